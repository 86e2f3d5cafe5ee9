// Single operators over whole arrays, cut up for the thread team: what the decoder does stage by stage, on its own.
#pragma once

#include "common/kernels.h"
#include "common/pack_blob.h"
#include "decoder.h"

namespace dseek {

// out[m][n_padded] = x[m][k] times the weight, activations prepared as the weight's format wants.
void multiply(const Linear& weight, const float* x, int m, float* out);

// Dense causal attention of bf16 arrays q, k, v [heads][tokens][d] into out of the same shape.
void dense_attention(const uint16_t* q, const uint16_t* k, const uint16_t* v, int heads, int tokens, int d,
                     uint16_t* out);

}  // namespace dseek
