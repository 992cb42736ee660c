# SPDX-License-Identifier: Apache-2.0
"""Markdown tables and pictures from the JSON files that the other programs wrote.

python -m benchmarks report out/*.json --out docs/images > tables.md
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import gpu, overhead, peers, scaling, static_gpu, tune
from benchmarks.pictures import draw_peers, draw_scaling
from benchmarks.store import Row, describe, read
from benchmarks.tables import View, bytes_text, ratio

_MORE = "<!-- more -->"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument(
        "--out", type=Path, help="folder of the pictures, which are named after the files; default: none"
    )
    parser.add_argument("--into", type=Path, help="a markdown file with marked places for the tables")
    args = parser.parse_args(arguments)
    for path in args.files:
        kind, about, rows = read(path)
        text = "\n".join([f"{describe(about)}:\n", *(view.markdown() for view in VIEWS[kind](rows))])
        if args.into:
            args.into.write_text(placed(args.into.read_text(), path.stem, text))
        else:
            print(text)
        if args.out and kind in PICTURES:
            PICTURES[kind](rows, describe(about), args.out / f"{path.stem}.png")


def placed(page: str, name: str, text: str) -> str:
    """The page with a text between the marks of that name. Raises ValueError where it has none.

    A page with the mark `<!-- more -->` gets a place for a new name before it.
    """
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    if begin not in page and page.count(_MORE) == 1:
        page = page.replace(_MORE, f"{begin}\n{end}\n\n{_MORE}")
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"the page has no place {begin} ... {end}")
    before, rest = page.split(begin)
    return f"{before}{begin}\n\n{text}\n{end}{rest.split(end)[1]}"


def peer_views(rows: list[Row]) -> list[View]:
    """The summary, then a table for each shape, dtype and mode in the order of the file."""
    groups = dict.fromkeys((r["shape"], r["dtype"], r["mode"]) for r in rows)
    return [summary(rows), *(peers.view(rows, *group) for group in groups)]


def summary(rows: list[Row]) -> View:
    """For each shape and mode: ours over the bare products, over the fastest and over the smallest other implementation."""
    lines = []
    for group in dict.fromkeys((r["shape"], r["dtype"], r["mode"]) for r in rows):
        chosen = {r["implementation"]: r for r in rows if (r["shape"], r["dtype"], r["mode"]) == group and r["seconds"]}
        ours, base = chosen.get("cce_fx"), chosen.get(peers.BASE)
        others = [r for name, r in chosen.items() if not name.startswith("cce_fx") and "product" not in name]
        if ours is None or not others:
            continue
        fastest = max(ratio(ours["seconds"], r["seconds"]) for r in others)
        extra = ours["peak"] - ours["gradients"]
        dense = [(r["peak"] - r["gradients"]) / extra for r in others if r["implementation"] in ("eager", "inductor")]
        over = f"{ratio(ours['seconds'], base['seconds']):.3f}" if base else "-"
        times = f"{min(dense):.0f}" if dense else "-"
        lines.append((", ".join(group), over, f"{fastest:.3f}", bytes_text(extra), times))
    columns = ("", "time / bare products", "time / fastest peer", "extra memory", "eager's or inductor's / ours")
    return View("cce_fx in one line for each shape", columns, tuple(lines))


VIEWS = {
    "peers": peer_views,
    "scaling": lambda rows: [scaling.view(rows)],
    "overhead": overhead.views,
    "gpu": gpu.views,
    "static_gpu": static_gpu.page_views,
    "tune": tune.views,
}
PICTURES = {"peers": draw_peers, "scaling": draw_scaling, "gpu": gpu.draw}
