"""The process group `dseek`: every operation against plain arithmetic, over every transport."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dseek.core.errors import ConfigError
from dseek.parallel.transport import mooncake, native, reference
from dseek.parallel.transport.meeting import Presence, host_id, one_sided_protocol
from tests.parallel import transport_scenarios as scenarios
from tests.parallel import transport_troubles as troubles
from tests.parallel.distributed import RankError, run_ranks

TRANSPORTS = [
    pytest.param("dseek", marks=pytest.mark.native),
    "dseek:tcp",
    "dseek:double",
    pytest.param("dseek:mooncake", marks=pytest.mark.mooncake),
]
NAMES = {
    "dseek": "shared memory",
    "dseek:tcp": "TCP",
    "dseek:double": "Mooncake over TCP",
    "dseek:mooncake": "Mooncake over TCP",
}


@pytest.mark.parametrize("backend", TRANSPORTS)
def test_every_operation_gives_the_bits_of_the_reference(backend: str) -> None:
    assert set(run_ranks(3, scenarios.do_everything, backend=backend)) == {NAMES[backend]}


@pytest.mark.native
@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_few_and_many_ranks(world_size: int) -> None:
    run_ranks(world_size, scenarios.do_a_little, backend="dseek")


@pytest.mark.parametrize("backend", TRANSPORTS)
def test_ranks_that_call_different_things_are_told(backend: str) -> None:
    first, second = run_ranks(2, troubles.disagree, backend=backend)
    for message, own, other in ((first, 0, 1), (second, 1, 0)):
        assert "all_reduce number 1" in message and f"rank {other}" in message, own
        assert "12" in message and "16" in message


@pytest.mark.parametrize("backend", TRANSPORTS)
@pytest.mark.parametrize("how", ["killed", "left"])
def test_a_peer_that_goes_is_an_error_within_seconds(backend: str, how: str) -> None:
    before = _leftovers()
    *survivors, _ = run_ranks(3, troubles.lose_a_peer, how, backend=backend, may_die=(2,))
    for message, waited_s in survivors:
        assert waited_s < 10
        assert "rank 2" in message or "gave up" in message or "rank 1 died or left" in message
    assert any("rank 2" in message for message, _ in survivors)
    assert _leftovers() == before


def _leftovers() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if "dseek" in name}


@pytest.mark.parametrize("backend", TRANSPORTS)
def test_a_silent_peer_is_waited_for_as_long_as_was_said(backend: str) -> None:
    message, _ = run_ranks(2, troubles.wait_for_the_silent, backend=backend)
    assert "did not" in message


@pytest.mark.parametrize("backend", TRANSPORTS)
def test_destroying_a_group_does_not_wait_for_its_operations(backend: str) -> None:
    assert max(run_ranks(2, troubles.leave_something_undone, backend=backend)) < 60


@pytest.mark.parametrize("backend", TRANSPORTS)
def test_a_message_that_nobody_took_fails_when_its_receiver_leaves(backend: str) -> None:
    message, _ = run_ranks(2, troubles.offer_in_vain, backend=backend)
    assert "rank 1" in message


@pytest.mark.parametrize("backend", TRANSPORTS[2:])
def test_large_messages_are_written_where_their_receiver_wants_them(backend: str) -> None:
    assert run_ranks(2, scenarios.count_writes, backend=backend) == [[160_000, 280_000], []]


@pytest.mark.native
def test_ctrl_c_ends_a_wait() -> None:
    assert run_ranks(2, troubles.interrupt, backend="dseek") == [True, True]


@pytest.mark.parametrize("backend", [TRANSPORTS[0], TRANSPORTS[3]])
def test_ddp_fsdp_tensor_parallel_and_dcp_run_unchanged(backend: str, tmp_path: Path) -> None:
    run_ranks(2, scenarios.train_in_every_way, str(tmp_path), backend=backend)


def test_shared_memory_that_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSEEK_KERNELS", "torch")
    with pytest.raises(RankError, match="DSEEK_TRANSPORT is shared_memory, but a rank has no native kernels"):
        run_ranks(2, scenarios.do_without_kernels, backend="gloo")


def test_an_engine_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mooncake.engine", None)  # type: ignore[arg-type]
    assert not mooncake.is_installed()
    with pytest.raises(ConfigError, match=r"cannot be loaded.*mooncake-transfer-engine-non-cuda.*DSEEK_TRANSPORT"):
        mooncake.Mooncake("127.0.0.1", "tcp")
    with pytest.raises(RankError, match=r"DSEEK_TRANSPORT is mooncake, but the ranks \[1\] cannot load"):
        run_ranks(2, scenarios.do_without_an_engine, backend="gloo")


@pytest.mark.parametrize(
    ("wanted", "rdma", "engine", "protocol"),
    [
        ("auto", (True, True), (True, True), "rdma"),
        ("auto", (True, False), (True, False), ""),
        ("auto", (True, True), (True, False), ""),
        ("mooncake", (True, True), (True, True), "rdma"),
        ("mooncake", (True, False), (True, True), "tcp"),
        ("tcp", (True, True), (False, False), ""),
    ],
)
def test_memory_is_written_to_where_all_ranks_can(
    wanted: str, rdma: tuple[bool, bool], engine: tuple[bool, bool], protocol: str
) -> None:
    ranks = [
        Presence(
            host=f"h{rank}",
            pid=1,
            has_kernels=True,
            wanted=wanted,
            has_rdma=rdma[rank],
            has_engine=engine[rank],
            address="10.0.0.1",
            port=1,
        )
        for rank in range(2)
    ]
    assert one_sided_protocol(ranks) == protocol


def test_a_host_is_the_same_for_its_processes() -> None:
    assert host_id() == host_id() and str(os.getuid()) in host_id()


def _kernel(variant: str, sources: list[torch.Tensor], reduction: str, out: torch.Tensor) -> torch.Tensor:
    module = native.module()
    assert module is not None
    before = module.variant()
    module.set_variant(variant)
    try:
        module.reduce(
            native.ELEMENTS[out.dtype],
            native.REDUCTIONS[reduction],
            [source.data_ptr() for source in sources],
            out.data_ptr(),
            out.numel(),
        )
    finally:
        module.set_variant(before)
    return out


def _variants() -> list[str]:
    module = native.module()
    return [] if module is None else list(module.variants())


@pytest.mark.native
@pytest.mark.parametrize("variant", _variants() or ["generic"])
@pytest.mark.parametrize("dtype", list(native.ELEMENTS), ids=str)
def test_every_variant_reduces_as_the_reference_does(variant: str, dtype: torch.dtype) -> None:
    names = [name for name in native.REDUCTIONS if dtype.is_floating_point or name != "avg"]
    for name in names:
        if dtype.is_floating_point and name in ("band", "bor", "bxor"):
            continue
        for num_ranks, size in ((1, 5), (5, 1031)):
            # An element beyond the first, so that nothing is aligned to more than its own size.
            sources = [x[1:] for x in scenarios.values(num_ranks, size + 1, dtype, seed=size)]
            if dtype.is_floating_point:
                sources[-1][0], sources[0][1] = torch.nan, torch.inf
            poison = torch.nan if dtype.is_floating_point else 77
            out = torch.full((size + 2,), poison, dtype=dtype)
            _kernel(variant, sources, name, out[1 : size + 1])
            scenarios.same(out[1 : size + 1], reference.reduce(sources, name))
            assert torch.equal(
                out[[0, -1]].isnan() if dtype.is_floating_point else out[[0, -1]] == 77, torch.ones(2) > 0
            )
            in_place = _kernel(variant, sources, name, sources[-1])
            scenarios.same(in_place, out[1 : size + 1])


@pytest.mark.native
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((9, 0, [0], 0, 0), "element type"),
        ((0, 8, [0], 0, 0), "reduction"),
        ((0, 5, [0], 0, 0), "no such reduction"),
        ((4, 1, [0], 0, 0), "no such reduction"),
        ((0, 0, [], 0, 0), "sources"),
    ],
)
def test_kernels_refuse_what_they_do_not_know(arguments: tuple[Any, ...], message: str) -> None:
    module = native.module()
    assert module is not None
    with pytest.raises(ValueError, match=message):
        module.reduce(*arguments)


@pytest.mark.native
def test_a_segment_refuses_a_file_that_is_none(tmp_path: Path) -> None:
    module = native.module()
    assert module is not None
    num_bytes = module.segment_bytes(2, 16 << 10)
    path = tmp_path / "file"
    for content, message in ((b"short", "another size"), (bytes(num_bytes), "not the one")):
        path.write_bytes(content)
        with path.open("r+b") as file, pytest.raises(RuntimeError, match=message):
            module.Segment(file.fileno(), 1, 2, 16 << 10, 5, [-1, -1])
    for world_size, slot_bytes in ((0, 16 << 10), (65, 16 << 10), (2, 100), (2, (16 << 10) + 1)):
        with pytest.raises(ValueError, match=r"segment has|slot has"):
            module.segment_bytes(world_size, slot_bytes)


@pytest.mark.parametrize(
    ("x", "operation"),
    [
        (torch.ones(2, dtype=torch.int8), torch.distributed.ReduceOp.AVG),
        (torch.ones(2), torch.distributed.ReduceOp.BOR),
        (torch.ones(2, dtype=torch.bool), torch.distributed.ReduceOp.AVG),
        (torch.ones(2, dtype=torch.complex64), torch.distributed.ReduceOp.MAX),
        (torch.ones(2, dtype=torch.uint16), torch.distributed.ReduceOp.SUM),
    ],
)
def test_reductions_that_mean_nothing_are_refused(x: torch.Tensor, operation: Any) -> None:
    with pytest.raises(ConfigError):
        native.reducible(x, operation)
