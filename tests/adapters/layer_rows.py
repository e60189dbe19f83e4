"""Every kind of layer in a small model with its inputs: the rows of the tests against dense matrices."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

N = 3


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
