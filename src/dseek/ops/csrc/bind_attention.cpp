#include "bind_attention.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "sequence_attention.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace dseek {
namespace {

template <class Value>
SequenceShape shape_of(const Input<Value, 3>& q, const Input<Value, 3>& k, const Input<Value, 3>& v) {
    for (int axis = 0; axis < 3; ++axis) {
        require(k.shape(axis) == v.shape(axis), "k and v must have one shape");
        require(q.shape(axis) >= 1 && q.shape(axis) <= kMostRows,
                "q, k and v must have heads, tokens and a head width");
    }
    require(k.shape(0) >= 1 && q.shape(0) % k.shape(0) == 0, "query heads must be a multiple of key-value heads");
    require(q.shape(1) == k.shape(1) && q.shape(2) == k.shape(2), "q and k must have the same tokens and head width");
    require(q.shape(2) % 16 == 0 && q.shape(2) <= 512, "head width must be a multiple of 16 up to 512");
    require_aligned(q, k, v);
    return {static_cast<int>(q.shape(0)), static_cast<int>(k.shape(0)), static_cast<int>(q.shape(1)),
            static_cast<int>(q.shape(2))};
}

template <class Value>
Output<Value> attend(const Input<Value, 3>& q, const Input<Value, 3>& k, const Input<Value, 3>& v,
                     const DynamicPattern& pattern, AttentionTrace* trace) {
    const SequenceShape shape = shape_of(q, k, v);
    Pages memory = Pages::huge(q.size() * sizeof(Value));
    {
        nb::gil_scoped_release release;
        sequence_attention(shape, q.data(), k.data(), v.data(), pattern, memory.as<Value>(), trace);
    }
    const int64_t d = shape.head_dim;
    return own<Value>(std::move(memory), {q.shape(0), q.shape(1), q.shape(2)}, {shape.num_tokens * d, d, 1});
}

// Selections as Python lists: [kv head][query block or strip] of tuples.
template <class Choice>
nb::list to_lists(const std::vector<Choice>& selections, size_t groups) {
    nb::list all;
    const size_t blocks = groups == 0 ? 0 : selections.size() / groups;
    for (size_t g = 0; g < groups; ++g) {
        nb::list head;
        for (size_t block = 0; block < blocks; ++block) { head.append(to_tuple(selections[g * blocks + block])); }
        all.append(head);
    }
    return all;
}

template <class Value>
nb::object attend_dynamically(const Input<Value, 3>& q, const Input<Value, 3>& k, const Input<Value, 3>& v,
                              const std::vector<int>& near_blocks, int top_blocks, bool far, double min_share,
                              const std::optional<Input<float, 2>>& level_bias, bool trace) {
    const SequenceShape shape = shape_of(q, k, v);
    const DynamicPattern pattern = pattern_of(near_blocks, top_blocks, far, min_share, level_bias);
    require(static_cast<int>(near_blocks.size()) == shape.num_kv_heads,
            "near_blocks needs a window for each key-value head");
    require(min_share == 0. || shape.num_heads / shape.num_kv_heads <= kMostHeadsOfGroup,
            "a selection by rows needs smaller groups of heads");
    const auto levels = static_cast<size_t>(top_level(shape.num_tokens) + 1);
    require(!level_bias || (level_bias->shape(0) == q.shape(0) && level_bias->shape(1) == levels),
            "level_bias must be [heads, " + std::to_string(levels) + "]");
    AttentionTrace traced;
    auto out = attend(q, k, v, pattern, trace ? &traced : nullptr);
    if (!trace) return nb::cast(out);
    nb::dict parts;
    parts["pyramid_s"] = traced.times.pyramid_s;
    parts["selection_s"] = traced.times.selection_s;
    parts["attention_s"] = traced.times.attention_s;
    const auto groups = static_cast<size_t>(shape.num_kv_heads);
    return nb::make_tuple(out, min_share > 0. ? to_lists(traced.rows, groups) : to_lists(traced.blocks, groups), parts);
}

template <class Value>
void bind_for(nb::module_& module) {
    module.def(
        "dense_attention",
        [](const Input<Value, 3>& q, const Input<Value, 3>& k, const Input<Value, 3>& v) {
            return attend(q, k, v, {}, nullptr);
        },
        "q"_a.noconvert(), "k"_a.noconvert(), "v"_a.noconvert());
    module.def("dynamic_attention", &attend_dynamically<Value>, "q"_a.noconvert(), "k"_a.noconvert(), "v"_a.noconvert(),
               nb::kw_only(), "near_blocks"_a, "top_blocks"_a, "far"_a = false, "min_share"_a = 0.,
               "level_bias"_a = nb::none(), "trace"_a = false);
}

}  // namespace

DynamicPattern pattern_of(const std::vector<int>& near_blocks, int top_blocks, bool far, double min_share,
                          const std::optional<Input<float, 2>>& level_bias) {
    constexpr int kMostBlocks = 1 << 20;
    require(top_blocks >= 0 && top_blocks <= kMostBlocks, "top_blocks is out of range");
    for (const int blocks : near_blocks) require(blocks >= 0 && blocks <= kMostBlocks, "a window is out of range");
    require(min_share >= 0. && min_share < 1., "min_share must be at least 0 and below 1");
    require(min_share == 0. || top_blocks > 0, "a selection by rows needs top_blocks of at least 1");
    require(min_share == 0. || !far, "far cells need a selection by blocks, so no min_share");
    DynamicPattern pattern{near_blocks, top_blocks, far, static_cast<float>(min_share), {}, {}, {}};
    if (level_bias) {
        require_aligned(*level_bias);
        pattern.level_bias.assign(level_bias->data(), level_bias->data() + level_bias->size());
    }
    return pattern;
}

Gate gate_of(const GateArrays& arrays, int num_heads, int kv_heads) {
    const auto& [query, key, query_gain, key_gain, scale, own, own_bias] = arrays;
    const auto heads = static_cast<size_t>(num_heads), groups = static_cast<size_t>(kv_heads);
    const size_t dim = query.shape(2), levels = key.shape(0), head_dim = query.shape(1);
    require(query.shape(0) == heads && query_gain.shape(0) == heads && scale.shape(0) == heads &&
                own.shape(0) == heads && own_bias.shape(0) == heads,
            "a gate needs parameters for each of the " + std::to_string(num_heads) + " heads");
    require(key.shape(1) == groups && key_gain.shape(1) == groups,
            "a gate needs parameters for each of the " + std::to_string(kv_heads) + " key-value heads");
    require(dim >= 16 && dim % 16 == 0 && dim <= 512 && key.shape(3) == dim && query_gain.shape(1) == dim &&
                key_gain.shape(2) == dim,
            "a gate's width must be one multiple of 16 up to 512 in all its parameters");
    require(levels >= 1 && levels <= kMostLevels && key_gain.shape(0) == levels,
            "a gate must have 1 to " + std::to_string(kMostLevels) + " levels");
    require(head_dim >= 1 && head_dim <= kMostRows && key.shape(2) == 3 * head_dim && own.shape(1) == head_dim,
            "a gate's head width must be the same in all its parameters");
    require_aligned(query, key, query_gain, key_gain, scale, own, own_bias);
    const auto copy = [](const auto& array) { return std::vector<float>(array.data(), array.data() + array.size()); };
    return {static_cast<int>(dim),
            static_cast<int>(levels),
            static_cast<int>(head_dim),
            copy(query),
            copy(key),
            copy(query_gain),
            copy(key_gain),
            copy(scale),
            copy(own),
            copy(own_bias)};
}

nb::tuple to_tuple(const Selection& selection) {
    nb::list exact, far;
    for (const int32_t index : selection.blocks) exact.append(index);
    for (const Cell& cell : selection.far) far.append(nb::make_tuple(cell.level, cell.index));
    return nb::make_tuple(exact, far);
}

nb::tuple to_tuple(const RowSelection& selection) {
    nb::list exact, from;
    for (const int32_t index : selection.blocks) exact.append(index);
    for (const uint8_t row : selection.from_rows) from.append(static_cast<int>(row));
    return nb::make_tuple(exact, from);
}

void bind_attention(nb::module_& module) {
    bind_for<float>(module);
    bind_for<uint16_t>(module);
}

}  // namespace dseek
