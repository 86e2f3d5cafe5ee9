// The two ways through a block. With many rows each thread takes rows of its own through whole projections, and the
// team meets twice a block; with few rows all threads share every projection's channels and meet after each.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "decoder.h"

namespace dseek {

void Decoder::rotate_row(const Batch& batch, const BlockWeights& block, int row) {
    const int d = shape_.head_dim;
    const int position = batch.positions[row];
    const float* cos = cos_ + static_cast<size_t>(position) * (d / 2);
    const float* sin = sin_ + static_cast<size_t>(position) * (d / 2);
    float* query = qkv_.as<float>() + static_cast<size_t>(row) * qkv_stride_;
    for (int head = 0; head < shape_.num_heads + shape_.num_kv_heads; ++head) {
        float* vector = query + static_cast<size_t>(head) * d;
        const float* norm = head < shape_.num_heads ? block.query_norm : block.key_norm;
        if (norm != nullptr) table_->rms_norm(vector, norm, shape_.epsilon, d, vector);
        table_->rotary(vector, cos, sin, d);
    }
}

void Decoder::store_rows(const Batch& batch, int layer, int begin, int end) {
    const size_t d = static_cast<size_t>(shape_.head_dim);
    const size_t keys_at = static_cast<size_t>(shape_.num_heads) * d, values_at = keys_at + shape_.num_kv_heads * d;
    for (int row = begin; row < end;) {
        const int position = batch.positions[row], slot = position % kPageTokens, sequence = row_sequence_[row];
        const int count = std::min({kPageTokens - slot, end - row, batch.row_starts[sequence + 1] - row});
        const int page =
            batch.page_tables[static_cast<size_t>(sequence) * batch.pages_per_sequence + position / kPageTokens];
        const float* source = qkv_.as<float>() + static_cast<size_t>(row) * qkv_stride_;
        for (int g = 0; g < shape_.num_kv_heads; ++g) {
            table_->store_tokens(layout_, cache_.data() + layout_.offset(page, layer, g), slot, count,
                                 source + keys_at + g * d, source + values_at + g * d, qkv_stride_);
        }
        row += count;
    }
}

void Decoder::project_qkv_rows(const Batch& batch, const BlockWeights& block, int layer, int begin, int end,
                               Worker& worker) {
    const size_t stride = static_cast<size_t>(round_up(shape_.hidden_size, kPanel));
    worker.prepared.lay_out(block.qkv, table_->row_kind(block.qkv.format, end - begin), end - begin);
    float* normed = worker.normed.as<float>();
    for (int row = begin; row < end; ++row) {
        table_->rms_norm(residual_ + row * stride, block.input_norm, shape_.epsilon, shape_.hidden_size, normed);
        table_->prepare_row(normed, block.qkv.k, block.qkv.k_padded, worker.prepared.rows, row - begin);
    }
    worker.clock.mark(layer, Operator::qkv_input);
    watch(block, kQkv, worker.prepared.rows, end - begin);
    table_->linear({.weight = &block.qkv,
                    .rows = &worker.prepared.rows,
                    .row_begin = 0,
                    .row_end = end - begin,
                    .panel_begin = 0,
                    .panel_end = block.qkv.num_panels(),
                    .epilogue = Epilogue::store,
                    .bias = block.qkv_bias,
                    .out = qkv_.as<float>() + static_cast<size_t>(begin) * qkv_stride_,
                    .out_stride = qkv_stride_});
    worker.clock.mark(layer, Operator::qkv);
    for (int row = begin; row < end; ++row) rotate_row(batch, block, row);
    store_rows(batch, layer, begin, end);
    worker.clock.mark(layer, Operator::cache);
}

void Decoder::mlp_rows(const BlockWeights& block, const float* attended, float* x, int begin, int end, Worker& worker) {
    const size_t stride = static_cast<size_t>(round_up(shape_.hidden_size, kPanel));
    const size_t query = static_cast<size_t>(shape_.num_heads) * shape_.head_dim;
    const int num_rows = end - begin, layer = index_of(block);
    Rows& rows = worker.prepared.rows;
    float* target = x + begin * stride;
    float* normed = worker.normed.as<float>();
    float* hidden = worker.hidden.as<float>();
    const auto multiply = [&](const Linear& weight, Epilogue epilogue, const float* bias, float* out,
                              size_t out_stride) {
        table_->linear({.weight = &weight,
                        .rows = &rows,
                        .row_begin = 0,
                        .row_end = num_rows,
                        .panel_begin = 0,
                        .panel_end = weight.num_panels(),
                        .epilogue = epilogue,
                        .bias = bias,
                        .out = out,
                        .out_stride = out_stride});
    };
    // 1. Output projection, onto the residual stream.
    worker.prepared.lay_out(block.output, table_->row_kind(block.output.format, num_rows), num_rows);
    for (int row = 0; row < num_rows; ++row) {
        table_->prepare_row(attended + (begin + row) * query, block.output.k, block.output.k_padded, rows, row);
    }
    watch(block, kOutput, rows, num_rows);
    worker.clock.mark(layer, Operator::output_input);
    multiply(block.output, Epilogue::add, block.output_bias, target, stride);
    worker.clock.mark(layer, Operator::output);
    // 2. Gate and up.
    worker.prepared.lay_out(block.gate_up, table_->row_kind(block.gate_up.format, num_rows), num_rows);
    for (int row = 0; row < num_rows; ++row) {
        table_->rms_norm(target + row * stride, block.post_attention_norm, shape_.epsilon, shape_.hidden_size, normed);
        table_->prepare_row(normed, block.gate_up.k, block.gate_up.k_padded, rows, row);
    }
    watch(block, kGateUp, rows, num_rows);
    worker.clock.mark(layer, Operator::gate_up_input);
    multiply(block.gate_up, Epilogue::gated, block.gate_up_bias, hidden, hidden_stride_);
    worker.clock.mark(layer, Operator::gate_up);
    // 3. Down, onto the residual stream.
    worker.prepared.lay_out(block.down, table_->row_kind(block.down.format, num_rows), num_rows);
    for (int row = 0; row < num_rows; ++row) {
        table_->prepare_row(hidden + row * hidden_stride_, block.down.k, block.down.k_padded, rows, row);
    }
    watch(block, kDown, rows, num_rows);
    worker.clock.mark(layer, Operator::down_input);
    multiply(block.down, Epilogue::add, block.down_bias, target, stride);
    worker.clock.mark(layer, Operator::down);
}

bool Decoder::exchange_layer(int layer, int thread_idx) {
    if (exchange_ == nullptr) return true;
    if (thread_idx == 0) {
        try {
            (*exchange_)(layer);
        } catch (...) { failure_ = std::current_exception(); }
    }
    meet(thread_idx);
    mark(thread_idx, layer, Operator::exchange);
    return failure_ == nullptr;
}

void Decoder::gather_needed(const Batch& batch, int thread_idx) {
    const size_t stride = static_cast<size_t>(round_up(shape_.hidden_size, kPanel));
    const size_t query = static_cast<size_t>(shape_.num_heads) * shape_.head_dim;
    for (int i = thread_idx; i < batch.num_logit_rows; i += team_->size()) {
        const int row = batch.logit_rows[i];
        float* attended = needed_attended_.as<float>() + i * query;
        std::memcpy(needed_x_.as<float>() + i * stride, residual_ + row * stride, stride * 4);
        if (row_splits_[row] > 0) merge_splits(row, attended);
        else std::memcpy(attended, attended_.as<float>() + row * query, query * 4);
    }
    meet(thread_idx);
}

void Decoder::run_in_rows(const Batch& batch, int thread_idx, int block_begin, int block_end, bool last_needed_only,
                          int& stage) {
    Worker& worker = workers_[thread_idx];
    share_out(num_row_tasks_, thread_idx, stage, [&](int task) {
        project_qkv_rows(batch, blocks_[block_begin], block_begin, task * rows_per_task_, task_end(batch, task),
                         worker);
    });
    for (int layer = block_begin; layer < block_end; ++layer) {
        const BlockWeights& block = blocks_[layer];
        const bool needed_only = last_needed_only && layer + 1 == block_end;
        meet(thread_idx);
        mark(thread_idx, layer, Operator::cache);
        if (!exchange_layer(layer, thread_idx)) return;
        if (!patterns_.empty()) seal_blocks(layer, thread_idx, stage);
        const auto& tasks = needed_only ? needed_tasks_ : tasks_;
        share_out(static_cast<int>(tasks.size()), thread_idx, stage,
                  [&](int task) { attend(batch, block, layer, tasks[task], worker); });
        meet(thread_idx);
        mark(thread_idx, layer, Operator::attention);
        if (needed_only) {
            if (batch.num_logit_rows == 0) return;
            gather_needed(batch, thread_idx);
            finish_block_in_channels(block, needed_attended_.as<float>(), needed_x_.as<float>(), batch.num_logit_rows,
                                     false, thread_idx, stage);
            return;
        }
        share_out(num_row_tasks_, thread_idx, stage, [&](int task) {
            const int begin = task * rows_per_task_, end = task_end(batch, task);
            mlp_rows(block, attended_.as<float>(), residual_, begin, end, worker);
            if (layer + 1 < block_end) project_qkv_rows(batch, blocks_[layer + 1], layer + 1, begin, end, worker);
        });
    }
    meet(thread_idx);
    mark(thread_idx, block_end - 1, Operator::down);
}

const Rows& Decoder::prepare_all(const Linear& weight, const float* x, size_t stride, const float* norm, int num_rows,
                                 bool merge, int thread_idx) {
    const RowKind kind = table_->row_kind(weight.format, num_rows);
    const bool by_all = num_rows <= kRowsPreparedByAll;
    Worker& worker = workers_[thread_idx];
    RowBuffer& buffer = by_all ? worker.prepared : shared_rows_;
    int begin = 0, end = num_rows;
    if (!by_all) {
        const int threads = team_->size();
        begin = num_rows * thread_idx / threads;
        end = num_rows * (thread_idx + 1) / threads;
        if (thread_idx == 0) shared_rows_.lay_out(weight, kind, num_rows);
        meet(thread_idx);
    } else {
        buffer.lay_out(weight, kind, num_rows);
    }
    for (int row = begin; row < end; ++row) {
        const float* source = x + row * stride;
        if (norm != nullptr) {
            table_->rms_norm(source, norm, shape_.epsilon, weight.k, worker.normed.as<float>());
            source = worker.normed.as<float>();
        } else if (merge && row_splits_[row] > 0) {
            merge_splits(row, worker.normed.as<float>());
            source = worker.normed.as<float>();
        }
        table_->prepare_row(source, weight.k, weight.k_padded, buffer.rows, row);
    }
    if (!by_all) meet(thread_idx);
    return buffer.rows;
}

void Decoder::multiply_claimed(const Linear& weight, const Rows& rows, int num_rows, Epilogue epilogue,
                               const float* bias, float* out, size_t out_stride, int thread_idx, int& stage) {
    constexpr int kTilePanels = 4;
    constexpr int kTasksPerThread = 4;
    const int panels = weight.num_panels();
    const int step =
        round_up((panels + kTasksPerThread * team_->size() - 1) / (kTasksPerThread * team_->size()), kTilePanels);
    share_out((panels + step - 1) / step, thread_idx, stage, [&](int task) {
        table_->linear({.weight = &weight,
                        .rows = &rows,
                        .row_begin = 0,
                        .row_end = num_rows,
                        .panel_begin = task * step,
                        .panel_end = std::min((task + 1) * step, panels),
                        .epilogue = epilogue,
                        .bias = bias,
                        .out = out,
                        .out_stride = out_stride});
    });
    meet(thread_idx);
}

void Decoder::finish_block_in_channels(const BlockWeights& block, const float* attended, float* x, int num_rows,
                                       bool merge, int thread_idx, int& stage) {
    const size_t stride = static_cast<size_t>(round_up(shape_.hidden_size, kPanel));
    const size_t query = static_cast<size_t>(shape_.num_heads) * shape_.head_dim;
    const int layer = index_of(block);
    const Rows& attended_rows = prepare_all(block.output, attended, query, nullptr, num_rows, merge, thread_idx);
    if (thread_idx == 0) watch(block, kOutput, attended_rows, num_rows);
    mark(thread_idx, layer, Operator::output_input);
    multiply_claimed(block.output, attended_rows, num_rows, Epilogue::add, block.output_bias, x, stride, thread_idx,
                     stage);
    mark(thread_idx, layer, Operator::output);
    const Rows& normed = prepare_all(block.gate_up, x, stride, block.post_attention_norm, num_rows, false, thread_idx);
    if (thread_idx == 0) watch(block, kGateUp, normed, num_rows);
    mark(thread_idx, layer, Operator::gate_up_input);
    multiply_claimed(block.gate_up, normed, num_rows, Epilogue::gated, block.gate_up_bias, hidden_.as<float>(),
                     hidden_stride_, thread_idx, stage);
    mark(thread_idx, layer, Operator::gate_up);
    const Rows& hidden =
        prepare_all(block.down, hidden_.as<float>(), hidden_stride_, nullptr, num_rows, false, thread_idx);
    if (thread_idx == 0) watch(block, kDown, hidden, num_rows);
    mark(thread_idx, layer, Operator::down_input);
    multiply_claimed(block.down, hidden, num_rows, Epilogue::add, block.down_bias, x, stride, thread_idx, stage);
    mark(thread_idx, layer, Operator::down);
}

void Decoder::run_in_channels(const Batch& batch, int thread_idx, int block_begin, int block_end, bool last_needed_only,
                              int& stage) {
    Worker& worker = workers_[thread_idx];
    const size_t stride = static_cast<size_t>(round_up(shape_.hidden_size, kPanel));
    for (int layer = block_begin; layer < block_end; ++layer) {
        const BlockWeights& block = blocks_[layer];
        const bool needed_only = last_needed_only && layer + 1 == block_end;
        const Rows& normed =
            prepare_all(block.qkv, residual_, stride, block.input_norm, batch.num_rows, false, thread_idx);
        if (thread_idx == 0) watch(block, kQkv, normed, batch.num_rows);
        mark(thread_idx, layer, Operator::qkv_input);
        multiply_claimed(block.qkv, normed, batch.num_rows, Epilogue::store, block.qkv_bias, qkv_.as<float>(),
                         qkv_stride_, thread_idx, stage);
        mark(thread_idx, layer, Operator::qkv);
        if (!single_rows_) {
            share_out(batch.num_rows, thread_idx, stage, [&](int row) {
                rotate_row(batch, block, row);
                store_rows(batch, layer, row, row + 1);
            });
            meet(thread_idx);
            mark(thread_idx, layer, Operator::cache);
            if (!exchange_layer(layer, thread_idx)) return;
            if (!patterns_.empty()) seal_blocks(layer, thread_idx, stage);
        }
        // Lone rows store their keys inside the attention task, so all tasks are needed even in the last layer.
        const auto& tasks = needed_only && !single_rows_ ? needed_tasks_ : tasks_;
        share_out(static_cast<int>(tasks.size()), thread_idx, stage,
                  [&](int task) { attend(batch, block, layer, tasks[task], worker); });
        meet(thread_idx);
        mark(thread_idx, layer, Operator::attention);
        if (needed_only) {
            if (batch.num_logit_rows == 0) return;
            gather_needed(batch, thread_idx);
            finish_block_in_channels(block, needed_attended_.as<float>(), needed_x_.as<float>(), batch.num_logit_rows,
                                     false, thread_idx, stage);
            return;
        }
        finish_block_in_channels(block, attended_.as<float>(), residual_, batch.num_rows, true, thread_idx, stage);
    }
}

void Decoder::finish(const Batch& batch, int thread_idx, float* logits, int& stage) {
    const size_t stride = static_cast<size_t>(round_up(shape_.hidden_size, kPanel));
    const Rows& rows =
        prepare_all(head_, needed_x_.as<float>(), stride, final_norm_, batch.num_logit_rows, false, thread_idx);
    mark(thread_idx, shape_.num_layers, Operator::head_input);
    multiply_claimed(head_, rows, batch.num_logit_rows, Epilogue::store, nullptr, logits, logit_stride(), thread_idx,
                     stage);
    mark(thread_idx, shape_.num_layers, Operator::head);
}

void Decoder::finish_hidden(const Batch& batch, int thread_idx, float* hidden) {
    const size_t stride = hidden_stride();
    for (int i = thread_idx; i < batch.num_logit_rows; i += team_->size()) {
        table_->rms_norm(needed_x_.as<float>() + i * stride, final_norm_, shape_.epsilon, shape_.hidden_size,
                         hidden + i * stride);
    }
}

}  // namespace dseek
