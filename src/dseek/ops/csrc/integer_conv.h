// Convolution of integers: inputs rounded to a step, int8 weights with a scale an output channel.
#pragma once

#include "common/kernels.h"

namespace dseek {

// Arrays run height, width, channels; a dimension that is not there has size one.
struct ConvShape {
    int batch = 1, height = 1, width = 1, channels = 1;
    int out_channels = 1, kernel_height = 1, kernel_width = 1;
    int stride_y = 1, stride_x = 1, dilation_y = 1, dilation_x = 1;
    int pad_top = 0, pad_bottom = 0, pad_left = 0, pad_right = 0;
    int groups = 1;

    int padded_height() const { return height + pad_top + pad_bottom; }
    int padded_width() const { return width + pad_left + pad_right; }
    int out_height() const { return (padded_height() - dilation_y * (kernel_height - 1) - 1) / stride_y + 1; }
    int out_width() const { return (padded_width() - dilation_x * (kernel_width - 1) - 1) / stride_x + 1; }
    int taps() const { return kernel_height * kernel_width; }
    int inputs_of_output() const { return taps() * (channels / groups); }
};

struct ConvCall {
    ConvShape shape;
    const float* x = nullptr;      // [batch][height][width][channels]
    float* steps = nullptr;        // [batch], given, or written where they are to be found
    bool find_steps = false;       // by each sample's largest magnitude
    int low = -127, high = 127;    // of the integers that inputs are rounded to
    int zero = 0;                  // taken from them before they are multiplied, and accounted for
    const float* bias = nullptr;   // [out_channels] or null
    float* out = nullptr;          // [batch][out_height][out_width][out_channels]
    const Linear* weights = nullptr;  // [groups], i8p, inputs in the order kernel height, width, channel; or null
    // Depthwise, where `weights` is null: one input channel for each output channel.
    const int8_t* taps = nullptr;     // [taps][round_up(channels, 16)]
    const float* tap_scale = nullptr;  // [round_up(channels, 16)]
};

void convolve(const ConvCall& call);

}  // namespace dseek
