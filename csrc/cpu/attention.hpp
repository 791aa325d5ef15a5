// Causal attention of a group of queries that share a kv head, over one chunk of the context.
//
// The context is cut at fixed positions (multiples of kChunk); each chunk gives its own softmax, and chunks are merged
// in order. A query's result is therefore the same bits alone, in a prefill, in any batch and on any number of threads.
#pragma once

#include "attention_plan.hpp"
#include "program.hpp"
#include "simd.hpp"

namespace martlet {
namespace MARTLET_ISA {

// Query rows that a tile keeps in registers, with 16 keys each or with 4 vectors of a value.
constexpr int kScoreRows = L == 16 ? 6 : L == 8 ? 2 : 1;
constexpr int kValueRows = L == 16 ? 5 : L == 8 ? 2 : 1;

// What the cache holds, and how it meets queries and weights.
enum class Kv { kFloats, kPairs, kWidened };  // f32; bf16 times bf16 pairs; bf16 times f32

template <Kv kKind>
struct Cache {
  static constexpr int kPack = kKind == Kv::kFloats ? 1 : 2;  // elements in a 32-bit lane of the cache
  static constexpr int kBytes = kKind == Kv::kPairs ? 2 : 4;  // of an element of a query, or of a weight
  static constexpr int kLane = kPack * kBytes;                // bytes of those that meet one lane
  struct Lane {
    F first, second;
  };
  static INLINE Lane unpack(const uint8_t* p) {
    const U raw = load<U>(p);
    return kKind == Kv::kWidened ? Lane{low_bf16(raw), high_bf16(raw)} : Lane{(F)raw, F{}};
  }
  // acc += lane * x, over the pack.
  static INLINE F mad(F acc, const Lane& lane, const uint8_t* x) {
    if (kKind == Kv::kPairs) return dot2(acc, (U)lane.first, splat(scalar<uint32_t>(x)));
    acc = fma(lane.first, splat(scalar<float>(x)), acc);
    return kKind == Kv::kFloats ? acc : fma(lane.second, splat(scalar<float>(x + 4)), acc);
  }
};

// scores[r][16] of kRows queries against one tile of 16 keys. Even and odd steps are summed apart: the few queries of a
// decoding sequence are too short a chain otherwise to keep the multipliers busy.
template <Kv kKind, int kRows>
INLINE void score_tile(const uint8_t* q, const uint8_t* k_tile, int dim, float* scores) {
  using C = Cache<kKind>;
  constexpr int kVectors = 16 / L;
  F acc[2][kRows][kVectors] = {};
  const int steps = dim / C::kPack;
  for (int d = 0; d < steps; d += 2)
    for (int odd = 0; odd < 2; ++odd)
      for (int v = 0; v < kVectors; ++v) {
        const typename C::Lane key = C::unpack(k_tile + (d + odd) * 64 + v * 4 * L);
        for (int r = 0; r < kRows; ++r)
          acc[odd][r][v] = C::mad(acc[odd][r][v], key, q + ((int64_t)r * steps + d + odd) * C::kLane);
      }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) store(scores + r * kChunk + v * L, acc[0][r][v] + acc[1][r][v]);
}

// out[r][kVectors * L] = weights of kRows queries times values, for columns from `column` on.
template <Kv kKind, int kRows, int kVectors>
INLINE void value_tile(const uint8_t* weights, const uint8_t* const* v_tiles, int tiles, int dim, int column,
                       float* out) {
  using C = Cache<kKind>;
  F acc[kRows][kVectors] = {};
  constexpr int kSteps = 16 / C::kPack;
  for (int tile = 0; tile < tiles; ++tile) {
    if (!v_tiles[tile]) continue;
    for (int s = 0; s < kSteps; ++s) {
      typename C::Lane value[kVectors];
      for (int v = 0; v < kVectors; ++v) value[v] = C::unpack(v_tiles[tile] + ((int64_t)s * dim + column + v * L) * 4);
      for (int r = 0; r < kRows; ++r) {
        const uint8_t* p = weights + (int64_t)r * kChunk * C::kBytes + (tile * kSteps + s) * C::kLane;
        for (int v = 0; v < kVectors; ++v) acc[r][v] = C::mad(acc[r][v], value[v], p);
      }
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) store(out + (int64_t)r * dim + column + v * L, acc[r][v]);
}

template <Kv kKind, int kRows>
INLINE void value_rows(const uint8_t* weights, const uint8_t* const* v_tiles, int tiles, int dim, float* out) {
  constexpr int kMost = 4;
  int column = 0;
  for (; column + kMost * L <= dim; column += kMost * L)
    value_tile<kKind, kRows, kMost>(weights, v_tiles, tiles, dim, column, out);
  for (; column < dim; column += L) value_tile<kKind, kRows, 1>(weights, v_tiles, tiles, dim, column, out);
}

// Softmax over positions lo ... hi - 1 of a chunk (relative), which may be none; the weights of all others become 0.
// cap: of the scores, 0 for none.
template <Kv kKind>
INLINE void softmax(float* scores, int lo, int hi, int tiles, float cap, uint8_t* weights, float* peak, float* total) {
  const I lane = [] {
    I v;
    for (int i = 0; i < L; ++i) v[i] = i;
    return v;
  }();
  const F lowest = splat(-__builtin_inff());
  F best = lowest;
  for (int i = lo / L * L; i < hi; i += L) {
    const I at = lane + i;
    F s = load<F>(scores + i);
    if (cap != 0.0f) s = capped(s, cap);
    s = (at >= lo) & (at < hi) ? s : lowest;
    store(scores + i, s);
    best = max(best, s);
  }
  *peak = highest(best);
  F all = {};
  for (int i = 0; i < tiles * 16; i += L) {
    F p = {};
    if (lo < hi && i + L > lo && i < hi) p = exp(load<F>(scores + i) - *peak);
    all += p;
    if (kKind == Kv::kPairs) store(weights + 2 * i, to_bf16(p));
    else store(weights + 4 * i, p);
  }
  *total = sum(all);
}

template <Kv kKind, int M>
INLINE void scores_of(const uint8_t* q, int rows, const uint8_t* k_tile, int dim, float* scores) {
  using C = Cache<kKind>;
  for (; rows >= M; rows -= M, q += (int64_t)M * dim * C::kBytes, scores += M * kChunk)
    score_tile<kKind, M>(q, k_tile, dim, scores);
  if constexpr (M > 1)
    if (rows) scores_of<kKind, M - 1>(q, rows, k_tile, dim, scores);
}

template <Kv kKind, int M>
INLINE void values_of(const uint8_t* weights, int rows, const uint8_t* const* v_tiles, int tiles, int dim, float* out) {
  using C = Cache<kKind>;
  for (; rows >= M; rows -= M, weights += M * kChunk * C::kBytes, out += (int64_t)M * dim)
    value_rows<kKind, M>(weights, v_tiles, tiles, dim, out);
  if constexpr (M > 1)
    if (rows) values_of<kKind, M - 1>(weights, rows, v_tiles, tiles, dim, out);
}

template <Kv kKind>
void chunk_of(const AttentionOp& op, const AttentionTask& task, int chunk, float* scratch, Softmax part) {
  using C = Cache<kKind>;
  const int group = op.heads / op.kv_heads, rows = task.tokens * group, begin = chunk * kChunk;
  const int seen_to = least(task.position + task.tokens - begin, kChunk), tiles = (seen_to + 15) / 16;
  const int seen_from = op.window ? most(0, task.position + 1 - op.window - begin) : 0;
  const int64_t tile_bytes = 64 * (int64_t)op.dim / C::kPack, per_block = task.block_size / 16;
  float* scores = scratch;
  uint8_t* weights = (uint8_t*)(scratch + (int64_t)rows * kChunk);
  const uint8_t *k_tiles[kChunk / 16 + 1] = {}, *v_tiles[kChunk / 16] = {};

  for (int tile = most(0, seen_from / 16); tile < tiles; ++tile) {
    const int64_t at = begin / 16 + tile;
    const int64_t block = task.blocks[at / per_block];
    const int64_t index = (block * op.kv_heads + task.kv_head) * per_block + at % per_block;
    k_tiles[tile] = (const uint8_t*)op.k_cache + index * tile_bytes;
    v_tiles[tile] = (const uint8_t*)op.v_cache + index * tile_bytes;
  }
  for (int tile = 0; tile < tiles; ++tile) {
    if (rows < kTileRows / 2) {  // few queries wait for memory, and blocks lie anywhere in it
      if (k_tiles[tile + 1]) fetch(k_tiles[tile + 1], tile_bytes);
      if (v_tiles[tile]) fetch(v_tiles[tile], tile_bytes);
    }
    if (k_tiles[tile])
      scores_of<kKind, kScoreRows>((const uint8_t*)task.q, rows, k_tiles[tile], op.dim, scores + tile * 16);
  }
  for (int r = 0; r < rows; ++r) {
    const int position = task.position + r / group - begin;
    const int hi = least(position + 1, kChunk), lo = op.window ? most(0, position + 1 - op.window) : 0;
    softmax<kKind>(scores + r * kChunk, lo, most(lo, hi), tiles, op.softcap, weights + (int64_t)r * kChunk * C::kBytes,
                   part.peak + r, part.total + r);
  }
  values_of<kKind, kValueRows>(weights, rows, v_tiles, tiles, op.dim, part.values);
}

// The softmax of a task's queries over one chunk. scratch: attention_scratch floats.
void attend_chunk(const AttentionOp& op, const AttentionTask& task, int chunk, float* scratch, Softmax part) {
  if (op.bf16) chunk_of<kPairDot ? Kv::kPairs : Kv::kWidened>(op, task, chunk, scratch, part);
  else chunk_of<Kv::kFloats>(op, task, chunk, scratch, part);
}

// state = state merged with the next chunk's part.
void merge_chunk(int rows, int dim, Softmax state, Softmax part) {
  for (int r = 0; r < rows; ++r) {
    if (!(part.peak[r] > -__builtin_inff())) continue;  // the chunk lies outside this query's window
    const float peak = most(state.peak[r], part.peak[r]);
    const float keep = exp(splat(state.peak[r] - peak))[0], add = exp(splat(part.peak[r] - peak))[0];
    state.peak[r] = peak;
    state.total[r] = state.total[r] * keep + part.total[r] * add;
    float *out = state.values + (int64_t)r * dim, *in = part.values + (int64_t)r * dim;
    for (int i = 0; i < dim; i += L) store(out + i, fma(load<F>(out + i), splat(keep), load<F>(in + i) * add));
  }
}

// Writes the finished state of a task's queries to the operation's output.
void finish_attention(const AttentionOp& op, const AttentionTask& task, Softmax state) {
  const int group = op.heads / op.kv_heads;
  for (int r = 0; r < task.tokens * group; ++r) {
    const int head = task.kv_head * group + r % group;
    float* y = op.y + (int64_t)(task.token + r / group) * op.y_stride + (int64_t)head * op.dim;
    const float inverse = 1.0f / state.total[r];
    for (int i = 0; i < op.dim; i += L) store(y + i, load<F>(state.values + (int64_t)r * op.dim + i) * inverse);
  }
}

}  // namespace MARTLET_ISA
}  // namespace martlet
