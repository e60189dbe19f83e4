"""States that were changed: each is refused, with nothing changed, or a run can go on from it."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_leaves

from kfaclinalg_torch import KFAC, KFACPreconditioner

x = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
y = torch.randint(3, (12,), generator=torch.Generator().manual_seed(0))


class Trained:
    """A model under `KFAC`, or under a preconditioner with these options."""

    def __init__(self, kind, **options):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        known = {"likelihood": "categorical"} | options
        self.held = kind(self.model, **known)

    def step(self):
        if isinstance(self.held, KFAC):
            self.held.step(x, y)
            return
        self.model.zero_grad()
        outputs = self.model(x)
        self.held.update(outputs)
        nn.functional.cross_entropy(outputs, y).backward()
        self.held.step()


RUNS = {
    "KFAC": lambda: Trained(KFAC),
    "KFAC, block-tridiagonal": lambda: Trained(KFAC, structure="block-tridiagonal"),
    "explicit": lambda: Trained(KFACPreconditioner, inverse_period=2),
    "cholesky": lambda: Trained(KFACPreconditioner, inverse_period=1),
    "eigen": lambda: Trained(KFACPreconditioner, structure="eigen"),
    "block-tridiagonal": lambda: Trained(KFACPreconditioner, structure="block-tridiagonal"),
    "low rank": lambda: Trained(KFACPreconditioner, rank=2),
}
ODD = [
    *(None, "odd", -1, 0, 7, math.nan, math.inf, [], {}, [1.0], {"a": 1}, True),
    *(torch.ones(2, 3), torch.ones(5, 5), torch.ones(()), torch.ones(5, 5, dtype=torch.int64)),
]


def places(value, at=()):
    """The path of every item."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*at, key)
        yield from places(item, (*at, key))


def mutate(data, state):
    path = data.draw(st.sampled_from(list(places(state))))
    parent = state
    for key in path[:-1]:
        parent = parent[key]
    how = data.draw(st.sampled_from(["replaced", "replaced", "removed", "doubled"]))
    if how == "replaced":
        parent[path[-1]] = data.draw(st.sampled_from(ODD))
    elif how == "removed":
        del parent[path[-1]]
    elif isinstance(parent, list):
        parent.append(parent[path[-1]])
    else:
        parent["more"] = parent[path[-1]]


def same(one, other):
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(tree_leaves(one), tree_leaves(other), strict=True)
    )


@pytest.mark.parametrize("make", RUNS.values(), ids=RUNS)
def test_a_changed_state_is_refused_or_can_be_gone_on_from(make, request):
    run = make()
    for _ in range(3):
        run.step()
    good = copy.deepcopy(run.held.state_dict())

    @settings(max_examples=max(20, request.config.getoption("--fuzz") // 10), deadline=None, database=None)
    @given(data=st.data())
    def check(data):
        state = copy.deepcopy(good)
        mutate(data, state)
        run.held.load_state_dict(copy.deepcopy(good))
        try:
            run.held.load_state_dict(state)
        except ValueError:
            assert same(run.held.state_dict(), good)
        else:
            run.step()

    check()
    run.held.load_state_dict(good)
    run.step()


def test_the_state_of_another_structure_is_refused():
    one, other = RUNS["KFAC"](), RUNS["KFAC, block-tridiagonal"]()
    one.step()
    other.step()
    for a, b in ((one, other), (other, one)):
        with pytest.raises(ValueError, match="the state was made with structure"):
            a.held.load_state_dict(b.held.state_dict())
