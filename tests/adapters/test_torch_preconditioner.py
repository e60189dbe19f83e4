"""`KFACPreconditioner` in the training loops that people have; its statistics are tested by themselves elsewhere."""

import copy
import gc
import io
import math
import pickle
import re
import warnings
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import distributed, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_flatten
from torch.utils.checkpoint import checkpoint

from kfaclinalg import (
    CholeskyInverse,
    Diagonal,
    Factors,
    Kronecker,
    LayerFactors,
    LinAlgError,
    block_diagonal_inverse,
)
from kfaclinalg_torch import Categorical, Gaussian, KFACPreconditioner
from kfaclinalg_torch.inverses import Factored, Inverses, exact, factored

ESTIMATORS = ["sampled", "exact", "empirical"]


# -- models, data and loops --


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
    if preconditioner is not None and preconditioner.estimator != "empirical":
        preconditioner.update(outputs)
    (scale * loss(outputs, y)).backward()
    return outputs.detach()


def one_step(model, preconditioner, x, y, **options):
    model.zero_grad()
    backward(model, preconditioner, x, y, **options)
    preconditioner.step()
    return gradients(model)


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


# -- periods and staggering --


def changes(preconditioner, model, steps):
    """The layers whose inverse is another after each step, seen in what becomes of one and the same gradient."""
    before, changed = {}, []
    for step in range(steps):
        x, y = batch(seed=step)
        backward(model, preconditioner, x, y)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        preconditioner.step()
        now = {name: p.grad.clone() for name, p in model.named_parameters() if name.endswith("weight")}
        changed.append(
            {name[: -len(".weight")] for name, g in now.items() if not torch.equal(g, before.get(name))}
            if before
            else {name[: -len(".weight")] for name in now}
        )
        before = now
    return changed


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    ("period", "due"), [(1, range(8)), (3, (0, 3, 6)), (lambda step: 1 if step < 3 else 4, (0, 1, 2, 4))]
)
def test_statistics_are_taken_on_their_own_period(estimator, period, due):
    model = network(4, 5, 3)
    preconditioner = preconditioned(model, estimator, statistics_period=period, inverse_period=5)
    taken, before = [], None
    for step in range(8):
        one_step(model, preconditioner, *batch(seed=step))
        now = dense(preconditioner.layers)
        if before is None or not torch.equal(now["0"][0], before["0"][0]):
            assert before is None or not torch.equal(now["2"][1], before["2"][1])
            taken.append(step)
        before = now
    assert taken == list(due)


def test_inverses_are_refreshed_on_their_own_period_one_layer_a_step():
    model = network(4, 6, 5, 3)
    changed = changes(preconditioned(model, inverse_period=4), model, 13)
    assert changed[0] == {"0", "2", "4"}
    assert sorted(name for names in changed[1:5] for name in names) == ["0", "2", "4"]
    assert changed[1:5] == changed[5:9] == changed[9:13]
    assert max(map(len, changed[1:])) == 1


def test_every_inverse_is_refreshed_at_every_step_where_the_period_is_one():
    model = network(4, 6, 5, 3)
    assert changes(preconditioned(model, inverse_period=1), model, 4) == [{"0", "2", "4"}] * 4


def test_where_the_period_is_one_substitution_takes_the_place_of_inverses():
    """A function of the step may say otherwise in the next, so that it keeps to inverses."""
    x, y = batch()
    for often, kind in ((1, CholeskyInverse), (lambda step: 1, torch.Tensor)):
        model = network(4, 6, 5, 3)
        preconditioner = preconditioned(model, inverse_period=often)
        found = [one_step(model, preconditioner, x, y) for _ in range(2)]
        assert all(isinstance(M, kind) for K in preconditioner._inverses.inverses.values() for M in (K.A, K.B))
        if kind is CholeskyInverse:
            expected = found
    assert_near(found, expected)


def test_the_inverse_period_may_follow_the_iterations():
    model = network(4, 5, 3)
    changed = changes(preconditioned(model, inverse_period=lambda step: 1 if step < 3 else 100), model, 8)
    assert changed[:3] == [{"0", "2"}] * 3
    assert changed[3:] == [set()] * 5


def test_damping_may_follow_the_iterations():
    model, case = network(4, 5, 3), batch()
    preconditioner = preconditioned(model, "exact", damping=lambda step: 10.0 ** (step - 3), inverse_period=1)
    for step in range(4):
        came = one_step(model, preconditioner, *case)
        other = network(4, 5, 3)
        assert_near(came, one_step(other, preconditioned(other, "exact", damping=10.0 ** (step - 3)), *case))


@pytest.mark.parametrize("period", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("structure", ["block-diagonal", "eigen"])
def test_no_step_is_a_spike(period, structure, monkeypatch):
    """The work of a step, n³ for each side, is at most the largest layer's and the mean."""
    sizes = (3, 20, 5, 17, 30, 2, 9, 9, 9, 9, 3)
    model, work = network(*sizes), []
    preconditioner = preconditioned(model, structure=structure, inverse_period=period)
    build = preconditioner._inverses.build

    def counted(layer, damping):
        work[-1] += layer.A.shape[-1] ** 3 + layer.G.shape[-1] ** 3
        return build(layer, damping)

    monkeypatch.setattr(preconditioner._inverses, "build", counted)
    for step in range(2 * period + 1):
        work.append(0)
        x, y = batch(features=3, seed=step)
        one_step(model, preconditioner, x, y)
    costs = [(n + 1) ** 3 + m**3 for n, m in pairwise(sizes)]
    assert work[0] == sum(costs)
    for first in range(1, period + 2):
        assert sum(work[first : first + period]) == sum(costs)
    assert max(work[1:]) <= max(costs) + sum(costs) / period


# -- kl_clip --


def clipped_case(**options):
    model = network(4, 5, 3)
    preconditioner = preconditioned(model, "exact", **options)
    model.zero_grad()
    backward(model, preconditioner, *batch())
    V = gradients(model)
    preconditioner.step()
    return V, gradients(model)


@pytest.mark.parametrize("lr", [1.0, 0.1, lambda step: 0.5])
@pytest.mark.parametrize("kappa", [1e-3, 1e-1, 1e6])
def test_kl_clip_scales_the_whole_update_by_one_factor(kappa, lr):
    V, U = clipped_case()
    agreement = sum(float((V[name].double() * U[name].double()).sum()) for name in V)
    rate = lr(0) if callable(lr) else lr
    factor = min(1.0, math.sqrt(kappa / (rate**2 * agreement)))
    assert (factor < 1.0) == (kappa == 1e-3 or (kappa, lr) == (1e-1, 1.0)) or callable(lr)
    _, clipped = clipped_case(kl_clip=kappa, kl_lr=lr)
    assert_near(clipped, {name: factor * u for name, u in U.items()})


def test_kl_clip_may_follow_the_iterations():
    _, expected = clipped_case(kl_clip=1e-3)
    _, came = clipped_case(kl_clip=lambda step: 1e-3 * (step + 1))
    assert_same(came, expected)


def test_kl_clip_leaves_a_zero_gradient_zero():
    model = network(4, 3)
    preconditioner = preconditioned(model, kl_clip=1e-3)
    came = one_step(model, preconditioner, *batch(), scale=0.0)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in came.values())


# -- torch.amp --


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("make", [lambda: (network(4, 8, 3), batch()), lambda: (Mixed(), mixed_batch())])
def test_it_trains_under_autocast(dtype, estimator, make):
    model, (x, y) = make()
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    preconditioner = preconditioned(model, estimator, damping=0.1, grad_scaler=scaler, inverse_period=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            outputs = model(x)
            loss = functional.cross_entropy(outputs.float(), y)
        assert outputs.dtype == dtype
        if estimator != "empirical":
            preconditioner.update(outputs)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        preconditioner.step()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert all(
        M.dtype == torch.float32 and bool(M.isfinite().all()) for M in tree_flatten(dense(preconditioner.layers))[0]
    )
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert preconditioner.rejected == 0


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_the_factors_under_autocast_are_those_of_the_float32_pass_to_bfloat16_rounding(estimator):
    x, y = batch(64)
    came = []
    for enabled in (True, False):
        model = network(4, 8, 3)
        preconditioner = preconditioned(model, estimator)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            outputs = model(x)
        if estimator == "exact":
            preconditioner.update(outputs)
        functional.cross_entropy(outputs.float(), y).backward()
        preconditioner.step()
        came.append(dense(preconditioner.layers))
    assert not torch.equal(came[0]["0"][1], came[1]["0"][1])
    assert_near(came[0], came[1], c=5 * torch.finfo(torch.bfloat16).eps / torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
def test_update_under_autocast_takes_the_same_statistic(weight_sharing):
    """The moments of bfloat16 activations are float32 sums, not bfloat16 products."""
    (x, y), came = mixed_batch(N=64), []
    for inside in (True, False):
        model = Mixed()
        preconditioner = preconditioned(model, "exact", weight_sharing=weight_sharing)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            preconditioner.update(outputs)
        functional.cross_entropy(outputs.float(), y).backward()
        preconditioner.step()
        came.append(dense(preconditioner.layers))
    assert_near(*came)


def test_a_whole_loop_under_autocast_keeps_the_factors_in_float32():
    """backward() and step() inside the `with` too, as many loops have it."""
    (x, y), came = batch(64), []
    for inside in (True, False):
        model = network(4, 8, 3)
        preconditioner = preconditioned(model, "empirical")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            functional.cross_entropy(outputs.float(), y).backward()
            preconditioner.step()
        came.append((dense(preconditioner.layers), gradients(model)))
    assert_near(came[0][0], came[1][0])
    assert_near(came[0][1], came[1][1], c=1000)


@pytest.mark.parametrize("unscale", ["before the step", "by the optimizer's step"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_scaled_loss_gives_the_statistics_and_the_step_of_an_unscaled_one(estimator, unscale):
    """Bitwise: the scale is a power of two."""
    runs = []
    for scale in (None, 2.0**12):
        model, (x, y) = network(4, 8, 3), batch()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        preconditioner = preconditioned(model, estimator, grad_scaler=scaler, inverse_period=2)
        for _ in range(4):
            optimizer.zero_grad()
            outputs = model(x)
            if estimator != "empirical":
                preconditioner.update(outputs)
            scaler.scale(functional.cross_entropy(outputs, y)).backward()
            if unscale == "before the step":
                scaler.unscale_(optimizer)
            preconditioner.step()
            scaler.step(optimizer)
            scaler.update()
        runs.append((dict(model.state_dict()), dense(preconditioner.layers)))
    assert_same(*runs)


@pytest.mark.parametrize("structure", ["block-diagonal", "eigen", "block-tridiagonal"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("at", [0, 2])
def test_statistics_are_skipped_with_the_step_that_overflows(estimator, at, structure):
    model, optimizer, (x, y) = network(4, 8, 3), None, batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=1000)
    preconditioner = preconditioned(model, estimator, grad_scaler=scaler, structure=structure, inverse_period=1)
    for step in range(5):
        before = copy.deepcopy((model.state_dict(), dense(preconditioner.layers)))
        optimizer.zero_grad()
        outputs = model(x)
        if estimator != "empirical":
            preconditioner.update(outputs)
        loss = functional.cross_entropy(outputs, y)
        scaler.scale(loss * (torch.inf if step == at else 1.0)).backward()
        scaler.unscale_(optimizer)
        preconditioner.step()
        scaler.step(optimizer)
        scaler.update()
        after = (model.state_dict(), dense(preconditioner.layers))
        if step == at:
            assert_same(after, before)
        else:
            assert not torch.equal(after[0]["0.weight"], before[0]["0.weight"])
        assert preconditioner.rejected == (step >= at)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_large_float16_gradients_do_not_look_like_an_overflow():
    """Each is finite; only their sum in float16 would not be."""
    model, (x, _) = network(4, 40, 3).half(), batch()
    preconditioner = preconditioned(model, damping=1.0)
    preconditioner.update(model(x.half()))
    for p in model.parameters():
        p.grad = torch.full_like(p, 1000.0)
    preconditioner.step()
    assert preconditioner.rejected == 0


# -- gradient accumulation --


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("estimator", ["exact", "empirical", "fixed"])
@pytest.mark.parametrize(("parts", "reduction"), [((6, 6), "mean"), ((1, 4, 7), "sum"), ((1,) * 12, "mean")])
def test_parts_of_a_batch_are_the_batch(estimator, parts, reduction, weight_sharing):
    x, y = mixed_batch(N=12)
    N, runs = len(x), []
    for sizes in ((12,), parts):
        model = Mixed()
        likelihood = Fixed() if estimator == "fixed" else "categorical"
        kind = "sampled" if estimator == "fixed" else estimator
        preconditioner = preconditioned(
            model, kind, likelihood, reduction=reduction, weight_sharing=weight_sharing, damping=0.1
        )
        for part, targets in zip(x.split(sizes), y.split(sizes), strict=True):
            share = len(part) / N if reduction == "mean" else len(part)
            backward(model, preconditioner, part, targets, scale=share)
        preconditioner.step()
        runs.append((dense(preconditioner.layers), gradients(model)))
    assert_near(runs[1][0], runs[0][0])
    assert_near(runs[1][1], runs[0][1], c=1000)


@pytest.mark.parametrize("structure", ["eigen", "block-tridiagonal"])
@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_parts_of_a_batch_are_the_batch_to_every_structure(structure, estimator):
    (x, y), runs = batch(), []
    for sizes in ((12,), (5, 7)):
        model = network(4, 8, 3)
        preconditioner = preconditioned(model, estimator, structure=structure, damping=0.1)
        for part, targets in zip(x.split(sizes), y.split(sizes), strict=True):
            backward(model, preconditioner, part, targets, scale=len(part) / len(x))
        preconditioner.step()
        runs.append((dense(preconditioner.layers), gradients(model)))
    assert_near(runs[1][0], runs[0][0])
    assert_near(runs[1][1], runs[0][1], c=1000)


def test_all_forward_passes_may_come_before_the_backward_passes():
    (x, y), runs = batch(), []
    for sizes in ((12,), (5, 7)):
        model = network(4, 8, 3)
        preconditioner = preconditioned(model, "empirical")
        losses = [
            functional.cross_entropy(model(part), targets) * len(part) / len(x)
            for part, targets in zip(x.split(sizes), y.split(sizes), strict=True)
        ]
        for loss in reversed(losses):
            loss.backward()
        preconditioner.step()
        runs.append(dense(preconditioner.layers))
    assert_near(*runs)


# -- gradient checkpointing --


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant=None):
        torch.manual_seed(0)
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.inner = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6))
        self.use_reentrant = use_reentrant

    def forward(self, x):
        x = self.first(x)
        x = self.inner(x) if self.use_reentrant is None else checkpoint(self.inner, x, use_reentrant=self.use_reentrant)
        return self.last(x.tanh())


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("structure", ["block-diagonal", "eigen"])
def test_non_reentrant_checkpointing_changes_nothing(estimator, structure):
    runs = []
    for use_reentrant in (None, False):
        model = Checkpointed(use_reentrant)
        preconditioner = preconditioned(model, estimator, structure=structure, inverse_period=2)
        found = [one_step(model, preconditioner, *batch(N, seed=N)) for N in (12, 6, 5, 12)]
        runs.append((found, dense(preconditioner.layers)))
    assert_near(*runs)


def test_reentrant_checkpointing_changes_nothing():
    """The loss's own backward pass shows it; `torch.autograd.grad` does not go through such a checkpoint."""
    runs = []
    for use_reentrant in (None, True):
        model = Checkpointed(use_reentrant)
        preconditioner = preconditioned(model, "empirical", inverse_period=2)
        found = [one_step(model, preconditioner, *batch(N, seed=N)) for N in (12, 6, 5, 12)]
        runs.append((found, dense(preconditioner.layers)))
    assert_near(*runs)


def test_reentrant_checkpointing_takes_parts_of_a_batch_whose_forward_passes_all_come_first():
    (x, y), runs = batch(), []
    for use_reentrant in (None, True):
        model = Checkpointed(use_reentrant)
        preconditioner = preconditioned(model, "empirical")
        losses = [
            functional.cross_entropy(model(part), targets) * len(part) / len(x)
            for part, targets in zip(x.split((5, 7)), y.split((5, 7)), strict=True)
        ]
        for loss in losses:
            loss.backward()
        preconditioner.step()
        runs.append(dense(preconditioner.layers))
    assert_near(*runs)


@pytest.mark.parametrize("estimator", ["sampled", "exact"])
def test_reentrant_checkpointing_of_an_extra_backward_pass_is_refused_or_right(estimator):
    """Never a statistic without the layers inside."""
    model = Checkpointed(True)
    preconditioner = preconditioned(model, estimator)
    x, y = batch()
    outputs = model(x)
    try:
        preconditioner.update(outputs)
    except (RuntimeError, ValueError) as error:
        assert "heckpoint" in str(error)  # noqa: PT017
        return
    functional.cross_entropy(outputs, y).backward()
    preconditioner.step()
    assert preconditioner.layers.keys() == {"first", "inner.0", "inner.2", "last"}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_nothing_of_what_a_checkpoint_computed_again_is_kept(estimator):
    model = Checkpointed(False)
    preconditioner = preconditioned(model, estimator)
    storages = [stored(module) for module in (model.first, model.inner[0], model.inner[1])]
    one_step(model, preconditioner, *batch())
    gc.collect()
    assert all(storages)
    assert all(storage.expired() for kept in storages for storage in kept)


# -- torch.compile --


# torch hides this warning of its own, but not from a filter that makes it an error
compiles = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@compiles
@pytest.mark.parametrize(
    ("estimator", "backend"), [*((estimator, "eager") for estimator in ESTIMATORS), ("exact", "aot_eager")]
)
def test_a_compiled_model_gives_what_the_model_gives(estimator, backend):
    torch.compiler.reset()
    runs = []
    for compiled in (False, True):
        model = network(4, 8, 3)
        called = torch.compile(model, backend=backend) if compiled else model
        preconditioner = preconditioned(called, estimator, inverse_period=2)
        found = []
        for seed in range(3):
            x, y = batch(seed=seed)
            model.zero_grad()
            backward(called, preconditioner, x, y)
            preconditioner.step()
            found.append(gradients(model))
        runs.append((found, dense(preconditioner.layers)))
    assert_near(*runs)


@compiles
@pytest.mark.parametrize("when", ["in place", "after", "and run before"])
def test_a_model_may_be_compiled_in_other_ways(when):
    """In place; after the hooks are there; and one that was compiled and run before they were."""
    torch.compiler.reset()
    x, y = batch()
    expected_model = network(4, 8, 3)
    expected = one_step(expected_model, preconditioned(expected_model), x, y)
    model = network(4, 8, 3)
    called = model
    if when == "in place":
        model.compile(backend="eager")
    if when == "and run before":
        called = torch.compile(model, backend="eager")
        called(x)
    preconditioner = preconditioned(called)
    if when == "after":
        called = torch.compile(model, backend="eager")
    backward(called, preconditioner, x, y)
    preconditioner.step()
    assert_near(gradients(model), expected)


@compiles
def test_a_compiled_attention_is_captured():
    torch.compiler.reset()
    x, y = mixed_batch()
    runs = []
    for compiled in (False, True):
        model = Mixed()
        called = torch.compile(model, backend="eager") if compiled else model
        preconditioner = preconditioned(called, "exact")
        backward(called, preconditioner, x, y)
        preconditioner.step()
        runs.append((gradients(model), dense(preconditioner.layers)))
    assert_near(*runs)


# -- DistributedDataParallel --

WORLD = 2
DISTRIBUTED = {
    f"{structure} {estimator} {kind}": (structure, estimator, kind)
    for structure, kinds in {
        "block-diagonal": ("linear", "mixed", "reduce", "unequal"),
        "eigen": ("linear", "mixed"),
        "block-tridiagonal": ("linear",),
    }.items()
    for estimator in ("exact", "empirical")
    for kind in kinds
}


def distributed_run(structure, estimator, kind, rank, world):
    """The gradients and factors after three steps on this process's share of the batches."""
    linear = kind in ("linear", "unequal")
    model, parts = network(4, 8, 3) if linear else Mixed(), ((9, 3) if kind == "unequal" else (6, 6))
    called = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    sharing = "reduce" if kind == "reduce" else "expand"
    preconditioner = preconditioned(called, estimator, structure=structure, weight_sharing=sharing, damping=0.1)
    found = []
    for seed in range(3):
        x, y = batch(seed=seed) if linear else mixed_batch(seed, N=12)
        if world > 1:
            x, y = (t.split(parts)[rank] for t in (x, y))
        model.zero_grad()
        backward(called, preconditioner, x, y)
        preconditioner.step()
        found.append(gradients(model))
    return found, dense(preconditioner.layers)


def one_process(rank, world, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    try:
        found = {name: distributed_run(*case, rank, world) for name, case in DISTRIBUTED.items()}
        torch.save(found, f"{folder}/{rank}")
    finally:
        distributed.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    torch.multiprocessing.spawn(one_process, (WORLD, str(folder)), nprocs=WORLD)
    return [torch.load(folder / str(rank), weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("name", DISTRIBUTED)
def test_two_processes_give_what_one_gives_on_the_whole_batch(processes, name):
    found, layers = distributed_run(*DISTRIBUTED[name], 0, 1)
    for process in processes:
        assert_near(process[name][1], layers)
        if not name.endswith("unequal"):  # there DDP's own mean of the gradients is another
            assert_near(process[name][0], found, c=1000)
    # To the last bit, or else the copies of the model would drift apart: nobody sends the weights round again.
    assert_same(processes[0][name], processes[1][name])


# -- what is captured, and what not --


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, "paused"])
def test_evaluation_captures_nothing(estimator, mode):
    """And the statistic of a training step around it is the same, bitwise."""
    runs = []
    for evaluated in (False, True):
        model = Mixed()
        preconditioner = preconditioned(model, estimator)
        x, y = mixed_batch()
        outputs = model(x)
        if estimator != "empirical":
            preconditioner.update(outputs)
        if evaluated:
            with preconditioner.paused() if mode == "paused" else mode():
                model(mixed_batch(seed=5)[0])
        functional.cross_entropy(outputs, y).backward()
        if evaluated:
            with preconditioner.paused() if mode == "paused" else mode():
                model(mixed_batch(seed=6)[0])
        preconditioner.step()
        runs.append((gradients(model), dense(preconditioner.layers)))
    assert_same(*runs)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_step_after_evaluation_alone_says_that_nothing_was_captured(estimator):
    model, (x, y) = network(4, 3), batch()
    preconditioner = preconditioned(model, estimator)
    with preconditioner.paused():
        functional.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match="nothing was captured"):
        preconditioner.step()


def test_paused_ends_with_its_block_even_after_an_error_and_may_be_nested():
    model, (x, y) = network(4, 3), batch()
    preconditioner = preconditioned(model)

    def broken():
        with preconditioner.paused(), preconditioner.paused():
            model(x)
            raise KeyError

    with pytest.raises(KeyError):
        broken()
    one_step(model, preconditioner, x, y)
    assert set(preconditioner.layers) == {"0"}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_train_and_eval_make_no_difference(estimator):
    runs = []
    for training in (True, False):
        model = Mixed().train(training)
        preconditioner = preconditioned(model, estimator)
        runs.append((one_step(model, preconditioner, *mixed_batch()), dense(preconditioner.layers)))
    assert_same(*runs)


def test_the_captured_batch_normalisation_is_that_of_the_forward_pass():
    """Though the mode is another by the time of update()."""
    (x, y), runs = batch(), []
    for switched in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
        preconditioner = preconditioned(model, "exact")
        outputs = model(x)
        model.train(not switched)
        preconditioner.update(outputs)
        functional.cross_entropy(outputs, y).backward()
        preconditioner.step()
        runs.append(dense(preconditioner.layers))
    assert_same(*runs)


# -- state_dict --

STRUCTURES = {
    "block-diagonal": {},
    "substitution": {"inverse_period": 1},
    "exactly damped": {"exact_damping": True},
    "low rank": {"rank": 2},
    "reduce": {"weight_sharing": "reduce"},
    "eigen": {"structure": "eigen"},
    "eigen reduce": {"structure": "eigen", "weight_sharing": "reduce"},
    "block-tridiagonal": {"structure": "block-tridiagonal"},
}


class Run:
    def __init__(self, structure, estimator, optimizer, seed=0):
        chain = structure == "block-tridiagonal"
        self.model, self.batch = (network(4, 6, 5, 3), batch) if chain else (Mixed(), mixed_batch)
        options = {"statistics_period": 2, "inverse_period": 3, "kl_clip": 0.1, "damping": 0.1} | STRUCTURES[structure]
        self.preconditioner = preconditioned(self.model, estimator, seed=seed, **options)
        self.optimizer = optimizer(self.model.parameters())
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 4, gamma=0.5)
        self.parts = (self.model, self.preconditioner, self.optimizer, self.scheduler)

    def go(self, steps):
        for step in steps:
            one_step(self.model, self.preconditioner, *self.batch(seed=step))
            self.optimizer.step()
            self.scheduler.step()
        return self


OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
}


@pytest.mark.parametrize(("optimizer", "stop"), [("SGD", 1), ("AdamW", 5)])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_resumed_run_is_bitwise_the_run_without_a_stop(structure, estimator, optimizer, stop):
    straight = Run(structure, estimator, OPTIMIZERS[optimizer]).go(range(stop))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in straight.parts], file)
    straight.go(range(stop, stop + 6))

    file.seek(0)
    resumed = Run(structure, estimator, OPTIMIZERS[optimizer], seed=7)  # its generator stands elsewhere
    for part, state in zip(resumed.parts, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    resumed.go(range(stop, stop + 6))
    for part, expected in zip(resumed.parts, straight.parts, strict=True):
        assert_same(dict(part.state_dict()), dict(expected.state_dict()))


def test_a_state_is_a_snapshot():
    """Later steps do not change it, nor does loading it twice."""
    run = Run("block-diagonal", "exact", OPTIMIZERS["SGD"]).go(range(3))
    state = run.preconditioner.state_dict()
    before = copy.deepcopy(state)
    run.go(range(3, 6))
    assert_same(state, before)
    run.preconditioner.load_state_dict(state)
    run.go(range(3, 6))
    assert_same(state, before)


def test_a_state_from_before_the_first_step_loads():
    model = network(4, 3)
    preconditioner = preconditioned(model)
    preconditioner.load_state_dict(preconditioner.state_dict())
    one_step(model, preconditioner, *batch())


class Partly(nn.Module):
    """`idle` is never used, `rare` only if asked for."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.layer, self.idle, self.rare = nn.Linear(4, 3), nn.Linear(4, 4), nn.Linear(3, 3)

    def forward(self, x, rarely=False):
        x = self.layer(x)
        return self.rare(x) if rarely else x


def test_a_state_of_a_model_with_an_idle_layer_loads():
    model = Partly()
    preconditioner = preconditioned(model)
    one_step(model, preconditioner, *batch())
    other = preconditioned(Partly())
    other.load_state_dict(preconditioner.state_dict())
    assert_same(dense(other.layers), dense(preconditioner.layers))


def test_a_module_may_have_any_name():
    """`kind` is a key of the stored records too."""
    model = nn.ModuleDict({"kind": nn.Linear(4, 3), "moments": nn.Linear(3, 3)})
    model.forward = lambda x: model["moments"](model["kind"](x))
    preconditioner = preconditioned(model)
    one_step(model, preconditioner, *batch())
    before = dense(preconditioner.layers)
    preconditioner.load_state_dict(preconditioner.state_dict())
    assert_same(dense(preconditioner.layers), before)


@pytest.mark.parametrize(
    ("other", "options"),
    [
        ((4, 6, 3), {}),
        ((4, 6, 5, 3), {}),
        ((5, 5, 3), {}),
        ((4, 5, 3), {"structure": "eigen"}),
        ((4, 5, 3), {"structure": "block-tridiagonal"}),
    ],
    ids=["widths", "layers", "inputs", "eigen", "block-tridiagonal"],
)
def test_the_state_of_another_model_or_structure_is_refused_and_changes_nothing(other, options):
    model = network(4, 5, 3)
    preconditioner = preconditioned(model)
    one_step(model, preconditioner, *batch())
    network_of_other = network(*other)
    refusing = preconditioned(network_of_other, **options)
    one_step(network_of_other, refusing, *batch(features=other[0]))
    before = copy.deepcopy(refusing.state_dict())
    with pytest.raises(ValueError, match="state"):
        refusing.load_state_dict(preconditioner.state_dict())
    assert_same(refusing.state_dict(), before)


# -- remove --


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


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_remove_leaves_the_model_as_it_was(estimator):
    model = Mixed()
    before = attributes(model)
    preconditioner = preconditioned(model, estimator)
    one_step(model, preconditioner, *mixed_batch())
    preconditioner.remove()
    assert_untouched(model, before)
    assert model.attention.forward.__func__ is nn.MultiheadAttention.forward
    preconditioner.remove()  # a second time it does nothing


def test_remove_in_the_middle_of_a_step_leaves_the_backward_pass_alone():
    model, (x, y) = network(4, 3), batch()
    preconditioner = preconditioned(model, "empirical")
    loss = functional.cross_entropy(model(x), y)
    preconditioner.remove()
    loss.backward()
    other = network(4, 3)
    functional.cross_entropy(other(x), y).backward()
    assert_same(gradients(model), gradients(other))


def test_remove_keeps_a_forward_of_ones_own():
    model = Mixed()
    original = model.attention.forward
    model.attention.forward = partial(original)
    before = attributes(model)
    preconditioned(model).remove()
    assert_untouched(model, before)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_preconditioners_of_one_model_are_removed_in_any_order(order):
    model = Mixed()
    before = attributes(model)
    both = [preconditioned(model, "exact") for _ in range(2)]
    for i in order:
        both[i].remove()
    assert_untouched(model, before)


def test_a_model_is_copied_and_pickled_after_remove():
    model, (x, y) = Mixed(), mixed_batch()
    preconditioner = preconditioned(model)
    one_step(model, preconditioner, x, y)
    preconditioner.remove()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in other.modules())


def test_a_copy_of_a_model_in_training_is_a_model():
    """`torch.optim.swa_utils.AveragedModel` makes one."""
    model, (x, y) = Mixed(), mixed_batch()
    preconditioner = preconditioned(model, "exact")
    average = torch.optim.swa_utils.AveragedModel(model)
    assert torch.equal(average(x), model(x))
    came = one_step(model, preconditioner, x, y)
    other = Mixed()
    assert_same(came, one_step(other, preconditioned(other, "exact"), x, y))


# -- dtypes --


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("structure", ["block-diagonal", "eigen"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_factors_are_float32_whatever_the_model_is(dtype, structure, estimator):
    (x, y), runs = batch(), []
    for kind in (torch.float32, dtype):
        model = network(4, 8, 3, dtype=dtype).to(kind)  # the same weights
        likelihood = Fixed() if estimator == "sampled" else "categorical"
        preconditioner = preconditioned(model, estimator, likelihood, structure=structure, damping=0.1, kl_clip=0.01)
        came = one_step(model, preconditioner, x.to(dtype).to(kind), y)
        assert all(g.dtype == kind for g in came.values())
        layers = dense(preconditioner.layers)
        assert all(M.dtype == torch.float32 for pair in layers.values() for M in pair)
        runs.append((came, layers))
    c = 20 * max(torch.finfo(dtype).eps / torch.finfo(torch.float32).eps, 5)
    assert_near(*((found, layers) for found, layers in (runs[1], runs[0])), c=c)


def test_a_model_of_several_dtypes():
    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = nn.Linear(4, 5).bfloat16(), nn.Linear(5, 6), nn.Linear(6, 3).double()

        def forward(self, x):
            return self.three(self.two(self.one(x.bfloat16()).float()).double())

    model = Cast()
    preconditioner = preconditioned(model, kl_clip=1e-3)
    came = one_step(model, preconditioner, *batch())
    assert len(came) == 6
    assert all(bool(g.isfinite().all()) for g in came.values())
    assert preconditioner.rejected == 0


def test_factors_in_float64_on_request():
    model, (x, y) = network(4, 3).double(), batch()
    preconditioner = preconditioned(model, factor_dtype=torch.float64)
    one_step(model, preconditioner, x.double(), y)
    assert all(M.dtype == torch.float64 for M in preconditioner.layers["0"])


# -- the failure ladder --


def refreshed(A, G, damping, build=factored, **inverses):
    """The inverse that one refresh makes of these factors."""
    found = Inverses(lambda layer, strength: build(layer, strength, "trace"))
    found.refresh(0, 1, damping, Factored({"layer": LayerFactors(A, G)}, ()))
    return found.inverses["layer"]


@pytest.mark.parametrize("build", [factored, exact])
def test_what_is_not_symmetric_is_symmetrised(build):
    A, skew, G = torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([[0.0, 0.3], [-0.3, 0.0]]), torch.eye(2)
    assert_near(refreshed(A + skew, G, 0.1, build).to_dense(), refreshed(A, G, 0.1, build).to_dense())


def test_what_float32_cannot_invert_is_inverted_in_float64():
    A, G, damping = torch.ones(2, 2), torch.eye(2), 1e-18  # 1 + γ is 1 in float32
    assert not bool(factored(LayerFactors(A, G), damping, "trace").A.isfinite().all())
    came = refreshed(A, G, damping)
    assert isinstance(came, Kronecker)
    assert came.A.dtype == came.B.dtype == torch.float32
    expected = torch.linalg.inv(A.double() + 1e-9 * torch.eye(2))
    torch.testing.assert_close(came.A.double(), expected, rtol=1e-6, atol=0)


def test_what_float64_cannot_invert_gets_more_damping_but_not_without_bound():
    c = 1 + 2.0**-23
    A, G = torch.tensor([[1.0, c], [c, 1.0]]), torch.eye(2)  # an eigenvalue is -1.2e-7
    came = refreshed(A, G, 1e-15)
    expected = factored(LayerFactors(A.double(), G.double()), 1e-13, "trace")  # 10 times is γ = 1e-7, too little
    torch.testing.assert_close(came.A.double(), expected.A, rtol=1e-5, atol=0)
    indefinite = Inverses(lambda layer, strength: factored(layer, strength, "trace"))
    indefinite.refresh(0, 1, 1e-15, Factored({"layer": LayerFactors(torch.diag(torch.tensor([1.0, -1.0])), G)}, ()))
    assert indefinite.inverses == {}


def test_an_inverse_that_only_float64_holds_is_not_an_inverse():
    """1e45 is finite in float64 and infinite in float32: a NaN in the gradient."""
    singular = torch.diag(torch.tensor([1.0, 0.0]))
    inverses = Inverses(lambda layer, strength: factored(layer, strength, "trace"))
    inverses.refresh(0, 1, 1e-90, Factored({"layer": LayerFactors(singular, torch.eye(2))}, ()))
    ((_, U),) = inverses.apply([("layer", torch.diag(torch.tensor([1.0, 0.0])))])
    assert bool(U.isfinite().all())


class Failing:
    """The `build` of an `Inverses`, which fails on demand for one of the layers."""

    def __init__(self, build, width):
        self.build, self.width, self.fails, self.tried = build, width, False, []

    def __call__(self, layer, damping):
        inverse = self.build(layer, damping)
        if layer.A.shape[-1] != self.width:
            return inverse
        self.tried.append((layer.A.dtype, damping))
        return torch.utils._pytree.tree_map(lambda x: math.nan * x, inverse) if self.fails else inverse


def failing(model, width=6, **options):
    preconditioner = preconditioned(model, "exact", inverse_period=1, damping=0.01, **options)
    preconditioner._inverses.build = build = Failing(preconditioner._inverses.build, width)
    return preconditioner, build


def test_the_rungs_of_the_ladder_in_their_order():
    model = network(4, 5, 3)
    preconditioner, build = failing(model)
    one_step(model, preconditioner, *batch())
    assert build.tried == [(torch.float32, 0.01)]
    build.tried.clear()
    build.fails = True
    one_step(model, preconditioner, *batch())
    assert [dtype for dtype, _ in build.tried[:2]] == [torch.float32, torch.float64]
    dampings = [damping for _, damping in build.tried]
    assert dampings[0] == dampings[1] == 0.01
    assert all(low < high for low, high in pairwise(dampings[1:]))
    assert 3 <= len(dampings) <= 10
    assert dampings[-1] <= 1e6 * dampings[0]


def test_a_layer_that_fails_keeps_its_inverse_and_the_others_get_theirs():
    model, other = network(4, 5, 3), network(4, 5, 3)
    (preconditioner, build), plain = failing(model), preconditioned(other, "exact", inverse_period=1, damping=0.01)
    for M, P in ((model, preconditioner), (other, plain)):
        one_step(M, P, *batch(seed=0))
    build.fails = True
    plain._inverses.build = Failing(plain._inverses.build, 6)
    kept = plain._inverses.inverses["2"]
    came = one_step(model, preconditioner, *batch(seed=1))
    expected = one_step(other, plain, *batch(seed=1))
    assert torch.equal(came["0.weight"], expected["0.weight"])
    assert not torch.equal(came["2.weight"], expected["2.weight"])
    x, y = batch(seed=1)
    model.zero_grad()
    functional.cross_entropy(model(x), y).backward()
    V = torch.cat([model[2].weight.grad, model[2].bias.grad[:, None]], dim=1)
    assert_near(torch.cat([came["2.weight"], came["2.bias"][:, None]], dim=1), kept @ V)


def test_the_third_failure_in_a_row_raises_and_says_what_and_why():
    model = network(4, 5, 3)
    preconditioner, build = failing(model)
    for fails in (False, True, True, False, True, True):
        build.fails = fails
        came = one_step(model, preconditioner, *batch())
        assert all(bool(g.isfinite().all()) for g in came.values())
    with pytest.raises(LinAlgError, match=r"'2'.*3 refreshes.*condition.*[Ll]ikely causes"):
        one_step(model, preconditioner, *batch())


def test_only_refreshes_count():
    model = network(4, 5, 3)
    preconditioner, build = failing(model)
    preconditioner.inverse_period = 4

    def steps(first, last):
        for step in range(first, last):
            build.fails = step > 0
            one_step(model, preconditioner, *batch(seed=step))

    steps(0, 9)  # a third refresh after the first has its turn in the four steps from here
    with pytest.raises(LinAlgError, match="'2'"):
        steps(9, 13)


def test_failures_in_a_row_go_on_after_a_stop():
    model = network(4, 5, 3)
    preconditioner, build = failing(model)
    for fails in (False, True, True):
        build.fails = fails
        one_step(model, preconditioner, *batch())
    resumed, build = failing(model)
    resumed.load_state_dict(preconditioner.state_dict())
    build.fails = True
    with pytest.raises(LinAlgError, match="'2'"):
        one_step(model, resumed, *batch())


@pytest.mark.parametrize("structure", ["block-diagonal", "eigen", "block-tridiagonal"])
def test_singular_factors_with_hardly_any_damping_raise_in_the_third_refresh(structure):
    """A feature that is always zero, before a unit that never learns; and no NaN in a gradient before that."""
    model, (x, y) = network(4, 5, 3, activation=nn.ReLU), batch()
    model[0].bias.data[0] = -100.0
    x[:, 0] = 0.0
    preconditioner = preconditioned(model, structure=structure, damping=5e-324, inverse_period=1)

    def steps():
        for _ in range(3):
            came = one_step(model, preconditioner, x, y)
            assert all(bool(g.isfinite().all()) for g in came.values())

    with pytest.raises(LinAlgError, match="ikely causes"):
        steps()


# -- NaN and infinity --


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("structure", ["block-diagonal", "eigen", "block-tridiagonal"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("at", [0, 2])
def test_what_is_not_finite_never_enters_an_average(value, structure, estimator, at):
    """1e30 is finite, its square is not."""
    model = network(4, 5, 3, activation=nn.Sigmoid)
    preconditioner = preconditioned(model, estimator, structure=structure, inverse_period=1)
    for step in range(5):
        before = dense(preconditioner.layers)
        x, y = batch(seed=step)
        if step == at:
            x[3, 1] = value
        came = one_step(model, preconditioner, x, y)
        if step == at:
            assert_same(dense(preconditioner.layers), before)
        else:
            assert all(bool(g.isfinite().all()) for g in came.values())
    assert preconditioner.rejected == 1
    assert all(bool(M.isfinite().all()) for M in tree_flatten(dense(preconditioner.layers))[0])


def test_the_squares_of_an_eigenbasis_stay_finite():
    """A ~ 1e24 and G ~ 1e20 are finite; (g a)² ~ 1e44 is not."""
    torch.manual_seed(0)
    model, (x, _), weights = nn.Linear(4, 3, bias=False), batch(), torch.randn(12, 3)
    preconditioner = preconditioned(model, "empirical", structure="eigen", reduction="sum", inverse_period=1)
    for step in range(4):
        model.zero_grad()
        large = step == 1
        ((model(x * (1e12 if large else 1.0)) * weights).sum() * (1e10 if large else 1.0)).backward()
        if large:
            for p in model.parameters():
                p.grad.fill_(1.0)
        preconditioner.step()
    assert all(bool(S.isfinite().all()) for S in preconditioner._inverses.squares.values())
    assert all(bool(g.isfinite().all()) for g in gradients(model).values())


# -- what cannot be treated --


class Raw(nn.Module):
    def __init__(self):
        super().__init__()
        self.shift, self.layer = nn.Parameter(torch.zeros(4)), nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x + self.shift)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.layer = nn.LSTM(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(self.lstm(x)[0])


class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.bilinear, self.layer = nn.Bilinear(4, 4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.layer(self.bilinear(x, x))


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.spectrum, self.layer = nn.Linear(4, 4, dtype=torch.complex64), nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(self.spectrum(x.to(torch.complex64)).abs())


class Words(nn.Module):
    def __init__(self, embedding):
        super().__init__()
        self.embedding, self.layer = embedding, nn.Linear(4, 3)

    def forward(self, x):
        x = self.embedding((x.abs() * 3).long().clamp(max=6))
        return self.layer(x if x.ndim == 2 else x.mean(1))


class Normalised(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.one, self.norm, self.layer = nn.Linear(4, 4), norm, nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(self.norm(self.one(x).unflatten(1, (2, 2))).flatten(1))


class TiedConvolutions(nn.Module):
    def __init__(self, bias=False):
        super().__init__()
        self.one, self.two = (nn.Conv1d(2, 2, 3, padding=1, bias=bias) for _ in range(2))
        self.two.weight, self.layer = self.one.weight, nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(self.two(self.one(x.unflatten(1, (2, 2))).tanh()).flatten(1))


class TiedNorms(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.layer = nn.LayerNorm(4), nn.LayerNorm(4), nn.Linear(4, 3)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.layer(self.two(self.one(x).tanh()))


def frozen():
    model = network(4, 5, 3)
    model[0].weight.requires_grad_(False)
    return model


def lazy():
    return nn.Sequential(nn.Linear(4, 5), nn.LazyLinear(3))


def normed(wrap):
    return lambda: nn.Sequential(wrap(nn.Linear(4, 5)), nn.Linear(5, 3))


def old_weight_norm(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module)


UNTREATED = {
    "PReLU": (lambda: nn.Sequential(nn.Linear(4, 5), nn.PReLU(), nn.Linear(5, 3)), {"1.weight"}, "PReLU"),
    "LSTM": (
        Recurrent,
        {"lstm.weight_ih_l0", "lstm.weight_hh_l0", "lstm.bias_ih_l0", "lstm.bias_hh_l0"},
        "LSTM",
    ),
    "Bilinear": (Bilinear, {"bilinear.weight", "bilinear.bias"}, "Bilinear"),
    "Parameter": (Raw, {"shift"}, "Raw"),
    "weight_norm": (
        normed(parametrizations.weight_norm),
        {"0.bias", "0.parametrizations.weight.original0", "0.parametrizations.weight.original1"},
        "computed from|made of",
    ),
    "old weight_norm": (normed(old_weight_norm), {"0.bias", "0.weight_g", "0.weight_v"}, "computed from|made of"),
    "spectral_norm": (
        normed(parametrizations.spectral_norm),
        {"0.bias", "0.parametrizations.weight.original"},
        "computed from|made of",
    ),
    "LazyLinear": (lazy, {"1.weight", "1.bias"}, "not initialised"),
    "frozen weight": (frozen, {"0.bias"}, "frozen"),
    "sparse Embedding": (lambda: Words(nn.Embedding(7, 4, sparse=True)), {"embedding.weight"}, "sparse"),
    "by frequency": (
        lambda: Words(nn.Embedding(7, 4, scale_grad_by_freq=True)),
        {"embedding.weight"},
        "frequency",
    ),
    "EmbeddingBag": (lambda: Words(nn.EmbeddingBag(7, 4)), {"embedding.weight"}, "EmbeddingBag"),
    "SyncBatchNorm": (
        lambda: Normalised(nn.SyncBatchNorm(2)).eval(),
        {"norm.weight", "norm.bias"},
        "SyncBatchNorm",
    ),
    "InstanceNorm": (
        lambda: Normalised(nn.InstanceNorm1d(2, affine=True)),
        {"norm.weight", "norm.bias"},
        "InstanceNorm1d",
    ),
    "complex": (Complex, {"spectrum.weight", "spectrum.bias"}, "not real"),
    "tied convolutions": (TiedConvolutions, {"one.weight"}, "tied"),
    "tied normalisations": (TiedNorms, {"one.weight", "one.bias", "two.bias"}, "tied"),
    "tied convolutions with biases of their own": (
        lambda: TiedConvolutions(bias=True),
        {"one.weight", "one.bias", "two.bias"},
        "tied",
    ),
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", UNTREATED)
def test_what_it_cannot_treat_is_named_with_the_reason_in_one_warning_and_left_alone(name, estimator):
    make, skipped, reason = UNTREATED[name]
    torch.manual_seed(0)
    model, (x, y) = make(), batch()
    with pytest.warns(UserWarning, match="KFACPreconditioner leaves") as caught:
        preconditioner = preconditioned(model, estimator, damping=0.1)
    (warning,) = caught
    assert warning.filename == __file__
    assert preconditioner.skipped.keys() == skipped
    for parameter, why in preconditioner.skipped.items():
        assert parameter in str(warning.message)
        assert why in str(warning.message)
    assert re.search(reason, " ".join(preconditioner.skipped.values()))

    if name == "SyncBatchNorm":
        return  # it runs on an accelerator alone
    outputs = model(x)
    if estimator != "empirical":
        preconditioner.update(outputs)
    functional.cross_entropy(outputs, y).backward()
    before = gradients(model)
    preconditioner.step()
    for parameter, g in gradients(model).items():
        assert torch.equal(g.to_dense(), before[parameter].to_dense()) == (parameter in skipped), parameter


@pytest.mark.filterwarnings("ignore:KFACPreconditioner leaves")
@pytest.mark.parametrize("generator", [None, torch.Generator()])
@pytest.mark.parametrize(
    "make", [nn.Tanh, nn.PReLU, lambda: network(4, 3).requires_grad_(False), lambda: nn.Sequential(nn.LazyLinear(3))]
)
def test_a_model_with_nothing_to_precondition_is_refused(make, generator):
    with pytest.raises(ValueError, match=r"(nothing|no layer|no parameter|none)"):
        KFACPreconditioner(make(), likelihood="categorical", generator=generator)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_layer_that_is_not_used_or_only_sometimes(estimator):
    model = Partly()
    preconditioner = preconditioned(model, estimator, inverse_period=3)
    for step in range(10):
        x, y = batch(seed=step)
        model.zero_grad()
        outputs = model(x, rarely=step % 4 == 2)
        if estimator != "empirical":
            preconditioner.update(outputs)
        functional.cross_entropy(outputs, y).backward()
        V = gradients(model)
        preconditioner.step()
        U = gradients(model)
        assert V.keys() == U.keys()
        assert all(not torch.equal(V[name], U[name]) for name in V)
        assert ("rare" in preconditioner.layers) == (step >= 2)
    assert "idle" not in preconditioner.layers


def test_a_layer_that_comes_late_is_averaged_from_its_own_first_statistic():
    model = Partly()
    preconditioner = preconditioned(model, "exact")
    for step in range(5):
        one_step(model, preconditioner, *batch(seed=step))
    x, _ = batch(seed=9)
    outputs = model(x, rarely=True)
    preconditioner.update(outputs)
    preconditioner.step()
    a = functional.pad(model.layer(x).detach(), (0, 1), value=1.0)
    assert_near(preconditioner.layers["rare"].A, a.mT @ a / len(x))


def test_two_layers_with_one_bias():
    """It is a layer of its own, A = 1 and the G of both: its gradient is preconditioned once."""
    torch.manual_seed(0)
    model = network(4, 4, 4, 4)
    model[2].bias = model[0].bias
    preconditioner = preconditioned(model, "exact", damping=0.1)
    (x, y) = batch()
    before = [p.detach().clone() for p in model.parameters()]
    came = one_step(model, preconditioner, x, y)
    assert preconditioner.skipped == {}
    layers = preconditioner.layers
    G = layers["0.bias"].G + layers["2.bias"].G
    plain = network(4, 4, 4, 4)
    plain[2].bias = plain[0].bias
    for p, value in zip(plain.parameters(), before, strict=True):
        p.data.copy_(value)
    functional.cross_entropy(plain(x), y).backward()
    P = block_diagonal_inverse(Factors((LayerFactors(torch.ones(1, 1), G),)), 0.1**0.5)
    (expected,) = P @ (plain[0].bias.grad[:, None],)
    assert torch.allclose(came["0.bias"], expected[:, 0], rtol=1e-4, atol=1e-7)


def test_skip_leaves_a_module_alone():
    model = network(4, 5, 3)
    with pytest.warns(UserWarning, match=r"2\.weight.*by name"):
        preconditioner = preconditioned(model, skip=["2"])
    assert preconditioner.skipped.keys() == {"2.weight", "2.bias"}
    x, y = batch()
    backward(model, preconditioner, x, y)
    V = gradients(model)
    preconditioner.step()
    assert torch.equal(model[2].weight.grad, V["2.weight"])
    assert not torch.equal(model[0].weight.grad, V["0.weight"])


# -- misuse --

MISTAKES = [
    ({"estimator": "fisher"}, "estimator is 'fisher', expected one of"),
    ({"structure": "kfac"}, "structure is 'kfac', expected one of"),
    ({"reduction": "average"}, "reduction is 'average', expected one of"),
    ({"likelihood": "poisson"}, "likelihood is 'poisson', expected one of"),
    ({"likelihood": object()}, "lacks the methods"),
    ({"likelihood": None}, "likelihood"),
    ({"weight_sharing": "both"}, "weight_sharing"),
    ({"weight_sharing": {"0": "both"}}, "weight_sharing"),
    ({"weight_sharing": {"nothing": "reduce"}}, "weight_sharing names nothing"),
    ({"skip": ["nothing"]}, "skip.*nothing"),
    ({"skip": "0"}, "skip"),
    ({"damping": -1.0}, "damping"),
    ({"damping": math.nan}, "damping"),
    ({"damping": math.inf}, "damping"),
    ({"decay": 1.0}, "decay"),
    ({"decay": -0.1}, "decay"),
    ({"decay": math.nan}, "decay"),
    ({"statistics_period": 0}, "statistics_period"),
    ({"statistics_period": -2}, "statistics_period"),
    ({"inverse_period": 0}, "inverse_period"),
    ({"inverse_period": -2}, "inverse_period"),
    ({"inverse_period": 2.5}, "inverse_period"),
    ({"samples": 0}, "samples"),
    ({"samples": -1}, "samples"),
    ({"kl_clip": -1.0}, "kl_clip"),
    ({"kl_clip": math.nan}, "kl_clip"),
    ({"kl_lr": -1.0}, "kl_lr"),
    ({"pi_norm": "nuclear"}, "norm"),
    ({"rank": 0}, "rank"),
    ({"factor_dtype": torch.bfloat16}, "factor_dtype"),
    ({"factor_dtype": torch.int64}, "factor_dtype"),
    ({"structure": "eigen", "rank": 2}, "rank"),
    ({"structure": "block-tridiagonal", "rank": 2}, "rank"),
    ({"structure": "block-tridiagonal", "exact_damping": True}, "exact_damping"),
    ({"exact_damping": True, "rank": 2}, "rank"),
]


@pytest.mark.parametrize(
    ("options", "message"), MISTAKES, ids=[re.sub(" at 0x.*", "", str(options)) for options, _ in MISTAKES]
)
def test_a_wrong_option_is_refused_at_once_and_leaves_no_hook(options, message):
    model = network(4, 5, 3)
    before = attributes(model)
    with pytest.raises((ValueError, TypeError), match=message):
        KFACPreconditioner(model, **({"likelihood": "categorical"} | options))
    assert_untouched(model, before)


def test_a_wrong_keyword_is_refused():
    with pytest.raises(TypeError, match="learning_rate"):
        KFACPreconditioner(network(4, 3), likelihood="categorical", learning_rate=0.1)


def test_a_chain_of_other_layers_is_refused():
    with pytest.raises(ValueError, match=r"block-tridiagonal.*embedding"):
        preconditioned(Mixed(), structure="block-tridiagonal")


@pytest.mark.parametrize("name", ["damping", "inverse_period", "statistics_period", "kl_clip", "kl_lr"])
def test_what_a_callable_gives_is_checked_too(name):
    model = network(4, 5, 3)
    with pytest.raises(ValueError, match=name):  # noqa: PT012
        options = {"kl_clip": 1.0, "inverse_period": 1} | {name: lambda step: 1 if step < 2 else -1}
        preconditioner = preconditioned(model, **options)
        for step in range(4):
            one_step(model, preconditioner, *batch(seed=step))


@pytest.mark.parametrize("estimator", ["sampled", "exact"])
class TestUpdate:
    def test_twice(self, estimator):
        model, (x, _) = network(4, 3), batch()
        preconditioner = preconditioned(model, estimator)
        outputs = model(x)
        preconditioner.update(outputs)
        with pytest.raises((RuntimeError, ValueError), match="update"):
            preconditioner.update(outputs)

    def test_between_statistics_it_does_nothing_however_often(self, estimator):
        model, (x, y) = network(4, 3), batch()
        preconditioner = preconditioned(model, estimator, statistics_period=2)
        one_step(model, preconditioner, x, y)
        outputs = model(x)
        preconditioner.update(outputs)
        preconditioner.update(outputs)

    @pytest.mark.parametrize("other", ["model", "pass without gradients", "detached", "earlier pass"])
    def test_with_outputs_of_something_else(self, estimator, other):
        model, (x, y) = network(4, 3), batch()
        preconditioner = preconditioned(model, estimator)
        if other == "earlier pass":
            outputs = model(x)
            preconditioner.update(outputs)
            functional.cross_entropy(outputs, y).backward(retain_graph=True)
            preconditioner.step()
            model(x)
        elif other == "pass without gradients":
            with torch.no_grad():
                outputs = model(x)
        elif other == "detached":
            outputs = model(x).detach()
        else:
            model(x)
            outputs = network(4, 3, seed=1)(x)
        with pytest.raises((RuntimeError, ValueError), match=r"outputs|update"):
            preconditioner.update(outputs)

    @pytest.mark.parametrize("kind", [tuple, lambda z: {"logits": z}, lambda z: None])
    def test_with_what_is_no_tensor(self, estimator, kind):
        model, (x, _) = network(4, 3), batch()
        preconditioner = preconditioned(model, estimator)
        outputs = kind(model(x))
        with pytest.raises((TypeError, ValueError), match="outputs"):
            preconditioner.update(outputs)

    def test_after_the_backward_pass(self, estimator):
        """Its graph is gone: torch says so."""
        model, (x, y) = network(4, 5, 3), batch()
        preconditioner = preconditioned(model, estimator)
        outputs = model(x)
        functional.cross_entropy(outputs, y).backward()
        with pytest.raises(RuntimeError, match="backward"):
            preconditioner.update(outputs)

    def test_after_an_input_was_changed_in_place(self, estimator):
        model, (x, _) = network(4, 3), batch()
        preconditioner = preconditioned(model, estimator)
        outputs = model(x)
        x.mul_(2)
        with pytest.raises(RuntimeError, match="'0' were changed in place"):
            preconditioner.update(outputs)


def test_update_with_the_empirical_estimator():
    model = network(4, 3)
    preconditioner = preconditioned(model, "empirical")
    with pytest.raises(ValueError, match=r"'empirical' takes its statistics from loss.backward\(\)"):
        preconditioner.update(model(batch()[0]))


def test_an_input_changed_in_place_before_the_loss_s_own_backward_pass():
    """Where autograd itself has no need of it: the weight's gradient of a Linear whose weight is frozen later."""

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.Embedding(5, 3)

        def forward(self, tokens):
            return self.norm(tokens).sum(1)

    model, tokens = Sum(), torch.randint(5, (6, 2))
    preconditioner = preconditioned(model, "empirical")
    loss = functional.cross_entropy(model(tokens), torch.zeros(6, dtype=torch.int64))
    tokens.add_(0)
    with pytest.raises(RuntimeError, match=r"in place|inplace"):
        loss.backward()
    assert preconditioner.layers == {}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_step_before_anything_was_captured(estimator):
    missing = r"loss.backward\(\)" if estimator == "empirical" else r"update\(outputs\)"
    model = network(4, 3)
    preconditioner = preconditioned(model, estimator)
    with pytest.raises(RuntimeError, match=f"nothing was captured before step.*{missing}"):
        preconditioner.step()
    one_step(model, preconditioner, *batch())  # it is as before


# -- inputs --


def same_as_plain(model, call, expected_model=None, c=100, **options):
    """The factors, and that the outputs and gradients V are those without a preconditioner."""
    other = copy.deepcopy(model)
    preconditioner = preconditioned(model, "empirical", **options)
    outputs, expected = call(model), call(other)
    assert_near(outputs.detach(), expected.detach(), c)
    for z in (outputs, expected):
        z.square().mean().backward()
    assert_near(gradients(model), gradients(other), c)
    preconditioner.step()
    return preconditioner


def test_inputs_by_keyword():
    model, (x, y) = network(4, 3)[0], batch()
    runs = []
    for call in (lambda m: m(x), lambda m: m(input=x)):
        m = copy.deepcopy(model)
        preconditioner = preconditioned(m, "exact")
        outputs = call(m)
        preconditioner.update(outputs)
        functional.cross_entropy(outputs, y).backward()
        preconditioner.step()
        runs.append((gradients(m), dense(preconditioner.layers)))
    assert_same(*runs)


def test_a_keyword_may_come_before_the_input():
    torch.manual_seed(0)
    model = nn.ConvTranspose1d(2, 3, 3, stride=2)
    x = torch.randn(4, 2, 5)
    preconditioner = same_as_plain(model, lambda m: m(output_size=None, input=x))
    assert set(preconditioner.layers) == {""}


class Several(nn.Module):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.one, self.two = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, x, *, other, flag=True):
        return self.one(x) + self.two(other)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_several_inputs(estimator):
    model, (x, y), other = Several(), batch(), batch(features=2)[0]
    preconditioner = preconditioned(model, estimator)
    outputs = model(x, other=other)
    if estimator != "empirical":
        preconditioner.update(outputs)
    functional.cross_entropy(outputs, y).backward()
    g = 12 * torch.autograd.grad(functional.cross_entropy(z := outputs.detach().requires_grad_(), y), z)[0]
    preconditioner.step()
    a = functional.pad(other, (0, 1), value=1.0)
    assert_near(preconditioner.layers["two"].A, a.mT @ a / 12)
    if estimator == "empirical":
        assert_near(preconditioner.layers["two"].G, g.mT @ g / 12)


@pytest.mark.parametrize("container", [lambda x, o: [x, o], lambda x, o: {"x": x, "other": o}])
def test_inputs_in_a_list_or_a_dictionary(container):
    class Unpacks(Several):
        def forward(self, inputs):
            x, other = inputs.values() if isinstance(inputs, dict) else inputs
            return super().forward(x.unflatten(0, (-1, 2)), other=other.unflatten(0, (-1, 2))).flatten(0, 1)

    model, (x, y), other = Unpacks(), batch(), batch(features=2)[0]
    preconditioner = preconditioned(model, "exact")
    outputs = model(container(x, other))
    preconditioner.update(outputs)
    functional.cross_entropy(outputs, y).backward()
    preconditioner.step()
    a = functional.pad(other, (0, 1), value=1.0)
    assert_near(preconditioner.layers["two"].A, a.mT @ a / 12)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("structure", ["block-diagonal", "eigen", "block-tridiagonal"])
def test_a_batch_of_one(estimator, structure):
    model = network(4, 5, 3)
    preconditioner = preconditioned(model, estimator, structure=structure, damping=0.1)
    x, y = batch(1)
    came = one_step(model, preconditioner, x, y)
    assert all(bool(g.isfinite().all()) for g in came.values())
    a = functional.pad(x, (0, 1), value=1.0)
    assert_near(preconditioner.layers["0"].A, a.mT @ a)


def test_an_empty_batch_leaves_the_averages():
    model = network(4, 3)
    preconditioner = preconditioned(model, "empirical")
    one_step(model, preconditioner, *batch())
    before = dense(preconditioner.layers)
    x, y = batch(0)
    model.zero_grad()
    functional.cross_entropy(model(x), y, reduction="sum").backward()
    preconditioner.step()
    assert_same(dense(preconditioner.layers), before)


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_unbatched_inputs_are_a_batch_of_one(estimator):
    runs = []
    x = batch(1)[0]
    for z in (x, x[0]):
        model = network(4, 5, 3)
        preconditioner = preconditioned(model, estimator, "gaussian")
        outputs = model(z)
        if estimator == "exact":
            preconditioner.update(outputs)
        (0.5 * outputs.square().sum()).backward()
        preconditioner.step()
        runs.append((gradients(model), dense(preconditioner.layers)))
    assert_near(runs[1], runs[0])


def test_an_unbatched_image_is_a_batch_of_one():
    runs = []
    torch.manual_seed(0)
    x, first = torch.randn(1, 2, 5, 5), nn.Conv2d(2, 3, 3)
    for z in (x, x[0]):
        model = copy.deepcopy(first)
        preconditioner = preconditioned(model, "empirical")
        (0.5 * model(z).square().sum()).backward()
        preconditioner.step()
        runs.append((gradients(model), dense(preconditioner.layers)))
    assert_near(runs[1], runs[0])


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ELU, nn.Hardtanh])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_activation_in_place(activation, estimator):
    runs = []
    for inplace in (False, True):
        model = network(4, 8, 6, 3, activation=lambda inplace=inplace: activation(inplace=inplace))
        preconditioner = preconditioned(model, estimator)
        runs.append((one_step(model, preconditioner, *batch()), dense(preconditioner.layers)))
    assert_near(*runs, c=1000)


def test_a_backward_hook_of_the_user_stays():
    model, (x, y), seen = network(4, 3), batch(), []
    model[0].register_full_backward_hook(lambda module, g_in, g_out: seen.append(g_out[0].shape))
    preconditioner = preconditioned(model, "empirical")
    one_step(model, preconditioner, x.requires_grad_(), y)
    preconditioner.remove()
    assert seen == [(12, 3)]
    assert len(model[0]._backward_hooks) == 1


def test_a_functional_call_under_a_transform_is_left_alone():
    """`torch.func` gradients of a model with hooks, as for a neural tangent kernel."""
    model, (x, y) = network(4, 5, 3), batch()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters):
        return functional.cross_entropy(torch.func.functional_call(model, parameters, (x,)), y)

    expected = torch.func.grad(loss)(parameters)
    preconditioned(model, "empirical")
    assert_same(torch.func.grad(loss)(parameters), expected)


# -- with the optimizers of torch --


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "Adagrad", "RMSprop"])
@pytest.mark.parametrize("structure", ["block-diagonal", "eigen", "block-tridiagonal"])
def test_any_optimizer_takes_the_gradients_and_a_scheduler_its_learning_rate(optimizer, structure):
    model, (x, y) = network(4, 8, 3), batch(48)
    rate = {"SGD": 0.5, "Adagrad": 0.1}.get(optimizer, 0.02)
    optimizer = getattr(torch.optim, optimizer)(model.parameters(), lr=rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40, eta_min=0.1 * rate)
    preconditioner = preconditioned(model, structure=structure, damping=0.1, inverse_period=5)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        outputs = model(x)
        preconditioner.update(outputs)
        loss = functional.cross_entropy(outputs, y)
        loss.backward()
        preconditioner.step()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * rate)


def test_one_step_on_a_gaussian_model_is_the_natural_gradient():
    """A linear model: G = I, so that a step with rate 1 solves the least-squares problem."""
    torch.manual_seed(0)
    x = torch.randn(50, 3)
    target = x @ torch.randn(3, 2) + 1
    model = nn.Linear(3, 2)
    preconditioner = preconditioned(model, "exact", "gaussian", damping=1e-12)
    one_step(model, preconditioner, x, target, loss=lambda z, t: 0.5 * (z - t).square().sum() / len(z))
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    torch.testing.assert_close(model(x), target, rtol=1e-4, atol=1e-4)


# -- memory --


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("structure", "N"), [("block-diagonal", 4), ("eigen", 64)])  # 4: with outer products
def test_nothing_of_a_step_lives_longer_and_nothing_grows(estimator, structure, N):
    """Without the help of the garbage collector, which knows nothing of an accelerator's memory."""
    model = network(16, 16, 3)
    preconditioner = preconditioned(model, estimator, structure=structure, inverse_period=2)
    outputs = [stored(module) for module in model]
    counts = []
    gc.collect()
    gc.disable()
    try:
        for step in range(50):
            x, y = batch(N, 16, seed=step)
            backward(model, preconditioner, x, y)
            preconditioner.step()
            model.zero_grad()
            assert all(storage.expired() for storages in outputs for storage in storages)
            del x, y
            if step in (9, 29, 49):
                counts.append(sum(issubclass(type(t), torch.Tensor) for t in gc.get_objects()))
    finally:
        gc.enable()
    assert counts[0] == counts[1] == counts[2]
    assert preconditioner._capture.uses == []


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_passes_that_nobody_updates_or_backpropagates_do_not_pile_up(estimator):
    """Validation with gradients enabled, say: after a step nothing is left of them."""
    model = network(16, 16, 3)
    preconditioner = preconditioned(model, estimator)
    storages = stored(model[1])
    for step in range(3):
        x, y = batch(64, 16, seed=step)
        backward(model, preconditioner, x, y)
        model(x)
        preconditioner.step()
    gc.collect()
    assert len(storages) == 6
    assert all(storage.expired() for storage in storages)


def test_steps_without_a_statistic_keep_nothing():
    model = network(16, 16, 3)
    preconditioner = preconditioned(model, statistics_period=100)
    x, y = batch(64, 16)
    one_step(model, preconditioner, x, y)
    model(x)
    assert preconditioner._capture.uses == []


# -- transformers --


def encoder_layer(**options):
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(8, 2, 12, **({"batch_first": True} | options))


def padding(N=3, L=5):
    mask = torch.zeros(N, L, dtype=torch.bool)
    mask[0, 3:] = True
    return mask


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_an_encoder_layer_in_training_gives_the_same(batch_first, norm_first, masked, dropout):
    """Outputs and gradients, with the same random numbers too."""
    model = encoder_layer(batch_first=batch_first, norm_first=norm_first, dropout=dropout)
    other = copy.deepcopy(model)
    preconditioner = preconditioned(model, "empirical")
    x, weights = torch.randn(3, 5, 8), torch.randn(8)
    mask = padding() if masked else None
    runs = []
    for m in (model, other):
        torch.manual_seed(1)
        z = m(x if batch_first else x.transpose(0, 1), src_key_padding_mask=mask)
        (z * weights).sum().backward()
        runs.append((z.detach(), gradients(m), torch.rand(1)))
    assert_near(*runs, c=1000)
    preconditioner.step()
    names = {f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    assert set(preconditioner.layers) == names | {"linear1", "linear2", "norm1", "norm2"}


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_fast_path_in_evaluation_gives_the_same(depth, masked, mode):
    """`TransformerEncoder` makes nested tensors of padded sequences there."""
    model = encoder_layer(dropout=0.0)
    if depth:
        model = nn.TransformerEncoder(model, depth)
    model.eval()
    other = copy.deepcopy(model)
    preconditioned(model, "empirical")
    x, options = torch.randn(3, 5, 8), {"src_key_padding_mask": padding()} if masked else {}
    with mode(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of nested tensors is in prototype stage")
        expected, came = other(x, **options), model(x, **options)
    kept = slice(None) if not masked else ~padding()  # what is padded is nobody's
    assert_near(came[kept].detach(), expected[kept].detach())


def test_the_fast_path_is_back_after_remove():
    model = encoder_layer(dropout=0.0).eval()
    other = copy.deepcopy(model)
    preconditioned(model, "empirical").remove()
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        assert torch.equal(model(x), other(x))


def test_a_whole_transformer_trains():
    torch.manual_seed(0)
    model = nn.Transformer(8, 2, 1, 1, 12, dropout=0.0, batch_first=True)
    other = copy.deepcopy(model)
    preconditioner = preconditioned(model, "empirical", damping=0.1)
    source, target, weights = torch.randn(3, 5, 8), torch.randn(3, 4, 8), torch.randn(8)
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    runs = []
    for m in (model, other):
        z = m(source, target, tgt_mask=mask, tgt_is_causal=True)
        (z * weights).sum().backward()
        runs.append((z.detach(), gradients(m)))
    assert_near(*runs, c=1000)
    preconditioner.step()
    assert preconditioner.skipped == {}
    assert all(bool(g.isfinite().all()) for g in gradients(model).values())


def test_a_likelihood_of_ones_own_in_the_exact_factor():
    class Half:
        def loss(self, outputs, targets):
            return Gaussian().loss(outputs, targets) * 2

        def sample(self, outputs, generator):
            return Gaussian().sample(outputs, generator)

        def fisher_product(self, outputs, tangents):
            return 2 * tangents

    model, (x, _) = network(4, 3), batch()
    preconditioner = preconditioned(model, "exact", Half())
    outputs = model(x)
    preconditioner.update(outputs)
    outputs.square().mean().backward()
    preconditioner.step()
    assert_near(preconditioner.layers["0"].G, 2 * torch.eye(3))
