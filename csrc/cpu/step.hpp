// Runs a program for one step's batch on a team of threads.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "kernels.hpp"
#include "thread_pool.hpp"

namespace martlet {

// Up to here every thread prepares its own copy of a linear's input, which is cheaper than meeting at a barrier.
constexpr int kOwnRows = 4;

// Pieces of a loop: small enough to share well, large enough that dealing them out costs nothing.
inline int grain_of(int n, int threads) { return n < threads * 32 ? 1 : n / (threads * 16); }

inline int panels_of(const Matrix& w) { return (w.n + kPanel - 1) / kPanel; }

// Memory that only grows, aligned to cache lines; zeros at first. Contents do not survive growth.
class Scratch {
 public:
  uint8_t* reserve(int64_t bytes) {
    if (bytes > size_) {
      memory_.reset(new uint8_t[bytes + 64]());
      size_ = bytes;
    }
    return get();
  }
  uint8_t* get() const { return memory_.get() + (64 - (uintptr_t)memory_.get() % 64) % 64; }

 private:
  std::unique_ptr<uint8_t[]> memory_;
  int64_t size_ = 0;
};

class Executor {
 public:
  Executor(int threads, int spins, Isa isa)
      : team_(threads, spins), kernels_(*kernels_for(isa)), own_(size_t(team_.size())) {}
  Executor(const Executor&) = delete;

  ~Executor() { finish(); }

  // A step in up to three calls, so that the caller can do something else between them while the other threads compute.
  // Calls follow each other as the team's do. Until `finish`, or the next `begin`, everything that ops and batch point
  // at is in use; the batch itself is copied.
  void begin(const Op* ops, int n_ops, const Batch& batch);  // finishes the step before
  void help();    // the caller computes too, until all but the head and sampling is done
  void finish();  // and with this it is done; nothing where no step is under way
  void run(const Op* ops, int n_ops, const Batch& batch) {
    begin(ops, n_ops, batch);
    finish();
  }
  // The team, with nothing under way.
  Team& team() {
    finish();
    return team_;
  }
  int screen_rows(Format head) const { return kernels_.screen_rows(head); }
  void make_screen(const Matrix& head, uint8_t* out);

 private:
  struct Token {
    int32_t seq, position;
  };
  // Query tokens of one sequence that attend together; `split`: their chunks are tasks of their own.
  struct Tile {
    int32_t seq, token, tokens, position, first_chunk, chunks;
    int64_t part;  // number of the first unfinished softmax of a split tile
    int32_t counter;
    bool split;
  };
  struct Task {
    int32_t tile, kv_head, chunk;
  };
  // How attention of one shape is cut for this batch; layers of the same shape share it.
  struct Plan {
    int32_t group, kv_heads, window;
    std::vector<Tile> tiles;
    std::vector<Task> tasks;
    int64_t parts;
    int32_t counters;
  };
  struct Best {
    float value;
    int32_t token;
  };
  // A thread's own memory.
  struct Own {
    Scratch acts, taken, panel, products, lora, queries, attention, sampler, seen, best, scores, screen;
    float least[kOwnRows];  // what each query's best logit is at least
    int rows = 0;    // that operations have now: tokens, or picked ones
    int shrunk = 0;  // tasks with A in this step, up to the linear the thread is at
  };
  struct Prepared {
    const uint8_t* acts;
    int64_t stride;
  };
  // Tokens that run with the adapter of one slot: `count` of adapted_ from `first` on.
  struct Group {
    int32_t slot, first, count;
  };
  // Where the tokens of a mixture of experts go. Pair p = token * active + choice.
  struct Routing {
    int active = 0;
    std::vector<int32_t> expert;   // of each pair
    std::vector<float> weight;     // of each pair
    std::vector<int32_t> place;    // of each pair among the pairs sorted by expert
    std::vector<int32_t> token;    // of each sorted pair
    std::vector<int32_t> first;    // [experts + 1], where each expert's pairs begin
    std::vector<int32_t> working;  // experts that have any
  };

  void work(Worker&, int first, int last);
  void lay_out(const Op* ops, int n_ops, const Batch& batch);
  void lay_out_adapters(const Op* ops, int n_ops);
  Plan plan(const AttentionOp& op) const;
  const Plan* plan_of(const AttentionOp& op) const;

  void embed(Worker&, const EmbedOp&);
  void angles(Worker&, const AnglesOp&);
  void linear(Worker&, const LinearOp&);
  void linears_by_rows(Worker&, const Op* ops, int count);
  int shrink_tasks(const LinearOp&) const;
  int task_or_panel(int i, int tasks, int panels) const;
  void shrink(Worker&, const LinearOp&, int task, const Prepared&);
  void expand_ahead(const LinearOp&, int panel) const;
  void expand(const LinearOp&, int panel, int tasks, float* products);
  void gather_adapted(Worker&, const LinearOp&, int token, const uint8_t* acts, int64_t bytes);
  uint8_t* lora_inputs(Worker&);
  int64_t lora_input_bytes(const Matrix&) const;
  ActKind lora_act_kind(const Matrix&, const Group&) const;
  bool suits(const Matrix&, const Group&) const;
  bool stands_together(const Matrix&, const Group&) const;
  void attention(Worker&, const AttentionOp&);
  void attend(Worker&, const AttentionOp&, const Plan&, int task);
  Upcoming keys_of(const AttentionOp&, const Plan&, const Task&, int chunk) const;
  Upcoming upcoming(const AttentionOp&, const Plan&, int task, int chunk) const;
  void head(Worker&, const HeadOp&);
  void norm_add(Worker&, const NormAddOp&);
  void route(Worker&, const RouteOp&);
  void experts(Worker&, const ExpertsOp&);
  void combine(Worker&, const CombineOp&);
  void layer_norm(Worker&, const LayerNormOp&);
  void shift(Worker&, const ShiftOp&);
  void recur(Worker&, const RecurOp&);
  void remember(Worker&, const RememberOp&);
  void gate_add(Worker&, const GateAddOp&);
  void pick(Worker&, const PickOp&);
  int rows(const Worker& worker) const { return own_[worker.rank].rows; }
  int row_blocks(int rows) const;
  Prepared prepare(Worker&, const Matrix&, const float* x, int64_t stride, const float* norm, float eps,
               const int32_t* index, int rows, const int32_t* order, const LinearOp* adapted = nullptr);
  void prepare_row(Worker&, ActKind, const float* x, const float* norm, float eps, int k, const int32_t* order,
                   uint8_t* out);
  void warm(const Worker&, const Matrix&) const;
  void store_key_value(const AttentionOp&, int token, int kv_head) const;
  const int32_t* table(int seq) const { return batch_->blocks + batch_->rows[seq] * batch_->blocks_stride; }
  int64_t query_bytes(const AttentionOp& op) const;  // of the queries that share a kv head
  bool needs_logits(const Query&, int known) const;
  void lay_out_head(const HeadOp&, bool picks);
  void screen(Worker&, const HeadOp&, Prepared& rows);
  void take_best(const HeadOp&, int query, int panel, const float* row, Best&) const;
  uint32_t columns_of(const HeadOp&, int query, int panel) const;
  bool ruled_out(const Worker&, int panels, int panel) const;
  Best best_of(int query, Scratch Own::* bests) const;
  void answer(Worker&, int query, int vocab);

  Team team_;
  const Kernels& kernels_;
  std::vector<Own> own_;

  // Of the step that is under way.
  bool under_way_ = false;
  const Op* ops_ = nullptr;
  int n_ops_ = 0, head_ = 0;  // the head's place among the operations
  int next_ = 0;              // the caller's next operation
  Batch held_{};
  const Batch* batch_ = &held_;
  std::vector<Token> tokens_;
  std::vector<int32_t> first_;  // [n_seqs + 1], where each sequence's tokens begin
  bool decode_ = false;  // one token of each sequence
  bool picks_ = false;   // rows without a query are left out behind the PickOp
  std::vector<Plan> plans_;
  Routing routing_;
  std::vector<int32_t> adapted_;  // tokens that run with an adapter, by slot
  std::vector<Group> groups_;
  std::vector<int32_t> group_of_, place_;  // of each token: its group or -1, and where it stands in adapted_
  int64_t lora_stride_ = 0;  // bytes between the products of two tokens with their A
  Scratch lora_inputs_, lora_t_;
  std::atomic<int> shrunk_{0};  // tasks with A that are done in this step
  std::vector<int32_t> query_tokens_, logit_slot_;
  bool screens_ = false;  // only what the head's screen leaves is computed
  Scratch acts_, queries_, parts_, logits_, bounds_;
  std::unique_ptr<std::atomic<int>[]> done_;  // finished chunks of each split (tile, kv head)
  int64_t done_size_ = 0;
};

}  // namespace martlet
