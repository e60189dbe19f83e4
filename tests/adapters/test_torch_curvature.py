"""`fit_curvature` and `Curvature` against dense Fisher matrices, Jacobians and gradients by torch.func, in float64."""

from functools import partial

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from curvature_cases import EPS, MODELS, Case, K, N, Words, close, eye, flat, mlp
from torch import nn
from torch.utils.data import DataLoader
from two_devices import THERE, TwoDevices

from kfaclinalg import Diagonal, KroneckerEigen, Tridiagonal, testing
from kfaclinalg_torch import (
    KFAC,
    Empirical,
    FisherOperator,
    KFACPreconditioner,
    Sampled,
    curvlinops_operator,
    fit_curvature,
    gpytorch_operator,
    load_curvature,
)
from kfaclinalg_torch._fit import _corrected

pytestmark = pytest.mark.filterwarnings("ignore:fit_curvature takes the diagonal")


every_model = pytest.mark.parametrize("name", MODELS)
both = pytest.mark.parametrize("structure", ["block-diagonal", "eigen"])


def test_one_example_of_one_layer_is_its_exact_fisher():
    """A ⊗ G is exact where all inputs are the same, and EKFAC's diagonal is that of the Fisher in the eigenbasis."""
    torch.manual_seed(0)
    model, x = nn.Linear(4, K).double(), torch.randn(1, 4, dtype=torch.float64)
    curvature = fit_curvature(model, "categorical", (x, torch.zeros(1, dtype=torch.int64)), progress=False)
    a, p = torch.cat([x[0], torch.ones(1)]), torch.softmax(model(x)[0], 0).detach()
    close(curvature.operator.to_dense(), torch.kron(torch.outer(a, a), torch.diag(p) - torch.outer(p, p)))


@every_model
def test_the_eigenvalues_of_ekfac_are_the_diagonal_of_the_exact_fisher_in_its_basis(name):
    """Of every kind of layer: tied weights, embeddings and what is used twice as well."""
    case = Case(name)
    curvature = case.fit(size=7, structure="eigen")
    F, start = case.fisher(curvature), 0
    for block in curvature.eigen:
        Q_A, Q_B = (Q.to_dense() if isinstance(Q, Diagonal) else Q for Q in (block.Q_A, block.Q_B))
        members, expected = block.eigenvalues.reshape(-1, *block.shape), []
        for i, eigenvalues in enumerate(members):
            part = slice(start, start := start + eigenvalues.numel())
            A, B = (Q if Q.ndim == 2 else Q[i] for Q in (Q_A, Q_B))
            Q = torch.kron(A.contiguous(), B.contiguous())
            expected.append(torch.diagonal(Q.mT @ F[part, part] @ Q))
        close(members.mT.flatten(), torch.cat(expected))


def test_of_reduced_weight_sharing_the_eigenvalues_are_those_of_reduced_gradients():
    """Of an embedding (Σ g) āᵀ, ā being how often each word is in an example, over its positions."""
    case = Case("words")
    F = case.fit(size=7, structure="eigen", estimator="empirical", weight_sharing="reduce").eigen[0]
    h = case.model.embed(case.x).detach().requires_grad_()
    outputs = case.model.last(torch.tanh(case.model.mix(h)).sum(1))
    (g,) = torch.autograd.grad(nn.functional.cross_entropy(outputs, case.y, reduction="sum"), h)
    a = nn.functional.one_hot(case.x, 7).double().mean(1)
    close(F.eigenvalues, (g.sum(1) @ F.Q_B).square().mT @ a.square() / N)


def test_the_layers_in_a_recurrence_are_seen():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.last = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, K)

        def forward(self, x):
            return self.last(self.lstm(x)[0][:, -1])

    curvature = fit_curvature(Last(), "categorical", (torch.randn(N, 2, 3), torch.randint(K, (N,))), progress=False)
    assert list(curvature.layers) == ["lstm.ih_l0", "lstm.hh_l0", "last"]
    assert not curvature.fallback


@every_model
@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_batches_of_any_size_and_chunks_give_the_same(name, estimator):
    """To 1e-14 the factors, F, and EKFAC's eigenvalues along the same eigenvectors."""
    case = Case(name)
    one = case.fit(structure="eigen", estimator=estimator)
    passes, spectra = one._passes, case.fit(estimator=estimator).eigen
    with passes.open(), torch.no_grad():
        expected = _corrected(passes, case.loader(), spectra)
        for size in (1, 7):
            found = _corrected(passes, case.loader(size), spectra)
            for P, Q in zip(expected, found, strict=True):
                assert float((P.eigenvalues - Q.eigenvalues).abs().max() / P.eigenvalues.max()) <= 1e-14
    for options in ({"size": 1}, {"size": 7}, {"size": 7, "chunk_size": 2, "offload": "cpu"}):
        other = case.fit(structure="eigen", estimator=estimator, **options)
        for layer, same in zip(one.factors.layers, other.factors.layers, strict=True):
            for M, same_M in zip(layer, same, strict=True):
                assert float((M.diagonal() - same_M.diagonal()).abs().max() / M.diagonal().abs().max()) <= 1e-14
        F, G = (case.fit(estimator=estimator, **o).operator.to_dense() for o in ({}, options))
        assert float((F - G).abs().max() / F.abs().max()) <= 1e-14
        for P, Q, layer in zip(one.eigen, other.eigen, one.factors.layers, strict=True):
            error = torch.linalg.vector_norm(P.to_dense() - Q.to_dense())
            bound = testing.C * max(P.shape) * EPS * turning(P, layer)
            assert float(error.max()) <= max(bound, 1e-14) * float(torch.linalg.vector_norm(P.eigenvalues))


@every_model
@pytest.mark.parametrize("structure", ["block-diagonal", "block-tridiagonal", "eigen"])
def test_what_is_kept_on_another_device_gives_the_same(name, structure):
    case = Case(name)
    data, one = case.loader(7), case.fit(size=7, structure=structure)
    expected = one.scores(data, data), one.self_scores(data), one.variances(case.x), one.logdet(0.5)
    sample = one.sample(torch.Generator().manual_seed(0))
    with TwoDevices():
        other = case.fit(size=7, structure=structure, offload="meta")
        found = other.scores(data, data), other.self_scores(data), other.variances(case.x), other.logdet(0.5).to("cpu")
        drawn = other.sample(torch.Generator().manual_seed(0))
        assert all(P.diagonal().device == THERE for P in other.operator.blocks)
        logdet = other.inverse(0.5).logdet().to("cpu")
        for x, y in zip((*found, logdet), (*expected, one.inverse(0.5).logdet()), strict=True):
            assert type(x) is torch.Tensor
            close(x, y, 1e3)
        assert all(torch.allclose(x, sample[k]) for k, x in drawn.items())


def turning(P, factors):
    """What EKFAC's F changes by, over its norm, where A and G change by 1 of theirs: rounding turns their eigenvectors.

    To first order an eigenvector i turns towards k by ε ‖A‖ / (a_i - a_k), and F changes by that times s_ij - s_kj.
    """
    total, s = 1.0, P.eigenvalues
    for M, side in zip(factors, (s.mT, s), strict=True):
        if not isinstance(M, torch.Tensor):
            continue
        w = torch.linalg.eigvalsh(M)
        gap = (w[..., :, None] - w[..., None, :]).abs()
        change = (side[..., :, None, :] - side[..., None, :, :]).norm(dim=-1)
        known = gap > 10 * EPS * w.max()  # what is within rounding of each other has the same eigenvalues of F: zero
        total += float(torch.where(known, change / gap.clamp(min=EPS * w.max()), 0.0).max() * w.max() / s.norm())
    return total


@every_model
@both
def test_what_is_asked_of_the_shifted_operator(name, structure):
    case = Case(name)
    curvature = case.fit(structure=structure)
    F = curvature.operator.to_dense()
    P = curvature.shifted(0.1, scale=3.0)
    assert len(P.blocks) == len(curvature.layers)
    close(P.to_dense(), 3 * F + 0.1 * eye(len(F)))
    condition = float(torch.linalg.cond(P.to_dense()))
    close(P.logdet(), torch.logdet(P.to_dense()), condition)
    deltas = torch.arange(1.0, len(P.blocks) + 1, dtype=torch.float64)
    each = curvature.shifted(list(deltas.tolist())).trace() - curvature.operator.trace()
    close(each, sum(d * block.diagonal().numel() for d, block in zip(deltas, P.blocks, strict=True)))


@every_model
@pytest.mark.parametrize("structure", ["block-diagonal", "block-tridiagonal", "eigen"])
def test_the_inverse_is_one_operator(name, structure):
    """Where a layer has several, the groups of a convolution or the channels of a normalisation, as well."""
    case = Case(name)
    curvature = case.fit(structure=structure)
    inverse, v = curvature.inverse(0.3), flat(curvature, case.parameters)
    Vs, dense = curvature.pack(case.parameters), inverse.to_dense()
    if structure == "eigen":
        F = curvature.operator.to_dense()
        close(dense, torch.linalg.inv(F + 0.09 * eye(len(F))))
    close(torch.cat([V.mT.flatten() for V in inverse @ Vs]), dense @ v)
    close(inverse.logdet(), torch.logdet(dense))
    close(inverse.gram([V[None] for V in Vs], [V[None] for V in Vs]), (v @ dense @ v)[None, None])
    np.testing.assert_allclose(inverse.to_namespace(np).as_scipy() @ v.numpy(), dense @ v, rtol=1e-12, atol=1e-12)


@every_model
@both
def test_scores_are_those_of_dense_gradients(name, structure):
    case = Case(name)
    curvature = case.fit(structure=structure)
    g, F = case.gradients(curvature), curvature.operator.to_dense()
    P = torch.linalg.inv(F + 0.3 * eye(len(F)))
    condition = float(torch.linalg.cond(P))
    close(curvature.scores((case.x[:5], case.y[:5]), case.loader(7), damping=0.3), g[:5] @ P @ g.mT, condition)
    close(curvature.self_scores(case.loader(7), damping=0.3), torch.einsum("ni,ij,nj->n", g, P, g), condition)
    mean = [0.1 * block.trace() / block.diagonal().numel() for block in curvature.operator.blocks]
    usual = curvature.scores(case.loader(), case.loader())
    close(usual, curvature.scores(case.loader(), case.loader(), damping=[float(d) for d in mean]), 1e3)


@every_model
@both
def test_variances_are_those_of_the_jacobian(name, structure):
    case = Case(name)
    curvature = case.fit(structure=structure)
    J, P = case.jacobians(curvature), curvature.shifted(0.1, scale=2.0).to_dense()
    expected = J @ torch.linalg.inv(P) @ J.mT
    close(curvature.variances(case.x, delta=0.1, scale=2.0), expected, float(torch.linalg.cond(P)))
    close(curvature.variances(list(case.x.split(7)), delta=0.1, scale=2.0), expected, float(torch.linalg.cond(P)))


def test_a_preconditioner_and_its_model_are_seen_together():
    """Both take the place of attention's forward pass, and each sees what it would alone."""
    case = Case("attending")
    expected, found = case.fit(), []
    for fitted in (False, True):
        preconditioner = KFACPreconditioner(case.model, likelihood="categorical", estimator="exact")
        outputs = case.model(case.x)
        with preconditioner.paused():
            curvature = case.fit() if fitted else expected
        assert torch.equal(curvature.operator.to_dense(), expected.operator.to_dense())
        preconditioner.update(outputs)
        nn.functional.cross_entropy(outputs, case.y).backward()
        preconditioner.step()
        found.append(preconditioner.layers)
        preconditioner.remove()
    assert type(case.model.attention).forward is case.model.attention.forward.__func__
    assert found[0].keys() == found[1].keys() == expected.layers.keys()
    assert all(torch.equal(M.G, found[1][name].G) for name, M in found[0].items())
    other = KFACPreconditioner(case.model, likelihood="categorical", estimator="exact")
    KFAC(case.model, "categorical").step(case.x, case.y)
    other.update(case.model(case.x))
    other.step()
    assert other.layers.keys() == found[0].keys()


@pytest.mark.parametrize("name", ["mlp", "attending"])
@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_a_preconditioner_does_not_see_the_passes_of_a_fit(name, estimator):
    """Not paused, between the backward pass and the step, of the model and of what it is a part of."""
    found = []
    for fitted in (False, True):
        case = Case(name)
        own = {} if estimator == "empirical" else {"likelihood": "categorical"}
        whole = nn.Sequential(case.model)
        preconditioner = KFACPreconditioner(whole, estimator=estimator, **own)
        outputs = whole(case.x)
        if own:
            preconditioner.update(outputs)
        nn.functional.cross_entropy(outputs, case.y).backward()
        if fitted:
            curvature = case.fit(structure="eigen")
            curvature.self_scores(case.loader())
            FisherOperator(case.model, "categorical", case.loader()).gradient()
        preconditioner.step()
        found.append(preconditioner.layers)
    for one, other in zip(*(layers.values() for layers in found), strict=True):
        assert torch.equal(one.A.diagonal(), other.A.diagonal())
        assert torch.equal(one.G, other.G)


def test_variances_take_no_targets_and_no_mask():
    """The Jacobian is the same whatever counts in the loss, and whatever the loss is."""
    case = Case("words")
    curvature = case.fit(estimator="empirical", mask=lambda x: x != 6)
    J, P = case.jacobians(curvature), curvature.shifted(0.1).to_dense()
    assert bool((case.x == 6).any())
    close(curvature.variances(case.x, delta=0.1), J @ torch.linalg.inv(P) @ J.mT, float(torch.linalg.cond(P)))


def test_samples_have_the_inverse_as_their_covariance():
    case = Case("mlp")
    curvature, generator = case.fit(), torch.Generator().manual_seed(0)
    P, count = curvature.shifted(0.5).to_dense(), 4000
    center = flat(curvature, case.parameters)
    drawn = [flat(curvature, curvature.sample(generator, delta=0.5)) - center for _ in range(count)]
    z = torch.stack(drawn) @ torch.linalg.cholesky(P)  # of unit covariance
    error = torch.linalg.matrix_norm(z.mT @ z / count - eye(len(P)))
    assert float(error) <= 1.3 * len(P) / count**0.5  # E‖S - I‖² = d (d + 1) / count
    same = curvature.sample(torch.Generator().manual_seed(3))
    assert all(torch.equal(same[k], x) for k, x in curvature.sample(torch.Generator().manual_seed(3)).items())


@every_model
def test_packing_and_unpacking_undo_each_other(name):
    case = Case(name)
    curvature = case.fit()
    back = curvature.unpack(curvature.pack(case.parameters))
    assert back.keys() == case.parameters.keys()
    assert all(torch.equal(back[k], x) for k, x in case.parameters.items())


@both
def test_projections_split_the_space(structure):
    curvature = Case("everything").fit(structure=structure)
    top, low = (curvature.projection(part, 0.5).to_dense() for part in ("top", "low"))
    close(top + low, eye(len(top), dtype=torch.float64))
    close(top @ top, top)
    F = curvature.operator.to_dense()
    assert float(torch.trace(top @ F)) >= 0.5 * float(torch.trace(F))
    assert float(torch.trace(low)) > float(torch.trace(top))


@every_model
@both
def test_it_is_saved_and_loaded(name, structure, tmp_path):
    case = Case(name)
    curvature = case.fit(structure=structure)
    curvature.save(tmp_path / "curvature.pt")
    loaded = load_curvature(tmp_path / "curvature.pt", case.model, "categorical", structure=structure)
    assert torch.equal(loaded.operator.to_dense(), curvature.operator.to_dense())
    assert loaded.examples == N
    assert torch.equal(loaded.scores(case.loader(), case.loader()), curvature.scores(case.loader(), case.loader()))
    with pytest.raises(ValueError, match="the state was made with layers"):
        load_curvature(tmp_path / "curvature.pt", nn.Linear(2, 2).double(), "categorical", structure=structure)
    other = "eigen" if structure == "block-diagonal" else "block-diagonal"
    with pytest.raises(ValueError, match="the state was made with structure"):
        load_curvature(tmp_path / "curvature.pt", case.model, "categorical", structure=other)
    with pytest.raises(ValueError, match="the state was made with likelihood Categorical, expected Gaussian"):
        load_curvature(tmp_path / "curvature.pt", case.model, "gaussian", structure=structure)


def test_the_gradient_of_the_evidence_in_delta_passes_through():
    curvature = Case("mlp").fit()
    delta = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    curvature.shifted(delta, scale=float(N)).logdet().backward()
    P = N * curvature.operator.to_dense() + 0.7 * eye(64)
    close(delta.grad, torch.trace(torch.linalg.inv(P)), float(torch.linalg.cond(P)))


@every_model
@both
def test_the_determinant_is_that_of_the_shifted_operator(name, structure):
    curvature = Case(name).fit(structure=structure)
    each = torch.arange(1.0, len(curvature.eigen) + 1, dtype=torch.float64)
    for delta in (1e-200, 1e-30, 1e-9, 0.3, 1e40, each[0] / 3, each, each.tolist()):
        close(curvature.logdet(delta, scale=float(N)), curvature.shifted(delta, scale=float(N)).logdet())
    delta, scale = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.3, 2.0))
    pairs = [
        torch.autograd.grad(of(delta, scale=scale), (delta, scale))
        for of in (curvature.logdet, lambda *a, **k: curvature.shifted(*a, **k).logdet())
    ]
    for found, expected in zip(*pairs, strict=True):
        close(found, expected)
    P = N * curvature.operator.to_dense() + 0.3 * eye(sum(b.diagonal().numel() for b in curvature.operator.blocks))
    close(curvature.logdet(0.3, scale=N), torch.logdet(P))
    assert Case(name, torch.float32).fit().logdet(0.3).dtype == torch.float32


def test_a_mask_leaves_positions_out():
    case = Case("words")
    x = torch.cat([case.x, torch.full((N, 2), 6)], 1)

    class Masked(Words):
        def forward(self, x):
            keep = (torch.arange(x.shape[1]) < 3)[None, :, None]
            return self.last((torch.tanh(self.mix(self.embed(x))) * keep).sum(1))

    model = Masked().double()
    model.load_state_dict(case.model.state_dict())
    counts = lambda x: (torch.arange(x.shape[1]) < 3).expand(x.shape)  # noqa: E731
    masked = fit_curvature(model, "categorical", (x, case.y), mask=counts, progress=False)
    close(masked.operator.to_dense(), case.fit().operator.to_dense())


class Tagger(nn.Module):
    """A class for each word, of that word and those before it."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.last = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.mix(self.embed(x).cumsum(1))))


def test_batches_of_which_nothing_counts_add_nothing():
    """To factors, links, products and gradient; and what counts at fewer positions weighs less."""
    torch.manual_seed(0)
    model, x, y = Tagger().double(), torch.randint(7, (9, 4)), torch.randint(3, (9, 4))
    lengths = torch.tensor([4, 2, 0, 1, 3, 0, 0, 4, 1])
    x[torch.arange(4) >= lengths[:, None]] = 6  # which counts nowhere
    x[torch.arange(4) < lengths[:, None]] %= 6
    some, options = lengths > 0, {"mask": lambda x: x != 6}
    whole, pieces = [(x[some], y[some])], [*zip(x.split(2), y.split(2), strict=True), (x[5:7], y[5:7])]
    one, other = (
        fit_curvature(model, "categorical", data, structure="block-tridiagonal", progress=False, **options)
        for data in (whole, pieces)
    )
    assert one.examples == other.examples == 6
    for links in ("A", "G"):
        close(getattr(other.factors.links[0], links), getattr(one.factors.links[0], links))
    close(other.operator.to_dense(), one.operator.to_dense())
    F, G = (FisherOperator(model, "categorical", data, **options) for data in (whole, pieces))
    Vs = F.split(torch.randn(len(one.operator.to_dense()), dtype=torch.float64))
    close(G.stacked(G @ Vs), F.stacked(F @ Vs))
    close(G.stacked(G.gradient()), F.stacked(F.gradient()))
    scores = one.self_scores((x, y))
    assert torch.equal(scores == 0, ~some)
    close(scores, torch.cat([one.self_scores((x[i : i + 1], y[i : i + 1])) for i in range(9)]))
    for of in (
        lambda data: fit_curvature(model, "categorical", data, progress=False, **options),
        lambda data: FisherOperator(model, "categorical", data, **options).gradient(),
    ):
        with pytest.raises(ValueError, match="mask counts no position"):
            of([(x[~some], y[~some])])


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, K)).double()
    x, before = torch.randn(N, 5).double(), {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    curvature = fit_curvature(
        model, "categorical", (x, torch.randint(K, (N,), generator=torch.Generator())), progress=False
    )
    curvature.variances(x)
    FisherOperator(model, "categorical", (x, torch.zeros(N, dtype=torch.int64))).gradient()
    assert model.training
    assert model[2].training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model[0]._forward_hooks
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_a_model_that_has_changed_is_refused():
    """Its new layer would be seen by nobody, and add nothing to the scores."""
    case = Case("mlp")
    curvature, F = case.fit(), FisherOperator(case.model, "categorical", case.loader())
    uses = (
        lambda: curvature.self_scores(case.loader()),
        lambda: curvature.variances(case.x),
        curvature.sample,
        F.gradient,
        lambda: F @ curvature.pack(case.parameters),
    )
    old, case.model[2] = case.model[2], nn.Linear(6, K).double()
    for of in uses:
        with pytest.raises(ValueError, match="'2' was replaced since the curvature was made"):
            of()
    case.model[2] = old
    case.model.float()
    for of in uses:
        with pytest.raises(ValueError, match=r"'0\.weight' was \(torch\.float64, 'cpu'\) when the curvature was made"):
            of()


def test_a_model_may_be_frozen_after_the_fit():
    case = Case("tied")
    curvature = case.fit()
    scores, variances = curvature.self_scores(case.loader()), curvature.variances(case.x)
    case.model.requires_grad_(False)
    assert torch.equal(curvature.self_scores(case.loader()), scores)
    assert torch.equal(curvature.variances(case.x), variances)
    assert not any(p.requires_grad for p in case.model.parameters())


class Failing(nn.Module):
    """Takes a batch of N, and of it no smaller one."""

    def __init__(self):
        super().__init__()
        self.layer, self.dropout = nn.Linear(5, K), nn.Dropout(0.5)

    def forward(self, x):
        if len(x) < 3:
            raise RuntimeError("too few")
        return self.layer(self.dropout(x))


def test_the_model_is_left_as_it_was_after_an_error():
    """As long as somebody holds the error, too."""
    model, x, y = Failing(), torch.randn(N, 5), torch.randint(K, (N,))
    curvature, data = fit_curvature(model, "categorical", (x, y), progress=False), [(x, y), (x[:2], y[:2])]
    F = FisherOperator(model, "categorical", data)
    Vs = curvature.pack(dict(model.named_parameters()))
    for of in (
        lambda: fit_curvature(model, "categorical", data, progress=False),
        lambda: curvature.scores((x, y), data),
        lambda: curvature.self_scores(data),
        lambda: curvature.variances([x, x[:2]]),
        lambda: F @ Vs,
        F.gradient,
    ):
        with pytest.raises((ValueError, RuntimeError), match="too few") as error:
            of()
        assert model.training
        assert model.dropout.training
        assert not model.layer._forward_hooks
        assert not model._forward_pre_hooks
        assert torch.is_grad_enabled()
        assert error


def test_sampled_targets_agree_on_average_and_repeat():
    case = Case("mlp")
    exact = case.fit().layers["2"].G
    one, two = (
        case.fit(estimator=Sampled(2000), generator=torch.Generator().manual_seed(0)).layers["2"].G for _ in "ab"
    )
    assert torch.equal(one, two)
    assert float(torch.linalg.matrix_norm(one - exact) / torch.linalg.matrix_norm(exact)) < 0.05


@every_model
def test_products_with_the_exact_fisher_and_the_gradient(name):
    case = Case(name)
    F, curvature = FisherOperator(case.model, "categorical", case.loader(7)), case.fit()
    v = torch.randn(
        len(flat(curvature, case.parameters)), dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    close(F.stacked(F @ F.split(v)), case.fisher(curvature) @ v)
    close(F.stacked(F.gradient()), case.gradients(curvature).mean(0))
    for operator in (F.as_scipy(0.5), F.as_scipy(0.5).H):
        np.testing.assert_allclose(operator @ v.numpy(), F.stacked(F @ F.split(v)) + 0.5 * v, atol=1e-13)


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_products_with_the_exact_fisher_of_a_recurrence(kind):
    """In float32 as well, of which torch has no forward mode of an LSTM."""
    torch.manual_seed(0)
    model, x, y = kind(3, 4, batch_first=True), torch.randn(N, 2, 3), torch.randint(4, (N, 2))
    F = FisherOperator(model, "categorical", (x, y), outputs=0)
    curvature = fit_curvature(model, "categorical", (x, y), outputs=0, progress=False)
    (names, parameters), outputs = zip(*model.named_parameters(), strict=True), model(x)[0].flatten(0, 1)
    v = torch.randn(sum(p.numel() for p in parameters))
    product = torch.zeros_like(v)
    for z, p in zip(outputs, outputs.softmax(-1).detach(), strict=True):
        slopes = [torch.autograd.grad(z_k, parameters, retain_graph=True) for z_k in z]
        J = torch.stack([flat(curvature, dict(zip(names, slope, strict=True))) for slope in slopes])
        product += J.T @ ((torch.diag(p) - torch.outer(p, p)) @ (J @ v)) / N
    torch.testing.assert_close(F.stacked(F @ F.split(v)), product)


def test_the_fisher_operator_takes_matrices_in_the_dtype_of_the_factors():
    case, wide = Case("mlp", torch.float32), {"factor_dtype": torch.float64}
    F, curvature = FisherOperator(case.model, "categorical", case.loader(7), **wide), case.fit(**wide)
    Vs = curvature.pack(case.parameters)
    product = F @ Vs
    assert {V.dtype for V in (*Vs, *product, *F.gradient())} == {torch.float64}
    expected = FisherOperator(case.model, "categorical", case.loader()) @ [V.float() for V in Vs]
    torch.testing.assert_close(F.stacked(product).float(), F.stacked(expected))


def test_the_fisher_operator_takes_what_the_curvature_packs():
    """Of a layer that is used without a call as well, which a first pass shows."""

    class Uncalled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(5, 6), nn.Linear(6, K)

        def forward(self, x):
            return self.last(torch.tanh(nn.functional.linear(x, self.first.weight, self.first.bias)))

    model, data = Uncalled(), (torch.randn(N, 5), torch.randint(K, (N,)))
    curvature, F = fit_curvature(model, "categorical", data, progress=False), FisherOperator(model, "categorical", data)
    assert F.shapes == [tuple(V.shape) for V in curvature.pack(dict(model.named_parameters()))]
    assert len(F @ curvature.pack(dict(model.named_parameters()))) == len(curvature.layers) == 3


@pytest.mark.parametrize("structure", ["block-diagonal", Tridiagonal(), "eigen"], ids=str)
def test_kfac_preconditions_conjugate_gradients(structure):
    """Hessian-free with SciPy's cg: fewer iterations with F̆⁻¹ and F̂⁻¹ than without, and the same minimiser."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, K)).double()
    x = torch.randn(400, 12, dtype=torch.float64) * torch.logspace(1, 0, 12, dtype=torch.float64)
    data, damping = [(x, x[:, :K].abs().argmax(1))], 1e-4
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(50):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), data[0][1]).backward()
        optimizer.step()
    F = FisherOperator(model, "categorical", data)
    curvature = fit_curvature(model, "categorical", data, structure=structure, progress=False)
    system, b = F.as_scipy(damping), F.stacked(F.gradient()).numpy()
    inverse = curvature.inverse(damping**0.5).to_namespace(np).as_scipy()
    counts, solutions = [], []
    for M in (None, inverse):
        steps = []
        solution, failed = scipy.sparse.linalg.cg(system, b, M=M, rtol=1e-8, callback=steps.append, maxiter=2000)
        assert not failed
        counts.append(len(steps))
        solutions.append(solution)
    assert counts[1] < 0.7 * counts[0], counts
    np.testing.assert_allclose(*solutions, atol=1e-5 * np.linalg.norm(solutions[0]))


def test_links_to_what_shows_no_examples_do_not_depend_on_the_size_of_the_batches():
    case = Case("placed")
    (one,), (other,) = (case.fit(size=size, structure="block-tridiagonal").factors.links for size in (1, 7))
    close(other.A, one.A)
    close(other.G, one.G)


def test_an_example_of_which_nothing_counts_adds_nothing_where_each_is_seen_alone():
    case = Case("placed")
    case.x[0] = 6
    counts = lambda x: x != 6  # noqa: E731
    some = [(x, y) for x, y in case.loader(1) if bool(counts(x).any())]
    one = case.fit(mask=counts)
    other = fit_curvature(case.model, "categorical", some, mask=counts, progress=False)
    assert one.examples == other.examples == len(some) < N
    close(one.operator.to_dense(), other.operator.to_dense())


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, K)

    def forward(self, one, other):
        return self.layer(one + other)


def test_a_model_of_two_inputs_takes_a_pair_of_them():
    torch.manual_seed(0)
    model, (one, other), y = Sum(), torch.randn(2, N, 4), torch.randint(K, (N,))
    (expected,) = fit_curvature(model.layer, "categorical", (one + other, y), progress=False).factors.layers
    examples = [((one[i], other[i]), y[i]) for i in range(N)]
    for data in (((one, other), y), [((one, other), y)], DataLoader(examples, batch_size=N)):
        curvature = fit_curvature(model, "categorical", data, progress=False)
        assert all(map(torch.equal, curvature.layers["layer"], expected))
        assert len(curvature.self_scores(data)) == len(curvature.variances(data)) == N


class Fixed(nn.Module):
    """Takes N examples, and no other number of them."""

    def forward(self, x):
        return x.view(N, 4)


def test_a_model_may_have_one_batch_size():
    torch.manual_seed(0)
    layer, data = nn.Linear(4, K), (torch.randn(N, 4), torch.randint(K, (N,)))
    found, expected = (
        fit_curvature(nn.Sequential(first, layer), "categorical", data, progress=False).layers["1"]
        for first in (Fixed(), nn.Identity())
    )
    assert all(map(torch.equal, found, expected))


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


def test_numbers_of_numpy_are_numbers():
    curvature = Case("mlp").fit()
    for one in (np.float32(1), np.int64(1), torch.tensor(1.0, dtype=torch.float64)):
        assert torch.equal(curvature.logdet(one, scale=one), curvature.logdet(1.0))
        assert torch.equal(curvature.shifted(one, scale=one).to_dense(), curvature.shifted(1.0).to_dense())


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


def test_inference_mode_is_no_obstacle():
    case = Case("mlp")
    with torch.inference_mode():
        curvature = case.fit()
        scores, F = curvature.self_scores(case.loader()), FisherOperator(case.model, "categorical", case.loader())
        assert len(F.gradient()) == len(F @ curvature.pack(case.parameters)) == 2
    assert torch.equal(curvature.operator.to_dense(), case.fit().operator.to_dense())
    assert torch.equal(scores, case.fit().self_scores(case.loader()))


def test_a_layer_that_no_gradient_reaches_adds_nothing_to_the_scores():
    model, x, y = mlp(), torch.randn(N, 5), torch.randint(K, (N,))
    with torch.no_grad():
        model[2].weight.zero_()
    curvature = fit_curvature(model, "categorical", (x, y), progress=False)
    assert float(curvature.layers["0"].G.abs().max()) == 0
    scores = curvature.scores((x, y), (x, y))
    assert bool(scores.isfinite().all())
    torch.testing.assert_close(curvature.self_scores((x, y)), scores.diagonal())
