# SPDX-License-Identifier: Apache-2.0
"""Losses of the rows as code bases write them, none of which a kernel knows, and losses that mix rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

N, B, T, D, E, V, K = 24, 4, 6, 2, 3, 50, 3


class Heads(nn.Module):
    """A student with and without bias, and a frozen teacher of another hidden size."""

    def __init__(self) -> None:
        super().__init__()
        self.s = nn.Linear(D, V, bias=False)
        self.b = nn.Linear(D, V)
        self.t = nn.Linear(E, V, bias=False).requires_grad_(False)
        self.wide = nn.Linear(D, K * V)


@dataclass
class Data:
    x: Tensor  # (N, D)
    e: Tensor  # (N, E)
    y: Tensor  # (N,)
    m: Tensor  # (N,) of 0 and 1
    a: Tensor  # (N,)

    def to(self, dtype: torch.dtype) -> Data:
        cast = lambda t: t.detach().to(dtype) if t.is_floating_point() else t  # noqa: E731
        found = Data(*(cast(t) for t in vars(self).values()))
        found.x.requires_grad_()
        return found


def data(seed: int = 0, n: int = N) -> Data:
    g = torch.Generator().manual_seed(seed)
    normal = lambda *size: torch.randn(*size, generator=g)  # noqa: E731
    y = torch.randint(0, V, (n,), generator=g)
    y[::5] = -100
    return Data(normal(n, D).requires_grad_(), normal(n, E), y, (torch.rand(n, generator=g) > 0.3).float(), normal(n))


Loss = Callable[[Heads, Data], Any]
LOSSES: dict[str, Loss] = {}
MIXED: dict[str, Loss] = {}


def loss(function: Loss) -> Loss:
    LOSSES[function.__name__] = function
    return function


def mixed(function: Loss) -> Loss:
    MIXED[function.__name__] = function
    return function


@loss
def kl_distillation(h: Heads, d: Data) -> Tensor:
    student = F.log_softmax(h.s(d.x) / 2.0, -1)
    return F.kl_div(student, F.softmax(h.t(d.e) / 2.0, -1), reduction="batchmean") * 4.0


@loss
def kl_with_log_target_and_mask(h: Heads, d: Data) -> Tensor:
    each = F.kl_div(h.s(d.x).log_softmax(-1), h.t(d.e).log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return (each * d.m).sum() / d.m.sum()


@loss
def jensen_shannon(h: Heads, d: Data) -> Tensor:
    a, b = h.s(d.x).log_softmax(-1), h.t(d.e).log_softmax(-1)
    mean = torch.logsumexp(torch.stack([a + math.log(0.5), b + math.log(0.5)]), dim=0)
    both = 0.5 * F.kl_div(mean, a, log_target=True, reduction="none") + 0.5 * F.kl_div(
        mean, b, log_target=True, reduction="none"
    )
    return both.sum(-1)[d.y != -100].mean()


@loss
def reverse_kl_in_place(h: Heads, d: Data) -> Tensor:
    z = h.s(d.x)
    z /= 2.0
    p = z.softmax(-1)
    return (p * (p.log() - F.log_softmax(h.t(d.e), -1))).sum(-1).mean()


@loss
def cross_entropy_with_entropy(h: Heads, d: Data) -> Tensor:
    z = h.b(d.x)
    entropy = -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)
    return F.cross_entropy(z, d.y) - 0.01 * (entropy * d.m).sum() / d.m.sum()


@loss
def metrics_beside(h: Heads, d: Data) -> tuple[Tensor, ...]:
    z = h.b(d.x)
    top = z.topk(5, -1).indices
    right = (z.argmax(-1) == d.y).float().mean()
    return F.cross_entropy(z, d.y), right, (top == d.y[:, None]).any(-1).float().mean(), z.detach().mean()


@loss
def smoothed_by_scatter(h: Heads, d: Data) -> Tensor:
    z, y = h.s(d.x), d.y.clamp(0)
    target = torch.full_like(z, 0.1 / (V - 2)).scatter_(1, y.unsqueeze(1), 0.9)
    target[:, 0] = 0
    return F.kl_div(F.log_softmax(z, -1), target, reduction="sum") / d.y.ne(-100).sum()


@loss
def multi_label(h: Heads, d: Data) -> Tensor:
    return F.binary_cross_entropy_with_logits(h.b(d.x), F.one_hot(d.y.clamp(0), V).float().to(d.x.dtype))


@loss
def arc_face(h: Heads, d: Data) -> Tensor:
    cosine = F.linear(F.normalize(d.x), F.normalize(h.s.weight)).clamp(-1 + 1e-4, 1 - 1e-4)
    one_hot = torch.zeros_like(cosine)
    one_hot.scatter_(1, d.y.clamp(0).view(-1, 1), 1.0)
    margin = torch.cos(torch.acos(cosine) + 0.5)
    return F.cross_entropy((one_hot * margin + (1 - one_hot) * cosine) * 16.0, d.y.clamp(0))


@loss
def focal(h: Heads, d: Data) -> Tensor:
    p = h.s(d.x).softmax(-1).clamp_min(1e-6)
    right = p[torch.arange(p.size(0)), d.y.clamp(0)]
    return (-((1 - right) ** 2) * right.log() * d.m).mean()


@loss
def softplus_of_differences(h: Heads, d: Data) -> Tensor:
    z, y = h.s(d.x), d.y.clamp(0)
    right = z.gather(-1, y[:, None])
    others = torch.where(F.one_hot(y, V).bool(), -torch.inf, z - right)
    return F.softplus(others.logsumexp(-1)).mean()


@loss
def soft_targets(h: Heads, d: Data) -> Tensor:
    return F.cross_entropy(h.b(d.x), F.softmax(h.t(d.e), -1))


@loss
def hinge(h: Heads, d: Data) -> Tensor:
    return F.multi_margin_loss(h.s(d.x), d.y.clamp(0))


@loss
def unlikelihood(h: Heads, d: Data) -> Tensor:
    log_probs = F.log_softmax(h.s(d.x), -1)
    wrong = torch.zeros_like(log_probs).scatter_(1, (d.y.clamp(0)[:, None] + 3) % V, 1)
    return -((1 - log_probs.exp()).clamp(min=1e-5).log() * wrong).sum()


@loss
def sparsemax_like(h: Heads, d: Data) -> Tensor:
    z = h.s(d.x)
    ordered, _ = z.sort(-1, descending=True)
    sums = ordered.cumsum(-1) - 1
    ranks = torch.arange(1, V + 1, device=z.device, dtype=z.dtype)
    support = (ranks * ordered > sums).sum(-1, keepdim=True)
    tau = sums.gather(-1, support - 1) / support.to(z.dtype)
    return ((z - tau).clamp(min=0) ** 2).sum(-1).mean()


@loss
def soft_embeddings(h: Heads, d: Data) -> Tensor:
    return (h.s(d.x).softmax(-1) @ h.s.weight - d.x).pow(2).mean()


@loss
def code_books(h: Heads, d: Data) -> Tensor:
    z = h.wide(d.x.view(B, T, D)).view(B, T, K, V)
    targets = d.y.clamp(0).view(B, T, 1).expand(B, T, K)
    mixture = z.log_softmax(-1)
    return -(mixture.gather(-1, targets[..., None]).squeeze(-1).exp().mean(-1).log()).mean()


@loss
def policy_gradient(h: Heads, d: Data) -> Tensor:
    log_probs = h.s(d.x).div(0.7).log_softmax(-1)
    chosen = log_probs.gather(1, d.y.clamp(0)[:, None]).squeeze(1)
    ratio = (chosen - chosen.detach()).exp()
    clipped = torch.minimum(ratio * d.a, ratio.clamp(0.8, 1.2) * d.a)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return -(clipped * d.m).sum() / d.m.sum() - 0.01 * entropy.mean()


@loss
def sequences_of_three_dimensions(h: Heads, d: Data) -> Tensor:
    z, t = h.s(d.x.view(B, T, D)), h.t(d.e.view(B, T, E))
    each = (t.softmax(-1) * (t.log_softmax(-1) - z[:, :].log_softmax(-1))).sum(-1)
    return (each.sum(1) / T).mean()


@loss
def shifted_rows(h: Heads, d: Data) -> Tensor:
    z = h.s(d.x.view(B, T, D))[:, :-1]
    p = z.softmax(-1)
    return (p.pow(2).sum(-1) * d.m.view(B, T)[:, 1:]).mean()


@loss
def classes_before_rows(h: Heads, d: Data) -> Tensor:
    z = h.s(d.x.view(B, T, D)).transpose(1, 2)
    return -(z.log_softmax(1).exp() ** 2).sum(1).log().mean()


@loss
def half_of_the_classes(h: Heads, d: Data) -> Tensor:
    z = h.s(d.x)
    first, second = z.chunk(2, dim=-1)
    return (first.logsumexp(-1) - second.logsumexp(-1)).abs().mean() + torch.cat([second, first], -1).amax(-1).mean()


@loss
def two_losses_of_one_head(h: Heads, d: Data) -> tuple[Tensor, Tensor]:
    z = h.s(d.x)
    return (z.sigmoid() * z).sum(-1).mean(), z.tanh().pow(2).sum(-1)


@loss
def weights_from_a_first_look(h: Heads, d: Data) -> Tensor:
    p = h.s(d.x).softmax(-1)
    sure = p.max(-1).values
    weight = sure / sure.mean()  # of all rows: the second half has to wait
    return (p.pow(2).sum(-1) * weight).mean()


@loss
def nothing_flows_through_the_teacher(h: Heads, d: Data) -> Tensor:
    z = h.s(d.x)
    with torch.no_grad():
        target = z.mul(2).softmax(-1)
    return -(target * z.log_softmax(-1)).sum(-1).mean()


@loss
def logits_given_as_targets(h: Heads, d: Data) -> Tensor:
    wanted = torch.outer(d.a, torch.linspace(-1, 1, V, dtype=d.a.dtype))
    return F.mse_loss(h.s(d.x), wanted) + F.smooth_l1_loss(h.s(d.x).softmax(-1), wanted.softmax(-1), reduction="sum")


@loss
def metrics_before_the_loss(h: Heads, d: Data) -> tuple[Tensor, Tensor]:
    z = h.s(d.x)
    p = z.softmax(-1)
    with torch.no_grad():
        sure = p.max(-1).values.mean()
    return (p**2).sum(-1).mean(), sure


@loss
def hidden_made_in_place(h: Heads, d: Data) -> Tensor:
    x = d.x * 2.0
    x.add_(d.a[:, None])
    return h.s(x).sigmoid().sum(-1).mean()


@loss
def a_target_made_late(h: Heads, d: Data) -> tuple[Tensor, Tensor]:
    z = h.s(d.x).tanh()
    large = z.amax(-1).mean()
    return F.cross_entropy(z, d.y.roll(1)), large


@loss
def classes_as_rows(h: Heads, d: Data) -> Tensor:
    z = d.x @ h.s.weight.t()
    p = z.softmax(0)
    return (p * p).sum(0).log().mean() + z.tanh().pow(2).sum(-1).mean()


@loss
def pairs_in_both_directions(h: Heads, d: Data) -> Tensor:
    z = d.x @ h.s.weight[: d.x.size(0)].t()
    pairs = torch.eye(z.size(0), dtype=z.dtype)
    return -(pairs * (z.softmax(0).log() + 0.0)).sum() - (pairs * z.tanh().log_softmax(1)).sum()


class Doubled(torch.autograd.Function):
    """A gradient that is not the operation's."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.tanh()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


@loss
def a_gradient_of_its_own(h: Heads, d: Data) -> Tensor:
    return Doubled.apply(h.s(d.x)).pow(2).sum(-1).mean()


@mixed
def both_directions_at_once(h: Heads, d: Data) -> Tensor:
    z = h.s(d.x)
    return (z.softmax(0) * z.softmax(1)).sum(-1).mean()


@mixed
def turned_after_a_change(h: Heads, d: Data) -> Tensor:
    z = h.s(d.x)
    z.mul_(2.0)
    return z.log_softmax(0).pow(2).sum(0).mean()


@mixed
def a_product_over_everything(h: Heads, d: Data) -> Tensor:
    z = h.s(d.x)
    return (z.sigmoid().sum(-1) * torch.tensordot(z, z.tanh(), 2)).mean()


@mixed
def softmax_over_rows(h: Heads, d: Data) -> Tensor:
    return (h.s(d.x).softmax(0) ** 2).sum(-1).mean()


@mixed
def similarity_of_rows(h: Heads, d: Data) -> Tensor:
    z = h.s(d.x)
    return (z @ z.t()).softmax(-1).diagonal().log().mean()


@mixed
def batch_statistics(h: Heads, d: Data) -> Tensor:
    z = h.s(d.x)
    z = (z - z.mean(0)) / (z.std(0) + 1e-3)
    return z.pow(4).mean()


@mixed
def sorted_rows(h: Heads, d: Data) -> Tensor:
    return (h.s(d.x).sort(0).values * d.a[:, None]).sigmoid().sum(-1).mean()


@mixed
def rows_before(h: Heads, d: Data) -> Tensor:
    z = h.s(d.x.view(B, T, D)).softmax(-1)
    return (z[:, 1:] - z[:, :-1]).pow(2).sum(-1).mean() + z.cumsum(1).pow(2).sum(-1).mean()


@mixed
def rows_chosen_by_number(h: Heads, d: Data) -> Tensor:
    z = h.s(d.x).tanh()
    return (z[d.y.clamp(0) % N] * z).sum(-1).mean()


@mixed
def rolled(h: Heads, d: Data) -> Tensor:
    z = h.s(d.x).sigmoid()
    return (z.roll(1, 0) * z).sum(-1).mean() + z.flip(0).mul(z).sum(-1).mean()


@mixed
def a_marginal(h: Heads, d: Data) -> Tensor:
    p = h.s(d.x).softmax(-1).mean(0)
    return (p * p.log()).sum()


@mixed
def hidden_changed_between(h: Heads, d: Data) -> Tensor:
    x = d.x * 1.0
    p = h.s(x.clone()).softmax(-1)
    with torch.no_grad():
        d.e.mul_(1.0)
    kept = d.a.clone()
    scaled = p + kept[:, None]
    kept.zero_()
    return scaled.pow(2).sum(-1).mean() + kept.sum()


@mixed
def logits_changed_under_another_name(h: Heads, d: Data) -> Tensor:
    z = h.s(d.x) * 1.0
    other = z.view(-1)
    other[0] = 3.0
    z.t()[1].mul_(0.5)
    return z.softmax(-1).pow(2).sum(-1).mean()


@mixed
def a_watched_gradient(h: Heads, d: Data) -> Tensor:
    z = h.s(d.x)
    z.register_hook(lambda g: g * 3)
    return z.sigmoid().sum(-1).mean()


@mixed
def a_checkpoint(h: Heads, d: Data) -> Tensor:
    def inner(x: Tensor) -> Tensor:
        return (h.s(x).softmax(-1) * h.t(d.e).softmax(-1)).sum(-1).log().mean()

    return torch.utils.checkpoint.checkpoint(inner, d.x, use_reentrant=False)


@mixed
def logits_returned_too(h: Heads, d: Data) -> tuple[Tensor, Tensor]:
    z = h.s(d.x)
    return z.softmax(-1).pow(2).sum(-1).mean(), z


@mixed
def a_size_that_is_no_shape(h: Heads, d: Data) -> Tensor:
    return (h.s(d.x) * d.x.size(0)).tanh().sum(-1).mean() / d.x.size(0)


@mixed
def no_rows_at_all(h: Heads, d: Data) -> Tensor:
    return h.s(d.x[:0]).sigmoid().sum(-1).sum() + d.x.sum()


@mixed
def a_network_behind(h: Heads, d: Data) -> Tensor:
    best = h.s(d.x).argmax(-1)
    return (h.s.weight[best] * d.x).sum(-1).mean()


@mixed
def autocast_within(h: Heads, d: Data) -> Tensor:
    z = h.s(d.x)
    with torch.autocast("cpu", enabled=False):
        return (z.sigmoid() @ h.s.weight).pow(2).sum(-1).mean()
