# SPDX-License-Identifier: Apache-2.0
"""The pass in a pipeline of your own: on an fx graph, inside inductor, and with rules for your own operations.

python examples/custom_pipeline.py
"""

import torch
import torch.nn.functional as F

import cce_fx
from cce_fx.passes import CutCrossEntropyPass, OwnReason, rule

VOCAB, HIDDEN = 5000, 64


class Head(torch.nn.Module):
    """A language-model head with its loss."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(VOCAB, HIDDEN) * 0.02)

    def forward(self, hidden, target):
        logits = F.linear(hidden, self.weight)
        return F.cross_entropy(logits.view(-1, VOCAB), target.view(-1))


def on_an_fx_graph(model, hidden, target):
    """`rewrite` takes any GraphModule whose operations are torch's."""
    graph = torch.fx.symbolic_trace(model)
    graph, report = cce_fx.rewrite(graph, (hidden, target))
    print(report)
    return graph(hidden, target)


def inside_inductor(model, hidden, target):
    """Among inductor's own passes, before or after others of yours."""
    seen = []

    def count_nodes(graph):
        seen.append(len(graph.nodes))

    cut = CutCrossEntropyPass()
    with torch._inductor.config.patch(pre_grad_custom_pass=_sequence(count_nodes, cut, count_nodes)):
        loss = torch.compile(model)(hidden, target)
    print(
        f"inductor's graph had {seen[0]} nodes before the pass and {seen[-1]} after; {len(cut.report.rewritten)} loss cut"
    )
    return loss


def _sequence(*passes):
    """One pass out of several; its uuid keeps inductor's cache honest."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class Sequence(CustomGraphPass):
        def __call__(self, graph):
            for each in passes:
                each(graph)

        def uuid(self):
            return (get_hash_for_files((__file__,)), *(p.uuid() for p in passes if hasattr(p, "uuid")))

    return Sequence()


def mark(logits):
    """An operation of our own, which the pass cannot know: it leaves logits as they are."""
    return logits


torch.fx.wrap("mark")


@rule(mark)
def _mark(call):
    """Its rule: a view goes through unchanged."""
    view = call.view()
    return view and view.at(call.node)


class MarkedHead(Head):
    def forward(self, hidden, target):
        return F.cross_entropy(mark(F.linear(hidden, self.weight)).view(-1, VOCAB), target.view(-1))


def watermark(logits):
    """Another one, which favours some classes: no view of a head any more."""
    return logits + torch.arange(VOCAB) % 2


torch.fx.wrap("watermark")
WATERMARK = OwnReason("WATERMARK", "watermarked logits are not the head's", "watermark when sampling, not in training")


@rule(watermark)
def _watermark(call):
    """Its rule: the loss is left alone, and the report says why in our own words."""
    return call.decline(WATERMARK) if call.view() else None


class WatermarkedHead(Head):
    def forward(self, hidden, target):
        return F.cross_entropy(watermark(F.linear(hidden, self.weight)).view(-1, VOCAB), target.view(-1))


def main():
    torch.manual_seed(0)
    hidden, target = torch.randn(4, 32, HIDDEN), torch.randint(0, VOCAB, (4, 32))
    for model, way in (
        (Head(), on_an_fx_graph),
        (Head(), inside_inductor),
        (MarkedHead(), on_an_fx_graph),
        (WatermarkedHead(), on_an_fx_graph),
    ):
        want, got = model(hidden, target), way(model, hidden, target)
        torch.testing.assert_close(got, want)
        print(f"{type(model).__name__}, {way.__name__}: loss {got.item():.6f}, eager {want.item():.6f}\n")


if __name__ == "__main__":
    main()
