"""Memory of training a dense model on many devices: ZeRO stages, offload to pinned host memory, tiling, recomputation.

Each figure says how it arises. Mixed precision with Adam: 2 bytes of weights and 2 of gradients a parameter, 12 of
optimiser state (weights, momentum and variance in fp32).

    stage 0: 16 P;  stage 1: 4 P + 12 P / N;  stage 2: 2 P + 14 P / N;  stage 3: 16 P / N

Sources: Rajbhandari et al. 2020 (ZeRO, section 5 and figure 1), Ren et al. 2021 (ZeRO-Offload), Rajbhandari et al. 2021
(ZeRO-Infinity, section 3: activations between checkpoints and the working memory of the largest operator, which tiling
divides), Korthikanti et al. 2022 (activations of a layer without recomputation, section 4.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dseek.core.errors import ConfigError
from dseek.plan.devices import DeviceMachine
from dseek.plan.outline import Outline

Offload = Literal["none", "optimizer", "all"]

FORMULAS = (
    "weights 2 P (/ N in stage 3); gradients 2 P (/ N from stage 2); optimiser 12 P (/ N from stage 1)",
    "offload moves them to the host; activations 2 s b h a layer, what goes into it",
    "working: the larger of a layer, s b h (34 + 5 a s / h) and in stage 3 four bytes of its largest matrix / tiles,",
    "and of the head, 8 s b V / tiles",
)
"""How the figures of a table arise; s tokens, b sequences, h width, a heads, V vocabulary."""

WEIGHT_BYTES, GRADIENT_BYTES, OPTIMIZER_BYTES = 2, 2, 12


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingMemory:
    """What one device and its share of the host hold."""

    stage: int
    """ZeRO stage, 0 to 3."""
    offload: Offload
    """What is kept in pinned host memory: nothing, the optimiser's state, or weights and gradients too."""
    tiles: int
    """Pieces that the largest operator and the head are worked in."""
    recomputes: bool
    """Activations of a layer are computed again in the backward pass."""
    weights_bytes: float
    """On the device."""
    gradients_bytes: float
    """On the device."""
    optimizer_bytes: float
    """On the device."""
    activations_bytes: float
    """Kept from forward to backward."""
    working_bytes: float
    """The largest operator's weights and gradients gathered, one layer's activations, logits and their gradients."""
    host_bytes: float
    """Pinned, for this device."""
    transfer_s: float
    """Time a step to move what is offloaded over the host's link; 0 without a link or offload."""
    fits: bool
    """Into the device and the host."""

    @property
    def device_bytes(self) -> float:
        """All on the device."""
        states = self.weights_bytes + self.gradients_bytes + self.optimizer_bytes
        return states + self.activations_bytes + self.working_bytes


def training_memory(
    outline: Outline,
    machine: DeviceMachine,
    *,
    num_devices: int,
    stage: int,
    offload: Offload = "none",
    tiles: int = 1,
    recomputes: bool = True,
    batch: int = 1,
    sequence_tokens: int = 2048,
) -> TrainingMemory:
    """Work out the memory of one way to train.

    Args:
        outline: a dense model.
        machine: the devices; `num_devices` of them, on as many hosts as that takes.
        num_devices: devices that share the states.
        stage: 0 shares nothing, 1 the optimiser's state, 2 gradients too, 3 weights too.
        offload: what goes to pinned host memory; "all" needs stage 3.
        tiles: pieces of the largest operator and of the head.
        recomputes: keep only what goes into each layer.
        batch: sequences on each device.
        sequence_tokens: their length.

    Raises:
        ConfigError: a model with experts, or a combination that does not exist.
    """
    if outline.num_experts:
        raise ConfigError(f"{outline.name} has experts", needed="a dense model for the table of training memory")
    if stage not in (0, 1, 2, 3) or (offload == "all" and stage != 3) or (offload == "optimizer" and stage == 0):
        raise ConfigError(
            f"ZeRO stage {stage} with offload of {offload}", needed="stages 0 to 3; 1 or more for optimizer, 3 for all"
        )
    if min(num_devices, tiles, batch, sequence_tokens) < 1:
        raise ConfigError("a count below 1", needed="devices, tiles, batch and sequence of at least 1")
    parameters = outline.num_parameters()
    weights = WEIGHT_BYTES * parameters / (num_devices if stage >= 3 else 1)
    gradients = GRADIENT_BYTES * parameters / (num_devices if stage >= 2 else 1)
    optimizer = OPTIMIZER_BYTES * parameters / (num_devices if stage >= 1 else 1)
    host = 0.0
    if offload != "none":
        host, optimizer = optimizer, 0.0
    if offload == "all":
        host += weights + gradients
        weights = gradients = 0.0
    activations = activation_bytes(outline, batch, sequence_tokens, recomputes=recomputes)
    working = working_bytes(outline, batch, sequence_tokens, tiles=tiles, gathers=stage == 3, recomputes=recomputes)
    transfer_s = 0.0
    if offload != "none" and machine.host_link is not None:
        # Gradients go out and weights come back; with everything offloaded, weights also come for forward and backward.
        moved = (GRADIENT_BYTES + WEIGHT_BYTES) * parameters / num_devices
        moved += 2 * WEIGHT_BYTES * parameters / num_devices if offload == "all" else 0.0
        transfer_s = moved / (machine.host_link.bandwidth_gbs * 1e9)
    on_device = weights + gradients + optimizer + activations + working
    host_share = machine.host_memory_bytes / machine.num_devices
    return TrainingMemory(
        stage=stage,
        offload=offload,
        tiles=tiles,
        recomputes=recomputes,
        weights_bytes=weights,
        gradients_bytes=gradients,
        optimizer_bytes=optimizer,
        activations_bytes=activations,
        working_bytes=working,
        host_bytes=host,
        transfer_s=transfer_s,
        fits=on_device <= machine.device.memory_bytes and host <= host_share,
    )


def activation_bytes(outline: Outline, batch: int, sequence_tokens: int, *, recomputes: bool) -> float:
    """Bytes of activations that wait for the backward pass, in 16 bits.

    Args:
        outline: the model.
        batch: sequences.
        sequence_tokens: their length.
        recomputes: only what goes into each layer is kept, 2 s b h; else all of it, s b h (34 + 5 a s / h).

    Source: Korthikanti et al. 2022, equations 1 and 2.
    """
    rows = batch * sequence_tokens
    if recomputes:
        return 2.0 * rows * outline.hidden_size * outline.num_layers
    return outline.num_layers * layer_activation_bytes(outline, batch, sequence_tokens)


def layer_activation_bytes(outline: Outline, batch: int, sequence_tokens: int) -> float:
    """Bytes of all activations of one layer, s b h (34 + 5 a s / h).

    Args:
        outline: the model.
        batch: sequences.
        sequence_tokens: their length.
    """
    rows = batch * sequence_tokens
    scores = 5.0 * outline.num_heads * sequence_tokens / outline.hidden_size
    return rows * outline.hidden_size * (34 + scores)


def working_bytes(
    outline: Outline, batch: int, sequence_tokens: int, *, tiles: int, gathers: bool, recomputes: bool
) -> float:
    """Bytes that are needed for a moment: the largest of what a layer and the head need.

    Args:
        outline: the model.
        batch: sequences.
        sequence_tokens: their length.
        tiles: pieces of the largest operator's weights and of the head's rows.
        gathers: weights lie elsewhere and are gathered, with their gradients, for each operator.
        recomputes: a layer's activations come back for its backward pass.
    """
    largest = outline.hidden_size * outline.intermediate_size
    gathered = (WEIGHT_BYTES + GRADIENT_BYTES) * largest / tiles if gathers else 0.0
    layer = gathered + (layer_activation_bytes(outline, batch, sequence_tokens) if recomputes else 0.0)
    # Logits in fp32 and their gradients, for a tile of the rows.
    head = 8.0 * batch * sequence_tokens / tiles * outline.vocab_size
    return max(layer, head)


def table(
    outline: Outline, machine: DeviceMachine, *, num_devices: int, batch: int, sequence_tokens: int
) -> list[TrainingMemory]:
    """List the ways side by side: every stage, with and without offload and tiling.

    Args:
        outline: a dense model.
        machine: the devices.
        num_devices: how many of them.
        batch: sequences on each device.
        sequence_tokens: their length.
    """
    ways: Sequence[tuple[int, Offload]] = (
        (0, "none"), (1, "none"), (2, "none"), (3, "none"), (1, "optimizer"), (2, "optimizer"), (3, "optimizer"),
        (3, "all"),
    )  # fmt: skip
    return [
        training_memory(
            outline,
            machine,
            num_devices=num_devices,
            stage=stage,
            offload=offload,
            tiles=tiles,
            batch=batch,
            sequence_tokens=sequence_tokens,
        )
        for stage, offload in ways
        for tiles in (1, 16)
    ]
