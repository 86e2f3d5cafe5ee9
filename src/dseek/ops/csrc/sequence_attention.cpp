#include "sequence_attention.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "common/thread_pool.h"

namespace dseek {
namespace {

void widen_row(const float* source, int count, float* out) { std::copy(source, source + count, out); }
void widen_row(const uint16_t* source, int count, float* out) { kernels().widen(source, count, out); }

void narrow_row(const float* source, int count, float* out) { std::copy(source, source + count, out); }
void narrow_row(const float* source, int count, uint16_t* out) { kernels().narrow(source, count, out); }

double now_s() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// What one thread works with.
struct Room {
    std::vector<float> rows;  // two blocks of rows of all heads of a group
    SelectionRoom selection;
    AttentionTimes times;
};

}  // namespace

template <class Value>
void sequence_attention(const SequenceShape& shape, const Value* q, const Value* k, const Value* v,
                        const DynamicPattern& pattern, Value* out, AttentionTrace* trace) {
    constexpr CacheType kType = std::is_same_v<Value, float> ? CacheType::fp32 : CacheType::bf16;
    ThreadPool& team = thread_pool();
    const KernelTable& table = kernels();
    const int d = shape.head_dim, groups = shape.num_kv_heads, heads = shape.num_heads / groups;
    const int blocks = (shape.num_tokens + kPageTokens - 1) / kPageTokens;
    const CacheLayout layout(kType, d, 1, groups);
    // Kept between calls, since new memory costs as much as attending to a part of it.
    constexpr size_t kMostKept = size_t{256} << 20;
    thread_local Pages cache;
    const size_t cache_bytes = layout.page_bytes() * static_cast<size_t>(blocks);
    if (cache.size() < cache_bytes) cache = Pages(cache_bytes);
    uint8_t* const cache_data = cache.data();
    Pyramid pyramid;
    const bool by_rows = pattern.active() && pattern.min_share > 0.f;
    if (pattern.active()) {
        const int most = pattern.top_blocks;
        pyramid = Pyramid(layout, blocks, shape.num_tokens, by_rows ? 0 : most, by_rows ? most : 0, 0);
    }
    std::vector<int32_t> pages(static_cast<size_t>(blocks));
    for (int block = 0; block < blocks; ++block) pages[block] = block;
    const size_t block_floats = static_cast<size_t>(kPageTokens) * d;
    std::vector<Room> rooms(static_cast<size_t>(team.size()));
    for (Room& room : rooms) {
        room.rows.resize(2 * block_floats * static_cast<size_t>(heads));
        if (pattern.active()) pyramid.reserve(room.selection, heads);
    }
    constexpr int kStripsOfBlock = kPageTokens / kStripRows;
    if (trace != nullptr) {
        trace->blocks.assign(by_rows ? 0 : static_cast<size_t>(groups) * blocks, {});
        trace->rows.assign(by_rows ? static_cast<size_t>(groups) * blocks * kStripsOfBlock : 0, {});
    }
    const float scale = 1.f / std::sqrt(static_cast<float>(d));
    const auto rows_of = [&](int block) { return std::min(kPageTokens, shape.num_tokens - block * kPageTokens); };
    const auto start_of = [&](int head, int block) {
        return (static_cast<size_t>(head) * shape.num_tokens + static_cast<size_t>(block) * kPageTokens) * d;
    };
    const auto head_view = [&](int g) { return HeadView{cache_data + layout.offset(0, 0, g), pages.data(), 0, g}; };

    const auto fill_page = [&](int g, int block, Room& room) {
        const size_t start = start_of(g, block);
        uint8_t* page = cache_data + layout.offset(block, 0, g);
        if constexpr (kType == CacheType::bf16) {
            if (rows_of(block) == kPageTokens) {
                table.store_page(layout, page, k + start, v + start);
                return;
            }
        }
        const int count = rows_of(block) * d;
        float *keys = room.rows.data(), *values = keys + block_floats;
        widen_row(k + start, count, keys);
        widen_row(v + start, count, values);
        // What an earlier call left in slots that stay empty must not be infinite when it is multiplied by 0.
        if (rows_of(block) < kPageTokens) std::memset(page, 0, layout.head_bytes);
        table.store_tokens(layout, page, 0, rows_of(block), keys, values, static_cast<size_t>(d));
    };
    const auto attend = [&](int g, int block, Room& room) {
        const int rows = rows_of(block);
        const size_t stride = static_cast<size_t>(heads) * d;
        float *queries = room.rows.data(), *results = queries + block_floats * heads;
        for (int head = 0; head < heads; ++head) {
            const Value* source = q + start_of(g * heads + head, block);
            for (int row = 0; row < rows; ++row) {
                float* target = queries + row * stride + static_cast<size_t>(head) * d;
                widen_row(source + static_cast<size_t>(row) * d, d, target);
            }
        }
        AttentionCall call;
        call.layout = &layout;
        call.cache = head_view(g).cache;
        call.pages = pages.data();
        call.query = queries;
        call.query_stride = stride;
        call.out = results;
        call.out_stride = stride;
        call.num_heads = heads;
        call.first_position = block * kPageTokens;
        call.num_rows = rows;
        call.scale = scale;
        double selection_s = 0., attention_s = 0.;
        const auto timed = [](double& total, const auto& body) {
            const double started = now_s();
            body();
            total += now_s() - started;
        };
        for (int row = 0; row < (by_rows ? rows : 0); row += kStripRows) {
            AttentionCall strip = call;
            strip.first_position += row;
            strip.num_rows = std::min(kStripRows, rows - row);
            strip.query += row * stride;
            strip.out += row * stride;
            RowSelection& chosen = room.selection.by_rows;
            timed(selection_s, [&] {
                pyramid.select_rows(head_view(g),
                                    {strip.first_position, strip.num_rows, strip.query, stride, heads, row > 0, false},
                                    pattern.budget(g), {}, room.selection);
            });
            strip.blocks = chosen.blocks.data();
            strip.from_rows = chosen.from_rows.data();
            strip.num_blocks = static_cast<int>(chosen.blocks.size());
            timed(attention_s, [&] { table.attention(strip); });
            if (trace == nullptr) continue;
            const size_t index = (static_cast<size_t>(g) * blocks + block) * kStripsOfBlock + row / kStripRows;
            trace->rows[index] = chosen;
        }
        if (pattern.active() && !by_rows) {
            timed(selection_s, [&] {
                pyramid.select(head_view(g), block, pattern.budget(g), queries, heads, room.selection);
                const Selection& selection = room.selection.selection;
                call.blocks = selection.blocks.data();
                call.num_blocks = static_cast<int>(selection.blocks.size());
                if (pattern.far) {
                    const size_t first = static_cast<size_t>(g) * heads * static_cast<size_t>(pyramid.top() + 1);
                    const float* bias = pattern.level_bias.empty() ? nullptr : pattern.level_bias.data() + first;
                    call.far = pyramid.gather_far(head_view(g), heads, bias, scale, room.selection);
                }
                if (trace != nullptr) trace->blocks[static_cast<size_t>(g) * blocks + block] = selection;
            });
        }
        if (!by_rows) timed(attention_s, [&] { table.attention(call); });
        room.times.selection_s += selection_s;
        room.times.attention_s += attention_s;
        for (int head = 0; head < heads; ++head) {
            Value* target = out + start_of(g * heads + head, block);
            for (int row = 0; row < rows; ++row) {
                const float* source = results + row * stride + static_cast<size_t>(head) * d;
                narrow_row(source, d, target + static_cast<size_t>(row) * d);
            }
        }
    };

    for (int slot = 0; slot < ThreadPool::kCounters; ++slot) team.reset_counter(slot);
    team.run([&](int thread_idx) {
        Room& room = rooms[thread_idx];
        int stage = 0;
        // The next stage's counter is cleared two meetings after its last use.
        const auto share_out = [&](int count, const auto& body) {
            if (thread_idx == 0) team.reset_counter((stage + 2) % ThreadPool::kCounters);
            const int slot = stage++ % ThreadPool::kCounters;
            for (int task = team.claim(slot); task < count; task = team.claim(slot)) body(task);
            team.barrier();
        };
        share_out(groups * blocks, [&](int task) {
            const int g = task / blocks, block = task % blocks;
            fill_page(g, block, room);
            // While the page is near, and where a later block can see it.
            if (pattern.active() && block < blocks - 1) pyramid.seal(head_view(g), block, 0, {});
        });
        for (int level = 1; pattern.active() && level <= pyramid.top(); ++level) {
            const int cells = (blocks - 1) / cell_blocks(level);  // complete ones that a later block can see
            const double started = now_s();
            share_out(groups * cells, [&](int task) {
                pyramid.seal(head_view(task % groups), (task / groups + 1) * cell_blocks(level) - 1, level, {});
            });
            room.times.pyramid_s += now_s() - started;
        }
        // Head by head, so that its keys and values are near; the longest rows first.
        share_out(groups * blocks, [&](int task) { attend(task / blocks, blocks - 1 - task % blocks, room); });
    });
    if (cache.size() > kMostKept) cache = Pages();
    if (trace == nullptr) return;
    trace->times = {};
    for (const Room& room : rooms) {
        trace->times.pyramid_s += room.times.pyramid_s;
        trace->times.selection_s += room.times.selection_s;
        trace->times.attention_s += room.times.attention_s;
    }
}

template void sequence_attention(const SequenceShape&, const float*, const float*, const float*, const DynamicPattern&,
                                 float*, AttentionTrace*);
template void sequence_attention(const SequenceShape&, const uint16_t*, const uint16_t*, const uint16_t*,
                                 const DynamicPattern&, uint16_t*, AttentionTrace*);

}  // namespace dseek
