// The encoder-decoder's Python face: it keeps the arrays that are looked into, and lets one thread at a time use it.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <mutex>
#include <optional>

#include "bind.h"
#include "bind_encoder_decoder.h"
#include "encoder_decoder.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace dseek {
namespace {

using NamedProjection = std::tuple<Blob, Vector>;  // packed weight, bias
using NamedNorm = std::tuple<Vector, Vector>;  // weight, bias

Activation activation_from_name(const std::string& name) {
    if (name == "relu") return Activation::relu;
    if (name == "silu") return Activation::silu;
    if (name == "gelu") return Activation::gelu;
    throw std::invalid_argument("unknown activation '" + name + "'; needed: relu, silu or gelu");
}

// An encoder-decoder together with the arrays that it looks into.
class OwningEncoderDecoder {
public:
    explicit OwningEncoderDecoder(const EncoderDecoderShape& shape) : model_(shape) {}

    void add_encoder_layer(const std::vector<NamedProjection>& projections, const std::vector<NamedNorm>& norms) {
        const std::lock_guard lock(mutex_);
        require(projections.size() == 4 && norms.size() == 2, "a layer of the encoder has 4 projections and 2 norms");
        model_.add_encoder_layer({.qkv = keep(projections[0]),
                                  .output = keep(projections[1]),
                                  .inner = keep(projections[2]),
                                  .outer = keep(projections[3]),
                                  .attention_norm = keep(norms[0]),
                                  .final_norm = keep(norms[1])});
    }

    void add_decoder_layer(const std::vector<NamedProjection>& projections, const std::vector<NamedNorm>& norms) {
        const std::lock_guard lock(mutex_);
        require(projections.size() == 6 && norms.size() == 3, "a layer of the decoder has 6 projections and 3 norms");
        model_.add_decoder_layer({.qkv = keep(projections[0]),
                                  .output = keep(projections[1]),
                                  .source_query = keep(projections[2]),
                                  .source_output = keep(projections[3]),
                                  .inner = keep(projections[4]),
                                  .outer = keep(projections[5]),
                                  .attention_norm = keep(norms[0]),
                                  .source_norm = keep(norms[1]),
                                  .final_norm = keep(norms[2])});
    }

    void set_tables(const Input<float, 2>& embedding, const Input<float, 2>& positions,
                    const NamedProjection& source_key_values, const NamedProjection& head) {
        const std::lock_guard lock(mutex_);
        const EncoderDecoderShape& shape = model_.shape();
        const auto width = static_cast<size_t>(shape.hidden_size);
        require(embedding.shape(0) == static_cast<size_t>(shape.vocab_size) && embedding.shape(1) == width,
                "the embedding must be [vocab_size, hidden_size]");
        require(positions.shape(0) == static_cast<size_t>(shape.max_positions) && positions.shape(1) == width,
                "the positions must be [max_positions, hidden_size]");
        require_aligned(embedding, positions);
        model_.set_tables(embedding.data(), positions.data(), keep(source_key_values), keep(head));
        tables_ = {embedding, positions};
    }

    // Answers [sentences, max_tokens], their lengths, and logits where tokens to follow are given.
    nb::tuple translate(const Input<int32_t, 1>& source_ids, const Input<int32_t, 1>& starts,
                        const Input<int32_t, 1>& limits, const std::optional<Input<int32_t, 2>>& forced) {
        const size_t num_sentences = limits.size();
        require(num_sentences >= 1 && num_sentences <= kMostSentences && starts.size() == num_sentences + 1,
                "starts must have one entry more than limits, and there must be 1 to 65536 sentences");
        require_aligned(source_ids, starts, limits);
        for (size_t i = 0; i < num_sentences; ++i) {
            require(
                starts(i) >= 0 && starts(i) <= starts(i + 1) && static_cast<size_t>(starts(i + 1)) <= source_ids.size(),
                "starts must rise from 0 to the number of source tokens");
        }
        require(static_cast<size_t>(starts(num_sentences)) == source_ids.size(),
                "starts must rise from 0 to the number of source tokens");
        TranslationBatch batch;
        batch.source_ids = source_ids.data();
        batch.starts = starts.data();
        batch.limits = limits.data();
        batch.num_sentences = static_cast<int>(num_sentences);
        for (size_t i = 0; i < num_sentences; ++i) batch.max_tokens = std::max(batch.max_tokens, limits(i));
        require(batch.max_tokens >= 1 && batch.max_tokens <= model_.shape().max_positions,
                "limits must be 1 to the model's longest answer");
        if (forced) {
            require(forced->shape(0) == num_sentences && forced->shape(1) == static_cast<size_t>(batch.max_tokens),
                    "tokens to follow must be [sentences, largest limit]");
            require_aligned(*forced);
            batch.forced = forced->data();
        }
        const auto columns = static_cast<size_t>(batch.max_tokens);
        const size_t stride = model_.logit_stride();
        Pages tokens(num_sentences * columns * sizeof(int32_t)), lengths(num_sentences * sizeof(int32_t));
        Pages logits(forced ? num_sentences * columns * stride * sizeof(float) : 0);
        batch.logits = forced ? logits.as<float>() : nullptr;
        {
            const nb::gil_scoped_release release;
            const std::lock_guard lock(mutex_);
            model_.translate(batch, tokens.as<int32_t>(), lengths.as<int32_t>());
        }
        const auto steps = static_cast<int64_t>(columns);
        nb::object shown = nb::none();
        if (forced) {
            const auto row = static_cast<int64_t>(stride);
            shown = nb::cast(own<float>(std::move(logits),
                                        {num_sentences, columns, static_cast<size_t>(model_.shape().vocab_size)},
                                        {steps * row, row, 1}));
        }
        return nb::make_tuple(own<int32_t>(std::move(tokens), {num_sentences, columns}, {steps, 1}),
                              own<int32_t>(std::move(lengths), {num_sentences}, {1}), shown);
    }

    const EncoderDecoder& model() const { return model_; }

private:
    static constexpr size_t kMostSentences = 1 << 16;

    Projection keep(const NamedProjection& named) {
        const auto& [blob, bias] = named;
        const Linear weight = view(blob);
        require(bias.size() == static_cast<size_t>(weight.n_padded),
                "a bias has " + std::to_string(bias.size()) + " values; needed: " + std::to_string(weight.n_padded));
        require_aligned(bias);
        blobs_.push_back(blob);
        vectors_.push_back(bias);
        return {weight, bias.data()};
    }

    LayerNorm keep(const NamedNorm& named) {
        const auto& [weight, bias] = named;
        const auto width = static_cast<size_t>(model_.shape().hidden_size);
        require(weight.size() == width && bias.size() == width, "a norm has another width than the model");
        require_aligned(weight, bias);
        vectors_.push_back(weight);
        vectors_.push_back(bias);
        return {weight.data(), bias.data()};
    }

    EncoderDecoder model_;
    std::mutex mutex_;
    std::vector<Blob> blobs_;
    std::vector<Vector> vectors_;
    std::vector<Input<float, 2>> tables_;
};

}  // namespace

void bind_encoder_decoder(nb::module_& module) {
    nb::class_<OwningEncoderDecoder>(module, "EncoderDecoder")
        .def(
            "__init__",
            [](OwningEncoderDecoder* self, int hidden_size, int intermediate_size, int num_heads,
               int num_encoder_layers, int num_decoder_layers, int vocab_size, int max_positions, int start_id,
               int end_id, float epsilon, const std::string& activation) {
                new (self) OwningEncoderDecoder({hidden_size, intermediate_size, num_heads, num_encoder_layers,
                                                 num_decoder_layers, vocab_size, max_positions, start_id, end_id,
                                                 epsilon, activation_from_name(activation)});
            },
            nb::kw_only(), "hidden_size"_a, "intermediate_size"_a, "num_heads"_a, "num_encoder_layers"_a,
            "num_decoder_layers"_a, "vocab_size"_a, "max_positions"_a, "start_id"_a, "end_id"_a, "epsilon"_a,
            "activation"_a)
        .def("add_encoder_layer", &OwningEncoderDecoder::add_encoder_layer, "projections"_a, "norms"_a)
        .def("add_decoder_layer", &OwningEncoderDecoder::add_decoder_layer, "projections"_a, "norms"_a)
        .def("set_tables", &OwningEncoderDecoder::set_tables, nb::kw_only(), "embedding"_a, "positions"_a,
             "source_key_values"_a, "head"_a)
        .def("translate", &OwningEncoderDecoder::translate, "source_ids"_a, "starts"_a, "limits"_a,
             "forced"_a = nb::none())
        .def_prop_ro("weight_bytes", [](const OwningEncoderDecoder& self) { return self.model().weight_bytes(); })
        .def_prop_ro("workspace_bytes",
                     [](const OwningEncoderDecoder& self) { return self.model().workspace_bytes(); });
}

}  // namespace dseek
