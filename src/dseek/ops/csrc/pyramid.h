// The pyramid of one paged cache: means of cells, and what every query block has opened.
//
// All of it hangs on pages, beside the keys and values, so that a sequence's pages are all there is to know about it: a
// cell's means lie with the page of its last block, a query block's openings with its own page. Sharing a prefix shares
// both, and dropping the newest tokens drops both.
#pragma once

#include <algorithm>
#include <vector>

#include "common/cells.h"
#include "common/kernels.h"
#include "common/pages.h"
#include "gate.h"

namespace dseek {

// How the heads of a layer attend.
struct DynamicPattern {
    std::vector<int> near_blocks;  // [kv heads], window in blocks
    int top_blocks = 0;  // opened at every level; 0 leaves the window and the first block
    bool far = false;
    float min_share = 0.f;  // see Budget; whether it is above 0 holds for all heads
    std::vector<float> level_bias;  // [heads][levels], natural logarithm; empty: zeros
    Gate gate;  // of a selection by rows; not active: cells are scored by their mean keys

    bool active() const { return !near_blocks.empty(); }
    std::vector<float> min_shares;  // [kv heads], above 0; empty: `min_share` for all

    Budget budget(int kv_head) const {
        return {near_blocks[kv_head], top_blocks, far, min_shares.empty() ? min_share : min_shares[kv_head]};
    }
};

// One key-value head of a sequence in a layer.
struct HeadView {
    const uint8_t* cache = nullptr;  // moved to the layer and head
    const int32_t* pages = nullptr;  // of the sequence
    int layer = 0, kv_head = 0;
};

// Working memory of a selection by rows.
struct RowRoom {
    struct Opened {
        int32_t index;
        uint8_t from;  // row
    };
    std::vector<Opened> opened, next_opened;
    std::vector<int32_t> cells;  // candidates of a level
    std::vector<const float*> keys;
    std::vector<float> bias, turned;
    std::vector<uint8_t> seen_from, opened_from;
    Pages packed, query, scores;
    bool is_packed = false;  // whether `packed` holds the cells of the level that was met last
    float rest[kMostHeadsOfGroup * kStripRows] = {};  // [heads][16]
};

// Rows of one strip of sixteen, for all heads of a group.
struct StripQuery {
    int first_position = 0;
    int num_rows = 0;
    const float* query = nullptr;  // row r, head h at query + r * stride + h * d, rotated
    size_t stride = 0;
    int num_heads = 0;
    bool follows = false;  // the strip before it, of the same block and call, was selected last
    bool keep = true;  // whether what is opened is written down
};

// Working memory of one thread: a selection with its far cells gathered into pages.
struct SelectionRoom {
    Selection selection;
    DescentRoom descent;
    std::vector<const float*> means;
    std::vector<float> scores;
    std::vector<uint64_t> order;
    std::vector<float> rows;  // [64][2][d], means of a page of far cells
    Pages far_pages;
    std::vector<float> far_bias;
    RowRoom rows_room;
    RowSelection by_rows;
};

class Pyramid {
public:
    Pyramid() = default;
    // Throws std::invalid_argument for more openings than a record may hold. `gate_dim` is 0 where no layer has a gate.
    // `row_blocks` is what a selection by rows may open, 0 where no layer has one.
    Pyramid(const CacheLayout& layout, int num_pages, int64_t num_tokens, int top_blocks, int row_blocks, int gate_dim);

    // What gates need; set before the first cell is sealed.
    GateRotation rotation;

    bool empty() const { return num_pages_ == 0; }
    int top() const { return top_; }
    size_t bytes() const { return memory_.size(); }
    // All records: one a page, layer and key-value head, in this order.
    uint8_t* records() const { return memory_.data(); }
    size_t record_bytes() const { return record_bytes_; }
    // What of a record was selected, and so cannot be computed again from keys and values.
    struct Span {
        size_t begin, bytes;
    };
    std::vector<Span> selected() const;
    // Makes room for every selection, so that none has to allocate.
    void reserve(SelectionRoom& room, int num_heads) const;

    // Whether `block` is the last of a cell of this level.
    static bool ends_cell(int block, int level) { return (block + 1) % cell_blocks(level) == 0; }
    // Computes the means of the cell of `level` that ends with `block`; those of the level below must be there.
    void seal(const HeadView& head, int block, int level, const Gate& gate);
    // Scores cells by the queries of the block's first position ([num_heads][d], rotated, one after the other), opens
    // the best of each level and keeps their indices with the block's page. A cell's score is the largest q . mean key
    // of the group's heads; its tokens do not matter among cells of one level.
    void select(const HeadView& head, int query_block, const Budget& budget, const float* query, int num_heads,
                SelectionRoom& room);
    // The same selection again, from what was kept.
    void recall(const HeadView& head, int query_block, const Budget& budget, SelectionRoom& room) const;
    // Lets the rows of a strip open cells, after the strip's earlier rows; fills `room.by_rows`.
    void select_rows(const HeadView& head, const StripQuery& strip, const Budget& budget, const Gate& gate,
                     SelectionRoom& room);
    // What the rows of a strip up to the one at `position` attend to, from what was kept.
    RowSelection recall_rows(const HeadView& head, int position, const Budget& budget) const;
    // Lays the far cells of the selection out as pages. `level_bias` is [num_heads][levels], or null.
    FarCells gather_far(const HeadView& head, int num_heads, const float* level_bias, float scale,
                        SelectionRoom& room) const;

private:
    // Where a descent starts: what came before decides, not how long the sequence will become.
    int top_at(int query_block) const {
        return std::min(top_, top_level(static_cast<int64_t>(query_block) * kPageTokens));
    }
    uint8_t* record(const HeadView& head, int block) const;
    float* means(const HeadView& head, const Cell& cell) const;
    // [3][d], then what rows score: the mean key [d] and the gate's key [dim].
    float* statistics(const HeadView& head, const Cell& cell) const;
    int32_t* openings(const HeadView& head, int block, int level) const;  // count, then indices
    int32_t* strip_openings(const HeadView& head, int position, int level) const;  // count, then index << 4 | row
    void reserve_rows(SelectionRoom& selection, int num_heads) const;
    void set_query(const HeadView& head, const StripQuery& strip, const Gate& gate, RowRoom& room) const;
    void open_level(const HeadView& head, const StripQuery& strip, const Budget& budget, const Gate& gate, int level,
                    RowRoom& room);

    CacheLayout layout_, far_layout_;
    int num_pages_ = 0, top_ = 0, top_blocks_ = 0, most_far_ = 0, row_blocks_ = 0, row_top_ = 0, gate_dim_ = 0;
    size_t means_bytes_ = 0, openings_bytes_ = 0, statistics_bytes_ = 0, strip_bytes_ = 0, strips_offset_ = 0,
           record_bytes_ = 0;
    Pages memory_;
};

}  // namespace dseek
