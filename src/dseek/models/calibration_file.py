"""Calibrations of a model in a JSON file: what its numbers look like, and what narrower formats lose; read as hostile.

A calibration file MUST be one JSON object with `format` "dseek-calibration-1", `model` (`weights_fingerprint` of the
model it was made with), `num_layers`, `source` (what was read), `tensors` (a list of `TensorStatistics`), `limits` and
`losses`; what is empty in them is not known. Where a list runs over layers it has one entry a layer, `null` where that
layer was not measured. Keys that are not named here MUST be refused. A file beside a model, `calibration.json` in its
folder or MODEL.calibration.json beside MODEL.gguf, MAY be picked up by whoever plans a run of that model; a file of
another model MUST be refused.

Most readers want the losses and the limits only, so the statistics are turned into objects when they are asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dseek.core import config
from dseek.core.errors import ConfigError, FileFormatError
from dseek.models.tensor_names import ROLE_MODULES

if TYPE_CHECKING:
    from dseek.models.files import ModelFiles

FORMAT = "dseek-calibration-1"
FILE_NAME = "calibration.json"
"""Name of the file in a model's folder; beside a single file MODEL.gguf it is MODEL.calibration.json."""

MAX_FILE_BYTES = 128 * 2**20
MAX_LAYERS = 2**14
MAX_LOSS = 10.0

_HASHED = ("o_proj.weight", "down_proj.weight")
_HASHED_BYTES = 4096

REMEDY = "make it again with `dseek calibrate MODEL --text FILES --out FILE`"

Kind = Literal["weight", "input", "output", "key", "value"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Noise:
    """Mean square of what rounding adds to a tensor's values."""

    expected: float
    """Of errors that are spread evenly over a step."""
    bound: float
    """Of errors that are the largest possible everywhere."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Histogram:
    """How many values are how large, by powers of two."""

    first_exponent: int
    """Values of the first bin lie in [2^e, 2^(e + 1)) for this e; -126 at least."""
    counts: tuple[int, ...]
    """Bin by bin, rising; the first and the last are not 0."""
    num_zeros: int
    """Values that are 0."""
    num_subnormal: int
    """Values between 0 and 2^-126."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cancellation:
    """Condition number of a layer's dot products, sum |x_i w_i| / |sum x_i w_i|, over outputs and a sample of rows."""

    median: float
    """Half of them are at most this."""
    percentile_90: float
    """Nine of ten are at most this."""
    percentile_99: float
    """All but one of a hundred are at most this."""
    squares: float
    """The same in squares, sum x_i^2 w_i^2 over (sum x_i w_i)^2, both summed over outputs and rows first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorStatistics:
    """What the values of a weight, or of a layer's inputs or outputs over all texts, look like."""

    name: str
    """Canonical name of the weight or the module, or of a fused projection (`model.layers.0.qkv`)."""
    kind: Kind
    """What it is; keys are rotated, as the cache holds them."""
    num_channels: int
    """Width of a row."""
    num_values: int
    """Values seen, those that are not finite left out."""
    least: float
    """Smallest value."""
    largest: float
    """Largest value."""
    mean: float
    """Mean."""
    variance: float
    """Mean squared distance from the mean."""
    kurtosis: float
    """Fourth central moment over the squared variance: 3 for a normal distribution."""
    histogram: Histogram
    """Magnitudes."""
    outlier_share: float
    """Share of the values beyond six times the root mean square."""
    outlier_channels: tuple[int, ...]
    """Channels whose largest magnitude is above six times the median channel's, largest first, at most 16."""
    num_outlier_channels: int
    """How many there are."""
    noise: dict[str, Noise]
    """By integer format: i8c, i8g and i4g, or int8 for keys and values."""
    rotated_largest: float
    """Largest magnitude after the rotation of the format i8c."""
    num_nan: int
    """Values that are not a number."""
    num_infinite: int
    """Infinite values."""
    not_finite: tuple[str, ...]
    """Where the first of these are."""
    cancellation: Cancellation | None
    """Of an output; None for what is no output."""

    @property
    def mean_square(self) -> float:
        """Mean of the squared values."""
        return self.variance + self.mean * self.mean

    @property
    def magnitude(self) -> float:
        """Largest magnitude."""
        return max(abs(self.least), abs(self.largest))


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """What a calibration was made from."""

    texts: tuple[str, ...]
    """Names of the files."""
    num_tokens: int
    """Tokens that ran through the model for the statistics."""
    window_tokens: int
    """Longest piece of text at a time."""
    origin: str
    """Tells these texts, cut so, from others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Largest magnitude that the inputs of projections had, by role and layer."""

    plain: dict[str, tuple[float, ...]]
    """As they come."""
    rotated: dict[str, tuple[float, ...]]
    """After the rotation of the format i8c."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Losses:
    """What narrower formats lose: nats a token, which is the relative rise of perplexity where it is small."""

    projections: dict[str, dict[str, tuple[float | None, ...]]]
    """By weight format, role and layer, each projection alone in that format."""
    measured: dict[str, dict[str, tuple[bool, ...]]]
    """Which of these were measured; the others were estimated."""
    caches: dict[str, float]
    """By cache dtype."""
    tables: dict[str, float]
    """By format of embedding and head together."""
    origin: str
    """Tells the text and the settings that these are of from others; empty where nothing is known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """What is known of a model's numbers."""

    format: str
    """`FORMAT`."""
    model: str
    """Fingerprint of the model."""
    num_layers: int
    """Its layers."""
    source: Source
    """What was read."""
    limits: Limits
    """Of projections' inputs."""
    losses: Losses
    """Of narrower formats."""

    def loss_table(self) -> dict[tuple[int, str, str], float]:
        """Give the losses of projections by layer, role and weight format, as `dseek.plan.make` takes them."""
        return {
            (layer, role, weight_format): loss
            for weight_format, roles in self.losses.projections.items()
            for role, by_layer in roles.items()
            for layer, loss in enumerate(by_layer)
            if loss is not None
        }


def weights_fingerprint(files: ModelFiles) -> str:
    """Tell a model's weights, as they are stored, from others: what rounding costs depends on the grid they lie on.

    Args:
        files: the opened model.

    Returns:
        A hash of encoding and beginning of the projections that write to the residual stream.
    """
    digest = hashlib.sha256()
    for name in files.tensor_names():
        if name.endswith(_HASHED):
            tensor = files.tensor(name)
            digest.update(f"{name} {tensor.encoding} {tensor.shape}".encode())
            digest.update(tensor.data.reshape(-1)[:_HASHED_BYTES].tobytes())
    return digest.hexdigest()[:16]


def find_calibration(files: ModelFiles, path: str | Path | None = None) -> Calibration | None:
    """Read a model's calibration: the file that is named, or the one beside the model.

    Args:
        files: the opened model.
        path: the file; None looks beside the model.

    Returns:
        The calibration, or None where none is named and none is there.

    Raises:
        ConfigError: the file that is named cannot be read.
        FileFormatError: it is damaged, or of another model.
    """
    if path is None:
        path = place_beside(files)
        if not path.is_file():
            return None
    calibration = read_calibration(Path(path))
    check_model(calibration, files, Path(path))
    return calibration


def place_beside(files: ModelFiles) -> Path:
    """Say where a model's calibration is looked for.

    Args:
        files: the opened model.
    """
    return files.path / FILE_NAME if files.path.is_dir() else files.path.with_suffix("." + FILE_NAME)


def check_model(calibration: Calibration, files: ModelFiles, path: Path) -> None:
    """Make sure that a calibration is of a model.

    Args:
        calibration: what was read.
        files: the opened model.
        path: where it was read from, for messages.

    Raises:
        FileFormatError: it is of another one.
    """
    if calibration.model != weights_fingerprint(files) or calibration.num_layers != files.shape.num_layers:
        raise FileFormatError(
            f"{path} was made with another model than {files.path}",
            needed="a calibration of this model",
            remedy="make one with `dseek calibrate`, or take the file away",
        )


def read_calibration(path: Path) -> Calibration:
    """Read a calibration without its statistics.

    Args:
        path: the file.

    Returns:
        The calibration.

    Raises:
        ConfigError: the file cannot be read.
        FileFormatError: it is not a sound calibration.
    """
    return _calibration(_parsed(path), path)


def read_all(path: Path) -> tuple[Calibration, tuple[TensorStatistics, ...]]:
    """Read a calibration with its statistics.

    Args:
        path: the file.

    Returns:
        The calibration, and the statistics in the order of the model's computation.

    Raises:
        ConfigError: the file cannot be read.
        FileFormatError: it is not a sound calibration.
    """
    data = _parsed(path)
    calibration = _calibration(data, path)
    try:
        tensors = tuple(
            config.from_mapping(TensorStatistics, entry, where=f"{path}: tensors[{index}]")
            for index, entry in enumerate(data["tensors"])
        )
    except ConfigError as error:
        raise FileFormatError(str(error), remedy=REMEDY) from None
    return calibration, tensors


def to_json(calibration: Calibration, tensors: tuple[TensorStatistics, ...]) -> str:
    """Write a calibration and its statistics as `read_all` reads them.

    Args:
        calibration: the calibration.
        tensors: the statistics.
    """
    import json

    plain = {**config.to_plain(calibration), "tensors": config.to_plain(tensors)}
    return json.dumps(plain, allow_nan=False) + "\n"


def _parsed(path: Path) -> dict[str, Any]:
    """The file's JSON object, with a list of tensors."""
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise FileFormatError(f"{path} is {size} bytes long", needed=f"at most {MAX_FILE_BYTES}")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"the calibration {path} cannot be read: {error.strerror or error}",
            remedy="make one with `dseek calibrate MODEL --text FILES --out FILE`",
        ) from None
    except UnicodeDecodeError:
        raise FileFormatError(f"{path} is not a calibration: it is not UTF-8 text", remedy=REMEDY) from None
    try:
        data = config.parse_json(text, where=str(path))
    except ConfigError as error:
        raise FileFormatError(str(error), remedy=REMEDY) from None
    stated = data.get("format") if isinstance(data, dict) else None
    if stated != FORMAT:
        raise FileFormatError(f"{path} has the format {str(stated)[:60]!r}", needed=FORMAT, remedy=REMEDY)
    if not isinstance(data.get("tensors"), list):
        raise FileFormatError(f"{path} has no list of tensors", remedy=REMEDY)
    found: dict[str, Any] = data
    return found


def _calibration(data: Mapping[str, Any], path: Path) -> Calibration:
    plain = {key: value for key, value in data.items() if key != "tensors"}
    try:
        calibration = config.from_mapping(Calibration, plain, where=str(path))
    except ConfigError as error:
        raise FileFormatError(str(error), remedy=REMEDY) from None
    _check(calibration, path)
    return calibration


def _check(calibration: Calibration, path: Path) -> None:
    """Refuse numbers that no calibration has."""
    layers = calibration.num_layers
    if not 1 <= layers <= MAX_LAYERS:
        raise FileFormatError(f"{path}: num_layers is {layers}", needed=f"1 to {MAX_LAYERS}", remedy=REMEDY)
    limits, losses = calibration.limits, calibration.losses
    tables: list[tuple[str, Mapping[str, tuple[Any, ...]]]] = [
        ("limits.plain", limits.plain),
        ("limits.rotated", limits.rotated),
    ]
    tables += [(f"losses.projections.{name}", roles) for name, roles in losses.projections.items()]
    tables += [(f"losses.measured.{name}", roles) for name, roles in losses.measured.items()]
    for name, roles in tables:
        for role, by_layer in roles.items():
            if role not in ROLE_MODULES:
                raise FileFormatError(f"{path}: {name} has {role[:60]!r}", needed="one of " + ", ".join(ROLE_MODULES))
            if len(by_layer) != layers:
                raise FileFormatError(
                    f"{path}: {name}.{role} has {len(by_layer)} entries", needed=f"one a layer, {layers}", remedy=REMEDY
                )
    numbers = [loss for roles in losses.projections.values() for entries in roles.values() for loss in entries]
    numbers += [*losses.caches.values(), *losses.tables.values()]
    for loss in numbers:
        if loss is not None and not 0.0 <= loss <= MAX_LOSS:
            raise FileFormatError(f"{path} has a loss of {loss}", needed=f"0 to {MAX_LOSS:g}", remedy=REMEDY)
    for table in (limits.plain, limits.rotated):
        for largest in (value for entries in table.values() for value in entries):
            if not largest >= 0.0:
                raise FileFormatError(f"{path} has a limit of {largest}", needed="at least 0", remedy=REMEDY)
