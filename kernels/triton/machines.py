# SPDX-License-Identifier: Apache-2.0
"""What the supported machines offer, and the block shapes that suit them.

Peak rates are the vendors' dense figures; the bandwidth of the last-level cache is an estimate. The block shapes were
chosen by the compiler's resource figures with triton 3.6 and 3.9 (`benchmarks/static_gpu.py`: no spills, shared memory within
the device's), not by timing: no such machine was at hand. `python -m benchmarks tune` finds others by time.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import triton


@dataclass(frozen=True)
class Tile:
    """Shape of one matrix-product tile: (rows, cols) of the output, steps of `depth` along the sum.

    `tma` says that its factors come through tensor descriptors where they can (`Head.using`). `registers` is how many a
    thread may have: without a number, CUDA's assembler may rather spill a few than run one program less at a time.
    """

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    tma: bool = False
    registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        return _options(self.warps, self.stages, self.registers)


@dataclass(frozen=True)
class Fused:
    """Shape of a fused gradient kernel: it owns (own, group) of the output and meets the other side `other` at a time."""

    own: int
    other: int
    depth: int
    group: int
    warps: int
    stages: int
    registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        return _options(self.warps, self.stages, self.registers)


def _options(warps: int, stages: int, registers: int | None) -> dict[str, int]:
    """The compiler's options."""
    return {"num_warps": warps, "num_stages": stages} | ({} if registers is None else {"maxnreg": registers})


@dataclass(frozen=True)
class Config:
    """Block shapes of every kernel for one dtype on one machine."""

    sweep: Tile  # tiles of logits in the forward: rows of hidden by columns of the vocabulary
    logits: Tile  # the same where tiles are written to scratch memory
    heavy: Tile  # instead of both, where a cap, a bias, smoothing, a filter or a mask needs registers too
    weighted: Tile  # instead of `heavy` in the forward, where class weights or two others of those need more of them
    product: Tile  # the two products of the chunked backward
    fused: Fused  # the fused kernels of the recompute backward
    heavy_fused: Fused  # the same, where the tiles of logits are heavy
    likeliest: Tile | None = None  # instead of `sweep` where the likeliest class needs registers that are not there


@dataclass(frozen=True)
class Machine:
    """One kind of accelerator. Rates in units per second, sizes in bytes."""

    name: str
    arch: str  # "sm_80", "gfx942"
    backend: str  # "cuda", "hip" or "cpu"
    capability: int | str  # 80, "gfx942"
    warp: int
    processors: int
    shared: int  # shared memory that one program may have
    l2: int  # last-level cache
    flops16: float  # dense bf16 / fp16
    flops32: float  # fp32, without tensor cores
    flops_tf32: float
    flops64: float
    memory_rate: float
    l2_rate: float
    configs: dict[str, Config] = field(repr=False, default_factory=dict)

    def config(self, dtype: torch.dtype, heavy: bool = False, weighted: bool = False, aligned: bool = True) -> Config:
        """Block shapes for inputs of `dtype`.

        `heavy` says that the tiles of logits need more than products of rows, `weighted` that they need much more, `aligned`
        that factors are loaded 16 bytes at a time.
        """
        half = "16" if aligned else "16, unaligned"
        config = self.configs[{torch.float64: "64", torch.float32: "32"}.get(dtype, half)]
        if not heavy:
            return config
        sweep = config.weighted if weighted else config.heavy
        return replace(config, sweep=sweep, logits=config.heavy, fused=config.heavy_fused)

    def flops(self, dtype: torch.dtype, tf32: bool = False) -> float:
        """Peak matrix rate for inputs of `dtype`."""
        if dtype == torch.float64:
            return self.flops64
        if dtype == torch.float32:
            return self.flops_tf32 if tf32 else self.flops32
        return self.flops16

    def through_tma(self) -> Machine:
        """The same machine with tiles of logits that are loaded through tensor descriptors, where it has the engine."""
        if self.arch not in _TMA:
            return self
        half = self.configs["16"]
        tiles = {name: replace(tile, tma=True) for name in _TILES if (tile := getattr(half, name))} | _TMA[self.arch]
        return replace(self, configs={**self.configs, "16": replace(half, **tiles)})

    def like(self, name: str, processors: int, shared: int, l2: int) -> Machine:
        """The same machine with what the driver says of it."""
        return replace(self, name=name, processors=processors, shared=shared, l2=l2)


_TRITON = tuple(int(x) for x in triton.__version__.split(".")[:2])


def _alike(tile: Tile, fused: Fused) -> Config:
    return Config(tile, tile, tile, tile, tile, fused, fused)


_SINGLE = _alike(Tile(64, 64, 16, 4, 3), Fused(32, 32, 16, 64, 4, 2))
_DOUBLE = _alike(Tile(32, 32, 16, 4, 2), Fused(32, 32, 16, 64, 4, 2))
# Numbers of two bytes that are loaded one by one take a register each.
_UNALIGNED = {
    "cuda": _alike(Tile(64, 64, 32, 4, 2, registers=255), Fused(32, 32, 32, 64, 4, 2, registers=255)),
    "hip": _alike(Tile(64, 64, 32, 4, 2), Fused(32, 32, 32, 64, 4, 2)),
}
_HALF = {
    "sm_80": Config(
        # triton 3.6 keeps two values less in registers, which is what the larger tile lacks later.
        sweep=Tile(128, 256, 32, 8, 2) if _TRITON < (3, 7) else Tile(128, 128, 64, 8, 3),
        logits=Tile(128, 256, 32, 8, 3),
        heavy=Tile(128, 128, 32, 8, 4),
        weighted=Tile(128, 128, 32, 8, 4),
        product=Tile(128, 128, 32, 8, 4),
        fused=Fused(64, 64, 32, 256, 8, 3),
        heavy_fused=Fused(64, 64, 32, 256, 8, 3),
    ),
    "sm_86": _alike(Tile(128, 128, 32, 8, 3), Fused(64, 64, 32, 256, 8, 2)),
    "sm_90": Config(
        sweep=Tile(256, 128, 64, 8, 3),
        logits=Tile(256, 128, 64, 8, 3),
        heavy=Tile(128, 128, 64, 8, 4),
        weighted=Tile(128, 64, 64, 8, 4, registers=255),
        product=Tile(128, 128, 64, 8, 3),
        fused=Fused(64, 128, 64, 256, 8, 3),
        heavy_fused=Fused(64, 64, 64, 256, 8, 3),
    ),
    "sm_100": Config(
        sweep=Tile(128, 256, 64, 8, 3),
        logits=Tile(128, 256, 64, 8, 3),
        heavy=Tile(128, 128, 64, 8, 4),
        weighted=Tile(128, 64, 64, 8, 4, registers=255),
        product=Tile(128, 128, 64, 8, 4),
        fused=Fused(64, 128, 64, 256, 8, 3),
        heavy_fused=Fused(64, 64, 64, 256, 8, 3, registers=255),
        likeliest=Tile(128, 128, 64, 8, 4),
    ),
    "gfx942": Config(
        sweep=Tile(256, 128, 64, 8, 2),
        logits=Tile(256, 128, 64, 8, 2),
        heavy=Tile(128, 128, 64, 4, 2),
        weighted=Tile(128, 128, 64, 4, 2),
        product=Tile(256, 128, 64, 8, 2),
        fused=Fused(64, 64, 32, 256, 8, 2),
        heavy_fused=Fused(64, 64, 32, 256, 8, 2),
    ),
}
# By architecture with tensor descriptors: the tiles of logits that differ from the others then.
_TILES = ("sweep", "logits", "heavy", "weighted", "likeliest")
_TMA = {"sm_90": {}, "sm_100": {"sweep": Tile(128, 256, 64, 8, 2, tma=True)}, "cpu": {}}
# The interpreter pays for every operation and not for its size.
_TEST = Tile(16, 64, 32, 1, 1)
_SMALL = replace(_alike(_TEST, Fused(16, 32, 32, 32, 1, 1)), product=Tile(16, 32, 16, 1, 1))


def _configs(name: str) -> dict[str, Config]:
    # Without fp64 tensor cores the fused kernels need twice the registers.
    double = _alike(_DOUBLE.sweep, Fused(32, 32, 16, 32, 8, 2)) if name == "sm_86" else _DOUBLE
    return {
        "16": _HALF[name],
        "16, unaligned": _UNALIGNED["hip" if name.startswith("gfx") else "cuda"],
        "32": _SINGLE,
        "64": double,
    }


_T, _KIB, _MIB = 1e12, 1 << 10, 1 << 20
A100 = Machine(
    name="A100", arch="sm_80", backend="cuda", capability=80, warp=32, processors=108, shared=163 * _KIB, l2=40 * _MIB,
    flops16=312 * _T, flops32=19.5 * _T, flops_tf32=156 * _T, flops64=19.5 * _T, memory_rate=2.04 * _T,
    l2_rate=4.5 * _T, configs=_configs("sm_80"),
)  # fmt: skip
RTX3090 = Machine(
    name="RTX 3090", arch="sm_86", backend="cuda", capability=86, warp=32, processors=82, shared=99 * _KIB, l2=6 * _MIB,
    flops16=71 * _T, flops32=35.6 * _T, flops_tf32=35.6 * _T, flops64=0.56 * _T, memory_rate=0.94 * _T,
    l2_rate=2.5 * _T, configs=_configs("sm_86"),
)  # fmt: skip
L40S = Machine(
    name="L40S", arch="sm_89", backend="cuda", capability=89, warp=32, processors=142, shared=99 * _KIB, l2=96 * _MIB,
    flops16=362 * _T, flops32=91.6 * _T, flops_tf32=183 * _T, flops64=1.4 * _T, memory_rate=0.86 * _T,
    l2_rate=5 * _T, configs=_configs("sm_86"),
)  # fmt: skip
H100 = Machine(
    name="H100", arch="sm_90", backend="cuda", capability=90, warp=32, processors=132, shared=227 * _KIB, l2=50 * _MIB,
    flops16=989 * _T, flops32=67 * _T, flops_tf32=495 * _T, flops64=67 * _T, memory_rate=3.35 * _T,
    l2_rate=5.5 * _T, configs=_configs("sm_90"),
)  # fmt: skip
H200 = replace(H100, name="H200", memory_rate=4.8 * _T)
B200 = Machine(
    name="B200", arch="sm_100", backend="cuda", capability=100, warp=32, processors=148, shared=227 * _KIB, l2=126 * _MIB,
    flops16=2250 * _T, flops32=75 * _T, flops_tf32=1100 * _T, flops64=37 * _T, memory_rate=7.7 * _T,
    l2_rate=10 * _T, configs=_configs("sm_100"),
)  # fmt: skip
RTX5090 = Machine(
    name="RTX 5090", arch="sm_120", backend="cuda", capability=120, warp=32, processors=170, shared=99 * _KIB,
    l2=96 * _MIB, flops16=210 * _T, flops32=105 * _T, flops_tf32=105 * _T, flops64=1.6 * _T, memory_rate=1.79 * _T,
    l2_rate=5 * _T, configs=_configs("sm_86"),
)  # fmt: skip
MI300X = Machine(
    name="MI300X", arch="gfx942", backend="hip", capability="gfx942", warp=64, processors=304, shared=64 * _KIB,
    l2=256 * _MIB, flops16=1307 * _T, flops32=163 * _T, flops_tf32=653 * _T, flops64=163 * _T, memory_rate=5.3 * _T,
    l2_rate=14 * _T, configs=_configs("gfx942"),
)  # fmt: skip
MACHINES = {m.name: m for m in (A100, RTX3090, L40S, H100, H200, B200, RTX5090, MI300X)}
# The machine that stands for each architecture where the driver's figures are not asked.
BY_ARCH = {m.arch: m for m in (A100, RTX3090, L40S, H100, B200, RTX5090, MI300X)}
INTERPRETER = Machine(
    name="interpreter", arch="cpu", backend="cpu", capability="cpu", warp=1, processors=4, shared=_MIB, l2=_MIB,
    flops16=1e9, flops32=1e9, flops_tf32=1e9, flops64=1e9, memory_rate=1e9, l2_rate=1e9,
    configs=dict.fromkeys(("16", "16, unaligned", "32", "64"), _SMALL),
)  # fmt: skip
