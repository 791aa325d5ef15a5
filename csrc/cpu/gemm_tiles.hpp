// panel_product in AMX tiles: integers and bf16 by 16 rows, 16 outputs and 64 bytes of inputs at a time.
//
// The sums of integers are those of gemm.hpp, and what is done with them in float is done in the same order: the bits
// are the same, so few rows may take one way and many the other. bf16 has no other way in a set with tiles: the unit
// adds even and odd inputs apart, 16 pairs at a time, which no cheap sequence of vectors does.
#pragma once

#include "gemm.hpp"
#include "tiles.hpp"

namespace martlet {
namespace MARTLET_ISA {

#if defined(TILE_A)

constexpr int kByteTileRows = 8;  // from so many rows on tiles are faster than VNNI: int8
constexpr int kBlockTileRows = 12;  // and formats whose blocks have to be widened first

// Rows of a tile beyond those asked for are not stored.
INLINE void put_rows(const F* acc, int count, const float* channel_scale, float* out) {
  const F scale = channel_scale ? load<F>(channel_scale) : splat(1.0f);
#pragma GCC unroll 16
  for (int m = 0; m < kTileRows; ++m)
    if (m < count) store(out + m * kPanel, channel_scale ? acc[m] * scale : acc[m]);
}

// A group of 64 inputs fills a tile, so the integers of each group come out as one product.
inline void int8_tiles(const uint8_t* panel, int k, const uint8_t* acts, int64_t stride, int rows, float* out) {
  const int groups = k / kTileBytes;
  const float* channel_scale = (const float*)(panel + (int64_t)groups * kLayouts[kInt8].block);
  alignas(64) int32_t sums[2][kTileRows][kTileOutputs];
  for (int row = 0; row < rows; row += kTileRows)
    for (int v = 0; v < kPanel / kTileOutputs; ++v) {
      const uint8_t *a = acts + row * stride, *b = panel + v * 64, *group = a + groups_at(kActByte64, k);
      F acc[kTileRows] = {};
      for (int g = 0; g < groups; ++g, a += kTileBytes, b += kLayouts[kInt8].block, group += sizeof(Group)) {
        _tile_loadd(TILE_A, a, stride);
        _tile_loadd(TILE_B, b, kStep);
        _tile_zero(TILE_C0);
        _tile_dpbsud(TILE_C0, TILE_A, TILE_B);
        _tile_stored(TILE_C0, sums[g % 2], 64);
#pragma GCC unroll 16
        for (int m = 0; m < kTileRows; ++m) {
          const I total = load<I>(sums[g % 2][m]) + splat(scalar<int32_t>(group + m * stride + offsetof(Group, minus_sum)));
          acc[m] = fma(splat(scalar<float>(group + m * stride)), to_float(total), acc[m]);
        }
      }
      put_rows(acc, rows - row, channel_scale + v * kTileOutputs, out + row * kPanel + v * kTileOutputs);
    }
}

// Blocks of 32 inputs, widened to bytes of their own sign (Signed), meet the high and the low parts of the activations.
template <class R>
void block_tiles(const uint8_t* widened, int k, const uint8_t* acts, int64_t stride, int rows, float* out) {
  static_assert(R::kParts == 1, "a half tile is a whole block");
  alignas(64) int32_t high[2][kTileRows][kTileOutputs], low[2][kTileRows][kTileOutputs];
  for (int row = 0; row < rows; row += kTileRows)
    for (int v = 0; v < kPanel / kTileOutputs; ++v) {
      const uint8_t *a = acts + row * stride, *at = widened, *group = a + groups_at(kActSplit32, k);
      F acc[kTileRows] = {};
      for (int b = 0; b < k / 32; ++b, a += 64, at += R::kWidened, group += sizeof(Group)) {
        _tile_loadd(TILE_HALF_B, at + R::kScales * kStep + v * 64, kStep);
        _tile_loadd(TILE_HALF_A, a, stride);
        _tile_zero(TILE_C0);
        _tile_dpbssd(TILE_C0, TILE_HALF_A, TILE_HALF_B);
        _tile_stored(TILE_C0, high[b % 2], 64);
        _tile_loadd(TILE_HALF_A, a + 32, stride);
        _tile_zero(TILE_C1);
        _tile_dpbssd(TILE_C1, TILE_HALF_A, TILE_HALF_B);
        _tile_stored(TILE_C1, low[b % 2], 64);
        const F d = load<F>(at + v * 64), least = R::kMin ? load<F>(at + kStep + v * 64) : F{};
#pragma GCC unroll 16
        for (int m = 0; m < kTileRows; ++m) {
          const I total = load<I>(low[b % 2][m]) + (load<I>(high[b % 2][m]) << 7);
          acc[m] = fma(d * scalar<float>(group + m * stride), to_float(total), acc[m]);
          if (R::kMin) acc[m] = fma(least, splat(scalar<float>(group + m * stride + offsetof(Group, scaled_sum))), acc[m]);
        }
      }
      put_rows(acc, rows - row, nullptr, out + row * kPanel + v * kTileOutputs);
    }
}

// Pairs of bf16, 16 of them a tile; sums stay in their tiles to the end. The last pairs of an odd width stand in a tile
// of their own with zeros behind: what follows them in memory may be no number.
inline void bf16_tiles(const uint8_t* panel, int k, const uint8_t* acts, int64_t stride, int rows, float* out) {
  const int steps = (k + 1) / 2, whole = steps / kTileRows, rest = steps % kTileRows;
  alignas(64) uint8_t last[kTileRows * kStep];
  if (rest) {
    std::memcpy(last, panel + (int64_t)whole * sizeof last, (size_t)rest * kStep);
    std::memset(last + rest * kStep, 0, (size_t)(kTileRows - rest) * kStep);
    written();
  }
  const int tiles = whole + (rest != 0);
  const bool few = rows <= kFewRows;
  for (int row = 0; row < rows; row += 2 * kTileRows) {
    const bool two = row + kTileRows < rows;
    const uint8_t *a0 = acts + row * stride, *a1 = a0 + kTileRows * stride;
    _tile_zero(TILE_C0);
    _tile_zero(TILE_C1);
    _tile_zero(TILE_C2);
    _tile_zero(TILE_C3);
    for (int t = 0; t < tiles; ++t) {
      const uint8_t* b = t < whole ? panel + (int64_t)t * sizeof last : last;
      if (few) fetch(b + kAhead, sizeof last);
      _tile_loadd(TILE_B, b, kStep);
      _tile_loadd(TILE_A, a0 + t * kTileBytes, stride);
      _tile_dpbf16ps(TILE_C0, TILE_A, TILE_B);
      if (two) {
        _tile_loadd(TILE_A, a1 + t * kTileBytes, stride);
        _tile_dpbf16ps(TILE_C2, TILE_A, TILE_B);
        _tile_loadd(TILE_B, b + 64, kStep);
        _tile_dpbf16ps(TILE_C3, TILE_A, TILE_B);
        _tile_loadd(TILE_A, a0 + t * kTileBytes, stride);
      } else {
        _tile_loadd(TILE_B, b + 64, kStep);
      }
      _tile_dpbf16ps(TILE_C1, TILE_A, TILE_B);
    }
    float* to = out + row * kPanel;
    _tile_stored(TILE_C0, to, 4 * kPanel);
    _tile_stored(TILE_C1, to + kTileOutputs, 4 * kPanel);
    if (!two) continue;
    _tile_stored(TILE_C2, to + kTileRows * kPanel, 4 * kPanel);
    _tile_stored(TILE_C3, to + kTileRows * kPanel + kTileOutputs, 4 * kPanel);
  }
}

template <Format f>
INLINE bool block_tiles_of(const uint8_t* panel, int k, const uint8_t* acts, int64_t stride, int rows, uint8_t* scratch,
                           float* out) {
  const int padded = (int)padded_inputs(f, k);
  Widened<f>::template widen<true>(panel, padded / 32, scratch);
  written();
  block_tiles<Widened<f>>(scratch, padded, acts, stride, rows, out);
  return true;
}

// Whether the product was computed here; if not, it is for gemm.hpp. Q6_K has two scales in a block and stays there.
INLINE bool tile_product(Format f, const uint8_t* panel, int k, const uint8_t* acts, int64_t stride, int rows,
                         uint8_t* scratch, float* out) {
  if (f == kBF16) return bf16_tiles(panel, k, acts, stride, rows, out), true;
  if (f == kInt8 && rows >= kByteTileRows)
    return int8_tiles(panel, (int)padded_inputs(f, k), acts, stride, rows, out), true;
  if (rows < kBlockTileRows) return false;
  switch (f) {
    case kQ4_0: return block_tiles_of<kQ4_0>(panel, k, acts, stride, rows, scratch, out);
    case kQ4_1: return block_tiles_of<kQ4_1>(panel, k, acts, stride, rows, scratch, out);
    case kQ5_0: return block_tiles_of<kQ5_0>(panel, k, acts, stride, rows, scratch, out);
    case kQ5_1: return block_tiles_of<kQ5_1>(panel, k, acts, stride, rows, scratch, out);
    case kQ8_0: return block_tiles_of<kQ8_0>(panel, k, acts, stride, rows, scratch, out);
    case kQ4_K: return block_tiles_of<kQ4_K>(panel, k, acts, stride, rows, scratch, out);
    case kQ5_K: return block_tiles_of<kQ5_K>(panel, k, acts, stride, rows, scratch, out);
    default: return false;
  }
}

#else

INLINE bool tile_product(Format, const uint8_t*, int, const uint8_t*, int64_t, int, uint8_t*, float*) { return false; }

#endif

constexpr int kRowUnit = kTiles ? kTileRows : 6;  // 6: the rows of a tile of bytes in registers, and half of most others

// out[rows][32] = acts times the panel: see Kernels::panel_product and panel_product.
void product(Format f, const uint8_t* panel, int k, const uint8_t* acts, int64_t stride, int rows, uint8_t* scratch,
             float* out) {
  if (!tile_product(f, panel, k, acts, stride, rows, scratch, out))
    panel_product(f, panel, k, acts, stride, rows, scratch, out);
}

}  // namespace MARTLET_ISA
}  // namespace martlet
