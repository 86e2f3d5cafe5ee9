#include "pages.h"

#include <sys/mman.h>

#include <new>
#include <utility>

namespace dseek {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kWorthIt = size_t{256} << 10;  // smaller blocks are reached through few small pages

// What a block takes: blocks that are worth it are whole huge pages, or the last part of one would be small pages.
size_t mapped_bytes(size_t num_bytes) {
    return num_bytes < kWorthIt ? num_bytes : (num_bytes + kHugePage - 1) / kHugePage * kHugePage;
}

uint8_t* map(size_t num_bytes) {
    void* address = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (address == MAP_FAILED) throw std::bad_alloc();
    return static_cast<uint8_t*>(address);
}

}  // namespace

Pages::Pages(size_t num_bytes) : size_(num_bytes) {
    if (num_bytes == 0) return;
    const size_t wanted = mapped_bytes(num_bytes);
    if (num_bytes < kWorthIt) {
        data_ = map(wanted);
        return;
    }
    // One page too many, then the ends that stick out of the aligned part are given back.
    uint8_t* address = map(wanted + kHugePage);
    const size_t lead = (kHugePage - reinterpret_cast<uintptr_t>(address) % kHugePage) % kHugePage;
    if (lead > 0) munmap(address, lead);
    if (lead < kHugePage) munmap(address + lead + wanted, kHugePage - lead);
    data_ = address + lead;
    madvise(data_, wanted, MADV_HUGEPAGE);
}

Pages::~Pages() {
    if (data_ != nullptr) munmap(data_, mapped_bytes(size_));
}

Pages::Pages(Pages&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

Pages& Pages::operator=(Pages&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
}

}  // namespace dseek
