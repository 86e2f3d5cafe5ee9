// Attention of the decoder: its patterns, what each row attends to, and the parts of a long context joined again.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "decoder.h"

namespace dseek {
namespace {

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

}  // namespace

void Decoder::check_look(int layer, int kv_head, const int32_t* pages, int num_pages, int block, bool by_rows) const {
    if (patterns_.empty() || pyramid_.empty()) refuse("no layer has a pattern");
    if (layer < 0 || layer >= shape_.num_layers || kv_head < 0 || kv_head >= shape_.num_kv_heads ||
        !patterns_[layer].active() || patterns_[layer].budget(kv_head).by_rows() != by_rows) {
        refuse("there is no such layer or key-value head with such a pattern");
    }
    if (block < 0 || block >= num_pages) refuse("the page table does not reach that block");
    for (int i = 0; i < num_pages; ++i) {
        if (pages[i] < 0 || pages[i] >= num_pages_) refuse("page " + std::to_string(pages[i]) + " is out of range");
    }
}

Selection Decoder::selection(int layer, int kv_head, const int32_t* pages, int num_pages, int query_block) {
    check_look(layer, kv_head, pages, num_pages, query_block, false);
    SelectionRoom room;
    pyramid_.reserve(room, shape_.num_heads / shape_.num_kv_heads);
    const HeadView head{cache_.data() + layout_.offset(0, layer, kv_head), pages, layer, kv_head};
    pyramid_.recall(head, query_block, patterns_[layer].budget(kv_head), room);
    return room.selection;
}

RowSelection Decoder::row_selection(int layer, int kv_head, const int32_t* pages, int num_pages, int position) {
    if (position < 0) refuse("there is no position " + std::to_string(position));
    check_look(layer, kv_head, pages, num_pages, position / kPageTokens, true);
    const HeadView head{cache_.data() + layout_.offset(0, layer, kv_head), pages, layer, kv_head};
    return pyramid_.recall_rows(head, position, patterns_[layer].budget(kv_head));
}

void Decoder::set_pattern(int layer, DynamicPattern pattern) {
    if (num_pages_ > 0) refuse("a layer's pattern must be set before the cache is allocated");
    if (layer < 0 || layer >= shape_.num_layers) refuse("there is no layer " + std::to_string(layer));
    if (static_cast<int>(pattern.near_blocks.size()) != shape_.num_kv_heads) {
        refuse("a pattern needs a window for each of the " + std::to_string(shape_.num_kv_heads) + " key-value heads");
    }
    for (const int blocks : pattern.near_blocks) {
        if (blocks < 0 || blocks > 1 << 20) refuse("a window of " + std::to_string(blocks) + " blocks is out of range");
    }
    const bool by_rows = pattern.budget(0).by_rows();
    if (pattern.gate.active() && (!by_rows || pattern.gate.head_dim != shape_.head_dim)) {
        refuse("a gate of another head width, or without a least share to select by");
    }
    if (by_rows && shape_.num_heads / shape_.num_kv_heads > kMostHeadsOfGroup) {
        refuse("a selection by rows needs groups of at most " + std::to_string(kMostHeadsOfGroup) + " heads");
    }
    patterns_.resize(static_cast<size_t>(shape_.num_layers));
    patterns_[layer] = std::move(pattern);
}

void Decoder::attend(const Batch& batch, const BlockWeights& block, int layer, const AttentionTask& task,
                     Worker& worker) {
    const int d = shape_.head_dim, heads = shape_.num_heads / shape_.num_kv_heads;
    const size_t query_size = static_cast<size_t>(shape_.num_heads) * d;
    const size_t group_offset = static_cast<size_t>(task.kv_head) * heads * d;
    const int position = batch.positions[task.row_begin];
    const int32_t* pages = batch.page_tables + static_cast<size_t>(task.sequence) * batch.pages_per_sequence;
    float* row = qkv_.as<float>() + static_cast<size_t>(task.row_begin) * qkv_stride_;

    AttentionCall call;
    call.layout = &layout_;
    call.cache = cache_.data() + layout_.offset(0, layer, task.kv_head);
    call.pages = pages;
    call.query = row + group_offset;
    call.query_stride = qkv_stride_;
    call.out = attended_.as<float>() + static_cast<size_t>(task.row_begin) * query_size + group_offset;
    call.out_stride = query_size;
    call.num_heads = heads;
    call.first_position = position;
    call.num_rows = task.num_rows;
    call.step_rows = batch.row_starts[task.sequence + 1] - batch.row_starts[task.sequence];
    call.window = block.window;
    call.scale = 1.f / std::sqrt(static_cast<float>(d));
    call.page_begin = task.page_begin;
    call.page_end = task.page_end;
    if (single_rows_ && !by_rows_) {
        // A lone row has not been rotated yet: this task does it for its own heads, in memory of its own.
        const float* cos = cos_ + static_cast<size_t>(position) * (d / 2);
        const float* sin = sin_ + static_cast<size_t>(position) * (d / 2);
        const auto turn = [&](const float* source, const float* norm, float* target) {
            if (norm != nullptr) table_->rms_norm(source, norm, shape_.epsilon, d, target);
            else std::memcpy(target, source, static_cast<size_t>(d) * 4);
            table_->rotary(target, cos, sin, d);
        };
        float* query = worker.query.as<float>();
        if (task.holds_newest) {
            const float* key = row + query_size + static_cast<size_t>(task.kv_head) * d;
            turn(key, block.key_norm, query);
            uint8_t* page = cache_.data() + layout_.offset(pages[position / kPageTokens], layer, task.kv_head);
            table_->store_tokens(layout_, page, position % kPageTokens, 1, query,
                                 key + static_cast<size_t>(shape_.num_kv_heads) * d, 0);
        }
        for (int head = 0; head < heads; ++head) {
            turn(row + group_offset + static_cast<size_t>(head) * d, block.query_norm,
                 query + static_cast<size_t>(head) * d);
        }
        call.query = query;
    }
    const bool selects = !patterns_.empty() && patterns_[layer].active();
    if (selects && patterns_[layer].min_share > 0.f && task.split < 0) {
        attend_by_rows(batch, layer, task, worker, call);
        return;
    }
    if (selects) choose_blocks(batch, layer, task, worker, call);
    if (task.split >= 0) {
        const size_t slot =
            split_start_[task.row_begin] + static_cast<size_t>(task.split) * shape_.num_kv_heads + task.kv_head;
        call.out = partial_out_.as<float>() + slot * heads * d;
        call.partial_max = partial_max_.as<float>() + slot * heads;
        call.partial_sum = partial_sum_.as<float>() + slot * heads;
        const bool sees_nothing = block.window > 0 && task.page_end * kPageTokens <= position - block.window + 1;
        if (sees_nothing || (call.blocks != nullptr && call.page_begin == call.page_end && call.far.count == 0)) {
            std::fill(call.partial_max, call.partial_max + heads, -1e30f);
            std::fill(call.partial_sum, call.partial_sum + heads, 0.f);
            std::memset(call.out, 0, static_cast<size_t>(heads) * d * 4);
            return;
        }
    }
    table_->attention(call);
}

void Decoder::find_new_blocks(const Batch& batch) {
    new_blocks_.clear();
    if (patterns_.empty()) return;
    const auto add = [&](const int32_t* tables, int sequence, int begin, int end) {
        const int32_t* pages = tables + static_cast<size_t>(sequence) * batch.pages_per_sequence;
        if (begin % kPageTokens == 0 && begin > 0) {
            // Sequences that go on from a page that they share would all seal the cells that end with it at once.
            const int block = begin / kPageTokens;
            const auto seals_the_same = [&](const NewBlock& fresh) {
                return fresh.block == block && fresh.pages[block - 1] == pages[block - 1];
            };
            if (std::any_of(new_blocks_.begin(), new_blocks_.end(), seals_the_same)) begin += kPageTokens;
        }
        for (int block = begin / kPageTokens + (begin % kPageTokens > 0); block <= (end - 1) / kPageTokens; ++block) {
            new_blocks_.push_back({pages, block});
        }
    };
    for (int w = 0; w < batch.num_wholes; ++w) {
        add(batch.whole_page_tables, w, batch.whole_positions[2 * w], batch.whole_positions[2 * w + 1]);
    }
    if (batch.num_wholes > 0) return;
    for (int s = 0; s < batch.num_sequences; ++s) {
        const int begin = batch.positions[batch.row_starts[s]];
        add(batch.page_tables, s, begin, begin + batch.row_starts[s + 1] - batch.row_starts[s]);
    }
}

void Decoder::seal_blocks(int layer, int thread_idx, int& stage) {
    if (new_blocks_.empty() || !patterns_[layer].active()) return;
    const int groups = shape_.num_kv_heads;
    for (int level = 0; level <= pyramid_.top(); ++level) {
        // Upper levels have work for few blocks; whether there is any is the same for all threads.
        const auto ends = [&](const NewBlock& fresh) {
            return fresh.block > 0 && Pyramid::ends_cell(fresh.block - 1, level);
        };
        if (std::none_of(new_blocks_.begin(), new_blocks_.end(), ends)) continue;
        share_out(static_cast<int>(new_blocks_.size()) * groups, thread_idx, stage, [&](int task) {
            const NewBlock& fresh = new_blocks_[task / groups];
            if (!ends(fresh)) return;
            const int g = task % groups;
            pyramid_.seal({cache_.data() + layout_.offset(0, layer, g), fresh.pages, layer, g}, fresh.block - 1, level,
                          patterns_[layer].gate);
        });
        meet(thread_idx);
    }
    mark(thread_idx, layer, Operator::select);
}

void Decoder::choose_blocks(const Batch& batch, int layer, const AttentionTask& task, Worker& worker,
                            AttentionCall& call) {
    const DynamicPattern& pattern = patterns_[layer];
    const int position = batch.positions[task.row_begin], block = position / kPageTokens;
    const int heads = call.num_heads, first_head = task.kv_head * heads;
    const Budget budget = pattern.budget(task.kv_head);
    SelectionRoom& room = worker.selection;
    const HeadView head{call.cache, call.pages, layer, task.kv_head};
    if (budget.by_rows()) {  // of a lone row, in parts
        pyramid_.select_rows(head, {position, 1, call.query, call.query_stride, heads, false, task.holds_newest},
                             budget, pattern.gate, room);
    } else if (position % kPageTokens == 0) {
        pyramid_.select(head, block, budget, call.query, heads, room);
    } else {
        pyramid_.recall(head, block, budget, room);
    }
    const std::vector<int32_t>& blocks = budget.by_rows() ? room.by_rows.blocks : room.selection.blocks;
    call.blocks = blocks.data();
    call.num_blocks = static_cast<int>(blocks.size());
    if (task.split >= 0) {
        const int splits = row_splits_[task.row_begin];
        call.page_begin = call.num_blocks * task.split / splits;
        call.page_end = call.num_blocks * (task.split + 1) / splits;
    }
    // The newest part brings the far cells.
    if (pattern.far && task.holds_newest) {
        const float* bias = pattern.level_bias.empty()
                                ? nullptr
                                : pattern.level_bias.data() + static_cast<size_t>(first_head) * (pyramid_.top() + 1);
        call.far = pyramid_.gather_far(head, heads, bias, call.scale, room);
    }
}

void Decoder::attend_by_rows(const Batch& batch, int layer, const AttentionTask& task, Worker& worker,
                             const AttentionCall& whole) {
    const DynamicPattern& pattern = patterns_[layer];
    const Budget budget = pattern.budget(task.kv_head);
    const HeadView head{whole.cache, whole.pages, layer, task.kv_head};
    RowSelection& chosen = worker.selection.by_rows;
    for (int row = 0; row < task.num_rows;) {
        const int position = batch.positions[task.row_begin] + row, before = position % kStripRows;
        AttentionCall call = whole;
        call.first_position = position;
        call.num_rows = std::min(kStripRows - before, task.num_rows - row);
        call.query += row * call.query_stride;
        call.out += row * call.out_stride;
        pyramid_.select_rows(head, {position, call.num_rows, call.query, call.query_stride, call.num_heads, row > 0},
                             budget, pattern.gate, worker.selection);
        for (uint8_t& from : chosen.from_rows) from = static_cast<uint8_t>(std::max(0, from - before));
        call.blocks = chosen.blocks.data();
        call.from_rows = chosen.from_rows.data();
        call.num_blocks = static_cast<int>(chosen.blocks.size());
        table_->attention(call);
        row += call.num_rows;
    }
}

// Joins the parts of a row's context by their maxima and sums (Dao et al. 2023, Flash-Decoding).
void Decoder::merge_splits(int row, float* out) const {
    const int splits = row_splits_[row];
    const int d = shape_.head_dim, groups = shape_.num_kv_heads, heads = shape_.num_heads / groups;
    for (int head = 0; head < shape_.num_heads; ++head) {
        const auto slot = [&](int split) {
            return (split_start_[row] + static_cast<size_t>(split) * groups + head / heads) * heads + head % heads;
        };
        float largest = partial_max_.as<float>()[slot(0)];
        for (int split = 1; split < splits; ++split) largest = std::max(largest, partial_max_.as<float>()[slot(split)]);
        float total = 0.f;
        float* target = out + static_cast<size_t>(head) * d;
        std::memset(target, 0, static_cast<size_t>(d) * 4);
        for (int split = 0; split < splits; ++split) {
            const float factor = std::exp2(partial_max_.as<float>()[slot(split)] - largest);
            total += factor * partial_sum_.as<float>()[slot(split)];
            const float* part = partial_out_.as<float>() + slot(split) * d;
            for (int i = 0; i < d; ++i) target[i] += factor * part[i];
        }
        for (int i = 0; i < d; ++i) target[i] /= total;
    }
}

}  // namespace dseek
