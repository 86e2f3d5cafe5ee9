#include "pyramid.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

namespace dseek {
namespace {

constexpr int kStripsOfBlock = kPageTokens / kStripRows;

// A number that is the smaller the higher a score, among equal scores the earlier; what is no number comes last.
uint64_t rank_of(float score, uint32_t index) {
    if (std::isnan(score)) score = -INFINITY;
    const auto bits = std::bit_cast<uint32_t>(score + 0.f);  // of the two zeros, one
    const uint32_t rising = (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
    return uint64_t{~rising} << 32 | index;
}

}  // namespace

Pyramid::Pyramid(const CacheLayout& layout, int num_pages, int64_t num_tokens, int top_blocks, int row_blocks,
                 int gate_dim)
    : layout_(layout),
      far_layout_(layout.type == CacheType::fp32 ? CacheType::fp32 : CacheType::bf16, layout.head_dim, 1, 1),
      num_pages_(num_pages),
      top_(top_level(num_tokens)),
      top_blocks_(top_blocks),
      row_blocks_(row_blocks),
      gate_dim_(gate_dim) {
    constexpr int kMostOpenings = 1 << 12;
    if (top_blocks < 0 || top_blocks > kMostOpenings || row_blocks < 0 || row_blocks > kMostOpenings) {
        throw std::invalid_argument("blocks to select are " + std::to_string(std::max(top_blocks, row_blocks)) +
                                    "; needed: 0 to " + std::to_string(kMostOpenings));
    }
    const int num_blocks = static_cast<int>((num_tokens + kPageTokens - 1) / kPageTokens);
    most_far_ = most_far_cells(num_blocks, top_, top_blocks);
    means_bytes_ = static_cast<size_t>(layout.head_dim) * 2 * sizeof(float);
    openings_bytes_ = round_up_size((1 + static_cast<size_t>(top_blocks)) * sizeof(int32_t), 64);
    if (gate_dim > 0) statistics_bytes_ = (4 * static_cast<size_t>(layout.head_dim) + gate_dim) * sizeof(float);
    row_top_ = row_top_level(num_blocks);
    if (row_blocks > 0) strip_bytes_ = (1 + static_cast<size_t>(row_blocks)) * sizeof(int32_t);
    strips_offset_ = (means_bytes_ + openings_bytes_ + statistics_bytes_) * static_cast<size_t>(top_ + 1);
    record_bytes_ =
        round_up_size(strips_offset_ + strip_bytes_ * kStripsOfBlock * static_cast<size_t>(row_top_ + 1), 64);
    memory_ = Pages(record_bytes_ * layout.num_kv_heads * layout.num_layers * static_cast<size_t>(num_pages));
}

std::vector<Pyramid::Span> Pyramid::selected() const {
    std::vector<Span> spans;
    const size_t levels = static_cast<size_t>(top_ + 1);
    if (top_blocks_ > 0) spans.push_back({means_bytes_ * levels, openings_bytes_ * levels});
    if (row_blocks_ > 0) spans.push_back({strips_offset_, strip_bytes_ * kStripsOfBlock * (row_top_ + 1)});
    return spans;
}

uint8_t* Pyramid::record(const HeadView& head, int block) const {
    const size_t index = (static_cast<size_t>(head.pages[block]) * layout_.num_layers + head.layer) *
                             static_cast<size_t>(layout_.num_kv_heads) +
                         head.kv_head;
    return memory_.data() + index * record_bytes_;
}

float* Pyramid::means(const HeadView& head, const Cell& cell) const {
    const int last_block = (cell.index + 1) * cell_blocks(cell.level) - 1;
    return reinterpret_cast<float*>(record(head, last_block) + means_bytes_ * static_cast<size_t>(cell.level));
}

float* Pyramid::statistics(const HeadView& head, const Cell& cell) const {
    const int last_block = (cell.index + 1) * cell_blocks(cell.level) - 1;
    return reinterpret_cast<float*>(record(head, last_block) +
                                    (means_bytes_ + openings_bytes_) * static_cast<size_t>(top_ + 1) +
                                    statistics_bytes_ * static_cast<size_t>(cell.level));
}

int32_t* Pyramid::openings(const HeadView& head, int block, int level) const {
    return reinterpret_cast<int32_t*>(record(head, block) + means_bytes_ * static_cast<size_t>(top_ + 1) +
                                      openings_bytes_ * static_cast<size_t>(level));
}

int32_t* Pyramid::strip_openings(const HeadView& head, int position, int level) const {
    const int strip = position % kPageTokens / kStripRows;
    return reinterpret_cast<int32_t*>(record(head, position / kPageTokens) + strips_offset_ +
                                      strip_bytes_ * static_cast<size_t>(level * kStripsOfBlock + strip));
}

void Pyramid::reserve(SelectionRoom& room, int num_heads) const {
    const size_t far_pages = static_cast<size_t>(most_far_ + kPageTokens - 1) / kPageTokens;
    const size_t met = static_cast<size_t>(most_far_) + static_cast<size_t>(top_blocks_ + 16) * 8;
    room.selection.blocks.reserve(num_pages_ + 2);
    room.selection.far.reserve(met);
    for (auto* cells : {&room.descent.opened, &room.descent.next_opened, &room.descent.candidates}) cells->reserve(met);
    room.descent.chosen.reserve(met);
    room.means.reserve(met);
    room.scores.reserve(met);
    room.order.reserve(met);
    if (row_blocks_ > 0) reserve_rows(room, num_heads);
    room.rows.resize(static_cast<size_t>(kPageTokens) * 2 * layout_.head_dim);
    if (far_pages * far_layout_.head_bytes > room.far_pages.size()) {
        room.far_pages = Pages(far_pages * far_layout_.head_bytes);
    }
    room.far_bias.resize(std::max(room.far_bias.size(), far_pages * kPageTokens * num_heads));
}

void Pyramid::seal(const HeadView& head, int block, int level, const Gate& gate) {
    const int d = layout_.head_dim, children = 1 << kRadixBits;
    const Cell cell{level, block / cell_blocks(level)};
    const uint8_t* page = head.cache + static_cast<size_t>(head.pages[block]) * layout_.page_bytes();
    float* target = means(head, cell);
    if (level == 0) {
        kernels().page_means(layout_, page, target, target + d);
    } else {
        std::memset(target, 0, means_bytes_);
        for (int child = cell.index * children; child < (cell.index + 1) * children; ++child) {
            const float* source = means(head, {level - 1, child});
            for (int i = 0; i < 2 * d; ++i) target[i] += source[i];
        }
        for (int i = 0; i < 2 * d; ++i) target[i] *= 1.f / static_cast<float>(children);
    }
    if (!gate.active()) return;
    float* own = statistics(head, cell);
    if (level == 0) {
        const size_t at = static_cast<size_t>(block) * (d / 2) * kPageTokens;
        kernels().page_statistics(layout_, page, rotation.model_cos.data() + at, rotation.model_sin.data() + at,
                                  rotation.model_scale, own);
    } else {
        std::memcpy(own, statistics(head, {level - 1, cell.index * children}),
                    static_cast<size_t>(3 * d) * sizeof(float));
        for (int child = cell.index * children + 1; child < (cell.index + 1) * children; ++child) {
            const float* source = statistics(head, {level - 1, child});
            for (int i = 0; i < d; ++i) {
                own[i] = std::max(own[i], source[i]);
                own[d + i] = std::min(own[d + i], source[d + i]);
                own[2 * d + i] += source[2 * d + i];
            }
        }
        for (int i = 2 * d; i < 3 * d; ++i) own[i] *= 1.f / static_cast<float>(children);
    }
    std::copy(target, target + d, own + 3 * d);
    gate_key(gate, rotation, layout_.num_kv_heads, head.kv_head, level, own, cell.index * cell_blocks(level),
             own + 4 * d);
}

void Pyramid::select(const HeadView& head, int query_block, const Budget& budget, const float* query, int num_heads,
                     SelectionRoom& room) {
    const auto open = [&](int level, const std::vector<Cell>& candidates, std::vector<int32_t>& chosen) {
        const size_t count = candidates.size(), wanted = std::min(count, static_cast<size_t>(budget.top_blocks));
        int32_t* kept = openings(head, query_block, level);
        kept[0] = static_cast<int32_t>(wanted);
        if (wanted < count && wanted > 0) {
            room.means.clear();
            for (const Cell& cell : candidates) room.means.push_back(means(head, cell));
            room.scores.resize(count);
            // All cells of a level are equally large, so the logarithm of their tokens does not change their order.
            kernels().score_cells(query, num_heads, layout_.head_dim, room.means.data(), static_cast<int>(count),
                                  room.scores.data());
            room.order.resize(count);
            for (size_t i = 0; i < count; ++i) room.order[i] = rank_of(room.scores[i], static_cast<uint32_t>(i));
            std::nth_element(room.order.begin(), room.order.begin() + wanted, room.order.end());
            for (size_t i = 0; i < wanted; ++i) room.order[i] &= 0xffffffffu;
            std::sort(room.order.begin(), room.order.begin() + wanted);
            for (size_t i = 0; i < wanted; ++i) chosen.push_back(candidates[room.order[i]].index);
        } else if (wanted > 0) {
            for (const Cell& cell : candidates) chosen.push_back(cell.index);
        }
        std::copy(chosen.begin(), chosen.end(), kept + 1);
    };
    descend(query_block, top_at(query_block), budget, open, room.selection, room.descent);
}

void Pyramid::recall(const HeadView& head, int query_block, const Budget& budget, SelectionRoom& room) const {
    const auto open = [&](int level, const std::vector<Cell>& candidates, std::vector<int32_t>& chosen) {
        const int32_t* kept = openings(head, query_block, level);
        const size_t count = std::min(candidates.size(), static_cast<size_t>(std::max(kept[0], 0)));
        chosen.assign(kept + 1, kept + 1 + std::min(count, static_cast<size_t>(top_blocks_)));
    };
    descend(query_block, top_at(query_block), budget, open, room.selection, room.descent);
}

FarCells Pyramid::gather_far(const HeadView& head, int num_heads, const float* level_bias, float scale,
                             SelectionRoom& room) const {
    constexpr float kUnused = -1e30f;
    const int d = layout_.head_dim, count = static_cast<int>(room.selection.far.size());
    FarCells far{&far_layout_, room.far_pages.data(), count, room.far_bias.data()};
    const int slots = far.num_pages() * kPageTokens;
    for (int begin = 0; begin < slots; begin += kPageTokens) {
        const int used = std::min(kPageTokens, count - begin);
        std::fill(room.rows.begin(), room.rows.end(), 0.f);
        for (int i = 0; i < used; ++i) {
            const Cell& cell = room.selection.far[begin + i];
            std::memcpy(room.rows.data() + static_cast<size_t>(i) * 2 * d, means(head, cell), means_bytes_);
        }
        kernels().store_tokens(far_layout_, room.far_pages.data() + begin / kPageTokens * far_layout_.head_bytes, 0,
                               kPageTokens, room.rows.data(), room.rows.data() + d, 2 * static_cast<size_t>(d));
    }
    for (int h = 0; h < num_heads; ++h) {
        float* bias = room.far_bias.data() + static_cast<size_t>(h) * slots;
        std::fill(bias, bias + slots, kUnused);
        for (int i = 0; i < count; ++i) {
            const Cell& cell = room.selection.far[i];
            const float tokens = static_cast<float>(kPageTokens) * static_cast<float>(cell_blocks(cell.level));
            const float added = level_bias != nullptr ? level_bias[h * (top_ + 1) + cell.level] : 0.f;
            bias[i] = std::max((std::log(tokens) + added) / scale, kUnused);
        }
    }
    return far;
}

}  // namespace dseek
