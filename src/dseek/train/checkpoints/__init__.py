"""Checkpoints that do not stop the training: snapshots in memory, incremental backups, an atomic commit.

`CheckpointWriter.save` copies a state aside and writes it in a thread; `newest` finds the newest checkpoint that is
whole, and `Checkpoint.load_into` reads it on as many ranks as there are now. Files are JSON and raw chunks, no pickle.
"""

from dseek.train.checkpoints.reading import Checkpoint, complete_steps, newest
from dseek.train.checkpoints.store import CheckpointConfig, CheckpointError, CheckpointWriter, Pending

__all__ = [
    "Checkpoint",
    "CheckpointConfig",
    "CheckpointError",
    "CheckpointWriter",
    "Pending",
    "complete_steps",
    "newest",
]
