// Mixtures of experts, and norms behind: see RouteOp, ExpertsOp, CombineOp and NormAddOp.
//
// Pairs of a token and an expert are sorted by expert, so each expert's matrices meet all their rows at once.
#include <algorithm>
#include <cmath>

#include "step.hpp"

namespace martlet {
void Executor::norm_add(Worker& worker, const NormAddOp& op) {
  const int n = rows(worker);
  worker.each(n, grain_of(n, team_.size()), [&](int begin, int end) {
    for (int64_t t = begin; t < end; ++t)
      kernels_.norm_add(op.x + t * op.x_stride, op.norm, op.eps, op.n, op.y + t * op.y_stride);
  });
}

void Executor::route(Worker& worker, const RouteOp& op) {
  const int n = rows(worker), active = op.active;
  Routing& to = routing_;
  if (worker.rank == 0) {
    to.active = active;
    for (auto* part : {&to.expert, &to.place, &to.token}) part->resize(size_t(n) * active);
    to.weight.resize(size_t(n) * active);
  }
  worker.barrier();
  worker.each(n, grain_of(n, team_.size()), [&](int begin, int end) {
    for (int t = begin; t < end; ++t) {
      const float* rating = op.ratings + t * op.stride;
      int32_t* expert = &to.expert[size_t(t) * active];
      float* weight = &to.weight[size_t(t) * active];
      float chosen = 0, all = 0;
      for (int a = 0; a < active; ++a) {
        int best = -1;
        for (int e = 0; e < op.count; ++e)
          if ((best < 0 || rating[e] > rating[best]) && std::find(expert, expert + a, e) == expert + a) best = e;
        expert[a] = best;
        chosen += weight[a] = std::exp(rating[best] - rating[expert[0]]);
      }
      for (int e = 0; e < op.count; ++e) all += std::exp(rating[e] - rating[expert[0]]);
      for (int a = 0; a < active; ++a) weight[a] /= op.renormalise ? chosen : all;
    }
  });
  worker.each(1, 1, [&](int, int) {
    to.first.assign(op.count + 1, 0);
    for (int32_t e : to.expert) ++to.first[e + 1];
    to.working.clear();
    for (int e = 0; e < op.count; ++e) {
      if (to.first[e + 1]) to.working.push_back(e);
      to.first[e + 1] += to.first[e];
    }
    std::vector<int32_t> next(to.first.begin(), to.first.end() - 1);
    for (size_t p = 0; p < to.expert.size(); ++p) {
      to.place[p] = next[to.expert[p]]++;
      to.token[to.place[p]] = int32_t(p) / active;
    }
  });
}

void Executor::experts(Worker& worker, const ExpertsOp& op) {
  const LinearOp& linear = op.linear;
  const Routing& to = routing_;
  const int rows = (int)to.token.size(), panels = panels_of(linear.w);
  const auto kind = [&](int e) {
    return kernels_.act_kind(Format(op.experts[e].format), to.first[e + 1] - to.first[e]);
  };
  int64_t stride = 0;  // of the widest kind, so that every row has its place
  for (int e : to.working) stride = std::max(stride, act_bytes(kind(e), linear.w.k));
  uint8_t* acts = acts_.reserve(0);
  worker.each(rows, grain_of(rows, team_.size()), [&](int begin, int end) {
    for (int r = begin; r < end; ++r) {
      const int e = int(std::upper_bound(to.first.begin(), to.first.end(), r) - to.first.begin()) - 1;
      const float* x = linear.x + (op.gather ? to.token[r] : r) * linear.x_stride;
      kernels_.prepare(kind(e), x, linear.norm, linear.eps, linear.w.k, acts + r * stride);
    }
  });
  uint8_t* scratch = own_[worker.rank].panel.reserve(0);
  float* products = (float*)own_[worker.rank].products.reserve(0);
  const int tasks = (int)to.working.size() * panels;
  worker.each(tasks, grain_of(tasks, team_.size()), [&](int begin, int end) {
    for (int i = begin; i < end; ++i) {
      const int e = to.working[i / panels], p = i % panels, first = to.first[e], count = to.first[e + 1] - first;
      const Matrix& w = op.experts[e];
      const Format format = Format(w.format);
      kernels_.panel_product(format, w.panels + p * panel_bytes(format, w.k), w.k, acts + first * stride, stride, count,
                             scratch, products);
      kernels_.finish(linear, p, products, first, count);
    }
  });
}

void Executor::combine(Worker& worker, const CombineOp& op) {
  const Routing& from = routing_;
  const int n = rows(worker);
  worker.each(n, grain_of(n, team_.size()), [&](int begin, int end) {
    for (int64_t t = begin; t < end; ++t) {
      float* y = op.y + t * op.y_stride;
      if (!op.add) std::fill(y, y + op.n, 0.0f);
      for (int a = 0; a < from.active; ++a) {
        const size_t pair = size_t(t) * from.active + a;
        const float* x = op.pairs + from.place[pair] * op.pairs_stride;
        const float weight = from.weight[pair];
        for (int i = 0; i < op.n; ++i) y[i] += weight * x[i];
      }
      if (!op.shared) continue;
      const float* x = op.shared + t * op.shared_stride;
      const float weight = op.gate ? 1.0f / (1.0f + std::exp(-op.gate[t * op.gate_stride])) : 1.0f;
      for (int i = 0; i < op.n; ++i) y[i] += weight * x[i];
    }
  });
}

}  // namespace martlet
