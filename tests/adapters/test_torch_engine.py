"""`KFAC` on every kind of layer: its quantities against dense ones, one function a step, and all structures."""

import copy
import warnings

import pytest
import torch
from layer_rows import ROWS
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn import functional
from training import Mixed, assert_same, mixed_batch

from kfaclinalg import Diagonal, Eigen, Exact, Factored, LowRank, Tridiagonal, block_diagonal_inverse
from kfaclinalg_torch import KFAC, ExactFisher, KFACPreconditioner, Sampled
from kfaclinalg_torch._batch import Batch

pytestmark = [pytest.mark.usefixtures("double"), pytest.mark.filterwarnings("ignore:KFAC takes the diagonal")]
pytestmark += [
    pytest.mark.filterwarnings(f"ignore:{said}") for said in ("There is a performance drop", "Using padding=")
]
STRUCTURES = [Factored(), Exact(), LowRank(3), Eigen(), Tridiagonal()]
by_name = {"ids": lambda structure: type(structure).__name__}


class Everything(Mixed):
    """`Mixed`, with a recurrent layer, a token, a class of one's own and tied weights."""

    def __init__(self):
        super().__init__()
        self.double()
        self.gru, self.token = nn.GRU(4, 4, batch_first=True), nn.Parameter(torch.randn(4))
        self.bilinear, self.tied = nn.Bilinear(4, 4, 4), nn.Linear(4, 7, bias=False)
        self.tied.weight = self.embedding.weight
        self.drop, self.batch = nn.Dropout(0.3), nn.BatchNorm1d(4)

    def forward(self, tokens):
        x = self.drop(self.norm(self.embedding(tokens))) + self.token
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.batch(self.bilinear(x, self.gru(x)[0]).mT).mT
        return self.head(self.convolution(x.mT).tanh().mean(2)) + self.tied(x).mean(1)[:, :3]


def problem_of(model, x, y, likelihood="categorical", **options):
    optimizer = KFAC(model, likelihood, statistics_fraction=1.0, curvature_fraction=1.0, **options)
    optimizer._trained.probe(Batch(x, y), optimizer._tensor_of)
    return optimizer, optimizer._problem(Batch(x, y), optimizer._trained.capture(), optimizer.options)


def test_the_gradient_and_the_gram_are_those_of_the_dense_fisher():
    torch.manual_seed(0)
    (x, y), model = mixed_batch(), Everything().eval()
    optimizer, problem = problem_of(model, x, y)
    weights, network = optimizer._trained.network.weights(), optimizer._trained.network
    assert {p for layer in optimizer._trained.layers for p in layer.parameters} == set(model.parameters())
    _, gradient = problem.loss_and_gradient(weights)
    functional.cross_entropy(model(x), y).backward()
    for layer, V in zip(optimizer._trained.layers, gradient, strict=True):
        torch.testing.assert_close(V, layer.matrix(lambda p: p.grad), rtol=1e-9, atol=1e-12)

    directions = [tuple(torch.randn_like(W) for W in weights) for _ in range(2)]
    tangents = [network.by_name(network.parameters(d)) for d in directions]
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    gram = torch.zeros(2, 2)
    for n in range(len(x)):
        J = jacrev(lambda q, n=n: functional_call(model, q, (x[n : n + 1],))[0])(parameters)
        Jd = torch.stack([sum((J[k].flatten(1) @ d[k].flatten()) for k in d) for d in tangents])
        p = model(x[n : n + 1])[0].detach().softmax(-1)
        gram += Jd @ (torch.diag(p) - torch.outer(p, p)) @ Jd.T / len(x)
    torch.testing.assert_close(problem.curvature_gram(weights, directions), gram, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("structure", ["block-diagonal", "eigen"])
def test_its_factors_are_those_of_the_preconditioner(structure, sharing):
    torch.manual_seed(0)
    (x, y), model = mixed_batch(), Everything().eval()
    twin = copy.deepcopy(model)
    optimizer, problem = problem_of(model, x, y, estimator="exact", structure=structure, weight_sharing=sharing)
    factors = problem.factors(optimizer._trained.network.weights(), False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        preconditioner = KFACPreconditioner(twin, likelihood="categorical", estimator="exact", weight_sharing=sharing)
    preconditioner.update(twin(x))
    functional.cross_entropy(twin(x), y).backward()
    preconditioner.step()
    expected = preconditioner._estimate.averages.of(preconditioner._layers).layers
    for name, came in zip(optimizer._trained.names, factors.layers, strict=True):
        if name != "token":  # whose diagonal has random signs
            for pair in zip(came, expected[name], strict=True):
                M, N = (X.to_dense() if isinstance(X, Diagonal) else X for X in pair)
                torch.testing.assert_close(M, N, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("structure", STRUCTURES, **by_name)
@pytest.mark.parametrize("row", [name for name in ROWS if "padding" not in name])
def test_it_steps_on_every_kind_of_layer(row, structure):
    torch.manual_seed(0)
    model, *args = ROWS[row]()
    outputs = copy.deepcopy(model)(*args)
    y = torch.randint(outputs.shape[-1], outputs.shape[:-1])
    optimizer = KFAC(model, "categorical", structure=structure, damping=1.0)
    for _ in range(2):
        optimizer.step(tuple(args), y)
        assert optimizer.info.refused == ""
        assert optimizer.info.change < 0


@pytest.mark.parametrize("structure", STRUCTURES, **by_name)
def test_it_trains_everything_at_once(structure):
    torch.manual_seed(0)
    (x, y), model = mixed_batch(N=32), Everything()
    optimizer = KFAC(model, "categorical", structure=structure, damping=0.1, curvature_fraction=1.0)
    assert optimizer.fallback.keys() == {"token"}
    assert optimizer.layers == {}
    losses = [optimizer.step(x, y) for _ in range(25)]
    assert set(optimizer.layers) == set(optimizer._trained.names)
    assert optimizer.info.refused == ""
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("estimator", [Sampled(3), ExactFisher()])
def test_an_estimator_is_a_value(estimator):
    torch.manual_seed(0)
    (x, y), model = mixed_batch(), Everything()
    optimizer = KFAC(model, "categorical", estimator=estimator)
    optimizer.step(x, y)
    assert optimizer.info.refused == ""
    with pytest.raises(ValueError, match="KFAC takes its targets from the model"):
        KFAC(model, "categorical", estimator="empirical")


# -- one step, one function --


class Quadratic(nn.Module):
    """Linear in its weights, with dropout before and in attention-like products after."""

    def __init__(self):
        super().__init__()
        self.drop, self.layer = nn.Dropout(0.5), nn.Linear(6, 4)

    def forward(self, x):
        return self.layer(self.drop(x)) + self.layer(self.drop(x.roll(1, 1)))


def test_the_ratio_of_a_quadratic_problem_is_one_with_dropout_on():
    torch.manual_seed(0)
    model, x, y = Quadratic(), torch.randn(64, 6), torch.randn(64, 4)
    everything = {"curvature_fraction": 1.0, "statistics_fraction": 1.0}
    optimizer = KFAC(model, "gaussian", damping=0.0, weight_decay=0.0, damping_period=1, **everything)
    for _ in range(3):
        optimizer.step(x, y)
        assert optimizer.info.ratio == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_running_statistics_move_once_a_step(chunk_size):
    torch.manual_seed(0)
    (x, y), model = mixed_batch(), Everything()
    twin = copy.deepcopy(model)
    optimizer = KFAC(model, "categorical", damping_period=1, chunk_size=chunk_size)
    torch.manual_seed(1)
    optimizer.step(x, y)
    torch.manual_seed(1)
    for part in x.split(chunk_size or len(x)):
        twin(part)
    assert int(model.batch.num_batches_tracked) == int(twin.batch.num_batches_tracked)
    torch.testing.assert_close(model.batch.running_mean, twin.batch.running_mean)


def test_no_pass_sees_more_than_a_chunk():
    torch.manual_seed(0)
    (x, y), model, sizes = mixed_batch(N=12), Everything(), []
    model.embedding.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    KFAC(model, "categorical", damping_period=1, chunk_size=5).step(x, y)
    assert max(sizes) <= 5


# -- neighbours --


class Strided(nn.Module):
    """Two layers: a convolution with positions and another with a stride, or a linear layer behind a pooling."""

    def __init__(self, kind):
        super().__init__()
        self.one = nn.Conv1d(2, 3, 3, padding=1)
        self.two = {
            "same": nn.Conv1d(3, 2, 3, padding=1),
            "stride": nn.Conv1d(3, 2, 3, stride=2),
            "pooling": nn.Linear(3, 2),
        }[kind]

    def forward(self, x):
        x = torch.tanh(self.one(x))
        return self.two(x.mean(2)) if isinstance(self.two, nn.Linear) else self.two(x).mean(2)


def rows_of(model, x, layer, reduced):
    """a (N, R, n) and the Jacobians of the outputs g (D, N, R, m) of one layer of `Strided`, by hand."""
    kept = {}
    handle = layer.register_forward_hook(lambda m, args, s: kept.update(x=args[0].detach(), s=s))
    z = model(x)
    handle.remove()
    g = torch.stack([torch.autograd.grad(z[:, d].sum(), kept["s"], retain_graph=True)[0] for d in range(z.shape[1])])
    a, g = (kept["x"][:, None], g[:, :, None]) if isinstance(layer, nn.Linear) else (unfolded(layer, kept["x"]), g.mT)
    a = functional.pad(a, (0, 1), value=1.0)
    return (a.mean(1, keepdim=True), g.sum(2, keepdim=True)) if reduced else (a, g)


def unfolded(layer, x):
    k, s, p = layer.kernel_size[0], layer.stride[0], layer.padding[0]
    return functional.pad(x, (p, p)).unfold(2, k, s).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(("kind", "sharing"), [("same", "expand"), ("stride", "reduce"), ("pooling", "reduce")])
def test_the_inverse_of_two_neighbours_is_that_of_the_dense_matrix(kind, sharing):
    """Of two layers F̂ is F̃: blocks E[a_i a_jᵀ] ⊗ E[g_i g_jᵀ], over positions, or over examples where they are reduced.
    The likelihood has F_R = I."""
    torch.manual_seed(0)
    model, x = Strided(kind), torch.randn(40, 2, 8)
    optimizer, problem = problem_of(
        model, x, torch.randn(40, 2), "gaussian", structure=Tridiagonal(), estimator="exact", weight_sharing=sharing
    )
    factors = problem.factors(optimizer._trained.network.weights(), True)
    rows = [rows_of(model, x, layer, sharing == "reduce") for layer in (model.one, model.two)]

    def moments(i, j):
        (a, g), (b, h) = rows[i], rows[j]
        A = torch.einsum("nri,nrj->ij", a, b) / (a.shape[0] * a.shape[1])
        return A, torch.einsum("dnri,dnrj->ij", g, h) / a.shape[0]

    gamma, damped = 0.3, []
    for i, layer in enumerate(factors.layers):
        A, G = moments(i, i)
        torch.testing.assert_close((layer.A, layer.G), (A, G), rtol=1e-9, atol=1e-12)
        pi = ((A.trace() / len(A)) / (G.trace() / len(G))) ** 0.5
        damped.append((A + pi * gamma * torch.eye(len(A)), G + gamma / pi * torch.eye(len(G))))
    off = torch.kron(*moments(0, 1))
    dense = torch.cat([torch.cat([torch.kron(*damped[0]), off], 1), torch.cat([off.T, torch.kron(*damped[1])], 1)], 0)
    inverse = Tridiagonal().inverse(factors, gamma)
    torch.testing.assert_close(inverse.to_dense(), torch.linalg.inv(dense), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("kind", ["stride", "pooling"])
def test_neighbours_with_other_positions_stay_definite_in_the_expand_setting(kind):
    """c = 1/√R keeps every correlation at one or below, without damping too: highly correlated positions."""
    torch.manual_seed(0)
    model, x = Strided(kind), torch.randn(300, 2, 1).expand(-1, -1, 8) + 0.01 * torch.randn(300, 2, 8)
    optimizer, problem = problem_of(
        model, x, torch.randn(300, 2), "gaussian", structure="block-tridiagonal", estimator="exact"
    )
    factors = problem.factors(optimizer._trained.network.weights(), True)
    (a, g), (b, h) = (rows_of(model, x, layer, False) for layer in (model.one, model.two))
    A = torch.einsum("ni,nj->ij", a.mean(1), b.mean(1)) / len(x)
    G = torch.einsum("dni,dnj->ij", g.sum(2), h.sum(2)) / len(x) / (a.shape[1] * b.shape[1]) ** 0.5
    torch.testing.assert_close(tuple(factors.links[0]), (A, G), rtol=1e-9, atol=1e-12)
    for i in range(2):
        joint = [
            torch.cat([torch.cat([M, X], 1), torch.cat([X.T, N], 1)], 0)
            for M, N, X in zip(*(layer for layer in factors.layers), factors.links[0], strict=True)
        ]
        assert float(torch.linalg.eigvalsh(joint[i]).min()) > -1e-12


def test_what_has_no_neighbours_is_block_diagonal_beside_the_chain():
    torch.manual_seed(0)
    (x, y), model = mixed_batch(N=16), Everything()
    optimizer = KFAC(model, "categorical", structure="block-tridiagonal", damping=0.1)
    optimizer.step(x, y)
    inverse, factors = optimizer._state.inverse, optimizer.factors
    chain = len(inverse.Psi_A) + 1
    assert 1 < chain < len(optimizer._trained.names)
    assert {"embedding", "norm", "token"} & set(optimizer._trained.names[:chain]) == set()
    Vs = tuple(torch.randn_like(layer.matrix(torch.detach)) for layer in optimizer._trained.layers)
    beside = block_diagonal_inverse(factors._replace(layers=factors.layers[chain:], links=()), optimizer._state.gamma)
    for came, expected in zip(inverse.apply(Vs)[chain:], beside.apply(Vs[chain:]), strict=True):
        torch.testing.assert_close(came, expected)


# -- what a checkpoint knows --


@pytest.mark.parametrize("structure", STRUCTURES, **by_name)
def test_a_resumed_run_is_bitwise_the_same(structure):
    torch.manual_seed(0)
    (x, y), model = mixed_batch(N=16), Everything().eval()
    optimizer = KFAC(model, "categorical", structure=structure, damping=0.1)
    for _ in range(3):
        optimizer.step(x, y)
    state, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    expected = [optimizer.step(x, y) for _ in range(3)]
    twin = Everything().eval()
    twin.load_state_dict(weights)
    other = KFAC(twin, "categorical", structure=structure, damping=0.1)
    other.load_state_dict(state)
    assert [other.step(x, y) for _ in range(3)] == expected


MADE = {
    "structure": ({"structure": LowRank(2)}, {"structure": Exact()}, r"LowRank\(rank=2.*expected Exact"),
    "rank": ({"structure": LowRank(2)}, {"structure": LowRank(3)}, r"rank=2.*rank=3"),
    "estimator": ({"estimator": "sampled"}, {"estimator": "exact"}, r"Sampled\(samples=1\).*ExactFisher"),
    "layers": ({}, {"skip": ["head"]}, r"head.*expected"),
}


@pytest.mark.filterwarnings("ignore:KFAC.* leaves")
@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("kind", [KFAC, KFACPreconditioner])
def test_a_state_made_with_something_else_is_refused(kind, name):
    def run(options):
        torch.manual_seed(0)
        (x, y), model = mixed_batch(), Mixed()
        held = kind(model, likelihood="categorical", **options)
        if kind is KFAC:
            held.step(x, y)
        else:
            held.update(model(x))
            functional.cross_entropy(model(x), y).backward()
            held.step()
        return held

    one, other, message = MADE[name]
    given, mine = run(one).state_dict(), run(other)
    before = copy.deepcopy(mine.state_dict())
    with pytest.raises(ValueError, match=message):
        mine.load_state_dict(given)
    assert_same(mine.state_dict(), before)


@pytest.mark.parametrize("how", ["to", "replaced"])
def test_parameters_of_another_kind_are_refused(how):
    torch.manual_seed(0)
    (x, y), model = mixed_batch(), Mixed()
    held = KFACPreconditioner(model, likelihood="categorical")
    optimizer = KFAC(model, "categorical")
    if how == "to":
        model.to(torch.float64 if model.head.weight.dtype == torch.float32 else torch.float32)
    else:
        model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    held.update(model(x))
    functional.cross_entropy(model(x), y).backward()
    with pytest.raises(ValueError, match="the preconditioner was made"):
        held.step()
    with pytest.raises(ValueError, match="the optimizer was made"):
        optimizer.step(x, y)
