// Timings of the kernels themselves, for the description of a machine. Seconds are medians over repeats.
#pragma once

#include <cstddef>

#include "common/formats.h"
#include "common/kernels.h"

namespace dseek {

// GB/s at which the whole team reads `num_bytes` from memory, the best of `repeats` passes.
double read_bandwidth(size_t num_bytes, int repeats);

// One product of `m` rows with an n x k weight. The call cycles through so many copies of the weight that together they
// take `working_set_bytes`; 0 keeps to a single copy.
double time_linear(Format format, int m, int n, int k, int repeats, size_t working_set_bytes);

// Causal attention of the newest `num_rows` queries of one sequence of `context` tokens.
double time_attention(int num_rows, int context, int num_heads, int num_kv_heads, int head_dim, CacheType type,
                      int repeats);

}  // namespace dseek
