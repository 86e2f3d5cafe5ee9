// AVX-512: the portable source compiled for 64-byte registers. AMX has nothing to add to it.
#define DSEEK_VARIANT avx512
#include "../common/encoder_decoder_portable.h"

namespace dseek {

const EncoderDecoderKernels& avx512_encoder_decoder() {
    using namespace avx512;
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
