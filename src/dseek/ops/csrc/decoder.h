// A whole decoder-only transformer over packed weights and a paged cache, run by one thread team.
//
// One call takes a mixed batch (prompts and single new tokens of several sequences) through all blocks. Axes: R rows of
// the batch, D hidden size, H heads, G key-value heads, d head width, F MLP width, V vocabulary.
#pragma once

#include <array>
#include <exception>
#include <functional>
#include <memory>
#include <vector>

#include "common/kernels.h"
#include "common/row_buffer.h"
#include "common/thread_pool.h"
#include "operator_clock.h"
#include "pyramid.h"

namespace dseek {

struct DecoderShape {
    int hidden_size = 0;
    int intermediate_size = 0;
    int num_layers = 0;
    int num_heads = 0;
    int num_kv_heads = 0;
    int head_dim = 0;
    int vocab_size = 0;
    float epsilon = 1e-5f;
    CacheType cache_type = CacheType::bf16;
};

// Views of memory that the owner of the decoder keeps alive. Biases are in packed channel order; null where absent.
struct BlockWeights {
    Linear qkv, output, gate_up, down;
    const float* input_norm = nullptr;
    const float* post_attention_norm = nullptr;
    const float* query_norm = nullptr;
    const float* key_norm = nullptr;
    const float* qkv_bias = nullptr;
    const float* output_bias = nullptr;
    const float* gate_up_bias = nullptr;
    const float* down_bias = nullptr;
    int window = 0;
    // Largest magnitude that the rows into qkv, output, gate_up and down may have, as they are rounded to integers
    // (rotated, where the format rotates them); 0: any. Rows that are not rounded to integers are not looked at.
    std::array<float, 4> limits{};
};

struct Batch {
    const int32_t* token_ids = nullptr;  // [R]
    const int32_t* positions = nullptr;  // [R], consecutive inside a sequence
    const int32_t* row_starts = nullptr;  // [num_sequences + 1]
    const int32_t* page_tables = nullptr;  // [num_sequences][pages_per_sequence]
    const int32_t* logit_rows = nullptr;  // [num_logit_rows], ascending
    int num_rows = 0;
    int num_sequences = 0;
    int pages_per_sequence = 0;
    int num_logit_rows = 0;
    // Where the rows are a part of what several processes compute together: all new positions of every sequence. Their
    // keys and values are in the cache when a layer's exchange is over.
    const int32_t* whole_positions = nullptr;  // [num_wholes][2], first and end
    const int32_t* whole_page_tables = nullptr;  // [num_wholes][pages_per_sequence]
    int num_wholes = 0;  // 0: the batch is all there is
    bool wants_hidden = false;  // instead of logits
};

// Called once a layer, in order, when the layer's new keys and values are in the cache and before anything attends to
// them. It may change pages of that layer that the batch does not write.
using Exchange = std::function<void(int layer)>;

// Attention work that one thread does at once: consecutive rows of one sequence and one key-value head, or one row and
// some of its pages.
struct AttentionTask {
    int sequence;
    int row_begin, num_rows;
    int kv_head;
    int page_begin, page_end;  // page_end -1: all
    int split;  // index among the row's splits; -1: not split
    bool holds_newest;  // this task stores the row's key and value
    int64_t cost;
};

class Decoder {
public:
    explicit Decoder(const DecoderShape& shape);

    // Throw std::invalid_argument where shapes do not fit.
    void add_block(const BlockWeights& block);
    void set_tables(const Linear& embedding, const Linear& head, const float* final_norm);
    // cos and sin: [num_positions][d / 2].
    void set_rotary(const float* cos, const float* sin, int num_positions);
    // How a layer attends; dense if never called. Before `allocate_cache`, which makes room for what it needs.
    void set_pattern(int layer, DynamicPattern pattern);
    // Rotation of the gates at every block's first position: cos and sin [num_blocks][dim / 2]. Before
    // `allocate_cache`.
    void set_gate_rotation(std::vector<float> cos, std::vector<float> sin, int num_blocks);
    // What a query block attends to, as it was selected; for looking at.
    Selection selection(int layer, int kv_head, const int32_t* pages, int num_pages, int query_block);
    // What the strip of a position attends to, up to its row, where rows select for themselves; for looking at.
    RowSelection row_selection(int layer, int kv_head, const int32_t* pages, int num_pages, int position);
    void allocate_cache(int num_pages);

    // Limits of a layer's rows, see `BlockWeights`.
    void set_limits(int layer, const std::array<float, 4>& limits);
    // Projections whose rows were beyond their limits since the last call, as 4 * layer + role.
    std::vector<int> take_exceeded();
    // Other weights of a layer, without limits, that `swap_wide` puts in the place of its own, and back.
    void set_wide(int layer, const Linear& qkv, const Linear& output, const Linear& gate_up, const Linear& down);
    void swap_wide(int layer);

    // Whether runs are timed by layer and operator, and how many stretches of each thread's time are kept at most.
    void set_timing(bool on, size_t most_stretches);
    // Clocks of the last run, one a thread.
    std::vector<const OperatorClock*> clocks() const;

    // Writes logits [num_logit_rows][logit_stride()], or, where `batch.wants_hidden`, what the head would see of these
    // rows, [num_logit_rows][hidden_stride()]: the last block's output after the final norm. Throws
    // std::invalid_argument for ids, positions or pages out of range; the cache is then as before. What `exchange`
    // throws ends the run and is thrown on; the pages of the batch then hold anything.
    void forward(const Batch& batch, float* out, const Exchange& exchange = {});

    // Runs blocks [block_begin, block_end) in place on hidden states x [R][D]; token ids and logit rows are not used.
    void run_blocks(const Batch& batch, int block_begin, int block_end, float* x);

    size_t logit_stride() const { return static_cast<size_t>(head_.n_padded); }
    size_t hidden_stride() const { return static_cast<size_t>(round_up(shape_.hidden_size, kPanel)); }
    int num_pages() const { return num_pages_; }
    size_t page_bytes() const { return layout_.page_bytes(); }
    const CacheLayout& layout() const { return layout_; }
    // Keys and values, `page_bytes()` a page.
    uint8_t* cache() const { return cache_.data(); }
    const Pyramid& pyramid() const { return pyramid_; }
    const DecoderShape& shape() const { return shape_; }
    // Bytes of weights that one decode step reads, and of working memory in use.
    size_t weight_bytes() const;
    size_t workspace_bytes() const;

private:
    // What one thread owns.
    struct Worker {
        RowBuffer prepared;
        Pages normed;  // float [block rows][widest]
        Pages hidden;  // float [block rows][F padded]
        Pages query;  // float [heads of a group][d]
        SelectionRoom selection;
        OperatorClock clock;
    };

    enum Role { kQkv, kOutput, kGateUp, kDown };

    static constexpr int kRowsPreparedByAll = 4;  // up to here every thread prepares all rows, which saves a meeting

    void check(const Batch& batch) const;
    void check_sequence(const int32_t* pages, int pages_per_sequence, int begin, int end) const;
    void plan(const Batch& batch);
    void find_new_blocks(const Batch& batch);
    // End of a task's rows where threads have rows of their own.
    int task_end(const Batch& batch, int task) const {
        return task + 1 == num_row_tasks_ ? batch.num_rows : (task + 1) * rows_per_task_;
    }
    void reserve(int num_rows, int num_logit_rows, int num_threads);
    size_t row_buffer_bytes(int num_rows) const;

    // `stage` counts the shared-out stages of a run; it is the thread's own, and equal in all threads.
    void run_in_rows(const Batch& batch, int thread_idx, int block_begin, int block_end, bool last_needed_only,
                     int& stage);
    void run_in_channels(const Batch& batch, int thread_idx, int block_begin, int block_end, bool last_needed_only,
                         int& stage);
    void finish(const Batch& batch, int thread_idx, float* logits, int& stage);
    void finish_hidden(const Batch& batch, int thread_idx, float* hidden);
    // Thread 0 makes the exchange of a layer while the others wait; false, for all of them, where it failed.
    bool exchange_layer(int layer, int thread_idx);

    void project_qkv_rows(const Batch& batch, const BlockWeights& block, int layer, int begin, int end, Worker& worker);
    void mlp_rows(const BlockWeights& block, const float* attended, float* x, int begin, int end, Worker& worker);
    void finish_block_in_channels(const BlockWeights& block, const float* attended, float* x, int num_rows, bool merge,
                                  int thread_idx, int& stage);
    // Brings the pyramid up to date for the query blocks that begin in this batch; all threads together.
    void seal_blocks(int layer, int thread_idx, int& stage);
    // Restricts a call to what the pattern selects.
    void choose_blocks(const Batch& batch, int layer, const AttentionTask& task, Worker& worker, AttentionCall& call);
    // Attends strip by strip, each row to what it selects; `whole` is the task's call.
    void attend_by_rows(const Batch& batch, int layer, const AttentionTask& task, Worker& worker,
                        const AttentionCall& whole);
    void check_look(int layer, int kv_head, const int32_t* pages, int num_pages, int block, bool by_rows) const;
    // Notes that prepared rows are beyond the limit of the projection that they go into.
    void watch(const BlockWeights& block, Role role, const Rows& rows, int num_rows);
    void check_block(const BlockWeights& block) const;
    void check_layer(int layer) const;
    int index_of(const BlockWeights& block) const { return static_cast<int>(&block - blocks_.data()); }
    void rotate_row(const Batch& batch, const BlockWeights& block, int row);
    void store_rows(const Batch& batch, int layer, int begin, int end);
    void attend(const Batch& batch, const BlockWeights& block, int layer, const AttentionTask& task, Worker& worker);
    void merge_splits(int row, float* out) const;
    void gather_needed(const Batch& batch, int thread_idx);
    // Norm (where a weight is given) or merging of splits, then preparation of all rows for `weight`.
    const Rows& prepare_all(const Linear& weight, const float* x, size_t stride, const float* norm, int num_rows,
                            bool merge, int thread_idx);
    void multiply_claimed(const Linear& weight, const Rows& rows, int num_rows, Epilogue epilogue, const float* bias,
                          float* out, size_t out_stride, int thread_idx, int& stage);

    // The team's meeting, with the time that the thread waits for it on its clock.
    void meet(int thread_idx) {
        OperatorClock& clock = workers_[thread_idx].clock;
        if (!clock.on()) return team_->barrier();
        const int64_t arrived = OperatorClock::now();
        team_->barrier();
        clock.add_wait(OperatorClock::now() - arrived);
    }
    // Gives the time since the thread's last mark to an operator.
    void mark(int thread_idx, int layer, Operator done) { workers_[thread_idx].clock.mark(layer, done); }
    // Makes the clocks ready for a run and says when it began.
    int64_t arm_clocks();

    // Shares out [0, count) over the team, first come first served. Two stages in a row have a meeting between them.
    // Counters rotate: the one after next is cleared here, two meetings after its last use and two before its next.
    template <class Body>
    void share_out(int count, int thread_idx, int& stage, const Body& body) {
        const int slot = stage % ThreadPool::kCounters;
        if (thread_idx == 0) team_->reset_counter((stage + 2) % ThreadPool::kCounters);
        ++stage;
        for (int index = team_->claim(slot); index < count; index = team_->claim(slot)) body(index);
    }

    DecoderShape shape_;
    std::vector<BlockWeights> blocks_, wide_;  // wide_: [layers], or none
    std::vector<uint8_t> exceeded_;  // [layers][4], written by all threads
    Linear embedding_, head_;
    const float* final_norm_ = nullptr;
    const float* cos_ = nullptr;
    const float* sin_ = nullptr;
    int num_positions_ = 0;
    CacheLayout layout_;
    Pages cache_;
    int num_pages_ = 0;
    std::vector<DynamicPattern> patterns_;  // [layers], or none
    Pyramid pyramid_;
    GateRotation gate_rotation_;
    int gate_blocks_ = 0;
    bool selects_rows_ = false;  // in some layer

    ThreadPool* team_ = nullptr;
    const KernelTable* table_ = nullptr;
    int capacity_ = 0, task_capacity_ = 0, shared_capacity_ = 0;  // rows
    const KernelTable* sized_for_ = nullptr;  // whose kinds of rows the last two are for; null after new weights
    int threads_ready_ = 0;
    bool timing_ = false;
    size_t most_stretches_ = 0;  // of a thread
    size_t qkv_stride_ = 0, hidden_stride_ = 0;
    Pages x_, qkv_, attended_, hidden_, needed_x_, needed_attended_;
    float* residual_ = nullptr;  // x in use: ours, or the caller's
    RowBuffer shared_rows_;
    std::vector<Worker> workers_;

    // The plan of the current batch.
    bool by_rows_ = false;
    int rows_per_task_ = 0, num_row_tasks_ = 0;
    bool single_rows_ = false;
    std::vector<AttentionTask> tasks_, needed_tasks_;
    struct NewBlock {
        const int32_t* pages;  // of its sequence
        int block;
    };
    std::vector<NewBlock> new_blocks_;  // query blocks whose first position is in the batch, or in its wholes
    const Exchange* exchange_ = nullptr;  // of the current run
    std::exception_ptr failure_;  // what it threw
    std::vector<int> row_splits_;  // [R], 0 where a row is not split
    std::vector<int> row_sequence_;  // [R]
    std::vector<size_t> split_start_;  // [R], first slot of a row's partial results
    Pages partial_out_, partial_max_, partial_sum_;
};

}  // namespace dseek
