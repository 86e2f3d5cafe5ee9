"""Checkpoints: what is restored is what was saved, bit for bit, and whatever happens the newest whole one is found."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dseek.core.errors import ConfigError, FileFormatError
from dseek.train.checkpoints import (
    Checkpoint,
    CheckpointConfig,
    CheckpointError,
    CheckpointWriter,
    chunks,
    collecting,
    complete_steps,
    newest,
    reading,
    snapshot,
    store,
)
from dseek.train.checkpoints.files import Fault, Files, InjectedCrash
from tests.parallel.distributed import run_ranks


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks without much data."""
    for module in ("chunks", "manifest", "reading", "store"):
        monkeypatch.setattr(f"dseek.train.checkpoints.{module}.MAX_CHUNK_BYTES", 1024)


def trained(step: int, *, num_changed: int = 1) -> dict[str, Any]:
    """A state as a training has it; between steps a few tensors change."""
    generator = torch.Generator().manual_seed(1)
    weights = {f"layer.{index}": torch.randn(40, 20, generator=generator) for index in range(4)}
    for index in range(num_changed):
        weights[f"layer.{index}"] += step
    return {
        "model": weights,
        "optimizer": {
            "state": {
                0: {"step": torch.tensor(float(step)), "exp_avg": torch.randn(7, generator=generator).bfloat16()}
            },
            "param_groups": [{"lr": 1e-3 * step, "betas": (0.9, 0.999), "params": [0, 1], "fused": None}],
        },
        "data": {"file": "texts/ä.txt", "offset": 10**15 + step, "is_end": False},
        "rng": torch.get_rng_state(),
        "empty": torch.empty(0, 3),
        "nan": float("nan"),
    }


def same_state(found: Any, wanted: Any) -> None:
    """Hold a nest to the bits, types and key types of another."""
    assert type(found) is type(wanted)
    if isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for key in wanted:
            same_state(found[key], wanted[key])
    elif isinstance(wanted, (list, tuple)):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            same_state(one, other)
    elif isinstance(wanted, torch.Tensor):
        assert found.dtype == wanted.dtype and found.shape == wanted.shape
        assert found.contiguous().view(-1).view(torch.uint8).equal(wanted.contiguous().view(-1).view(torch.uint8))
    else:
        assert found == wanted or (found != found and wanted != wanted)


def write(folder: Path, *steps: int, remote: Path | None = None, keep_last: int = 3, **options: Any) -> list[int]:
    """Save steps one after the other; the bytes that were new in each."""
    writer = CheckpointWriter(CheckpointConfig(folder=folder, remote=remote, keep_last=keep_last, **options))
    new_bytes = []
    for step in steps:
        pending = writer.save(step, trained(step), private={"rng": [step]})
        pending.wait()
        new_bytes.append(pending.new_bytes)
    writer.close()
    return new_bytes


def the_newest(folder: Path, remote: Path | None = None) -> Checkpoint:
    """The newest whole checkpoint, which must be there."""
    found = newest(folder, remote)
    assert found is not None
    return found


@pytest.mark.parametrize("compress", [True, False])
def test_what_is_restored_is_what_was_saved(tmp_path: Path, compress: bool) -> None:
    write(tmp_path, 1, 2, compress=compress)
    checkpoint = the_newest(tmp_path)
    assert checkpoint.step == 2
    same_state(checkpoint.state(), trained(2))
    assert checkpoint.private(0) == {"rng": [2]}
    target = trained(5)
    state = checkpoint.load_into(target)
    assert state["model"]["layer.0"] is target["model"]["layer.0"]
    same_state(state, trained(2))


def test_only_what_changed_is_written(tmp_path: Path) -> None:
    first, second = write(tmp_path, 1, 2, compress=False)
    changed = 40 * 20 * 4 + 4
    assert first > 4 * 40 * 20 * 4
    assert changed <= second < changed + 16 * 20
    before = len(chunk_names(tmp_path))
    assert write(tmp_path, 2) == [0]
    assert len(chunk_names(tmp_path)) == before


def chunk_names(folder: Path) -> set[str]:
    """Names of all chunks of a folder."""
    return chunks.ChunkStore(folder / "chunks", Files()).digests()


def test_a_snapshot_does_not_change_with_the_state(tmp_path: Path) -> None:
    writer = CheckpointWriter(CheckpointConfig(folder=tmp_path))
    state = trained(3)
    pendings = []
    for step in (3, 4, 5):
        state["model"]["layer.1"].fill_(step)
        pendings.append(writer.save(step, state))
        state["model"]["layer.1"].fill_(-1)
    writer.close()
    for pending in pendings:
        pending.wait(0)
        assert pending.stall_s >= 0
        found = Checkpoint(tmp_path, pending.step).state()
        assert found["model"]["layer.1"].eq(pending.step).all()


def test_two_buffers_are_reused() -> None:
    buffers = snapshot.SnapshotBuffers()
    taken = [buffers.take(trained(1), None, 0, 1) for _ in range(2)]
    places = {one.buffer.data_ptr() for one in taken}
    for one in taken:
        buffers.give_back(one)
    assert {buffers.take(trained(2), None, 0, 1).buffer.data_ptr() for _ in range(2)} == places


def test_what_is_kept(tmp_path: Path) -> None:
    write(tmp_path, *range(1, 9), keep_last=2, keep_every=3)
    assert complete_steps(tmp_path) == [3, 6, 7, 8]
    named = {
        digest
        for step in complete_steps(tmp_path)
        for part in Checkpoint(tmp_path, step).parts
        for digest in part.chunks
    }
    assert chunk_names(tmp_path) == named
    for step in complete_steps(tmp_path):
        same_state(Checkpoint(tmp_path, step).state(), trained(step))


def test_nobody_deletes_while_somebody_writes(tmp_path: Path) -> None:
    write(tmp_path, 1)
    orphan = tmp_path / "chunks" / "ab" / ("ab" * 32)
    orphan.parent.mkdir(exist_ok=True)
    orphan.write_bytes(b"x" * 50)
    with store.locked(tmp_path, alone=False):
        assert collecting.collect(tmp_path, Files()) == 0
    assert collecting.collect(tmp_path, Files()) == 50
    assert not orphan.exists() and newest(tmp_path) is not None


def test_the_second_folder_stands_in(tmp_path: Path) -> None:
    near, far = tmp_path / "near", tmp_path / "far"
    write(near, 1, 2, remote=far)
    assert complete_steps(far) == [1, 2]
    victim = next(iter(Checkpoint(near, 2).parts[0].chunks))
    chunks.ChunkStore(near / "chunks", Files()).path(victim).write_bytes(b"torn")
    with pytest.raises(FileFormatError, match="cut short"):
        Checkpoint(near, 2).verify()
    same_state(the_newest(near, far).state(), trained(2))
    shutil.rmtree(near)
    same_state(the_newest(near, far).state(), trained(2))


def _damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "flip":
        content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content[: len(content) // 2]) if how == "cut" else bytes(content))
    if how == "gone":
        path.unlink()


@pytest.mark.parametrize("how", ["flip", "cut", "gone"])
@pytest.mark.parametrize("what", ["manifest.json", "part-0000.json", "chunk"])
def test_damage_is_found_and_the_one_before_is_taken(tmp_path: Path, what: str, how: str) -> None:
    write(tmp_path, 1, 2)
    chunk = (set(Checkpoint(tmp_path, 2).parts[0].chunks) - set(Checkpoint(tmp_path, 1).parts[0].chunks)).pop()
    path = (
        chunks.ChunkStore(tmp_path / "chunks", Files()).path(chunk)
        if what == "chunk"
        else reading.step_folder(tmp_path, 2) / what
    )
    _damage(path, how)
    if not (what == "manifest.json" and how == "flip"):  # a flipped digit of its time of day is no damage to the state
        same_state(the_newest(tmp_path).state(), trained(1))
    # Writing the step again repairs it.
    write(tmp_path, 2)
    same_state(the_newest(tmp_path).state(), trained(2))


@given(st.integers(0, 110), st.sampled_from(["kill", "torn", "full"]), st.integers(0, 2))
@settings(max_examples=50, deadline=None)
def test_whatever_happens_the_newest_whole_one_is_found(at: int, kind: Any, num_before: int) -> None:
    # In memory, where there is such a place: flushing some thousand files to a disk takes its time.
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        folder = Path(name)
        if num_before:
            write(folder, *range(1, num_before + 1), keep_last=1)
        files = Files(Fault(at=at, kind=kind))
        writer = CheckpointWriter(CheckpointConfig(folder=folder, keep_last=1), files=files)
        survived = num_before
        for step in (num_before + 1, num_before + 2):
            pending = writer.save(step, trained(step))
            try:
                pending.wait()
                survived = step
            except CheckpointError:
                assert kind == "full"  # and the training goes on
            except InjectedCrash:
                break
        writer.close()
        found = newest(folder)
        if found is None:
            assert survived == 0
            return
        # A step whose manifest was renamed before the crash counts too, though nobody was told.
        assert survived <= found.step <= num_before + 2
        same_state(found.state(), trained(found.step))
        write(folder, num_before + 3, keep_last=1)
        same_state(the_newest(folder).state(), trained(num_before + 3))
        assert complete_steps(folder)[-1] == num_before + 3


def test_every_operation_of_a_save_can_fail(tmp_path: Path) -> None:
    """The crash points above reach beyond the last operation of both saves."""
    files = Files()
    writer = CheckpointWriter(CheckpointConfig(folder=tmp_path, keep_last=1), files=files)
    for step in (1, 2):
        writer.save(step, trained(step)).wait()
    writer.close()
    assert 20 < files.num_operations


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": object()}, "holds a object"),
        ({"a": {1.5: 2}}, "key 1.5"),
        ({"a": np.zeros(2)}, "holds a ndarray"),
        ({"a": torch.zeros(2, dtype=torch.uint16)}, "uint16"),
    ],
)
def test_what_cannot_be_saved_is_said_at_once(tmp_path: Path, state: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CheckpointWriter(CheckpointConfig(folder=tmp_path)).save(1, state)


def test_another_shape_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 1)
    other = trained(1)
    other["model"]["layer.2"] = torch.zeros(20, 40)
    with pytest.raises(FileFormatError, match=r"saved as \[40, 20\]"):
        the_newest(tmp_path).load_into(other)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one checkpoint."""
    folder = tmp_path_factory.mktemp("written")
    write(folder, 1)
    return folder


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_hostile_manifests_are_refused_or_read(written: Path, data: st.DataObject) -> None:
    """Any field of any file replaced by anything: an error that says so, or a state of the same kind."""
    path = reading.step_folder(written, 1) / data.draw(st.sampled_from(["manifest.json", "part-0000.json"]))
    original = path.read_bytes()
    fields = json.loads(original)
    place: Any = fields
    for _ in range(data.draw(st.integers(0, 5))):
        inner = list(place.items() if isinstance(place, dict) else enumerate(place))
        inner = [(key, value) for key, value in inner if isinstance(value, (dict, list)) and value]
        if not inner:
            break
        place = data.draw(st.sampled_from([value for _, value in inner]))
    key = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else list(range(len(place)))))
    place[key] = data.draw(JSON)
    try:
        path.write_text(json.dumps(fields))
        with contextlib.suppress(FileFormatError):  # any other error fails the test
            if path.name == "manifest.json":
                reading.read_manifest(path)
                Checkpoint(written, 1).state()
            else:
                reading.read_part(path)
    finally:
        path.write_bytes(original)


@given(st.binary(max_size=200), st.integers(0, 2000))
def test_hostile_chunks_are_refused(content: bytes, num_bytes: int) -> None:
    for stored in (content, b"DSKC\x01\x01\x04\x00" + content, chunks.encode(memoryview(content), 1, compress=True)):
        with contextlib.suppress(FileFormatError):  # any other error fails the test
            assert len(chunks.decode(stored, num_bytes, "name")) == num_bytes


def test_compression_pays_where_it_pays() -> None:
    bits = torch.randint(0, 256, (1024,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert not chunks.saves_enough(memoryview(bits.numpy()), 1)
    near_one = (torch.rand(256, generator=torch.Generator().manual_seed(0)) + 1).numpy()
    content = memoryview(near_one).cast("B")
    assert chunks.saves_enough(content, 4)
    stored = chunks.encode(content, 4, compress=True)
    assert chunks.decode(stored, len(content), "name") == bytes(content)


def _save_sharded(rank: int, world_size: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world_size,))
    whole = {name: torch.arange(35.0).reshape(7, 5) + index for index, name in enumerate("abc")}
    state = {
        "a": distribute_tensor(whole["a"], mesh, [Shard(0)]),
        "b": distribute_tensor(whole["b"], mesh, [Shard(1)]),
        "c": distribute_tensor(whole["c"], mesh, [Replicate()]),
        "plain": torch.arange(5),
        "step": 7,
    }
    path = Path(folder)
    if not complete_steps(path):
        writer = CheckpointWriter(CheckpointConfig(folder=path), rank=rank, world_size=world_size, run="first")
        writer.save(7, state, private={"rank": rank, "noise": torch.full((3,), rank)}).wait()
        writer.close()
        return
    for value in state.values():
        if isinstance(value, torch.Tensor):
            (value.to_local() if hasattr(value, "to_local") else value).fill_(-1)
    checkpoint = newest(path)
    assert checkpoint is not None
    found = checkpoint.load_into(state)
    for name, wanted in whole.items():
        assert torch.equal(found[name].full_tensor(), wanted), name
    assert torch.equal(found["plain"], torch.arange(5)) and found["step"] == 7
    assert [checkpoint.private(saver)["rank"] for saver in range(len(checkpoint.parts))] == [0, 1, 2]
    assert checkpoint.private(2)["noise"].tolist() == [2, 2, 2]


def test_a_state_is_read_by_another_number_of_ranks(tmp_path: Path) -> None:
    run_ranks(3, _save_sharded, str(tmp_path))
    run_ranks(2, _save_sharded, str(tmp_path))
    whole = the_newest(tmp_path).state()
    assert torch.equal(whole["b"], torch.arange(35.0).reshape(7, 5) + 1)


def test_ranks_that_do_not_write_are_told_of(tmp_path: Path) -> None:
    config = CheckpointConfig(folder=tmp_path, peers_timeout_s=0.05)
    writer = CheckpointWriter(config, rank=0, world_size=2, run="alone")
    with pytest.raises(CheckpointError, match="rank 1 did not write its part"):
        writer.save(1, trained(1)).wait()
    writer.close()
    assert newest(tmp_path) is None
    with pytest.raises(ConfigError, match="run id"):
        CheckpointWriter(config, rank=0, world_size=2)
