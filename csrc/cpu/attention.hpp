// Causal attention of a group of queries that share a kv head, over one chunk of the context.
//
// The context is cut at fixed positions (multiples of kChunk); each chunk gives its own softmax, and chunks are merged
// in order. A query's result is therefore the same bits alone, in a prefill, in any batch and on any number of threads.
#pragma once

#include "attention_bytes.hpp"
#include "attention_tiles.hpp"
#include "program.hpp"
#include "simd.hpp"

namespace martlet {
namespace MARTLET_ISA {

// Query rows that a tile keeps in registers, with 16 keys each or with 4 vectors of a value.
constexpr int kScoreRows = L == 16 ? 6 : L == 8 ? 3 : 1;
constexpr int kValueRows = L == 16 ? 6 : L == 8 ? 3 : 1;

// What the cache holds, and how it meets queries and weights.
// f32; bf16 times bf16 pairs; bf16 times f32; s8 times f32; s8 times 15-bit integers
enum class Kv { kFloats, kPairs, kWidened, kBytes, kSplit };

template <Kv kKind>
struct Cache {
  // Elements in a 32-bit lane of the cache.
  static constexpr int kPack = kKind == Kv::kFloats ? 1 : kKind == Kv::kBytes || kKind == Kv::kSplit ? 4 : 2;
  static constexpr int kBytes = kKind == Kv::kPairs ? 2 : 4;  // of an element of a query, or of a weight
  static constexpr int kLane = kPack * kBytes;                // bytes of those that meet one lane
  static constexpr bool kScaled = kPack == 4;                 // 16 scales behind each tile
  static constexpr CacheKind kCache = kKind == Kv::kFloats ? kCacheF32 : kScaled ? kCacheInt8 : kCacheBF16;
  struct Lane {
    F part[kKind == Kv::kPairs ? 1 : kPack];
  };
  static INLINE Lane unpack(const uint8_t* p) {
    const U raw = load<U>(p);
    Lane lane;
    if constexpr (kKind == Kv::kWidened) {
      lane.part[0] = low_bf16(raw);
      lane.part[1] = high_bf16(raw);
    } else if constexpr (kKind == Kv::kBytes) {
      for (int i = 0; i < 4; ++i) lane.part[i] = to_float((I)(raw << (24 - 8 * i)) >> 24);
    } else {
      lane.part[0] = (F)raw;
    }
    return lane;
  }
  // acc += lane * x, over the pack.
  static INLINE F mad(F acc, const Lane& lane, const uint8_t* x) {
    if constexpr (kKind == Kv::kPairs) return dot2(acc, (U)lane.part[0], splat(scalar<uint32_t>(x)));
    for (int i = 0; i < kPack; ++i) acc = fma(lane.part[i], splat(scalar<float>(x + 4 * i)), acc);
    return acc;
  }
};

// scores[r][16 * kTogether] of kRows queries against kTogether tiles of 16 keys. Even and odd steps are summed apart: the
// few queries of a decoding sequence are too short a chain otherwise to keep the multipliers busy.
template <Kv kKind, int kRows, int kTogether>
INLINE void score_tile(const uint8_t* q, const uint8_t* const* k_tiles, int dim, float* scores) {
  using C = Cache<kKind>;
  constexpr int kInTile = 16 / L, kVectors = kTogether * kInTile;
  F acc[2][kRows][kVectors] = {};
  const int steps = dim / C::kPack;
  for (int d = 0; d < steps; d += 2)
    for (int odd = 0; odd < 2; ++odd)
      for (int v = 0; v < kVectors; ++v) {
        const typename C::Lane key = C::unpack(k_tiles[v / kInTile] + (d + odd) * 64 + v % kInTile * 4 * L);
        for (int r = 0; r < kRows; ++r)
          acc[odd][r][v] = C::mad(acc[odd][r][v], key, q + ((int64_t)r * steps + d + odd) * C::kLane);
      }
  for (int v = 0; v < kVectors; ++v) {
    const F scale = C::kScaled ? load<F>(k_tiles[v / kInTile] + 16 * dim + v % kInTile * 4 * L) : F{};
    for (int r = 0; r < kRows; ++r) {
      const F s = acc[0][r][v] + acc[1][r][v];
      store(scores + r * kChunk + v * L, C::kScaled ? s * scale : s);
    }
  }
}

// out[r][kVectors * L] = weights of kRows queries times values, for columns from `column` on.
template <Kv kKind, int kRows, int kVectors>
INLINE void value_tile(const uint8_t* weights, const uint8_t* const* v_tiles, int tiles, int dim, int column,
                       const Upcoming* next, float* out) {
  using C = Cache<kKind>;
  F acc[kRows][kVectors] = {};
  constexpr int kSteps = 16 / C::kPack;
  for (int tile = 0; tile < tiles; ++tile) {
    ask(next, tile, tile + 1);
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
INLINE void value_rows(const uint8_t* weights, const uint8_t* const* v_tiles, int tiles, int dim, const Upcoming* next,
                       float* out) {
  constexpr int kMost = 4;
  int column = 0;
  for (; column + kMost * L <= dim; column += kMost * L, next = nullptr)
    value_tile<kKind, kRows, kMost>(weights, v_tiles, tiles, dim, column, next, out);
  for (; column < dim; column += L, next = nullptr)
    value_tile<kKind, kRows, 1>(weights, v_tiles, tiles, dim, column, next, out);
}

// Softmax of a row over positions lo ... hi - 1 of a chunk (relative), which may be none, in two halves: a processor that
// has the first halves of many rows before it does not wait for each row's peak.
struct Seen {
  int lo, hi;
  INLINE int begin() const { return lo / L * L; }  // of the vectors with anything that is seen
  INLINE int end() const { return most(begin(), (hi + L - 1) / L * L); }
};

// The largest score. cap: of the scores, 0 for none; scores that are not seen, in vectors with others that are, become
// minus infinity.
INLINE float peak_of(float* scores, Seen seen, float cap) {
  const I lane = [] {
    I v;
    for (int i = 0; i < L; ++i) v[i] = i;
    return v;
  }();
  const F lowest = splat(-__builtin_inff());
  F best = lowest;
  for (int i = seen.begin(); i < seen.end(); i += L) {
    F s = load<F>(scores + i);
    if (cap != 0.0f) s = capped(s, cap);
    const bool edge = i < seen.lo || i + L > seen.hi;
    if (edge) {
      const I at = lane + i;
      s = (at >= seen.lo) & (at < seen.hi) ? s : lowest;
    }
    if (cap != 0.0f || edge) store(scores + i, s);
    best = max(best, s);
  }
  return highest(best);
}

// The weights, 0 for all that is not seen, their sum, and the largest of those that are written. They take the scales of
// the values with them, where those have any.
template <Kv kKind>
INLINE float weights_of(const float* scores, const float* value_scale, Seen seen, int tiles, float peak,
                        uint8_t* weights, float* largest) {
  const auto put = [&](int i, F p) {
    if (kKind == Kv::kPairs) store(weights + 2 * i, to_bf16(p));
    else store(weights + 4 * i, p);
  };
  F all = {}, best = {};
  const Shifted<kKind == Kv::kPairs || kKind == Kv::kSplit> weight(seen.lo < seen.hi ? peak : 0.0f);
  const int begin = seen.begin(), end = seen.end();
  for (int i = 0; i < begin; i += L) put(i, F{});
  for (int i = begin; i < end; i += L) {
    F p = weight.of(load<F>(scores + i));
    all += p;
    if (Cache<kKind>::kScaled) p *= load<F>(value_scale + i);
    if (kKind == Kv::kSplit) best = max(best, p);
    put(i, p);
  }
  for (int i = end; i < tiles * 16; i += L) put(i, F{});
  if (kKind == Kv::kSplit) *largest = highest(best);
  return sum(all);
}

template <Kv kKind, int M, int kTogether>
INLINE void scores_of(const uint8_t* q, int rows, const uint8_t* const* k_tiles, int dim, float* scores) {
  using C = Cache<kKind>;
  for (; rows >= M; rows -= M, q += (int64_t)M * dim * C::kBytes, scores += M * kChunk)
    score_tile<kKind, M, kTogether>(q, k_tiles, dim, scores);
  if constexpr (M > 1)
    if (rows) scores_of<kKind, M - 1, kTogether>(q, rows, k_tiles, dim, scores);
}

template <Kv kKind, int M>
INLINE void values_of(const uint8_t* weights, int rows, const uint8_t* const* v_tiles, int tiles, int dim,
                      const Upcoming* next, float* out) {
  using C = Cache<kKind>;
  for (; rows >= M; rows -= M, weights += M * kChunk * C::kBytes, out += (int64_t)M * dim, next = nullptr)
    value_rows<kKind, M>(weights, v_tiles, tiles, dim, next, out);
  if constexpr (M > 1)
    if (rows) values_of<kKind, M - 1>(weights, rows, v_tiles, tiles, dim, next, out);
}

// ---- Many rows: keys and values become f32 once and then meet all rows. The sums run in the same order as above. ----

constexpr int kWideRows = 12;  // as many as make that worth while
constexpr int kWideScores = L == 16 ? 12 : L == 8 ? 6 : 2, kWideValues = L == 16 ? 6 : L == 8 ? 6 : 2;
constexpr int kWideVectors = L == 16 ? 4 : 2, kWideColumns = kWideVectors * L;

// A tile of keys as [dim][16].
template <class C>
INLINE void widen_keys(const uint8_t* k_tile, int dim, float* out) {
  for (int d = 0; d < dim / C::kPack; ++d)
    for (int v = 0; v < 16 / L; ++v) {
      const typename C::Lane lane = C::unpack(k_tile + d * 64 + v * 4 * L);
      for (int i = 0; i < C::kPack; ++i) store(out + (d * C::kPack + i) * 16 + v * L, lane.part[i]);
    }
}

// Columns column ... column + kVectors * L - 1 of the values of a chunk, as [16 * tiles][kVectors * L].
template <class C, int kVectors>
INLINE void widen_values(const uint8_t* const* v_tiles, int first, int tiles, int dim, int column, float* out) {
  for (int tile = first; tile < tiles; ++tile)
    for (int s = 0; s < 16 / C::kPack; ++s)
      for (int v = 0; v < kVectors; ++v) {
        const typename C::Lane lane = C::unpack(v_tiles[tile] + ((int64_t)s * dim + column + v * L) * 4);
        for (int i = 0; i < C::kPack; ++i)
          store(out + (tile * 16 + s * C::kPack + i) * kVectors * L + v * L, lane.part[i]);
      }
}

template <class C, int kRows>
INLINE void wide_scores(const float* q, int rows, const float* keys, const float* scale, int dim, float* scores) {
  constexpr int kVectors = 16 / L;
  for (; rows >= kRows; rows -= kRows, q += (int64_t)kRows * dim, scores += kRows * kChunk) {
    F acc[kRows][kVectors], total[kRows][kVectors];
    for (int odd = 0; odd < 2; ++odd) {
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v) acc[r][v] = F{};
      for (int d = odd * C::kPack; d < dim; d += 2 * C::kPack)
#pragma GCC unroll 4
        for (int i = 0; i < C::kPack; ++i) {
          F key[kVectors];
          for (int v = 0; v < kVectors; ++v) key[v] = load<F>(keys + (d + i) * 16 + v * L);
          for (int r = 0; r < kRows; ++r) {
            const F x = splat(q[(int64_t)r * dim + d + i]);
            for (int v = 0; v < kVectors; ++v) acc[r][v] = fma(key[v], x, acc[r][v]);
          }
        }
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v) total[r][v] = odd ? total[r][v] + acc[r][v] : acc[r][v];
    }
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v)
        store(scores + r * kChunk + v * L, C::kScaled ? total[r][v] * load<F>(scale + v * L) : total[r][v]);
  }
  if constexpr (kRows > 1)
    if (rows) wide_scores<C, kRows / 2>(q, rows, keys, scale, dim, scores);
}

template <int kRows, int kVectors>
INLINE void wide_values(const float* weights, int rows, const float* values, int first, int end, int dim, float* out) {
  for (; rows >= kRows; rows -= kRows, weights += kRows * kChunk, out += (int64_t)kRows * dim) {
    F acc[kRows][kVectors] = {};
    for (int t = first; t < end; ++t) {
      F value[kVectors];
      for (int v = 0; v < kVectors; ++v) value[v] = load<F>(values + (t * kVectors + v) * L);
      for (int r = 0; r < kRows; ++r) {
        const F p = splat(weights[r * kChunk + t]);
        for (int v = 0; v < kVectors; ++v) acc[r][v] = fma(value[v], p, acc[r][v]);
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) store(out + (int64_t)r * dim + v * L, acc[r][v]);
  }
  if constexpr (kRows > 1)
    if (rows) wide_values<kRows / 2, kVectors>(weights, rows, values, first, end, dim, out);
}

template <class C>
INLINE void wide_values_of(const float* weights, int rows, const uint8_t* const* v_tiles, int first, int tiles, int dim,
                           float* room, float* out) {
  int column = 0;
  for (; column + kWideColumns <= dim; column += kWideColumns) {
    widen_values<C, kWideVectors>(v_tiles, first, tiles, dim, column, room);
    wide_values<kWideValues, kWideVectors>(weights, rows, room, first * 16, tiles * 16, dim, out + column);
  }
  for (; column < dim; column += L) {
    widen_values<C, 1>(v_tiles, first, tiles, dim, column, room);
    wide_values<kWideValues, 1>(weights, rows, room, first * 16, tiles * 16, dim, out + column);
  }
}

template <Kv kKind>
void chunk_of(const AttentionOp& op, const AttentionTask& task, int chunk, float* scratch, Softmax part) {
  using C = Cache<kKind>;
  constexpr bool kInTiles = kTiles && (kKind == Kv::kPairs || kKind == Kv::kSplit);
  const int group = op.heads / op.kv_heads, rows = task.tokens * group, begin = chunk * kChunk;
  const int64_t room_rows = scratch_rows(rows);
  const int seen_to = least(task.position + task.tokens - begin, kChunk), tiles = (seen_to + 15) / 16;
  const int seen_from = op.window ? most(0, task.position + 1 - op.window - begin) : 0;
  const int64_t tile_bytes = cache_tile_bytes(C::kCache, op.dim), per_block = task.block_size / 16;
  constexpr bool kMayWiden = kKind != Kv::kPairs && kKind != Kv::kSplit;
  const bool wide = kMayWiden && rows >= kWideRows;
  const int padded = kKind == Kv::kSplit ? (int)round_up(tiles, 4) : tiles;  // with weights 0
  float* scores = scratch;
  uint8_t* weights = (uint8_t*)(scratch + room_rows * kChunk);
  float* room = scratch + 2 * room_rows * kChunk;
  const uint8_t *k_tiles[kChunk / 16] = {}, *v_tiles[kChunk / 16] = {};

  const int first = most(0, seen_from / 16);
  for (int tile = first; tile < tiles; ++tile) {
    const int64_t at = begin / 16 + tile;
    const int64_t block = task.blocks[at / per_block];
    const int64_t index = (block * op.kv_heads + task.kv_head) * per_block + at % per_block;
    k_tiles[tile] = (const uint8_t*)op.k_cache + index * tile_bytes;
    v_tiles[tile] = (const uint8_t*)op.v_cache + index * tile_bytes;
  }
  for (int tile = 0; tile < tiles; ++tile) {
    if (task.next && v_tiles[tile]) fetch(v_tiles[tile], tile_bytes);
    if (!k_tiles[tile]) continue;
    if constexpr (kInTiles) {
      const uint8_t* q = (const uint8_t*)task.q;
      if (kKind == Kv::kPairs) tile_scores(q, rows, k_tiles[tile], op.dim, scores + tile * 16);
      else tile_byte_scores(q, rows, query_row_bytes(op.cache, op.dim), k_tiles[tile], op.dim, scores + tile * 16);
      continue;
    }
    if constexpr (kKind == Kv::kSplit) {
      // So many tiles together that there are sums enough to keep the multipliers busy, and no more than registers.
      const int count = rows <= 2 && tile + 4 <= tiles ? 4 : tile + 2 <= tiles ? 2 : 1;
      for (int i = 1; i < count; ++i)
        if (task.next) fetch(v_tiles[tile + i], tile_bytes);
      const int64_t stride = query_row_bytes(op.cache, op.dim);
      byte_scores((const uint8_t*)task.q, rows, stride, k_tiles + tile, count, op.dim, scores + tile * 16);
      tile += count - 1;
      continue;
    }
    if constexpr (kMayWiden)
      if (wide) {
        widen_keys<C>(k_tiles[tile], op.dim, room);
        const float* scale = (const float*)(k_tiles[tile] + 16 * op.dim);
        wide_scores<C, kWideScores>((const float*)task.q, rows, room, scale, op.dim, scores + tile * 16);
        continue;
      }
    // With two tiles of keys together an element of a query is loaded once for 32 keys, not for 16.
    if (kKind == Kv::kPairs && rows >= kScoreRows && tile + 1 < tiles) {
      if (task.next) fetch(v_tiles[tile + 1], tile_bytes);
      scores_of<kKind, kScoreRows, 2>((const uint8_t*)task.q, rows, k_tiles + tile, op.dim, scores + tile * 16);
      ++tile;
      continue;
    }
    scores_of<kKind, kScoreRows, 1>((const uint8_t*)task.q, rows, k_tiles + tile, op.dim, scores + tile * 16);
  }
  float value_scale[kChunk];   // of each token
  float* largest = part.values;  // of each row's weights: there is room until the values come
  if (C::kScaled)
    for (int tile = 0; tile < padded; ++tile)
      for (int i = 0; i < 16; i += L)
        store(value_scale + tile * 16 + i,
              v_tiles[tile] ? load<F>(v_tiles[tile] + 16 * op.dim + 4 * i) : F{});
  const auto seen_by = [&](int r) {
    const int position = task.position + r / group - begin;
    const int hi = least(position + 1, kChunk), lo = op.window ? most(0, position + 1 - op.window) : 0;
    return Seen{lo, most(lo, hi)};
  };
  for (int r = 0; r < rows; ++r) part.peak[r] = peak_of(scores + r * kChunk, seen_by(r), op.softcap);
  for (int r = 0; r < rows; ++r) {
    uint8_t* row = weights + (int64_t)r * kChunk * C::kBytes;
    part.total[r] =
        weights_of<kKind>(scores + r * kChunk, value_scale, seen_by(r), padded, part.peak[r], row, largest + r);
  }
  if (kKind == Kv::kSplit)  // in place of the rows' scores
    for (int r = 0; r < rows; ++r)
      split_weights((const float*)weights + r * kChunk, largest[r], padded * 16, (uint8_t*)(scores + r * kChunk));
  const bool together = kInTiles || wide;  // values that are not walked tile by tile
  ask(task.next, together ? 0 : tiles, kChunk / 16 + 1);
  if constexpr (kKind == Kv::kSplit) {
    const uint8_t* parts = (const uint8_t*)scores;
    if (!kInTiles) return byte_values<6>(parts, rows, 4 * kChunk, v_tiles, tiles, op.dim, task.next, part.values);
    return tile_byte_values(parts, rows, 4 * kChunk, v_tiles, first, tiles, padded, op.dim, (uint8_t*)room,
                            part.values);
  }
  if constexpr (kInTiles) return tile_values(weights, rows, v_tiles, first, tiles, op.dim, part.values);
  if constexpr (kMayWiden)
    if (wide) return wide_values_of<C>((const float*)weights, rows, v_tiles, first, tiles, op.dim, room, part.values);
  values_of<kKind, kValueRows>(weights, rows, v_tiles, tiles, op.dim, task.next, part.values);
}

// The softmax of a task's queries over one chunk. scratch: attention_scratch floats.
void attend_chunk(const AttentionOp& op, const AttentionTask& task, int chunk, float* scratch, Softmax part) {
  switch (op.cache) {
    case kCacheBF16: return chunk_of<kPairDot ? Kv::kPairs : Kv::kWidened>(op, task, chunk, scratch, part);
    case kCacheInt8: return chunk_of<kLongBytes ? Kv::kSplit : Kv::kBytes>(op, task, chunk, scratch, part);
    default: return chunk_of<Kv::kFloats>(op, task, chunk, scratch, part);
  }
}

// state = state merged with the next chunk's part.
void merge_chunk(int rows, int dim, Softmax state, Softmax part) {
  float keep[L], add[L];
  for (int first = 0; first < rows; first += L) {
    const int count = least(L, rows - first);
    for (int r = 0; r < L; ++r) keep[r] = r < count ? state.peak[first + r] : 0.0f;
    for (int r = 0; r < L; ++r) add[r] = r < count ? part.peak[first + r] : 0.0f;
    const F ours = load<F>(keep), theirs = load<F>(add), peak = max(ours, theirs);
    float peaks[L];
    store(peaks, peak);
    store(keep, exp(ours - peak));
    store(add, exp(theirs - peak));
    for (int r = 0; r < count; ++r) {
      const int row = first + r;
      if (!(part.peak[row] > -__builtin_inff())) continue;  // the chunk lies outside this query's window
      state.peak[row] = peaks[r];
      state.total[row] = state.total[row] * keep[r] + part.total[row] * add[r];
      float *out = state.values + (int64_t)row * dim, *in = part.values + (int64_t)row * dim;
      const F k = splat(keep[r]), a = splat(add[r]);
      for (int i = 0; i < dim; i += L) store(out + i, fma(load<F>(out + i), k, load<F>(in + i) * a));
    }
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
