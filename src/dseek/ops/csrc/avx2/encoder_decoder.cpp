// AVX2 with FMA: the portable source compiled for 32-byte registers.
#define DSEEK_VARIANT avx2
#include "../common/encoder_decoder_portable.h"

namespace dseek {

const EncoderDecoderKernels& avx2_encoder_decoder() {
    using namespace avx2;
    static const EncoderDecoderKernels table{
        .add_norm = add_norm,
        .activate = activate,
        .attend = attend,
        .store_key_value = store_key_value,
        .largest = largest,
    };
    return table;
}

}  // namespace dseek
