// SPDX-License-Identifier: Apache-2.0
// Gradients of the classes that matter, from tiles that cce_sums has left: filtered.py has the bound. First each class gets a
// level by its mean probability. When it is known down to which level classes are kept, their columns of a tile are moved
// together and multiplied with their rows of the weight, and with hidden for their rows of the gradient of the weight.

#if STORAGE == 0

namespace {

// visit(vector, first of its rows) for a column of a chunk's tiles.
template <typename Visit>
INLINE void each_vector(const Call& q, const Sizes& s, int64_t chunk, int64_t c, const Visit& visit) {
  for (int64_t n = 0; n < s.stretches(); ++n) {
    const Stretch stretch(q, s, n);
    float* const column = stretch.of(q.tiles[chunk], q, s) + c * stretch.padded;
    for (int64_t j = 0; j < stretch.padded; j += kLanes) visit(column + j, stretch.first + j);
  }
}

struct Levels {
  float *factor, *mass;  // (R,), (kLevels, R)

  Levels(const Call&, const Sizes& s, Room& room) : factor(room.take(s.rows)), mass(room.take(kLevels * s.rows)) {}
};

// One thread's classes, with p = tile * |prob| / (sumexp top): sum p over the rows, the level of its mean, or 0 for a target,
// and for each level and row the sum of its p.
void find_levels(const Call& q, const Sizes& s, const Known& known, const Levels& own, Span chunks) {
  std::fill_n(own.mass, kLevels * s.rows, 0.0f);
  for (int64_t chunk = chunks.first; chunk < chunks.last; ++chunk) {
    const Columns columns(q, chunk);
    uint8_t* const levels = q.levels + columns.first;
    std::fill_n(levels, columns.count, uint8_t(0));
    for (int64_t n = 0; n < s.stretches(); ++n)
      each_hit(q, columns, Stretch(q, s, n), [&](int64_t, int64_t c) { levels[c] = 1; });
    take_factor(q, s, known, chunk, own.factor);
    for (int64_t j = 0; j < s.rows; j += kLanes) {
      const Floats factor = load(own.factor + j) * (1.0f / q.top);
      store(own.factor + j, factor < 0.0f ? -factor : factor);
    }
    for (int64_t c = 0; c < columns.count; ++c) {
      Floats total = {};
      each_vector(q, s, chunk, c, [&](float* at, int64_t r) __attribute__((always_inline)) { total += load(at) * load(own.factor + r); });
      const float sum = sum_of(total);
      levels[c] = levels[c] ? 0 : level_of(sum / q.rows);
      q.class_sums[columns.first + c] = sum;
      float* const into = own.mass + levels[c] * s.rows;
      each_vector(q, s, chunk, c, [&](float* at, int64_t r) __attribute__((always_inline)) {
        store(into + r, load(into + r) + load(at) * load(own.factor + r));
      });
    }
  }
}

struct Chosen : Own, Panels {
  float *factor, *d_hidden;
  int64_t *index, *places;  // (C,) kept columns of a chunk, and where among them each of its columns is

  Chosen(const Call& q, const Sizes& s, Room& room)
      : Own(q, s, false, s.rows, room),
        Panels(q, s, s.rows, room),
        factor(room.take(s.rows)),
        d_hidden(q.d_hidden ? room.take(s.rows * s.span) : nullptr),
        index(reinterpret_cast<int64_t*>(room.take(2 * q.columns))),
        places(reinterpret_cast<int64_t*>(room.take(2 * q.columns))) {}
};

// Move the columns of a chunk's tiles that are in `keep` (V,) together, times `factor` where there is one. Which classes the
// columns are is told by own.index (count,), and afterwards by the beginning of it; how many they are then.
int64_t keep_columns(const Call& q, const Sizes& s, int64_t chunk, const uint8_t* keep, int64_t count, const Chosen& own, const float* factor) {
  for (int64_t n = 0; n < s.stretches(); ++n) {
    const Stretch stretch(q, s, n);
    float* const tile = stretch.of(q.tiles[chunk], q, s);
    const float* from = tile;
    float* to = tile;
    for (int64_t c = 0; c < count; ++c, from += stretch.padded) {
      if (!keep[own.index[c]]) continue;
      for (int64_t j = 0; j < stretch.padded; j += kLanes)
        store(to + j, factor ? load(from + j) * load(factor + stretch.first + j) : load(from + j));
      to += stretch.padded;
    }
  }
  return std::remove_if(own.index, own.index + count, [&](int64_t c) { return !keep[c]; }) - own.index;
}

// The gradient of hidden from `count` columns, whose numbers are in own.index.
void hidden_of_kept(const Call& q, const Sizes& s, int64_t chunk, int64_t count, const Chosen& own, bool add) {
  Matrix weight = weight_of(q);
  weight.index = own.index;
  for (int64_t i = 0; i < count; ++i) {
    const Number* const soon = weight.line(std::min(i + 4, count - 1));
    for (int64_t k = 0; weight.column == 1 && k < q.width; k += 16) __builtin_prefetch(soon + k);
    for (int64_t k = 0; k < s.span; k += kPanel) copy_panel(weight, i, 1, k, own.right + k * q.columns + i * kPanel);
  }
  Columns columns(q, chunk);
  columns.count = count;
  for (int64_t n = 0; n < s.stretches(); ++n) {
    const Stretch stretch(q, s, n);
    add_hidden(q, s, columns, stretch.of(q.tiles[chunk], q, s), stretch, stretch.first, s.rows, own, own.d_hidden, add);
  }
}

// Whether tiles lie in the gradient of the weight, where the threads' chunks cannot be others than those of the sums.
bool lent(const Call& q, const Sizes& s) {
  const float* const last = q.tiles[s.chunks - 1];
  return q.d_weight && last >= q.d_weight && last < q.d_weight + q.classes * q.width;
}

// A thread's chunks, so that all have as much to do: vocabularies lie in the order of frequency, and what is kept at their
// beginning.
Span of_equal_work(const Call& q, const Sizes& s, int64_t thread) {
  const auto work = [&](int64_t c) { return 1 + 8 * (q.keep_hidden[c] + q.keep_weight[c]); };
  int64_t total = 0, done = 0, chunk = 0;
  for (int64_t c = 0; c < q.classes; ++c) total += work(c);
  int64_t edges[2];
  for (int64_t i = 0; i < 2; ++i) {
    for (; chunk < s.chunks && done * q.threads < total * (thread + i); ++chunk) {
      const Columns columns(q, chunk);
      for (int64_t c = 0; c < columns.count; ++c) done += work(columns.first + c);
    }
    edges[i] = chunk;
  }
  return {edges[0], thread + 1 == q.threads ? s.chunks : edges[1]};
}

// One thread's part of the gradients, the last chunk first, as in use_tiles.
void use_kept(const Call& q, const Sizes& s, const Known& known, const Chosen& own, Span chunks) {
  if (q.d_hidden && chunks.first == chunks.last) std::fill_n(own.d_hidden, s.rows * s.span, 0.0f);
  if (q.d_weight && own.all(s)) own.take(q, s, 0, q.rows, 0);
  for (int64_t chunk = chunks.last - 1; chunk >= chunks.first; --chunk) {
    const Columns columns(q, chunk);
    if (q.fresh && q.d_weight) std::fill_n(q.d_weight + columns.first * q.width, columns.count * q.width, 0.0f);
    take_factor(q, s, known, chunk, own.factor);
    int64_t count = columns.count;
    for (int64_t c = 0; c < count; ++c) own.index[c] = columns.first + c;
    const float* factor = own.factor;
    for (const bool hidden : {bool(q.more), !q.more}) {  // the smaller set is a part of the larger
      const uint8_t* const keep = hidden ? q.keep_hidden : q.keep_weight;
      count = keep_columns(q, s, chunk, keep, count, own, factor);
      if (factor) {
        for (int64_t c = 0; c < count; ++c) own.places[own.index[c] - columns.first] = c;
        for (int64_t n = 0; n < s.stretches(); ++n) {
          const Stretch stretch(q, s, n);
          float* const tile = stretch.of(q.tiles[chunk], q, s);
          each_hit(q, columns, stretch, [&](int64_t r, int64_t c) {
            tile[own.places[c] * stretch.padded + r] -= q.hit[q.first + stretch.first + r] * known.slope[stretch.first + r];
          });
        }
        if (q.d_bias) {
          if (q.fresh) std::fill_n(q.d_bias + columns.first, columns.count, 0.0f);
          for (int64_t c = 0; c < count; ++c) {
            Floats total = {};
            each_vector(q, s, chunk, c, [&](float* at, int64_t) __attribute__((always_inline)) { total += load(at); });
            q.d_bias[own.index[c]] += sum_of(total);
          }
        }
        factor = nullptr;
      }
      if (hidden && q.d_hidden) hidden_of_kept(q, s, chunk, count, own, chunk < chunks.last - 1);
      if (!hidden && q.d_weight) {
        Columns kept = columns;
        kept.count = count;
        add_weight(q, s, kept, {q.tiles[chunk], 0, q.rows, s.stretch}, own, {q.d_weight, q.width, q.width, own.index}, true);
      }
    }
  }
}

}  // namespace

extern "C" {

// Levels (V,), sums (V,) and masses (kLevels, R) of the classes, from the tiles that cce_sums left.
void cce_levels(const Call* call) {
  const Call& q = *call;
  const Sizes s(q);
  Room room{q.room};
  const Known known(s, room);
  in_threads(q, s, [&](int64_t t, Span chunks) { find_levels(q, s, known, part_of<Levels>(q, s, room, t), chunks); });
  std::fill_n(q.mass, kLevels * s.rows, 0.0f);
  for (int64_t t = 0; t < q.threads; ++t) {
    const float* const mass = part_of<Levels>(q, s, room, t).mass;
    for (int64_t i = 0; i < kLevels * s.rows; ++i) q.mass[i] += mass[i];
  }
}

// Gradients of the classes that are kept, which use up the tiles. The uniform part is in that of hidden alone.
void cce_kept(const Call* call) {
  const Call& q = *call;
  const Sizes s(q);
  Room room{q.room};
  const Known known(s, room);
  in_threads(q, s, [&](int64_t t, Span chunks) {
    use_kept(q, s, known, part_of<Chosen>(q, s, room, t), lent(q, s) ? chunks : of_equal_work(q, s, t));
  });
  put_block<Chosen>(q, s, room, [&](int64_t number, int64_t k) {
    return q.uniform ? some_floats(q.uniform_weight + k, q.width - k) * q.uniform[number] : Floats{};
  });
}

}  // extern "C"
#endif
