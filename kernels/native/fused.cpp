// SPDX-License-Identifier: Apache-2.0
// A head with its loss: block of rows by block of rows, chunk of columns by chunk of columns. See fused.py.
//
// Each thread has columns of its own, in chunks whose weights stay in its cache: they are copied once, and serve the logits and
// the gradient of hidden; while they are multiplied the next are asked for. What threads sum up over their columns is added in
// the threads' order, so that results repeat bit by bit with the same number of threads.
//
// The logits of a chunk are a tile (C, R): columns by rows, rows filled up to whole vectors. A block of many rows is divided
// into stretches, whose tiles follow one another, so that what belongs to a row fits into the cache as well.

#include <utility>

namespace {

// --- sums, and the gradient of hidden on the way -----------------------------------------------------------------------------

struct Sums : Own {
  float *top, *shift, *sum, *lost, *at_target, *d_hidden;
  double* weighted;

  Sums(const Call& q, const Sizes& s, Room& room)
      : Own(q, s, !q.tiles, s.stretch, room),
        top(room.take(s.stretch)),    // the largest logits so far
        shift(room.take(s.stretch)),  // the same, or 0
        sum(room.take(s.stretch)),    // of exponentials
        lost(room.take(s.stretch)),   // what it is too large by
        at_target(room.take(s.stretch)),
        d_hidden(q.d_hidden ? room.take(s.stretch * s.span) : nullptr),
        weighted(reinterpret_cast<double*>(room.take(q.weighted ? 2 * s.stretch : 0))) {}
};

// tile = exp(z - shift), times the cap's slope where there is one; sum += their sum over the columns; weighted += sum w z.
// Where one class is nearly sure, its gradient is what the others add to a sum of one: each of their roundings would count.
template <bool kCapped, bool kWeighted>
void exponentials(const Call& q, Columns columns, float* tile, int64_t rows, const Sums& own, bool keep) {
  constexpr int64_t kPiece = 8;  // columns that are added up in pairs, and then with what was lost before (Kahan)
  for (int64_t j = 0; j < rows; j += kLanes) {
    const Floats down = load(own.shift + j);
    Floats total = load(own.sum + j), lost = load(own.lost + j), wtotal = {};
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
  }
}

void take_exponentials(const Call& q, Columns columns, float* tile, int64_t rows, const Sums& own) {
  const auto walk = q.capped ? (q.weighted ? exponentials<true, true> : exponentials<true, false>)
                             : (q.weighted ? exponentials<false, true> : exponentials<false, false>);
  walk(q, columns, tile, rows, own, q.tiles || q.d_hidden);
}

// Make what is summed up of a row relative to a larger logit.
void shrink(const Call& q, const Sizes& s, const Stretch& stretch, const Sums& own, int64_t r, float factor) {
  own.sum[r] *= factor;
  own.lost[r] *= factor;
  if (q.d_hidden && r < stretch.count)
    for (int64_t k = 0; k < s.span; k += kPanel) {
      float* const at = own.d_hidden + k * stretch.padded + r * kPanel;
      store(at, load(at) * factor);
      store(at + kLanes, load(at + kLanes) * factor);
    }
}

// Take the largest logits so far from the largest products; earlier sums become relative to them.
void take_peaks(const Call& q, const Sizes& s, const Stretch& stretch, const Sums& own) {
  for (int64_t j = 0; j < stretch.padded; j += kLanes) {
    const Floats top = logit_of(q, load(own.peak + j)), before = load(own.top + j);
    const Floats shift = top == -INFINITY ? Floats{} : top;  // exponentials of a row without any finite logit are 0
    const Floats factor = exp_floor(before - shift);
    store(own.top + j, top);
    store(own.shift + j, shift);
    for (int64_t i = 0; i < kLanes; ++i)
      if (factor[i] != 1.0f && before[i] != -INFINITY) shrink(q, s, stretch, own, j + i, factor[i]);
  }
}

// One thread's sums of a stretch, over its chunks.
void sum_up(const Call& q, const Sizes& s, const Stretch& stretch, const float* turned, const Known& known, const Sums& own,
            Span chunks) {
  std::fill_n(own.peak, stretch.padded, -INFINITY);
  std::fill_n(own.top, stretch.padded, -INFINITY);
  std::fill_n(own.sum, stretch.padded, 0.0f);
  std::fill_n(own.lost, stretch.padded, 0.0f);
  if (q.weighted) std::fill_n(own.weighted, stretch.padded, 0.0);
  if (q.d_hidden && chunks.first == chunks.last) std::fill_n(own.d_hidden, stretch.padded * s.span, 0.0f);
  for (int64_t chunk = chunks.first; chunk < chunks.last; ++chunk) {
    const Columns columns(q, chunk);
    float* const tile = q.tiles ? stretch.of(q.tiles[chunk], q, s) : own.tile;
    copy_bias(q, columns, own.bias);
    make_logits(q, s, columns, turned, stretch.padded, own, tile, true);
    take_peaks(q, s, stretch, own);
    each_hit(q, columns, stretch, [&](int64_t r, int64_t c) {
      const float x = tile[c * stretch.padded + r], t = q.capped ? tanh_of(x) : 0.0f;
      q.target_logit[q.first + stretch.first + r] = q.capped ? t * q.outer : x;
      known.slope[stretch.first + r] = 1.0f - t * t;
    });
    take_exponentials(q, columns, tile, stretch.padded, own);
    if (q.shifts) std::copy_n(own.shift, stretch.padded, q.shifts + chunk * s.rows + stretch.first);
    if (!q.d_hidden) continue;
    // Without the targets: p - 1 is more exact as a number than as what is left of two products.
    each_hit(q, columns, stretch, [&](int64_t r, int64_t c) { own.at_target[r] = std::exchange(tile[c * stretch.padded + r], 0.0f); });
    copy_right(q, s, columns, own);
    add_hidden(q, s, columns, tile, stretch, 0, stretch.padded, own, own.d_hidden, chunk > chunks.first);
    if (q.tiles) each_hit(q, columns, stretch, [&](int64_t r, int64_t c) { tile[c * stretch.padded + r] = own.at_target[r]; });
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
float put_hidden(const Call& q, const Sizes& s, Room room, int64_t number, int64_t r, int64_t rows, const float* factors, const Less& less) {
  Number* const out = q.d_hidden + (q.index ? q.index[number] : number) * q.width;
  Floats wrong = {};
  for (int64_t k = 0; k < q.width; k += kLanes) {
    Floats sum = {};
    for (int64_t t = 0; t < q.threads; ++t) {
      const float* const from = part_of<Part>(q, s, room, t).d_hidden + k / kPanel * kPanel * rows + r * kPanel + k % kPanel;
      sum += load(from) * (factors ? factors[t] : 1.0f);
    }
    wrong += sum * 0.0f;
    put_numbers(out + k, q.width - k, sum - less(k));
  }
  return sum_of(wrong);
}

// The gradient of hidden of all rows of a block, from what threads hold for the block, less what `less` says of row number
// `number` and numbers k and on.
template <typename Part, typename Less>
void put_block(const Call& q, const Sizes& s, Room room, const Less& less) {
  if (!q.d_hidden) return;
#pragma omp parallel for schedule(static) num_threads(q.threads) if (q.threads > 1)
  for (int64_t r = 0; r < q.rows; ++r) {
    const int64_t number = q.first + r;
    put_hidden<Part>(q, s, room, number, r, s.rows, nullptr, [&](int64_t k) { return less(number, k); });
  }
}

// The sums of one row from those of the threads, and the gradient of hidden with its one-hot and uniform parts. Not 0 where
// something is not finite.
float finish_row(const Call& q, const Sizes& s, const Stretch& stretch, const Known& known, Room room, int64_t r) {
  const int64_t number = q.first + stretch.first + r, at = stretch.first + r;
  float top = -INFINITY, factors[kMostThreads];
  double total = 0.0, weighted = 0.0;
  for (int64_t t = 0; t < q.threads; ++t) {
    factors[t] = part_of<Sums>(q, s, room, t).top[r];
    top = factors[t] > top || factors[t] != factors[t] ? factors[t] : top;
  }
  const float shift = top == -INFINITY ? 0.0f : top;
  for (int64_t t = 0; t < q.threads; ++t) {
    const Sums own = part_of<Sums>(q, s, room, t);
    factors[t] = std::exp(factors[t] - shift);
    total += (double(own.sum[r]) - double(own.lost[r])) * double(factors[t]);
    if (q.weighted) weighted += own.weighted[r];
  }
  const float sum = float(total);
  q.highest[number] = top;
  q.sumexp[number] = sum;
  if (q.weighted) q.weighted_sum[number] = float(weighted - q.weight_total * double(shift));
  if (!q.prob) return 0.0f;
  const float ratio = q.prob[number] / sum, hit = q.hit[number] * known.slope[at];
  const float uniform = q.uniform ? q.uniform[number] : 0.0f;
  known.shift[at] = shift;
  known.ratio[at] = ratio;
  known.uniform[at] = uniform;
  const float wrong = 0.0f * top + 0.0f * ratio + 0.0f * hit;
  if (!q.d_hidden) return wrong;
  for (int64_t t = 0; t < q.threads; ++t) factors[t] *= ratio;
  const int64_t target = q.target[number];
  const float at_target = target < 0 ? 0.0f : hit - ratio * std::exp(q.target_logit[number] - shift) * known.slope[at];
  return wrong + put_hidden<Sums>(q, s, room, number, r, stretch.padded, factors, [&](int64_t k) {
    Floats less = {};
    if (target >= 0) less += vector_of(weight_of(q), target, k) * at_target;
    if (q.uniform) less += some_floats(q.uniform_weight + k, q.width - k) * uniform;
    return less;
  });
}

// --- gradients of weight and bias ------------------------------------------------------------------------------------------

#if STORAGE == 0
// By what a row's exponentials in the tiles of a chunk are multiplied to be prob p.
void take_factor(const Call& q, const Sizes& s, const Known& known, int64_t chunk, float* factor) {
  for (int64_t j = 0; j < s.rows; j += kLanes)
    store(factor + j, exp_floor(load(q.shifts + chunk * s.rows + j) - load(known.shift + j)) * load(known.ratio + j));
}

struct Kept : Panels {
  float* factor;

  Kept(const Call& q, const Sizes& s, Room& room) : Panels(q, s, s.rows, room), factor(room.take(s.rows)) {}
};

// One thread's part, from the tiles that the sums have kept. The last chunk first: a tile may lie where the gradient of the
// chunk before it goes.
void use_tiles(const Call& q, const Sizes& s, const Known& known, const Kept& own, Span chunks) {
  if (q.d_weight && own.all(s)) own.take(q, s, 0, q.rows, 0);
  for (int64_t chunk = chunks.last - 1; chunk >= chunks.first; --chunk) {
    const Columns columns(q, chunk);
    take_factor(q, s, known, chunk, own.factor);
    for (int64_t n = 0; n < s.stretches(); ++n) {
      const Stretch stretch(q, s, n);
      make_gradient(q, columns, stretch.of(q.tiles[chunk], q, s), stretch, known, q.d_bias,
                    [&](Floats e, int64_t r) __attribute__((always_inline)) { return Pair{e * load(own.factor + r), Floats{} + 1.0f}; });
    }
    if (q.d_weight)
      add_weight(q, s, columns, {q.tiles[chunk], 0, q.rows, s.stretch}, own, {q.d_weight + columns.first * q.width, q.width, q.width, nullptr}, !q.fresh);
  }
}
#endif

struct Weights : Own, Panels {
  float *turned, *total;  // hidden of a stretch as right factor; d_weight (C, D) before it is rounded

  Weights(const Call& q, const Sizes& s, Room& room)
      : Own(q, s, true, s.stretch, room),
        Panels(q, s, s.stretch, room),
        turned(room.take(s.stretch * s.depth)),
        total(STORAGE == 0 || !q.d_weight ? nullptr : room.take(q.columns * s.span)) {}
};

// One thread's part, from logits that are made again: each chunk over all rows, and rounded once.
void make_weights(const Call& q, const Sizes& s, const Known& known, const Weights& own, Span chunks) {
  const auto gradient = q.capped ? gradient_of<true> : gradient_of<false>;
  for (int64_t chunk = chunks.first; chunk < chunks.last; ++chunk) {
    const Columns columns(q, chunk);
    Number* const out = q.d_weight + columns.first * q.width;
#if STORAGE == 0
    const Target target = {out, q.width, q.width, nullptr};
#else
    const Target target = {own.total, s.span, s.span, nullptr};
#endif
    copy_bias(q, columns, own.bias);
    for (int64_t n = 0; n < s.stretches(); ++n) {
      const Stretch stretch(q, s, n);
      copy_turned(hidden_of(q), stretch.first, stretch.count, stretch.padded, s.depth, own.turned);
      make_logits(q, s, columns, own.turned, stretch.padded, own, own.tile, n == 0);
      gradient(q, columns, own.tile, stretch, known, q.d_bias);
      if (!q.d_weight) continue;
      if (own.all(s)) own.take(q, s, stretch.first, stretch.count, 0);
      const float* const words = pair_rows(own.tile, columns.count, stretch.padded, own.words);
      add_weight(q, s, columns, {words, stretch.first, stretch.count, stretch.padded}, own, target, n > 0 || (STORAGE == 0 && !q.fresh));
    }
#if STORAGE != 0
    for (int64_t c = 0; q.d_weight && c < columns.count; ++c)
      for (int64_t k = 0; k < q.width; k += kLanes) put_numbers(out + c * q.width + k, q.width - k, load(own.total + c * s.span + k));
#endif
  }
}

// --- gradients from sums that are known -----------------------------------------------------------------------------------

struct Again : Own, Panels {
  float* d_hidden;

  Again(const Call& q, const Sizes& s, Room& room)
      : Own(q, s, true, s.rows, room), Panels(q, s, s.rows, room), d_hidden(q.d_hidden ? room.take(s.rows * s.span) : nullptr) {}
};

// One thread's part of all gradients; in half precision of hidden's alone, since those of the weight cannot be added to.
void make_again(const Call& q, const Sizes& s, const float* turned, const Known& known, const Again& own, Span chunks) {
  const auto gradient = q.capped ? gradient_of<true> : gradient_of<false>;
  if (q.d_hidden && chunks.first == chunks.last) std::fill_n(own.d_hidden, s.rows * s.span, 0.0f);
  if (q.d_weight && own.all(s)) own.take(q, s, 0, q.rows, 0);
  for (int64_t chunk = chunks.first; chunk < chunks.last; ++chunk) {
    const Columns columns(q, chunk);
    copy_bias(q, columns, own.bias);
    for (int64_t n = 0; n < s.stretches(); ++n) {
      const Stretch stretch(q, s, n);
      float* const tile = stretch.of(own.tile, q, s);
      make_logits(q, s, columns, turned + stretch.first * s.depth, stretch.padded, own, tile, n == 0);
      gradient(q, columns, tile, stretch, known, q.d_bias);
      if (!q.d_hidden) continue;
      if (n == 0) copy_right(q, s, columns, own);
      add_hidden(q, s, columns, tile, stretch, stretch.first, s.rows, own, own.d_hidden, chunk > chunks.first);
    }
#if STORAGE == 0
    if (q.d_weight)
      add_weight(q, s, columns, {own.tile, 0, q.rows, s.stretch}, own, {q.d_weight + columns.first * q.width, q.width, q.width, nullptr}, !q.fresh);
#endif
  }
}

}  // namespace

extern "C" {

// Sums of the rows, the gradient of hidden where it is wanted, and tiles of exponentials where there are places for them.
// Whether all that is finite; what is not is for others to make gradients of.
int32_t cce_sums(const Call* call) {
  const Call& q = *call;
  const Sizes s(q);
  Room room{q.room};
  const Known known(s, room);
  known.begin(s);
  float* const turned = room.take(s.stretch * s.depth);
  float wrong = 0.0f;
  for (int64_t n = 0; n < s.stretches(); ++n) {
    const Stretch stretch(q, s, n);
    copy_turned(hidden_of(q), stretch.first, stretch.count, stretch.padded, s.depth, turned);
    in_threads(q, s, [&](int64_t t, Span chunks) { sum_up(q, s, stretch, turned, known, part_of<Sums>(q, s, room, t), chunks); });
#pragma omp parallel for schedule(static) num_threads(q.threads) reduction(+ : wrong) if (q.threads > 1)
    for (int64_t r = 0; r < stretch.count; ++r) wrong += finish_row(q, s, stretch, known, room, r);
  }
  return wrong == 0.0f;
}

#if STORAGE == 0
// The gradients of weight and bias from the tiles that cce_sums left, which are used up.
void cce_tiles(const Call* call) {
  const Call& q = *call;
  const Sizes s(q);
  Room room{q.room};
  const Known known(s, room);
  in_threads(q, s, [&](int64_t t, Span chunks) { use_tiles(q, s, known, part_of<Kept>(q, s, room, t), chunks); });
}
#endif

// The gradients of weight and bias from `highest` and `sumexp`.
void cce_weights(const Call* call) {
  const Call& q = *call;
  const Sizes s(q);
  Room room{q.room};
  const Known known(s, room);
  known.take_norm(q, s);
  in_threads(q, s, [&](int64_t t, Span chunks) { make_weights(q, s, known, part_of<Weights>(q, s, room, t), chunks); });
}

// All gradients that are wanted from `highest` and `sumexp`; not that of a weight in half precision.
void cce_gradients(const Call* call) {
  const Call& q = *call;
  const Sizes s(q);
  Room room{q.room};
  const Known known(s, room);
  known.take_norm(q, s);
  float* const turned = room.take(s.rows * s.depth);
  for (int64_t n = 0; n < s.stretches(); ++n) {
    const Stretch stretch(q, s, n);
    copy_turned(hidden_of(q), stretch.first, stretch.count, stretch.padded, s.depth, turned + stretch.first * s.depth);
  }
  in_threads(q, s, [&](int64_t t, Span chunks) { make_again(q, s, turned, known, part_of<Again>(q, s, room, t), chunks); });
  put_block<Again>(q, s, room, [](int64_t, int64_t) { return Floats{}; });
}

}  // extern "C"
