# SPDX-License-Identifier: Apache-2.0
"""The README and the pages: each block of code is run, each command's options exist, each table says what the code says.

Python blocks of a page run from top to bottom in one scope, at their own lines. Code in a comment `<!-- setup ... -->` runs
too: what a block needs and a reader does not. A `text` block with the title "Output" is what the block before it prints.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import io
import logging
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
from markdown_it import MarkdownIt

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

from benchmarks.__main__ import main as benchmarks
from cce_fx import Options
from cce_fx.passes import BEGINNERS, RULES, Reason

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("*.md"))]
OUTPUT = 'text title="Output"'
KINDS = {"python", "setup", "sh", "text", OUTPUT}


@dataclass(frozen=True)
class Block:
    page: Path
    kind: str
    line: int  # of its first line of content, from 0
    text: str


def blocks(page: Path) -> Iterator[Block]:
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type == "fence":
            yield Block(page, token.info.strip(), token.map[0] + 1, token.content)
        elif token.type == "html_block" and token.content.startswith("<!-- setup\n"):
            code = token.content.split("\n", 1)[1].rsplit("-->", 1)[0]
            yield Block(page, "setup", token.map[0] + 1, code)


BLOCKS = [block for page in PAGES for block in blocks(page)]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def own_process_state() -> Iterator[None]:
    """What pages may change for the whole process, put back."""
    rules, beginners, level, root = RULES.copy(), BEGINNERS.copy(), logging.getLogger("cce_fx").level, logging.root
    handlers = root.handlers[:]
    torch._dynamo.reset()
    yield
    RULES.clear(), RULES.update(rules), BEGINNERS.clear(), BEGINNERS.update(beginners)
    logging.getLogger("cce_fx").setLevel(level)
    root.handlers[:] = handlers
    torch._dynamo.reset()


def test_every_block_is_of_a_kind_that_is_checked() -> None:
    assert not [(name(b.page), b.line) for b in BLOCKS if b.kind not in KINDS]
    assert len([b for b in BLOCKS if b.kind == "python"]) > 20


@pytest.mark.parametrize("page", [p for p in PAGES if any(b.kind == "python" for b in blocks(p))], ids=name)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_process_state: None) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    scope = {"__name__": "__main__"}
    printed = io.StringIO()
    for block in blocks(page):
        if block.kind in ("python", "setup"):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(_compiled(block), scope)
        elif block.kind == OUTPUT:
            assert _plain(printed.getvalue()) == _plain(block.text), f"{name(page)}:{block.line}"


def _compiled(block: Block) -> object:
    """The code under the page's own name and line numbers, so that what prints a source line prints the page's."""
    tree = ast.parse("\n" * block.line + block.text, str(block.page))
    return compile(tree, str(block.page), "exec")


def _plain(text: str) -> str:
    """Without the width of columns, the folders, the places in files, and what a loss needs, which depends on the processor."""
    text = re.sub(r"[\w./-]+\.(?:md|py):\d+", "FILE:LINE", text)
    text = re.sub(r"needs [\d.]+ [KMG]iB", "needs BYTES", text)
    return "\n".join(" ".join(line.split()) for line in text.strip().splitlines())


COMMANDS = sorted(
    {
        part.strip()
        for block in BLOCKS
        if block.kind == "sh"
        for line in block.text.replace("\\\n", " ").splitlines()
        for part in line.partition(" #")[0].split("&&")
        if part.strip() and not part.strip().startswith("export ")
    }
)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_the_options_that_it_is_given(command: str) -> None:
    """Asked by --help: to run them would train for minutes, or install."""
    words = shlex.split(command)
    if "pip" in words[:3]:
        _check_installation(words)
    program, given = _program(words)
    text = _help(*program)
    for option in (w.split("=")[0] for w in given if w.startswith("-")):
        assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", text), f"{option} is not in:\n{text}"


@functools.cache
def _help(*program: str) -> str:
    """Asked once: pages name one program many times."""
    if program[1:3] == ("-m", "benchmarks"):  # these import torch, which is here
        with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
            benchmarks([*program[3:], "--help"])
        return text.getvalue()
    env = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run([*program, "--help"], capture_output=True, text=True, cwd=ROOT, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _program(words: list[str]) -> tuple[list[str], list[str]]:
    """What to ask for help, and the options given to it."""
    first, *rest = words
    tool = Path(first).name
    if tool.startswith("python"):
        at = 2 if rest[0] == "-m" else 1
        if rest[0] == "-m" and rest[1] in ("cce_fx", "benchmarks"):
            at = 3  # their subcommands
        return [sys.executable, *rest[:at]], rest[at:]
    found = Path(sys.executable).parent / tool
    # A program's subcommand, where it has one, is asked: `pip install --help`.
    subcommand = rest[:1] if tool in ("pip", "mkdocs", "git", "ruff", "twine") and not rest[0].startswith("-") else []
    if tool in ("pip", "mkdocs", "ruff", "mypy", "pytest", "twine"):
        return [sys.executable, "-m", tool, *subcommand], rest[len(subcommand) :]
    script = next((i for i, w in enumerate(rest) if w.endswith(".py")), len(rest))
    return [str(found) if found.exists() else tool, *subcommand], rest[len(subcommand) : script]


def _check_installation(words: list[str]) -> None:
    """The extras and files that a `pip install` names are there."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words:
        if "[" in word:
            assert set(word.split("[")[1].rstrip("]").split(",")) <= set(extras), word
        if word.endswith(".txt"):
            assert (ROOT / word).exists()


def _table(page: str, heading: str) -> list[str]:
    """The names in the first column of the first table under a heading."""
    text = (ROOT / page).read_text().split(heading, 1)[1]
    rows = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert rows is not None
    return re.findall(r"`(\w+)`", "\n".join(row.split("|")[1] for row in rows[0].splitlines()))


def test_the_page_lists_every_option() -> None:
    assert sorted(_table("docs/options.md", "Options of cce_fx")) == sorted(f.name for f in fields(Options))


def test_the_page_names_real_reasons() -> None:
    assert set(_table("docs/options.md", "## What is declined")) <= {r.name for r in Reason}


def test_every_reason_has_a_program_that_meets_it_and_a_remedy() -> None:
    page = (DOCS / "troubleshooting.md").read_text()
    sections = dict(re.findall(r"^### `(\w+)`\n(.*?)(?=^##|\Z)", page, re.MULTILINE | re.DOTALL))
    assert list(sections) == [r.name for r in Reason]
    for reason, text in sections.items():
        code = "".join(re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
        assert f'"{reason}"' in code, f"no program shows {reason}"
        assert len(text.split("```")[0].split()) > 15


def test_every_error_of_the_table_is_one_that_the_code_raises() -> None:
    page = (DOCS / "troubleshooting.md").read_text().split("## Errors")[1].split("\n## ")[0]
    source = "".join(p.read_text() for folder in ("cce_fx", "kernels") for p in (ROOT / folder).rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # strings over several lines
    begun = re.findall(r"^\| `([^`]+)`", page, re.MULTILINE)
    assert len(begun) >= 8
    for message in begun:
        assert all(part in source for part in message.split(" ... ")), message


def test_every_picture_is_in_the_gallery() -> None:
    shown = re.findall(r"!\[[^]]*\]\(images/([^)]+)\)", (DOCS / "gallery.md").read_text())
    assert sorted(shown) == sorted(p.name for p in (DOCS / "images").iterdir())


def test_the_picture_of_the_graphs_is_up_to_date(tmp_path: Path, own_process_state: None) -> None:
    made = tmp_path / "graphs.svg"
    runpy.run_path(str(DOCS / "graphs.py"))["picture"](made)
    texts = [re.findall(r">([^<>]+)</text>", p.read_text()) for p in (made, DOCS / "images" / "graphs.svg")]
    assert texts[0] == texts[1] and len(texts[0]) > 40, "run: python docs/graphs.py"


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert not [p.name for p in DOCS.glob("*.md") if f": {p.name}\n" not in navigation]
