// The two products of attention in AMX tiles, for any number of query rows: so a token has the same bits alone and in a
// prompt. A tile of 16 keys is [dim / 2][16][2] and one of values [8][dim][2] in a bf16 cache, [dim / 4][16][4] and
// [4][dim][4] in one of int8: all are the B of a product as they lie there. What meets int8 has 15 bits, in two parts
// (kActSplit1024): nothing is widened, and only keys and values are rounded.
#pragma once

#include "attention_plan.hpp"
#include "rows.hpp"
#include "tiles.hpp"

namespace martlet {
namespace MARTLET_ISA {

#if defined(TILE_A)

// One row tile's part of a sum over the head: C += queries * keys, for 32 or the last 16 elements of the head.
#define ADD_SCORES(C, A, B, r)                                   \
  _tile_loadd(A, at + int64_t(r) * kTileRows * row_bytes, row_bytes); \
  _tile_dpbf16ps(C, A, B);

// scores[rows][16], kChunk apart, of queries [rows][dim] against 16 keys.
inline void tile_scores(const uint8_t* q, int rows, const uint8_t* k_tile, int dim, float* scores) {
  const int64_t row_bytes = 2 * (int64_t)dim, score_bytes = 4 * kChunk;
  for (; rows > 0; rows -= 3 * kTileRows, q += 3 * kTileRows * row_bytes, scores += 3 * kTileRows * kChunk) {
    const bool second = rows > kTileRows, third = rows > 2 * kTileRows;
    _tile_zero(TILE_C0);
    _tile_zero(TILE_C1);
    _tile_zero(TILE_C2);
    int d = 0;
    for (; d + 32 <= dim; d += 32) {
      const uint8_t* at = q + 2 * d;
      _tile_loadd(TILE_B, k_tile + d * 32, 64);
      ADD_SCORES(TILE_C0, TILE_A, TILE_B, 0)
      if (second) { ADD_SCORES(TILE_C1, TILE_A, TILE_B, 1) }
      if (third) { ADD_SCORES(TILE_C2, TILE_A, TILE_B, 2) }
    }
    if (d < dim) {
      const uint8_t* at = q + 2 * d;
      _tile_loadd(TILE_HALF_B, k_tile + d * 32, 64);
      ADD_SCORES(TILE_C0, TILE_HALF_A, TILE_HALF_B, 0)
      if (second) { ADD_SCORES(TILE_C1, TILE_HALF_A, TILE_HALF_B, 1) }
      if (third) { ADD_SCORES(TILE_C2, TILE_HALF_A, TILE_HALF_B, 2) }
    }
    _tile_stored(TILE_C0, scores, score_bytes);
    if (second) _tile_stored(TILE_C1, scores + kTileRows * kChunk, score_bytes);
    if (third) _tile_stored(TILE_C2, scores + 2 * kTileRows * kChunk, score_bytes);
  }
}

#define ADD_VALUES(C, i)                                               \
  _tile_loadd(TILE_HALF_B, values + (i) * 64, value_bytes);            \
  _tile_dpbf16ps(C, TILE_HALF_A, TILE_HALF_B);

// out[rows][dim] = weights [rows][kChunk] times the values of tiles first ... tiles - 1.
inline void tile_values(const uint8_t* weights, int rows, const uint8_t* const* v_tiles, int first, int tiles, int dim,
                        float* out) {
  constexpr int kAcross = 4;  // tiles of outputs at a time
  const int64_t value_bytes = 4 * (int64_t)dim, weight_bytes = 2 * kChunk;
  alignas(64) float sums[kTileRows][kAcross * kTileOutputs];
  written();
  for (int row = 0; row < rows; row += kTileRows)
    for (int column = 0; column < dim; column += kAcross * kTileOutputs) {
      const int across = least(kAcross, (dim - column) / kTileOutputs);
      _tile_zero(TILE_C0);
      _tile_zero(TILE_C1);
      _tile_zero(TILE_C2);
      _tile_zero(TILE_C3);
      for (int t = first; t < tiles; ++t) {
        const uint8_t* values = v_tiles[t] + 4 * column;
        _tile_loadd(TILE_HALF_A, weights + row * weight_bytes + t * kHalfTileBytes, weight_bytes);
        ADD_VALUES(TILE_C0, 0)
        if (across > 1) { ADD_VALUES(TILE_C1, 1) }
        if (across > 2) { ADD_VALUES(TILE_C2, 2) }
        if (across > 3) { ADD_VALUES(TILE_C3, 3) }
      }
      // Behind the last row lies another task's softmax.
      const bool whole = row + kTileRows <= rows;
      float* to = whole ? out + (int64_t)row * dim + column : sums[0];
      const int64_t stride = whole ? 4 * (int64_t)dim : (int64_t)sizeof sums[0];
      _tile_stored(TILE_C0, to, stride);
      if (across > 1) _tile_stored(TILE_C1, to + kTileOutputs, stride);
      if (across > 2) _tile_stored(TILE_C2, to + 2 * kTileOutputs, stride);
      if (across > 3) _tile_stored(TILE_C3, to + 3 * kTileOutputs, stride);
      if (!whole)
        for (int r = row; r < rows; ++r)
          std::memcpy(out + (int64_t)r * dim + column, sums[r - row], (size_t)across * 64);
    }
}

#undef ADD_SCORES
#undef ADD_VALUES

// One 16 x 16 product of 15-bit integers as its two sums leave the tiles.
struct alignas(64) Parts {
  int32_t high[kTileRows][kTileOutputs], low[kTileRows][kTileOutputs];
  INLINE F row(int m) const { return to_float((load<I>(high[m]) << 7) + load<I>(low[m])); }
};

// scores[rows][16], kChunk apart, of queries (query_row_bytes apart) against 16 keys of s8.
inline void tile_byte_scores(const uint8_t* q, int rows, int64_t stride, const uint8_t* k_tile, int dim,
                             float* scores) {
  const int rest = dim % kTileBytes;
  const uint8_t* scale = q + 2 * round_up(dim, kTileBytes);
  const F key_scale = load<F>(k_tile + 16 * dim);
  alignas(64) uint8_t last[kTileRows * kTileBytes];
  if (rest) {  // the last part of a head that is no multiple of 64, with zeros behind
    std::memcpy(last, k_tile + (dim - rest) * 16, (size_t)rest * 16);
    std::memset(last + rest * 16, 0, sizeof last - (size_t)rest * 16);
    written();
  }
  Parts sums;
  for (int row = 0; row < rows; row += kTileRows, q += kTileRows * stride) {
    _tile_zero(TILE_C0);
    _tile_zero(TILE_C1);
    for (int d = 0; d < dim; d += kTileBytes) {
      _tile_loadd(TILE_B, d + kTileBytes <= dim ? k_tile + d * 16 : last, 64);
      _tile_loadd(TILE_A, q + 2 * d, stride);
      _tile_dpbssd(TILE_C0, TILE_A, TILE_B);
      _tile_loadd(TILE_A, q + 2 * d + kTileBytes, stride);
      _tile_dpbssd(TILE_C1, TILE_A, TILE_B);
    }
    _tile_stored(TILE_C0, sums.high, 64);
    _tile_stored(TILE_C1, sums.low, 64);
    for (int m = 0; m < kTileRows && row + m < rows; ++m, scale += stride, scores += kChunk)
      store(scores, sums.row(m) * (key_scale * scalar<float>(scale)));
  }
}

// out[rows][dim] = weights of 15 bits, `stride` bytes apart, times the values of s8 of tiles first ... tiles - 1. The
// weights cover `padded` tiles, a multiple of 4, and are 0 for all others. room: [kChunk][dim] bytes.
inline void tile_byte_values(const uint8_t* weights, int rows, int64_t stride, const uint8_t* const* v_tiles, int first,
                             int tiles, int padded, int dim, uint8_t* room, float* out) {
  constexpr int kDeep = 4;  // tiles of 16 values that one product takes
  const int64_t row_bytes = 4 * (int64_t)dim, tile_bytes = 16 * (int64_t)dim;
  for (int t = first; t < tiles; ++t) std::memcpy(room + t * tile_bytes, v_tiles[t], (size_t)tile_bytes);
  written();
  Parts sums[2];
  for (int row = 0; row < rows; row += kTileRows, weights += kTileRows * stride)
    for (int column = 0; column < dim; column += 2 * kTileOutputs) {
      const bool two = column + kTileOutputs < dim;
      _tile_zero(TILE_C0);
      _tile_zero(TILE_C1);
      _tile_zero(TILE_C2);
      _tile_zero(TILE_C3);
      for (int t = first / kDeep * kDeep; t < padded; t += kDeep) {
        const uint8_t *a = weights + t * 2 * kTileRows, *b = room + t * tile_bytes + 4 * column;
        _tile_loadd(TILE_A, a, stride);
        _tile_loadd(TILE_B, b, row_bytes);
        _tile_dpbssd(TILE_C0, TILE_A, TILE_B);
        if (two) {
          _tile_loadd(TILE_B, b + 64, row_bytes);
          _tile_dpbssd(TILE_C2, TILE_A, TILE_B);
          _tile_loadd(TILE_A, a + kTileBytes, stride);
          _tile_dpbssd(TILE_C3, TILE_A, TILE_B);
          _tile_loadd(TILE_B, b, row_bytes);
        } else {
          _tile_loadd(TILE_A, a + kTileBytes, stride);
        }
        _tile_dpbssd(TILE_C1, TILE_A, TILE_B);
      }
      _tile_stored(TILE_C0, sums[0].high, 64);
      _tile_stored(TILE_C1, sums[0].low, 64);
      _tile_stored(TILE_C2, sums[1].high, 64);
      _tile_stored(TILE_C3, sums[1].low, 64);
      const uint8_t* scale = weights + padded * 2 * kTileRows;
      for (int m = 0; m < kTileRows && row + m < rows; ++m, scale += stride)
        for (int v = 0; v <= two; ++v)
          store(out + (int64_t)(row + m) * dim + column + v * kTileOutputs, sums[v].row(m) * scalar<float>(scale));
    }
}

#else

inline void tile_scores(const uint8_t*, int, const uint8_t*, int, float*) {}
inline void tile_values(const uint8_t*, int, const uint8_t* const*, int, int, int, float*) {}
inline void tile_byte_scores(const uint8_t*, int, int64_t, const uint8_t*, int, float*) {}
inline void tile_byte_values(const uint8_t*, int, int64_t, const uint8_t* const*, int, int, int, int, uint8_t*,
                             float*) {}

#endif

}  // namespace MARTLET_ISA
}  // namespace martlet
