"""The multi-layer perceptron by hand, against torch's autograd in float64, on every backend."""

import inspect
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from backends import EAGER, GPU, JAX, NUMPY, STRICT, TORCH, TORCH_FLOAT32
from torch.func import grad, hessian, jvp, vmap
from torch.nn import functional

from kfaclinalg import KFACOptions, kfac_step
from kfaclinalg_mlp import MLP, sparse_weights
from kfaclinalg_mlp.activations import ACTIVATIONS
from kfaclinalg_mlp.likelihoods import LIKELIHOODS

every_likelihood = pytest.mark.parametrize("likelihood", LIKELIHOODS)
N, SIZES = 24, (5, 4, 6, 3)
# Each activation stands first, second and last in one of these.
NETWORKS = [
    ("tanh", "relu", "identity"),
    ("identity", "sigmoid", "tanh"),
    ("relu", "tanh", "sigmoid"),
    ("sigmoid", "identity", "relu"),
]
PHI = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "relu": torch.relu, "identity": lambda s: s}
LIKELIHOOD_CASES = [(NETWORKS[0], likelihood) for likelihood in LIKELIHOODS]
CASES = [*LIKELIHOOD_CASES, *((names, "bernoulli") for names in NETWORKS[1:])]
GPU_CASES = [pytest.param(b, *case) for b in GPU for case in CASES]
every_case = pytest.mark.parametrize(
    ("b", "activations", "likelihood"),
    [(b, *case) for b in EAGER for case in CASES] + [(JAX[0], *case) for case in LIKELIHOOD_CASES] + GPU_CASES,
    ids=lambda x: x[2] if isinstance(x, tuple) else str(x),  # an activation, of the output layer
)


def loss(likelihood, z, y):
    """Of one example, by torch."""
    if likelihood == "bernoulli":
        return functional.binary_cross_entropy_with_logits(z, y, reduction="sum")
    return functional.cross_entropy(z, y) if likelihood == "categorical" else 0.5 * ((z - y) ** 2).sum()


def samples(likelihood, z, rng):
    """What `MLPProblem` says that it draws, in NumPy."""
    if likelihood == "gaussian":
        return z + rng.standard_normal(z.shape)
    if likelihood == "bernoulli":
        return (rng.random(z.shape) < 1 / (1 + np.exp(-z))).astype(float)
    cumulative = np.cumsum(np.exp(z) / np.exp(z).sum(axis=1, keepdims=True), axis=1)
    return np.asarray([np.searchsorted(c, u) for c, u in zip(cumulative, rng.random(len(z)), strict=True)])


class Case:
    """A network and a batch: in the backend's arrays, and (`x`, `y`, `W`) in torch, float64."""

    def __init__(self, b, activations, likelihood, *, seed=1, **fractions):
        rng = np.random.default_rng(0)
        self.b, self.activations, self.likelihood = b, activations, likelihood
        x, *W = (
            rng.standard_normal(shape).astype(b.dtype)
            for shape in [(N, SIZES[0]), *((m, n + 1) for n, m in pairwise(SIZES))]
        )
        y = rng.integers(3, size=N) if likelihood == "categorical" else rng.random((N, SIZES[-1])).astype(b.dtype)
        self.weights, self.inputs, self.targets = tuple(map(b.array, W)), b.array(x), b.array(y, y.dtype)
        self.x, self.y = (torch.asarray(z.astype(np.int64 if z.dtype.kind == "i" else float)) for z in (x, y))
        self.W = tuple(torch.asarray(w.astype(float)) for w in W)
        self.mlp, self.rng = MLP(activations, likelihood), np.random.default_rng(seed)
        fractions = {"statistics_fraction": 1.0, "curvature_fraction": 1.0} | fractions
        self.problem = self.mlp.problem(self.inputs, self.targets, rng=self.rng, **fractions)

    def forward(self, W, x, shifts=(0.0, 0.0, 0.0)):
        """z of one example, and the ā of each layer; the shifts are added to the s."""
        inputs = []
        for name, W_i, shift in zip(self.activations, W, shifts, strict=True):
            inputs.append(torch.cat([x, torch.ones_like(x[:1])]))
            x = PHI[name](W_i @ inputs[-1] + shift)
        return x, inputs

    def mean_loss(self, W):
        return vmap(lambda x, y: loss(self.likelihood, self.forward(W, x)[0], y))(self.x, self.y).mean()

    def close(self, x, expected, terms=N):
        """To 10 n eps, relative to the norm: n terms a sum."""
        expected = expected.numpy()
        assert np.linalg.norm(self.b.numpy(x) - expected) <= 10 * terms * self.b.eps * np.linalg.norm(expected)

    def scalars(self, x):
        """What accumulates in float64 where the device has it."""
        assert str(x.dtype).endswith("float32" if "no_float64" in self.b.name else "float64")
        return torch.asarray(np.array(self.b.read(x), dtype=float))


def moments(x, y):
    return vmap(torch.outer)(x, y).mean(0)


# --- against autograd


@every_case
def test_the_gradient_is_that_of_the_mean_loss(b, activations, likelihood):
    case = Case(b, activations, likelihood)
    h, gradient = case.problem.loss_and_gradient(case.weights)
    expected = case.mean_loss(case.W).item()
    for value in (h, case.problem.loss(case.weights)):
        assert case.scalars(value).item() == pytest.approx(expected, rel=10 * N * b.eps)
    for DW, reference in zip(gradient, grad(case.mean_loss)(case.W), strict=True):
        case.close(DW, reference)


@every_case
def test_the_factors_are_the_moments_of_single_examples(b, activations, likelihood):
    """g is a gradient with respect to a shift of s, of the loss of ONE example: it fixes G's scale."""
    case, rng = Case(b, activations, likelihood, statistics_fraction=0.5), np.random.default_rng(1)
    x = case.x[rng.permutation(N)[: N // 2]]
    z, a = vmap(lambda x: case.forward(case.W, x))(x)
    y = torch.asarray(samples(likelihood, z.numpy(), rng))
    zeros = tuple(torch.zeros(m, dtype=torch.float64) for m in SIZES[1:])
    g = vmap(lambda x, y: grad(lambda s: loss(likelihood, case.forward(case.W, x, s)[0], y))(zeros))(x, y)
    factors = case.problem.factors(case.weights, True)
    for i, layer in enumerate(factors.layers):
        case.close(layer.A, moments(a[i], a[i]))
        case.close(layer.G, moments(g[i], g[i]))
    assert len(factors.links) == len(SIZES) - 2
    for i, link in enumerate(factors.links):
        case.close(link.A, moments(a[i], a[i + 1]))
        case.close(link.G, moments(g[i], g[i + 1]))
    assert case.problem.factors(case.weights, False).links == ()


@every_case
def test_the_curvature_gram_is_that_of_the_exact_fisher(b, activations, likelihood):
    """(J d)ᵀ H (J e) by torch's forward-mode product and the Hessian of its loss, an example at a time."""
    case, rng = Case(b, activations, likelihood, curvature_fraction=0.5), np.random.default_rng(1)
    rows = rng.permutation(N)[: N // 2]
    host = [[rng.standard_normal(W.shape).astype(b.dtype) for W in case.W] for _ in range(3)]
    directions = [tuple(torch.asarray(D.astype(float)) for D in d) for d in host]

    def gram(x, y):
        z = case.forward(case.W, x)[0]
        H = hessian(lambda z: loss(likelihood, z, y))(z)
        Jd = torch.stack([jvp(lambda *W: case.forward(W, x)[0], case.W, d)[1] for d in directions])
        return Jd @ H @ Jd.T

    expected = vmap(gram)(case.x[rows], case.y[rows]).mean(0)
    found = case.scalars(case.problem.curvature_gram(case.weights, [tuple(map(b.array, d)) for d in host]))
    assert torch.linalg.norm(found - expected) <= 10 * N * b.eps * torch.linalg.norm(expected)


@pytest.mark.parametrize("b", [*EAGER, *JAX, *GPU], ids=str)
def test_the_outputs(b):
    case = Case(b, NETWORKS[0], "gaussian")
    outputs = b.jit(case.mlp.outputs)(case.weights, case.inputs)
    case.close(outputs, vmap(lambda x: case.forward(case.W, x)[0])(case.x))


# --- sampling


@every_likelihood
def test_samples_are_from_the_models_own_distribution(likelihood):
    """The mean of Dz over sampled targets is zero and its covariance is F_R, to 5 standard errors."""
    draws, z = 200_000, np.asarray([[0.3, -1.2, 2.0, -0.4]])
    torch_z = torch.asarray(z[0])
    L, rng = LIKELIHOODS[likelihood], np.random.default_rng(0)
    outputs = np.tile(z, (draws, 1))
    g = L.gradient(outputs, L.sample(outputs, L.noise(rng, *outputs.shape)))
    target = torch.tensor(1) if likelihood == "categorical" else torch_z  # on which the Hessian does not depend
    F = hessian(lambda z: loss(likelihood, z, target))(torch_z).numpy()
    for found, expected in ((g, 0), (g[:, :, None] * g[:, None, :], F)):
        standard_error = found.std(axis=0) / math.sqrt(draws)
        assert (abs(found.mean(axis=0) - expected) <= 5 * standard_error + 1e-15).all()
    np.testing.assert_allclose(np.stack([L.fisher_product(z, e[None])[0] for e in np.eye(4)]), F, atol=1e-15)


@pytest.mark.parametrize("b", [NUMPY, TORCH, TORCH_FLOAT32, *STRICT, JAX[0]], ids=str)
def test_a_class_without_probability_is_never_sampled(b):
    """Not even the first and the last class, at noise that is the least above 0 or rounds to 1."""
    z = b.array(np.tile([-1000.0, 0.1, 0.2, 0.3, -1000.0], (2, 1)))
    u = b.array(np.asarray([[1e-30], [1.0]]))
    assert np.asarray(b.read(LIKELIHOODS["categorical"].sample(z, u))).tolist() == [1, 3]


@every_likelihood
def test_every_backend_sees_the_same_samples(likelihood):
    case = Case(NUMPY, NETWORKS[0], likelihood, statistics_fraction=0.5)
    expected = case.problem.factors(case.weights, False).layers[-1].G
    for b in (TORCH, STRICT[0], JAX[0]):
        other = Case(b, NETWORKS[0], likelihood, statistics_fraction=0.5)
        np.testing.assert_allclose(b.read(other.problem.factors(other.weights, False).layers[-1].G), expected, 1e-12)
    another = Case(NUMPY, NETWORKS[0], likelihood, statistics_fraction=0.5, seed=2)
    assert not np.allclose(another.problem.factors(another.weights, False).layers[-1].G, expected, 1e-3)


def test_only_what_is_random_draws():
    case = Case(NUMPY, NETWORKS[0], "bernoulli", statistics_fraction=0.5)
    other = np.random.default_rng(1)
    case.problem.loss_and_gradient(case.weights)
    case.problem.loss(case.weights)
    case.problem.curvature_gram(case.weights, [case.weights])  # the fraction is 1
    assert case.rng.bit_generator.state == other.bit_generator.state
    case.problem.factors(case.weights, False)
    other.permutation(N)
    other.random((N // 2, SIZES[-1]))
    assert case.rng.bit_generator.state == other.bit_generator.state


def test_a_subset_has_one_example_at_least():
    case = Case(NUMPY, NETWORKS[0], "gaussian", statistics_fraction=1e-9)
    A = case.problem.factors(case.weights, False).layers[0].A
    assert np.linalg.matrix_rank(A) == 1


# --- far out


@pytest.mark.parametrize("b", [NUMPY, TORCH, TORCH_FLOAT32, *STRICT, JAX[0]], ids=str)
@every_likelihood
@pytest.mark.parametrize("last", ["identity", "sigmoid"])
def test_extreme_logits_give_finite_losses(b, likelihood, last):
    """W a = ±1000, with the worst targets: the loss is 1000 where it is not saturated (NumPy's warnings are errors)."""
    W, x = (b.array([[1000.0, 0.0], [-1000.0, 0.0]]),), b.array([[1.0], [-1.0]])
    y = b.array([1, 0], "int64") if likelihood == "categorical" else b.array([[0.0, 1.0], [1.0, 0.0]])
    mlp = MLP([last], likelihood)
    fractions = {"statistics_fraction": 1.0, "curvature_fraction": 1.0}
    problem = mlp.problem(x, y, rng=np.random.default_rng(0), **fractions)
    h, (DW,) = problem.loss_and_gradient(W)
    (layer,) = problem.factors(W, False).layers
    for found in (h, DW, *layer, problem.curvature_gram(W, [W])):
        assert np.isfinite(np.asarray(b.read(found))).all()
    if last == "identity":
        expected = {"bernoulli": 2000.0, "categorical": 2000.0, "gaussian": 0.5 * (1000**2 + 1001**2)}
        assert float(h) == pytest.approx(expected[likelihood], rel=1e-6)


@pytest.mark.parametrize("b", [NUMPY, TORCH_FLOAT32], ids=str)
def test_a_loss_near_zero_keeps_its_digits(b):
    for z, y in ((20.0, 1.0), (-20.0, 0.0)):
        problem = MLP(["identity"], "bernoulli").problem(b.array([[1.0]]), b.array([[y]]), rng=np.random.default_rng(0))
        h = float(problem.loss((b.array([[z, 0.0]]),)))
        assert h == pytest.approx(math.log1p(math.exp(-20)), rel=10 * b.eps)


def test_the_loss_accumulates_in_float64():
    m = 1_000_000
    z, y = torch.zeros(1, m), torch.full((1, m), 0.5)
    assert LIKELIHOODS["bernoulli"].loss(z, y).item() == pytest.approx(m * float(torch.tensor(2.0).log()), rel=1e-9)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nan_passes_every_activation(name):
    assert math.isnan(ACTIVATIONS[name].value(np.asarray([math.nan]))[0])


def test_nan_is_refused_by_the_step():
    case = Case(NUMPY, ("relu", "relu", "identity"), "bernoulli")
    case.inputs[3, 1] = math.nan
    _, _, info = kfac_step(case.problem, case.weights, None, KFACOptions())
    assert info.refused == "the loss is not finite"


# --- mistakes

X, Y, C = np.zeros((6, 3)), np.zeros((6, 2)), np.zeros(6, dtype=np.int64)
W = (np.zeros((4, 4)), np.zeros((2, 5)))
RNG = np.random.default_rng(0)


def stepped(likelihood="bernoulli", x=X, y=Y, weights=W, rng=RNG, **fractions):
    return lambda: MLP(("tanh", "identity"), likelihood).problem(x, y, rng=rng, **fractions).loss_and_gradient(weights)


def gram(*directions):
    return lambda: MLP(("tanh", "identity"), "gaussian").problem(X, Y, rng=RNG).curvature_gram(W, directions)


@pytest.mark.parametrize(
    ("mistake", "error", "message"),
    [
        (lambda: MLP((), "gaussian"), ValueError, "activations is empty, expected one a layer"),
        (lambda: MLP(("tanh", "gelu"), "gaussian"), ValueError, r"activations\[1\] is 'gelu', expected one of 'tanh'"),
        (lambda: MLP(("tanh",), "poisson"), ValueError, "likelihood is 'poisson', expected one of 'bernoulli', 'cat"),
        (stepped(weights=W[:1]), ValueError, "got 1 weights, expected 2, one for each activation"),
        (
            stepped(weights=(W[0], W[0])),
            ValueError,
            r"weights\[1\] has shape \(4, 4\), expected \(m, 5\): 4 inputs and",
        ),
        (stepped(weights=(W[0], W[1][0])), ValueError, r"weights\[1\] has shape \(5,\)"),
        (stepped(weights=(W[0], W[1].astype("f4"))), TypeError, r"weights\[1\] has dtype float32, expected float64"),
        (stepped(weights=(torch.zeros(4, 4), W[1])), TypeError, r"weights\[0\]: an array of .*torch, expected .*numpy"),
        (stepped(x=X.tolist()), TypeError, "inputs: a list, expected an array"),
        (stepped(x=X.astype("f2")), TypeError, "inputs have dtype float16, expected float32 or float64"),
        (stepped(x=X[0]), ValueError, r"inputs have shape \(3,\), expected \(N, features\), N > 0"),
        (stepped(x=X[:0], y=Y[:0]), ValueError, r"inputs have shape \(0, 3\), expected \(N, features\), N > 0"),
        (stepped(y=Y[:5]), ValueError, r"targets have shape \(5, 2\), expected \(6, \.\.\.\)"),
        (stepped(y=Y.tolist()), TypeError, "targets: a list, expected an array"),
        (stepped(y=torch.zeros(6, 2)), TypeError, "targets: an array of .*torch, expected one of .*numpy"),
        (stepped(y=Y[:, 0]), ValueError, r"targets have shape \(6,\), expected \(6, 2\), as the outputs \(bernoulli\)"),
        (stepped(y=Y + 1.5), ValueError, r"targets lie in \[1.5, 1.5\], expected \[0, 1\] \(bernoulli\)"),
        (stepped(y=Y.astype(int)), TypeError, "targets have dtype int64, expected float64, that of the outputs"),
        (stepped("gaussian", y=Y[:, :1]), ValueError, r"targets have shape \(6, 1\), expected \(6, 2\)"),
        (stepped("categorical"), ValueError, r"targets have shape \(6, 2\), expected class indices \(6,\)"),
        (stepped("categorical", y=Y[:, 0]), TypeError, "targets have dtype float64, expected integer class indices"),
        (stepped("categorical", y=C + 2), ValueError, r"targets lie in \[2, 2\], expected \[0, 1\] \(categorical\)"),
        (stepped("categorical", y=C - 1), ValueError, r"targets lie in \[-1, -1\], expected \[0, 1\]"),
        (stepped(rng=0), TypeError, "rng is a int, expected a numpy.random.Generator"),
        (stepped(statistics_fraction=0), ValueError, r"statistics_fraction is 0, expected a number in \(0, 1\]"),
        (stepped(curvature_fraction=1.1), ValueError, r"curvature_fraction is 1.1, expected a number in \(0, 1\]"),
        (gram(W, W[:1]), ValueError, r"directions\[1\] has 1 arrays, expected 2, as the weights"),
        (gram((W[0], W[1][:1])), ValueError, r"directions\[0\]\[1\] has shape \(1, 5\), expected \(2, 5\)"),
        (gram((W[0], W[1].astype("f4"))), TypeError, r"directions\[0\]\[1\] has dtype float32, expected float64"),
        (lambda: sparse_weights((3,), rng=RNG), ValueError, r"sizes is \(3,\), expected two or more, each >= 1"),
        (lambda: sparse_weights((3, 0), rng=RNG), ValueError, r"sizes is \(3, 0\)"),
        (lambda: sparse_weights((3, 2), rng=RNG, connections=0), ValueError, "connections is 0, expected an integer"),
        (lambda: sparse_weights((3, 2), rng=RNG, scale=-1.0), ValueError, "scale is -1.0, expected a number >= 0"),
        (lambda: sparse_weights((3, 2), rng=0), TypeError, "rng is a int, expected a numpy.random.Generator"),
        (lambda: sparse_weights(3, rng=RNG), TypeError, "sizes is 3, expected a sequence"),
    ],
)
def test_mistakes_are_refused(mistake, error, message):
    with pytest.raises(error, match=message):
        mistake()


def test_another_device_is_refused():
    one, other = (Case(b, NETWORKS[0], "bernoulli") for b in STRICT[:2])
    with pytest.raises(ValueError, match=r"targets: on device .*device1.*, expected .*device2.*, as the inputs"):
        other.mlp.problem(other.inputs, one.targets, rng=RNG)
    with pytest.raises(ValueError, match=r"weights\[0\]: on device .*device1.*, expected .*device2"):
        other.mlp.outputs(one.weights, other.inputs)


# --- sparse initialisation


def test_sparse_weights_have_their_connections_scale_and_bias():
    sizes = (200, 300, 10, 40)
    weights = sparse_weights(sizes, rng=np.random.default_rng(0), scale=0.25, bias=0.5)
    assert [w.shape for w in weights] == [(300, 201), (10, 301), (40, 11)]
    assert all(w.dtype == np.float64 and (w[:, -1] == 0.5).all() for w in weights)
    assert [set((w[:, :-1] != 0).sum(axis=1).tolist()) for w in weights] == [{15}, {15}, {10}]
    chosen = weights[0][:, :-1]
    values = chosen[chosen != 0]
    n = len(values)  # 4500 draws: bounds of 5 standard errors
    assert abs(values.mean()) <= 5 * 0.25 / math.sqrt(n)
    assert abs(values.std() / 0.25 - 1) <= 5 / math.sqrt(2 * n)
    uses = (chosen != 0).sum(axis=0)  # of each input, binomial
    assert abs(uses.mean() - 22.5) < 1e-12
    assert abs(uses - 22.5).max() <= 5 * math.sqrt(22.5)


def test_sparse_weights_follow_the_generator():
    one, two, other = (sparse_weights((20, 8, 3), rng=np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert all((a == b).all() for a, b in zip(one, two, strict=True))
    assert any((a != b).any() for a, b in zip(one, other, strict=True))


# --- the surface


def test_the_fractions_are_those_of_the_options():
    defaults = inspect.signature(MLP.problem).parameters
    for name in ("statistics_fraction", "curvature_fraction"):
        assert defaults[name].default == getattr(KFACOptions(), name)
