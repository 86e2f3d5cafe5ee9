"""Mutated weight files: each opens, or ends in one of two errors; no crash, no hang, no memory grab.

Every mutation is drawn from a fixed seed, so a failure names the number that repeats it. While a file is opened the
address space may grow by 1 GiB only: a length that was believed would end in MemoryError.
"""

from __future__ import annotations

import json
import random
import resource
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dseek.core.errors import FileFormatError, UnsupportedModelError
from dseek.models.encoding import to_float32
from dseek.models.files import ModelFiles
from dseek.models.folder_files import FolderFiles
from dseek.models.gguf_files import GgufFiles
from tests.models import gguf_building, tiny

NUM_MUTATIONS = 4000
HEADROOM_BYTES = 1 << 30
LONGEST_S = 5.0

NUMBERS = [0, 1, 2, 7, 31, 33, 255, 256, 65_535, 65_536, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32]
NUMBERS += [1 << 40, (1 << 62) + 3, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]


def mutate(data: bytes, rng: random.Random, header_bytes: int) -> bytes:
    """Damage a file in one to four ways, mostly in its header.

    Args:
        data: the file.
        rng: decides.
        header_bytes: length of the part that is worth damaging.

    Returns:
        The damaged file.
    """
    damaged = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        end = max(1, min(len(damaged), header_bytes if rng.random() < 0.9 else len(data)))
        place = rng.randrange(end)
        kind = rng.randrange(8)
        if kind == 0:
            damaged[place : place + 1] = bytes([rng.randrange(256)])
        elif kind == 1 and damaged:
            damaged[min(place, len(damaged) - 1)] ^= 1 << rng.randrange(8)
        elif kind == 2:
            damaged[place : place + 8] = struct.pack("<Q", rng.choice(NUMBERS))
        elif kind == 3:
            damaged[place : place + 4] = struct.pack("<I", rng.choice(NUMBERS) & 0xFFFF_FFFF)
        elif kind == 4:
            del damaged[place : place + rng.choice([1, 4, 8, 64, 1000])]
        elif kind == 5:
            damaged[place:place] = rng.randbytes(rng.choice([1, 4, 8, 64]))
        elif kind == 6:
            other = rng.randrange(end)
            length = rng.choice([1, 8, 40])
            damaged[place : place + length] = damaged[other : other + length]
        else:
            del damaged[rng.randrange(len(damaged) + 1) if rng.random() < 0.5 else place :]
    return bytes(damaged)


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """Damage the meaning of a safetensors header and keep it well-formed JSON."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    for _ in range(rng.choice([1, 1, 2, 3])):
        name = rng.choice(names)
        if name not in header:
            continue
        strange = [*NUMBERS, -1, 1.5, None, True, "x", [], {}, [[1]], "9" * 50]
        kind = rng.randrange(7)
        if kind == 0:
            header[name]["data_offsets"][rng.randrange(2)] = rng.choice(strange)
        elif kind == 1:
            header[name]["shape"] = [rng.choice(strange) for _ in range(rng.randrange(5))]
        elif kind == 2:
            header[name]["dtype"] = rng.choice(["F16", "BF16", "I8", "F64", "", 3, None])
        elif kind == 3:
            header[name] = rng.choice(strange)
        elif kind == 4:
            header[rng.choice(["lm_head.weight", "x", "", "model.norm.weight", "__metadata__"])] = header.pop(name)
        elif kind == 5:
            del header[name]
        else:
            header[name] = json.loads(json.dumps(header[rng.choice(sorted(header))]))
        names = [key for key, value in header.items() if isinstance(value, dict) and len(value) == 3] or [name]
        names = [key for key in names if isinstance(header.get(key), dict) and "data_offsets" in header[key]]
        if not names or not all(isinstance(header[key]["data_offsets"], list) for key in names):
            break
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


@contextmanager
def limited_memory() -> Iterator[None]:
    """Let the address space grow by `HEADROOM_BYTES` and no more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + HEADROOM_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def use(files: ModelFiles) -> None:
    """Do with a model what the engine would: read every tensor, cut a text."""
    for name in files.tensor_names():
        tensor = files.tensor(name)
        assert to_float32(tensor).shape == tensor.shape
    assert isinstance(files.chat_template, str | None)
    tokenizer = files.tokenizer()
    tokenizer.decode(tokenizer.encode("the quick 12 🙂<|end|>"))


def run_mutations(
    path: Path, make: Callable[[random.Random], bytes], open_files: Callable[[], ModelFiles], count: int
) -> int:
    """Open many damaged files.

    Args:
        path: where each is written.
        make: damages the file.
        open_files: opens it.
        count: how many.

    Returns:
        How many of them opened all the same.
    """
    num_opened = longest_message = 0
    with limited_memory():
        for number in range(count):
            path.write_bytes(make(random.Random(number)))
            start = time.perf_counter()
            try:
                with open_files() as files:
                    use(files)
                num_opened += 1
            except (FileFormatError, UnsupportedModelError) as error:
                longest_message = max(longest_message, len(str(error)))
            except BaseException as error:
                error.add_note(f"mutation {number}")
                raise
            assert time.perf_counter() - start < LONGEST_S, number
    assert longest_message < 2000, "a message should not flood the terminal"
    return num_opened


linux_only = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to bound the memory")


@linux_only
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["byte-level", "scores"])
def test_gguf(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "m.gguf"
    vocabulary = gguf_building.byte_level_metadata()
    if kind == "scores":
        tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
        tokens += ["▁", *"thequick", "th", "▁th", "▁the", "<|end|>"]
        tokens = list(dict.fromkeys(tokens))
        tokens += [f"t{i}" for i in range(384 - len(tokens))]
        vocabulary = {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": [-float(i) for i in range(384)],
            "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (384 - 259),
            "tokenizer.ggml.unknown_token_id": 0,
        }
    gguf_building.write_model(path, encoding="Q4_1", tokenizer=vocabulary)
    whole = path.read_bytes()
    header_bytes = min(tensor.offset for tensor in GgufFiles("m", path)._parts[0].tensors.values())
    opened = run_mutations(
        path, lambda rng: mutate(whole, rng, header_bytes), lambda: GgufFiles("m", path), NUM_MUTATIONS // 2
    )
    assert 0 < opened < NUM_MUTATIONS // 4, "mutations should reach both ends"


@linux_only
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["bytes", "json"])
def test_safetensors(tmp_path: Path, kind: str) -> None:
    folder = tiny.save("llama-16-mqa-tied", tmp_path / "m", dtype="bfloat16")
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    header_bytes = 8 + int.from_bytes(whole[:8], "little")

    def make(rng: random.Random) -> bytes:
        return mutate(whole, rng, header_bytes) if kind == "bytes" else mutate_json(whole, rng)

    run_mutations(path, make, lambda: FolderFiles("m", folder), NUM_MUTATIONS // 2)


@linux_only
def test_tokenizer_json(tmp_path: Path) -> None:
    folder = tiny.save("llama-16-mqa-tied", tmp_path / "m", dtype="bfloat16")
    path = folder / "tokenizer.json"
    whole = path.read_bytes()
    run_mutations(path, lambda rng: mutate(whole, rng, len(whole)), lambda: FolderFiles("m", folder), 300)
