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

// A group of 64 inputs fills a tile, so the integers of each group come out as one product and go into the sums in
// float by way of memory. A few groups at a time, so that what is on its way stays in the nearest cache.
constexpr int kGroupsAtOnce = 4;
struct alignas(64) Products {
  int32_t of[kGroupsAtOnce][4][kTileRows][kTileOutputs];  // tiles: rows 0 and outputs 0, 0 and 1, 1 and 1, 1 and 0
};

#define NEXT_PRODUCT(C, i)                                       \
  if (g > 0) _tile_stored(C, products.of[g - 1][i], 64);         \
  _tile_zero(C);                                                 \
  _tile_dpbsud(C, TILE_A, TILE_B);

// Products of `groups` groups, for 16 or (kTwo) 32 rows. Those of a group are stored when the next ones are begun.
template <bool kTwo>
INLINE void int8_products(const uint8_t* panel, const uint8_t* acts, int64_t stride, int groups, bool first_rows,
                          Products& products) {
  for (int g = 0; g < groups; ++g, acts += kTileBytes, panel += kLayouts[kInt8].block) {
    if (first_rows) fetch(panel + kAhead, kLayouts[kInt8].block);
    _tile_loadd(TILE_A, acts, stride);
    _tile_loadd(TILE_B, panel, kStep);
    NEXT_PRODUCT(TILE_C0, 0)
    _tile_loadd(TILE_B, panel + 64, kStep);
    NEXT_PRODUCT(TILE_C1, 1)
    if (!kTwo) continue;
    _tile_loadd(TILE_A, acts + kTileRows * stride, stride);
    NEXT_PRODUCT(TILE_C2, 2)
    _tile_loadd(TILE_B, panel, kStep);
    NEXT_PRODUCT(TILE_C3, 3)
  }
  _tile_stored(TILE_C0, products.of[groups - 1][0], 64);
  _tile_stored(TILE_C1, products.of[groups - 1][1], 64);
  if (!kTwo) return;
  _tile_stored(TILE_C2, products.of[groups - 1][2], 64);
  _tile_stored(TILE_C3, products.of[groups - 1][3], 64);
}

#undef NEXT_PRODUCT

// out[16][32] (+)= the products of `groups` groups for the first or the second 16 rows, in floats. group: the first of
// those groups of the first of these rows.
template <bool kSecond>
INLINE void add_products(const Products& products, int groups, const uint8_t* group, int64_t stride, bool first,
                         const float* channel_scale, float* out) {
  constexpr int kAtOnce = 8;  // rows whose sums fit into registers
  for (int m0 = 0; m0 < kTileRows; m0 += kAtOnce, group += kAtOnce * stride, out += kAtOnce * kPanel) {
    F left[kAtOnce] = {}, right[kAtOnce] = {};
    if (!first)
#pragma GCC unroll 8
      for (int m = 0; m < kAtOnce; ++m) {
        left[m] = load<F>(out + m * kPanel);
        right[m] = load<F>(out + m * kPanel + L);
      }
    for (int g = 0; g < groups; ++g) {
      const uint8_t* at = group + g * sizeof(Group);
      const auto& a = products.of[g][kSecond ? 3 : 0];
      const auto& b = products.of[g][kSecond ? 2 : 1];
#pragma GCC unroll 8
      for (int m = 0; m < kAtOnce; ++m, at += stride) {
        const I offset = splat(scalar<int32_t>(at + offsetof(Group, minus_sum)));
        const F scale = splat(scalar<float>(at));
        left[m] = fma(scale, to_float(load<I>(a[m0 + m]) + offset), left[m]);
        right[m] = fma(scale, to_float(load<I>(b[m0 + m]) + offset), right[m]);
      }
    }
    const F l = channel_scale ? load<F>(channel_scale) : splat(1.0f), r = channel_scale ? load<F>(channel_scale + L) : l;
#pragma GCC unroll 8
    for (int m = 0; m < kAtOnce; ++m) {
      store(out + m * kPanel, channel_scale ? left[m] * l : left[m]);
      store(out + m * kPanel + L, channel_scale ? right[m] * r : right[m]);
    }
  }
}

inline void int8_tiles(const uint8_t* panel, int k, const uint8_t* acts, int64_t stride, int rows, float* out) {
  const int groups = k / kTileBytes;
  const float* channel_scale = (const float*)(panel + (int64_t)groups * kLayouts[kInt8].block);
  Products products;
  for (int row = 0; row < rows; row += 2 * kTileRows) {
    const bool two = row + kTileRows < rows;
    const uint8_t* a = acts + row * stride;
    for (int g = 0; g < groups; g += kGroupsAtOnce) {
      const int here = least(kGroupsAtOnce, groups - g);
      const uint8_t *at = a + g * kTileBytes, *b = panel + g * kLayouts[kInt8].block;
      if (two) int8_products<true>(b, at, stride, here, row == 0, products);
      else int8_products<false>(b, at, stride, here, row == 0, products);
      const float* last = g + here == groups ? channel_scale : nullptr;
      const uint8_t* group = a + groups_at(kActByte64, k) + g * sizeof(Group);
      add_products<false>(products, here, group, stride, g == 0, last, out + row * kPanel);
      if (!two) continue;
      add_products<true>(products, here, group + kTileRows * stride, stride, g == 0, last, out + (row + kTileRows) * kPanel);
    }
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
  for (int row = 0; row < rows; row += 2 * kTileRows) {
    const bool two = row + kTileRows < rows;
    const uint8_t *a0 = acts + row * stride, *a1 = a0 + kTileRows * stride;
    _tile_zero(TILE_C0);
    _tile_zero(TILE_C1);
    _tile_zero(TILE_C2);
    _tile_zero(TILE_C3);
    for (int t = 0; t < tiles; ++t) {
      const uint8_t* b = t < whole ? panel + (int64_t)t * sizeof last : last;
      if (row == 0) fetch(b + kAhead, sizeof last);
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
