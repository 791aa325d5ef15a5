#include "step.hpp"

#include <algorithm>
#include <cmath>

#include "pack.hpp"

namespace martlet {
namespace {

// A block of rows goes through all linears up to the next attention on one thread: its activations stay in that
// thread's cache, and nobody waits in between. Every block reads the weights, so a thread needs enough rows.
constexpr int kRowBlock = 96, kRowsForBlocks = 64;
constexpr int kWarmBytes = 8192;

}  // namespace

void Executor::begin(const Op* ops, int n_ops, const Batch& batch) {
  finish();
  held_ = batch;
  ops_ = ops;
  n_ops_ = n_ops;
  head_ = int(std::find_if(ops, ops + n_ops, [](const Op& op) { return op.kind == kHead; }) - ops);
  next_ = 0;
  lay_out(ops, n_ops, held_);
  under_way_ = true;
  team_.begin([this](Worker& worker) { work(worker, 0, n_ops_); });
}

void Executor::help() {
  if (!under_way_ || next_ >= head_) return;
  work(team_.caller(), next_, head_);
  next_ = head_;
}

void Executor::finish() {
  if (!under_way_) return;
  work(team_.caller(), next_, n_ops_);
  team_.end();
  under_way_ = false;
}

// What a thread does of a step: operations first ... last - 1.
void Executor::work(Worker& worker, int first, int last) {
  const Op* ops = ops_;
  kernels_.enter();
  if (!first) own_[worker.rank].rows = (int)tokens_.size();
  for (int i = first; i < last; ++i) {
    int linears = 0;
    while (row_blocks(rows(worker)) && i + linears < last && ops[i + linears].kind == kLinear) ++linears;
    if (linears) {
      linears_by_rows(worker, ops + i, linears);
      i += linears - 1;
      continue;
    }
    switch (ops[i].kind) {
      case kEmbed: embed(worker, *(const EmbedOp*)ops[i].op); break;
      case kAngles: angles(worker, *(const AnglesOp*)ops[i].op); break;
      case kLinear: linear(worker, *(const LinearOp*)ops[i].op); break;
      case kAttention:
        if (i + 1 < last && ops[i + 1].kind == kLinear) warm(worker, ((const LinearOp*)ops[i + 1].op)->w);
        attention(worker, *(const AttentionOp*)ops[i].op);
        break;
      case kHead: head(worker, *(const HeadOp*)ops[i].op); break;
      case kNormAdd: norm_add(worker, *(const NormAddOp*)ops[i].op); break;
      case kRoute: route(worker, *(const RouteOp*)ops[i].op); break;
      case kExperts: experts(worker, *(const ExpertsOp*)ops[i].op); break;
      case kCombine: combine(worker, *(const CombineOp*)ops[i].op); break;
      case kLayerNorm: layer_norm(worker, *(const LayerNormOp*)ops[i].op); break;
      case kShift: shift(worker, *(const ShiftOp*)ops[i].op); break;
      case kRecur: recur(worker, *(const RecurOp*)ops[i].op); break;
      case kRemember: remember(worker, *(const RememberOp*)ops[i].op); break;
      case kGateAdd: gate_add(worker, *(const GateAddOp*)ops[i].op); break;
      case kPick: pick(worker, *(const PickOp*)ops[i].op); break;
    }
  }
  kernels_.leave();
}

// Everything that depends on the batch alone, and all memory the step will need.
void Executor::lay_out(const Op* ops, int n_ops, const Batch& batch) {
  tokens_.clear();
  first_.assign(1, 0);
  for (int s = 0; s < batch.n_seqs; ++s) {
    for (int i = 0; i < batch.count[s]; ++i) tokens_.push_back({s, batch.start[s] + i});
    first_.push_back((int32_t)tokens_.size());
  }
  decode_ = (int)tokens_.size() == batch.n_seqs;
  lay_out_adapters(ops, n_ops);
  picks_ = groups_.empty() && batch.n_queries < (int)tokens_.size();
  for (int q = 1; q < batch.n_queries; ++q) picks_ = picks_ && batch.queries[q - 1].token < batch.queries[q].token;
  const int64_t n = (int64_t)tokens_.size(), rows = std::max<int64_t>({n, batch.n_queries, kOwnRows});
  int64_t times = 1;  // rows a token has in the linears of experts
  const bool by_rows = row_blocks((int)n) != 0;
  plans_.clear();
  int64_t acts = 0, queries = 0, parts = 0, counters = 0;
  const auto reserve_linear = [&](const Matrix& w) {
    const int64_t row = act_room(Format(w.format), w.k);
    acts = std::max(acts, (times * rows + kSpareRows) * row);
    for (Own& own : own_) {
      own.acts.reserve(((by_rows ? kRowBlock + kernels_.row_unit : kOwnRows) + kSpareRows) * row);
      own.panel.reserve(widened_bytes(w.k));
      own.products.reserve((times * rows + kSpareRows) * kPanel * 4);
    }
  };
  bool picks = false;
  for (int i = 0; i < n_ops; ++i) {
    if (ops[i].kind == kLinear) {
      const LinearOp& op = *(const LinearOp*)ops[i].op;
      reserve_linear(op.w);
      for (Own& own : own_) own.taken.reserve(op.order ? 8 * int64_t(op.w.k) : 0);
    }
    if (ops[i].kind == kRoute) times = ((const RouteOp*)ops[i].op)->active;
    if (ops[i].kind == kExperts) reserve_linear(((const ExpertsOp*)ops[i].op)->linear.w);
    if (ops[i].kind == kCombine) times = 1;
    if (ops[i].kind == kAttention) {
      const AttentionOp& op = *(const AttentionOp*)ops[i].op;
      if (!plan_of(op)) plans_.push_back(plan(op));
      const Plan& plan = *plan_of(op);
      const int64_t group = op.heads / op.kv_heads, tile = std::max<int64_t>(kQueryRows, group);
      const int64_t query = kernels_.query_row_bytes(op.cache, op.dim);
      queries = std::max(queries, (n * op.heads + kSpareRows) * query);
      for (Own& own : own_) own.queries.reserve((group + kSpareRows) * query);
      parts = std::max(parts, plan.parts * softmax_floats(group, op.dim) * 4);
      counters = std::max<int64_t>(counters, plan.counters);
      const int64_t floats = attention_scratch(tile, op.dim) + 2 * softmax_floats(tile, op.dim);
      for (Own& own : own_) own.attention.reserve(4 * floats);
    }
    picks = picks || (ops[i].kind == kPick && picks_);
    if (ops[i].kind == kHead) {
      reserve_linear(((const HeadOp*)ops[i].op)->w);
      lay_out_head(*(const HeadOp*)ops[i].op, picks);
    }
  }
  acts_.reserve(acts);
  queries_.reserve(queries);
  parts_.reserve(parts);
  if (counters > done_size_) {
    done_.reset(new std::atomic<int>[counters]());
    done_size_ = counters;
  }
}

// Fetches the beginning of a thread's part of a matrix while it does something else: memory should never rest.
void Executor::warm(const Worker& worker, const Matrix& w) const {
  if (tokens_.size() > kOwnRows || worker.behind()) return;
  const int64_t bytes = panel_bytes(Format(w.format), w.k);
  const int grain = grain_of(panels_of(w), team_.size()), pieces = (panels_of(w) + grain - 1) / grain;
  const int64_t begin = int64_t(team_.first_of(worker.rank, pieces)) * grain * bytes;
  const int64_t end = std::min(begin + kWarmBytes, panels_of(w) * bytes);
  for (int64_t at = begin; at < end; at += 64) __builtin_prefetch(w.panels + at, 0, 2);
}

// One row, its elements taken in `order` if there is one. A sum of squares does not mind.
void Executor::prepare_row(Worker& worker, ActKind kind, const float* x, const float* norm, float eps, int k,
                           const int32_t* order, uint8_t* out) {
  if (order) {
    float* taken = (float*)own_[worker.rank].taken.reserve(0);
    for (int i = 0; i < k; ++i) taken[i] = x[order[i]];
    if (norm)
      for (int i = 0; i < k; ++i) taken[k + i] = norm[order[i]];
    x = taken;
    if (norm) norm = taken + k;
  }
  kernels_.prepare(kind, x, norm, eps, k, out);
}

// The loop that reads the rows must come next: a thread that finds it over leaves its own copy as it is.
Executor::Prepared Executor::prepare(Worker& worker, const Matrix& w, const float* x, int64_t stride, const float* norm,
                                 float eps, const int32_t* index, int rows, const int32_t* order,
                                 const LinearOp* adapted) {
  const ActKind kind = kernels_.act_kind(Format(w.format), rows);
  const int64_t bytes = act_bytes(kind, w.k);
  uint8_t* acts = rows <= kOwnRows ? own_[worker.rank].acts.reserve(0) : acts_.reserve(0);
  const auto work = [&](int begin, int end) {
    for (int r = begin; r < end; ++r) {
      prepare_row(worker, kind, x + (index ? index[r] : r) * stride, norm, eps, w.k, order, acts + r * bytes);
      if (adapted) gather_adapted(worker, *adapted, r, acts + r * bytes, bytes);
    }
  };
  if (rows > kOwnRows) worker.each(rows, grain_of(rows, team_.size()), work);
  else if (!worker.behind()) work(0, rows);
  return {acts, bytes};
}

void Executor::embed(Worker& worker, const EmbedOp& op) {
  const Format format = Format(op.table.format);
  worker.each((int)tokens_.size(), 1, [&](int begin, int end) {
    for (int t = begin; t < end; ++t) {
      const int token = batch_->tokens[batch_->rows[tokens_[t].seq] * batch_->tokens_stride + tokens_[t].position];
      const uint8_t* panel = op.table.panels + token / kPanel * panel_bytes(format, op.table.k);
      float* y = op.y + t * op.y_stride;
      unpack_row(format, panel, token % kPanel, op.table.k, y);
      if (op.scale != 1.0f)
        for (int i = 0; i < op.table.k; ++i) y[i] *= op.scale;
    }
  });
}

void Executor::angles(Worker& worker, const AnglesOp& op) {
  const int n = (int)tokens_.size();
  worker.each(n, grain_of(n, team_.size()), [&](int begin, int end) {
    for (int64_t t = begin; t < end; ++t)
      for (int i = 0; i < op.half; ++i) {
        const double angle = tokens_[t].position * op.frequencies[i];
        op.cosines[t * op.half + i] = (float)(std::cos(angle) * op.magnitude);
        op.sines[t * op.half + i] = (float)(std::sin(angle) * op.magnitude);
      }
  });
}

void Executor::linear(Worker& worker, const LinearOp& op) {
  const int n = rows(worker), panels = panels_of(op.w);
  if (!n) return;
  const Format format = Format(op.w.format);
  warm(worker, op.w);
  const int tasks = shrink_tasks(op), shrunk = own_[worker.rank].shrunk += tasks;
  const Prepared rows = prepare(worker, op.w, op.x, op.x_stride, op.norm, op.eps, nullptr, n, op.order,
                            tasks ? &op : nullptr);
  const int64_t bytes = panel_bytes(format, op.w.k);
  uint8_t* scratch = own_[worker.rank].panel.reserve(0);
  float* products = (float*)own_[worker.rank].products.reserve(0);
  const auto panel = [&](int p) {
    if (tasks) expand_ahead(op, p);
    kernels_.panel_product(format, op.w.panels + p * bytes, op.w.k, rows.acts, rows.stride, n, scratch, products);
    if (tasks) expand(op, p, shrunk, products);
    kernels_.finish(op, p, products, 0, n);
  };
  worker.each(tasks + panels, tasks ? 1 : grain_of(panels, team_.size()), [&](int begin, int end) {
    for (int i = begin; i < end; ++i) {
      const int item = tasks ? task_or_panel(i, tasks, panels) : i;
      if (item < tasks) shrink(worker, op, item, rows);
      else panel(item - tasks);
    }
  });
}

// Blocks of rows that linears are shared out by; 0: by panels. Adapters meet the rows of a whole linear.
int Executor::row_blocks(int rows) const {
  const int size = team_.size();
  return groups_.empty() && rows >= kRowsForBlocks * size ? (int)round_up((rows + kRowBlock - 1) / kRowBlock, size) : 0;
}

void Executor::linears_by_rows(Worker& worker, const Op* ops, int count) {
  const int n = rows(worker), blocks = row_blocks(n), unit = kernels_.row_unit;
  const auto row = [&](int64_t block) {  // whole tiles as far as possible
    return block == blocks ? n : int(block * n / blocks / unit * unit);
  };
  Own& own = own_[worker.rank];
  uint8_t *acts = own.acts.reserve(0), *scratch = own.panel.reserve(0);
  float* products = (float*)own.products.reserve(0);
  worker.each(blocks, 1, [&](int first, int last) {
    for (int block = first; block < last; ++block)
      for (int i = 0; i < count; ++i) {
        const LinearOp& op = *(const LinearOp*)ops[i].op;
        const int begin = row(block), rows = row(block + 1) - begin;
        const Format format = Format(op.w.format);
        const ActKind kind = kernels_.act_kind(format, rows);
        const int64_t stride = act_bytes(kind, op.w.k), bytes = panel_bytes(format, op.w.k);
        for (int r = 0; r < rows; ++r)
          prepare_row(worker, kind, op.x + (begin + r) * op.x_stride, op.norm, op.eps, op.w.k, op.order,
                      acts + r * stride);
        for (int p = 0; p < panels_of(op.w); ++p) {
          kernels_.panel_product(format, op.w.panels + p * bytes, op.w.k, acts, stride, rows, scratch, products);
          kernels_.finish(op, p, products, begin, rows);
        }
      }
  });
}

void Executor::pick(Worker& worker, const PickOp& op) {
  if (!picks_) return;
  worker.each(2, 1, [&](int begin, int end) {
    for (int i = begin; i < end; ++i) {
      float* to = i ? op.mixed : op.x;
      const int64_t stride = i ? op.mixed_stride : op.x_stride, width = i ? op.mixed_width : op.width;
      for (int q = 0; q < batch_->n_queries; ++q)  // tokens rise, so no row is overwritten before it was moved
        if (q != batch_->queries[q].token) std::copy_n(to + batch_->queries[q].token * stride, width, to + q * stride);
    }
  });
  own_[worker.rank].rows = batch_->n_queries;
}

}  // namespace martlet
