// What the files that bind C++ to Python share: array types and their checks.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/kernels.h"
#include "common/pages.h"

namespace dseek {

template <class T, int kDims>
using Input = nanobind::ndarray<const T, nanobind::ndim<kDims>, nanobind::c_contig, nanobind::device::cpu>;
using Blob = Input<uint8_t, 1>;
using Vector = Input<float, 1>;
template <class T>
using Output = nanobind::ndarray<nanobind::numpy, T>;

constexpr size_t kMostRows = 1u << 24;

inline void require(bool condition, const std::string& message) {
    if (!condition) throw std::invalid_argument(message);
}

// Buffers may come from anywhere in memory; the kernels read whole elements.
template <class... Arrays>
void require_aligned(const Arrays&... arrays) {
    const auto aligned = [](const auto& array) {
        return reinterpret_cast<uintptr_t>(array.data()) % sizeof(*array.data()) == 0;
    };
    require((aligned(arrays) && ...), "an array does not start at a multiple of its element's size; copy it");
}

inline CacheType cache_type_from_name(const std::string& name) {
    if (name == "fp32") return CacheType::fp32;
    if (name == "bf16") return CacheType::bf16;
    if (name == "int8") return CacheType::int8;
    throw std::invalid_argument("unknown cache type '" + name + "'; needed: fp32, bf16 or int8");
}

// A new array over memory of its own, 64-byte aligned; `shape` may be narrower than the memory's rows.
template <class T>
Output<T> own(Pages&& memory, const std::vector<size_t>& shape, const std::vector<int64_t>& strides) {
    auto* pages = new Pages(std::move(memory));
    nanobind::capsule owner(pages, [](void* pointer) noexcept { delete static_cast<Pages*>(pointer); });
    return Output<T>(pages->as<T>(), shape.size(), shape.data(), owner, strides.data());
}

// The packed weight in a blob, checked.
inline Linear view(const Blob& blob) { return view_blob(blob.data(), blob.size()); }

// Convolution of integer_conv.h, with its arguments checked.
void bind_integer_conv(nanobind::module_& module);
// The decoder of decoder.h, as a class.
void bind_decoder(nanobind::module_& module);
// The timings of measure.h, with their arguments checked.
void bind_measurements(nanobind::module_& module);
// The segment of transport.h and its messages, as classes.
void bind_transport(nanobind::module_& module);

}  // namespace dseek
