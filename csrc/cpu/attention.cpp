// Attention shared out among threads: see AttentionOp, attention_plan.hpp and, for what a task computes, attention.hpp.
#include <algorithm>

#include "step.hpp"

namespace martlet {
namespace {

constexpr int kShares = 6;  // pieces of attention that each thread should find at least

}  // namespace

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

}  // namespace martlet
