// From encoded tensors to a packed blob.
#include "pack_blob.h"

#include <cstring>
#include <mutex>
#include <stdexcept>

#include "kernels.h"
#include "numbers.h"
#include "thread_pool.h"

namespace dseek {
namespace {

struct BlockLayout {
    int elements;
    int bytes;
};

BlockLayout block_layout(Encoding encoding) {
    switch (encoding) {
        case Encoding::f32: return {1, 4};
        case Encoding::f16:
        case Encoding::bf16: return {1, 2};
        case Encoding::q8_0: return {32, 34};
        case Encoding::q4_0: return {32, 18};
        case Encoding::q4_1: return {32, 20};
        case Encoding::i8_channel: return {1, 1};  // behind the scale
    }
    throw std::invalid_argument("unknown encoding");
}

// Bytes of a row of k inputs.
size_t row_bytes(Encoding encoding, int k) {
    const BlockLayout layout = block_layout(encoding);
    const size_t before = encoding == Encoding::i8_channel ? sizeof(float) : 0;
    return before + static_cast<size_t>(k / layout.elements) * layout.bytes;
}

uint16_t read_u16(const uint8_t* source) {
    uint16_t value;
    std::memcpy(&value, source, 2);
    return value;
}

// One row as floats (block layouts: ggml's ggml-common.h and dequantize_row_*).
void decode_row(Encoding encoding, const uint8_t* source, int k, float* out) {
    switch (encoding) {
        case Encoding::f32: std::memcpy(out, source, static_cast<size_t>(k) * 4); return;
        case Encoding::f16:
            for (int i = 0; i < k; ++i) out[i] = half_to_float(read_u16(source + i * 2));
            return;
        case Encoding::bf16:
            for (int i = 0; i < k; ++i) out[i] = bf16_to_float(read_u16(source + i * 2));
            return;
        case Encoding::q8_0:
            for (int block = 0; block < k / 32; ++block, source += 34, out += 32) {
                const float scale = half_to_float(read_u16(source));
                for (int i = 0; i < 32; ++i) out[i] = scale * static_cast<float>(static_cast<int8_t>(source[2 + i]));
            }
            return;
        case Encoding::q4_0:
            for (int block = 0; block < k / 32; ++block, source += 18, out += 32) {
                const float scale = half_to_float(read_u16(source));
                for (int i = 0; i < 16; ++i) {
                    out[i] = scale * static_cast<float>((source[2 + i] & 15) - 8);
                    out[16 + i] = scale * static_cast<float>((source[2 + i] >> 4) - 8);
                }
            }
            return;
        case Encoding::q4_1:
            for (int block = 0; block < k / 32; ++block, source += 20, out += 32) {
                const float scale = half_to_float(read_u16(source)), minimum = half_to_float(read_u16(source + 2));
                for (int i = 0; i < 16; ++i) {
                    out[i] = scale * static_cast<float>(source[4 + i] & 15) + minimum;
                    out[16 + i] = scale * static_cast<float>(source[4 + i] >> 4) + minimum;
                }
            }
            return;
        case Encoding::i8_channel: {
            float scale;
            std::memcpy(&scale, source, sizeof scale);
            for (int i = 0; i < k; ++i) {
                out[i] = scale * static_cast<float>(static_cast<int8_t>(source[sizeof scale + i]));
            }
            return;
        }
    }
}

// Where a row of the joined tensor lies.
struct RowSource {
    Encoding encoding;
    const uint8_t* data;
};

RowSource find_row(const std::vector<Piece>& pieces, int row, int k) {
    for (const Piece& piece : pieces) {
        if (row < piece.rows) {
            return {piece.encoding, piece.data + static_cast<size_t>(row) * row_bytes(piece.encoding, k)};
        }
        row -= piece.rows;
    }
    return {Encoding::f32, nullptr};
}

// The row that becomes packed channel `channel`, or -1 for padding.
int source_row(const BlobHeader& header, int channel) {
    const int n = static_cast<int>(header.n);
    if (header.interleaved == 0) return channel < n ? channel : -1;
    const int panel = channel / kPanel, index = panel / 2 * kPanel + channel % kPanel;
    return index < n / 2 ? panel % 2 * (n / 2) + index : -1;
}

bool repacks(Format format, const std::vector<Piece>& pieces) {
    for (const Piece& piece : pieces) {
        const bool q4 = piece.encoding == Encoding::q4_0 || piece.encoding == Encoding::q4_1;
        const bool exact = (format == Format::i4g && q4) ||
                           (format == Format::i8g && piece.encoding == Encoding::q8_0) ||
                           (format == Format::i8p && piece.encoding == Encoding::i8_channel);
        if (!exact) return false;
    }
    return true;
}

// Moves the rows of one panel of i8p: values and scales stay exactly those given.
void repack_channels(uint8_t* blob, const BlobHeader& header, const std::vector<Piece>& pieces, int panel,
                     Findings& findings) {
    const int k = static_cast<int>(header.k), k_padded = static_cast<int>(header.k_padded);
    uint8_t* data = blob + sizeof(BlobHeader) + static_cast<size_t>(panel) * panel_bytes(Format::i8p, k_padded);
    auto* scales = reinterpret_cast<float*>(blob + header.scale_offset) + static_cast<size_t>(panel) * kPanel;
    auto* sums = reinterpret_cast<int32_t*>(blob + header.extra_offset) + static_cast<size_t>(panel) * kPanel;
    std::memset(data, 0, panel_bytes(Format::i8p, k_padded));
    for (int lane = 0; lane < kPanel; ++lane) {
        scales[lane] = 0.f;
        sums[lane] = 0;
        const int row = source_row(header, panel * kPanel + lane);
        if (row < 0) continue;
        const uint8_t* source = find_row(pieces, row, k).data;
        std::memcpy(&scales[lane], source, sizeof(float));
        if (!std::isfinite(scales[lane])) findings.add(Finding::not_finite, row, 0, scales[lane]);
        source += sizeof(float);
        int32_t total = 0;
        for (int i = 0; i < k; ++i) {
            data[i / 4 * 64 + lane * 4 + i % 4] = source[i];
            total += static_cast<int8_t>(source[i]);
        }
        sums[lane] = total * 128;
    }
}

// Moves the blocks of one panel without decoding them: the numbers stay exactly those of the file.
void repack_panel(uint8_t* blob, const BlobHeader& header, const std::vector<Piece>& pieces, int panel,
                  Findings& findings) {
    const auto format = static_cast<Format>(header.format);
    const int k = static_cast<int>(header.k), groups = k / kGroup;
    uint8_t* data = blob + sizeof(BlobHeader) + static_cast<size_t>(panel) * panel_bytes(format, k);
    auto* scales =
        reinterpret_cast<uint16_t*>(blob + header.scale_offset) + static_cast<size_t>(panel) * groups * kPanel;
    auto* minima =
        reinterpret_cast<uint16_t*>(blob + header.extra_offset) + static_cast<size_t>(panel) * groups * kPanel;
    for (int lane = 0; lane < kPanel; ++lane) {
        const int row = source_row(header, panel * kPanel + lane);
        if (row < 0) {
            for (int group = 0; group < groups; ++group) {
                scales[group * kPanel + lane] = 0;
                if (format == Format::i4g) minima[group * kPanel + lane] = 0;
            }
            continue;
        }
        const RowSource source = find_row(pieces, row, k);
        const BlockLayout layout = block_layout(source.encoding);
        for (int group = 0; group < groups; ++group) {
            const uint8_t* block = source.data + static_cast<size_t>(group) * layout.bytes;
            const uint16_t scale = read_u16(block);
            scales[group * kPanel + lane] = scale;
            if (!is_finite_half(scale)) findings.add(Finding::not_finite, row, group * kGroup, half_to_float(scale));
            if (format == Format::i8g) {
                uint8_t* target = data + static_cast<size_t>(group) * 512 + lane * 4;
                for (int step = 0; step < 8; ++step) {
                    uint32_t four;
                    std::memcpy(&four, block + 2 + step * 4, 4);
                    four ^= 0x80808080u;
                    std::memcpy(target + step * 64, &four, 4);
                }
                continue;
            }
            const bool has_min = source.encoding == Encoding::q4_1;
            const uint16_t minimum = has_min ? read_u16(block + 2) : float_to_half(-8.f * half_to_float(scale));
            minima[group * kPanel + lane] = minimum;
            if (!is_finite_half(minimum) && is_finite_half(scale)) {
                // Q4_0 has no minimum of its own; here it is -8 scales, which a half may not hold.
                const float value = has_min ? half_to_float(minimum) : -8.f * half_to_float(scale);
                findings.add(has_min ? Finding::not_finite : Finding::overflow, row, group * kGroup, value);
            }
            // File: byte i holds inputs i and i + 16. Blob: byte i of quarter z holds inputs 8z + i and 8z + 4 + i.
            const uint8_t* nibbles = block + (has_min ? 4 : 2);
            uint32_t words[4];
            std::memcpy(words, nibbles, 16);
            uint8_t* target = data + static_cast<size_t>(group) * 256 + lane * 4;
            for (int z = 0; z < 4; ++z) {
                const uint32_t first = words[z % 2 * 2], second = words[z % 2 * 2 + 1];
                const uint32_t four = z < 2 ? (first & 0x0f0f0f0fu) | (second & 0x0f0f0f0fu) << 4
                                            : (first >> 4 & 0x0f0f0f0fu) | (second & 0xf0f0f0f0u);
                std::memcpy(target + z * 64, &four, 4);
            }
        }
    }
}

}  // namespace

void check_size(Format format, int64_t n, int64_t k, bool interleaved) {
    constexpr int64_t kMostChannels = 1 << 26;
    constexpr int64_t kMostInputs = 1 << 20;      // a panel of them, widened, is 64 MiB of working memory a thread
    constexpr int64_t kMostInt8Inputs = 1 << 16;  // sums of products of two bytes stay within 32 bits
    const int64_t most_inputs = per_channel(format) ? kMostInt8Inputs : kMostInputs;
    if (n < 1 || n > kMostChannels || k < 1 || k > most_inputs) {
        throw std::invalid_argument("a weight's shape is " + std::to_string(n) + " x " + std::to_string(k) +
                                    "; needed: 1 to " + std::to_string(kMostChannels) + " x 1 to " +
                                    std::to_string(most_inputs));
    }
    if (interleaved && n % 2 != 0) throw std::invalid_argument("an interleaved weight needs an even number of rows");
}

Linear view_blob(const uint8_t* blob, size_t num_bytes) {
    if (reinterpret_cast<uintptr_t>(blob) % alignof(float) != 0) {
        throw std::invalid_argument("a packed weight must start at a multiple of four bytes; copy it to new memory");
    }
    BlobHeader header;
    if (num_bytes < sizeof header) throw std::invalid_argument("packed weight is shorter than its header");
    std::memcpy(&header, blob, sizeof header);
    if (header.magic != kBlobMagic || header.version != kBlobVersion || header.format > 6) {
        throw std::invalid_argument("not a packed weight of this version");
    }
    const auto format = static_cast<Format>(header.format);
    check_size(format, header.n, header.k, header.interleaved != 0);
    const BlobHeader expected =
        make_header(format, static_cast<int>(header.n), static_cast<int>(header.k), header.interleaved == 1);
    if (std::memcmp(&header, &expected, sizeof header) != 0 || num_bytes < expected.num_bytes) {
        throw std::invalid_argument("packed weight does not have the length that its header needs");
    }
    Linear view;
    view.format = format;
    view.n = static_cast<int>(header.n);
    view.k = static_cast<int>(header.k);
    view.n_padded = static_cast<int>(header.n_padded);
    view.k_padded = static_cast<int>(header.k_padded);
    view.interleaved = header.interleaved == 1;
    view.data = blob + sizeof header;
    view.scale = blob + header.scale_offset;
    view.extra = blob + header.extra_offset;
    view.num_bytes = header.num_bytes;
    return view;
}

Encoding encoding_from_name(const std::string& name) {
    if (name == "F32") return Encoding::f32;
    if (name == "F16") return Encoding::f16;
    if (name == "BF16") return Encoding::bf16;
    if (name == "Q8_0") return Encoding::q8_0;
    if (name == "Q4_0") return Encoding::q4_0;
    if (name == "Q4_1") return Encoding::q4_1;
    if (name == "I8_CHANNEL") return Encoding::i8_channel;
    throw std::invalid_argument("encoding " + name + " cannot be packed; widen it to F32 first");
}

Format format_from_name(const std::string& name) {
    if (name == "f32") return Format::f32;
    if (name == "f16") return Format::f16;
    if (name == "bf16") return Format::bf16;
    if (name == "i8c") return Format::i8c;
    if (name == "i8g") return Format::i8g;
    if (name == "i4g") return Format::i4g;
    if (name == "i8p") return Format::i8p;
    throw std::invalid_argument("unknown weight format '" + name + "'; needed: f32, f16, bf16, i8c, i8p, i8g or i4g");
}

void check_pieces(const std::vector<Piece>& pieces, int n, int k) {
    int64_t rows = 0;
    for (const Piece& piece : pieces) {
        const BlockLayout layout = block_layout(piece.encoding);
        if (piece.rows < 0 || k % layout.elements != 0) {
            throw std::invalid_argument("a row of " + std::to_string(k) + " inputs is not a whole number of blocks");
        }
        const size_t needed = static_cast<size_t>(piece.rows) * row_bytes(piece.encoding, k);
        if (piece.num_bytes != needed) {
            throw std::invalid_argument("a weight has " + std::to_string(piece.num_bytes) +
                                        " bytes where its shape needs " + std::to_string(needed));
        }
        rows += piece.rows;
    }
    if (rows != n) throw std::invalid_argument("the pieces of a weight do not add up to its rows");
}

Findings pack_blob(const BlobHeader& header, const std::vector<Piece>& pieces, uint8_t* blob) {
    std::memset(blob, 0, sizeof header);
    std::memcpy(blob, &header, sizeof header);
    const int num_panels = static_cast<int>(header.n_padded) / kPanel;
    const int k = static_cast<int>(header.k), k_padded = static_cast<int>(header.k_padded);
    const bool plain = static_cast<Format>(header.format) == Format::i8p;
    const bool exact = (plain || k == k_padded) && repacks(static_cast<Format>(header.format), pieces);
    std::atomic<int> next{0};
    const KernelTable& table = kernels();
    Findings all;
    std::mutex joining;
    thread_pool().run([&](int) {
        std::vector<float> rows(exact ? 0 : static_cast<size_t>(k_padded) * kPanel);
        Findings findings;
        for (int panel = next++; panel < num_panels; panel = next++) {
            if (exact) {
                if (plain) repack_channels(blob, header, pieces, panel, findings);
                else repack_panel(blob, header, pieces, panel, findings);
                continue;
            }
            std::fill(rows.begin(), rows.end(), 0.f);
            for (int lane = 0; lane < kPanel; ++lane) {
                const int row = source_row(header, panel * kPanel + lane);
                if (row < 0) continue;
                const RowSource source = find_row(pieces, row, k);
                float* decoded = rows.data() + static_cast<size_t>(lane) * k_padded;
                decode_row(source.encoding, source.data, k, decoded);
                inspect_row(static_cast<Format>(header.format), decoded, k, row, findings);
            }
            table.pack_panel(blob, panel, rows.data());
        }
        if (findings.any()) {
            const std::lock_guard lock(joining);
            all.join(findings);
        }
    });
    return all;
}

}  // namespace dseek
