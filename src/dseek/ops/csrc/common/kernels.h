// What one instruction-set variant provides: plain functions over raw pointers, gathered in a table.
//
// Every variant fills the same table; `generic` is portable C++ and the yardstick for the others. A kernel works on
// one thread and on a slice (rows, panels, heads) that the caller has cut, so that variants know nothing of threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "formats.h"

namespace dseek {

constexpr int kPageTokens = 64;

// How activations are prepared for a weight format.
enum class RowKind {
    f32,       // as they are
    bf16,      // rounded
    token_u8,  // rotated, then one scale a row; stored as value + 128
    plain_u8,  // the same without the rotation
    group_s8,  // one scale and one sum for every 32 inputs
};

// Prepared activations, row after row.
struct Rows {
    RowKind kind = RowKind::f32;
    void* values = nullptr;        // [rows][stride] of the kind's element
    size_t stride = 0;             // elements between rows
    float* scale = nullptr;        // token_u8, plain_u8: [rows]
    float* group_scale = nullptr;  // group_s8: [rows][groups]
    float* group_sum = nullptr;    // group_s8: [rows][groups], scale times the sum of the quantised values
    int groups = 0;

    template <class T>
    T* row(int index) const {
        return static_cast<T*>(values) + static_cast<size_t>(index) * stride;
    }
};

enum class Epilogue {
    store,  // out = product + bias
    add,    // out += product + bias
    gated,  // out[c] = silu(product[gate c]) * product[up c]; panels are interleaved
};

// product[row][channel] for rows [row_begin, row_end) and panels [panel_begin, panel_end), into
// out[row * out_stride + channel]. A gated call takes an even number of panels and writes half as many channels.
struct LinearCall {
    const Linear* weight = nullptr;
    const Rows* rows = nullptr;
    int row_begin = 0, row_end = 0;
    int panel_begin = 0, panel_end = 0;
    Epilogue epilogue = Epilogue::store;
    const float* bias = nullptr;  // [n_padded] in packed order, or null
    float* out = nullptr;
    size_t out_stride = 0;
};

enum class CacheType : int { fp32 = 0, bf16 = 1, int8 = 2 };

// Where one page of one head lies. Keys: bf16 and int8 [d / 2][64][2], fp32 [d][64]. Values: bf16 and int8
// [32][d][2], fp32 [64][d]. int8 adds float [64] scales of the keys and of the values.
struct CacheLayout {
    CacheType type = CacheType::bf16;
    int head_dim = 0;
    int num_layers = 0;
    int num_kv_heads = 0;
    size_t value_offset = 0;
    size_t scale_offset = 0;
    size_t head_bytes = 0;

    CacheLayout() = default;
    CacheLayout(CacheType cache_type, int dim, int layers, int kv_heads)
        : type(cache_type), head_dim(dim), num_layers(layers), num_kv_heads(kv_heads) {
        const size_t width = type == CacheType::fp32 ? 4 : type == CacheType::bf16 ? 2 : 1;
        value_offset = static_cast<size_t>(dim) * kPageTokens * width;
        scale_offset = 2 * value_offset;
        head_bytes = scale_offset + (type == CacheType::int8 ? 2 * kPageTokens * sizeof(float) : 0);
    }
    size_t page_bytes() const { return head_bytes * num_kv_heads * num_layers; }
    size_t offset(int page, int layer, int kv_head) const {
        return static_cast<size_t>(page) * page_bytes() +
               (static_cast<size_t>(layer) * num_kv_heads + kv_head) * head_bytes;
    }
};

// Summaries of runs of tokens, attended to like keys: a slot of a page for each. Never int8.
struct FarCells {
    const CacheLayout* layout = nullptr;
    const uint8_t* pages = nullptr;  // [ceil(count / 64)][layout->head_bytes]
    int count = 0;
    const float* bias = nullptr;  // [heads][ceil(count / 64) * 64], added to q . k before `scale`; unused slots: -1e30

    int num_pages() const { return (count + kPageTokens - 1) / kPageTokens; }
};

// Rows that one attention task takes, of one key-value head: a page of positions, or a part of it where so many would
// leave threads without work. Kernels take sixteen at a time.
inline int rows_of_attention_task(int num_rows, int num_kv_heads, int num_threads) {
    int rows = kPageTokens;
    while (rows > 16 && (num_rows + rows - 1) / rows * num_kv_heads < 2 * num_threads) rows /= 2;
    return rows;
}

// Attention of `num_rows` newest queries at consecutive positions, for all query heads of one key-value head.
struct AttentionCall {
    const CacheLayout* layout = nullptr;
    const uint8_t* cache = nullptr;  // already moved to this layer and head: a page lies at cache + page * page_bytes
    const int32_t* pages = nullptr;  // page numbers of the sequence
    const float* query = nullptr;  // row r, head h at query + r * query_stride + h * d, rotated, not scaled
    size_t query_stride = 0;
    float* out = nullptr;  // same shape as query
    size_t out_stride = 0;
    int num_heads = 0;  // query heads of this group
    int first_position = 0;  // position of row 0
    int num_rows = 0;
    // Rows of the sequence in this step, of which these are some: by them kernels decide what rounds differently, so
    // that results do not hang on how rows are shared out. 0: these are all.
    int step_rows = 0;
    int window = 0;  // newest positions a query sees, 0 = all
    // Blocks to attend to, indices into `pages`, ascending; null: all that are visible. Then page_begin and page_end
    // count entries of this list.
    const int32_t* blocks = nullptr;
    int num_blocks = 0;
    const uint8_t* from_rows = nullptr;  // [num_blocks], first row that attends to each block; null: row 0
    FarCells far;
    float scale = 0.f;  // 1 / sqrt(d)
    // Decode split over pages: attend to [page_begin, page_end) only and leave the sums unnormalised.
    int page_begin = 0, page_end = -1;
    float* partial_max = nullptr;  // [num_heads], base-2 exponent
    float* partial_sum = nullptr;  // [num_heads]
};

// Scores of the cells of one level for the rows of a strip of sixteen queries, and which of them each row opens.
struct OpenCall {
    int num_heads = 0;
    int row_begin = 0, row_end = 0;  // rows that open now; what earlier rows opened is in `opened_from`
    int num_pages = 0;  // cells in pages of 64
    const float* scores = nullptr;  // [heads][pages][16][64], base-2 logarithms of the cells' mass
    const float* bias = nullptr;  // [pages * 64], added to the scores
    const uint8_t* seen_from = nullptr;  // [pages * 64], first row that sees the cell; 16: none
    uint8_t* opened_from = nullptr;  // [pages * 64], first row that opens it; kNeverOpened, kMayNotOpen
    float* rest = nullptr;  // [heads][16], base-2 logarithm of the mass outside; in return, cells left closed are in it
    float log_share = 0.f;  // base-2 logarithm of the least share of its head's mass that opens a cell
    bool pass_on = false;  // whether `rest` is needed afterwards
    int most = 0;  // cells that the strip may open, those opened earlier included
};

constexpr int kStripRows = 16;
constexpr int kMostHeadsOfGroup = 64;  // that a selection by rows can weigh
constexpr uint8_t kNeverOpened = 0xfe;  // so far
constexpr uint8_t kMayNotOpen = 0xff;  // counted, but exact already

// Inputs rounded to whole steps: clamp(round(x / step), low, high) - zero, from -127 to 127, stored as value + 128.
struct RoundingRange {
    float step = 1.f;
    int low = -127, high = 127;
    int zero = 0;
};

// Neighbouring outputs of one row of a depthwise convolution, all channels.
struct DepthwiseCall {
    const uint8_t* image = nullptr;  // first input of output 0, value + 128; pixels of channels_padded bytes
    int pixel_stride = 0;  // bytes from the first input of one output to that of the next
    const int32_t* offsets = nullptr;  // [taps], bytes from an output's first input
    const int8_t* weight = nullptr;  // [taps][channels_padded]
    int taps = 0, channels = 0, channels_padded = 0, pixels = 0;
    const int32_t* start = nullptr;  // [channels_padded], what the sums begin with: the offsets of inputs undone
    const float* scale = nullptr;  // [channels_padded], of the weight
    float step = 1.f;  // of the inputs
    const float* bias = nullptr;  // [channels_padded]
    float* out = nullptr;  // [pixels][channels]
};

// What ranks exchange and reduce; the numbers are those of dseek.parallel.transport.native.
enum class Element : int { float32, float64, bfloat16, float16, int8, uint8, int16, int32, int64 };
enum class Reduction : int { sum, average, product, least, greatest, bit_and, bit_or, bit_xor };

// outs[...][i] = sources[0][i] o sources[1][i] o ..., in this order. An output may be one of the sources. There are no
// averages of integers and no bitwise reductions of floats.
struct ReduceCall {
    Element element = Element::float32;
    Reduction reduction = Reduction::sum;
    int num_sources = 0, num_outs = 0;
    const void* const* sources = nullptr;
    void* const* outs = nullptr;
    size_t count = 0;
};

// Scores of a lone row with cells that lie anywhere, for all heads of a group at once; sizes as in `score_strip`.
struct RowScoreCall {
    const float* query = nullptr;  // head h at query + h * query_stride
    size_t query_stride = 0;
    int num_heads = 0, dim = 0;
    bool exact = false;
    const float* const* cells = nullptr;
    int count = 0;
    float* scores = nullptr;  // cell i of head h at scores + h * score_stride + i / 64 * page_stride + i % 64
    size_t score_stride = 0, page_stride = 0;

    float* place(int head, int cell) const {
        return scores + head * score_stride + cell / kPageTokens * page_stride + cell % kPageTokens;
    }
};

struct KernelTable {
    const char* name;
    void (*rms_norm)(const float* x, const float* weight, float epsilon, int size, float* out);
    void (*rotary)(float* x, const float* cos, const float* sin, int head_dim);
    void (*prepare_row)(const float* x, int k, int k_padded, const Rows& rows, int row_idx);
    RowKind (*row_kind)(Format format, int num_rows);
    void (*linear)(const LinearCall& call);
    // Writes `count` tokens into slots [slot, slot + count) of one head's page; token t's key is at key + t * stride.
    void (*store_tokens)(const CacheLayout& layout, uint8_t* page, int slot, int count, const float* key,
                         const float* value, size_t stride);
    // Lays out a whole page of one head, from keys and values [64][d] that are bf16 as the page's are.
    void (*store_page)(const CacheLayout& layout, uint8_t* page, const uint16_t* key, const uint16_t* value);
    void (*widen)(const uint16_t* source, int count, float* out);
    void (*narrow)(const float* source, int count, uint16_t* out);
    void (*attention)(const AttentionCall& call);
    // Means over all tokens of one head's page, [head_dim] each.
    void (*page_means)(const CacheLayout& layout, const uint8_t* page, float* key, float* value);
    // Largest, least and mean [3][head_dim] of a page's keys as they were before their rotation, times `scale`; cos and
    // sin are [head_dim / 2][64].
    void (*page_statistics)(const CacheLayout& layout, const uint8_t* page, const float* cos, const float* sin,
                            float scale, float* statistics);
    // scores[i] = max over heads of query[head] . means[i]; query heads lie one after the other.
    void (*score_cells)(const float* query, int heads, int head_dim, const float* const* means, int count,
                        float* scores);
    // Lays vectors [count][dim] out as keys of a page of 64, the unused ones zero. `exact` pages are fp32, others may
    // be bf16; either way a page has room for dim * 64 floats.
    void (*pack_cells)(const float* const* cells, int count, int dim, bool exact, void* page);
    // scores[page][row][slot] = query[row] . cell, for sixteen rows of `dim` floats, dim a multiple of 16.
    void (*score_strip)(const float* query, int dim, bool exact, const void* pages, int num_pages, float* scores);
    void (*score_row)(const RowScoreCall& call);
    void (*open_cells)(const OpenCall& call);
    float (*largest_of_run)(const float* x, size_t count);
    void (*round_run)(const float* x, size_t count, const RoundingRange& range, uint8_t* out);
    void (*depthwise)(const DepthwiseCall& call);
    void (*reduce)(const ReduceCall& call);
    double (*read_bytes)(const uint8_t* data, size_t num_bytes);
    void (*pack_panel)(uint8_t* blob, int panel, float* rows);
    void (*unpack_channel)(const Linear& weight, int channel, float* out);
};

const KernelTable& generic_kernels();
#if defined(__x86_64__)
const KernelTable& avx2_kernels();
const KernelTable& avx512_kernels();
const KernelTable& amx_kernels();
#endif

// The table in use; chosen from what the processor and the operating system offer, or by `select_kernels`.
const KernelTable& kernels();
// Throws std::invalid_argument for a name that this processor cannot run.
void select_kernels(const char* name);

}  // namespace dseek
