// AMX int8 and bf16 tiles (Sapphire Rapids and later), with the AVX-512 kernels for what tiles do not help.
#define DSEEK_VARIANT amx
#include "../avx512/cache.h"
#include "../avx512/rows.h"
#include "../common/cells_portable.h"
#include "../common/integer_conv.h"
#include "../common/narrow.h"
#include "../common/pack.h"
#include "../common/reduce.h"
#include "attention.h"
#include "linear.h"
#include "score_strip.h"

namespace dseek {

const KernelTable& amx_kernels() {
    using namespace amx;
    static const KernelTable table{
        .name = "amx",
        .rms_norm = rms_norm,
        .rotary = rotary,
        .prepare_row = prepare_row_avx512,
        .row_kind = row_kind_portable,
        .linear = linear_amx,
        .store_tokens = store_tokens_512,
        .store_page = store_page_512,
        .widen = widen,
        .narrow = narrow,
        .attention = attention_amx,
        .page_means = page_means,
        .page_statistics = page_statistics,
        .score_cells = score_cells,
        .pack_cells = pack_cells_512,
        .score_strip = score_strip_amx,
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
