// AVX2 with FMA and F16C: linear layers of its own, the rest from the portable source compiled for 32-byte registers.
#define DSEEK_VARIANT avx2
#include "../common/attention_portable.h"
#include "../common/cells_portable.h"
#include "../common/integer_conv.h"
#include "../common/narrow.h"
#include "../common/open_cells.h"
#include "../common/pack.h"
#include "../common/reduce.h"
#include "../common/rows.h"
#include "linear.h"

namespace dseek {

const KernelTable& avx2_kernels() {
    using namespace avx2;
    static const KernelTable table{
        .name = "avx2",
        .rms_norm = rms_norm,
        .rotary = rotary,
        .prepare_row = prepare_row,
        .row_kind = row_kind_portable,
        .linear = linear_avx2,
        .store_tokens = store_tokens,
        .store_page = store_page,
        .widen = widen,
        .narrow = narrow,
        .attention = attention_portable,
        .page_means = page_means,
        .page_statistics = page_statistics,
        .score_cells = score_cells,
        .pack_cells = pack_cells,
        .score_strip = score_strip,
        .score_row = score_row,
        .open_cells = open_cells,
        .largest_of_run = largest_of_run,
        .round_run = round_run,
        .depthwise = depthwise,
        .reduce = reduce,
        .read_bytes = read_bytes,
        .pack_panel = pack_panel,
        .unpack_channel = unpack_channel,
    };
    return table;
}

}  // namespace dseek
