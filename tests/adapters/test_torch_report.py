"""What `Watch` writes down and the page of `report`, against what is computed beside them."""

import math
import re

import numpy as np
import pytest
import torch
from torch import nn

from kfaclinalg_torch import KFAC, KFACPreconditioner, Watch, report


@pytest.fixture
def data():
    torch.manual_seed(0)
    return torch.randn(64, 4), torch.randint(3, (64,))


def network(extra=False):
    torch.manual_seed(1)
    layers = [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)]
    return nn.Sequential(*layers[:1], Shift(), *layers[1:]) if extra else nn.Sequential(*layers)


class Shift(nn.Module):
    """A parameter that no rule knows."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(5))

    def forward(self, x):
        return x + self.shift


def trained(data, *, watched, steps=4, **options):
    """The model and what it was trained by; the gradients and updates of the layers as they were seen from outside."""
    x, y = data
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    own = KFACPreconditioner(model, likelihood="categorical", generator=torch.Generator().manual_seed(0), **options)
    taker, seen = Watch(own) if watched else own, []
    for _ in range(steps):
        optimizer.zero_grad()
        outputs = model(x)
        taker.update(outputs)
        nn.functional.cross_entropy(outputs, y).backward()
        before = [p.grad.clone() for p in model[0].parameters()]
        taker.step()
        seen.append((before, [p.grad.clone() for p in model[0].parameters()]))
        optimizer.step()
    return model, taker, seen


def norm(parts):
    return float(np.sqrt(sum(float(p.double().square().sum()) for p in parts)))


def test_watching_changes_nothing_and_writes_down_the_lengths(data):
    plain, _, _ = trained(data, watched=False, statistics_period=1)
    model, watch, seen = trained(data, watched=True, statistics_period=1)
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)
    for record, (before, after) in zip(watch.history, seen, strict=True):
        assert record["gradient/0"] == pytest.approx(norm(before), rel=1e-12)
        assert record["update/0"] == pytest.approx(norm(after), rel=1e-12)
        inner = sum(float((g.double() * u.double()).sum()) for g, u in zip(before, after, strict=True))
        assert record["cosine/0"] == pytest.approx(inner / norm(before) / norm(after), rel=1e-9)
        assert 0 < record["cosine/0"] < 0.999
        assert {name for name in record if "seconds" in name} == {
            f"seconds/{task}" for task in ("update", "averages", "refresh", "products")
        }
        assert all(record[name] >= 0 for name in record if "seconds" in name)
    assert "average" not in vars(watch.optimizer._estimate)  # nothing is left of the clock


def cells(page, name):
    return (
        re.search(rf"<tr><td>{name}</td>(.*?)</tr>", page)
        .group(1)
        .removesuffix("</td>")
        .removeprefix("<td>")
        .split("</td><td>")
    )


@pytest.mark.parametrize("damping", [1e-3, 1e6])
def test_the_page_says_where_the_damping_lies(data, tmp_path, damping):
    _, watch, _ = trained(data, watched=True, damping=damping)
    report(watch.optimizer, tmp_path / "page.html", watch)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    for name, (A, G) in watch.optimizer.layers.items():
        a, g = (np.linalg.eigvalsh(M.double().numpy()) for M in (A, G))
        n, m, cond_A, cond_G, largest, lam, below = cells(page, name)
        assert (int(n), int(m)) == (len(a), len(g))
        assert float(cond_A) == pytest.approx(a[-1] / a[0], rel=0.06)
        if name == "0":  # the other's G is singular to rounding: softmax
            assert float(cond_G) == pytest.approx(g[-1] / g[0], rel=0.06)
        assert float(largest) == pytest.approx(a[-1] * g[-1], rel=0.06)
        assert float(lam) == pytest.approx(damping, rel=0.06)
        assert below == f"{np.mean(np.outer(a, g) < damping):.0%}"
    assert ("the direction there is the gradient" in page) == (damping == 1e6)


def test_the_page_needs_nothing_else_and_names_what_is_left_alone(data, tmp_path):
    x, y = data
    model = network(extra=True)
    with pytest.warns(UserWarning, match="shift"):
        preconditioner = KFACPreconditioner(model, likelihood="categorical")
    outputs = model(x)
    preconditioner.update(outputs)
    nn.functional.cross_entropy(outputs, y).backward()
    preconditioner.step()
    report(preconditioner, str(tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<td>1.shift</td>" in page
    assert not re.search(r'(src|href)="http|<script|@import', page.replace("xmlns", ""))


def test_kfac_is_watched_too_and_a_refused_step_is_counted(data, tmp_path):
    x, y = data
    calls, optimizer = [], KFAC(network(), "categorical")
    watch = Watch(optimizer, lambda step, record: calls.append((step, record)))
    for k in range(6):
        loss = watch.step(x * math.nan if k == 3 else x, y)
        assert loss == optimizer.info.loss or k == 3
    assert [step for step, _ in calls] == list(range(6))
    assert [record["refused"] for record in watch.history] == [0, 0, 0, 1, 0, 0]
    assert watch.history[5]["gamma"] == optimizer.info.gamma
    report(optimizer, tmp_path / "page.html", watch)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "1 of 6 steps were refused." in page
    assert page.count("<svg") == 2


def test_mistakes(data, tmp_path):
    model = network()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="SGD, expected KFAC"):
        Watch(sgd)
    with pytest.raises(TypeError, match="SGD, expected KFAC"):
        report(sgd, tmp_path / "page.html")
    with pytest.raises(ValueError, match="take a step first"):
        report(KFAC(model, "categorical"), tmp_path / "page.html")
    with pytest.raises(TypeError, match="no update"):
        Watch(KFAC(model, "categorical")).update(model(data[0]))
    assert not (tmp_path / "page.html").exists()
