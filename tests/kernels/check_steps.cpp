// SPDX-License-Identifier: Apache-2.0
// Every step of the native code with every option, held to sums and gradients in doubles: a program without Python, so that it
// can be compiled for another processor and run under an emulator. It is compiled with -DSTORAGE, -I kernels/native.

#include "vectors.h"

#include "micro_kernel.h"

#include "head.h"

#include "gradients.h"

#include "steps.cpp"

#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

namespace {

using Doubles = std::vector<double>;

float widen(float x) { return x; }

float widen(uint16_t x) {
  uint16_t few[kLanes] = {x};
#if STORAGE == 0
  return few[0];
#else
  return load_numbers(few)[0];
#endif
}

Number number_of(float x) {
  Number few[kLanes];
  store_numbers(few, Floats{} + x);
  return few[0];
}

struct Options {
  bool bias, capped, weighted, some_rows, transposed;
  int64_t threads;
};

// A problem, its answer in doubles, and what the code writes.
struct Problem {
  const int64_t all, n, d, v;
  const Options o;
  std::vector<Number> hidden, weight, d_hidden, d_weight;
  std::vector<float> bias, class_weight, prob, hit, uniform, uniform_weight, highest, sumexp, target_logit, d_bias, nll, lse;
  std::vector<double> weighted_sum;
  std::vector<int64_t> index, target, best;
  Doubles z, dx, ref_hidden, ref_weight, ref_bias;
  Head head{};

  Problem(int64_t rows, int64_t d, int64_t v, Options o) : all(rows), n(o.some_rows ? (rows + 1) / 2 : rows), d(d), v(v), o(o) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    const auto numbers = [&](int64_t count) {
      std::vector<Number> made(count);
      for (auto& x : made) x = number_of(normal(random));
      return made;
    };
    const auto floats = [&](int64_t count, float from) {
      std::vector<float> made(count);
      for (auto& x : made) x = from + 0.1f * std::abs(normal(random));
      return made;
    };
    hidden = numbers(all * d), weight = numbers(v * d);
    bias = floats(v, -0.1f), class_weight = floats(v, 0.5f);
    prob = floats(n, 0.5f), hit = floats(n, 0.5f), uniform = floats(n, 0.01f);
    for (int64_t i = 0; i < n; ++i) index.push_back(o.some_rows ? 2 * i : i), target.push_back(i % 5 == 4 ? -1 : random() % v);
    highest.resize(n), sumexp.resize(n), target_logit.resize(n), weighted_sum.resize(n), nll.resize(n), lse.resize(n), best.resize(n);
    d_hidden.resize(all * d), d_weight.resize(v * d), d_bias.resize(v), uniform_weight.resize(d);
    fill_head();
    answer();
  }

  double h(int64_t r, int64_t k) const { return widen(hidden[o.transposed ? k * all + index[r] : index[r] * d + k]); }
  double w(int64_t c, int64_t k) const { return widen(weight[o.transposed ? k * v + c : c * d + k]); }

  void fill_head() {
    Head& q = head;
    q.weight = weight.data(), q.hidden = hidden.data();
    q.weight_row = o.transposed ? 1 : d, q.weight_column = o.transposed ? v : 1;
    q.hidden_row = o.transposed ? 1 : d, q.hidden_column = o.transposed ? all : 1;
    q.bias = o.bias ? bias.data() : nullptr, q.class_weight = o.weighted ? class_weight.data() : nullptr;
    q.classes = v, q.width = d, q.inner = o.capped ? 0.2f : 0.5f, q.outer = o.capped ? 3.0f : 1.0f, q.capped = o.capped;
    q.weighted = o.weighted, q.index = o.some_rows ? index.data() : nullptr, q.target = target.data();
    q.prob = prob.data(), q.hit = hit.data(), q.uniform = o.weighted ? uniform.data() : nullptr;
    for (int64_t k = 0; k < d; ++k)
      for (int64_t c = 0; c < v; ++c) uniform_weight[k] += class_weight[c] * float(w(c, k));
    q.uniform_weight = uniform_weight.data();
    q.highest = highest.data(), q.sumexp = sumexp.data(), q.target_logit = target_logit.data(), q.weighted_sum = weighted_sum.data();
    q.nll = nll.data(), q.lse = lse.data(), q.best = best.data();
    q.d_hidden = d_hidden.data(), q.d_weight = d_weight.data(), q.d_bias = d_bias.data();
    q.columns = o.threads == 1 ? kRows : 24, q.threads = o.threads;
  }

  void answer() {
    z.resize(n * v), dx.resize(n * v), ref_hidden.assign(all * d, 0.0), ref_weight.assign(v * d, 0.0), ref_bias.assign(v, 0.0);
    for (int64_t r = 0; r < n; ++r) {
      double top = -INFINITY, sum = 0.0;
      Doubles slope(v, 1.0);
      for (int64_t c = 0; c < v; ++c) {
        double x = o.bias ? bias[c] : 0.0;
        for (int64_t k = 0; k < d; ++k) x += h(r, k) * w(c, k);
        x *= double(head.inner);
        if (o.capped) slope[c] = 1.0 - std::tanh(x) * std::tanh(x), x = std::tanh(x) * head.outer;
        top = std::max(top, z[r * v + c] = x);
      }
      for (int64_t c = 0; c < v; ++c) sum += std::exp(z[r * v + c] - top);
      for (int64_t c = 0; c < v; ++c) {
        double g = prob[r] * std::exp(z[r * v + c] - top) / sum - (c == target[r] ? hit[r] : 0.0);
        g = (g - (o.weighted ? uniform[r] * class_weight[c] : 0.0)) * slope[c];
        ref_bias[c] += g;
        for (int64_t k = 0; k < d; ++k) ref_hidden[index[r] * d + k] += g * w(c, k), ref_weight[c * d + k] += g * h(r, k);
      }
    }
  }
};

int failures = 0, checks = 0;

void compare(const char* plan, const char* what, const Problem& p, double error, double scale, double most) {
  ++checks;
  if (error <= most * scale) return;
  ++failures;
  std::printf("%s, %s: %g of %g; N=%ld D=%ld V=%ld bias %d capped %d weighted %d some rows %d transposed %d threads %ld\n", plan, what,
              error, scale, long(p.all), long(p.d), long(p.v), p.o.bias, p.o.capped, p.o.weighted, p.o.some_rows, p.o.transposed,
              long(p.o.threads));
}

constexpr double kMost[] = {2e-5, 2e-2, 2e-3};  // of the largest gradient, by storage

template <typename Values>
void check_gradient(const char* plan, const char* what, const Problem& p, const Values& found, const Doubles& wanted, double most) {
  double error = 0.0, scale = 1e-30;
  for (size_t i = 0; i < wanted.size(); ++i) {
    const double difference = std::abs(widen(found[i]) - wanted[i]);
    error = difference == difference ? std::max(error, difference) : INFINITY;
    scale = std::max(scale, std::abs(wanted[i]));
  }
  compare(plan, what, p, error, scale, most);
}

void check_sums(const char* plan, const Problem& p) {
  double error = 0.0;
  for (int64_t r = 0; r < p.n; ++r) {
    double top = -INFINITY, sum = 0.0, weighted = 0.0;
    for (int64_t c = 0; c < p.v; ++c) top = std::max(top, p.z[r * p.v + c]), weighted += p.class_weight[c] * p.z[r * p.v + c];
    for (int64_t c = 0; c < p.v; ++c) sum += std::exp(p.z[r * p.v + c] - top);
    const double at = p.target[r] < 0 ? 0.0 : p.z[r * p.v + p.target[r]], lse = top + std::log(sum);
    const bool is_class = p.best[r] >= 0 && p.best[r] < p.v;
    for (double difference : {p.highest[r] - top, is_class ? p.z[r * p.v + p.best[r]] - top : NAN, p.target_logit[r] - at, p.lse[r] - lse, p.nll[r] - (lse - at),
                              p.o.weighted ? (p.weighted_sum[r] - weighted) / double(p.v) : 0.0})
      error = difference == difference ? std::max(error, std::abs(difference)) : INFINITY;
  }
  compare(plan, "sums", p, error, 1.0, 5e-5);
}

// A plan of steps, as plan.py makes them, of few rows at a time.
void check(const char* plan, Problem& p, std::vector<Step> steps, bool sums, bool gradients) {
  std::vector<float> workspace;
  int64_t size = 0, position = 0;
  for (Step& step : steps) {
    step.last = p.n, step.end = p.v;
    if (!step.rows) step.rows = p.n;
    if (!step.classes) step.classes = p.v;
    size = std::max(size, cce_workspace(&p.head, &step));
  }
  workspace.assign(size, NAN);
  p.head.workspace = workspace.data(), p.head.workspace_size = size;
  std::fill(p.target_logit.begin(), p.target_logit.end(), 0.0f);
  std::fill(p.best.begin(), p.best.end(), -1);
  std::fill(p.d_bias.begin(), p.d_bias.end(), 0.0f);
  std::fill(p.d_hidden.begin(), p.d_hidden.end(), number_of(0.0f));
  std::fill(p.d_weight.begin(), p.d_weight.end(), number_of(NAN));
  int32_t state = kMore;
  while (state == kMore) state = cce_run(&p.head, steps.data(), steps.size(), &position);
  compare(plan, "state", p, state, 1.0, 0.0);
  if (sums) check_sums(plan, p);
  if (!gradients) return;
  check_gradient(plan, "gradient of hidden", p, p.d_hidden, p.ref_hidden, kMost[STORAGE]);
  check_gradient(plan, "gradient of weight", p, p.d_weight, p.ref_weight, kMost[STORAGE]);
  check_gradient(plan, "gradient of bias", p, p.d_bias, p.ref_bias, kMost[STORAGE]);
}

#if STORAGE == 0
// The products of a block whose loss somebody else computes: logits, and the gradients that a gradient of the logits gives, the
// weight's added to what is there.
void check_products(Problem& p) {
  const int64_t rows = up(p.n, kFill);
  std::vector<float> logits(p.v * rows), hidden(rows * p.d), d_hidden(rows * p.d, NAN), d_weight(p.v * p.d, 1.0f), workspace;
  Doubles exact(p.v * rows), exact_hidden(rows * p.d), exact_weight(p.v * p.d, 1.0);
  for (int64_t r = 0; r < p.n; ++r)
    for (int64_t k = 0; k < p.d; ++k) hidden[r * p.d + k] = p.h(r, k);
  Head head{};
  head.weight = p.head.weight, head.weight_row = p.head.weight_row, head.weight_column = p.head.weight_column;
  head.hidden = hidden.data(), head.hidden_row = p.d, head.hidden_column = 1;
  head.classes = p.v, head.width = p.d, head.inner = head.outer = 1.0f;
  head.columns = p.head.columns, head.threads = p.o.threads, head.logits = logits.data();
  const auto take = [&](Step step) {
    int64_t position = 0;
    step.last = rows, step.rows = step.block = rows, step.end = step.classes = p.v;
    workspace.assign(cce_workspace(&head, &step), NAN);
    head.workspace = workspace.data(), head.workspace_size = workspace.size();
    compare("products", "state", p, cce_run(&head, &step, 1, &position), 1.0, 0.0);
  };
  Step first{}, second{};
  first.kind = kProducts, second.kind = kGiven;
  second.hidden = second.weights = second.adds = 1;
  take(first);
  for (int64_t c = 0; c < p.v; ++c)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = 0; k < p.d; ++k) exact[c * rows + r] += hidden[r * p.d + k] * p.w(c, k);
  check_gradient("products", "logits", p, logits, exact, kMost[0]);
  head.d_hidden = d_hidden.data(), head.d_weight = d_weight.data();
  for (int64_t i = 0; i < p.v * rows; ++i) logits[i] = float(i % 11) - 5.0f;
  take(second);
  for (int64_t c = 0; c < p.v; ++c)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = 0; k < p.d; ++k) {
        exact_hidden[r * p.d + k] += logits[c * rows + r] * p.w(c, k);
        exact_weight[c * p.d + k] += double(logits[c * rows + r]) * hidden[r * p.d + k];
      }
  check_gradient("products", "gradient of hidden", p, d_hidden, exact_hidden, kMost[0]);
  check_gradient("products", "gradient of weight", p, d_weight, exact_weight, kMost[0]);
}
#endif

Step step_of(int64_t kind, int64_t rows, int64_t block, bool hidden, bool weights, bool in_weight = false) {
  Step step{};
  step.kind = kind, step.rows = rows, step.block = block, step.hidden = hidden, step.weights = weights, step.in_weight = in_weight;
  return step;
}

void check_all(Problem& p) {
#if STORAGE == 0
  check_products(p);
#endif
  check("sums", p, {step_of(kSums, 0, 32, false, false)}, true, false);
  const bool together = !(p.o.capped && p.o.weighted);  // else no step makes both
  Step weights = step_of(kWeights, 0, 32, false, true), again = step_of(kGradients, 32, 16, true, STORAGE == 0);
  weights.classes = p.head.columns * p.o.threads;
  if (together) check("sums and gradient of hidden, then weights", p, {step_of(kSums, 64, 32, true, false), weights}, true, true);
  check("sums, then gradients", p,
        STORAGE == 0 ? std::vector<Step>{step_of(kSums, 0, 16, false, false), again}
                     : std::vector<Step>{step_of(kSums, 0, 16, false, false), again, weights}, true, true);
  if (STORAGE != 0 || !together) return;
  check("tiles", p, {step_of(kTiles, 48, 32, true, true)}, true, true);
  if (p.d < 16 || p.n > p.d / 16 * 16) return;
  check("tiles in the gradient", p, {step_of(kTiles, 0, 32, true, true, true)}, true, true);
}

}  // namespace

int main() {
  const int64_t shapes[][3] = {{1, 1, 1}, {3, 5, 7}, {40, 64, 100}, {75, 33, 61}, {130, 48, 257}, {20, 600, 15}};
  for (const auto& [n, d, v] : shapes)
    for (int64_t bits = 0; bits < 64; ++bits) {
      Problem p(n, d, v, {bool(bits & 1), bool(bits & 2), bool(bits & 4), bool(bits & 8), bool(bits & 16), bits & 32 ? 3 : 1});
      check_all(p);
    }
  std::printf("%d of %d checks failed; vectors of %d numbers, %d to a word\n", failures, checks, int(kLanes), kPack);
  return failures > 0;
}
