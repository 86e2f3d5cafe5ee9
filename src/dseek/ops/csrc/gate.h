// The learned gate of dynamic attention: scores cells of keys for a query block.
//
//   u     = rotate(norm(Wq [queries of the group's heads]))        at the query block's first position
//   kappa = rotate(norm(Wk_level [largest; least; mean key]))      at the cell's first position
//   score = u . kappa
//
// Queries and keys are those before the model's own rotation; the cache holds rotated ones, so they are turned back.
#pragma once

#include <vector>

namespace dseek {

// The gate of one layer.
struct Gate {
    int dim = 0;     // a multiple of 16
    int levels = 0;  // with a projection of their own; larger cells use the last
    int query_size = 0, key_size = 0;
    std::vector<float> query;       // [kv heads][query_size][dim]
    std::vector<float> key;         // [levels][kv heads][key_size][dim]
    std::vector<float> query_gain;  // [kv heads][dim]
    std::vector<float> key_gain;    // [levels][kv heads][dim]

    bool active() const { return dim > 0; }
};

// The gate's rotation at the first position of every block, and the model's own, block by block.
struct GateRotation {
    std::vector<float> cos, sin;            // [blocks][dim / 2]
    std::vector<float> model_cos, model_sin;  // [blocks][d / 2][64]
    float model_scale = 1.f;                // what turning back has to be multiplied by

    // Lays the model's tables [positions][d / 2] out by blocks; positions past the last are not turned.
    void set_model(const float* cos_table, const float* sin_table, int num_positions, int head_dim);
};

// out [dim] for a query [query_size] that is not rotated.
void gate_query(const Gate& gate, const GateRotation& rotation, int kv_head, const float* query, int block, float* out);
// out [dim] for a cell's statistics [key_size].
void gate_key(const Gate& gate, const GateRotation& rotation, int kv_heads, int kv_head, int level,
              const float* statistics, int first_block, float* out);

}  // namespace dseek
