"""Positions that do not count, and models that take and return more than tensors: as the same data without padding."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from training import ESTIMATORS

from kfaclinalg import Diagonal
from kfaclinalg_torch import KFAC, Categorical, Empirical, KFACPreconditioner
from kfaclinalg_torch._batch import Batch

pytestmark = pytest.mark.usefixtures("double")
LENGTHS, PAD = (5, 2, 4), 0
STRUCTURES = ["block-diagonal", "eigen", "block-tridiagonal"]


class Tagger(nn.Module):
    """A class for each word, of the word and what came before it: padding at the end is not seen by the others."""

    def __init__(self, lengths=None):
        torch.manual_seed(0)
        super().__init__()
        self.embedding, self.norm = nn.Embedding(9, 4), nn.LayerNorm(4)
        self.layer, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, tokens):
        x = self.norm(self.embedding(tokens)).cumsum(1)
        return self.head(torch.tanh(self.layer(x)))


class Convolved(nn.Module):
    """The same of a convolution of width 1 and of a recurrent layer that packs its sequences."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.embedding, self.layer = nn.Embedding(9, 4), nn.Conv1d(4, 5, 1)
        self.gru, self.head = nn.GRU(5, 4, batch_first=True, bidirectional=True), nn.Linear(8, 3)

    def forward(self, tokens):
        x = torch.tanh(self.layer(self.embedding(tokens).mT)).mT
        lengths = (tokens != PAD).sum(1)
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.head(nn.utils.rnn.pad_packed_sequence(self.gru(packed)[0], batch_first=True)[0])


class Ragged(Categorical):
    """Targets that depend on nothing but the outputs."""

    def sample(self, outputs, generator):
        return outputs.argmin(-1)


def sentences():
    generator = torch.Generator().manual_seed(1)
    x = [torch.randint(1, 9, (length,), generator=generator) for length in LENGTHS]
    y = [torch.randint(3, (length,), generator=generator) for length in LENGTHS]
    return x, y


def padded(rows, value):
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def dense(layers):
    return {name: [M.to_dense() if isinstance(M, Diagonal) else M for M in pair] for name, pair in layers.items()}


def preconditioner_of(model, estimator, **options):
    own = {} if estimator == "empirical" else {"likelihood": Ragged()}
    kind = Empirical("sum") if estimator == "empirical" else estimator
    return KFACPreconditioner(model, estimator=kind, damping=0.1, **own, **options)


def step(model, preconditioner, batches):
    model.zero_grad()
    for x, y in batches:
        z = model(x)
        if not isinstance(preconditioner.estimator, Empirical):
            preconditioner.update(z)
        functional.cross_entropy(z.mT, y, ignore_index=-100, reduction="sum").backward()
    preconditioner.step()
    return dense(preconditioner.layers), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("structure", ["block-diagonal", "eigen"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kind", [Tagger, Convolved])
def test_padding_enters_nothing(kind, estimator, structure, sharing):
    """Each sentence in a pass of its own, without padding, is one batch of them."""
    x, y = sentences()
    options = {"structure": structure, "weight_sharing": sharing}
    whole, single = kind(), kind()
    one = preconditioner_of(whole, estimator, mask=lambda tokens: tokens != PAD, **options)
    other = preconditioner_of(single, estimator, **options)
    came = step(whole, one, [(padded(x, PAD), padded(y, -100))])
    expected = step(single, other, [(a[None], b[None]) for a, b in zip(x, y, strict=True)])
    torch.testing.assert_close(came, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_padding_matters_without_a_mask(estimator):
    """So that the test above can fail."""
    x, y = sentences()
    whole, single = Tagger(), Tagger()
    came, _ = step(whole, preconditioner_of(whole, estimator), [(padded(x, PAD), padded(y, -100))])
    batches = [(a[None], b[None]) for a, b in zip(x, y, strict=True)]
    expected, _ = step(single, preconditioner_of(single, estimator), batches)
    assert not torch.allclose(came["layer"][0], expected["layer"][0], rtol=1e-3)


def test_the_mask_may_be_set_before_a_pass():
    x, y = sentences()
    whole, other = Tagger(), Tagger()
    one, two = preconditioner_of(whole, "exact"), preconditioner_of(other, "exact", mask=lambda tokens: tokens != PAD)
    one.mask = padded(y, -100) != -100  # what only the loss knows
    batches = [(padded(x, PAD), padded(y, -100))]
    torch.testing.assert_close(step(whole, one, batches), step(other, two, batches), rtol=0, atol=0)
    one.mask = torch.ones(3, 5)
    with pytest.raises(TypeError, match=r"mask gives a torch\.float64, expected a boolean tensor"):
        whole(padded(x, PAD))
    one.mask = torch.ones(2, 5, dtype=torch.bool)  # that of another batch
    with pytest.raises(ValueError, match=r"mask has shape \(2, 5\), expected \(3, \.\.\.\)"):
        whole(padded(x, PAD))
    with torch.no_grad():
        whole(padded(x, PAD))  # shows nothing


@pytest.mark.parametrize("structure", STRUCTURES)
def test_kfac_counts_what_the_mask_counts(structure):
    """Loss, gradient, factors and gram of padded sentences: the means over the sentences by themselves."""
    x, y = sentences()
    everything = {"statistics_fraction": 1.0, "curvature_fraction": 1.0, "structure": structure}
    model = Tagger()
    optimizer = KFAC(model, Ragged(), estimator="exact", mask=lambda tokens: tokens != PAD, **everything)
    weights = optimizer._trained.network.weights()
    tokens, targets = padded(x, PAD), padded(y, 0)
    whole = optimizer._problem(Batch(tokens, targets, tokens != PAD), optimizer._trained.capture(), optimizer.options)
    parts = [
        optimizer._problem(Batch(a[None], b[None]), optimizer._trained.capture(), optimizer.options)
        for a, b in zip(x, y, strict=True)
    ]
    h, gradient = whole.loss_and_gradient(weights)
    singles = [part.loss_and_gradient(weights) for part in parts]
    torch.testing.assert_close(h, sum(s[0] for s in singles) / 3)
    torch.testing.assert_close(whole.loss(weights), h)
    for i, V in enumerate(gradient):
        torch.testing.assert_close(V, sum(s[1][i] for s in singles) / 3, rtol=1e-9, atol=1e-12)
    directions = [tuple(torch.randn_like(W) for W in weights) for _ in range(2)]
    gram = sum(part.curvature_gram(weights, directions) for part in parts) / 3
    torch.testing.assert_close(whole.curvature_gram(weights, directions), gram, rtol=1e-9, atol=1e-12)

    factors = whole.factors(weights, structure == "block-tridiagonal")
    found = [part.factors(weights, structure == "block-tridiagonal") for part in parts]
    rows = torch.tensor(LENGTHS) / sum(LENGTHS)
    for i, name in enumerate(optimizer._trained.names):
        G = sum(one.layers[i].G for one in found) / 3
        torch.testing.assert_close(factors.layers[i].G, G, rtol=1e-9, atol=1e-12)
        if name in ("layer", "head"):
            A = sum(r * one.layers[i].A for r, one in zip(rows, found, strict=True))
            torch.testing.assert_close(factors.layers[i].A, A, rtol=1e-9, atol=1e-12)
    for i, link in enumerate(factors.links):
        A = sum(r * one.links[i].A for r, one in zip(rows, found, strict=True))
        torch.testing.assert_close(link.A, A, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(link.G, sum(one.links[i].G for one in found) / 3, rtol=1e-9, atol=1e-12)


def test_kfac_trains_on_padded_sentences():
    x, y = sentences()
    model, tokens, targets = Tagger(), padded(x, PAD), padded(y, -100)
    optimizer = KFAC(model, "categorical", damping=0.1)
    losses = [optimizer.step(tokens, targets, mask=targets != -100) for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0]
    assert optimizer.info.refused == ""


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_examples_of_which_nothing_counts_change_nothing(chunk_size):
    x, y = sentences()
    tokens, targets = padded(x, PAD), padded(y, 0)
    more, none = torch.cat([tokens, tokens[:2]]), torch.zeros(2, 5, dtype=torch.bool)
    everything = {"statistics_fraction": 1.0, "curvature_fraction": 1.0, "chunk_size": chunk_size}
    one, two = (KFAC(Tagger(), Ragged(), estimator="exact", weight_decay=0.0, **everything) for _ in range(2))
    mask = tokens != PAD
    for _ in range(2):
        came = one.step(more, torch.cat([targets, targets[:2]]), mask=torch.cat([mask, none]))
        assert came == pytest.approx(two.step(tokens, targets, mask=mask))
    assert one.info.refused == two.info.refused == ""
    assert one.info.alpha == pytest.approx(two.info.alpha)
    with pytest.raises(ValueError, match="mask counts no position"):
        one.step(tokens, targets, mask=torch.zeros_like(mask))


# -- dictionaries, records and several outputs --


class Record(nn.Module):
    def __init__(self, kind):
        torch.manual_seed(0)
        super().__init__()
        self.kind, self.layer, self.head = kind, nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x, shift=None):
        h = torch.tanh(self.layer(x if shift is None else x + shift))
        z = self.head(h)
        return {"dictionary": {"hidden": h, "logits": z}, "tuple": (h, z)}.get(self.kind) or type(
            "Outputs", (), {"hidden": h, "logits": z}
        )()


@pytest.mark.parametrize(
    ("kind", "outputs"), [("dictionary", "logits"), ("tuple", 1), ("record", "logits"), ("record", lambda o: o.logits)]
)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_which_of_the_outputs_the_likelihood_is_of(estimator, kind, outputs):
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    model = Record(kind)
    own = {} if estimator == "empirical" else {"likelihood": "categorical"}
    generator = torch.Generator().manual_seed(0)
    preconditioner = KFACPreconditioner(model, estimator=estimator, outputs=outputs, generator=generator, **own)
    returned = model(x=x, shift=x)
    if estimator != "empirical":
        preconditioner.update(returned)
    z = returned["logits"] if kind == "dictionary" else returned[1] if kind == "tuple" else returned.logits
    functional.cross_entropy(z, y).backward()
    preconditioner.step()
    assert preconditioner.layers.keys() == {"layer", "head"}
    optimizer = KFAC(model, "categorical", outputs=outputs)
    losses = [optimizer.step({"x": x, "shift": x}, y) for _ in range(5)]
    assert losses[-1] < losses[0]


def test_what_is_no_tensor_asks_for_outputs():
    model = Record("record")
    preconditioner = KFACPreconditioner(model, likelihood="categorical")
    with pytest.raises(ValueError, match="say with outputs="):
        preconditioner.update(model(torch.randn(6, 4)))
    with pytest.raises(ValueError, match="say with outputs="):
        KFAC(model, "categorical").step(torch.randn(6, 4), torch.randint(3, (6,)))


@pytest.mark.parametrize("outputs", ["missing", 7])
@pytest.mark.parametrize("kind", ["record", "dictionary", "tuple"])
def test_outputs_that_are_not_there_are_named(kind, outputs):
    with pytest.raises(ValueError, match=f"outputs={outputs!r} is nothing of the"):
        KFAC(Record(kind), "categorical", outputs=outputs).step(torch.randn(6, 4), torch.randint(3, (6,)))
