// Collectives between processes of one host over a shared segment that all of them have mapped.
//
// The segment holds, for each rank, a line of counters and three slots, and for each ordered pair of ranks a ring of
// cells (transport_messages.h). A tensor passes through the slots block by block, so that blocks stay in the cache:
// its owner writes a block into a slot, the others reduce or copy straight from there. Tensors that lie in a shared
// region are read and written where they are.
//
// Every rank calls the same operations in the same order. Ranks wait for each other at barriers: a rank's `arrived`
// counts the barriers it has reached. Between the last read of a slot and its next writing lie at least two of them,
// because a slot is used again three blocks later and every block has its own.
//
// A wait spins for a moment, then sleeps in the kernel and looks every few milliseconds whether a peer has died, left
// or failed. Such an error, a timeout or an interrupt breaks the segment for all.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "common/kernels.h"

namespace dseek {

constexpr int kMostRanks = 64;
constexpr int kSlots = 3;
constexpr int kCells = 4;
constexpr size_t kCellBytes = 64 << 10;
constexpr size_t kSmallestSlot = 16 << 10;
constexpr size_t kLineBytes = 128;  // two cache lines: processors fetch neighbours in pairs

enum class Operation : uint32_t { barrier, all_reduce, reduce, reduce_scatter, all_gather, broadcast, all_to_all };

// What a rank is about to do, for the others to compare.
struct Announcement {
    uint64_t sequence;
    uint32_t operation, element, reduction, root;
    uint64_t num_bytes;  // of the whole tensor, or 0 where ranks may differ
    int64_t region;  // that the tensor lies in, or -1
    uint64_t offset;
};

struct alignas(kLineBytes) RankLine {
    std::atomic<uint32_t> arrived;
    std::atomic<uint32_t> sleepers;
    std::atomic<uint32_t> has_left;
    std::atomic<uint32_t> is_broken;
    alignas(kLineBytes) std::atomic<uint32_t> bell;  // rung where a message for this rank, or room for one, came
    std::atomic<uint32_t> bell_sleepers;
    alignas(kLineBytes) Announcement announced[4];
};

struct SegmentHeader {
    char magic[8];
    uint64_t token, num_bytes;
    uint32_t world_size, slot_bytes;
};

struct RingLine {
    alignas(kLineBytes) std::atomic<uint64_t> written;
    alignas(kLineBytes) std::atomic<uint64_t> read;
};

struct alignas(64) CellHeader {
    uint64_t message_bytes;
    uint32_t tag, num_bytes;
};

// Where things lie; the same computation on every rank.
struct SegmentLayout {
    SegmentLayout(int world_size, size_t slot_bytes);
    size_t lines, slots, rings, cells, num_bytes;
};

// A place that all ranks have mapped, such that peers read and write each other's tensors.
struct SharedRegion {
    std::vector<uint8_t*> of_rank;
    size_t num_bytes = 0;
};

// Called every few milliseconds of waiting; throws to end it.
using OnTick = void (*)();

class Segment {
public:
    // Maps the segment behind a file descriptor, which stays the caller's. The creator (rank 0) writes the header.
    // `peers` are process file descriptors by rank, -1 for this one. Throws std::runtime_error.
    Segment(int descriptor, int rank, int world_size, size_t slot_bytes, uint64_t token, std::vector<int> peers);
    ~Segment();
    Segment(const Segment&) = delete;
    Segment& operator=(const Segment&) = delete;

    // All sizes in bytes but `count`. They return when this rank's part is done and its tensors may be used again.
    void barrier();
    void all_reduce(uint8_t* data, size_t count, Element element, Reduction reduction);
    void reduce(uint8_t* data, size_t count, Element element, Reduction reduction, int root);
    void reduce_scatter(const std::vector<const uint8_t*>& inputs, uint8_t* out, size_t count, Element element,
                        Reduction reduction);
    void all_gather(const uint8_t* input, const std::vector<uint8_t*>& outs, const std::vector<size_t>& num_bytes);
    void broadcast(uint8_t* data, size_t num_bytes, int root);
    void all_to_all(const std::vector<const uint8_t*>& inputs, const std::vector<size_t>& input_bytes,
                    const std::vector<uint8_t*>& outs, const std::vector<size_t>& out_bytes);

    // Takes a region that all ranks have mapped, as the same number on all.
    void add_region(SharedRegion region) { regions_.push_back(std::move(region)); }
    // Tells the others that this rank will not call anything any more.
    void leave();

    double timeout_s = 1800., message_timeout_s = 1800.;
    OnTick on_tick = nullptr;

    int rank() const { return rank_; }
    int world_size() const { return world_size_; }
    RingLine& ring(int source, int destination) const;
    uint8_t* cell(int source, int destination, uint64_t index) const;
    RankLine& line(int rank) const;
    void ring_bell(int rank);
    // Sleeps until this rank's bell is no longer `seen`, at most some milliseconds.
    void wait_for_bell(uint32_t seen, bool may_spin);
    // Why nothing more will come from a rank, or an empty text.
    std::string loss_of(int rank) const;
    // Marks the segment as unusable and throws.
    [[noreturn]] void fail(const std::string& message);

private:
    uint8_t* slot(int rank, uint64_t block) const;
    void announce(Operation operation, uint64_t num_bytes, Element element, Reduction reduction, int root,
                  const void* data);
    void compare_announcements();
    const Announcement& announcement_of(int rank) const;
    // Where every rank's tensor lies, as this process sees it; empty unless all of them lie in regions.
    std::vector<uint8_t*> shared_tensors() const;
    void meet();
    void wait_for(int rank, uint32_t arrived);
    std::string first_loss(uint32_t arrived) const;

    uint8_t* base_ = nullptr;
    int rank_, world_size_;
    size_t slot_bytes_;
    SegmentLayout layout_;
    std::vector<int> peers_;
    std::vector<SharedRegion> regions_;
    uint64_t sequence_ = 0, block_ = 0;
    uint32_t arrived_ = 0;
    int num_spins_;
};

// Tells sleepers of a counter that it has changed; another process may be among them.
void wake_sleepers(std::atomic<uint32_t>& counter);
// Sleeps until a counter is no longer `seen`, at most `milliseconds`.
void sleep_on(std::atomic<uint32_t>& counter, uint32_t seen, int milliseconds);
// Copies past the cache where `far`, for what is not read again soon.
void copy_bytes(uint8_t* out, const uint8_t* source, size_t num_bytes, bool far);
size_t element_bytes(Element element);

}  // namespace dseek
