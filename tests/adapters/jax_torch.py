"""The same networks as a module of torch and as a function of JAX."""

import jax.numpy as jnp
import torch
from jax import lax
from torch import nn


def as_params(model):
    return {name: jnp.array(p.detach().numpy()) for name, p in model.named_parameters()}


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 0))
        self.second = nn.Conv2d(4, 6, 2, groups=2, dilation=(1, 2))
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))).mean((2, 3)))


def images(p, x):
    dims = ("NCHW", "OIHW", "NCHW")
    x = lax.conv_general_dilated(x, p["first.weight"], (2, 1), ((1, 1), (0, 0)), dimension_numbers=dims)
    x = jnp.tanh(x + p["first.bias"][:, None, None])
    options = {"rhs_dilation": (1, 2), "feature_group_count": 2, "dimension_numbers": dims}
    x = lax.conv_general_dilated(x, p["second.weight"], (1, 1), "VALID", **options)
    return jnp.tanh(x + p["second.bias"][:, None, None]).mean((2, 3)) @ p["last.weight"].T + p["last.bias"]


class Texts(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.norm, self.linear = nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 5)

    def forward(self, x):
        return self.linear(self.norm(self.table(x)))


def texts(p, x):
    x = p["table.weight"][x]
    x = (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)
    return (x * p["norm.weight"] + p["norm.bias"]) @ p["linear.weight"].T + p["linear.bias"]
