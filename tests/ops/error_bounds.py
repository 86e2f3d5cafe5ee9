"""How far a kernel may be from the exact result: derived, element by element, for weight formats and cache dtypes.

Nothing here is fitted. With u the unit roundoff of a float format (2^-24 for fp32, 2^-11 for fp16, 2^-8 for bf16;
Higham 2002, Accuracy and Stability of Numerical Algorithms, section 2.1) and g(n) = n u / (1 - n u) for u of fp32
(lemma 3.1):

- A weight w is stored as w + dw, an activation x as x + dx. Rounding to a float: |dw| <= u |w|, plus half the smallest
  subnormal. Rounding to integers of a step s: |dw| <= min(|w|, s / 2) where nothing is clipped.
- The product of what is stored, summed in fp32 in whatever order, is off by at most g(n) sum |x + dx| |w + dw|
  (section 3.1, equation 3.5; fused operations round less often). Sums of int8 products are exact in 32 bits; then only
  the conversion and the products with scales round, g(4) of the result.
- So |y - x w| <= sum |x| |dw| + sum |dx| (|w| + |dw|) + g(n) sum (|x| + |dx|) (|w| + |dw|).
- Scales are computed in fp32, and rounded to a half in the grouped formats: 2^-11 of them, or half the smallest
  subnormal half. What that clips is at most the largest integer times the scale's error.
- i8c rotates both operands by an orthogonal H first, which leaves x w as it is. A value of the rotation is a sum of n
  values times 1 / sqrt(n), made in log2(n) steps, so it is off by at most g(log2(n) + 3) sum |x_j| / sqrt(n).

Attention: a score is off by ds = (|q| |dk| + |dq| (|k| + |dk|) + g(d + 3) |q| |k|) / sqrt(d). With D the largest of a
query's ds, each unnormalised weight is off by a factor within exp(D) and the 1 + e of the exponential (and of bf16,
for kernels that round weights to it), so each normalised one by a factor within exp(2 D) ((1 + e) / (1 - e)). As
weights sum to one, |do| <= sum p_j r |v_j - o| + sum p_j (1 + r) |dv_j| + g(n + 5) sum p_j (1 + r) (|v_j| + |dv_j|), r
that factor less one, n the keys and rescalings.

What the bounds do not know: what sums of many roundings do on average. A bound of n roundings is some sqrt(n) above
what random data shows; the tests measure how far.
"""

from __future__ import annotations

import numpy as np

U32, U16, UB16 = 2.0**-24, 2.0**-11, 2.0**-8
HALF_TINY = 2.0**-25
GROUP = 32
LONGEST_RUN, MIX_BELOW = 64, 16  # of ops/csrc/common/rotation.h


def g(count: int) -> float:
    """n u / (1 - n u) of fp32."""
    return count * U32 / (1 - count * U32)


def rotated(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rotate rows as i8c does, written anew in float64, and bound what fp32 makes of it.

    Args:
        x: float64 [M, K].

    Returns:
        The rotated rows and the bound of each value, [M, ceil(K / 16) * 16].
    """
    x = np.pad(x, ((0, 0), (0, -x.shape[1] % 16)))
    values, bounds, start = [], [], 0
    while start < x.shape[1]:
        left = (x.shape[1] - start) // 16
        run = min(1 << (left.bit_length() - 1), LONGEST_RUN)
        block = x[:, start : start + run * 16].reshape(-1, run, 16)
        matrix = _hadamard(run)
        turned, sums = np.einsum("rs,msl->mrl", matrix, block), np.abs(block).sum(1, keepdims=True) / np.sqrt(run)
        sums, steps = np.broadcast_to(sums, turned.shape), int(np.log2(run))
        if run < MIX_BELOW:
            turned = turned @ _hadamard(16)
            sums = np.broadcast_to(np.abs(block).sum((1, 2), keepdims=True) / np.sqrt(16 * run), turned.shape)
            steps += 4
        values.append(turned.reshape(len(x), -1))
        bounds.append(g(steps + 3) * sums.reshape(len(x), -1))
        start += run * 16
    return np.concatenate(values, 1), np.concatenate(bounds, 1)


def _hadamard(size: int) -> np.ndarray:
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(size)


def _grouped(x: np.ndarray) -> np.ndarray:
    return np.pad(x, ((0, 0), (0, -x.shape[1] % GROUP))).reshape(len(x), -1, GROUP)


def _flat(x: np.ndarray, like: np.ndarray) -> np.ndarray:
    return np.broadcast_to(x, (*x.shape[:2], GROUP)).reshape(len(x), -1)[:, : like.shape[1]]


def _int8_rounding(x: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """Of values that become integers up to 127, `largest` becoming that: at most half a step, and at most the value.

    The quotient, up to 127, is off by g(4) of itself, and kernels may add 128.5 to it, which rounds by 2^-17; zero
    stays zero.
    """
    step = largest / 127 * (1 + 4 * U32)
    return np.minimum(np.abs(x), 0.5 * step) + g(4) * np.abs(x) + np.where(x == 0, 0, 2.0**-17 * step)


def weight_errors(w: np.ndarray, weight_format: str) -> tuple[np.ndarray, np.ndarray]:
    """Bound what storing does to a weight.

    Args:
        w: float64 [N, K], values of float32; for i8c rotated already.
        weight_format: of the blob.

    Returns:
        |dw| and, for grouped formats, the magnitudes that a kernel adds up instead of |w| (several times larger, as it
        takes an offset or a minimum apart); both [N, K].
    """
    magnitude = np.abs(w)
    if weight_format == "f32":
        return np.zeros_like(w), magnitude
    if weight_format == "f16":
        return np.maximum(U16 * magnitude, HALF_TINY), magnitude
    if weight_format == "bf16":
        return UB16 * magnitude, magnitude
    if weight_format in ("i8c", "i8p"):
        return _int8_rounding(w, magnitude.max(1, keepdims=True)), magnitude
    groups = _grouped(w)
    if weight_format == "i8g":
        scale = np.abs(groups).max(2, keepdims=True) / 127
        scale_error = np.maximum(U16 * scale, HALF_TINY)
        error = np.maximum(0.5 * (scale + scale_error) * (1 + 254 * g(4)), 127 * scale_error)
        return _flat(error, w), magnitude + _flat(256 * scale, w)
    least, most = groups.min(2, keepdims=True), groups.max(2, keepdims=True)
    scale = (most - least) / 15 * (1 + 2 * U32)
    scale_error, least_error = np.maximum(U16 * scale, HALF_TINY), np.maximum(U16 * np.abs(least), HALF_TINY)
    # The quotient is of w - minimum, whose own rounding is relative to both.
    quotient = g(4) * (np.abs(groups) + np.abs(least)).max(2, keepdims=True)
    error = np.maximum(0.5 * (scale + scale_error) + quotient, 15 * scale_error + least_error)
    return _flat(error, w), _flat(15 * (scale + scale_error) + np.abs(least) + least_error, w)


def linear_bound(x: np.ndarray, w: np.ndarray, weight_format: str, *, few_rows: bool) -> tuple[np.ndarray, np.ndarray]:
    """Give the exact product and how far a kernel may be from it.

    Args:
        x: float32 [M, K].
        w: float32 [N, K].
        weight_format: of the blob.
        few_rows: whether grouped formats take int8 activations.

    Returns:
        float64 [M, N] each.
    """
    x, w = x.astype(np.float64), w.astype(np.float64)
    exact = x @ w.T
    turned_x, turned_w = np.zeros_like(x), np.zeros_like(w)
    if weight_format == "i8c":
        (x, turned_x), (w, turned_w) = rotated(x), rotated(w)
    dw, added = weight_errors(w, weight_format)
    dw = dw + turned_w * 2  # of the value, and of the row's largest one that the scale is made from
    num_inputs = x.shape[1] + 64  # padding
    if weight_format in ("f32", "f16"):
        dx, count = np.zeros_like(x), x.shape[1] + 1
    elif weight_format in ("i8c", "i8p"):
        dx, count = _int8_rounding(x, np.abs(x).max(1, keepdims=True)) + 2 * turned_x, 4
    elif weight_format == "bf16" or not few_rows:
        dx, count = UB16 * np.abs(x), num_inputs
        if weight_format != "bf16":
            dw = dw + (UB16 + g(2)) * (np.abs(w) + dw) + g(2) * added
            added = np.abs(w)
    else:
        dx = _int8_rounding(x, _flat(np.abs(_grouped(x)).max(2, keepdims=True), x))
        count = 2 * (num_inputs // GROUP) + 6
    ax, aw = np.abs(x), np.abs(w)
    return exact, ax @ dw.T + dx @ (aw + dw).T + g(count) * ((ax + dx) @ (added + dw).T)


def attention_bound(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, errors: tuple[np.ndarray, np.ndarray, np.ndarray], cache_dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    """Give exact causal attention of one head and how far a kernel may be from it.

    Args:
        q, k, v: float64 [T, d].
        errors: bounds of what they were off by before they were stored, [T, d] each.
        cache_dtype: fp32, bf16 or int8.

    Returns:
        float64 [T, d] each.
    """
    num_tokens, width = q.shape
    dq, dk, dv = errors
    narrow = 1e-6  # the exponential's relative error
    if cache_dtype != "fp32":
        # Kernels with bf16 products round queries and weights to it, and take a coarser exponential.
        dq, narrow = dq + UB16 * (np.abs(q) + dq), UB16 + 2e-4
        dk, dv = (error + UB16 * (np.abs(x) + error) for x, error in ((k, dk), (v, dv)))
    if cache_dtype == "int8":
        dk, dv = (
            2 * error + _int8_rounding(x, np.abs(x).max(1, keepdims=True)) + UB16 * np.abs(x)
            for x, error in ((k, errors[1]), (v, errors[2]))
        )
        # Or queries are integers of fifteen bits with a scale a head ...
        dq = dq + np.abs(q).max(1, keepdims=True) * 2.0**-16
    root = np.sqrt(width)
    scores = q @ k.T / root
    aq, ak = np.abs(q), np.abs(k)
    score_errors = (aq @ dk.T + dq @ (ak + dk).T + g(width + 3) * ((aq + dq) @ (ak + dk).T)) / root
    visible = np.tril(np.ones((num_tokens, num_tokens), dtype=bool))
    weights = np.where(visible, np.exp(scores - np.where(visible, scores, -np.inf).max(1, keepdims=True)), 0)
    weights /= weights.sum(1, keepdims=True)
    out = weights @ v
    # The base-2 exponent, rounded where it is large, is one more error of the score.
    largest = np.where(visible, score_errors + 4 * U32 * np.abs(scores), 0).max(1, keepdims=True)
    ratio = np.exp(2 * largest) * (1 + narrow) / (1 - narrow) - 1
    count = num_tokens + num_tokens // 64 + 8
    spread = np.stack([(weights[row] @ np.abs(v - out[row])) for row in range(num_tokens)])
    held = weights @ (np.abs(v) + dv)
    bound = ratio * spread + (1 + ratio) * (weights @ dv) + g(count) * (1 + ratio) * held
    if cache_dtype == "int8":
        # ... and so are weights times the values' scales, up to the largest of them.
        largest_product = (weights * np.abs(v).max(1)).max(1, keepdims=True)
        bound = bound + (1 + ratio) * visible.sum(1, keepdims=True) * largest_product * 2.0**-16
    return out, bound
