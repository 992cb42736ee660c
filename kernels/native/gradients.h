// SPDX-License-Identifier: Apache-2.0
// From the logits of a chunk of columns to the gradients: of the products, of hidden and of the weight.

namespace {

// --- gradient of the products ------------------------------------------------------------------------------------------------

// visit(row, column) of each target of the stretch that lies in the chunk; rows are numbered within the stretch.
template <typename Visit>
INLINE void each_hit(const Call& q, Columns columns, const Stretch& stretch, const Visit& visit) {
  const int64_t* const target = q.target + q.first + stretch.first;
  for (int64_t r = 0; r < stretch.count; ++r) {
    const int64_t c = target[r] - columns.first;
    if (c >= 0 && c < columns.count) visit(r, c);
  }
}

// What a tile (C, R) still lacks to be the gradient of the products: entry(vector of it, first of its rows) is a pair, p and the
// cap's slope. One-hot parts, whose slope is known, are taken off afterwards; sums over the rows go to the bias's gradient.
template <typename Entry>
INLINE void make_gradient(const Call& q, Columns columns, float* tile, const Stretch& stretch, const Known& known, bool bias,
                          const Entry& entry) {
  for (int64_t c = 0; c < columns.count; ++c) {
    const float w = q.class_weight ? q.class_weight[columns.first + c] : 1.0f;
    Floats total = {};
    for (int64_t j = 0; j < stretch.padded; j += kLanes) {
      float* const at = tile + c * stretch.padded + j;
      const auto [p, slope] = entry(load(at), stretch.first + j);
      const Floats g = (p - load(known.uniform + stretch.first + j) * w) * slope;
      store(at, g);
      total += g;
    }
    if (bias) {
      float& sum = q.d_bias[columns.first + c];
      sum = (q.fresh && stretch.number == 0 ? 0.0f : sum) + sum_of(total);
    }
  }
  each_hit(q, columns, stretch, [&](int64_t r, int64_t c) {
    const float hit = q.hit[q.first + stretch.first + r] * known.slope[stretch.first + r];
    tile[c * stretch.padded + r] -= hit;
    if (bias) q.d_bias[columns.first + c] -= hit;
  });
}

struct Pair {
  Floats p, slope;
};

// The gradient of the products in the place of products, where the sums are known.
template <bool kCapped>
void gradient_of(const Call& q, Columns columns, float* tile, const Stretch& stretch, const Known& known, bool bias) {
  if (kCapped)
    each_hit(q, columns, stretch, [&](int64_t r, int64_t c) {
      const float t = tanh_of(tile[c * stretch.padded + r]);
      known.slope[stretch.first + r] = 1.0f - t * t;
    });
  make_gradient(q, columns, tile, stretch, known, bias, [&](Floats x, int64_t r) __attribute__((always_inline)) {
    const Floats t = kCapped ? tanh_of(x) : Floats{};
    const Floats z = kCapped ? rounded(t * q.outer) : x;
    return Pair{exp_floor(z - load(known.shift + r)) * load(known.ratio + r), 1.0f - t * t};
  });
}

// --- gradient of hidden ------------------------------------------------------------------------------------------------------

// Copy a chunk's weights as the right factor of the gradient of hidden, where that is not what `left` is.
void copy_right(const Call& q, const Sizes& s, Columns columns, const Own& own) {
  if (kPack == 1) return;
  for (int64_t k = 0; k < s.span; k += kPanel)
    copy_panel(weight_of(q), columns.first, columns.count, k, own.right + k * s.pairs);
}

// d_hidden (D / panel, R, panel) = or += tile^T W, for the rows of a stretch, which begin at `first` among `all` rows.
void add_hidden(const Call& q, const Sizes& s, Columns columns, const float* tile, const Stretch& stretch, int64_t first, int64_t all,
                const Own& own, float* d_hidden, bool add) {
  const float* const words = pair_columns(tile, columns.count, stretch.padded, own.words);
  const int64_t length = up(columns.count, kPack) / kPack;
  Nothing nothing;
  for (int64_t k = 0; k < s.span; k += kPanel) {
    float* const out = d_hidden + k * all + first * kPanel;
    in_blocks(stretch.count, [&](auto size, int64_t r) __attribute__((always_inline)) {
      constexpr int kR = decltype(size)::kValue;
      const Left left = {words + r, 1, stretch.padded, 1, length, 0};
      multiply<kR, 2, 1, 0>(left, own.right + k * s.pairs, out + r * kPanel, kPanel, add, nothing, nothing);
    });
  }
}

// --- gradient of the weight --------------------------------------------------------------------------------------------------

// Columns of hidden as panels, copied for `rows` rows: as many at once as stay in the cache.
struct Panels {
  int64_t group;
  float* copy;  // (group / panel, R / pack, panel)

  Panels(const Call& q, const Sizes& s, int64_t rows, Room& room)
      : group(std::min(s.span, std::max(kPanel, kCopied / rows / kPanel * kPanel))),
        copy(q.d_weight ? room.take(up(rows, kPack) / kPack * group) : nullptr) {}

  bool all(const Sizes& s) const { return group == s.span; }

  void take(const Call& q, const Sizes& s, int64_t row, int64_t count, int64_t first) const {
    for (int64_t k = first; k < std::min(first + group, s.span); k += kPanel)
      copy_panel(hidden_of(q), row, count, k, at(count, k - first));
  }

  float* at(int64_t count, int64_t k) const { return copy + k * (up(count, kPack) / kPack); }
};

// Rows of the gradient of the weight, in float32: `width` numbers of each, `step` apart; some of them by their numbers in
// `index`, where there is one.
struct Target {
  float* at;
  int64_t step, width;
  const int64_t* index;

  float* line(int64_t c) const { return at + (index ? index[c] : c) * step; }
};

// Tiles (C, R) of rows row..row + count of a block, in stretches of `stretch` rows.
struct Tiles {
  const float* at;  // as left factors of sums over their rows
  int64_t row, count, stretch;
};

template <int kR>
INLINE void weight_block(const Call& q, const Tiles& tiles, int64_t c, const float* panel, const Target& out, int64_t k, bool add) {
  const int64_t whole = tiles.count / tiles.stretch, done = whole * tiles.stretch, left_rows = tiles.count - done;
  const int64_t words = tiles.stretch / kPack, padded = up(left_rows, kFill) / kPack;
  const int64_t wide = std::min(kPanel, out.width - k);
  const bool apart = wide < kPanel || out.index;  // rows that do not lie as a block does
  float block[kR * kPanel];
  float* const to = apart ? block : out.line(c) + k;
  const int64_t step = apart ? kPanel : out.step;
  const bool add_here = add && !apart;
  Nothing nothing;
  if (whole) {
    const Left left = {tiles.at + c * words, words, 1, whole, words, q.columns * words};
    multiply<kR, 2, 0, 1>(left, panel, to, step, add_here, nothing, nothing);
  }
  if (left_rows) {
    const Left left = {tiles.at + done / kPack * q.columns + c * padded, padded, 1, 1, up(left_rows, kPack) / kPack, 0};
    multiply<kR, 2, 0, 1>(left, panel + done / kPack * kPanel, to, step, whole || add_here, nothing, nothing);
  }
  for (int64_t i = 0; apart && i < kR; ++i) {
    float* const line = out.line(c + i) + k;
    const float* const sums = block + i * kPanel;
    if (wide == kPanel) {
      for (int64_t j = 0; j < kPanel; j += kLanes) store(line + j, add ? load(line + j) + load(sums + j) : load(sums + j));
    } else {
      for (int64_t j = 0; j < wide; ++j) line[j] = (add ? line[j] : 0.0f) + sums[j];
    }
  }
}

// out (C, D) of a chunk = or += tiles @ hidden.
void add_weight(const Call& q, const Sizes& s, Columns columns, const Tiles& tiles, const Panels& panels, Target out, bool add) {
  for (int64_t first = 0; first < out.width; first += panels.group) {
    if (!panels.all(s)) panels.take(q, s, tiles.row, tiles.count, first);
    const int64_t last = std::min(first + panels.group, out.width);
    in_blocks(columns.count, [&](auto size, int64_t c) __attribute__((always_inline)) {
      constexpr int kR = decltype(size)::kValue;
      const int64_t below = c + 2 * kR <= columns.count ? c + kR : c;
      for (int64_t k = first; k < last; k += kPanel) {
        const bool more = k + kPanel < last;  // what comes next is in no cache, as a rule
        for (int64_t i = 0; i < kR; ++i)
          for (int64_t j = 0; j < kPanel; j += 16)
            __builtin_prefetch(out.line((more ? c : below) + i) + (more ? k + kPanel : first) + j, 1, 3);
        weight_block<kR>(q, tiles, c, panels.at(tiles.count, k - first), out, k, add);
      }
    });
  }
}

}  // namespace
