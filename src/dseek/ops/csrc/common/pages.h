// Memory from the operating system, for things that are large or live long.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dseek {

// 64-byte aligned memory that starts as zeros and costs nothing until it is touched.
class Pages {
public:
    Pages() = default;
    explicit Pages(size_t num_bytes);
    // The same on whole huge pages where that is worth it: for buffers that are read across their rows, whose small
    // pages would be too many for the processor's address tables. Takes up to 2 MiB more.
    static Pages huge(size_t num_bytes);
    ~Pages();
    Pages(Pages&& other) noexcept;
    Pages& operator=(Pages&& other) noexcept;
    uint8_t* data() const { return data_; }
    size_t size() const { return size_; }
    template <class T>
    T* as() const {
        return reinterpret_cast<T*>(data_);
    }

private:
    uint8_t* data_ = nullptr;
    size_t size_ = 0;
    size_t mapped_ = 0;
};

}  // namespace dseek
