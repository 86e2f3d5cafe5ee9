// Packing of weights, as they lie in a file, into a blob.
#pragma once

#include <string>
#include <vector>

#include "findings.h"
#include "formats.h"

namespace dseek {

// Encodings whose blocks are understood here; others are widened to f32 by the caller. A row of i8_channel is its
// scale, a float, and one int8 for each input.
enum class Encoding { f32, f16, bf16, q8_0, q4_0, q4_1, i8_channel };

// Some rows of a weight; a fused projection is several pieces, one below the other.
struct Piece {
    Encoding encoding;
    int rows;
    const uint8_t* data;
    size_t num_bytes;
};

// Both throw std::invalid_argument for an unknown name.
Encoding encoding_from_name(const std::string& name);
Format format_from_name(const std::string& name);

// Throws std::invalid_argument unless the pieces have exactly n rows of k inputs.
void check_pieces(const std::vector<Piece>& pieces, int n, int k);

// Writes header.num_bytes bytes, using the whole thread team. Q4_0 and Q4_1 into i4g, Q8_0 into i8g and i8_channel into
// i8p are moved without being decoded. The pieces must have been checked.
// Gives what the format does not hold; the blob is complete all the same, and of no use where numbers are not finite.
Findings pack_blob(const BlobHeader& header, const std::vector<Piece>& pieces, uint8_t* blob);

}  // namespace dseek
