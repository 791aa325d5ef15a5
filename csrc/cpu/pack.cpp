#include "pack.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace martlet {
namespace {

template <class T>
T read(const uint8_t* p) {
  T t;
  std::memcpy(&t, p, sizeof t);
  return t;
}

float half_to_float(uint16_t h) {
  const int exponent = h >> 10 & 31, fraction = h & 1023;
  const float magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                          : exponent == 0 ? std::ldexp((float)fraction, -24)
                                          : std::ldexp((float)(fraction + 1024), exponent - 25);
  return h >> 15 ? -magnitude : magnitude;
}

uint16_t float_to_half(float f) {  // to nearest even; f is finite and small enough
  const uint32_t bits = read<uint32_t>((const uint8_t*)&f), sign = bits >> 16 & 0x8000;
  const float magnitude = std::fabs(f);
  if (magnitude < 6.103515625e-5f) return uint16_t(sign | uint32_t(std::nearbyint(magnitude * 16777216.0f)));
  const uint32_t rounded = (bits & 0x7fffffff) + 0xfff + (bits >> 13 & 1);
  return uint16_t(sign | ((rounded - (112u << 23)) >> 13));
}

uint16_t to_bf16(float f) {
  const uint32_t bits = read<uint32_t>((const uint8_t*)&f);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// One block of 32 inputs, whatever its format: value = scale * q - minimum, the scale of each half its own.
struct Block {
  int bits;        // of a quant
  uint8_t q[32];   // as stored: 0 ... 2^bits - 1
  int offset;      // value of a quant is q - offset
  bool has_min;
  uint16_t d, m;   // halves of the block, or of its super block
  uint8_t scale[2], min;  // six- and eight-bit scales of formats with super blocks; min: the zero of int4
};

// Bytes of a block of int4 in a row: d, the zero, a byte unused, two quants a byte.
int64_t int4_bytes(int f) { return 4 + 16 * kLayouts[f].super; }

// In front of a block's quants in a panel.
int64_t quants_at(Format f, bool has_min) { return is_int4(f) ? 0 : kLayouts[f].super > 1 || !has_min ? 64 : 128; }

// Six-bit scale and minimum number i of a K block's 12 bytes.
void k_scale(const uint8_t* s, int i, uint8_t* scale, uint8_t* min) {
  if (i < 4) {
    *scale = s[i] & 63;
    *min = s[i + 4] & 63;
  } else {
    *scale = uint8_t((s[i + 4] & 15) | s[i - 4] >> 6 << 4);
    *min = uint8_t(s[i + 4] >> 4 | s[i] >> 6 << 4);
  }
}

void fifth_bits(const uint8_t* high, uint8_t* q) {
  const uint32_t bits = read<uint32_t>(high);
  for (int i = 0; i < 32; ++i) q[i] |= (bits >> i & 1) << 4;
}

void nibbles(const uint8_t* p, uint8_t* q) {
  for (int i = 0; i < 16; ++i) {
    q[i] = p[i] & 15;
    q[i + 16] = p[i] >> 4;
  }
}

// Block b of a row in a file's layout (ggml).
Block block_of(Format f, const uint8_t* row, int64_t b) {
  Block out{};
  const int sub = int(b % 8);
  switch (f) {
    case kQ4_0:
    case kQ5_0:
    case kQ8_0: {
      const uint8_t* p = row + b * (f == kQ4_0 ? 18 : f == kQ5_0 ? 22 : 34);
      out.bits = f == kQ4_0 ? 4 : f == kQ5_0 ? 5 : 8;
      out.offset = 1 << (out.bits - 1);
      out.d = read<uint16_t>(p);
      if (f == kQ8_0)
        for (int i = 0; i < 32; ++i) out.q[i] = p[2 + i] ^ 0x80;
      else nibbles(p + (f == kQ5_0 ? 6 : 2), out.q);
      if (f == kQ5_0) fifth_bits(p + 2, out.q);
      break;
    }
    case kQ4_1:
    case kQ5_1: {
      const uint8_t* p = row + b * (f == kQ4_1 ? 20 : 24);
      out.bits = f == kQ4_1 ? 4 : 5;
      out.has_min = true;
      out.d = read<uint16_t>(p);
      out.m = read<uint16_t>(p + 2);
      nibbles(p + (f == kQ5_1 ? 8 : 4), out.q);
      if (f == kQ5_1) fifth_bits(p + 4, out.q);
      break;
    }
    case kQ4_K:
    case kQ5_K: {
      const uint8_t* p = row + b / 8 * (f == kQ4_K ? 144 : 176);
      const uint8_t* low = p + (f == kQ4_K ? 16 : 48) + sub / 2 * 32;
      out.bits = f == kQ4_K ? 4 : 5;
      out.has_min = true;
      out.d = read<uint16_t>(p);
      out.m = read<uint16_t>(p + 2);
      k_scale(p + 4, sub, &out.scale[0], &out.min);
      for (int i = 0; i < 32; ++i) {
        out.q[i] = sub % 2 ? low[i] >> 4 : low[i] & 15;
        if (f == kQ5_K) out.q[i] |= (p[16 + i] >> sub & 1) << 4;
      }
      break;
    }
    case kQ6_K: {
      const uint8_t* p = row + b / 8 * 210;
      const int half = sub / 4, quarter = sub % 4;  // 128 inputs; 32 of them
      const uint8_t *low = p + half * 64 + quarter % 2 * 32, *high = p + 128 + half * 32;
      out.bits = 6;
      out.offset = 32;
      out.d = read<uint16_t>(p + 208);
      for (int h = 0; h < 2; ++h) out.scale[h] = p[192 + half * 8 + quarter * 2 + h];
      for (int i = 0; i < 32; ++i)
        out.q[i] = uint8_t((quarter < 2 ? low[i] & 15 : low[i] >> 4) | (high[i] >> (2 * quarter) & 3) << 4);
      break;
    }
    case kInt4x32:
    case kInt4x64:
    case kInt4x128: {
      const int64_t super = kLayouts[f].super;
      const uint8_t *p = row + b / super * int4_bytes(f), *q = p + 4 + b % super * 16;
      out.bits = 4;
      out.has_min = true;
      out.d = read<uint16_t>(p);
      out.min = p[2];
      for (int i = 0; i < 32; ++i) out.q[i] = i % 2 ? q[i / 2] >> 4 : q[i / 2] & 15;
      break;
    }
    default: break;
  }
  return out;
}

void values_of(Format f, const Block& b, float* out) {
  const float d = half_to_float(b.d), m = b.has_min ? half_to_float(b.m) : 0;
  if (is_int4(f)) {
    for (int i = 0; i < 32; ++i) out[i] = d * (float)(int(b.q[i]) - int(b.min));
    return;
  }
  const bool super = kLayouts[f].super > 1;
  for (int i = 0; i < 32; ++i) {
    const float scale = !super ? d : f == kQ6_K ? d * (float)(int8_t)b.scale[i / 16] : d * (float)b.scale[0];
    const float low = super ? -(m * (float)b.min) : m;
    const float v = scale * (float)(int(b.q[i]) - b.offset);
    out[i] = b.has_min ? v + low : v;
  }
}

void decode_row(int source, const uint8_t* row, int64_t k, float* out) {
  switch (source) {
    case kF32: std::memcpy(out, row, 4 * k); return;
    case kF16:
      for (int64_t i = 0; i < k; ++i) out[i] = half_to_float(read<uint16_t>(row + 2 * i));
      return;
    case kBF16:
      for (int64_t i = 0; i < k; ++i) {
        const uint32_t bits = uint32_t(read<uint16_t>(row + 2 * i)) << 16;
        std::memcpy(out + i, &bits, 4);
      }
      return;
    case kInt8:
      for (int64_t i = 0; i < k; ++i) out[i] = read<float>(row) * (float)(int8_t)row[4 + i];
      return;
    default:
      for (int64_t b = 0; b < k / 32; ++b) values_of(Format(source), block_of(Format(source), row, b), out + 32 * b);
  }
}

uint8_t* block_at(Format f, uint8_t* panel, int64_t b) {
  const Layout& at = kLayouts[f];
  return panel + (b / at.super + 1) * at.header + b * at.block;
}

void put_half(uint8_t* base, int lane, uint16_t h) { std::memcpy(base + 2 * lane, &h, 2); }

void put_block(Format f, const Block& b, int64_t index, int lane, uint8_t* panel) {
  const Layout& layout = kLayouts[f];
  uint8_t* at = block_at(f, panel, index);
  uint8_t* header = layout.header ? at - index % layout.super * layout.block - layout.header : at;
  if (index % layout.super == 0) {
    put_half(header, lane, b.d);
    if (is_int4(f)) header[64 + lane] = b.min;
    else if (b.has_min) put_half(header + 64, lane, b.m);
  }
  if (is_int4(f)) {
  } else if (f == kQ6_K) {
    at[lane] = b.scale[0];
    at[32 + lane] = b.scale[1];
  } else if (layout.super > 1) {
    at[lane] = b.scale[0];
    at[32 + lane] = b.min;
  }
  uint8_t* q = at + quants_at(f, b.has_min);
  for (int i = 0; i < 32; ++i) {
    const int step = i / 4, byte = lane * 4 + i % 4;
    if (b.bits == 8) {
      q[step * 128 + byte] = b.q[i];
      continue;
    }
    q[(step & 3) * 128 + byte] |= uint8_t((b.q[i] & 15) << (step & 4));
    if (b.bits == 5) q[512 + byte] |= uint8_t(b.q[i] >> 4 << step);
    if (b.bits == 6) q[(4 + step / 4) * 128 + byte] |= uint8_t(b.q[i] >> 4 << (2 * (step & 3)));
  }
}

// Four bits and a minimum for each 32 weights: the range of the block in 15 steps.
Block quantise_4bit(const float* x, int64_t count) {
  Block b{};
  b.bits = 4;
  b.has_min = true;
  float low = count ? x[0] : 0, high = low;
  for (int64_t i = 1; i < count; ++i) {
    low = std::min(low, x[i]);
    high = std::max(high, x[i]);
  }
  b.d = float_to_half((high - low) / 15);
  b.m = float_to_half(low);
  const float d = half_to_float(b.d), m = half_to_float(b.m);
  for (int64_t i = 0; i < count; ++i)
    b.q[i] = d > 0 ? uint8_t(std::min(15.0f, std::max(0.0f, std::nearbyint((x[i] - m) / d)))) : 0;
  return b;
}

void encode_row(Format f, const float* x, int64_t k, int lane, uint8_t* panel) {
  switch (f) {
    case kF32:
      for (int64_t i = 0; i < k; ++i) std::memcpy(panel + i * 128 + lane * 4, x + i, 4);
      return;
    case kBF16:
      for (int64_t i = 0; i < k; ++i) {
        const uint16_t h = to_bf16(x[i]);
        std::memcpy(panel + i / 2 * 128 + lane * 4 + i % 2 * 2, &h, 2);
      }
      return;
    case kInt8: {
      float largest = 0;
      for (int64_t i = 0; i < k; ++i) largest = std::max(largest, std::fabs(x[i]));
      const float scale = largest / 127, inverse = largest > 0 ? 127 / largest : 0;
      for (int64_t i = 0; i < k; ++i)
        panel[i / 4 * 128 + lane * 4 + i % 4] = uint8_t(128 + int(std::nearbyint(x[i] * inverse)));
      std::memcpy(panel + padded_inputs(kInt8, k) * kPanel + 4 * lane, &scale, 4);
      return;
    }
    default:  // kQ4_1
      for (int64_t b = 0; b * 32 < k; ++b)
        put_block(f, quantise_4bit(x + b * 32, std::min<int64_t>(32, k - b * 32)), b, lane, panel);
  }
}

}  // namespace

int64_t source_row_bytes(int source, int64_t k) {
  switch (source) {
    case kF32: return 4 * k;
    case kF16:
    case kBF16: return 2 * k;
    case kQ4_0: return k / 32 * 18;
    case kQ4_1: return k / 32 * 20;
    case kQ5_0: return k / 32 * 22;
    case kQ5_1: return k / 32 * 24;
    case kQ8_0: return k / 32 * 34;
    case kQ4_K: return k / 256 * 144;
    case kQ5_K: return k / 256 * 176;
    case kQ6_K: return k / 256 * 210;
    case kInt8: return 4 + k;
    case kInt4x32:
    case kInt4x64:
    case kInt4x128: return k / (32 * kLayouts[source].super) * int4_bytes(source);
    default: return -1;
  }
}

void pack_panel(int source, Format target, const uint8_t* const rows[kPanel], int64_t k, uint8_t* panel) {
  std::memset(panel, 0, panel_bytes(target, k));
  if (target == kInt8) std::memset(panel, 128, padded_inputs(kInt8, k) * kPanel);
  const bool as_it_is = source == target && kLayouts[target].group == 32;
  std::vector<float> values(as_it_is ? 0 : k);
  for (int lane = 0; lane < kPanel; ++lane) {
    if (!rows[lane]) continue;
    if (source == kInt8 && target == kInt8) {
      std::memcpy(panel + padded_inputs(kInt8, k) * kPanel + 4 * lane, rows[lane], 4);
      for (int64_t i = 0; i < k; ++i) panel[i / 4 * 128 + lane * 4 + i % 4] = rows[lane][4 + i] ^ 0x80;
    } else if (as_it_is) {
      for (int64_t b = 0; b < k / 32; ++b) put_block(target, block_of(target, rows[lane], b), b, lane, panel);
    } else {
      decode_row(source, rows[lane], k, values.data());
      encode_row(target, values.data(), k, lane, panel);
    }
  }
}

void unpack_row(Format f, const uint8_t* panel, int lane, int64_t k, float* out) {
  const Layout& layout = kLayouts[f];
  if (f == kF32) {
    for (int64_t i = 0; i < k; ++i) std::memcpy(out + i, panel + i * 128 + lane * 4, 4);
  } else if (f == kBF16) {
    for (int64_t i = 0; i < k; ++i) {
      const uint32_t bits = uint32_t(read<uint16_t>(panel + i / 2 * 128 + lane * 4 + i % 2 * 2)) << 16;
      std::memcpy(out + i, &bits, 4);
    }
  } else if (f == kInt8) {
    const float scale = read<float>(panel + padded_inputs(f, k) * kPanel + 4 * lane);
    for (int64_t i = 0; i < k; ++i) out[i] = scale * (float)(int(panel[i / 4 * 128 + lane * 4 + i % 4]) - 128);
  } else {
    for (int64_t index = 0; index * 32 < k; ++index) {
      const uint8_t* at = block_at(f, const_cast<uint8_t*>(panel), index);
      const uint8_t* header = layout.header ? at - index % layout.super * layout.block - layout.header : at;
      Block b{};
      b.bits = f == kQ8_0 ? 8 : f == kQ6_K ? 6 : f == kQ5_0 || f == kQ5_1 || f == kQ5_K ? 5 : 4;
      b.has_min = f == kQ4_1 || f == kQ5_1 || f == kQ4_K || f == kQ5_K || is_int4(f);
      b.offset = b.has_min ? 0 : 1 << (b.bits - 1);
      b.d = read<uint16_t>(header + 2 * lane);
      if (b.has_min) b.m = read<uint16_t>(header + 64 + 2 * lane);
      b.scale[0] = at[lane];
      b.scale[1] = b.min = is_int4(f) ? header[64 + lane] : at[32 + lane];
      const uint8_t* q = at + quants_at(f, b.has_min);
      for (int i = 0; i < 32; ++i) {
        const int step = i / 4, byte = lane * 4 + i % 4;
        if (b.bits == 8) b.q[i] = q[step * 128 + byte];
        else b.q[i] = q[(step & 3) * 128 + byte] >> (step & 4) & 15;
        if (b.bits == 5) b.q[i] |= (q[512 + byte] >> step & 1) << 4;
        if (b.bits == 6) b.q[i] |= (q[(4 + step / 4) * 128 + byte] >> (2 * (step & 3)) & 3) << 4;
      }
      float values[32];
      values_of(f, b, values);
      std::memcpy(out + index * 32, values, 4 * std::min<int64_t>(32, k - index * 32));
    }
  }
}

}  // namespace martlet
