"""Makes a calibration of a model: statistics, then losses, in one file that grows and that a stopped run goes on with.

What a file holds already of the same model, the same texts and the same settings is not computed again. After the
statistics, and after every loss that is measured, the file is written anew, whole or not at all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dseek.compress.sensitivity import CACHES, FORMATS, TABLES, Sensitivity, origin_of, scaled
from dseek.compress.statistics_pass import ActivationPass, weight_statistics
from dseek.core.errors import ConfigError
from dseek.core.files import atomic_write_text
from dseek.models.calibration_file import (
    FORMAT,
    MAX_LOSS,
    Calibration,
    Losses,
    Source,
    TensorStatistics,
    check_model,
    read_all,
    to_json,
    weights_fingerprint,
)
from dseek.models.decoder import Decoder
from dseek.models.files import ModelFiles
from dseek.models.tensor_names import ROLE_MODULES

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationSettings:
    """How a model is calibrated."""

    window_tokens: int = 512
    """Longest piece of text at a time."""
    max_tokens: int = 8192
    """Tokens of all texts together that run for the statistics, shared out evenly."""
    sensitivity: str | None = None
    """Losses of narrower formats: None leaves them out; estimate or measure."""
    sensitivity_tokens: int = 1024
    """Of these tokens, so many for the losses."""
    formats: tuple[str, ...] = FORMATS
    """Weight formats whose losses are found."""
    seed: int = 0
    """Of the tokens that are drawn for the estimate."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: a value out of its range.
        """
        if self.sensitivity not in (None, "estimate", "measure"):
            raise ConfigError(f"the sensitivity is {self.sensitivity!r}", needed="estimate or measure")
        if self.window_tokens < 16 or self.max_tokens < 16 or self.sensitivity_tokens < 16:
            raise ConfigError(
                f"windows of {self.window_tokens} tokens, {self.max_tokens} together, {self.sensitivity_tokens} for "
                "losses",
                needed="at least 16 each",
            )
        for name in self.formats:
            if name not in FORMATS:
                raise ConfigError(f"losses were asked for in {name!r}", needed="some of " + ", ".join(FORMATS))


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """A piece of a text."""

    token_ids: torch.Tensor
    """int64 [T]."""
    where: str
    """Name of the text and the first token's index in it."""


@dataclass(kw_only=True, slots=True)
class _State:
    """What is known so far."""

    calibration: Calibration
    tensors: tuple[TensorStatistics, ...]
    path: Path

    def save(self) -> None:
        """Write the file."""
        try:
            atomic_write_text(self.path, to_json(self.calibration, self.tensors))
        except OSError as error:
            raise ConfigError(f"the calibration cannot be written to {self.path}: {error.strerror or error}") from None

    def change(self, **losses: Any) -> None:
        """Replace some of the losses."""
        changed = dataclasses.replace(self.calibration.losses, **losses)
        self.calibration = dataclasses.replace(self.calibration, losses=changed)


def cut(texts: Sequence[tuple[str, Sequence[int]]], settings: CalibrationSettings) -> list[Window]:
    """Cut texts into windows, in turn, until there are tokens enough.

    Args:
        texts: name and token ids of each.
        settings: length of a window, tokens of all.

    Returns:
        Windows of at least 16 tokens; the first of every text, then the second of every text, and so on.

    Raises:
        ConfigError: no text has 16 tokens.
    """
    size, left = settings.window_tokens, settings.max_tokens
    windows = []
    longest = max((len(ids) for _, ids in texts), default=0)
    for start in range(0, longest, size):
        for name, ids in texts:
            piece = torch.tensor(ids[start : start + min(size, left)], dtype=torch.int64)
            if len(piece) >= 16:
                windows.append(Window(token_ids=piece, where=f"{name}, token {start} on"))
                left -= len(piece)
            if left < 16:
                return windows
    if not windows:
        raise ConfigError(f"the longest text has {longest} tokens", needed="at least 16")
    return windows


def calibrate(
    files: ModelFiles,
    windows: Sequence[Window],
    names: Sequence[str],
    out: Path,
    settings: CalibrationSettings,
    progress: Progress,
) -> tuple[Calibration, tuple[TensorStatistics, ...]]:
    """Calibrate a model.

    Args:
        files: the opened model.
        windows: from `cut`.
        names: of the texts.
        out: the file; one of the same model and texts is gone on with.
        settings: how.
        progress: told what is being done, how much is done and how much there is.

    Returns:
        What is in the file.

    Raises:
        ConfigError: the file cannot be read or written, or is of other texts or settings.
        FileFormatError: it is damaged, or of another model.
    """
    ids = [window.token_ids for window in windows]
    source = Source(
        texts=tuple(names),
        num_tokens=sum(map(len, ids)),
        window_tokens=settings.window_tokens,
        origin=origin_of(ids, 0),
    )
    state = _begun(files, out, source)
    decoder: Decoder | None = None
    if state is None:
        tensors = weight_statistics(files, progress)
        decoder = _decoder(files)
        watched = ActivationPass(decoder)
        watched.add(ids, [window.where for window in windows], progress)
        calibration = Calibration(
            format=FORMAT,
            model=weights_fingerprint(files),
            num_layers=files.shape.num_layers,
            source=source,
            limits=watched.limits(),
            losses=Losses(projections={}, measured={}, caches={}, tables={}, origin=""),
        )
        state = _State(calibration=calibration, tensors=(*tensors, *watched.results()), path=out)
        state.save()
    if settings.sensitivity is not None:
        _find_losses(files, decoder, ids, state, settings, progress)
    return state.calibration, state.tensors


def _decoder(files: ModelFiles) -> Decoder:
    return Decoder.from_files(files, torch.float32).requires_grad_(False)


def _begun(files: ModelFiles, out: Path, source: Source) -> _State | None:
    """What the file holds, if it is there."""
    if not out.exists():
        return None
    calibration, tensors = read_all(out)
    check_model(calibration, files, out)
    if calibration.source.origin != source.origin:
        raise ConfigError(
            f"{out} was made from other texts, or with other windows",
            remedy="give the same ones to go on with it, another --out, or take the file away",
        )
    return _State(calibration=calibration, tensors=tensors, path=out)


def _find_losses(
    files: ModelFiles,
    decoder: Decoder | None,
    ids: Sequence[torch.Tensor],
    state: _State,
    settings: CalibrationSettings,
    progress: Progress,
) -> None:
    """Estimate all losses that are not known, or measure them one after the other."""
    chosen: list[torch.Tensor] = []
    for token_ids in ids:
        left = settings.sensitivity_tokens - sum(map(len, chosen))
        if left >= 16:
            chosen.append(token_ids[:left])
    origin = origin_of(chosen, settings.seed)
    if state.calibration.losses.origin not in ("", origin):
        raise ConfigError(
            f"the losses in {state.path} are of other tokens or another seed",
            remedy="give the same --sensitivity-tokens and --seed to go on with them, or another --out",
        )
    if _is_complete(state.calibration.losses, settings):
        return
    decoder = decoder or _decoder(files)
    sums = Sensitivity(decoder, chosen, settings.seed)
    state.change(origin=origin)
    _find_shared(sums, state, progress)
    missing = [name for name in settings.formats if name not in state.calibration.losses.projections]
    if missing:
        _estimate(sums, decoder, state, missing, progress)
    if settings.sensitivity == "measure":
        _measure(sums, decoder, state, settings.formats, progress)


def _is_complete(losses: Losses, settings: CalibrationSettings) -> bool:
    """Whether nothing is left to find out."""
    if any(name not in losses.caches for name in CACHES) or any(name not in losses.tables for name in TABLES):
        return False
    if any(name not in losses.projections for name in settings.formats):
        return False
    marks = (all(row) for name in settings.formats for row in losses.measured[name].values())
    return settings.sensitivity == "estimate" or all(marks)


def _find_shared(sums: Sensitivity, state: _State, progress: Progress) -> None:
    """Measure caches and tables, which are not by layer."""
    losses = state.calibration.losses
    caches, tables = dict(losses.caches), dict(losses.tables)
    done, total = len(caches) + len(tables), len(CACHES) + len(TABLES)
    for name in CACHES:
        if name not in caches:
            caches[name] = min(MAX_LOSS, sums.divergence({}, cache_dtype=name))
            done += 1
            progress("cache and tables", done, total)
    for name in TABLES:
        if name not in tables:
            tables[name] = min(MAX_LOSS, sums.divergence({}, table_format=name))
            done += 1
            progress("cache and tables", done, total)
    state.change(caches=caches, tables=tables)
    state.save()


def _estimate(sums: Sensitivity, decoder: Decoder, state: _State, formats: Sequence[str], progress: Progress) -> None:
    """Measure every role in every format in all layers at once, and share that out."""
    num_layers = decoder.shape.num_layers
    levels = {}
    total = len(formats) * len(ROLE_MODULES)
    for name in formats:
        for role in ROLE_MODULES:
            everywhere = {(layer, role): name for layer in range(num_layers)}
            level = sums.divergence(everywhere)
            levels[name, role] = level if math.isfinite(level) else MAX_LOSS
            progress("levels", len(levels), total)
    found = scaled(sums.expected(formats, progress), levels)
    losses = state.calibration.losses
    bounded = {
        name: {role: tuple(min(MAX_LOSS, loss) for loss in by_layer) for role, by_layer in roles.items()}
        for name, roles in found.items()
    }
    unmeasured = {name: dict.fromkeys(roles, (False,) * num_layers) for name, roles in found.items()}
    state.change(projections={**losses.projections, **bounded}, measured={**losses.measured, **unmeasured})
    state.save()


def _measure(sums: Sensitivity, decoder: Decoder, state: _State, formats: Sequence[str], progress: Progress) -> None:
    """Measure every projection alone; what was measured before is not measured again."""
    num_layers = decoder.shape.num_layers
    places = [(name, layer, role) for name in formats for layer in range(num_layers) for role in ROLE_MODULES]
    for index, (name, layer, role) in enumerate(places):
        losses = state.calibration.losses
        if not losses.measured[name][role][layer]:
            loss = sums.divergence({(layer, role): name})
            values, marks = list(losses.projections[name][role]), list(losses.measured[name][role])
            values[layer], marks[layer] = min(MAX_LOSS, loss) if math.isfinite(loss) else MAX_LOSS, True
            state.change(
                projections=_with(losses.projections, name, role, tuple(values)),
                measured=_with(losses.measured, name, role, tuple(marks)),
            )
            state.save()
        progress("projections", index + 1, len(places))


def _with(table: dict[str, Any], name: str, role: str, values: tuple[Any, ...]) -> dict[str, Any]:
    """The table with one row replaced."""
    return {**table, name: {**table[name], role: values}}
