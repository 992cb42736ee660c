# SPDX-License-Identifier: Apache-2.0
"""setuptools, with an sdist whose bytes depend on the sources and on SOURCE_DATE_EPOCH alone.

setuptools' wheels are so already; its sdists carry the times, modes and owners of the files as they lie on the disk.
"""

from __future__ import annotations

import gzip
import os
import tarfile
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  # every hook that is not replaced here


def build_sdist(sdist_directory: str, config_settings: dict[str, Any] | None = None) -> str:
    """Build the sdist, and where SOURCE_DATE_EPOCH is set write it anew in that time's name."""
    name = build_meta.build_sdist(sdist_directory, config_settings)
    when = os.environ.get("SOURCE_DATE_EPOCH")
    if when is not None:
        _rewrite(Path(sdist_directory, name), int(when))
    return name


def _rewrite(path: Path, when: int) -> None:
    """The same files in order, each of nobody, of one time and of one mode."""
    with tarfile.open(path) as tar:
        files = [(m, tar.extractfile(m)) for m in sorted(tar.getmembers(), key=lambda m: m.name)]
        made = path.with_suffix(".new")
        with (
            made.open("wb") as raw,
            gzip.GzipFile("", "wb", 9, raw, mtime=when) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as out,
        ):
            for member, content in files:
                plain = tarfile.TarInfo(member.name)
                plain.type, plain.size, plain.mtime = member.type, member.size, when
                plain.mode = 0o755 if member.isdir() else 0o644
                out.addfile(plain, content)
    made.replace(path)
