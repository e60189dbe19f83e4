"""Models and data for the tests of `fit_curvature`; gradients, Jacobians and Fisher matrices by torch.func."""

import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap

from kfaclinalg import testing
from kfaclinalg_torch import fit_curvature

EPS, N, K = torch.finfo(torch.float64).eps, 20, 4


class Everything(nn.Module):
    """A convolution, a grouped one, a normalisation, a linear layer and a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.grouped = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 6, 2, groups=3)
        self.norm, self.last, self.scale = nn.LayerNorm(12), nn.Linear(24, K), nn.Parameter(torch.ones(K))

    def forward(self, x):
        h = torch.tanh(self.grouped(torch.tanh(self.first(x)))).flatten(1)[:, :24]
        return self.last(torch.cat([self.norm(h[:, :12]), h[:, 12:]], 1)) * self.scale


class Words(nn.Module):
    """An embedding, summed over positions with a linear layer that is used at each of them."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.last = nn.Embedding(7, 5), nn.Linear(5, 6), nn.Linear(6, K)

    def forward(self, x):
        return self.last(torch.tanh(self.mix(self.embed(x))).sum(1))


class Placed(nn.Module):
    """Words at positions, of which an embedding and a linear layer know, and no example."""

    def __init__(self):
        super().__init__()
        self.embed, self.place, self.turn = nn.Embedding(7, 5), nn.Embedding(3, 5), nn.Linear(3, 5)
        self.last = nn.Linear(5, K)

    def forward(self, x):
        # Three lengths: where A has an eigenvalue twice, its eigenvectors, and so EKFAC, are anybody's.
        where = self.place(torch.arange(3)) + self.turn(torch.diag(torch.arange(1.0, 4.0).to(self.last.weight)))
        return self.last(torch.tanh(self.embed(x) + where).sum(1))


class Attending(nn.Module):
    """Attention, whose forward pass a rule takes the place of."""

    def __init__(self):
        super().__init__()
        self.embed, self.last = nn.Embedding(7, 4), nn.Linear(4, K)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        h = self.embed(x)
        return self.last(self.attention(h, h, h)[0].sum(1))


class Tied(nn.Module):
    """An embedding that is the last layer too, and a normalisation and a linear layer that are used twice."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.norm = nn.Embedding(K, 5, padding_idx=1), nn.Linear(5, 5), nn.LayerNorm(5)
        self.last = nn.Linear(5, K)
        self.last.weight = self.embed.weight

    def forward(self, x):
        h = self.norm(torch.tanh(self.mix(self.embed(x))))
        return self.last(self.norm(torch.tanh(self.mix(h)).sum(1)))


class Sum(nn.Module):
    """Of two inputs."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, K)

    def forward(self, one, other):
        return self.layer(one + other)


def mlp():
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, K))


MODELS = {
    "mlp": (mlp, lambda: torch.randn(N, 5)),
    "everything": (Everything, lambda: torch.randn(N, 1, 6, 6)),
    "words": (Words, lambda: torch.randint(7, (N, 3))),
    "placed": (Placed, lambda: torch.randint(7, (N, 3))),
    "attending": (Attending, lambda: torch.randint(7, (N, 3))),
    "tied": (Tied, lambda: torch.randint(K, (N, 3))),
}


class Case:
    def __init__(self, name, dtype=torch.float64):
        make, inputs = MODELS[name]
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            self.model, self.x, self.y = make(), inputs(), torch.randint(K, (N,))
        finally:
            torch.set_default_dtype(before)
        self.parameters = {name: p.detach() for name, p in self.model.named_parameters()}

    def loader(self, size=N):
        return list(zip(self.x.split(size), self.y.split(size), strict=True))

    def fit(self, size=N, **options):
        return fit_curvature(self.model, "categorical", self.loader(size), progress=False, **options)

    def outputs(self, parameters, x):
        return functional_call(self.model, parameters, (x[None],))[0]

    def loss(self, parameters, x, y):
        return nn.functional.cross_entropy(self.outputs(parameters, x)[None], y[None])

    def gradients(self, curvature):
        """(N, entries), in the order of the stacked vecs."""
        found = vmap(grad(self.loss), (None, 0, 0))(self.parameters, self.x, self.y)
        return torch.stack([flat(curvature, {k: g[i] for k, g in found.items()}) for i in range(N)])

    def jacobians(self, curvature):
        """(N, K, entries)."""
        found = vmap(jacrev(self.outputs), (None, 0))(self.parameters, self.x)
        return torch.stack(
            [
                torch.stack([flat(curvature, {name: J[i, k] for name, J in found.items()}) for k in range(K)])
                for i in range(N)
            ]
        )

    def fisher(self, curvature):
        J, p = self.jacobians(curvature), torch.softmax(self.model(self.x).detach(), -1)
        F_R = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        return (J.mT @ F_R @ J).mean(0)


def eye(n, dtype=torch.float64):
    return torch.eye(n, dtype=dtype)


def flat(curvature, tensors):
    return torch.cat([V.mT.flatten() for V in curvature.pack(tensors)])


def close(computed, expected, condition=1.0):
    error = torch.linalg.vector_norm(computed - expected) / torch.linalg.vector_norm(expected)
    assert float(error) <= testing.C * 200 * condition * EPS  # n = 200 or so entries, and rows, enter each sum
