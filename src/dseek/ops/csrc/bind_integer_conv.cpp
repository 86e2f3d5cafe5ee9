// Convolution of integers as a function of arrays.
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <climits>
#include <optional>

#include "bind.h"
#include "integer_conv.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace dseek {
namespace {

using Images = Input<float, 4>;
using Result = nb::ndarray<float, nb::ndim<4>, nb::c_contig, nb::device::cpu>;
using Steps = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Taps = Input<int8_t, 2>;

constexpr int64_t kMostOfDimension = 1 << 24;
constexpr size_t kMostBytes = size_t{1} << 36;

// Kernel height and width, stride, dilation, and padding at the top, bottom, left and right.
ConvShape read_shape(const Images& x, const std::vector<int64_t>& geometry, int64_t out_channels, int64_t groups) {
    require(geometry.size() == 10, "the geometry has other than ten numbers");
    for (size_t i = 0; i < 10; ++i) {
        require(geometry[i] >= (i < 6 ? 1 : 0) && geometry[i] <= kMostOfDimension,
                "a number of the geometry is too large");
    }
    for (size_t dim = 0; dim < 4; ++dim) {
        require(x.shape(dim) >= 1 && x.shape(dim) <= static_cast<size_t>(kMostOfDimension),
                "a dimension of the images is 0 or too large");
    }
    require(out_channels >= 1 && out_channels <= kMostOfDimension && groups >= 1 && groups <= out_channels,
            "a number of channels or groups is too large");
    const auto at = [&](size_t index) { return static_cast<int>(geometry[index]); };
    ConvShape shape;
    shape.batch = static_cast<int>(x.shape(0));
    shape.height = static_cast<int>(x.shape(1));
    shape.width = static_cast<int>(x.shape(2));
    shape.channels = static_cast<int>(x.shape(3));
    shape.out_channels = static_cast<int>(out_channels);
    shape.kernel_height = at(0), shape.kernel_width = at(1);
    shape.stride_y = at(2), shape.stride_x = at(3);
    shape.dilation_y = at(4), shape.dilation_x = at(5);
    shape.pad_top = at(6), shape.pad_bottom = at(7), shape.pad_left = at(8), shape.pad_right = at(9);
    shape.groups = static_cast<int>(groups);
    require(shape.channels % shape.groups == 0 && shape.out_channels % shape.groups == 0,
            "groups do not divide the channels");
    const int64_t reach_y = int64_t{shape.dilation_y} * (shape.kernel_height - 1) + 1;
    const int64_t reach_x = int64_t{shape.dilation_x} * (shape.kernel_width - 1) + 1;
    require(reach_y <= shape.padded_height() && reach_x <= shape.padded_width(), "the kernel is larger than the image");
    const double area = static_cast<double>(shape.batch) * shape.padded_height() * shape.padded_width();
    require(area * (shape.channels + 15) < static_cast<double>(kMostBytes) && area * shape.out_channels < kMostBytes,
            "the images are too large");
    require(static_cast<double>(std::max(shape.stride_x, shape.dilation_x)) * (shape.channels + 15) < INT_MAX,
            "a stride or dilation is too large");
    require(static_cast<double>(shape.batch) * shape.out_height() * shape.out_width() < INT_MAX / 2 &&
                static_cast<double>(shape.batch) * shape.padded_height() < INT_MAX / 2 &&
                static_cast<double>(shape.padded_height()) * shape.padded_width() * (shape.channels + 15) < INT_MAX,
            "the images are too large");
    return shape;
}

// What both kinds share; `out` and `steps` are written.
ConvCall read_call(const ConvShape& shape, const Images& x, Steps& steps, bool find_steps,
                   const std::array<int64_t, 3>& range, const std::optional<Vector>& bias, Result& out) {
    const auto [low, high, zero] = range;
    require(low >= -127 && low <= 0 && high >= 1 && high <= 254 && zero >= 0 && zero <= 127 && low - zero >= -127 &&
                high - zero <= 127,
            "integers of inputs must lie in -127..127, their zero taken from them");
    require(steps.shape(0) == static_cast<size_t>(shape.batch), "there must be a step for each sample");
    require(out.shape(0) == static_cast<size_t>(shape.batch) &&
                out.shape(1) == static_cast<size_t>(shape.out_height()) &&
                out.shape(2) == static_cast<size_t>(shape.out_width()) &&
                out.shape(3) == static_cast<size_t>(shape.out_channels),
            "the result has another shape than the convolution's");
    require(!bias || bias->shape(0) == static_cast<size_t>(shape.out_channels), "the bias has another size");
    require_aligned(x, steps, out);
    if (bias) require_aligned(*bias);
    ConvCall call;
    call.shape = shape;
    call.x = x.data();
    call.steps = steps.data();
    call.find_steps = find_steps;
    call.low = static_cast<int>(low), call.high = static_cast<int>(high), call.zero = static_cast<int>(zero);
    call.bias = bias ? bias->data() : nullptr;
    call.out = out.data();
    return call;
}

void integer_conv(const Images& x, const Blob& blobs, int64_t groups, const std::vector<int64_t>& geometry, Steps steps,
                  bool find_steps, const std::array<int64_t, 3>& range, const std::optional<Vector>& bias, Result out) {
    require(groups >= 1 && groups <= kMostOfDimension && blobs.size() % static_cast<size_t>(groups) == 0,
            "the packed weight is not one blob of the same size for each group");
    const size_t bytes = blobs.size() / static_cast<size_t>(groups);
    std::vector<Linear> weights;
    for (int64_t group = 0; group < groups; ++group) {
        weights.push_back(view_blob(blobs.data() + static_cast<size_t>(group) * bytes, bytes));
        const Linear& weight = weights.back();
        require(weight.format == Format::i8p && !weight.interleaved && weight.num_bytes == bytes,
                "a convolution needs weights of the format i8p, not interleaved");
        require(weight.n == weights[0].n && weight.k == weights[0].k, "the groups have weights of different shapes");
    }
    const ConvShape shape = read_shape(x, geometry, weights[0].n * groups, groups);
    require(static_cast<int64_t>(shape.kernel_height) * shape.kernel_width * (shape.channels / groups) == weights[0].k,
            "the weight has other inputs than the kernel");
    ConvCall call = read_call(shape, x, steps, find_steps, range, bias, out);
    call.weights = weights.data();
    nb::gil_scoped_release release;
    convolve(call);
}

void depthwise_conv(const Images& x, const Taps& taps, const Vector& scale, const std::vector<int64_t>& geometry,
                    Steps steps, bool find_steps, const std::array<int64_t, 3>& range,
                    const std::optional<Vector>& bias, Result out) {
    const int64_t channels = static_cast<int64_t>(x.shape(3));
    const ConvShape shape = read_shape(x, geometry, channels, channels);
    const auto padded = static_cast<size_t>(round_up(shape.channels, kPanel));
    require(static_cast<int64_t>(shape.kernel_height) * shape.kernel_width < 1 << 16, "the kernel is too large");
    require(taps.shape(0) == static_cast<size_t>(shape.taps()) && taps.shape(1) == padded && scale.shape(0) == padded,
            "a depthwise weight must be [taps][channels], channels and scales padded to a multiple of 16");
    require_aligned(scale);
    ConvCall call = read_call(shape, x, steps, find_steps, range, bias, out);
    call.taps = taps.data();
    call.tap_scale = scale.data();
    nb::gil_scoped_release release;
    convolve(call);
}

}  // namespace

void bind_integer_conv(nb::module_& module) {
    module.def("integer_conv", &integer_conv, "x"_a, "blobs"_a, "groups"_a, "geometry"_a, "steps"_a, "find_steps"_a,
               "range"_a, "bias"_a.none(), "out"_a);
    module.def("depthwise_conv", &depthwise_conv, "x"_a, "taps"_a, "scale"_a, "geometry"_a, "steps"_a, "find_steps"_a,
               "range"_a, "bias"_a.none(), "out"_a);
}

}  // namespace dseek
