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

constexpr int kBlockTileRows = 12;  // from so many rows on tiles are faster than VNNI: formats that have to be widened

// Rows of a tile beyond those asked for are not stored.
INLINE void put_rows(const F* acc, int count, const float* channel_scale, float* out) {
  const F scale = channel_scale ? load<F>(channel_scale) : splat(1.0f);
#pragma GCC unroll 16
  for (int m = 0; m < kTileRows; ++m)
    if (m < count) store(out + m * kPanel, channel_scale ? acc[m] * scale : acc[m]);
}

// int8: an activation of 15 bits with one scale for 1024 inputs costs two products, of its high and of its low parts,
// but their sums stay in the tiles to the end of the group. One of 8 bits needs a scale for every 64 inputs to be worth
// as much, and then each product leaves its tile through memory to be scaled: 90 cycles instead of 32. No sum of a
// group exceeds 1024 * 128 * 16256 < 2^31.
constexpr int kLongBlocks = 1024 / kTileBytes;

struct alignas(64) Products {
  int32_t of[4][kTileRows][kTileOutputs];  // outputs 0-15 of high parts, of low parts; outputs 16-31 of high, of low
};

INLINE void long_products(const uint8_t* panel, int blocks, const uint8_t* acts, int64_t stride, bool first_rows,
                          Products& products) {
  _tile_zero(TILE_C0);
  _tile_zero(TILE_C1);
  _tile_zero(TILE_C2);
  _tile_zero(TILE_C3);
  for (int b = 0; b < blocks; ++b, acts += 2 * kTileBytes, panel += kLayouts[kInt8].block) {
    if (first_rows) fetch(panel + kAhead, kLayouts[kInt8].block);
    _tile_loadd(TILE_A, acts, stride);
    _tile_loadd(TILE_B, panel, kStep);
    _tile_dpbsud(TILE_C0, TILE_A, TILE_B);
    _tile_loadd(TILE_A, acts + kTileBytes, stride);
    _tile_dpbsud(TILE_C1, TILE_A, TILE_B);
    _tile_loadd(TILE_B, panel + 64, kStep);
    _tile_dpbsud(TILE_C3, TILE_A, TILE_B);
    _tile_loadd(TILE_A, acts, stride);
    _tile_dpbsud(TILE_C2, TILE_A, TILE_B);
  }
  _tile_stored(TILE_C0, products.of[0], 64);
  _tile_stored(TILE_C1, products.of[1], 64);
  _tile_stored(TILE_C2, products.of[2], 64);
  _tile_stored(TILE_C3, products.of[3], 64);
}

// Few rows: the same integers, without tiles.
template <int M>
INLINE void long_rows(const uint8_t* panel, int blocks, const uint8_t* acts, int64_t stride, Products& products) {
  constexpr int kChains = M == 1 ? 2 : 1;  // of each sum, since a single one would wait for itself
  I sum[4][M][kChains] = {};
  for (int b = 0; b < blocks; ++b, acts += 2 * kTileBytes, panel += kLayouts[kInt8].block) {
    fetch(panel + kAhead, kLayouts[kInt8].block);
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) {
      const U left = load<U>(panel + j * kStep), right = load<U>(panel + j * kStep + 64);
      for (int m = 0; m < M; ++m) {
        const U high = splat(scalar<uint32_t>(acts + m * stride + 4 * j));
        const U low = splat(scalar<uint32_t>(acts + m * stride + kTileBytes + 4 * j));
        const int c = j % kChains;
        sum[0][m][c] = dot4<8>(sum[0][m][c], left, high);
        sum[1][m][c] = dot4<8>(sum[1][m][c], left, low);
        sum[2][m][c] = dot4<8>(sum[2][m][c], right, high);
        sum[3][m][c] = dot4<8>(sum[3][m][c], right, low);
      }
    }
  }
  for (int i = 0; i < 4; ++i)
    for (int m = 0; m < M; ++m) store(products.of[i][m], sum[i][m][0] + (kChains == 2 ? sum[i][m][kChains - 1] : I{}));
}

// out[count][32] (+)= the products of one group in floats. group: of the first of these rows.
INLINE void add_products(const Products& products, int count, const uint8_t* group, int64_t stride, bool first,
                         const float* channel_scale, float* out) {
  const F l = channel_scale ? load<F>(channel_scale) : splat(1.0f), r = channel_scale ? load<F>(channel_scale + L) : l;
  for (int m = 0; m < count; ++m, group += stride, out += kPanel) {
    const I offset = splat(scalar<int32_t>(group + offsetof(Group, minus_sum)));
    const F scale = splat(scalar<float>(group));
    for (int v = 0; v < 2; ++v) {
      const I total = (load<I>(products.of[2 * v][m]) << 7) + load<I>(products.of[2 * v + 1][m]) + offset;
      const F sum = fma(scale, to_float(total), first ? F{} : load<F>(out + v * L));
      store(out + v * L, channel_scale ? sum * (v ? r : l) : sum);
    }
  }
}

inline void int8_product(const uint8_t* panel, int k, const uint8_t* acts, int64_t stride, int rows, float* out) {
  const int blocks = k / kTileBytes;
  const float* channel_scale = (const float*)(panel + (int64_t)blocks * kLayouts[kInt8].block);
  const uint8_t* groups = acts + groups_at(kActSplit1024, k);
  Products products;
  for (int b = 0; b < blocks; b += kLongBlocks, groups += sizeof(Group)) {
    const int here = least(kLongBlocks, blocks - b);
    const uint8_t *at = panel + b * kLayouts[kInt8].block, *a = acts + 2 * b * kTileBytes;
    for (int row = 0; row < rows; row += kTileRows, a += kTileRows * stride) {
      const int count = least(kTileRows, rows - row);
      switch (rows) {
        case 1: long_rows<1>(at, here, a, stride, products); break;
        case 2: long_rows<2>(at, here, a, stride, products); break;
        case 3: long_rows<3>(at, here, a, stride, products); break;
        case 4: long_rows<4>(at, here, a, stride, products); break;
        default: long_products(at, here, a, stride, row == 0, products);
      }
      add_products(products, count, groups + row * stride, stride, b == 0, b + here == blocks ? channel_scale : nullptr,
                   out + row * kPanel);
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
          const uint8_t* sum = group + m * stride + offsetof(Group, scaled_sum);
          if (R::kMin) acc[m] = fma(least, splat(scalar<float>(sum)), acc[m]);
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
      if (row == 0) fetch<3>(b + kAhead, sizeof last);  // a step 4 % faster than by the second cache; int8's is slower
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
  if (f == kInt8) return int8_product(panel, (int)padded_inputs(f, k), acts, stride, rows, out), true;
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

constexpr ActKind act_kind(Format f, int rows) {
  const ActKind plain = f == kInt8 ? (kTiles ? kActSplit1024 : kByteKind) : kLayouts[f].act;
  return rows >= kWordRows ? as_words(plain) : plain;
}
static_assert(act_bytes(act_kind(kInt8, 1), 4096) <= act_room(kInt8, 4096));
static_assert(act_bytes(act_kind(kQ4_0, kWordRows), 4096) <= act_room(kQ4_0, 4096));

constexpr int kRowUnit = kTiles ? kTileRows : 6;  // 6: rows of a tile of bytes in registers, and half of most others

// out[rows][32] = acts times the panel: see Kernels::panel_product and panel_product.
void product(Format f, const uint8_t* panel, int k, const uint8_t* acts, int64_t stride, int rows, uint8_t* scratch,
             float* out) {
  if (!tile_product(f, panel, k, acts, stride, rows, scratch, out))
    panel_product(f, panel, k, acts, stride, rows, scratch, out);
}

}  // namespace MARTLET_ISA
}  // namespace martlet
