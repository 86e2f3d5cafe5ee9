// Rows that are beyond what a model was calibrated for, and the wider weights that stand in where some are.
#include <atomic>
#include <stdexcept>
#include <utility>

#include "decoder.h"

namespace dseek {

void Decoder::set_limits(int layer, const std::array<float, 4>& limits) {
    check_layer(layer);
    for (const float limit : limits) {
        if (!(limit >= 0.f)) throw std::invalid_argument("a limit must not be negative");
    }
    blocks_[layer].limits = limits;
}

std::vector<int> Decoder::take_exceeded() {
    std::vector<int> found;
    for (size_t i = 0; i < exceeded_.size(); ++i) {
        if (exceeded_[i] != 0) found.push_back(static_cast<int>(i));
        exceeded_[i] = 0;
    }
    return found;
}

void Decoder::set_wide(int layer, const Linear& qkv, const Linear& output, const Linear& gate_up, const Linear& down) {
    check_layer(layer);
    BlockWeights block = blocks_[layer];
    block.qkv = qkv;
    block.output = output;
    block.gate_up = gate_up;
    block.down = down;
    block.limits = {};
    check_block(block);
    wide_.resize(blocks_.size());
    wide_[layer] = block;
}

void Decoder::swap_wide(int layer) {
    check_layer(layer);
    if (wide_.size() != blocks_.size() || wide_[layer].input_norm == nullptr) {
        throw std::invalid_argument("the layer has no wide weights");
    }
    std::swap(blocks_[layer], wide_[layer]);
    sized_for_ = nullptr;  // other formats, other rows
}

void Decoder::watch(const BlockWeights& block, Role role, const Rows& rows, int num_rows) {
    const float limit = block.limits[role];
    if (limit <= 0.f) return;
    // A scale is the largest magnitude over 127. NaN is beyond any limit.
    bool within = true;
    if (rows.kind == RowKind::token_u8 || rows.kind == RowKind::plain_u8) {
        for (int row = 0; row < num_rows; ++row) within &= rows.scale[row] * 127.f <= limit;
    } else if (rows.kind == RowKind::group_s8) {
        const int count = num_rows * rows.groups;
        for (int i = 0; i < count; ++i) within &= rows.group_scale[i] * 127.f <= limit;
    }
    if (within) return;
    const size_t place = static_cast<size_t>(index_of(block)) * 4 + role;
    std::atomic_ref<uint8_t>(exceeded_[place]).store(1, std::memory_order_relaxed);
}

}  // namespace dseek
