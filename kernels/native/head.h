// SPDX-License-Identifier: Apache-2.0
// What the sweeps of fused.cpp have in common: the call, its sizes, and the logits of a chunk of columns.

#include <algorithm>

extern "C" {

struct Call {  // as in fused.py
  // The head: z = inner (h w + b), or outer * tanh(inner (h w + b)) where `capped`.
  const Number* weight;             // (V, D)
  const float *bias, *class_weight;  // (V,) or null; (V,), null is ones
  int64_t weight_row, weight_column, classes, width;
  double weight_total;  // of class_weight
  float inner, outer;
  int32_t capped, weighted;  // whether sums of w z are wanted
  // The rows first..first + rows of those in `index` (n,), or of all where it is null.
  const Number* hidden;
  int64_t hidden_row, hidden_column;
  const int64_t *index, *target;  // (n,) each; -1 is a target that is not among the columns
  int64_t first, rows;
  // dx = prob p - hit [c = t] - uniform w (n,), as in rows.py; uniform may be null, uniform_weight (D,) is sum_c w_c W_c.
  const float *prob, *hit, *uniform, *uniform_weight;
  // Statistics (n,): results of the sums, and given to what comes after them. target_logit is zero beforehand.
  float *highest, *sumexp, *target_logit, *weighted_sum;
  // Gradients (N, D), (V, D) and (V,), contiguous; null where not wanted. `fresh`: the last two hold nothing yet.
  Number *d_hidden, *d_weight;
  float* d_bias;
  // Places for the tiles of all chunks, and for what is taken off their logits, (chunks, R); null where tiles are not kept.
  float* const* tiles;
  float* shifts;
  // A filter (see filter.cpp): for each class its level and the sum of its share of all rows, of each level the sum for each
  // row; then which classes each gradient keeps, those of hidden's `more` than the others. `top` is the largest |prob|.
  uint8_t* levels;
  float *class_sums, *mass;
  const uint8_t *keep_hidden, *keep_weight;
  float top;
  int32_t more;
  // Sizes: columns begin..end of the weight are looked at; rows of a stretch, columns of a chunk. `room` has as many numbers as `cce_room` says.
  int64_t begin, end, stretch, columns;
  int32_t threads, fresh;
  float* room;
};

}  // extern "C"

namespace {

constexpr int64_t kFill = 16;                // rows are filled up to a multiple of this
constexpr int64_t kSlab = 512 / kPanel;      // panels of a line of the weight that are multiplied before the next lines
constexpr int64_t kMostThreads = 256;
constexpr int64_t kCopied = 1 << 17;  // numbers of hidden that a thread copies at once
constexpr float kNever = 3.0e38f;     // the shift of rows that only fill up a vector: their exponentials are 0

// --- sizes -----------------------------------------------------------------------------------------------------------------

struct Sizes {
  int64_t depth;    // words of a line of hidden or of the weight, filled up
  int64_t span;     // its numbers
  int64_t rows;     // of the block, filled up
  int64_t stretch;  // rows of a stretch
  int64_t pairs;    // words of a column of a chunk
  int64_t chunks;   // of columns

  explicit Sizes(const Call& q)
      : depth(up(q.width, kPack * kPanel) / kPack),
        span(up(q.width, kPanel)),
        rows(up(q.rows, kFill)),
        stretch(std::min(q.stretch, rows)),
        pairs(up(q.columns, kPack) / kPack),
        chunks((q.end - q.begin + q.columns - 1) / q.columns) {}

  int64_t stretches() const { return (rows + stretch - 1) / stretch; }
};

struct Span {
  int64_t first, last;
};

struct Columns {
  int64_t first, count;

  Columns(const Call& q, int64_t chunk)
      : first(q.begin + chunk * q.columns), count(std::min(q.columns, q.end - first)) {}
};

// Some rows of a block, numbered within it.
struct Stretch {
  int64_t number, first, count, padded;

  Stretch(const Call& q, const Sizes& s, int64_t number)
      : number(number),
        first(number * s.stretch),
        count(std::min(s.stretch, q.rows - first)),
        padded(up(count, kFill)) {}

  float* of(float* tiles, const Call& q, const Sizes& s) const { return tiles + number * q.columns * s.stretch; }
};

Matrix weight_of(const Call& q) { return {q.weight, q.weight_row, q.weight_column, q.width, nullptr}; }

Matrix hidden_of(const Call& q) {
  return {q.hidden + (q.index ? 0 : q.first * q.hidden_row), q.hidden_row, q.hidden_column, q.width,
          q.index ? q.index + q.first : nullptr};
}

// --- memory ----------------------------------------------------------------------------------------------------------------

struct Room {
  float* at;

  float* take(int64_t count) {
    float* const part = at;
    at += up(count, kLanes);
    return part;
  }
};

// What is known of each row of a block when its sums are: the largest logit or 0, prob / sumexp, the cap's slope at the
// target, and the uniform coefficient. Where tiles are kept, it stays there from the sums on.
struct Known {
  float *shift, *ratio, *slope, *uniform;

  Known(const Sizes& s, Room& room)
      : shift(room.take(s.rows)), ratio(room.take(s.rows)), slope(room.take(s.rows)), uniform(room.take(s.rows)) {}

  void begin(const Sizes& s) const {
    std::fill_n(shift, s.rows, kNever);
    std::fill_n(ratio, s.rows, 0.0f);
    std::fill_n(slope, s.rows, 1.0f);
    std::fill_n(uniform, s.rows, 0.0f);
  }

  void take_norm(const Call& q, const Sizes& s) const {
    begin(s);
    for (int64_t r = 0; r < q.rows; ++r) {
      const int64_t number = q.first + r;
      shift[r] = q.highest[number];
      ratio[r] = q.prob[number] / q.sumexp[number];
      if (q.uniform) uniform[r] = q.uniform[number];
    }
  }
};

// What a thread works with: the weights of a chunk as left and as right factor, a tile, and the largest products so far.
struct Own {
  float *left, *bias, *tile, *words, *peak, *right;

  Own(const Call& q, const Sizes& s, bool tiles, int64_t rows, Room& room)
      : left(room.take(q.columns * s.depth)),
        bias(room.take(q.columns)),
        tile(tiles ? room.take(q.columns * rows) : nullptr),
        words(kPack == 1 ? nullptr : room.take((q.columns + 1) * s.stretch / 2)),
        peak(room.take(s.stretch)),
        right(kPack == 1 ? left : q.d_hidden ? room.take(s.pairs * s.span) : nullptr) {}
};

// The part of the room that belongs to a thread; all have one size.
template <typename Part>
Part part_of(const Call& q, const Sizes& s, Room room, int64_t thread) {
  Room after = room;
  Part first(q, s, after);
  if (thread == 0) return first;
  Room own{room.at + thread * (after.at - room.at)};
  return Part(q, s, own);
}

// Numbers of a room with the parts of all threads.
template <typename Part>
int64_t room_with(const Call& q, const Sizes& s, Room room) {
  const int64_t before = room.at - static_cast<float*>(nullptr);
  Part(q, s, room);
  return before + q.threads * (room.at - static_cast<float*>(nullptr) - before);
}

// part(thread, chunks of that thread), all threads at once.
template <typename Part>
void in_threads(const Call& q, const Sizes& s, const Part& part) {
#pragma omp parallel for schedule(static, 1) num_threads(q.threads) if (q.threads > 1)
  for (int64_t t = 0; t < q.threads; ++t)
    part(t, Span{s.chunks * t / q.threads, s.chunks * (t + 1) / q.threads});
}

// --- logits ----------------------------------------------------------------------------------------------------------------

// The same number wherever it is used, and not a part of a fused multiplication and subtraction in one place.
INLINE Floats rounded(Floats value) {
#ifdef __AVX512F__
  asm("" : "+v"(value));
#else
  asm("" : "+x"(value));
#endif
  return value;
}

INLINE Floats logit_of(const Call& q, Floats product) { return q.capped ? rounded(tanh_of(product) * q.outer) : product; }

// The same for one number, and not by other instructions, which round otherwise.
float tanh_of(float x) { return rounded(tanh_of(rounded(Floats{} + x)))[0]; }

void copy_bias(const Call& q, Columns columns, float* bias) {
  for (int64_t c = 0; c < columns.count; ++c) bias[c] = q.bias ? q.bias[columns.first + c] * q.inner : 0.0f;
}

// A block of products: inner (W h + b) where they are the `last` of their sum, and peak (R,) the largest of them and before.
template <int kR, int kV>
INLINE void logits_block(const Call& q, const Left& left, const float* panel, const float* bias, float* tile, int64_t rows,
                         float* peak, bool add, bool last, Ahead& ahead) {
  multiply<kR, kV, kPanel, 1>(left, panel, tile, rows, add, ahead, [&](Floats(&sums)[kR][kV]) __attribute__((always_inline)) {
    if (!last) return;
    for (int v = 0; v < kV; ++v) {
      Floats top = load(peak + v * kLanes);
      for (int i = 0; i < kR; ++i) {
        sums[i][v] = sums[i][v] * q.inner + bias[i];
        top = larger(sums[i][v], top);
      }
      store(peak + v * kLanes, top);
    }
  });
}

// Words of `count` lines of the weight that come after line `row`, from word k on, to be asked for in `times` portions.
INLINE Ahead weights_after(const Call& q, int64_t row, int64_t count, int64_t k, int64_t words, int64_t times) {
  if (q.weight_column != 1 || row >= q.classes) return {};
  const int64_t first = k * kPack, bytes = sizeof(Number) * std::min(words * kPack, q.width - first);
  count = std::min(count, q.classes - row);
  const int64_t lines = count * ((bytes + 63) / 64);
  return {reinterpret_cast<const char*>(q.weight + row * q.weight_row + first), int64_t(sizeof(Number)) * q.weight_row, bytes, count,
          (lines + times - 1) / times};
}

// tile (C, R) = the products of a chunk with the rows of `turned`. The weights are copied to `own.left` where `copy`.
void make_logits(const Call& q, const Sizes& s, Columns columns, const float* turned, int64_t rows, const Own& own, float* tile,
                 bool copy) {
  const Matrix weight = weight_of(q);
  const int64_t panels = s.depth / kPanel;
  for (int64_t slab = 0; slab < panels; slab += kSlab) {
    const int64_t now = std::min(kSlab, panels - slab), from = slab * kPanel;
    const bool last = slab + now == panels;
    in_blocks(columns.count, [&](auto size, int64_t c) __attribute__((always_inline)) {
      constexpr int kR = decltype(size)::kValue;
      float* const lines = own.left + from * q.columns + c * kPanel;
      const int64_t row = columns.first + c, below = c + 2 * kR <= columns.count ? kR * rows : 0;
      Ahead ahead = {};
      if (copy) {
        for (int64_t p = 0; p < now; ++p) copy_lines(weight, row, kR, from + p * kPanel, lines + p * q.columns * kPanel);
        ahead = weights_after(q, row + kR, kR, from, now * kPanel, now * ((rows + kPanel - 1) / kPanel));
      }
      for (int64_t i = 0; i < kR; ++i)  // a kept tile may be in no cache
        for (int64_t j = 0; j < rows; j += 16) __builtin_prefetch(tile + (c + i) * rows + below + j, 1, 3);
      const Left left = {lines, kPanel, 1, now, kPanel, q.columns * kPanel};
      int64_t r = 0;
      for (; r + kPanel <= rows; r += kPanel)
        logits_block<kR, 2>(q, left, turned + r * s.depth + from * kPanel, own.bias + c, tile + c * rows + r, rows, own.peak + r,
                            slab > 0, last, ahead);
      if (r < rows)
        logits_block<kR, 1>(q, left, turned + r * s.depth + from * kLanes, own.bias + c, tile + c * rows + r, rows, own.peak + r,
                            slab > 0, last, ahead);
    });
  }
}

}  // namespace
