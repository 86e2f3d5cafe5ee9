"""Linear layers over packed weights: formats, packing, product, and the PyTorch twin of each.

`packing` turns weights as they lie in a file into a blob; `dispatch` multiplies by one; `reference` says in plain
PyTorch what both must give.
"""
