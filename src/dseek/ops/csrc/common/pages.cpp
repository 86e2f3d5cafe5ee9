#include "pages.h"

#include <sys/mman.h>

#include <new>
#include <utility>

namespace dseek {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

}  // namespace

Pages::Pages(size_t num_bytes) : size_(num_bytes) {
    if (num_bytes == 0) return;
    void* address = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (address == MAP_FAILED) throw std::bad_alloc();
    if (num_bytes >= kHugePage) madvise(address, num_bytes, MADV_HUGEPAGE);
    data_ = static_cast<uint8_t*>(address);
}

Pages::~Pages() {
    if (data_ != nullptr) munmap(data_, size_);
}

Pages::Pages(Pages&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

Pages& Pages::operator=(Pages&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
}

}  // namespace dseek
