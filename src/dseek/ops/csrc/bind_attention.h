// Attention of whole sequences, as Python sees it, and the pattern that the decoder's binding takes too.
#pragma once

#include <nanobind/stl/tuple.h>

#include <optional>
#include <tuple>
#include <vector>

#include "bind.h"
#include "pyramid.h"

namespace dseek {

// A checked pattern; without `near_blocks` it is dense. `level_bias` is [heads, levels].
DynamicPattern pattern_of(const std::vector<int>& near_blocks, int top_blocks, bool far, double min_share,
                          const std::optional<Input<float, 2>>& level_bias);

// query [heads, d, dim], key [levels, kv heads, 3 d, dim], their gains [heads, dim] and [levels, kv heads, dim], scale
// [heads], own [heads, d] and own bias [heads].
using GateArrays = std::tuple<Input<float, 3>, Input<float, 4>, Input<float, 2>, Input<float, 3>, Input<float, 1>,
                              Input<float, 2>, Input<float, 1>>;
Gate gate_of(const GateArrays& arrays, int num_heads, int kv_heads);

// (exact blocks, [(level, index) of far cells]).
nanobind::tuple to_tuple(const Selection& selection);
// (exact blocks, from which row of the strip on each).
nanobind::tuple to_tuple(const RowSelection& selection);

void bind_attention(nanobind::module_& module);

}  // namespace dseek
