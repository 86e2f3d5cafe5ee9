"""Quality of dynamic attention: what it keeps of dense attention's answers, by the same engine in bf16, cache included.

`ratio` is what is kept, `limit_share` the share of causal query-key pairs that was skipped, counted from the decoder's
own selections over all layers, heads and positions of the sequences. Both ways of attending see the same token ids.
"""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks import checks, models, standard_library
from benchmarks.contest import Entrant, running
from benchmarks.errors import BenchmarkError, IncorrectError
from benchmarks.peers.client import PeerProcess
from benchmarks.prose import articles, prose_path
from benchmarks.result import Outcome
from benchmarks.rows import Settings
from benchmarks.scoring import perplexity

MODEL = models.SMOLLM2
SEED = 0
"""Of the order of the files, of the needles' names and codes."""
FIRST = 2192
"""First position whose prediction counts: earlier ones see little more than the patterns do."""
SMOKE_TOKENS, SMOKE_FIRST = 1536, 1024
CHECK_TOKENS = 1024
"""Tokens over which dense attention is compared with transformers in fp32."""
SAME_LOSS = 0.01
"""Largest mean difference, in nats, where dynamic attention has everything in its window: rounding alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What a query may look at."""

    window_tokens: int = 64
    """Tokens before its own block."""
    min_share: float = 0.024
    """Share of some head's attention for which a query opens a block of 64 tokens."""
    top_blocks: int = 64
    """Blocks that sixteen neighbouring queries may open."""


DENSE: dict[str, Any] = {"attention": "dense"}

DENSITY_FIFTH = Budget(min_share=0.031)
"""Looks at a fifth of the causal pairs of 8192 tokens."""


def dynamic_wish(budget: Budget) -> dict[str, Any]:
    """The one place that says how the rows attend dynamically: keyword arguments of `dseek.load`.

    Args:
        budget: the pattern's sizes.
    """
    return {
        "attention": "dynamic",
        "attention_window": budget.window_tokens,
        "attention_top_blocks": budget.top_blocks,
        "attention_min_share": budget.min_share,
    }


@dataclass(kw_only=True, slots=True)
class Scores:
    """What one way of attending predicted, over the positions that count."""

    right: list[list[bool]] = field(default_factory=list)
    """Whether the token that followed was the likeliest, by sequence."""
    losses: list[list[float]] = field(default_factory=list)
    """Nats, by sequence."""
    skipped: list[float] = field(default_factory=list)
    """Share of the causal pairs, by sequence, of all positions."""
    skipped_counted: list[float] = field(default_factory=list)
    """The same of the positions that count."""
    facts: dict[str, Any] = field(default_factory=dict)
    """The patterns, and what the checks saw."""

    @property
    def accuracy(self) -> float:
        """Share of right predictions."""
        return statistics.fmean(right for sequence in self.right for right in sequence)

    @property
    def perplexity(self) -> float:
        """Of all that counts."""
        return perplexity([loss for sequence in self.losses for loss in sequence])


def gate_8k(settings: Settings) -> Outcome:
    """Eight sequences of 8192 tokens."""
    return _gate(settings, settings.pick(8192, SMOKE_TOKENS), settings.pick(8, 1), {})


def gate_16k(settings: Settings) -> Outcome:
    """Four sequences of 16,384 tokens, twice the length the model was trained for."""
    positions = 16384
    return _gate(
        settings,
        settings.pick(positions, SMOKE_TOKENS),
        settings.pick(4, 1),
        {"max_position_embeddings": positions, "rope_scaling": "yarn"},
    )


def _gate(settings: Settings, num_tokens: int, count: int, positions: dict[str, Any]) -> Outcome:
    """Compare next-token top-1 over held-out source.

    Args:
        settings: threads, smoke.
        num_tokens: tokens of a sequence.
        count: sequences.
        positions: arguments of `dseek.load` about the positions.

    Returns:
        The share of dense attention's accuracy that is kept.
    """
    budget = Budget()
    dense, dynamic = _score(settings, held_out_sequences(num_tokens, count), budget, positions)
    kept = _kept(dense.accuracy, dynamic.accuracy)
    return Outcome(
        value=kept,
        unit="fraction",
        ratio=kept,
        limit_share=statistics.fmean(dynamic.skipped),
        peer="dense attention",
        details={
            "data": "files of the standard library that are held out, whole, in an order drawn by the seed",
            "python": platform.python_version(),
            "seed": SEED,
            "sequences": count,
            **_compared(settings, dense, dynamic, budget, num_tokens),
            "kept_by_sequence": [
                _kept(statistics.fmean(base), statistics.fmean(own))
                for base, own in zip(dense.right, dynamic.right, strict=True)
            ],
            **positions,
        },
    )


def prose_perplexity(settings: Settings) -> Outcome:
    """Up to four articles of the user's, the longest ones, each a sequence of 8192 tokens."""
    num_tokens = settings.pick(8192, SMOKE_TOKENS)
    path = prose_path()
    texts = articles(path)
    titles = list(texts)[: settings.pick(4, 1)]
    encoded = encode([texts[title] for title in titles])
    sequences = {title: ids[:num_tokens] for title, ids in zip(titles, encoded, strict=True) if len(ids) >= num_tokens}
    if not sequences:
        raise BenchmarkError(f"no article in {path} has {num_tokens} tokens")
    dense, dynamic = _score(settings, list(sequences.values()), DENSITY_FIFTH, {})
    return Outcome(
        value=dynamic.perplexity / dense.perplexity - 1,
        unit="fraction",
        ratio=dense.perplexity / dynamic.perplexity,
        limit_share=statistics.fmean(dynamic.skipped),
        peer="dense attention",
        details={
            "data": f"contexts of an article joined, from {path.name}",
            "articles": list(sequences),
            "sequences": len(sequences),
            **_compared(settings, dense, dynamic, DENSITY_FIFTH, num_tokens),
            "perplexity_by_sequence": [
                [perplexity(base), perplexity(own)] for base, own in zip(dense.losses, dynamic.losses, strict=True)
            ],
        },
    )


def _kept(dense: float, dynamic: float) -> float:
    """The share of dense attention's accuracy that is kept; red where dense attention predicts nothing."""
    if not dense > 0:
        raise IncorrectError("dense attention predicted no token")
    return dynamic / dense


def _compared(settings: Settings, dense: Scores, dynamic: Scores, budget: Budget, num_tokens: int) -> dict[str, Any]:
    """Figures that the rows over texts have in common, for the details."""
    return {
        "tokens_of_a_sequence": num_tokens,
        "first_position": _first(settings),
        "positions": sum(map(len, dense.losses)),
        "budget": asdict(budget),
        "accuracy": {"dense": dense.accuracy, "dynamic": dynamic.accuracy},
        "perplexity": {"dense": dense.perplexity, "dynamic": dynamic.perplexity},
        "skipped_by_sequence": dynamic.skipped,
        "skipped_of_counted_positions": statistics.fmean(dynamic.skipped_counted),
        "checks": {"dense": dense.facts, "dynamic": dynamic.facts},
    }


def _first(settings: Settings) -> int:
    return settings.pick(FIRST, SMOKE_FIRST)


def held_out_sequences(num_tokens: int, count: int) -> list[list[int]]:
    """Sequences of held-out source in SmolLM2's vocabulary.

    Args:
        num_tokens: tokens of each.
        count: how many.

    Returns:
        Token ids; no file serves two of them.
    """
    names = standard_library.shuffled(standard_library.held_out_files(), SEED)
    return standard_library.joined(encode([standard_library.read(name) for name in names]), num_tokens, count)


def encode(texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts by dseek's tokenizer, without special ones.

    Args:
        texts: the texts.
    """
    with PeerProcess("dseek") as worker:
        ids: list[list[int]] = worker.call("encode_all", path=models.own_path(MODEL), texts=list(texts))["token_ids"]
    return ids


@contextmanager
def attending(
    settings: Settings, name: str, wish: dict[str, Any], num_tokens: int
) -> Iterator[tuple[PeerProcess, dict[str, Any]]]:
    """Load dseek in bf16 with a way of attending.

    Args:
        settings: threads.
        name: of the way.
        wish: keyword arguments of `dseek.load`.
        num_tokens: longest sequence.

    Yields:
        The worker, which watches its sequences, and what it says of its attention.

    Raises:
        IncorrectError: the cache is not bf16.
    """
    options = {"precision": "bf16", "batch": 1, **wish}
    entrant = Entrant(f"dseek {name}", "dseek", models.own_path(MODEL), options)
    with running([entrant], threads=settings.threads, context_tokens=num_tokens) as engines:
        (engine,) = engines
        if engine.loaded["cache_dtype"] != "bf16":
            raise IncorrectError(f"the cache is {engine.loaded['cache_dtype']}, bf16 is compared")
        facts = engine.process.call("watch")
        yield engine.process, {key: facts[key] for key in ("attention", "gate")}


def _score(
    settings: Settings, sequences: Sequence[list[int]], budget: Budget, positions: dict[str, Any]
) -> tuple[Scores, Scores]:
    """Score sequences with both ways of attending, and check both.

    Args:
        settings: threads, smoke.
        sequences: token ids, of one length.
        budget: of dynamic attention.
        positions: arguments of `dseek.load` about the positions.

    Returns:
        Scores of dense and of dynamic attention.

    Raises:
        IncorrectError: dense attention is not what transformers computes, or dynamic attention is not the same where
            everything lies in its window, or it skipped nothing.
    """
    num_tokens = len(sequences[0])
    # The first block and the window before the query's block: all that lies before it, whatever is selected.
    near = sequences[0][: budget.window_tokens + 64]
    scores, near_losses = [], []
    for name, wish in (("dense", DENSE), ("dynamic", dynamic_wish(budget))):
        with attending(settings, name, wish | positions, num_tokens) as (process, facts):
            found = Scores(facts=facts)
            near_losses.append(process.call("nll", token_ids=near, window=len(near))["losses"])
            found.facts["skipped_in_window"] = process.call("skipped", firsts=[0])["shares"][0]
            for ids in sequences:
                _add(found, process, ids, _first(settings))
            if name == "dense":
                found.facts |= checks.check_losses(
                    process,
                    MODEL,
                    sequences[0][:CHECK_TOKENS],
                    CHECK_TOKENS,
                    threads=settings.threads,
                    config=_reference_config(positions),
                )
            scores.append(found)
    dense, dynamic = scores
    difference = statistics.fmean(abs(own - base) for base, own in zip(*near_losses, strict=True))
    dynamic.facts["difference_in_window"] = difference
    if not difference <= SAME_LOSS or dynamic.facts["skipped_in_window"] != 0:
        raise IncorrectError(
            f"where everything lies in the window, dynamic attention differs by {difference:.4f} nats a token and "
            f"skips {dynamic.facts['skipped_in_window']:.2%}"
        )
    if any(dense.skipped) or not all(share > 0 for share in dynamic.skipped):
        raise IncorrectError(f"dense attention skipped {dense.skipped}, dynamic {dynamic.skipped}")
    return dense, dynamic


def _add(found: Scores, process: PeerProcess, ids: list[int], first: int) -> None:
    """Score one sequence and count what was skipped of it."""
    answer = process.call("nll", token_ids=ids, window=len(ids))
    counted, all_of_it = process.call("skipped", firsts=[first, 0])["shares"]
    process.freeze()
    targets = ids[1:]
    found.right.append([best == target for best, target in zip(answer["best"], targets, strict=True)][first:])
    found.losses.append(answer["losses"][first:])
    found.skipped_counted.append(counted)
    found.skipped.append(all_of_it)


def _reference_config(positions: dict[str, Any]) -> dict[str, Any]:
    """What `positions` means in a Hugging Face configuration."""
    if not positions:
        return {}
    config = json.loads((models.hf_folder(MODEL) / "config.json").read_text())
    trained, wanted = config["max_position_embeddings"], positions["max_position_embeddings"]
    rope = {
        "rope_type": positions["rope_scaling"],
        "factor": wanted / trained,
        "original_max_position_embeddings": trained,
    }
    return {"max_position_embeddings": wanted, "rope_parameters": {**config["rope_parameters"], **rope}}
