# SPDX-License-Identifier: Apache-2.0
"""Options that have to be the same in every process: compared before the first collective that depends on them.

Over the process group's store and not by a collective, which is itself what processes that differ would not reach together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.distributed as dist

from .._torch import process_group_store

if TYPE_CHECKING:
    from ..passes import Candidate, Policy

_agreed: dict[tuple[str, str], list[str]] = {}


def agree(group: dist.ProcessGroup, what: str, choice: str) -> None:
    """Wait until every process of `group` has told its choice for `what`, and compare. Free until this one's choice changes.

    Args:
        group: the processes that have to agree.
        what: the thing chosen for, the same text in every process.
        choice: every option that matters, as text.

    Raises:
        RuntimeError: another process has made another choice; it raises too. Or one has told none within the group's timeout.
    """
    known = _agreed.setdefault((group.group_name, what), [])
    if known[-1:] == [choice] or group.size() == 1:
        return
    # A program may change its mind, as long as all processes do: the choices are numbered.
    prefix = f"cce_fx/{group.group_name}/{what}/{len(known)}"
    store = process_group_store(group)
    mine = group.rank()
    store.set(f"{prefix}/{mine}", choice)
    for rank in range(group.size()):
        theirs = _read(store, f"{prefix}/{rank}", what, rank, group)
        if theirs != choice:
            known.append("")  # the next try has names of its own in the store, where these choices stay
            raise RuntimeError(
                f"processes differ in the options of {what}: rank {mine} of group {group.group_name!r} has {choice}, rank "
                f"{rank} has {theirs}. Give every process the same options, model and versions."
            )
    known.append(choice)


def agree_on_losses(candidates: Sequence[Candidate], rewritten: set[str], policy: Policy) -> None:
    """Compare what was decided for each loss on a head of DTensors, over every dimension of its mesh.

    Args:
        candidates: the losses of a graph.
        rewritten: the names of those that were rewritten.
        policy: the options that decided.

    Raises:
        RuntimeError: as `agree`.
    """
    from ..passes.sharded import has_sharded_head
    from ..passes.values import source_line, value_of

    for c in candidates:
        if not has_sharded_head(c.view):
            continue
        mesh = value_of(c.view.linear).device_mesh
        mesh = getattr(mesh, "real_obj", mesh)  # inside Dynamo's fake object
        outcome = "cut" if c.anchor.name in rewritten else "not cut"
        choice = f"{outcome}, {c.result.name}, {c.loss}, {policy}"
        what = f"the loss at {source_line(c.anchor) or c.anchor.name} over {c.view.classes} classes"
        for dim in range(mesh.ndim):
            agree(mesh.get_group(dim), what, choice)


def _read(store: dist.Store, key: str, what: str, rank: int, group: dist.ProcessGroup) -> str:
    try:
        return store.get(key).decode()
    except dist.DistStoreError as error:
        raise RuntimeError(
            f"rank {rank} of group {group.group_name!r} did not reach {what} within the store's timeout of {store.timeout}: it "
            "runs another program or other options of cce_fx, or has ended"
        ) from error
