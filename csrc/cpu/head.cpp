// The head and sampling: the end of a step. Few greedy rows read the head's screen first (screen.hpp), in one loop more:
// Executor::screen finds what each panel's logits can be at most, and a logit that is reached. The loop over the head's
// panels then passes over those that stay below.
#include <algorithm>
#include <climits>
#include <cmath>

#include "step.hpp"

namespace martlet {
namespace {

constexpr int kHeadRows = 64;  // rows of logits computed together

}  // namespace

bool Executor::needs_logits(const Query& query, int known) const {
  const Sampling& s = batch_->sampling[query.row];
  return query.target >= 0 || query.top >= 0 || s.temperature >= 1e-5f || s.n_bias || s.n_allowed ||
         (s.n_end && known - s.prompt_len < s.min_tokens) || s.presence != 0 || s.frequency != 0 || s.repetition != 1;
}

void Executor::lay_out_head(const HeadOp& op, bool picks) {
  const int n = batch_->n_queries, vocab = op.w.n, k = op.w.k;
  int slots = 0, most = 0;
  query_tokens_.resize(n);
  logit_slot_.resize(n);
  for (int q = 0; q < n; ++q) {
    if (q % kHeadRows == 0) slots = 0;
    const int token = batch_->queries[q].token;
    query_tokens_[q] = picks ? q : token;
    logit_slot_[q] = needs_logits(batch_->queries[q], tokens_[token].position + 1) ? slots++ : -1;
    most = std::max(most, slots);
  }
  logits_.reserve(int64_t(most) * vocab * 4);
  screens_ = !most && n <= std::min(kOwnRows, op.screen_rows);
  if (screens_) bounds_.reserve(int64_t(n) * panels_of(op.w) * 4);
  for (Own& own : own_) {
    own.sampler.reserve(sampler_bytes(vocab));
    own.seen.reserve(4 * vocab);
    if (screens_) own.screen.reserve(n * act_bytes(kActSplit32, k) + 4 * round_up(k, 32));
    for (Scratch Own::* bests : {&Own::best, &Own::scores}) {
      Best* best = (Best*)(own.*bests).reserve(sizeof(Best) * std::max(1, n));
      std::fill(best, best + n, Best{-INFINITY, INT_MAX});
    }
  }
}

// Columns of a panel that query q chooses among.
uint32_t Executor::columns_of(const HeadOp& op, int q, int panel) const {
  const int columns = op.w.n - panel * kPanel;
  const uint32_t real = columns < kPanel ? (1u << columns) - 1 : ~0u;
  const Query& query = batch_->queries[q];
  const uint32_t* mask = query.target < 0 ? batch_->sampling[query.row].mask : nullptr;
  return mask ? mask[panel] & real : real;
}

// Takes a panel's logits into the running argmax of query q.
void Executor::take_best(const HeadOp& op, int q, int panel, const float* row, Best& best) const {
  const Query& query = batch_->queries[q];
  const bool masked = query.target < 0 && batch_->sampling[query.row].mask;
  const int first = panel * kPanel;
  if (masked) kernels_.take_best_of(row, first, columns_of(op, q, panel), &best.value, &best.token);
  else kernels_.take_best(row, first, std::min(kPanel, op.w.n - first), &best.value, &best.token);
}

// What all threads found.
Executor::Best Executor::best_of(int q, Scratch Own::* bests) const {
  Best all{-INFINITY, INT_MAX};
  for (const Own& own : own_) {
    const Best& theirs = ((const Best*)(own.*bests).get())[q];
    if (theirs.value > all.value || (theirs.value == all.value && theirs.token < all.token)) all = theirs;
  }
  return all;
}

// Finds what each logit can be at most, and for each query a logit that is: of the token with the highest score, from
// the head itself. rows: prepared for the head, and prepared again where a thread came too late for the first time.
void Executor::screen(Worker& worker, const HeadOp& op, Prepared& rows) {
  const int n = batch_->n_queries, k = op.w.k, panels = panels_of(op.w);
  const Format format = Format(op.w.format);
  const ActKind kind = kernels_.act_kind(format, n);
  const int64_t bytes = panel_bytes(kScreen, k), stride = act_bytes(kActSplit32, k);
  Own& own = own_[worker.rank];
  uint8_t *acts = own.screen.get(), *scratch = own.panel.get();
  float *products = (float*)own.products.get(), *bounds = (float*)bounds_.get(), norms[kOwnRows];
  const bool late = worker.behind();
  for (int q = 0; q < n && !late; ++q) {
    float* mixed = (float*)(acts + n * stride);
    norms[q] = kernels_.screen_row(kind, rows.acts + q * rows.stride, k, mixed);
    kernels_.prepare(kActSplit32, mixed, nullptr, 0.0f, (int)padded_inputs(kScreen, k), acts + q * stride);
  }
  worker.each(panels, grain_of(panels, team_.size()), [&](int begin, int end) {
    for (int p = begin; p < end; ++p) {
      const uint8_t* panel = op.screen + p * bytes;
      kernels_.panel_product(kScreen, panel, k, acts, stride, n, scratch, products);
      for (int q = 0; q < n; ++q) {
        const float *row = products + q * kPanel, *slack = (const float*)(panel + bytes) - kPanel;
        bounds[int64_t(q) * panels + p] = kernels_.highest_bound(row, slack, norms[q], columns_of(op, q, p));
        take_best(op, q, p, row, ((Best*)own.scores.get())[q]);
      }
    }
  });
  if (late) rows = prepare(worker, op.w, op.x, op.x_stride, op.norm, op.eps, query_tokens_.data(), n, nullptr);
  for (int q = 0; q < n && !worker.behind(); ++q) {
    own.least[q] = -INFINITY;
    const int panel = best_of(q, &Own::scores).token / kPanel;
    if (panel >= panels) continue;
    kernels_.panel_product(format, op.w.panels + panel * panel_bytes(format, k), k, rows.acts, rows.stride, n, scratch,
                           products);
    Best best{-INFINITY, INT_MAX};
    take_best(op, q, panel, products + q * kPanel, best);
    own.least[q] = best.value;
  }
}

// Whether a panel can hold no query's token. A bound that is no number rules out nothing.
bool Executor::ruled_out(const Worker& worker, int panels, int panel) const {
  const float* bounds = (const float*)bounds_.get();
  for (int q = 0; q < batch_->n_queries; ++q)
    if (!(bounds[int64_t(q) * panels + panel] < own_[worker.rank].least[q])) return false;
  return true;
}

void Executor::head(Worker& worker, const HeadOp& op) {
  const int panels = panels_of(op.w), vocab = op.w.n;
  const Format format = Format(op.w.format);
  const int64_t bytes = panel_bytes(format, op.w.k);
  float* logits = (float*)logits_.get();
  Own& own = own_[worker.rank];
  uint8_t* scratch = own.panel.get();
  float* products = (float*)own.products.get();
  Best* best = (Best*)own.best.get();
  if (batch_->before_head) {
    if (worker.rank == 0) batch_->before_head();
    worker.barrier();
  }
  for (int first = 0; first < batch_->n_queries; first += kHeadRows) {
    const int n = std::min(kHeadRows, batch_->n_queries - first);
    Prepared rows = prepare(worker, op.w, op.x, op.x_stride, op.norm, op.eps, query_tokens_.data() + first, n, nullptr);
    if (screens_) screen(worker, op, rows);
    worker.each(panels, grain_of(panels, team_.size()), [&](int begin, int end) {
      for (int p = begin; p < end; ++p) {
        if (screens_ && ruled_out(worker, panels, p)) continue;
        kernels_.panel_product(format, op.w.panels + p * bytes, op.w.k, rows.acts, rows.stride, n, scratch, products);
        for (int r = 0; r < n; ++r) {
          const float* row = products + r * kPanel;
          const int slot = logit_slot_[first + r];
          if (slot < 0) {
            take_best(op, first + r, p, row, best[first + r]);
          } else {
            const int columns = std::min(kPanel, vocab - p * kPanel);
            float* to = logits + (int64_t)slot * vocab + p * kPanel;
            std::copy(row, row + columns, to);
            if (op.softcap != 0.0f) kernels_.soft_cap(to, columns, op.softcap);
          }
        }
      }
    });
    worker.each(n, 1, [&](int begin, int end) {
      for (int q = first + begin; q < first + end; ++q) {
        if (logit_slot_[q] >= 0) {
          answer(worker, q, vocab);
          continue;
        }
        const int token = best_of(q, &Own::best).token;
        batch_->answers[q] = {token == INT_MAX ? 0 : token, 0, 0.0f, 0};
      }
    });
  }
  if (worker.rank == 0)
    for (int q = 0; q < batch_->n_queries; ++q) {
      const Query& query = batch_->queries[q];
      int32_t* tokens = batch_->tokens + query.row * batch_->tokens_stride;
      if (query.target < 0) tokens[tokens_[query.token].position + 1] = batch_->answers[q].token;
    }
}

void Executor::answer(Worker& worker, int q, int vocab) {
  const Query& query = batch_->queries[q];
  Own& own = own_[worker.rank];
  const float* logits = (const float*)logits_.get() + (int64_t)logit_slot_[q] * vocab;
  Answer& answer = batch_->answers[q];
  answer = {query.target, 0, 0.0f, 0};
  if (query.target < 0)
    answer.token = kernels_.sample(batch_->sampling[query.row], batch_->tokens + query.row * batch_->tokens_stride,
                                   tokens_[query.token].position + 1, logits, vocab, own.sampler.get(),
                                   (int32_t*)own.seen.get());
  if (query.top >= 0)
    kernels_.describe(logits, vocab, answer.token, query.top, own.sampler.get(), &answer,
                      batch_->top_ids + (int64_t)q * batch_->top_stride,
                      batch_->top_logprobs + (int64_t)q * batch_->top_stride);
}

void Executor::make_screen(const Matrix& head, uint8_t* out) {
  const Format format = Format(head.format);
  team().run([&](Worker& worker) {
    worker.each(panels_of(head), 16, [&](int begin, int end) {
      for (int64_t p = begin; p < end; ++p)
        kernels_.make_screen(format, head.panels + p * panel_bytes(format, head.k), head.k,
                             out + p * panel_bytes(kScreen, head.k));
    });
  });
}

}  // namespace martlet
