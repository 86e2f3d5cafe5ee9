// Packed weights: one self-describing blob a projection, laid out for the inner loops that read it.
//
// A blob is a 64-byte header and up to three arrays, each starting on a 64-byte boundary. Output channels are grouped
// into panels of 16 (one SIMD lane a channel); inside a panel the input axis runs outermost, so every kernel streams
// its weights strictly forward. All values are little endian.
//
//   format  data, for one panel                        scale               extra
//   f32     float   [k_padded][16]                     -                   -
//   f16     half    [k_padded][16]                     -                   -
//   bf16    bfloat  [k_padded / 2][16][2]              -                   -
//   i8c     int8    [k_padded / 4][16][4]              float [n_padded]    int32 [n_padded], 128 * sum of the row
//   i8p     as i8c, and the rows are not rotated: int8 values and scales that somebody else chose fit as they are
//   i8g     uint8   [k_padded / 32][8][16][4], w + 128 half [groups][16]   -
//   i4g     uint8   [k_padded / 32][4][16][4], nibbles half [groups][16]   half [groups][16], the minimum
//
// i4g byte z of a group holds step 2z in its low nibble and step 2z + 1 in its high one (a step is four inputs).
#pragma once

#include <cstddef>
#include <cstdint>

namespace dseek {

enum class Format : uint32_t { f32 = 0, f16 = 1, bf16 = 2, i8c = 3, i8g = 4, i4g = 5, i8p = 6 };

constexpr int kPanel = 16;       // output channels of a panel
constexpr int kGroup = 32;       // inputs that share a scale in i8g and i4g
constexpr int kBlobAlign = 64;   // bytes
constexpr uint32_t kBlobMagic = 0x4b505344;  // "DSPK"
constexpr uint32_t kBlobVersion = 1;

struct BlobHeader {
    uint32_t magic;
    uint32_t version;
    uint32_t format;
    uint32_t n;          // output channels
    uint32_t k;          // inputs
    uint32_t n_padded;   // multiple of 16
    uint32_t k_padded;   // multiple of the format's step
    uint32_t interleaved;  // 1: panels alternate between the first and the second half of the channels (gate, up)
    uint64_t scale_offset;
    uint64_t extra_offset;
    uint64_t num_bytes;
    uint64_t reserved;
};
static_assert(sizeof(BlobHeader) == 64);

// One scale an output channel: the same layout and the same product, rotated (i8c) or plain (i8p).
inline bool per_channel(Format format) { return format == Format::i8c || format == Format::i8p; }

inline int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }
inline size_t round_up_size(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Inputs are padded with zero weights so that no kernel needs a tail.
inline int k_multiple(Format format) {
    switch (format) {
        case Format::f32:
        case Format::f16: return 1;
        case Format::bf16: return 32;
        case Format::i8c:
        case Format::i8p: return 64;
        case Format::i8g:
        case Format::i4g: return kGroup;
    }
    return 64;
}

// Bytes of one panel's data.
inline size_t panel_bytes(Format format, int k_padded) {
    const size_t elements = static_cast<size_t>(k_padded) * kPanel;
    switch (format) {
        case Format::f32: return elements * 4;
        case Format::f16:
        case Format::bf16: return elements * 2;
        case Format::i8c:
        case Format::i8p:
        case Format::i8g: return elements;
        case Format::i4g: return elements / 2;
    }
    return 0;
}

// Fills in sizes and offsets of a blob for an [n, k] weight.
inline BlobHeader make_header(Format format, int n, int k, bool interleaved) {
    BlobHeader header{};
    header.magic = kBlobMagic;
    header.version = kBlobVersion;
    header.format = static_cast<uint32_t>(format);
    header.n = static_cast<uint32_t>(n);
    header.k = static_cast<uint32_t>(k);
    header.n_padded = static_cast<uint32_t>(interleaved ? 2 * round_up(n / 2, kPanel) : round_up(n, kPanel));
    header.k_padded = static_cast<uint32_t>(round_up(k, k_multiple(format)));
    header.interleaved = interleaved ? 1 : 0;
    const size_t num_panels = header.n_padded / kPanel;
    size_t end = sizeof(BlobHeader) + num_panels * panel_bytes(format, static_cast<int>(header.k_padded));
    const size_t groups = header.k_padded / kGroup;
    size_t scale_bytes = 0, extra_bytes = 0;
    if (per_channel(format)) scale_bytes = extra_bytes = size_t{header.n_padded} * 4;
    if (format == Format::i8g || format == Format::i4g) scale_bytes = num_panels * groups * kPanel * 2;
    if (format == Format::i4g) extra_bytes = scale_bytes;
    header.scale_offset = end = round_up_size(end, kBlobAlign);
    header.extra_offset = end = round_up_size(end + scale_bytes, kBlobAlign);
    header.num_bytes = round_up_size(end + extra_bytes, kBlobAlign);
    return header;
}

// A checked view of a blob; what the kernels take.
struct Linear {
    Format format = Format::f32;
    int n = 0, k = 0, n_padded = 0, k_padded = 0;
    bool interleaved = false;
    const uint8_t* data = nullptr;
    const uint8_t* scale = nullptr;
    const uint8_t* extra = nullptr;
    size_t num_bytes = 0;

    int num_panels() const { return n_padded / kPanel; }
    const uint8_t* panel(int index) const { return data + static_cast<size_t>(index) * panel_bytes(format, k_padded); }
    const float* channel_scale() const { return reinterpret_cast<const float*>(scale); }
    const int32_t* channel_sum() const { return reinterpret_cast<const int32_t*>(extra); }
    const uint16_t* group_scale(int panel) const {
        return reinterpret_cast<const uint16_t*>(scale) + static_cast<size_t>(panel) * (k_padded / kGroup) * kPanel;
    }
    const uint16_t* group_min(int panel) const {
        return reinterpret_cast<const uint16_t*>(extra) + static_cast<size_t>(panel) * (k_padded / kGroup) * kPanel;
    }
};

// Throws std::invalid_argument unless a weight may have n output channels of k inputs in this format.
void check_size(Format format, int64_t n, int64_t k, bool interleaved);

// Reads a header and checks every size in it against the blob's length, and that the blob starts at a multiple of four
// bytes; throws std::invalid_argument.
Linear view_blob(const uint8_t* blob, size_t num_bytes);

}  // namespace dseek
