# SPDX-License-Identifier: Apache-2.0
"""Options that have to be the same in every process: compared before the first collective that depends on them.

Over the process group's store and not by a collective, which is itself what processes that differ would not reach together.
"""

from __future__ import annotations

import torch.distributed as dist

from .._torch import process_group_store

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


def _read(store: dist.Store, key: str, what: str, rank: int, group: dist.ProcessGroup) -> str:
    try:
        return store.get(key).decode()
    except dist.DistStoreError as error:
        raise RuntimeError(
            f"rank {rank} of group {group.group_name!r} did not reach {what} within the store's timeout of {store.timeout}: it "
            "runs another program or other options of cce_fx, or has ended"
        ) from error
