#include "integer_conv.h"

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cstring>
#include <vector>

#include "common/row_buffer.h"
#include "common/thread_pool.h"

namespace dseek {
namespace {

constexpr int kMostRowsPerTask = 256;
constexpr size_t kRowBytesPerTask = 128 << 10;  // gathered inputs of a task stay in a private cache

// Working memory of the calling thread, grown as needed and kept: mapping it anew would cost more than small layers do.
uint8_t* grown(Pages& kept, size_t num_bytes) {
    if (kept.size() < num_bytes) kept = Pages::huge(num_bytes);
    return kept.data();
}

thread_local Pages kept_images, kept_rows;

// The rounded and padded images, and what the outputs need besides the products.
class Convolution {
public:
    explicit Convolution(const ConvCall& call)
        : call_(call),
          shape_(call.shape),
          table_(kernels()),
          team_(thread_pool()),
          depthwise_(call.weights == nullptr) {
        pixel_bytes_ = depthwise_ ? round_up(shape_.channels, kPanel) : shape_.channels;
        line_bytes_ = static_cast<size_t>(shape_.padded_width()) * pixel_bytes_;
        image_bytes_ = line_bytes_ * shape_.padded_height();
        images_ = grown(kept_images, image_bytes_ * shape_.batch);
        largest_ = std::vector<std::atomic<float>>(call.find_steps ? shape_.batch : 0);
        if (depthwise_) prepare_taps();
        else prepare_rows();
    }

    void run() {
        team_.reset_counter(0);
        team_.run([&](int thread_idx) {
            const int lines = shape_.batch * shape_.height;
            const int begin = share(lines, thread_idx), end = share(lines, thread_idx + 1);
            if (call_.find_steps) {
                find_largest(begin, end);
                team_.barrier();
                if (thread_idx == 0) set_steps();
                team_.barrier();
            }
            pad(thread_idx);
            for (int line = begin; line < end; ++line) round_line(line);
            team_.barrier();
            if (depthwise_) multiply_depthwise();
            else multiply_gathered(thread_idx);
        });
    }

private:
    int share(int count, int thread_idx) const {
        return static_cast<int>(static_cast<int64_t>(count) * thread_idx / team_.size());
    }

    uint8_t* line(int sample, int padded_row) const {
        return images_ + sample * image_bytes_ + padded_row * line_bytes_;
    }

    void find_largest(int begin, int end) {
        const size_t count = static_cast<size_t>(shape_.width) * shape_.channels;
        for (int line = begin; line < end; ++line) {
            const float found = table_.largest_of_run(call_.x + line * count, count);
            std::atomic<float>& largest = largest_[line / shape_.height];
            float known = largest.load(std::memory_order_relaxed);
            while (found > known && !largest.compare_exchange_weak(known, found, std::memory_order_relaxed)) {}
        }
    }

    void set_steps() {
        for (int sample = 0; sample < shape_.batch; ++sample) {
            call_.steps[sample] = std::max(largest_[sample].load() / static_cast<float>(call_.high), FLT_MIN);
        }
    }

    // Zeros around the images: the integer 0, with `zero` taken from it and the offset of 128 added.
    void pad(int thread_idx) {
        const bool gaps = pixel_bytes_ != shape_.channels;
        if (!gaps && shape_.padded_height() == shape_.height && shape_.padded_width() == shape_.width) return;
        const int lines = shape_.batch * shape_.padded_height();
        const int begin = share(lines, thread_idx), end = share(lines, thread_idx + 1);
        const int value = std::clamp(0, call_.low, call_.high) - call_.zero + 128;
        if (begin < end) std::memset(images_ + begin * line_bytes_, value, (end - begin) * line_bytes_);
        team_.barrier();
    }

    void round_line(int index) {
        const int sample = index / shape_.height, row = index % shape_.height;
        const RoundingRange range{call_.steps[sample], call_.low, call_.high, call_.zero};
        uint8_t* target = line(sample, row + shape_.pad_top) + static_cast<size_t>(shape_.pad_left) * pixel_bytes_;
        const float* source = call_.x + static_cast<size_t>(index) * shape_.width * shape_.channels;
        if (pixel_bytes_ == shape_.channels) {
            table_.round_run(source, static_cast<size_t>(shape_.width) * shape_.channels, range, target);
            return;
        }
        for (int x = 0; x < shape_.width; ++x) {
            table_.round_run(source + static_cast<size_t>(x) * shape_.channels, shape_.channels, range,
                             target + static_cast<size_t>(x) * pixel_bytes_);
        }
    }

    // Dense and grouped: inputs of each output are gathered into a row, rows times the packed weight.
    void prepare_rows() {
        const Linear& weight = call_.weights[0];
        const int outputs = shape_.batch * shape_.out_height() * shape_.out_width();
        rows_per_task_ = static_cast<int>(kRowBytesPerTask / static_cast<size_t>(weight.k_padded));
        rows_per_task_ = std::min(outputs, std::clamp(rows_per_task_, kPanel, kMostRowsPerTask));
        row_tasks_ = (outputs + rows_per_task_ - 1) / rows_per_task_;
        const int wanted = std::max(1, 2 * team_.size() / (row_tasks_ * shape_.groups));
        panels_per_task_ = round_up((weight.num_panels() + wanted - 1) / wanted, 4);
        panel_tasks_ = (weight.num_panels() + panels_per_task_ - 1) / panels_per_task_;
        gathered_bytes_ = round_up_size(RowBuffer::bytes(weight, RowKind::plain_u8, rows_per_task_), kBlobAlign);
        product_bytes_ = static_cast<size_t>(rows_per_task_) * weight.n_padded * sizeof(float);
        room_ = grown(kept_rows, (gathered_bytes_ + product_bytes_) * team_.size());
        // What `zero` took from every input: zero * scale * (sum of the row), times the step.
        taken_.resize(call_.zero != 0 ? shape_.out_channels : 0);
        for (size_t channel = 0; channel < taken_.size(); ++channel) {
            const int of_group = shape_.out_channels / shape_.groups;
            const Linear& own = call_.weights[channel / of_group];
            const int lane = static_cast<int>(channel) % of_group;
            taken_[channel] = static_cast<float>(call_.zero) * static_cast<float>(own.channel_sum()[lane] / 128) *
                              own.channel_scale()[lane];
        }
    }

    void multiply_gathered(int thread_idx) {
        const int tasks = row_tasks_ * panel_tasks_ * shape_.groups;
        const int outputs = shape_.batch * shape_.out_height() * shape_.out_width();
        uint8_t* base = room_ + (gathered_bytes_ + product_bytes_) * thread_idx;
        auto* product = reinterpret_cast<float*>(base + gathered_bytes_);
        int gathered = -1;
        for (int task = team_.claim(0); task < tasks; task = team_.claim(0)) {
            const int rows_of = task / panel_tasks_, group = rows_of % shape_.groups;
            const int begin = rows_of / shape_.groups * rows_per_task_;
            const int end = std::min(begin + rows_per_task_, outputs);
            const Linear& weight = call_.weights[group];
            const Rows rows = RowBuffer::rows_in(base, weight, RowKind::plain_u8, rows_per_task_);
            if (gathered != rows_of) {
                for (int output = begin; output < end; ++output) gather(output, group, rows, output - begin);
                gathered = rows_of;
            }
            const int panel = task % panel_tasks_ * panels_per_task_;
            const int panel_end = std::min(panel + panels_per_task_, weight.num_panels());
            table_.linear({.weight = &weight,
                           .rows = &rows,
                           .row_begin = 0,
                           .row_end = end - begin,
                           .panel_begin = panel,
                           .panel_end = panel_end,
                           .epilogue = Epilogue::store,
                           .bias = nullptr,
                           .out = product,
                           .out_stride = static_cast<size_t>(weight.n_padded)});
            const int channel = panel * kPanel, count = std::min(panel_end * kPanel, weight.n) - channel;
            for (int row = 0; row < end - begin; ++row) {
                finish(product + static_cast<size_t>(row) * weight.n_padded + channel, group * weight.n + channel,
                       count, begin + row, rows.scale[row]);
            }
        }
    }

    void gather(int output, int group, const Rows& rows, int row) const {
        const int width = shape_.out_width(), area = width * shape_.out_height();
        const int sample = output / area, y = output % area / width, x = output % width;
        const int channels = shape_.channels / shape_.groups;
        rows.scale[row] = call_.steps[sample];
        uint8_t* target = rows.row<uint8_t>(row);
        for (int ky = 0; ky < shape_.kernel_height; ++ky) {
            const uint8_t* source = line(sample, y * shape_.stride_y + ky * shape_.dilation_y) +
                                    static_cast<size_t>(x) * shape_.stride_x * pixel_bytes_ + group * channels;
            if (shape_.groups == 1 && shape_.dilation_x == 1) {
                const size_t run = static_cast<size_t>(shape_.kernel_width) * channels;
                std::memcpy(target, source, run);
                target += run;
                continue;
            }
            for (int kx = 0; kx < shape_.kernel_width; ++kx) {
                std::memcpy(target, source + static_cast<size_t>(kx) * shape_.dilation_x * pixel_bytes_, channels);
                target += channels;
            }
        }
    }

    void finish(const float* product, int channel, int count, int output, float step) const {
        float* out = call_.out + static_cast<size_t>(output) * shape_.out_channels + channel;
        std::memcpy(out, product, static_cast<size_t>(count) * sizeof(float));
        if (!taken_.empty()) {
            const float* taken = taken_.data() + channel;
            for (int i = 0; i < count; ++i) out[i] += step * taken[i];
        }
        if (call_.bias != nullptr) {
            for (int i = 0; i < count; ++i) out[i] += call_.bias[channel + i];
        }
    }

    void prepare_taps() {
        const int padded = pixel_bytes_;
        offsets_.resize(shape_.taps());
        for (int tap = 0; tap < shape_.taps(); ++tap) {
            const size_t rows = static_cast<size_t>(tap / shape_.kernel_width) * shape_.dilation_y;
            const size_t pixels = static_cast<size_t>(tap % shape_.kernel_width) * shape_.dilation_x;
            offsets_[tap] = static_cast<int32_t>(rows * line_bytes_ + pixels * padded);
        }
        start_.assign(padded, 0);
        bias_.assign(padded, 0.f);
        for (int channel = 0; channel < shape_.channels; ++channel) {
            int32_t total = 0;
            for (int tap = 0; tap < shape_.taps(); ++tap)
                total += call_.taps[static_cast<size_t>(tap) * padded + channel];
            start_[channel] = total * (call_.zero - 128);
            if (call_.bias != nullptr) bias_[channel] = call_.bias[channel];
        }
    }

    void multiply_depthwise() {
        const int lines = shape_.batch * shape_.out_height();
        for (int index = team_.claim(0); index < lines; index = team_.claim(0)) {
            const int sample = index / shape_.out_height(), y = index % shape_.out_height();
            table_.depthwise({.image = line(sample, y * shape_.stride_y),
                              .pixel_stride = shape_.stride_x * pixel_bytes_,
                              .offsets = offsets_.data(),
                              .weight = call_.taps,
                              .taps = shape_.taps(),
                              .channels = shape_.channels,
                              .channels_padded = pixel_bytes_,
                              .pixels = shape_.out_width(),
                              .start = start_.data(),
                              .scale = call_.tap_scale,
                              .step = call_.steps[sample],
                              .bias = bias_.data(),
                              .out = call_.out + static_cast<size_t>(index) * shape_.out_width() * shape_.channels});
        }
    }

    const ConvCall& call_;
    const ConvShape& shape_;
    const KernelTable& table_;
    ThreadPool& team_;
    const bool depthwise_;
    int pixel_bytes_ = 0;
    size_t line_bytes_ = 0, image_bytes_ = 0;
    uint8_t* images_ = nullptr;
    std::vector<std::atomic<float>> largest_;
    // Dense and grouped.
    int rows_per_task_ = 0, row_tasks_ = 0, panels_per_task_ = 0, panel_tasks_ = 0;
    size_t gathered_bytes_ = 0, product_bytes_ = 0;
    uint8_t* room_ = nullptr;
    std::vector<float> taken_;
    // Depthwise.
    std::vector<int32_t> offsets_, start_;
    std::vector<float> bias_;
};

}  // namespace

void convolve(const ConvCall& call) { Convolution(call).run(); }

}  // namespace dseek
