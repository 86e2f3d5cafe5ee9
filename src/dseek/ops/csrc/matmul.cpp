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
    // Kept between calls where it is small: giving memory back costs a lone row several times its product.
    constexpr size_t kMostKept = 1 << 20;
    thread_local RowBuffer kept;
    RowBuffer passing;
    const size_t num_bytes = RowBuffer::bytes(weight, kind, m);
    RowBuffer& buffer = num_bytes <= kMostKept ? kept : passing;
    if (buffer.memory.size() < num_bytes) buffer.memory = Pages::huge(std::max(num_bytes, size_t{64} << 10));
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

}  // namespace dseek
