// What LoRA adapters add to a linear: few outputs from many inputs (shrink), then many from those few (expand).
//
// Each sum is one chain over its terms in their order, whatever the number of tokens, as in gemm.hpp.
#pragma once

#include "program.hpp"
#include "simd.hpp"

namespace martlet {
namespace MARTLET_ISA {

template <bool kBF16>
INLINE F lora_weights(const void* base, int64_t at) {
  return kBF16 ? from_bf16(load<Halves>((const uint16_t*)base + at)) : load<F>((const float*)base + at);
}

template <bool kBF16, int M, int R>
INLINE void shrink_tile(const Lora& lora, int row, int k, const float* x, float* t, int64_t stride) {
  constexpr int kLine = kBF16 ? 32 : 16;
  F acc[M][R] = {};
  for (int i = 0; i < k; i += L) {
    if (i % kLine == 0)  // few tokens wait for memory: the next rows are asked for while these are multiplied
      for (int r = 0; r < R; ++r) __builtin_prefetch((const uint8_t*)lora.a + (int64_t(row + R + r) * k + i) * 64 / kLine);
    F v[M];
    for (int m = 0; m < M; ++m) v[m] = load<F>(x + (int64_t)m * k + i);
    for (int r = 0; r < R; ++r) {
      const F w = lora_weights<kBF16>(lora.a, int64_t(row + r) * k + i);
      for (int m = 0; m < M; ++m) acc[m][r] = fma(w, v[m], acc[m][r]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < R; ++r) t[m * stride + row + r] = sum(acc[m][r]);
}

template <bool kBF16, int M>
INLINE void shrink_rows(const Lora& lora, int row, int rows, int k, const float* x, float* t, int64_t stride) {
  constexpr int kRows = M == 1 ? 4 : 2;
  for (; rows >= kRows; rows -= kRows, row += kRows) shrink_tile<kBF16, M, kRows>(lora, row, k, x, t, stride);
  for (; rows; --rows, ++row) shrink_tile<kBF16, M, 1>(lora, row, k, x, t, stride);
}

template <bool kBF16>
INLINE void shrink_as(const Lora& lora, int row, int rows, int k, const float* x, int tokens, float* t,
                      int64_t stride) {
  for (; tokens >= 4; tokens -= 4, x += 4 * k, t += 4 * stride) shrink_rows<kBF16, 4>(lora, row, rows, k, x, t, stride);
  for (; tokens; --tokens, x += k, t += stride) shrink_rows<kBF16, 1>(lora, row, rows, k, x, t, stride);
}

// t[token][row ...] = rows of A times x [tokens][k]; k is padded to whole vectors with zeros.
void shrink(const Lora& lora, int row, int rows, int k, const float* x, int tokens, float* t, int64_t stride) {
  if (lora.bf16) shrink_as<true>(lora, row, rows, k, x, tokens, t, stride);
  else shrink_as<false>(lora, row, rows, k, x, tokens, t, stride);
}

constexpr int kSide = kPanel / 2, kSideVectors = kSide / L;

template <bool kBF16, int M>
INLINE void expand_tile(const Lora& lora, int64_t half, const float* const* t, float* const* out) {
  const int64_t at = half / 2 * lora.rank * kPanel + half % 2 * kSide;
  F acc[M][kSideVectors];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < kSideVectors; ++v) acc[m][v] = load<F>(out[m] + v * L);
  for (int r = 0; r < lora.rank; ++r)
    for (int v = 0; v < kSideVectors; ++v) {
      const F w = lora_weights<kBF16>(lora.b, at + r * kPanel + v * L);
      for (int m = 0; m < M; ++m) acc[m][v] = fma(w, splat(t[m][r]), acc[m][v]);
    }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < kSideVectors; ++v) store(out[m] + v * L, acc[m][v]);
}

template <bool kBF16, int M>
INLINE void expand_tokens(const Lora& lora, int64_t half, const float* t, int64_t stride, const int32_t* tokens,
                          float* products) {
  const float* from[M];
  float* to[M];
  for (int m = 0; m < M; ++m) {
    from[m] = t + m * stride + lora.halves[half];
    to[m] = products + (int64_t)tokens[m] * kPanel + half % 2 * kSide;
  }
  expand_tile<kBF16, M>(lora, half, from, to);
}

// products[tokens[i]][32] += the panel's rows of B times t[i].
void expand(const Lora& lora, int panel, const float* t, int64_t stride, const int32_t* tokens, int count,
            float* products) {
  const int64_t bytes = (int64_t)lora.rank * kPanel * (lora.bf16 ? 2 : 4);
  const uint8_t* next = (const uint8_t*)lora.b + (panel + 1) * bytes;
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(next + at);
  for (int64_t half = 2 * panel; half < 2 * panel + 2; ++half) {
    if (lora.halves[half] < 0) continue;
    int i = 0;
    for (; i + 4 <= count; i += 4)
      if (lora.bf16) expand_tokens<true, 4>(lora, half, t + i * stride, stride, tokens + i, products);
      else expand_tokens<false, 4>(lora, half, t + i * stride, stride, tokens + i, products);
    for (; i < count; ++i)
      if (lora.bf16) expand_tokens<true, 1>(lora, half, t + i * stride, stride, tokens + i, products);
      else expand_tokens<false, 1>(lora, half, t + i * stride, stride, tokens + i, products);
  }
}

}  // namespace MARTLET_ISA
}  // namespace martlet
