# SPDX-License-Identifier: Apache-2.0
"""The pass: find, decide and rewrite, over a graph module; and its face for pipelines of passes."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.fx import Graph, GraphModule, Node

from .._torch import CustomGraphPass, HigherOrderOperator
from ..functional import __file__ as functional_file
from ..functional import makes_grads_in_forward
from . import fakes
from .beside import with_readings
from .decide import decide
from .faults import Fault, Undo, failed, stage
from .joined import Joined, on_one_weight
from .modules import inline_known
from .policy import Policy
from .programs.tier import RowPrograms, cut_rows, join_rows
from .registry import rules_text
from .report import Declined, Report, Rewritten
from .rewriter import erase_unused, logits_use, rewrite_site
from .trace import Trace, trace
from .values import Decline, LossSite, Reason, Result, output_of

_log = logging.getLogger("cce_fx")


def apply(gm: GraphModule, policy: Policy, undo: Undo) -> tuple[Report, Trace]:
    """Rewrite every site of a graph whose nodes carry example values, in place.

    Raises `Fault` where the pass itself fails; the caller then restores what `undo` remembers.
    """
    found = trace(gm.graph)
    report = Report()
    declines = list(found.declines)
    done: list[LossSite] = []
    moved: dict[Node, Node] = {}
    read: set[Node] = set()
    shared = Joined()
    needed, joined = found.needed(), RowPrograms()
    if policy.tiers == "all":
        with stage("row programs", output_of(gm.graph)):
            joined = join_rows(gm, found, policy, undo)
    with stage("joining losses", output_of(gm.graph)):
        groups = on_one_weight(found) if policy.strategy != "grads_in_forward" else []
    together = {c.anchor for group in groups for c in group}
    later = replace(policy, strategy="recompute")
    for candidate in found.candidates:
        if candidate.anchor in joined.within:
            continue
        with stage("deciding", candidate.anchor):
            site = decide(candidate, later if candidate.anchor in together else policy, needed)
        if isinstance(site, Decline):
            refused: Decline | None = site
        else:
            undo.remember()
            with stage("rewriting", candidate.anchor):
                site = with_readings(site, found, read)
                refused = rewrite_site(gm, site, policy, moved)
            read |= {r.anchor for r in site.readings} if refused is None else set()
        if refused is not None:
            # A router's or a gate's statistics are no loss that a user would look for.
            if candidate.result is Result.LOSS or refused.reason is not Reason.SMALL:
                declines.append(refused)
        else:
            done.append(site)
    with stage("rewriting", *(site.candidate.anchor for site in done)):
        if done:
            # Views beside the paths too, such as what a tracer saved for a backward.
            erase_unused(gm.graph, list(reversed(found.views)))
    for group in groups:
        with stage("joining losses", *(c.anchor for c in group)):
            early = makes_grads_in_forward(policy.strategy, "mean", group[0].view.dtype)
            shared.add(gm, {c.anchor for c in group}, found.transformed, early)
    with stage("rewriting", *(site.candidate.anchor for site in done)):
        if done:
            gm.graph.lint()
            gm.recompile()
    rows = RowPrograms()
    if policy.tiers == "all":
        with stage("row programs", output_of(gm.graph)):
            rows = cut_rows(gm, found, policy, undo)
            declines = rows.declines(joined.declines(declines))
    for site in done:
        line, anchor = Rewritten.of(site, logits_use(site.candidate.view)), site.candidate.anchor
        line = replace(line, strategy="grads_in_forward") if anchor in shared.early else line
        report.rewritten.append(line.without_weight(site) if anchor in shared.sharing else line)
    report.rewritten += [cut.reported(policy) for cut in (*joined.cuts, *rows.cuts)]
    report.declined += [Declined.of(d) for d in declines]
    for body in _bodies(gm, found):
        # A checkpoint runs its body twice: gradients made in the first run would be thrown away.
        recompute = replace(policy, strategy="recompute") if policy.strategy == "auto" else policy
        inner, _ = apply(body, recompute, undo)
        report.rewritten += inner.rewritten
        report.declined += inner.declined
    return report, found


def _bodies(gm: GraphModule, found: Trace) -> list[GraphModule]:
    """The graphs inside higher-order operators (activation checkpoints, `torch.cond`) that run under no transform."""
    bodies = {}
    for node in gm.graph.nodes:
        if isinstance(node.target, HigherOrderOperator) and node not in found.transformed:
            names = [n.target for n in node.all_input_nodes if n.op == "get_attr"]
            bodies |= {
                name: gm.get_submodule(name) for name in names if isinstance(getattr(gm, name, None), GraphModule)
            }
    return list(bodies.values())


def announce(report: Report) -> None:
    """One line per loss to the logger `cce_fx`, which is silent unless asked."""
    for line in (*report.rewritten, *report.declined):
        _log.info("%s", line)


def rewrite(
    gm: GraphModule, example_inputs: Sequence[Any] | None = None, policy: Policy | None = None
) -> tuple[GraphModule, Report]:
    """Cut every cross-entropy of a graph module, in place.

    Args:
        gm: from `torch.fx.symbolic_trace`, `torch.export`, `make_fx` or Dynamo.
        example_inputs: values of the placeholders; needed where the nodes carry no example values.
        policy: strategy and thresholds.

    Returns:
        The same module, and a report of what was rewritten and declined.
    """
    undo = Undo(gm)
    try:
        with stage("reading the graph", output_of(gm.graph)):
            inline_known(gm)
            if not fakes.ensure(gm, example_inputs):
                _log.info("the graph carries no shapes; pass example_inputs")
        with fakes.unguarded(gm):
            report, _ = apply(gm, policy or Policy(), undo)
    except Fault as fault:
        undo.restore()
        report = failed(fault)
    announce(report)
    return gm, report


class CutCrossEntropyPass(CustomGraphPass):
    """The pass for a pipeline of passes: callable on an `fx.Graph` or an `fx.GraphModule`.

    For example `torch._inductor.config.pre_grad_custom_pass = CutCrossEntropyPass()`. Logits that the graph returns are
    still computed; only `backend="cce"` can make them lazy. `report` holds the last call's report.
    """

    def __init__(self, policy: Policy | None = None) -> None:
        self.policy: Policy = policy or Policy()
        self.report: Report = Report()

    def __call__(self, graph: Graph | GraphModule) -> None:
        gm = graph if isinstance(graph, GraphModule) else graph.owning_module
        _, self.report = rewrite(gm, None, self.policy)

    def uuid(self) -> str:
        """Changes with the project's source, the rules in force and the policy."""
        return source_digest(repr(self.policy))


def source_digest(*more: str) -> str:
    """A digest of what decides a rewrite's result, for caches of compiled graphs."""
    digest = hashlib.sha256(_source())
    for text in (rules_text(), *more):
        digest.update(text.encode())
    return digest.hexdigest()


@functools.cache
def _source() -> bytes:
    """A digest of the project's files, as they were when it was first asked for."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parent
    # Not the package's own file, which it has none of where a folder of its name beside the script hides its __init__.
    package = Path(functional_file).resolve().parent
    for folder in (root, package, package / "kernels"):
        files = (p for p in folder.resolve().rglob("*") if p.suffix in (".py", ".cpp", ".h"))
        for path in sorted(files):
            digest.update(path.read_bytes())
    return digest.digest()
