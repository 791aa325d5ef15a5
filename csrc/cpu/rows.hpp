// Work on single rows of activations: norm, conversion to what a format multiplies with, epilogues, rotation.
#pragma once

#include "program.hpp"
#include "simd.hpp"
#include "tiles.hpp"

namespace martlet {
namespace MARTLET_ISA {

INLINE float rms_factor(const float* x, int n, float eps) {
  F squares[4] = {};  // a single sum would wait for itself
  int i = 0;
  for (; i + 4 * L <= n; i += 4 * L)
    for (int j = 0; j < 4; ++j) {
      const F v = load<F>(x + i + j * L);
      squares[j] = fma(v, v, squares[j]);
    }
  for (; i + L <= n; i += L) {
    const F v = load<F>(x + i);
    squares[0] = fma(v, v, squares[0]);
  }
  float total = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
  for (; i < n; ++i) total += x[i] * x[i];
  return 1.0f / __builtin_sqrtf(total / (float)n + eps);
}

// `count` <= L values of the normed row from element i on; the others are 0.
INLINE F normed(const float* x, const float* norm, float factor, int i, int count) {
  F v = {}, w = {};
  if (count == L) {
    v = load<F>(x + i);
    if (norm) w = load<F>(norm + i);
  } else {
    for (int lane = 0; lane < count; ++lane) {
      v[lane] = x[i + lane];
      if (norm) w[lane] = norm[i + lane];
    }
  }
  return norm ? v * factor * w : v;
}

// The first `bytes` of v, or all of it.
template <class V>
INLINE void put_lanes(void* out, V v, int64_t bytes) {
  if (bytes >= (int64_t)sizeof v) store(out, v);
  else std::memcpy(out, &v, (size_t)bytes);
}

// One group of kGroup values from v, as integers of `kind` at `out` (the row's) and what stands behind them. Returns its
// share of the row's scaled_sum (kActPair32).
template <ActKind kKind, int kGroup>
INLINE float quantise_group(const F* v, int g, uint8_t* out, uint8_t* groups) {
  constexpr int kVectors = kGroup / L;
  constexpr bool kBytes = kKind == kActByte64 || kKind == kActPair32;
  constexpr float kMost = kBytes ? 127.0f : 16256.0f;  // 16256 = 128 * 127
  F peak = {};
  for (int i = 0; i < kVectors; ++i) {
    const F size = abs(v[i]);
    peak = max(peak, kKind == kActPair32 ? size + swap_pairs(size) : size);
  }
  const float largest = highest(peak), inverse = largest > 0 ? kMost / largest : 0.0f;
  I halves[2] = {};
  for (int i = 0; i < kVectors; ++i) {
    const I q = round_to_int(v[i] * inverse);
    halves[i * 2 / kVectors] += q;
    if (kKind == kActWord32) {
      store(out + 2 * (g * kGroup + i * L), to_words(q));
    } else if (kBytes) {
      store(out + g * kGroup + i * L, to_bytes(q));
    } else {
      const I high = (q + 64) >> 7;
      store(out + 2 * g * kGroup + i * L, to_bytes(high));
      store(out + (2 * g + 1) * kGroup + i * L, to_bytes(q - (high << 7)));
    }
  }
  Group& group = *(Group*)(groups + g * sizeof(Group));  // in its place: a copy would wait for the copied to be stored
  group.scale = largest / kMost;
  if (kKind == kActPair32) {
    return 128.0f * group.scale * (float)sum(halves[0] + halves[1]);
  } else if (kKind == kActByte64) {  // met by int8 alone, which asks for no halves
    group.minus_sum = -128 * sum(halves[0] + halves[1]);
  } else {
    for (int h = 0; h < 2; ++h) group.minus_half[h] = -sum(halves[h]);
    group.minus_sum = group.minus_half[0] + group.minus_half[1];
    group.scaled_sum = -group.scale * (float)group.minus_sum;
  }
  return 0.0f;
}

template <ActKind kKind>
INLINE void quantise(const float* x, const float* norm, float factor, int k, uint8_t* out) {
  constexpr int kGroup = kKind == kActByte64 ? 64 : 32, kVectors = kGroup / L;
  uint8_t* groups = out + groups_at(kKind, k);
  F v[kVectors];
  float total = 0;
  int g = 0;
  for (; (g + 1) * kGroup <= k; ++g) {
    for (int i = 0; i < kVectors; ++i) v[i] = normed(x, norm, factor, g * kGroup + i * L, L);
    total += quantise_group<kKind, kGroup>(v, g, out, groups);
  }
  if (g * kGroup < k) {
    for (int i = 0; i < kVectors; ++i) {
      const int at = g * kGroup + i * L;
      v[i] = normed(x, norm, factor, at, most(0, least(L, k - at)));
    }
    total += quantise_group<kKind, kGroup>(v, g, out, groups);
  }
  if (kKind == kActPair32) ((Group*)groups)->scaled_sum = total;
}

// Groups of 1024: the largest is looked for in a first pass over each.
INLINE void quantise_long(const float* x, const float* norm, float factor, int k, uint8_t* out) {
  constexpr int kGroup = 1024, kBlock = 64;
  constexpr float kMost = 16256.0f;
  uint8_t* groups = out + groups_at(kActSplit1024, k);
  for (int begin = 0; begin < k; begin += kGroup, groups += sizeof(Group)) {
    const int end = least(k, begin + kGroup);
    F peak = {};
    for (int at = begin; at < end; at += L) peak = max(peak, abs(normed(x, norm, factor, at, least(L, end - at))));
    const float largest = highest(peak), inverse = largest > 0 ? kMost / largest : 0.0f;
    I total = {};
    for (int block = begin; block < end; block += kBlock) {
      I q[kBlock / L];
      for (int i = 0; i < kBlock / L; ++i) {
        const int at = block + i * L;
        q[i] = round_to_int(normed(x, norm, factor, at, most(0, least(L, end - at))) * inverse);
        total += q[i];
      }
      store_parts<false>(out + 2 * block, q);
    }
    const Group group = {largest / kMost, 0.0f, -128 * sum(total), {}};
    std::memcpy(groups, &group, sizeof group);
  }
}

// One row x[k], normed when `norm` is given, as activations of a kind.
void prepare(ActKind kind, const float* x, const float* norm, float eps, int k, uint8_t* out) {
  const float factor = norm ? rms_factor(x, k, eps) : 1.0f;
  switch (kind) {
    case kActSplit32: return quantise<kActSplit32>(x, norm, factor, k, out);
    case kActByte64: return quantise<kActByte64>(x, norm, factor, k, out);
    case kActPair32: return quantise<kActPair32>(x, norm, factor, k, out);
    case kActSplit1024: return quantise_long(x, norm, factor, k, out);
    case kActWord32: return quantise<kActWord32>(x, norm, factor, k, out);
    case kActBF16:
      for (int i = 0; i < k; i += L) {
        const Halves v = to_bf16(normed(x, norm, factor, i, least(L, k - i)));
        const int count = (int)round_up(least(L, k - i), 2);
        if (kPairDot) put_lanes(out + 2 * i, v, 2 * count);
        else put_lanes(out + 4 * i, from_bf16(v), 4 * count);
      }
      if (kTiles) std::memset(out + 2 * round_up(k, 2), 0, 2 * size_t(round_up(k, 32) - round_up(k, 2)));
      return;
    case kActF32:
      for (int i = 0; i < k; i += L) {
        const F v = normed(x, norm, factor, i, least(L, k - i));
        put_lanes(out + 4 * i, v, 4 * (k - i));
      }
  }
}

// The values of a row that `prepare` made, of any kind but words.
void restore(ActKind kind, const uint8_t* acts, int k, float* out) {
  const uint8_t* groups = acts + groups_at(kind, k);
  const auto scale = [&](int group) { return scalar<float>(groups + group * sizeof(Group)); };
  const auto split = [&](int i, int block) {  // high parts of a block, then its low ones
    const int8_t* at = (const int8_t*)acts + i / block * 2 * block + i % block;
    return (float)(128 * at[0] + at[block]);
  };
  switch (kind) {
    case kActF32: std::memcpy(out, acts, 4 * (size_t)k); return;
    case kActBF16:
      if (!kPairDot) std::memcpy(out, acts, 4 * (size_t)k);
      for (int i = 0; kPairDot && i < k; ++i) {
        const uint32_t bits = (uint32_t)scalar<uint16_t>(acts + 2 * i) << 16;
        std::memcpy(out + i, &bits, 4);
      }
      return;
    case kActByte64:
      for (int i = 0; i < k; ++i) out[i] = (float)(int8_t)acts[i] * scale(i / 64);
      return;
    case kActPair32:
      for (int i = 0; i < k; ++i) out[i] = (float)(int8_t)acts[i] * scale(i / 32);
      return;
    case kActSplit32:
      for (int i = 0; i < k; ++i) out[i] = split(i, 32) * scale(i / 32);
      return;
    case kActSplit1024:
      for (int i = 0; i < k; ++i) out[i] = split(i, 64) * scale(i / 1024);
      return;
    default: __builtin_trap();
  }
}

// e^-x overflows to a large finite number, so that both ends come out right: x and 0.
INLINE F sigmoid(F x) { return 1.0f / (1.0f + exp(-x)); }

INLINE F erf(F x) {  // Abramowitz & Stegun 7.1.26, error below 1.5e-7
  const F a = abs(x), t = 1.0f / (1.0f + 0.3275911f * a);
  F p = splat(1.061405429f);
  p = fma(p, t, splat(-1.453152027f));
  p = fma(p, t, splat(1.421413741f));
  p = fma(p, t, splat(-0.284496736f));
  p = fma(p, t, splat(0.254829592f));
  const F y = 1.0f - p * t * exp(-a * a);
  return x < 0.0f ? -y : y;
}

INLINE F activate(int activation, F x) {
  switch (activation) {
    case kSilu: return x * sigmoid(x);
    case kGeluTanh: return x * sigmoid(1.5957691216f * (x + 0.044715f * x * x * x));  // tanh(u) = 2 sigmoid(2u) - 1
    case kGelu: return 0.5f * x * (1.0f + erf(x * 0.70710678f));
    case kTanh: return capped(x, 1.0f);
    case kSigmoid: return sigmoid(x);
    default: {
      const F positive = max(x, F{});
      return positive * positive;
    }
  }
}

// A panel of gates and ups that fills a line of y in every row.
template <int kActivation>
INLINE void finish_gated(const LinearOp& op, const float* products, float* y, int rows) {
  for (int r = 0; r < rows; ++r, products += kPanel, y += op.y_stride)
    for (int i = 0; i < kPanel / 2; i += L)
      store(y + i, activate(kActivation, load<F>(products + i)) * load<F>(products + kPanel / 2 + i));
}
template <int kEpilogue>
INLINE void finish_plain(const LinearOp& op, const float* products, float* y, int rows) {
  for (int r = 0; r < rows; ++r, products += kPanel, y += op.y_stride)
    for (int i = 0; i < kPanel; i += L) {
      const F p = load<F>(products + i);
      store(y + i, kEpilogue == kAdd ? p + load<F>(y + i) : p);
    }
}

// Takes the products of one panel, [rows][32], into columns of y.
void finish(const LinearOp& op, int panel, const float* products, int row0, int rows) {
  const bool gated = op.epilogue == kGated;
  if (!op.bias && (panel + 1) * (gated ? kPanel / 2 : kPanel) <= op.n_out) {  // common cases, without their questions
    float* y = op.y + row0 * op.y_stride + panel * (gated ? kPanel / 2 : kPanel);
    if (op.epilogue == kStore) return finish_plain<kStore>(op, products, y, rows);
    if (op.epilogue == kAdd) return finish_plain<kAdd>(op, products, y, rows);
    if (gated && op.activation == kSilu) return finish_gated<kSilu>(op, products, y, rows);
    if (gated && op.activation == kGeluTanh) return finish_gated<kGeluTanh>(op, products, y, rows);
  }
  const int width = gated ? kPanel / 2 : kPanel, column = panel * width;
  const int columns = least(width, op.n_out - column);
  for (int r = 0; r < rows; ++r) {
    float* y = op.y + (int64_t)(row0 + r) * op.y_stride + column;
    const float* p = products + r * kPanel;
    for (int i = 0; i < columns; i += L) {
      const int lanes = least(L, columns - i);
      F v = load<F>(p + i), old = {};
      if (op.bias) v += load<F>(op.bias + panel * kPanel + i);
      if (op.epilogue == kAdd || op.epilogue == kMultiply) {
        if (lanes == L) old = load<F>(y + i);
        else std::memcpy(&old, y + i, 4 * (size_t)lanes);
      }
      switch (op.epilogue) {
        case kAdd: v += old; break;
        case kMultiply: v *= old; break;
        case kActivate: v = activate(op.activation, v); break;
        case kGated: {
          F up = load<F>(p + width + i);
          if (op.bias) up += load<F>(op.bias + panel * kPanel + width + i);
          v = activate(op.activation, v) * up;
        }
      }
      put_lanes(y + i, v, 4 * lanes);
    }
  }
}

// y += x, normed.
void norm_add(const float* x, const float* norm, float eps, int n, float* y) {
  const float factor = rms_factor(x, n, eps);
  int i = 0;
  for (; i + L <= n; i += L) store(y + i, load<F>(y + i) + normed(x, norm, factor, i, L));
  for (; i < n; ++i) y[i] += x[i] * factor * norm[i];
}

// x = cap * tanh(x / cap).
void soft_cap(float* x, int n, float cap) {
  for (int i = 0; i < n; i += L) {
    const int lanes = least(L, n - i);
    F v = {};
    if (lanes == L) v = load<F>(x + i);
    else std::memcpy(&v, x + i, 4 * (size_t)lanes);
    put_lanes(x + i, capped(v, cap), 4 * lanes);
  }
}

// out = head x, normed when `norm` is given, rotated, times scale.
INLINE void rotate_head(const AttentionOp& op, const float* x, const float* norm, const float* cosines,
                        const float* sines, float scale, float* out) {
  const float factor = norm ? rms_factor(x, op.dim, op.eps) : 1.0f;
  for (int i = 0; i < op.dim; i += L) store(out + i, normed(x, norm, factor, i, L));
  const int half = op.rotary / 2, step = op.interleaved ? 2 : 1, partner = op.interleaved ? 1 : half;
  int i = 0;
  if (!op.interleaved)
    for (; i + L <= half; i += L) {
      const F a = load<F>(out + i), b = load<F>(out + half + i), c = load<F>(cosines + i), s = load<F>(sines + i);
      store(out + i, a * c - b * s);
      store(out + half + i, b * c + a * s);
    }
  for (; i < half; ++i) {
    float *a = out + i * step, *b = a + partner;
    const float first = *a, second = *b;
    *a = first * cosines[i] - second * sines[i];
    *b = second * cosines[i] + first * sines[i];
  }
  if (scale != 1.0f)
    for (int d = 0; d < op.dim; d += L) store(out + d, load<F>(out + d) * scale);
}

constexpr int kMaxHeadDim = 512;

// Zeroes the slots of a tile of v behind `slot`: attention reads them with weight zero, and zero times NaN is NaN.
// Integers are no NaN, their scales may be.
INLINE void clear_behind(const AttentionOp& op, int slot, void* v_tile) {
  if (op.cache == kCacheInt8) {
    std::memset((float*)((uint8_t*)v_tile + 16 * op.dim) + slot + 1, 0, 4 * (size_t)(15 - slot));
    return;
  }
  const int pack = op.cache == kCacheBF16 ? 2 : 1, first = slot / pack + 1, bytes = op.dim * 4;
  std::memset((uint8_t*)v_tile + (int64_t)first * bytes, 0, (size_t)(16 / pack - first) * bytes);
  if (slot % pack == 0 && pack == 2)
    for (int i = 0; i < op.dim; ++i) ((uint16_t*)v_tile)[(slot / 2 * op.dim + i) * 2 + 1] = 0;
}

// Bytes of one query as it meets a cache: bf16 where one of bf16 is multiplied in pairs, 15-bit integers and their
// scale (kActSplit1024) where one of int8 is multiplied as it is, else f32.
int64_t query_row_bytes(int32_t cache, int64_t dim) {
  if (cache == kCacheInt8 && kLongBytes) return 2 * round_up(dim, 64) + 64;
  return dim * (cache == kCacheBF16 && kPairDot ? 2 : 4);
}

// The queries of token t that share a kv head, normed, rotated and scaled, into q, query_row_bytes apart.
void rotate_queries(const AttentionOp& op, int64_t t, int kv_head, void* q) {
  const int group = op.heads / op.kv_heads, half = op.rotary / 2;
  const float* x = op.qkv + t * op.qkv_stride + (int64_t)kv_head * group * op.dim;
  float head[kMaxHeadDim];
  for (int h = 0; h < group; ++h) {
    rotate_head(op, x + h * op.dim, op.q_norm, op.cosines + t * half, op.sines + t * half, op.scale, head);
    uint8_t* out = (uint8_t*)q + h * query_row_bytes(op.cache, op.dim);
    if (op.cache == kCacheBF16 && kPairDot)
      for (int i = 0; i < op.dim; i += L) store(out + 2 * i, to_bf16(load<F>(head + i)));
    else if (op.cache == kCacheInt8 && kLongBytes) quantise_long(head, nullptr, 1.0f, op.dim, out);
    else std::memcpy(out, head, 4 * (size_t)op.dim);
  }
}

// One head's key into `slot` of its tile: lanes of `kPack` elements, 16 lanes apart. Its value: elements apart.
template <class T, int kPack>
INLINE void scatter(const T* key, const T* value, int dim, int slot, void* k_tile, void* v_tile) {
  for (int i = 0; i < dim; i += kPack)
    std::memcpy((T*)k_tile + (i * 16 + slot * kPack), key + i, sizeof(T) * kPack);
  T* v = (T*)v_tile + (int64_t)slot / kPack * dim * kPack + slot % kPack;
  for (int i = 0; i < dim; ++i) v[i * kPack] = value[i];
}

// One head as s8; returns the scale.
INLINE float to_s8(const float* x, int dim, int8_t* out) {
  F peak = {};
  for (int i = 0; i < dim; i += L) peak = max(peak, abs(load<F>(x + i)));
  const float largest = highest(peak), inverse = largest > 0 ? 127.0f / largest : 0.0f;
  for (int i = 0; i < dim; i += L) store(out + i, to_bytes(round_to_int(load<F>(x + i) * inverse)));
  return largest / 127.0f;
}

// The key and value of token t into `slot` of their tiles. last: the sequence holds nothing behind this token.
void store_key_value(const AttentionOp& op, int64_t t, int kv_head, int slot, bool last, void* k_tile, void* v_tile) {
  const int dim = op.dim, half = op.rotary / 2;
  const float* x = op.qkv + t * op.qkv_stride + (int64_t)(op.heads + kv_head) * dim;
  float head[kMaxHeadDim];
  rotate_head(op, x, op.k_norm, op.cosines + t * half, op.sines + t * half, 1.0f, head);
  const float* v = x + op.kv_heads * dim;
  if (op.cache == kCacheF32) {
    scatter<float, 1>(head, v, dim, slot, k_tile, v_tile);
  } else if (op.cache == kCacheBF16) {
    uint16_t key[kMaxHeadDim], value[kMaxHeadDim];
    for (int i = 0; i < dim; i += L) {
      store(key + i, to_bf16(load<F>(head + i)));
      store(value + i, to_bf16(load<F>(v + i)));
    }
    scatter<uint16_t, 2>(key, value, dim, slot, k_tile, v_tile);
  } else {
    int8_t key[kMaxHeadDim], value[kMaxHeadDim];
    const float k_scale = to_s8(head, dim, key), v_scale = to_s8(v, dim, value);
    std::memcpy((uint8_t*)k_tile + 16 * dim + 4 * slot, &k_scale, 4);
    std::memcpy((uint8_t*)v_tile + 16 * dim + 4 * slot, &v_scale, 4);
    scatter<int8_t, 4>(key, value, dim, slot, k_tile, v_tile);
  }
  if (last) clear_behind(op, slot, v_tile);
}

}  // namespace MARTLET_ISA
}  // namespace martlet
