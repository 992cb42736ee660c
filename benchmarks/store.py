# SPDX-License-Identifier: Apache-2.0
"""Results on disk: one JSON file for one command, rewritten whole after every measurement, so that a stopped run is kept."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]


@dataclass
class Store:
    """Rows of one command, in memory and, where there is a path, on disk.

    A file from before is continued where it is of the same command and machine; else ValueError.
    """

    kind: str
    path: Path | None = None
    rows: list[Row] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=lambda: machine())

    def __post_init__(self) -> None:
        if self.path is not None and self.path.exists():
            kind, about, rows = read(self.path)
            if (kind, about) != (self.kind, self.about):
                raise ValueError(f"{self.path} holds {kind!r} of {about}; give this run another file")
            self.rows = rows

    def find(self, **key: Any) -> Iterator[Row]:
        """The rows with these values."""
        return (row for row in self.rows if all(row.get(name) == value for name, value in key.items()))

    def replace(self, rows: list[Row], **key: Any) -> None:
        """Put rows in the place of those with these values, and write the file."""
        self.rows = [row for row in self.rows if any(row.get(k) != v for k, v in key.items())] + rows
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_name(self.path.name + ".part")
            part.write_text(json.dumps({"kind": self.kind, "machine": self.about, "rows": self.rows}, indent=1) + "\n")
            part.replace(self.path)


def read(path: Path) -> tuple[str, dict[str, Any], list[Row]]:
    """The command, the machine and the rows of a file."""
    data = json.loads(path.read_text())
    return data["kind"], data["machine"], data["rows"]


def machine() -> dict[str, Any]:
    """What the figures depend on beside the code."""
    return {
        "cpu": _lscpu().get("Model name", "unknown processor"),
        "cores": os.cpu_count(),
        "l2": _lscpu().get("L2 cache"),
        "l3": _lscpu().get("L3 cache"),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "amx": "amx_bf16" in _lscpu().get("Flags", "").split(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def gpu_machine(device: str = "cuda") -> dict[str, Any]:
    """The same of a GPU; `machine()` for the CPU."""
    if device == "cpu":
        return machine()
    properties, backend = torch.cuda.get_device_properties(), "rocm" if torch.version.hip else "cuda"
    return {
        "gpu": properties.name,
        "arch": getattr(properties, "gcnArchName", "") or f"sm_{properties.major}{properties.minor}",
        "processors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        backend: torch.version.hip or torch.version.cuda,
    }


def slug(about: dict[str, Any]) -> str:
    """The machine's name for a file."""
    return re.sub(r"[^A-Za-z0-9]+", "_", about.get("gpu") or about["cpu"]).strip("_")


def _lscpu() -> dict[str, str]:
    try:
        text = subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def describe(about: dict[str, Any]) -> str:
    """The machine in one line, or versions alone where nothing was run."""
    if "triton" in about and "gpu" not in about:
        return f"torch {about['torch']}, triton {about['triton']}"
    if "gpu" in about:
        toolkit = ", ".join(f"{name} {about[name]}" for name in ("cuda", "rocm", "triton") if name in about)
        memory = about["memory"] / 2**30
        return f"{about['gpu']} ({about['arch']}, {memory:.0f} GiB), torch {about['torch']}, {toolkit}"
    amx = ", AMX" if about["amx"] else ""
    return (
        f"{about['cores']} cores of {about['cpu']} ({about['vectors']}{amx}; L2 {about['l2']}, L3 {about['l3']}), "
        f"{about['threads']} threads, torch {about['torch']}"
    )
