// What Python hands to C++: a decoder as a flat list of operations, and one step's batch. Plain C structs; their
// Python mirrors are in martlet/kernels/cpu/program.py, in the same order. All memory belongs to the caller.
//
// T is the number of tokens of the step, in sequence order; activations between operations are f32 rows.
#pragma once

#include <cstdint>

#include "formats.hpp"

namespace martlet {

// A packed matrix [n, k]: ceil(n / 32) panels one after another.
struct Matrix {
  const uint8_t* panels;
  int32_t format;
  int32_t n, k;
  int32_t reserved;
};

enum OpKind : int32_t { kEmbed, kAngles, kLinear, kAttention, kHead, kNormAdd, kRoute, kExperts, kCombine,
                        kLayerNorm, kShift, kRecur, kRemember, kGateAdd, kPick };

// y[t] = row tokens[t] of the table, times scale.
struct EmbedOp {
  Matrix table;
  float* y;
  int64_t y_stride;  // in elements, as all strides of activations
  float scale;
  int32_t reserved;
};

// cosines[t][i], sines[t][i] of position(t) * frequency[i], times magnitude.
struct AnglesOp {
  const double* frequencies;
  float *cosines, *sines;  // [T][half]
  int32_t half;
  float magnitude;
};

enum Activation : int32_t { kSilu, kGeluTanh, kGelu, kTanh, kSigmoid, kSquaredRelu };

// What becomes of a product p. kGated: a panel is 16 gates and 16 ups, and gives 16 outputs.
enum Epilogue : int32_t {
  kStore,     // y = p
  kAdd,       // y += p
  kActivate,  // y = act(p)
  kMultiply,  // y *= p
  kGated,     // y = act(gate) * up
};

// What an adapter adds to a linear before its epilogue: B (A rmsnorm(x)). The matrices fused into the linear (q, k, v;
// gate, up) each have an A, padded with zeros to the largest rank; they stand under each other, each beginning at a
// multiple of 16 rows, or 32 where the rank is above 16.
struct Lora {
  const uint8_t* a;       // panels of `rows` rows, in the format and the order of inputs that suit the linear's weights
  const uint8_t* b;       // [panels of the linear * 2] sides, see lora.hpp
  const int32_t* halves;  // [panels of the linear * 2], the first row of A for each half of a panel; -1: nothing to add
  int32_t rank;           // a multiple of 4
  int32_t rows;           // 0: this adapter leaves the linear alone
};

constexpr int kLoraUnit = 32;  // products with A that are made integers together, or 16 of them

// Activations are prepared once for a linear and its adapters: A takes what its weights take. Beside integers B is
// integer too.
constexpr Format lora_format(Format base) { return base == kF32 || base == kBF16 || base == kInt8 ? base : kQ8_0; }
// What products with A take, for each of its rows: a float, or their share of 16 rows' kActByte64.
constexpr int64_t kLoraRowBytes = act_bytes(kActByte64, kLoraUnit) / 16;
constexpr int64_t lora_row_bytes(Format base) { return base == kF32 || base == kBF16 ? 4 : kLoraRowBytes; }

// y = epilogue(w * rmsnorm(x) + bias); no norm when `norm` is null, no bias when `bias` is null. Where `order` is given,
// input i of w is element order[i] of what is left of x: quantisations may sort their inputs.
struct LinearOp {
  Matrix w;
  const float* x;
  const float* norm;  // [k]
  const float* bias;  // [panels * 32], in panel order
  float* y;
  int64_t x_stride, y_stride;
  float eps;
  int32_t epilogue, activation;
  int32_t n_out;  // columns of y: n, or the gated half of it
  const Lora* loras;  // [slots], slot 0 unused; null: adapters cannot concern it
  const int32_t* order;  // [k], null for the order of x
};

// How keys and values are kept. kCacheInt8: s8 with one scale for each token and head.
enum CacheKind : int32_t { kCacheF32, kCacheBF16, kCacheInt8 };

constexpr int64_t cache_tile_bytes(int32_t kind, int64_t dim) {
  return kind == kCacheF32 ? 64 * dim : kind == kCacheBF16 ? 32 * dim : 16 * dim + 64;
}

// Rotates q and k (after an optional norm of each head), writes k and v into the cache, attends causally.
// Cache: [block][kv_head][block_size / 16] tiles of 16 tokens, a tile being [dim / pack][16][pack] for k and
// [16 / pack][dim][pack] for v, pack 4 for int8, 2 for bf16 and 1 for f32; behind those of int8 16 scales in f32.
struct AttentionOp {
  const float* qkv;  // [T][heads + 2 * kv_heads][dim]
  float* y;          // [T][heads][dim]
  void *k_cache, *v_cache;
  const float *cosines, *sines;    // [T][rotary / 2]
  const float *q_norm, *k_norm;    // [dim] or null
  int64_t qkv_stride, y_stride;
  int32_t heads, kv_heads, dim;
  int32_t rotary;       // elements of a head that rotate
  int32_t interleaved;  // pairs (2i, 2i + 1), else (i, i + rotary / 2)
  int32_t window;       // tokens seen, itself included; 0: all
  int32_t cache;        // a CacheKind
  float scale, eps;
  float softcap;  // scores s become softcap * tanh(s / softcap); 0: they stay
};

// y += rmsnorm(x) of [T][n].
struct NormAddOp {
  const float* x;
  const float* norm;
  float* y;
  int64_t x_stride, y_stride;
  int32_t n;
  float eps;
};

// Each token's `active` experts, those rated highest, and their weights: softmax over all ratings, or over the chosen.
// A token and one of its experts are a pair. Pairs sorted by expert are what ExpertsOp works on until the next RouteOp.
struct RouteOp {
  const float* ratings;  // [T][count]
  int64_t stride;
  int32_t count, active, renormalise;
  int32_t reserved;
};

// `linear` with the matrix of each pair's expert. x: rows of tokens if `gather`, else of pairs in their order; y: rows
// of pairs in their order. linear.w is that of any expert, for its sizes.
struct ExpertsOp {
  LinearOp linear;
  const Matrix* experts;  // [count]
  int32_t gather;
  int32_t reserved;
};

// y[t] (+)= weighted sum of the token's pairs, plus sigmoid(gate[t]) * shared[t] (gate null: times 1; shared null: none).
struct CombineOp {
  const float* pairs;
  const float *shared, *gate;
  float* y;
  int64_t pairs_stride, shared_stride, gate_stride, y_stride;
  int32_t n;
  int32_t add;
};

// Logits of the queries' tokens, and what is asked of them. Where a step wants the likeliest tokens and nothing else,
// those that the screen cannot rule out are all that is computed.
struct HeadOp {
  Matrix w;
  const float* x;
  const float* norm;
  int64_t x_stride;
  float eps;
  float softcap;  // of the logits; 0: none
  int32_t screen_rows;  // queries up to which the screen is asked; 0: there is none
  int32_t reserved;
  const uint8_t* screen;  // [panels of w] screens, see screen.hpp
};

// What follows is RWKV's. A sequence's state is a slot of f32, slots standing `state_stride` apart; the `state` of an
// operation is where its part of slot 0 begins. Slots are numbered by rows, and those of Batch::kept follow.

// y = (x - mean) / sqrt(variance + eps) * norm + bias of [T][n]; x and y may be the same.
struct LayerNormOp {
  const float *x, *norm, *bias;
  float* y;
  int64_t x_stride, y_stride;
  int32_t n;
  float eps;
};

// Part p of y[t] is x[t] + (x[t - 1] - x[t]) * (shares[p] + moved[t][p]). The state holds the x before a step's first.
struct ShiftOp {
  const float *x, *state;
  const float* shares;  // [parts][n]
  const float* moved;   // [T][parts][n], null for none
  float* y;             // [T][parts][n]
  int64_t x_stride, state_stride, moved_stride, y_stride;
  int32_t n, parts;
};

// Rows of f32, `stride` apart; 0: all are the same row.
struct Rows {
  const float* x;
  int64_t stride;
};

// The time mix behind its linears: Recurrence in martlet/model/spec.py says what is computed. A head's state is
// [keys][values]. y is the normed outcome times the gate.
struct RecurOp {
  Rows r, k, v;
  Rows decay;  // w = exp(-exp(decay)); of the delta rule: w = exp(-sigmoid(decay) / sqrt(e))
  Rows gate;   // null: 1
  Rows rate, value, first;  // of the delta rule; value and first null: v as it is
  const float *removal, *renewal;  // [heads * dim], of the delta rule
  const float *bonus, *norm, *bias;  // [heads * dim]
  float *y, *state;
  int64_t y_stride, state_stride;
  int32_t heads, dim;
  int32_t delta;  // the delta rule, of generation 7
  float eps;
};

// The state's x, from now on: that of each sequence's last token, and of those after which a state is kept.
struct RememberOp {
  const float* x;
  float* state;
  int64_t x_stride, state_stride;
  int32_t n;
  int32_t reserved;
};

// y += x * gate of [T][n].
struct GateAddOp {
  const float *x, *gate;
  float* y;
  int64_t x_stride, gate_stride, y_stride;
  int32_t n;
  int32_t reserved;
};

// From here on only tokens that have a query matter, in the order of the queries: row q of x and of mixed becomes what
// the row of its token was. Left out where that would save nothing, or where adapters go by token.
struct PickOp {
  float *x, *mixed;
  int64_t x_stride, mixed_stride;
  int32_t width, mixed_width;
};

struct Op {
  int64_t kind;
  const void* op;
};

// How a row chooses its tokens; see SamplingParams for the meaning of each field.
struct Sampling {
  uint64_t seed;
  const int32_t* bias_ids;
  const float* biases;
  const int32_t* allowed_ids;
  const int32_t* end_ids;  // not before min_tokens
  const uint32_t* mask;    // null, or bits of the tokens to choose among; set no later than by Batch::before_head
  int32_t n_bias, n_allowed, n_end;
  int32_t prompt_len, min_tokens, top_k;
  float temperature, top_p, min_p, presence, frequency, repetition;
};

// One row of logits. target < 0: sample the token after `token` for `row`, else tell of token `target`.
// top < 0: no log-probability is asked; else the `top` most likely tokens too.
struct Query {
  int32_t token;   // index in the flat batch, 0 ... T - 1
  int32_t row;
  int32_t target;
  int32_t top;
};

struct Answer {
  int32_t token;
  int32_t rank;
  float logprob;
  int32_t reserved;
};

struct Batch {
  int32_t n_seqs, n_queries;
  const int32_t *rows, *start, *count;  // [n_seqs]
  int32_t* tokens;                      // [rows][tokens_stride]; sampled tokens are written back
  int64_t tokens_stride;
  const int32_t* blocks;  // block tables [rows][blocks_stride]
  int64_t blocks_stride;
  int32_t block_size;  // a multiple of 16
  int32_t top_stride;
  const Query* queries;
  const Sampling* sampling;  // [rows]
  Answer* answers;           // [n_queries]
  int32_t* top_ids;          // [n_queries][top_stride]
  float* top_logprobs;
  void (*before_head)();  // null, or called on the calling thread when only the head and sampling are left
  const int32_t* adapters;  // [n_seqs], slot of each sequence's adapter, 0 for none; null: no sequence has any
  const int32_t* kept;      // [T], slot that the state after this token is kept in as well, -1: none; null: none is
};

}  // namespace martlet
