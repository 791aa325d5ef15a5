// What LoRA adapters add to a linear, second half: many outputs from the few that A gave (expand). The first half,
// few outputs from many inputs, is a product like any other (gemm.hpp), in the format that lora_format names.
//
// Each sum is one chain over its terms in their order, whatever the number of tokens, as in gemm.hpp.
#pragma once

#include "program.hpp"
#include "simd.hpp"

namespace martlet {
namespace MARTLET_ISA {

constexpr int kSide = kPanel / 2, kSideVectors = kSide / L;

// B of half a panel: [rank][16].
template <bool kBF16>
struct FloatSide {
  static constexpr int kRow = kSide * (kBF16 ? 2 : 4);
  static int64_t bytes(int rank) { return (int64_t)rank * kRow; }

  template <int M>
  static INLINE void add(const uint8_t* b, int rank, const uint8_t* const* t, float* const* out) {
    F acc[M][kSideVectors];
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < kSideVectors; ++v) acc[m][v] = load<F>(out[m] + v * L);
    for (int r = 0; r < rank; ++r, b += kRow)
      for (int v = 0; v < kSideVectors; ++v) {
        const F w = kBF16 ? from_bf16(load<Halves>(b + v * 2 * L)) : load<F>(b + v * 4 * L);
        for (int m = 0; m < M; ++m) acc[m][v] = fma(w, splat(scalar<float>(t[m] + 4 * r)), acc[m][v]);
      }
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < kSideVectors; ++v) store(out[m] + v * L, acc[m][v]);
  }
};

// B of half a panel beside integer weights: [16] scales in f32, then [rank / 4][16][4] quants plus 128. They meet rows
// of kActByte64, one for each unit of 16 or 32 ranks.
struct ByteSide {
  static constexpr int kStep4 = 4 * kSide, kUnitSteps = kLoraUnit / 4;
  static int64_t bytes(int rank) { return 4 * kSide + (int64_t)rank / 4 * kStep4; }

  template <int M>
  static INLINE void add(const uint8_t* b, int rank, const uint8_t* const* t, float* const* out) {
    const int steps = rank / 4;
    for (int v = 0; v < kSideVectors; ++v) {
      const F scale = load<F>(b + v * 4 * L);
      F acc[M];
      for (int m = 0; m < M; ++m) acc[m] = load<F>(out[m] + v * L);
      int64_t at = 0;  // of the unit in a token's row
      for (int j0 = 0; j0 < steps; j0 += kUnitSteps, at += kLoraUnit * kLoraRowBytes) {
        const uint8_t* quants = b + 4 * kSide + j0 * kStep4 + v * 4 * L;
        const int64_t group = at + groups_at(kActByte64, kLoraUnit);
        I sum[M];
        for (int m = 0; m < M; ++m)
          sum[m] = kByteOffset ? splat(scalar<int32_t>(t[m] + group + offsetof(Group, minus_sum))) : I{};
        for (int j = 0; j < least(kUnitSteps, steps - j0); ++j) {
          const U w = load<U>(quants + j * kStep4);
          for (int m = 0; m < M; ++m)
            sum[m] = add_quads(sum[m], dot4<8>(start_quads(sum[m]), w, splat(scalar<uint32_t>(t[m] + at + 4 * j))));
        }
        for (int m = 0; m < M; ++m) acc[m] = fma(scale * scalar<float>(t[m] + group), to_float(sum[m]), acc[m]);
      }
      for (int m = 0; m < M; ++m) store(out[m] + v * L, acc[m]);
    }
  }
};

template <class Side, int M>
INLINE void expand_tokens(const uint8_t* b, int rank, const uint8_t* t, int64_t stride, const int32_t* tokens,
                          float* products) {
  const uint8_t* from[M];
  float* to[M];
  for (int m = 0; m < M; ++m) {
    from[m] = t + m * stride;
    to[m] = products + (int64_t)tokens[m] * kPanel;
  }
  Side::template add<M>(b, rank, from, to);
}

template <class Side>
void expand_as(const Lora& lora, int panel, int64_t row_bytes, const uint8_t* t, int64_t stride, const int32_t* tokens,
               int count, float* products) {
  const int64_t bytes = Side::bytes(lora.rank);
  for (int64_t half = 2 * panel; half < 2 * panel + 2; ++half, products += kSide) {
    if (lora.halves[half] < 0) continue;
    const uint8_t *b = lora.b + half * bytes, *from = t + lora.halves[half] * row_bytes;
    int i = 0;
    for (; i + 4 <= count; i += 4)
      expand_tokens<Side, 4>(b, lora.rank, from + i * stride, stride, tokens + i, products);
    for (; i < count; ++i) expand_tokens<Side, 1>(b, lora.rank, from + i * stride, stride, tokens + i, products);
  }
}

// products[tokens[i]][32] += the panel's rows of B times t[i]. base: format of the linear's own weights.
void expand(Format base, const Lora& lora, int panel, const uint8_t* t, int64_t stride, const int32_t* tokens,
            int count, float* products) {
  const int64_t row_bytes = lora_row_bytes(base);
  if (base == kF32) expand_as<FloatSide<false>>(lora, panel, row_bytes, t, stride, tokens, count, products);
  else if (base == kBF16) expand_as<FloatSide<true>>(lora, panel, row_bytes, t, stride, tokens, count, products);
  else expand_as<ByteSide>(lora, panel, row_bytes, t, stride, tokens, count, products);
}

}  // namespace MARTLET_ISA
}  // namespace martlet
