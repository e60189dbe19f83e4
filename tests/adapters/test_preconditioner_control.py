"""What the defaults choose: a damping relative to the curvature, the length of an update, and the two periods."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from training import (
    Mixed,
    assert_near,
    assert_same,
    backward,
    batch,
    gradients,
    losses_of,
    mixed_batch,
    network,
    preconditioned,
)

from kfaclinalg import Exact, Factors, LayerFactors, Link, LowRank, block_tridiagonal_inverse
from kfaclinalg_torch import KFACPreconditioner, Relative
from kfaclinalg_torch._damping import gamma_of

LAYERS = ("0", "2", "4")


def with_bias(tensors, name):
    return torch.cat([tensors[f"{name}.weight"], tensors[f"{name}.bias"][:, None]], 1).double()


def case(model=None, *, scale=1.0, **options):
    """∇W and the update of the layers of a network, and its A and G, after one step."""
    model = model or network(4, 6, 5, 3)
    preconditioner = preconditioned(model, "exact", **options)
    backward(model, preconditioner, *batch(N=40), scale=scale)
    V = gradients(model)
    preconditioner.step()
    U = gradients(model)
    factors = {name: tuple(M.double() for M in pair) for name, pair in preconditioner.layers.items()}
    return [{name: with_bias(x, name) for name in LAYERS} for x in (V, U)], factors


# -- a damping relative to the curvature --


def mean_eigenvalues(A, G):
    return torch.linalg.eigvalsh(A).mean(), torch.linalg.eigvalsh(G).mean()


def factored(A, G, V, fraction):
    a, g = (fraction**0.5 * mean for mean in mean_eigenvalues(A, G))
    return torch.linalg.solve(G + g * torch.eye(len(G)), V) @ torch.linalg.inv(A + a * torch.eye(len(A)))


def exact(A, G, V, fraction):
    a, g = mean_eigenvalues(A, G)
    F = torch.kron(A, G) + fraction * a * g * torch.eye(len(A) * len(G), dtype=A.dtype)
    return torch.linalg.solve(F, V.mT.flatten()).view(V.mT.shape).mT


@pytest.mark.parametrize("fraction", [1e-3, 0.1, 3.0])
@pytest.mark.parametrize(("structure", "reference"), [("block-diagonal", factored), (Exact(), exact)])
def test_a_relative_damping_is_a_part_of_the_mean_eigenvalue(structure, reference, fraction):
    (V, U), factors = case(damping=Relative(fraction, sampling=False), length=None, structure=structure)
    for name, (A, G) in factors.items():
        expected = reference(A, G, V[name], fraction)
        bound = 100 * torch.finfo(torch.float32).eps / fraction  # cond of the damped factors
        torch.testing.assert_close(U[name], expected, rtol=0, atol=bound * float(expected.abs().max()))


SIZES = 40, 8, 24  # of three batches; with a decay of 0.6 their weights are 0.3, 0.3 and 0.4
ROWS = 1 / (0.3**2 / 40 + 0.3**2 / 8 + 0.4**2 / 24)
EACH = {"decay": 0.6, "statistics_period": 1, "inverse_period": 1, "length": None}


def of_sizes(n, m, fraction=0.1, rows=ROWS):
    """With the sampling errors of A and G."""
    return math.sqrt((fraction + (n - 1) / rows) * (fraction + (m - 1) / rows))


@pytest.mark.parametrize(("structure", "reference"), [("block-diagonal", factored), (Exact(), exact)])
def test_the_sampling_error_of_the_averages_is_added_to_a_relative_damping(structure, reference):
    model = network(4, 6, 5, 3)
    preconditioner = preconditioned(model, "exact", structure=structure, **EACH)
    for N in SIZES:
        model.zero_grad()
        backward(model, preconditioner, *batch(N=N))
        V = gradients(model)
        preconditioner.step()
    U, factors = gradients(model), preconditioner.layers
    for name in LAYERS:
        A, G = (M.double() for M in factors[name])
        expected = reference(A, G, with_bias(V, name), of_sizes(len(A), len(G)))
        bound = 1000 * torch.finfo(torch.float32).eps * float(expected.abs().max())
        torch.testing.assert_close(with_bias(U, name), expected, rtol=0, atol=bound)


@pytest.mark.parametrize(("sharing", "positions"), [("reduce", 1), ("expand", 7)])
@pytest.mark.parametrize("structure", ["block-diagonal", "block-tridiagonal", "eigen", Exact(), LowRank(4)])
def test_every_structure_takes_it(structure, sharing, positions):
    """For one layer it is a larger fraction. The positions of an example are rows; in the reduce setting it is one."""
    updates, options = [], EACH | {"weight_sharing": sharing}
    for damping in (Relative(0.1), Relative(of_sizes(5, 3, rows=positions * ROWS), sampling=False)):
        torch.manual_seed(0)
        model = nn.Linear(4, 3).double()
        preconditioner = preconditioned(model, "exact", structure=structure, damping=damping, **options)
        for N in SIZES:
            model.zero_grad()
            x = torch.randn(N, 7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(N))
            backward(model, preconditioner, x, torch.zeros(N, 7), loss=lambda z, y: z.square().mean())
            preconditioner.step()
        updates.append(gradients(model))
    assert_near(*updates)


def test_a_diagonal_side_and_one_of_one_dimension_have_no_sampling_error():
    model = nn.Embedding(9, 3).double()
    updates = []
    for damping in (Relative(0.1), Relative(math.sqrt(0.1 * (0.1 + 2 / 20)), sampling=False)):
        preconditioner = preconditioned(model, "exact", damping=damping, length=None)
        model.zero_grad()
        backward(model, preconditioner, torch.arange(20) % 9, torch.arange(20) % 3)
        preconditioner.step()
        updates.append([model.weight.grad.clone()])
        preconditioner.remove()
    assert_near(*updates)


def test_what_averages_are_worth_is_part_of_a_state():
    def run(stop):
        model = network(4, 6, 5, 3)
        optimizer = preconditioned(model, **EACH)
        for k, N in enumerate(SIZES):
            if stop == k:
                state = optimizer.state_dict()
                optimizer.remove()
                optimizer = preconditioned(model, **EACH)
                optimizer.load_state_dict(state)
            model.zero_grad()
            backward(model, optimizer, *batch(N=N))
            optimizer.step()
        return gradients(model), optimizer._estimate.averages.rows

    (whole, rows), (resumed, again) = run(None), run(2)
    assert_same(whole, resumed)
    assert rows == again == dict.fromkeys(LAYERS, pytest.approx(ROWS))


def test_the_eigen_form_is_damped_by_a_part_of_its_own_mean_eigenvalue():
    """A ⊗ G has another mean than the second moments of the gradients along its eigenvectors."""
    model, fraction = nn.Linear(4, 3, bias=False).double(), 0.3
    preconditioner = preconditioned(
        model, "exact", structure="eigen", damping=Relative(fraction, sampling=False), length=None
    )
    backward(model, preconditioner, torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3)
    V = model.weight.grad.clone()
    preconditioner.step()
    F = preconditioner._inverses.fitted[""]
    Q = torch.kron(F.Q_A, F.Q_B)
    dense = Q @ torch.diag(F.eigenvalues.mT.flatten()) @ Q.mT
    A, G = preconditioner.layers[""]
    assert abs(float(dense.trace() / (A.trace() * G.trace())) - 1) > 1e-3
    damped = dense + fraction * dense.trace() / len(dense) * torch.eye(len(dense), dtype=dense.dtype)
    expected = torch.linalg.solve(damped, V.mT.flatten()).view(V.mT.shape).mT
    torch.testing.assert_close(model.weight.grad, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.parametrize("structure", ["block-diagonal", "block-tridiagonal", "eigen"])
def test_neither_the_scale_of_the_loss_nor_that_of_the_inputs_matters(structure):
    """A W that is so many times smaller for inputs so many times larger has an update so many times smaller."""
    updates = []
    for c in (1.0, 2.0**10):
        model = nn.Sequential(*(nn.Linear(n, m, bias=False) for n, m in pairwise((4, 5, 3)))).double()
        x = torch.randn(40, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            for layer in model:
                layer.weight.copy_(torch.linspace(-1, 1, layer.weight.numel()).view_as(layer.weight))
            model[0].weight.div_(c)
        preconditioner = preconditioned(model, "exact", "gaussian", structure=structure, length=None)
        outputs = model(c * x)
        preconditioner.update(outputs)
        outputs.pow(2).sum().div(40).mul(c).backward()
        preconditioner.step()
        updates.append([model[0].weight.grad, model[1].weight.grad / c])
    assert_near(updates[1], updates[0])


def test_in_a_chain_each_layer_has_a_damping_of_its_own():
    """F = D F' D with D = √(a_i g_i) on layer i, and all mean eigenvalues of F' are one: one γ serves them all."""
    generator = torch.Generator().manual_seed(0)
    wide = {"generator": generator, "dtype": torch.float64}
    rows = [s * torch.randn(50, n, **wide) for n, s in ((4, 9.0), (3, 1e-2), (5, 1.0))]
    slopes = [s * torch.randn(50, m, **wide) for m, s in ((3, 0.1), (5, 7.0), (2, 1e3))]
    rows[1], rows[2] = rows[1] + 1e-3 * rows[0][:, :3], rows[2] + 20 * rows[1] @ torch.ones(3, 5, dtype=torch.float64)
    means = [(x.square().mean(), g.square().mean()) for x, g in zip(rows, slopes, strict=True)]

    def inverse(rows, slopes, gamma_of):
        layers = tuple(LayerFactors(x.mT @ x / 50, g.mT @ g / 50) for x, g in zip(rows, slopes, strict=True))
        sides = zip(pairwise(rows), pairwise(slopes), strict=True)
        links = tuple(Link(x.mT @ y / 50, g.mT @ h / 50) for (x, y), (g, h) in sides)
        return block_tridiagonal_inverse(Factors(layers, links), gamma_of(layers))

    fraction = 0.2
    came = inverse(rows, slopes, lambda layers: tuple(gamma_of(Relative(fraction), layer) for layer in layers))
    even = zip(rows, slopes, means, strict=True)
    unit = [(x / a**0.5, g / b**0.5) for x, g, (a, b) in even]
    expected = inverse(*zip(*unit, strict=True), lambda layers: fraction**0.5)
    Vs = tuple(torch.randn(g.shape[1], x.shape[1], **wide) for x, g in unit)
    scales = [(a * b) ** 0.5 for a, b in means]
    Us = expected.apply(tuple(V / s for V, s in zip(Vs, scales, strict=True)))
    for U, came_one, s in zip(Us, came.apply(Vs), scales, strict=True):
        torch.testing.assert_close(came_one, U / s, rtol=1e-10, atol=1e-10 * float((U / s).abs().max()))


def test_a_layer_without_curvature_keeps_a_finite_update():
    model = network(4, 6, 5, 3)
    with torch.no_grad():
        model[4].weight.zero_()  # nothing reaches the layers below
    (_, U), factors = case(model)
    assert float(factors["0"][1].abs().max()) == 0
    assert float(U["0"].abs().max()) == 0
    assert all(bool(U[name].isfinite().all()) for name in LAYERS)


@pytest.mark.parametrize("fraction", [-0.1, math.nan, math.inf, "large", True])
def test_a_fraction_is_a_number(fraction):
    with pytest.raises((TypeError, ValueError), match="fraction is"):
        Relative(fraction)


@pytest.mark.parametrize("sampling", [1, None, "no"])
def test_the_sampling_error_is_added_or_not(sampling):
    with pytest.raises(TypeError, match="sampling is"):
        Relative(0.1, sampling=sampling)


# -- the length of the update --


@pytest.mark.parametrize("length", [1e-3, 0.5])
@pytest.mark.parametrize("structure", ["block-diagonal", "block-tridiagonal", "eigen"])
def test_each_layer_is_updated_by_the_same_length_in_the_direction_of_its_own(structure, length):
    (_, came), _ = case(structure=structure, length=length, scale=1e6)
    (_, plain), _ = case(structure=structure, length=None)
    for name in LAYERS:
        torch.testing.assert_close(came[name].square().mean().sqrt(), torch.tensor(length).double(), rtol=1e-5, atol=0)
        assert_near(came[name], plain[name] * (length / plain[name].square().mean().sqrt()), c=1000)


def test_the_length_is_chosen_with_the_damping():
    (_, default), _ = case()
    (_, plain), _ = case(damping=0.1)
    (_, long), _ = case(damping=0.1, length=1.0)
    (_, clipped), _ = case(kl_clip=1e-6)
    rms = [float(U["2"].square().mean().sqrt()) for U in (default, plain, long, clipped)]
    assert rms[0] == pytest.approx(1e-3)
    assert rms[2] == pytest.approx(1.0)
    assert rms[1] != pytest.approx(1e-3, rel=1e-2)
    assert rms[3] != pytest.approx(1e-3, rel=1e-2)


def test_a_length_may_follow_the_steps():
    (_, expected), _ = case(length=0.1)
    (_, came), _ = case(length=lambda step: 0.1 / (step + 1))
    assert_same(came, expected)


@pytest.mark.parametrize("options", [{"length": -1.0}, {"length": "long"}, {"length": 1e-3, "kl_clip": 1e-3}])
def test_a_wrong_length_is_refused(options):
    with pytest.raises((TypeError, ValueError), match="length"):
        KFACPreconditioner(network(4, 3), likelihood="categorical", **options)


@pytest.mark.parametrize(("scale", "lr"), [(0.0, None), (1.0, 0.0)])
def test_a_limit_of_zero_leaves_what_has_no_length(scale, lr):
    model = network(4, 6, 5, 3)
    preconditioner = preconditioned(model, "exact", kl_clip=0.0, kl_lr=lr)
    backward(model, preconditioner, *batch(), scale=scale)
    preconditioner.step()
    for g in gradients(model).values():
        assert bool(g.isfinite().all())
        assert bool((g == 0).all()) == (scale == 0)


def test_what_is_left_alone_keeps_its_gradient():
    model = network(4, 6, 5, 3)
    with pytest.warns(UserWarning, match="skipped by name"):
        preconditioner = preconditioned(model, "exact", skip=["2"])
    backward(model, preconditioner, *batch())
    before = gradients(model)
    preconditioner.step()
    assert torch.equal(model[2].weight.grad, before["2.weight"])


# -- the periods --


def work_of(preconditioner, model, x, y):
    backward(model, preconditioner, x, y)
    return preconditioner._estimate.statistic.work


def test_the_work_is_counted_from_rows_and_shapes():
    N, sizes = 12, (4, 6, 5, 3)
    model = network(*sizes)
    work = work_of(preconditioned(model, samples=2), model, *batch(N))
    shapes = [(m, n + 1) for n, m in pairwise(sizes)]
    assert work.model == sum(6 * N * m * n for m, n in shapes)
    assert work.statistic == sum(N * (n * n + 2 * m * m) + 2 * 2 * N * m * n for m, n in shapes)


def test_a_reduced_layer_has_a_row_an_example_and_a_long_side_a_diagonal():
    N, R, n, m = 5, 7, 4, 8200
    for sharing, rows in (("expand", N * R), ("reduce", N)):
        model = nn.Linear(n, m, bias=False)
        preconditioner = preconditioned(model, "empirical", weight_sharing=sharing)
        model(torch.ones(N, R, n)).sum().backward()
        work = preconditioner._estimate.statistic.work
        assert work == (6 * N * R * m * n, 2 * N * R * m * n + rows * (n * n + m))


def test_the_patches_of_a_convolution_meet_a_panel_at_a_time():
    N, c, m = 5, 30, 6
    model = nn.Sequential(nn.Conv2d(c, m, 3, bias=False), nn.Flatten())
    work = work_of(preconditioned(model), model, torch.ones(N, c, 4, 4), torch.zeros(N, dtype=torch.int64))
    n, rows = 9 * c, 4 * N
    panel = 135  # of two, each at least 128 rows
    of_input = 2 * (panel * n + (n - panel) * (n - panel))
    assert work.statistic == rows * (of_input + m * m + 2 * n * m)


@pytest.mark.parametrize(("N", "sizes"), [(4, (30, 40, 30)), (200, (30, 40, 30)), (2000, (8, 3))])
def test_what_is_added_is_at_most_the_model_s_own_work(N, sizes):
    model = network(*sizes)
    preconditioner = preconditioned(model)
    work = work_of(preconditioner, model, *batch(N, sizes[0], sizes[-1]))
    preconditioner.step()
    periods = preconditioner._periods
    shapes = [(m, n + 1) for n, m in pairwise(sizes)]
    spare = max(work.model - sum(2 * m * n * (m + n) for m, n in shapes), work.model // 4)
    costs = {"statistics_period": work.statistic, "inverse_period": sum(m**3 + n**3 for m, n in shapes)}
    for name, (least, largest) in {"statistics_period": (1, 10), "inverse_period": (10, 100)}.items():
        period = periods[name]
        assert least <= period <= largest
        assert period == largest or costs[name] / period <= spare / 2
        assert period == least or costs[name] / (period - 1) > spare / 2


def test_statistics_are_taken_and_inverses_made_early_and_then_in_their_periods():
    model = network(4, 6, 5, 3)
    preconditioner = preconditioned(model)
    preconditioner._periods = {"statistics_period": 7, "inverse_period": 11}
    taken, made = [], []
    for step in range(30):
        before = preconditioner._estimate.averages.taken, dict(preconditioner._inverses.inverses)
        backward(model, preconditioner, *batch(seed=step))
        preconditioner.step()
        if preconditioner._estimate.averages.taken > before[0]:
            taken.append(step)
        made.append({name for name, K in preconditioner._inverses.inverses.items() if K is not before[1].get(name)})
    assert taken == [0, 1, 2, 4, 7, 14, 21, 28]
    assert [step for step in range(11) if made[step] == set(LAYERS)] == [0, 1, 2, 4, 8]
    assert sum(map(len, made[11:22])) == len(LAYERS)  # each once, in steps of their own


def test_with_a_number_for_the_damping_nothing_is_chosen():
    model = network(4, 6, 5, 3)
    preconditioner = preconditioned(model, damping=0.1)
    for step in range(4):
        backward(model, preconditioner, *batch(seed=step))
        preconditioner.step()
    assert preconditioner._estimate.averages.taken == 4
    assert preconditioner._period("inverse_period") == 10


def test_a_module_does_what_it_did_where_nothing_is_due():
    """A rule's forward, step by step in a recurrent layer, is for statistics alone."""
    torch.manual_seed(0)
    model = nn.GRU(3, 4, batch_first=True)
    preconditioner = preconditioned(model, "exact", "gaussian", outputs=0, damping=0.1, statistics_period=3)
    x, nodes = torch.randn(2, 5, 3), []
    for _ in range(4):
        outputs, _ = model(x)
        nodes.append(len(graph(outputs.grad_fn)))
        preconditioner.update((outputs, None))
        outputs.sum().backward()
        preconditioner.step()
    assert nodes[1] == nodes[2] < nodes[0] == nodes[3]


def graph(node):
    """All nodes that lead to this one."""
    known, stack = set(), [node]
    while stack:
        one = stack.pop()
        if one is not None and one not in known:
            known.add(one)
            stack += [before for before, _ in one.next_functions]
    return known


# -- what comes of it --

SGD, ADAMW = (lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9)), torch.optim.AdamW
USUAL = [*((SGD, lr) for lr in (1e-3, 1e-2, 0.1, 1.0)), *((ADAMW, lr) for lr in (1e-4, 1e-3, 1e-2))]


@pytest.mark.parametrize("make", [lambda: (network(4, 8, 3), batch(64)), lambda: (Mixed(), mixed_batch(N=32))])
@pytest.mark.parametrize(("optimizer", "lr"), USUAL)
def test_the_defaults_go_down_with_any_usual_rate(make, optimizer, lr):
    model, (x, y) = make()
    losses = losses_of(model, optimizer(model.parameters(), lr=lr), preconditioned(model), x, y, 100)
    assert losses[-1] < losses[0]
    assert max(losses) < 1.2 * losses[0]
