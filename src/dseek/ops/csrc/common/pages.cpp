#include "pages.h"

#include <sys/mman.h>

#include <new>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace dseek {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kWorthIt = size_t{256} << 10;  // smaller ones are reached through few small pages

// AddressSanitizer does not know where mapped memory ends. Under it the memory lies between two poisoned zones, so that
// a step past either end is seen to the byte.
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kZone = 4096;
#else
constexpr size_t kZone = 0;
#endif

void set_zones([[maybe_unused]] uint8_t* data, [[maybe_unused]] size_t num_bytes, [[maybe_unused]] bool poisoned) {
#if defined(__SANITIZE_ADDRESS__)
    if (poisoned) {
        __asan_poison_memory_region(data - kZone, kZone);
        __asan_poison_memory_region(data + num_bytes, kZone);
    } else {
        __asan_unpoison_memory_region(data - kZone, num_bytes + 2 * kZone);
    }
#endif
}

uint8_t* map(size_t num_bytes) {
    void* address = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (address == MAP_FAILED) throw std::bad_alloc();
    return static_cast<uint8_t*>(address);
}

}  // namespace

Pages::Pages(size_t num_bytes) : size_(num_bytes), mapped_(num_bytes) {
    if (num_bytes == 0) return;
    if (num_bytes > SIZE_MAX - 2 * kZone) throw std::bad_alloc();
    uint8_t* address = map(num_bytes + 2 * kZone);
    if (num_bytes >= kHugePage) madvise(address, num_bytes, MADV_HUGEPAGE);
    data_ = address + kZone;
    set_zones(data_, size_, true);
}

Pages Pages::huge(size_t num_bytes) {
    if (num_bytes < kWorthIt || num_bytes > SIZE_MAX / 2 || kZone > 0) return Pages(num_bytes);
    // One page too many, then the ends that stick out of the aligned part are given back.
    const size_t wanted = (num_bytes + kHugePage - 1) / kHugePage * kHugePage;
    uint8_t* address = map(wanted + kHugePage);
    const size_t lead = (kHugePage - reinterpret_cast<uintptr_t>(address) % kHugePage) % kHugePage;
    if (lead > 0) munmap(address, lead);
    if (lead < kHugePage) munmap(address + lead + wanted, kHugePage - lead);
    Pages pages;
    pages.data_ = address + lead;
    pages.size_ = num_bytes;
    pages.mapped_ = wanted;
    madvise(pages.data_, wanted, MADV_HUGEPAGE);
    return pages;
}

Pages::~Pages() {
    if (data_ == nullptr) return;
    set_zones(data_, size_, false);
    munmap(data_ - kZone, mapped_ + 2 * kZone);
}

Pages::Pages(Pages&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)),
      mapped_(std::exchange(other.mapped_, 0)) {}

Pages& Pages::operator=(Pages&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(mapped_, other.mapped_);
    return *this;
}

}  // namespace dseek
