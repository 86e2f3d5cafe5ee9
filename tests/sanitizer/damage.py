"""Damage to arguments: one thing of an array, of a header, or of any other value is changed."""

from __future__ import annotations

from typing import Any

import numpy as np

NUMBERS = (-(2**63), -(2**31), -1, 0, 1, 2, 3, 15, 17, 64, 65_537, 2**26 + 1, 2**31 - 1, 2**31, 2**32 + 1, 2**63, 2**64)
STRANGERS = (None, "", "bf16", "i8c", "nonsense\0", b"bytes", 1.5, float("nan"), (), [1], {}, object(), True)
VALUES = (float("nan"), float("inf"), -float("inf"), 3e38, -1e-40, 0.0)


def damaged_array(array: np.ndarray, rng: np.random.Generator) -> Any:
    """Change one thing of an array."""
    kind = rng.integers(12)
    if kind == 0:
        return array.astype(rng.choice(["f8", "f4", "f2", "i8", "i4", "u2", "u1", "?", ">f4", "c8"]))
    if kind == 1:
        return array[: max(0, len(array) - int(rng.integers(1, 4)))]
    if kind == 2:
        return np.concatenate([array, array])
    if kind == 3:
        return np.asfortranarray(array.T) if array.ndim > 1 else array[::-1]
    if kind == 4:
        return np.repeat(array, 2, axis=-1)[..., ::2]
    if kind == 5:
        room = np.zeros(array.nbytes + 8, np.uint8)
        shifted = room[int(rng.integers(1, 8)) :][: array.nbytes].view(array.dtype).reshape(array.shape)
        shifted[...] = array
        return shifted
    if kind == 6:
        return array.reshape(((1, -1), (-1, 1), (-1,), (1, 1, -1))[rng.integers(4)])
    if kind == 7:
        return np.zeros(rng.choice([0, 1, 3], array.ndim), array.dtype)
    if kind == 8:
        return array.tolist()
    changed = array.copy()
    if changed.size:
        place = int(rng.integers(changed.size))
        if changed.dtype.kind == "f":
            changed.flat[place] = rng.choice(VALUES)
        elif changed.dtype == np.uint8:
            damage_header(changed, rng)
        elif changed.dtype.kind in "iu":
            bounds = np.iinfo(changed.dtype)
            near = [int(changed.flat[place]) + step for step in (-1, 1)]
            fitting = [number for number in (*NUMBERS, *near, *near) if bounds.min <= number <= bounds.max]
            changed.flat[place] = int(rng.choice(fitting))
    return changed


def damage_header(blob: np.ndarray, rng: np.random.Generator) -> None:
    """Change one number in the header of a packed weight, in place."""
    header = blob.reshape(-1)[:64]
    fields = header[: header.size // 4 * 4].view(np.uint32)
    if not fields.size:
        return
    place = int(rng.integers(fields.size))
    old = int(fields[place])
    near = [old - 1, old + 1, old ^ 1, 2 * old, old // 2, old + 64, old - 64]
    fields[place] = int(rng.choice([*near, *near, 0, 1, 2, 3, 5, 6, 255, 2**16, 2**26, 2**30, 2**32 - 1])) & 0xFFFFFFFF


def damaged(value: Any, rng: np.random.Generator) -> Any:
    """Change an argument: often a little, sometimes into something else altogether."""
    if rng.random() < 0.1:
        return STRANGERS[rng.integers(len(STRANGERS))]
    if isinstance(value, np.ndarray):
        return damaged_array(value, rng)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return NUMBERS[rng.integers(len(NUMBERS))] if rng.random() < 0.7 else value + int(rng.integers(-1, 2))
    if isinstance(value, float):
        return float(rng.choice(VALUES))
    if isinstance(value, tuple) and value and isinstance(value[0], np.ndarray):
        place = int(rng.integers(len(value)))
        part = value[place]  # a list, where it was damaged before
        changed_part = damaged_array(part, rng) if isinstance(part, np.ndarray) else damaged(part, rng)
        return (*value[:place], changed_part, *value[place + 1 :])
    if isinstance(value, list) and value and isinstance(value[0], tuple):
        changed = [list(part) for part in value]
        part = changed[int(rng.integers(len(changed)))]
        place = int(rng.integers(len(part)))
        part[place] = damaged(part[place], rng)
        return [tuple(part) for part in changed]
    return STRANGERS[rng.integers(len(STRANGERS))]
