# SPDX-License-Identifier: Apache-2.0
"""Deliberate faults, each of which has to turn a test red: `python -m tests.mutation`.

Every fault is one replacement in one file. The tests run against a copy of the repository, so the checkout stays whole.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Fault:
    name: str
    path: str
    old: str
    new: str


FAULTS = [
    Fault(
        "a weight that is written over between two losses is one weight",
        "passes/joined.py",
        "    return not written_between((a, *a.all_input_nodes), first, last)",
        "    return True",
    ),
    Fault(
        "a loss that another one is made of is joined with it",
        "passes/joined.py",
        """            if node in members:
                return None
""",
        """            if node in members:
                continue
""",
    ),
    Fault(
        "what is written down between two losses is written where it was",
        "passes/joined.py",
        "written & _memory(n for m in stay for n in (m, *m.all_input_nodes))",
        "False",
    ),
    Fault(
        "what is added to losses on one weight is lost",
        "passes/scalar.py",
        'if name == "sub" and node.args[0] is inputs[0] else total + added',
        'if name == "sub" and node.args[0] is inputs[0] else total',
    ),
    Fault(
        "a mean of nothing ends the gradients of other losses",
        "passes/scalar.py",
        "total = total + torch.where(condition, math.nan, 0.0)",
        "total = torch.where(condition, math.nan, total)",
    ),
    Fault(
        "a gradient that waits for its backward is not seen",
        "cce_fx/held.py",
        "return bool(node._raw_saved_tensors)",
        "return node._raw_saved_tensors is None",
    ),
    Fault(
        "a softmax over rows is one over classes",
        "passes/programs/operations.py",
        """    for d in over:
        mix(value.dims[d], call.name)
    dims = list(value.dims)
""",
        "    dims = list(value.dims)\n",
    ),
    Fault(
        "a result that is part of the logits is what takes their place",
        "cce_fx/row_op.py",
        "return t.clone() if t.untyped_storage()._cdata in memory else t",
        "return t",
    ),
    Fault(
        "rows that fill up a block have a gradient",
        "cce_fx/row_op.py",
        "            head.tile[n:] = 0\n",
        "            head.tile[n:] = 1\n",
    ),
    Fault(
        "the gradient of the weight is that of the last block",
        "cce_fx/row_op.py",
        "self._d_weight[k], part.start > 0)",
        "self._d_weight[k], False)",
    ),
    Fault(
        "a block's code is for another layout of its inputs",
        "cce_fx/row_op.py",
        "return tuple(tuple((tuple(t.shape), t.stride(), t.dtype, t.device) for t in group) for group in groups)",
        "return tuple(tuple((tuple(t.shape), t.contiguous().stride(), t.dtype, t.device) for t in group) for group in groups)",
    ),
    Fault(
        "a reduction of all logits has their gradient where there is none",
        "passes/programs/region.py",
        "            self._check_flow(rows, value_of(node))\n",
        "",
    ),
    Fault(
        "losses of one head are one program though one of them mixes rows",
        "passes/programs/tier.py",
        "    if not region.exits or (at_once and not _has_all(region, heads, found)):\n",
        "    if not region.exits:\n",
    ),
    Fault(
        "an axis that is mixed may have rows",
        "passes/programs/axes.py",
        "        if one.row and other.mixed:\n",
        "        if one.row and other.mixed and False:\n",
    ),
    Fault(
        "a product that is turned keeps its rows",
        "passes/values.py",
        "return replace(self, hidden=hidden, weight=rows, class_dim=1 - self.class_dim)",
        "return self",
    ),
    Fault(
        "a size that is not fixed is that of the example",
        "passes/programs/sizes.py",
        "return self.reference(a, b).text()",
        "return a",
    ),
    Fault(
        "rows that are added up are kept apart",
        "passes/programs/operations.py",
        """    over = call.dims("dim")
    for d in over:
        mix(value.dims[d], call.name)
    kept""",
        """    over = call.dims("dim")
    kept""",
    ),
    Fault(
        "rows that are multiplied with each other are kept apart",
        "passes/programs/operations.py",
        """    mix(places["j"], call.name)
""",
        "",
    ),
    Fault(
        "some rows are all",
        "passes/programs/operations.py",
        """        return call.made(Made("aten.alias.default", (value,)), value.dims)
    mix(value.dims[d], call.name)
""",
        """        return call.made(Made("aten.alias.default", (value,)), value.dims)
""",
    ),
    Fault(
        "places chosen among rows are each row's own",
        "passes/programs/operations.py",
        "        if rows and isinstance(i.source, Places):\n",
        "        if rows:\n",
    ),
    Fault(
        "a gradient flows through what the program took without one",
        "passes/programs/region.py",
        "        if flows and not example.requires_grad:\n",
        "        if False:\n",
    ),
    Fault(
        "ignore_index is dropped from the mean",
        "cce_fx/functional.py",
        "valid = target != loss.ignore_index",
        "valid = target == target",
    ),
    Fault(
        "the mean divides by N",
        "cce_fx/functional.py",
        "denominator = row_weight.sum()",
        "denominator = (row_weight == row_weight).sum()",
    ),
    Fault(
        "class weights do not normalise the mean",
        "cce_fx/functional.py",
        "denominator = row_weight.sum()",
        "denominator = valid.sum()",
    ),
    Fault("smoothing is divided by nothing", "cce_fx/functional.py", "(smoothing / classes)", "smoothing"),
    Fault(
        "smoothing ignores the class weights",
        "cce_fx/functional.py",
        "class_weight.to(dtype) if smooth and class_weight is not None else None",
        "None",
    ),
    Fault(
        "the shift is off by one",
        "passes/rules/rows.py",
        '    return view.rows(call.node, "index", _index, tuple(replay), class_dim=class_dim)',
        "    replay = [slice(1, None) if i == slice(None, -1, None) else i for i in replay]\n"
        '    return view.rows(call.node, "index", _index, tuple(replay), class_dim=class_dim)',
    ),
    Fault("the bias is lost", "passes/rules/linear.py", "bias=None if bias is None else Operand(bias)", "bias=None"),
    Fault(
        "an added bias is lost",
        "passes/rules/elementwise.py",
        'return view.at(call.node, bias=_with_bias(view, Operand(other).then("flatten", torch.flatten)))',
        "return view.at(call.node)",
    ),
    Fault(
        "a shift is not taken off",
        "passes/rewriter.py",
        "        out = out - shift",
        "        out = out + 0 * shift",
    ),
    Fault(
        "an adapter's scale is lost",
        "passes/rules/heads.py",
        "return operand if scale == 1.0 else",
        "return operand if scale else",
    ),
    Fault(
        "a bias after a scale is not divided by it", "passes/rules/elementwise.py", "if scale != 1.0:", "if scale == 0:"
    ),
    Fault(
        "a mean over the classes is a sum",
        "passes/rewriter.py",
        "smooth = smooth / size_of(view.classes, weight, 0)",
        "pass",
    ),
    Fault(
        "-log_softmax is log_softmax", "passes/rewriter.py", "return out if candidate.negated else -out", "return -out"
    ),
    Fault(
        "probabilities are not divided by their sum",
        "kernels/portable/tiles.py",
        "(c.prob / norm.sumexp)[:, None]",
        "c.prob[:, None]",
    ),
    Fault(
        "what is rounded is written block by block",
        "kernels/portable/tiles.py",
        "out.weight.dtype != self.head.dtype and len(self.blocks) > 1",
        "False",
    ),
    Fault(
        "a target outside of the classes counts as one of them",
        "kernels/rows.py",
        "return int(lowest) >= 0 and int(highest) < classes",
        "return int(lowest) >= 0",
    ),
    Fault(
        "what is not finite keeps its row's one-hot part apart",
        "kernels/native/run.py",
        "if not run.take(plan.sums_and_gradients(*run.sizes)):",
        "run.take(plan.sums_and_gradients(*run.sizes))\n    if False:",
    ),
    Fault(
        "threads' sums are added whatever they are relative to",
        "kernels/native/steps.cpp",
        "factors[t] = std::exp(factors[t] - shift);",
        "factors[t] = 1.0f;",
    ),
    Fault(
        "a larger logit leaves the sums as they were",
        "kernels/native/steps.cpp",
        "if (factor[i] != 1.0f && before[i] != -INFINITY)",
        "if (factor[i] != factor[i])",
    ),
    Fault(
        "what a sum has lost is forgotten",
        "kernels/native/steps.cpp",
        "lost = rounded(sum - total) - more;",
        "lost = Floats{};",
    ),
    Fault(
        "a tile is where the gradient of its own columns goes",
        "kernels/native/head.h",
        "(chunk - 1) * q.columns * q.width",
        "chunk * q.columns * q.width",
    ),
    Fault(
        "a pair of bfloat16 numbers loses its second",
        "kernels/native/micro_kernel.h",
        "(Floats)(low | (high << 16))",
        "(Floats)(low)",
    ),
    Fault(
        "what is left of a block of rows is not multiplied",
        "kernels/native/micro_kernel.h",
        "for (; at < count; ++at) part(Constant<1>{}, at);",
        "",
    ),
    Fault(
        "lazy rows are those of the whole",
        "cce_fx/lazy/expression.py",
        "        hidden = move(hidden)",
        "        hidden = move(hidden.flip(0))",
    ),
    Fault(
        "what stands for a size is not told from the size",
        "cce_fx/lazy/graph.py",
        "node.args, node.kwargs = torch.fx.node.map_aggregate((node.args, node.kwargs), named)",
        "named(0)",
    ),
    Fault(
        "rows are chosen of what has them in another order",
        "cce_fx/lazy/expression.py",
        "if not whole.in_order or base.like.dim() != 2",
        "if base.like.dim() != 2",
    ),
    Fault(
        "chosen rows are the first rows",
        "cce_fx/lazy/expression.py",
        "index_select(0, chosen.places)",
        "narrow(0, 0, len(chosen.places))",
    ),
    Fault(
        "the first classes are cut off instead of the last",
        "passes/values.py",
        "return x[start:stop]",
        "return x[len(x) - stop :]",
    ),
    Fault(
        "gather takes a shifted class",
        "passes/rewriter.py",
        "out = nll if result is Result.LOG_PROB",
        "out = nll.roll(1) if result is Result.LOG_PROB",
    ),
    Fault(
        "a softmax over rows is one over classes",
        "passes/rules/elementwise.py",
        "facing = view.facing(dim) if isinstance(dim, int) else None",
        "facing = view if isinstance(dim, int) else None",
    ),
    Fault("a division scales up", "passes/rules/elementwise.py", "1.0 / float(divisor)", "float(divisor)"),
    Fault(
        "the scale after a cap comes before it",
        "passes/rules/elementwise.py",
        '"scale" if e.softcap is None else "post_scale"',
        '"scale"',
    ),
    Fault("the cap is ignored", "passes/rules/elementwise.py", "softcap=1.0))", "softcap=None))"),
    Fault("in-place changes go unseen", "passes/trace.py", "    if not written:\n        return\n", "    return\n"),
    Fault(
        "hooks go unseen",
        "passes/rules/elementwise.py",
        "return call.decline(Reason.HOOK) if call.view() is not None else None",
        "view = call.view()\n    return view and view.at(call.node)",
    ),
    Fault(
        "rows of (B, V, T) logits are read in the wrong order",
        "passes/rewriter.py",
        "hidden = torch.movedim(hidden, view.class_dim, -1)",
        "hidden = torch.movedim(hidden, view.class_dim, 0)",
    ),
    Fault(
        "a detached head gets a gradient",
        "passes/rules/elementwise.py",
        'hidden=view.hidden.then("detach", torch.detach),',
        "hidden=view.hidden,",
    ),
    Fault("the gradient of the mean is not scaled", "cce_fx/op.py", "g * grad_total.to(g.dtype) if m", "g if m"),
    Fault(
        "the loss's dtype is not eager's",
        "passes/rewriter.py",
        "return out if value_of(candidate.anchor).dtype == dtype else out.to(value_of(candidate.anchor).dtype)",
        "return out",
    ),
    Fault(
        "what is read beside a loss may be of other rows",
        "passes/beside.py",
        "return _rows(one.hidden) == _rows(other.hidden)",
        "return True",
    ),
    Fault(
        "what is read beside a loss may be of other logits",
        "passes/beside.py",
        "one.scale * one.post_scale * other.scale * other.post_scale > 0",
        "True",
    ),
    Fault(
        "a loss is written where gradients are off",
        "passes/beside.py",
        "        place = off[reading]\n",
        "",
    ),
    Fault(
        "a loss is written before its target is changed",
        "passes/beside.py",
        "return None if written_between(inputs, place, anchor) else place",
        "return place",
    ),
    Fault(
        "a scaled weight that is written over is seen through",
        "passes/programs/scales.py",
        "not through or written_between([*kept, *through], through[-1], view.linear)",
        "not through",
    ),
    Fault(
        "a run is repeated for the other sign of zero",
        "passes/programs/runs.py",
        "return type(argument), repr(argument)",
        "return type(argument), argument",
    ),
    Fault(
        "every backward of a function is taken for linear",
        "passes/programs/own_gradient.py",
        "    return all(_is_linear(program, args) for name, args, _ in program.code if name == OWN_GRADIENT)",
        "    return True",
    ),
    Fault(
        "a function's rows and those of its gradient are not joined",
        "passes/programs/own_gradient.py",
        "            if a:\n                join(a, b)",
        "            pass",
    ),
    Fault(
        "a loss is written before its target",
        "passes/beside.py",
        "if any(order.get(n, -1) >= order[place] for n in inputs):",
        "if False:",
    ),
    Fault(
        "rows that a loss leaves out have the first class",
        "cce_fx/functional.py",
        "torch.where(ignored, others[5], top)",
        "top.clamp(min=0)",
    ),
    Fault(
        "the likeliest class is that of the first thread",
        "kernels/native/steps.cpp",
        "top = factors[t], highest = t;",
        "top = factors[t];",
    ),
    Fault(
        "the likeliest class is the last that was the largest so far",
        "kernels/portable/tiles.py",
        "better = (found > before) |",
        "better = (found >= before) |",
    ),
    Fault(
        "a ReLU on the logits is taken for a cast",
        "passes/rules/elementwise.py",
        '@rule("contiguous")',
        '@rule("contiguous", torch.relu, "relu")',
    ),
]


def red(fault: Fault, where: Path) -> bool:
    """Whether the tests fail with the fault in place."""
    path = where / fault.path
    text = path.read_text()
    if text.count(fault.old) < 1:
        raise SystemExit(f"{fault.name}: {fault.path} no longer holds\n{fault.old}")
    path.write_text(text.replace(fault.old, fault.new))
    try:
        names = ("forms", "semantics", "lazy_logits", "programs", "ops")  # the quickest first
        tests = [f"tests/kernels/test_{name}.py" for name in ("native", "contract")]
        tests += [f"tests/test_{name}.py" for name in names]
        if "beside" in fault.path or "functional" in fault.path:
            tests.insert(0, "tests/test_beside.py")
        if fault.path in ("passes/joined.py", "passes/scalar.py", "cce_fx/held.py"):
            tests.insert(0, "tests/test_joined.py")
        if fault.path.startswith(("passes/programs", "cce_fx/row_op")):
            tests = [f"tests/test_{name}.py" for name in ("program_heads", "row_programs", "changing_sizes", "forms")]
            if "own_gradient" in fault.path:
                tests.insert(0, "tests/test_own_gradient.py")
        env = {**os.environ, "PYTHONPATH": str(where), "CCE_FX_PROGRAMS": "80"}
        command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", *tests]
        return subprocess.run(command, cwd=where, env=env, capture_output=True).returncode == 1
    finally:
        path.write_text(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="only the faults whose name holds one of these words")
    words = parser.parse_args().words
    faults = [f for f in FAULTS if not words or any(w in f.name for w in words)]
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder) / "cce_fx"
        ignore = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".hypothesis", "out")
        shutil.copytree(ROOT, where, symlinks=True, ignore=ignore)
        for fault in faults:
            killed = red(fault, where)
            print(f"{'red ' if killed else 'GREEN'}  {fault.name}", flush=True)
            survivors += [] if killed else [fault.name]
    print(f"{len(faults) - len(survivors)} of {len(faults)} faults turn a test red")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
