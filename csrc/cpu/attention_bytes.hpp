// The two products of attention with a cache of int8, in vectors. Queries and weights have 15 bits, in two parts of s8 or
// u8, as in tiles (attention_tiles.hpp): twice the products of eight bits, as many as pairs of bf16 take, and nothing is
// widened. Without VNNI they are words, and so become the bytes that meet them, in registers. Sums are integers, so
// their order changes no bit.
#pragma once

#include "attention_plan.hpp"
#include "rows.hpp"

namespace martlet {
namespace MARTLET_ISA {

// Tiles to ask for while tiles first ... end - 1 of something else are read.
INLINE void ask(const Upcoming* next, int first, int end) {
  if (next)
    for (int i = first; i < least(end, next->count); ++i) fetch(next->tiles[i], next->bytes);
}

// Weights [count], none negative, as integers (store_parts), and the scale behind all. count: a multiple of 64.
INLINE void split_weights(const float* x, float largest, int count, uint8_t* out) {
  constexpr float kMost = 16256.0f;
  const float inverse = largest > 0 ? kMost / largest : 0.0f, scale = largest / kMost;
  for (int i = 0; i < count; i += 64) {
    I q[64 / L];
    for (int j = 0; j < 64 / L; ++j) q[j] = round_to_int(load<F>(x + i + j * L) * inverse);
    store_parts<true>(out + 2 * i, q);
  }
  std::memcpy(out + 2 * count, &scale, 4);
}

#if defined(__AVX512VNNI__)

// scores[r][16 * kTogether], kChunk apart, of kRows queries (kActSplit1024, `stride` apart) against kTogether tiles of
// 16 keys. Keys become u8, 128 too large, which the sum of each query's integers undoes.
template <int kRows, int kTogether>
INLINE void byte_score_tile(const uint8_t* q, int64_t stride, const uint8_t* const* k_tiles, int dim, float* scores) {
  I acc[2][kRows][kTogether] = {};
  for (int block = 0; block < dim; block += 64) {
    const uint8_t* at = q + 2 * block;
    const int end = least(64, dim - block);
    for (int d = 0; d < end; d += 4, at += 4) {
      U key[kTogether];
      for (int t = 0; t < kTogether; ++t) key[t] = load<U>(k_tiles[t] + (block + d) * 16) ^ 0x80808080u;
      for (int r = 0; r < kRows; ++r)
        for (int part = 0; part < 2; ++part) {
          const U x = splat(scalar<uint32_t>(at + r * stride + 64 * part));
          for (int t = 0; t < kTogether; ++t) acc[part][r][t] = dot4<8>(acc[part][r][t], key[t], x);
        }
    }
  }
  const uint8_t* groups = q + groups_at(kActSplit1024, dim);
#pragma GCC unroll 8  // else the sums go through memory
  for (int r = 0; r < kRows; ++r) {
    const Group group = scalar<Group>(groups + r * stride);
#pragma GCC unroll 4
    for (int t = 0; t < kTogether; ++t) {
      const I sum = (acc[0][r][t] << 7) + acc[1][r][t] + group.minus_sum;
      const F key_scale = load<F>(k_tiles[t] + 16 * dim);
      store(scores + r * kChunk + t * 16, to_float(sum) * (key_scale * group.scale));
    }
  }
}

// out[r][kVectors * L] = weights of kRows queries, `stride` bytes apart, times values, for columns from `column` on.
template <int kRows, int kVectors>
INLINE void byte_value_tile(const uint8_t* weights, int64_t stride, const uint8_t* const* v_tiles, int tiles, int dim,
                            int column, const Upcoming* next, float* out) {
  I acc[2][kRows][kVectors] = {};
  for (int tile = 0; tile < tiles; ++tile) {
    ask(next, tile, tile + 1);
    if (!v_tiles[tile]) continue;
    const uint8_t* at = weights + tile / 4 * 128 + tile % 4 * 16;
    for (int s = 0; s < 4; ++s, at += 4) {
      U value[kVectors];
      for (int v = 0; v < kVectors; ++v) value[v] = load<U>(v_tiles[tile] + ((int64_t)s * dim + column + v * L) * 4);
      for (int r = 0; r < kRows; ++r)
        for (int part = 0; part < 2; ++part) {
          const U p = splat(scalar<uint32_t>(at + r * stride + 64 * part));
          for (int v = 0; v < kVectors; ++v) acc[part][r][v] = dot4<8>(acc[part][r][v], p, value[v]);
        }
    }
  }
  const uint8_t* scales = weights + round_up(tiles, 4) * 32;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const float scale = scalar<float>(scales + r * stride);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      store(out + (int64_t)r * dim + column + v * L, to_float((acc[0][r][v] << 7) + acc[1][r][v]) * scale);
  }
}

#elif defined(__AVX2__)

template <int kRows, int kTogether>
INLINE void byte_score_tile(const uint8_t* q, int64_t stride, const uint8_t* const* k_tiles, int dim, float* scores) {
  constexpr int kInTile = 16 / L, kVectors = kTogether * kInTile;
  I acc[kRows][kVectors] = {};
  for (int d = 0; d < dim; d += 4)
    for (int v = 0; v < kVectors; ++v) {
      const U key = load<U>(k_tiles[v / kInTile] + d * 16 + v % kInTile * 4 * L);
      for (int pair = 0; pair < 2; ++pair) {
        const U keys = signed_pair(key, pair);
        const uint8_t* at = q + 2 * d + 4 * pair;
        for (int r = 0; r < kRows; ++r)
          acc[r][v] = dot2_words(acc[r][v], keys, splat(scalar<uint32_t>(at + r * stride)));
      }
    }
  const uint8_t* groups = q + groups_at(kActSplit1024, dim);
#pragma GCC unroll 8  // else the sums go through memory
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const F key_scale = load<F>(k_tiles[v / kInTile] + 16 * dim + v % kInTile * 4 * L);
      store(scores + r * kChunk + v * L, to_float(acc[r][v]) * (key_scale * scalar<float>(groups + r * stride)));
    }
}

template <int kRows, int kVectors>
INLINE void byte_value_tile(const uint8_t* weights, int64_t stride, const uint8_t* const* v_tiles, int tiles, int dim,
                            int column, const Upcoming* next, float* out) {
  I acc[kRows][kVectors] = {};
  for (int tile = 0; tile < tiles; ++tile) {
    ask(next, tile, tile + 1);
    if (!v_tiles[tile]) continue;
    const uint8_t* at = weights + tile * 32;
    for (int s = 0; s < 4; ++s)
      for (int v = 0; v < kVectors; ++v) {
        const U value = load<U>(v_tiles[tile] + ((int64_t)s * dim + column + v * L) * 4);
        for (int pair = 0; pair < 2; ++pair) {
          const U values = signed_pair(value, pair);
          const uint8_t* from = at + 8 * s + 4 * pair;
          for (int r = 0; r < kRows; ++r)
            acc[r][v] = dot2_words(acc[r][v], values, splat(scalar<uint32_t>(from + r * stride)));
        }
      }
  }
  const uint8_t* scales = weights + round_up(tiles, 4) * 32;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      store(out + (int64_t)r * dim + column + v * L, to_float(acc[r][v]) * scalar<float>(scales + r * stride));
}

#endif

#if defined(__AVX2__)

template <int M, int kTogether>
INLINE void byte_scores_of(const uint8_t* q, int rows, int64_t stride, const uint8_t* const* k_tiles, int dim,
                           float* scores) {
  for (; rows >= M; rows -= M, q += M * stride, scores += M * kChunk)
    byte_score_tile<M, kTogether>(q, stride, k_tiles, dim, scores);
  if constexpr (M > 1)
    if (rows) byte_scores_of<M - 1, kTogether>(q, rows, stride, k_tiles, dim, scores);
}

// scores[rows][16 * count], kChunk apart, against a few tiles of keys.
INLINE void byte_scores(const uint8_t* q, int rows, int64_t stride, const uint8_t* const* k_tiles, int count, int dim,
                        float* scores) {
  if (count == 4) return byte_scores_of<kWords ? 1 : 2, 4>(q, rows, stride, k_tiles, dim, scores);
  if (count == 2) return byte_scores_of<kWords ? 3 : 6, 2>(q, rows, stride, k_tiles, dim, scores);
  byte_scores_of<6, 1>(q, rows, stride, k_tiles, dim, scores);
}

template <int M>
INLINE void byte_values(const uint8_t* weights, int rows, int64_t stride, const uint8_t* const* v_tiles, int tiles,
                        int dim, const Upcoming* next, float* out) {
  constexpr int kMost = M > 3 ? 2 : 4;
  for (; rows >= M; rows -= M, weights += M * stride, out += (int64_t)M * dim) {
    int column = 0;
    for (; column + kMost * L <= dim; column += kMost * L, next = nullptr)
      byte_value_tile<M, kMost>(weights, stride, v_tiles, tiles, dim, column, next, out);
    for (; column < dim; column += L, next = nullptr)
      byte_value_tile<M, 1>(weights, stride, v_tiles, tiles, dim, column, next, out);
  }
  if constexpr (M > 1)
    if (rows) byte_values<M - 1>(weights, rows, stride, v_tiles, tiles, dim, next, out);
}

#else

INLINE void byte_scores(const uint8_t*, int, int64_t, const uint8_t* const*, int, int, float*) {}
template <int M>
INLINE void byte_values(const uint8_t*, int, int64_t, const uint8_t* const*, int, int, const Upcoming*, float*) {}

#endif

}  // namespace MARTLET_ISA
}  // namespace martlet
