// Portable C++: runs anywhere, and the yardstick that the other variants are tested against.
#define DSEEK_VARIANT generic
#include "../common/attention_portable.h"
#include "../common/cells_portable.h"
#include "../common/integer_conv.h"
#include "../common/linear_portable.h"
#include "../common/narrow.h"
#include "../common/open_cells.h"
#include "../common/pack.h"
#include "../common/reduce.h"
#include "../common/rows.h"

namespace dseek {

const KernelTable& generic_kernels() {
    using namespace generic;
    static const KernelTable table{
        .name = "generic",
        .rms_norm = rms_norm,
        .rotary = rotary,
        .prepare_row = prepare_row,
        .row_kind = row_kind_portable,
        .linear = linear_portable,
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
