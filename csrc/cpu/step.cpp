#include "step.hpp"

#include <algorithm>
#include <cmath>
#include <climits>

#include "pack.hpp"

namespace martlet {
namespace {

constexpr int kHeadRows = 64;  // rows of logits computed together
// A block of rows goes through all linears up to the next attention on one thread: its activations stay in that
// thread's cache, and nobody waits in between. Every block reads the weights, so a thread needs enough rows.
constexpr int kRowBlock = 96, kRowsForBlocks = 64;
constexpr int kWarmBytes = 8192;
constexpr int kShares = 6;  // pieces of attention that each thread should find at least

}  // namespace

void Executor::run(const Op* ops, int n_ops, const Batch& batch) {
  lay_out(ops, n_ops, batch);
  team_.run([&](Worker& worker) {
    kernels_.enter();
    own_[worker.rank].rows = (int)tokens_.size();
    for (int i = 0; i < n_ops; ++i) {
      int linears = 0;
      while (row_blocks(rows(worker)) && i + linears < n_ops && ops[i + linears].kind == kLinear) ++linears;
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
          if (i + 1 < n_ops && ops[i + 1].kind == kLinear) warm(worker, ((const LinearOp*)ops[i + 1].op)->w);
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
  });
}

// Everything that depends on the batch alone, and all memory the step will need.
void Executor::lay_out(const Op* ops, int n_ops, const Batch& batch) {
  batch_ = &batch;
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
  int64_t acts = 0, queries = 0, parts = 0, counters = 0, logits = 0;
  const auto reserve_linear = [&](const Matrix& w) {
    const int64_t row = act_bytes(as_words(kLayouts[w.format].act), w.k);
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
      const Matrix& w = ((const HeadOp*)ops[i].op)->w;
      reserve_linear(w);
      int slots = 0;
      query_tokens_.resize(batch.n_queries);
      logit_slot_.resize(batch.n_queries);
      for (int q = 0; q < batch.n_queries; ++q) {
        if (q % kHeadRows == 0) slots = 0;
        const int token = batch.queries[q].token;
        query_tokens_[q] = picks ? q : token;
        logit_slot_[q] = needs_logits(batch.queries[q], tokens_[token].position + 1) ? slots++ : -1;
        logits = std::max<int64_t>(logits, slots);
      }
      logits_.reserve(logits * w.n * 4);
      for (Own& own : own_) {
        Best* best = (Best*)own.best.reserve(sizeof(Best) * std::max(1, batch.n_queries));
        std::fill(best, best + batch.n_queries, Best{-INFINITY, INT_MAX});
        own.sampler.reserve(sampler_bytes(w.n));
        own.seen.reserve(4 * w.n);
      }
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
  if (tokens_.size() > kOwnRows) return;
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

// ---- Attention ----

const Executor::Plan* Executor::plan_of(const AttentionOp& op) const {
  for (const Plan& plan : plans_)
    if (plan.group == op.heads / op.kv_heads && plan.kv_heads == op.kv_heads && plan.window == op.window) return &plan;
  return nullptr;
}

Executor::Plan Executor::plan(const AttentionOp& op) const {
  const int group = op.heads / op.kv_heads, most = std::max(1, kQueryRows / group);
  Plan plan{group, op.kv_heads, op.window, {}, {}, 0, 0};
  const auto chunks_of = [&](int position, int tokens) {
    const int first = op.window ? std::max(0, position + 1 - op.window) / kChunk : 0;
    return (position + tokens - 1) / kChunk + 1 - first;
  };
  int64_t all = 0;
  for (int s = 0; s < batch_->n_seqs; ++s) all += op.kv_heads * chunks_of(batch_->start[s], batch_->count[s]);
  for (int s = 0, token = 0; s < batch_->n_seqs; token += batch_->count[s++])
    for (int i = 0; i < batch_->count[s]; i += most) {
      Tile tile{};
      tile.seq = s;
      tile.token = token + i;
      tile.tokens = std::min(most, batch_->count[s] - i);
      tile.position = batch_->start[s] + i;
      tile.first_chunk = op.window ? std::max(0, tile.position + 1 - op.window) / kChunk : 0;
      tile.chunks = chunks_of(tile.position, tile.tokens);
      // Only where a whole context would be too large a piece of the work: parts have to be merged through memory.
      tile.split = batch_->count[s] == 1 && tile.chunks > 1 && tile.chunks * kShares * team_.size() > all;
      if (tile.split) {
        tile.part = plan.parts;
        tile.counter = plan.counters;
        plan.parts += (int64_t)tile.chunks * op.kv_heads;
        plan.counters += op.kv_heads;
      }
      plan.tiles.push_back(tile);
    }
  for (int t = (int)plan.tiles.size() - 1; t >= 0; --t)  // the late, long ones first
    for (int h = 0; h < op.kv_heads; ++h) {
      const int pieces = plan.tiles[t].split ? plan.tiles[t].chunks : 1;
      for (int c = 0; c < pieces; ++c) plan.tasks.push_back({t, h, c});
    }
  return plan;
}

int64_t Executor::query_bytes(const AttentionOp& op) const {
  return op.heads / op.kv_heads * kernels_.query_row_bytes(op.cache, op.dim);
}

void Executor::store_key_value(const AttentionOp& op, int token, int kv_head) const {
  const Token at = tokens_[token];
  const int size = batch_->block_size, block = table(at.seq)[at.position / size];
  const int64_t tile = (int64_t(block) * op.kv_heads + kv_head) * (size / 16) + at.position % size / 16;
  const int64_t offset = tile * cache_tile_bytes(op.cache, op.dim);
  const bool last = at.position + 1 == batch_->start[at.seq] + batch_->count[at.seq];
  kernels_.store_key_value(op, token, kv_head, at.position % 16, last, (uint8_t*)op.k_cache + offset,
                           (uint8_t*)op.v_cache + offset);
}

// Queries wait in queries_, [kv_head][token][group][dim]. Where every sequence computes one token, each task rotates
// the queries it needs and the last chunk's task stores the key and value: then nobody has to wait in between.
void Executor::attention(Worker& worker, const AttentionOp& op) {
  const int n = (int)tokens_.size(), pairs = n * op.kv_heads;
  if (!decode_)
    worker.each(pairs, grain_of(pairs, team_.size()), [&](int begin, int end) {
      for (int i = begin; i < end; ++i) {
        const int t = i / op.kv_heads, h = i % op.kv_heads;
        kernels_.rotate_queries(op, t, h, queries_.reserve(0) + (int64_t(h) * n + t) * query_bytes(op));
        store_key_value(op, t, h);
      }
    });
  const Plan& plan = *plan_of(op);
  worker.each((int)plan.tasks.size(), 1, [&](int begin, int end) {
    for (int i = begin; i < end; ++i) attend(worker, op, plan, i);
  });
}

// The keys of a chunk, counted within its task, and the tile of values that a new token goes into.
Upcoming Executor::keys_of(const AttentionOp& op, const Plan& plan, const Task& task, int chunk) const {
  Upcoming keys{};
  keys.bytes = cache_tile_bytes(op.cache, op.dim);
  const Tile& tile = plan.tiles[task.tile];
  const int64_t per_block = batch_->block_size / 16, last = (tile.position + tile.tokens - 1) / 16;
  const int64_t first = int64_t(tile.first_chunk + chunk) * (kChunk / 16), behind = first + kChunk / 16;
  const auto add = [&](const void* cache, int64_t at) {
    const int64_t block = table(tile.seq)[at / per_block];
    const int64_t index = (block * op.kv_heads + task.kv_head) * per_block + at % per_block;
    keys.tiles[keys.count++] = (const uint8_t*)cache + index * keys.bytes;
  };
  for (int64_t at = first; at < std::min(last + 1, behind); ++at) add(op.k_cache, at);
  if (decode_ && last < behind) add(op.v_cache, last);
  return keys;
}

// What a thread will most likely read after a chunk of a task: the task's next, or the next task's first.
Upcoming Executor::upcoming(const AttentionOp& op, const Plan& plan, int number, int chunk) const {
  const Task& task = plan.tasks[number];
  const Tile& tile = plan.tiles[task.tile];
  if (!tile.split && chunk + 1 < tile.chunks) return keys_of(op, plan, task, chunk + 1);
  if (number + 1 == (int)plan.tasks.size()) return {};
  return keys_of(op, plan, plan.tasks[number + 1], plan.tasks[number + 1].chunk);
}

void Executor::attend(Worker& worker, const AttentionOp& op, const Plan& plan, int number) {
  const Task& task = plan.tasks[number];
  const Tile& tile = plan.tiles[task.tile];
  const int rows = tile.tokens * plan.group, last_chunk = tile.chunks - 1;
  const int64_t floats = softmax_floats(rows, op.dim);
  float* own = (float*)own_[worker.rank].attention.reserve(0);
  const Softmax state = softmax_at(own, rows), part = softmax_at(own + floats, rows);
  float* scratch = own + 2 * floats;
  const uint8_t* q = queries_.reserve(0) + (int64_t(task.kv_head) * tokens_.size() + tile.token) * query_bytes(op);
  if (decode_) {
    q = own_[worker.rank].queries.reserve(0);
    kernels_.rotate_queries(op, tile.token, task.kv_head, (void*)q);
    if (!tile.split || task.chunk == last_chunk) store_key_value(op, tile.token, task.kv_head);
  }
  Upcoming next;
  const AttentionTask what{q, table(tile.seq), batch_->block_size, task.kv_head, tile.token, tile.tokens, tile.position,
                           rows < kFewQueries ? &next : nullptr};
  const auto attend_chunk = [&](int chunk, Softmax to) {
    if (what.next) next = upcoming(op, plan, number, chunk);
    kernels_.attend_chunk(op, what, tile.first_chunk + chunk, scratch, to);
  };
  const auto split_part = [&](int chunk) {
    const int64_t number = tile.part + int64_t(task.kv_head) * tile.chunks + chunk;
    return softmax_at((float*)parts_.reserve(0) + number * floats, rows);
  };
  if (tile.split) {
    attend_chunk(task.chunk, split_part(task.chunk));
    std::atomic<int>& done = done_[tile.counter + task.kv_head];
    if (done.fetch_add(1, std::memory_order_acq_rel) < last_chunk) return;
    done.store(0, std::memory_order_relaxed);  // the last one to finish merges them all
  }
  const Softmax first = tile.split ? split_part(0) : state;
  if (!tile.split) attend_chunk(0, first);
  for (int c = 1; c < tile.chunks; ++c) {
    if (!tile.split) attend_chunk(c, part);
    kernels_.merge_chunk(rows, op.dim, first, tile.split ? split_part(c) : part);
  }
  kernels_.finish_attention(op, what, first);
}

// ---- Head and sampling ----

bool Executor::needs_logits(const Query& query, int known) const {
  const Sampling& s = batch_->sampling[query.row];
  return query.target >= 0 || query.top >= 0 || s.temperature >= 1e-5f || s.n_bias || s.n_allowed ||
         (s.n_end && known - s.prompt_len < s.min_tokens) || s.presence != 0 || s.frequency != 0 || s.repetition != 1;
}

void Executor::head(Worker& worker, const HeadOp& op) {
  const int panels = panels_of(op.w), vocab = op.w.n;
  const Format format = Format(op.w.format);
  const int64_t bytes = panel_bytes(format, op.w.k);
  float* logits = (float*)logits_.reserve(0);
  Own& own = own_[worker.rank];
  uint8_t* scratch = own.panel.reserve(0);
  float* products = (float*)own.products.reserve(0);
  Best* best = (Best*)own.best.reserve(0);
  if (batch_->before_head) {
    if (worker.rank == 0) batch_->before_head();
    worker.barrier();
  }
  for (int first = 0; first < batch_->n_queries; first += kHeadRows) {
    const int n = std::min(kHeadRows, batch_->n_queries - first);
    const Prepared rows = prepare(worker, op.w, op.x, op.x_stride, op.norm, op.eps, query_tokens_.data() + first, n,
                              nullptr);
    worker.each(panels, grain_of(panels, team_.size()), [&](int begin, int end) {
      for (int p = begin; p < end; ++p) {
        const int columns = std::min(kPanel, vocab - p * kPanel);
        kernels_.panel_product(format, op.w.panels + p * bytes, op.w.k, rows.acts, rows.stride, n, scratch, products);
        for (int r = 0; r < n; ++r) {
          const float* row = products + r * kPanel;
          const int slot = logit_slot_[first + r];
          if (slot < 0) {
            const Query& query = batch_->queries[first + r];
            const uint32_t* mask = query.target < 0 ? batch_->sampling[query.row].mask : nullptr;
            Best& mine = best[first + r];
            const uint32_t real = columns < kPanel ? (1u << columns) - 1 : ~0u;
            if (mask) kernels_.take_best_of(row, p * kPanel, mask[p] & real, &mine.value, &mine.token);
            else kernels_.take_best(row, p * kPanel, columns, &mine.value, &mine.token);
          } else {
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
        Best all{-INFINITY, INT_MAX};
        for (Own& other : own_) {
          const Best& theirs = ((Best*)other.best.reserve(0))[q];
          if (theirs.value > all.value || (theirs.value == all.value && theirs.token < all.token)) all = theirs;
        }
        batch_->answers[q] = {all.token == INT_MAX ? 0 : all.token, 0, 0.0f, 0};
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
  const float* logits = (const float*)logits_.reserve(0) + (int64_t)logit_slot_[q] * vocab;
  void* scratch = own_[worker.rank].sampler.reserve(0);
  Answer& answer = batch_->answers[q];
  answer = {query.target, 0, 0.0f, 0};
  if (query.target < 0)
    answer.token = kernels_.sample(batch_->sampling[query.row], batch_->tokens + query.row * batch_->tokens_stride,
                                   tokens_[query.token].position + 1, logits, vocab, scratch,
                                   (int32_t*)own_[worker.rank].seen.reserve(0));
  if (query.top >= 0)
    kernels_.describe(logits, vocab, answer.token, query.top, scratch, &answer,
                      batch_->top_ids + (int64_t)q * batch_->top_stride,
                      batch_->top_logprobs + (int64_t)q * batch_->top_stride);
}

}  // namespace martlet
