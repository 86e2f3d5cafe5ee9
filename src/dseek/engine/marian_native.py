"""`NativeMarian`: an encoder-decoder on the compiled kernels, a whole batch and all its steps in one call.

Products run in float32 or on integers: weights rounded to int8 with one scale an output channel, activations a token at
a time as they come. The embedding, norms, softmax and sums stay float32. Positions and keys are kept in float32: they
are small beside the weights of a sentence's length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from dseek.core.errors import UnsupportedModelError
from dseek.engine.translation import Seq2SeqRunner
from dseek.models.encoding import to_float32
from dseek.models.marian import Marian
from dseek.ops import native
from dseek.ops.linear.packing import pack
from dseek.ops.tensor import EncodedTensor

FORMATS = {"fp32": "f32", "int8": "i8p"}
"""Precision to the format of packed weights."""
_LANES = 16


class NativeMarian(Seq2SeqRunner):
    """Packed weights and caches of one model.

    Args:
        model: whose weights are packed; not needed afterwards.
        precision: a key of `FORMATS`.
        threads: of the kernels; None leaves their number as it is.

    Raises:
        ConfigError: there are no native kernels.
        UnsupportedModelError: heads of a width that the kernels do not have.
    """

    def __init__(self, model: Marian, precision: str, *, threads: int | None = None) -> None:
        compiled = native.require()
        self.shape = shape = model.shape
        if shape.head_dim % _LANES:
            raise UnsupportedModelError(
                f"heads are {shape.head_dim} wide",
                needed=f"a multiple of {_LANES} for the native kernels",
                remedy="run it on PyTorch",
            )
        if threads is not None:
            compiled.set_num_threads(threads)
        self._format = FORMATS[precision]
        self._native: Any = compiled.EncoderDecoder(
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_heads=shape.num_heads,
            num_encoder_layers=shape.num_encoder_layers,
            num_decoder_layers=shape.num_decoder_layers,
            vocab_size=shape.vocab_size,
            max_positions=shape.max_positions,
            start_id=shape.start_id,
            end_id=shape.eos_id,
            epsilon=1e-5,
            activation=shape.activation,
        )
        self._fill(model)

    @property
    def weight_bytes(self) -> int:
        """Bytes of packed weights."""
        return int(self._native.weight_bytes)

    def translate(self, sources: Sequence[Sequence[int]], limits: Sequence[int]) -> list[list[int]]:
        """Answer a batch; see `Seq2SeqRunner.translate`.

        Args:
            sources: token ids with the end token, at least one each.
            limits: most tokens of each answer.

        Returns:
            Token ids of each answer, without start and end token.

        Raises:
            ValueError: an id, a length or a limit is out of range.
        """
        tokens, lengths, _ = self._native.translate(*_joined(sources), np.array(limits, dtype=np.int32))
        return [row[:length].tolist() for row, length in zip(tokens, lengths.tolist(), strict=True)]

    def logits(self, source: Sequence[int], target: Sequence[int]) -> np.ndarray:
        """Compute what the steps of a given answer would have chosen from.

        Args:
            source: token ids with the end token.
            target: token ids of the answer, without the start token.

        Returns:
            float32 [T, V]; row t is what stands before token t is chosen, suppressed tokens at minus infinity.

        Raises:
            ValueError: an id or a length is out of range.
        """
        limits = np.array([len(target)], dtype=np.int32)
        forced = np.array([target], dtype=np.int32)
        _, _, logits = self._native.translate(*_joined([source]), limits, forced)
        result: np.ndarray = np.array(logits[0])
        return result

    def _fill(self, model: Marian) -> None:
        state = {name: value.detach().float() for name, value in model.state_dict().items()}
        self._state = state
        for index in range(self.shape.num_encoder_layers):
            name = f"model.encoder.layers.{index}"
            self._native.add_encoder_layer(
                [self._qkv(f"{name}.self_attn"), self._one(f"{name}.self_attn.out_proj"), *self._mlp(name)],
                [self._norm(f"{name}.self_attn_layer_norm"), self._norm(f"{name}.final_layer_norm")],
            )
        key_values = []
        for index in range(self.shape.num_decoder_layers):
            name = f"model.decoder.layers.{index}"
            source = f"{name}.encoder_attn"
            self._native.add_decoder_layer(
                [
                    self._qkv(f"{name}.self_attn"),
                    self._one(f"{name}.self_attn.out_proj"),
                    self._one(f"{source}.q_proj"),
                    self._one(f"{source}.out_proj"),
                    *self._mlp(name),
                ],
                [
                    self._norm(f"{name}.self_attn_layer_norm"),
                    self._norm(f"{source}_layer_norm"),
                    self._norm(f"{name}.final_layer_norm"),
                ],
            )
            key_values += [f"{source}.k_proj", f"{source}.v_proj"]
        embedding = state["model.shared.weight"]
        bias = torch.full((-(-self.shape.vocab_size // _LANES) * _LANES,), -torch.inf)
        bias[: self.shape.vocab_size] = state["final_logits_bias"][0]
        bias[list(self.shape.suppressed_ids)] = -torch.inf
        self._native.set_tables(
            embedding=(embedding * self.shape.embedding_scale).contiguous().numpy(),
            positions=model.positions.float().contiguous().numpy(),
            source_key_values=self._several(key_values),
            head=(self._pack([embedding]), bias.numpy()),
        )
        del self._state

    def _pack(self, weights: Sequence[torch.Tensor]) -> np.ndarray:
        tensors = [
            EncodedTensor("", tuple(weight.shape), "F32", weight.contiguous().numpy().reshape(-1).view(np.uint8))
            for weight in weights
        ]
        return pack(self._format, tensors, to_float32)

    def _several(self, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Projections that share their inputs, one below the other."""
        bias = torch.cat([self._state[f"{name}.bias"] for name in names])
        padded = nn.functional.pad(bias, (0, -len(bias) % _LANES)).contiguous()
        return self._pack([self._state[f"{name}.weight"] for name in names]), padded.numpy()

    def _one(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        return self._several([name])

    def _qkv(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        return self._several([f"{name}.q_proj", f"{name}.k_proj", f"{name}.v_proj"])

    def _mlp(self, name: str) -> list[tuple[np.ndarray, np.ndarray]]:
        return [self._one(f"{name}.fc1"), self._one(f"{name}.fc2")]

    def _norm(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        return self._state[f"{name}.weight"].contiguous().numpy(), self._state[f"{name}.bias"].contiguous().numpy()


def _joined(sources: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """All sources one after the other, and where each begins."""
    lengths = [len(source) for source in sources]
    ids = np.concatenate([np.asarray(source, dtype=np.int32) for source in sources])
    return ids, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
