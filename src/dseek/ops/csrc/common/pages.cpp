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

}  // namespace

Pages::Pages(size_t num_bytes) : size_(num_bytes) {
    if (num_bytes == 0) return;
    if (num_bytes > SIZE_MAX - 2 * kZone) throw std::bad_alloc();
    void* address = mmap(nullptr, num_bytes + 2 * kZone, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (address == MAP_FAILED) throw std::bad_alloc();
    if (num_bytes >= kHugePage) madvise(address, num_bytes, MADV_HUGEPAGE);
    data_ = static_cast<uint8_t*>(address) + kZone;
    set_zones(data_, size_, true);
}

Pages::~Pages() {
    if (data_ == nullptr) return;
    set_zones(data_, size_, false);
    munmap(data_ - kZone, size_ + 2 * kZone);
}

Pages::Pages(Pages&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

Pages& Pages::operator=(Pages&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
}

}  // namespace dseek
