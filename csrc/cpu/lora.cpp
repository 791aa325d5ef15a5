// LoRA adapters within a step: which tokens run with which, and what that adds to a linear. A step in which no sequence
// has one pays for none of it.
//
// Both halves ride on what the linear does anyway. Products with A take the activations prepared for its weights and are
// the first pieces of the loop over its panels; a panel's own product needs nothing of them, so whoever comes to add B
// behind it seldom waits.
#include <algorithm>
#include <cstring>
#include <thread>

#include "step.hpp"

namespace martlet {
namespace {

constexpr int kTaskTokens = 64;  // most tokens of a task; where there are several, each has half of that at least
constexpr int kPolls = 2000;    // before a thread that waits gives its core away

int pieces(int n, int size) { return (n + size - 1) / size; }
int panels_of(const Lora& lora) { return pieces(lora.rows, kPanel); }

}  // namespace

void Executor::lay_out_adapters(const Op* ops, int n_ops) {
  adapted_.clear();
  groups_.clear();
  shrunk_.store(0, std::memory_order_relaxed);
  for (Own& own : own_) own.shrunk = 0;
  if (!batch_->adapters) return;
  for (int t = 0; t < (int)tokens_.size(); ++t)
    if (batch_->adapters[tokens_[t].seq]) adapted_.push_back(t);
  const auto slot = [&](int token) { return batch_->adapters[tokens_[token].seq]; };
  std::stable_sort(adapted_.begin(), adapted_.end(), [&](int a, int b) { return slot(a) < slot(b); });
  group_of_.assign(tokens_.size(), -1);
  place_.resize(tokens_.size());
  for (int i = 0; i < (int)adapted_.size(); ++i) {
    if (groups_.empty() || groups_.back().slot != slot(adapted_[i])) groups_.push_back({slot(adapted_[i]), i, 0});
    ++groups_.back().count;
    group_of_[adapted_[i]] = int(groups_.size()) - 1;
    place_[adapted_[i]] = i;
  }
  int64_t inputs = 0;
  lora_stride_ = 0;
  for (int i = 0; i < n_ops; ++i) {
    if (ops[i].kind != kLinear) continue;
    const LinearOp& op = *(const LinearOp*)ops[i].op;
    if (!op.loras) continue;
    inputs = std::max(inputs, lora_input_bytes(op.w));
    for (const Group& group : groups_)
      lora_stride_ = std::max(lora_stride_, op.loras[group.slot].rows * lora_row_bytes(Format(op.w.format)));
  }
  const int64_t n = (int64_t)adapted_.size();
  lora_inputs_.reserve((n + kSpareRows) * inputs);
  lora_t_.reserve(n * lora_stride_);
  for (Own& own : own_) own.lora.reserve((std::min<int64_t>(n, kOwnRows) + kSpareRows) * inputs);
}

int64_t Executor::lora_input_bytes(const Matrix& w) const { return act_room(Format(w.format), w.k); }

ActKind Executor::lora_act_kind(const Matrix& w, const Group& group) const {
  return kernels_.act_kind(lora_format(Format(w.format)), std::min(group.count, kTaskTokens / 2));
}

// Whether all rows are prepared as a group's A wants them, and
bool Executor::suits(const Matrix& w, const Group& group) const {
  return lora_act_kind(w, group) == kernels_.act_kind(Format(w.format), (int)tokens_.size());
}
// whether the group's stand in one piece there.
bool Executor::stands_together(const Matrix& w, const Group& group) const {
  return adapted_[group.first + group.count - 1] - adapted_[group.first] == group.count - 1 && suits(w, group);
}

// Token t, prepared in `acts` for the linear, once more beside the other tokens of its adapter.
void Executor::gather_adapted(Worker& worker, const LinearOp& op, int t, const uint8_t* acts, int64_t bytes) {
  if (group_of_[t] < 0) return;
  const Group& group = groups_[group_of_[t]];
  if (!op.loras[group.slot].rows || stands_together(op.w, group)) return;
  uint8_t* to = lora_inputs(worker) + place_[t] * lora_input_bytes(op.w);
  if (suits(op.w, group)) std::memcpy(to, acts, (size_t)bytes);
  else prepare_row(worker, lora_act_kind(op.w, group), op.x + t * op.x_stride, op.norm, op.eps, op.w.k, op.order, to);
}

uint8_t* Executor::lora_inputs(Worker& worker) {
  return ((int)tokens_.size() <= kOwnRows ? own_[worker.rank].lora : lora_inputs_).reserve(0);
}

int Executor::shrink_tasks(const LinearOp& op) const {
  int tasks = 0;
  if (op.loras)
    for (const Group& group : groups_) tasks += pieces(group.count, kTaskTokens) * panels_of(op.loras[group.slot]);
  return tasks;
}

// What item i of a linear's loop is: a task below `tasks`, or a panel behind them. Every thread's range begins with its
// share of the tasks, since all panels wait for them. The loop has pieces of one item.
int Executor::task_or_panel(int i, int tasks, int panels) const {
  if (panels < team_.size()) return i;  // a range might be shorter than its share
  const int owner = int(int64_t(i) * team_.size() / (tasks + panels));  // whose range it is in
  const int before = team_.first_of(owner, tasks), share = team_.first_of(owner + 1, tasks) - before;
  const int at = i - team_.first_of(owner, tasks + panels);
  return at < share ? before + at : tasks + i - before - share;
}

// Some tokens of one adapter times a panel of its A.
void Executor::shrink(Worker& worker, const LinearOp& op, int task, const Prepared& rows) {
  const Format base = Format(op.w.format), format = lora_format(base);
  const Group* group = groups_.data();
  for (int here; task >= (here = pieces(group->count, kTaskTokens) * panels_of(op.loras[group->slot])); ++group)
    task -= here;
  const Lora& lora = op.loras[group->slot];
  const int parts = pieces(group->count, kTaskTokens), panel = task / parts, part = task % parts;
  const int first = part * group->count / parts, count = (part + 1) * group->count / parts - first;
  const bool together = stands_together(op.w, *group);
  const int64_t stride = together ? rows.stride : lora_input_bytes(op.w);
  const uint8_t* x = together ? rows.acts + (adapted_[group->first] + first) * stride
                              : lora_inputs(worker) + (group->first + first) * stride;
  Own& own = own_[worker.rank];
  float* products = (float*)own.products.reserve(0);
  kernels_.panel_product(format, lora.a + panel * panel_bytes(format, op.w.k), op.w.k, x, stride,
                         count, own.panel.reserve(0), products);
  const int64_t row_bytes = lora_row_bytes(base);
  const int unit = row_bytes == 4 ? kPanel : lora.rank <= kLoraUnit / 2 ? kLoraUnit / 2 : kLoraUnit;
  uint8_t* t = lora_t_.reserve(0) + (group->first + first) * lora_stride_;
  for (int i = 0; i < count; ++i, t += lora_stride_)
    for (int row = 0; row < std::min(kPanel, lora.rows - panel * kPanel); row += unit) {
      const float* from = products + i * kPanel + row;
      uint8_t* to = t + (panel * kPanel + row) * row_bytes;
      if (row_bytes == 4) std::memcpy(to, from, 4 * (size_t)std::min(kPanel, lora.rows - panel * kPanel));
      else kernels_.prepare(kActByte64, from, nullptr, 0.0f, unit, to);
    }
  shrunk_.fetch_add(1, std::memory_order_release);
}

// What the panel's products with B will read: memory brings it while the panel's own weights are multiplied.
void Executor::expand_ahead(const LinearOp& op, int panel) const {
  const int floats = op.w.format == kF32 ? 4 : op.w.format == kBF16 ? 2 : 0;
  for (const Group& group : groups_) {
    const Lora& lora = op.loras[group.slot];
    const int64_t bytes = int64_t(kPanel) * lora.rank * (floats ? floats : 1) + (floats ? 0 : 4 * kPanel);
    for (int64_t at = 0; lora.rows && at < bytes; at += 64) __builtin_prefetch(lora.b + panel * bytes + at);
  }
}

// Adds to a panel's products once the first `tasks` tasks of the step are done.
void Executor::expand(const LinearOp& op, int panel, int tasks, float* products) {
  for (int polls = 0; shrunk_.load(std::memory_order_acquire) < tasks; ++polls)
    if (polls >= kPolls) std::this_thread::yield();
  const uint8_t* t = lora_t_.reserve(0);
  for (const Group& group : groups_) {
    const Lora& lora = op.loras[group.slot];
    if (lora.rows)
      kernels_.expand(Format(op.w.format), lora, panel, t + group.first * lora_stride_, lora_stride_,
                      adapted_.data() + group.first, group.count, products);
  }
}

}  // namespace martlet
