"""One plan for all ranks, and each rank's share of its host."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dseek.core import environment
from dseek.core.errors import ConfigError, DseekError
from dseek.parallel.meeting import expecting, join
from dseek.parallel.strategy import ShardStrategy, check_strategy

if TYPE_CHECKING:
    from dseek.engine.runner import Runner
    from dseek.hardware.machine import Machine
    from dseek.parallel.ranks import Ranks
    from dseek.plan.plan import Plan

LOCAL_VARIABLE = "LOCAL_WORLD_SIZE"
"""Ranks on this host, as torchrun says it."""


def meet(strategy: ShardStrategy) -> Ranks:
    """Find the ranks that a prompt is shared out to.

    Args:
        strategy: how; checked before anybody is waited for.

    Returns:
        This process among its peers.

    Raises:
        ConfigError: an unknown strategy, or nothing says who the peers are.
        PeerError: a peer did not come.
    """
    check_strategy(strategy)
    return join()


def shared_plan(ranks: Ranks, decide: Callable[[], Plan]) -> Plan:
    """Let rank 0 decide for all, since ranks may have measured different machines.

    Args:
        ranks: this process and its peers.
        decide: makes the plan; called on rank 0 only.

    Returns:
        The plan of rank 0, on every rank.

    Raises:
        DseekError: rank 0 could not make one; on the other ranks a ConfigError that says why.
        PeerError: rank 0 does not answer.
    """
    from dseek.plan.plan import Plan

    if ranks.rank == 0:
        try:
            plan = decide()
        except DseekError as error:
            with expecting("the plan"):
                ranks.broadcast_text(json.dumps({"error": str(error)}))
            raise
        with expecting("the plan"):
            ranks.broadcast_text(json.dumps({"plan": plan.to_json()}))
        return plan
    with expecting("the plan"):
        answer = json.loads(ranks.broadcast_text(None))
    if "error" in answer:
        raise ConfigError(f"rank 0 has no plan: {answer['error']}")
    return Plan.from_json(answer["plan"], where="the plan of rank 0")


def share_of_host(machine: Machine | None, threads: int | None, memory_limit_bytes: int | None) -> dict[str, Any]:
    """Leave the other ranks of this host their part of its cores and memory.

    Args:
        machine: its measurements; None takes this one's.
        threads: what was asked for, which stands, or None.
        memory_limit_bytes: what was asked for, which stands, or None.

    Returns:
        Keyword arguments of `make_plan`.

    Raises:
        ConfigError: the environment variable with the number of ranks is no number.
    """
    from dseek import plan as planning

    machine = machine or planning.this_machine()
    text = os.environ.get(LOCAL_VARIABLE) or "1"
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"environment variable {LOCAL_VARIABLE} is {text!r}", needed="the ranks on this host")
    num_local = int(text)
    if threads is None and environment.get("DSEEK_NUM_THREADS") is None and num_local > 1:
        threads = max(1, machine.num_cores // num_local)
    if memory_limit_bytes is None and num_local > 1:
        memory_limit_bytes = machine.memory_limit_bytes // num_local
    return {"machine": machine, "threads": threads, "memory_limit_bytes": memory_limit_bytes}


def with_longer_steps(plan: Plan, num_ranks: int) -> Plan:
    """Let a step have as many rows a rank as it had alone, up to a whole context.

    Args:
        plan: made for one process.
        num_ranks: ranks that a prompt is shared out to.
    """
    from dseek.plan.plan import MAX_CHUNK_TOKENS

    rows = min(plan.prefill_chunk_tokens * num_ranks, max(plan.prefill_chunk_tokens, plan.context_tokens))
    return dataclasses.replace(plan, prefill_chunk_tokens=min(rows, MAX_CHUNK_TOKENS))


def sharded(runner: Runner, plan: Plan, ranks: Ranks, strategy: ShardStrategy) -> Runner:
    """Join a rank's runner with those of its peers.

    Args:
        runner: this rank's.
        plan: what all run.
        ranks: this process and its peers.
        strategy: how prompts are shared out.

    Returns:
        A runner that they use together.

    Raises:
        ConfigError: the plan's kernels are not native.
        PeerError: the ranks do not run the same.
    """
    from dseek.engine.native_runner import NativeRunner
    from dseek.engine.sharded_runner import ShardedRunner

    if not isinstance(runner, NativeRunner):
        raise ConfigError(
            "a shard strategy was asked for, but the plan runs on PyTorch", needed="the native kernels on every rank"
        )
    return ShardedRunner(runner, plan, ranks, strategy)
