"""One decoder block as a single operator: norm, projections, rotation, attention, gated MLP.

The engine runs all blocks of a model in one native call; `dispatch` is the same code for one block and one sequence, so
that it can be tested, traced and used on its own. `reference` is its twin.
"""
