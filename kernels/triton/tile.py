# SPDX-License-Identifier: Apache-2.0
"""What every kernel does with one tile of logits: the product, the epilogue, and the gradient. Device functions only.

A tile is (A, B): A owners by B others. In the forward, owners are rows of hidden and others columns of the vocabulary;
in the gradient of the weight it is the other way round, so that the tile is made in the layout its product needs.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def narrow(x, dtype: tl.constexpr, OPERAND: tl.constexpr):
    """x in `dtype`, rounded to nearest even. The interpreter truncates to bf16, so there it is rounded by hand."""
    if dtype != OPERAND and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
        return tl.where(x == x, rounded, x).to(dtype)
    return x.to(dtype)


@triton.jit
def product(
    a_rows,  # (A,) pointers to the first entry of each row
    b_rows,  # (B,)
    D,
    stride_a,
    stride_b,
    A: tl.constexpr,
    B: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,  # D is a multiple of DEPTH
    ACC: tl.constexpr,
    OPERAND: tl.constexpr,  # dtype of the factors: the inputs', but wider in the interpreter, whose dot lacks bf16
    PRECISION: tl.constexpr,
):
    """a @ b.T (A, B) over the D entries of each row, accumulated in ACC."""
    k = tl.arange(0, DEPTH)
    a_ptr = a_rows[:, None] + (k.to(tl.int64) * stride_a)[None, :]
    b_ptr = b_rows[:, None] + (k.to(tl.int64) * stride_b)[None, :]
    # 64 bits also for the steps: DEPTH times the stride of a transposed weight may not fit in 32.
    step_a = tl.full((), DEPTH, tl.int64) * stride_a
    step_b = tl.full((), DEPTH, tl.int64) * stride_b
    out = tl.zeros((A, B), dtype=ACC)
    for start in range(0, D, DEPTH):
        if EVEN_DEPTH:
            a = tl.load(a_ptr)
            b = tl.load(b_ptr)
        else:
            inside = k[None, :] < D - start
            a = tl.load(a_ptr, mask=inside, other=0.0)
            b = tl.load(b_ptr, mask=inside, other=0.0)
        b = tl.trans(b).to(OPERAND)
        out = tl.dot(a.to(OPERAND), b, out, input_precision=PRECISION, out_dtype=ACC)
        a_ptr += step_a
        b_ptr += step_b
    return out


@triton.jit
def tma_product(
    a,  # tensor descriptor of (rows, D), tiles of (A, DEPTH)
    b,  # tensor descriptor of (rows, D), tiles of (B, DEPTH)
    row_a,
    row_b,
    D,
    A: tl.constexpr,
    B: tl.constexpr,
    DEPTH: tl.constexpr,
    ACC: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`product` of A rows from row_a on and B rows from row_b on; entries outside count as 0."""
    out = tl.zeros((A, B), dtype=ACC)
    for start in range(0, D, DEPTH):
        x = a.load([row_a, start])
        y = tl.trans(b.load([row_b, start]))
        out = tl.dot(x.to(OPERAND), y.to(OPERAND), out, input_precision=PRECISION, out_dtype=ACC)
    return out


@triton.jit
def tanh(x, PRECISE: tl.constexpr):
    """tanh(x), off by 2^-23; where PRECISE by a few units in the last place, for small x too."""
    if not PRECISE:
        return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    far = tl.where(x < 0, -far, far)
    # The Taylor series: below 1/4 each term is under a 1/39 of the one before.
    y = x * x
    near = y * 0.0
    if x.dtype == tl.float64:
        near = y * (18888466084.0 / 194896477400625.0) - 443861162.0 / 1856156927625.0
        near = near * y + 6404582.0 / 10854718875.0
        near = near * y - 929569.0 / 638512875.0
        near = near * y + 21844.0 / 6081075.0
        near = near * y - 1382.0 / 155925.0
    near = near * y + 62.0 / 2835.0
    near = near * y - 17.0 / 315.0
    near = near * y + 2.0 / 15.0
    near = (near * y - 1.0 / 3.0) * y
    return tl.where(tl.abs(x) < 0.25, x + x * near, far)


@triton.jit
def columns(tile, order, V, COLS: tl.constexpr, EVEN_COLS: tl.constexpr, ORDERED: tl.constexpr):
    """The classes of a tile of the vocabulary (COLS,) int32, which of them exist (COLS,), and where they lie in order."""
    place = tile * COLS + tl.arange(0, COLS)
    inside = place < V
    column = place
    if ORDERED:
        column = tl.load(order + place, mask=inside, other=0)
    elif not EVEN_COLS:
        # Column 0 stands in for those past the end: it can be read, and what comes of it is masked.
        column = tl.where(inside, place, 0)
    return column, inside, place


@triton.jit
def logits(x, bias, column, INNER: tl.constexpr, OUTER: tl.constexpr, CAPPED: tl.constexpr):
    """Logits z, and tanh where there is a cap (else z again), of products x; bias and column broadcast against x.

    CAPPED is 0 without a cap, 1 with one, 2 where tanh is to be precise.
    """
    if bias is not None:
        x += tl.load(bias + column).to(x.dtype)
    if INNER != 1.0:
        x *= INNER
    if CAPPED:
        t = tanh(x, CAPPED == 2)
        return t * OUTER, t
    return x, x


@triton.jit
def likeliest(z, top, place):
    """The first class (A,) with the largest logit `top` (A,) of each row of a tile (A, B); any class of a row with a NaN.

    Not by a maximum with indices, which would take registers for a second tile.
    """
    return tl.min(tl.where(z < top[:, None], 2147483647, place[None, :]), 1)


@triton.jit
def add_tile(
    x,
    bias,
    class_weight,
    column,
    inside,
    place,
    target,
    highest,
    total,
    at_target,
    smooth,
    weights,
    best,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    CAPPED: tl.constexpr,
    SMOOTH: tl.constexpr,
    TOP: tl.constexpr,
    EVEN_COLS: tl.constexpr,
):
    """A row's sums so far (A,) with one more tile of products x (A, B): the online softmax of arXiv 2411.09009, 4.1.

    The sums are the largest logit, sum exp(z - max), the target's logit, for SMOOTH sum w (z - max) and sum w (1,), and for
    TOP the class of the largest logit.
    """
    z, _ = logits(x, bias, column[None, :], INNER, OUTER, CAPPED)
    at_target += tl.sum(tl.where(place[None, :] == target[:, None], z, 0.0), 1)
    if not EVEN_COLS:
        z = tl.where(inside[None, :], z, float("-inf"))
    top = tl.max(z, 1)
    if TOP:
        best = tl.where(top > highest, likeliest(z, top, place), best)
    now = tl.maximum(highest, top)
    # Something finite to subtract while every logit so far is -inf.
    shift = tl.where(now == float("-inf"), 0.0, now)
    down = tl.where(highest == float("-inf"), 0.0, highest) - shift
    below = z - shift[:, None]
    if SMOOTH:
        # Before the exponentials, so that no two tiles are needed at once.
        finite = below if EVEN_COLS else tl.where(inside[None, :], below, 0.0)
        if class_weight is not None:
            w = tl.load(class_weight + column, mask=inside, other=0.0)
            smooth += weights * down + tl.sum(finite * w[None, :], 1)
            weights += tl.sum(w, 0)
        else:
            smooth += weights * down + tl.sum(finite, 1)
            weights += tl.sum(inside.to(x.dtype), 0)
    total *= tl.exp(tl.where(highest == float("-inf"), float("-inf"), down))
    total += tl.sum(tl.exp(below), 1)
    return now, total, at_target, smooth, weights, best


@triton.jit
def gradient(
    x,
    bias,
    class_weight,
    column,
    target,
    highest,
    prob,
    hit,
    uniform,
    inside,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    CAPPED: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    """The loss's gradient with respect to the products x; every other argument broadcasts against x.

    `inside` says which classes exist, None if all do. Rows past the end need no mask: `rows_at` gives them a maximum of
    +inf and coefficients of 0.
    (softmax - onehot) of arXiv 2411.09009, section 4.2, with the coefficients of `rows.Rows`.
    """
    z, t = logits(x, bias, column, INNER, OUTER, CAPPED)
    out = tl.exp(z - highest) * prob
    out = tl.where(column == target, out - hit, out)
    if SMOOTH:
        if class_weight is not None:
            out -= uniform * tl.load(class_weight + column).to(x.dtype)
        else:
            out -= uniform
    if CAPPED:
        out *= 1.0 - t * t
    if inside is not None:
        out = tl.where(inside, out, 0.0)
    return out


@triton.jit
def swizzle(pid, rows, cols, GROUP):
    """(row, col) of a program: `GROUP` rows at a time are met by all columns, so that both stay in the cache."""
    per_group = GROUP * cols
    group = pid // per_group
    first = group * GROUP
    height = tl.minimum(rows - first, GROUP)
    inner = pid % per_group
    return first + inner % height, inner // height


@triton.jit
def rows_at(place, kept, index, column, highest, prob, hit, uniform):
    """What the gradient needs of the rows at `place` (R,): number, target column, largest logit, coefficients.

    Past the end: row 0, no target, a maximum of +inf whose probabilities are 0, and coefficients of 0.
    """
    row = tl.load(index + place, mask=kept, other=0)
    target = tl.load(column + place, mask=kept, other=-1)
    # Where there is no uniform part, anything will do: `gradient` is told not to use it.
    u = hit if uniform is None else uniform
    return (
        row,
        target,
        tl.load(highest + place, mask=kept, other=float("inf")),
        tl.load(prob + place, mask=kept, other=0.0),
        tl.load(hit + place, mask=kept, other=0.0),
        tl.load(u + place, mask=kept, other=0.0),
    )


@triton.jit
def negligible(dx, prob, hit, share, CLASSES: tl.constexpr):
    """Whether every row's sum of |dx| over the tile's classes is at most that share of its coefficients (R,).

    CLASSES is the axis of dx that the classes are on. A block filter as in arXiv 2411.09009, section 4.3, on sums, so that
    the shares of all tiles are a bound for the row. Written so that a NaN is never negligible.
    """
    scale = tl.maximum(tl.abs(prob), tl.abs(hit))
    large = (tl.sum(tl.abs(dx), CLASSES) <= share * scale) == 0
    # As one row of all: triton 3.6 cannot compile a maximum of a vector of sums for tensor memory (Blackwell).
    return tl.max(tl.reshape(large.to(tl.int32), (1, large.numel))) == 0
