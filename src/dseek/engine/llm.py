"""`load`: opens a model, takes (or makes) a plan, and builds what the plan says, ready to answer as an `LLM`.

Imports PyTorch only where the plan runs on it.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dseek.core.errors import DseekError
from dseek.core.logs import get_logger
from dseek.engine.engine import EngineOptions
from dseek.engine.loaded import LLM, Prompt

if TYPE_CHECKING:
    from dseek.hardware.machine import Machine
    from dseek.models.files import ModelFiles
    from dseek.models.long_positions import Scaling
    from dseek.parallel.strategy import ShardStrategy
    from dseek.plan.objective import ObjectiveKind
    from dseek.plan.plan import Plan

logger = get_logger("dseek.engine")

__all__ = ["LLM", "Prompt", "load"]


@contextlib.contextmanager
def _paused_collector() -> Iterator[None]:
    """Keep Python's garbage collector from running.

    A vocabulary is some 200,000 objects that stay; the collector would look through them again and again while they
    are made, which takes as long as a tenth of the whole load.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_paused_collector()
def load(
    model: str | ModelFiles,
    *,
    precision: str | None = None,
    cache_dtype: str | None = None,
    plan: Plan | str | Path | None = None,
    context: int | None = None,
    prompt_tokens: int | None = None,
    answer_tokens: int | None = None,
    threads: int | None = None,
    batch: int = 4,
    objective: ObjectiveKind = "latency",
    max_quality_loss: float | None = None,
    memory_limit_bytes: int | None = None,
    max_position_embeddings: int | None = None,
    rope_scaling: Scaling | None = None,
    machine: Machine | None = None,
    attention: str | None = None,
    attention_window: int | str | None = None,
    attention_top_blocks: int | None = None,
    attention_far: bool | None = None,
    attention_min_share: float | None = None,
    shard_strategy: ShardStrategy | None = None,
    calibration: str | Path | None = None,
    prefix_cache: bool = True,
    speculate: int = 0,
) -> LLM:
    """Open a model, plan its run and make it ready to answer.

    Args:
        model: a folder in Hugging Face layout, a `.gguf` file, an alias or a hub id; or the opened files of one, which
            then belong to what is returned.
        precision: auto, fp32, bf16, fp16, int8 or int4; None takes DSEEK_PRECISION_MODE.
        cache_dtype: fp32, bf16 or int8, of the cache of keys and values; None takes the plan's choice.
        plan: a plan, or a file that `dseek plan --save` wrote; excludes the options that would make another one.
        context: longest prompt with its answer, in tokens; None takes the model's, at most 4096.
        prompt_tokens: prompt of the typical request that is planned for; None takes what fills `context` if that is
            given, else 512.
        answer_tokens: answer of the typical request; None takes 128, fewer in a short context.
        threads: threads of the kernels; None takes DSEEK_NUM_THREADS, else the plan's choice.
        batch: requests that may run at once.
        objective: what to plan for: latency, throughput or memory.
        max_quality_loss: fraction of perplexity that a faster precision may cost; None takes the plan's default.
        memory_limit_bytes: peak memory that the plan may foresee; None takes the machine's.
        max_position_embeddings: positions to run with, from the model's own up; None takes those of a given plan, else
            the model's. It permits a longer `context` and does not ask for one.
        rope_scaling: how positions beyond the model's own are rotated: auto, yarn, dynamic, linear or none; None is
            auto. See `dseek.models.long_positions`.
        machine: a measured machine; None takes this one's measurements, made on first use.
        attention: auto, dense, window or dynamic; None is auto, or what the options below are about. What is asked for
            is had whatever quality it costs.
        attention_window: tokens that every position sees before its own block: 64, 128, ... 4096; auto gives every
            key-value head its own, from the model's gate file or measured once; None chooses one for all.
        attention_top_blocks: blocks of 64 tokens that dynamic attention selects beside the window; None chooses.
        attention_far: whether what dynamic attention does not select counts by its means; None is False.
        attention_min_share: least share of a head's attention, above 0 and below 1, that makes a query open a block;
            None chooses, or lets a block's first query choose where `attention_top_blocks` or `attention_far` says so.
        shard_strategy: how ranks share out long prompts: auto, contiguous or zigzag; None runs alone. All ranks of the
            default process group, or of torchrun, then call this and everything else alike.
        calibration: file that `dseek calibrate` wrote for this model, whose losses and ranges the plan is made from;
            None takes the one beside the model, if there is one.
        prefix_cache: keep computed pages of the cache for later prompts that begin alike, while nobody needs them.
        speculate: guess so many tokens of an answer at a time, from what stood before, and check them in one step; 0
            guesses none. The answers are the same.

    Returns:
        The loaded model.

    Raises:
        DseekError: the model cannot be found, read or run, an option is wrong, or memory would not suffice.
    """
    from dseek.engine.build import build_runner
    from dseek.engine.planning import given_plan, make_plan, warn_of_idle_positions
    from dseek.models.files import open_model
    from dseek.models.long_positions import extend_positions
    from dseek.plan.attention_wish import AttentionWish

    wish = AttentionWish(
        kind=attention,
        window_tokens=attention_window,
        top_blocks=attention_top_blocks,
        far=attention_far,
        min_share=attention_min_share,
    )
    options = EngineOptions(prefix_cache=prefix_cache, speculate=speculate)
    ranks = None
    if shard_strategy is not None:
        from dseek.engine import sharding

        ranks = sharding.meet(shard_strategy)
    files = open_model(model) if isinstance(model, str) else model

    def decide() -> Plan:
        if plan is not None:
            return given_plan(
                plan,
                files,
                precision=precision,
                cache_dtype=cache_dtype,
                context=context,
                threads=threads,
                prompt_tokens=prompt_tokens,
                answer_tokens=answer_tokens,
                max_position_embeddings=max_position_embeddings,
                attention=wish,
                calibration=calibration,
            )
        host: dict[str, Any] = {"machine": machine, "threads": threads, "memory_limit_bytes": memory_limit_bytes}
        made = make_plan(
            files,
            precision=precision,
            cache_dtype=cache_dtype,
            context=context,
            prompt_tokens=prompt_tokens,
            answer_tokens=answer_tokens,
            batch=batch,
            objective=objective,
            max_quality_loss=max_quality_loss,
            attention=wish,
            calibration=calibration,
            **(host if ranks is None else sharding.share_of_host(**host)),
        )
        return made if ranks is None else sharding.with_longer_steps(made, ranks.world_size)

    # The tokenizer is built beside the planning and packing; whoever needs it first waits for it.
    threading.Thread(target=_build_tokenizer, args=(files,), daemon=True).start()
    try:
        files.shape = extend_positions(files.shape, max_position_embeddings, rope_scaling)
        decided = decide() if ranks is None else sharding.shared_plan(ranks, decide)
        if ranks is not None and ranks.rank > 0:
            given_plan(decided, files, precision=None, context=None, threads=None)
        warn_of_idle_positions(files.shape, decided, max_position_embeddings)
        runner = build_runner(files, decided)
        if ranks is not None and shard_strategy is not None:
            runner = sharding.sharded(runner, decided, ranks, shard_strategy)
        return LLM(files, decided, runner, options)
    except BaseException:
        files.close()
        raise


def _build_tokenizer(files: ModelFiles) -> None:
    """Build a model's tokenizer ahead of its use; an error comes again, and is reported, when it is used."""
    with contextlib.suppress(DseekError, OSError):
        files.tokenizer()
