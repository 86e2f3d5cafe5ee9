"""The measured claims of dseek, one row each, run beside the peers they are measured against.

`python -m benchmarks list` names the rows; see `benchmarks/README.md` for what a row is and how to add one.
"""
