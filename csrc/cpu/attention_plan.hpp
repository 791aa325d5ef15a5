// How attention is cut into tasks: (sequence, kv head, some query tokens), each walking chunks of the context.
#pragma once

#include <cstdint>

namespace martlet {

constexpr int kChunk = 128;     // context tokens of a chunk, a multiple of every vector and of 16
constexpr int kQueryRows = 48;  // query rows (tokens times heads of the group) that a task takes at most

constexpr int kFewQueries = kQueryRows / 2;  // so few query rows wait for memory, and blocks lie anywhere in it

// Tiles of the cache to ask for, `bytes` each. While the keys of a chunk are read its values come, and while the values are
// read, the keys of the chunk that a thread takes next: so memory never rests. The last one is for the value that will be
// written then.
struct Upcoming {
  const uint8_t* tiles[kChunk / 16 + 1];
  int32_t count;
  int64_t bytes;
};

struct AttentionTask {
  const void* q;          // [tokens][group], query_row_bytes each; kSpareRows more are read
  const int32_t* blocks;  // the sequence's block table
  int32_t block_size;
  int32_t kv_head;
  int32_t token;     // first query token in the flat batch
  int32_t tokens;    // how many
  int32_t position;  // of the first
  const Upcoming* next;  // nullptr for many rows
};

// An unfinished softmax of some query rows: largest score, sum of weights, weighted sum of values [rows][dim].
struct Softmax {
  float *peak, *total, *values;
};

constexpr int64_t softmax_floats(int64_t rows, int64_t dim) { return rows * (dim + 2); }
// Kernels may work on whole tiles of rows.
constexpr int64_t scratch_rows(int64_t rows) { return (rows + 15) / 16 * 16; }
// Scores and weights of the rows, and a chunk of keys or values as f32.
constexpr int64_t attention_scratch(int64_t rows, int64_t dim) {
  return 2 * scratch_rows(rows) * kChunk + kChunk * dim;
}

inline Softmax softmax_at(float* memory, int64_t rows) { return {memory, memory + rows, memory + 2 * rows}; }

}  // namespace martlet
