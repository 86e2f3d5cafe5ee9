// What the encoder-decoder needs from an instruction-set variant beside the products of `KernelTable`.
//
// Widths (of rows and heads) are multiples of sixteen. A kernel works on one thread and one row.
#pragma once

#include <cstdint>

namespace dseek {

enum class Activation : int { relu = 0, silu = 1, gelu = 2 };

constexpr int kKeyBlock = 16;  // keys side by side, one a lane

struct EncoderDecoderKernels {
    // x = (s - mean(s)) / sqrt(variance(s) + epsilon) * weight + bias with s = x + added.
    void (*add_norm)(float* x, const float* added, const float* weight, const float* bias, float epsilon, int size);
    void (*activate)(Activation activation, float* x, int size);
    // Attention of one query to `count` keys. Keys [ceil(count / 16)][d][16], values [count][d], scores has room for
    // whole blocks; what keys hold behind `count` is finite.
    void (*attend)(const float* query, const float* keys, const float* values, int count, int head_dim, float scale,
                   float* scores, float* out);
    // Puts one key into its lane and one value into its row.
    void (*store_key_value)(const float* key, const float* value, int position, int head_dim, float* keys,
                            float* values);
    // Raises `best` to the largest of `count` values, and sets `index` to its place counted from `first`; the first of
    // equal ones counts, over several calls with rising `first` too.
    void (*largest)(const float* values, int count, int first, float* best, int32_t* index);
};

// Those of the variant that `kernels()` is.
const EncoderDecoderKernels& encoder_decoder_kernels();

const EncoderDecoderKernels& generic_encoder_decoder();
#if defined(__x86_64__)
const EncoderDecoderKernels& avx2_encoder_decoder();
const EncoderDecoderKernels& avx512_encoder_decoder();
#endif

}  // namespace dseek
