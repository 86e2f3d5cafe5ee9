"""Where time goes: hot operators beside the machine's roofline, for native runs and PyTorch code, and what would help.

`profile` takes a callable or is a context manager; `dseek profile` and `deepseek-profiler` are its command lines.
Nothing else of dseek imports this room: it listens to events (`dseek.core.events`).
"""

from dseek.profiler.records import Advice, OperatorRecord, Profile
from dseek.profiler.session import ProfileSession, profile

__all__ = ["Advice", "OperatorRecord", "Profile", "ProfileSession", "profile"]
