# SPDX-License-Identifier: Apache-2.0
"""The table and the picture at the end of a comparison."""

import statistics
from pathlib import Path

from rich.table import Table

from support.files import write_whole

MIB = 2**20
COLOURS = {"eager": "#8c8c8c", "inductor": "#e69f00", "cce": "#0072b2"}


def losses(run: dict) -> list[float]:
    return [s["loss"] for s in run["steps"]]


def summarise(run: dict, reference: dict | None) -> dict:
    """The figures of one run; `reference` is the eager run, or None when it was not made."""
    times = [s["seconds"] for s in run["steps"]]
    own = run["own"]
    apart = None
    if reference is not None:
        apart = max(abs(a - b) for a, b in zip(losses(run), losses(reference), strict=True))
    return {
        "last_loss": losses(run)[-1],
        "largest_difference": apart,
        "median_step_seconds": statistics.median(times[1:] or times),  # the first step compiles
        "first_step_seconds": times[0],
        "peak_above_own_bytes": max(0, run["trace"]["peak_bytes"] - own["gradients"]),
        "allocator_peak_bytes": run["trace"].get("allocator_peak"),
        "own_bytes": sum(own.values()),
    }


def comparison_table(summaries: dict[str, dict]) -> Table:
    table = Table()
    table.add_column("")
    for mode in summaries:
        table.add_column(mode, justify="right", style="bold" if mode == "cce" else "")
    rows = {
        "loss at the last step": lambda s: f"{s['last_loss']:.4f}",
        "largest difference of the loss to eager": lambda s: difference(s["largest_difference"]),
        "median step": lambda s: f"{s['median_step_seconds'] * 1e3:.0f} ms",
        "first step, compilation included": lambda s: f"{s['first_step_seconds']:.1f} s",
        "peak memory above the model's own": lambda s: f"{s['peak_above_own_bytes'] / MIB:.0f} MiB",
        "the model's own: weights, gradients, Adam": lambda s: f"{s['own_bytes'] / MIB:.0f} MiB",
    }
    if any(s["allocator_peak_bytes"] is not None for s in summaries.values()):
        rows["peak of the step by the GPU's allocator"] = lambda s: f"{s['allocator_peak_bytes'] / MIB:.0f} MiB"
    for name, cell in rows.items():
        table.add_row(name, *(cell(s) for s in summaries.values()))
    return table


def difference(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}" if value else "0"


def draw(runs: dict[str, dict], title: str, path: Path) -> Path:
    """Memory over one step above, the loss curves and how far they are apart below."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed to write a file
    import matplotlib.pyplot as plt

    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
    with plt.rc_context(style | {"font.size": 10, "axes.titlelocation": "left", "axes.titleweight": "bold"}):
        figure = plt.figure(figsize=(10, 8), layout="constrained")
        grid = figure.add_gridspec(3, 2, height_ratios=[4, 0.7, 3])
        memory = figure.add_subplot(grid[0, :])
        draw_memory(memory, runs)
        draw_phases(figure.add_subplot(grid[1, :], sharex=memory), runs)
        draw_losses(figure.add_subplot(grid[2, 0]), runs)
        draw_differences(figure.add_subplot(grid[2, 1]), runs)
        figure.suptitle(title, fontsize=12)
        write_whole(path, lambda part: figure.savefig(part, dpi=130))
        plt.close(figure)
    return path


def draw_memory(axes, runs: dict[str, dict]) -> None:
    for mode, run in runs.items():
        trace, own = run["trace"], run["own"]
        mib = [b / MIB for b in trace["bytes_alive"]]
        colour = COLOURS[mode]
        axes.plot(trace["milliseconds"], mib, drawstyle="steps-post", color=colour, linewidth=1.8, label=mode)
        axes.fill_between(trace["milliseconds"], mib, step="post", color=colour, alpha=0.12)
        if trace.get("allocator_peak"):  # what the allocator itself counts, whole blocks
            axes.axhline(trace["allocator_peak"] / MIB, color=colour, linestyle="--", linewidth=0.8, alpha=0.7)
        top = max(range(len(mib)), key=mib.__getitem__)
        axes.annotate(
            f"{mode}: {mib[top]:,.0f} MiB",
            (trace["milliseconds"][top], mib[top]),
            xytext=(6, 4),
            textcoords="offset points",
            color=colour,
            fontweight="bold",
        )
    gradients = own["gradients"] / MIB
    axes.axhline(gradients, color="black", linestyle=":", linewidth=1)
    axes.annotate(
        f"gradients: {gradients:.0f} MiB",
        (1, gradients),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        fontsize=9,
    )
    axes.set_ylim(0, 1.1 * max(run["trace"]["peak_bytes"] for run in runs.values()) / MIB)
    axes.set_title("Memory over one training step")
    axes.set_ylabel("MiB on top of weights and Adam's state")
    axes.tick_params(labelbottom=False)


def draw_phases(axes, runs: dict[str, dict]) -> None:
    """Thin bars that say what each run was doing at that time."""
    shades = {"forward": 0.35, "backward": 0.65, "optimizer": 0.95}
    for row, (mode, run) in enumerate(runs.items()):
        for name, (begin, end) in run["trace"]["phases"].items():
            axes.barh(row, end - begin, left=begin, height=0.75, color=COLOURS[mode], alpha=shades[name])
            if row == 0 and name != "optimizer":
                axes.text((begin + end) / 2, row, name, ha="center", va="center", fontsize=8)
    axes.set_yticks(range(len(runs)), list(runs))
    axes.invert_yaxis()
    axes.grid(False)
    axes.set_xlabel("milliseconds since the step began")


def draw_losses(axes, runs: dict[str, dict]) -> None:
    looks = {"eager": {"linewidth": 5, "alpha": 0.5}, "inductor": {"linewidth": 2}, "cce": {"linestyle": (0, (3, 2))}}
    for mode, run in runs.items():
        axes.plot(range(1, len(run["steps"]) + 1), losses(run), color=COLOURS[mode], label=mode, **looks[mode])
    axes.set_title("Loss")
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy, nats per token")
    axes.legend(frameon=False)


def draw_differences(axes, runs: dict[str, dict]) -> None:
    axes.set_title("Distance of the loss to eager's")
    axes.set_xlabel("step")
    axes.set_ylabel("absolute difference, nats per token")
    others = [m for m in runs if m != "eager"]
    if "eager" not in runs or not others:
        axes.text(0.5, 0.5, "needs the eager run and one other", ha="center", transform=axes.transAxes)
        return
    for mode in others:
        # A float32 loss of about 8 has steps of 5e-7: an exact zero is drawn there, a logarithm has no place for it.
        apart = [max(abs(a - b), 2e-7) for a, b in zip(losses(runs[mode]), losses(runs["eager"]), strict=True)]
        axes.plot(range(1, len(apart) + 1), apart, color=COLOURS[mode], label=mode, linewidth=1.5)
    axes.set_yscale("log")
    axes.set_ylim(1e-7, max(1e-5, 3 * axes.get_ylim()[1]))
    axes.legend(loc="upper left", frameon=False, ncols=len(others))
