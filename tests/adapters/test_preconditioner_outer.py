"""The outer form of a step is taken where it holds, and gives the dense one."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from dense_layers import Case, by_group, factored, gradient, judge_step, losses, moments
from torch import Tensor, nn

from kfaclinalg import Kronecker

pytestmark = pytest.mark.usefixtures("double")


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
