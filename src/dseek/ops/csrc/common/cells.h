// The pyramid's cells: aligned runs of 1, 8, 64, ... blocks of 64 tokens, and the descent through them.
//
// A query block sees the blocks before it as the largest complete cells that tile them. The descent opens cells from
// the top down; what it visited and did not open stands for its tokens as a whole. Every earlier token is thus counted
// exactly once: in an exact block, or in one far cell.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace dseek {

constexpr int kRadixBits = 3;  // a cell has eight children
constexpr int kMostLevels = 6;

struct Cell {
    int level;
    int index;  // the cell's first block is index * cell_blocks(level)

    friend bool operator==(const Cell&, const Cell&) = default;
};

inline int cell_blocks(int level) { return 1 << (kRadixBits * level); }

// The level of the largest cells that a context of so many tokens is worth: 2 (4096 tokens) up to 128K, then one more
// for each factor of eight.
inline int top_level(int64_t num_tokens) {
    int level = 2;
    for (int64_t reach = int64_t{1} << 17; reach < num_tokens && level + 1 < kMostLevels; reach *= 8) ++level;
    return level;
}

// What a descent may take: the window of a key-value head in blocks, and how many cells each level opens.
struct Budget {
    int near_blocks = 0;
    int top_blocks = 0;
    bool far = false;  // whether cells that stay closed count by their means
    // Where above 0, every row opens for itself the cells that have this share of some head's mass, and a strip of
    // sixteen rows up to `top_blocks` at each level. Otherwise the block's first row opens for all of them.
    float min_share = 0.f;

    bool by_rows() const { return min_share > 0.f; }
};

// How a cell lies to the near window, which is exact anyway, and to the first block, which always is.
enum class CellFate { inside, forced, free };

inline CellFate fate_of(const Cell& cell, int query_block, const Budget& budget) {
    const int near_from = std::max(0, query_block - budget.near_blocks);
    const int first = cell.index * cell_blocks(cell.level), end = first + cell_blocks(cell.level);
    if (first >= near_from || (cell.level == 0 && first == 0)) return CellFate::inside;
    if (end > near_from || first == 0) return CellFate::forced;
    return CellFate::free;
}

// The exact blocks of a strip of rows, ascending, and from which row of the strip on each is attended to.
struct RowSelection {
    std::vector<int32_t> blocks;
    std::vector<uint8_t> from_rows;
};

// Level that a descent by rows starts from: flat while scoring every block costs little, then the lowest level with no
// more than that many cells.
inline int row_top_level(int num_blocks) {
    constexpr int kMostFlat = 256;
    int level = 0;
    while (num_blocks > kMostFlat * cell_blocks(level) && level + 1 < kMostLevels) ++level;
    return level;
}

// The exact blocks of a query block, ascending, its own included, and the far cells.
struct Selection {
    std::vector<int32_t> blocks;
    std::vector<Cell> far;
};

// Working memory of a descent, kept between calls.
struct DescentRoom {
    std::vector<Cell> opened, next_opened, candidates;
    std::vector<int32_t> chosen;
};

// Walks the descent of `query_block` from `top` down and fills `selection`. `open(level, candidates, chosen)` is given
// a level's free candidates, ascending, and appends the indices of those to open to `chosen`, ascending.
template <class Open>
void descend(int query_block, int top, const Budget& budget, const Open& open, Selection& selection,
             DescentRoom& room) {
    selection.blocks.clear();
    selection.far.clear();
    room.opened.clear();
    int tiled = 0;  // blocks that the starting cells so far cover
    for (int level = top; level >= 0; --level) {
        room.candidates.clear();
        room.next_opened.clear();
        const auto meet = [&](const Cell& cell) {
            switch (fate_of(cell, query_block, budget)) {
                case CellFate::inside: return;
                case CellFate::forced: room.next_opened.push_back(cell); return;
                case CellFate::free: room.candidates.push_back(cell); return;
            }
        };
        for (const Cell& parent : room.opened) {
            for (int child = 0; child < 1 << kRadixBits; ++child) meet({level, (parent.index << kRadixBits) + child});
        }
        const int size = cell_blocks(level);
        for (; tiled + size <= query_block; tiled += size) meet({level, tiled / size});
        room.chosen.clear();
        open(level, room.candidates, room.chosen);
        size_t at = 0;
        for (const Cell& cell : room.candidates) {
            if (at < room.chosen.size() && room.chosen[at] == cell.index) {
                room.next_opened.push_back(cell);
                ++at;
            } else if (budget.far) {
                selection.far.push_back(cell);
            }
        }
        std::sort(room.next_opened.begin(), room.next_opened.end(),
                  [](const Cell& a, const Cell& b) { return a.index < b.index; });
        room.opened.swap(room.next_opened);
    }
    const int near_from = std::max(0, query_block - budget.near_blocks);
    if (near_from > 0) selection.blocks.push_back(0);
    for (const Cell& cell : room.opened) selection.blocks.push_back(cell.index);
    for (int block = near_from; block <= query_block; ++block) selection.blocks.push_back(block);
}

// Most cells that a level of a descent may meet, and so most far cells of all levels together.
inline int most_far_cells(int num_blocks, int top, int top_blocks) {
    // A level meets the children of what the level above opened (top_blocks, and two that are forced) and fewer than
    // eight starting cells; the highest meets all its cells.
    const int met = ((top_blocks + 2) << kRadixBits) + (1 << kRadixBits);
    return std::min(num_blocks, num_blocks / cell_blocks(top) + 1 + met * top + (1 << kRadixBits));
}

}  // namespace dseek
