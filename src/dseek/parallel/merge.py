"""Attention over a set of keys from attention over its disjoint parts."""

from __future__ import annotations

import torch


def merge_partials(
    out_THd: torch.Tensor, lse_TH: torch.Tensor, more_THd: torch.Tensor, more_lse_TH: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Join the results over two disjoint sets of keys.

    Args:
        out_THd: [T, H, d] softmax-weighted values over the one set; any finite value where the set is empty.
        lse_TH: [T, H] log of the sum of exp(score) over it; minus infinity where the set is empty.
        more_THd: [T, H, d] over the other set.
        more_lse_TH: [T, H] over the other set.

    Returns:
        Values and log-sum-exp over both; zeros and minus infinity where both are empty.
        Source: Milakov and Gimelshein 2018, Online normalizer calculation for softmax, section 3.
    """
    highest_TH = torch.maximum(lse_TH, more_lse_TH)
    # Where both sets are empty the difference of two infinities must not become NaN.
    base_TH = highest_TH.masked_fill(highest_TH == float("-inf"), 0.0)
    weight_TH, more_weight_TH = (lse_TH - base_TH).exp(), (more_lse_TH - base_TH).exp()
    sum_TH = weight_TH + more_weight_TH
    divisor_TH1 = sum_TH.masked_fill(sum_TH == 0.0, 1.0).unsqueeze(-1)
    merged_THd = (out_THd * weight_TH.unsqueeze(-1) + more_THd * more_weight_TH.unsqueeze(-1)) / divisor_TH1
    return merged_THd, base_TH + sum_TH.log()
