"""What `Watch` writes down and the page of `report`, against what is computed beside them."""

import math
import re

import numpy as np
import pytest
import torch
from torch import nn

from kfaclinalg_torch import KFAC, KFACPreconditioner, Relative, Watch, report


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


def test_the_page_shows_the_damping_of_the_last_step(data, tmp_path):
    _, watch, _ = trained(data, watched=True, damping=lambda step: 10.0**-step)
    report(watch.optimizer, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert float(cells(page, "0")[5]) == pytest.approx(1e-3)


def test_the_page_shows_the_damping_of_ekfac_by_its_own_eigenvalues(data, tmp_path):
    x, y = data
    uneven = torch.where(torch.arange(len(x))[:, None] % 8 == 0, 6.0, 0.2) * x, y
    _, watch, _ = trained(uneven, watched=True, structure="eigen", damping=Relative(0.1))
    report(watch.optimizer, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    eigenvalues, rows = watch.optimizer._inverses.fitted["0"].eigenvalues, watch.optimizer._estimate.averages.rows["0"]
    m, n = eigenvalues.shape
    expected = ((0.1 + (n - 1) / rows) * (0.1 + (m - 1) / rows)) ** 0.5 * float(eigenvalues.mean())
    assert float(cells(page, "0")[5]) == pytest.approx(expected, rel=0.06)
    A, G = watch.optimizer.layers["0"]
    assert float(eigenvalues.mean()) < 0.85 * float(A.diagonal().mean() * G.diagonal().mean())


def test_the_eigenvalues_of_groups_are_those_of_each(data, tmp_path):
    x, y = data
    model = nn.Sequential(nn.Unflatten(1, (4, 1)), nn.Conv1d(4, 6, 1, groups=2), nn.Flatten(), nn.Linear(6, 3))
    with torch.no_grad():
        model[3].weight[:, :3] *= 10  # the group of the small inputs has the large gradients
    preconditioner = KFACPreconditioner(model, likelihood="categorical", damping=1e-2)
    outputs = model(x * torch.tensor([0.1, 0.1, 3.0, 3.0]))
    preconditioner.update(outputs)
    nn.functional.cross_entropy(outputs, y).backward()
    preconditioner.step()
    report(preconditioner, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    A, G = (M.double().numpy() for M in preconditioner.layers["1"])
    products = [np.outer(np.linalg.eigvalsh(a), np.linalg.eigvalsh(g)) for a, g in zip(A, G, strict=True)]
    *_, largest, _, below = cells(page, "1")
    assert float(largest) == pytest.approx(np.max(products), rel=0.06)
    assert below == f"{np.mean(np.array(products) < 1e-2):.0%}"


def test_a_state_that_was_loaded_has_a_page(data, tmp_path):
    x, y = data
    first, second = (KFAC(network(), "categorical") for _ in range(2))
    first.step(x, y)
    second.load_state_dict(first.state_dict())
    report(second, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert float(cells(page, "0")[5]) == pytest.approx(second.state_dict()["state"]["gamma"] ** 2, rel=0.06)


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


def test_watching_kfac_changes_nothing(data):
    plain, watched = (KFAC(network(), "categorical", generator=torch.Generator().manual_seed(0)) for _ in range(2))
    watch = Watch(watched)
    for _ in range(3):
        assert plain.step(*data) == watch.step(*data)
    assert all(map(torch.equal, plain.model.parameters(), watched.model.parameters()))


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
    tasks = {name for name in watch.history[5] if "seconds" in name}
    assert tasks == {f"seconds/{task}" for task in ("gradient", "statistics", "curvature", "loss", "inverses")}
    assert all(watch.history[5][name] > 0 for name in tasks)
    assert "_problem" not in vars(optimizer)  # nothing is left of the clock
    report(optimizer, tmp_path / "page.html", watch)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "1 of 6 steps were refused." in page
    assert "<th>γ²</th><th>below γ²</th>" in page
    assert "<td>statistics</td>" in page
    assert page.count("<svg") == 2


def test_mistakes(data, tmp_path):
    model = network()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="SGD, expected KFAC"):
        Watch(sgd)
    with pytest.raises(TypeError, match=r"callback is 'log\.txt', expected a function"):
        Watch(KFAC(model, "categorical"), "log.txt")
    with pytest.raises(TypeError, match="the step of KFACPreconditioner takes no arguments"):
        Watch(KFACPreconditioner(model, likelihood="categorical")).step(*data)
    with pytest.raises(TypeError, match="SGD, expected KFAC"):
        report(sgd, tmp_path / "page.html")
    with pytest.raises(ValueError, match="take a step first"):
        report(KFAC(model, "categorical"), tmp_path / "page.html")
    with pytest.raises(TypeError, match="no update"):
        Watch(KFAC(model, "categorical")).update(model(data[0]))
    assert not (tmp_path / "page.html").exists()
