"""`Plan`: what was decided for one model on one machine, and what it is expected to reach; `make` decides it.

Every command that runs a model takes a plan; none of them decides anew. A plan file is read strictly: unknown keys,
values of another type and numbers out of range are errors, since a plan sizes what is then allocated.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dseek.core import config
from dseek.core.attention_pattern import AttentionPattern
from dseek.core.errors import ConfigError
from dseek.core.files import atomic_write_text
from dseek.core.shape import ModelShape
from dseek.hardware.machine import Machine
from dseek.hardware.store import load_or_measure
from dseek.plan import cost, search
from dseek.plan.activation_limits import CalibratedInputs, LayerLimits, limits_of
from dseek.plan.attention_wish import AttentionWish
from dseek.plan.candidates import Wishes
from dseek.plan.cost import Prediction
from dseek.plan.explain import Choice
from dseek.plan.formats import CacheDtype, Kernels, LayerFormats, Precision, WeightFormat
from dseek.plan.head_facts import HeadFacts
from dseek.plan.layout import PAGE_TOKENS, Layout
from dseek.plan.objective import MAX_BATCH, MAX_CONTEXT_TOKENS, Objective
from dseek.plan.quality import LossTable, MeasuredLosses

VERSION = 3
"""Version of the JSON."""

MAX_FILE_BYTES = 16 * 2**20
MAX_CHUNK_TOKENS = 65536
MAX_THREADS = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Everything an engine needs to know to run a model, decided."""

    version: int
    """`VERSION` of the writer."""
    model: str
    """Name the user gave."""
    shape: ModelShape
    """The model."""
    machine_id: str
    """Machine whose measurements were used."""
    objective: Objective
    """What it was decided for; its typical request is the one the predictions are for."""
    precision: Precision
    """Precision of the weights, by its common name; mixed where the search put two of them beside each other."""
    kernels: Kernels
    """native, or torch where the native kernels are absent or not wanted."""
    layer_formats: tuple[LayerFormats, ...]
    """Weight formats, layer by layer."""
    embedding_format: WeightFormat
    """Format of the embedding."""
    head_format: WeightFormat
    """Format of the output head."""
    cache_dtype: CacheDtype
    """Element type of the key/value cache."""
    attention_patterns: tuple[AttentionPattern, ...]
    """What each layer attends to, layer by layer."""
    page_tokens: int
    """Positions in a page of the cache."""
    num_pages: int
    """Pages of the cache."""
    context_tokens: int
    """Tokens a sequence may hold."""
    max_batch: int
    """Sequences at a time."""
    prefill_chunk_tokens: int
    """Most rows of a step: longer prompts are cut, so that running sequences wait no longer than that."""
    num_threads: int
    """Threads."""
    predicted: Prediction
    """Expected for the objective's typical request."""
    choices: tuple[Choice, ...]
    """How it was decided."""
    activation_limits: tuple[LayerLimits, ...] = ()
    """How large the inputs of projections may be, layer by layer, where the model was calibrated; empty: any."""

    def layout(self) -> Layout:
        """Return the part that time and memory depend on."""
        return Layout(
            kernels=self.kernels,
            layer_formats=self.layer_formats,
            embedding_format=self.embedding_format,
            head_format=self.head_format,
            cache_dtype=self.cache_dtype,
            attention_patterns=self.attention_patterns,
            num_pages=self.num_pages,
            max_batch=self.max_batch,
            prefill_chunk_tokens=self.prefill_chunk_tokens,
            num_threads=self.num_threads,
        )

    def predict(self, machine: Machine, *, prompt_tokens: int, context_tokens: int, batch: int) -> Prediction:
        """Predict this plan for another job than its objective's.

        Args:
            machine: the measurements.
            prompt_tokens: length of each prompt, for the prefill rate.
            context_tokens: positions in each sequence's cache while decoding, for the decode rate.
            batch: sequences at a time.

        Raises:
            ConfigError: the machine was not measured with the plan's kernels.
        """
        return cost.predict(
            self.shape,
            machine,
            self.layout(),
            prompt_tokens=prompt_tokens,
            context_tokens=context_tokens,
            batch=batch,
        )

    def check_model(self, shape: ModelShape) -> None:
        """Make sure that the plan is for a model.

        Args:
            shape: the model that is about to be run.

        Raises:
            ConfigError: it has another shape than the plan's.
        """
        if shape != self.shape:
            names = [name for name in shape.__dataclass_fields__ if getattr(shape, name) != getattr(self.shape, name)]
            name = names[0]
            raise ConfigError(
                f"the plan is for {self.model!r}, whose {name} is {getattr(self.shape, name)}; "
                f"this model's is {getattr(shape, name)}",
                remedy="make a plan for this model with `dseek plan MODEL --save FILE`",
            )

    def to_json(self) -> str:
        """Write as JSON."""
        return json.dumps(config.to_plain(self), indent=1)

    @staticmethod
    def from_json(text: str, *, where: str = "plan") -> Plan:
        """Read what `to_json` wrote.

        Args:
            text: the JSON document.
            where: what it is, for messages.

        Raises:
            ConfigError: not such JSON, or values that do not make a plan.
        """
        data = config.parse_json(text, where=where)
        version = data.get("version") if isinstance(data, dict) else None
        if isinstance(version, int) and version != VERSION:
            raise ConfigError(
                f"{where} is a plan of version {version}", needed=f"version {VERSION}", remedy="make the plan again"
            )
        plan = config.from_mapping(Plan, data, where=where)
        _check(plan, where)
        return plan

    def save(self, path: str | Path) -> None:
        """Write to a file, whole or not at all.

        Args:
            path: where.

        Raises:
            ConfigError: it cannot be written.
        """
        try:
            atomic_write_text(path, self.to_json() + "\n")
        except OSError as error:
            raise ConfigError(f"the plan cannot be written to {path}: {error.strerror or error}") from None


def this_machine() -> Machine:
    """Return this machine's kept measurements, or measure it now (some 25 s, without showing progress).

    Raises:
        ConfigError: a `DSEEK_*` variable is bad, or nothing can be measured here.
    """
    return load_or_measure()


def make(
    shape: ModelShape,
    machine: Machine,
    objective: Objective,
    *,
    encodings: Mapping[str, int],
    model: str = "",
    precision: str | None = None,
    cache_dtype: str | None = None,
    num_threads: int | None = None,
    prefill_chunk_tokens: int | None = None,
    kernels: str | None = None,
    attention: AttentionWish | None = None,
    heads: HeadFacts | None = None,
    losses: LossTable | MeasuredLosses | None = None,
    calibrated_inputs: CalibratedInputs | None = None,
) -> Plan:
    """Decide how to run a model.

    Args:
        shape: the model.
        machine: the measurements.
        objective: what for.
        encodings: elements in the model's file, by encoding (`ModelFiles.encodings`).
        model: its name, for messages and the plan file.
        precision: fp32, bf16, fp16, int8 or int4 to have that and no other; auto to choose; None takes
            DSEEK_PRECISION_MODE.
        cache_dtype: fp32, bf16 or int8 to have that; None to choose.
        num_threads: threads to have; None takes DSEEK_NUM_THREADS, else chooses.
        prefill_chunk_tokens: most rows of a step; None to choose.
        kernels: native or torch to have those; None takes native where they were measured.
        attention: what layers attend to, as far as that is decided; None to choose.
        heads: the model's trained gate and the windows of its heads (`dseek.engine.head_facts`); None knows of none.
        losses: what storing projections in a format loses (rise of perplexity, a fraction), by layer, role and weight
            format, where that was measured for this model, alone or with what caches and tables lose; the prior of
            `plan.quality` stands in for the others.
        calibrated_inputs: how large the inputs of projections were when the model was calibrated; None does not know,
            and the plan then sets them no limits.

    Returns:
        The plan, with its predictions and how it was decided.

    Raises:
        ConfigError: a value that is not one of those above, or a combination that does not run here.
        MemoryLimitError: nothing allowed fits into the memory.
    """
    wishes = Wishes(
        model=model or "the model",
        precision=precision,
        cache_dtype=cache_dtype,
        num_threads=num_threads,
        prefill_chunk_tokens=prefill_chunk_tokens,
        kernels=kernels,
        attention=attention or AttentionWish(),
        heads=heads or HeadFacts(),
    )
    measured = losses if isinstance(losses, MeasuredLosses) else MeasuredLosses(projections=losses or {})
    decision = search.decide(shape, machine, objective, encodings, wishes, measured)
    layout = decision.layout
    prompt_tokens, answer_tokens = objective.request(decision.context_tokens)
    return Plan(
        version=VERSION,
        model=model,
        shape=shape,
        machine_id=machine.machine_id,
        objective=dataclasses.replace(objective, prompt_tokens=prompt_tokens, answer_tokens=answer_tokens),
        precision=decision.precision,
        kernels=layout.kernels,
        layer_formats=layout.layer_formats,
        embedding_format=layout.embedding_format,
        head_format=layout.head_format,
        cache_dtype=layout.cache_dtype,
        attention_patterns=layout.attention_patterns,
        page_tokens=PAGE_TOKENS,
        num_pages=layout.num_pages,
        context_tokens=decision.context_tokens,
        max_batch=layout.max_batch,
        prefill_chunk_tokens=layout.prefill_chunk_tokens,
        num_threads=layout.num_threads,
        predicted=decision.predicted,
        choices=decision.choices,
        activation_limits=limits_of(layout.layer_formats, layout.kernels, calibrated_inputs),
    )


def load(path: str | Path) -> Plan:
    """Read a plan file.

    Args:
        path: what `Plan.save` (or `dseek plan --save`) wrote.

    Raises:
        ConfigError: the file cannot be read or is not a sound plan.
    """
    file = Path(path)
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{path} is {file.stat().st_size} bytes long", needed=f"at most {MAX_FILE_BYTES}")
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"plan file {path} cannot be read: {error.strerror or error}",
            remedy="make one with `dseek plan MODEL --save FILE`",
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not a plan: it is not UTF-8 text") from None
    return Plan.from_json(text, where=str(path))


def _check(plan: Plan, where: str) -> None:
    """Refuse numbers that no planner writes."""
    shape = plan.shape
    ranges = (
        ("shape.vocab_size", shape.vocab_size, 1, 2**24),
        ("shape.hidden_size", shape.hidden_size, 1, 2**20),
        ("shape.intermediate_size", shape.intermediate_size, 1, 2**22),
        ("shape.num_layers", shape.num_layers, 1, 2**14),
        ("shape.num_heads", shape.num_heads, 1, 2**14),
        ("shape.num_kv_heads", shape.num_kv_heads, 1, shape.num_heads),
        ("shape.head_dim", shape.head_dim, 16, 2**14),
        ("shape.max_position_embeddings", shape.max_position_embeddings, 1, MAX_CONTEXT_TOKENS),
        ("page_tokens", plan.page_tokens, PAGE_TOKENS, PAGE_TOKENS),
        ("context_tokens", plan.context_tokens, 1, shape.max_position_embeddings),
        ("max_batch", plan.max_batch, 1, MAX_BATCH),
        ("num_pages", plan.num_pages, -(-plan.context_tokens // PAGE_TOKENS), 2**31 - 1),
        ("prefill_chunk_tokens", plan.prefill_chunk_tokens, 1, MAX_CHUNK_TOKENS),
        ("num_threads", plan.num_threads, 1, MAX_THREADS),
    )
    for name, value, low, high in ranges:
        if not low <= value <= high:
            raise ConfigError(f"{where}.{name} is {value}", needed=str(low) if low == high else f"{low} to {high}")
    if len(plan.layer_formats) != shape.num_layers:
        raise ConfigError(
            f"{where}.layer_formats has {len(plan.layer_formats)} entries", needed=f"one a layer, {shape.num_layers}"
        )
    if len(plan.attention_patterns) != shape.num_layers:
        raise ConfigError(
            f"{where}.attention_patterns has {len(plan.attention_patterns)} entries",
            needed=f"one a layer, {shape.num_layers}",
        )
    for layer, pattern in enumerate(plan.attention_patterns):
        if len(pattern.window_tokens) > 1 and len(pattern.window_tokens) != shape.num_kv_heads:
            raise ConfigError(
                f"{where}.attention_patterns[{layer}] has {len(pattern.window_tokens)} windows",
                needed=f"1, or one for each of {shape.num_kv_heads} key-value heads",
            )
        if len(pattern.share_factors) not in (0, shape.num_kv_heads):
            raise ConfigError(
                f"{where}.attention_patterns[{layer}] has {len(pattern.share_factors)} factors on the least share",
                needed=f"one for each of the {shape.num_kv_heads} key-value heads, or none",
            )
        if pattern.dense_heads and pattern.dense_heads[-1] >= shape.num_kv_heads:
            raise ConfigError(
                f"{where}.attention_patterns[{layer}] has a dense head {pattern.dense_heads[-1]}",
                needed=f"0 to {shape.num_kv_heads - 1}",
            )
    if len(plan.activation_limits) not in (0, shape.num_layers):
        raise ConfigError(
            f"{where}.activation_limits has {len(plan.activation_limits)} entries",
            needed=f"one a layer, {shape.num_layers}, or none",
        )
    if any(limit < 0 for limits in plan.activation_limits for limit in limits.by_role().values()):
        raise ConfigError(f"{where}.activation_limits has a limit below 0", needed="0 or more")
    if shape.num_heads % shape.num_kv_heads:
        raise ConfigError(f"{where}.shape.num_heads is {shape.num_heads}", needed="a multiple of num_kv_heads")
    if shape.head_dim % 16:
        raise ConfigError(f"{where}.shape.head_dim is {shape.head_dim}", needed="a multiple of 16")
    if shape.window_layers is not None and len(shape.window_layers) != shape.num_layers:
        raise ConfigError(f"{where}.shape.window_layers has another length than the layers", needed="one a layer")
