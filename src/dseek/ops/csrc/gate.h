// The learned gate of dynamic attention: corrects how much attention mass a head's query is expected to give a cell.
//
//   u     = rotate(norm(Wq query))                        of one head, at the query block's first position
//   kappa = rotate(norm(Wk_level [largest; least; mean])) of a cell's keys, at the cell's first position
//   score = scale q . mean key / sqrt(d) + u . kappa / sqrt(dim) + log(tokens of the cell / 64)
//   own   = a . query + b                                 what the query's own block gets
//
// Queries and keys of u, kappa and own are those before the model's own rotation; the cache holds rotated ones, so they
// are turned back. The first product takes both as the cache has them.
#pragma once

#include <vector>

namespace dseek {

// The gate of one layer.
struct Gate {
    int dim = 0;  // a multiple of 16
    int levels = 0;  // with a projection of their own; larger cells use the last
    int head_dim = 0;
    std::vector<float> query;  // [heads][head_dim][dim]
    std::vector<float> key;  // [levels][kv heads][3 head_dim][dim]
    std::vector<float> query_gain;  // [heads][dim]
    std::vector<float> key_gain;  // [levels][kv heads][dim]
    std::vector<float> scale;  // [heads]
    std::vector<float> own;  // [heads][head_dim]
    std::vector<float> own_bias;  // [heads]

    bool active() const { return dim > 0; }
};

// The gate's rotation at the first position of every block, and the model's own, block by block.
struct GateRotation {
    std::vector<float> cos, sin;  // [blocks][dim / 2]
    std::vector<float> model_cos, model_sin;  // [blocks][d / 2][64]
    float model_scale = 1.f;  // what turning back has to be multiplied by

    // Lays the model's tables [positions][d / 2] out by blocks; positions past the last are not turned.
    void set_model(const float* cos_table, const float* sin_table, int num_positions, int head_dim);
    // Undoes the model's rotation of one vector at a position.
    void turn_back(const float* x, int head_dim, int position, float* out) const;
};

// out [dim] for a head's query that is not rotated.
void gate_query(const Gate& gate, const GateRotation& rotation, int head, const float* query, int block, float* out);
// Natural logarithm of the mass of the query's own block.
float gate_own(const Gate& gate, int head, const float* query);
// out [dim] for a cell's statistics [3 head_dim].
void gate_key(const Gate& gate, const GateRotation& rotation, int kv_heads, int kv_head, int level,
              const float* statistics, int first_block, float* out);

}  // namespace dseek
