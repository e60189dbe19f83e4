import math

import numpy as np
import pytest
import torch
from backends import JAX, NUMPY, STRICT, TORCH, TORCH_FLOAT32, Backend

from kfaclinalg import (
    Factored,
    Factors,
    KFACOptions,
    LayerFactors,
    OuterProduct,
    _best_step,
    batch_factors,
    kfac_step,
    testing,
)


class LinearRegression:
    """h(W) = ½ mean ‖W a - y‖², a quadratic with F = A ⊗ I: the only layer's Fisher matrix is known exactly."""

    def __init__(self, b: Backend, seed: int = 0, N: int = 30, n: int = 4, m: int = 3) -> None:
        rng = np.random.default_rng(seed)
        self.b, self.N, self.shape = b, N, (m, n)
        self.a, self.y = rng.standard_normal((N, n)) * 2.0 ** np.arange(n), rng.standard_normal((N, m))
        self.A = self.a.T @ self.a / N
        self.F = testing.dense_kronecker(self.A, np.eye(m))
        self.inputs, self.targets = b.array(self.a), b.array(self.y)
        self.start = (b.array(rng.standard_normal((m, n))),)

    def residuals(self, W):
        return self.inputs @ W.mT - self.targets

    def loss(self, weights):
        from array_api_compat import array_namespace

        return 0.5 * array_namespace(self.inputs).sum(self.residuals(weights[0]) ** 2) / self.N

    def loss_and_gradient(self, weights):
        return self.loss(weights), (self.residuals(weights[0]).mT @ self.inputs / self.N,)

    def factors(self, weights, links):
        return Factors((batch_factors([self.inputs], [self.inputs]).layers[0]._replace(G=self.b.array(np.eye(3))),))

    def curvature_gram(self, weights, directions):
        from array_api_compat import array_namespace

        xp = array_namespace(self.inputs)
        pushed = [self.inputs @ D.mT for (D,) in directions]
        return xp.stack([xp.stack([xp.sum(u * v) / self.N for v in pushed]) for u in pushed])

    @property
    def optimum(self):
        return np.linalg.lstsq(self.a, self.y, rcond=None)[0].T


# No damping and no adaptation: what remains is linear algebra.
EXACT = KFACOptions(damping=0.0, weight_decay=0.0)


def run(problem, options, steps, state=None):
    weights, infos = problem.start, []
    for _ in range(steps):
        weights, state, info = kfac_step(problem, weights, state, options)
        infos.append(info)
    return weights, state, infos


class FactoredRegression(LinearRegression):
    """The same, with its gradient as the residuals and inputs that it is made of."""

    def loss_and_gradient(self, weights):
        return self.loss(weights), (OuterProduct(self.residuals(weights[0]).mT / self.N, self.inputs.mT),)


@pytest.mark.parametrize("b", [NUMPY, TORCH, STRICT[0]], ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_factored_gradient_gives_the_same_steps(b, weight_decay):
    options = KFACOptions(damping=0.1, weight_decay=weight_decay)
    (dense,), (factored,) = (run(problem(b), options, 10)[0] for problem in (LinearRegression, FactoredRegression))
    bound = testing.inverse_bound(np.linalg.cond(LinearRegression(b).A), b.eps)
    np.testing.assert_allclose(b.numpy(factored), b.numpy(dense), rtol=bound, atol=bound)


@pytest.mark.parametrize("b", [NUMPY, TORCH, *STRICT, *JAX[:2]], ids=str)
def test_one_undamped_step_solves_a_quadratic(b):
    problem = LinearRegression(b)
    weights, _, (info,) = run(problem, EXACT, 1)
    bound = testing.inverse_bound(np.linalg.cond(problem.A), b.eps)
    np.testing.assert_allclose(b.numpy(weights[0]), problem.optimum, atol=bound)
    assert info.alpha == pytest.approx(1, abs=bound)
    assert (info.mu, info.refused, info.refreshed) == (0.0, "", True)


def test_the_reduction_ratio_of_a_quadratic_is_one_and_lambda_falls():
    # Weight decay is part of h and of M; λ is in M alone, so with λ > 0 the ratio is above 1.
    problem = LinearRegression(NUMPY)
    options = EXACT._replace(weight_decay=0.1, damping=0.1, damping_period=2)
    _, state, infos = run(problem, options, 4)
    assert [math.isnan(info.ratio) for info in infos] == [True, False, True, False]
    assert [info.damping for info in infos] == [0.1, 0.1, 0.1, 0.1]  # λ >= η
    options = options._replace(weight_decay=1e-9)
    _, state, infos = run(problem, options, 4)
    assert [info.damping for info in infos] == pytest.approx([0.1, 0.1, 0.1 * 0.95**2, 0.1 * 0.95**2])
    assert state.damping == pytest.approx(0.1 * 0.95**4)


class MisledRegression(LinearRegression):
    """Its S2 has seen a tenth of the curvature."""

    def curvature_gram(self, weights, directions):
        return 0.1 * super().curvature_gram(weights, directions)


def test_tau2_doubles_where_the_model_misleads():
    """The steps are ten times too long then: ρ < 0."""
    options = EXACT._replace(damping=0.01, damping_period=1)
    for problem, fractions in ((MisledRegression, [1 / 2, 1, 1]), (LinearRegression, [1 / 4] * 3)):
        instance = problem(NUMPY)
        weights, state, found = instance.start, None, []
        for _ in range(3):
            weights, state, info = kfac_step(instance, weights, state, options)
            found.append(state.curvature_fraction)
            assert (info.ratio < 0) == (problem is MisledRegression)
        assert found == fractions
    *_, infos = run(MisledRegression(NUMPY), options._replace(damping_period=4), 3)
    assert all(math.isnan(info.ratio) for info in infos)


def test_the_loss_includes_the_weight_decay():
    problem = LinearRegression(NUMPY)
    _, _, (info,) = run(problem, EXACT._replace(weight_decay=0.5), 1)
    assert info.loss == pytest.approx(problem.loss(problem.start) + 0.25 * (problem.start[0] ** 2).sum())


@pytest.mark.parametrize("b", [NUMPY, TORCH_FLOAT32, JAX[1]], ids=str)
def test_the_squares_of_the_weights_are_not_rounded(b):
    """Squares of float32 are exact in float64."""
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((40, 30)).astype(np.float32) for _ in range(2)]
    came = b.jit(_best_step.square_of)(tuple(map(b.array, weights)))
    exact = math.fsum(float(w) ** 2 for W in weights for w in W.ravel())
    assert abs(float(came) - exact) <= 10 * 2400 * 2.0**-52 * exact


def test_gamma_never_falls_below_the_root_of_the_weight_decay():
    problem = LinearRegression(NUMPY)
    options = KFACOptions(damping=0.0, weight_decay=0.01, gamma_period=1, inverse_period=1)
    _, _, infos = run(problem, options, 30)
    assert min(info.gamma for info in infos) >= 0.1
    assert min(info.damping for info in infos) >= 0.01


def test_without_momentum():
    _, state, infos = run(LinearRegression(NUMPY), KFACOptions(momentum="none"), 3)
    assert [info.mu for info in infos] == [0.0] * 3
    assert state.update is None
    _, _, with_momentum = run(LinearRegression(NUMPY), KFACOptions(), 3)
    assert with_momentum[2].mu != 0
    assert with_momentum[2].loss < infos[2].loss


def test_the_factors_are_averaged():
    first, second = LinearRegression(NUMPY, 0), LinearRegression(NUMPY, 1)
    weights, state, _ = kfac_step(first, first.start, None, KFACOptions())
    np.testing.assert_allclose(state.factors.layers[0].A, first.A, rtol=1e-12)
    _, state, _ = kfac_step(second, weights, state, KFACOptions())
    np.testing.assert_allclose(state.factors.layers[0].A, (first.A + second.A) / 2, rtol=1e-12)


class Broken(LinearRegression):
    """One of the problem's answers is not finite."""

    def __init__(self, b, part, value=math.nan):
        super().__init__(b)
        self.part, self.value = part, value

    def _broken(self, part, x):
        return x * self.value if part == self.part else x

    def loss_and_gradient(self, weights):
        loss, (gradient,) = super().loss_and_gradient(weights)
        return self._broken("loss", loss), (self._broken("gradient", gradient),)

    def factors(self, weights, links):
        ((A, G),) = super().factors(weights, links).layers
        return Factors((LayerFactors(A, self._broken("factors", G)),))

    def curvature_gram(self, weights, directions):
        return self._broken("curvature", super().curvature_gram(weights, directions))

    def loss(self, weights):
        moved = weights is not self.start
        return self._broken("loss after", super().loss(weights)) if moved else super().loss(weights)


REASONS = {
    "loss": "the loss is not finite",
    "gradient": "the update is not finite",
    "factors": "the statistics are not finite",
    "curvature": "the update is not finite",
    "loss after": "the loss after the step is not finite",
}


@pytest.mark.parametrize("b", [NUMPY, TORCH_FLOAT32, STRICT[0]], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", REASONS)
def test_a_step_that_is_not_finite_is_refused(b, part, value):
    options = KFACOptions(damping_period=1)
    good, bad = LinearRegression(b), Broken(b, part, value)
    weights, state, _ = kfac_step(good, good.start, None, options)
    bad.start = weights
    with np.errstate(invalid="ignore"):
        same, after, info = kfac_step(bad, weights, state, options)
    assert info.refused == REASONS[part] or (part == "gradient" and "loss" in info.refused)
    assert same is weights
    assert after._replace(damping=state.damping, gamma=state.gamma) == state
    assert after.damping == pytest.approx(state.damping / 0.95)
    assert (info.alpha, info.mu, info.change, info.update_norm, info.refreshed) == (0, 0, 0, 0, False)


@pytest.mark.parametrize("b", [NUMPY, TORCH_FLOAT32, STRICT[0]], ids=str)
@pytest.mark.parametrize("period", [1, 4])
def test_a_step_that_doubles_the_loss_is_refused_in_every_iteration(b, period):
    misled, options = MisledRegression(b), EXACT._replace(damping=0.01, damping_period=period)
    weights, state, infos = run(misled, options, 6)
    assert [info.refused for info in infos] == ["the step raises the loss"] * 6
    assert weights[0] is misled.start[0]
    assert (state.iteration, state.factors, state.update) == (0, None, None)
    assert state.curvature_fraction == 1
    assert state.damping == pytest.approx(0.01 / 0.95 ** (6 * period))
    weights, state, infos = run(misled, options, 400)  # until λ makes up for the curvature that S2 has not seen
    assert any(info.refused == "" for info in infos)
    assert misled.loss(weights) < misled.loss(misled.start)


def test_a_damping_of_zero_rises_where_the_loss_does():
    *_, infos = run(MisledRegression(NUMPY), EXACT._replace(damping=0, weight_decay=0), 400)
    assert infos[0].damping == 0
    assert infos[0].refused == "the step raises the loss"
    assert any(not info.refused for info in infos)


def test_a_refused_first_step_leaves_a_state_to_start_from():
    bad, good = Broken(NUMPY, "loss"), LinearRegression(NUMPY)
    weights, state, info = kfac_step(bad, good.start, None, KFACOptions())
    assert info.refused
    assert (state.iteration, state.factors, state.inverse, state.update) == (0, None, None, None)
    weights, state, info = kfac_step(good, weights, state, KFACOptions())
    assert not info.refused
    assert state.iteration == 1


def test_gamma_rises_where_an_inverse_failed_and_the_run_recovers():
    problem = LinearRegression(NUMPY)
    indefinite = Factors((LayerFactors(problem.A - 0.3 * np.linalg.norm(problem.A, 2) * np.eye(4), np.eye(3)),))
    problem.factors = lambda weights, links: indefinite
    weights, state, refused = problem.start, None, 0
    options = KFACOptions(damping=0.01)
    for _ in range(40):
        weights, state, info = kfac_step(problem, weights, state, options)
        refused += bool(info.refused)
    assert 0 < refused < 39
    assert state.gamma > 0.1
    assert problem.loss(weights) < problem.loss(problem.start)


@pytest.mark.parametrize("b", [TORCH, STRICT[0], *JAX[:1]], ids=str)
def test_the_trajectories_of_all_backends_agree(b):
    options = KFACOptions(gamma_period=6, inverse_period=3, damping_period=2)
    expected, _, expected_infos = run(LinearRegression(NUMPY), options, 30)
    weights, _, infos = run(LinearRegression(b), options, 30)
    np.testing.assert_allclose(b.numpy(weights[0]), expected[0], rtol=1e-9)
    assert [info.gamma for info in infos] == pytest.approx([info.gamma for info in expected_infos], rel=1e-9)
    assert [info.loss for info in infos] == pytest.approx([info.loss for info in expected_infos], rel=1e-9)


def test_bad_options_and_weights_are_refused_at_the_start():
    problem = LinearRegression(NUMPY)
    with pytest.raises(ValueError, match="structure is 'dense', expected one of 'block-diagonal'"):
        kfac_step(problem, problem.start, None, KFACOptions(structure="dense"))


def test_weight_decay_moves_the_optimum_towards_zero():
    """The minimum of h + η/2 ‖W‖² is that of ridge regression."""
    problem, eta = LinearRegression(NUMPY), 0.5
    (W,), _, _ = run(problem, KFACOptions(damping=eta, weight_decay=eta), 60)
    ridge = np.linalg.solve(problem.A + eta * np.eye(4), problem.a.T @ problem.y / problem.N).T
    bound = testing.inverse_bound(np.linalg.cond(problem.A + eta * np.eye(4)), NUMPY.eps)
    np.testing.assert_allclose(W, ridge, rtol=bound, atol=bound)


@pytest.mark.parametrize("elsewhere", [float, np.asarray, torch.asarray], ids=["a number", "NumPy", "torch"])
def test_a_loss_may_live_elsewhere(elsewhere):
    class Elsewhere(LinearRegression):
        def loss(self, weights):
            return elsewhere(float(super().loss(weights)))

    (W,), _, infos = run(Elsewhere(TORCH_FLOAT32), KFACOptions(), 6)
    (expected,), _, others = run(LinearRegression(TORCH_FLOAT32), KFACOptions(), 6)
    assert torch.equal(W, expected)
    assert [info.ratio for info in infos] == pytest.approx([info.ratio for info in others], nan_ok=True)


@pytest.mark.parametrize("best", [0, 1, 2])
def test_gamma_is_tried_as_it_is_smaller_and_larger(best, monkeypatch):
    tried = []

    class Recording(Factored):
        def inverse(self, fitted, gamma):
            tried.append(gamma)
            return super().inverse(fitted, gamma)

    options = KFACOptions(Recording(), damping=1.0, gamma_period=1, inverse_period=1, weight_decay=0.0)
    gamma = (1.0, options.omega2, 1 / options.omega2)[best]
    monkeypatch.setattr(_best_step, "_lower", lambda x, y: y if y.candidate.gamma == gamma else x)
    _, state, _ = run(LinearRegression(NUMPY), options, 1)
    assert tried == [1.0, options.omega2, 1 / options.omega2]
    assert state.gamma == tried[best]
