// How weights lie in memory: the formats, and the panels that every kernel reads.
//
// A panel holds kPanel = 32 outputs of a matrix, one lane each, with its inputs one after another, so that a kernel
// streams it from end to end and needs no horizontal sums. One step of inputs fills 32 lanes of 4 bytes:
//   f32   1 input   [32] float
//   bf16  2 inputs  [32][2] bf16
//   bytes 4 inputs  [32][4] u8, each weight plus its format's offset; activations are s8 (dot4 in simd.hpp)
// Block formats meet activations of 15 bits, in two parts of s8: rounding to 8 bits is what moves answers (0.08 in the
// log-probability of a token of SmolLM2, against 0.01 for a cache in bf16), and a stream of weights hides the work.
// Block formats keep the scales of a block in front of its quants. Nothing is lost: a block has the same bits as in
// the file it came from, in another order. Those of one scale and one zero for 32 to 128 inputs (GPTQ, AWQ) have both
// in a header: value = d * (q - zero). Four-bit quants: step j sits in the low nibbles of group j, step j + 4 in
// the high ones. Extra bits (q5, q6) are planes of one or two bits a step.
#pragma once

#include <cstdint>

namespace martlet {

constexpr int kPanel = 32;

enum Format : int32_t {
  kF32 = 0,
  kBF16 = 1,
  kInt8 = 2,  // one scale an output
  kQ4_0 = 3,
  kQ4_1 = 4,
  kQ5_0 = 5,
  kQ5_1 = 6,
  kQ8_0 = 7,
  kQ4_K = 8,
  kQ5_K = 9,
  kQ6_K = 10,
  kInt4x32 = 11,
  kInt4x64 = 12,
  kInt4x128 = 13,
  kScreen = 14,  // of a head: see screen.hpp
  kFormats = 15,
  kF16 = 32,  // only as a source
};

// What a linear's input is turned into before it meets the weights.
//   kActBF16     rounded to bf16; as pairs, or as f32 where the processor has no product of pairs (kPairDot); for
//                tiles (tiles.hpp) with zeros up to a multiple of 32
//   kActSplit32  groups of 32, value = scale * (128 * high + low); 32 high parts, then 32 low parts
//   kActByte64   groups of 64, value = scale * s8
//   kActPair32   groups of 32, value = scale * s8, where inputs 2i and 2i + 1 are at most 128 together: what int8 meets
//                where its products saturate 16 bits (kPairs). A step is 1.0 to 1.4 times as wide as without pairs, and
//                a group of half as many inputs more than makes up for it
//   kActSplit1024  groups of 1024, value = scale * (128 * high + low); of every 64 inputs the high parts, then the low
//                parts (store_parts). Instead of kActByte64 where there are tiles: see gemm_tiles.hpp
//   kActWord32   the integers of kActSplit32 as whole words, for many rows where that is faster (kWords)
enum ActKind : int32_t { kActF32, kActBF16, kActSplit32, kActByte64, kActSplit1024, kActWord32, kActPair32 };

// Behind the integers of a row: one of these for each group.
struct Group {
  float scale;
  float scaled_sum;       // sum of the group's values, for formats with a minimum; kActPair32: in the first group, of
                          // the whole row's, times 128, which undoes the offset of the weights in the end
  int32_t minus_sum;      // -(sum of its integers), undoes the offset of the weights; times 128 for int8's
  int32_t minus_half[2];  // -(sum of the integers of each half)
};

struct Layout {
  int32_t group;        // inputs a block, the unit that inputs are padded to
  int32_t super;        // blocks that share a header
  int32_t header;       // bytes of that header
  int32_t block;        // bytes of a block
  int32_t tail;         // bytes behind the last block
  ActKind act;
};

constexpr Layout kLayouts[kFormats] = {
    {1, 1, 0, 128, 0, kActF32},              // f32
    {2, 1, 0, 128, 0, kActBF16},             // bf16
    {64, 1, 0, 2048, 128, kActByte64},      // int8
    {32, 1, 0, 64 + 512, 0, kActSplit32},    // q4_0: d
    {32, 1, 0, 128 + 512, 0, kActSplit32},   // q4_1: d, m
    {32, 1, 0, 64 + 640, 0, kActSplit32},    // q5_0: d
    {32, 1, 0, 128 + 640, 0, kActSplit32},   // q5_1: d, m
    {32, 1, 0, 64 + 1024, 0, kActSplit32},   // q8_0: d
    {32, 8, 128, 64 + 512, 0, kActSplit32},  // q4_K: d, dmin | scales, minima
    {32, 8, 128, 64 + 640, 0, kActSplit32},  // q5_K
    {32, 8, 64, 64 + 768, 0, kActSplit32},   // q6_K: d | two scales
    {32, 1, 128, 512, 0, kActSplit32},       // int4: d, zeros |
    {32, 2, 128, 512, 0, kActSplit32},
    {32, 4, 128, 512, 0, kActSplit32},
    {32, 1, 0, 64 + 640, 128, kActSplit32},  // screen: d | slack of each output
};

constexpr bool is_int4(int f) { return f >= kInt4x32 && f <= kInt4x128; }

constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Inputs of a row with its padding. Formats with super blocks take only whole ones, so `super` never pads.
constexpr int64_t padded_inputs(Format f, int64_t k) { return round_up(k, kLayouts[f].group); }

constexpr int64_t panel_bytes(Format f, int64_t k) {
  const Layout& at = kLayouts[f];
  const int64_t blocks = padded_inputs(f, k) / at.group;
  return blocks / at.super * at.header + blocks * at.block + at.tail;
}

// Where a prepared row's groups begin, and bytes of the whole row: an odd number of cache lines, since 16 rows that
// are a power of two apart push each other out of the cache.
constexpr int64_t groups_at(ActKind kind, int64_t k) {
  return kind == kActSplit32 || kind == kActWord32 ? 2 * round_up(k, 32)
         : kind == kActByte64                      ? round_up(k, 64)
         : kind == kActPair32                      ? round_up(k, 32)
         : kind == kActSplit1024                   ? 2 * round_up(k, 64)
                                                   : 0;
}
constexpr ActKind as_words(ActKind kind) { return kind == kActSplit32 ? kActWord32 : kind; }
constexpr int64_t odd_lines(int64_t bytes) { return (bytes + 63) / 64 * 64 | 64; }
constexpr int64_t act_bytes(ActKind kind, int64_t k) {
  switch (kind) {
    case kActF32:
    case kActBF16: return odd_lines(4 * round_up(k, 2));
    case kActSplit32:
    case kActPair32:
    case kActWord32: return odd_lines(groups_at(kind, k) + round_up(k, 32) / 32 * int64_t(sizeof(Group)));
    case kActSplit1024: return odd_lines(groups_at(kind, k) + round_up(k, 1024) / 1024 * int64_t(sizeof(Group)));
    default: return odd_lines(groups_at(kind, k) + round_up(k, 64) / 64 * int64_t(sizeof(Group)));
  }
}
// Room for a row of a format on any instruction set: int8's is the longest in two parts, others' as words.
constexpr int64_t act_room(Format f, int64_t k) {
  return act_bytes(f == kInt8 ? kActSplit1024 : as_words(kLayouts[f].act), k);
}

// Most bytes that a panel takes when its quants are widened to words and its scales to floats.
constexpr int64_t widened_bytes(int64_t k) { return round_up(k, 64) / 32 * (2 * 128 + 2048); }

}  // namespace martlet
