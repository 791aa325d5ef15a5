// RWKV between its linears: see LayerNormOp, ShiftOp, RecurOp, RememberOp and GateAddOp.
//
// A head of a sequence is a task: its tokens follow each other, and nothing else waits for them.
#include <algorithm>

#include "step.hpp"

namespace martlet {
void Executor::layer_norm(Worker& worker, const LayerNormOp& op) {
  const int n = (int)tokens_.size();
  worker.each(n, grain_of(n, team_.size()), [&](int begin, int end) {
    for (int t = begin; t < end; ++t) kernels_.layer_norm(op, t);
  });
}

void Executor::shift(Worker& worker, const ShiftOp& op) {
  const int n = (int)tokens_.size();
  worker.each(n, grain_of(n, team_.size()), [&](int begin, int end) {
    for (int64_t t = begin; t < end; ++t) {
      const int seq = tokens_[t].seq;
      const bool first = t == first_[seq];
      kernels_.shift(op, t, first ? op.state + batch_->rows[seq] * op.state_stride : op.x + (t - 1) * op.x_stride);
    }
  });
}

void Executor::recur(Worker& worker, const RecurOp& op) {
  const int64_t size = (int64_t)op.dim * op.dim;
  worker.each(batch_->n_seqs * op.heads, 1, [&](int begin, int end) {
    for (int task = begin; task < end; ++task) {
      const int seq = task / op.heads, head = task % op.heads, first = first_[seq];
      float* state = op.state + batch_->rows[seq] * op.state_stride + head * size;
      kernels_.recur(op, head, first, first_[seq + 1] - first, state, batch_->kept ? batch_->kept + first : nullptr);
    }
  });
}

void Executor::remember(Worker& worker, const RememberOp& op) {
  const int n = (int)tokens_.size();
  worker.each(n, grain_of(n, team_.size()), [&](int begin, int end) {
    for (int64_t t = begin; t < end; ++t) {
      const float* x = op.x + t * op.x_stride;
      const int seq = tokens_[t].seq;
      if (t + 1 == first_[seq + 1]) std::copy(x, x + op.n, op.state + batch_->rows[seq] * op.state_stride);
      if (batch_->kept && batch_->kept[t] >= 0) std::copy(x, x + op.n, op.state + batch_->kept[t] * op.state_stride);
    }
  });
}

void Executor::gate_add(Worker& worker, const GateAddOp& op) {
  const int n = (int)tokens_.size();
  worker.each(n, grain_of(n, team_.size()), [&](int begin, int end) {
    for (int64_t t = begin; t < end; ++t) {
      const float *x = op.x + t * op.x_stride, *gate = op.gate + t * op.gate_stride;
      float* y = op.y + t * op.y_stride;
      for (int i = 0; i < op.n; ++i) y[i] += x[i] * gate[i];
    }
  });
}

}  // namespace martlet
