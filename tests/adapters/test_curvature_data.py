"""The data and models that `fit_curvature` takes: batches of any size, masks, sampled targets, several inputs."""

import pytest
import torch
from curvature_cases import EPS, MODELS, Case, K, N, Sum, Words, close
from torch import nn
from torch.utils.data import DataLoader
from two_devices import THERE, TwoDevices

from kfaclinalg import testing
from kfaclinalg_torch import FisherOperator, Sampled, fit_curvature
from kfaclinalg_torch._fit import _corrected

pytestmark = pytest.mark.filterwarnings("ignore:fit_curvature takes the diagonal")

every_model = pytest.mark.parametrize("name", MODELS)


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


def test_sampled_targets_agree_on_average_and_repeat():
    case = Case("mlp")
    exact = case.fit().layers["2"].G
    one, two = (
        case.fit(estimator=Sampled(2000), generator=torch.Generator().manual_seed(0)).layers["2"].G for _ in "ab"
    )
    assert torch.equal(one, two)
    assert float(torch.linalg.matrix_norm(one - exact) / torch.linalg.matrix_norm(exact)) < 0.05


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
