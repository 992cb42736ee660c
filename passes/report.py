"""What was done to a graph and why: the answer of `cce_fx.explain`, and one log line per loss."""

from __future__ import annotations

import html
from dataclasses import dataclass, field, replace
from typing import Any

from .values import Decline, LossSite, source_line


@dataclass(frozen=True)
class Rewritten:
    """A loss that is now cut."""

    loss: str  # node name
    linear: str
    source: str
    path: tuple[str, ...]  # operations passed through, from the linear to the loss
    sources: tuple[str, ...]  # where each of them stands in the program
    strategy: str  # "grads_in_forward" or "recompute"
    bytes_saved: int | None  # at the example shapes; None where they are symbolic
    bytes_saved_expr: str  # in N rows, D hidden size, V classes
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
            strategy="recompute" if site.needs is None else "grads_in_forward",
            bytes_saved=site.saved_value,
            bytes_saved_expr=str(site.saved_bytes),
            logits=logits,
        )

    def __str__(self) -> str:
        saved = self.bytes_saved_expr + " bytes" if self.bytes_saved is None else human_bytes(self.bytes_saved)
        steps = list(zip(reversed(self.path), reversed(self.sources), strict=True))
        width = max(len(name) for name in self.path) + 6
        tree = [f"      {'<- ' if at else ''}{name}".ljust(width + 6) + where for at, (name, where) in enumerate(steps)]
        lines = [f"rewritten: saves {saved}, {self.strategy}, logits {self.logits}", *(line.rstrip() for line in tree)]
        return "\n".join(lines)


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

    def to_dict(self) -> dict[str, Any]:
        return {
            "graphs": self.graphs,
            "bytes_saved": self.bytes_saved,
            "rewritten": [vars(r).copy() for r in self.rewritten],
            "declined": [vars(d).copy() for d in self.declined],
        }

    def __str__(self) -> str:
        head = (
            f"cce_fx: {len(self.rewritten)} loss(es) rewritten, {len(self.declined)} declined in {self.graphs} graph(s); "
            f"{human_bytes(self.bytes_saved)} saved at the example shapes"
        )
        return "\n".join([head, *(f"  {line}" for line in (*self.rewritten, *self.declined))])

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
