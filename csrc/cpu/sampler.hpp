// From a row of logits to a token, and log-probabilities. The rules are those of martlet.kernels.ops.Ops.sample, the
// noise that of martlet.kernels.philox. The vocabulary is never sorted.
//
// What top_k, min_p and top_p leave is a prefix of the tokens ranked by (logit descending, id ascending). Its end is
// found by quickselect on weights (1 for top_k, probability for top_p) among the few likeliest tokens.
#pragma once

#include <algorithm>

#include "program.hpp"
#include "simd.hpp"

namespace martlet {
namespace MARTLET_ISA {

constexpr float kGreedyBelow = 1e-5f;
constexpr float kLowest = -__builtin_inff();

struct Candidate {
  float x;
  int32_t id;
  float mass;  // e^(x - best)
  bool before(const Candidate& other) const { return x > other.x || (x == other.x && id < other.id); }
};

// Index and value of the largest of n floats, the first of equals.
INLINE int argmax(const float* x, int n) {
  F top = splat(kLowest);
  int i = 0;
  for (; i + L <= n; i += L) top = max(top, load<F>(x + i));
  float best = highest(top);
  for (; i < n; ++i) best = most(best, x[i]);
  for (i = 0; i < n; ++i)
    if (x[i] == best) return i;
  return 0;  // all are NaN
}

// Sum of e^(x - best).
INLINE float mass_of(const float* x, int n, float best, float floor) {
  F total = {};
  int i = 0;
  for (; i + L <= n; i += L) {
    const F v = load<F>(x + i);
    total += v >= floor ? exp(v - best) : F{};
  }
  float rest = 0;
  for (; i < n; ++i) rest += x[i] >= floor ? exp(splat(x[i] - best))[0] : 0.0f;
  return sum(total) + rest;
}

// Candidates with x >= floor and x > -inf.
INLINE int gather(const float* x, int n, float best, float floor, Candidate* out) {
  int count = 0;
  for (int i = 0; i < n; i += L) {
    if (i + L <= n && !any(load<F>(x + i) >= floor)) continue;
    for (int j = i; j < least(n, i + L); ++j)
      if (x[j] >= floor && x[j] > kLowest) out[count++] = {x[j], j, exp(splat(x[j] - best))[0]};
  }
  return count;
}

// Moves the shortest prefix whose weight reaches `target` to the front (all, if none does); returns its length.
template <class Weight>
INLINE int select_prefix(Candidate* c, int n, double target, Weight weight) {
  int begin = 0, end = n;  // everything before `begin` is in the prefix, everything from `end` on is out
  double weighed = 0;
  while (begin < end) {
    Candidate *low = c + begin, *high = c + end - 1, *mid = low + (high - low) / 2;
    if (mid->before(*low)) std::swap(*mid, *low);
    if (high->before(*low)) std::swap(*high, *low);
    if (high->before(*mid)) std::swap(*high, *mid);
    const Candidate pivot = *mid;
    double upper = 0;
    Candidate* bound = low;
    for (Candidate* p = low; p <= high; ++p)
      if (!pivot.before(*p)) {  // ranks up to and with the pivot
        upper += weight(*p);
        std::swap(*p, *bound++);
      }
    const int middle = (int)(bound - c);
    if (weighed + upper < target) {
      weighed += upper;
      begin = middle;
    } else if (middle == end) {  // the pivot ranks last: the prefix ends with it if the others do not reach the target
      if (weighed + upper - weight(pivot) < target) return end;
      Candidate* p = c + begin;
      while (p->id != pivot.id) ++p;
      std::swap(*p, c[--end]);
    } else {
      end = middle;
    }
  }
  return end;
}

INLINE float uniform(uint64_t seed, uint32_t position, uint32_t token) {
  uint32_t c0 = token / 4, c1 = position, c2 = 0, c3 = 0, k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = (uint64_t)c0 * 0xD2511F53u, p1 = (uint64_t)c2 * 0xCD9E8D57u;
    c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
    c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
    c1 = (uint32_t)p1;
    c3 = (uint32_t)p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const uint32_t words[4] = {c0, c1, c2, c3};
  return ((float)(words[token % 4] >> 9) + 0.5f) * 0x1p-23f;
}
INLINE float gumbel(uint64_t seed, uint32_t position, uint32_t token) {
  return -__builtin_logf(-__builtin_logf(uniform(seed, position, token)));
}
constexpr float kMostNoise = 16.7f;  // above -log(-log(1 - 2^-24))

struct Draw {
  uint64_t seed;
  uint32_t position;
  float best = kLowest;
  int token = -1;
  INLINE void offer(float x, int id) {
    if (x + kMostNoise < best) return;
    const float noisy = x + gumbel(seed, position, (uint32_t)id);
    if (noisy > best || (noisy == best && id < token)) {
      best = noisy;
      token = id;
    }
  }
};

// allowed, bias, banned, penalties: in place on x[n]. seen: n zeros, left as zeros.
INLINE void restrict_and_penalise(const Sampling& s, const int32_t* tokens, int known, float* x, int n, int32_t* seen) {
  if (s.n_allowed) {
    float* kept = (float*)seen;  // the values of the allowed tokens, while all others are struck out
    for (int i = 0; i < s.n_allowed; ++i) kept[s.allowed_ids[i]] = x[s.allowed_ids[i]];
    for (int i = 0; i < n; ++i) x[i] = kLowest;
    for (int i = 0; i < s.n_allowed; ++i) x[s.allowed_ids[i]] = kept[s.allowed_ids[i]];
    for (int i = 0; i < s.n_allowed; ++i) seen[s.allowed_ids[i]] = 0;
  }
  for (int i = 0; i < s.n_bias; ++i) x[s.bias_ids[i]] += s.biases[i];
  if (known - s.prompt_len < s.min_tokens)
    for (int i = 0; i < s.n_end; ++i) x[s.end_ids[i]] = kLowest;
  if (s.repetition == 1.0f && s.frequency == 0.0f && s.presence == 0.0f) return;
  constexpr int32_t kSeen = 1 << 30;  // above any count of outputs
  for (int i = 0; i < known; ++i) {
    int32_t& mark = seen[tokens[i]];
    mark = (mark | kSeen) + (i >= s.prompt_len);
  }
  for (int i = 0; i < known; ++i) {
    const int token = tokens[i];
    if (!seen[token]) continue;
    const int count = seen[token] & (kSeen - 1);
    float v = x[token];
    v = v > 0 ? v / s.repetition : v * s.repetition;
    x[token] = v - (s.frequency * (float)count + (count ? s.presence : 0.0f));
    seen[token] = 0;
  }
}

// Leaves what min_p, top_k and top_p keep of x[n] in c; returns how many.
INLINE int survivors(const Sampling& s, const float* x, int n, float best, Candidate* c) {
  const float floor = s.min_p > 0 ? best + __builtin_logf(s.min_p) : kLowest;
  const bool limited = s.top_k > 0 && s.top_k < n, nucleus = s.top_p < 1.0f;
  double total = nucleus && !limited ? mass_of(x, n, best, floor) : 0;
  const auto one = [](const Candidate&) { return 1.0; };
  const auto mass = [](const Candidate& p) { return (double)p.mass; };
  int count = 0;
  for (float drop = 6.0f;; drop *= 3.0f) {
    const bool all = drop > 60.0f || best - drop < floor;
    count = gather(x, n, best, all ? floor : best - drop, c);
    if (all || (limited && count >= s.top_k)) break;
    double held = 0;
    for (int i = 0; i < count; ++i) held += c[i].mass;
    if (nucleus && !limited && held >= s.top_p * total) break;
  }
  if (limited) count = select_prefix(c, count, s.top_k, one);
  if (!nucleus) return count;
  if (limited) {
    total = 0;
    for (int i = 0; i < count; ++i) total += c[i].mass;
  }
  return select_prefix(c, count, s.top_p * total, mass);
}

// Copies n logits, masked ones as -inf; bit t % 32 of word t / 32 keeps token t. Few words of a mask are mixed.
INLINE void copy_masked(const float* logits, const uint32_t* mask, int n, float* x) {
  for (int first = 0; first < n; first += 32) {
    const int count = least(32, n - first);
    const uint32_t bits = mask[first / 32];
    if (bits == ~0u) {
      std::memcpy(x + first, logits + first, 4 * (size_t)count);
    } else if (bits == 0) {
      for (int i = 0; i < count; ++i) x[first + i] = kLowest;
    } else {
      for (int i = 0; i < count; ++i) x[first + i] = bits >> i & 1 ? logits[first + i] : kLowest;
    }
  }
}

// The token after `known` tokens. x: scratch for n floats; c: for n candidates; seen: n zeros.
int sample(const Sampling& s, const int32_t* tokens, int known, const float* logits, int n, float* x, Candidate* c,
           int32_t* seen) {
  if (s.mask) copy_masked(logits, s.mask, n, x);
  else std::memcpy(x, logits, 4 * (size_t)n);
  restrict_and_penalise(s, tokens, known, x, n, seen);
  const int likeliest = argmax(x, n);
  if (s.temperature < kGreedyBelow) return likeliest;
  for (int i = 0; i < n; ++i) x[i] /= s.temperature;
  Draw draw{s.seed, (uint32_t)known};
  if (s.top_k > 0 || s.top_p < 1.0f || s.min_p > 0) {
    const int count = survivors(s, x, n, x[likeliest], c);
    for (int i = 0; i < count; ++i) draw.offer(c[i].x, c[i].id);
  } else {
    draw.offer(x[likeliest], likeliest);  // first, so that the hopeless are passed over without a draw
    for (int i = 0; i < n; ++i)
      if (x[i] + kMostNoise >= draw.best && x[i] > kLowest) draw.offer(x[i], i);
  }
  return draw.token < 0 ? likeliest : draw.token;
}

// Raw log-probability and rank of `token`, and the `k` likeliest tokens in order.
void describe(const float* logits, int n, int token, int k, Candidate* c, Answer* answer, int32_t* top_ids,
              float* top_logprobs) {
  const float best = logits[argmax(logits, n)];
  const float log_total = best + __builtin_logf(mass_of(logits, n, best, kLowest));
  int rank = 1;
  for (int i = 0; i < n; ++i) rank += logits[i] > logits[token];
  answer->rank = rank;
  answer->logprob = logits[token] - log_total;
  k = least(k, n);
  if (k <= 0) return;
  int count = 0;
  for (float drop = 6.0f; count < k; drop *= 3.0f) {
    count = gather(logits, n, best, drop > 60.0f ? kLowest : best - drop, c);
    if (drop > 60.0f) break;
  }
  count = select_prefix(c, count, k, [](const Candidate&) { return 1.0; });
  std::sort(c, c + count, [](const Candidate& a, const Candidate& b) { return a.before(b); });
  for (int i = 0; i < count; ++i) {
    top_ids[i] = c[i].id;
    top_logprobs[i] = c[i].x - log_total;
  }
}

// Takes columns first ... first + columns - 1 of a row of logits into the running argmax.
void take_best(const float* row, int first, int columns, float* best, int32_t* token) {
  if (columns == 2 * L && !any(max(load<F>(row), load<F>(row + L)) >= *best)) return;  // nearly always
  const int i = argmax(row, columns);
  if (row[i] > *best || (row[i] == *best && first + i < *token)) {
    *best = row[i];
    *token = first + i;
  }
}

// The same for the 32 columns from `first` on, of which `mask` keeps some.
void take_best_of(const float* row, int first, uint32_t mask, float* best, int32_t* token) {
  for (; mask; mask &= mask - 1) {
    const int i = __builtin_ctz(mask);
    if (row[i] > *best || (row[i] == *best && first + i < *token)) {
      *best = row[i];
      *token = first + i;
    }
  }
}

}  // namespace MARTLET_ISA
}  // namespace martlet
