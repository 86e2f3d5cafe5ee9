// Prepared activations together with their memory.
#pragma once

#include <cassert>

#include "kernels.h"
#include "pages.h"

namespace dseek {

struct RowBuffer {
    Rows rows;
    Pages memory;

    // What `lay_out` needs.
    static size_t bytes(const Linear& weight, RowKind kind, int num_rows) {
        return Sizes(weight, kind, num_rows).total();
    }

    // Points `rows` into the memory, which must be large enough.
    void lay_out(const Linear& weight, RowKind kind, int num_rows) {
        assert(bytes(weight, kind, num_rows) <= memory.size());
        rows = rows_in(memory.data(), weight, kind, num_rows);
    }

    // The same in memory of somebody else's, 64-byte aligned.
    static Rows rows_in(uint8_t* base, const Linear& weight, RowKind kind, int num_rows) {
        const Sizes sizes(weight, kind, num_rows);
        Rows rows;
        rows.kind = kind;
        rows.values = base;
        rows.stride = sizes.row / sizes.width;
        rows.scale = reinterpret_cast<float*>(base + sizes.values);
        rows.group_scale = reinterpret_cast<float*>(base + sizes.values + sizes.scales);
        rows.group_sum = reinterpret_cast<float*>(base + sizes.values + sizes.scales + sizes.groups);
        rows.groups = sizes.num_groups;
        return rows;
    }

private:
    struct Sizes {
        size_t width, row, values, scales, groups;
        int num_groups;

        Sizes(const Linear& weight, RowKind kind, int num_rows) {
            constexpr int kTilePadding = 32;  // tiles read whole blocks of rows
            constexpr size_t kLine = 64;
            width = kind == RowKind::f32 ? 4 : kind == RowKind::bf16 ? 2 : 1;
            // An odd number of cache lines between rows keeps the rows of a tile out of each other's cache sets.
            row = round_up_size(static_cast<size_t>(weight.k_padded) * width, kLine);
            if (row / kLine % 2 == 0) row += kLine;
            num_groups = weight.k_padded / kGroup;
            values = row * static_cast<size_t>(num_rows + kTilePadding);
            scales = round_up_size(static_cast<size_t>(num_rows) * 4, kLine);
            groups =
                kind == RowKind::group_s8 ? round_up_size(static_cast<size_t>(num_rows) * num_groups * 4, kLine) : 0;
        }
        size_t total() const { return values + scales + 2 * groups; }
    };
};

}  // namespace dseek
