#include "matmul.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/numbers.h"

namespace dseek {

void multiply(const Linear& weight, const float* x, int m, float* out) {
    constexpr int kRowsPerTask = 256;
    constexpr int kTilePanels = 4;
    ThreadPool& team = thread_pool();
    const KernelTable& table = kernels();
    const int threads = team.size();
    const RowKind kind = table.row_kind(weight.format, m);
    RowBuffer buffer;
    buffer.memory = Pages(RowBuffer::bytes(weight, kind, m));
    buffer.lay_out(weight, kind, m);
    // Many rows: a task takes some rows through all channels, so that its activations stay in a private cache.
    const int row_step = std::min(m, kRowsPerTask);
    const int row_tasks = (m + row_step - 1) / row_step;
    const int wanted = std::max(1, 4 * threads / row_tasks);
    const int panels = weight.num_panels();
    const int panel_step = round_up((panels + wanted - 1) / wanted, kTilePanels);
    const int panel_tasks = (panels + panel_step - 1) / panel_step;
    team.reset_counter(0);
    team.run([&](int thread_idx) {
        for (int row = m * thread_idx / threads; row < m * (thread_idx + 1) / threads; ++row) {
            table.prepare_row(x + static_cast<size_t>(row) * weight.k, weight.k, weight.k_padded, buffer.rows, row);
        }
        team.barrier();
        for (int task = team.claim(0); task < row_tasks * panel_tasks; task = team.claim(0)) {
            const int row = task / panel_tasks * row_step, panel = task % panel_tasks * panel_step;
            table.linear({.weight = &weight,
                          .rows = &buffer.rows,
                          .row_begin = row,
                          .row_end = std::min(row + row_step, m),
                          .panel_begin = panel,
                          .panel_end = std::min(panel + panel_step, panels),
                          .epilogue = Epilogue::store,
                          .bias = nullptr,
                          .out = out,
                          .out_stride = static_cast<size_t>(weight.n_padded)});
        }
    });
}

void dense_attention(const uint16_t* q, const uint16_t* k, const uint16_t* v, int heads, int tokens, int d,
                     uint16_t* out) {
    ThreadPool& team = thread_pool();
    const KernelTable& table = kernels();
    const CacheLayout layout(CacheType::bf16, d, 1, heads);
    const int blocks = (tokens + kPageTokens - 1) / kPageTokens;
    const Pages cache(layout.page_bytes() * static_cast<size_t>(blocks));
    std::vector<int32_t> pages(static_cast<size_t>(blocks));
    for (int block = 0; block < blocks; ++block) pages[block] = block;
    const size_t block_floats = static_cast<size_t>(kPageTokens) * d;
    const auto block_rows = [&](int block) { return std::min(kPageTokens, tokens - block * kPageTokens); };
    // Queries of one task: enough that a page, once near, is used often; few enough that their sums stay near too.
    constexpr int kTaskBlocks = 2;
    const int tasks = (blocks + kTaskBlocks - 1) / kTaskBlocks;
    team.reset_counter(0);
    team.reset_counter(1);
    std::vector<std::vector<float>> rooms(static_cast<size_t>(team.size()),
                                          std::vector<float>(2 * kTaskBlocks * block_floats));
    team.run([&](int thread_idx) {
        float* room = rooms[thread_idx].data();
        for (int task = team.claim(0); task < heads * blocks; task = team.claim(0)) {
            const int head = task / blocks, block = task % blocks;
            const size_t start = (static_cast<size_t>(head) * tokens + static_cast<size_t>(block) * kPageTokens) * d;
            const size_t count = static_cast<size_t>(block_rows(block)) * d;
            for (size_t i = 0; i < count; ++i) {
                room[i] = bf16_to_float(k[start + i]);
                room[block_floats + i] = bf16_to_float(v[start + i]);
            }
            table.store_tokens(layout, cache.data() + layout.offset(block, 0, head), 0, block_rows(block), room,
                               room + block_floats, static_cast<size_t>(d));
        }
        team.barrier();
        float* queries = room;
        float* results = room + kTaskBlocks * block_floats;
        for (int task = team.claim(1); task < heads * tasks; task = team.claim(1)) {
            const int head = task % heads, first = (tasks - 1 - task / heads) * kTaskBlocks;  // the longest rows first
            const size_t start = (static_cast<size_t>(head) * tokens + static_cast<size_t>(first) * kPageTokens) * d;
            const int rows = std::min(kTaskBlocks * kPageTokens, tokens - first * kPageTokens);
            const size_t count = static_cast<size_t>(rows) * d;
            for (size_t i = 0; i < count; ++i) queries[i] = bf16_to_float(q[start + i]);
            AttentionCall call;
            call.layout = &layout;
            call.cache = cache.data() + layout.offset(0, 0, head);
            call.pages = pages.data();
            call.query = queries;
            call.query_stride = static_cast<size_t>(d);
            call.out = results;
            call.out_stride = static_cast<size_t>(d);
            call.num_heads = 1;
            call.first_position = first * kPageTokens;
            call.num_rows = rows;
            call.scale = 1.f / std::sqrt(static_cast<float>(d));
            table.attention(call);
            for (size_t i = 0; i < count; ++i) out[start + i] = float_to_bf16(results[i]);
        }
    });
}

}  // namespace dseek
