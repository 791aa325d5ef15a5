// How a block of each format is read: its quants, a step of four inputs at a time, its scales and its minima.
#pragma once

#include "formats.hpp"
#include "simd.hpp"

namespace martlet {
namespace MARTLET_ISA {

constexpr int kStep = 4 * kPanel;  // bytes of one step of a panel

// `v` counts vectors of L outputs, `j` steps of 4 inputs within a block.
INLINE const uint8_t* block_at(Format f, const uint8_t* panel, int b) {
  const Layout& at = kLayouts[f];
  return panel + (int64_t)(b / at.super + 1) * at.header + (int64_t)b * at.block;
}
INLINE const uint8_t* header_at(Format f, const uint8_t* panel, int b) {
  const Layout& at = kLayouts[f];
  return panel + (int64_t)(b / at.super) * (at.header + (int64_t)at.super * at.block);
}
INLINE U step_at(const uint8_t* quants, int j, int v) { return load<U>(quants + j * kStep + v * 4 * L); }
INLINE U nibble_at(const uint8_t* quants, int j, int v) {
  return (step_at(quants, j & 3, v) >> (j & 4)) & 0x0f0f0f0fu;
}

// Few rows wait for memory: weights are asked for this far ahead, across pages, where the processor's own prefetchers
// stop. Measured on one thread: q4_1 streams at 13.9 GB/s instead of 9.9, bf16 at 15.5 instead of 11.5.
constexpr int kAhead = 8192;

constexpr int kBlockSteps = 8;  // of four inputs: all blocks here have 32

struct Plain {  // no minimum, one scale a block
  static constexpr bool kMin = false;
  static constexpr int kParts = 1, kOffset = 0;
  static constexpr int kBytes = 0;  // of a block in memory; 0 for one that is near already
};

template <Format f>
struct Reader;

template <Format f, int kWidth, bool kWithMin>
struct SimpleReader : Plain {
  static constexpr bool kMin = kWithMin;
  static constexpr int kBits = kWidth, kOffset = kWithMin ? 0 : kBits - 1, kBytes = kLayouts[f].block;
  const uint8_t *at, *q;
  INLINE SimpleReader(const uint8_t* panel, int b) : at(block_at(f, panel, b)), q(at + (kWithMin ? 128 : 64)) {}
  INLINE U quants(int j, int v) const {
    if (kBits == 8) return step_at(q, j, v);
    const U low = nibble_at(q, j, v);
    return kBits == 4 ? low : low | ((step_at(q, 4, v) >> j) & 0x01010101u) << 4;
  }
  INLINE F scale(int v, int) const { return load_half(at + v * 2 * L); }
  INLINE F minimum(int v) const { return kWithMin ? load_half(at + 64 + v * 2 * L) : F{}; }
};
template <>
struct Reader<kQ4_0> : SimpleReader<kQ4_0, 4, false> { using SimpleReader::SimpleReader; };
template <>
struct Reader<kQ4_1> : SimpleReader<kQ4_1, 4, true> { using SimpleReader::SimpleReader; };
template <>
struct Reader<kQ5_0> : SimpleReader<kQ5_0, 5, false> { using SimpleReader::SimpleReader; };
template <>
struct Reader<kScreen> : SimpleReader<kScreen, 5, false> { using SimpleReader::SimpleReader; };
template <>
struct Reader<kQ5_1> : SimpleReader<kQ5_1, 5, true> { using SimpleReader::SimpleReader; };
template <>
struct Reader<kQ8_0> : SimpleReader<kQ8_0, 8, false> { using SimpleReader::SimpleReader; };

template <Format f, int kWidth>
struct SuperReader : Plain {  // q4_K, q5_K: d * scale * q - dmin * minimum
  static constexpr bool kMin = true;
  static constexpr int kBits = kWidth, kBytes = kLayouts[f].block;
  const uint8_t *head, *at, *q;
  INLINE SuperReader(const uint8_t* panel, int b)
      : head(header_at(f, panel, b)), at(block_at(f, panel, b)), q(at + 64) {}
  INLINE U quants(int j, int v) const {
    const U low = nibble_at(q, j, v);
    return kBits == 4 ? low : low | ((step_at(q, 4, v) >> j) & 0x01010101u) << 4;
  }
  INLINE F scale(int v, int) const { return load_half(head + v * 2 * L) * load_bytes(at + v * L); }
  INLINE F minimum(int v) const { return -(load_half(head + 64 + v * 2 * L) * load_bytes(at + 32 + v * L)); }
};
template <>
struct Reader<kQ4_K> : SuperReader<kQ4_K, 4> { using SuperReader::SuperReader; };
template <>
struct Reader<kQ5_K> : SuperReader<kQ5_K, 5> { using SuperReader::SuperReader; };

template <Format f>
struct Int4Reader : Plain {  // d * (q - zero)
  static constexpr bool kMin = true;
  static constexpr int kBits = 4, kBytes = kLayouts[f].block;
  const uint8_t *head, *at;
  INLINE Int4Reader(const uint8_t* panel, int b) : head(header_at(f, panel, b)), at(block_at(f, panel, b)) {}
  INLINE U quants(int j, int v) const { return nibble_at(at, j, v); }
  INLINE F scale(int v, int) const { return load_half(head + v * 2 * L); }
  INLINE F minimum(int v) const { return -(load_half(head + v * 2 * L) * load_bytes(head + 64 + v * L)); }
};
template <>
struct Reader<kInt4x32> : Int4Reader<kInt4x32> { using Int4Reader::Int4Reader; };
template <>
struct Reader<kInt4x64> : Int4Reader<kInt4x64> { using Int4Reader::Int4Reader; };
template <>
struct Reader<kInt4x128> : Int4Reader<kInt4x128> { using Int4Reader::Int4Reader; };

template <>
struct Reader<kQ6_K> : Plain {  // d * scale * (q - 32), a scale for each half block
  static constexpr int kBits = 6, kParts = 2, kOffset = 5, kBytes = kLayouts[kQ6_K].block;
  const uint8_t *head, *at, *q;
  INLINE Reader(const uint8_t* panel, int b)
      : head(header_at(kQ6_K, panel, b)), at(block_at(kQ6_K, panel, b)), q(at + 64) {}
  INLINE U quants(int j, int v) const {
    return nibble_at(q, j, v) | ((step_at(q, 4 + j / 4, v) >> (2 * (j & 3))) & 0x03030303u) << 4;
  }
  INLINE F scale(int v, int part) const {
    return load_half(head + v * 2 * L) * load_bytes((const int8_t*)at + part * 32 + v * L);
  }
  INLINE F minimum(int) const { return F{}; }
};

// A block whose quants were widened to bytes and scales to floats, once for many rows: [parts + min][32] f32, 8 steps.
template <Format f>
struct Widened : Plain {
  using Source = Reader<f>;
  static constexpr bool kMin = Source::kMin;
  static constexpr int kBits = Source::kBits, kParts = Source::kParts, kOffset = Source::kOffset;
  static constexpr int kScales = kParts + kMin, kWidened = kScales * kStep + 8 * kStep;
  const uint8_t* at;
  INLINE Widened(const uint8_t* scratch, int b) : at(scratch + (int64_t)b * kWidened) {}
  INLINE U quants(int j, int v) const { return step_at(at + kScales * kStep, j, v); }
  INLINE F scale(int v, int part) const { return load<F>(at + part * kStep + v * 4 * L); }
  INLINE F minimum(int v) const { return kMin ? load<F>(at + kParts * kStep + v * 4 * L) : F{}; }

  // kSigned: without their offset, as s8.
  template <bool kSigned>
  static void widen(const uint8_t* panel, int blocks, uint8_t* out) {
    const U offset = splat(kSigned && kOffset ? 0x01010101u << kOffset : 0u);
    for (int b = 0; b < blocks; ++b) {
      const Source from(panel, b);
      fetch(from.at + kAhead, Source::kBytes);
      for (int v = 0; v < kPanel / L; ++v, out += 4 * L) {
        for (int part = 0; part < kParts; ++part) store(out + part * kStep, from.scale(v, part));
        if (kMin) store(out + kParts * kStep, from.minimum(v));
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j)
          store(out + (kScales + j) * kStep, (U)((Quarters)from.quants(j, v) - (Quarters)offset));
      }
      out += kWidened - kStep;
    }
  }
};

}  // namespace MARTLET_ISA
}  // namespace martlet
