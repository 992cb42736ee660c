"""Programs drawn from the grammar that the pass supports: rewritten, and the same results as eager."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, given, settings

from .helpers import compare
from .programs import Program, programs

EXAMPLES = int(os.environ.get("CCE_FX_PROGRAMS", "150"))


@given(programs())
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    print_blob=True,
    phases=[Phase.explicit, Phase.generate],
)
def test_a_rewritten_program_equals_eager(program: Program) -> None:
    watch = compare(program.function(), program.tensors())
    assert watch.rewritten == 1, "the loss was declined"
    rows, classes = program.shape[0] * program.shape[1], program.shape[3]
    widest = max(rows * program.shape[2], classes * program.shape[2], rows, classes)
    # No tensor as large as the logits, unless hidden or weight is itself.
    assert watch.largest() < max((program.shape[0]) * (program.shape[1] - 1) * classes, widest + 1)
