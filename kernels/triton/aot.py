# SPDX-License-Identifier: Apache-2.0
"""Compiling recorded launches for machines that are not there, and reading what the compiler made of them.

Needs no GPU: the triton wheel brings ptxas and cuobjdump. Not for use with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .device import Launch
from .machines import Machine

_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint32: "u32",
    torch.bool: "i1",
}
_TENSOR_CORE = {
    "mma.sync": r"\bmma\.sync",
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma",
    "mfma": r"\bv_mfma",
}
# 32-bit registers of a multiprocessor, and threads it can hold.
_REGISTERS, _THREADS = 65536, 2048


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses."""

    kernel: str
    machine: str
    registers: int  # per thread
    spills: int  # bytes per thread in memory
    shared: int  # bytes per program
    warps: int
    programs: int  # that fit on one multiprocessor
    tensor_core: dict[str, int]  # instructions by kind
    loops: int  # innermost loops in the assembly
    bare: int  # innermost loops without a tensor-core instruction
    density: float  # flops on tensor cores for each instruction that a warp issues, in the loops that multiply
    assembly: str  # PTX or AMDGCN


def specialise(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
    """Signature, constants and attributes of a launch, as triton's JIT would derive them from its arguments."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for place, (name, parameter) in enumerate(zip(launch.kernel.arg_names, launch.kernel.params, strict=True)):
        value = launch.args[name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            aligned = True
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0
        else:
            signature[name] = "fp32"
            aligned = False
        if aligned:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def compile_for(launch: Launch, machine: Machine) -> Resources:
    """Compile a recorded launch for `machine`. Raises what the compiler raises."""
    signature, constants, attributes = specialise(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return compile_source(source, launch.options, machine)


def compile_source(source: ASTSource, options: dict[str, Any], machine: Machine) -> Resources:
    """Compile any kernel with its arguments' types for `machine`."""
    compiled = triton.compile(
        source, target=GPUTarget(machine.backend, machine.capability, machine.warp), options=options
    )
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    if machine.backend == "cuda":
        text = compiled.asm["ptx"]
        registers, spills = _cuda_usage(compiled.asm["cubin"])
    else:
        text = compiled.asm["amdgcn"]
        registers, spills = _hip_usage(text)
    loops = find_loops(text)
    inner = [loop for loop in loops if loop.innermost]
    multiply = {loop.name for loop in loops if _count(loop.body)}
    # Not the loops around those, which hold what the compiler peeled off them, but those around a lock.
    around = {name for loop in loops if loop.name in multiply for name in loop.parents}
    busy = [loop for loop in loops if loop.name in multiply - around]
    flops = sum(_tensor_flops(loop.body, text, warps) for loop in busy)
    return Resources(
        kernel=source.name,
        machine=machine.name,
        registers=registers,
        spills=spills,
        shared=shared,
        warps=warps,
        programs=_programs(machine, registers, shared, warps),
        tensor_core=_count(text),
        loops=len(inner),
        bare=sum(not _count(loop.body) for loop in inner),
        density=flops / max(1, sum(loop.instructions for loop in busy)),
        assembly=text,
    )


@dataclass(frozen=True)
class Loop:
    """A loop in PTX or AMDGCN, without the loops inside it."""

    name: str
    body: str
    innermost: bool
    parents: frozenset[str]

    @property
    def instructions(self) -> int:
        """How many there are, by lines that begin with one."""
        return sum(
            bool(re.match(r"\s+(?:@!?%p\d+\s+)?[a-z]\w*(?:[.:]|\s|_|;)", line)) for line in self.body.splitlines()
        )


def find_loops(assembly: str) -> list[Loop]:
    """The loops of an assembly, by LLVM's comments.

    Blocks out of line jump back without being loops, and a few instructions of Triton's that spin on a barrier inside the
    loop that works are none either.
    """
    bodies: dict[str, list[str]] = {}
    parents: dict[str, set[str]] = {}
    inner: set[str] = set()
    here = block = ""
    for line in assembly.splitlines():
        if label := re.match(r"(?:\.L|\$L__)(BB\w+):|(?:;|//) %bb\.\d+:", line):
            block, here = label.group(1) or "", ""
        if parent := re.search(r"Parent Loop (\w+)", line):
            parents.setdefault(block, set()).add(parent.group(1))
        if "Loop Header: Depth" in line:
            here = block
            inner |= {here} if "Inner Loop Header" in line else set()
        elif found := re.search(r"in Loop: Header=(\w+)", line):
            here = found.group(1)
        if here:
            bodies.setdefault(here, []).append(line)
    return [
        Loop(header, "\n".join(body), header in inner, frozenset(parents.get(header, ())))
        for header, body in bodies.items()
    ]


def _count(assembly: str) -> dict[str, int]:
    """Tensor-core instructions by kind."""
    counts = {name: len(re.findall(pattern, assembly)) for name, pattern in _TENSOR_CORE.items()}
    return {name: n for name, n in counts.items() if n}


def _tensor_flops(body: str, assembly: str, warps: int) -> float:
    """Flops of a loop's tensor-core instructions, for each warp (or wave), from the shapes that they carry."""
    flops = 0.0
    for m, n, k in re.findall(r"\bmma\.sync\.\S*?m(\d+)n(\d+)k(\d+)", body):
        flops += 2 * int(m) * int(n) * int(k)
    for m, n, k in re.findall(r"\bwgmma\.mma_async\.\S*?m(\d+)n(\d+)k(\d+)", body):
        flops += 2 * int(m) * int(n) * int(k) / 4  # four warps issue it together
    for m, n, k in re.findall(r"\bv_mfma_\w+?_(\d+)x(\d+)x(\d+)", body):
        flops += 2 * int(m) * int(n) * int(k)
    for register in re.findall(r"\btcgen05\.mma\S*\s+\[[^\]]*\],\s*%rd\d+,\s*%rd\d+,\s*(%r\d+)", body):
        # One thread issues it; M and N stand in the instruction descriptor, and K is 16 for half precision.
        descriptor = int(re.findall(rf"mov\.b32\s+{register}, (\d+);", assembly)[-1])
        flops += 2 * ((descriptor >> 24 & 31) * 16) * ((descriptor >> 17 & 63) * 8) * 16 / warps
    return flops


def _programs(machine: Machine, registers: int, shared: int, warps: int) -> int:
    """How many programs one multiprocessor holds at once, by registers, shared memory and threads."""
    threads = warps * machine.warp
    if machine.backend == "hip":
        # Four SIMDs with 512 registers per lane each; a wave stays on one of them.
        waves = 4 * min(8, 512 // max(1, registers))
        return max(0, min(waves // warps, machine.shared // max(1, shared)))
    by_registers = _REGISTERS // (max(1, registers) * threads)
    # Each program also takes a KiB of shared memory for the system.
    by_shared = (machine.shared + 1024) // (shared + 1024)
    return min(by_registers, by_shared, _THREADS // threads)


def _cuda_usage(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(tool), "--dump-resource-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage:\n{text}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def _hip_usage(text: str) -> tuple[int, int]:
    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found.group(1)) if found else 0

    # The count includes the accumulation registers. Scalar registers spill into lanes of vector ones, not into memory.
    return field("vgpr_count"), field("private_segment_fixed_size")
