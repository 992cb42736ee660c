# SPDX-License-Identifier: Apache-2.0
"""The pass: fx graphs in, fx graphs with cut cross-entropy out. See docs/architecture.md for the way through it."""

from .pipeline import CutCrossEntropyPass, rewrite
from .policy import Policy
from .registry import BEGINNERS, RULES, Call, rule
from .report import Declined, Report, Rewritten
from .values import Candidate, Decline, LogitsView, LossSite, Operand, OwnReason, Reason, Step

__all__ = [
    "BEGINNERS",
    "RULES",
    "Call",
    "Candidate",
    "CutCrossEntropyPass",
    "Decline",
    "Declined",
    "LogitsView",
    "LossSite",
    "Operand",
    "OwnReason",
    "Policy",
    "Reason",
    "Report",
    "Rewritten",
    "Step",
    "rewrite",
    "rule",
]
