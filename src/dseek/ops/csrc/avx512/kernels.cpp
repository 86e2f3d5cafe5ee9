// AVX-512 with VNNI and BF16 (Zen 4 and later, Cooper Lake, Sapphire Rapids and later).
#define DSEEK_VARIANT avx512
#include "../common/cells_portable.h"
#include "../common/integer_conv.h"
#include "../common/narrow.h"
#include "../common/pack.h"
#include "../common/reduce.h"
#include "attention.h"
#include "cache.h"
#include "linear.h"
#include "rows.h"
#include "score_strip.h"

namespace dseek {

const KernelTable& avx512_kernels() {
    using namespace avx512;
    static const KernelTable table{
        .name = "avx512",
        .rms_norm = rms_norm,
        .rotary = rotary,
        .prepare_row = prepare_row_avx512,
        .row_kind = row_kind_portable,
        .linear = linear_avx512,
        .store_tokens = store_tokens_512,
        .store_page = store_page_512,
        .widen = widen,
        .narrow = narrow,
        .attention = attention_avx512,
        .page_means = page_means,
        .page_statistics = page_statistics,
        .score_cells = score_cells,
        .pack_cells = pack_cells_512,
        .score_strip = score_strip_avx512,
        .score_row = score_row_512,
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
