# SPDX-License-Identifier: Apache-2.0
"""`backend="cce"`: rewrite the captured graph, hand it to the inner backend, and wrap what it returns.

torch finds this function through the entry-point group `torch_dynamo_backends`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import GraphModule

from . import observe
from ._torch import (
    BackendCompilerFailed,
    InductorWrapper,
    InvalidCxxCompiler,
    RestartAnalysis,
    compiler_config,
    lookup_backend,
)
from .distributed import op as op  # a graph from torch's caches may hold its operators
from .first_call import watched
from .functional import prepare
from .options import Options, split
from .outputs import CutOutputs, cut_outputs, restore
from .passes import Candidate, Report, fakes
from .passes.faults import Fault, Undo, failed, stage
from .passes.pipeline import apply, source_digest
from .passes.sharded import agree_on_losses
from .passes.trace import written_inputs
from .passes.values import output_of, value_of

Compiled = Callable[..., Any]


def cce(
    gm: GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: dict[str, Any] | None = None
) -> Compiled:
    """Compile a Dynamo graph with its language-model losses cut.

    Where cce_fx itself fails, the graph is compiled as it was, and a warning says so.

    Args:
        gm: the captured graph, rewritten in place.
        example_inputs: its inputs, fake or real.
        mode: as `torch.compile` takes it.
        options: as `torch.compile` takes them; `cce_fx.Options` are taken out, the rest is inductor's.

    Raises:
        ValueError, TypeError: an option that is unknown or wrong.
        RuntimeError: with `strict`, when a graph has losses and none could be rewritten.
        Exception: what the inner backend raises for the graph as it was, unchanged.
    """
    ours, rest = split(options)
    inner = _inner(ours, mode, rest)
    tune = (mode or "").startswith("max-autotune") or bool(rest.get("max_autotune"))
    before = observe.text_of(gm)
    cut = cut_graph(gm, example_inputs, ours, tune=tune)
    agree_on_losses(cut.candidates, {r.loss for r in cut.report.rewritten}, ours.policy)
    after = observe.text_of(gm)
    report, anchors = cut.report, [c.anchor for c in cut.candidates] or [output_of(gm.graph)]
    _check_strict(ours, report)
    if not cut.undo.changed:
        compiled = _compile(inner, gm, example_inputs)
    else:
        written = written_inputs(gm.graph)
        try:
            with stage("compiling the rewritten graph", *anchors):
                made = restore(_compile(inner, gm, example_inputs), cut.outputs)
            compiled = watched(made, gm, cut.undo, written, anchors, inner)
        except Fault as fault:
            if isinstance(fault.__cause__, (RestartAnalysis, NoCompilerError)):
                raise fault.original() from None
            cut.undo.restore()
            compiled = _compile(inner, gm, example_inputs)  # what this raises is not ours
            report = failed(fault)
            _check_strict(ours, report)
    observe.record(report, before, after)
    return compiled


def _compile(inner: Compiled, gm: GraphModule, example_inputs: Sequence[Any]) -> Compiled:
    compiled = inner(gm, example_inputs)
    if not callable(compiled):
        raise TypeError(f"the inner backend {inner!r} returned {type(compiled).__name__}, not a callable")
    return compiled


def _check_strict(options: Options, report: Report) -> None:
    if options.strict and report.declined and not report.rewritten:
        raise RuntimeError(f"strict: no loss of this graph was rewritten.\n{report}")


@dataclass(frozen=True)
class CutGraph:
    """A graph whose losses were rewritten in place."""

    report: Report
    outputs: CutOutputs  # what to put back after each call
    candidates: tuple[Candidate, ...]  # every loss that was found
    undo: Undo


def cut_graph(gm: GraphModule, example_inputs: Sequence[Any], options: Options, *, tune: bool = False) -> CutGraph:
    """Rewrite a Dynamo graph's losses and take out the logits that it returns, in place."""
    undo = Undo(gm)
    try:
        with fakes.unguarded(gm), stage("reading the graph", output_of(gm.graph)):
            fakes.ensure(gm, example_inputs)
            report, found = apply(gm, replace(options.policy, tune=tune), undo)
            outputs = CutOutputs()
            if options.logits == "lazy":
                with stage("making logits lazy", *(c.anchor for c in found.candidates)):
                    outputs = cut_outputs(gm, found, {r.linear for r in report.rewritten}, options, undo)
                report.note_lazy({output.linear for output in outputs.lazy})
    except Fault as fault:
        undo.restore()
        return CutGraph(failed(fault), CutOutputs(), (), undo)
    cut = {r.linear for r in report.rewritten}
    for view in (*(c.view for c in found.candidates), *(v for n, v in found.heads.items() if n.name in cut)):
        prepare(view.dtype, value_of(view.hidden.node).device)
    return CutGraph(report, outputs, tuple(found.candidates), undo)


def _inner(options: Options, mode: str | None, rest: dict[str, Any]) -> Compiled:
    """The backend that compiles the rewritten graph."""
    if callable(options.inner):
        return options.inner
    if options.inner == "inductor":
        return _inductor(mode, rest)
    inner = lookup_backend(options.inner)
    kwargs = {"mode": mode} if mode else {}
    return lambda gm, inputs: inner(gm, inputs, **kwargs)


class NoCompilerError(RuntimeError):
    """inductor found no C++ compiler: nothing that another graph would change."""


def _inductor(mode: str | None, rest: dict[str, Any]) -> Compiled:
    """Inductor with `mode=` and `options=` meaning what they mean for `backend="inductor"`."""
    from ._torch import compile_fx, compile_fx_inner, get_donated_idxs  # other backends do without inductor

    patches = InductorWrapper(mode, rest, None).config

    def compile_with_inductor(gm: GraphModule, inputs: Sequence[Any]) -> Compiled:
        tag = _cache_tag()

        def compile_one(gm: GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
            # A backward is compiled when it first runs, outside the patch below. Inductor's key does not tell one that may
            # write to what was saved for it from one that runs again (retain_graph), which would then read what was written.
            with compiler_config.patch(cache_key_tag=f"{tag} donated {get_donated_idxs()}"):
                return compile_fx_inner(gm, inputs, **kwargs)

        try:
            with compiler_config.patch(cache_key_tag=tag):
                return compile_fx(gm, inputs, inner_compile=compile_one, config_patches=patches)
        except InvalidCxxCompiler as error:
            raise NoCompilerError(_NO_COMPILER) from error
        except BackendCompilerFailed as error:
            if isinstance(error.inner_exception, InvalidCxxCompiler):
                raise NoCompilerError(_NO_COMPILER) from error
            raise

    return compile_with_inductor


def _cache_tag() -> str:
    """What torch's caches on disk add to their keys: a graph with our operators is of this version of them.

    Nothing else in a key tells it, and a compiled backward from before an operator changed would be run as it was.
    """
    return f"{compiler_config.cache_key_tag} cce_fx {source_digest()}".strip()


_NO_COMPILER = (
    "inductor needs a C++ compiler and found none. Install one (Debian and Ubuntu: apt-get install g++; Fedora: dnf "
    "install gcc-c++; macOS: xcode-select --install) or name it in the environment variable CXX. To run without one, "
    'pass options={"inner": "aot_eager"}: the losses are still cut, the rest of the model is not fused.'
)
