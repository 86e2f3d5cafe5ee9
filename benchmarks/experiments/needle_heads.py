"""Which heads a missed needle hangs on: the row `needle`'s prompts, their last rows by the gate, head by head.

Run: `python -m benchmarks.experiments.needle_heads [--lengths N ...]`. The haystack is read densely, in float32, and
only the question and the answer's own digits attend to what the gate chooses, by the rule of `gate_recall`. Where that
loses the answer, each key and value head in turn sees everything, and then each of them by the true masses: a head that
brings the answer back in the first case is one it hangs on, and in the second the gate is at fault.

R rows of question and answer, T tokens, H query heads in G groups, B blocks, d head width.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from rich.progress import track

from benchmarks import models
from benchmarks.experiments.gate_recall import Selection
from benchmarks.rows.attention_quality import MODEL, Budget
from benchmarks.rows.needle import DEPTHS, LENGTHS, NEEDLES, Trial, make_trials
from dseek.core.attention_pattern import BLOCK_TOKENS
from dseek.models.decoder import Block, Decoder
from dseek.models.files import open_model
from dseek.models.gate_file import find_gates
from dseek.models.projections import layer_projections, project
from dseek.ops.attention.rotary import rotate
from dseek.ops.attention.row_selection import STRIP_ROWS
from dseek.train.gate import Gate
from dseek.train.gate_samples import key_statistics
from dseek.train.gate_training import gates_of

QUESTION_ROWS = 24
"""Rows before the answer that attend to what is chosen."""

Head = tuple[int, int]
"""A layer and a key and value head."""


@dataclass(frozen=True, slots=True)
class Read:
    """A prompt whose haystack was read densely."""

    token_ids: torch.Tensor
    """int64 [T]: prompt, answer and padding, whole blocks."""
    first: int
    """First row that attends to what is chosen, a whole strip."""
    targets: tuple[int, int]
    """Rows that predict the answer: the first one and the one after the last."""
    layers: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    """Keys before and after rotation and values [first, G, d] of each layer."""


def read(decoder: Decoder, trial: Trial) -> Read:
    """Read a prompt densely.

    Args:
        decoder: in float32.
        trial: the prompt and its answer.
    """
    ids = [*trial.prompt, *trial.answer]
    ids += ids[:1] * (-len(ids) % BLOCK_TOKENS)
    first = (len(trial.prompt) - QUESTION_ROWS) // STRIP_ROWS * STRIP_ROWS
    token_ids = torch.tensor(ids)
    layers = [
        (layer.keys[:first].clone(), layer.rotated_keys[:first].clone(), layer.values[:first].clone())
        for layer in layer_projections(decoder, token_ids)
    ]
    begin = len(trial.prompt) - 1
    return Read(token_ids, first, (begin, begin + len(trial.answer)), layers)


@torch.inference_mode()
def answer(
    decoder: Decoder, selections: list[Selection], prompt: Read, way: str | None, others: dict[Head, str | None]
) -> tuple[bool, float]:
    """Let question and answer attend to what is chosen.

    Args:
        decoder: in float32.
        selections: one a layer.
        prompt: what was read.
        way: how heads choose; None is everything.
        others: heads that choose in another way.

    Returns:
        Whether every token of the answer is the likeliest one after those before, and the answer's log-likelihood.
    """
    model, first = decoder.model, prompt.first
    rows_R = torch.arange(first, len(prompt.token_ids))
    x_RD = model.embed_tokens(prompt.token_ids[first:])
    rotation = model.rotary_emb(rows_R, x_RD.dtype, None)
    hidden_RT = torch.arange(len(prompt.token_ids))[None] > rows_R[:, None]
    for layer, block in enumerate(model.layers):
        assert isinstance(block, Block)
        q_RHd, k_RGd, v_RGd = project(block.self_attn, block.input_layernorm(x_RD))
        rotated_RHd, past = rotate(q_RHd, *rotation), prompt.layers[layer]
        k_TGd, v_TGd = torch.cat((past[0], k_RGd)), torch.cat((past[2], v_RGd))
        rotated_TGd = torch.cat((past[1], rotate(k_RGd, *rotation)))
        num_groups = k_TGd.shape[1]
        q_GPRd = rotated_RHd.unflatten(1, (num_groups, -1)).permute(1, 2, 0, 3)
        scores_GPRT = q_GPRd @ rotated_TGd.permute(1, 2, 0)[:, None] * q_GPRd.shape[-1] ** -0.5
        weights_GPRT = scores_GPRT.masked_fill_(hidden_RT, float("-inf")).softmax(-1)
        ways_G = [others.get((layer, group), way) for group in range(num_groups)]
        for used in set(filter(None, ways_G)):
            mass_RHB = weights_GPRT.unflatten(-1, (-1, BLOCK_TOKENS)).sum(-1).permute(2, 0, 1, 3).flatten(1, 2)
            means_BGd = rotated_TGd.unflatten(0, (-1, BLOCK_TOKENS)).mean(1)
            keep_GRB = selections[layer].of(
                used, rows_R, mass_RHB, (q_RHd, rotated_RHd), (key_statistics(k_TGd), means_BGd)
            )
            for group in (index for index, own in enumerate(ways_G) if own == used):
                weights_GPRT[group] *= keep_GRB[group].repeat_interleave(BLOCK_TOKENS, -1)
        weights_GPRT /= weights_GPRT.sum(-1, keepdim=True)
        out_RHd = (weights_GPRT @ v_TGd.transpose(0, 1)[:, None]).permute(2, 0, 1, 3).flatten(1, 2)
        x_RD = x_RD + block.self_attn.o_proj(out_RHd.flatten(1))
        x_RD = x_RD + block.mlp(block.post_attention_layernorm(x_RD))
    begin, end = prompt.targets
    logits_AV = decoder.lm_head(model.norm(x_RD[begin - first : end - first]))
    target_A = prompt.token_ids[begin + 1 : end + 1]
    likelihood = logits_AV.log_softmax(-1).gather(1, target_A[:, None]).sum()
    return bool((logits_AV.argmax(-1) == target_A).all()), float(likelihood)


def examine(
    decoder: Decoder, selections: list[Selection], trial: Trial, counts: dict[str, Counter[Head]] | None
) -> None:
    """Print what one prompt hangs on.

    Args:
        decoder: in float32.
        selections: one a layer.
        trial: the prompt.
        counts: raised for every head that brings the answer back, by how it attends; None tries no heads.
    """
    prompt = read(decoder, trial)
    heads = [(layer, group) for layer, past in enumerate(prompt.layers) for group in range(past[0].shape[1])]
    found = {name: answer(decoder, selections, prompt, name, {}) for name in (None, "gate", "true masses")}
    said = ", ".join(
        f"{name or 'dense'} {'yes' if right else 'no'} ({value:.1f})" for name, (right, value) in found.items()
    )
    print(f"{trial.needle.name}, {trial.length} tokens, depth {trial.depth}: {said}", flush=True)
    if counts is None or not found[None][0] or found["gate"][0]:
        return
    for name, way in (("everything", None), ("true masses", "true masses")):
        tried = {head: answer(decoder, selections, prompt, "gate", {head: way}) for head in _shown(heads, name)}
        counts[name].update(head for head, (right, _) in tried.items() if right)
        best = sorted(tried, key=lambda head: -tried[head][1])[:6]
        values = ", ".join(f"{head} {tried[head][1]:.1f}{' found' if tried[head][0] else ''}" for head in best)
        print(f"  one head sees {name}: {values}", flush=True)


def _shown(heads: Iterable[Head], name: str) -> Iterable[Head]:
    return track(list(heads), description=name, transient=True)


def main() -> int:
    """Print each prompt that the gate loses and the heads it hangs on.

    Returns:
        Exit status: 2 where the model has no gate.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", choices=LENGTHS, default=LENGTHS, metavar="N")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="of the needles (default: all)")
    parser.add_argument("--share", type=float, default=Budget().min_share, help="least share (default: %(default)s)")
    parser.add_argument("--answers-only", action="store_true", help="try no heads one by one")
    arguments = parser.parse_args()
    budget = Budget(min_share=arguments.share)
    trials = make_trials(LENGTHS, DEPTHS, NEEDLES)
    with open_model(models.own_path(MODEL)) as files:
        gates = find_gates(files)
        if gates is None:
            print(f"needle_heads: error: {files.name} has no gate, train one with `dseek train-gate`", file=sys.stderr)
            return 2
        decoder = Decoder.from_files(files, torch.float32).requires_grad_(False)
    selections = []
    for layer, gate in enumerate(gates_of(gates)):
        assert isinstance(gate, Gate)
        selections.append(Selection(gates, layer, gate, budget))
    counts: dict[str, Counter[Head]] = {"everything": Counter(), "true masses": Counter()}
    for trial in trials:
        if trial.length in arguments.lengths and (not arguments.names or trial.needle.name in arguments.names):
            examine(decoder, selections, trial, None if arguments.answers_only else counts)
    if not arguments.answers_only:
        for name, found in counts.items():
            print(f"answers that one head brings back by {name}: {dict(found.most_common(12))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
