// Attention of whole sequences, as Python sees it, and the pattern that the decoder's binding takes too.
#pragma once

#include <optional>
#include <vector>

#include "bind.h"
#include "pyramid.h"

namespace dseek {

// A checked pattern; without `near_blocks` it is dense. `level_bias` is [heads, levels].
DynamicPattern pattern_of(const std::vector<int>& near_blocks, int top_blocks, bool far,
                          const std::optional<Input<float, 2>>& level_bias);

void bind_attention(nanobind::module_& module);

}  // namespace dseek
