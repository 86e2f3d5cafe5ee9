// Which variants this processor and operating system can run, and which one is in use.
#include <atomic>
#include <stdexcept>
#include <string>

#include "cpu.h"
#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dseek {
namespace {

#if defined(__x86_64__)

constexpr long kArchReqXcompPerm = 0x1023;  // Linux arch_prctl: ask for a state component
constexpr long kXfeatureTileData = 18;

bool bit(unsigned word, int index) { return (word >> index) & 1u; }

uint64_t enabled_state() {
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (static_cast<uint64_t>(high) << 32) | low;
}

CpuFeatures detect() {
    CpuFeatures features;
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return features;
    const bool osxsave = bit(c, 27);
    const bool fma = bit(c, 12), f16c = bit(c, 29);
    if (!osxsave) return features;
    const uint64_t state = enabled_state();
    const bool ymm_state = (state & 0x6) == 0x6;
    const bool zmm_state = (state & 0xe6) == 0xe6;
    const bool tile_state = (state & 0x60000) == 0x60000;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return features;
    features.avx2 = ymm_state && fma && f16c && bit(b, 5);
    const bool avx512_base = zmm_state && bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31);  // F, DQ, BW, VL
    features.avx512_vnni = avx512_base && bit(c, 11);
    features.avx512_fp16 = avx512_base && bit(d, 23);
    const bool amx = tile_state && bit(d, 24);
    const bool amx_bf16 = amx && bit(d, 22), amx_int8 = amx && bit(d, 25);
    unsigned max_subleaf = a;
    if (max_subleaf >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) {
        features.avx512_bf16 = avx512_base && bit(a, 5);
    }
    // The kernel gives tile registers only to a process that asks; a refusal means no AMX here.
    if (amx_bf16 && amx_int8 && features.avx512_vnni && features.avx512_bf16) {
        features.amx = syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
    }
    return features;
}

#else

CpuFeatures detect() { return {}; }

#endif

const KernelTable* best() {
#if defined(__x86_64__)
    const CpuFeatures& features = cpu_features();
    if (features.amx) return &amx_kernels();
    if (features.avx512_vnni && features.avx512_bf16) return &avx512_kernels();
    if (features.avx2) return &avx2_kernels();
#endif
    return &generic_kernels();
}

std::atomic<const KernelTable*> selected{nullptr};

}  // namespace

const CpuFeatures& cpu_features() {
    static const CpuFeatures features = detect();
    return features;
}

std::vector<std::string> runnable_variants() {
    std::vector<std::string> names{"generic"};
    const CpuFeatures& features = cpu_features();
    if (features.avx2) names.emplace_back("avx2");
    if (features.avx512_vnni && features.avx512_bf16) names.emplace_back("avx512");
    if (features.amx) names.emplace_back("amx");
    return names;
}

const KernelTable& kernels() {
    const KernelTable* table = selected.load(std::memory_order_acquire);
    if (table == nullptr) {
        table = best();
        selected.store(table, std::memory_order_release);
    }
    return *table;
}

void select_kernels(const char* name) {
    const std::string wanted = name;
    bool runnable = wanted == "auto";
    std::string choices = "auto";
    for (const std::string& variant : runnable_variants()) {
        runnable = runnable || variant == wanted;
        choices += ", " + variant;
    }
    if (!runnable) {
        throw std::invalid_argument("kernel variant '" + wanted + "' does not run on this processor; needed: one of " +
                                    choices);
    }
    const KernelTable* table = best();
    if (wanted == "generic") table = &generic_kernels();
#if defined(__x86_64__)
    if (wanted == "avx2") table = &avx2_kernels();
    if (wanted == "avx512") table = &avx512_kernels();
    if (wanted == "amx") table = &amx_kernels();
#endif
    selected.store(table, std::memory_order_release);
}

}  // namespace dseek
