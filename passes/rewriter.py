# SPDX-License-Identifier: Apache-2.0
"""Rewrite: write one operator call for each `LossSite`, and take away what nothing reads any more."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node, Proxy

from .._torch import GraphAppendingTracer
from ..functional import (
    LIKELIEST,
    KernelSpec,
    Read,
    filter_bound,
    row_statistics,
    site_loss,
    statistics_dtype,
    target_logit,
    top_class,
)
from ..kernels.spec import Needs
from .canonical import CHECKS, canonical
from .fakes import WouldGuard, propagate
from .policy import Policy
from .sharded import has_sharded_head, write_loss
from .values import Candidate, Decline, Form, LogitsView, LossSite, Operand, Reason, Result, value_of


class Builder:
    """Writes nodes into a graph by running ordinary code on proxies, and remembers what it wrote."""

    def __init__(self, graph: Graph, moved: dict[Node, Node]) -> None:
        self.graph: Graph = graph
        self.moved: dict[Node, Node] = moved
        self.written: list[Node] = []
        self._tracer = GraphAppendingTracer(graph)

    @contextlib.contextmanager
    def before(self, node: Node, like: Node | None = None) -> Iterator[None]:
        """Write before `node`, on behalf of its source line or that of another one that it is `like`."""
        first = node.prev
        try:
            with self.graph.inserting_before(node):
                yield
        finally:
            self._adopt(first, node, node if like is None else like)

    def _adopt(self, first: Node, last: Node, like: Node) -> None:
        at = first.next
        while at is not last:
            self.written.append(at)
            for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "custom"):
                if key in like.meta and key not in at.meta:
                    at.meta[key] = like.meta[key]
            at = at.next

    def proxy(self, value: Any) -> Any:
        """Proxies in place of the nodes in a value; of what was written for them where they were rewritten."""
        return torch.fx.node.map_arg(value, lambda n: Proxy(self.moved.get(n, n), self._tracer))

    def operand(self, operand: Operand, dtype: torch.dtype) -> Any:
        """An operand with its steps, in `dtype`."""
        x = self.proxy(operand.node)
        for step in operand.steps:
            args = (self.operand(a, dtype) if isinstance(a, Operand) else self.proxy(a) for a in step.args)
            x = step.apply(x, *args)
        return x if value_of(operand.node).dtype == dtype else x.to(dtype)

    def undo(self) -> None:
        for node in reversed(self.written):
            self.graph.erase_node(node)
        self.written.clear()


def rewrite_site(gm: GraphModule, site: LossSite, policy: Policy, moved: dict[Node, Node]) -> Decline | None:
    """Replace the site's loss; a Decline, with the graph as it was, where the result does not fit in its place.

    `moved` tells what stands in the place of anchors that were replaced before, and is told of this one.
    """
    anchor = site.candidate.anchor
    builder = Builder(gm.graph, moved)
    try:
        with builder.before(site.place or anchor, like=anchor):
            new, readings = _write(builder, site, policy)
        propagate(gm, builder.written, grad=value_of(anchor).requires_grad)
    except WouldGuard as error:
        builder.undo()
        return Decline(Reason.DYNAMIC, anchor, str(error))
    written = {anchor: new.node} | {r.anchor: out.node for r, out in zip(site.readings, readings, strict=True)}
    for node, other in written.items():
        was, now = value_of(node), value_of(other)
        if was.dtype != now.dtype or len(was.shape) != len(now.shape) or was.requires_grad != now.requires_grad:
            builder.undo()
            return Decline(
                Reason.INTERNAL, node, f"{tuple(was.shape)} {was.dtype} became {tuple(now.shape)} {now.dtype}"
            )
    moved |= written
    kernel = next((n for n in builder.written if n.target in LIKELIEST), None)
    if kernel is not None and site.candidate.result is Result.LOSS:
        kernel.meta["cce_fx_loss"] = site.candidate
    for candidate in (site.candidate, *site.readings):
        in_its_place(candidate.anchor, written[candidate.anchor])
        candidate.anchor.replace_all_uses_with(written[candidate.anchor])
        erase_unused(gm.graph, [candidate.anchor, *reversed(candidate.view.path)])
    return None


def in_its_place(old: Node, new: Node) -> None:
    """Give what stands in the place of a node its example value, whose memory is that of the views that others have of it."""
    new.meta["example_value"] = value_of(old)


_FORMS = {
    Form.LOGITS: lambda z: z,
    Form.LOG_SOFTMAX: lambda z: torch.log_softmax(z, -1),
    Form.NEG_LOG_SOFTMAX: lambda z: -torch.log_softmax(z, -1),
    Form.SOFTMAX: lambda z: torch.softmax(z, -1),
}


def write_operands(gm: GraphModule, view: LogitsView) -> bool:
    """Make the graph return what `logits_of` takes: hidden, its last dimension D, weight and bias; whether it can."""
    if view.form not in _FORMS:
        return False
    builder = Builder(gm.graph, {})
    output = next(n for n in gm.graph.nodes if n.op == "output")
    with builder.before(output):
        operands = _operands(builder, view, view.dtype)
    output.args = (tuple(None if x is None else x.node for x in operands),)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return True


def _operands(builder: Builder, view: LogitsView, bias_dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """hidden (..., D) with D last, weight (V, D) and bias (V,) or None."""
    hidden = builder.operand(view.hidden, view.dtype)
    if view.class_dim != len(view.shape) - 1:
        hidden = torch.movedim(hidden, view.class_dim, -1)
    bias = None if view.bias is None else builder.operand(view.bias, bias_dtype)
    return hidden, builder.operand(view.weight, view.dtype), bias


def head_operands(builder: Builder, view: LogitsView) -> tuple[Any, Any]:
    """hidden (..., D) with D last and weight (V, D), in the dtype of the product."""
    hidden, weight, _ = _operands(builder, view, view.dtype)
    return hidden, weight


def size_of(size: Any, x: Any, dim: int) -> Any:
    """A size of a proxy, itself where it is a number: what is written into a graph holds no symbol."""
    return size if isinstance(size, int) else x.size(dim)


def logits_of(view: LogitsView, dtype: torch.dtype, hidden: Any, weight: Any, bias: Any) -> Any:
    """A view's value (..., V) in `dtype` for some of its rows, of tensors or of proxies."""
    return _FORMS[view.form](after_product(view, dtype, torch.nn.functional.linear(hidden, weight, bias)))


def after_product(view: LogitsView, dtype: torch.dtype, z: Any) -> Any:
    """A view's logits in `dtype`, of hidden @ weight.T + bias: a tensor or a proxy."""
    e = view.epilogue
    z = z if view.dtype == dtype else z.to(dtype)
    z = z if e.scale == 1.0 else z * e.scale
    z = z if e.softcap is None else torch.tanh(z / e.softcap) * e.softcap
    return z if e.post_scale == 1.0 else z * e.post_scale


def write_logits(gm: GraphModule, view: LogitsView, node: Node) -> bool:
    """Compute `node` from a hidden state of its own rows, in place; whether its form allows that."""
    if view.form not in _FORMS:
        return False
    builder = Builder(gm.graph, {})
    with builder.before(node.next):
        z = logits_of(view, value_of(node).dtype, *_operands(builder, view, view.dtype))
        z = z if view.class_dim == len(view.shape) - 1 else torch.movedim(z, -1, view.class_dim)
    node.replace_all_uses_with(z.node, delete_user_cb=lambda user: user not in builder.written)
    erase_unused(gm.graph, list(reversed(view.path)))
    gm.graph.lint()
    gm.recompile()
    return True


def _write(builder: Builder, site: LossSite, policy: Policy) -> tuple[Any, list[Any]]:
    """What stands in the place of a site's anchor, and of the anchors of its readings."""
    candidate, readings = site.candidate, []
    view, loss = candidate.view, candidate.loss
    if has_sharded_head(view):
        return _write_sharded(builder, site, policy), []
    shaped, weight, bias = _operands(builder, view, view.bias_dtype)
    hidden = shaped if len(view.shape) == 2 else torch.reshape(shaped, (-1, size_of(view.hidden_size, weight, 1)))
    class_weight = None if candidate.class_weight is None else builder.proxy(candidate.class_weight)
    kernel = KernelSpec(
        needs=None if site.needs is None else Needs(*site.needs),
        autocast=False,  # the casts of the program are in the graph
        workspace=policy.workspace,
        filter_eps=filter_bound(policy.filter_eps, view.dtype),
        tune=policy.tune,
        reads=frozenset(_READS[r.result] for r in site.readings),
    )
    dtype = statistics_dtype(view.dtype)
    target = rows = None
    if candidate.target is not None:
        target = builder.proxy(candidate.target)
        rows = target if value_of(candidate.target).dim() == 1 else torch.reshape(target, (-1,))
    if candidate.result is Result.LOSS:
        classes = size_of(view.classes, weight, 0)
        out, read = site_loss(hidden, weight, bias, rows, class_weight, classes, dtype, loss, kernel)
        readings = [_reading(builder, r, read[_READS[r.result]]) for r in site.readings]
        if loss.reduction == "none" and len(view.shape) != 2:
            out = out.reshape_as(target)
    else:
        out = _rows(builder, candidate, (hidden, weight, bias, rows), kernel, dtype)
        out = out.sum() if candidate.total else _as_anchor(out, candidate, shaped)
    return out if value_of(candidate.anchor).dtype == dtype else out.to(value_of(candidate.anchor).dtype), readings


_READS: dict[Result, Read] = {Result.TOP: "top", Result.MEAN: "mean"}


def _reading(builder: Builder, reading: Candidate, rows: Any) -> Any:
    """What is read of each row (N,), as the anchor has it."""
    dtype = value_of(reading.anchor).dtype
    if reading.total:
        out = rows.mean()
    else:
        out = _as_anchor(rows, reading, _operands(builder, reading.view, reading.view.dtype)[0])
    return out if reading.result is Result.TOP else out.to(dtype)


def _write_sharded(builder: Builder, site: LossSite, policy: Policy) -> Any:
    view, weights = site.candidate.view, site.candidate.class_weight
    class_weight = None if weights is None else builder.proxy(weights)
    operands = _operands(builder, view, view.bias_dtype)
    out = write_loss(site, operands, builder.proxy(site.candidate.target), class_weight, policy.workspace)
    dtype = value_of(site.candidate.anchor).dtype
    return out if dtype == statistics_dtype(view.dtype) else out.to(dtype)


def _rows(builder: Builder, candidate: Candidate, head: tuple[Any, ...], kernel: KernelSpec, dtype: torch.dtype) -> Any:
    """What a candidate other than a loss returns, (N,) in `dtype`."""
    view, result, epilogue = candidate.view, candidate.result, candidate.loss.epilogue
    hidden, weight, bias, rows = head
    shift = None if view.shift is None else torch.reshape(builder.proxy(view.shift), (-1,)).to(dtype)
    if result is Result.LOGIT:
        out = target_logit(hidden, weight, bias, rows, epilogue, dtype)
    elif result is Result.MAX:
        out = target_logit(
            hidden, weight, bias, top_class(hidden, weight, bias, epilogue, kernel.workspace), epilogue, dtype
        )
    else:
        summed = result in (Result.SUM_LOG, Result.MEAN_LOG)
        if rows is None:
            rows = torch.zeros_like(hidden.select(1, 0), dtype=torch.int64)
        nll, lse, smooth = row_statistics(hidden, weight, bias, rows, candidate.loss, kernel, smooth=summed)
        if result is Result.PROB:
            return torch.exp(-nll)
        if result is Result.LOG_PROB or summed:
            if result is Result.MEAN_LOG:
                smooth = smooth / size_of(view.classes, weight, 0)
            out = nll if result is Result.LOG_PROB else smooth
            return out if candidate.negated else -out
        out = lse
    if shift is not None:
        out = out - shift
    return torch.exp(out) if result is Result.SUM_EXP else out


def _as_anchor(out: Any, candidate: Candidate, shaped: Any) -> Any:
    """(N,) in the shape of the anchor; `shaped` is hidden (..., D) in the view's rows, the class dimension last."""
    rank, at = len(candidate.view.shape), candidate.view.class_dim
    if rank != 2:
        out = out.reshape_as(shaped.select(-1, 0))
    return out.unsqueeze(at) if candidate.keepdim else out


def erase_unused(graph: Graph, nodes: list[Node]) -> None:
    """Erase those of `nodes`, users before what they use, that nothing reads.

    A part of one that is never used is no reader, nor is what `torch.export` checks of a dtype, if there is no other.
    """
    for node in nodes:
        parts = [u for u in node.users if u.target is operator.getitem and not u.users]
        checks = [u for u in node.users if canonical(u) in CHECKS]
        for idle in [*parts, *(checks if len(parts) + len(checks) == len(node.users) else ())]:
            graph.erase_node(idle)
        if not node.users and not getattr(node, "_erased", False):
            graph.erase_node(node)


def logits_use(view: LogitsView) -> str:
    """What still reads the logits of a view after its loss is gone."""
    alive = [n for n in view.path if n.users]
    if not alive:
        return "unused"
    readers = {u for n in alive for u in n.users if u not in view.path}
    return "returned" if readers and all(r.op == "output" for r in readers) else "used"
