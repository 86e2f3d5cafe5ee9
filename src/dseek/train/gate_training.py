"""`train_gates`: gates of all layers, learned from samples of a frozen model; stopped, it goes on where it was.

Samples are made first, a file a text, since the model's forward pass costs far more than a step of the gates. Training
then passes over them many times. After every pass weights, moments and the pass's number are written, whole or not at
all, so that a run that was stopped repeats at most one pass.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save as to_safetensors

from dseek.core.attention_pattern import BLOCK_TOKENS, RADIX
from dseek.core.errors import ConfigError
from dseek.core.files import atomic_write_bytes
from dseek.core.shape import ModelShape
from dseek.models import gate_file
from dseek.models.decoder import Decoder
from dseek.train.gate import Gate, free_cells, partition_loss, pool_means, pool_statistics
from dseek.train.gate_samples import LayerSample, layer_samples

Progress = Callable[[str, int, int, dict[str, float]], None]
"""Called with what is being done, how much of it is done, how much there is, and figures worth showing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GateTraining:
    """How gates are trained."""

    gate_dim: int = 32
    """Width of queries and keys of the gate."""
    num_levels: int = 2
    """Levels of cells that have a gate of their own; larger cells use the last."""
    near_blocks: int = 4
    """Window in blocks; cells inside are not chosen and so not learned."""
    num_rows: int = 256
    """Rows of each text whose true attention is computed."""
    num_passes: int = 16
    """Passes over the samples."""
    learning_rate: float = 5e-3
    """Largest step of AdamW, reached after a short rise and lowered along a cosine."""
    weight_decay: float = 0.01
    """Of AdamW."""
    seed: int = 0
    """Of initial weights, drawn rows and the order of samples."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: a value out of its range.
        """
        ranges = (
            ("gate width", self.gate_dim, 2, 256),
            ("number of levels", self.num_levels, 1, 6),
            ("window in blocks", self.near_blocks, 1, 64),
            ("number of rows", self.num_rows, 1, 65_536),
            ("number of passes", self.num_passes, 1, 10_000),
        )
        for what, value, low, high in ranges:
            if not low <= value <= high:
                raise ConfigError(f"the gate's {what} is {value}", needed=f"{low} to {high}")
        if self.gate_dim % 2:
            raise ConfigError(f"the gate's width is {self.gate_dim}", needed="an even number")
        if not 0.0 < self.learning_rate < 1.0:
            raise ConfigError(f"the learning rate is {self.learning_rate}", needed="above 0 and below 1")


def make_samples(
    decoder_of: Callable[[int], Decoder],
    texts: Sequence[torch.Tensor],
    folder: Path,
    config: GateTraining,
    progress: Progress,
    *,
    model: str,
) -> list[Path]:
    """Write a file of samples for every text that has none yet.

    Args:
        decoder_of: gives the frozen model for a text of so many tokens.
        texts: token ids, int64 [T] each.
        folder: where the files go, made if need be.
        config: number of rows, seed.
        progress: told after every text.
        model: names the model and how far its positions reach; files made with another name are refused.

    Returns:
        The files, in the order of the texts.

    Raises:
        ConfigError: a file is there that was made from something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for index, token_ids in enumerate(texts):
        file = folder / f"{index:04d}.safetensors"
        origin = _origin(token_ids, config, model)
        if file.exists():
            _check_origin(file, origin)
        else:
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + index)
            tensors = {}
            samples = layer_samples(
                decoder_of(len(token_ids)), token_ids, num_rows=config.num_rows, generator=generator
            )
            for layer, sample in enumerate(samples):
                for field in fields(sample):
                    value = getattr(sample, field.name)
                    stored = (
                        value if field.name == "rows" else value.half() if field.name == "mass" else value.bfloat16()
                    )
                    tensors[f"{layer}.{field.name}"] = stored
            atomic_write_bytes(file, to_safetensors(tensors, {"origin": origin}))
        files.append(file)
        progress("samples", index + 1, len(texts), {})
    return files


def _origin(token_ids: torch.Tensor, config: GateTraining, model: str) -> str:
    """Name what a sample is made from."""
    digest = hashlib.sha256(token_ids.numpy().tobytes())
    digest.update(f"{config.num_rows} {config.seed} {model}".encode())
    return digest.hexdigest()


def _check_origin(file: Path, origin: str) -> None:
    with safe_open(str(file), framework="pt") as stored:
        if (stored.metadata() or {}).get("origin") != origin:
            raise ConfigError(
                f"{file} was made from another text or model, or with other settings",
                needed="samples of the model and the texts that are given",
                remedy="train into another folder, or take the samples away",
            )


def read_samples(file: Path, num_layers: int) -> list[LayerSample]:
    """Read what `make_samples` wrote.

    Args:
        file: one of its files.
        num_layers: layers of the model.

    Returns:
        A sample a layer.
    """
    with safe_open(str(file), framework="pt") as stored:
        return [
            LayerSample(
                **{field.name: _wide(stored.get_tensor(f"{layer}.{field.name}")) for field in fields(LayerSample)}
            )
            for layer in range(num_layers)
        ]


def new_gates(shape: ModelShape, config: GateTraining) -> torch.nn.ModuleList:
    """Make untrained gates, one a layer.

    Args:
        shape: the model.
        config: widths, levels, seed.
    """
    torch.manual_seed(config.seed)
    return torch.nn.ModuleList(
        Gate(
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            gate_dim=config.gate_dim,
            num_levels=config.num_levels,
            theta=shape.rope.theta,
        )
        for _ in range(shape.num_layers)
    )


def gates_of(stored: gate_file.Gates) -> torch.nn.ModuleList:
    """Make modules of gates that were read from a file, in float32.

    Args:
        stored: the file's.
    """
    made = torch.nn.ModuleList()
    for layer in stored.layers:
        num_heads, head_dim, gate_dim = layer.query.shape
        num_levels, num_groups = layer.key.shape[:2]
        gate = Gate(num_heads, num_groups, head_dim, gate_dim=gate_dim, num_levels=num_levels, theta=stored.theta)
        gate.load_state_dict({part: torch.from_numpy(getattr(layer, part)) for part in gate_file.LEARNED_PARTS})
        made.append(gate)
    return made


def gate_loss(gate: Gate, sample: LayerSample, config: GateTraining) -> torch.Tensor:
    """Mean divergence of one layer's expected shares from the true ones, over levels, rows and heads.

    On each level the cells that a descent could open there stand beside the blocks that they leave over: the window's,
    the first one, and those behind the last complete cell.

    Args:
        gate: the layer's gate.
        sample: one text in that layer.
        config: levels and window.
    """
    blocks_R = sample.rows // BLOCK_TOKENS
    own_mass = sample.mass.gather(2, blocks_R[:, None, None].expand(-1, sample.mass.shape[1], 1))[..., 0]
    own = gate.own_block(sample.queries)
    scores = _scores(gate, sample, 0)
    before_RB = torch.arange(scores.shape[-1])[None] < blocks_R[:, None]
    losses = [partition_loss([scores], [sample.mass], [before_RB], own, own_mass)]
    for level in range(1, config.num_levels):
        size = RADIX**level
        num_cells = len(sample.statistics) // size
        free_RC = free_cells(blocks_R, num_cells, level, config.near_blocks)
        if not free_RC.any():
            break
        mass = sample.mass[:, :, : num_cells * size].unflatten(-1, (num_cells, size)).sum(-1)
        left_RB = before_RB.clone()
        left_RB[:, : num_cells * size] &= ~free_RC.repeat_interleave(size, dim=1)
        both = [_scores(gate, sample, level), scores]
        losses.append(partition_loss(both, [mass, sample.mass], [free_RC, left_RB], own, own_mass))
    return torch.stack(losses).mean()


def _scores(gate: Gate, sample: LayerSample, level: int) -> torch.Tensor:
    """All cells of a level for all rows of a sample."""
    statistics, means = pool_statistics(sample.statistics, level), pool_means(sample.means, level)
    scores: torch.Tensor = gate(sample.queries, sample.rotated, sample.rows // BLOCK_TOKENS, statistics, means, level)
    return scores


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def train_gates(
    gates: torch.nn.ModuleList, files: Sequence[Path], state_file: Path, config: GateTraining, progress: Progress
) -> None:
    """Train gates in place.

    Args:
        gates: of `new_gates`.
        files: of `make_samples`.
        state_file: safetensors that a pass is kept in; where it exists, training goes on after it.
        config: how.
        progress: told after every pass, with the mean loss.

    Raises:
        ConfigError: the state is of a training with other settings.
    """
    parameters = dict(gates.named_parameters())
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    num_steps = config.num_passes * len(files)
    first_pass = _restore(parameters, optimizer, state_file, config) if state_file.exists() else 0
    step = first_pass * len(files)
    for num_pass in range(first_pass, config.num_passes):
        generator = torch.Generator().manual_seed(config.seed + num_pass)
        total = 0.0
        for index in torch.randperm(len(files), generator=generator).tolist():
            rise, fall = min(1.0, (step + 1) / 20), 0.5 + 0.5 * math.cos(math.pi * step / num_steps)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * rise * fall
            optimizer.zero_grad()
            samples = read_samples(files[index], len(gates))
            losses = [gate_loss(gate, sample, config) for gate, sample in zip(_as_list(gates), samples, strict=True)]
            loss = torch.stack(losses)
            loss.sum().backward()
            optimizer.step()
            total += float(loss.detach().mean())
            step += 1
        _keep(parameters, optimizer, state_file, config, num_pass + 1)
        progress("passes", num_pass + 1, config.num_passes, {"loss": total / len(files)})


def _as_list(gates: torch.nn.ModuleList) -> list[Gate]:
    return [gate for gate in gates if isinstance(gate, Gate)]


def _keep(
    parameters: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    file: Path,
    config: GateTraining,
    num_passes: int,
) -> None:
    """Write weights, moments and progress."""
    tensors = {f"weight.{name}": value.detach() for name, value in parameters.items()}
    for name, value in parameters.items():
        for key, moment in optimizer.state[value].items():
            tensors[f"{key}.{name}"] = moment.detach().clone()
    metadata = {key: str(value) for key, value in asdict(config).items()} | {"passes": str(num_passes)}
    atomic_write_bytes(file, to_safetensors(tensors, metadata))


def _restore(
    parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, file: Path, config: GateTraining
) -> int:
    """Read what `_keep` wrote; returns the passes done."""
    with safe_open(str(file), framework="pt") as stored:
        metadata = stored.metadata() or {}
        for key, value in asdict(config).items():
            if metadata.get(key) != str(value):
                raise ConfigError(
                    f"{file} is of a training with {key} {metadata.get(key)}",
                    needed=f"{key} {value}",
                    remedy="train into another folder, or with the settings it was begun with",
                )
        names = set(stored.keys())
        with torch.no_grad():
            for name, value in parameters.items():
                value.copy_(stored.get_tensor(f"weight.{name}"))
                keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in names]
                optimizer.state[value] = {key: stored.get_tensor(f"{key}.{name}") for key in keys}
        return int(metadata["passes"])


def save_gates(
    gates: torch.nn.ModuleList,
    factors_LG: torch.Tensor,
    theta: float,
    model: str,
    path: Path,
    windows_LG: torch.Tensor | None = None,
    *,
    level_biases: Sequence[torch.Tensor] = (),
) -> None:
    """Write gates as `dseek.models.gate_file` reads them, in bfloat16.

    Args:
        gates: of `new_gates`, trained.
        factors_LG: of `dseek.train.head_shares`, 0 for heads that see everything.
        theta: base of their rotation.
        model: fingerprint of the model.
        path: the file, written whole or not at all.
        windows_LG: of `dseek.train.sample_windows`, powers of two, which bfloat16 holds as they are; None for none.
        level_biases: [H, M] of each layer, of `dseek.train.level_bias`, or none.
    """
    tensors = {f"layers.{layer}.dense": (factors_G == 0).bfloat16() for layer, factors_G in enumerate(factors_LG)}
    for layer, factors_G in enumerate(factors_LG):
        # The kernels never ask for the factor of a head that sees everything.
        tensors[f"layers.{layer}.share_factor"] = factors_G.where(factors_G > 0, 1.0).bfloat16()
    if windows_LG is not None:
        tensors |= {f"layers.{layer}.window": windows_G.bfloat16() for layer, windows_G in enumerate(windows_LG)}
    tensors |= {f"layers.{layer}.level_bias": bias.bfloat16() for layer, bias in enumerate(level_biases)}
    for layer, gate in enumerate(_as_list(gates)):
        for part in gate_file.LEARNED_PARTS:
            tensors[f"layers.{layer}.{part}"] = getattr(gate, part).detach().bfloat16().contiguous()
    atomic_write_bytes(
        path, to_safetensors(tensors, {"format": gate_file.FORMAT, "theta": repr(theta), "model": model})
    )
