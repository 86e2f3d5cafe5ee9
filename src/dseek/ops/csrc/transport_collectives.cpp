// The collectives of transport.h: which block lies in which slot, who reduces what, and when ranks meet.
#include <algorithm>
#include <cstring>

#include "transport.h"

namespace dseek {
namespace {

constexpr size_t kLine = 64;
constexpr size_t kOneShotBytes = 16 << 10;  // where meeting once less is worth more than reducing everything everywhere
constexpr size_t kFarBytes = 4 << 20;  // outputs beyond this are not read again from the cache

size_t blocks_of(size_t size, size_t block) { return std::max<size_t>(1, (size + block - 1) / block); }

// What a rank reduces of `count` elements: [share_begin(rank), share_begin(rank + 1)), cut between cache lines.
size_t share_begin(size_t count, int rank, int world_size, size_t width) {
    const size_t line = kLine / width;
    return std::min(count, (count * rank / world_size + line - 1) / line * line);
}

}  // namespace

void Segment::barrier() {
    announce(Operation::barrier, 0, Element::uint8, Reduction::sum, 0, nullptr);
    meet();
    compare_announcements();
}

void Segment::all_reduce(uint8_t* data, size_t count, Element element, Reduction reduction) {
    const size_t width = element_bytes(element), num_bytes = count * width;
    announce(Operation::all_reduce, num_bytes, element, reduction, 0, data);
    const void* sources[kMostRanks];
    void* outs[kMostRanks] = {data};
    ReduceCall call{element, reduction, world_size_, 1, sources, outs, count};

    if (num_bytes <= std::min(kOneShotBytes, slot_bytes_)) {
        copy_bytes(slot(rank_, block_), data, num_bytes, false);
        meet();
        compare_announcements();
        for (int rank = 0; rank < world_size_; ++rank) sources[rank] = slot(rank, block_);
        kernels().reduce(call);
        ++block_;
        return;
    }

    meet();
    compare_announcements();
    const std::vector<uint8_t*> shared = shared_tensors();
    if (!shared.empty()) {
        const size_t begin = share_begin(count, rank_, world_size_, width);
        for (int rank = 0; rank < world_size_; ++rank) sources[rank] = outs[rank] = shared[rank] + begin * width;
        call.num_outs = world_size_;
        call.count = share_begin(count, rank_ + 1, world_size_, width) - begin;
        kernels().reduce(call);
        meet();
        return;
    }

    // A step writes one block for the others, reduces this rank's share of the block before it, and fetches the other
    // shares of the one before that. The place of a rank's own share in its slot takes the reduced one.
    const size_t per_block = slot_bytes_ / width, num_blocks = blocks_of(count, per_block);
    for (size_t step = 0; step < num_blocks + 2; ++step) {
        for (size_t stage = 0; stage < 3; ++stage) {
            if (step < stage || step - stage >= num_blocks) continue;
            const size_t index = step - stage, first = index * per_block, size = std::min(per_block, count - first);
            const size_t begin = share_begin(size, rank_, world_size_, width) * width;
            const size_t end = share_begin(size, rank_ + 1, world_size_, width) * width;
            uint8_t *own = slot(rank_, block_ + index), *here = data + first * width;
            if (stage == 0) {
                copy_bytes(own, here, begin, false);
                copy_bytes(own + end, here + end, size * width - end, false);
            } else if (stage == 1) {
                for (int rank = 0; rank < world_size_; ++rank) sources[rank] = slot(rank, block_ + index) + begin;
                sources[rank_] = outs[0] = here + begin;
                outs[1] = own + begin;
                call.num_outs = 2;
                call.count = (end - begin) / width;
                kernels().reduce(call);
            } else {
                for (int rank = 0; rank < world_size_; ++rank) {
                    if (rank == rank_) continue;
                    const size_t from = share_begin(size, rank, world_size_, width) * width;
                    const size_t past = share_begin(size, rank + 1, world_size_, width) * width;
                    copy_bytes(here + from, slot(rank, block_ + index) + from, past - from, false);
                }
            }
        }
        if (step < num_blocks + 1) meet();
    }
    block_ += num_blocks;
}

void Segment::reduce(uint8_t* data, size_t count, Element element, Reduction reduction, int root) {
    const size_t width = element_bytes(element);
    announce(Operation::reduce, count * width, element, reduction, root, nullptr);
    const void* sources[kMostRanks];
    void* outs[1] = {nullptr};
    ReduceCall call{element, reduction, world_size_, 1, sources, outs, count};

    // The root reduces alone, since it alone needs the result, and its own part never moves.
    const size_t per_block = slot_bytes_ / width, num_blocks = blocks_of(count, per_block);
    for (size_t step = 0; step < num_blocks + 1; ++step) {
        if (rank_ != root && step < num_blocks) {
            const size_t first = step * per_block, size = std::min(per_block, count - first);
            copy_bytes(slot(rank_, block_ + step), data + first * width, size * width, false);
        }
        if (rank_ == root && step >= 1) {
            const size_t index = step - 1, first = index * per_block;
            for (int rank = 0; rank < world_size_; ++rank) sources[rank] = slot(rank, block_ + index);
            sources[rank_] = outs[0] = data + first * width;
            call.count = std::min(per_block, count - first);
            kernels().reduce(call);
        }
        if (step < num_blocks) meet();
        if (step == 0) compare_announcements();
    }
    block_ += num_blocks;
}

void Segment::reduce_scatter(const std::vector<const uint8_t*>& inputs, uint8_t* out, size_t count, Element element,
                             Reduction reduction) {
    const size_t width = element_bytes(element), num_bytes = count * width;
    bool is_one_piece = true;
    for (int rank = 0; rank < world_size_; ++rank) {
        is_one_piece = is_one_piece && inputs[rank] == inputs[0] + rank * num_bytes;
    }
    announce(Operation::reduce_scatter, num_bytes * world_size_, element, reduction, 0,
             is_one_piece ? inputs[0] : nullptr);
    const void* sources[kMostRanks];
    void* outs[1] = {out};
    ReduceCall call{element, reduction, world_size_, 1, sources, outs, count};
    const size_t part = slot_bytes_ / world_size_ / kLine * kLine, per_part = part / width;
    const size_t num_blocks = blocks_of(count, per_part);

    if (num_blocks > 1) {
        meet();
        compare_announcements();
        const std::vector<uint8_t*> shared = shared_tensors();
        if (!shared.empty()) {
            for (int rank = 0; rank < world_size_; ++rank) sources[rank] = shared[rank] + rank_ * num_bytes;
            kernels().reduce(call);
            meet();
            return;
        }
    }
    for (size_t step = 0; step < num_blocks + 1; ++step) {
        if (step < num_blocks) {
            const size_t first = step * per_part, size = std::min(per_part, count - first);
            for (int rank = 0; rank < world_size_; ++rank) {
                if (rank == rank_) continue;
                copy_bytes(slot(rank_, block_ + step) + rank * part, inputs[rank] + first * width, size * width, false);
            }
        }
        if (step >= 1) {
            const size_t index = step - 1, first = index * per_part;
            for (int rank = 0; rank < world_size_; ++rank) sources[rank] = slot(rank, block_ + index) + rank_ * part;
            sources[rank_] = inputs[rank_] + first * width;
            outs[0] = out + first * width;
            call.count = std::min(per_part, count - first);
            kernels().reduce(call);
        }
        if (step < num_blocks) meet();
        if (step == 0) compare_announcements();
    }
    block_ += num_blocks;
}

void Segment::all_gather(const uint8_t* input, const std::vector<uint8_t*>& outs,
                         const std::vector<size_t>& num_bytes) {
    const size_t longest = *std::max_element(num_bytes.begin(), num_bytes.end()), own_bytes = num_bytes[rank_];
    const bool is_even = *std::min_element(num_bytes.begin(), num_bytes.end()) == longest;
    const bool far = longest * world_size_ > kFarBytes;
    announce(Operation::all_gather, is_even ? longest : 0, Element::uint8, Reduction::sum, 0,
             is_even ? input : nullptr);
    const size_t num_blocks = blocks_of(longest, slot_bytes_);
    if (num_blocks > 1) {
        meet();
        compare_announcements();
        const std::vector<uint8_t*> shared = shared_tensors();
        if (!shared.empty()) {
            for (int rank = 0; rank < world_size_; ++rank) {
                if (outs[rank] != shared[rank]) copy_bytes(outs[rank], shared[rank], longest, far);
            }
            meet();
            return;
        }
    }
    const auto size_of = [&](int rank, size_t index) {
        const size_t first = index * slot_bytes_;
        return first < num_bytes[rank] ? std::min(slot_bytes_, num_bytes[rank] - first) : 0;
    };
    for (size_t step = 0; step < num_blocks + 1; ++step) {
        if (step < num_blocks && size_of(rank_, step) > 0) {
            copy_bytes(slot(rank_, block_ + step), input + step * slot_bytes_, size_of(rank_, step), false);
        }
        if (step >= 1) {
            const size_t index = step - 1, first = index * slot_bytes_;
            for (int rank = 0; rank < world_size_; ++rank) {
                if (rank == rank_ || size_of(rank, index) == 0) continue;
                copy_bytes(outs[rank] + first, slot(rank, block_ + index), size_of(rank, index), far);
            }
        }
        if (step < num_blocks) meet();
        if (step == 0) compare_announcements();
    }
    if (own_bytes > 0 && outs[rank_] != input) copy_bytes(outs[rank_], input, own_bytes, far);
    block_ += num_blocks;
}

void Segment::broadcast(uint8_t* data, size_t num_bytes, int root) {
    announce(Operation::broadcast, num_bytes, Element::uint8, Reduction::sum, root, data);
    const size_t num_blocks = blocks_of(num_bytes, slot_bytes_);
    const bool far = num_bytes > kFarBytes;
    if (num_blocks > 1) {
        meet();
        compare_announcements();
        if (const std::vector<uint8_t*> shared = shared_tensors(); !shared.empty()) {
            // The giver has a processor, too: of every taker's tensor it writes the first share.
            const size_t given = num_bytes / world_size_ / kLine * kLine;
            for (int rank = 0; rank < world_size_ && rank_ == root; ++rank) {
                if (rank != root) copy_bytes(shared[rank], data, given, far);
            }
            if (rank_ != root) copy_bytes(data + given, shared[root] + given, num_bytes - given, far);
            meet();
            return;
        }
        const Announcement& given = announcement_of(root);
        if (given.region >= 0 && given.region < static_cast<int64_t>(regions_.size()) &&
            given.offset + num_bytes <= regions_[given.region].num_bytes) {
            if (rank_ != root) copy_bytes(data, regions_[given.region].of_rank[root] + given.offset, num_bytes, far);
            meet();
            return;
        }
    }
    for (size_t step = 0; step < num_blocks + 1; ++step) {
        if (rank_ == root && step < num_blocks && num_bytes > 0) {
            const size_t first = step * slot_bytes_;
            copy_bytes(slot(rank_, block_ + step), data + first, std::min(slot_bytes_, num_bytes - first), false);
        }
        if (rank_ != root && step >= 1 && num_bytes > 0) {
            const size_t first = (step - 1) * slot_bytes_;
            copy_bytes(data + first, slot(root, block_ + step - 1), std::min(slot_bytes_, num_bytes - first), far);
        }
        if (step < num_blocks) meet();
        if (step == 0) compare_announcements();
    }
    block_ += num_blocks;
}

void Segment::all_to_all(const std::vector<const uint8_t*>& inputs, const std::vector<size_t>& input_bytes,
                         const std::vector<uint8_t*>& outs, const std::vector<size_t>& out_bytes) {
    announce(Operation::all_to_all, 0, Element::uint8, Reduction::sum, 0, nullptr);
    // 1. Everybody learns the sizes: they say how many blocks there are, and whether both sides mean the same.
    auto* sizes = reinterpret_cast<uint64_t*>(slot(rank_, block_));
    for (int rank = 0; rank < world_size_; ++rank) sizes[rank] = input_bytes[rank];
    meet();
    compare_announcements();
    size_t longest = 0, total = 0;
    for (int source = 0; source < world_size_; ++source) {
        const auto* given = reinterpret_cast<const uint64_t*>(slot(source, block_));
        for (int rank = 0; rank < world_size_; ++rank) {
            if (source != rank) longest = std::max<size_t>(longest, given[rank]);
        }
        if (given[rank_] != out_bytes[source]) {
            fail("rank " + std::to_string(source) + " gives " + std::to_string(given[rank_]) + " bytes to rank " +
                 std::to_string(rank_) + ", which expects " + std::to_string(out_bytes[source]));
        }
        total += out_bytes[source];
    }
    ++block_;

    // 2. Block by block, a slot holding a part for each receiver.
    const bool far = total > kFarBytes;
    const size_t part = slot_bytes_ / world_size_ / kLine * kLine, num_blocks = blocks_of(longest, part);
    for (size_t step = 0; step < num_blocks + 1; ++step) {
        for (int rank = 0; rank < world_size_; ++rank) {
            const size_t first = step * part;
            if (rank == rank_ || first >= input_bytes[rank]) continue;
            copy_bytes(slot(rank_, block_ + step) + rank * part, inputs[rank] + first,
                       std::min(part, input_bytes[rank] - first), false);
        }
        for (int rank = 0; step >= 1 && rank < world_size_; ++rank) {
            const size_t first = (step - 1) * part;
            if (rank == rank_ || first >= out_bytes[rank]) continue;
            copy_bytes(outs[rank] + first, slot(rank, block_ + step - 1) + rank_ * part,
                       std::min(part, out_bytes[rank] - first), far);
        }
        if (step < num_blocks) meet();
    }
    if (out_bytes[rank_] > 0 && outs[rank_] != inputs[rank_]) {
        std::memmove(outs[rank_], inputs[rank_], out_bytes[rank_]);
    }
    block_ += num_blocks;
}

}  // namespace dseek
