"""`LanguageModel`: a decoder with its loss, as it is trained: documents apart, and memory where the plan wants it.

The decoder's own modules run, in its own order; what is added is that documents do not see each other, positions that
begin anew, the loss over chunks of rows, and blocks that compute their activations a second time instead of keeping
them. It has no cache. B rows, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dseek.models.decoder import Decoder
from dseek.ops.attention.apart import DocumentGroups, group_documents
from dseek.ops.attention.reference import visible
from dseek.train.encoding import IGNORED
from dseek.train.losses import chunked_cross_entropy, plain_cross_entropy


class LanguageModel(nn.Module):
    """A decoder that answers with its loss.

    Args:
        decoder: the model.
        logits_chunk_tokens: rows of the head at a time; 0 is all of them.
    """

    def __init__(self, decoder: Decoder, logits_chunk_tokens: int = 0) -> None:
        super().__init__()
        self.decoder = decoder
        self.logits_chunk_tokens = logits_chunk_tokens

    def forward(
        self, token_ids_BT: torch.Tensor, labels_BT: torch.Tensor, documents_BT: torch.Tensor | None
    ) -> torch.Tensor:
        """Sum the cross entropies of all tokens that have a label.

        Args:
            token_ids_BT: int64 [B, T].
            labels_BT: int64 [B, T]; the label of a token is predicted at the position before it, the first never.
            documents_BT: int64 [B, T], rising, or None where a row is one text.

        Returns:
            A scalar, float32.
        """
        hidden_BTD = self.hidden_states(token_ids_BT, documents_BT)
        targets_BS = labels_BT[:, 1:]
        learned_BS = targets_BS != IGNORED
        # Only rows of the head that have a label are computed: of a conversation often the smaller part.
        hidden_ND, targets_N = hidden_BTD[:, :-1][learned_BS], targets_BS[learned_BS]
        weight_VD = self.decoder.lm_head.weight
        if self.logits_chunk_tokens and len(targets_N) > self.logits_chunk_tokens:
            return chunked_cross_entropy(hidden_ND, weight_VD, targets_N, self.logits_chunk_tokens)
        return plain_cross_entropy(hidden_ND, weight_VD, targets_N)

    def hidden_states(self, token_ids_BT: torch.Tensor, documents_BT: torch.Tensor | None) -> torch.Tensor:
        """Give the normed last hidden states.

        Args:
            token_ids_BT: int64 [B, T].
            documents_BT: int64 [B, T], or None.

        Returns:
            [B, T, D].
        """
        stack = self.decoder.model
        num_tokens = token_ids_BT.shape[1]
        x_BTD = stack.embed_tokens(token_ids_BT)
        indices_T = torch.arange(num_tokens, device=x_BTD.device)
        window = self.decoder.shape.sliding_window
        if documents_BT is None:
            rotation = stack.rotary_emb(indices_T, x_BTD.dtype)
            plain: DocumentGroups | None = None
            windowed: torch.Tensor | DocumentGroups | None = (
                None if window is None else visible(indices_T, indices_T, window)
            )
        else:
            positions_BT = restarted_positions(documents_BT)
            flat = stack.rotary_emb(positions_BT.flatten(), x_BTD.dtype, context_tokens=num_tokens)
            rotation = tuple(part.view(*positions_BT.shape, -1) for part in flat)
            device = x_BTD.device.type
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_BTD.dtype
            plain = group_documents(documents_BT, None, dtype)
            windowed = None if window is None else group_documents(documents_BT, window, dtype)
        for layer, block in enumerate(stack.layers):
            if self._is_windowed(layer):
                x_BTD = block(x_BTD, rotation, windowed, False, None)
            else:
                x_BTD = block(x_BTD, rotation, plain, plain is None, None)
        normed_BTD: torch.Tensor = stack.norm(x_BTD)
        return normed_BTD

    def _is_windowed(self, layer: int) -> bool:
        shape = self.decoder.shape
        return shape.sliding_window is not None and (shape.window_layers is None or shape.window_layers[layer])


def restarted_positions(documents_BT: torch.Tensor) -> torch.Tensor:
    """Count positions from each document's first token in its row.

    Args:
        documents_BT: int64 [B, T], rising.

    Returns:
        int64 [B, T].
    """
    indices_BT = torch.arange(documents_BT.shape[1], device=documents_BT.device).expand_as(documents_BT)
    begins_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    begins_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    return indices_BT - torch.where(begins_BT, indices_BT, 0).cummax(dim=1).values


def save_memory(decoder: Decoder, *, checkpointed_layers: int, mlp_chunk_tokens: int) -> None:
    """Make the first blocks of a decoder keep nothing but their input, and MLPs compute some tokens at a time.

    Blocks are changed in place, before they are sharded; names of parameters stay what they are.

    Args:
        decoder: to be trained.
        checkpointed_layers: blocks that compute their activations again in the backward pass.
        mlp_chunk_tokens: tokens that an MLP computes at a time, and again in the backward pass; 0 leaves MLPs alone.

    Source: Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost, section 4.
    """
    for layer, block in enumerate(decoder.model.layers):
        if mlp_chunk_tokens:
            mlp = block.get_submodule("mlp")
            setattr(mlp, "forward", _tiled(mlp.forward, mlp_chunk_tokens))  # noqa: B010 (mypy keeps methods)
        if layer < checkpointed_layers:
            setattr(block, "forward", _recomputed(block.forward))  # noqa: B010


def _recomputed(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def run(*arguments: object) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return forward(*arguments)
        result: torch.Tensor = checkpoint(forward, *arguments, use_reentrant=False)
        return result

    return run


def _tiled(forward: Callable[..., torch.Tensor], chunk_tokens: int) -> Callable[..., torch.Tensor]:
    again = _recomputed(forward)

    def run(x_BTD: torch.Tensor) -> torch.Tensor:
        chunks = x_BTD.flatten(0, -2).split(chunk_tokens)
        return torch.cat([again(chunk) for chunk in chunks]).view_as(x_BTD)

    return run
