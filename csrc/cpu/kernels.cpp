// Compiled once for each instruction set, with MARTLET_ISA naming it (see martlet/kernels/cpu/build.py).
#include "kernels.hpp"

#include "attention.hpp"
#include "gemm_tiles.hpp"
#include "lora.hpp"
#include "recurrence.hpp"
#include "rows.hpp"
#include "sampler.hpp"
#include "screen.hpp"

#define NAME_(isa) kernels_##isa
#define NAME(isa) NAME_(isa)

namespace martlet {
namespace MARTLET_ISA {

int sample_with(const Sampling& s, const int32_t* tokens, int known, const float* logits, int n, void* scratch,
                int32_t* seen) {
  float* x = (float*)scratch;
  return sample(s, tokens, known, logits, n, x, (Candidate*)(x + n), seen);
}

void describe_with(const float* logits, int n, int token, int k, void* scratch, Answer* answer, int32_t* top_ids,
                   float* top_logprobs) {
  describe(logits, n, token, k, (Candidate*)scratch, answer, top_ids, top_logprobs);
}

}  // namespace MARTLET_ISA

extern const Kernels NAME(MARTLET_SET);
const Kernels NAME(MARTLET_SET) = {
    MARTLET_ISA::kRowUnit,         MARTLET_ISA::act_kind,
    MARTLET_ISA::take_tiles,       MARTLET_ISA::leave_tiles,
    MARTLET_ISA::prepare,          MARTLET_ISA::product,
    MARTLET_ISA::finish,           MARTLET_ISA::expand,           MARTLET_ISA::query_row_bytes,
    MARTLET_ISA::rotate_queries,   MARTLET_ISA::store_key_value,
    MARTLET_ISA::attend_chunk,     MARTLET_ISA::merge_chunk,      MARTLET_ISA::finish_attention,
    MARTLET_ISA::norm_add,         MARTLET_ISA::soft_cap,
    MARTLET_ISA::layer_norm,       MARTLET_ISA::shift,            MARTLET_ISA::recur,
    MARTLET_ISA::screen_rows,      MARTLET_ISA::make_screen,      MARTLET_ISA::screen_row,
    MARTLET_ISA::highest_bound,
    MARTLET_ISA::take_best,        MARTLET_ISA::take_best_of,     MARTLET_ISA::sample_with,
    MARTLET_ISA::describe_with,
};

}  // namespace martlet
