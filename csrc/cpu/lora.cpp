// LoRA adapters within a step: which tokens run with which, and what that adds to a linear. A step in which no sequence
// has one pays for none of it.
#include <algorithm>

#include "step.hpp"

namespace martlet {
namespace {

constexpr int kOwnRows = 4;    // as in step.cpp: so few rows every thread prepares for itself
constexpr int kTaskRows = 8;   // rows of A and
constexpr int kTaskTokens = 32;  // tokens of a task

int padded(int k) { return (k + 15) / 16 * 16; }
int pieces(int n, int size) { return (n + size - 1) / size; }

}  // namespace

void Executor::lay_out_adapters(const Op* ops, int n_ops) {
  adapted_.clear();
  groups_.clear();
  if (!batch_->adapters) return;
  for (int t = 0; t < (int)tokens_.size(); ++t)
    if (batch_->adapters[tokens_[t].seq]) adapted_.push_back(t);
  const auto slot = [&](int token) { return batch_->adapters[tokens_[token].seq]; };
  std::stable_sort(adapted_.begin(), adapted_.end(), [&](int a, int b) { return slot(a) < slot(b); });
  for (int i = 0; i < (int)adapted_.size(); ++i) {
    if (groups_.empty() || groups_.back().slot != slot(adapted_[i])) groups_.push_back({slot(adapted_[i]), i, 0});
    ++groups_.back().count;
  }
  int64_t inputs = 0;
  lora_rows_ = 0;
  for (int i = 0; i < n_ops; ++i) {
    if (ops[i].kind != kLinear) continue;
    const LinearOp& op = *(const LinearOp*)ops[i].op;
    if (!op.loras) continue;
    inputs = std::max<int64_t>(inputs, padded(op.w.k));
    for (const Group& group : groups_) lora_rows_ = std::max(lora_rows_, op.loras[group.slot].rows);
  }
  const int64_t n = (int64_t)adapted_.size();
  lora_inputs_.reserve(4 * n * inputs);
  lora_t_.reserve(4 * n * lora_rows_);
  for (Own& own : own_) own.lora.reserve(4 * std::min<int64_t>(n, kOwnRows) * inputs);
}

// The inputs of the tokens that run with an adapter, normed, times their A's; null where no A concerns this linear.
const float* Executor::shrink(Worker& worker, const LinearOp& op) {
  int tasks = 0;
  for (const Group& group : groups_)
    tasks += pieces(group.count, kTaskTokens) * pieces(op.loras[group.slot].rows, kTaskRows);
  if (!tasks) return nullptr;
  const int n = (int)adapted_.size(), k = padded(op.w.k);
  float* x = (float*)(n <= kOwnRows ? own_[worker.rank].lora : lora_inputs_).reserve(0);
  const auto prepare = [&](int begin, int end) {
    for (int i = begin; i < end; ++i) {
      float* row = x + (int64_t)i * k;
      kernels_.prepare(kActF32, op.x + adapted_[i] * op.x_stride, op.norm, op.eps, op.w.k, (uint8_t*)row);
      std::fill(row + op.w.k, row + k, 0.0f);
    }
  };
  if (n <= kOwnRows) prepare(0, n);
  else worker.each(n, std::max(1, n / (team_.size() * 8)), prepare);
  float* t = (float*)lora_t_.reserve(0);
  worker.each(tasks, 1, [&](int begin, int end) {
    for (int task = begin; task < end; ++task) {
      int left = task;
      for (const Group& group : groups_) {
        const Lora& lora = op.loras[group.slot];
        const int across = pieces(lora.rows, kTaskRows), here = pieces(group.count, kTaskTokens) * across;
        if (left >= here) {
          left -= here;
          continue;
        }
        const int row = left % across * kTaskRows, first = left / across * kTaskTokens;
        const int64_t at = group.first + first;
        kernels_.shrink(lora, row, std::min(kTaskRows, lora.rows - row), k, x + at * k,
                        std::min(kTaskTokens, group.count - first), t + at * lora_rows_, lora_rows_);
        break;
      }
    }
  });
  return t;
}

void Executor::expand(const LinearOp& op, int panel, const float* t, float* products) const {
  for (const Group& group : groups_) {
    const Lora& lora = op.loras[group.slot];
    if (lora.rows)
      kernels_.expand(lora, panel, t + (int64_t)group.first * lora_rows_, lora_rows_, adapted_.data() + group.first,
                      group.count, products);
  }
}

}  // namespace martlet
