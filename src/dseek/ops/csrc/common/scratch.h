// Aligned working memory of one thread, grown as needed and kept.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "formats.h"

namespace dseek {
namespace DSEEK_VARIANT {

class Scratch {
public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { std::free(data_); }

    // At least `num_bytes`, 64-byte aligned; the content is whatever was left there.
    uint8_t* get(size_t num_bytes) {
        if (num_bytes > capacity_) {
            std::free(data_);
            capacity_ = round_up_size(num_bytes, 4096);
            data_ = static_cast<uint8_t*>(std::aligned_alloc(64, capacity_));
            if (data_ == nullptr) throw std::bad_alloc();
        }
        return data_;
    }

private:
    uint8_t* data_ = nullptr;
    size_t capacity_ = 0;
};

}  // namespace DSEEK_VARIANT
}  // namespace dseek
