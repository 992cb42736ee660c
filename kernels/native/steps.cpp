// SPDX-License-Identifier: Apache-2.0
// The steps of a head with its loss: in comes a Call with some rows, out go their sums or gradients. plan.py chooses the steps of
// a problem, and run.py takes them.
//
// Each thread has columns of its own, in chunks whose weights stay in its cache: they are packed once, and serve the logits and
// the gradient of hidden; while they are multiplied the next are prefetched. What threads sum up over their columns is added in
// the threads' order, so that results repeat bit by bit with the same number of threads.
//
// The logits of a chunk and a row block are a tile (C, R): columns by rows, rows filled up to whole vectors. A step has several
// row blocks, so that what belongs to a row fits into the cache as well; the tiles of a chunk follow one another.

#include <chrono>
#include <utility>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

// --- sums, and the gradient of hidden on the way -----------------------------------------------------------------------------

struct Sums : Buffers {
  float *top, *shift, *sum, *lost, *at_target, *d_hidden;
  double* weighted;
  float* raised;  // 0 where a chunk has a larger logit than all before it, else -1
  int32_t* best;  // the class of the largest logit so far

  Sums(const Call& q, const Sizes& s, Workspace& workspace)
      : Buffers(q, s, !q.stores, s.block, workspace),
        top(workspace.take(s.block)),    // the largest logits so far
        shift(workspace.take(s.block)),  // the same, or 0
        sum(workspace.take(s.block)),    // of exponentials
        lost(workspace.take(s.block)),   // what it is too large by
        at_target(workspace.take(s.block)),
        d_hidden(q.d_hidden ? workspace.take(s.block * s.span) : nullptr),
        weighted(reinterpret_cast<double*>(workspace.take(q.weighted ? 2 * s.block : 0))),
        raised(workspace.take(s.block)),
        best(reinterpret_cast<int32_t*>(workspace.take(s.block))) {}
};

// tile = exp(z - shift), times the cap's slope where there is one; sum += their sum over the columns; weighted += sum w z.
// Where one class is nearly sure, its gradient is what the others add to a sum of one: each of their roundings would count.
// With kBest, best becomes the first class of the largest logit, where the chunk has raised that.
template <bool kCapped, bool kWeighted, bool kBest>
void exponentials(const Call& q, Columns columns, float* tile, int64_t rows, int64_t j, const Sums& own, bool keep) {
  constexpr int64_t kPiece = 8;  // columns that are added up in pairs, and then with what was lost before (Kahan)
  const Floats down = load(own.shift + j);
  Floats total = load(own.sum + j), lost = load(own.lost + j), wtotal = {}, best = Floats{} + kNever;
  float of_classes = 0.0f;
  const auto entry = [&](int64_t c) __attribute__((always_inline)) {
    float* const at = tile + c * rows + j;
    Floats z = load(at), slope = {};
    if (kCapped) {
      z = tanh_of(z);
      slope = 1.0f - z * z;
      z = rounded(z * q.outer);
    }
    const Floats x = z - down, e = exp_floor(x);
    if (kBest) {  // infinity less infinity is not below 0 either
      const Floats at = x < 0.0f ? Floats{} + kNever : Floats{} + float(c);
      best = at < best ? at : best;
    }
    if (kWeighted) {
      const float w = q.class_weight ? q.class_weight[columns.first + c] : 1.0f;
      wtotal += x * w;
      of_classes += w;
    }
    if (keep) store(at, kCapped ? e * slope : e);
    return e;
  };
  const auto add = [&](Floats part) __attribute__((always_inline)) {
    const Floats more = part - lost, sum = rounded(total + more);
    lost = rounded(sum - total) - more;
    total = sum;
  };
  const auto add_weighted = [&]() __attribute__((always_inline)) {
    for (int64_t i = 0; i < kLanes; ++i) own.weighted[j + i] += double(wtotal[i]) + double(of_classes) * double(down[i]);
    wtotal = Floats{};
    of_classes = 0.0f;
  };
  int64_t c = 0;
  for (; c + kPiece <= columns.count; c += kPiece) {
    Floats e[kPiece];
#pragma GCC unroll 16
    for (int64_t i = 0; i < kPiece; ++i) e[i] = entry(c + i);
    add(((e[0] + e[1]) + (e[2] + e[3])) + ((e[4] + e[5]) + (e[6] + e[7])));
    if (kWeighted) add_weighted();
  }
  for (; c < columns.count; ++c) add(entry(c));
  if (kWeighted) add_weighted();
  store(own.sum + j, total);
  store(own.lost + j, lost);
  for (int64_t i = 0; kBest && i < kLanes; ++i)
    if (own.raised[j + i] == 0.0f) own.best[j + i] = int32_t(columns.first + int64_t(best[i]));
}

template <bool kBest>
auto exponentials_for(const Call& q) {
  return q.capped ? (q.weighted ? exponentials<true, true, kBest> : exponentials<true, false, kBest>)
                  : (q.weighted ? exponentials<false, true, kBest> : exponentials<false, false, kBest>);
}

void take_exponentials(const Call& q, Columns columns, float* tile, int64_t rows, const Sums& own) {
  const Phase phase(kExponentials);
  const auto plain = exponentials_for<false>(q), with_best = exponentials_for<true>(q);
  for (int64_t j = 0; j < rows; j += kLanes)
    (q.best && sum_of(load(own.raised + j)) > -float(kLanes) ? with_best : plain)(q, columns, tile, rows, j, own, q.stores || q.d_hidden);
}

// Make what is summed up of a row relative to a larger logit.
void shrink(const Call& q, const Sizes& s, const RowBlock& block, const Sums& own, int64_t r, float factor) {
  own.sum[r] *= factor;
  own.lost[r] *= factor;
  if (q.d_hidden && r < block.count)
    for (int64_t k = 0; k < s.span; k += kPanel) {
      float* const at = own.d_hidden + k * block.padded + r * kPanel;
      store(at, load(at) * factor);
      store(at + kLanes, load(at + kLanes) * factor);
    }
}

// Take the largest logits so far from the largest products; earlier sums become relative to them.
void take_peaks(const Call& q, const Sizes& s, Columns columns, const float* tile, const RowBlock& block, const Sums& own) {
  const Phase phase(kExponentials);
  for (int64_t j = 0; j < block.padded; j += kLanes) {
    if (sum_of(load(own.odd + j)) != 0.0f) {  // the largest of them once more, with a NaN as the largest of all
      Floats top = load(own.peak + j);
      for (int64_t c = 0; c < columns.count; ++c) {
        const Floats z = load(tile + c * block.padded + j);
        for (int64_t i = 0; i < kLanes; ++i)
          if (z[i] != z[i] && top[i] == top[i]) own.best[j + i] = int32_t(columns.first + c);
        top = larger(z, top);
      }
      store(own.peak + j, top);
    }
    const Floats top = logit_of(q, load(own.peak + j)), before = load(own.top + j);
    const Floats shift = top == -INFINITY ? Floats{} : top;  // exponentials of a row without any finite logit are 0
    const Floats factor = exp_floor(before - shift);
    store(own.top + j, top);
    store(own.shift + j, shift);
    store(own.raised + j, top > before ? Floats{} : Floats{} - 1.0f);
    for (int64_t i = 0; i < kLanes; ++i)
      if (factor[i] != 1.0f && before[i] != -INFINITY) shrink(q, s, block, own, j + i, factor[i]);
  }
}

// One thread's sums of a row block, over its chunks.
void sum_up(const Call& q, const Sizes& s, const RowBlock& block, const float* packed, const RowState& state,
            const StoredTiles& stored, const Sums& own, Span chunks) {
  std::fill_n(own.peak, block.padded, -INFINITY);
  std::fill_n(own.top, block.padded, -INFINITY);
  std::fill_n(own.best, block.padded, 0);
  std::fill_n(own.sum, block.padded, 0.0f);
  std::fill_n(own.lost, block.padded, 0.0f);
  if (q.weighted) std::fill_n(own.weighted, block.padded, 0.0);
  if (q.d_hidden && chunks.first == chunks.last) std::fill_n(own.d_hidden, block.padded * s.span, 0.0f);
  for (int64_t chunk = chunks.first; chunk < chunks.last; ++chunk) {
    const Columns columns(q, chunk);
    float* const tile = q.stores ? block.of(stored.tile(q, s, chunk), q, s) : own.tile;
    copy_bias(q, columns, own.bias);
    make_logits(q, s, columns, packed, block.padded, own, tile);
    take_peaks(q, s, columns, tile, block, own);
    each_target(q, columns, block, [&](int64_t r, int64_t c) {
      const float x = tile[c * block.padded + r], t = q.capped ? tanh_of(x) : 0.0f;
      q.target_logit[q.first + block.first + r] = q.capped ? t * q.outer : x;
      state.slope[block.first + r] = 1.0f - t * t;
    });
    take_exponentials(q, columns, tile, block.padded, own);
    if (q.stores) std::copy_n(own.shift, block.padded, stored.shifts + chunk * s.rows + block.first);
    if (!q.d_hidden) continue;
    // Without the targets: p - 1 is more exact as a number than as what is left of two products.
    each_target(q, columns, block, [&](int64_t r, int64_t c) { own.at_target[r] = std::exchange(tile[c * block.padded + r], 0.0f); });
    pack_right(q, s, columns, own, true);
    add_hidden(q, s, columns, tile, block, 0, block.padded, own, own.d_hidden, chunk > chunks.first);
    if (q.stores) each_target(q, columns, block, [&](int64_t r, int64_t c) { tile[c * block.padded + r] = own.at_target[r]; });
  }
}

// --- the end of a row ----------------------------------------------------------------------------------------------------------

// The first `count` of a vector, or all.
void put_numbers(Number* to, int64_t count, Floats values) {
  if (count >= kLanes) return store_numbers(to, values);
  Number few[kLanes];
  store_numbers(few, values);
  std::copy_n(few, count, to);
}

// A row of the gradient of hidden: the sum over threads of their factor times what they hold, (D / panel, rows, panel), less
// what `less` says of numbers k and on. Not 0 where it is not finite.
template <typename Part, typename Less>
float put_hidden(const Call& q, const Sizes& s, Workspace workspace, int64_t number, int64_t r, int64_t rows, const float* factors, const Less& less) {
  Number* const out = q.d_hidden + (q.index ? q.index[number] : number) * q.width;
  Floats wrong = {};
  for (int64_t k = 0; k < q.width; k += kLanes) {
    Floats sum = {};
    for (int64_t t = 0; t < q.threads; ++t) {
      const float* const from = part_of<Part>(q, s, workspace, t).d_hidden + k / kPanel * kPanel * rows + r * kPanel + k % kPanel;
      sum += load(from) * (factors ? factors[t] : 1.0f);
    }
    wrong += sum * 0.0f;
    put_numbers(out + k, q.width - k, sum - less(k));
  }
  return sum_of(wrong);
}

// The sums of one row from those of the threads, and the gradient of hidden with its one-hot and uniform parts. Not 0 where
// something is not finite.
float finish_row(const Call& q, const Sizes& s, const RowBlock& block, const RowState& state, Workspace workspace, int64_t r) {
  const int64_t number = q.first + block.first + r, at = block.first + r;
  float top = -INFINITY, factors[kMostThreads];
  double total = 0.0, weighted = 0.0;
  int64_t highest = 0;  // the thread with the largest logit, the first of equals, a NaN being the largest
  for (int64_t t = 0; t < q.threads; ++t) {
    factors[t] = part_of<Sums>(q, s, workspace, t).top[r];
    if (factors[t] > top || (factors[t] != factors[t] && top == top)) top = factors[t], highest = t;
  }
  const float shift = top == -INFINITY ? 0.0f : top;
  for (int64_t t = 0; t < q.threads; ++t) {
    const Sums own = part_of<Sums>(q, s, workspace, t);
    factors[t] = std::exp(factors[t] - shift);
    total += (double(own.sum[r]) - double(own.lost[r])) * double(factors[t]);
    if (q.weighted) weighted += own.weighted[r];
  }
  const float sum = float(total);
  q.highest[number] = top;
  q.sumexp[number] = sum;
  if (q.weighted) q.weighted_sum[number] = weighted;
  if (q.best) q.best[number] = part_of<Sums>(q, s, workspace, highest).best[r];
  if (!q.prob) return 0.0f;
  const float ratio = q.prob[number] / sum, hit = q.hit[number] * state.slope[at];
  const float uniform = q.uniform ? q.uniform[number] : 0.0f;
  state.shift[at] = shift;
  state.ratio[at] = ratio;
  state.uniform[at] = uniform;
  const float wrong = 0.0f * top + 0.0f * ratio + 0.0f * hit;
  if (!q.d_hidden) return wrong;
  for (int64_t t = 0; t < q.threads; ++t) factors[t] *= ratio;
  const int64_t target = q.target[number];
  const float at_target = target < 0 ? 0.0f : hit - ratio * std::exp(q.target_logit[number] - shift) * state.slope[at];
  return wrong + put_hidden<Sums>(q, s, workspace, number, r, block.padded, factors, [&](int64_t k) {
    Floats less = {};
    if (target >= 0) less += vector_of(weight_of(q), target, k) * at_target;
    if (q.uniform) less += some_floats(q.uniform_weight + k, q.width - k) * uniform;
    return less;
  });
}

// --- gradients of weight and bias ------------------------------------------------------------------------------------------

#if STORAGE == 0
// By what a row's exponentials in the tiles of a chunk are multiplied to be prob p.
void take_factor(const Sizes& s, const RowState& state, const StoredTiles& stored, int64_t chunk, float* factor) {
  for (int64_t j = 0; j < s.rows; j += kLanes)
    store(factor + j, exp_floor(load(stored.shifts + chunk * s.rows + j) - load(state.shift + j)) * load(state.ratio + j));
}

struct FromTiles : Panels {
  float* factor;

  FromTiles(const Call& q, const Sizes& s, Workspace& workspace) : Panels(q, s, s.rows, workspace), factor(workspace.take(s.rows)) {}
};

// One thread's part, from the tiles that the sums have stored, which are used up.
void use_tiles(const Call& q, const Sizes& s, const RowState& state, const StoredTiles& stored, const FromTiles& own,
               Span chunks) {
  if (q.d_weight && own.all(s)) own.take(q, s, 0, q.rows, 0);
  for (int64_t chunk = chunks.last - 1; chunk >= chunks.first; --chunk) {
    const Columns columns(q, chunk);
    float* const tile = stored.tile(q, s, chunk);
    take_factor(s, state, stored, chunk, own.factor);
    for (int64_t n = 0; n < s.row_blocks(); ++n) {
      const RowBlock block(q, s, n);
      make_gradient(q, columns, block.of(tile, q, s), block, state, q.d_bias,
                    [&](Floats e, int64_t r) __attribute__((always_inline)) { return Pair{e * load(own.factor + r), Floats{} + 1.0f}; });
    }
    if (q.d_weight)
      add_weight(q, s, columns, {tile, 0, q.rows, s.block}, own, {q.d_weight + columns.first * q.width, q.width, q.width}, !q.fresh);
  }
}
#endif

struct Weights : Buffers, Panels {
  float *packed, *total;  // hidden of a block as right factor; d_weight (C, D) before it is rounded

  Weights(const Call& q, const Sizes& s, Workspace& workspace)
      : Buffers(q, s, true, s.block, workspace),
        Panels(q, s, s.block, workspace),
        packed(workspace.take(s.block * s.depth)),
        total(STORAGE == 0 || !q.d_weight ? nullptr : workspace.take(q.columns * s.span)) {}
};

// One thread's part, from logits that are made again: each chunk over all rows, and rounded once.
void make_weights(const Call& q, const Sizes& s, const RowState& state, const Weights& own, Span chunks) {
  const auto gradient = q.capped ? gradient_of<true> : gradient_of<false>;
  for (int64_t chunk = chunks.first; chunk < chunks.last; ++chunk) {
    const Columns columns(q, chunk);
    Number* const out = q.d_weight + columns.first * q.width;
#if STORAGE == 0
    const Target target = {out, q.width, q.width};
#else
    const Target target = {own.total, s.span, s.span};
#endif
    copy_bias(q, columns, own.bias);
    for (int64_t n = 0; n < s.row_blocks(); ++n) {
      const RowBlock block(q, s, n);
      pack_transposed(hidden_of(q), block.first, block.count, block.padded, s.depth, own.packed);
      make_logits(q, s, columns, own.packed, block.padded, own, own.tile);
      gradient(q, columns, own.tile, block, state, q.d_bias);
      if (!q.d_weight) continue;
      if (own.all(s)) own.take(q, s, block.first, block.count, 0);
      const float* const words = pair_rows(own.tile, columns.count, block.padded, own.words);
      add_weight(q, s, columns, {words, block.first, block.count, block.padded}, own, target, n > 0 || (STORAGE == 0 && !q.fresh));
    }
#if STORAGE != 0
    for (int64_t c = 0; q.d_weight && c < columns.count; ++c)
      for (int64_t k = 0; k < q.width; k += kLanes) put_numbers(out + c * q.width + k, q.width - k, load(own.total + c * s.span + k));
#endif
  }
}

// The gradient of hidden as the sum of what the threads hold.
template <typename Part>
void add_threads(const Call& q, const Sizes& s, Workspace workspace) {
  if (!q.d_hidden) return;
#pragma omp parallel for schedule(static) num_threads(q.threads) if (q.threads > 1)
  for (int64_t r = 0; r < q.rows; ++r)
    put_hidden<Part>(q, s, workspace, q.first + r, r, s.rows, nullptr, [](int64_t) { return Floats{}; });
}

// --- gradients from sums that are known ----------------------------------------------------------------------------------

struct Gradients : Buffers, Panels {
  float* d_hidden;

  Gradients(const Call& q, const Sizes& s, Workspace& workspace)
      : Buffers(q, s, !q.given, s.rows, workspace), Panels(q, s, s.rows, workspace), d_hidden(q.d_hidden ? workspace.take(s.rows * s.span) : nullptr) {}
};

// One thread's part of all gradients; in half precision of hidden's alone, since those of the weight cannot be added to.
void make_again(const Call& q, const Sizes& s, const float* packed, const RowState& state, const Gradients& own, Span chunks) {
  const auto gradient = q.capped ? gradient_of<true> : gradient_of<false>;
  if (q.d_hidden && chunks.first == chunks.last) std::fill_n(own.d_hidden, s.rows * s.span, 0.0f);
  if (q.d_weight && own.all(s)) own.take(q, s, 0, q.rows, 0);
  for (int64_t chunk = chunks.first; chunk < chunks.last; ++chunk) {
    const Columns columns(q, chunk);
    copy_bias(q, columns, own.bias);
    for (int64_t n = 0; n < s.row_blocks(); ++n) {
      const RowBlock block(q, s, n);
      float* const tile = block.of(own.tile, q, s);
      make_logits(q, s, columns, packed + block.first * s.depth, block.padded, own, tile, n > 0 && both_factors(q));
      gradient(q, columns, tile, block, state, q.d_bias);
      if (!q.d_hidden) continue;
      if (n == 0) pack_right(q, s, columns, own, true);
      add_hidden(q, s, columns, tile, block, block.first, s.rows, own, own.d_hidden, chunk > chunks.first);
    }
#if STORAGE == 0
    if (q.d_weight)
      add_weight(q, s, columns, {own.tile, 0, q.rows, s.block}, own, {q.d_weight + columns.first * q.width, q.width, q.width}, !q.fresh);
#endif
  }
}

#if STORAGE == 0
// --- products apart from their loss ------------------------------------------------------------------------------------------

struct Products : Buffers {
  Products(const Call& q, const Sizes& s, Workspace& workspace) : Buffers(q, s, false, 0, workspace) {}
};

// The logits of one row block, for a loss that somebody else computes.
void make_products(const Call& q) {
  const Sizes s(q);
  Workspace workspace{q.workspace};
  float* const packed = workspace.take(s.rows * s.depth);
  pack_transposed(hidden_of(q), 0, q.rows, s.rows, s.depth, packed);
  in_threads(q, s, [&](int64_t t, Span chunks) {
    const auto own = part_of<Products>(q, s, workspace, t);
    std::fill_n(own.peak, s.rows, -INFINITY);
    for (int64_t chunk = chunks.first; chunk < chunks.last; ++chunk) {
      const Columns columns(q, chunk);
      copy_bias(q, columns, own.bias);
      make_logits(q, s, columns, packed, s.rows, own, q.logits + columns.first * s.rows);
    }
  });
}

// The gradients of hidden and weight from that of the products, which lies where the logits were.
void use_given(const Call& q) {
  const Sizes s(q);
  Workspace workspace{q.workspace};
  const RowBlock block(q, s, 0);
  in_threads(q, s, [&](int64_t t, Span chunks) {
    const auto own = part_of<Gradients>(q, s, workspace, t);
    if (q.d_hidden && chunks.first == chunks.last) std::fill_n(own.d_hidden, s.rows * s.span, 0.0f);
    if (q.d_weight && own.all(s)) own.take(q, s, 0, q.rows, 0);
    for (int64_t chunk = chunks.first; chunk < chunks.last; ++chunk) {
      const Columns columns(q, chunk);
      const float* const tile = q.logits + columns.first * s.rows;
      if (q.d_hidden) {
        pack_right(q, s, columns, own, false);
        add_hidden(q, s, columns, tile, block, 0, s.rows, own, own.d_hidden, chunk > chunks.first);
      }
      if (q.d_weight)
        add_weight(q, s, columns, {tile, 0, q.rows, s.rows}, own, {q.d_weight + columns.first * q.width, q.width, q.width}, !q.fresh);
    }
  });
  add_threads<Gradients>(q, s, workspace);
}
#endif

// --- calls -----------------------------------------------------------------------------------------------------------------

// How many numbers the workspace of a call has to have.
int64_t size_of(const Call& q, int64_t kind) {
  const Sizes s(q);
  Workspace workspace{nullptr};
#if STORAGE == 0
  if (kind == kGiven) return size_with<Gradients>(q, s, workspace);
  if (kind == kProducts) {
    workspace.take(s.rows * s.depth);
    return size_with<Products>(q, s, workspace);
  }
#endif
  const RowState state(s, workspace);
  if (kind == kWeights) return size_with<Weights>(q, s, workspace);
  const StoredTiles stored(q, s, workspace);
  Workspace more = workspace;
  more.take((kind == kGradients ? s.rows : s.block) * s.depth);
  if (kind == kGradients) return size_with<Gradients>(q, s, more);
#if STORAGE == 0
  return std::max(size_with<Sums>(q, s, more), size_with<FromTiles>(q, s, workspace));
#else
  return size_with<Sums>(q, s, more);
#endif
}

// Sums of the rows, the gradient of hidden where it is wanted, and stored tiles. Whether all that is finite.
bool make_sums(const Call& q) {
  const Sizes s(q);
  Workspace workspace{q.workspace};
  const RowState state(s, workspace);
  const StoredTiles stored(q, s, workspace);
  state.begin(s);
  float* const packed = workspace.take(s.block * s.depth);
  float wrong = 0.0f;
  for (int64_t n = 0; n < s.row_blocks(); ++n) {
    const RowBlock block(q, s, n);
    pack_transposed(hidden_of(q), block.first, block.count, block.padded, s.depth, packed);
    in_threads(q, s, [&](int64_t t, Span chunks) {
      sum_up(q, s, block, packed, state, stored, part_of<Sums>(q, s, workspace, t), chunks);
    });
#pragma omp parallel for schedule(static) num_threads(q.threads) reduction(+ : wrong) if (q.threads > 1)
    for (int64_t r = 0; r < block.count; ++r) {
      const Phase phase(kHiddenGradient);
      wrong += finish_row(q, s, block, state, workspace, r);
    }
  }
  return wrong == 0.0f;
}

#if STORAGE == 0
// The gradients of weight and bias from stored tiles.
void use_stored(const Call& q) {
  const Sizes s(q);
  Workspace workspace{q.workspace};
  const RowState state(s, workspace);
  const StoredTiles stored(q, s, workspace);
  if (kGuard > 0) take_guards(q.workspace + workspace.used, size_of(q, kTiles) - workspace.used);  // of the sums
  in_threads(q, s, [&](int64_t t, Span chunks) {
    use_tiles(q, s, state, stored, part_of<FromTiles>(q, s, workspace, t), chunks);
  });
}
#endif

// The gradients of weight and bias from `highest` and `sumexp`.
void make_weights(const Call& q) {
  const Sizes s(q);
  Workspace workspace{q.workspace};
  const RowState state(s, workspace);
  state.take_norm(q, s);
  in_threads(q, s, [&](int64_t t, Span chunks) { make_weights(q, s, state, part_of<Weights>(q, s, workspace, t), chunks); });
}

// All gradients that are wanted from `highest` and `sumexp`; not that of a weight in half precision.
void make_gradients(const Call& q) {
  const Sizes s(q);
  Workspace workspace{q.workspace};
  const RowState state(s, workspace);
  state.take_norm(q, s);
  float* const packed = workspace.take(s.rows * s.depth);
  for (int64_t n = 0; n < s.row_blocks(); ++n) {
    const RowBlock block(q, s, n);
    pack_transposed(hidden_of(q), block.first, block.count, block.padded, s.depth, packed + block.first * s.depth);
  }
  in_threads(q, s, [&](int64_t t, Span chunks) {
    make_again(q, s, packed, state, part_of<Gradients>(q, s, workspace, t), chunks);
  });
  add_threads<Gradients>(q, s, workspace);
}

// Whether what was made is finite, where that has to be known.
bool make(const Call& q, int64_t kind) {
  bool finite = true;
  if (kind == kWeights) {
    make_weights(q);
  } else if (kind == kGradients) {
    make_gradients(q);
#if STORAGE == 0
  } else if (kind == kProducts) {
    make_products(q);
  } else if (kind == kGiven) {
    use_given(q);
#endif
  } else {
    finite = make_sums(q) || !(q.d_hidden || q.stores);
#if STORAGE == 0
    if (finite && kind == kTiles) use_stored(q);
#endif
  }
  if (kGuard > 0) take_guards(q.workspace, size_of(q, kind));
  return finite;
}

// The loss of each row and the logarithm of its sum, from its sums.
void finish(const Head& head, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) {
    const float highest = head.highest[r], log_sum = std::log(head.sumexp[r]);
    // The difference first: lse - z_t would cancel the leading digits of two large numbers.
    head.nll[r] = (highest - head.target_logit[r]) + log_sum;
    head.lse[r] = std::isinf(highest) ? highest : highest + log_sum;
  }
}

// Large pages, where the system has them: memory that is new costs a fault for each page of 4 KiB when it is written.
void ask_for_large_pages(void* memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(memory) + bytes) / kPage * kPage;
  if (memory && first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

}  // namespace

extern "C" {

enum State { kDone, kMore, kNotFinite };

// Take steps from piece number `position` of all of theirs on, for half a second, so that whoever waits may interrupt.
int32_t cce_run(const Head* head, const Step* steps, int64_t count, int64_t* position) {
  if (*position == 0) {
    ask_for_large_pages(head->d_weight, head->classes * head->width * sizeof(Number));
    ask_for_large_pages(head->workspace, head->workspace_size * sizeof(float));
  }
  const auto begin = std::chrono::steady_clock::now();
  int64_t before = 0;
  for (int64_t i = 0; i < count; before += pieces(steps[i++]))
    for (; *position < before + pieces(steps[i]); ++*position) {
      if (std::chrono::steady_clock::now() - begin > std::chrono::milliseconds(500)) return kMore;
      if (!make(Call(*head, steps[i], *position - before), steps[i].kind)) return kNotFinite;
    }
  if (head->nll) finish(*head, steps[count - 1].last);
  return kDone;
}

// Whether each target (n,) is one of the classes.
int32_t cce_are_classes(const int64_t* target, int64_t n, int64_t classes) {
  bool all = true;
  for (int64_t r = 0; r < n; ++r) all &= uint64_t(target[r]) < uint64_t(classes);
  return all;
}

// How many numbers the workspace of a step has to have.
int64_t cce_workspace(const Head* head, const Step* step) { return size_of(Call(*head, *step, 0), step->kind); }

#ifdef PHASES
// Ticks in each phase since the last call.
void cce_phases(int64_t* ticks) {
  for (int i = 0; i < kPhases; ++i) ticks[i] = phase_ticks[i].exchange(0);
}

int64_t cce_ticks() { return ticks_now(); }
#endif

// For the other side to compare.
int64_t cce_head_size() { return sizeof(Head); }
int64_t cce_step_size() { return sizeof(Step); }

}  // extern "C"
