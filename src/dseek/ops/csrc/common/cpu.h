// Instruction sets that can really be used: offered by the processor and enabled by the operating system.
#pragma once

#include <string>
#include <vector>

namespace dseek {

struct CpuFeatures {
    bool avx2 = false;         // with FMA and F16C
    bool avx512_vnni = false;  // F, DQ, BW, VL and VNNI
    bool avx512_bf16 = false;
    bool avx512_fp16 = false;
    bool amx = false;  // tile, int8 and bf16, with permission granted
};

const CpuFeatures& cpu_features();
std::vector<std::string> runnable_variants();

}  // namespace dseek
