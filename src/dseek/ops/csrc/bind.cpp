// The Python face of the native code: arrays in, arrays out, checked here so that nothing below has to.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <climits>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>

#include "bind_attention.h"
#include "common/cpu.h"
#include "decoder.h"
#include "matmul.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace dseek {
namespace {

Linear view(const Blob& blob) { return view_blob(blob.data(), blob.size()); }

using NamedPiece = std::tuple<std::string, int, Blob>;

Output<uint8_t> pack_encoded(const std::string& format_name, const std::vector<NamedPiece>& named, int k,
                             bool interleaved) {
    std::vector<Piece> pieces;
    int64_t n = 0;
    for (const auto& [encoding, rows, data] : named) {
        pieces.push_back({encoding_from_name(encoding), rows, data.data(), data.size()});
        n += rows;
    }
    const Format format = format_from_name(format_name);
    check_size(format, n, k, interleaved);
    check_pieces(pieces, static_cast<int>(n), k);
    const BlobHeader header = make_header(format, static_cast<int>(n), k, interleaved);
    Pages memory(header.num_bytes);
    {
        nb::gil_scoped_release release;
        pack_blob(header, pieces, memory.data());
    }
    return own<uint8_t>(std::move(memory), {header.num_bytes}, {1});
}

Output<uint8_t> pack(const std::string& format, const Input<float, 2>& weight, bool interleaved) {
    check_size(format_from_name(format), static_cast<int64_t>(weight.shape(0)), static_cast<int64_t>(weight.shape(1)),
               interleaved);
    const int n = static_cast<int>(weight.shape(0)), k = static_cast<int>(weight.shape(1));
    size_t num_bytes = weight.size() * sizeof(float), shape[1] = {num_bytes};
    Blob bytes(const_cast<float*>(weight.data()), 1, shape, nb::handle(), nullptr, nb::dtype<uint8_t>());
    return pack_encoded(format, {{"F32", n, bytes}}, k, interleaved);
}

Output<float> linear(const Input<float, 2>& x, const Blob& blob) {
    const Linear weight = view(blob);
    require(x.shape(0) >= 1 && x.shape(0) <= kMostRows && x.shape(1) == static_cast<size_t>(weight.k),
            "activations do not have the weight's inputs");
    require_aligned(x);
    Pages memory(x.shape(0) * weight.n_padded * sizeof(float));
    {
        nb::gil_scoped_release release;
        multiply(weight, x.data(), static_cast<int>(x.shape(0)), memory.as<float>());
    }
    return own<float>(std::move(memory), {x.shape(0), static_cast<size_t>(weight.n)}, {weight.n_padded, 1});
}

// Rows of the weight as floats, undoing rotation and interleaving.
Output<float> unpack(const Blob& blob) {
    const Linear weight = view(blob);
    Pages memory(static_cast<size_t>(weight.n) * weight.k * sizeof(float));
    const int half = weight.n / 2;
    for (int row = 0; row < weight.n; ++row) {
        int channel = row;
        if (weight.interleaved) {
            const int index = row % half;
            channel = (index / kPanel * 2 + row / half) * kPanel + index % kPanel;
        }
        kernels().unpack_channel(weight, channel, memory.as<float>() + static_cast<size_t>(row) * weight.k);
    }
    return own<float>(std::move(memory), {static_cast<size_t>(weight.n), static_cast<size_t>(weight.k)}, {weight.k, 1});
}

Output<float> norm(const Input<float, 2>& x, const Vector& weight, float epsilon) {
    require(weight.size() == x.shape(1) && weight.size() >= 1 && weight.size() <= INT_MAX,
            "the norm's weight has another width than its rows");
    require_aligned(x, weight);
    const int size = static_cast<int>(x.shape(1));
    Pages memory(x.size() * sizeof(float));
    for (size_t row = 0; row < x.shape(0); ++row) {
        kernels().rms_norm(x.data() + row * size, weight.data(), epsilon, size, memory.as<float>() + row * size);
    }
    return own<float>(std::move(memory), {x.shape(0), x.shape(1)}, {size, 1});
}

// A decoder together with the arrays that it looks into.
class OwningDecoder {
public:
    explicit OwningDecoder(const DecoderShape& shape) : decoder_(shape) {}

    void add_block(const Blob& qkv, const Blob& output, const Blob& gate_up, const Blob& down, const Vector& input_norm,
                   const Vector& post_attention_norm, const std::optional<Vector>& query_norm,
                   const std::optional<Vector>& key_norm, const std::optional<Vector>& qkv_bias,
                   const std::optional<Vector>& output_bias, const std::optional<Vector>& gate_up_bias,
                   const std::optional<Vector>& down_bias, int window) {
        const std::lock_guard lock(mutex_);
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
        const std::lock_guard lock(mutex_);
        const Linear embedding_view = keep(embedding), head_view = keep(head);
        decoder_.set_tables(embedding_view, head_view, keep(final_norm, decoder_.shape().hidden_size, "final norm"));
    }

    void set_rotary(const Input<float, 2>& cos, const Input<float, 2>& sin) {
        const size_t half = static_cast<size_t>(decoder_.shape().head_dim / 2);
        require(cos.shape(1) == half && sin.shape(1) == half && cos.shape(0) == sin.shape(0) && cos.shape(0) >= 1 &&
                    cos.shape(0) < (1u << 30),
                "rotary tables must be [positions, head_dim / 2]");
        require_aligned(cos, sin);
        const std::lock_guard lock(mutex_);
        rotary_ = {cos, sin};
        decoder_.set_rotary(cos.data(), sin.data(), static_cast<int>(cos.shape(0)));
    }

    void set_pattern(int layer, const std::vector<int>& near_blocks, int top_blocks, bool far, double min_share,
                     const std::optional<Input<float, 2>>& level_bias, const std::optional<GateArrays>& gate) {
        DynamicPattern pattern = pattern_of(near_blocks, top_blocks, far, min_share, level_bias);
        if (gate) pattern.gate = gate_of(*gate, decoder_.shape().num_heads, decoder_.shape().num_kv_heads);
        const std::lock_guard lock(mutex_);
        decoder_.set_pattern(layer, std::move(pattern));
    }

    void set_gate_rotation(const Input<float, 2>& cos, const Input<float, 2>& sin) {
        require(cos.shape(0) == sin.shape(0) && cos.shape(1) == sin.shape(1) && cos.shape(0) <= kMostRows,
                "the gates' cos and sin must be [blocks, width / 2]");
        require_aligned(cos, sin);
        const std::lock_guard lock(mutex_);
        decoder_.set_gate_rotation({cos.data(), cos.data() + cos.size()}, {sin.data(), sin.data() + sin.size()},
                                   static_cast<int>(cos.shape(0)));
    }

    nb::tuple selection(int layer, int kv_head, const Input<int32_t, 1>& pages, int query_block) {
        require(pages.size() <= kMostRows, "a page table is too long");
        require_aligned(pages);
        const std::lock_guard lock(mutex_);
        return to_tuple(decoder_.selection(layer, kv_head, pages.data(), static_cast<int>(pages.size()), query_block));
    }

    nb::tuple row_selection(int layer, int kv_head, const Input<int32_t, 1>& pages, int position) {
        require(pages.size() <= kMostRows, "a page table is too long");
        require_aligned(pages);
        const std::lock_guard lock(mutex_);
        return to_tuple(decoder_.row_selection(layer, kv_head, pages.data(), static_cast<int>(pages.size()), position));
    }

    void allocate_cache(int num_pages) {
        const std::lock_guard lock(mutex_);
        decoder_.allocate_cache(num_pages);
    }

    Output<float> forward(const Input<int32_t, 1>& token_ids, const Input<int32_t, 1>& positions,
                          const Input<int32_t, 1>& row_starts, const Input<int32_t, 2>& page_tables,
                          const Input<int32_t, 1>& logit_rows) {
        Batch batch = batch_of(positions, row_starts, page_tables);
        require(token_ids.size() == positions.size(), "token_ids and positions differ in length");
        require(logit_rows.size() <= positions.size(), "logit_rows must be ascending rows of the batch");
        require_aligned(token_ids, logit_rows);
        batch.token_ids = token_ids.data();
        batch.logit_rows = logit_rows.data();
        batch.num_logit_rows = static_cast<int>(logit_rows.size());
        const size_t stride = decoder_.logit_stride();
        Pages logits(logit_rows.size() * stride * sizeof(float));
        {
            nb::gil_scoped_release release;
            const std::lock_guard lock(mutex_);
            decoder_.forward(batch, logits.as<float>());
        }
        const size_t vocab = static_cast<size_t>(decoder_.shape().vocab_size);
        return own<float>(std::move(logits), {logit_rows.size(), vocab}, {static_cast<int64_t>(stride), 1});
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
            nb::gil_scoped_release release;
            const std::lock_guard lock(mutex_);
            decoder_.run_blocks(batch, block_begin, block_end, out.as<float>());
        }
        return own<float>(std::move(out), {x.shape(0), x.shape(1)}, {static_cast<int64_t>(x.shape(1)), 1});
    }

    const Decoder& decoder() const { return decoder_; }

private:
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

    Decoder decoder_;
    std::mutex mutex_;
    std::vector<Blob> blobs_;
    std::vector<Vector> vectors_;
    std::vector<Input<float, 2>> rotary_;
};

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
             "far"_a = false, "min_share"_a = 0., "level_bias"_a = nb::none(), "gate"_a = nb::none())
        .def("set_gate_rotation", &OwningDecoder::set_gate_rotation, "cos"_a, "sin"_a)
        .def("selection", &OwningDecoder::selection, "layer"_a, "kv_head"_a, "pages"_a, "query_block"_a)
        .def("row_selection", &OwningDecoder::row_selection, "layer"_a, "kv_head"_a, "pages"_a, "position"_a)
        .def("allocate_cache", &OwningDecoder::allocate_cache, "num_pages"_a)
        .def("forward", &OwningDecoder::forward, "token_ids"_a, "positions"_a, "row_starts"_a, "page_tables"_a,
             "logit_rows"_a)
        .def("run_blocks", &OwningDecoder::run_blocks, "x"_a, "positions"_a, "row_starts"_a, "page_tables"_a,
             "block_begin"_a, "block_end"_a)
        .def_prop_ro("num_pages", [](const OwningDecoder& self) { return self.decoder().num_pages(); })
        .def_prop_ro("page_bytes", [](const OwningDecoder& self) { return self.decoder().page_bytes(); })
        .def_prop_ro("weight_bytes", [](const OwningDecoder& self) { return self.decoder().weight_bytes(); })
        .def_prop_ro("workspace_bytes", [](const OwningDecoder& self) { return self.decoder().workspace_bytes(); });
}

}  // namespace
}  // namespace dseek

NB_MODULE(_native, module) {
    using namespace dseek;
    module.doc() = "Native kernels; use them through dseek.ops.";
    module.def("variant", [] { return std::string(kernels().name); });
    module.def("variants", [] { return runnable_variants(); });
    module.def("set_variant", [](const std::string& name) { select_kernels(name.c_str()); }, "name"_a);
    module.def("cpu_features", [] {
        const CpuFeatures& features = cpu_features();
        std::vector<std::string> names;
        if (features.avx2) names.emplace_back("avx2");
        if (features.avx512_vnni) names.emplace_back("avx512_vnni");
        if (features.avx512_bf16) names.emplace_back("avx512_bf16");
        if (features.avx512_fp16) names.emplace_back("avx512_fp16");
        if (features.amx) names.emplace_back("amx");
        return names;
    });
    module.def("num_threads", [] { return num_threads(); });
    module.def(
        "set_num_threads",
        [](int threads) {
            require(threads >= 1 && threads <= 1024, "number of threads must be between 1 and 1024");
            nb::gil_scoped_release release;
            set_num_threads(threads);
        },
        "num_threads"_a);
    module.def(
        "packed_bytes",
        [](const std::string& format, int n, int k, bool interleaved) {
            const Format parsed = format_from_name(format);
            check_size(parsed, n, k, interleaved);
            return make_header(parsed, n, k, interleaved).num_bytes;
        },
        "format"_a, "n"_a, "k"_a, "interleaved"_a = false);
    module.def("pack", &pack, "format"_a, "weight"_a, "interleaved"_a = false);
    module.def("pack_encoded", &pack_encoded, "format"_a, "pieces"_a, "k"_a, "interleaved"_a = false);
    module.def("unpack", &unpack, "blob"_a);
    module.def("linear", &linear, "x"_a, "blob"_a);
    module.def("rms_norm", &norm, "x"_a, "weight"_a, "epsilon"_a);
    bind_attention(module);
    bind_measurements(module);
    bind_decoder(module);
}
