// SPDX-License-Identifier: Apache-2.0
// The micro-kernel of all matrix products, and the packing of factors for it. In come matrices as they lie in memory; out go
// packed panels, and products of packed panels. The micro-kernel multiplies a few rows of the left factor, number by number,
// by one panel of the right factor, vector by vector, and sums up in registers. head.h makes logits with it.
//
// Factors are words of 32 bits: float32 numbers, or (kPack = 2) pairs of bfloat16 numbers that one instruction multiplies and
// adds. What lies in memory in half precision becomes one or the other when it is copied.

#ifdef __aarch64__
#include <arm_neon.h>
#else
#include <immintrin.h>
#endif

#ifdef PHASES
#include <atomic>
#include <utility>
#endif

namespace {

// --- where the time goes ----------------------------------------------------------------------------------------------------

// Compiled with PHASES, for `python -m benchmarks kernel --peak`: ticks of all threads in each phase, exclusive of inner ones.
enum PhaseName { kPacking, kLogits, kExponentials, kHiddenGradient, kWeightGradient, kAdding, kPhases };
#ifdef PHASES
std::atomic<int64_t> phase_ticks[kPhases];

INLINE int64_t ticks_now() {
#ifdef __aarch64__
  int64_t ticks;
  asm volatile("mrs %0, cntvct_el0" : "=r"(ticks));
  return ticks;
#else
  return __builtin_ia32_rdtsc();
#endif
}

struct Phase {
  explicit Phase(PhaseName name) : name(name), outer(current), begin(ticks_now()) { current = this; }
  ~Phase() {
    const int64_t ticks = ticks_now() - begin;
    own[name] += ticks - inner;
    current = outer;
    if (outer) outer->inner += ticks;
    for (int i = 0; !outer && i < kPhases; ++i) phase_ticks[i] += std::exchange(own[i], 0);
  }
  PhaseName name;
  Phase* outer;
  int64_t begin, inner = 0;
  static thread_local Phase* current;
  static thread_local int64_t own[kPhases];  // of this thread, since its outermost phase began
};
thread_local Phase* Phase::current = nullptr;
thread_local int64_t Phase::own[kPhases] = {};
#else
struct Phase {
  explicit Phase(PhaseName) {}
};
#endif

// STORAGE is defined in front of this file: 0 float32, 1 bfloat16, 2 float16.
#if STORAGE == 0
typedef float Number;
#else
typedef uint16_t Number;
#endif
#if STORAGE == 1 && (defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC))
#define PAIRS
constexpr int kPack = 2;
#else
constexpr int kPack = 1;
#endif

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 12;  // of a block: 12 x 2 sums, two vectors and a number are 27 of 32 registers
#else
constexpr int kRows = 6;  // 6 x 2 sums, two vectors and a number are 15 of 16
#endif
constexpr int kFewRows = kRows / 3;     // of a block of what is left over
constexpr int64_t kPanel = 2 * kLanes;  // columns of a block

constexpr int64_t up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

// --- numbers in memory ---------------------------------------------------------------------------------------------------

typedef uint16_t Shorts __attribute__((vector_size(2 * kLanes)));

INLINE Ints widened(const uint16_t* from) {
  Shorts some;
  std::memcpy(&some, from, sizeof some);
  return __builtin_convertvector(some, Ints);
}

INLINE Floats load_numbers(const float* from) { return load(from); }

#ifdef __aarch64__
typedef __fp16 Halves __attribute__((vector_size(2 * kLanes)));
#endif

INLINE Floats load_numbers(const uint16_t* from) {
#if STORAGE != 2
  return (Floats)(widened(from) << 16);
#elif defined(__aarch64__)
  Halves some;
  std::memcpy(&some, from, sizeof some);
  return __builtin_convertvector(some, Floats);
#elif defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#else
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#endif
}

INLINE void store_numbers(float* to, Floats values) { store(to, values); }

// Bits of the nearest bfloat16 numbers, ties to even; NaN stays NaN.
INLINE Shorts bfloat16_of(Floats values) {
  const Ints bits = (Ints)values, rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return __builtin_convertvector(((values == values ? rounded : bits | 0x400000) >> 16) & 0xffff, Shorts);
}

// Rounded to the nearest number, ties to even; NaN stays NaN.
INLINE void store_numbers(uint16_t* to, Floats values) {
#if STORAGE != 2
  const Shorts some = bfloat16_of(values);
  std::memcpy(to, &some, sizeof some);
#elif defined(__aarch64__)
  const Halves some = __builtin_convertvector(values, Halves);
  std::memcpy(to, &some, sizeof some);
#elif defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph((__m512)values, _MM_FROUND_TO_NEAREST_INT));
#else
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)values, _MM_FROUND_TO_NEAREST_INT));
#endif
}

// Numbers first..first + count of a line whose numbers lie `step` apart; the others of the vector are zero.
INLINE Floats some_numbers(const Number* line, int64_t step, int64_t count) {
  Number few[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) few[i] = line[i * step];
  return load_numbers(few);
}

// --- products --------------------------------------------------------------------------------------------------------------

template <int value>
struct Constant {
  static constexpr int kValue = value;
};

// part(Constant<rows>, first row) for 0..count in blocks of kRows, then of fewer.
template <typename Part>
INLINE void in_blocks(int64_t count, const Part& part) {
  int64_t at = 0;
  for (; at + kRows <= count; at += kRows) part(Constant<kRows>{}, at);
  for (; at + kFewRows <= count; at += kFewRows) part(Constant<kFewRows>{}, at);
  for (; at < count; ++at) part(Constant<1>{}, at);
}

constexpr int kUnroll = 8;  // words of the left factor between two prefetches

// Memory that will be needed soon, prefetched line by line while something else is computed: `count` pieces of `bytes` bytes,
// `lines` lines at a time. All at once they would keep the cache from what is multiplied.
template <bool kWrite>
struct Ahead {
  const char* at;
  int64_t step, bytes, count, lines, done = 0;

  INLINE void ask() {
    for (int64_t line = 0; line < lines && count > 0; ++line) {
      if (kWrite)
        __builtin_prefetch(at + done, 1, 3);
      else
        __builtin_prefetch(at + done, 0, 2);
      done += 64;
      if (done >= bytes) {
        done = 0;
        at += step;
        --count;
      }
    }
  }
};

struct Nothing {
  INLINE void ask() const {}
  template <typename Sums>
  INLINE void operator()(Sums&) const {}
};

// Where the left factor's words lie: row i and word k at `at` + i row + k step, the k in `segments` of `length` words, each
// `segment` after the one before. Strides that the compiler knows (not 0) are template arguments of `multiply`.
struct Left {
  const float* at;
  int64_t row, step, segments, length, segment;
};

// A panel of the right factor: word k of its columns at `at + k row`.
struct Right {
  const float* at;
  int64_t row;
};

INLINE Floats multiply_add(Floats sum, Floats right, float word) {
#if defined(PAIRS) && defined(__aarch64__)
  const bfloat16x8_t pair = vreinterpretq_bf16_f32(vdupq_n_f32(word));
  return (Floats)vbfdotq_f32((float32x4_t)sum, vreinterpretq_bf16_f32((float32x4_t)right), pair);
#elif defined(PAIRS)
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(word), (__m512bh)right);
#else
  return sum + right * word;
#endif
}

// out (R, 16 V) = left (R, K) @ panel (K, 16 V), or with `add` out += ...; `finish` may change the sums before they are stored.
template <int kR, int kV, int kRow, int kStep, typename Hint, typename Finish>
__attribute__((noinline)) void multiply(const Left& left, Right panel, float* out, int64_t out_row, bool add, Hint& hint,
                                        const Finish& finish) {
  const int64_t row = kRow ? kRow : left.row, step = kStep ? kStep : left.step;
  Floats sums[kR][kV];
#pragma GCC unroll 16
  for (int i = 0; i < kR; ++i)
#pragma GCC unroll 16
    for (int v = 0; v < kV; ++v) sums[i][v] = Floats{};
  for (int64_t s = 0; s < left.segments; ++s) {
    const float* at = left.at + s * left.segment;
    const auto add_word = [&]() __attribute__((always_inline)) {
      Floats right[kV];
#pragma GCC unroll 16
      for (int v = 0; v < kV; ++v) right[v] = load(panel.at + v * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kR; ++i) {
        const float word = at[i * row];
#pragma GCC unroll 16
        for (int v = 0; v < kV; ++v) sums[i][v] = multiply_add(sums[i][v], right[v], word);
      }
      at += step;
      panel.at += panel.row;
    };
    int64_t k = 0;
    for (; k + kUnroll <= left.length; k += kUnroll) {
      hint.ask();
#pragma GCC unroll 16
      for (int u = 0; u < kUnroll; ++u) add_word();
    }
    for (; k < left.length; ++k) add_word();
  }
  const Phase phase(kAdding);
  if (add) {  // only now: a long sum is more exact in parts
#pragma GCC unroll 16
    for (int i = 0; i < kR; ++i)
#pragma GCC unroll 16
      for (int v = 0; v < kV; ++v) sums[i][v] += load(out + i * out_row + v * kLanes);
  }
  finish(sums);
#pragma GCC unroll 16
  for (int i = 0; i < kR; ++i)
#pragma GCC unroll 16
    for (int v = 0; v < kV; ++v) store(out + i * out_row + v * kLanes, sums[i][v]);
}

// --- copies of factors ---------------------------------------------------------------------------------------------------

// A matrix (rows, width) in memory, its rows by their numbers in `index` where there is one.
struct Matrix {
  const Number* at;
  int64_t row, column, width;
  const int64_t* index;

  const Number* line(int64_t i) const { return at + (index ? index[i] : i) * row; }
};

// Numbers k..k + kLanes of line i, zero beyond its end.
INLINE Floats vector_of(const Matrix& from, int64_t i, int64_t k) {
  const Number* const at = from.line(i) + k * from.column;
  const int64_t left = from.width - k;
  return from.column == 1 && left >= kLanes ? load_numbers(at) : some_numbers(at, from.column, left < kLanes ? left : kLanes);
}

INLINE Floats load_full_words(const Number* at) {
  Floats words;
  if (kPack == 1) return load_numbers(at);
  std::memcpy(&words, at, sizeof words);
  return words;
}

// Words k..k + kLanes of a line, zero beyond its end.
INLINE Floats load_words(const Matrix& from, const Number* line, int64_t k) {
  const int64_t left = from.width - k * kPack;
  if (from.column == 1 && left >= kPack * kLanes) return load_full_words(line + k * kPack);
  if (kPack == 1) return some_numbers(line + k * from.column, from.column, left < kLanes ? left : kLanes);
  Number few[kPack * kLanes] = {};
  for (int64_t i = 0; i < kPack * kLanes && i < left; ++i) few[i] = line[(k * kPack + i) * from.column];
  Floats words;
  std::memcpy(&words, few, sizeof words);
  return words;
}

// Words k..k + kPanel of lines row..row + count, line after line: a left factor along the lines.
INLINE void pack_rows(const Matrix& from, int64_t row, int64_t count, int64_t k, float* to) {
  for (int64_t i = 0; i < count; ++i, to += kPanel) {
    const Number* const line = from.line(row + i);
    store(to, load_words(from, line, k));
    store(to + kLanes, load_words(from, line, k + kLanes));
  }
}

// The same for whole panels k..k + panels of words, each `stride` words after the one before, in portions while something else is
// computed, so that memory and registers work at the same time.
struct PackAhead {
  Matrix from{};
  int64_t row = 0, count = 0, k = 0, panels = 0, stride = 0;
  float* to = nullptr;
  int64_t full = 0, portion = 0, lines = 0;  // panels that the width fills; panels at a time; lines that are left
  const Number* at = nullptr;
  float* out = nullptr;
  int64_t panel = 0;

  PackAhead() = default;
  PackAhead(const Matrix& from, int64_t row, int64_t count, int64_t k, int64_t panels, float* to, int64_t stride, int64_t hints)
      : from(from), row(row), count(count), k(k), panels(panels), stride(stride), to(to),
        full(from.column == 1 ? std::clamp<int64_t>(from.width / kPack / kPanel - k / kPanel, 0, panels) : 0),
        portion((count * full + hints - 1) / hints), lines(full ? count : 0) {
    begin_line();
  }

  INLINE void begin_line() {
    at = lines ? from.line(row + count - lines) + k * kPack : nullptr;
    out = to + (count - lines) * kPanel;
    panel = 0;
  }

  INLINE void ask() {
    for (int64_t i = 0; i < portion && lines > 0; ++i) {
      store(out, load_full_words(at));
      store(out + kLanes, load_full_words(at + kPack * kLanes));
      __builtin_prefetch(at + count * from.row, 0, 3);  // for the block after this one
      __builtin_prefetch(at + count * from.row + kPack * kLanes, 0, 3);
      at += kPack * kPanel;
      out += stride;
      if (++panel == full) {
        --lines;
        begin_line();
      }
    }
  }

  void finish() {
    const Phase phase(kPacking);
    while (lines > 0) ask();
    for (int64_t p = full; p < panels; ++p) pack_rows(from, row, count, k + p * kPanel, to + p * stride);
  }
};

// Numbers first..first + kPanel of lines row..row + count, line after line, or pair of lines after pair: a right factor across
// the lines. Zero beyond the width, and in the place of the last pair's second line where there is none.
INLINE void pack_panel(const Matrix& from, int64_t row, int64_t count, int64_t first, float* to) {
  if (kPack == 1) return pack_rows(from, row, count, first, to);
  const int64_t left = from.width - first;
  Number few[2][kPanel];
  for (int64_t i = 0; i < count; i += 2, to += kPanel) {
    const Number* lines[2];
    for (int64_t l = 0; l < 2; ++l) {
      const bool there = i + l < count;
      lines[l] = there ? from.line(row + i + l) + first * from.column : few[l];
      if (there && from.column == 1 && left >= kPanel) continue;
      for (int64_t k = 0; k < kPanel; ++k) few[l][k] = there && k < left ? lines[l][k * from.column] : Number(0);
      lines[l] = few[l];
    }
#if STORAGE != 0
    for (int64_t v = 0; v < kPanel; v += kLanes)
      store(to + v, (Floats)(widened(lines[0] + v) | (widened(lines[1] + v) << 16)));
#endif
  }
}

#if defined(__clang__)
INLINE void transpose(Floats* lines) {
  float values[kLanes][kLanes];
  std::memcpy(values, lines, sizeof values);
  for (int64_t i = 0; i < kLanes; ++i)
    for (int64_t j = 0; j < kLanes; ++j) lines[i][j] = values[j][i];
}
#else
// A square of numbers packed: blocks of half its size change places, then blocks of a quarter, and so on.
INLINE void transpose(Floats* lines) {
  Ints lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
#pragma GCC unroll 16
  for (int size = kLanes / 2; size > 0; size /= 2) {
    const Ints odd = (lane & size) != 0;
    const Ints low = odd ? kLanes + (lane ^ size) : lane, high = odd ? kLanes + lane : (lane ^ size);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      if ((i & size) == 0) {
        const Floats a = lines[i], b = lines[i + size];
        lines[i] = __builtin_shuffle(a, b, low);
        lines[i + size] = __builtin_shuffle(a, b, high);
      }
  }
}
#endif

// Lines row..row + count as the right factor of a product along them: for each panel of lines word k of all of them, for all
// `depth` words. Lines up to `padded` are zero.
void pack_transposed(const Matrix& from, int64_t row, int64_t count, int64_t padded, int64_t depth, float* to) {
  const Phase phase(kPacking);
  for (int64_t r = 0; r < padded; r += kPanel) {
    const int64_t wide = padded - r < kPanel ? padded - r : kPanel;
    float* const panel = to + r * depth;
    for (int64_t j = 0; j < wide; j += kLanes)
      for (int64_t k = 0; k < depth; k += kLanes) {
        Floats lines[kLanes];
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes; ++i)
          lines[i] = r + j + i < count ? load_words(from, from.line(row + r + j + i), k) : Floats{};
        transpose(lines);
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes; ++i) store(panel + (k + i) * wide + j, lines[i]);
      }
  }
}

// --- tiles as left factors -------------------------------------------------------------------------------------------------

// As `bfloat16_of`, in an instruction where there is one, which takes denormal numbers for zero.
INLINE Shorts factors_of(Floats values) {
#if defined(PAIRS) && defined(__AVX512BF16__)
  return (Shorts)_mm512_cvtneps_pbh((__m512)values);
#else
  return bfloat16_of(values);
#endif
}

// A tile (C, R) of float32 as the left factor of sums over its columns: itself, or pairs of columns (C / 2, R) in `to`.
INLINE const float* pair_columns(const float* tile, int64_t columns, int64_t rows, float* to) {
  if (kPack == 1) return tile;
  for (int64_t c = 0; c < columns; c += 2)
    for (int64_t j = 0; j < rows; j += kLanes) {
      const Floats a = load(tile + c * rows + j), b = c + 1 < columns ? load(tile + (c + 1) * rows + j) : Floats{};
      const Ints low = __builtin_convertvector(factors_of(a), Ints), high = __builtin_convertvector(factors_of(b), Ints);
      store(to + c / 2 * rows + j, (Floats)(low | (high << 16)));
    }
  return to;
}

// The same for sums over its rows: itself, or pairs of rows (C, R / 2) in `to`.
INLINE const float* pair_rows(const float* tile, int64_t columns, int64_t rows, float* to) {
  if (kPack == 1) return tile;
  for (int64_t j = 0; j < columns * rows; j += kLanes) {
    const Shorts some = factors_of(load(tile + j));
    std::memcpy(to + j / 2, &some, sizeof some);
  }
  return to;
}

}  // namespace
