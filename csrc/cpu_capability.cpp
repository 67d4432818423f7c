// Which instructions this CPU has and the operating system lets a program use.

#include "star_kernels.h"

#include <c10/util/Exception.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string_view>

namespace star_kernels {

#if defined(__x86_64__)

namespace {

struct Registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);  // leaves zeros where the CPU lacks the leaf
  return r;
}

// The register state that the operating system saves and restores (XCR0).
uint64_t saved_state() {
  unsigned low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

bool bit(unsigned value, int position) { return (value >> position) & 1u; }

bool has(uint64_t state, uint64_t wanted) { return (state & wanted) == wanted; }

// Where attention of bf16 tensors takes 1.8 times as long by products of pairs as in float32 (Emerald Rapids).
bool bf16_products_are_slow() {
  const Registers vendor = cpuid(0, 0);
  return std::memcmp(&vendor.ebx, "Genu", 4) == 0;
}

}  // namespace

CpuCapability cpu_capability() {
  constexpr uint64_t ymm = 0x6, zmm = 0xe6, tiles = 0x60000;
  CpuCapability capability;
  const Registers basic = cpuid(1, 0), extended = cpuid(7, 0), more = cpuid(7, 1);
  if (!bit(basic.ecx, 27)) return capability;  // without OSXSAVE there is no xgetbv
  const uint64_t state = saved_state();
  capability.avx2 = has(state, ymm) && bit(extended.ebx, 5) && bit(basic.ecx, 12) && bit(basic.ecx, 29);
  capability.avx512 = capability.avx2 && has(state, zmm) && bit(extended.ebx, 16) && bit(extended.ebx, 17) && bit(extended.ebx, 30) &&
                      bit(extended.ebx, 31);
  capability.avx512_bf16 = capability.avx512 && bit(more.eax, 5);
  capability.amx = has(state, tiles) && bit(extended.edx, 24) && bit(extended.edx, 22);
  return capability;
}

#else

CpuCapability cpu_capability() { return {}; }

namespace {

bool bf16_products_are_slow() { return false; }

}  // namespace

#endif

namespace {

CpuLevel highest_level(const CpuCapability& capability) {
  if (capability.avx512_bf16) return CpuLevel::avx512_bf16;
  if (capability.avx512) return CpuLevel::avx512;
  return capability.avx2 ? CpuLevel::avx2 : CpuLevel::generic;
}

CpuLevel level_by_name(std::string_view name) {
  if (name == "default") return CpuLevel::generic;
  if (name == "avx2") return CpuLevel::avx2;
  if (name == "avx512") return CpuLevel::avx512;
  TORCH_CHECK_VALUE(name == "avx512_bf16",
                    "STAR_KERNELS_CPU_CAPABILITY: expected one of default, avx2, avx512, avx512_bf16, got '", name, "'");
  return CpuLevel::avx512_bf16;
}

}  // namespace

CpuLevel cpu_level() {
  static const CpuLevel highest = highest_level(cpu_capability());
  static const CpuLevel fastest = bf16_products_are_slow() ? std::min(highest, CpuLevel::avx512) : highest;
  const char* limit = std::getenv("STAR_KERNELS_CPU_CAPABILITY");
  return limit == nullptr || *limit == '\0' ? fastest : std::min(highest, level_by_name(limit));
}

}  // namespace star_kernels
