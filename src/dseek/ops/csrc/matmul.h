// Single operators over whole arrays, cut up for the thread team: what the decoder does stage by stage, on its own.
#pragma once

#include "common/kernels.h"
#include "common/pack_blob.h"
#include "decoder.h"

namespace dseek {

// out[m][n_padded] = x[m][k] times the weight, activations prepared as the weight's format wants.
void multiply(const Linear& weight, const float* x, int m, float* out);

}  // namespace dseek
