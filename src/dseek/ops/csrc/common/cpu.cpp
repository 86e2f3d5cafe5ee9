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

// A variant that was compiled. Its table is asked for only where the processor runs it.
struct Variant {
    const char* name;
    bool runs;
    const KernelTable& (*table)();
};

// From the slowest to the fastest.
std::vector<Variant> variants() {
    [[maybe_unused]] const CpuFeatures& features = cpu_features();
    std::vector<Variant> found{{"generic", true, &generic_kernels}};
#if defined(DSEEK_HAS_AVX2)
    found.push_back({"avx2", features.avx2, &avx2_kernels});
#endif
#if defined(DSEEK_HAS_AVX512)
    found.push_back({"avx512", features.avx512_vnni && features.avx512_bf16, &avx512_kernels});
#endif
#if defined(DSEEK_HAS_AMX)
    found.push_back({"amx", features.amx, &amx_kernels});
#endif
    std::erase_if(found, [](const Variant& variant) { return !variant.runs; });
    return found;
}

std::atomic<const KernelTable*> selected{nullptr};

}  // namespace

const CpuFeatures& cpu_features() {
    static const CpuFeatures features = detect();
    return features;
}

std::vector<std::string> runnable_variants() {
    std::vector<std::string> names;
    for (const Variant& variant : variants()) names.emplace_back(variant.name);
    return names;
}

const KernelTable& kernels() {
    const KernelTable* table = selected.load(std::memory_order_acquire);
    if (table == nullptr) {
        table = &variants().back().table();
        selected.store(table, std::memory_order_release);
    }
    return *table;
}

void select_kernels(const char* name) {
    const std::string wanted = name;
    const std::vector<Variant> found = variants();
    std::string choices = "auto";
    for (const Variant& variant : found) {
        if (wanted == variant.name) {
            selected.store(&variant.table(), std::memory_order_release);
            return;
        }
        choices += std::string(", ") + variant.name;
    }
    if (wanted != "auto") {
        throw std::invalid_argument("kernel variant '" + wanted + "' does not run on this processor; needed: one of " +
                                    choices);
    }
    selected.store(&found.back().table(), std::memory_order_release);
}

}  // namespace dseek
