#include "decoder.h"

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

namespace dseek {
namespace {

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

void check_linear(const Linear& weight, int n, int k, bool interleaved, const char* name) {
    if (weight.n != n || weight.k != k || weight.interleaved != interleaved) {
        refuse(std::string(name) + " is " + std::to_string(weight.n) + " x " + std::to_string(weight.k) +
               "; needed: " + std::to_string(n) + " x " + std::to_string(k) + (interleaved ? ", interleaved" : ""));
    }
}

}  // namespace

Decoder::Decoder(const DecoderShape& shape)
    : shape_(shape), layout_(shape.cache_type, shape.head_dim, shape.num_layers, shape.num_kv_heads) {
    constexpr int kLargest = 1 << 24;
    for (const int size : {shape.hidden_size, shape.intermediate_size, shape.num_layers, shape.num_heads,
                           shape.num_kv_heads, shape.head_dim, shape.vocab_size}) {
        if (size < 1 || size > kLargest) refuse("a size of the decoder is out of range: " + std::to_string(size));
    }
    if (shape.head_dim % 16 != 0 || shape.head_dim > 512) {
        refuse("head width is " + std::to_string(shape.head_dim) + "; needed: a multiple of 16 up to 512");
    }
    if (shape.num_heads % shape.num_kv_heads != 0) refuse("query heads are no multiple of key-value heads");
    const int64_t qkv = (int64_t{shape.num_heads} + 2 * shape.num_kv_heads) * shape.head_dim;
    if (qkv > kLargest || 2 * shape.intermediate_size > kLargest) refuse("a projection of the decoder is too wide");
}

void Decoder::check_block(const BlockWeights& block) const {
    const int query = shape_.num_heads * shape_.head_dim, kv = shape_.num_kv_heads * shape_.head_dim;
    check_linear(block.qkv, query + 2 * kv, shape_.hidden_size, false, "qkv projection");
    check_linear(block.output, shape_.hidden_size, query, false, "output projection");
    check_linear(block.gate_up, 2 * shape_.intermediate_size, shape_.hidden_size, true, "gate and up projection");
    check_linear(block.down, shape_.hidden_size, shape_.intermediate_size, false, "down projection");
}

void Decoder::check_layer(int layer) const {
    if (layer < 0 || layer >= static_cast<int>(blocks_.size())) {
        refuse("layer " + std::to_string(layer) + " is out of range; there are " + std::to_string(blocks_.size()));
    }
}

void Decoder::add_block(const BlockWeights& block) {
    check_block(block);
    if (static_cast<int>(blocks_.size()) == shape_.num_layers) refuse("more blocks than the decoder has layers");
    blocks_.push_back(block);
    exceeded_.resize(blocks_.size() * 4);
    sized_for_ = nullptr;
}

void Decoder::set_tables(const Linear& embedding, const Linear& head, const float* final_norm) {
    check_linear(embedding, shape_.vocab_size, shape_.hidden_size, false, "embedding");
    check_linear(head, shape_.vocab_size, shape_.hidden_size, false, "head");
    embedding_ = embedding;
    head_ = head;
    final_norm_ = final_norm;
    sized_for_ = nullptr;
}

void Decoder::set_rotary(const float* cos, const float* sin, int num_positions) {
    cos_ = cos;
    sin_ = sin;
    num_positions_ = num_positions;
    if (gate_blocks_ > 0) pyramid_.rotation.set_model(cos, sin, num_positions, shape_.head_dim);
}

void Decoder::set_gate_rotation(std::vector<float> cos, std::vector<float> sin, int num_blocks) {
    if (num_pages_ > 0) refuse("the gates' rotation must be set before the cache is allocated");
    gate_rotation_.cos = std::move(cos);
    gate_rotation_.sin = std::move(sin);
    gate_blocks_ = num_blocks;
}

void Decoder::allocate_cache(int num_pages) {
    if (num_pages < 1) refuse("the cache needs at least one page");
    if (static_cast<size_t>(num_pages) > SIZE_MAX / layout_.page_bytes()) throw std::bad_alloc();
    int top_blocks = 0, row_blocks = 0, gate_dim = 0;
    for (const DynamicPattern& pattern : patterns_) {
        int& most = pattern.min_share > 0.f ? row_blocks : top_blocks;
        most = std::max(most, pattern.top_blocks);
        if (!pattern.gate.active()) continue;
        if (gate_dim != 0 && gate_dim != pattern.gate.dim) refuse("the layers' gates differ in width");
        gate_dim = pattern.gate.dim;
    }
    if (gate_dim > 0 && gate_rotation_.cos.size() != static_cast<size_t>(gate_blocks_) * (gate_dim / 2)) {
        refuse("the gates' rotation is missing or has another width than they have");
    }
    if (gate_dim > 0 && gate_blocks_ < num_pages) refuse("the gates' rotation has fewer blocks than the cache pages");
    selects_rows_ = row_blocks > 0;
    if (!patterns_.empty()) {
        pyramid_ = Pyramid(layout_, num_pages, static_cast<int64_t>(num_pages) * kPageTokens, top_blocks, row_blocks,
                           gate_dim);
        pyramid_.rotation = gate_rotation_;
        if (gate_dim > 0 && cos_ != nullptr) {
            pyramid_.rotation.set_model(cos_, sin_, num_positions_, shape_.head_dim);
        }
        const size_t biases = static_cast<size_t>(shape_.num_heads) * static_cast<size_t>(pyramid_.top() + 1);
        for (const DynamicPattern& pattern : patterns_) {
            if (!pattern.level_bias.empty() && pattern.level_bias.size() != biases) {
                refuse("level_bias has " + std::to_string(pattern.level_bias.size()) +
                       " values; needed: " + std::to_string(biases) + ", heads times levels");
            }
        }
    }
    cache_ = Pages(layout_.page_bytes() * static_cast<size_t>(num_pages));
    num_pages_ = num_pages;
}

size_t Decoder::weight_bytes() const {
    size_t total = head_.num_bytes;
    for (const BlockWeights& block : blocks_) {
        total += block.qkv.num_bytes + block.output.num_bytes + block.gate_up.num_bytes + block.down.num_bytes;
    }
    return total;
}

size_t Decoder::workspace_bytes() const {
    size_t total = x_.size() + qkv_.size() + attended_.size() + hidden_.size() + needed_x_.size() +
                   needed_attended_.size() + shared_rows_.memory.size() + partial_out_.size() + partial_max_.size() +
                   partial_sum_.size();
    for (const Worker& worker : workers_) {
        total += worker.prepared.memory.size() + worker.normed.size() + worker.hidden.size() + worker.query.size();
    }
    return total;
}

void Decoder::check_sequence(const int32_t* pages, int pages_per_sequence, int begin, int end) const {
    if (begin < 0 || end <= begin || end > num_positions_) {
        refuse("position " + std::to_string(begin < 0 ? begin : int64_t{end} - 1) +
               " is out of range; the context has " + std::to_string(num_positions_) + " positions");
    }
    const int needed = (end + kPageTokens - 1) / kPageTokens;
    if (needed > pages_per_sequence) refuse("a sequence has fewer pages than its positions need");
    for (int page = 0; page < needed; ++page) {
        if (pages[page] < 0 || pages[page] >= num_pages_) {
            refuse("page " + std::to_string(pages[page]) + " is out of range; the cache has " +
                   std::to_string(num_pages_) + " pages");
        }
    }
}

void Decoder::check(const Batch& batch) const {
    if (static_cast<int>(blocks_.size()) != shape_.num_layers || cos_ == nullptr || num_pages_ == 0) {
        refuse("the decoder is not complete: blocks, rotary tables and cache must be set first");
    }
    if (batch.num_rows < 1 || batch.num_sequences < 1) refuse("a batch needs at least one row");
    if (batch.row_starts[0] != 0 || batch.row_starts[batch.num_sequences] != batch.num_rows) {
        refuse("row_starts does not cover the batch");
    }
    for (int s = 0; s < batch.num_sequences; ++s) {
        const int begin = batch.row_starts[s], end = batch.row_starts[s + 1];
        if (end <= begin || end > batch.num_rows) refuse("row_starts must grow");
        const int first = batch.positions[begin];
        if (first > INT_MAX - (end - begin)) refuse("a position is out of range");
        for (int row = begin; row < end; ++row) {
            if (batch.positions[row] != first + row - begin) refuse("positions of a sequence must be consecutive");
        }
        check_sequence(batch.page_tables + static_cast<size_t>(s) * batch.pages_per_sequence, batch.pages_per_sequence,
                       first, first + end - begin);
    }
    for (int w = 0; w < batch.num_wholes; ++w) {
        check_sequence(batch.whole_page_tables + static_cast<size_t>(w) * batch.pages_per_sequence,
                       batch.pages_per_sequence, batch.whole_positions[2 * w], batch.whole_positions[2 * w + 1]);
    }
    for (int i = 0; i < batch.num_logit_rows; ++i) {
        const int row = batch.logit_rows[i];
        if (row < 0 || row >= batch.num_rows || (i > 0 && row <= batch.logit_rows[i - 1])) {
            refuse("logit_rows must be ascending rows of the batch");
        }
    }
}

void Decoder::plan(const Batch& batch) {
    constexpr int kRowsForRowMode = 32;    // rows a thread should have before it works on rows of its own
    constexpr int kLargestRowTask = 256;   // its activations then fit a private cache of 1 to 2 MiB
    constexpr int kPagesForSplit = 4;      // least pages of a part of a long context
    constexpr int kLeastRowTask = 16;  // kernels for few rows round otherwise: a batch takes them for all or none
    const int threads = team_->size();
    find_new_blocks(batch);
    // Where a query block begins, cells may have to be sealed between storing and attending, and an exchange comes
    // between the two as well: not inside one task.
    single_rows_ = batch.num_rows == batch.num_sequences && new_blocks_.empty() && exchange_ == nullptr;
    by_rows_ = batch.num_rows >= kRowsForRowMode * threads;
    const int share = round_up((batch.num_rows + threads - 1) / threads, 16);
    const int parts = (share + kLargestRowTask - 1) / kLargestRowTask;
    rows_per_task_ = round_up((share + parts - 1) / parts, 16);
    num_row_tasks_ = batch.num_rows / rows_per_task_ + (batch.num_rows % rows_per_task_ >= kLeastRowTask ? 1 : 0);
    num_row_tasks_ = std::max(1, num_row_tasks_);

    tasks_.clear();
    needed_tasks_.clear();
    row_splits_.assign(batch.num_rows, 0);
    row_sequence_.assign(batch.num_rows, 0);
    split_start_.assign(batch.num_rows, 0);
    const int groups = shape_.num_kv_heads;
    const int wanted_splits =
        std::max(1, (4 * threads + groups * batch.num_sequences - 1) / (groups * batch.num_sequences));
    // A pattern selects for whole blocks.
    const int task_rows = patterns_.empty() ? rows_of_attention_task(batch.num_rows, groups, threads) : kPageTokens;
    size_t num_partials = 0;
    for (int s = 0; s < batch.num_sequences; ++s) {
        const int begin = batch.row_starts[s], end = batch.row_starts[s + 1];
        std::fill(row_sequence_.begin() + begin, row_sequence_.begin() + end, s);
        const int pages = batch.positions[end - 1] / kPageTokens + 1;
        const int splits = std::min(wanted_splits, pages / kPagesForSplit);
        if (single_rows_ && !by_rows_ && splits > 1) {
            row_splits_[begin] = splits;
            split_start_[begin] = num_partials;
            num_partials += static_cast<size_t>(splits) * groups;
            for (int g = 0; g < groups; ++g) {
                for (int split = 0; split < splits; ++split) {
                    const int first = pages * split / splits, last = pages * (split + 1) / splits;
                    tasks_.push_back({s, begin, 1, g, first, last, split, split + 1 == splits, last - first});
                }
            }
            continue;
        }
        for (int row = begin; row < end;) {
            // Tasks end where a block of positions ends, so that only the last page of a task needs a mask.
            const int to_boundary = task_rows - batch.positions[row] % task_rows;
            const int rows = std::min(to_boundary, end - row);
            const int64_t cost = static_cast<int64_t>(batch.positions[row] / kPageTokens + 1) * rows;
            for (int g = 0; g < groups; ++g) tasks_.push_back({s, row, rows, g, 0, -1, -1, true, cost});
            row += rows;
        }
    }
    // Longest first: what is left at the end is then short.
    std::stable_sort(tasks_.begin(), tasks_.end(), [](const auto& a, const auto& b) { return a.cost > b.cost; });
    for (const AttentionTask& task : tasks_) {
        const int* first = std::lower_bound(batch.logit_rows, batch.logit_rows + batch.num_logit_rows, task.row_begin);
        const bool needed = first != batch.logit_rows + batch.num_logit_rows && *first < task.row_begin + task.num_rows;
        // The selection of a query block that goes on in a later batch is made here and now.
        const int begin = batch.positions[task.row_begin], end = begin + task.num_rows;
        const bool goes_on =
            !patterns_.empty() && (begin % kPageTokens == 0 || selects_rows_) && end % kPageTokens != 0;
        if (needed || goes_on) needed_tasks_.push_back(task);
    }
    const size_t heads = static_cast<size_t>(shape_.num_heads / groups);
    const size_t partial_bytes = num_partials * heads * shape_.head_dim * 4;
    if (partial_bytes > partial_out_.size()) {
        partial_out_ = Pages(2 * partial_bytes);
        partial_max_ = Pages(2 * num_partials * heads * 4);
        partial_sum_ = Pages(2 * num_partials * heads * 4);
    }
}

size_t Decoder::row_buffer_bytes(int num_rows) const {
    size_t most = 0;
    const auto consider = [&](const Linear& weight) {
        if (weight.data == nullptr) return;
        for (const int rows : {1, num_rows}) {
            const RowKind kind = table_->row_kind(weight.format, rows);
            most = std::max(most, RowBuffer::bytes(weight, kind, rows));
        }
    };
    for (const BlockWeights& block : blocks_) {
        for (const Linear* weight : {&block.qkv, &block.output, &block.gate_up, &block.down}) consider(*weight);
    }
    consider(head_);
    return most;
}

void Decoder::reserve(int num_rows, int num_logit_rows, int num_threads) {
    const int widest = std::max({shape_.hidden_size, shape_.num_heads * shape_.head_dim, shape_.intermediate_size});
    qkv_stride_ = static_cast<size_t>(round_up((shape_.num_heads + 2 * shape_.num_kv_heads) * shape_.head_dim, kPanel));
    hidden_stride_ = static_cast<size_t>(round_up(shape_.intermediate_size, kPanel));
    if (num_threads != threads_ready_) {
        workers_ = std::vector<Worker>(static_cast<size_t>(num_threads));
        threads_ready_ = num_threads;
        task_capacity_ = 0;
    }
    if (table_ != sized_for_) {
        sized_for_ = table_;
        task_capacity_ = shared_capacity_ = 0;
    }
    // All memory is taken here: nothing may fail once the team is running.
    int task_rows = kRowsPreparedByAll;
    if (by_rows_) task_rows = std::max(rows_per_task_, num_rows - (num_row_tasks_ - 1) * rows_per_task_);
    if (task_rows > task_capacity_) {
        const size_t row_bytes = row_buffer_bytes(task_rows);
        for (Worker& worker : workers_) {
            worker.prepared.memory = Pages::huge(row_bytes);
            worker.normed = Pages(static_cast<size_t>(round_up(widest, 16)) * 4);
            worker.hidden = Pages::huge(static_cast<size_t>(task_rows) * hidden_stride_ * 4);
            if (!pyramid_.empty()) pyramid_.reserve(worker.selection, shape_.num_heads / shape_.num_kv_heads);
            worker.query = Pages(static_cast<size_t>(shape_.num_heads / shape_.num_kv_heads) * shape_.head_dim * 4);
        }
        task_capacity_ = task_rows;
    }
    const int shared_rows = by_rows_ ? num_logit_rows : num_rows;
    if (shared_rows > shared_capacity_) {
        shared_rows_.memory = Pages::huge(row_buffer_bytes(shared_rows));
        shared_capacity_ = shared_rows;
    }
    if (num_rows <= capacity_) return;
    const size_t rows = static_cast<size_t>(num_rows);
    const size_t query = static_cast<size_t>(shape_.num_heads) * shape_.head_dim;
    const size_t hidden = static_cast<size_t>(round_up(shape_.hidden_size, kPanel));
    x_ = Pages::huge(rows * hidden * 4);
    needed_x_ = Pages(rows * hidden * 4);
    qkv_ = Pages::huge(rows * qkv_stride_ * 4);
    attended_ = Pages::huge(rows * query * 4);
    needed_attended_ = Pages(rows * query * 4);
    hidden_ = Pages::huge(rows * hidden_stride_ * 4);
    capacity_ = num_rows;
}

void Decoder::forward(const Batch& batch, float* out, const Exchange& exchange) {
    check(batch);
    if (final_norm_ == nullptr) refuse("the decoder has no embedding and head");
    for (int row = 0; row < batch.num_rows; ++row) {
        if (batch.token_ids[row] < 0 || batch.token_ids[row] >= shape_.vocab_size) {
            refuse("token id " + std::to_string(batch.token_ids[row]) + " is out of range; the vocabulary has " +
                   std::to_string(shape_.vocab_size) + " entries");
        }
    }
    team_ = &thread_pool();
    table_ = &kernels();
    exchange_ = exchange ? &exchange : nullptr;
    failure_ = nullptr;
    plan(batch);
    reserve(batch.num_rows, batch.num_logit_rows, team_->size());
    residual_ = x_.as<float>();
    const bool needed_only = batch.num_logit_rows * 2 <= batch.num_rows;
    const int64_t began = arm_clocks();
    for (int slot = 0; slot < ThreadPool::kCounters; ++slot) team_->reset_counter(slot);
    team_->run([&](int thread_idx) {
        workers_[thread_idx].clock.begin(began);
        const int threads = team_->size();
        const int begin = batch.num_rows * thread_idx / threads, end = batch.num_rows * (thread_idx + 1) / threads;
        const size_t stride = static_cast<size_t>(round_up(shape_.hidden_size, kPanel));
        for (int row = begin; row < end; ++row) {
            table_->unpack_channel(embedding_, batch.token_ids[row], residual_ + row * stride);
        }
        meet(thread_idx);
        mark(thread_idx, shape_.num_layers, Operator::embed);
        int stage = 0;
        if (by_rows_) run_in_rows(batch, thread_idx, 0, shape_.num_layers, needed_only, stage);
        else run_in_channels(batch, thread_idx, 0, shape_.num_layers, needed_only, stage);
        if (failure_ != nullptr) return;
        if (batch.num_logit_rows > 0) {
            if (!needed_only) gather_needed(batch, thread_idx);
            if (batch.wants_hidden) finish_hidden(batch, thread_idx, out);
            else finish(batch, thread_idx, out, stage);
        }
    });
    exchange_ = nullptr;
    if (failure_ != nullptr) std::rethrow_exception(std::exchange(failure_, nullptr));
}

void Decoder::run_blocks(const Batch& batch, int block_begin, int block_end, float* x) {
    check(batch);
    if (block_begin < 0 || block_end > shape_.num_layers || block_begin >= block_end) refuse("no such blocks");
    if (shape_.hidden_size % kPanel != 0) refuse("hidden size must be a multiple of 16 here");
    team_ = &thread_pool();
    table_ = &kernels();
    exchange_ = nullptr;
    plan(batch);
    reserve(batch.num_rows, batch.num_logit_rows, team_->size());
    residual_ = x;
    const int64_t began = arm_clocks();
    for (int slot = 0; slot < ThreadPool::kCounters; ++slot) team_->reset_counter(slot);
    team_->run([&](int thread_idx) {
        workers_[thread_idx].clock.begin(began);
        int stage = 0;
        if (by_rows_) run_in_rows(batch, thread_idx, block_begin, block_end, false, stage);
        else run_in_channels(batch, thread_idx, block_begin, block_end, false, stage);
    });
}

}  // namespace dseek
