"""What the ranks of the transport's tests do; every function runs on all ranks and compares with plain arithmetic."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dseek.core.errors import ConfigError
from dseek.parallel.transport import GroupError, TransportGroup, reference

ReduceOp = dist.ReduceOp

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 20_003, 140_003)
"""One word, one block or some, and several blocks with a part of one at the end."""


def the_group() -> TransportGroup:
    """The default group, which must be the transport's."""
    group = dist.group.WORLD
    assert isinstance(group, TransportGroup)
    return group


def values(world_size: int, size: int, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    """What each rank holds; sums of it round differently in every order."""
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return [(torch.randn(size, generator=generator) * 3).to(dtype) for _ in range(world_size)]
    return [torch.randint(-100, 100, (size,), generator=generator).to(dtype) for _ in range(world_size)]


def same(x: torch.Tensor, wanted: torch.Tensor) -> None:
    """Hold a tensor to the bits of another."""
    torch.testing.assert_close(x, wanted, rtol=0, atol=0, equal_nan=True)


def reduce_everything(rank: int, world_size: int) -> str:
    """Reductions, bit for bit in the order of the ranks."""
    cases: list[tuple[torch.dtype, str]] = [(dtype, name) for dtype in FLOATS for name in ("sum", "avg")]
    cases += [(torch.float32, name) for name in ("product", "min", "max")]
    cases += [(torch.float64, "sum"), (torch.int64, "sum"), (torch.int8, "max"), (torch.int32, "bor")]
    cases += [(torch.bfloat16, "max"), (torch.uint8, "bxor")]
    for index, (dtype, name) in enumerate(cases):
        for size in SIZES if (dtype, name) in cases[:1] + cases[3:4] else SIZES[:2]:
            held = values(world_size, size, dtype, seed=index)
            if name in ("min", "max") and dtype.is_floating_point:
                held[-1][size // 2] = torch.nan
            wanted = reference.reduce(held, name)
            operation = getattr(ReduceOp, name.upper())
            x = held[rank].clone()
            dist.all_reduce(x, operation)
            same(x, wanted)
            x = held[rank].clone()
            dist.reduce(x, world_size - 1, operation)
            same(x, wanted if rank == world_size - 1 else held[rank])
            parts = values(world_size, size * world_size, dtype, seed=index + 50)
            out = torch.empty(size, dtype=dtype)
            dist.reduce_scatter_single(out, parts[rank].clone(), operation)
            same(out, reference.reduce(parts, name)[rank * size : (rank + 1) * size])
    return the_group().transport.name


def move_everything(rank: int, world_size: int) -> None:
    """All that copies."""
    for size in SIZES:
        mine = torch.arange(size) + rank * size
        everyone = torch.arange(world_size * size)
        gathered = torch.full((world_size * size,), -1)
        dist.all_gather_single(gathered, mine)
        same(gathered, everyone)
        listed = [torch.full((size,), -1) for _ in range(world_size)]
        dist.all_gather(listed, mine)
        same(torch.cat(listed), everyone)
        given = mine.clone()
        dist.broadcast(given, world_size - 1)
        same(given, torch.arange(size) + (world_size - 1) * size)
        exchanged = torch.full((world_size * size,), -1)
        dist.all_to_all_single(exchanged, everyone * (rank + 1))
        same(exchanged.view(world_size, -1), torch.stack([mine * (peer + 1) for peer in range(world_size)]))
        dist.gather(mine, listed if rank == 0 else None)
        if rank == 0:
            same(torch.cat(listed), everyone)
        scattered = torch.full((size,), -1)
        dist.scatter(scattered, list(everyone.view(world_size, -1)) if rank == 0 else None)
        same(scattered, mine)


def move_odd_things(rank: int, world_size: int) -> None:
    """Uneven sizes, layouts that are not contiguous, nothing at all, objects, lists at once, other dtypes."""
    uneven = [torch.full((peer * 50_000 + 1,), -1.0) for peer in range(world_size)]
    dist.all_gather(uneven, torch.full((rank * 50_000 + 1,), float(rank)))
    for peer, part in enumerate(uneven):
        same(part, torch.full((peer * 50_000 + 1,), float(peer)))
    sizes = [[(source + 2 * peer) % 3 * 7000 for peer in range(world_size)] for source in range(world_size)]
    source = torch.cat([torch.full((sizes[rank][peer], 2), rank * 10 + peer) for peer in range(world_size)])
    incoming = [sizes[peer][rank] for peer in range(world_size)]
    out = torch.full((sum(incoming), 2), -1)
    dist.all_to_all_single(out, source, incoming, sizes[rank])
    same(out, torch.cat([torch.full((size, 2), peer * 10 + rank) for peer, size in enumerate(incoming)]))
    parts = [torch.full((peer + 1,), float(rank + 1)) for peer in range(world_size)]
    own = torch.empty(rank + 1)
    dist.reduce_scatter(own, parts)
    same(own, torch.full((rank + 1,), world_size * (world_size + 1) / 2))

    across = torch.arange(12.0).reshape(3, 4).t() * (rank + 1)
    dist.all_reduce(across)
    same(across, torch.arange(12.0).reshape(3, 4).t() * (world_size * (world_size + 1) / 2))
    strided = torch.zeros(10)[::2]
    dist.broadcast(strided.add_(rank), 1)
    same(strided, torch.ones(5))
    for empty in (torch.empty(0), torch.empty(3, 0)):
        dist.all_reduce(empty)
        dist.broadcast(empty, 0)
    scalar = torch.tensor(2.0)
    dist.all_reduce(scalar)
    assert scalar.item() == 2.0 * world_size
    truth = torch.tensor([rank == 0, False, True])
    dist.all_reduce(truth, ReduceOp.MIN)
    assert truth.tolist() == [False, False, True]
    phasor = torch.tensor([1 + 2j, 3j])
    dist.all_reduce(phasor)
    same(phasor, torch.tensor([1 + 2j, 3j]) * world_size)

    negated = torch.tensor([1 + 2j, 3j]).conj().imag  # a view that PyTorch negates when it is read
    dist.all_reduce(negated)
    same(negated.resolve_neg(), torch.tensor([-2.0, -3.0]) * world_size)

    objects: list[Any] = [None] * world_size
    dist.all_gather_object(objects, {"rank": rank})
    assert objects == [{"rank": peer} for peer in range(world_size)]
    several = [torch.full((size,), float(rank)) for size in (3, 50_000)]
    with dist._coalescing_manager():
        for tensor in several:
            dist.all_reduce(tensor)
    same(torch.cat(several), torch.full((50_003,), world_size * (world_size - 1) / 2))
    for wrong in (
        lambda: dist.all_reduce(torch.ones(3, dtype=torch.int32), ReduceOp.AVG),
        lambda: dist.all_reduce(torch.ones(3), ReduceOp.BAND),
        lambda: dist.all_gather_single(torch.empty(3), torch.empty(2)),
        lambda: dist.all_to_all_single(torch.empty(4), torch.empty(4), [1] * world_size, [3] * world_size),
    ):
        with pytest.raises(ConfigError):
            wrong()


def send_messages(rank: int, world_size: int) -> None:
    """Messages that cross, that come in another order than they are asked for, from anybody, and of the wrong size."""
    after, before = (rank + 1) % world_size, (rank - 1) % world_size
    for size in (0, 5, 300_000):
        mine, theirs = torch.arange(size) + rank, torch.full((size,), -1)
        works = dist.batch_isend_irecv([dist.P2POp(dist.isend, mine, after), dist.P2POp(dist.irecv, theirs, before)])
        for work in works:
            work.wait()
        same(theirs, torch.arange(size) + before)
    # Two messages under different tags, received the other way round.
    sends = [dist.isend(torch.full((100_000,), float(tag)), after, tag=tag) for tag in (1, 2)]
    for tag in (2, 1):
        theirs = torch.empty(100_000)
        dist.recv(theirs, before, tag=tag)
        same(theirs, torch.full((100_000,), float(tag)))
    for send in sends:
        send.wait()
    if rank == 0:
        heard = set()
        for _ in range(world_size - 1):
            x = torch.empty(3)
            source = dist.recv(x)
            same(x, torch.full((3,), float(source)))
            heard.add(source)
        assert heard == set(range(1, world_size))
    else:
        dist.send(torch.full((3,), float(rank)), 0)
    # Everybody sends before anybody receives.
    for size in (3, 100_000):
        send = dist.isend(torch.ones(size), after, tag=9)
        with pytest.raises(GroupError, match=f"sent {4 * size} bytes with tag 9 where {4 * size + 4} were expected"):
            dist.recv(torch.empty(size + 1), before, tag=9)
        send.wait()
    # Parts of one tensor that overlap, on their way and into places that lie side by side, beside a collective.
    whole, places = torch.arange(200_000.0) + rank, torch.full((240_000,), -1.0)
    sends = [dist.isend(whole[:120_000], after, tag=3), dist.isend(whole[80_000:], after, tag=4)]
    total = whole[50_000:].clone()
    work = dist.all_reduce(total, async_op=True)
    dist.recv(places[120_000:], before, tag=4)
    dist.recv(places[:120_000], before, tag=3)
    for send in [*sends, work]:
        assert send is not None
        send.wait()
    expected = torch.arange(200_000.0) + before
    same(places, torch.cat([expected[:120_000], expected[80_000:]]))
    same(total, torch.arange(50_000.0, 200_000.0) * world_size + world_size * (world_size - 1) / 2)
    dist.barrier()


def count_writes(rank: int, world_size: int) -> list[int]:
    """Bytes of each write that a rank makes for its messages, of which all but the small one are written."""
    engine = the_group().transport._engine  # type: ignore[attr-defined]
    written, write_all = [], engine.write_all

    def counted(writes: dict[int, tuple[str, torch.Tensor, int]], deadline: float) -> None:
        written.extend(x.nbytes for _, x, _ in writes.values())
        write_all(writes, deadline)

    engine.write_all = counted
    for size in (50, 40_000, 70_000):
        if rank == 0:
            dist.send(torch.arange(float(size)), 1)
        else:
            x = torch.empty(size)
            dist.recv(x, 0)
            same(x, torch.arange(float(size)))
    return written


def overlap(rank: int, world_size: int) -> None:
    """Operations under way, futures, and groups of some ranks."""
    tensors = [torch.full((30_000,), float(rank + index)) for index in range(8)]
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    now = torch.ones(5)
    dist.all_reduce(now)
    same(now, torch.full((5,), float(world_size)))
    for index, (tensor, work) in enumerate(zip(tensors, works, strict=True)):
        assert work is not None
        future = work.get_future()
        assert future.wait()[0] is tensor or torch.equal(future.wait()[0], tensor)
        assert work.is_completed() and work.is_success() and work.wait()
        same(tensor, torch.full((30_000,), world_size * index + world_size * (world_size - 1) / 2))
    first, last = dist.new_group([0, 1]), dist.new_group(list(range(1, world_size)))
    for group, members in ((first, [0, 1]), (last, list(range(1, world_size)))):
        if rank in members:
            x = torch.full((70_000,), float(rank))
            dist.all_reduce(x, group=group)
            same(x, torch.full((70_000,), float(sum(members))))
    dist.barrier()
    shared = the_group().empty_shared(150_001)
    for turn in range(2):
        shared.fill_(rank + turn)
        dist.all_reduce(shared, ReduceOp.SUM)
        same(shared, torch.full((150_001,), float(sum(range(world_size)) + turn * world_size)))
    shared.fill_(rank)
    private = torch.full((150_001,), -1.0)
    dist.broadcast(shared if rank == 1 else private, 1)
    same(shared if rank == 1 else private, torch.full((150_001,), 1.0))
    # Both mapped: the giver and the takers copy; in three parts and a rest where there are three ranks.
    theirs = the_group().empty_shared(150_001)
    for source in (shared, theirs):
        shared.fill_(rank)
        theirs.copy_(torch.arange(150_001.0) * (rank + 2))
        given = source if rank == 1 else (theirs if source is shared else shared)
        expected = torch.full_like(shared, 1.0) if source is shared else torch.arange(150_001.0) * 3
        dist.broadcast(given, 1)
        same(given, expected)
        dist.barrier()
    parts = the_group().empty_shared(world_size, 100_000)
    parts.copy_(torch.arange(world_size)[:, None].expand_as(parts) + rank)
    out = torch.empty(100_000)
    dist.reduce_scatter_single(out, parts)
    same(out, torch.full((100_000,), float(rank * world_size + sum(range(world_size)))))
    gathered = torch.empty(world_size, 100_000)
    dist.all_gather_single(gathered, parts[rank])
    same(gathered, torch.arange(0, 2 * world_size, 2.0)[:, None].expand_as(gathered).contiguous())


def hand_over(rank: int, world_size: int) -> None:
    """A tensor that a rank gives to the others, where it lies and where it cannot be read there."""
    mine = the_group().empty_shared(3, 50_001, dtype=torch.bfloat16)
    mine.fill_(rank)
    for root in range(world_size):
        given = the_group().hand_over(mine[1:], root)
        same(given, torch.full((2, 50_001), float(root), dtype=torch.bfloat16))
        is_theirs = the_group().transport.name == "shared memory" and rank != root
        assert (given.data_ptr() != mine[1:].data_ptr()) == is_theirs
        dist.barrier()
        mine.fill_(rank + 0.5)
        dist.barrier()
        now = (root if is_theirs else rank) + 0.5
        same(given, torch.full((2, 50_001), now, dtype=torch.bfloat16))
        dist.barrier()
        mine.fill_(rank)
        dist.barrier()
    ordinary = torch.full((50_001,), float(rank))
    filled = the_group().hand_over(ordinary, 1)
    assert filled is ordinary
    same(ordinary, torch.full((50_001,), 1.0))
    with pytest.raises(ConfigError, match="a contiguous one"):
        the_group().hand_over(torch.empty(4, 4).T, 0)


def do_everything(rank: int, world_size: int) -> str:
    """All operations, one after the other in one group."""
    name = reduce_everything(rank, world_size)
    for scenario in (move_everything, move_odd_things, send_messages, overlap, hand_over):
        scenario(rank, world_size)
        dist.barrier()
    return name


def do_a_little(rank: int, world_size: int) -> None:
    """One of each kind, for groups of any size."""
    for size in (3, 70_001):
        held = values(world_size, size, torch.float32)
        x = held[rank].clone()
        dist.all_reduce(x)
        same(x, reference.reduce(held, "sum"))
        gathered = torch.full((world_size, size), -1.0)
        dist.all_gather_single(gathered, held[rank])
        same(gathered, torch.stack(held))
        out = torch.empty(size)
        dist.reduce_scatter_single(out, gathered * (rank + 1), ReduceOp.MAX)
        same(out, torch.maximum(held[rank], held[rank] * world_size))
        dist.all_to_all_single(gathered, torch.stack(held) * 2)
        same(gathered, held[rank].expand(world_size, size) * 2)
        dist.broadcast(x, world_size - 1)
    if world_size > 1:
        theirs = torch.empty(100_000)
        send = dist.isend(torch.full((100_000,), float(rank)), (rank + 1) % world_size)
        dist.recv(theirs, (rank - 1) % world_size)
        send.wait()
        same(theirs, torch.full((100_000,), float((rank - 1) % world_size)))


def do_without_kernels(rank: int, world_size: int) -> None:
    """Ask for shared memory where there are no kernels."""
    os.environ["DSEEK_KERNELS"], os.environ["DSEEK_TRANSPORT"] = "torch", "shared_memory"
    dist.new_group([0, 1], backend="dseek")


def do_without_an_engine(rank: int, world_size: int) -> None:
    """Ask for Mooncake's engine where one rank has what stands for it and the other nothing."""
    sys.path[:0] = [] if rank else [str(Path(__file__).parent / "engine_double")]
    sys.modules.update({"mooncake.engine": None} if rank else {})  # type: ignore[dict-item]
    os.environ["DSEEK_TRANSPORT"] = "mooncake"
    dist.new_group(backend="dseek")


def train_in_every_way(rank: int, world_size: int, folder: str) -> None:
    """DDP, FSDP2, tensor parallelism and DCP run unchanged, and compute what one process does."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    def model() -> nn.Sequential:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 6))

    batch = torch.randn(4 * world_size, 12, generator=torch.Generator().manual_seed(5))

    def step(module: nn.Module, x: torch.Tensor) -> None:
        optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(2):
            optimiser.zero_grad()
            module(x).square().mean().backward()
            optimiser.step()

    plain = model()
    step(plain, batch)
    wanted = plain.state_dict()
    mine = batch.chunk(world_size)[rank]

    replicated = nn.parallel.DistributedDataParallel(model())
    step(replicated, mine)
    torch.testing.assert_close(dict(replicated.module.state_dict()), dict(wanted))

    sharded = model()
    for layer in (sharded[0], sharded[2]):
        fully_shard(layer)
    fully_shard(sharded)
    step(sharded, mine)
    full = {name: x.full_tensor() for name, x in sharded.state_dict().items() if isinstance(x, DTensor)}
    torch.testing.assert_close(full, dict(wanted))

    mesh = init_device_mesh("cpu", (world_size,))
    parallel = parallelize_module(model(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    step(parallel, batch)
    full = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in parallel.state_dict().items()}
    torch.testing.assert_close(full, dict(wanted))

    state = get_model_state_dict(sharded)
    checkpoint.save(state, checkpoint_id=Path(folder) / "sync")
    checkpoint.async_save(state, checkpoint_id=Path(folder) / "async").result()
    for name in ("sync", "async"):
        again = model()
        fully_shard(again)
        loaded = get_model_state_dict(again)
        checkpoint.load(loaded, checkpoint_id=Path(folder) / name)
        set_model_state_dict(again, loaded)
        full = {key: x.full_tensor() for key, x in again.state_dict().items() if isinstance(x, DTensor)}
        torch.testing.assert_close(full, dict(wanted))
