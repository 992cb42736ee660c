# SPDX-License-Identifier: Apache-2.0
"""Cut cross-entropy for unchanged PyTorch models: `torch.compile(model, backend="cce")`.

The public names are gathered here and loaded when first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .backend import cce
    from .diagnose import explain
    from .functional import linear_cross_entropy
    from .lazy import LazyLogits
    from .lazy.head import lazy_head
    from .options import Options
    from .passes import CutCrossEntropyPass, Report, rewrite

_HOMES = {
    "CutCrossEntropyPass": "passes",
    "LazyLogits": "lazy",
    "Options": "options",
    "Report": "passes",
    "cce": "backend",
    "explain": "diagnose",
    "lazy_head": "lazy.head",
    "linear_cross_entropy": "functional",
    "rewrite": "passes",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{home}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


__all__ = [
    "CutCrossEntropyPass",
    "LazyLogits",
    "Options",
    "Report",
    "__version__",
    "cce",
    "explain",
    "lazy_head",
    "linear_cross_entropy",
    "rewrite",
]
