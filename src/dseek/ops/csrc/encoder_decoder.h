// An encoder-decoder over packed weights that translates a batch greedily in one call.
//
// Sentences are independent of each other, so with at least as many of them as threads every thread takes some through
// the whole model and never waits for another. With fewer, all threads take each sentence through together: they share
// the output channels of every product and meet after it. Axes: R rows, S source tokens, T target tokens, D hidden
// size, H heads, d head width, F MLP width, V vocabulary.
#pragma once

#include <cstdint>
#include <vector>

#include "common/encoder_decoder_kernels.h"
#include "common/kernels.h"
#include "common/row_buffer.h"
#include "common/thread_pool.h"

namespace dseek {

struct EncoderDecoderShape {
    int hidden_size = 0;
    int intermediate_size = 0;
    int num_heads = 0;
    int num_encoder_layers = 0;
    int num_decoder_layers = 0;
    int vocab_size = 0;
    int max_positions = 0;
    int start_id = 0;
    int end_id = 0;
    float epsilon = 1e-5f;
    Activation activation = Activation::relu;

    int head_dim() const { return hidden_size / num_heads; }
};

// Views of memory that the owner keeps alive; biases are [n_padded].
struct Projection {
    Linear weight;
    const float* bias = nullptr;
};

struct LayerNorm {
    const float* weight = nullptr;
    const float* bias = nullptr;
};

struct EncoderLayer {
    Projection qkv, output, inner, outer;
    LayerNorm attention_norm, final_norm;
};

struct DecoderLayer {
    Projection qkv, output, source_query, source_output, inner, outer;
    LayerNorm attention_norm, source_norm, final_norm;
};

struct TranslationBatch {
    const int32_t* source_ids = nullptr;  // all sentences, one after the other
    const int32_t* starts = nullptr;  // [num_sentences + 1]
    int num_sentences = 0;
    int max_tokens = 0;  // columns of `tokens`
    const int32_t* limits = nullptr;  // [num_sentences], most tokens of each answer, at most max_tokens
    // Tokens to follow instead of the likeliest ones, [num_sentences][max_tokens], or null; and where the logits of all
    // steps go, [num_sentences][max_tokens][V padded], or null.
    const int32_t* forced = nullptr;
    float* logits = nullptr;
};

class EncoderDecoder {
public:
    // Throws std::invalid_argument where sizes cannot be run, here and below.
    explicit EncoderDecoder(const EncoderDecoderShape& shape);

    void add_encoder_layer(const EncoderLayer& layer);
    void add_decoder_layer(const DecoderLayer& layer);
    // Embedding [V][D] with its scale, positions [max_positions][D]; `source_key_values` gives keys and values of the
    // source for all layers of the decoder, [layers * 2 * D, D]; the head's bias is -infinity for tokens that are never
    // chosen and for the padding.
    void set_tables(const float* embedding, const float* positions, const Projection& source_key_values,
                    const Projection& head);

    // Writes the answers without start and end tokens, [num_sentences][max_tokens], and how long each is; an answer as
    // long as its limit may have been cut off. Throws for ids, lengths or limits out of range, before anything is done.
    void translate(const TranslationBatch& batch, int32_t* tokens, int32_t* lengths);

    const EncoderDecoderShape& shape() const { return shape_; }
    size_t logit_stride() const { return static_cast<size_t>(head_.weight.n_padded); }
    size_t weight_bytes() const;
    size_t workspace_bytes() const;

private:
    // What a thread owns: its rows, and where the team is split, the caches of its sentences.
    struct Worker {
        std::vector<int32_t> sentences;  // of this thread, or of all together
        std::vector<int32_t> row_starts;  // [sentences + 1], first row of each sentence in the encoder
        std::vector<int32_t> active;  // indices into `sentences` that go on
        RowBuffer prepared;
        Pages x, scores, logits, best;
        std::vector<int32_t> next_token, best_index;
    };
    // Rows that products write and others read; one for each thread, or one for the team.
    struct Room {
        Pages wide, attended, product, hidden, source, own_cache, source_cache;
        Pages team_best, team_index;  // [threads][rows], what each thread found among its channels
        int num_rows = 0, num_sentences = 0, source_tokens = 0, target_tokens = 0;
    };

    void check(const TranslationBatch& batch) const;
    void share_out(const TranslationBatch& batch);
    void reserve(const TranslationBatch& batch);
    void reserve_room(const TranslationBatch& batch, Room& room, Worker& worker);
    void run(const TranslationBatch& batch, int thread_idx, int32_t* tokens, int32_t* lengths);
    void encode(const TranslationBatch& batch, int thread_idx);
    void decode(const TranslationBatch& batch, int thread_idx, int32_t* tokens, int32_t* lengths);
    void decode_step(const TranslationBatch& batch, int thread_idx, int step);
    void choose(const TranslationBatch& batch, int thread_idx, int step);

    // Product of all rows at `x` with this thread's share of the channels, after which the team has met.
    void project(int thread_idx, const Projection& projection, const float* x, size_t stride, int num_rows, float* out,
                 size_t out_stride);
    void add_norm_rows(int thread_idx, const LayerNorm& norm, const float* added, size_t stride, int num_rows);
    void feed_forward(int thread_idx, const Projection& inner, const Projection& outer, const LayerNorm& norm,
                      int num_rows);
    void embed(Worker& worker, int row, int token, int position) const;
    void prepare(Worker& worker, const Linear& weight, const float* x, size_t stride, int num_rows) const;
    void meet() const {
        if (together_) team_->barrier();
    }
    // The part of [0, count) that a thread of a team does; everything where threads have sentences of their own.
    int part_begin(int count, int thread_idx) const { return together_ ? count * thread_idx / team_->size() : 0; }
    int part_end(int count, int thread_idx) const {
        return together_ ? count * (thread_idx + 1) / team_->size() : count;
    }
    Room& room(int thread_idx) { return rooms_[together_ ? 0 : static_cast<size_t>(thread_idx)]; }
    float* own_keys(Room& room, int layer, int sentence, int head) const;
    float* own_values(Room& room, int layer, int sentence, int head) const;
    float* source_keys(Room& room, int layer, int sentence, int head) const;
    float* source_values(Room& room, int layer, int sentence, int head) const;
    size_t row_stride() const { return static_cast<size_t>(shape_.hidden_size); }
    void check_projection(const Projection& projection, int n, int k, const char* name) const;

    EncoderDecoderShape shape_;
    std::vector<EncoderLayer> encoder_;
    std::vector<DecoderLayer> decoder_;
    const float* embedding_ = nullptr;
    const float* positions_ = nullptr;
    Projection source_key_values_, head_;
    size_t wide_stride_ = 0, hidden_stride_ = 0, source_stride_ = 0;

    ThreadPool* team_ = nullptr;
    const KernelTable* table_ = nullptr;
    const EncoderDecoderKernels* rows_ = nullptr;
    bool together_ = false;
    std::vector<Worker> workers_;
    std::vector<Room> rooms_;
};

}  // namespace dseek
