"""One long sequence on several processes: which blocks each rank holds, and causal attention over all of them.

`sharding` and `strategy` decide, in plain data and without PyTorch; `ContextParallel` (`context_parallel.py`) computes,
over the ranks of a `torch.distributed` group. The operator itself is handed in by the caller: this room knows
positions, owners and messages, not kernels.
"""

from dseek.parallel.sharding import BlockAssignment, balanced_assignment, dynamic_sharding
from dseek.parallel.strategy import AttentionWork, Link, ShardStrategy, assign_blocks, choose_strategy

__all__ = [
    "AttentionWork",
    "BlockAssignment",
    "Link",
    "ShardStrategy",
    "assign_blocks",
    "balanced_assignment",
    "choose_strategy",
    "dynamic_sharding",
]
