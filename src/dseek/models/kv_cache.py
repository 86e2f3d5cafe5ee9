"""`KVCache`: the keys and values a torch decoder has seen, for token by token generation on the torch path.

One contiguous block for each layer, allocated once. All rows of the batch have the same length; sequences of different
lengths take a cache each. The native engine keeps pages instead (`dseek.engine.cache`).
"""

from __future__ import annotations

import torch

from dseek.core.errors import RequestError
from dseek.core.shape import ModelShape


class KVCache:
    """Keys and values of up to `max_tokens` positions.

    Args:
        shape: the model.
        max_tokens: room, in positions.
        batch_size: rows.
        dtype: of the stored keys and values; the decoder's own.
        device: where they lie.
    """

    def __init__(
        self,
        shape: ModelShape,
        max_tokens: int,
        *,
        batch_size: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        size = (shape.num_layers, batch_size, shape.num_kv_heads, max_tokens, shape.head_dim)
        self.keys_LBGSd = torch.empty(size, dtype=dtype, device=device)
        self.values_LBGSd = torch.empty(size, dtype=dtype, device=device)
        self.length = 0

    @property
    def max_tokens(self) -> int:
        """Positions there is room for."""
        return self.keys_LBGSd.shape[3]

    @property
    def batch_size(self) -> int:
        """Rows."""
        return self.keys_LBGSd.shape[1]

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return self.keys_LBGSd.nbytes + self.values_LBGSd.nbytes

    def check_room(self, batch_size: int, num_tokens: int) -> None:
        """Refuse a step that does not fit.

        Args:
            batch_size: rows of the step.
            num_tokens: positions it adds.

        Raises:
            RequestError: another batch size, not enough room, or gradients enabled.
        """
        if torch.is_grad_enabled():
            raise RequestError(
                "a cache was given while gradients are enabled",
                needed="no gradients through a cache, which is overwritten in place",
                remedy="call the decoder under torch.inference_mode() or torch.no_grad(), or without a cache",
            )
        if batch_size != self.batch_size:
            raise RequestError(
                f"{batch_size} rows of tokens for a cache of {self.batch_size} rows",
                needed="as many rows as the cache was made for",
                remedy="make a cache with this batch_size",
            )
        if self.length + num_tokens > self.max_tokens:
            raise RequestError(
                f"{num_tokens} tokens after {self.length} for a cache of {self.max_tokens} tokens",
                needed=f"at most {self.max_tokens - self.length} tokens",
                remedy="make a longer cache, or shorten the text",
            )

    def append(self, layer: int, k_BGTd: torch.Tensor, v_BGTd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one layer's new keys and values behind the old ones; `length` stays until `advance`.

        Args:
            layer: index of the decoder block.
            k_BGTd: [B, G, T, d] new keys, already rotated.
            v_BGTd: [B, G, T, d] new values.

        Returns:
            All keys and values so far, views [B, G, length + T, d].
        """
        end = self.length + k_BGTd.shape[2]
        self.keys_LBGSd[layer, :, :, self.length : end] = k_BGTd
        self.values_LBGSd[layer, :, :, self.length : end] = v_BGTd
        return self.keys_LBGSd[layer, :, :, :end], self.values_LBGSd[layer, :, :, :end]

    def advance(self, num_tokens: int) -> None:
        """Count the tokens every layer has now appended.

        Args:
            num_tokens: positions added.
        """
        self.length += num_tokens

    def truncate(self, length: int) -> None:
        """Forget the newest positions.

        Args:
            length: positions to keep; 0 empties the cache.
        """
        assert 0 <= length <= self.length, "a cache can only be made shorter"
        self.length = length
