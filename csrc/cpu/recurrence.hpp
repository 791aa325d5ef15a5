// RWKV's rows and heads: layer norm, token shift, and the recurrences of generations 5, 6 and 7.
#pragma once

#include "rows.hpp"

namespace martlet {
namespace MARTLET_ISA {

// Lanes i ... of a row of n, zeros behind its end.
INLINE F lanes_at(const float* x, int i, int n) {
  if (i + L <= n) return load<F>(x + i);
  F v = {};
  std::memcpy(&v, x + i, 4 * (size_t)(n - i));
  return v;
}

INLINE void put_lanes_at(float* y, int i, int n, F v) { put_lanes(y + i, v, 4 * least(L, n - i)); }

struct Moments {
  float mean, inverse;  // of the standard deviation
};

INLINE Moments moments(const float* x, int n, float eps) {
  F total = {}, squares = {};
  for (int i = 0; i < n; i += L) total += lanes_at(x, i, n);
  const float mean = sum(total) / (float)n;
  for (int i = 0; i < n; i += L) {
    F v = lanes_at(x, i, n) - mean;
    for (int lane = n - i; lane < L; ++lane) v[lane] = 0;
    squares = fma(v, v, squares);
  }
  return {mean, 1.0f / __builtin_sqrtf(sum(squares) / (float)n + eps)};
}

void layer_norm(const LayerNormOp& op, int64_t t) {
  const float* x = op.x + t * op.x_stride;
  float* y = op.y + t * op.y_stride;
  const Moments m = moments(x, op.n, op.eps);
  for (int i = 0; i < op.n; i += L)
    put_lanes_at(y, i, op.n, fma((lanes_at(x, i, op.n) - m.mean) * m.inverse, lanes_at(op.norm, i, op.n),
                                 lanes_at(op.bias, i, op.n)));
}

void shift(const ShiftOp& op, int64_t t, const float* before) {
  const float* x = op.x + t * op.x_stride;
  for (int p = 0; p < op.parts; ++p) {
    const float* share = op.shares + (int64_t)p * op.n;
    const float* moved = op.moved ? op.moved + t * op.moved_stride + (int64_t)p * op.n : nullptr;
    float* y = op.y + t * op.y_stride + (int64_t)p * op.n;
    for (int i = 0; i < op.n; i += L) {
      const F own = lanes_at(x, i, op.n);
      F part = lanes_at(share, i, op.n);
      if (moved) part += lanes_at(moved, i, op.n);
      put_lanes_at(y, i, op.n, fma(lanes_at(before, i, op.n) - own, part, own));
    }
  }
}

INLINE float dot(const float* a, const float* b, const float* c, int n) {
  F total = {};
  for (int i = 0; i < n; i += L) total = fma(load<F>(a + i) * load<F>(b + i), load<F>(c + i), total);
  return sum(total);
}

constexpr int kColumns = 4;  // vectors of values that go through a state together

// y = r S + (r . bonus k) v, then S <- diag(w) S + k^T v. S [dim][dim], a row a key.
INLINE void step_of_wkv(const float* r, const float* k, const float* v, const float* w, float own, int dim, float* s,
                        float* y) {
  for (int column = 0; column < dim; column += kColumns * L) {
    const int vectors = least(kColumns, (dim - column) / L);
    F value[kColumns], read[kColumns];
    for (int c = 0; c < vectors; ++c) {
      value[c] = load<F>(v + column + c * L);
      read[c] = value[c] * own;
    }
    for (int i = 0; i < dim; ++i) {
      float* row = s + (int64_t)i * dim + column;
      const F ri = splat(r[i]), ki = splat(k[i]), wi = splat(w[i]);
      for (int c = 0; c < vectors; ++c) {
        const F state = load<F>(row + c * L);
        read[c] = fma(ri, state, read[c]);
        store(row + c * L, fma(wi, state, ki * value[c]));
      }
    }
    for (int c = 0; c < vectors; ++c) store(y + column + c * L, read[c]);
  }
}

// S <- diag(w) S - (rate q)^T (q S) + k^T v, then y = r S. removed: q; put_out: rate q.
INLINE void step_of_delta_rule(const float* r, const float* k, const float* v, const float* w, const float* removed,
                               const float* put_out, int dim, float* s, float* y) {
  for (int column = 0; column < dim; column += kColumns * L) {
    const int vectors = least(kColumns, (dim - column) / L);
    F value[kColumns], taken[kColumns] = {}, read[kColumns] = {};
    for (int i = 0; i < dim; ++i)
      for (int c = 0; c < vectors; ++c)
        taken[c] = fma(splat(removed[i]), load<F>(s + (int64_t)i * dim + column + c * L), taken[c]);
    for (int c = 0; c < vectors; ++c) value[c] = load<F>(v + column + c * L);
    for (int i = 0; i < dim; ++i) {
      float* row = s + (int64_t)i * dim + column;
      const F ri = splat(r[i]), ki = splat(k[i]), wi = splat(w[i]), pi = splat(-put_out[i]);
      for (int c = 0; c < vectors; ++c) {
        const F state = fma(wi, load<F>(row + c * L), fma(pi, taken[c], ki * value[c]));
        store(row + c * L, state);
        read[c] = fma(ri, state, read[c]);
      }
    }
    for (int c = 0; c < vectors; ++c) store(y + column + c * L, read[c]);
  }
}

INLINE const float* row_of(const Rows& rows, int64_t t, int column) { return rows.x + t * rows.stride + column; }

void recur(const RecurOp& op, int head, int64_t first, int count, float* state, const int32_t* kept) {
  const int dim = op.dim, at = head * dim;
  const int64_t size = (int64_t)dim * dim;
  const float *bonus = op.bonus + at, *norm = op.norm + at, *bias = op.bias + at;
  float w[kMaxHeadDim], key[kMaxHeadDim], value[kMaxHeadDim], removed[kMaxHeadDim], put_out[kMaxHeadDim];
  for (int64_t t = first; t < first + count; ++t) {
    const float *r = row_of(op.r, t, at), *k = row_of(op.k, t, at), *v = row_of(op.v, t, at);
    const float *decay = row_of(op.decay, t, at), *gate = op.gate.x ? row_of(op.gate, t, at) : nullptr;
    float* y = op.y + t * op.y_stride + at;
    float own;
    if (op.delta) {
      const float *rate = row_of(op.rate, t, at), *removal = op.removal + at, *renewal = op.renewal + at;
      F squares = {};
      for (int i = 0; i < dim; i += L) {
        const F plain = load<F>(k + i), q = plain * load<F>(removal + i);
        squares = fma(q, q, squares);
        store(removed + i, q);
        store(key + i, plain * fma(load<F>(rate + i) - 1.0f, load<F>(renewal + i), splat(1.0f)));
        store(w + i, exp(sigmoid(load<F>(decay + i)) * -0.60653066f));
      }
      const float length = __builtin_sqrtf(sum(squares)), inverse = 1.0f / most(length, 1e-12f);
      for (int i = 0; i < dim; i += L) {
        const F q = load<F>(removed + i) * inverse;
        store(removed + i, q);
        store(put_out + i, q * load<F>(rate + i));
      }
      k = key;
      if (op.value.x) {
        const float *share = row_of(op.value, t, at), *of_first = row_of(op.first, t, at);
        for (int i = 0; i < dim; i += L) {
          const F mine = load<F>(v + i);
          store(value + i, fma(load<F>(of_first + i) - mine, load<F>(share + i), mine));
        }
        v = value;
      }
      own = dot(r, k, bonus, dim);
      step_of_delta_rule(r, k, v, w, removed, put_out, dim, state, y);
    } else {
      for (int i = 0; i < dim; i += L) store(w + i, exp(-exp(load<F>(decay + i))));
      step_of_wkv(r, k, v, w, dot(r, k, bonus, dim), dim, state, y);
      own = 0.0f;
    }
    const Moments m = moments(y, dim, op.eps);
    for (int i = 0; i < dim; i += L) {
      F out = fma((load<F>(y + i) - m.mean) * m.inverse, load<F>(norm + i), load<F>(bias + i));
      out = fma(splat(own), load<F>(v + i), out);
      store(y + i, gate ? out * load<F>(gate + i) : out);
    }
    if (kept && kept[t - first] >= 0)
      std::memcpy(op.state + kept[t - first] * op.state_stride + head * size, state, 4 * (size_t)size);
  }
}

}  // namespace MARTLET_ISA
}  // namespace martlet
