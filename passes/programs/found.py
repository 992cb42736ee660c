# SPDX-License-Identifier: Apache-2.0
"""What is found of a graph's regions: their nodes, what leaves them, and why a head has none."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import Node

from ..values import LogitsView, Reason
from .axes import OwnGradient, RowsMixed
from .split import Split
from .value import Turned, Value


@dataclass(frozen=True)
class Exit:
    """A value that leaves a region: a node's, or what a node's reduction is made of."""

    node: Node
    value: Value
    split: Split | None = None
    first: Node | None = None  # the first node that reads it


@dataclass
class Region:
    """The nodes of a graph that may be row programs."""

    heads: dict[Node | Turned, LogitsView] = field(default_factory=dict)
    inside: list[Node] = field(default_factory=list)
    pulled: list[Node] = field(default_factory=list)  # nodes beside it that it makes for itself, of less than logits
    exits: list[Exit] = field(default_factory=list)
    refused: dict[Node, str] = field(default_factory=dict)  # why a node that reads a region is not in it
    reasons: dict[Node, Reason] = field(default_factory=dict)  # of those for which a head was left out


REASONS = {RowsMixed: Reason.ROWS_MIXED, OwnGradient: Reason.OWN_GRADIENT}


class Large(Exception):
    """Heads whose logits something outside the region needs."""

    def __init__(self, heads: set[Node], node: Node, why: str) -> None:
        super().__init__(why)
        self.heads: set[Node] = heads
        self.node: Node = node
