#include "measure.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <vector>

#include "decoder.h"
#include "matmul.h"

namespace dseek {
namespace {

double now_s() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

double median(std::vector<double> values) {
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
}

// Times a call: one that warms up, then up to `repeats` that count. A call that takes long is not repeated for it.
template <class Call>
double median_time(int repeats, const Call& call) {
    constexpr double kLongS = 0.3;
    std::vector<double> times;
    double spent = 0.;
    for (int repeat = -1; repeat < repeats && (times.empty() || spent < kLongS); ++repeat) {
        const double start = now_s();
        call();
        const double seconds = now_s() - start;
        spent += seconds;
        if (repeat >= 0 || seconds > kLongS) times.push_back(seconds);
    }
    return median(times);
}

// Small numbers of both signs without a pattern; the arithmetic they cause is that of real weights.
void fill(float* values, size_t count) {
    uint32_t state = 0x9e3779b9u;
    for (size_t i = 0; i < count; ++i) {
        state = state * 1664525u + 1013904223u;
        values[i] = static_cast<float>(static_cast<int32_t>(state) >> 8) * 0x1p-24f;
    }
}

}  // namespace

double read_bandwidth(size_t num_bytes, int repeats) {
    ThreadPool& team = thread_pool();
    const Pages memory(num_bytes);
    const size_t share = num_bytes / static_cast<size_t>(team.size()) / 512 * 512;
    std::vector<double> sinks(static_cast<size_t>(team.size()));
    team.run([&](int thread_idx) { std::memset(memory.data() + thread_idx * share, thread_idx + 1, share); });
    double best = 0.;
    for (int repeat = 0; repeat < repeats; ++repeat) {
        const double start = now_s();
        team.run([&](int thread_idx) {
            sinks[thread_idx] = kernels().read_bytes(memory.data() + thread_idx * share, share);
        });
        const double seconds = now_s() - start;
        best = std::max(best, static_cast<double>(share * static_cast<size_t>(team.size())) / seconds * 1e-9);
    }
    return best;
}

double time_linear(Format format, int m, int n, int k, int repeats, size_t working_set_bytes) {
    const BlobHeader header = make_header(format, n, k, false);
    const int copies = std::max(1, static_cast<int>(working_set_bytes / header.num_bytes));
    std::vector<float> source(static_cast<size_t>(n) * k);
    fill(source.data(), source.size());
    const std::vector<Piece> pieces{
        {Encoding::f32, n, reinterpret_cast<const uint8_t*>(source.data()), source.size() * sizeof(float)}};
    const size_t stride = round_up_size(header.num_bytes, 4096);
    const Pages blobs(stride * static_cast<size_t>(copies));
    pack_blob(header, pieces, blobs.data());
    for (int copy = 1; copy < copies; ++copy) std::memcpy(blobs.data() + copy * stride, blobs.data(), header.num_bytes);
    std::vector<float> x(static_cast<size_t>(m) * k), out(static_cast<size_t>(m) * header.n_padded);
    fill(x.data(), x.size());
    // One call is a whole pass over the copies, as a decode step is a pass over the layers.
    return median_time(repeats,
                       [&] {
                           for (int copy = 0; copy < copies; ++copy) {
                               multiply(view_blob(blobs.data() + copy * stride, header.num_bytes), x.data(), m,
                                        out.data());
                           }
                       }) /
           copies;
}

double time_attention(int num_rows, int context, int num_heads, int num_kv_heads, int head_dim, CacheType type,
                      int repeats) {
    const KernelTable& table = kernels();
    ThreadPool& team = thread_pool();
    const CacheLayout layout(type, head_dim, 1, num_kv_heads);
    const int num_pages = (context + kPageTokens - 1) / kPageTokens;
    const Pages cache(layout.page_bytes() * static_cast<size_t>(num_pages));
    std::vector<int32_t> pages(static_cast<size_t>(num_pages));
    for (int page = 0; page < num_pages; ++page) pages[page] = page;
    const size_t width = static_cast<size_t>(num_heads) * head_dim;
    std::vector<float> token(2 * static_cast<size_t>(head_dim)), query(static_cast<size_t>(num_rows) * width);
    fill(token.data(), token.size());
    fill(query.data(), query.size());
    for (int position = 0; position < context; ++position) {
        for (int g = 0; g < num_kv_heads; ++g) {
            table.store_tokens(layout, cache.data() + layout.offset(position / kPageTokens, 0, g),
                               position % kPageTokens, 1, token.data(), token.data() + head_dim, 0);
        }
    }
    std::vector<float> out(query.size());
    const int heads = num_heads / num_kv_heads;
    const int task_rows = rows_of_attention_task(num_rows, num_kv_heads, team.size());
    const int row_tasks = (num_rows + task_rows - 1) / task_rows;
    // A single row is split over its pages, as the decoder does; here the parts are not joined.
    const int splits = num_rows == 1 ? std::clamp(4 * team.size() / num_kv_heads, 1, std::max(1, num_pages / 4)) : 1;
    std::vector<float> partial(static_cast<size_t>(splits) * num_heads * (head_dim + 2));
    return median_time(repeats, [&] {
        team.reset_counter(0);
        team.run([&](int) {
            const int count = row_tasks * num_kv_heads * splits;
            for (int task = team.claim(0); task < count; task = team.claim(0)) {
                const int g = task % num_kv_heads, split = task / num_kv_heads % splits;
                const int row = (row_tasks - 1 - task / num_kv_heads / splits) * task_rows;
                const size_t at = static_cast<size_t>(row) * width + static_cast<size_t>(g) * heads * head_dim;
                AttentionCall call;
                call.layout = &layout;
                call.cache = cache.data() + layout.offset(0, 0, g);
                call.pages = pages.data();
                call.query = query.data() + at;
                call.query_stride = width;
                call.out = out.data() + at;
                call.out_stride = width;
                call.num_heads = heads;
                call.first_position = context - num_rows + row;
                call.num_rows = std::min(task_rows, num_rows - row);
                call.scale = 1.f / std::sqrt(static_cast<float>(head_dim));
                if (splits > 1) {
                    const size_t slot = (static_cast<size_t>(split) * num_kv_heads + g) * heads;
                    call.page_begin = num_pages * split / splits;
                    call.page_end = num_pages * (split + 1) / splits;
                    call.out = partial.data() + slot * head_dim;
                    call.partial_max = partial.data() + static_cast<size_t>(splits) * width + slot;
                    call.partial_sum = call.partial_max + static_cast<size_t>(splits) * num_heads;
                }
                table.attention(call);
            }
        });
    });
}

}  // namespace dseek
