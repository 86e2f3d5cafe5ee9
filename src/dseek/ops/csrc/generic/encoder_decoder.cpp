// Portable C++, and the yardstick for the others.
#define DSEEK_VARIANT generic
#include "../common/encoder_decoder_portable.h"

namespace dseek {

const EncoderDecoderKernels& generic_encoder_decoder() {
    using namespace generic;
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
