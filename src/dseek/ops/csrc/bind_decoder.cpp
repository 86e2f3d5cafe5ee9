// The decoder's Python face: it keeps the arrays that the decoder looks into, and lets one thread at a time use it.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <iterator>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>

#include "bind_attention.h"
#include "decoder.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace dseek {
namespace {

constexpr double kMostShareFactor = 1024.;
constexpr size_t kMostStretches = 1u << 20;

// In the order of `Operator`.
constexpr const char* kOperatorNames[] = {
    "embed",         "qkv_input", "qkv",        "cache", "select",   "attention", "output_input", "output",
    "gate_up_input", "gate_up",   "down_input", "down",  "exchange", "wait",      "head_input",   "head"};
static_assert(std::size(kOperatorNames) == kNumOperators);

// New positions of whole sequences, [sequences, 2], and their page tables.
using Wholes = std::tuple<Input<int32_t, 2>, Input<int32_t, 2>>;

// A decoder together with the arrays that it looks into.
class OwningDecoder {
public:
    explicit OwningDecoder(const DecoderShape& shape) : decoder_(shape) {}

    void add_block(const Blob& qkv, const Blob& output, const Blob& gate_up, const Blob& down, const Vector& input_norm,
                   const Vector& post_attention_norm, const std::optional<Vector>& query_norm,
                   const std::optional<Vector>& key_norm, const std::optional<Vector>& qkv_bias,
                   const std::optional<Vector>& output_bias, const std::optional<Vector>& gate_up_bias,
                   const std::optional<Vector>& down_bias, int window) {
        const auto lock = hold();
        BlockWeights block;
        block.qkv = keep(qkv);
        block.output = keep(output);
        block.gate_up = keep(gate_up);
        block.down = keep(down);
        const DecoderShape& shape = decoder_.shape();
        block.input_norm = keep(input_norm, shape.hidden_size, "input norm");
        block.post_attention_norm = keep(post_attention_norm, shape.hidden_size, "post-attention norm");
        if (query_norm) block.query_norm = keep(*query_norm, shape.head_dim, "query norm");
        if (key_norm) block.key_norm = keep(*key_norm, shape.head_dim, "key norm");
        if (qkv_bias) block.qkv_bias = keep(*qkv_bias, block.qkv.n_padded, "qkv bias");
        if (output_bias) block.output_bias = keep(*output_bias, block.output.n_padded, "output bias");
        if (gate_up_bias) block.gate_up_bias = keep(*gate_up_bias, block.gate_up.n_padded, "gate and up bias");
        if (down_bias) block.down_bias = keep(*down_bias, block.down.n_padded, "down bias");
        require(window >= 0, "a window must not be negative");
        block.window = window;
        decoder_.add_block(block);
    }

    void set_tables(const Blob& embedding, const Blob& head, const Vector& final_norm) {
        const auto lock = hold();
        const Linear embedding_view = keep(embedding), head_view = keep(head);
        decoder_.set_tables(embedding_view, head_view, keep(final_norm, decoder_.shape().hidden_size, "final norm"));
    }

    void set_rotary(const Input<float, 2>& cos, const Input<float, 2>& sin) {
        const size_t half = static_cast<size_t>(decoder_.shape().head_dim / 2);
        require(cos.shape(1) == half && sin.shape(1) == half && cos.shape(0) == sin.shape(0) && cos.shape(0) >= 1 &&
                    cos.shape(0) < (1u << 30),
                "rotary tables must be [positions, head_dim / 2]");
        require_aligned(cos, sin);
        const auto lock = hold();
        rotary_ = {cos, sin};
        decoder_.set_rotary(cos.data(), sin.data(), static_cast<int>(cos.shape(0)));
    }

    void set_pattern(int layer, const std::vector<int>& near_blocks, int top_blocks, bool far, double min_share,
                     const std::vector<double>& share_factors, const std::optional<Input<float, 2>>& level_bias,
                     const std::optional<GateArrays>& gate) {
        DynamicPattern pattern = pattern_of(near_blocks, top_blocks, far, min_share, level_bias);
        if (!share_factors.empty()) {
            require(share_factors.size() == static_cast<size_t>(decoder_.shape().num_kv_heads) && min_share > 0.,
                    "share_factors needs a factor for each key-value head, and min_share");
            for (const double factor : share_factors) {
                require(factor > 0. && factor <= kMostShareFactor, "a factor on the least share is out of range");
                pattern.min_shares.push_back(static_cast<float>(min_share * factor));
            }
        }
        if (gate) pattern.gate = gate_of(*gate, decoder_.shape().num_heads, decoder_.shape().num_kv_heads);
        const auto lock = hold();
        decoder_.set_pattern(layer, std::move(pattern));
    }

    void set_gate_rotation(const Input<float, 2>& cos, const Input<float, 2>& sin) {
        require(cos.shape(0) == sin.shape(0) && cos.shape(1) == sin.shape(1) && cos.shape(0) <= kMostRows,
                "the gates' cos and sin must be [blocks, width / 2]");
        require_aligned(cos, sin);
        const auto lock = hold();
        decoder_.set_gate_rotation({cos.data(), cos.data() + cos.size()}, {sin.data(), sin.data() + sin.size()},
                                   static_cast<int>(cos.shape(0)));
    }

    nb::tuple selection(int layer, int kv_head, const Input<int32_t, 1>& pages, int query_block) {
        require(pages.size() <= kMostRows, "a page table is too long");
        require_aligned(pages);
        const auto lock = hold();
        return to_tuple(decoder_.selection(layer, kv_head, pages.data(), static_cast<int>(pages.size()), query_block));
    }

    nb::tuple row_selection(int layer, int kv_head, const Input<int32_t, 1>& pages, int position) {
        require(pages.size() <= kMostRows, "a page table is too long");
        require_aligned(pages);
        const auto lock = hold();
        return to_tuple(decoder_.row_selection(layer, kv_head, pages.data(), static_cast<int>(pages.size()), position));
    }

    void set_limits(int layer, const std::vector<float>& limits) {
        require(limits.size() == 4, "a layer has four limits: qkv, output, gate_up, down");
        const auto lock = hold();
        decoder_.set_limits(layer, {limits[0], limits[1], limits[2], limits[3]});
    }

    std::vector<int> take_exceeded() {
        const auto lock = hold();
        return decoder_.take_exceeded();
    }

    void set_wide(int layer, const Blob& qkv, const Blob& output, const Blob& gate_up, const Blob& down) {
        const auto lock = hold();
        const Linear views[] = {keep(qkv), keep(output), keep(gate_up), keep(down)};
        decoder_.set_wide(layer, views[0], views[1], views[2], views[3]);
    }

    void swap_wide(int layer) {
        const auto lock = hold();
        decoder_.swap_wide(layer);
    }

    void allocate_cache(int num_pages) {
        const auto lock = hold();
        require(!shown_, "the cache cannot be allocated anew once its memory was handed out");
        decoder_.allocate_cache(num_pages);
    }

    Output<float> forward(const Input<int32_t, 1>& token_ids, const Input<int32_t, 1>& positions,
                          const Input<int32_t, 1>& row_starts, const Input<int32_t, 2>& page_tables,
                          const Input<int32_t, 1>& logit_rows, const std::optional<nb::callable>& exchange,
                          const std::optional<Wholes>& wholes, bool hidden) {
        Batch batch = batch_of(positions, row_starts, page_tables);
        require(token_ids.size() == positions.size(), "token_ids and positions differ in length");
        require(logit_rows.size() <= positions.size(), "logit_rows must be ascending rows of the batch");
        require_aligned(token_ids, logit_rows);
        batch.token_ids = token_ids.data();
        batch.logit_rows = logit_rows.data();
        batch.num_logit_rows = static_cast<int>(logit_rows.size());
        if (wholes) {
            const auto& [spans, tables] = *wholes;
            require(spans.shape(1) == 2 && spans.shape(0) == tables.shape(0) && spans.shape(0) <= kMostRows &&
                        tables.shape(1) == page_tables.shape(1),
                    "wholes must be [sequences, 2] positions and as many page tables, as wide as those of the rows");
            require_aligned(spans, tables);
            batch.whole_positions = spans.data();
            batch.whole_page_tables = tables.data();
            batch.num_wholes = static_cast<int>(spans.shape(0));
        }
        batch.wants_hidden = hidden;
        const size_t stride = hidden ? decoder_.hidden_stride() : decoder_.logit_stride();
        const int width = hidden ? decoder_.shape().hidden_size : decoder_.shape().vocab_size;
        Pages out(logit_rows.size() * stride * sizeof(float));
        Exchange layer_exchange;
        if (exchange) {
            layer_exchange = [&](int layer) {
                const nb::gil_scoped_acquire acquire;
                (*exchange)(layer);
            };
        }
        {
            const auto lock = hold();
            running_ = std::this_thread::get_id();
            const Idle idle{running_};
            const nb::gil_scoped_release release;
            decoder_.forward(batch, out.as<float>(), layer_exchange);
        }
        return own<float>(std::move(out), {logit_rows.size(), static_cast<size_t>(width)},
                          {static_cast<int64_t>(stride), 1});
    }

    void set_timing(bool on, size_t most_stretches) {
        require(most_stretches <= kMostStretches, "too many stretches of time to keep");
        const auto lock = hold();
        decoder_.set_timing(on, most_stretches);
    }

    // Nanoseconds of the last run [threads, layers + 1, operators]; for each thread its stretches [n, 5] (begin, end,
    // waited, layer, operator); how many stretches found no room.
    nb::tuple timings() {
        const auto lock = hold();
        const std::vector<const OperatorClock*> clocks = decoder_.clocks();
        const size_t layers = static_cast<size_t>(decoder_.shape().num_layers) + 1, row = layers * kNumOperators;
        // An array of no threads still needs memory to point to.
        Pages counts(std::max<size_t>(1, clocks.size()) * row * sizeof(int64_t));
        nb::list stretches;
        size_t lost = 0;
        for (size_t i = 0; i < clocks.size(); ++i) {
            std::memcpy(counts.as<int64_t>() + i * row, clocks[i]->ns().data(), row * sizeof(int64_t));
            const size_t count = clocks[i]->num_stretches();
            Pages kept(std::max<size_t>(1, count) * 5 * sizeof(int64_t));
            for (size_t j = 0; j < count; ++j) {
                const Stretch& from = clocks[i]->stretches()[j];
                int64_t* to = kept.as<int64_t>() + 5 * j;
                to[0] = from.begin_ns, to[1] = from.end_ns, to[2] = from.waited_ns;
                to[3] = from.layer, to[4] = from.operator_idx;
            }
            stretches.append(own<int64_t>(std::move(kept), {count, 5}, {5, 1}));
            lost += clocks[i]->num_lost();
        }
        const int64_t operators = kNumOperators;
        return nb::make_tuple(own<int64_t>(std::move(counts), {clocks.size(), layers, static_cast<size_t>(operators)},
                                           {static_cast<int64_t>(row), operators, 1}),
                              stretches, lost);
    }

    Output<float> run_blocks(const Input<float, 2>& x, const Input<int32_t, 1>& positions,
                             const Input<int32_t, 1>& row_starts, const Input<int32_t, 2>& page_tables, int block_begin,
                             int block_end) {
        Batch batch = batch_of(positions, row_starts, page_tables);
        require(x.shape(0) == positions.size() && x.shape(1) == static_cast<size_t>(decoder_.shape().hidden_size),
                "hidden states must be [rows, hidden_size]");
        require_aligned(x);
        Pages out(x.size() * sizeof(float));
        std::memcpy(out.data(), x.data(), x.size() * sizeof(float));
        {
            const auto lock = hold();
            const nb::gil_scoped_release release;
            decoder_.run_blocks(batch, block_begin, block_end, out.as<float>());
        }
        return own<float>(std::move(out), {x.shape(0), x.shape(1)}, {static_cast<int64_t>(x.shape(1)), 1});
    }

    // The cache's own memory: [pages][layers][bytes of all heads].
    Output<uint8_t> cache_pages() {
        const auto lock = hold();
        const CacheLayout& layout = decoder_.layout();
        const size_t bytes = layout.head_bytes * layout.num_kv_heads;
        return show(decoder_.cache(), {static_cast<size_t>(layout.num_layers), bytes}, {bytes, 1});
    }

    // What queries selected, in the pyramid's own memory: arrays [pages][layers][heads][bytes], none where no layer
    // selects.
    std::vector<Output<uint8_t>> selections() {
        const auto lock = hold();
        const CacheLayout& layout = decoder_.layout();
        const size_t heads = static_cast<size_t>(layout.num_kv_heads), layers = static_cast<size_t>(layout.num_layers);
        std::vector<Output<uint8_t>> shown;
        if (decoder_.pyramid().empty()) return shown;
        const size_t record = decoder_.pyramid().record_bytes();
        for (const Pyramid::Span& span : decoder_.pyramid().selected()) {
            shown.push_back(show(decoder_.pyramid().records() + span.begin, {layers, heads, span.bytes},
                                 {heads * record, record, 1}));
        }
        return shown;
    }

    const Decoder& decoder() const { return decoder_; }

private:
    // Waits for the decoder without holding Python up: whoever runs it may need Python for an exchange.
    std::unique_lock<std::mutex> hold() {
        require(running_ != std::this_thread::get_id(), "an exchange may not call the decoder that it belongs to");
        std::unique_lock lock(mutex_, std::try_to_lock);
        if (!lock.owns_lock()) {
            const nb::gil_scoped_release release;
            lock.lock();
        }
        return lock;
    }

    // An array over the decoder's memory that keeps the decoder alive; every page has this shape and these strides.
    Output<uint8_t> show(uint8_t* data, std::vector<size_t> shape, std::vector<size_t> strides) {
        require(decoder_.num_pages() > 0, "the cache must be allocated first");
        shown_ = true;
        strides.insert(strides.begin(), shape.front() * strides.front());
        shape.insert(shape.begin(), static_cast<size_t>(decoder_.num_pages()));
        const std::vector<int64_t> steps(strides.begin(), strides.end());
        return Output<uint8_t>(data, shape.size(), shape.data(), nb::find(*this), steps.data());
    }

    static Batch batch_of(const Input<int32_t, 1>& positions, const Input<int32_t, 1>& row_starts,
                          const Input<int32_t, 2>& page_tables) {
        require(positions.size() >= 1 && positions.size() <= kMostRows, "a batch needs at least one row");
        require(row_starts.size() >= 2 && row_starts.size() <= kMostRows + 1 &&
                    page_tables.shape(0) == row_starts.size() - 1 && page_tables.shape(1) <= kMostRows,
                "page_tables must have a row a sequence, and row_starts one entry more");
        require_aligned(positions, row_starts, page_tables);
        Batch batch;
        batch.positions = positions.data();
        batch.row_starts = row_starts.data();
        batch.page_tables = page_tables.data();
        batch.num_rows = static_cast<int>(positions.size());
        batch.num_sequences = static_cast<int>(page_tables.shape(0));
        batch.pages_per_sequence = static_cast<int>(page_tables.shape(1));
        return batch;
    }

    Linear keep(const Blob& blob) {
        const Linear weight = view(blob);
        blobs_.push_back(blob);
        return weight;
    }
    const float* keep(const Vector& vector, int size, const char* name) {
        require(
            vector.size() == static_cast<size_t>(size),
            std::string(name) + " has " + std::to_string(vector.size()) + " values; needed: " + std::to_string(size));
        require_aligned(vector);
        vectors_.push_back(vector);
        return vector.data();
    }

    // Says at the end of a scope that no thread runs the decoder.
    struct Idle {
        std::atomic<std::thread::id>& running;
        ~Idle() { running = std::thread::id(); }
    };

    Decoder decoder_;
    std::mutex mutex_;
    std::atomic<std::thread::id> running_{};
    bool shown_ = false;
    std::vector<Blob> blobs_;
    std::vector<Vector> vectors_;
    std::vector<Input<float, 2>> rotary_;
};

}  // namespace

void bind_decoder(nb::module_& module) {
    nb::class_<OwningDecoder>(module, "Decoder")
        .def(
            "__init__",
            [](OwningDecoder* self, int hidden_size, int intermediate_size, int num_layers, int num_heads,
               int num_kv_heads, int head_dim, int vocab_size, float epsilon, const std::string& cache_type) {
                new (self) OwningDecoder({hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_dim,
                                          vocab_size, epsilon, cache_type_from_name(cache_type)});
            },
            nb::kw_only(), "hidden_size"_a, "intermediate_size"_a, "num_layers"_a, "num_heads"_a, "num_kv_heads"_a,
            "head_dim"_a, "vocab_size"_a, "epsilon"_a, "cache_type"_a = "bf16")
        .def("add_block", &OwningDecoder::add_block, nb::kw_only(), "qkv"_a, "output"_a, "gate_up"_a, "down"_a,
             "input_norm"_a, "post_attention_norm"_a, "query_norm"_a = nb::none(), "key_norm"_a = nb::none(),
             "qkv_bias"_a = nb::none(), "output_bias"_a = nb::none(), "gate_up_bias"_a = nb::none(),
             "down_bias"_a = nb::none(), "window"_a = 0)
        .def("set_tables", &OwningDecoder::set_tables, nb::kw_only(), "embedding"_a, "head"_a, "final_norm"_a)
        .def("set_rotary", &OwningDecoder::set_rotary, "cos"_a, "sin"_a)
        .def("set_pattern", &OwningDecoder::set_pattern, "layer"_a, nb::kw_only(), "near_blocks"_a, "top_blocks"_a,
             "far"_a = false, "min_share"_a = 0., "share_factors"_a = std::vector<double>(),
             "level_bias"_a = nb::none(), "gate"_a = nb::none())
        .def("set_gate_rotation", &OwningDecoder::set_gate_rotation, "cos"_a, "sin"_a)
        .def("selection", &OwningDecoder::selection, "layer"_a, "kv_head"_a, "pages"_a, "query_block"_a)
        .def("row_selection", &OwningDecoder::row_selection, "layer"_a, "kv_head"_a, "pages"_a, "position"_a)
        .def("set_limits", &OwningDecoder::set_limits, "layer"_a, "limits"_a)
        .def("take_exceeded", &OwningDecoder::take_exceeded)
        .def("set_wide", &OwningDecoder::set_wide, "layer"_a, nb::kw_only(), "qkv"_a, "output"_a, "gate_up"_a, "down"_a)
        .def("swap_wide", &OwningDecoder::swap_wide, "layer"_a)
        .def("allocate_cache", &OwningDecoder::allocate_cache, "num_pages"_a)
        .def("forward", &OwningDecoder::forward, "token_ids"_a, "positions"_a, "row_starts"_a, "page_tables"_a,
             "logit_rows"_a, "exchange"_a = nb::none(), "wholes"_a = nb::none(), "hidden"_a = false)
        .def("set_timing", &OwningDecoder::set_timing, "on"_a, "most_stretches"_a = 0)
        .def("timings", &OwningDecoder::timings)
        .def_prop_ro_static("operator_names",
                            [](nb::handle) {
                                nb::list names;
                                for (const char* name : kOperatorNames) names.append(name);
                                return names;
                            })
        .def("cache_pages", &OwningDecoder::cache_pages)
        .def("selections", &OwningDecoder::selections)
        .def("run_blocks", &OwningDecoder::run_blocks, "x"_a, "positions"_a, "row_starts"_a, "page_tables"_a,
             "block_begin"_a, "block_end"_a)
        .def_prop_ro("num_pages", [](const OwningDecoder& self) { return self.decoder().num_pages(); })
        .def_prop_ro("page_bytes", [](const OwningDecoder& self) { return self.decoder().page_bytes(); })
        .def_prop_ro("weight_bytes", [](const OwningDecoder& self) { return self.decoder().weight_bytes(); })
        .def_prop_ro("workspace_bytes", [](const OwningDecoder& self) { return self.decoder().workspace_bytes(); });
}

}  // namespace dseek
