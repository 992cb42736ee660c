// SPDX-License-Identifier: Apache-2.0
// From a tile of products to the gradients: in comes what head.h makes, out go the gradient of the products, in its place, and
// what the tile adds to those of hidden, weight and bias. steps.cpp puts the pieces in order.

namespace {

// --- gradient of the products ------------------------------------------------------------------------------------------------

// visit(row, column) of each target of the block that lies in the chunk; rows are numbered within the block.
template <typename Visit>
INLINE void each_target(const Call& q, Columns columns, const RowBlock& block, const Visit& visit) {
  const int64_t* const target = q.target + q.first + block.first;
  for (int64_t r = 0; r < block.count; ++r) {
    const int64_t c = target[r] - columns.first;
    if (c >= 0 && c < columns.count) visit(r, c);
  }
}

// What a tile (C, R) still lacks to be the gradient of the products: entry(vector of it, first of its rows) is a pair, p and the
// cap's slope. One-hot parts, whose slope is state, are taken off afterwards; sums over the rows go to the bias's gradient.
template <typename Entry>
INLINE void make_gradient(const Call& q, Columns columns, float* tile, const RowBlock& block, const RowState& state, bool bias,
                          const Entry& entry) {
  const Phase phase(kExponentials);
  for (int64_t c = 0; c < columns.count; ++c) {
    const float w = q.class_weight ? q.class_weight[columns.first + c] : 1.0f;
    Floats total = {};
    for (int64_t j = 0; j < block.padded; j += kLanes) {
      float* const at = tile + c * block.padded + j;
      const auto [p, slope] = entry(load(at), block.first + j);
      const Floats g = (p - load(state.uniform + block.first + j) * w) * slope;
      store(at, g);
      total += g;
    }
    if (bias) {
      float& sum = q.d_bias[columns.first + c];
      sum = (q.fresh && block.number == 0 ? 0.0f : sum) + sum_of(total);
    }
  }
  each_target(q, columns, block, [&](int64_t r, int64_t c) {
    const float hit = q.hit[q.first + block.first + r] * state.slope[block.first + r];
    tile[c * block.padded + r] -= hit;
    if (bias) q.d_bias[columns.first + c] -= hit;
  });
}

struct Pair {
  Floats p, slope;
};

// The gradient of the products in the place of products, where the sums are state.
template <bool kCapped>
void gradient_of(const Call& q, Columns columns, float* tile, const RowBlock& block, const RowState& state, bool bias) {
  if (kCapped)
    each_target(q, columns, block, [&](int64_t r, int64_t c) {
      const float t = tanh_of(tile[c * block.padded + r]);
      state.slope[block.first + r] = 1.0f - t * t;
    });
  make_gradient(q, columns, tile, block, state, bias, [&](Floats x, int64_t r) __attribute__((always_inline)) {
    const Floats t = kCapped ? tanh_of(x) : Floats{};
    const Floats z = kCapped ? rounded(t * q.outer) : x;
    return Pair{exp_floor(z - load(state.shift + r)) * load(state.ratio + r), 1.0f - t * t};
  });
}

// --- gradient of hidden ------------------------------------------------------------------------------------------------------

// Pack a chunk's weights as the right factor of the gradient of hidden, unless the logits of the chunk have done so.
void pack_right(const Call& q, const Sizes& s, Columns columns, const Buffers& own, bool there) {
  if (there && both_factors(q)) return;
  const Phase phase(kPacking);
  for (int64_t k = 0; k < s.span; k += kPanel)
    pack_panel(weight_of(q), columns.first, columns.count, k, own.right + k * s.pairs);
}

// d_hidden (D / panel, R, panel) = or += tile^T W, for the rows of a block, which begin at `first` among `all` rows.
void add_hidden(const Call& q, const Sizes& s, Columns columns, const float* tile, const RowBlock& block, int64_t first, int64_t all,
                const Buffers& own, float* d_hidden, bool add) {
  const Phase phase(kHiddenGradient);
  const float* const words = pair_columns(tile, columns.count, block.padded, own.words);
  const int64_t length = up(columns.count, kPack) / kPack;
  const Nothing nothing;
  for (int64_t k = 0; k < s.span; k += kPanel) {
    const Right panel = {own.right + k * s.pairs, kPanel};
    float* const out = d_hidden + k * all + first * kPanel;
    in_blocks(block.count, [&](auto size, int64_t r) __attribute__((always_inline)) {
      constexpr int kR = decltype(size)::kValue;
      const Left left = {words + r, 1, block.padded, 1, length, 0};
      multiply<kR, 2, 1, 0>(left, panel, out + r * kPanel, kPanel, add, nothing, nothing);
    });
  }
}

// --- gradient of the weight --------------------------------------------------------------------------------------------------

// Columns of hidden as panels, copied for `rows` rows: as many at once as stay in the cache.
struct Panels {
  int64_t group;
  float* copy;  // (group / panel, R / pack, panel)

  Panels(const Call& q, const Sizes& s, int64_t rows, Workspace& workspace)
      : group(std::min(s.span, std::max(kPanel, kCopied / rows / kPanel * kPanel))),
        copy(q.d_weight ? workspace.take(up(rows, kPack) / kPack * group) : nullptr) {}

  bool all(const Sizes& s) const { return group == s.span; }

  void take(const Call& q, const Sizes& s, int64_t row, int64_t count, int64_t first) const {
    const Phase phase(kPacking);
    for (int64_t k = first; k < std::min(first + group, s.span); k += kPanel)
      pack_panel(hidden_of(q), row, count, k, at(count, k - first));
  }

  float* at(int64_t count, int64_t k) const { return copy + k * (up(count, kPack) / kPack); }
};

// Rows of the gradient of the weight, in float32: `width` numbers of each, `step` apart.
struct Target {
  float* at;
  int64_t step, width;

  float* line(int64_t c) const { return at + c * step; }
};

// Tiles (C, R) of rows row..row + count of a block, in row blocks of `block` rows.
struct Tiles {
  const float* at;  // as left factors of sums over their rows
  int64_t row, count, block;
};

template <int kR>
INLINE void weight_block(const Call& q, const Tiles& tiles, int64_t c, const float* panel, const Target& out, int64_t k, bool add,
                         Ahead<true>& ahead) {
  const int64_t whole = tiles.count / tiles.block, done = whole * tiles.block, left_rows = tiles.count - done;
  const int64_t words = tiles.block / kPack, padded = up(left_rows, kFill) / kPack;
  const int64_t wide = std::min(kPanel, out.width - k);
  const bool apart = wide < kPanel;
  float sums[kR * kPanel];
  float* const to = apart ? sums : out.line(c) + k;
  const int64_t step = apart ? kPanel : out.step;
  const bool add_here = add && !apart;
  const Nothing nothing;
  if (whole) {
    const Left left = {tiles.at + c * words, words, 1, whole, words, q.columns * words};
    multiply<kR, 2, 0, 1>(left, {panel, kPanel}, to, step, add_here, ahead, nothing);
  }
  if (left_rows) {
    const Left left = {tiles.at + done / kPack * q.columns + c * padded, padded, 1, 1, up(left_rows, kPack) / kPack, 0};
    multiply<kR, 2, 0, 1>(left, {panel + done / kPack * kPanel, kPanel}, to, step, whole || add_here, ahead, nothing);
  }
  for (int64_t i = 0; apart && i < kR; ++i) {
    float* const line = out.line(c + i) + k;
    for (int64_t j = 0; j < wide; ++j) line[j] = (add ? line[j] : 0.0f) + sums[i * kPanel + j];
  }
}

// out (C, D) of a chunk = or += tiles @ hidden.
void add_weight(const Call& q, const Sizes& s, Columns columns, const Tiles& tiles, const Panels& panels, Target out, bool add) {
  const Phase phase(kWeightGradient);
  for (int64_t first = 0; first < out.width; first += panels.group) {
    if (!panels.all(s)) panels.take(q, s, tiles.row, tiles.count, first);
    const int64_t last = std::min(first + panels.group, out.width);
    in_blocks(columns.count, [&](auto size, int64_t c) __attribute__((always_inline)) {
      constexpr int kR = decltype(size)::kValue;
      const int64_t below = c + 2 * kR <= columns.count ? c + kR : c;
      for (int64_t k = first; k < last; k += kPanel) {
        const bool more = k + kPanel < last;  // what comes next is in no cache, as a rule
        const float* const next = out.line(more ? c : below) + (more ? k + kPanel : first);
        const int64_t words = up(tiles.count, kPack) / kPack, lines = kR * kPanel / 16;
        Ahead<true> ahead = {reinterpret_cast<const char*>(next), 4 * out.step, 4 * kPanel, kR, (lines * kUnroll + words - 1) / words};
        weight_block<kR>(q, tiles, c, panels.at(tiles.count, k - first), out, k, add, ahead);
      }
    });
  }
}

}  // namespace
