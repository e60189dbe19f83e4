"""Models, batches and single steps of a training loop with `KFACPreconditioner`."""

from itertools import pairwise

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from kfaclinalg import Diagonal
from kfaclinalg_torch import Categorical, Empirical, KFACPreconditioner

ESTIMATORS = ["sampled", "exact", "empirical"]


def network(*sizes, dtype=torch.float32, activation=nn.Tanh, seed=0):
    torch.manual_seed(seed)
    layers = [m for n, k in pairwise(sizes) for m in (nn.Linear(n, k), activation())]
    return nn.Sequential(*layers[:-1]).to(dtype)


def batch(N=12, features=4, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, features, generator=generator), torch.randint(classes, (N,), generator=generator)


class Mixed(nn.Module):
    """A bit of everything that is known: embedding, attention, normalisation, convolution, linear."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.embedding, self.norm = nn.Embedding(7, 4), nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.convolution, self.head = nn.Conv1d(4, 3, 3, padding=1), nn.Linear(3, 3)

    def forward(self, tokens):
        x = self.norm(self.embedding(tokens))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.convolution(x.mT).tanh().mean(2))


def mixed_batch(seed=0, N=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(7, (N, 5), generator=generator), torch.randint(3, (N,), generator=generator)


def preconditioned(model, estimator="sampled", likelihood="categorical", seed=0, **options):
    likelihood = None if estimator == "empirical" else likelihood
    generator = torch.Generator().manual_seed(seed)
    return KFACPreconditioner(model, likelihood=likelihood, estimator=estimator, generator=generator, **options)


def backward(model, preconditioner, x, y, *, scale=1.0, loss=functional.cross_entropy):
    """One forward and one backward pass, as in the docstring of the class."""
    outputs = model(x)
    if preconditioner is not None and not isinstance(preconditioner.estimator, Empirical):
        preconditioner.update(outputs)
    (scale * loss(outputs, y)).backward()
    return outputs.detach()


def one_step(model, preconditioner, x, y, **options):
    model.zero_grad()
    backward(model, preconditioner, x, y, **options)
    preconditioner.step()
    return gradients(model)


def losses_of(model, optimizer, preconditioner, x, y, steps, after=lambda: None):
    """Those of each step of a training loop on one batch."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        outputs = model(x)
        preconditioner.update(outputs)
        loss = functional.cross_entropy(outputs, y)
        loss.backward()
        preconditioner.step()
        optimizer.step()
        after()
        losses.append(loss.item())
    return losses


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def dense(layers):
    """Copies of the factors, in tensors."""
    return {
        name: tuple(M.d.clone() if isinstance(M, Diagonal) else M.clone() for M in pair)
        for name, pair in layers.items()
    }


def assert_same(one, two):
    (leaves, tree), (others, other_tree) = tree_flatten(one), tree_flatten(two)
    assert tree == other_tree
    for x, y in zip(leaves, others, strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def assert_near(one, two, c=100):
    """To rounding: c eps of float32 relative to the largest entry; what is zero but for rounding counts as zero."""
    (leaves, tree), (others, other_tree) = tree_flatten(one), tree_flatten(two)
    assert tree == other_tree
    for x, y in zip(leaves, others, strict=True):
        bound = c * torch.finfo(torch.float32).eps * max(float(y.abs().max()), 1e-6)
        torch.testing.assert_close(x, y, rtol=0, atol=bound, check_dtype=False)


def stored(module):
    """The storages of the module's outputs, which do not keep them alive."""
    storages = []
    module.register_forward_hook(lambda module, x, y: storages.append(StorageWeakRef(y.untyped_storage())))
    return storages


class Fixed(Categorical):
    """Targets that do not depend on chance."""

    def sample(self, outputs, generator):
        return outputs.argmin(-1)


class Partly(nn.Module):
    """`idle` is never used, `rare` only if asked for."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.layer, self.idle, self.rare = nn.Linear(4, 3), nn.Linear(4, 4), nn.Linear(3, 3)

    def forward(self, x, rarely=False):
        x = self.layer(x)
        return self.rare(x) if rarely else x


def attributes(model):
    """All that hangs on the modules."""
    return {
        name: {key: list(value.items()) if isinstance(value, dict) else value for key, value in vars(module).items()}
        for name, module in model.named_modules()
    }


def assert_untouched(model, before):
    after = attributes(model)
    assert after.keys() == before.keys()
    for name, values in before.items():
        assert after[name].keys() == values.keys()
        for key, value in values.items():
            same = after[name][key]
            assert same is value or same == value, (name, key)


class Waits(TorchDispatchMode):
    """Counts the values that become Python's: each waits for a GPU. In its sight nothing is computed on the host."""

    count = 0

    def __enter__(self):
        self.tolist = torch.Tensor.tolist
        torch.Tensor.tolist = lambda tensor: (setattr(self, "count", self.count + 1), self.tolist(tensor))[1]
        return super().__enter__()

    def __exit__(self, *error):
        torch.Tensor.tolist = self.tolist
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))
