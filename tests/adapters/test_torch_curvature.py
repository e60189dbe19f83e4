"""What `Curvature` answers, against dense Fisher matrices, Jacobians and gradients by torch.func, in float64."""

import numpy as np
import pytest
import torch
from curvature_cases import MODELS, Case, K, N, close, eye, flat, mlp
from torch import nn

from kfaclinalg import Diagonal
from kfaclinalg_torch import FisherOperator, fit_curvature, load_curvature

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


def test_numbers_of_numpy_are_numbers():
    curvature = Case("mlp").fit()
    for one in (np.float32(1), np.int64(1), torch.tensor(1.0, dtype=torch.float64)):
        assert torch.equal(curvature.logdet(one, scale=one), curvature.logdet(1.0))
        assert torch.equal(curvature.shifted(one, scale=one).to_dense(), curvature.shifted(1.0).to_dense())


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
