// The Python face of the timings.
#include "measure.h"

#include <nanobind/stl/string.h>

#include <algorithm>

#include "bind.h"
#include "common/pack_blob.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace dseek {

void bind_measurements(nb::module_& module) {
    constexpr int64_t kMostMeasured = int64_t{1} << 28;  // elements of one array
    module.def(
        "read_bandwidth",
        [](size_t num_bytes, int repeats) {
            require(num_bytes >= 4096 && repeats >= 1, "read_bandwidth needs at least 4096 bytes and one repeat");
            nb::gil_scoped_release release;
            return read_bandwidth(num_bytes, repeats);
        },
        "num_bytes"_a, "repeats"_a);
    module.def(
        "time_linear",
        [](const std::string& format, int m, int n, int k, int repeats, bool cold, size_t working_set_bytes) {
            const Format parsed = format_from_name(format);
            check_size(parsed, n, k, false);
            require(m >= 1 && m <= 1 << 20 && repeats >= 1, "time_linear needs at least one row and one repeat");
            const int64_t largest = std::max({int64_t{n} * k, int64_t{m} * n, int64_t{m} * k});
            require(largest <= kMostMeasured && working_set_bytes <= size_t{1} << 34,
                    "time_linear: the matrices are too large");
            nb::gil_scoped_release release;
            return time_linear(parsed, m, n, k, repeats, cold ? working_set_bytes : 0);
        },
        "format"_a, "m"_a, "n"_a, "k"_a, "repeats"_a, "cold"_a, "working_set_bytes"_a = size_t{256} << 20);
    module.def(
        "time_attention",
        [](int num_query_rows, int context, int num_heads, int num_kv_heads, int head_dim,
           const std::string& cache_type, int repeats) {
            require(num_query_rows >= 1 && num_query_rows <= context && context <= 1 << 22 && num_kv_heads >= 1 &&
                        num_heads >= num_kv_heads && num_heads % num_kv_heads == 0 && num_heads <= 1 << 12 &&
                        head_dim >= 16 && head_dim <= 512 && head_dim % 16 == 0 && repeats >= 1 &&
                        int64_t{num_heads} * head_dim * num_query_rows <= kMostMeasured &&
                        int64_t{num_kv_heads} * head_dim * context <= kMostMeasured,
                    "time_attention: sizes out of range");
            const CacheType type = cache_type_from_name(cache_type);
            nb::gil_scoped_release release;
            return time_attention(num_query_rows, context, num_heads, num_kv_heads, head_dim, type, repeats);
        },
        "num_query_rows"_a, "context"_a, "num_heads"_a, "num_kv_heads"_a, "head_dim"_a, "cache_dtype"_a, "repeats"_a);
}

}  // namespace dseek
