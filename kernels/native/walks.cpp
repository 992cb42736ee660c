// SPDX-License-Identifier: Apache-2.0
// What is done to each entry of a tile of logits (C, R), in as few walks over memory as can be. See walks.py.
//
// Threads share the columns, so that each reads one stretch of memory from its beginning to its end. Columns come in
// pieces of a fixed size whose sums are added up in their order: results do not depend on the number of threads.

namespace {

constexpr int64_t kAtOnce = 4;  // columns: each sum is read and written once for this many

INLINE void store_some(float* to, Floats value, int64_t count) { std::memcpy(to, &value, sizeof(float) * count); }

struct Tile {
  float* values;
  int64_t columns, rows, piece;

  int64_t pieces() const { return (columns + piece - 1) / piece; }
  int64_t last(int64_t index) const { return (index + 1) * piece < columns ? (index + 1) * piece : columns; }
};

// walk(offset of a vector of rows, load, store) for all rows of a tile.
template <typename Walk>
INLINE void each_vector(int64_t rows, const Walk& walk) {
  int64_t j = 0;
  for (; j + kLanes <= rows; j += kLanes)
    walk(j, [](const float* from) __attribute__((always_inline)) { return load(from); }, [](float* to, Floats v) __attribute__((always_inline)) { store(to, v); });
  if (const int64_t left = rows - j; left > 0)
    walk(j, [left](const float* from) __attribute__((always_inline)) { return some_floats(from, left); },
         [left](float* to, Floats v) __attribute__((always_inline)) { store_some(to, v, left); });
}

template <int kColumns>
INLINE void maxima(const float* z, int64_t rows, float* highest) {
  each_vector(rows, [&](int64_t j, auto get, auto put) __attribute__((always_inline)) {
    Floats top = get(highest + j);
    for (int c = 0; c < kColumns; ++c) top = larger(top, get(z + c * rows + j));
    put(highest + j, top);
  });
}

template <int kColumns, bool kKeep, bool kWeighted>
INLINE void exponentials(float* z, int64_t rows, const float* shift, const float* weights, float* sum, float* wsum) {
  each_vector(rows, [&](int64_t j, auto get, auto put) __attribute__((always_inline)) {
    const Floats down = get(shift + j);
    Floats part = {}, wpart = {};
    for (int c = 0; c < kColumns; ++c) {
      const Floats x = get(z + c * rows + j) - down;
      if (kWeighted) wpart += x * (weights ? weights[c] : 1.0f);
      const Floats e = exp_floor(x);
      if (kKeep) put(z + c * rows + j, e);
      part += e;
    }
    put(sum + j, get(sum + j) + part);
    if (kWeighted) put(wsum + j, get(wsum + j) + wpart);
  });
}

template <bool kKeep, bool kWeighted>
void exp_sums(const Tile& tile, const float* shift, const float* weights, float* scratch, int32_t threads) {
  const int64_t rows = tile.rows;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t piece = 0; piece < tile.pieces(); ++piece) {
    float* const sum = scratch + piece * 2 * rows;
    std::memset(sum, 0, sizeof(float) * 2 * rows);
    int64_t c = piece * tile.piece;
    const int64_t last = tile.last(piece);
    for (; c + kAtOnce <= last; c += kAtOnce)
      exponentials<kAtOnce, kKeep, kWeighted>(tile.values + c * rows, rows, shift, weights ? weights + c : nullptr, sum,
                                              sum + rows);
    for (; c < last; ++c)
      exponentials<1, kKeep, kWeighted>(tile.values + c * rows, rows, shift, weights ? weights + c : nullptr, sum,
                                        sum + rows);
  }
}

void add_pieces(const float* scratch, int64_t pieces, int64_t rows, float* out) {
  std::memcpy(out, scratch, sizeof(float) * rows);
  for (int64_t piece = 1; piece < pieces; ++piece)
    for (int64_t j = 0; j < rows; ++j) out[j] += scratch[piece * 2 * rows + j];
}

// One column of p = values * factor: its sum, its level, and p added to its level's row of mass.
INLINE void take_level(const float* values, int64_t rows, const float* factor, uint8_t* level, float* sum, float* mass) {
  Floats sums = {};
  each_vector(rows, [&](int64_t j, auto get, auto) __attribute__((always_inline)) {
    sums += get(values + j) * get(factor + j);
  });
  *sum = sum_of(sums);
  const int32_t found = *level ? 0 : level_of(*sum / rows);
  *level = static_cast<uint8_t>(found);
  float* const into = mass + found * rows;
  each_vector(rows, [&](int64_t j, auto get, auto put) __attribute__((always_inline)) {
    put(into + j, get(into + j) + get(values + j) * get(factor + j));
  });
}

}  // namespace

extern "C" {

// highest = max(before, max_c z), sums = sum_c exp(z - highest), and where wanted weighted = sum_c w_c (z - highest);
// tile = exp(z - highest) if keep. before, weighted and weights may be null; weights are then ones. scratch holds two
// numbers per row and piece of columns.
void cce_exp_sums(float* values, int64_t columns, int64_t rows, int64_t piece, const float* before, const float* weights,
                  float* scratch, float* highest, float* sums, float* weighted, int32_t keep, int32_t threads) {
  const Tile tile = {values, columns, rows, piece};
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t index = 0; index < tile.pieces(); ++index) {
    float* const top = scratch + index * rows;
    const float* const z = values + index * piece * rows;
    std::memcpy(top, z, sizeof(float) * rows);
    int64_t c = 0;
    const int64_t count = tile.last(index) - index * piece;
    for (; c + kAtOnce <= count; c += kAtOnce) maxima<kAtOnce>(z + c * rows, rows, top);
    for (; c < count; ++c) maxima<1>(z + c * rows, rows, top);
  }
  std::memcpy(highest, before ? before : scratch, sizeof(float) * rows);
  for (int64_t index = 0; index < tile.pieces(); ++index) maxima<1>(scratch + index * rows, rows, highest);
  // What to subtract: 0 for a row without any finite logit, whose exponentials are then 0 and not NaN.
  float* const shift = sums;
  for (int64_t j = 0; j < rows; ++j) shift[j] = highest[j] == -INFINITY ? 0.0f : highest[j];
  if (keep)
    weighted ? exp_sums<true, true>(tile, shift, weights, scratch, threads)
             : exp_sums<true, false>(tile, shift, weights, scratch, threads);
  else
    weighted ? exp_sums<false, true>(tile, shift, weights, scratch, threads)
             : exp_sums<false, false>(tile, shift, weights, scratch, threads);
  add_pieces(scratch, tile.pieces(), rows, sums);
  if (weighted) add_pieces(scratch + rows, tile.pieces(), rows, weighted);
}

// tile = exp(z - highest) * factor, row by row.
void cce_probabilities(float* tile, int64_t columns, int64_t rows, const float* highest, const float* factor,
                       int32_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t c = 0; c < columns; ++c) {
    float* const row = tile + c * rows;
    each_vector(rows, [&](int64_t j, auto get, auto put) __attribute__((always_inline)) {
      put(row + j, exp_floor(get(row + j) - get(highest + j)) * get(factor + j));
    });
  }
}

// The sum of each column of p = tile * factor, its level by their mean (0 where `levels` is not 0), and
// mass (kLevels, rows) += p of each level. scratch holds a mass for each piece of columns.
void cce_levels(const float* tile, int64_t columns, int64_t rows, int64_t piece, const float* factor, uint8_t* levels,
                float* scratch, float* sums, float* mass, int32_t threads) {
  const int64_t pieces = (columns + piece - 1) / piece;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t index = 0; index < pieces; ++index) {
    float* const part = scratch + index * kLevels * rows;
    std::memset(part, 0, sizeof(float) * kLevels * rows);
    const int64_t last = (index + 1) * piece < columns ? (index + 1) * piece : columns;
    for (int64_t c = index * piece; c < last; ++c) take_level(tile + c * rows, rows, factor, levels + c, sums + c, part);
  }
  for (int64_t index = 0; index < pieces; ++index)
    for (int64_t j = 0; j < kLevels * rows; ++j) mass[j] += scratch[index * kLevels * rows + j];
}

// The first `count` columns of tile = columns index[0..count), ascending, times factor. Threads share the rows, so that each
// moves its part of the columns in their order.
void cce_keep(float* tile, int64_t rows, const int64_t* index, int64_t count, const float* factor, int32_t threads) {
  const int64_t vectors = (rows + kLanes - 1) / kLanes;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int32_t part = 0; part < threads; ++part) {
    const int64_t first = vectors * part / threads * kLanes, stop = vectors * (part + 1) / threads * kLanes;
    const int64_t last = stop < rows ? stop : rows;
    for (int64_t k = 0; k < count; ++k) {
      const float* const from = tile + index[k] * rows + first;
      float* const to = tile + k * rows + first;
      each_vector(last - first, [&](int64_t j, auto get, auto put) __attribute__((always_inline)) {
        put(to + j, get(from + j) * get(factor + first + j));
      });
    }
  }
}

}  // extern "C"
