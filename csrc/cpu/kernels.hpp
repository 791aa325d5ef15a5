// The kernels of one instruction set as a table. kernels.cpp is compiled once for each set and defines one table.
#pragma once

#include "attention_plan.hpp"
#include "program.hpp"

namespace martlet {

constexpr int kSpareRows = 15;  // kernels may work on whole multiples of 16 rows

struct Kernels {
  int row_unit;   // rows are best shared out in multiples of this
  ActKind (*act_kind)(Format, int rows);  // what so many rows are prepared as: at most act_room bytes each
  void (*enter)();  // called by a thread before it calls any of what follows, and
  void (*leave)();  // after the last one
  void (*prepare)(ActKind, const float* x, const float* norm, float eps, int k, uint8_t* out);
  // acts, out: with room for kSpareRows more than `rows`, which are read and written.
  void (*panel_product)(Format, const uint8_t* panel, int k, const uint8_t* acts, int64_t stride, int rows,
                        uint8_t* scratch, float* out);
  void (*finish)(const LinearOp&, int panel, const float* products, int row0, int rows);
  void (*expand)(Format base, const Lora&, int panel, const uint8_t* t, int64_t stride, const int32_t* tokens,
                 int count, float* products);
  int64_t (*query_row_bytes)(int32_t cache, int64_t dim);
  void (*rotate_queries)(const AttentionOp&, int64_t t, int kv_head, void* q);
  void (*store_key_value)(const AttentionOp&, int64_t t, int kv_head, int slot, bool last, void* k_tile, void* v_tile);
  void (*attend_chunk)(const AttentionOp&, const AttentionTask&, int chunk, float* scratch, Softmax part);
  void (*merge_chunk)(int rows, int dim, Softmax state, Softmax part);
  void (*finish_attention)(const AttentionOp&, const AttentionTask&, Softmax state);
  void (*norm_add)(const float* x, const float* norm, float eps, int n, float* y);
  void (*soft_cap)(float* x, int n, float cap);
  void (*layer_norm)(const LayerNormOp&, int64_t t);
  void (*shift)(const ShiftOp&, int64_t t, const float* before);
  // Tokens `first` ... `first + count - 1`, of one sequence, through one head. state: the head's. kept: null, or for
  // each of these tokens the slot that the state after it goes to as well.
  void (*recur)(const RecurOp&, int head, int64_t first, int count, float* state, const int32_t* kept);
  int (*screen_rows)(Format);  // rows of a step up to which a screen of a head in this format pays; 0: none is made
  void (*make_screen)(Format, const uint8_t* panel, int k, uint8_t* out);
  // What a screen meets of a prepared row, and that row's norm.
  float (*screen_row)(ActKind, const uint8_t* acts, int k, float* mixed);
  // The most that a panel's logits in `keep` can be, where the row's norm is `norm`.
  float (*highest_bound)(const float* scores, const float* slack, float norm, uint32_t keep);
  void (*take_best)(const float* row, int first, int columns, float* best, int32_t* token);
  void (*take_best_of)(const float* row, int first, uint32_t mask, float* best, int32_t* token);
  // scratch: sampler_bytes(n). seen: n zeros, left as zeros.
  int (*sample)(const Sampling&, const int32_t* tokens, int known, const float* logits, int n, void* scratch,
                int32_t* seen);
  void (*describe)(const float* logits, int n, int token, int k, void* scratch, Answer*, int32_t* top_ids,
                   float* top_logprobs);
};

constexpr int64_t sampler_bytes(int64_t n) { return n * (4 + 12); }  // a float and a candidate each

// Ordered from plain to wide. Compilers that do not know AMX leave it out (MARTLET_HAS_AMX).
enum Isa : int32_t { kGeneric, kAvx2, kAvx512Vnni, kAvx512BF16, kAmx, kIsas };

extern const Kernels kernels_generic;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512_vnni, kernels_avx512_bf16;
#endif
#if defined(MARTLET_HAS_AMX)
extern const Kernels kernels_amx;
#endif

Isa widest_isa();  // that this processor and its operating system run
Isa fastest_isa();  // the one to use: the widest, unless a plainer one is known to be faster here
const Kernels* kernels_for(Isa);

}  // namespace martlet
