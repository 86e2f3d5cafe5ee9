"""Windows of a model's heads by a calibration pass, for models whose gate file does not say them.

The model runs once, in PyTorch and bfloat16, over up to 8,192 tokens of source from Python's own standard library, a
text that every installation has; from the attention mass of rows in its second half `dseek.models.window_choice` takes
the windows. They are kept in the cache folder beside the machine's measurements, under the model's fingerprint.
"""

from __future__ import annotations

import importlib.util
import json
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dseek.core import config, environment, events, logs
from dseek.core.attention_pattern import BLOCK_TOKENS, WINDOWS
from dseek.core.errors import ConfigError
from dseek.core.files import atomic_write_text
from dseek.models.gate_file import fingerprint

if TYPE_CHECKING:
    from dseek.core.shape import ModelShape
    from dseek.models.files import ModelFiles
    from dseek.models.window_choice import WindowChoice

VERSION = 1
"""Version of the kept JSON."""

NUM_TOKENS = 8192
"""Tokens of the text: twice the longest window."""

LEAST_TOKENS = 2 * WINDOWS[0]
"""With fewer, not even the shortest window is in doubt."""

NUM_ROWS = 512
"""Rows whose attention is looked at, evenly spread."""

MODULES = ("argparse", "tarfile", "typing", "inspect", "subprocess", "pickle", "difflib", "ast")
"""Whose source is read, one after the other, until there are tokens enough; the first alone mostly has them.

One text will do: over each of the first four SmolLM2's windows are the same but for one step in 12 to 20 of 90 heads.
"""

PROGRESS_EVENT = "calibration.layer"
"""Emitted with `layer`, the one that comes next, and `num_layers`."""

REMEDY = (
    "take one window for all heads (64, 128, ... 4096), or train a gate, whose file has windows: `dseek train-gate`"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Kept:
    """What is kept of a calibration."""

    version: int
    """`VERSION` of the writer."""
    model: str
    """The model's fingerprint."""
    windows: tuple[tuple[int, ...], ...]
    """Tokens, by layer and key-value head."""


def head_windows(files: ModelFiles) -> tuple[tuple[int, ...], ...]:
    """Return a window for every key-value head: the kept ones, or measure them and keep them.

    Args:
        files: the opened model.

    Returns:
        Tokens by layer and head. Layers with a sliding window of the model's own, which no pattern changes, have the
        shortest.

    Raises:
        ConfigError: PyTorch is missing, or there is no text or not enough positions to measure with.
        DseekError: the model's tokenizer or weights are unusable.
    """
    model = fingerprint(files)
    path: Path = environment.get("DSEEK_CACHE_DIR") / "windows" / f"{model}.json"
    kept = _read(path, model, files.shape)
    if kept:
        return kept
    if importlib.util.find_spec("torch") is None:
        raise ConfigError("measuring the windows of heads needs PyTorch, which is not installed", remedy=REMEDY)
    windows = measure_windows(files)
    try:
        record = _Kept(version=VERSION, model=model, windows=windows)
        atomic_write_text(path, json.dumps(config.to_plain(record)) + "\n")
    except OSError as error:
        logs.get_logger(__name__).warning("the windows cannot be kept in %s: %s", path.parent, error)
    return windows


def _read(path: Path, model: str, shape: ModelShape) -> tuple[tuple[int, ...], ...]:
    """The windows kept in a file; none where there is no such file or it is of no use."""
    if not path.exists():
        return ()
    try:
        data = config.parse_json(path.read_text(encoding="utf-8"), where=str(path))
        kept = config.from_mapping(_Kept, data, where=str(path))
        sizes = {len(layer) for layer in kept.windows}
        sound = all(window in WINDOWS for layer in kept.windows for window in layer)
        expected = (VERSION, model, shape.num_layers, {shape.num_kv_heads})
        if sound and (kept.version, kept.model, len(kept.windows), sizes) == expected:
            return kept.windows
        error: Exception = ConfigError("they are of another model or version")
    except (ConfigError, OSError, UnicodeDecodeError) as caught:
        error = caught
    logs.get_logger(__name__).warning("the windows in %s are of no use and are measured anew: %s", path, error)
    return ()


def measure_windows(files: ModelFiles, choice: WindowChoice | None = None) -> tuple[tuple[int, ...], ...]:
    """Run the model over the text and choose the windows, whatever is kept.

    Args:
        files: the opened model.
        choice: what windows have to hold, and their mean; None is the default.

    Returns:
        As `head_windows`.

    Raises:
        ConfigError: there is no text or not enough positions to measure with.
        DseekError: the model's tokenizer or weights are unusable.
    """
    import torch

    from dseek.models.block_mass import block_mass
    from dseek.models.decoder import Decoder
    from dseek.models.projections import layer_projections
    from dseek.models.window_choice import WindowChoice, choose_windows, held_mass, windows_to_choose

    # 1. The text, in whole blocks, and rows that have at least half of it before them.
    shape = files.shape
    token_ids = _text(files)
    rows_R = torch.linspace(len(token_ids) // 2, len(token_ids) - 1, NUM_ROWS).long().unique()
    windows = windows_to_choose([rows_R])

    # 2. The mass that each window holds, layer by layer.
    decoder = Decoder.from_files(files, torch.bfloat16).requires_grad_(False)
    held, squared, free = [], [], []
    with torch.inference_mode():
        for layer, projections in enumerate(layer_projections(decoder, torch.tensor(token_ids))):
            events.emit(PROGRESS_EVENT, layer=layer, num_layers=shape.num_layers)
            if projections.window is None:
                free.append(layer)
                queries, keys = projections.rotated_queries[rows_R], projections.rotated_keys
                mass_RHB = block_mass(queries, keys, rows_R).double()
                held.append(held_mass(mass_RHB, rows_R, windows))
                squared.append(held_mass(mass_RHB.square(), rows_R, windows))

    # 3. The windows, under one mean for all layers that may have them.
    chosen = {}
    if free:
        held_LHW, squared_LHW = torch.stack(held), torch.stack(squared)
        found = choose_windows(held_LHW, squared_LHW, shape.num_kv_heads, windows, choice or WindowChoice())
        chosen = dict(zip(free, found, strict=True))
    shortest = [WINDOWS[0]] * shape.num_kv_heads
    return tuple(tuple(chosen.get(layer, shortest)) for layer in range(shape.num_layers))


def _text(files: ModelFiles) -> list[int]:
    """Tokens of the standard library's source, as many as there are to be, in whole blocks."""
    num_tokens = min(NUM_TOKENS, files.shape.max_position_embeddings)
    folder = Path(sysconfig.get_paths()["stdlib"])
    token_ids: list[int] = []
    for name in MODULES:
        path = folder / f"{name}.py"
        if len(token_ids) < num_tokens and path.is_file():
            source = path.read_text(encoding="utf-8", errors="replace")
            token_ids += files.tokenizer().encode(source, add_special_tokens=False)
    token_ids = token_ids[: min(num_tokens, len(token_ids)) // BLOCK_TOKENS * BLOCK_TOKENS]
    if len(token_ids) < LEAST_TOKENS:
        raise ConfigError(
            f"windows of heads would be measured over {len(token_ids)} tokens of Python's standard library in {folder}",
            needed=f"at least {LEAST_TOKENS}, in the library and in the model's positions",
            remedy=REMEDY,
        )
    return token_ids
