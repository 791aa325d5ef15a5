// Which instruction sets this processor runs. Uses cpuid and the operating system's mask of saved registers.
#include "kernels.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#if defined(MARTLET_HAS_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace martlet {
namespace {

// Tiles are 8 KiB of registers, which Linux saves only for processes that asked for them, once.
bool may_use_tiles(unsigned saved) {
#if defined(MARTLET_HAS_AMX) && defined(__linux__)
  constexpr unsigned kTileState = 3u << 17, kAskForState = 0x1023, kTileData = 18;
  unsigned a, b, c, d;
  if ((saved & kTileState) != kTileState || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool bf16 = d >> 22 & 1, tiles = d >> 24 & 1, int8 = d >> 25 & 1;
  return bf16 && tiles && int8 && syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
#else
  (void)saved;
  return false;
#endif
}

}  // namespace

Isa widest_isa() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return kGeneric;
  const bool fma = c >> 12 & 1, saves = c >> 27 & 1, avx = c >> 28 & 1, f16c = c >> 29 & 1;
  if (!fma || !saves || !avx || !f16c) return kGeneric;
  unsigned mask, high;
  __asm__("xgetbv" : "=a"(mask), "=d"(high) : "c"(0));
  if ((mask & 0x06) != 0x06 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return kGeneric;
  const unsigned most_leaf = a;
  if (!(b >> 5 & 1)) return kGeneric;
  // F, DQ, BW, VL and VNNI, with the wide registers saved on a context switch
  const bool avx512 = (mask & 0xe0) == 0xe0 && (b >> 16 & 1) && (b >> 17 & 1) && (b >> 30 & 1) && (b >> 31 & 1) &&
                      (c >> 11 & 1);
  if (!avx512) return kAvx2;
  if (most_leaf < 1 || !__get_cpuid_count(7, 1, &a, &b, &c, &d)) return kAvx512Vnni;
  if (!(a >> 5 & 1)) return kAvx512Vnni;
  return may_use_tiles(mask) ? kAmx : kAvx512BF16;
#else
  return kGeneric;
#endif
}

Isa fastest_isa() {
  const Isa widest = widest_isa();
#if defined(__x86_64__)
  // Intel's vdpbf16ps starts every second cycle, two FMAs every cycle: pairs cost as much as floats and round more.
  unsigned a, b, c, d;
  if (widest == kAvx512BF16 && __get_cpuid(0, &a, &b, &c, &d) && c == signature_INTEL_ecx) return kAvx512Vnni;
#endif
  return widest;
}

const Kernels* kernels_for(Isa isa) {
  switch (isa) {
    case kGeneric: return &kernels_generic;
#if defined(__x86_64__)
    case kAvx2: return &kernels_avx2;
    case kAvx512Vnni: return &kernels_avx512_vnni;
    case kAvx512BF16: return &kernels_avx512_bf16;
#endif
#if defined(MARTLET_HAS_AMX)
    case kAmx: return &kernels_amx;
#endif
    default: return nullptr;
  }
}

}  // namespace martlet
