# SPDX-License-Identifier: Apache-2.0
"""Every private name of torch that the project uses, why, and since which torch.

They are looked up when first imported from here, so that the functional interface does not load Dynamo. A name that a
torch does not have is an ImportError that says what is missing; `tests/test_torch_names.py` asks for every one of them, and
reads the sources for private names that are not listed.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the ones that annotations use
    from torch._inductor.custom_graph_pass import CustomGraphPass as CustomGraphPass
    from torch._ops import HigherOrderOperator as HigherOrderOperator
    from torch._ops import OpOverload as OpOverload
    from torch._ops import OpOverloadPacket as OpOverloadPacket
    from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
    from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv as ShapeEnv
    from torch.fx.proxy import GraphAppendingTracer as GraphAppendingTracer
    from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

OLDEST = "2.11"  # the oldest torch that is supported and tested


@dataclass(frozen=True)
class Private:
    """A name of torch that no documentation promises."""

    home: str  # "module:attribute"
    why: str
    since: str = OLDEST  # the oldest supported torch that has it


NAMES: dict[str, Private] = {
    # The backend.
    "InductorWrapper": Private(
        "torch:_TorchCompileInductorWrapper", "what `backend='inductor'` is: the only reader of `mode=` and `options=`"
    ),
    "weight_norm": Private("torch:_weight_norm", "what `torch.nn.utils.parametrizations.weight_norm` calls"),
    "lookup_backend": Private("torch._dynamo.backends.registry:lookup_backend", "`inner` may be any backend's name"),
    "BackendCompilerFailed": Private("torch._dynamo.exc:BackendCompilerFailed", "wraps an error of inductor's"),
    "RestartAnalysis": Private("torch._dynamo.exc:RestartAnalysis", "Dynamo's way to begin anew, no failure"),
    "InvalidCxxCompiler": Private("torch._inductor.exc:InvalidCxxCompiler", "told apart to say how to get a compiler"),
    "compiler_config": Private("torch.compiler:config", "`cache_key_tag`: what caches on disk add to their keys"),
    "compile_fx": Private("torch._inductor.compile_fx:compile_fx", "inductor, with what compiles each of its graphs"),
    "compile_fx_inner": Private("torch._inductor.compile_fx:compile_fx_inner", "what that is"),
    "get_donated_idxs": Private(
        "torch._inductor.utils:get_donated_idxs",
        "which saved tensors a backward may write to: no key of inductor's has them",
    ),
    "inductor_config": Private("torch._inductor:config", "which options are inductor's, for unknown ones"),
    "CustomGraphPass": Private(
        "torch._inductor.custom_graph_pass:CustomGraphPass", "inductor's type of passes with a key"
    ),
    # Graphs and their values.
    "FakeTensor": Private("torch._subclasses.fake_tensor:FakeTensor", "example values in Dynamo's graphs"),
    "FakeTensorMode": Private("torch._subclasses.fake_tensor:FakeTensorMode", "computes example values without data"),
    "detect_fake_mode": Private("torch._guards:detect_fake_mode", "the mode that a graph's inputs were made in"),
    "decomposition_table": Private(
        "torch._decomp:decomposition_table", "what an operation means in terms of others, for those without a rule"
    ),
    "disable_modes": Private(
        "torch.utils._python_dispatch:_disable_current_modes", "reads a number that an operation was given as a tensor"
    ),
    "ShapeEnv": Private(
        "torch.fx.experimental.symbolic_shapes:ShapeEnv",
        "what is known of sizes that are symbols; nothing may be added",
    ),
    "statically_known_true": Private(
        "torch.fx.experimental.symbolic_shapes:statically_known_true", "compares sizes without adding a guard"
    ),
    "is_concrete_int": Private(
        "torch.fx.experimental.symbolic_shapes:is_concrete_int", "a symbol that a graph has fixed to a number"
    ),
    "GraphAppendingTracer": Private("torch.fx.proxy:GraphAppendingTracer", "writes proxies' operations into a graph"),
    "OpOverload": Private("torch._ops:OpOverload", "targets of aten graphs"),
    "OpOverloadPacket": Private("torch._ops:OpOverloadPacket", "targets of `make_fx` without an overload"),
    "HigherOrderOperator": Private(
        "torch._ops:HigherOrderOperator", "checkpoints and branches, whose bodies are graphs"
    ),
    "c_nn": Private("torch._C:_nn", "some of `torch.nn.functional` is defined there: `linear`"),
    # Several processes.
    "functional_collectives": Private(
        "torch.distributed:_functional_collectives", "collectives that autograd and graphs see as ordinary operators"
    ),
    "process_group_store": Private(
        "torch.distributed.distributed_c10d:_get_process_group_store", "where processes compare their options"
    ),
    "FSDPState": Private(
        "torch.distributed.fsdp._fully_shard._fsdp_state:FSDPState", "whether a weight is one that FSDP2 gathered"
    ),
    "composable_states": Private(
        "torch.distributed._composable_state:_module_state_mapping", "FSDP2's states of modules"
    ),
    # Observation.
    "counters": Private("torch._dynamo.utils:counters", "where torch's own passes count"),
    "trace_structured": Private("torch._logging:trace_structured", "leaves artifacts for tlparse"),
    "trace_log": Private("torch._logging._internal:trace_log", "whether somebody listens to them"),
    # Operators and lazy logits.
    "DispatchKey": Private("torch._C:DispatchKey", "autocast of hidden, weight and bias alone, as F.linear's"),
    "DispatchKeySet": Private("torch._C:DispatchKeySet", "the same"),
    "ExcludeDispatchKeyGuard": Private("torch._C:_ExcludeDispatchKeyGuard", "the same"),
    "profiler_enabled": Private(
        "torch.autograd:_profiler_enabled", "entering a `record_function` takes 5 us where nobody looks"
    ),
    "dispatch_key_for_device": Private("torch._C:_dispatch_key_for_device", "the same"),
    "assert_async": Private("torch:_assert_async", "a condition on a GPU, without waiting for it"),
    "enter_autocast": Private("torch.amp.autocast_mode:_enter_autocast", "as Dynamo writes autocast into graphs"),
    "exit_autocast": Private("torch.amp.autocast_mode:_exit_autocast", "the same"),
    "check": Private("torch:_check", "conditions on sizes that may be symbols"),
    "DisableTorchFunctionSubclass": Private("torch._C:DisableTorchFunctionSubclass", "asks a lazy tensor itself"),
    "disable_dynamo": Private("torch:_disable_dynamo", "`torch.compiler.disable` that does not load Dynamo"),
    "make_fx": Private("torch.fx.experimental.proxy_tensor:make_fx", "a block of rows with its gradient as one graph"),
    "InductorError": Private(
        "torch._inductor.exc:InductorError", "what inductor raises for a graph that it cannot compile"
    ),
    "inductor_compile": Private("torch._inductor:compile", "compiles that graph"),
    "TorchDispatchMode": Private(
        "torch.utils._python_dispatch:TorchDispatchMode", "sees the aten operations below a graph's functions"
    ),
    "tree_leaves": Private("torch.utils._pytree:tree_leaves", "tensors among arguments and results"),
    "throw_on_data_ptr": Private(
        "torch._C:_set_throw_on_mutable_data_ptr", "an error where C code wants the memory that a tensor has none of"
    ),
    "functorch_stack": Private(
        "torch._C._functorch:peek_interpreter_stack", "whether a transform of torch.func is active"
    ),
    "tree_flatten": Private("torch.utils._pytree:tree_flatten", "results of an operation, and how they are returned"),
    "tree_unflatten": Private("torch.utils._pytree:tree_unflatten", "the same"),
    "tree_iter": Private("torch.utils._pytree:tree_iter", "lazy tensors among arguments"),
    "tree_map": Private("torch.utils._pytree:tree_map", "the same"),
}

# Private attributes of torch's objects that the project reads: (owner's "module:attribute", name) and why.
ATTRIBUTES: dict[tuple[str, str], str] = {
    ("torch:Tensor", "_version"): "whether a tensor changed in place since the forward",
    ("torch:Tensor", "_base"): "FSDP2 asks it of every output of a module",
    ("torch:Tensor", "_is_view"): "pipelining asks it of a stage's outputs before it detaches them",
    ("torch:Tensor", "_make_wrapper_subclass"): "a tensor without memory of its own",
    ("torch.distributed.fsdp:FSDPState", "_fsdp_param_group"): "the parameters that FSDP2 gathers together",
    ("torch.distributed.fsdp:FSDPParamGroup", "_reshard_after_forward"): "whether they are let go after the forward",
    (
        "torch.fx.experimental.symbolic_shapes:ShapeEnv",
        "_check_frozen",
    ): "asked before a guard is added: a graph's guards are made",
    (
        "torch.fx.experimental.symbolic_shapes:ShapeEnv",
        "_suppress_guards_tls",
    ): "whether torch itself is only asking, and would add none",
    ("torch.autograd:forward_ad", "_current_level"): "whether forward-mode differentiation is active",
    ("torch.autograd:Function", "_raw_saved_tensors"): "whether a backward has run: what it saved is then gone",
    ("torch:UntypedStorage", "_cdata"): "whether two tensors share memory",
    ("torch.nn:Module", "_forward_hooks"): "a module with hooks is not written out",
    ("torch.nn:Module", "_forward_pre_hooks"): "the same",
    ("torch.nn:Module", "_backward_hooks"): "the same",
    ("torch.nn:Module", "_backward_pre_hooks"): "the same",
    ("torch.distributed.tensor:DTensor", "_local_tensor"): "whether a DTensor's piece is fake",
    ("torch.fx:Graph", "_codegen"): "how a graph that is put back is written as Python",
    ("torch.fx:Graph", "_tracer_cls"): "the same: what a copy of a graph keeps of it",
    ("torch.fx:Node", "_erased"): "whether a node is still in its graph",
    ("torch._ops:OpOverload", "_schema"): "an operator's name and which arguments it writes to",
    ("torch._ops:OpOverload", "_overloadname"): "an operator's functional form, and its name in a row program",
    ("torch._ops:OpOverloadPacket", "_qualified_op_name"): "an operator's namespace",
}

# The same, of attributes that not every torch or every object has: they are looked for with a default.
OPTIONAL: dict[tuple[str, str], str] = {
    ("torch.distributed.fsdp:FSDPState", "_fsdp_param_groups"): "several groups of a module, in newer versions",
    ("torch.distributed.fsdp:FSDPParam", "_unsharded_param"): "the gathered weight, once there is one",
}

# Used where nothing of the project may be imported: `kernels/` stands alone.
ELSEWHERE: dict[tuple[str, str], str] = {
    (
        "kernels/native/build.py",
        "torch._inductor.codecache.CppCodeCache",
    ): "compiles C++ with inductor's flags, into its cache",
    ("kernels/triton/rows.py", "torch._assert_async"): "an out-of-range target on a GPU, without waiting for it",
}

# The module whose functions stand for a DTensor's methods in graphs of torch 2.11, with all arguments but the tensor inside
# (`args_as_value`, `kwargs_as_value`): `prim_redistribute`, `prim_to_local`. Later torches call the methods.
DTENSOR_CLOSURES = "torch._dynamo.variables.tensor"


def find(home: str) -> Any:
    """What "module:attribute" names. Raises ImportError or AttributeError where torch does not have it."""
    module, _, attribute = home.partition(":")
    owner = importlib.import_module(module)
    if hasattr(owner, attribute):
        return getattr(owner, attribute)
    return importlib.import_module(f"{module}.{attribute}")  # a module that nobody has imported yet


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    private = NAMES[name]
    try:
        found = find(private.home)
    except (ImportError, AttributeError) as error:
        import torch

        raise ImportError(
            f"torch {torch.__version__} has no {private.home.replace(':', '.')}, which cce_fx needs ({private.why}). "
            "docs/compatibility.md lists the versions that were tested; please report this one."
        ) from error
    globals()[name] = found
    return found
