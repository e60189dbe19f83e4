"""KFACPreconditioner against dense float64 matrices: the factors of every kind of layer, and what step() makes of them.

The reference shares no code with the adapter. A twin of the model has a perturbation added to the output of each
module: the Jacobian of the network's outputs with respect to it, an example at a time, gives g; a is the module's
response to unit weights. Examples that depend on each other (batch normalisation in training) stay together.
"""

from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from backends import TORCH
from matrices import judge
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from kfaclinalg import Diagonal, Factors, Kronecker, LayerFactors, Link, block_tridiagonal_inverse
from kfaclinalg_torch import KFACPreconditioner

N, DAMPING = 3, 0.05
EPS = float(np.finfo(float).eps)
LIKELIHOODS = ("gaussian", "bernoulli", "categorical")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
TRANSPOSED = CONVOLUTIONS[3:]
CHANNELS_LAST = (nn.LayerNorm, nn.RMSNorm)
SCALES = (*CHANNELS_LAST, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


# -- the models --


def through(layer: nn.Module, *shape: int, pool: bool = False) -> tuple[nn.Module, Tensor]:
    """layer, tanh, Linear, on inputs of this shape an example."""
    x = torch.randn(N, *shape)
    y = layer(x[:2])
    middle = [nn.Tanh(), nn.Flatten()] if y.ndim > 2 else [nn.Tanh()]
    return nn.Sequential(layer, *middle, nn.Linear(y[0].numel(), 3)), x


def normalised_after(first: nn.Module, norm: nn.Module, *shape: int, train: bool = False) -> tuple[nn.Module, Tensor]:
    """first, norm, tanh, Linear; neither the scale and shift nor the running moments are those of the start."""
    with torch.no_grad():
        for p in norm.parameters():
            p.add_(0.3 * torch.randn_like(p))
    if getattr(norm, "running_mean", None) is not None:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    x = torch.randn(N, *shape)
    y = norm(first(x))
    model = nn.Sequential(first, norm, nn.Tanh(), nn.Flatten(), nn.Linear(y[0].numel(), 3))
    return model.train(train), x


class Attention(nn.Module):
    """nn.MultiheadAttention of one input, or of one and another, and a head; the batch is first outside of it."""

    def __init__(self, *, cross=False, need_weights=True, mask=None, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, **options)
        for p in self.attention.parameters():
            nn.init.normal_(p, std=0.5)
        self.head = nn.Linear(4, 3)
        self.cross, self.need_weights, self.mask = cross, need_weights, mask

    def forward(self, x, *others):
        others = list(others)
        y = others.pop(0) if self.cross else x
        masks = {"key_padding_mask": others.pop(0)} if self.mask == "padding" else {}
        if self.mask == "float 3-D":  # (N, heads, L, S)
            masks = {"attn_mask": others.pop(0).flatten(0, 1)}
        if self.mask == "causal":
            masks = {"attn_mask": torch.ones(x.shape[1], y.shape[1]).triu(1).bool(), "is_causal": True}
        if not self.attention.batch_first:
            x, y = x.mT.permute(2, 0, 1), y.mT.permute(2, 0, 1)
        z, weights = self.attention(x, y, y, need_weights=self.need_weights, **masks)
        assert (weights is not None) == self.need_weights
        return self.head(torch.tanh(z if self.attention.batch_first else z.transpose(0, 1)))


def attention(*, cross=False, mask=None, **options) -> tuple[Any, ...]:
    model = Attention(cross=cross, mask=mask, **options)
    L, S = 4, 5 if cross else 4
    others = [torch.randn(N, S, 4)] if cross else []
    if mask == "padding":
        others.append(torch.arange(S) >= torch.tensor([[S], [2], [3]]))
    if mask == "float 3-D":
        others.append(torch.randn(N, 2, L, S))
    return model, torch.randn(N, L, 4), *others


class HandAttention(nn.Module):
    """The formula of attention, of four linear layers; what `Attention` must equal."""

    def __init__(self, of: nn.MultiheadAttention):
        super().__init__()
        self.heads, self.batch_first = of.num_heads, of.batch_first
        E, bias = of.embed_dim, of.in_proj_bias is not None
        for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
            layer = nn.Linear(E, E, bias=bias)
            layer.weight.data = of.in_proj_weight.data[i * E : (i + 1) * E].clone()
            if bias:
                layer.bias.data = of.in_proj_bias.data[i * E : (i + 1) * E].clone()
            setattr(self, name, layer)
        self.out_proj = deepcopy(of.out_proj)

    def forward(self, q, k, v, attn_mask=None, key_padding_mask=None, is_causal=False, need_weights=True):
        q, k, v = (x if self.batch_first else x.transpose(0, 1) for x in (q, k, v))
        split = partial(torch.unflatten, dim=-1, sizes=(self.heads, -1))
        q, k, v = split(self.q_proj(q)), split(self.k_proj(k)), split(self.v_proj(v))
        scores = torch.einsum("nlhd,nshd->nhls", q, k) / q.shape[-1] ** 0.5
        if attn_mask is not None and attn_mask.ndim == 3:
            scores = scores + attn_mask.unflatten(0, (-1, self.heads))
        elif attn_mask is not None:
            scores = scores.masked_fill(attn_mask, -torch.inf)
        if key_padding_mask is not None:
            scores = scores.masked_fill(key_padding_mask[:, None, None], -torch.inf)
        weights = scores.softmax(-1)
        z = self.out_proj(torch.einsum("nhls,nshd->nlhd", weights, v).flatten(2))
        return z if self.batch_first else z.transpose(0, 1), weights.mean(1) if need_weights else None


class ScaledDotProduct(nn.Module):
    """Attention as people write it now."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out, self.head = nn.Linear(4, 12), nn.Linear(4, 4, bias=False), nn.Linear(4, 3)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (2, 2)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(torch.tanh(self.out(y.transpose(1, 2).flatten(2))))


class Several(nn.Module):
    """One module, used on each of its inputs."""

    def __init__(self, layer, head, dims):
        super().__init__()
        self.layer, self.head, self.dims = layer, head, dims

    def forward(self, *xs):
        uses = [torch.tanh(self.layer(x)) for x in xs]
        return self.head(torch.cat([y.sum(self.dims) for y in uses], -1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.step, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        for _ in range(3):
            x = torch.tanh(self.step(x))
        return self.head(x)


class Language(nn.Module):
    """An embedding whose weight is that of the head."""

    def __init__(self, bias=True, padding_idx=None):
        super().__init__()
        self.embedding, self.middle = nn.Embedding(5, 3, padding_idx=padding_idx), nn.Linear(3, 3)
        self.head = nn.Linear(3, 5, bias=bias)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(torch.tanh(self.middle(self.embedding(x))))


class TiedLinear(nn.Module):
    def __init__(self, bias="own"):
        super().__init__()
        self.one, self.two, self.head = nn.Linear(3, 3, bias=bias != "none"), nn.Linear(3, 3), nn.Linear(3, 2)
        self.two.weight = self.one.weight
        if bias == "shared":
            self.two.bias = self.one.bias

    def forward(self, x):
        return self.head(torch.tanh(self.two(torch.tanh(self.one(x)))))


class Bag(nn.Module):
    """The mean of embeddings."""

    def __init__(self, **options):
        super().__init__()
        self.embedding, self.head = nn.Embedding(6, 3, **options), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.embedding(x).mean(1) if x.ndim > 1 else self.embedding(x)))


class Frames(nn.Module):
    """Each of the T frames of an example (N, T, ...) goes through `layer` as if it were one, as for video."""

    def __init__(self, layer, width):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(width, 3)

    def forward(self, x):
        y = torch.tanh(self.layer(x.flatten(0, 1)))
        return self.head(y.reshape(len(x), -1))


def frozen_bias() -> nn.Module:
    layer = nn.Linear(4, 3)
    layer.bias.requires_grad_(False)
    return layer


def words(*shape: int) -> Tensor:
    return torch.randint(6, (N, *shape))


Built = tuple[Any, ...]
conv = partial(nn.Conv2d, 2, 4, 3)
turned = partial(nn.ConvTranspose2d, 4, 4, (2, 3))
ROWS: dict[str, Callable[[], Built]] = {
    "Linear": lambda: through(nn.Linear(4, 3), 4),
    "Linear, no bias": lambda: through(nn.Linear(4, 3, bias=False), 4),
    "Linear, bias frozen": lambda: through(frozen_bias(), 4),
    "Linear, 3-D": lambda: (nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)), torch.randn(N, 3, 4)),
    "Linear, 3-D, no bias": lambda: through(nn.Linear(4, 3, bias=False), 3, 4),
    "Linear, 4-D": lambda: through(nn.Linear(4, 2), 2, 2, 4),
    "Linear, the model itself": lambda: (nn.Linear(4, 3), torch.randn(N, 4)),
    "Linear, frames": lambda: (Frames(nn.Linear(4, 2), 6), torch.randn(N, 3, 4)),
    "Conv1d": lambda: through(nn.Conv1d(2, 3, 3, padding=1), 2, 4),
    "Conv1d, stride, reflect": lambda: through(nn.Conv1d(2, 3, 3, 2, 2, padding_mode="reflect"), 2, 5),
    "Conv1d, dilation, groups": lambda: through(nn.Conv1d(4, 2, 2, dilation=2, groups=2), 4, 5),
    "Conv2d": lambda: through(conv(padding=1), 2, 4, 3),
    "Conv2d, no bias": lambda: through(conv(bias=False), 2, 4, 4),
    "Conv2d, 1x1": lambda: through(nn.Conv2d(3, 2, 1), 3, 2, 3),
    "Conv2d, stride": lambda: through(conv(stride=(2, 1), padding=(1, 0)), 2, 5, 4),
    "Conv2d, dilation": lambda: through(conv(dilation=(1, 2), padding=1), 2, 4, 5),
    "Conv2d, same": lambda: through(conv(padding="same"), 2, 3, 4),
    "Conv2d, same, even kernel": lambda: through(nn.Conv2d(2, 3, (2, 4), padding="same"), 2, 3, 4),
    "Conv2d, valid": lambda: through(conv(padding="valid"), 2, 4, 3),
    "Conv2d, reflect": lambda: through(conv(padding=1, padding_mode="reflect"), 2, 3, 4),
    "Conv2d, replicate": lambda: through(conv(padding=(2, 1), padding_mode="replicate"), 2, 2, 3),
    "Conv2d, circular": lambda: through(conv(padding=(1, 2), padding_mode="circular"), 2, 3, 3),
    "Conv2d, same, circular": lambda: through(conv(padding="same", padding_mode="circular"), 2, 3, 3),
    "Conv2d, groups": lambda: through(conv(groups=2, padding=1), 2, 3, 3),
    "Conv2d, groups, no bias, stride": lambda: through(conv(groups=2, stride=2, bias=False), 2, 5, 5),
    "Conv2d, depthwise": lambda: through(nn.Conv2d(3, 3, 2, groups=3), 3, 3, 4),
    "Conv2d, depthwise, twice the channels": lambda: through(nn.Conv2d(2, 4, 2, groups=2), 2, 3, 3),
    "Conv2d, frames": lambda: (Frames(nn.Conv2d(2, 2, 2), 8), torch.randn(N, 2, 2, 2, 3)),
    "Conv3d": lambda: through(nn.Conv3d(2, 2, 2, padding=(1, 0, 0)), 2, 2, 2, 3),
    "Conv3d, stride, circular": lambda: through(nn.Conv3d(1, 2, 2, (1, 2, 1), 1, padding_mode="circular"), 1, 2, 2, 2),
    "Conv3d, groups, replicate": lambda: through(nn.Conv3d(2, 2, 2, 1, 1, 1, 2, padding_mode="replicate"), 2, 1, 2, 2),
    "ConvTranspose1d": lambda: through(nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1), 2, 4),
    "ConvTranspose1d, no bias": lambda: through(nn.ConvTranspose1d(2, 3, 2, bias=False), 2, 3),
    "ConvTranspose2d": lambda: through(turned(), 4, 2, 2),
    "ConvTranspose2d, all": lambda: through(turned(stride=2, padding=1, output_padding=1, dilation=(1, 2)), 4, 2, 2),
    "ConvTranspose2d, groups": lambda: through(turned(groups=2, padding=(0, 1)), 4, 2, 2),
    "ConvTranspose2d, depthwise": lambda: through(nn.ConvTranspose2d(2, 4, 2, groups=2, stride=2), 2, 2, 2),
    "ConvTranspose3d": lambda: through(nn.ConvTranspose3d(2, 2, 2, stride=(1, 2, 1), padding=1), 2, 2, 2, 2),
    "Embedding": lambda: (Bag(), words(4)),
    "Embedding, one word": lambda: (Bag(), words()),
    "Embedding, padding": lambda: (Bag(padding_idx=2), torch.tensor([[2, 1, 0, 2], [3, 3, 1, 5], [2, 2, 4, 2]])),
    "LayerNorm": lambda: normalised_after(nn.Linear(4, 5), nn.LayerNorm(5), 4),
    "LayerNorm, 3-D": lambda: normalised_after(nn.Linear(4, 3), nn.LayerNorm(3), 2, 4),
    "LayerNorm, no bias": lambda: normalised_after(nn.Linear(4, 3), nn.LayerNorm(3, bias=False), 2, 4),
    "LayerNorm, two dimensions": lambda: normalised_after(nn.Linear(4, 3), nn.LayerNorm((2, 3)), 2, 4),
    "RMSNorm": lambda: normalised_after(nn.Linear(4, 5), nn.RMSNorm(5), 4),
    "RMSNorm, 3-D": lambda: normalised_after(nn.Linear(4, 3), nn.RMSNorm(3, eps=0.1), 2, 4),
    "GroupNorm": lambda: normalised_after(nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4), 2, 3, 3),
    "GroupNorm, no positions": lambda: normalised_after(nn.Linear(3, 6), nn.GroupNorm(2, 6), 3),
    "BatchNorm1d, eval": lambda: normalised_after(nn.Linear(3, 4), nn.BatchNorm1d(4), 3),
    "BatchNorm1d, positions, eval": lambda: normalised_after(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), 2, 4),
    "BatchNorm2d, eval": lambda: normalised_after(nn.Conv2d(2, 3, 2, bias=False), nn.BatchNorm2d(3), 2, 3, 3),
    "BatchNorm3d, eval": lambda: normalised_after(nn.Conv3d(1, 2, 2), nn.BatchNorm3d(2), 1, 2, 3, 2),
    "MultiheadAttention": lambda: attention(batch_first=True),
    "MultiheadAttention, no weights": lambda: attention(batch_first=True, need_weights=False),
    "MultiheadAttention, no bias": lambda: attention(batch_first=True, bias=False),
    "MultiheadAttention, sequence first": attention,
    "MultiheadAttention, sequence first, no weights": lambda: attention(need_weights=False, mask="padding"),
    "MultiheadAttention, padding": lambda: attention(batch_first=True, mask="padding"),
    "MultiheadAttention, causal": lambda: attention(batch_first=True, mask="causal", need_weights=False),
    "MultiheadAttention, cross": lambda: attention(batch_first=True, cross=True),
    "MultiheadAttention, cross, sequence first": lambda: attention(cross=True, mask="float 3-D"),
    "MultiheadAttention, cross, padding": lambda: attention(
        batch_first=True, cross=True, mask="padding", need_weights=False
    ),
    "scaled_dot_product_attention": lambda: (ScaledDotProduct(), torch.randn(N, 3, 4)),
    "used three times": lambda: (Recurrent(), torch.randn(N, 4)),
    "used on two lengths": lambda: (
        Several(nn.Linear(4, 3), nn.Linear(6, 3), 1),
        torch.randn(N, 2, 4),
        torch.randn(N, 5, 4),
    ),
    "Conv2d, used on two sizes": lambda: (
        Several(nn.Conv2d(2, 3, 2), nn.Linear(6, 3), (2, 3)),
        torch.randn(N, 2, 3, 3),
        torch.randn(N, 2, 2, 4),
    ),
    "Embedding, used twice": lambda: (Several(nn.Embedding(6, 2), nn.Linear(4, 3), 1), words(3), words(2)),
    "Embedding tied to the head": lambda: (Language(), torch.randint(5, (N, 3))),
    "Embedding tied to the head, no bias": lambda: (Language(bias=False), torch.randint(5, (N, 3))),
    "Embedding tied to the head, padding": lambda: (Language(padding_idx=1), torch.randint(5, (N, 4))),
    "two Linear tied": lambda: (TiedLinear(), torch.randn(N, 3)),
    "two Linear tied, one bias": lambda: (TiedLinear("none"), torch.randn(N, 3)),
    "two Linear tied, 3-D": lambda: (TiedLinear(), torch.randn(N, 2, 3)),
    "two Linear tied, and their bias": lambda: (TiedLinear("shared"), torch.randn(N, 3)),
}
TRAINED: dict[str, Callable[[], Built]] = {
    "BatchNorm1d": lambda: normalised_after(nn.Linear(3, 4), nn.BatchNorm1d(4), 3, train=True),
    "BatchNorm1d, positions": lambda: normalised_after(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), 2, 4, train=True),
    "BatchNorm2d": lambda: normalised_after(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), 2, 3, 3, train=True),
    "BatchNorm2d, no running moments, eval": lambda: normalised_after(
        nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3, track_running_stats=False), 2, 3, 3
    ),
}
every_row = pytest.mark.parametrize("row", ROWS)
quiet = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
every_likelihood = pytest.mark.parametrize("likelihood", LIKELIHOODS)
both_sharings = pytest.mark.parametrize("sharing", ["expand", "reduce"])


# -- losses and targets, by hand --


def losses(likelihood: str, z: Tensor, y: Tensor) -> Tensor:
    """Minus the log likelihood of each example (N,)."""
    if likelihood == "gaussian":
        each = (z - y) ** 2 / 2
    elif likelihood == "bernoulli":
        each = torch.log1p(torch.exp(z)) - y * z
    else:
        each = torch.log(torch.exp(z).sum(-1)) - (z * functional.one_hot(y, z.shape[-1])).sum(-1)
    return each.flatten(1).sum(1) if each.ndim > 1 else each


def targets_for(likelihood: str, z: Tensor) -> Tensor:
    if likelihood == "categorical":
        return torch.randint(z.shape[-1], z.shape[:-1])
    return torch.randn(z.shape) if likelihood == "gaussian" else torch.rand(z.shape).round()


# -- the reference --


class Seen(NamedTuple):
    """Of one example: a (R, groups, n) and the Jacobians g (D, R, groups, m) of each block, and the D x D curvature."""

    a: dict[str, Tensor]
    g: dict[str, Tensor]
    F: Tensor


def twin(model: nn.Module) -> nn.Module:
    """A copy with attention written out."""
    copy = deepcopy(model)
    for name, module in list(copy.named_children()):
        if isinstance(module, nn.MultiheadAttention):
            setattr(copy, name, HandAttention(module))
    return copy


def leaves(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if any(p.requires_grad for p in m.parameters(recurse=False))}


def perturbed(model: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, list[tuple[str, Tensor, Tensor]]]:
    """The outputs, and of each use of a module its name, inputs and the zero that was added to its outputs."""
    uses: list[tuple[str, Tensor, Tensor]] = []

    def hook(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        zero = torch.zeros_like(output, requires_grad=True)
        uses.append((name, inputs[0].detach(), zero))
        return output + zero

    handles = [module.register_forward_hook(partial(hook, name)) for name, module in leaves(model).items()]
    z = model(*args)
    for handle in handles:
        handle.remove()
    return z, uses


def seen(model: nn.Module, args: tuple[Tensor, ...], likelihood: str, y: Tensor | None = None) -> list[Seen]:
    """One at a time; with targets the curvature is that of the one gradient of the loss."""
    return [
        _seen(model, tuple(x[n : n + 1] for x in args), likelihood, None if y is None else y[n : n + 1])
        for n in range(len(args[0]))
    ]


def _seen(model: nn.Module, args: tuple[Tensor, ...], likelihood: str, y: Tensor | None) -> Seen:
    z, uses = perturbed(model, args)
    flat, point = z.flatten(), z.detach()
    columns = [torch.autograd.grad(entry, [zero for *_, zero in uses], retain_graph=True) for entry in flat]
    slopes = [torch.stack(column) for column in zip(*columns, strict=True)]
    target = targets_for(likelihood, point) if y is None else y

    def loss(v: Tensor) -> Tensor:
        return losses(likelihood, v.reshape(z.shape), target).sum()

    v = point.flatten().requires_grad_()
    if y is None:
        (e,) = torch.autograd.grad(loss(v), v, create_graph=True)
        F = torch.stack(
            [torch.autograd.grad(entry, v, retain_graph=True)[0] for entry in e]
        )  # the same for all targets
    else:
        (e,) = torch.autograd.grad(loss(v), v)
        F = torch.outer(e, e)
    a, g = blocks_of(model, uses, slopes, 1)
    return Seen({k: v[0] for k, v in a.items()}, {k: v[:, 0] for k, v in g.items()}, F)


def seen_together(model: nn.Module, args: tuple[Tensor, ...], likelihood: str, y: Tensor) -> list[Seen]:
    """The same from the gradient of the sum over the batch, whose examples depend on each other."""
    z, uses = perturbed(model, args)
    slopes = torch.autograd.grad(losses(likelihood, z, y).sum(), [zero for *_, zero in uses])
    a, g = blocks_of(model, uses, [s[None] for s in slopes], len(y))
    return [
        Seen({k: v[n] for k, v in a.items()}, {k: v[:, n] for k, v in g.items()}, torch.ones(1, 1))
        for n in range(len(y))
    ]


def blocks_of(model: nn.Module, uses: list[Any], slopes: list[Tensor], n: int) -> tuple[dict[str, Tensor], ...]:
    """a (n, R, groups, width) and g (D, n, R, groups, m) of each block, the positions of all its uses together."""
    a: dict[str, list[Tensor]] = {}
    g: dict[str, list[Tensor]] = {}
    tied = tied_weights(model)
    for (name, x, _), slope in zip(uses, slopes, strict=True):
        module = leaves(model)[name]
        if isinstance(module, SCALES):
            a.setdefault(name, []).append(torch.ones(n, 1, module.weight.numel(), 1))
            g.setdefault(name, []).append(scale_slopes(module, x, slope, n))
            continue
        rows = inputs_of(module, x)
        rows, outer = rows.reshape(n, -1, *rows.shape[-2:]), outputs_of(module, x, slope)
        outer = outer.reshape(len(slope), n, -1, *outer.shape[-2:])
        ones = torch.ones(*rows.shape[:-1], 1)
        has_bias = getattr(module, "bias", None) is not None and module.bias.requires_grad
        if has_bias and id(module.weight) in tied:
            a.setdefault(f"{name}.bias", []).append(ones)
            g.setdefault(f"{name}.bias", []).append(outer)
        elif has_bias:
            rows = torch.cat([rows, ones], -1)
        a.setdefault(name, []).append(rows)
        g.setdefault(name, []).append(outer)
    return {k: torch.cat(v, 1) for k, v in a.items()}, {k: torch.cat(v, 2) for k, v in g.items()}


def tied_weights(model: nn.Module) -> set[int]:
    weights = [id(getattr(m, "weight", m)) for m in leaves(model).values()]
    return {w for w in weights if weights.count(w) > 1}


def inputs_of(module: nn.Module, x: Tensor) -> Tensor:
    """(..., groups, n): what the module's outputs are linear in, the weights being given."""
    if isinstance(module, nn.Linear):
        return x[..., None, :]
    if isinstance(module, nn.Embedding):
        a = functional.one_hot(x, module.num_embeddings).to(torch.get_default_dtype())
        return (a if module.padding_idx is None else a * (x != module.padding_idx)[..., None])[..., None, :]
    return torch.stack(list(responses(module, x)), -1)


def responses(module: Any, x: Tensor) -> Iterator[Tensor]:
    """(N, *positions, groups) for each entry of the kernel: the outputs where that is 1 and everything else 0."""
    groups, transposed = module.groups, isinstance(module, TRANSPOSED)
    entries = torch.eye(module.in_channels // groups * prod(module.kernel_size))
    for unit in entries.reshape(len(entries), -1, *module.kernel_size):
        # In W = [..., kernel back to front] a transposed convolution is one.
        kernel = unit.flip(*range(1, unit.ndim)) if transposed else unit
        copies = kernel.repeat(groups, *[1] * len(module.kernel_size)) if transposed else kernel
        weight = copies.unsqueeze(1 if transposed else 0).expand_as(module.weight)
        parameters = {"weight": weight.contiguous()} | (
            {} if module.bias is None else {"bias": 0 * module.bias.detach()}
        )
        s = functional_call(module, parameters, (x,))
        yield s[:, :: module.out_channels // groups].movedim(1, -1)


def outputs_of(module: Any, x: Tensor, g: Tensor) -> Tensor:
    """(D, ..., groups, m); zero at the padding of an embedding, where a is."""
    if isinstance(module, CONVOLUTIONS):
        return g.movedim(2, -1).unflatten(-1, (module.groups, -1))
    if getattr(module, "padding_idx", None) is not None:
        g = g * (x != module.padding_idx)[..., None]
    return g[..., None, :]


def scale_slopes(module: Any, x: Tensor, g: Tensor, n: int) -> Tensor:
    """(D, n, 1, channels, 1 or 2): the Jacobians of the scale and the shift."""
    given = dict(module.named_parameters())
    unit = {"weight": torch.ones_like(given["weight"])}
    unit |= {"bias": torch.zeros_like(given["bias"])} if "bias" in given else {}
    x_hat = functional_call(deepcopy(module), unit, (x,)).detach()
    parts = [g * x_hat, g][: len(given)]
    if isinstance(module, CHANNELS_LAST):
        parts = [p.reshape(len(g), n, -1, module.weight.numel()).sum(2) for p in parts]
    else:
        parts = [p.reshape(len(g), n, -1, p.shape[2], prod(p.shape[3:])).sum((2, 4)) for p in parts]
    return torch.stack(parts, -1)[:, :, None]


def moments(examples: list[Seen], sharing: str | dict[str, str] = "expand") -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A and G (groups, ., .) of each block by the formulas of its setting."""
    found = {}
    for name in examples[0].a:
        setting = sharing if isinstance(sharing, str) else sharing.get(name, "expand")
        a, g = ([getattr(example, side)[name] for example in examples] for side in "ag")
        if setting == "reduce":
            a, g = [x.mean(0, keepdim=True) for x in a], [x.sum(1, keepdim=True) for x in g]
        rows = sum(len(x) for x in a)
        A = sum(torch.einsum("rgi,rgj->gij", x, x) for x in a) / rows
        G = sum(torch.einsum("drgi,de,ergj->gij", x, e.F, x) for x, e in zip(g, examples, strict=True)) / len(g)
        found[name] = (A.numpy(), G.numpy())
    return found


def gradient(model: nn.Module, name: str, like: Callable[[Tensor], Tensor] = lambda p: p.grad) -> np.ndarray:
    """W (groups, m, n) of the block of this name."""
    parts = dict(model.named_modules())
    parent, _, last = name.rpartition(".")
    if last in ("q_proj", "k_proj", "v_proj") and isinstance(parts[parent], nn.MultiheadAttention):
        E, i = parts[parent].embed_dim, ("q_proj", "k_proj", "v_proj").index(last)
        tensors = [like(p)[i * E : (i + 1) * E] for p in parts[parent].parameters(recurse=False)]
        return torch.cat([t.reshape(E, -1) for t in tensors], 1)[None].detach().numpy()
    if last == "bias" and name not in parts:
        return like(parts[parent].bias)[None, :, None].detach().numpy()
    module: Any = parts[name]
    weight, bias = like(module.weight).detach(), getattr(module, "bias", None)
    bias = None if bias is None or not bias.requires_grad else like(bias).detach()
    if isinstance(module, nn.Embedding):
        return weight.T[None].numpy()
    if isinstance(module, SCALES):
        return torch.stack([t.flatten() for t in (weight, bias) if t is not None], 1)[..., None].numpy()
    g = getattr(module, "groups", 1)
    if isinstance(module, TRANSPOSED):
        weight = weight.reshape(g, -1, *weight.shape[1:]).transpose(1, 2)
        weight = weight.flip(*range(3, weight.ndim))
    W = weight.reshape(g, -1 if g == 1 else module.out_channels // g, prod(weight.shape) // module_outputs(module))
    if bias is None or id(module.weight) in tied_weights(model):
        return W.numpy()
    return torch.cat([W, bias.reshape(g, -1, 1)], 2).numpy()


def module_outputs(module: Any) -> int:
    return module.out_features if isinstance(module, nn.Linear) else module.out_channels


def combined(pairs: list[tuple[np.ndarray, np.ndarray]], diagonal: bool) -> tuple[np.ndarray, np.ndarray]:
    """A and G of a shared weight: the partial traces of the dense Σ A_i ⊗ G_i, the first over the whole trace."""
    n, m = pairs[0][0].shape[-1], pairs[0][1].shape[-1]
    total = sum(np.kron(A[0], G[0]) for A, G in pairs).reshape(n, m, n, m)
    A, G = np.einsum("ikjk->ij", total) / np.einsum("ikik->", total), np.einsum("kikj->ij", total)
    return A[None], (np.diag(np.diag(G)) if diagonal else G)[None]


# -- dense inverses --


def factored(A: np.ndarray, G: np.ndarray, damping: float = DAMPING) -> np.ndarray:
    """(A + πγI)⁻¹ ⊗ (G + γ/π I)⁻¹."""
    (n, m), gamma = (len(A), len(G)), damping**0.5
    pi = np.sqrt(np.trace(A) / n) / np.sqrt(np.trace(G) / m)
    return np.kron(np.linalg.inv(A + pi * gamma * np.eye(n)), np.linalg.inv(G + gamma / pi * np.eye(m)))


def exact(A: np.ndarray, G: np.ndarray, damping: float = DAMPING) -> np.ndarray:
    return np.linalg.inv(np.kron(A, G) + damping * np.eye(len(A) * len(G)))


def vec(V: np.ndarray) -> np.ndarray:
    return V.T.reshape(-1)


def judge_step(operation: str, U: np.ndarray, inverses: list[np.ndarray], V: np.ndarray) -> None:
    """An inverse, applied: 10 n cond eps, in the scale of what it can make of V."""
    for came, K, v in zip(U, inverses, V, strict=True):
        error = np.linalg.norm(vec(came) - K @ vec(v))
        spectrum = np.linalg.eigvalsh(K)
        largest, condition = spectrum[-1], spectrum[-1] / spectrum[0]
        judge(TORCH, operation, error, 10 * len(K) * condition * EPS * largest * np.linalg.norm(v))


def judge_factors(operation: str, layers: dict[str, LayerFactors], examples: list[Seen], sharing: Any) -> None:
    """Sums of outer products: 10 eps in the scale of the same sums of absolute values, for each operation before."""
    expected, sizes = moments(examples, sharing), moments([absolute(example) for example in examples], sharing)
    assert layers.keys() == expected.keys()
    for name, layer in layers.items():
        for came, reference, size in zip(layer, expected[name], sizes[name], strict=True):
            M = came.to_dense() if isinstance(came, Diagonal) else came
            M = M if M.ndim == 3 else M[None]
            assert M.shape == reference.shape
            for one, full, scale in zip(M.numpy(), reference, size, strict=True):
                other = np.diag(np.diag(full)) if isinstance(came, Diagonal) else full
                judge(TORCH, operation, np.linalg.norm(one - other), 10 * OPERATIONS * EPS * np.trace(scale))


def absolute(example: Seen) -> Seen:
    a, g = ({name: x.abs() for name, x in side.items()} for side in (example.a, example.g))
    return Seen(a, g, example.F.abs())


OPERATIONS = 8  # of the network, one after the other, between what is compared


# -- a model, its batch, its preconditioner --


@dataclass
class Case:
    model: nn.Module
    args: tuple[Tensor, ...]
    likelihood: str = "categorical"
    targets: Tensor | None = None

    def __post_init__(self) -> None:
        self.twin = twin(self.model)
        with torch.no_grad():
            self.targets = targets_for(self.likelihood, deepcopy(self.twin)(*self.args))

    def loss(self, model: nn.Module, reduction: str = "mean") -> Tensor:
        return getattr(losses(self.likelihood, model(*self.args), self.targets), reduction)()

    def preconditioner(self, estimator: str = "exact", **options: Any) -> KFACPreconditioner:
        options = {"likelihood": self.likelihood, "damping": DAMPING, "factor_dtype": torch.float64} | options
        return KFACPreconditioner(self.model, estimator=estimator, **options)

    def run(self, estimator: str = "exact", **options: Any) -> KFACPreconditioner:
        """One step of a fresh preconditioner."""
        preconditioner = self.preconditioner(estimator, **options)
        self.step(preconditioner)
        return preconditioner

    def step(self, preconditioner: KFACPreconditioner, change: Callable[[], None] = lambda: None) -> None:
        self.model.zero_grad()
        z = self.model(*self.args)
        if preconditioner.estimator != "empirical":
            preconditioner.update(z)
        getattr(losses(self.likelihood, z, self.targets), preconditioner.reduction)().backward()
        change()
        preconditioner.step()

    def seen(self, estimator: str = "exact") -> list[Seen]:
        return seen(self.twin, self.args, self.likelihood, self.targets if estimator == "empirical" else None)

    def gradients(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """∇W of these blocks, by the twin."""
        self.twin.zero_grad()
        self.loss(self.twin).backward()
        return {name: gradient(self.twin, name) for name in names}

    def judge(self, operation: str, inverses: dict[str, list[np.ndarray]], model: nn.Module | None = None) -> None:
        """That p.grad is these inverses, one a group, times the gradient."""
        for name, V in self.gradients(inverses).items():
            judge_step(operation, gradient(model or self.model, name), inverses[name], V)


def case(row: str, likelihood: str = "categorical") -> Case:
    model, *args = ROWS[row]()
    return Case(model, tuple(args), likelihood)


def effective(model: nn.Module, found: dict[str, Any]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The factors of each weight: those of its block, or of all that share it, by the name of the first linear one."""
    names: dict[int, list[str]] = {}
    for name in found:
        module = dict(model.named_modules()).get(name)
        weight = model.get_submodule(name.rpartition(".")[0]).bias if module is None else module.weight
        names.setdefault(id(weight), []).append(name)
    result = {}
    for group in names.values():
        group.sort(key=lambda name: isinstance(dict(model.named_modules()).get(name), nn.Embedding))
        pairs = [found[name] for name in group]
        turned = len(group) > 1 and isinstance(dict(model.named_modules()).get(group[-1]), nn.Embedding)
        if turned:
            pairs[-1] = (pairs[-1][1], np.diag(np.diag(pairs[-1][0][0]))[None])
        embedding = isinstance(dict(model.named_modules()).get(group[0]), nn.Embedding)
        if embedding:
            pairs = [(np.diag(np.diag(A[0]))[None], G) for A, G in pairs]
        result[group[0]] = combined(pairs, turned) if len(group) > 1 else pairs[0]
    return result


def by_group(inverse: Callable[..., np.ndarray], found: dict[str, Any]) -> dict[str, list[np.ndarray]]:
    return {name: [inverse(*pair) for pair in zip(A, G, strict=True)] for name, (A, G) in found.items()}


# -- 1. the layer table --


@quiet
@every_row
@both_sharings
def test_layer(row, sharing):
    """A and G of the exact Fisher matrix, and p.grad after a step."""
    one = case(row)
    layers = one.run(weight_sharing=sharing).layers
    examples = one.seen()
    judge_factors(f"factors, exact, {sharing}", layers, examples, sharing)
    for name, layer in layers.items():
        embedding = isinstance(dict(one.model.named_modules()).get(name), nn.Embedding)
        assert [type(M) for M in layer] == [Diagonal if embedding else Tensor, Tensor]
    one.judge(f"step, {sharing}", by_group(factored, effective(one.twin, moments(examples, sharing))))


@quiet
@every_row
def test_layer_from_the_gradients_of_the_loss(row):
    one = case(row)
    judge_factors("factors, empirical", one.run("empirical").layers, one.seen("empirical"), "expand")


@pytest.mark.parametrize("row", TRAINED)
@both_sharings
def test_batch_normalisation_of_the_batch(row, sharing):
    """The examples depend on each other: what one of them gives is its part of the gradient of the sum."""
    model, *args = TRAINED[row]()
    one = Case(model, tuple(args))
    layers = one.run("empirical", weight_sharing=sharing).layers
    examples = seen_together(one.twin, one.args, one.likelihood, one.targets)
    judge_factors("factors, batch statistics", layers, examples, sharing)
    one.judge("step, batch statistics", by_group(factored, effective(one.twin, moments(examples, sharing))))


def test_the_setting_of_single_modules():
    one = case("Linear, 3-D, no bias")
    sharing = {"0": "reduce"}
    judge_factors("factors, mixed", one.run(weight_sharing=sharing).layers, one.seen(), sharing)
    assert not np.allclose(moments(one.seen(), sharing)["0"][1], moments(one.seen())["0"][1])


def test_a_perturbation_is_noticed():
    one = case("Conv2d, groups")
    layers = one.run().layers
    judge_factors("factors", layers, one.seen(), "expand")
    changed = {name: LayerFactors(A, (1 + 1e-12) * G) for name, (A, G) in layers.items()}
    with pytest.raises(AssertionError):
        judge_factors("factors", changed, one.seen(), "expand")


def judge_outputs(one: Tensor, other: Tensor) -> None:
    one, other = one.detach(), other.detach()
    judge(TORCH, "attention", float((one - other).abs().max()), 10 * OPERATIONS * EPS * float(other.abs().max()))


@pytest.mark.parametrize("row", [row for row in ROWS if row.startswith("Multihead")])
def test_attention_gives_what_it_gave(row):
    one = case(row)
    plain, by_hand = deepcopy(one.model)(*one.args), one.twin(*one.args)
    KFACPreconditioner(one.model, estimator="empirical")
    for expected in (plain, by_hand):
        judge_outputs(one.model(*one.args), expected)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize(
    "mask", ["none", "bool", "float", "bool 3-D", "bool and padding", "unbatched", "unbatched, padding"]
)
def test_attention_gives_all_that_it_gave(batch_first, need_weights, average, mask):
    """Its weights too, and for a query without a batch."""
    module = nn.MultiheadAttention(4, 2, batch_first=batch_first)
    plain, (L, S) = deepcopy(module), (3, 5)
    KFACPreconditioner(module, estimator="empirical")
    batch = () if "unbatched" in mask else (2,)
    q, k, v = (torch.randn(*batch, length, 4) for length in (L, S, S))
    if batch and not batch_first:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    keep = torch.ones(L, S).triu(3).bool()
    masks = {"none": None, "bool": keep, "float": torch.randn(L, S), "bool 3-D": keep.repeat(4, 1, 1)}
    options = {"attn_mask": masks.get(mask, keep if "bool" in mask else None)}
    if "padding" in mask:
        options["key_padding_mask"] = (torch.arange(S) > 3).expand(*batch, S)
    options |= {"need_weights": need_weights, "average_attn_weights": average}
    for a, b in zip(module(q, k, v, **options), plain(q, k, v, **options), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.shape == b.shape
            judge_outputs(a, b)


# -- 2. where K-FAC is exact --


def dense_ggn(model: nn.Module, args: tuple[Tensor, ...], likelihood: str) -> dict[str, np.ndarray]:
    """The diagonal blocks of (1/N) Σ Jᵀ H J (groups, n m, n m) by torch.func, one an example at a time."""
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    names = {p: name for name, p in model.named_parameters()}
    found: dict[str, Any] = {}
    examples = seen(model, args, likelihood)
    for n in range(len(args[0])):
        one = tuple(x[n : n + 1] for x in args)
        z = model(*one).detach()
        y = targets_for(likelihood, z)
        H = torch.func.hessian(lambda v, z=z, y=y: losses(likelihood, v.reshape(z.shape), y).sum())(z.flatten()).numpy()
        jacobian = torch.func.jacrev(lambda p, one=one: functional_call(model, p, one).flatten())(parameters)
        for block in examples[0].a:
            W = [gradient(model, block, lambda p, d=d, J=jacobian: J[names[p]][d]) for d in range(len(H))]
            J = np.array([[vec(part) for part in matrix] for matrix in W])  # (D, groups, n m)
            found[block] = found.get(block, 0.0) + np.einsum("dgi,de,egj->gij", J, H, J) / len(args[0])
    return found


def judge_blocks(operation: str, layers: dict[str, LayerFactors], expected: dict[str, np.ndarray], names=None) -> None:
    for name in names or layers:
        layer = LayerFactors(*(M.to_dense() if isinstance(M, Diagonal) else M for M in layers[name]))
        sides = [M.numpy() if M.ndim == 3 else M.numpy()[None] for M in layer]
        for A, G, F in zip(*sides, expected[name], strict=True):
            error = np.linalg.norm(np.kron(A, G) - F)
            judge(TORCH, operation, error, 10 * OPERATIONS * len(F) * EPS * np.trace(A) * np.trace(G))


def linear_network(*sizes: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(n, m) for n, m in pairwise(sizes)))


class Pooled(nn.Sequential):
    """The mean over the positions at the end."""

    def __init__(self, *layers, dims=1):
        super().__init__(*layers)
        self.dims = dims

    def forward(self, x):
        return super().forward(x).mean(self.dims)


EXACT = {
    "deep linear network": (lambda: linear_network(3, 4, 2, 3), (5, 3), "expand"),
    "independent positions": (lambda: linear_network(3, 4, 2), (5, 4, 3), "expand"),
    "mean over positions": (lambda: Pooled(*linear_network(3, 4, 2)), (5, 4, 3), "reduce"),
    "mean over pixels": (
        lambda: Pooled(nn.Conv2d(2, 3, 2), nn.Conv2d(3, 2, 1, bias=False), dims=(2, 3)),
        (4, 2, 4, 3),
        "reduce",
    ),
    "mean over pixels, groups": (
        lambda: Pooled(nn.Conv2d(2, 4, 2, groups=2), nn.Conv2d(4, 2, 1), dims=(2, 3)),
        (4, 2, 4, 3),
        "reduce",
    ),
    "mean over pixels, transposed": (
        lambda: Pooled(nn.ConvTranspose2d(2, 3, 2, stride=2), nn.Conv2d(3, 2, 1), dims=(2, 3)),
        (4, 2, 2, 3),
        "reduce",
    ),
}


@pytest.mark.parametrize("network", EXACT)
def test_linear_networks_with_a_square_loss(network):
    build, shape, sharing = EXACT[network]
    one = Case(build(), (torch.randn(shape),), "gaussian")
    layers = one.run(weight_sharing=sharing).layers
    judge_blocks("exact: linear network", layers, dense_ggn(one.twin, one.args, "gaussian"))


@every_likelihood
@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 3)),
        lambda: nn.Sequential(nn.Linear(4, 4, bias=False), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)),
        lambda: nn.Sequential(nn.Unflatten(1, (4, 1, 1)), nn.ConvTranspose2d(4, 2, 1), nn.Flatten(), nn.Linear(2, 3)),
    ],
)
def test_one_example(build, likelihood):
    one = Case(build(), (torch.randn(1, 4),), likelihood)
    judge_blocks("exact: one example", one.run().layers, dense_ggn(one.twin, one.args, likelihood))


def test_one_word():
    one = Case(Bag(), (words(),), "categorical")
    one.args = (one.args[0][:1],)
    one.targets = one.targets[:1]
    judge_blocks("exact: one example", one.run().layers, dense_ggn(one.twin, one.args, "categorical"))


def test_the_last_layer_of_any_network_with_a_square_loss():
    one = case("Linear", "gaussian")
    judge_blocks("exact: last layer", one.run().layers, dense_ggn(one.twin, one.args, "gaussian"), ["2"])


@every_likelihood
@pytest.mark.parametrize("row", [row for row in ROWS if "Norm" in row])
def test_normalisations_have_the_exact_blocks_of_their_channels(row, likelihood):
    one = case(row, likelihood)
    layers = one.run(weight_sharing="expand").layers
    judge_blocks("exact: channels", layers, dense_ggn(one.twin, one.args, likelihood), ["1"])


@every_likelihood
@both_sharings
def test_the_exact_factors_of_each_likelihood(likelihood, sharing):
    """Of outputs (N, classes) and (N, R, classes)."""
    for row in ("Linear, 3-D", "Conv2d, stride"):
        one = case(row, likelihood)
        judge_factors("factors, likelihoods", one.run(weight_sharing=sharing).layers, one.seen(), sharing)


@every_likelihood
@both_sharings
def test_sampled_factors_have_the_exact_ones_as_their_mean(likelihood, sharing):
    """4000 samples an example: 40 means of 25 copies of it, each with 4 samples."""
    model, x = ROWS["Linear, 3-D"]()
    one, copies = Case(model, (x,), likelihood), Case(model, (x.repeat(25, 1, 1),), likelihood)
    expected = moments(one.seen(), sharing)
    drawn: dict[str, list[np.ndarray]] = {}
    for k in range(40):
        generator = torch.Generator().manual_seed(k)
        sampled = copies.run("sampled", samples=4, generator=generator, weight_sharing=sharing)
        sampled.remove()
        for name, (A, G) in sampled.layers.items():
            drawn.setdefault(name, []).append(G.numpy())
            bound = 10 * OPERATIONS * EPS * np.trace(expected[name][0][0])
            judge(TORCH, "factors, sampled", np.linalg.norm(A.numpy() - expected[name][0][0]), bound)
    for name, Gs in drawn.items():
        error = np.std(Gs, axis=0, ddof=1) / len(Gs) ** 0.5
        assert (np.abs(np.mean(Gs, axis=0) - expected[name][1][0]) <= 5 * error).all()
        assert error.max() < 0.1 * np.abs(expected[name][1]).max()


class Custom:
    """A likelihood with what `Likelihood` asks for, and nothing more."""

    def __init__(self, likelihood):
        self.likelihood = likelihood

    def loss(self, outputs, targets):
        return losses(self.likelihood, outputs, targets).mean()

    def sample(self, outputs, generator):
        raise AssertionError("the exact estimator draws no samples")

    def fisher_product(self, outputs, tangents):
        z = outputs.detach()
        y = targets_for(self.likelihood, z)
        f = torch.func.grad(lambda v: losses(self.likelihood, v, y).sum())
        return torch.func.jvp(f, (z,), (tangents,))[1]


@every_likelihood
@both_sharings
@pytest.mark.parametrize("row", ["Linear, 3-D", "Conv2d, stride", "LayerNorm"])
def test_a_likelihood_of_three_methods(likelihood, sharing, row):
    one = case(row, likelihood)
    preconditioner = one.run(likelihood=Custom(likelihood), weight_sharing=sharing)
    judge_factors("factors, custom likelihood", preconditioner.layers, one.seen(), sharing)


class Correlated(Custom):
    """½ (y - z)ᵀ P (y - z), which no unit or position has to itself."""

    def __init__(self, P):
        self.P = P

    def fisher_product(self, outputs, tangents):
        return (tangents.flatten(1) @ self.P).reshape(outputs.shape)


@both_sharings
def test_a_likelihood_whose_positions_are_correlated(sharing):
    one = case("Linear, 3-D", "gaussian")
    root = torch.randn(9, 5)
    examples = [example._replace(F=root @ root.T) for example in one.seen()]
    preconditioner = one.run(likelihood=Correlated(root @ root.T), weight_sharing=sharing)
    judge_factors("factors, custom likelihood", preconditioner.layers, examples, sharing)


# -- 3. the reduction of the loss --


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
@pytest.mark.parametrize("structure", ["block-diagonal", "eigen", "block-tridiagonal"])
def test_the_reduction_does_not_matter(estimator, structure):
    runs = []
    for reduction in ("mean", "sum"):
        torch.manual_seed(0)
        one = case("Linear")
        layers = one.run(estimator, reduction=reduction, structure=structure).layers
        judge_factors("reduction", layers, one.seen(estimator), "expand")
        runs.append([gradient(one.model, name) for name in layers])
    for mean, total in zip(*runs, strict=True):  # the same inverse, but for rounding, on N times the gradient
        judge(TORCH, "reduction, step", np.linalg.norm(N * mean - total), 1e5 * EPS * np.linalg.norm(total))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("examples", [1, 7, 50])
def test_the_gradients_are_those_of_single_examples(reduction, examples):
    """G of softmax regression written down: (1/N) Σ (p - y)(p - y)ᵀ. A factor N, or its square, would show."""
    x = torch.randn(examples, 4)
    one = Case(nn.Linear(4, 3), (x,))
    layer = one.run("empirical", reduction=reduction).layers[""]
    g = torch.softmax(one.model(x), 1).detach() - functional.one_hot(one.targets, 3)
    a = torch.cat([x, torch.ones(examples, 1)], 1)
    for came, rows in zip(layer, (a, g), strict=True):
        expected = sum(torch.outer(row, row) for row in rows) / examples
        judge(TORCH, "reduction", float((came - expected).norm()), 10 * OPERATIONS * EPS * float(expected.trace()))


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@both_sharings
def test_parts_of_a_batch_are_one_batch(estimator, reduction, sharing):
    """Gradient accumulation, in parts of 1 and 2 examples."""
    one = case("Conv2d, stride")
    preconditioner = one.preconditioner(estimator, reduction=reduction, weight_sharing=sharing)
    for part in (slice(0, 1), slice(1, 3)):
        z = one.model(one.args[0][part])
        if estimator != "empirical":
            preconditioner.update(z)
        total = losses(one.likelihood, z, one.targets[part]).sum()
        (total / N if reduction == "mean" else total).backward()
    preconditioner.step()
    judge_factors("accumulation", preconditioner.layers, one.seen(estimator), sharing)


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_two_passes_before_their_updates(estimator):
    one = case("Linear")
    preconditioner = one.preconditioner(estimator)
    parts = [slice(0, 1), slice(1, 3)]
    passes = [one.model(one.args[0][part]) for part in parts]
    for z, part in zip(passes, parts, strict=True):
        if estimator != "empirical":
            preconditioner.update(z)
        (losses(one.likelihood, z, one.targets[part]).sum() / N).backward()
    preconditioner.step()
    judge_factors("accumulation", preconditioner.layers, one.seen(estimator), "expand")


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_inputs_in_a_dictionary(estimator):
    """The examples are counted once, though the frames that one layer sees are three times as many."""

    class Packed(Frames):
        def forward(self, batch):
            return super().forward(batch["x"])

    one = case("Linear, frames")
    expected = one.seen(estimator)
    model = Packed(one.model.layer, 6)
    model.head = one.model.head
    one.model, one.args = model, ({"x": one.args[0]},)
    judge_factors("factors, dictionary", one.run(estimator).layers, expected, "expand")


# -- 4. other structures --


def curvature_of(examples: list[Seen], sharing: str) -> dict[str, np.ndarray]:
    """(1/N) Σ of the products of each example's gradients ∇W: Σ g aᵀ over its positions, or ĝ āᵀ if reduced."""
    found = {}
    for name in examples[0].a:
        total = 0.0
        for example in examples:
            a, g = example.a[name], example.g[name]
            if sharing == "reduce":
                a, g = a.mean(0, keepdim=True), g.sum(1, keepdim=True)
            J = torch.einsum("rgi,drgj->dgij", a, g).flatten(2)  # vec(g aᵀ)
            total = total + torch.einsum("dgi,de,egj->gij", J, example.F, J).numpy() / len(examples)
        found[name] = total
    return found


class Eigen(NamedTuple):
    """Q = Q_A ⊗ Q_G, the products of eigenvalues, and how much Q magnifies rounding: 1 / relative gap of both sides."""

    Q: np.ndarray
    products: np.ndarray
    magnified: float

    @staticmethod
    def of(A: np.ndarray, G: np.ndarray) -> "Eigen":
        (a, Q_A), (g, Q_G) = np.linalg.eigh(A), np.linalg.eigh(G)
        gaps = [np.diff(w, prepend=0.0)[w > 1e-12 * w.max()].min() / w.max() for w in (a, g)]
        return Eigen(np.kron(Q_A, Q_G), np.kron(a, g), sum(1 / gap for gap in gaps))

    def squares(self, F: np.ndarray) -> np.ndarray:
        return np.einsum("ik,ij,jk->k", self.Q, F, self.Q)

    def judge(self, operation: str, U: np.ndarray, S: np.ndarray, V: np.ndarray) -> None:
        """U is Q diag(S + damping)⁻¹ Qᵀ V, to rounding that Q magnifies."""
        expected = self.Q @ ((self.Q.T @ vec(V)) / (S + DAMPING))
        error = np.linalg.norm(vec(U) - expected)
        condition = 1 + S.max() / DAMPING
        unit = OPERATIONS * EPS * self.magnified * condition * np.linalg.norm(vec(V)) / DAMPING
        judge(TORCH, operation, error, 10 * unit)


EIGEN = [
    "Linear",
    "Linear, 3-D",
    "Linear, frames",
    "Conv2d, stride",
    "Conv2d, groups",
    "Conv2d, frames",
    "ConvTranspose2d",
    "used three times",
    "used on two lengths",
    "MultiheadAttention, cross",
]


@pytest.mark.parametrize("row", EIGEN)
@both_sharings
@pytest.mark.parametrize(("estimator", "decay"), [("exact", 0.0), ("empirical", 0.95)])
def test_eigen(row, sharing, decay, estimator):
    """S = decay * the products of eigenvalues + (1 - decay) * the mean of the squared gradients of the examples."""
    one = case(row)
    one.run(estimator, structure="eigen", decay=decay, weight_sharing=sharing)
    examples = one.seen(estimator)
    F, V = curvature_of(examples, sharing), one.gradients(examples[0].a)
    for name, (A, G) in moments(examples, sharing).items():
        if sharing == "reduce" and name.endswith("k_proj"):
            continue  # the sum over the keys is zero: nothing but rounding
        for group, U in enumerate(gradient(one.model, name)):
            basis = Eigen.of(A[group], G[group])
            S = decay * basis.products + (1 - decay) * basis.squares(F[name][group])
            basis.judge(f"eigen, {sharing}", U, S, V[name][group])


@pytest.mark.parametrize("row", ["Linear, 3-D", "Conv2d, groups"])
def test_the_squares_of_eigen_are_the_diagonal_of_the_dense_fisher(row):
    one = case(row)
    one.run(structure="eigen", decay=0.0)
    F, found = dense_ggn(one.twin, one.args, one.likelihood), moments(one.seen())
    for name, V in one.gradients(found).items():
        for A, G, block, U, v in zip(*found[name], F[name], gradient(one.model, name), V, strict=True):
            basis = Eigen.of(A, G)
            basis.judge("eigen, dense Fisher", U, basis.squares(block), v)


@pytest.mark.parametrize("period", [1, 2])
def test_the_squares_of_eigen_follow_the_basis(period):
    """In a new basis S is the diagonal there of what it was; without a refresh the basis stays."""
    one = Case(nn.Linear(4, 3), (torch.randn(8, 4),), "bernoulli")
    preconditioner = one.run(structure="eigen", decay=0.5, inverse_period=period)
    A, G = (M[0] for M in moments(one.seen())[""])
    basis = Eigen.of(A, G)
    S = 0.5 * basis.products + 0.5 * basis.squares(curvature_of(one.seen(), "expand")[""][0])
    one.args = (torch.randn(8, 4),)
    one.step(preconditioner)
    if period == 1:
        dense = basis.Q @ np.diag(S) @ basis.Q.T
        basis = Eigen.of(*(0.5 * old + 0.5 * new[0] for old, new in zip((A, G), moments(one.seen())[""], strict=True)))
        S = basis.squares(dense)
    S = 0.5 * S + 0.5 * basis.squares(curvature_of(one.seen(), "expand")[""][0])
    basis.judge("eigen, two steps", gradient(one.model, "")[0], S, one.gradients([""])[""][0])


@pytest.mark.parametrize("options", [{"exact_damping": True}, {"structure": "eigen"}])
@pytest.mark.parametrize(
    "row", ["Linear", "Conv2d, groups", "LayerNorm", "Embedding", "two Linear tied", "Embedding tied to the head"]
)
def test_exact_damping(row, options):
    """(A ⊗ G + damping I)⁻¹; factored where a side is a diagonal. The eigen structure has it without squares."""
    one = case(row)
    one.run(**options)
    found = effective(one.twin, moments(one.seen()))
    linear = {name for name, m in one.model.named_modules() if isinstance(m, (nn.Linear, *CONVOLUTIONS))}
    inverses = by_group(exact, found)
    for name in found:
        if "structure" in options and name in linear and "tied" not in row:
            del inverses[name]
        if name == "embedding" or (name == "head" and "Embedding tied" in row):
            inverses |= by_group(factored, {name: found[name]})
    if "structure" in options and "tied" in row:
        inverses = {name: K for name, K in inverses.items() if name in ("one", "head") and name in shared(one.model)}
    one.judge("step, exact damping", inverses)


def shared(model: nn.Module) -> set[str]:
    return {name for name, m in leaves(model).items() if id(getattr(m, "weight", m)) in tied_weights(model)}


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_block_tridiagonal(estimator):
    """Against the core's inverse of factors and links put together by hand."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=False), nn.Tanh(), nn.Linear(2, 3))
    one = Case(model, (torch.randn(6, 3),))
    preconditioner = one.run(estimator, structure="block-tridiagonal")
    examples = one.seen(estimator)
    found, names = moments(examples), list(preconditioner.layers)
    links = []
    for i, j in pairwise(names):
        A = sum(torch.outer(e.a[i][0, 0], e.a[j][0, 0]) for e in examples) / len(examples)
        G = sum(e.g[i][:, 0, 0].T @ e.F @ e.g[j][:, 0, 0] for e in examples) / len(examples)
        links.append(Link(A, G))
    layers = [LayerFactors(*(torch.from_numpy(M[0]) for M in found[name])) for name in names]
    inverse = block_tridiagonal_inverse(Factors(tuple(layers), tuple(links)), DAMPING**0.5)
    V = one.gradients(names)
    U, v = (
        np.concatenate([vec(side[name][0]) for name in names]) for side in ({n: gradient(model, n) for n in names}, V)
    )
    K = inverse.to_dense().numpy()
    judge_step("step, block-tridiagonal", U[None, :, None], [K], v[None, :, None])
    assert np.abs(K[:16, 16:24]).max() > 0.01 * np.abs(K).max()  # the links matter


@pytest.mark.parametrize("rank", [3, 50])
def test_low_rank(rank):
    """A of rank 3, from so many examples; G has no more than 3 units, which are kept whole."""
    model = nn.Sequential(nn.Linear(12, 3, bias=False), nn.Tanh(), nn.Linear(3, 2, bias=False))
    one = Case(model, (torch.randn(3, 12),), "gaussian")
    one.run(rank=rank)
    one.judge("step, low rank", by_group(factored, moments(one.seen())))


def test_low_rank_truncates():
    """rank_k(A) and rank_k(G - diag G) + diag G, by eigenvectors, of a spectrum with a gap there."""
    x = torch.randn(40, 8) * torch.tensor([9.0, 7.0] + [1e-2] * 6)
    one = Case(nn.Linear(8, 2, bias=False), (x,), "gaussian")
    one.run(rank=2)
    A, G = (M[0] for M in moments(one.seen())[""])
    w, Q = np.linalg.eigh(A)
    truncated = (Q[:, -2:] * w[-2:]) @ Q[:, -2:].T
    one.judge("step, low rank", {"": [factored(truncated, G)]})
    V = one.gradients([""])[""][0]
    assert np.linalg.norm((factored(truncated, G) - factored(A, G)) @ vec(V)) > 1e-9 * np.linalg.norm(V)


# -- the outer form --


class Counter:
    def __init__(self, monkeypatch):
        self.calls = 0
        original = Kronecker.apply_outer

        def counted(K, *args, **kwargs):
            self.calls += 1
            return original(K, *args, **kwargs)

        monkeypatch.setattr(Kronecker, "apply_outer", counted)


def wide(examples: int = 4) -> Case:
    model = nn.Sequential(nn.Linear(15, 12), nn.Tanh(), nn.Linear(12, 13, bias=False))
    return Case(model, (torch.randn(examples, 15),))


def both(model: nn.Module, change: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    def changed():
        for p in model.parameters():
            p.grad.copy_(change(p.grad))

    return changed


CHANGES: dict[str, Callable[[nn.Module], Callable[[], None]]] = {
    "clipped": lambda model: lambda: nn.utils.clip_grad_norm_(model.parameters(), 1e-3),
    "scaled": lambda model: both(model, lambda g: 2 * g),
    "scaled a little": lambda model: both(model, lambda g: (1 + 1e-9) * g),
    "replaced": lambda model: both(model, torch.randn_like),
}


def assert_is_dense(one: Case, model: nn.Module, V: dict[str, np.ndarray]) -> None:
    for name, (A, G) in moments(one.seen()).items():
        judge_step("step, outer form", gradient(model, name), [factored(A[0], G[0])], V[name])


@pytest.mark.parametrize("estimator", ["exact", "empirical", "sampled"])
def test_the_outer_form_is_taken(estimator, monkeypatch):
    one, counter = wide(), Counter(monkeypatch)
    preconditioner = one.run(estimator)
    assert counter.calls == 2
    if estimator != "sampled":
        expected = by_group(factored, moments(one.seen(estimator)))
        one.judge("step, outer form", expected)
    assert len(preconditioner.layers) == 2


def test_the_outer_form_is_taken_whatever_the_numbers(monkeypatch):
    """What is let pass covers the rounding of the check itself, at sizes where the outer form pays most."""
    counter = Counter(monkeypatch)
    for seed in range(20):
        torch.manual_seed(seed)
        one = Case(nn.Linear(60, 50), (torch.randn(2, 60),))
        one.run("empirical")
        assert counter.calls == seed + 1


@pytest.mark.parametrize("change", CHANGES)
def test_gradients_that_were_changed(change, monkeypatch):
    one, counter = wide(), Counter(monkeypatch)
    preconditioner = one.preconditioner()
    V: dict[str, np.ndarray] = {}

    def changed():
        CHANGES[change](one.model)()
        V.update({name: gradient(one.model, name).copy() for name in ("0", "2")})

    one.step(preconditioner, changed)
    assert counter.calls == 0
    assert_is_dense(one, one.model, V)


@pytest.mark.parametrize("strength", [1e-1, 1e-8])
@pytest.mark.parametrize("of", ["all", "0", "2"])
def test_a_penalty_in_the_loss(strength, of, monkeypatch):
    one, counter = wide(), Counter(monkeypatch)
    preconditioner = one.preconditioner()
    z = one.model(*one.args)
    preconditioner.update(z)
    weights = one.model.parameters() if of == "all" else one.model[int(of)].parameters()
    (losses(one.likelihood, z, one.targets).mean() + strength * sum(p.square().sum() for p in weights)).backward()
    V = {name: gradient(one.model, name).copy() for name in ("0", "2")}
    preconditioner.step()
    assert counter.calls <= (0 if of == "all" else 1)
    assert_is_dense(one, one.model, V)


def test_gradients_of_two_steps(monkeypatch):
    """Without zero_grad the gradient holds the step before."""
    one, counter = wide(), Counter(monkeypatch)
    preconditioner = one.preconditioner()
    for p in one.model.parameters():
        p.grad = torch.randn_like(p)
    z = one.model(*one.args)
    preconditioner.update(z)
    losses(one.likelihood, z, one.targets).mean().backward()
    V = {name: gradient(one.model, name).copy() for name in ("0", "2")}
    preconditioner.step()
    assert counter.calls == 0
    assert_is_dense(one, one.model, V)


def test_the_outer_form_of_parts_of_a_batch(monkeypatch):
    one, counter = wide(6), Counter(monkeypatch)
    preconditioner = one.preconditioner()
    for part in (slice(0, 2), slice(2, 6)):
        z = one.model(one.args[0][part])
        preconditioner.update(z)
        (losses(one.likelihood, z, one.targets[part]).sum() / 6).backward()
    preconditioner.step()
    assert counter.calls == 2
    one.judge("step, outer form", by_group(factored, moments(one.seen())))


@pytest.mark.parametrize(
    "options", [{"exact_damping": True}, {"structure": "eigen"}, {"structure": "block-tridiagonal"}]
)
def test_other_structures_do_not_take_the_outer_form(options, monkeypatch):
    counter = Counter(monkeypatch)
    wide().run(**options)
    assert counter.calls == 0


# -- a side that is too long --


@pytest.mark.parametrize("options", [{}, {"exact_damping": True}, {"structure": "eigen"}, {"rank": 2}])
def test_a_long_side_keeps_its_diagonal(options):
    n = 8200
    one = Case(nn.Linear(n, 2, bias=False), (torch.randn(N, n),))
    A = one.run(**options).layers[""].A
    assert isinstance(A, Diagonal)
    a = (one.args[0] ** 2).sum(0).numpy() / N
    judge(TORCH, "factors, diagonal", np.linalg.norm(A.d.numpy() - a), 10 * OPERATIONS * EPS * np.linalg.norm(a))
    G = sum(example.F for example in one.seen()).numpy() / N  # g is the gradient at the outputs
    pi = np.sqrt(a.mean() / (np.trace(G) / 2))
    damped = G + DAMPING**0.5 / pi * np.eye(2)
    V = one.gradients([""])[""][0]
    expected = np.linalg.inv(damped) @ V / (a + pi * DAMPING**0.5)
    error, condition = np.linalg.norm(gradient(one.model, "")[0] - expected), np.linalg.cond(damped)
    judge(TORCH, "step, diagonal", error, 10 * 2 * condition * EPS * np.linalg.norm(expected))


# -- 5. the clip --


@pytest.mark.parametrize(
    "row", ["Conv2d, groups", "LayerNorm, 3-D", "MultiheadAttention", "Embedding tied to the head"]
)
@pytest.mark.parametrize(("part", "lr"), [(1e-4, 1.0), (0.25, 0.1), (4.0, 0.1)])
def test_kl_clip(row, lr, part):
    """min(1, √(κ / Σ lr² |<V, U>|)) over all layers; κ is `part` of the sum."""
    one = case(row)
    two = deepcopy(one)
    before: dict[str, np.ndarray] = {}
    preconditioner = one.preconditioner()
    names = list(effective(one.twin, moments(one.seen())))
    one.step(preconditioner, lambda: before.update({name: gradient(one.model, name).copy() for name in names}))
    U = {name: gradient(one.model, name) for name in names}
    total = sum(abs(float((before[name] * U[name]).sum())) for name in names)
    two.run(kl_clip=part * lr**2 * total, kl_lr=lr)
    for name in names:
        error = np.linalg.norm(gradient(two.model, name) - min(1, part**0.5) * U[name])
        judge(TORCH, "kl_clip", error, 10 * OPERATIONS * EPS * np.linalg.norm(U[name]))


# -- 6. one step --


@pytest.mark.parametrize("options", [{}, {"exact_damping": True}, {"structure": "eigen", "decay": 0.0}])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_one_step_solves_least_squares(options, reduction):
    """The curvature of the loss is A ⊗ I. The rest of the error is that of the normal equations, 10 cond eps."""
    x, y = torch.randn(20, 4), torch.randn(20, 3)
    model = nn.Linear(4, 3)
    sgd = torch.optim.SGD(model.parameters(), lr=1.0 if reduction == "mean" else 1 / 20)
    preconditioner = KFACPreconditioner(
        model,
        likelihood="gaussian",
        estimator="exact",
        reduction=reduction,
        damping=1e-30,
        factor_dtype=torch.float64,
        **options,
    )
    z = model(x)
    preconditioner.update(z)
    (((z - y) ** 2).sum() / (40 if reduction == "mean" else 2)).backward()
    preconditioner.step()
    sgd.step()
    a = np.hstack([x.numpy(), np.ones((20, 1))])
    solution = np.linalg.lstsq(a, y.numpy(), rcond=None)[0].T
    W = np.hstack([model.weight.detach().numpy(), model.bias.detach().numpy()[:, None]])
    bound = 10 * 5 * np.linalg.cond(a) ** 2 * EPS * max(np.linalg.norm(solution), 1.0)
    judge(TORCH, "least squares", np.linalg.norm(W - solution), bound)
