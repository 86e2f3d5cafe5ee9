"""`TorchMarian`: an encoder-decoder on PyTorch, eager, float32: where there are no kernels, and what they are beside.

It does nothing twice: query, key and value are one product, keys of the source are computed once, caches have their
size from the start, and rows that have ended leave the batch. B sentences, S source tokens, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dseek.engine.translation import Seq2SeqRunner
from dseek.models.marian import Marian

_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu}
_Affine = tuple[torch.Tensor, torch.Tensor]


@dataclass(slots=True)
class _Block:
    """Weights and biases of a layer; those for the source are missing in the encoder."""

    qkv: _Affine
    output: _Affine
    norm: _Affine
    inner: _Affine
    outer: _Affine
    final_norm: _Affine
    source_query: _Affine | None = None
    source_output: _Affine | None = None
    source_norm: _Affine | None = None


class TorchMarian(Seq2SeqRunner):
    """Greedy decoding with caches.

    Args:
        model: whose weights are taken.
        threads: of PyTorch; None leaves their number as it is.
    """

    def __init__(self, model: Marian, *, threads: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.shape = model.shape
        self.state = state = {name: value.detach().float() for name, value in model.state_dict().items()}
        """The weights, by the names of transformers."""
        self._encoder = [
            _block(state, f"model.encoder.layers.{index}") for index in range(self.shape.num_encoder_layers)
        ]
        names = [f"model.decoder.layers.{index}" for index in range(self.shape.num_decoder_layers)]
        self._decoder = [_block(state, name) for name in names]
        self._source = _joined(
            state, [f"{name}.encoder_attn.{part}" for name in names for part in ("k_proj", "v_proj")]
        )
        self._embedding = state["model.shared.weight"]
        self._scaled = self._embedding * self.shape.embedding_scale
        self._positions = model.positions.float()
        self._head_bias = state["final_logits_bias"][0].clone()
        self._head_bias[list(self.shape.suppressed_ids)] = -torch.inf

    @torch.inference_mode()
    def translate(self, sources: Sequence[Sequence[int]], limits: Sequence[int]) -> list[list[int]]:
        """Answer a batch; see `Seq2SeqRunner.translate`.

        Args:
            sources: token ids with the end token, at least one each.
            limits: most tokens of each answer.

        Returns:
            Token ids of each answer, without start and end token.
        """
        shape, num_rows = self.shape, len(sources)
        mask_BS, source = self._encode(sources)
        size = (shape.num_decoder_layers, 2, num_rows, shape.num_heads, max(limits), shape.head_dim)
        own = torch.empty(size)
        answers: list[list[int]] = [[] for _ in sources]
        rows = list(range(num_rows))  # sentence of each row, None where it has ended
        ended = [False] * num_rows
        next_B = torch.full((num_rows,), shape.start_id)
        for step in range(max(limits)):
            next_B = self._step(next_B, step, own, source, mask_BS)
            for row, token in enumerate(next_B.tolist()):
                sentence = rows[row]
                if ended[sentence]:
                    continue
                if token == shape.eos_id:
                    ended[sentence] = True
                    continue
                answers[sentence].append(token)
                ended[sentence] = len(answers[sentence]) == limits[sentence]
            going_on = [row for row, sentence in enumerate(rows) if not ended[sentence]]
            if not going_on:
                break
            # Moving the caches costs something too, so rows leave a quarter of the batch at a time.
            if 4 * len(going_on) <= 3 * len(rows):
                kept = torch.tensor(going_on)
                rows = [rows[row] for row in going_on]
                next_B, source = next_B[kept], source.index_select(2, kept)
                mask_BS = None if mask_BS is None else mask_BS[kept]
                moved = torch.empty((*size[:2], len(rows), *size[3:]))
                moved[..., : step + 1, :] = own[:, :, kept, :, : step + 1]
                own = moved
        return answers

    def _encode(self, sources: Sequence[Sequence[int]]) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Mask of the sources (None where all are as long), and their keys and values, [L, 2, B, H, S, d]."""
        longest = max(len(source) for source in sources)
        ids_BS = torch.tensor([[*source, *[self.shape.pad_id] * (longest - len(source))] for source in sources])
        mask_BS = None
        if any(len(source) != longest for source in sources):
            lengths = torch.tensor([len(source) for source in sources])
            mask_BS = (torch.arange(longest) < lengths[:, None])[:, None, None]
        x_BSD = F.embedding(ids_BS, self._scaled) + self._positions[:longest]
        for block in self._encoder:
            q, k, v = F.linear(x_BSD, *block.qkv).unflatten(-1, (3, self.shape.num_heads, -1)).unbind(2)
            attended = F.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask_BS
            )
            attended = F.linear(attended.transpose(1, 2).flatten(2), *block.output)
            x_BSD = self._finish(block, self._norm(x_BSD + attended, block.norm))
        shape = self.shape
        split = (shape.num_decoder_layers, 2, shape.num_heads, shape.head_dim)
        source = F.linear(x_BSD, *self._source).unflatten(-1, split).permute(2, 3, 0, 4, 1, 5)
        return mask_BS, source.contiguous()

    def _step(
        self, next_B: torch.Tensor, step: int, own: torch.Tensor, source: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Take one token of each row and choose the next."""
        heads = (self.shape.num_heads, 1, self.shape.head_dim)
        x_BD = F.embedding(next_B, self._scaled) + self._positions[step]
        for layer, block in enumerate(self._decoder):
            q, k, v = F.linear(x_BD, *block.qkv).unflatten(-1, (3, *heads)).unbind(1)
            own[layer, 0, :, :, step], own[layer, 1, :, :, step] = k[:, :, 0], v[:, :, 0]
            attended = F.scaled_dot_product_attention(
                q, own[layer, 0, :, :, : step + 1], own[layer, 1, :, :, : step + 1]
            )
            x_BD = self._norm(x_BD + F.linear(attended.flatten(1), *block.output), block.norm)
            assert block.source_query and block.source_output and block.source_norm
            q = F.linear(x_BD, *block.source_query).unflatten(-1, heads)
            attended = F.scaled_dot_product_attention(q, source[layer, 0], source[layer, 1], attn_mask=mask)
            x_BD = self._norm(x_BD + F.linear(attended.flatten(1), *block.source_output), block.source_norm)
            x_BD = self._finish(block, x_BD)
        return F.linear(x_BD, self._embedding, self._head_bias).argmax(-1)

    def _finish(self, block: _Block, x: torch.Tensor) -> torch.Tensor:
        inner = _FUNCTIONS[self.shape.activation](F.linear(x, *block.inner))
        return self._norm(x + F.linear(inner, *block.outer), block.final_norm)

    def _norm(self, x: torch.Tensor, norm: _Affine) -> torch.Tensor:
        return F.layer_norm(x, (self.shape.hidden_size,), *norm)


def _joined(state: dict[str, torch.Tensor], names: Sequence[str]) -> _Affine:
    """Projections that share their inputs, one below the other."""
    return torch.cat([state[f"{name}.weight"] for name in names]), torch.cat([state[f"{name}.bias"] for name in names])


def _block(state: dict[str, torch.Tensor], name: str) -> _Block:
    attention, source = f"{name}.self_attn", f"{name}.encoder_attn"
    reads_source = f"{source}.q_proj.weight" in state
    return _Block(
        qkv=_joined(state, [f"{attention}.{part}" for part in ("q_proj", "k_proj", "v_proj")]),
        output=_joined(state, [f"{attention}.out_proj"]),
        norm=_joined(state, [f"{attention}_layer_norm"]),
        inner=_joined(state, [f"{name}.fc1"]),
        outer=_joined(state, [f"{name}.fc2"]),
        final_norm=_joined(state, [f"{name}.final_layer_norm"]),
        source_query=_joined(state, [f"{source}.q_proj"]) if reads_source else None,
        source_output=_joined(state, [f"{source}.out_proj"]) if reads_source else None,
        source_norm=_joined(state, [f"{source}_layer_norm"]) if reads_source else None,
    )
