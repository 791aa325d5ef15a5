// y[row][32 outputs] = rows of activations times one panel of weights, for every format.
//
// Each output is one chain of sums over the inputs in their order, whatever the number of rows: a token's result does
// not depend on its batch. Integer formats add exactly within a block and then once in float, so they give the same
// bits on every instruction set, but int8 with tiles or on AVX2: its activations differ there (formats.hpp).
#pragma once

#include "readers.hpp"

namespace martlet {
namespace MARTLET_ISA {

constexpr int kWide = L >= 8 ? 2 : 4;                      // vectors of outputs that a tile keeps in registers
constexpr int kFloatRows = L == 16 ? 12 : L == 8 ? 6 : 1;  // rows that a tile keeps in registers: f32
constexpr int kBF16Rows = L == 16 ? 12 : L == 8 ? 5 : 1;   // bf16, which needs registers for both halves
constexpr int kByteRows = L == 16 ? 6 : L == 8 ? 4 : 1;    // int8
constexpr int kFewByteRows = L == 8 ? 2 : kByteRows;       // up to twice as many: tiles enough to ask for memory
constexpr int kByteSteps = L == 8 ? 4 : 1;                 // after which its tiles ask for memory: asking takes time, too
constexpr int kSplitRows = L == 16 ? 4 : L == 8 ? 2 : 1;   // block formats

// Asks for weights. Rows that one tile holds read memory as fast as they can, so it asks for its own panel. More take
// several tiles, of which only the first meets weights that are not in the cache yet: with each step a tile asks for its
// share of the panel behind, and memory works while the multipliers do.
struct Ahead {
  const uint8_t* at;
  int64_t advance;  // bytes a step
  bool own;         // of the tile's own panel, from where it is

  // most: rows of a tile.
  INLINE Ahead(const uint8_t* panel, int64_t bytes, int steps, int rows, int most)
      : at(panel + bytes), own(rows <= most) {
    const int64_t all = (int64_t)steps * ((rows + most - 1) / most) * (kPanel / L / kWide);
    advance = own ? 0 : (bytes + all - 1) / all;
  }
  INLINE void ask() {
    __builtin_prefetch(at, 0, 2);
    if (advance > 64) __builtin_prefetch(at + 64, 0, 2);
    at += advance;
  }
};

// ---- Tiles: M rows by W vectors of outputs, accumulators in registers. ----

template <class R, int M, int W>
INLINE void block_tile(const uint8_t* panel, int v0, const uint8_t* acts, int64_t stride, int k, float* out,
                       Ahead& ahead) {
  constexpr int kPartSteps = kBlockSteps / R::kParts, kSteps = least(kRun<R::kBits>, kPartSteps);
  constexpr int kOffset = R::kBits == 8 ? kByteOffset : R::kOffset;
  const uint8_t* groups = acts + groups_at(kActSplit32, k);
  F acc[M][W] = {};
  for (int b = 0; b * 4 * kBlockSteps < k; ++b) {
    const R block(panel, b);
    if (R::kBytes && ahead.own) fetch(block.at + kAhead, R::kBytes);
    const uint8_t* a = acts + (int64_t)b * 8 * kBlockSteps;
    const uint8_t* g = groups + (int64_t)b * sizeof(Group);
#pragma GCC unroll 2
    for (int part = 0; part < R::kParts; ++part) {
      const size_t sum_at = R::kParts == 1 ? offsetof(Group, minus_sum) : offsetof(Group, minus_half) + 4 * part;
      I sum[M][W], high[M][W] = {};
      for (int m = 0; m < M; ++m)
        for (int w = 0; w < W; ++w)
          sum[m][w] = kOffset ? splat(scalar<int32_t>(g + m * stride + sum_at)) << kOffset : I{};
#pragma GCC unroll 8
      for (int j0 = part * kPartSteps; j0 < (part + 1) * kPartSteps; j0 += kSteps) {
        Quads run[M][W], high_run[M][W];
        for (int m = 0; m < M; ++m)
          for (int w = 0; w < W; ++w) {
            run[m][w] = start_quads(sum[m][w]);
            high_run[m][w] = start_quads(high[m][w]);
          }
#pragma GCC unroll 8
        for (int j = j0; j < j0 + kSteps; ++j) {
          if (!ahead.own) ahead.ask();
          U q[W];
          for (int w = 0; w < W; ++w) q[w] = block.quants(j, v0 + w);
          for (int m = 0; m < M; ++m) {
            const uint8_t* x = a + m * stride + 4 * j;
            for (int w = 0; w < W; ++w)
              high_run[m][w] = dot4<R::kBits>(high_run[m][w], q[w], splat(scalar<uint32_t>(x)));
            for (int w = 0; w < W; ++w)
              run[m][w] = dot4<R::kBits>(run[m][w], q[w], splat(scalar<uint32_t>(x + 4 * kBlockSteps)));
          }
        }
        for (int m = 0; m < M; ++m)
          for (int w = 0; w < W; ++w) {
            sum[m][w] = add_quads(sum[m][w], run[m][w]);
            high[m][w] = add_quads(high[m][w], high_run[m][w]);
          }
      }
      for (int w = 0; w < W; ++w) {
        const F d = block.scale(v0 + w, part);
        for (int m = 0; m < M; ++m) {
          const I total = sum[m][w] + (high[m][w] << 7);
          acc[m][w] = fma(d * scalar<float>(g + m * stride), to_float(total), acc[m][w]);
        }
      }
    }
    if (R::kMin)
      for (int w = 0; w < W; ++w) {
        const F low = block.minimum(v0 + w);
        for (int m = 0; m < M; ++m)
          acc[m][w] = fma(low, splat(scalar<float>(g + m * stride + offsetof(Group, scaled_sum))), acc[m][w]);
      }
  }
  for (int m = 0; m < M; ++m)
    for (int w = 0; w < W; ++w) store(out + m * kPanel + (v0 + w) * L, acc[m][w]);
}

// int8: of a group only its sums and an activation's scale.
constexpr ActKind kByteKind = kPairs ? kActPair32 : kActByte64;
constexpr int kByteGroup = kPairs ? 32 : 64;

template <int M, int W>
INLINE void byte_tile(const uint8_t* panel, int v0, const uint8_t* acts, int64_t stride, int k, float* out,
                      const float* channel_scale, Ahead& ahead) {
  constexpr int kBytes = kByteGroup * kPanel;
  const uint8_t *groups = acts + groups_at(kByteKind, k), *g = groups;
  F acc[M][W] = {};
  for (int i = 0; i < k; i += kByteGroup, panel += kBytes, acts += kByteGroup, g += sizeof(Group)) {
    if (ahead.own) fetch(panel + kAhead, kBytes);
    I sum[M][W];
    for (int m = 0; m < M && !kPairs; ++m)
      for (int w = 0; w < W; ++w) sum[m][w] = splat(scalar<int32_t>(g + m * stride + offsetof(Group, minus_sum)));
#pragma GCC unroll 16
    for (int j = 0; j < kByteGroup / 4; ++j) {
      if (j % kByteSteps == 0 && !ahead.own) ahead.ask();
      U q[W];
      for (int w = 0; w < W; ++w) q[w] = step_at(panel, j, v0 + w);
      for (int m = 0; m < M; ++m) {
        const U x = splat(scalar<uint32_t>(acts + m * stride + 4 * j));
        for (int w = 0; w < W; ++w) sum[m][w] = kPairs && !j ? first_dot4(q[w], x) : add_dot4(sum[m][w], q[w], x);
      }
    }
    for (int m = 0; m < M; ++m)
      for (int w = 0; w < W; ++w)
        acc[m][w] = fma(splat(scalar<float>(g + m * stride)), to_float(sum[m][w]), acc[m][w]);
  }
  for (int m = 0; m < M; ++m) {
    const float offset = kPairs ? scalar<float>(groups + m * stride + offsetof(Group, scaled_sum)) : 0.0f;
    for (int w = 0; w < W; ++w)
      store(out + m * kPanel + (v0 + w) * L, (acc[m][w] - offset) * load<F>(channel_scale + (v0 + w) * L));
  }
}

template <bool kBF16, int M, int W>
INLINE void dense_tile(const uint8_t* panel, int v0, const uint8_t* acts, int64_t stride, int k, float* out,
                       Ahead& ahead) {
  F acc[M][W] = {};
  const int steps = kBF16 ? (k + 1) / 2 : k;
#pragma GCC unroll 2
  for (int j = 0; j < steps; ++j) {
    if (ahead.own) fetch(panel + (int64_t)j * kStep + v0 * 4 * L + kAhead, W * 4 * L);
    else ahead.ask();
    const uint8_t* x = acts + (int64_t)j * (kBF16 && !kPairDot ? 8 : 4);
    U w[W];
    for (int i = 0; i < W; ++i) w[i] = load<U>(panel + (int64_t)j * kStep + (v0 + i) * 4 * L);
    if (kBF16 && kPairDot) {
      for (int m = 0; m < M; ++m)
        for (int i = 0; i < W; ++i) acc[m][i] = dot2(acc[m][i], w[i], splat(scalar<uint32_t>(x + m * stride)));
      continue;
    }
    for (int half = 0; half < (kBF16 ? 2 : 1); ++half) {
      F value[W];
      for (int i = 0; i < W; ++i) value[i] = !kBF16 ? (F)w[i] : half ? high_bf16(w[i]) : low_bf16(w[i]);
      for (int m = 0; m < M; ++m)
        for (int i = 0; i < W; ++i)
          acc[m][i] = fma(value[i], splat(scalar<float>(x + m * stride + 4 * half)), acc[m][i]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int i = 0; i < W; ++i) store(out + m * kPanel + (v0 + i) * L, acc[m][i]);
}

// ---- All rows: tiles of at most kMost rows. ----

// One tile, of `rows` <= M rows.
template <int M, class Tile>
INLINE void tile_of(int rows, const Tile& tile, int v0, const uint8_t* acts, float* out, Ahead& ahead) {
  if (M == 1 || rows == M) return tile.template run<M, kWide>(v0, acts, out, ahead);
  if constexpr (M > 1) tile_of<M - 1>(rows, tile, v0, acts, out, ahead);
}

template <int M, class Tile>
void rows_of(const Tile& tile, const uint8_t* acts, int64_t stride, int rows, float* out, Ahead& ahead) {
  // One row or two leave registers for the whole panel: its weights pass by once, in the order in which they lie.
  if (rows == 1) return tile.template run<1, kPanel / L>(0, acts, out, ahead);
  if constexpr (M > 1)
    if (rows == 2) return tile.template run<2, kPanel / L>(0, acts, out, ahead);
  if constexpr (M > 6) {  // code for every size would be long
    const int whole = rows / M * M;
    for (int v0 = 0; v0 < kPanel / L; v0 += kWide)  // outside, so that the inner loop's weights stay near
      for (int m = 0; m < whole; m += M) tile.template run<M, kWide>(v0, acts + m * stride, out + m * kPanel, ahead);
    if (whole < rows) rows_of<6>(tile, acts + whole * stride, stride, rows - whole, out + whole * kPanel, ahead);
  } else {
    const int tiles = (rows + M - 1) / M;
    for (int v0 = 0; v0 < kPanel / L; v0 += kWide)
      for (int i = 0, m = 0; i < tiles; ++i) {  // as even as can be: small tiles wait for memory and for themselves
        const int count = (rows - m) / (tiles - i);
        tile_of<M>(count, tile, v0, acts + m * stride, out + m * kPanel, ahead);
        m += count;
      }
  }
}

template <class R>
struct BlockTile {
  const uint8_t* panel;
  int64_t stride;
  int k;
  template <int M, int W>
  INLINE void run(int v0, const uint8_t* acts, float* out, Ahead& ahead) const {
    block_tile<R, M, W>(panel, v0, acts, stride, k, out, ahead);
  }
};

struct ByteTile {
  const uint8_t* panel;
  int64_t stride;
  int k;
  const float* channel_scale;
  template <int M, int W>
  INLINE void run(int v0, const uint8_t* acts, float* out, Ahead& ahead) const {
    byte_tile<M, W>(panel, v0, acts, stride, k, out, channel_scale, ahead);
  }
};

template <bool kBF16>
struct DenseTile {
  const uint8_t* panel;
  int64_t stride;
  int k;
  template <int M, int W>
  INLINE void run(int v0, const uint8_t* acts, float* out, Ahead& ahead) const {
    dense_tile<kBF16, M, W>(panel, v0, acts, stride, k, out, ahead);
  }
};

// ---- Words: many rows meet a panel widened to 16 bits, [half][block]([scales, minima][16] f32, [steps][16][2]). ----

// Block formats alone: int8 takes few operations as bytes.
constexpr int kWordRows = kWords ? 6 : 1 << 30;  // fewer do not pay for the widening

constexpr int kWordTile = 6, kHalf = kPanel / 2, kHalfStep = 4 * kHalf;

template <Format f>
struct Words {
  using Source = Reader<f>;
  static constexpr int kParts = Source::kParts, kSteps = 2 * kBlockSteps, kInputs = 4 * kBlockSteps;
  static constexpr int kScales = kParts + Source::kMin, kBlock = (kScales + kSteps) * kHalfStep;

  static void widen(const uint8_t* panel, int blocks, uint8_t* out) {
    for (int v0 = 0; v0 < kPanel / L; v0 += kWide)
      for (int b = 0; b < blocks; ++b, out += kBlock) {
        const Source from(panel, b);
        fetch(from.at + kAhead, v0 ? 0 : Source::kBytes);
        for (int w = 0; w < kWide; ++w) {
          uint8_t* to = out + w * 4 * L;
          for (int part = 0; part < kParts; ++part)
            store(to + part * kHalfStep, from.scale(v0 + w, part));
          if (Source::kMin) store(to + kParts * kHalfStep, from.minimum(v0 + w));
          to += kScales * kHalfStep;
#pragma GCC unroll 8
          for (int j = 0; j < kBlockSteps; ++j)
            for (int pair = 0; pair < 2; ++pair)
              store(to + (2 * j + pair) * kHalfStep,
                    byte_pair(from.quants(j, v0 + w), pair, Source::kOffset ? 1 << Source::kOffset : 0));
        }
      }
  }
};

// M rows by half a panel.
template <class W, int M>
INLINE void words_tile(const uint8_t* half, const uint8_t* acts, int64_t stride, int k, float* out) {
  constexpr int kPartSteps = W::kSteps / W::kParts;
  const uint8_t* g = acts + groups_at(kActWord32, k);
  F acc[M][kWide] = {};
  for (int b = 0; b * W::kInputs < k; ++b, half += W::kBlock, g += sizeof(Group)) {
    const uint8_t *steps = half + W::kScales * kHalfStep, *x = acts + 2 * (int64_t)b * W::kInputs;
    for (int part = 0; part < W::kParts; ++part) {
      I sum[M][kWide] = {};
#pragma GCC unroll 4
      for (int j = 0; j < kPartSteps; ++j, steps += kHalfStep, x += 4) {
        U q[kWide];
        for (int w = 0; w < kWide; ++w) q[w] = load<U>(steps + w * 4 * L);
        for (int m = 0; m < M; ++m) {
          const U pair = splat(scalar<uint32_t>(x + m * stride));
          for (int w = 0; w < kWide; ++w) sum[m][w] = dot2_words(sum[m][w], q[w], pair);
        }
      }
      for (int w = 0; w < kWide; ++w) {
        const F d = load<F>(half + part * kHalfStep + w * 4 * L);
        for (int m = 0; m < M; ++m)
          acc[m][w] = fma(d * scalar<float>(g + m * stride), to_float(sum[m][w]), acc[m][w]);
      }
    }
    if (W::kScales > W::kParts)
      for (int w = 0; w < kWide; ++w) {
        const F low = load<F>(half + W::kParts * kHalfStep + w * 4 * L);
        for (int m = 0; m < M; ++m)
          acc[m][w] = fma(low, splat(scalar<float>(g + m * stride + offsetof(Group, scaled_sum))), acc[m][w]);
      }
  }
  for (int m = 0; m < M; ++m)
    for (int w = 0; w < kWide; ++w) store(out + m * kPanel + w * L, acc[m][w]);
}

template <class W, int M>
void words_rows(const uint8_t* half, const uint8_t* acts, int64_t stride, int k, int rows, float* out) {
  for (; rows >= M; rows -= M, acts += M * stride, out += M * kPanel) words_tile<W, M>(half, acts, stride, k, out);
  if constexpr (M > 1)
    if (rows) words_rows<W, M - 1>(half, acts, stride, k, rows, out);
}

template <Format f>
void words_panel(const uint8_t* panel, int k, const uint8_t* acts, int64_t stride, int rows, uint8_t* scratch,
                 float* out) {
  using W = Words<f>;
  if constexpr (kWords) {
    const int blocks = k / W::kInputs;
    W::widen(panel, blocks, scratch);
    for (int half = 0; half < 2; ++half)
      words_rows<W, kWordTile>(scratch + (int64_t)half * blocks * W::kBlock, acts, stride, k, rows, out + half * kHalf);
  }
}

template <Format f>
void block_panel(const uint8_t* panel, int k, const uint8_t* acts, int64_t stride, int rows, uint8_t* scratch,
                 float* out) {
  const int padded = (int)padded_inputs(f, k);
  if (rows >= kWordRows) return words_panel<f>(panel, padded, acts, stride, rows, scratch, out);
  Ahead ahead(panel, panel_bytes(f, k), padded / 4, rows, kSplitRows);
  if (f != kQ8_0 && rows > 2 * kSplitRows) {
    Widened<f>::template widen<false>(panel, padded / 32, scratch);
    rows_of<kSplitRows>(BlockTile<Widened<f>>{scratch, stride, padded}, acts, stride, rows, out, ahead);
  } else {
    rows_of<kSplitRows>(BlockTile<Reader<f>>{panel, stride, padded}, acts, stride, rows, out, ahead);
  }
}

// out[rows][32] = acts times the panel. acts: rows prepared for the format, `stride` bytes apart, as kActWord32 from
// kWordRows on. scratch: room for a widened panel (widened_bytes).
void panel_product(Format f, const uint8_t* panel, int k, const uint8_t* acts, int64_t stride, int rows,
                   uint8_t* scratch, float* out) {
  switch (f) {
    case kF32: {
      Ahead ahead(panel, panel_bytes(f, k), k, rows, kFloatRows);
      return rows_of<kFloatRows>(DenseTile<false>{panel, stride, k}, acts, stride, rows, out, ahead);
    }
    case kBF16: {
      Ahead ahead(panel, panel_bytes(f, k), (k + 1) / 2, rows, kBF16Rows);
      return rows_of<kBF16Rows>(DenseTile<true>{panel, stride, k}, acts, stride, rows, out, ahead);
    }
    case kInt8: {
      const int padded = (int)padded_inputs(f, k);
      const float* scale = (const float*)(panel + (int64_t)padded / 64 * kLayouts[kInt8].block);
      const ByteTile tile{panel, stride, k, scale};
      const bool few = rows <= 2 * kFewByteRows;
      Ahead ahead(panel, panel_bytes(f, k), padded / 4 / kByteSteps, rows, few ? kFewByteRows : kByteRows);
      if (few) return rows_of<kFewByteRows>(tile, acts, stride, rows, out, ahead);
      return rows_of<kByteRows>(tile, acts, stride, rows, out, ahead);
    }
    case kQ4_0: return block_panel<kQ4_0>(panel, k, acts, stride, rows, scratch, out);
    case kQ4_1: return block_panel<kQ4_1>(panel, k, acts, stride, rows, scratch, out);
    case kQ5_0: return block_panel<kQ5_0>(panel, k, acts, stride, rows, scratch, out);
    case kQ5_1: return block_panel<kQ5_1>(panel, k, acts, stride, rows, scratch, out);
    case kQ8_0: return block_panel<kQ8_0>(panel, k, acts, stride, rows, scratch, out);
    case kQ4_K: return block_panel<kQ4_K>(panel, k, acts, stride, rows, scratch, out);
    case kQ5_K: return block_panel<kQ5_K>(panel, k, acts, stride, rows, scratch, out);
    case kQ6_K: return block_panel<kQ6_K>(panel, k, acts, stride, rows, scratch, out);
    case kScreen: return block_panel<kScreen>(panel, k, acts, stride, rows, scratch, out);
    case kInt4x32: return block_panel<kInt4x32>(panel, k, acts, stride, rows, scratch, out);
    case kInt4x64: return block_panel<kInt4x64>(panel, k, acts, stride, rows, scratch, out);
    case kInt4x128: return block_panel<kInt4x128>(panel, k, acts, stride, rows, scratch, out);
    default: __builtin_trap();
  }
}

}  // namespace MARTLET_ISA
}  // namespace martlet
