// How the encoder-decoder runs: a thread takes its sentences through the encoder, then step by step through the decoder
// until each has ended. Nothing is allocated here.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "encoder_decoder.h"

namespace dseek {
namespace {

constexpr int kPanelsAtOnce = 64;  // of the head, whose logits are looked through while they are in the cache

size_t cache_at(int layers, int heads, int d, size_t tokens, int sentence, int layer, int head) {
    return ((static_cast<size_t>(sentence) * layers + layer) * heads + head) * tokens * d * 2;
}

}  // namespace

// Of each sentence, layer and head: keys, then values.
float* EncoderDecoder::own_keys(Room& room, int layer, int sentence, int head) const {
    const auto tokens = static_cast<size_t>(round_up(room.target_tokens, kKeyBlock));
    return room.own_cache.as<float>() +
           cache_at(shape_.num_decoder_layers, shape_.num_heads, shape_.head_dim(), tokens, sentence, layer, head);
}

float* EncoderDecoder::own_values(Room& room, int layer, int sentence, int head) const {
    const auto tokens = static_cast<size_t>(round_up(room.target_tokens, kKeyBlock));
    return own_keys(room, layer, sentence, head) + tokens * shape_.head_dim();
}

float* EncoderDecoder::source_keys(Room& room, int layer, int sentence, int head) const {
    const auto tokens = static_cast<size_t>(round_up(room.source_tokens, kKeyBlock));
    return room.source_cache.as<float>() +
           cache_at(shape_.num_decoder_layers, shape_.num_heads, shape_.head_dim(), tokens, sentence, layer, head);
}

float* EncoderDecoder::source_values(Room& room, int layer, int sentence, int head) const {
    const auto tokens = static_cast<size_t>(round_up(room.source_tokens, kKeyBlock));
    return source_keys(room, layer, sentence, head) + tokens * shape_.head_dim();
}

void EncoderDecoder::embed(Worker& worker, int row, int token, int position) const {
    const int d = shape_.hidden_size;
    const float* embedding = embedding_ + static_cast<size_t>(token) * d;
    const float* place = positions_ + static_cast<size_t>(position) * d;
    float* x = worker.x.as<float>() + static_cast<size_t>(row) * row_stride();
    for (int i = 0; i < d; ++i) x[i] = embedding[i] + place[i];
}

void EncoderDecoder::prepare(Worker& worker, const Linear& weight, const float* x, size_t stride, int num_rows) const {
    worker.prepared.lay_out(weight, table_->row_kind(weight.format, num_rows), num_rows);
    for (int row = 0; row < num_rows; ++row) {
        table_->prepare_row(x + static_cast<size_t>(row) * stride, weight.k, weight.k_padded, worker.prepared.rows,
                            row);
    }
}

void EncoderDecoder::project(int thread_idx, const Projection& projection, const float* x, size_t stride, int num_rows,
                             float* out, size_t out_stride) {
    Worker& worker = workers_[static_cast<size_t>(thread_idx)];
    const Linear& weight = projection.weight;
    prepare(worker, weight, x, stride, num_rows);
    table_->linear({.weight = &weight,
                    .rows = &worker.prepared.rows,
                    .row_begin = 0,
                    .row_end = num_rows,
                    .panel_begin = part_begin(weight.num_panels(), thread_idx),
                    .panel_end = part_end(weight.num_panels(), thread_idx),
                    .epilogue = Epilogue::store,
                    .bias = projection.bias,
                    .out = out,
                    .out_stride = out_stride});
    meet();
}

void EncoderDecoder::add_norm_rows(int thread_idx, const LayerNorm& norm, const float* added, size_t stride,
                                   int num_rows) {
    float* x = workers_[static_cast<size_t>(thread_idx)].x.as<float>();
    for (int row = 0; row < num_rows; ++row) {
        rows_->add_norm(x + static_cast<size_t>(row) * row_stride(), added + static_cast<size_t>(row) * stride,
                        norm.weight, norm.bias, shape_.epsilon, shape_.hidden_size);
    }
}

void EncoderDecoder::feed_forward(int thread_idx, const Projection& inner, const Projection& outer,
                                  const LayerNorm& norm, int num_rows) {
    Worker& worker = workers_[static_cast<size_t>(thread_idx)];
    Room& shared = room(thread_idx);
    float* hidden = shared.hidden.as<float>();
    project(thread_idx, inner, worker.x.as<float>(), row_stride(), num_rows, hidden, hidden_stride_);
    const int begin = part_begin(inner.weight.num_panels(), thread_idx) * kPanel;
    const int end = part_end(inner.weight.num_panels(), thread_idx) * kPanel;
    for (int row = 0; row < num_rows; ++row) {
        rows_->activate(shape_.activation, hidden + static_cast<size_t>(row) * hidden_stride_ + begin, end - begin);
    }
    meet();
    project(thread_idx, outer, hidden, hidden_stride_, num_rows, shared.product.as<float>(), row_stride());
    add_norm_rows(thread_idx, norm, shared.product.as<float>(), row_stride(), num_rows);
}

void EncoderDecoder::encode(const TranslationBatch& batch, int thread_idx) {
    Worker& worker = workers_[static_cast<size_t>(thread_idx)];
    Room& shared = room(thread_idx);
    const int num_rows = shared.num_rows, d = shape_.head_dim(), width = shape_.hidden_size;
    const int head_begin = part_begin(shape_.num_heads, thread_idx), head_end = part_end(shape_.num_heads, thread_idx);
    const float scale = 1.f / std::sqrt(static_cast<float>(d));
    float* wide = shared.wide.as<float>();
    float* attended = shared.attended.as<float>();
    // 1. Tokens to rows, without padding between sentences.
    for (int i = 0; i < shared.num_sentences; ++i) {
        const int first = worker.row_starts[static_cast<size_t>(i)];
        const int32_t* ids = batch.source_ids + batch.starts[worker.sentences[static_cast<size_t>(i)]];
        for (int t = 0; t < worker.row_starts[static_cast<size_t>(i) + 1] - first; ++t) {
            embed(worker, first + t, ids[t], t);
        }
    }
    // 2. The layers. The room for the first layer's keys of the source serves each sentence until it is filled.
    for (const EncoderLayer& layer : encoder_) {
        project(thread_idx, layer.qkv, worker.x.as<float>(), row_stride(), num_rows, wide, wide_stride_);
        for (int i = 0; i < shared.num_sentences; ++i) {
            const int first = worker.row_starts[static_cast<size_t>(i)];
            const int count = worker.row_starts[static_cast<size_t>(i) + 1] - first;
            for (int head = head_begin; head < head_end; ++head) {
                float* keys = source_keys(shared, 0, i, head);
                float* values = source_values(shared, 0, i, head);
                for (int t = 0; t < count; ++t) {
                    const float* row = wide + static_cast<size_t>(first + t) * wide_stride_ + head * d;
                    rows_->store_key_value(row + width, row + 2 * width, t, d, keys, values);
                }
                for (int t = 0; t < count; ++t) {
                    const auto at = static_cast<size_t>(first + t);
                    rows_->attend(wide + at * wide_stride_ + head * d, keys, values, count, d, scale,
                                  worker.scores.as<float>(), attended + at * row_stride() + head * d);
                }
            }
        }
        meet();
        project(thread_idx, layer.output, attended, row_stride(), num_rows, shared.product.as<float>(), row_stride());
        add_norm_rows(thread_idx, layer.attention_norm, shared.product.as<float>(), row_stride(), num_rows);
        feed_forward(thread_idx, layer.inner, layer.outer, layer.final_norm, num_rows);
    }
    // 3. Keys and values of the source for all layers of the decoder.
    float* source = shared.source.as<float>();
    project(thread_idx, source_key_values_, worker.x.as<float>(), row_stride(), num_rows, source, source_stride_);
    for (int i = 0; i < shared.num_sentences; ++i) {
        const int first = worker.row_starts[static_cast<size_t>(i)];
        const int count = worker.row_starts[static_cast<size_t>(i) + 1] - first;
        for (int layer = 0; layer < shape_.num_decoder_layers; ++layer) {
            for (int head = head_begin; head < head_end; ++head) {
                for (int t = 0; t < count; ++t) {
                    const float* row = source + static_cast<size_t>(first + t) * source_stride_ +
                                       static_cast<size_t>(layer) * 2 * width + head * d;
                    rows_->store_key_value(row, row + width, t, d, source_keys(shared, layer, i, head),
                                           source_values(shared, layer, i, head));
                }
            }
        }
    }
}

void EncoderDecoder::decode_step(const TranslationBatch& batch, int thread_idx, int step) {
    Worker& worker = workers_[static_cast<size_t>(thread_idx)];
    Room& shared = room(thread_idx);
    const int num_rows = static_cast<int>(worker.active.size()), d = shape_.head_dim(), width = shape_.hidden_size;
    const int head_begin = part_begin(shape_.num_heads, thread_idx), head_end = part_end(shape_.num_heads, thread_idx);
    const float scale = 1.f / std::sqrt(static_cast<float>(d));
    float* x = worker.x.as<float>();
    float* wide = shared.wide.as<float>();
    float* attended = shared.attended.as<float>();
    float* product = shared.product.as<float>();
    float* scores = worker.scores.as<float>();
    for (int row = 0; row < num_rows; ++row) {
        embed(worker, row, worker.next_token[static_cast<size_t>(worker.active[static_cast<size_t>(row)])], step);
    }
    for (int index = 0; index < shape_.num_decoder_layers; ++index) {
        const DecoderLayer& layer = decoder_[static_cast<size_t>(index)];
        // 1. Attention to the answer so far.
        project(thread_idx, layer.qkv, x, row_stride(), num_rows, wide, wide_stride_);
        for (int row = 0; row < num_rows; ++row) {
            const int i = worker.active[static_cast<size_t>(row)];
            for (int head = head_begin; head < head_end; ++head) {
                const float* query = wide + static_cast<size_t>(row) * wide_stride_ + head * d;
                float* keys = own_keys(shared, index, i, head);
                float* values = own_values(shared, index, i, head);
                rows_->store_key_value(query + width, query + 2 * width, step, d, keys, values);
                rows_->attend(query, keys, values, step + 1, d, scale, scores,
                              attended + static_cast<size_t>(row) * row_stride() + head * d);
            }
        }
        meet();
        project(thread_idx, layer.output, attended, row_stride(), num_rows, product, row_stride());
        add_norm_rows(thread_idx, layer.attention_norm, product, row_stride(), num_rows);
        // 2. Attention to the source.
        project(thread_idx, layer.source_query, x, row_stride(), num_rows, wide, wide_stride_);
        for (int row = 0; row < num_rows; ++row) {
            const int i = worker.active[static_cast<size_t>(row)];
            const int32_t sentence = worker.sentences[static_cast<size_t>(i)];
            const int count = batch.starts[sentence + 1] - batch.starts[sentence];
            for (int head = head_begin; head < head_end; ++head) {
                rows_->attend(wide + static_cast<size_t>(row) * wide_stride_ + head * d,
                              source_keys(shared, index, i, head), source_values(shared, index, i, head), count, d,
                              scale, scores, attended + static_cast<size_t>(row) * row_stride() + head * d);
            }
        }
        meet();
        project(thread_idx, layer.source_output, attended, row_stride(), num_rows, product, row_stride());
        add_norm_rows(thread_idx, layer.source_norm, product, row_stride(), num_rows);
        // 3. MLP.
        feed_forward(thread_idx, layer.inner, layer.outer, layer.final_norm, num_rows);
    }
}

void EncoderDecoder::choose(const TranslationBatch& batch, int thread_idx, int step) {
    Worker& worker = workers_[static_cast<size_t>(thread_idx)];
    Room& shared = room(thread_idx);
    const Linear& weight = head_.weight;
    const int num_rows = static_cast<int>(worker.active.size());
    const int panel_begin = part_begin(weight.num_panels(), thread_idx);
    const int panel_end = part_end(weight.num_panels(), thread_idx);
    const size_t stride = logit_stride();
    float* logits = worker.logits.as<float>();
    float* best = worker.best.as<float>();
    std::fill(best, best + num_rows, -INFINITY);
    std::fill(worker.best_index.begin(), worker.best_index.end(), shape_.end_id);
    prepare(worker, weight, worker.x.as<float>(), row_stride(), num_rows);
    for (int panel = panel_begin; panel < panel_end; panel += kPanelsAtOnce) {
        const int end = std::min(panel + kPanelsAtOnce, panel_end);
        table_->linear({.weight = &weight,
                        .rows = &worker.prepared.rows,
                        .row_begin = 0,
                        .row_end = num_rows,
                        .panel_begin = panel,
                        .panel_end = end,
                        .epilogue = Epilogue::store,
                        .bias = head_.bias,
                        .out = logits,
                        .out_stride = stride});
        // Channels beyond the vocabulary are padding; what its bias says must never become a token.
        const int first = panel * kPanel, count = std::min(end * kPanel, shape_.vocab_size) - first;
        for (int row = 0; row < num_rows; ++row) {
            rows_->largest(logits + static_cast<size_t>(row) * stride + first, count, first, best + row,
                           &worker.best_index[static_cast<size_t>(row)]);
        }
    }
    for (int row = 0; batch.logits != nullptr && row < num_rows; ++row) {
        const int32_t sentence = worker.sentences[static_cast<size_t>(worker.active[static_cast<size_t>(row)])];
        const size_t at = static_cast<size_t>(panel_begin) * kPanel;
        std::memcpy(batch.logits + (static_cast<size_t>(sentence) * batch.max_tokens + step) * stride + at,
                    logits + static_cast<size_t>(row) * stride + at,
                    static_cast<size_t>(panel_end - panel_begin) * kPanel * 4);
    }
    if (!together_) return;
    // Channels rise with the threads, so the first of equal logits is that of the first thread.
    const size_t found = round_up_size(static_cast<size_t>(shared.num_sentences) * 4, 64) / 4;
    float* team_best = shared.team_best.as<float>();
    auto* team_index = shared.team_index.as<int32_t>();
    std::copy(best, best + num_rows, team_best + thread_idx * found);
    std::copy_n(worker.best_index.begin(), num_rows, team_index + thread_idx * found);
    meet();
    for (int row = 0; row < num_rows; ++row) {
        size_t winner = 0;
        for (int other = 1; other < team_->size(); ++other) {
            if (team_best[other * found + row] > team_best[winner * found + row]) winner = static_cast<size_t>(other);
        }
        worker.best_index[static_cast<size_t>(row)] = team_index[winner * found + row];
    }
}

void EncoderDecoder::decode(const TranslationBatch& batch, int thread_idx, int32_t* tokens, int32_t* lengths) {
    Worker& worker = workers_[static_cast<size_t>(thread_idx)];
    const bool writes = !together_ || thread_idx == 0;
    for (size_t i = 0; i < worker.active.size(); ++i) worker.active[i] = static_cast<int32_t>(i);
    std::fill(worker.next_token.begin(), worker.next_token.end(), shape_.start_id);
    for (int step = 0; !worker.active.empty(); ++step) {
        decode_step(batch, thread_idx, step);
        choose(batch, thread_idx, step);
        size_t num_active = 0;
        for (size_t row = 0; row < worker.active.size(); ++row) {
            const int32_t i = worker.active[row], sentence = worker.sentences[static_cast<size_t>(i)];
            const size_t at = static_cast<size_t>(sentence) * batch.max_tokens + step;
            const int32_t token = batch.forced != nullptr ? batch.forced[at] : worker.best_index[row];
            const bool ended = batch.forced == nullptr && token == shape_.end_id;
            if (writes && !ended) tokens[at] = token;
            if (ended || step + 1 == batch.limits[sentence]) {
                if (writes) lengths[sentence] = ended ? step : step + 1;
                continue;
            }
            worker.next_token[static_cast<size_t>(i)] = token;
            worker.active[num_active++] = i;
        }
        worker.active.resize(num_active);  // shrinks, so nothing is allocated
    }
}

void EncoderDecoder::run(const TranslationBatch& batch, int thread_idx, int32_t* tokens, int32_t* lengths) {
    if (workers_[static_cast<size_t>(thread_idx)].sentences.empty()) return;
    encode(batch, thread_idx);
    meet();
    decode(batch, thread_idx, tokens, lengths);
}

}  // namespace dseek
