# SPDX-License-Identifier: Apache-2.0
"""What was done to a graph and why: the answer of `cce_fx.explain`, and one log line per loss."""

from __future__ import annotations

import html
from dataclasses import dataclass, field, replace
from typing import Any

import sympy

from .memory import NAMES, D, N, V, largest_rows
from .values import Decline, LossSite, source_line


@dataclass(frozen=True)
class Rewritten:
    """A loss that is now cut."""

    loss: str  # node name
    linear: str
    source: str
    path: tuple[str, ...]  # operations passed through, from the linear to the loss
    sources: tuple[str, ...]  # where each of them stands in the program
    tier: str  # "kernel", or "rows" for a row program
    strategy: str  # "grads_in_forward" or "recompute"
    bytes_saved: int | None  # at the example shapes; None where they are symbolic
    bytes_saved_expr: str  # in N rows, D hidden size, V classes
    bytes_needed_expr: str  # by the rewritten loss at its peak, gradients included
    rows: int | None  # N; None where it is symbolic
    hidden_size: int | None  # None where it is symbolic
    classes: int | None
    logits: str  # "unused", "lazy", "returned" or "used"

    @classmethod
    def of(cls, site: LossSite, logits: str) -> Rewritten:
        view = site.candidate.view
        return cls(
            loss=site.candidate.anchor.name,
            linear=view.linear.name,
            source=source_line(site.candidate.anchor),
            path=tuple(node.name for node in view.path),
            sources=tuple(source_line(node) for node in view.path),
            tier="kernel",
            strategy="recompute" if site.needs is None else "grads_in_forward",
            bytes_saved=site.saved_value,
            bytes_saved_expr=str(site.saved_bytes),
            bytes_needed_expr=str(site.needed_bytes),
            rows=site.row_count,
            hidden_size=_known(view.hidden_size),
            classes=_known(view.classes),
            logits=logits,
        )

    def without_weight(self, site: LossSite) -> Rewritten:
        """The same, where the gradient of the weight is counted with another loss, which shares it."""
        gradient = site.candidate.view.dtype.itemsize * V * D
        return replace(self, bytes_needed_expr=str(site.needed_bytes - gradient))

    def __str__(self) -> str:
        saved = _amount(self.bytes_saved, self.bytes_saved_expr)
        needed = _amount(self.bytes_needed, self.bytes_needed_expr)
        steps = list(zip(reversed(self.path), reversed(self.sources), strict=True))
        width = max(len(name) for name in self.path) + 6
        tree = [f"      {'<- ' if at else ''}{name}".ljust(width + 6) + where for at, (name, where) in enumerate(steps)]
        lines = [
            f"rewritten: saves {saved}, needs {needed}, {self.tier}, {self.strategy}, logits {self.logits}",
            *(line.rstrip() for line in tree),
        ]
        return "\n".join(lines)

    @property
    def bytes_needed(self) -> int | None:
        """Bytes that the rewritten loss takes at its peak, gradients included, at the example shapes; None where they are
        symbolic. Asks the kernel for its plan, so a CPU's is compiled if it was not yet."""
        if self.rows is None or self.hidden_size is None or self.classes is None:
            return None
        return int(self.needed_by_rows.subs(N, self.rows))

    @property
    def needed_by_rows(self) -> sympy.Expr:
        """`bytes_needed` as an expression in N alone. Raises ValueError where D or V is symbolic."""
        if self.hidden_size is None or self.classes is None:
            raise ValueError(f"the hidden size or the number of classes of {self.loss} is not known")
        expression = sympy.sympify(self.bytes_needed_expr, locals=NAMES)
        return expression.subs({D: self.hidden_size, V: self.classes})


def _known(size: Any) -> int | None:
    return size if isinstance(size, int) else None


def _amount(value: int | None, expression: str) -> str:
    return f"{expression} bytes" if value is None else human_bytes(value)


@dataclass(frozen=True)
class Declined:
    """A loss that was left as it was."""

    loss: str
    reason: str  # name of the Reason
    message: str
    source: str
    advice: str  # what to change

    @classmethod
    def of(cls, decline: Decline) -> Declined:
        return cls(decline.node.name, decline.reason.name, str(decline), source_line(decline.node), decline.advice)

    def __str__(self) -> str:
        return f"declined: {self.message}\n      to change that: {self.advice}"


@dataclass
class Report:
    """Every loss of one or several graphs. `print(report)` reads well; `to_dict()` is plain data."""

    rewritten: list[Rewritten] = field(default_factory=list)
    declined: list[Declined] = field(default_factory=list)
    graphs: int = 1

    def extend(self, other: Report) -> None:
        self.rewritten += other.rewritten
        self.declined += other.declined
        self.graphs += other.graphs

    def note_lazy(self, linears: set[str]) -> None:
        """The logits of these heads are handed out lazily."""
        self.rewritten = [replace(r, logits="lazy") if r.linear in linears else r for r in self.rewritten]

    @property
    def bytes_saved(self) -> int:
        """Bytes saved at the example shapes, over all rewritten losses whose shapes are known."""
        return sum(r.bytes_saved or 0 for r in self.rewritten)

    @property
    def bytes_needed(self) -> int:
        """Bytes that the rewritten losses hold at their peak, all together, beyond what the program holds without them."""
        return sum(r.bytes_needed or 0 for r in self.rewritten)

    def max_batch(self, memory: int) -> int:
        """The largest number of rows (tokens) N in each rewritten loss for which they fit into `memory`; 0 where none does.

        Args:
            memory: bytes for the losses: their gradients of hidden, weight and bias, and what the kernel works in. What the
                rest of the program holds for N rows is not among them.

        Raises:
            ValueError: no loss was rewritten, or the hidden size or the number of classes of one is symbolic.
        """
        if not self.rewritten:
            raise ValueError("no loss was rewritten")
        return largest_rows(sum(r.needed_by_rows for r in self.rewritten), memory)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, which `json.dumps` takes: `graphs`, `bytes_saved` and `bytes_needed` (both in bytes, at
        the example shapes), and lists `rewritten` and `declined` of dictionaries with the attributes of `Rewritten` and
        `Declined`.
        """
        return {
            "graphs": self.graphs,
            "bytes_saved": self.bytes_saved,
            "bytes_needed": self.bytes_needed,
            "rewritten": [{**vars(r), "bytes_needed": r.bytes_needed} for r in self.rewritten],
            "declined": [vars(d).copy() for d in self.declined],
        }

    def __str__(self) -> str:
        head = (
            f"cce_fx: {len(self.rewritten)} loss(es) rewritten, {len(self.declined)} declined in {self.graphs} graph(s); "
            f"{human_bytes(self.bytes_saved)} saved at the example shapes"
        )
        return "\n".join([head, *(f"  {line}" for line in (*self.rewritten, *self.declined) or (self._why_nothing(),))])

    def _why_nothing(self) -> str:
        if self.graphs == 0:
            return "nothing was captured: Dynamo ran all of it in eager. torch.compile(model, fullgraph=True) says why"
        return "no loss is in what was captured: it may be outside, or after a graph break (TORCH_LOGS=graph_breaks lists them)"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return f"<pre>{html.escape(str(self))}</pre>"


def human_bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
