// The encoder-decoder of encoder_decoder.h, as a class.
#pragma once

#include <nanobind/nanobind.h>

namespace dseek {

void bind_encoder_decoder(nanobind::module_& module);

}  // namespace dseek
