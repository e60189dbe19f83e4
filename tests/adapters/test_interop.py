"""Agreement with curvlinops, laplace-torch and kronfluence, where they are installed (the extra `interop`), in float64.

The network has linear layers, a convolution, a normalisation and an embedding. curvlinops and kronfluence take the
first two alone: there the others are skipped. laplace-torch takes all of them with our backend.
"""

import pytest
import torch
from torch import nn

from kfaclinalg_torch import FisherOperator, curvlinops_operator, fit_curvature, gpytorch_operator, laplace_backend

N, K, TOLERANCE = 24, 3, 1e-10
pytestmark = pytest.mark.filterwarnings("ignore")


KNOWN, OTHERS = ("conv", "hidden", "last"), ("embed", "norm")


class Network(nn.Module):
    def __init__(self, plain=False):
        super().__init__()
        self.conv, self.hidden, self.last = nn.Conv2d(1, 2, 3), nn.Linear(32, 5), nn.Linear(5, K)
        if not plain:
            self.embed, self.norm = nn.Embedding(2, 5), nn.LayerNorm(5)
        self.plain = plain

    def forward(self, x):
        h = torch.tanh(self.hidden(torch.tanh(self.conv(x)).flatten(1)))
        return self.last(h if self.plain else self.norm(h + self.embed((x[:, 0, 0, 0] > 0).long())))


@pytest.fixture
def case():
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield Network().eval(), torch.randn(N, 1, 6, 6), torch.randint(K, (N,))
    torch.set_default_dtype(before)


def agree(x, y):
    assert float(torch.linalg.vector_norm(x - y)) <= TOLERANCE * float(torch.linalg.vector_norm(y))


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_factors_of_curvlinops(case, estimator):
    curvlinops = pytest.importorskip("curvlinops")
    model, x, y = case
    kind = curvlinops.FisherType.TYPE2 if estimator == "exact" else curvlinops.FisherType.EMPIRICAL
    tangents = {name: torch.randn_like(p) for name, p in model.named_parameters() if name.startswith(KNOWN)}
    loss, parameters = nn.CrossEntropyLoss(), [model.get_parameter(name) for name in tangents]
    options = {"fisher_type": kind, "check_deterministic": False, "separate_weight_and_bias": False}
    theirs = curvlinops.KFACLinearOperator(model, loss, parameters, [(x, y)], **options)
    ours = fit_curvature(model, "categorical", [(x, y)], estimator=estimator, skip=OTHERS, progress=False)
    product = dict(zip(tangents, theirs @ list(tangents.values()), strict=True))
    mine = ours.unpack(ours.operator @ ours.pack(tangents))
    for name in tangents:
        agree(mine[name], product[name])
    agree(ours.operator.trace(), torch.as_tensor(theirs.trace))
    agree(sum(block.trace() for block in ours.eigen), torch.as_tensor(theirs.trace))


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_eigenvalues_of_curvlinops(case, estimator):
    curvlinops = pytest.importorskip("curvlinops")
    model, x, y = case
    kind = curvlinops.FisherType.TYPE2 if estimator == "exact" else curvlinops.FisherType.EMPIRICAL
    options = {"fisher_type": kind, "check_deterministic": False, "separate_weight_and_bias": False}
    tangents = {name: torch.randn_like(p) for name, p in model.named_parameters() if name.startswith(KNOWN)}
    parameters = [model.get_parameter(name) for name in tangents]
    theirs = curvlinops.EKFACLinearOperator(model, nn.CrossEntropyLoss(), parameters, [(x, y)], **options)
    fitted = {"estimator": estimator, "structure": "eigen", "skip": OTHERS, "progress": False}
    ours = fit_curvature(model, "categorical", [(x, y)], **fitted)
    product = dict(zip(tangents, theirs @ list(tangents.values()), strict=True))
    mine = ours.unpack(ours.operator @ ours.pack(tangents))
    for name in tangents:
        agree(mine[name], product[name])


@pytest.fixture
def laplace():
    return pytest.importorskip("laplace")


def kron_laplace(laplace, case, backend, batch, part="all", collated=None):
    model, x, y = case
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=batch, collate_fn=collated)
    la = laplace.Laplace(
        model, "classification", subset_of_weights=part, hessian_structure="kron", backend=backend, prior_precision=0.7
    )
    la.fit(loader, progress_bar=False)
    return la


@pytest.mark.parametrize("part", ["all", "last_layer"])
@pytest.mark.parametrize("batch", [N, 7])
def test_laplace_takes_the_backend(laplace, case, batch, part):
    from laplace.curvature import CurvlinopsGGN

    _, x, y = case
    case = (Network(plain=True).eval(), x, y)
    ours = kron_laplace(laplace, case, laplace_backend(), batch, part)
    theirs = kron_laplace(laplace, case, CurvlinopsGGN, batch, part)
    agree(ours.posterior_precision.logdet(), theirs.posterior_precision.logdet())
    agree(ours.log_marginal_likelihood(), theirs.log_marginal_likelihood())
    agree(ours(x[:5]), theirs(x[:5]))


def test_laplace_has_tied_weights_and_vectors_alone(laplace):
    """The posterior is N F + δ I with F of each parameter by itself; a transposed convolution is no product of two."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.last, self.scale = nn.Embedding(K, 5), nn.Linear(5, K), nn.Parameter(torch.ones(5))
            self.last.weight = self.embed.weight

        def forward(self, x):
            return self.last(torch.tanh(self.scale * self.embed(x).sum(1)))

    torch.manual_seed(0)
    model, x, y = Tied().double(), torch.randint(K, (N, 4)), torch.randint(K, (N,))
    la = kron_laplace(laplace, (model, x, y), laplace_backend(), N)
    curvature = fit_curvature(model, "categorical", [(x, y)], progress=False)
    agree(la.posterior_precision.logdet(), curvature.shifted(0.7, scale=N).logdet())
    J = la.backend.jacobians(x[:5])[0]
    agree(la.functional_variance(J), curvature.variances(x[:5], delta=0.7, scale=N))
    turned = nn.Sequential(nn.ConvTranspose2d(2, 2, 2), nn.Flatten(), nn.Linear(18, K)).double()
    with pytest.raises(ValueError, match=r"two factors of each weight, expected no 0\.weight, 0\.bias"):
        kron_laplace(laplace, (turned, torch.randn(N, 2, 2, 2).double(), y), laplace_backend(), N)


def test_laplace_has_batches_of_dictionaries(laplace, case):
    class Mapped(nn.Module):
        def __init__(self, of):
            super().__init__()
            self.of = of

        def forward(self, batch):
            return self.of(batch["input_ids"])

    def collated(rows):
        x, y = zip(*rows, strict=True)
        return {"input_ids": torch.stack(x), "labels": torch.stack(y)}

    model, x, y = case
    plain = kron_laplace(laplace, case, laplace_backend(), 7)
    mapped = kron_laplace(laplace, (Mapped(model).eval(), x, y), laplace_backend(), 7, collated=collated)
    agree(mapped.posterior_precision.logdet(), plain.posterior_precision.logdet())


def test_the_posterior_is_that_of_laplace(laplace, case):
    """Its Kronecker products with our factors, biases apart: logdet, J P⁻¹ Jᵀ and samples from the same P."""
    from kfaclinalg import BlockDiagonal, Kronecker
    from kfaclinalg_torch._laplace import kronecker_factors

    model, x, y = case
    la = kron_laplace(laplace, case, laplace_backend(), N)
    curvature = fit_curvature(model, "categorical", [(x, y)], progress=False)
    blocks = []
    for G, *A in kronecker_factors(curvature):
        side = A[0] if A else torch.eye(1)
        blocks.append(Kronecker(side, G).eigh().map(lambda s: N * s.clamp(min=0)).shifted(0.7))
    P = BlockDiagonal(tuple(blocks))
    agree(la.posterior_precision.logdet(), P.logdet())
    J, _ = la.backend.jacobians(x[:5])
    variance = la.functional_variance(J)
    # their vec has the rows of W one after the other
    ps = [p.reshape(len(p), -1) for p in model.parameters()]
    parts = J.split([p.numel() for p in ps], -1)
    mine = 0
    for part, p, block in zip(parts, ps, P.blocks, strict=True):
        U = part.reshape(-1, *p.shape)
        gram = block.inverse().gram(U, U).reshape(5, K, 5, K)
        mine = mine + torch.stack([gram[i, :, i] for i in range(5)])
    agree(mine, variance)
    # Samples: theirs are θ + P^-1/2 z, with the one root that is symmetric.
    size = sum(p.numel() for p in ps)
    theirs = la.posterior_precision.bmm(torch.eye(size), exponent=-0.5)
    parts = torch.eye(size).split([p.numel() for p in ps], -1)
    roots = [
        (block.power(-0.5) @ part.reshape(-1, *p.shape)).reshape(size, -1)
        for part, p, block in zip(parts, ps, P.blocks, strict=True)
    ]
    agree(torch.cat(roots, 1), theirs)


def test_scores_of_kronfluence(case, tmp_path):
    pytest.importorskip("kronfluence")
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    model, x, y = case

    class OurTask(Task):
        def compute_train_loss(self, batch, model, sample=False):
            return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self):
            return list(KNOWN)

    fitted = {"structure": "eigen", "estimator": "empirical", "skip": OTHERS, "progress": False}
    curvature = fit_curvature(model, "categorical", [(x, y)], **fitted)
    ours = curvature.scores((x[:5], y[:5]), (x, y))
    alone = curvature.self_scores((x, y))
    data = torch.utils.data.TensorDataset(x, y)
    task = OurTask()
    analyzer = Analyzer("test", prepare_model(model, task), task, output_dir=str(tmp_path), disable_tqdm=True, cpu=True)
    everywhere = {"amp_dtype": None}
    names = ("activation_covariance", "gradient_covariance", "per_sample_gradient", "lambda")
    factor_args = FactorArguments(
        strategy="ekfac",
        use_empirical_fisher=True,
        **{f"{name}_dtype": torch.float64 for name in names},
        **everywhere,
    )
    analyzer.fit_all_factors("f", data, per_device_batch_size=N, factor_args=factor_args, overwrite_output_dir=True)
    score_args = ScoreArguments(
        damping_factor=None,
        per_sample_gradient_dtype=torch.float64,
        precondition_dtype=torch.float64,
        score_dtype=torch.float64,
    )
    analyzer.compute_pairwise_scores(
        "s", "f", query_dataset=torch.utils.data.Subset(data, range(5)), train_dataset=data,
        per_device_query_batch_size=5, per_device_train_batch_size=N, score_args=score_args, overwrite_output_dir=True,
    )  # fmt: skip
    agree(ours, analyzer.load_pairwise_scores("s")["all_modules"])
    analyzer.compute_self_scores("self", "f", train_dataset=data, per_device_train_batch_size=N,
                                 score_args=score_args, overwrite_output_dir=True)  # fmt: skip
    agree(alone, analyzer.load_self_scores("self")["all_modules"])


def test_the_solvers_of_gpytorch_and_curvlinops_take_our_operators(case):
    """To 1e-4 by GPyTorch's cg, which curvlinops calls too: it adds 1e-10 to the squares that it divides by."""
    gpytorch, curvlinops = pytest.importorskip("linear_operator"), pytest.importorskip("curvlinops")
    model, x, y = case
    F, curvature = FisherOperator(model, "categorical", [(x, y)]), fit_curvature(model, "categorical", (x, y))
    P, b = curvature.shifted(3.0), torch.randn(sum(p.numel() for p in model.parameters()), 2)
    dense = torch.stack([F.stacked(F @ F.split(e)) for e in torch.eye(len(b))], 1) + 3.0 * torch.eye(len(b))
    solution = torch.linalg.solve(dense, b)
    A, inverse = gpytorch_operator(F, 3.0), gpytorch_operator(P.inverse())
    agree(A @ b, dense @ b)
    chain = fit_curvature(model, "categorical", (x, y), structure="block-tridiagonal").inverse(0.3)
    for operator in (gpytorch_operator(chain), curvlinops_operator(chain)):
        agree(operator @ b, chain.to_dense() @ b)
    agree(inverse.to_dense(), P.inverse().to_dense())
    limits = {"tolerance": 1e-12, "max_iter": 40}
    found = [
        gpytorch.utils.linear_cg(A.matmul, b, preconditioner=inverse.matmul, **limits),
        curvlinops.CGInverseLinearOperator(curvlinops_operator(F, 3.0), **limits) @ b,
    ]
    settings = gpytorch.settings
    with settings.max_cholesky_size(1), settings.cg_tolerance(1e-12), settings.max_cg_iterations(40):
        found.append(A.solve(b))
    found.append(curvlinops.LSMRInverseLinearOperator(curvlinops_operator(F, 3.0), atol=1e-13, btol=1e-13) @ b)
    for x in found:
        error = torch.linalg.vector_norm(x - solution)
        assert float(error) <= 1e-4 * float(torch.linalg.vector_norm(solution))
    agree(found[-1], solution)
