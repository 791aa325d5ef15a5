// Vectors of the widest kind the compiler was told to use, written once for every instruction set.
//
// This header is compiled several times with different -m flags; everything in it lives in a namespace of its own
// (MARTLET_ISA) so that the linker never merges an AVX-512 body into the AVX2 build. For the same reason the files
// that include it use no templates of the standard library.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifndef MARTLET_ISA
#define MARTLET_ISA isa_generic
#endif

#define INLINE inline __attribute__((always_inline))

namespace martlet {
namespace MARTLET_ISA {

#if defined(__AVX512F__)
constexpr int L = 16;
#elif defined(__AVX2__)
constexpr int L = 8;
#else
constexpr int L = 4;
#endif

typedef float F __attribute__((vector_size(4 * L)));
typedef int32_t I __attribute__((vector_size(4 * L)));
typedef uint32_t U __attribute__((vector_size(4 * L)));
typedef int8_t Bytes __attribute__((vector_size(L)));
typedef uint8_t Quarters __attribute__((vector_size(4 * L)));  // four bytes in each lane
typedef uint16_t Halves __attribute__((vector_size(2 * L)));

template <class V>
INLINE V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
INLINE void store(void* p, V v) {
  std::memcpy(p, &v, sizeof v);
}
template <class T>
INLINE T scalar(const void* p) {
  T t;
  std::memcpy(&t, p, sizeof t);
  return t;
}

// Asks for memory that will be read soon, into the second cache (kNear 2) or the first (3). Any address will do.
template <int kNear = 2>
INLINE void fetch(const uint8_t* at, int64_t bytes) {
  for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(at + line, 0, kNear);
}

INLINE F splat(float x) { return x - F{}; }
INLINE I splat(int32_t x) { return x - I{}; }
INLINE U splat(uint32_t x) { return x - U{}; }
INLINE F to_float(I v) { return __builtin_convertvector(v, F); }
INLINE F max(F a, F b) { return a > b ? a : b; }
INLINE F min(F a, F b) { return a < b ? a : b; }
INLINE F abs(F a) { return (F)((U)a & 0x7fffffffu); }
template <class T>
constexpr INLINE T least(T a, T b) { return a < b ? a : b; }
template <class T>
constexpr INLINE T most(T a, T b) { return a > b ? a : b; }

INLINE F fma(F a, F b, F c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

// Sums in a fixed order, so that equal inputs give equal bits wherever they stand in a batch.
INLINE float sum(F v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(v);  // the halves onto each other, as below
#elif defined(__AVX2__)
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#endif
  float lane[L];
  store(lane, v);
  for (int width = L / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}
INLINE int32_t sum(I v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_epi32((__m512i)v);
#else
  int32_t total = 0;
  for (int i = 0; i < L; ++i) total += v[i];
  return total;
#endif
}
INLINE float highest(F v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(v);
#else
  float lane[L];
  store(lane, v);
  for (int width = L / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] = most(lane[i], lane[i + width]);
  return lane[0];
#endif
}
// Lanes 2i and 2i + 1 changed for one another; only AVX2 asks.
INLINE F swap_pairs(F v) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return (F)_mm256_permute_ps((__m256)v, 0xb1);
#else
  return v;
#endif
}
INLINE bool any(I mask) {  // of a comparison
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  int32_t all = 0;
  for (int i = 0; i < L; ++i) all |= mask[i];
  return all != 0;
#endif
}

// Sums of four products of weights (u8, of kBits) and activations (s8, above -128) are exact and go into a Quads:
// up to kRun of them, then add_quads puts them into 32-bit sums. Eight-bit weights are stored plus 128; whether the
// products still hold that offset says kByteOffset. AVX2 has only pairs that saturate 16 bits: narrow weights leave
// room there for several pairs, and eight-bit ones shed their offset and hand their sign to the activations, so that
// no pair exceeds 2 * 128 * 127.
//
// add_dot4 is for int8, whose products always hold the offset: 255 times two activations fits 16 bits where these are
// no more than 128 together, and on AVX2 they are prepared so (kPairs). first_dot4 has no sum to add to.
#if defined(__AVX512VNNI__)
constexpr bool kPairs = false;
constexpr int kByteOffset = 7;
template <int kBits>
constexpr int kRun = 1;
typedef I Quads;
template <int kBits>
INLINE Quads dot4(Quads acc, U weights, U acts) {
  return (I)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)weights, (__m512i)acts);
}
INLINE Quads start_quads(I sum) { return sum; }
INLINE I add_quads(I, Quads run) { return run; }
INLINE I add_dot4(I sum, U weights, U acts) { return dot4<8>(sum, weights, acts); }
INLINE I first_dot4(U weights, U acts) { return dot4<8>(I{}, weights, acts); }
#elif defined(__AVX512F__)
#error "the AVX-512 build needs VNNI"
#elif defined(__AVX2__)
constexpr bool kPairs = true;
constexpr int kByteOffset = 0;
template <int kBits>
constexpr int kRun = kBits <= 4 ? 8 : kBits == 5 ? 4 : kBits == 6 ? 2 : 1;
typedef int16_t Quads __attribute__((vector_size(4 * L)));  // two 16-bit sums in each lane
template <int kBits>
INLINE Quads dot4(Quads acc, U weights, U acts) {
  const __m256i w = (__m256i)weights, a = (__m256i)acts;
  if (kBits < 8) return acc + (Quads)_mm256_maddubs_epi16(w, a);
  const __m256i part = _mm256_xor_si256(w, _mm256_set1_epi8((char)0x80));
  return acc + (Quads)_mm256_maddubs_epi16(_mm256_abs_epi8(part), _mm256_sign_epi8(a, part));
}
INLINE Quads start_quads(I) { return Quads{}; }
INLINE I add_quads(I sum, Quads run) { return sum + (I)_mm256_madd_epi16((__m256i)run, _mm256_set1_epi16(1)); }
INLINE I first_dot4(U weights, U acts) {
  return (I)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)weights, (__m256i)acts), _mm256_set1_epi16(1));
}
// One piece of code: compilers move the products of a whole tile in front of their sums, and run out of registers. With
// 16 rows and more a core makes 80 to 88 products a nanosecond so, where the same intrinsics make 57 to 70.
INLINE I add_dot4(I sum, U weights, U acts) {
  I part;
  asm("vpmaddubsw %3, %2, %1\n\tvpmaddwd %4, %1, %1\n\tvpaddd %1, %0, %0"
      : "+x"(sum), "=&x"(part) : "x"(weights), "x"(acts), "x"(_mm256_set1_epi16(1)));
  return sum;
}
#else
constexpr bool kPairs = false;
constexpr int kByteOffset = 7;
template <int kBits>
constexpr int kRun = 1;
typedef I Quads;
template <int kBits>
INLINE Quads dot4(Quads acc, U weights, U acts) {
  for (int shift = 0; shift < 32; shift += 8)
    acc += (I)((weights >> shift) & 255u) * ((I)(acts << (24 - shift)) >> 24);
  return acc;
}
INLINE Quads start_quads(I sum) { return sum; }
INLINE I add_quads(I, Quads run) { return run; }
INLINE I add_dot4(I sum, U weights, U acts) { return dot4<8>(sum, weights, acts); }
INLINE I first_dot4(U weights, U acts) { return dot4<8>(I{}, weights, acts); }
#endif

// Whether many rows are better multiplied as 16-bit words, two in a lane: without VNNI that takes half the operations.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr bool kWords = true;
INLINE I dot2_words(I acc, U a, U b) { return acc + (I)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
// Signed bytes 0 and 2, or 1 and 3, of each lane as words.
INLINE U signed_pair(U bytes, int pair) {
  return (U)_mm256_srai_epi16(pair ? (__m256i)bytes : _mm256_slli_epi16((__m256i)bytes, 8), 8);
}
// Bytes 0 and 1, or 2 and 3, of each lane as words minus an offset.
INLINE U byte_pair(U bytes, int pair, int offset) {
  const __m128i low = _mm_setr_epi8(0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13, -1);
  const __m128i high = _mm_setr_epi8(2, -1, 3, -1, 6, -1, 7, -1, 10, -1, 11, -1, 14, -1, 15, -1);
  const __m256i words = _mm256_shuffle_epi8((__m256i)bytes, _mm256_broadcastsi128_si256(pair ? high : low));
  return (U)_mm256_sub_epi16(words, _mm256_set1_epi16((short)offset));
}
#else
constexpr bool kWords = false;
INLINE I dot2_words(I acc, U, U) { return acc; }
INLINE U byte_pair(U bytes, int, int) { return bytes; }
#endif

// Whether bytes are multiplied with factors of 15 bits as they are: as two products of bytes, or as words.
#if defined(__AVX512VNNI__)
constexpr bool kLongBytes = true;
#else
constexpr bool kLongBytes = kWords;
#endif

// Two bf16 in each 32-bit lane, as two vectors of floats.
INLINE F low_bf16(U pairs) { return (F)(pairs << 16); }
INLINE F high_bf16(U pairs) { return (F)(pairs & 0xffff0000u); }

// Whether bf16 is multiplied in pairs as it is (and in tiles, where there are any). Where there is no instruction for
// that, the other factor is kept in f32 and a pair costs two multiply-adds, and two operations that many rows share.
#if defined(__AVX512BF16__)
constexpr bool kPairDot = true;
INLINE F dot2(F acc, U a, U b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }
#else
constexpr bool kPairDot = false;
INLINE F dot2(F acc, U a, U b) {
  return fma(high_bf16(a), high_bf16(b), fma(low_bf16(a), low_bf16(b), acc));
}
#endif

INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = h & 0x7fff;
  uint32_t bits = (magnitude << 13) + (112u << 23);
  if (magnitude >= 0x7c00) bits += 112u << 23;  // infinity and NaN keep the top exponent
  float f;
  if (magnitude < 0x0400) {  // subnormal: the fraction times 2^-24
    f = (float)magnitude * 5.9604644775390625e-8f;
    std::memcpy(&bits, &f, 4);
  }
  bits |= sign;
  std::memcpy(&f, &bits, 4);
  return f;
}

// L halves at p as floats.
INLINE F load_half(const void* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  F out;
  for (int i = 0; i < L; ++i) out[i] = half_to_float(scalar<uint16_t>((const char*)p + 2 * i));
  return out;
#endif
}

// L bytes at p as floats.
INLINE F load_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  F out;
  for (int i = 0; i < L; ++i) out[i] = p[i];
  return out;
#endif
}
INLINE F load_bytes(const int8_t* p) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  F out;
  for (int i = 0; i < L; ++i) out[i] = p[i];
  return out;
#endif
}

// The low halves and the low bytes of L integers.
INLINE Halves to_words(I v) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i packed = _mm256_packs_epi32((__m256i)v, (__m256i)v);  // all fit
  return (Halves)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector((U)v, Halves);
#endif
}
INLINE Bytes to_bytes(I v) {
#if defined(__AVX512F__)
  return (Bytes)_mm512_cvtepi32_epi8((__m512i)v);
#elif defined(__AVX2__)
  const __m256i low = _mm256_shuffle_epi8((__m256i)v, _mm256_set1_epi32(0x0c080400));
  return (Bytes)_mm_unpacklo_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1))[0];
#else
  return __builtin_convertvector(v, Bytes);
#endif
}

// 64 integers of 15 bits as their high parts, then their low ones, of 7 bits and a sign: integer = 128 * high + low.
// kPositive: none is negative, and then neither are the low parts. Where words are multiplied they stay whole, of every
// four 0, 2, 1, 3.
template <bool kPositive>
INLINE void store_parts(uint8_t* out, const I* q) {
#if defined(__AVX512F__)
  // Packing goes within each quarter of a vector; the quarters are put in order at the end.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m512i high[2], low[2];
  for (int i = 0; i < 2; ++i) {
    const __m512i words = _mm512_packs_epi32((__m512i)q[2 * i], (__m512i)q[2 * i + 1]);
    if (kPositive) {
      high[i] = _mm512_srli_epi16(words, 7);
      low[i] = _mm512_and_si512(words, _mm512_set1_epi16(127));
    } else {
      high[i] = _mm512_srai_epi16(_mm512_add_epi16(words, _mm512_set1_epi16(64)), 7);
      low[i] = _mm512_sub_epi16(words, _mm512_slli_epi16(high[i], 7));
    }
  }
  store(out, _mm512_permutexvar_epi32(order, _mm512_packs_epi16(high[0], high[1])));
  store(out + 64, _mm512_permutexvar_epi32(order, _mm512_packs_epi16(low[0], low[1])));
#elif defined(__AVX2__)
  for (int i = 0; i < 64 / L; ++i)
    store(out + 2 * i * L, to_words((I)_mm256_shuffle_epi32((__m256i)q[i], 0xd8)));
#else
  for (int i = 0; i < 64 / L; ++i) {
    const I high = (q[i] + (kPositive ? 0 : 64)) >> 7;
    store(out + i * L, to_bytes(high));
    store(out + 64 + i * L, to_bytes(q[i] - (high << 7)));
  }
#endif
}

// bf16 with round to nearest even, as 16-bit values. NaN stays NaN; numbers below the normal range may become 0.
INLINE Halves to_bf16(F v) {
#if defined(__AVX512BF16__)
  return (Halves)_mm512_cvtneps_pbh(v);
#endif
  const U bits = (U)v;
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U nan = (bits >> 16) | 0x40u;
  return __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded, Halves);
}
INLINE F from_bf16(Halves h) { return (F)(__builtin_convertvector(h, U) << 16); }

// Nearest integer, ties to even, for |v| < 2^22.
INLINE I round_to_int(F v) {
  const F magic = splat(12582912.0f);
  return (I)(v + magic) - (I)magic;
}

// e^x to about 1 ulp; 0 below the normal range. Cephes' reduction and polynomial.
INLINE F exp(F x) {
  const F clamped = min(max(x, splat(-87.3f)), splat(88.3f));
  const I n = round_to_int(clamped * 1.44269504f);
  const F k = to_float(n);
  F r = fma(k, splat(-0.693359375f), clamped);
  r = fma(k, splat(2.12194440e-4f), r);
  F p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r + 1.0f);
  const F scaled = (F)((I)p + (n << 23));
  return x < -87.3f ? F{} : scaled;
}

// cap * tanh(x / cap), from the exponential of a number that is never positive.
INLINE F capped(F x, float cap) {
  const F e = exp(abs(x) * (-2.0f / cap)), y = (1.0f - e) / (1.0f + e) * cap;
  return x < 0.0f ? -y : y;
}

// e^x for x <= 0, with fewer operations: n stays in the low bits of the sum that rounded it.
INLINE F exp_below(F x) {
  const F clamped = max(x, splat(-87.3f)), sum = fma(clamped, splat(1.44269504f), splat(12582912.0f));
  const F k = sum - 12582912.0f;
  F r = fma(k, splat(-0.693359375f), clamped);
  r = fma(k, splat(2.12194440e-4f), r);
  F p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r + 1.0f);
  return (F)((I)(x >= -87.3f) & ((I)p + (I)((U)sum << 23)));
}

// e^(x - peak) for many x, none above the peak. kRough: to 3e-6, enough for what is rounded to bf16 then: the peak goes
// into the multiplication by log2(e), and the polynomial for 2^r, |r| <= 1/2, is of the fourth degree.
template <bool kRough>
struct Shifted {
  F start;
  INLINE explicit Shifted(float peak) : start(splat(kRough ? peak * -1.44269504f : peak)) {}
  INLINE F of(F x) const {
    if (!kRough) return exp_below(x - start);
    const F t = max(fma(x, splat(1.44269504f), start), splat(-126.0f)), sum = t + 12582912.0f;
    const F r = t - (sum - 12582912.0f);
    F p = splat(9.560510206e-3f);
    p = fma(p, r, splat(5.591703917e-2f));
    p = fma(p, r, splat(2.402498111e-1f));
    p = fma(p, r, splat(6.931219677e-1f));
    p = fma(p, r, splat(9.999991909e-1f));
    return (F)((I)(t > -126.0f) & ((I)p + (I)((U)sum << 23)));
  }
};

}  // namespace MARTLET_ISA
}  // namespace martlet
