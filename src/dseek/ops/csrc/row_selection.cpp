// Selections by rows: every query opens the cells that hold a share of its attention, and the sixteen of a strip keep
// what any earlier one of them has opened.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "pyramid.h"

namespace dseek {
namespace {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kNoMass = -1e30f;

// What a strip has opened so far may be read while another thread adds to it: entries first, then their number.
int read_count(int32_t* count, int most) {
    return std::clamp(std::atomic_ref<int32_t>(*count).load(std::memory_order_acquire), 0, most);
}
void write_count(int32_t* count, int value) {
    std::atomic_ref<int32_t>(*count).store(value, std::memory_order_release);
}

}  // namespace

void Pyramid::reserve_rows(SelectionRoom& selection, int num_heads) const {
    RowRoom& room = selection.rows_room;
    const int blocks = num_pages_ + 2;
    // A level meets the children of what was opened and of two forced cells, the starting cells, and the window.
    const size_t met =
        std::min(static_cast<size_t>(blocks), static_cast<size_t>(row_blocks_ + 2) * 8 + 8 + 256 * 8) + blocks + 64;
    for (auto* opened : {&room.opened, &room.next_opened}) opened->reserve(met);
    room.cells.reserve(met);
    room.keys.reserve(met);
    room.bias.reserve(met);
    room.seen_from.reserve(met);
    room.opened_from.reserve(met);
    selection.by_rows.blocks.reserve(met);
    selection.by_rows.from_rows.reserve(met);
    const size_t dim = static_cast<size_t>(layout_.head_dim) + gate_dim_;
    const size_t pages = (met + kPageTokens - 1) / kPageTokens;
    room.turned.resize(static_cast<size_t>(layout_.head_dim));
    const auto grow = [](Pages& pages_of, size_t bytes) {
        if (pages_of.size() < bytes) pages_of = Pages(bytes);
    };
    grow(room.packed, pages * kPageTokens * dim * sizeof(float));
    grow(room.query, static_cast<size_t>(num_heads) * kStripRows * dim * sizeof(float));
    grow(room.scores, static_cast<size_t>(num_heads) * kStripRows * pages * kPageTokens * sizeof(float));
}

void Pyramid::set_query(const HeadView& head, const StripQuery& strip, const Gate& gate, RowRoom& room) const {
    const int d = layout_.head_dim, dim = d + (gate.active() ? gate.dim : 0),
              row_begin = strip.first_position % kStripRows;
    const float factor = kLog2E / std::sqrt(static_cast<float>(d));
    std::memset(room.query.data(), 0, static_cast<size_t>(strip.num_heads) * kStripRows * dim * sizeof(float));
    std::fill(std::begin(room.rest), std::end(room.rest), kNoMass);
    for (int h = 0; h < strip.num_heads; ++h) {
        const int model_head = head.kv_head * strip.num_heads + h;
        const float scale = gate.active() ? factor * gate.scale[model_head] : factor;
        for (int row = 0; row < strip.num_rows; ++row) {
            const int position = strip.first_position + row;
            const float* source = strip.query + row * strip.stride + static_cast<size_t>(h) * d;
            float* target = room.query.as<float>() + (static_cast<size_t>(h) * kStripRows + row_begin + row) * dim;
            for (int i = 0; i < d; ++i) target[i] = source[i] * scale;
            if (!gate.active()) continue;
            rotation.turn_back(source, d, position, room.turned.data());
            gate_query(gate, rotation, model_head, room.turned.data(), position / kPageTokens, target + d);
            const float gate_factor = kLog2E / std::sqrt(static_cast<float>(gate.dim));
            for (int i = d; i < dim; ++i) target[i] *= gate_factor;
            room.rest[h * kStripRows + row_begin + row] = kLog2E * gate_own(gate, model_head, room.turned.data());
        }
    }
}

void Pyramid::open_level(const HeadView& head, const StripQuery& strip, const Budget& budget, const Gate& gate,
                         int level, RowRoom& room) {
    const int free = static_cast<int>(room.cells.size()), row_begin = strip.first_position % kStripRows;
    const int block = strip.first_position / kPageTokens, top = row_top_level(block), most = budget.top_blocks;
    room.bias.assign(static_cast<size_t>(free), static_cast<float>(kRadixBits * level));
    room.opened_from.assign(static_cast<size_t>(free), kNeverOpened);
    if (level == top) {
        // The window and the first block are part of what shares are of.
        const int near_from = std::max(0, block - budget.near_blocks);
        const auto refer = [&](int exact) {
            room.cells.push_back(exact);
            room.bias.push_back(0.f);
            room.seen_from.push_back(0);
            room.opened_from.push_back(kMayNotOpen);
        };
        if (near_from > 0) refer(0);
        for (int exact = near_from; exact < block; ++exact) refer(exact);
    }
    int32_t* kept = strip_openings(head, strip.first_position, level);
    const int num_kept = row_begin == 0 ? 0 : read_count(kept, row_blocks_);
    int num_opened = 0;
    for (int i = 0; i < num_kept; ++i) {
        const int32_t index = kept[1 + i] >> 4, from = kept[1 + i] & 15;
        if (from >= row_begin) break;  // another thread's, for this very row
        ++num_opened;
        const auto found = std::lower_bound(room.cells.begin(), room.cells.begin() + free, index);
        if (found == room.cells.begin() + free || *found != index) continue;
        room.opened_from[static_cast<size_t>(found - room.cells.begin())] = static_cast<uint8_t>(from);
    }
    const int count = static_cast<int>(room.cells.size()), pages = (count + kPageTokens - 1) / kPageTokens;
    const int d = layout_.head_dim, dim = d + (gate.active() ? gate.dim : 0);
    const bool exact = layout_.type == CacheType::fp32;
    const size_t page_bytes = static_cast<size_t>(dim) * kPageTokens * sizeof(float);
    // The strips of a block meet the same cells where a descent has one level, which is then laid out already. For a
    // lone row laying them out would be most of the work.
    const bool is_alone = strip.num_rows == 1 && !strip.follows;
    const auto score_place = [&](int h) {
        return room.scores.as<float>() + static_cast<size_t>(h) * pages * kStripRows * kPageTokens;
    };
    if (!strip.follows || top > 0 || !room.is_packed) {
        room.keys.clear();
        for (int i = 0; i < count; ++i) {
            const Cell cell{i < free ? level : 0, room.cells[i]};
            room.keys.push_back(gate.active() ? statistics(head, cell) + 3 * d : means(head, cell));
        }
        for (int page = 0; page < pages && !is_alone; ++page) {
            kernels().pack_cells(room.keys.data() + page * kPageTokens,
                                 std::min(kPageTokens, count - page * kPageTokens), dim, exact,
                                 room.packed.data() + page * page_bytes);
        }
    }
    room.is_packed = !is_alone;
    room.bias.resize(static_cast<size_t>(pages) * kPageTokens, 0.f);
    room.opened_from.resize(static_cast<size_t>(pages) * kPageTokens, kMayNotOpen);
    room.seen_from.resize(static_cast<size_t>(pages) * kPageTokens, kStripRows);
    if (is_alone) {
        RowScoreCall alone;
        alone.query = room.query.as<float>() + static_cast<size_t>(row_begin) * dim;
        alone.query_stride = static_cast<size_t>(kStripRows) * dim;
        alone.num_heads = strip.num_heads;
        alone.dim = dim;
        alone.exact = exact;
        alone.cells = room.keys.data();
        alone.count = count;
        alone.scores = score_place(0) + static_cast<size_t>(row_begin) * kPageTokens;
        alone.score_stride = static_cast<size_t>(pages) * kStripRows * kPageTokens;
        alone.page_stride = static_cast<size_t>(kStripRows) * kPageTokens;
        kernels().score_row(alone);
        // The places behind the last cell are met by nobody, but have to be numbers.
        for (int h = 0; h < strip.num_heads; ++h) {
            for (int i = count; i < pages * kPageTokens; ++i) *alone.place(h, i) = 0.f;
        }
    } else {
        for (int h = 0; h < strip.num_heads; ++h) {
            kernels().score_strip(room.query.as<float>() + static_cast<size_t>(h) * kStripRows * dim, dim, exact,
                                  room.packed.data(), pages, score_place(h));
        }
    }
    OpenCall call;
    call.num_heads = strip.num_heads;
    call.row_begin = row_begin;
    call.row_end = row_begin + strip.num_rows;
    call.num_pages = pages;
    call.scores = room.scores.as<float>();
    call.bias = room.bias.data();
    call.seen_from = room.seen_from.data();
    call.opened_from = room.opened_from.data();
    call.rest = room.rest;
    call.log_share = std::log2(budget.min_share);
    call.pass_on = level > 0;
    call.most = most;
    kernels().open_cells(call);

    const int last_row = row_begin + strip.num_rows - 1;
    for (int i = 0; i < free; ++i) {
        if (room.opened_from[i] <= last_row) room.next_opened.push_back({room.cells[i], room.opened_from[i]});
    }
    if (!strip.keep) return;
    for (int row = row_begin; row <= last_row; ++row) {
        for (int i = 0; i < free; ++i) {
            if (room.opened_from[i] == row) kept[1 + num_opened++] = (room.cells[i] << 4) | row;
        }
    }
    write_count(kept, num_opened);
}

void Pyramid::select_rows(const HeadView& head, const StripQuery& strip, const Budget& budget, const Gate& gate,
                          SelectionRoom& selection) {
    RowRoom& room = selection.rows_room;
    const int block = strip.first_position / kPageTokens;
    const int near_from = std::max(0, block - budget.near_blocks);
    room.opened.clear();
    bool has_query = false;
    int tiled = 0;
    for (int level = row_top_level(block); level >= 0; --level) {
        room.cells.clear();
        room.seen_from.clear();
        room.next_opened.clear();
        const auto meet = [&](int index, uint8_t seen_from) {
            switch (fate_of({level, index}, block, budget)) {
                case CellFate::inside: return;
                case CellFate::forced: room.next_opened.push_back({index, seen_from}); return;
                case CellFate::free:
                    room.cells.push_back(index);
                    room.seen_from.push_back(seen_from);
                    return;
            }
        };
        for (const RowRoom::Opened& parent : room.opened) {
            for (int child = 0; child < 1 << kRadixBits; ++child)
                meet((parent.index << kRadixBits) + child, parent.from);
        }
        const int size = cell_blocks(level);
        for (; tiled + size <= block; tiled += size) meet(tiled / size, 0);
        if (room.cells.empty()) {
            if (strip.keep) write_count(strip_openings(head, strip.first_position, level), 0);
        } else {
            if (!has_query) set_query(head, strip, gate, room);
            has_query = true;
            open_level(head, strip, budget, gate, level, room);
        }
        std::sort(room.next_opened.begin(), room.next_opened.end(),
                  [](const auto& a, const auto& b) { return a.index < b.index; });
        room.opened.swap(room.next_opened);
    }
    RowSelection& chosen = selection.by_rows;
    chosen.blocks.clear();
    chosen.from_rows.clear();
    const auto attend_to = [&](int index, uint8_t from) {
        chosen.blocks.push_back(index);
        chosen.from_rows.push_back(from);
    };
    if (near_from > 0) attend_to(0, 0);
    for (const RowRoom::Opened& opened : room.opened) attend_to(opened.index, opened.from);
    for (int exact = near_from; exact <= block; ++exact) attend_to(exact, 0);
}

RowSelection Pyramid::recall_rows(const HeadView& head, int position, const Budget& budget) const {
    const int block = position / kPageTokens, near_from = std::max(0, block - budget.near_blocks);
    int32_t* kept = strip_openings(head, position, 0);
    std::vector<RowRoom::Opened> opened;
    for (int i = 0; i < read_count(kept, row_blocks_); ++i) {
        const int32_t entry = kept[1 + i];
        if ((entry & 15) <= position % kStripRows) opened.push_back({entry >> 4, static_cast<uint8_t>(entry & 15)});
    }
    std::sort(opened.begin(), opened.end(), [](const auto& a, const auto& b) { return a.index < b.index; });
    RowSelection chosen;
    const auto attend_to = [&](int index, uint8_t from) {
        chosen.blocks.push_back(index);
        chosen.from_rows.push_back(from);
    };
    if (near_from > 0) attend_to(0, 0);
    for (const auto& entry : opened) attend_to(entry.index, entry.from);
    for (int exact = near_from; exact <= block; ++exact) attend_to(exact, 0);
    return chosen;
}

}  // namespace dseek
