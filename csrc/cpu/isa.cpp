// Which instruction sets this processor and operating system offer, and which one is in use.
#include <atomic>
#include <cstring>

#include "cpu/attention.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif FASTATTN_HAS_NEON_BF16 && defined(__linux__)
#include <sys/auxv.h>
#elif FASTATTN_HAS_NEON_BF16 && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace fastattn::cpu {
namespace {

#define FASTATTN_NAME(enumerator, name) #name,
constexpr const char* kNames[kIsaCount] = {FASTATTN_LEVELS(FASTATTN_NAME)};
#undef FASTATTN_NAME

#if defined(__x86_64__)
// The register state that the operating system saves: CPUID says what the processor can do, XCR0 what a program may
// use.
uint64_t saved_state() {
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

bool has_bits(uint64_t word, uint64_t bits) { return (word & bits) == bits; }

Isa detect() {
  constexpr uint64_t kAvxState = 0x6, kAvx512State = 0xE6;
  uint32_t eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return Isa::kBaseline;
  const bool has_leaf1 = has_bits(ecx, bit_OSXSAVE | bit_AVX | bit_FMA | bit_F16C);
  if (!has_leaf1 || !has_bits(saved_state(), kAvxState)) return Isa::kBaseline;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !has_bits(ebx, bit_AVX2)) return Isa::kBaseline;
  const bool has_avx512 = has_bits(ebx, bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL);
  if (!has_avx512 || !has_bits(saved_state(), kAvx512State)) return Isa::kAvx2;
  constexpr uint32_t kAvx512Bf16Bit = 1u << 5;
  if (!has_bits(ecx, bit_AVX512VNNI) || eax < 1 || !__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) ||
      !has_bits(eax, kAvx512Bf16Bit)) {
    return Isa::kAvx512;
  }
  return Isa::kAvx512Bf16;
}
#elif FASTATTN_HAS_NEON_BF16
// Every 64-bit ARM processor has NEON. Bfloat16 came with ARMv8.6; the operating system says whether it is there.
bool has_bf16() {
#if defined(__linux__)
  constexpr unsigned long kHwcap2Bf16 = 1ul << 14;  // HWCAP2_BF16, which older headers lack
  return (getauxval(AT_HWCAP2) & kHwcap2Bf16) != 0;
#elif defined(__APPLE__)
  int answer = 0;
  size_t bytes = sizeof answer;
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &answer, &bytes, nullptr, 0) == 0 && answer != 0;
#else
  return false;
#endif
}

Isa detect() { return has_bf16() ? Isa::kNeonBf16 : Isa::kNeon; }
#elif defined(__aarch64__)
Isa detect() { return Isa::kNeon; }
#else
Isa detect() { return Isa::kBaseline; }
#endif

std::atomic<Isa>& active() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

bool isa_from_name(const char* name, Isa* isa) {
  for (int i = 0; i < kIsaCount; ++i) {
    if (std::strcmp(name, kNames[i]) == 0) {
      *isa = static_cast<Isa>(i);
      return true;
    }
  }
  return false;
}

Isa best_isa() {
  static const Isa isa = detect();
  return isa;
}

bool isa_supported(Isa isa) { return isa <= best_isa(); }
Isa active_isa() { return active().load(std::memory_order_relaxed); }
void set_active_isa(Isa isa) { active().store(isa, std::memory_order_relaxed); }

}  // namespace fastattn::cpu
