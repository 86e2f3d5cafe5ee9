#include "gate.h"

#include <algorithm>
#include <cmath>

#include "common/kernels.h"

namespace dseek {
namespace {

constexpr float kNormEpsilon = 0x1p-23f;  // that of float32, as PyTorch's rms_norm has it

void project(const float* x, int size, const float* weight, const float* gain, const float* cos, const float* sin,
             int dim, float* out) {
    std::fill(out, out + dim, 0.f);
    for (int i = 0; i < size; ++i) {
        for (int j = 0; j < dim; ++j) out[j] += x[i] * weight[static_cast<size_t>(i) * dim + j];
    }
    float squares = 0.f;
    for (int j = 0; j < dim; ++j) squares += out[j] * out[j];
    const float inverse = 1.f / std::sqrt(squares / static_cast<float>(dim) + kNormEpsilon);
    for (int j = 0; j < dim / 2; ++j) {
        const float first = out[j] * inverse * gain[j], second = out[j + dim / 2] * inverse * gain[j + dim / 2];
        out[j] = first * cos[j] - second * sin[j];
        out[j + dim / 2] = second * cos[j] + first * sin[j];
    }
}

}  // namespace

void GateRotation::set_model(const float* cos_table, const float* sin_table, int num_positions, int head_dim) {
    const int half = head_dim / 2, blocks = (num_positions + kPageTokens - 1) / kPageTokens;
    model_cos.assign(static_cast<size_t>(blocks) * half * kPageTokens, 1.f);
    model_sin.assign(model_cos.size(), 0.f);
    for (int position = 0; position < num_positions; ++position) {
        for (int i = 0; i < half; ++i) {
            const size_t from = static_cast<size_t>(position) * half + i;
            const size_t to =
                (static_cast<size_t>(position / kPageTokens) * half + i) * kPageTokens + position % kPageTokens;
            model_cos[to] = cos_table[from];
            model_sin[to] = sin_table[from];
        }
    }
    // Some rotations stretch: cos^2 + sin^2 is the square of that factor, and turning back multiplies by it again.
    model_scale =
        num_positions > 0 && half > 0 ? 1.f / (cos_table[0] * cos_table[0] + sin_table[0] * sin_table[0]) : 1.f;
}

void GateRotation::turn_back(const float* x, int head_dim, int position, float* out) const {
    const int half = head_dim / 2;
    const size_t at = static_cast<size_t>(position / kPageTokens) * half * kPageTokens + position % kPageTokens;
    for (int i = 0; i < half; ++i) {
        const float cos = model_cos[at + static_cast<size_t>(i) * kPageTokens];
        const float sin = model_sin[at + static_cast<size_t>(i) * kPageTokens];
        out[i] = (x[i] * cos + x[i + half] * sin) * model_scale;
        out[i + half] = (x[i + half] * cos - x[i] * sin) * model_scale;
    }
}

void gate_query(const Gate& gate, const GateRotation& rotation, int head, const float* query, int block, float* out) {
    const size_t at = static_cast<size_t>(block) * (gate.dim / 2);
    project(query, gate.head_dim, gate.query.data() + static_cast<size_t>(head) * gate.head_dim * gate.dim,
            gate.query_gain.data() + static_cast<size_t>(head) * gate.dim, rotation.cos.data() + at,
            rotation.sin.data() + at, gate.dim, out);
}

float gate_own(const Gate& gate, int head, const float* query) {
    const float* weight = gate.own.data() + static_cast<size_t>(head) * gate.head_dim;
    float total = gate.own_bias[head];
    for (int i = 0; i < gate.head_dim; ++i) total += weight[i] * query[i];
    return total;
}

void gate_key(const Gate& gate, const GateRotation& rotation, int kv_heads, int kv_head, int level,
              const float* statistics, int first_block, float* out) {
    const size_t index = static_cast<size_t>(std::min(level, gate.levels - 1)) * kv_heads + kv_head;
    const size_t at = static_cast<size_t>(first_block) * (gate.dim / 2);
    project(statistics, 3 * gate.head_dim, gate.key.data() + index * 3 * gate.head_dim * gate.dim,
            gate.key_gain.data() + index * gate.dim, rotation.cos.data() + at, rotation.sin.data() + at, gate.dim, out);
}

}  // namespace dseek
