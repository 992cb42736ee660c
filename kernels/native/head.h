// SPDX-License-Identifier: Apache-2.0
// What the steps of steps.cpp have in common: the call, its sizes, its workspace, and the logits of a chunk of columns. In comes a
// Call, out goes a tile of products with the largest of each row. gradients.h goes on from there.

#include <algorithm>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

extern "C" {

struct Head {  // as in library.py
  // z = inner (h w + b), or outer * tanh(inner (h w + b)) where `capped`.
  const Number* weight;              // (V, D)
  const float *bias, *class_weight;  // (V,) or null; (V,), null is ones
  int64_t weight_row, weight_column, classes, width;
  float inner, outer;
  int32_t capped, weighted;  // whether sums of w z are wanted
  // The n rows that are computed, those in `index` or all where it is null.
  const Number* hidden;
  int64_t hidden_row, hidden_column;
  const int64_t *index, *target;  // (n,) each; -1 is a target that is not among the columns
  // dx = prob p - hit [c = t] - uniform w (n,), as in rows.py; uniform may be null, uniform_weight (D,) is sum_c w_c W_c.
  const float *prob, *hit, *uniform, *uniform_weight;
  // Statistics (n,): results of the sums, and given to what comes after them. target_logit is zero beforehand.
  float *highest, *sumexp, *target_logit;
  double* weighted_sum;
  int64_t* best;  // the class of the largest logit; null where not wanted
  float *nll, *lse;  // of each row, made at the end of all steps; null where not wanted
  // Gradients (N, D), (V, D) and (V,), contiguous; null where not wanted.
  Number *d_hidden, *d_weight;
  float *d_bias, *logits;    // (V, R) of a step's R rows, a multiple of kFill: products, or the gradient of the products
  int64_t columns, threads;  // columns of a chunk
  float* workspace;          // as many numbers as `cce_workspace` says for the largest step
  int64_t workspace_size;
};

// Rows first..last, `rows` at a time in blocks of `block`, and columns begin..end of the weight, `classes` at a time.
struct Step {  // as in library.py
  int64_t kind;  // as in plan.py
  int64_t first, last, rows, block, begin, end, classes;
  int32_t hidden, weights;      // whether it makes the gradient of hidden, and those of weight and bias
  int32_t in_weight, adds;      // whether tiles lie in the memory of the weight's gradient; whether this holds something already
};

}  // extern "C"

namespace {

enum Kind { kSums, kTiles, kWeights, kGradients, kProducts, kGiven };

// One piece of a step: some of its rows, or of its columns.
struct Call : Head {
  int64_t first, rows, block, begin, end;
  bool fresh;  // the gradients of weight and bias hold nothing yet
  bool stores, given, in_weight;

  Call(const Head& head, const Step& step, int64_t piece) : Head(head) {
    const int64_t by_rows = (step.last - step.first + step.rows - 1) / step.rows;
    first = step.first + piece % by_rows * step.rows;
    rows = std::min(step.rows, step.last - first);
    block = step.block;
    begin = step.begin + piece / by_rows * step.classes;
    end = std::min(begin + step.classes, step.end);
    fresh = first == 0 && !step.adds;
    stores = step.kind == kTiles;
    given = step.kind == kGiven;
    in_weight = step.in_weight;
    if (!step.hidden) d_hidden = nullptr;
    if (!step.weights) d_weight = nullptr, d_bias = nullptr;
  }
};

int64_t pieces(const Step& step) {
  const auto parts = [](int64_t all, int64_t each) { return (all + each - 1) / each; };
  return parts(step.last - step.first, step.rows) * parts(step.end - step.begin, step.classes);
}


constexpr int64_t kFill = 16;                // rows are filled up to a multiple of this
constexpr int64_t kSlab = 512 / kPanel;      // panels of a line of the weight that are multiplied before the next lines
constexpr int64_t kMostThreads = 256;
constexpr int64_t kCopied = 1 << 17;  // numbers of hidden that a thread copies at once
constexpr float kNever = 3.0e38f;     // the shift of rows that only fill up a vector: their exponentials are 0

// --- sizes -----------------------------------------------------------------------------------------------------------------

struct Sizes {
  int64_t depth;    // words of a line of hidden or of the weight, filled up
  int64_t span;     // its numbers
  int64_t rows;     // of the call, filled up
  int64_t block;    // rows of a row block
  int64_t pairs;    // words of a column of a chunk
  int64_t chunks;   // of columns
  int64_t left;     // words of a block of weights as left factor

  explicit Sizes(const Call& q)
      : depth(up(q.width, kPack * kPanel) / kPack),
        span(up(q.width, kPanel)),
        rows(up(q.rows, kFill)),
        block(std::min(q.block, rows)),
        pairs(up(q.columns, kPack) / kPack),
        chunks((q.end - q.begin + q.columns - 1) / q.columns),
        left(kRows * std::min(depth, kSlab * kPanel)) {}

  int64_t row_blocks() const { return (rows + block - 1) / block; }
};

struct Span {
  int64_t first, last;
};

struct Columns {
  int64_t first, count;

  Columns(const Call& q, int64_t chunk)
      : first(q.begin + chunk * q.columns), count(std::min(q.columns, q.end - first)) {}
};

// Some of a call's rows, numbered within it.
struct RowBlock {
  int64_t number, first, count, padded;

  RowBlock(const Call& q, const Sizes& s, int64_t number)
      : number(number),
        first(number * s.block),
        count(std::min(s.block, q.rows - first)),
        padded(up(count, kFill)) {}

  // Its part of the tiles of a chunk.
  float* of(float* tile, const Call& q, const Sizes& s) const { return tile + number * q.columns * s.block; }
};

Matrix weight_of(const Call& q) { return {q.weight, q.weight_row, q.weight_column, q.width, nullptr}; }

Matrix hidden_of(const Call& q) {
  return {q.hidden + (q.index ? 0 : q.first * q.hidden_row), q.hidden_row, q.hidden_column, q.width,
          q.index ? q.index + q.first : nullptr};
}

// --- memory ----------------------------------------------------------------------------------------------------------------

// With AddressSanitizer, a guard after each part of a workspace finds what goes beyond it.
#ifdef __SANITIZE_ADDRESS__
constexpr int64_t kGuard = 16;
void guard(float* at) { __asan_poison_memory_region(at, sizeof(float) * kGuard); }
void take_guards(float* at, int64_t count) { __asan_unpoison_memory_region(at, sizeof(float) * count); }
#else
constexpr int64_t kGuard = 0;
void guard(float*) {}
void take_guards(float*, int64_t) {}
#endif

// Memory that is taken from its beginning on; without a base, how much that is.
struct Workspace {
  float* base;
  int64_t used = 0;

  float* take(int64_t count) {
    float* const part = base ? base + used : nullptr;
    used += up(count, kLanes) + kGuard;
    if (base) guard(base + used - kGuard);
    return part;
  }
};

// What is known of each row when its sums are: the largest logit or 0, prob / sumexp, the cap's slope at the target, and the
// uniform coefficient. Where tiles are stored, it stays there from the sums on.
struct RowState {
  float *shift, *ratio, *slope, *uniform;

  RowState(const Sizes& s, Workspace& workspace)
      : shift(workspace.take(s.rows)), ratio(workspace.take(s.rows)), slope(workspace.take(s.rows)), uniform(workspace.take(s.rows)) {}

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

// The tiles of all chunks, with what was taken off their logits, (chunks, R).
struct StoredTiles {
  float *shifts, *tiles;

  StoredTiles(const Call& q, const Sizes& s, Workspace& workspace)
      : shifts(q.stores ? workspace.take(s.chunks * s.rows) : nullptr),
        tiles(q.stores ? workspace.take((q.in_weight ? q.threads : s.chunks) * q.columns * s.rows) : nullptr) {}

  // A tile in the memory of the weight's gradient lies where that of the chunk before it goes, which is made later: a thread
  // makes the last of its chunks first. The first chunk of each thread has a place of its own.
  float* tile(const Call& q, const Sizes& s, int64_t chunk) const {
    if (!q.in_weight) return tiles + chunk * q.columns * s.rows;
    const int64_t thread = (chunk * q.threads + s.chunks - 1) / s.chunks;
    if (s.chunks * thread / q.threads == chunk) return tiles + thread * q.columns * s.rows;
    return reinterpret_cast<float*>(q.d_weight) + (chunk - 1) * q.columns * q.width;
  }
};

// Whether a chunk's weights as right factor, line after line in panels, are left factors as well.
bool both_factors(const Call& q) { return kPack == 1 && q.d_hidden; }

// What a thread works with: a chunk of weights as right factor, two blocks of them as left factors where that does not serve (one
// where a chunk has no more), a tile, and the largest products so far.
struct Buffers {
  float *left, *bias, *tile, *words, *peak, *odd, *right;

  Buffers(const Call& q, const Sizes& s, bool tiles, int64_t rows, Workspace& workspace)
      : left(both_factors(q) ? nullptr : workspace.take((1 + (q.columns > kRows)) * s.left)),
        bias(workspace.take(q.columns)),
        tile(tiles ? workspace.take(q.columns * rows) : nullptr),
        words(kPack == 1 ? nullptr : workspace.take((q.columns + 1) * s.block / 2)),
        peak(workspace.take(s.block)),
        odd(workspace.take(s.block)),
        right(q.d_hidden ? workspace.take(s.pairs * s.span) : nullptr) {}
};

// The part of the workspace that belongs to a thread; all have one size.
template <typename Part>
Part part_of(const Call& q, const Sizes& s, Workspace workspace, int64_t thread) {
  Workspace after = workspace;
  Part first(q, s, after);
  if (thread == 0) return first;
  workspace.used += thread * (after.used - workspace.used);
  return Part(q, s, workspace);
}

// Numbers of a workspace with the parts of all threads.
template <typename Part>
int64_t size_with(const Call& q, const Sizes& s, Workspace workspace) {
  const int64_t before = workspace.used;
  Part(q, s, workspace);
  return before + q.threads * (workspace.used - before);
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
#if defined(__aarch64__)
  asm("" : "+w"(value));
#elif defined(__AVX512F__)
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

// A block of products: inner (W h + b) where they are the `last` of their sum. `peak` (R,) becomes the largest of them and before,
// and `odd` (R,) is no longer zero where one is not finite, which a maximum may not tell.
template <int kR, int kV, typename Hint>
INLINE void logits_block(const Call& q, const Left& left, const float* panel, const float* bias, float* tile, int64_t rows,
                         float* peak, float* odd, bool add, bool last, Hint& hint) {
  multiply<kR, kV, kPanel, 1>(left, {panel, kV * kLanes}, tile, rows, add, hint, [&](Floats(&sums)[kR][kV]) __attribute__((always_inline)) {
    if (!last) return;
#pragma GCC unroll 16
    for (int v = 0; v < kV; ++v) {
      Floats top = load(peak + v * kLanes), wrong = load(odd + v * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kR; ++i) {
        const Floats z = sums[i][v] * q.inner + bias[i];
        top = z > top ? z : top;
        wrong += z * 0.0f;
        sums[i][v] = z;
      }
      store(peak + v * kLanes, top);
      store(odd + v * kLanes, wrong);
    }
  });
}

// tile (C, R) = the products of a chunk with the rows of `packed`. Weights are packed block by block, unless `right` holds them:
// the first at once, and each other one while the block before it is multiplied.
void make_logits(const Call& q, const Sizes& s, Columns columns, const float* packed, int64_t rows, const Buffers& own, float* tile,
                 bool there = false) {
  const Phase phase(kLogits);
  const Matrix weight = weight_of(q);
  const int64_t panels = s.depth / kPanel;
  std::fill_n(own.odd, rows, 0.0f);
  const bool both = both_factors(q);
  // Where every other block goes: behind the one before it, or behind its rows in each panel, which are few where there are several.
  const int64_t other = q.columns > kRows ? s.left : kFewRows * kPanel, segment = kPanel * (both ? s.pairs : kRows);
  const int64_t packed_panels = both ? panels : kSlab;
  int64_t number = 0;  // of a block
  for (int64_t begin = 0; begin < panels; begin += packed_panels) {
    const int64_t end = std::min(begin + packed_panels, panels);
    const int64_t hints = std::max<int64_t>((end - begin) * (kPanel / kUnroll) * (rows / kPanel), 1);
    const auto packing = [&](int64_t c) {
      const int64_t left = columns.count - c, count = left >= kRows ? kRows : left >= kFewRows ? kFewRows : std::min<int64_t>(left, 1);
      float* const to = both ? own.right + c * kPanel : own.left + number++ % 2 * other;
      return PackAhead(weight, columns.first + c, there ? 0 : count, begin * kPanel, end - begin, to, segment, hints);
    };
    PackAhead next = packing(0);
    in_blocks(columns.count, [&](auto size, int64_t c) __attribute__((always_inline)) {
      constexpr int kR = decltype(size)::kValue;
      next.finish();
      const float* const block = next.to;
      next = packing(c + kR);
      for (int64_t slab = begin; slab < end; slab += kSlab) {
        const int64_t now = std::min(kSlab, end - slab), from = slab * kPanel;
        const bool last = slab + now == panels;
        const Left left = {block + (slab - begin) * segment, kPanel, 1, now, kPanel, segment};
        int64_t r = 0;
        for (; r + kPanel <= rows; r += kPanel)
          logits_block<kR, 2>(q, left, packed + r * s.depth + from * kPanel, own.bias + c, tile + c * rows + r, rows, own.peak + r,
                              own.odd + r, slab > 0, last, next);
        if (r < rows)
          logits_block<kR, 1>(q, left, packed + r * s.depth + from * kLanes, own.bias + c, tile + c * rows + r, rows, own.peak + r,
                              own.odd + r, slab > 0, last, next);
      }
    });
  }
}

}  // namespace
