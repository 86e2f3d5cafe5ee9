"""Where the engine gets its plan from: a new one for the opened model, or a given one that is checked against it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from dseek.core.errors import ConfigError
from dseek.core.logs import get_logger

if TYPE_CHECKING:
    from dseek.core.shape import ModelShape
    from dseek.hardware.machine import Machine
    from dseek.models.files import ModelFiles
    from dseek.plan.attention_wish import AttentionWish
    from dseek.plan.objective import ObjectiveKind
    from dseek.plan.plan import Plan

logger = get_logger("dseek.engine")

DEFAULT_CONTEXT_TOKENS = 4096
"""Context of a plan that nobody asked a length of, where the model claims at least so much."""


def make_plan(
    files: ModelFiles,
    *,
    precision: str | None,
    cache_dtype: str | None = None,
    context: int | None,
    prompt_tokens: int | None,
    answer_tokens: int | None,
    threads: int | None,
    batch: int,
    objective: ObjectiveKind,
    max_quality_loss: float | None,
    memory_limit_bytes: int | None,
    machine: Machine | None,
    attention: AttentionWish | None = None,
    calibration: str | Path | None = None,
) -> Plan:
    """Plan the run of an opened model; the arguments are those of `load`.

    Args:
        files: the opened model.
        precision: see `load`.
        cache_dtype: see `load`.
        context: see `load`.
        prompt_tokens: see `load`.
        answer_tokens: see `load`.
        threads: see `load`.
        batch: see `load`.
        objective: see `load`.
        max_quality_loss: see `load`.
        memory_limit_bytes: see `load`.
        machine: see `load`.
        attention: what `load` was asked for about attention, or None.
        calibration: see `load`.

    Returns:
        The plan.

    Raises:
        DseekError: an option is wrong, or memory would not suffice.
    """
    from dseek import plan as planning
    from dseek.engine.calibrated import calibrated
    from dseek.engine.head_facts import head_facts
    from dseek.plan.objective import DEFAULT_QUALITY_LOSS

    wanted = planning.Objective(
        kind=objective,
        context_tokens=context,
        batch=batch,
        prompt_tokens=prompt_tokens,
        answer_tokens=answer_tokens,
        max_quality_loss=DEFAULT_QUALITY_LOSS if max_quality_loss is None else max_quality_loss,
        memory_limit_bytes=memory_limit_bytes,
    )
    if context is None:
        # Nobody stated a context, so the prompt is not to fill the one that is taken.
        context = min(files.shape.max_position_embeddings, DEFAULT_CONTEXT_TOKENS)
        prompt_tokens, answer_tokens = wanted.request(context)
        wanted = dataclasses.replace(
            wanted, context_tokens=context, prompt_tokens=prompt_tokens, answer_tokens=answer_tokens
        )
    return planning.make(
        files.shape,
        machine or planning.this_machine(),
        wanted,
        encodings=files.encodings(),
        model=files.name,
        precision=precision,
        cache_dtype=cache_dtype,
        num_threads=threads,
        attention=attention,
        heads=head_facts(files, attention),
        **calibrated(files, calibration),
    )


def given_plan(
    plan: Plan | str | Path,
    files: ModelFiles,
    *,
    precision: str | None,
    cache_dtype: str | None = None,
    context: int | None,
    threads: int | None,
    prompt_tokens: int | None = None,
    answer_tokens: int | None = None,
    max_position_embeddings: int | None = None,
    attention: AttentionWish | None = None,
    calibration: str | Path | None = None,
) -> Plan:
    """Read a plan if need be and check it.

    Args:
        plan: a plan or the file of one.
        files: the opened model; where the plan is for more positions than it has, and nobody asked for a number, it is
            given the plan's.
        precision: what was asked for beside the plan, or None.
        cache_dtype: what was asked for beside the plan, or None.
        context: what was asked for beside the plan, or None.
        threads: what was asked for beside the plan, or None.
        prompt_tokens: what was asked for beside the plan, or None.
        answer_tokens: what was asked for beside the plan, or None.
        max_position_embeddings: what was asked for beside the plan and given to the model already, or None.
        attention: what was asked for beside the plan, or None.
        calibration: what was asked for beside the plan, or None.

    Returns:
        The plan.

    Raises:
        ConfigError: it cannot be read, is for another model, or says something else than was asked for.
    """
    if calibration is not None:
        raise ConfigError(
            "a calibration was given beside a plan, which is made already",
            remedy="leave out one of them; `dseek plan --calibration FILE --save PLAN` makes a plan from a calibration",
        )
    if isinstance(plan, (str, Path)):
        from dseek import plan as planning

        plan = planning.load(plan)
    if max_position_embeddings is None:
        _extend_as_planned(files, plan)
    plan.check_model(files.shape)
    decided = {"precision": plan.precision, "context": plan.context_tokens, "threads": plan.num_threads}
    decided["cache dtype"] = plan.cache_dtype
    decided["prompt tokens"], decided["answer tokens"] = plan.objective.request(plan.context_tokens)
    asked = {"precision": precision, "context": context, "threads": threads}
    asked["cache dtype"] = cache_dtype
    asked |= {"prompt tokens": prompt_tokens, "answer tokens": answer_tokens}
    for name, value in asked.items():
        if value is not None and value not in (decided[name], "auto"):
            raise ConfigError(
                f"{name} {value} contradicts the plan, which says {decided[name]}",
                remedy=f"leave out {name} or the plan",
            )
    if attention is not None:
        attention.check_against(plan.attention_patterns, files.shape.num_kv_heads)
    return plan


def _extend_as_planned(files: ModelFiles, plan: Plan) -> None:
    """Give the model the positions that the plan was made for; `Plan.check_model` judges whether they agree then."""
    from dseek.models.long_positions import SCALINGS, extend_positions

    shape, planned = files.shape, plan.shape
    if planned.max_position_embeddings > shape.max_position_embeddings:
        kept = planned.rope.kind == shape.rope.kind and planned.rope.factor == shape.rope.factor
        kind = "none" if kept else planned.rope.kind
        if kind in SCALINGS:
            files.shape = extend_positions(shape, planned.max_position_embeddings, kind)


def warn_of_idle_positions(shape: ModelShape, plan: Plan, max_position_embeddings: int | None) -> None:
    """Say so where positions were asked for that the context does not reach.

    Args:
        shape: the model, with these positions.
        plan: what runs.
        max_position_embeddings: what was asked for, or None.
    """
    from dseek.models.rope import original_positions

    trained = original_positions(shape)
    if max_position_embeddings is not None and plan.context_tokens <= trained < max_position_embeddings:
        logger.warning(
            "max position embeddings %d: the context is %d tokens, for which the model's own %d suffice",
            max_position_embeddings,
            plan.context_tokens,
            trained,
        )
