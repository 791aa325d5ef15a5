// The screen of a head: a copy of 5.5 bits a weight that says which tokens could be the likeliest. A greedy step reads
// it whole, and of the head only the panels that hold such a token, which decide as they always would.
//
// Let w be an output's weights and a the prepared activations, both as the head's own kernel meets them, and H the
// Hadamard matrix that mixes every 32 inputs: H H^T = 32, and what it mixes has fewer outliers to waste a scale on. The
// screen holds q ~ H w and meets y ~ H a / 32 (kActSplit32), so w a = (H w) (H a / 32), and
//     |w a - q y| <= |H w - q| |y| + |w| |H^T (H a / 32 - y)| <= slack |a|
// with |y| = |a| / sqrt(32) and the error of y at most half a step of its scale, the largest of 32 values / 16256:
//     slack = |H w - q| / sqrt(32) + |w| (sqrt(32) / 2 / 16256 + rounding)
// Rounding: no kernel here adds more than 2 k + 32 times, each time with an error of 2^-24 of what |w| |a| bounds.
// Formats with minima cancel larger terms, and have no screen. Sums of tiny squares vanish, kTiny stands for them, and
// kLeast for what becomes zero where bf16 is multiplied without denormals. What no bound holds for has slack infinity.
#pragma once

#include "gemm.hpp"
#include "rows.hpp"

namespace martlet {
namespace MARTLET_ISA {

constexpr int kScreenGroup = 32, kMostScreened = 16384;  // inputs: more would add up too much rounding
constexpr float kPerRoot32 = 0.17677671f;                // 1 / sqrt(32), rounded up
constexpr float kTiny = 8.7e-19f, kLeast = 1e-25f;
constexpr float kShortest = 1e-15f, kLongest = 1e18f;    // |a|, between which the bound holds
constexpr float kHeaviest = 65536.0f;                    // |w|
constexpr float kInfinity = __builtin_inff();

// v times the Hadamard matrix of 32.
template <class T>
INLINE void mix(T* v) {
#pragma GCC unroll 5
  for (int width = 16; width; width /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < kScreenGroup / 2; ++i) {
      const int at = i / width * 2 * width + i % width;
      const T a = v[at], b = v[at + width];
      v[at] = a + b;
      v[at + width] = a - b;
    }
}

// Input i of L outputs.
template <Format f>
INLINE F weight_at(const uint8_t* panel, int i, int v) {
  if (f == kF32) return load<F>(panel + (int64_t)i * kStep + v * 4 * L);
  if (f == kBF16) {
    const U pairs = load<U>(panel + (int64_t)(i / 2) * kStep + v * 4 * L);
    return i % 2 ? high_bf16(pairs) : low_bf16(pairs);
  }
  const uint8_t* steps = f == kInt8 ? panel : block_at(f, panel, i / 32) + 64;
  const U bytes = load<U>(steps + (int64_t)(f == kInt8 ? i / 4 : i / 4 % 8) * kStep + v * 4 * L);
  return to_float((I)((bytes >> (8 * (i % 4))) & 255u) - 128);
}

// Numbers below the normal range become 0; those above it are asked for by no weights the bound holds for.
INLINE U to_half(F v) {
  const U bits = (U)v, magnitude = bits & 0x7fffffffu;
  const U half = ((bits >> 16) & 0x8000u) | ((magnitude + 0x1000u - (112u << 23)) >> 13);
  return magnitude < (113u << 23) ? U{} : half;
}

template <Format f>
void make_screen_of(const uint8_t* panel, int k, uint8_t* out) {
  const int blocks = (k + kScreenGroup - 1) / kScreenGroup;
  const float rounding = 1.9e-4f + (float)(4 * k + 64) * 5.97e-8f;
  for (int v = 0; v < kPanel / L; ++v) {
    F weight = {}, error = {};
    for (int b = 0; b < blocks; ++b) {
      const int count = least(kScreenGroup, k - b * kScreenGroup);
      const F scale = f == kInt8   ? load<F>(panel + padded_inputs(kInt8, k) * kPanel + v * 4 * L)
                      : f == kQ8_0 ? load_half(block_at(f, panel, b) + v * 2 * L)
                                   : splat(1.0f);
      F x[kScreenGroup] = {};
      if (count == kScreenGroup)
#pragma GCC unroll 32
        for (int i = 0; i < kScreenGroup; ++i) x[i] = weight_at<f>(panel, b * kScreenGroup + i, v) * scale;
      else
        for (int i = 0; i < count; ++i) x[i] = weight_at<f>(panel, b * kScreenGroup + i, v) * scale;
      mix(x);
      F high = {}, low = {};
      for (int i = 0; i < kScreenGroup; ++i) {
        weight = fma(x[i], x[i], weight);
        high = max(x[i], high);
        low = min(x[i], low);
      }
      const U half = to_half((high > -low ? high : low) * -0.0625f);  // the farthest from 0 is -16 steps
      uint8_t* block = out + (int64_t)b * kLayouts[kScreen].block;
      store(block + v * 2 * L, __builtin_convertvector(half, Halves));
      const F d = load_half(block + v * 2 * L), inverse = (F)((I)(d != 0.0f) & (I)(1.0f / d));
      U words[5] = {};
#pragma GCC unroll 32
      for (int i = 0; i < kScreenGroup; ++i) {
        const I q = round_to_int(max(min(x[i] * inverse, splat(15.0f)), splat(-16.0f)));
        const F left = fma(to_float(q), -d, x[i]);
        error = fma(left, left, error);
        const U bits = (U)(q + 16);
        words[i / 4 & 3] |= (bits & 15u) << (8 * (i % 4) + (i / 4 & 4));
        words[4] |= (bits >> 4) << (8 * (i % 4) + i / 4);
      }
      for (int j = 0; j < 5; ++j) store(block + 64 + j * kStep + v * 4 * L, words[j]);
    }
    float slack[L];
    for (int lane = 0; lane < L; ++lane) {
      const float norm = __builtin_sqrtf(weight[lane]) * kPerRoot32, lost = __builtin_sqrtf(error[lane]) * kPerRoot32;
      const float all = (lost + norm * rounding) * (1.0f + (float)(k + 64) * 2.4e-7f) + kTiny * (float)k;
      const bool holds = norm < kHeaviest && all < kHeaviest;  // neither is NaN
      slack[lane] = holds ? all : kInfinity;
      for (int b = 0; !holds && b < blocks; ++b)
        std::memset(out + (int64_t)b * kLayouts[kScreen].block + 2 * (v * L + lane), 0, 2);
    }
    std::memcpy(out + (int64_t)blocks * kLayouts[kScreen].block + v * 4 * L, slack, sizeof slack);
  }
}

// The screen of one panel of a head: blocks of kScreen, and the slack of each output behind them.
void make_screen(Format f, const uint8_t* panel, int k, uint8_t* out) {
  switch (f) {
    case kF32: return make_screen_of<kF32>(panel, k, out);
    case kBF16: return make_screen_of<kBF16>(panel, k, out);
    case kInt8: return make_screen_of<kInt8>(panel, k, out);
    case kQ8_0: return make_screen_of<kQ8_0>(panel, k, out);
    default: __builtin_trap();
  }
}

// H a / 32 of a prepared row, [k up to a multiple of 32], and |a|; infinity for one that the bound does not hold for.
float screen_row(ActKind kind, const uint8_t* acts, int k, float* mixed) {
  restore(kind, acts, k, mixed);
  const int padded = (int)round_up(k, kScreenGroup);
  for (int i = k; i < padded; ++i) mixed[i] = 0;
  double square = 0;
  for (int i = 0; i < k; ++i) square += (double)mixed[i] * mixed[i];
  for (int i = 0; i < padded; i += kScreenGroup) {
    mix(mixed + i);
    for (int j = 0; j < kScreenGroup; ++j) mixed[i + j] *= 1.0f / kScreenGroup;
  }
  const float norm = (float)__builtin_sqrt(square) * 1.00001f;
  return norm > kShortest && norm < kLongest ? norm : kInfinity;
}

// The most that the logits of a panel's outputs in `keep` can be.
float highest_bound(const float* scores, const float* slack, float norm, uint32_t keep) {
  if (!(norm < kInfinity)) return kInfinity;
  if (keep == ~0u) {
    F bound = splat(-kInfinity);
    for (int i = 0; i < kPanel; i += L) bound = max(bound, fma(load<F>(slack + i), splat(norm), load<F>(scores + i)));
    return highest(bound) + kLeast;
  }
  float bound = -kInfinity;
  for (; keep; keep &= keep - 1) {
    const int i = __builtin_ctz(keep);
    bound = most(bound, slack[i] * norm + scores[i]);
  }
  return bound + kLeast;
}

// Few rows wait for the weights; more wait for the multipliers, of which a screen needs as many as block formats do.
// Measured on two cores, with AVX2: three rows of a screen take 1.0 ms, of int8 0.66.
int screen_rows(Format f) {
  if (f != kF32 && f != kBF16 && f != kInt8 && f != kQ8_0) return 0;
  return L == 16 ? 4 : L < 8 ? 0 : f == kF32 || f == kBF16 ? 3 : 1;
}

}  // namespace MARTLET_ISA
}  // namespace martlet
