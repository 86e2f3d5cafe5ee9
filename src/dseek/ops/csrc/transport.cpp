#include "transport.h"

#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <climits>
#include <cstring>
#include <stdexcept>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dseek {
namespace {

using Clock = std::chrono::steady_clock;

constexpr char kMagic[8] = {'d', 's', 'e', 'e', 'k', 's', 'g', '1'};
constexpr int kTickMilliseconds = 10;
constexpr int kSpins = 4000;  // with a processor for each rank
constexpr int kSpinsWhenCrowded = 40;

size_t rounded_up(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#else
    std::atomic_thread_fence(std::memory_order_seq_cst);
#endif
}

int usable_processors() {
    cpu_set_t set;
    return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
}

const char* name_of(uint32_t operation) {
    constexpr const char* kNames[] = {"barrier",    "all_reduce", "reduce",    "reduce_scatter",
                                      "all_gather", "broadcast",  "all_to_all"};
    return operation < std::size(kNames) ? kNames[operation] : "nothing known";
}

std::string described(const Announcement& announcement) {
    return std::string(name_of(announcement.operation)) + " number " + std::to_string(announcement.sequence) + " (" +
           std::to_string(announcement.num_bytes) + " bytes, element " + std::to_string(announcement.element) +
           ", reduction " + std::to_string(announcement.reduction) + ", root " + std::to_string(announcement.root) +
           ")";
}

}  // namespace

void wake_sleepers(std::atomic<uint32_t>& counter) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&counter), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

void sleep_on(std::atomic<uint32_t>& counter, uint32_t seen, int milliseconds) {
    const timespec limit{milliseconds / 1000, (milliseconds % 1000) * 1000000L};
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&counter), FUTEX_WAIT, seen, &limit, nullptr, 0);
}

size_t element_bytes(Element element) {
    switch (element) {
        case Element::int8:
        case Element::uint8: return 1;
        case Element::bfloat16:
        case Element::float16:
        case Element::int16: return 2;
        case Element::float32:
        case Element::int32: return 4;
        default: return 8;
    }
}

void copy_bytes(uint8_t* out, const uint8_t* source, size_t num_bytes, bool far) {
    if (num_bytes == 0) return;  // an empty tensor may have no address
#if defined(__x86_64__)
    if (far && num_bytes >= 4096) {
        const size_t lead = -reinterpret_cast<uintptr_t>(out) & 63;
        std::memcpy(out, source, lead);
        size_t done = lead;
        for (; done + 64 <= num_bytes; done += 64) {
            for (int part = 0; part < 64; part += 16) {
                _mm_stream_si128(reinterpret_cast<__m128i*>(out + done + part),
                                 _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + done + part)));
            }
        }
        _mm_sfence();
        std::memcpy(out + done, source + done, num_bytes - done);
        return;
    }
#endif
    (void)far;
    std::memcpy(out, source, num_bytes);
}

SegmentLayout::SegmentLayout(int world_size, size_t slot_bytes) {
    const size_t ranks = static_cast<size_t>(world_size), pairs = ranks * ranks;
    lines = 4096;
    slots = rounded_up(lines + ranks * sizeof(RankLine), 4096);
    rings = slots + ranks * kSlots * slot_bytes;
    cells = rounded_up(rings + pairs * sizeof(RingLine), 4096);
    num_bytes = cells + pairs * kCells * (sizeof(CellHeader) + kCellBytes);
}

Segment::Segment(int descriptor, int rank, int world_size, size_t slot_bytes, uint64_t token, std::vector<int> peers)
    : rank_(rank),
      world_size_(world_size),
      slot_bytes_(slot_bytes),
      layout_(world_size, slot_bytes),
      peers_(std::move(peers)),
      num_spins_(usable_processors() >= world_size ? kSpins : kSpinsWhenCrowded) {
    struct stat status;
    if (fstat(descriptor, &status) != 0 || static_cast<size_t>(status.st_size) != layout_.num_bytes) {
        throw std::runtime_error("the shared segment has another size than this rank computes");
    }
    void* mapped = mmap(nullptr, layout_.num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    if (mapped == MAP_FAILED) throw std::runtime_error(std::string("mmap: ") + std::strerror(errno));
    base_ = static_cast<uint8_t*>(mapped);
    auto* header = reinterpret_cast<SegmentHeader*>(base_);
    if (rank_ == 0) {
        std::memcpy(header->magic, kMagic, sizeof kMagic);
        header->token = token;
        header->num_bytes = layout_.num_bytes;
        header->world_size = static_cast<uint32_t>(world_size_);
        header->slot_bytes = static_cast<uint32_t>(slot_bytes_);
    } else if (std::memcmp(header->magic, kMagic, sizeof kMagic) != 0 || header->token != token ||
               header->num_bytes != layout_.num_bytes || header->world_size != static_cast<uint32_t>(world_size_) ||
               header->slot_bytes != static_cast<uint32_t>(slot_bytes_)) {
        munmap(base_, layout_.num_bytes);
        throw std::runtime_error("the shared segment is not the one that rank 0 made");
    }
}

Segment::~Segment() { munmap(base_, layout_.num_bytes); }

RankLine& Segment::line(int rank) const { return reinterpret_cast<RankLine*>(base_ + layout_.lines)[rank]; }

RingLine& Segment::ring(int source, int destination) const {
    return reinterpret_cast<RingLine*>(base_ + layout_.rings)[source * world_size_ + destination];
}

uint8_t* Segment::cell(int source, int destination, uint64_t index) const {
    const size_t ring_idx = static_cast<size_t>(source) * world_size_ + destination;
    return base_ + layout_.cells + (ring_idx * kCells + index % kCells) * (sizeof(CellHeader) + kCellBytes);
}

uint8_t* Segment::slot(int rank, uint64_t block) const {
    return base_ + layout_.slots + (static_cast<size_t>(rank) * kSlots + block % kSlots) * slot_bytes_;
}

std::string Segment::loss_of(int rank) const {
    const std::string name = "rank " + std::to_string(rank);
    pollfd entry{peers_[rank], POLLIN, 0};
    if (rank != rank_ && poll(&entry, 1, 0) > 0 && (entry.revents & POLLIN)) return name + " died";
    if (line(rank).is_broken.load()) return name + " gave up";
    if (line(rank).has_left.load()) return name + " has left the group";
    return "";
}

void Segment::fail(const std::string& message) {
    line(rank_).is_broken.store(1);
    for (int rank = 0; rank < world_size_; ++rank) ring_bell(rank);
    throw std::runtime_error(message);
}

void Segment::leave() {
    line(rank_).has_left.store(1);
    for (int rank = 0; rank < world_size_; ++rank) ring_bell(rank);
}

void Segment::ring_bell(int rank) {
    RankLine& target = line(rank);
    target.bell.fetch_add(1);
    if (target.bell_sleepers.load() != 0) wake_sleepers(target.bell);
}

void Segment::wait_for_bell(uint32_t seen, bool may_spin) {
    RankLine& own = line(rank_);
    for (int spin = may_spin ? num_spins_ : 0; spin > 0; --spin) {
        if (own.bell.load(std::memory_order_acquire) != seen) return;
        relax();
    }
    own.bell_sleepers.fetch_add(1);
    if (own.bell.load() == seen) sleep_on(own.bell, seen, kTickMilliseconds);
    own.bell_sleepers.fetch_sub(1);
}

// Who died explains more than who gave up because of that.
std::string Segment::first_loss(uint32_t arrived) const {
    std::string found;
    for (int peer = 0; peer < world_size_; ++peer) {
        // Who has come already and left since does not matter.
        if (peer == rank_ || static_cast<int32_t>(line(peer).arrived.load() - arrived) >= 0) continue;
        const std::string loss = loss_of(peer);
        if (loss.empty() || static_cast<int32_t>(line(peer).arrived.load() - arrived) >= 0) continue;
        if (found.empty() || loss.ends_with("died")) found = loss;
    }
    return found;
}

// The counters may wrap around, hence the signed differences. The order of `arrived` and `sleepers` is sequentially
// consistent on both sides: either the sleeper sees the new count, or the other sees the sleeper.
void Segment::wait_for(int rank, uint32_t arrived) {
    RankLine& other = line(rank);
    const auto is_there = [&] {
        return static_cast<int32_t>(other.arrived.load(std::memory_order_acquire) - arrived) >= 0;
    };
    for (int spin = 0; spin < num_spins_; ++spin) {
        if (is_there()) return;
        relax();
    }
    const auto start = Clock::now();
    while (true) {
        const uint32_t seen = other.arrived.load();
        if (static_cast<int32_t>(seen - arrived) >= 0) return;
        other.sleepers.fetch_add(1);
        if (other.arrived.load() == seen) sleep_on(other.arrived, seen, kTickMilliseconds);
        other.sleepers.fetch_sub(1);
        if (is_there()) return;
        if (line(rank_).has_left.load()) fail("the group was destroyed while an operation was under way");
        const std::string loss = first_loss(arrived);
        if (!loss.empty()) fail(loss);
        const std::chrono::duration<double> waited = Clock::now() - start;
        if (waited.count() > timeout_s) {
            fail("rank " + std::to_string(rank) + " did not come within " + std::to_string(timeout_s) + " s");
        }
        if (on_tick != nullptr) {
            try {
                on_tick();
            } catch (...) {
                line(rank_).is_broken.store(1);
                throw;
            }
        }
    }
}

void Segment::meet() {
    RankLine& own = line(rank_);
    own.arrived.store(++arrived_);
    if (own.sleepers.load() != 0) wake_sleepers(own.arrived);
    for (int rank = 0; rank < world_size_; ++rank) {
        if (rank != rank_) wait_for(rank, arrived_);
    }
}

void Segment::announce(Operation operation, uint64_t num_bytes, Element element, Reduction reduction, int root,
                       const void* data) {
    if (line(rank_).is_broken.load()) throw std::runtime_error("an earlier operation of this group failed");
    Announcement& own = line(rank_).announced[++sequence_ % 4];
    own = {sequence_,
           static_cast<uint32_t>(operation),
           static_cast<uint32_t>(element),
           static_cast<uint32_t>(reduction),
           static_cast<uint32_t>(root),
           num_bytes,
           -1,
           0};
    const auto address = reinterpret_cast<uintptr_t>(data);
    for (size_t index = 0; index < regions_.size(); ++index) {
        const auto start = reinterpret_cast<uintptr_t>(regions_[index].of_rank[rank_]);
        if (address >= start && address < start + regions_[index].num_bytes) {
            own.region = static_cast<int64_t>(index);
            own.offset = address - start;
        }
    }
}

const Announcement& Segment::announcement_of(int rank) const { return line(rank).announced[sequence_ % 4]; }

void Segment::compare_announcements() {
    const Announcement& own = announcement_of(rank_);
    for (int rank = 0; rank < world_size_; ++rank) {
        const Announcement& other = announcement_of(rank);
        if (other.sequence != own.sequence || other.operation != own.operation || other.element != own.element ||
            other.reduction != own.reduction || other.root != own.root || other.num_bytes != own.num_bytes) {
            fail("rank " + std::to_string(rank_) + " calls " + described(own) + " where rank " + std::to_string(rank) +
                 " calls " + described(other));
        }
    }    // Who gave up after it had come would leave the others to find out at the next call.
    for (int rank = 0; rank < world_size_; ++rank) {
        if (line(rank).is_broken.load()) fail("rank " + std::to_string(rank) + " gave up");
    }
}

std::vector<uint8_t*> Segment::shared_tensors() const {
    std::vector<uint8_t*> tensors;
    for (int rank = 0; rank < world_size_; ++rank) {
        const Announcement& other = announcement_of(rank);
        if (other.region < 0 || other.region >= static_cast<int64_t>(regions_.size())) return {};
        const SharedRegion& region = regions_[other.region];
        if (other.offset > region.num_bytes || other.num_bytes > region.num_bytes - other.offset) return {};
        tensors.push_back(region.of_rank[rank] + other.offset);
    }
    return tensors;
}

}  // namespace dseek
