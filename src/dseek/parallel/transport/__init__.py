"""`torch.distributed.init_process_group("dseek")`: a process group that moves tensors between processes of one host
through shared memory, and between hosts by RDMA where there is some, else over TCP.

Importing this module registers the backend; DDP, FSDP2, tensor parallelism and distributed checkpoints run on it as
they do on gloo. Every reduction takes the ranks in their order, rank 0 first, so a result is the same bits each time,
on every rank and by any transport. A peer that dies is an error, not a hang.

It holds tensors of the CPU only; for CUDA take nccl.
"""

from dseek.parallel.transport.group import TransportGroup
from dseek.parallel.transport.registration import register
from dseek.parallel.transport.staging import BACKEND_NAME
from dseek.parallel.transport.work import GroupError

register()

__all__ = ["BACKEND_NAME", "GroupError", "TransportGroup", "register"]
