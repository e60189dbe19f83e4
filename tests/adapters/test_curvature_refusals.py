"""What `fit_curvature`, `Curvature` and `FisherOperator` refuse, by name."""

from functools import partial

import numpy as np
import pytest
import torch
from curvature_cases import Case, K, N, Sum

from kfaclinalg import KroneckerEigen
from kfaclinalg_torch import (
    Empirical,
    FisherOperator,
    curvlinops_operator,
    fit_curvature,
    gpytorch_operator,
    load_curvature,
)

pytestmark = pytest.mark.filterwarnings("ignore:fit_curvature takes the diagonal")


def test_loaders_that_hold_no_pairs_are_refused():
    case = Case("mlp")
    with pytest.raises(ValueError, match="loader is empty"):
        fit_curvature(case.model, "categorical", [], progress=False)
    with pytest.raises(TypeError, match="loader gives a Tensor, expected pairs"):
        fit_curvature(case.model, "categorical", [case.x], progress=False)
    for of in (FisherOperator, partial(fit_curvature, structure="eigen", progress=False)):
        with pytest.raises(TypeError, match="loader is a list_iterator, of one pass"):
            of(case.model, "categorical", iter(case.loader()))
    with pytest.raises(ValueError, match="loader is empty"):
        FisherOperator(case.model, "categorical", [])


def test_mistakes_are_refused():
    case = Case("mlp")
    curvature = case.fit()
    for delta, what in (
        (0.0, "delta is 0.0"),
        (-1, "delta is -1"),
        ([1.0], "delta has 1 items"),
        (float("inf"), "delta is inf"),
    ):
        with pytest.raises(ValueError, match=what):
            curvature.shifted(delta)
    for bad in (0.0, -1):
        with pytest.raises(ValueError, match="delta is"):
            curvature.logdet(bad)
        with pytest.raises(ValueError, match="scale is"):
            curvature.logdet(1.0, scale=bad)
    for bad in (0, -1.0):
        for of in (curvature.self_scores, lambda x, **k: curvature.scores(x, x, **k)):
            with pytest.raises(ValueError, match=rf"damping is {bad}, expected a number > 0"):
                of(case.loader(), damping=bad)
        for of in (curvature.sample, lambda **k: curvature.variances(case.x, **k)):
            with pytest.raises(ValueError, match=rf"delta is {bad}, expected a number > 0"):
                of(delta=bad)
    for bad in (-1.0, float("nan")):
        for of in (partial(curvature.shifted, 1.0), curvature.sample, partial(curvature.variances, case.x)):
            with pytest.raises(ValueError, match=f"scale is {bad}, expected a number >= 0"):
                of(scale=bad)
    with pytest.raises(ValueError, match="queries is empty"):
        curvature.scores([], case.loader())
    with pytest.raises(ValueError, match="examples is empty"):
        curvature.self_scores([])
    with pytest.raises(ValueError, match="inputs is empty"):
        curvature.variances([])
    narrow = (case.x[:, :3], case.y)
    for of in (
        lambda: fit_curvature(case.model, "categorical", narrow, progress=False),
        lambda: FisherOperator(case.model, "categorical", narrow),
        FisherOperator(case.model, "categorical", [*case.loader(), narrow]).gradient,
        lambda: curvature.scores(narrow, case.loader()),
        lambda: curvature.scores(case.loader(), narrow),
        lambda: curvature.self_scores(narrow),
        lambda: curvature.variances(narrow[0]),
    ):
        with pytest.raises(ValueError, match=r"the model does not take inputs of shapes \[\(20, 3\)\]"):
            of()
    with pytest.raises(ValueError, match="inputs and targets have"):
        curvature.scores((case.x, case.y[:3]), case.loader())
    with pytest.raises(TypeError, match="queries gives a Tensor, expected pairs"):
        curvature.scores(case.x, case.loader())
    with pytest.raises(ValueError, match=r"tensors lack 2\.bias"):
        curvature.pack({k: v for k, v in case.parameters.items() if k != "2.bias"})
    with pytest.raises(ValueError, match=r"'0\.bias' has shape"):
        curvature.pack(case.parameters | {"0.bias": torch.ones(2)})
    with pytest.raises(TypeError, match="tensors is a list, expected a dictionary"):
        curvature.pack(list(case.parameters.values()))
    with pytest.raises(TypeError, match="generator is 0, expected"):
        curvature.sample(0)
    for options, what in (({"damping": 1.0}, "unknown options damping"), ({"generator": 0}, "generator is 0")):
        with pytest.raises(TypeError, match=what):
            case.fit(**options)
    with pytest.raises(ValueError, match="Vs have shapes"):
        curvature.unpack([torch.ones(2, 2)])
    with pytest.raises(ValueError, match="expected one of"):
        curvature.projection("middle")
    with pytest.raises(TypeError, match="mask is a Tensor, expected a function"):
        case.fit(mask=torch.ones(N, dtype=torch.bool))
    for of in (gpytorch_operator, curvlinops_operator):
        with pytest.raises(TypeError, match="operator is a Curvature, expected a FisherOperator, a BlockDiagonal or"):
            of(curvature)
    with pytest.raises(ValueError, match="Vs have shapes"):
        FisherOperator(case.model, "categorical", case.loader()) @ (torch.ones(2, 2),)
    assert isinstance(curvature.eigen[0], KroneckerEigen)
    assert fit_curvature(case.model, "categorical", case.loader(), estimator=Empirical(), progress=True).examples == N


@pytest.mark.parametrize("bad", ["a", None, True, 1j, {}, [1.0, "a"], torch.ones(2, 2), np.ones(2)], ids=repr)
def test_what_is_no_number_is_refused_by_name(bad):
    case = Case("mlp")
    curvature, F = case.fit(), FisherOperator(case.model, "categorical", case.loader())
    for name, of in {
        "delta": (curvature.shifted, curvature.logdet, lambda x: curvature.sample(delta=x)),
        "scale": (lambda x: curvature.shifted(1.0, scale=x), lambda x: curvature.logdet(1.0, scale=x)),
        "energy": (partial(curvature.projection, "top"),),
        "damping": (F.as_scipy, lambda x: gpytorch_operator(F, x), lambda x: curvlinops_operator(F, x)),
    }.items():
        for f in of:
            with pytest.raises((TypeError, ValueError), match=f"^{name} (is|has)"):
                f(bad)


def test_what_is_of_another_kind_is_refused_by_name(tmp_path):
    case = Case("mlp")
    curvature, F = case.fit(), FisherOperator(case.model, "categorical", case.loader())
    for name, f in {
        "loader": lambda: fit_curvature(case.model, "categorical", 3),
        "queries": lambda: curvature.scores(None, case.loader()),
        "inputs": lambda: curvature.variances(3),
        "tensors": lambda: curvature.pack([case.x]),
        r"'0\.bias'": lambda: curvature.pack({k: p.numpy() if p.ndim == 1 else p for k, p in case.parameters.items()}),
        "Vs": lambda: F @ 3,
        "generator": lambda: curvature.sample(3),
    }.items():
        with pytest.raises(TypeError, match=f"^{name} is"):
            f()
    with pytest.raises(ValueError, match=r"offload is 'nowhere', expected a torch\.device"):
        case.fit(offload="nowhere")
    with pytest.raises(TypeError, match="generator is 3, expected"):
        case.fit(generator=3)
    with pytest.raises(ValueError, match="Vs have shapes"):
        curvature.unpack(torch.ones(2, 2))
    (tmp_path / "nothing.pt").write_text("nothing")
    with pytest.raises(ValueError, match=r"nothing\.pt is no state that Curvature\.save wrote"):
        load_curvature(tmp_path / "nothing.pt", case.model, "categorical")
    model = Sum()
    x, y = torch.randn(N, 4), torch.randint(K, (N,))
    two = fit_curvature(model, "categorical", ((x, x), y), progress=False)
    with pytest.raises(ValueError, match="the model does not take inputs of shapes"):
        two.variances((x, x))  # a pair of inputs and targets
