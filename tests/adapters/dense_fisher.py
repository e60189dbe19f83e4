"""The dense Fisher matrix of a small softmax model by torch.func, and one step of a preconditioner on it."""

import warnings

import torch
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn import functional

from kfaclinalg_torch import KFACPreconditioner


def fisher(model, x, *names, y=None):
    """The dense Fisher matrix of these parameters of a softmax model, mean over the examples; with targets that of the
    loss's own gradients."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    held = {name: params.pop(name) for name in names}
    sizes = [p.numel() for p in held.values()]

    def of(theta, example):
        parts = theta.split(sizes)
        given = {name: part.reshape(p.shape) for (name, p), part in zip(held.items(), parts, strict=True)}
        return functional_call(model, params | given, tuple(t[None] for t in example)).flatten()

    theta, total = torch.cat([p.flatten() for p in held.values()]), 0.0
    for n in range(len(x[0])):
        example = tuple(t[n] for t in x)
        J, p = jacrev(of)(theta, example), of(theta, example).softmax(-1)
        if y is None:
            total = total + J.T @ (torch.diag(p) - torch.outer(p, p)) @ J
        else:
            g = J.T @ (p - functional.one_hot(y[n], len(p)))
            total = total + torch.outer(g, g)
    return total / len(x[0])


def preconditioned(model, x, y=None, estimator="exact", **options):
    own = {} if estimator == "empirical" else {"likelihood": "categorical"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        preconditioner = KFACPreconditioner(model, estimator=estimator, damping=0.1, **own, **options)
        z = model(*x)
    if estimator != "empirical":
        preconditioner.update(z)
    functional.cross_entropy(z, torch.zeros(len(z), dtype=torch.int64) if y is None else y).backward()
    preconditioner.step()
    return preconditioner


class Head(nn.Module):
    """A layer between a Linear and a head."""

    def __init__(self, layer, n=4, m=5, *, twice=False):
        super().__init__()
        self.first, self.layer, self.head, self.twice = nn.Linear(3, n), layer, nn.Linear(m, 3), twice

    def forward(self, x):
        x = torch.tanh(self.first(x))
        y = self.layer(x, x + 1) if self.twice else self.layer(x)
        y = y[0] if isinstance(y, tuple) else y
        return self.head(torch.tanh(y[:, -1] if y.ndim == 3 else y))


def turned(F, m, n, bias=True):
    """From the order of (weight (m, n), bias) row by row to vec [weight, bias] column by column."""
    order = torch.cat([torch.arange(m * n).view(m, n), m * n + torch.arange(m)[:, None]], 1) if bias else None
    order = torch.arange(m * n).view(m, n) if order is None else order
    return F[order.T.flatten()][:, order.T.flatten()]
