// Causal attention of one whole sequence by the thread team: pages are filled, the pyramid is built, every query block
// attends. What the operators and the benchmarks call; the decoder has its own way through its cache.
#pragma once

#include <cstdint>
#include <vector>

#include "pyramid.h"

namespace dseek {

struct SequenceShape {
    int num_heads = 0;
    int num_kv_heads = 0;
    int num_tokens = 0;
    int head_dim = 0;
};

// Seconds that one thread spent on the parts, summed over the team.
struct AttentionTimes {
    double pyramid_s = 0.;    // means of cells
    double selection_s = 0.;  // scores, descent, far cells
    double attention_s = 0.;
};

// What was attended to, where somebody wants to know.
struct AttentionTrace {
    std::vector<Selection> blocks;   // [kv heads][query blocks], of selections by blocks
    std::vector<RowSelection> rows;  // [kv heads][strips], of selections by rows
    AttentionTimes times;
};

// q and out [heads][tokens][d], k and v [kv heads][tokens][d]; Value is float, or uint16_t for bf16. A pattern that is
// not active attends densely. `trace`, if given, is filled.
template <class Value>
void sequence_attention(const SequenceShape& shape, const Value* q, const Value* k, const Value* v,
                        const DynamicPattern& pattern, Value* out, AttentionTrace* trace);

}  // namespace dseek
