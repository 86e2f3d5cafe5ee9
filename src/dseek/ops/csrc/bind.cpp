// The Python face of the native code: arrays in, arrays out, checked here so that nothing below has to.
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <climits>

#include "bind_attention.h"
#include "bind_encoder_decoder.h"
#include "common/cpu.h"
#include "matmul.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace dseek {
namespace {

using NamedPiece = std::tuple<std::string, int, Blob>;

// Kind, count, and the row, column and value of the first one.
using FoundEntry = std::tuple<std::string, int64_t, int, int, float>;

std::vector<FoundEntry> to_entries(const Findings& findings) {
    constexpr const char* kNames[kFindings] = {"not finite", "overflow", "clipped", "vanished"};
    std::vector<FoundEntry> entries;
    for (int kind = 0; kind < kFindings; ++kind) {
        const FirstFound& found = findings.by_kind[kind];
        if (found.count > 0) entries.emplace_back(kNames[kind], found.count, found.row, found.column, found.value);
    }
    return entries;
}

std::tuple<Output<uint8_t>, std::vector<FoundEntry>> pack_inspected(const std::string& format_name,
                                                                    const std::vector<NamedPiece>& named, int k,
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
    Findings findings;
    {
        nb::gil_scoped_release release;
        findings = pack_blob(header, pieces, memory.data());
    }
    return {own<uint8_t>(std::move(memory), {header.num_bytes}, {1}), to_entries(findings)};
}

Output<uint8_t> pack_encoded(const std::string& format_name, const std::vector<NamedPiece>& named, int k,
                             bool interleaved) {
    return std::get<0>(pack_inspected(format_name, named, k, interleaved));
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
    module.def("pack_inspected", &pack_inspected, "format"_a, "pieces"_a, "k"_a, "interleaved"_a = false);
    module.def("unpack", &unpack, "blob"_a);
    module.def("linear", &linear, "x"_a, "blob"_a);
    module.def("rms_norm", &norm, "x"_a, "weight"_a, "epsilon"_a);
    bind_integer_conv(module);
    bind_attention(module);
    bind_measurements(module);
    bind_decoder(module);
    bind_encoder_decoder(module);
    bind_transport(module);
}
