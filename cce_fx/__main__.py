# SPDX-License-Identifier: Apache-2.0
"""`python -m cce_fx explain module:function`: what cce_fx would do to a model, without training it.

`function` takes no argument and returns the model and its example inputs, `(model, x, y)`; a dictionary at the end holds
keyword arguments. A module given by the path of its file works too: `examples/mine.py:function`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from . import __version__

WRONG, DECLINED = 2, 1  # exit statuses


class Problem(Exception):
    """Something that the user can put right; the message says what."""


def find(name: str) -> Callable[[], Any]:
    """The function that `module:function` or `file.py:function` names."""
    home, colon, attribute = name.rpartition(":")
    if not colon or not home or not attribute:
        raise Problem(f"name a function as module:function or file.py:function, not {name!r}")
    try:
        module = _from_file(Path(home)) if home.endswith(".py") else importlib.import_module(home)
    except ModuleNotFoundError as error:
        raise Problem(f"there is no module {error.name!r}; modules are looked for in {Path.cwd()} too") from error
    found = getattr(module, attribute, None)
    if not callable(found):
        raise Problem(f"{home} has no function {attribute!r}")
    return found


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise Problem(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def inputs_of(made: Any) -> tuple[Callable[..., Any], list[Any], dict[str, Any]]:
    """The model, its arguments and its keyword arguments, from what the function returned."""
    if not isinstance(made, (tuple, list)) or not made or not callable(made[0]):
        raise Problem(
            "the function must return the model and its example inputs, such as (model, x, y); it returned "
            f"{type(made).__name__}"
        )
    model, *args = made
    kwargs = args.pop() if args and isinstance(args[-1], dict) else {}
    return model, args, kwargs


def options_of(given: Sequence[str]) -> dict[str, Any]:
    """`name=value` with Python's spelling of numbers, None, True and False."""
    import ast

    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise Problem(f"an option is name=value, not {text!r}")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def explain(arguments: argparse.Namespace) -> int:
    from .diagnose import explain as run
    from .options import Options

    given = options_of(arguments.option)
    unknown = set(given) - {f.name for f in fields(Options)}
    if unknown:
        raise Problem(f"cce_fx has no option {min(unknown)!r}; it has {', '.join(f.name for f in fields(Options))}")
    try:
        options = Options(**given)
    except (TypeError, ValueError) as error:
        raise Problem(str(error)) from error
    model, args, kwargs = inputs_of(find(arguments.function)())
    report = run(model, *args, options=options, **kwargs)
    print(json.dumps(report.to_dict(), indent=2) if arguments.json else report)
    return DECLINED if arguments.check and (report.declined or not report.rewritten) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """0; with --check 1 where a loss was declined or there was none; 2 where something was wrong, which is told."""
    parser = argparse.ArgumentParser("python -m cce_fx", description="Cut cross-entropy for unchanged PyTorch models.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "explain", help="what would be rewritten in a model, what not, and why",
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    command.add_argument("function", help="module:function or file.py:function that returns (model, *inputs)")
    command.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of cce_fx; repeatable")
    command.add_argument("--json", action="store_true", help="the report as data")
    command.add_argument("--check", action="store_true", help="exit with 1 unless every loss is rewritten, and one is")
    sys.path.insert(0, str(Path.cwd()))
    try:
        return explain(parser.parse_args(argv))
    except Problem as problem:
        print(f"python -m cce_fx: {problem}", file=sys.stderr)
        return WRONG


if __name__ == "__main__":
    sys.exit(main())
