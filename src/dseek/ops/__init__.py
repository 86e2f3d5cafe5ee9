"""The operators: each has a `reference.py` (plain PyTorch, the oracle and the fallback) and, in `csrc/`, its kernels.

Importing the room imports neither PyTorch nor the kernels.
"""
