// Weights, checks and working memory of the encoder-decoder; how it runs is in encoder_decoder_run.cpp.
#include "encoder_decoder.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

namespace dseek {
namespace {

constexpr size_t kLine = 64;

// Grows to at least `num_bytes`; what was in it is lost.
void grow(Pages& pages, size_t num_bytes) {
    if (pages.size() < num_bytes) pages = Pages(num_bytes);
}

size_t whole_blocks(int tokens) { return static_cast<size_t>(round_up(tokens, kKeyBlock)); }

}  // namespace

const EncoderDecoderKernels& encoder_decoder_kernels() {
    [[maybe_unused]] const std::string name = kernels().name;
#if defined(DSEEK_HAS_AVX2)
    if (name == "avx2") return avx2_encoder_decoder();
#endif
#if defined(DSEEK_HAS_AVX512)
    if (name == "avx512" || name == "amx") return avx512_encoder_decoder();
#endif
    return generic_encoder_decoder();
}

EncoderDecoder::EncoderDecoder(const EncoderDecoderShape& shape) : shape_(shape) {
    const auto within = [](int value, int least, int most) { return value >= least && value <= most; };
    if (!within(shape.hidden_size, kPanel, 1 << 16) || !within(shape.intermediate_size, 1, 1 << 16) ||
        !within(shape.vocab_size, 1, 1 << 24) || !within(shape.max_positions, 1, 1 << 20) ||
        !within(shape.num_encoder_layers, 1, 1024) || !within(shape.num_decoder_layers, 1, 1024) ||
        !within(shape.num_heads, 1, shape.hidden_size)) {
        throw std::invalid_argument("a size of the encoder-decoder is out of range");
    }
    if (shape.hidden_size % shape.num_heads != 0 || shape.head_dim() % kPanel != 0) {
        throw std::invalid_argument("heads are " + std::to_string(shape.head_dim()) +
                                    " wide; needed: a multiple of 16");
    }
    if (!within(shape.start_id, 0, shape.vocab_size - 1) || !within(shape.end_id, 0, shape.vocab_size - 1)) {
        throw std::invalid_argument("start and end token must be in the vocabulary");
    }
    wide_stride_ = static_cast<size_t>(3) * shape.hidden_size;
    hidden_stride_ = static_cast<size_t>(round_up(shape.intermediate_size, kPanel));
    source_stride_ = static_cast<size_t>(2) * shape.hidden_size * shape.num_decoder_layers;
}

void EncoderDecoder::check_projection(const Projection& projection, int n, int k, const char* name) const {
    const Linear& weight = projection.weight;
    if (weight.n != n || weight.k != k || weight.interleaved || projection.bias == nullptr) {
        throw std::invalid_argument(std::string(name) + " is " + std::to_string(weight.n) + " x " +
                                    std::to_string(weight.k) + "; needed: " + std::to_string(n) + " x " +
                                    std::to_string(k) + ", with a bias and panels in order");
    }
}

void EncoderDecoder::add_encoder_layer(const EncoderLayer& layer) {
    if (static_cast<int>(encoder_.size()) == shape_.num_encoder_layers) {
        throw std::invalid_argument("the encoder has all its layers");
    }
    const int d = shape_.hidden_size, f = shape_.intermediate_size;
    check_projection(layer.qkv, 3 * d, d, "the encoder's qkv");
    check_projection(layer.output, d, d, "the encoder's output");
    check_projection(layer.inner, f, d, "the encoder's inner projection");
    check_projection(layer.outer, d, f, "the encoder's outer projection");
    encoder_.push_back(layer);
}

void EncoderDecoder::add_decoder_layer(const DecoderLayer& layer) {
    if (static_cast<int>(decoder_.size()) == shape_.num_decoder_layers) {
        throw std::invalid_argument("the decoder has all its layers");
    }
    const int d = shape_.hidden_size, f = shape_.intermediate_size;
    check_projection(layer.qkv, 3 * d, d, "the decoder's qkv");
    check_projection(layer.output, d, d, "the decoder's output");
    check_projection(layer.source_query, d, d, "the decoder's query for the source");
    check_projection(layer.source_output, d, d, "the decoder's output of the source");
    check_projection(layer.inner, f, d, "the decoder's inner projection");
    check_projection(layer.outer, d, f, "the decoder's outer projection");
    decoder_.push_back(layer);
}

void EncoderDecoder::set_tables(const float* embedding, const float* positions, const Projection& source_key_values,
                                const Projection& head) {
    check_projection(source_key_values, static_cast<int>(source_stride_), shape_.hidden_size,
                     "the projection of the source's keys and values");
    check_projection(head, shape_.vocab_size, shape_.hidden_size, "the head");
    embedding_ = embedding;
    positions_ = positions;
    source_key_values_ = source_key_values;
    head_ = head;
}

size_t EncoderDecoder::weight_bytes() const {
    size_t total = head_.weight.num_bytes + source_key_values_.weight.num_bytes;
    for (const EncoderLayer& layer : encoder_) {
        for (const Projection* part : {&layer.qkv, &layer.output, &layer.inner, &layer.outer}) {
            total += part->weight.num_bytes;
        }
    }
    for (const DecoderLayer& layer : decoder_) {
        for (const Projection* part :
             {&layer.qkv, &layer.output, &layer.source_query, &layer.source_output, &layer.inner, &layer.outer}) {
            total += part->weight.num_bytes;
        }
    }
    return total;
}

size_t EncoderDecoder::workspace_bytes() const {
    size_t total = 0;
    for (const Worker& worker : workers_) {
        total += worker.prepared.memory.size() + worker.x.size() + worker.scores.size() + worker.logits.size() +
                 worker.best.size();
    }
    for (const Room& room : rooms_) {
        for (const Pages* part : {&room.wide, &room.attended, &room.product, &room.hidden, &room.source,
                                  &room.own_cache, &room.source_cache, &room.team_best, &room.team_index}) {
            total += part->size();
        }
    }
    return total;
}

void EncoderDecoder::check(const TranslationBatch& batch) const {
    if (embedding_ == nullptr || static_cast<int>(encoder_.size()) != shape_.num_encoder_layers ||
        static_cast<int>(decoder_.size()) != shape_.num_decoder_layers) {
        throw std::invalid_argument("the encoder-decoder does not have all its weights yet");
    }
    if (batch.starts[0] != 0) throw std::invalid_argument("the first sentence must begin at 0");
    for (int sentence = 0; sentence < batch.num_sentences; ++sentence) {
        const int begin = batch.starts[sentence], end = batch.starts[sentence + 1];
        if (end <= begin || end - begin > shape_.max_positions) {
            throw std::invalid_argument("sentence " + std::to_string(sentence) + " has " +
                                        std::to_string(static_cast<int64_t>(end) - begin) + " tokens; needed: 1 to " +
                                        std::to_string(shape_.max_positions));
        }
        for (int i = begin; i < end; ++i) {
            if (batch.source_ids[i] < 0 || batch.source_ids[i] >= shape_.vocab_size) {
                throw std::invalid_argument("token " + std::to_string(batch.source_ids[i]) +
                                            " is not in the vocabulary");
            }
        }
        const int limit = batch.limits[sentence];
        if (limit < 1 || limit > std::min(batch.max_tokens, shape_.max_positions)) {
            throw std::invalid_argument("an answer's limit is " + std::to_string(limit) + " tokens; needed: 1 to " +
                                        std::to_string(std::min(batch.max_tokens, shape_.max_positions)));
        }
        for (int i = 0; batch.forced != nullptr && i < limit; ++i) {
            const int32_t token = batch.forced[static_cast<size_t>(sentence) * batch.max_tokens + i];
            if (token < 0 || token >= shape_.vocab_size) {
                throw std::invalid_argument("a token to follow is not in the vocabulary");
            }
        }
    }
}

// Long and short sentences go round among the threads, so that each has about the same to do.
void EncoderDecoder::share_out(const TranslationBatch& batch) {
    const int num_threads = team_->size();
    together_ = batch.num_sentences < num_threads;
    workers_.resize(static_cast<size_t>(num_threads));
    rooms_.resize(together_ ? std::max<size_t>(rooms_.size(), 1) : static_cast<size_t>(num_threads));
    std::vector<int32_t> order(static_cast<size_t>(batch.num_sentences));
    std::iota(order.begin(), order.end(), 0);
    const auto length = [&](int32_t index) { return batch.starts[index + 1] - batch.starts[index]; };
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return length(a) > length(b); });
    for (int thread_idx = 0; thread_idx < num_threads; ++thread_idx) {
        Worker& worker = workers_[static_cast<size_t>(thread_idx)];
        worker.sentences.clear();
        worker.row_starts.assign(1, 0);
        for (int i = together_ ? 0 : thread_idx; i < batch.num_sentences; i += together_ ? 1 : num_threads) {
            const int32_t sentence = order[static_cast<size_t>(i)];
            worker.sentences.push_back(sentence);
            worker.row_starts.push_back(worker.row_starts.back() + length(sentence));
        }
        worker.active.resize(worker.sentences.size());
        worker.next_token.resize(worker.sentences.size());
        worker.best_index.resize(worker.sentences.size());
    }
}

void EncoderDecoder::reserve(const TranslationBatch& batch) {
    for (size_t i = 0; i < workers_.size(); ++i) {
        if (!together_ || i == 0) reserve_room(batch, rooms_[i], workers_[i]);
        Worker& worker = workers_[i];
        const int num_rows = worker.row_starts.back(), num_sentences = static_cast<int>(worker.sentences.size());
        size_t prepared = 0;
        const auto need = [&](const Projection& projection, int rows) {
            const Linear& weight = projection.weight;
            const int few = std::min(rows, 8);  // formats in groups may prepare few rows in another way
            prepared = std::max({prepared, RowBuffer::bytes(weight, table_->row_kind(weight.format, rows), rows),
                                 RowBuffer::bytes(weight, table_->row_kind(weight.format, few), few)});
        };
        for (const EncoderLayer& layer : encoder_) {
            for (const Projection* part : {&layer.qkv, &layer.output, &layer.inner, &layer.outer})
                need(*part, num_rows);
        }
        need(source_key_values_, num_rows);
        for (const DecoderLayer& layer : decoder_) {
            for (const Projection* part :
                 {&layer.qkv, &layer.output, &layer.source_query, &layer.source_output, &layer.inner, &layer.outer}) {
                need(*part, num_sentences);
            }
        }
        need(head_, num_sentences);
        grow(worker.prepared.memory, prepared);
        grow(worker.x, static_cast<size_t>(std::max(num_rows, num_sentences)) * row_stride() * 4);
        grow(worker.scores, std::max(whole_blocks(shape_.max_positions), whole_blocks(batch.max_tokens)) * 4);
        grow(worker.logits, static_cast<size_t>(num_sentences) * logit_stride() * 4);
        grow(worker.best, static_cast<size_t>(num_sentences) * 4);
    }
}

void EncoderDecoder::reserve_room(const TranslationBatch& batch, Room& room, Worker& worker) {
    const int num_rows = worker.row_starts.back(), num_sentences = static_cast<int>(worker.sentences.size());
    room.num_rows = num_rows;
    room.num_sentences = num_sentences;
    room.source_tokens = room.target_tokens = 1;
    for (const int32_t sentence : worker.sentences) {
        room.source_tokens = std::max(room.source_tokens, batch.starts[sentence + 1] - batch.starts[sentence]);
        room.target_tokens = std::max(room.target_tokens, batch.limits[sentence]);
    }
    const auto rows = static_cast<size_t>(num_rows), sentences = static_cast<size_t>(num_sentences);
    const size_t token = row_stride() * 2 * 4 * shape_.num_decoder_layers;  // keys and values of all layers
    grow(room.wide, rows * wide_stride_ * 4);
    grow(room.attended, rows * row_stride() * 4);
    grow(room.product, rows * row_stride() * 4);
    grow(room.hidden, rows * hidden_stride_ * 4);
    grow(room.source, rows * source_stride_ * 4);
    grow(room.own_cache, sentences * whole_blocks(room.target_tokens) * token);
    grow(room.source_cache, sentences * whole_blocks(room.source_tokens) * token);
    const size_t found = static_cast<size_t>(team_->size()) * round_up_size(sentences * 4, kLine);
    grow(room.team_best, found);
    grow(room.team_index, found);
}

void EncoderDecoder::translate(const TranslationBatch& batch, int32_t* tokens, int32_t* lengths) {
    check(batch);
    team_ = &thread_pool();
    table_ = &kernels();
    rows_ = &encoder_decoder_kernels();
    share_out(batch);
    reserve(batch);
    team_->run([&](int thread_idx) { run(batch, thread_idx, tokens, lengths); });
}

}  // namespace dseek
