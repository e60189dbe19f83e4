"""Which training digits a prediction rests on: influence functions with EKFAC's curvature on MNIST.

    python docs/examples/influence.py            # under 2 minutes on one core
    python docs/examples/influence.py --quick    # about 10 seconds

A perceptron is trained on digits of which 10% have a wrong label. Self-influence, gᵀ (F + δI)⁻¹ g of each example's
gradient, ranks them: 85% of its first tenth are wrong labels. The gradient's norm does as well, and the loss, of a
network that has not learnt the wrong labels by heart, a little better. Below are, for three test digits, the training
digits that help and that harm its prediction most: digits with the label that they look like, and wrong ones.

The linear datamodeling score (Park et al. 2023) asks whether scores predict what another training set would give:
models are trained anew on random halves of clean data, and for each test digit the sum of the scores of a half is rank-
correlated with the loss of its model. The setting is that published with dattri (Deng et al. 2024): a perceptron
784-128-64-10 with dropout 0.1, SGD of 0.01 with momentum 0.9, 50 epochs, 5000 training and 500 test digits. Its
figures, read off a chart, are the dotted lines; it has none for EKFAC, which comes out beside the best of those that
take one model, CG. The damping is swept: a score at one that was never swept may be of little use, and at the right end
it is no more than the inner product of two gradients.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from _curvature_examples import accuracy, arguments, mnist, perceptron, publish
from _demo_page import COLOURS, FAINT, INK
from kfaclinalg_torch import fit_curvature

NETWORK, DROPOUT = (784, 128, 64, 10), 0.1
LR, MOMENTUM, BATCH = 0.01, 0.9, 64
FLIPPED = 0.1
DAMPINGS = (1e-2, 0.1, 1.0, 10.0, 1e3)  # times the mean eigenvalue of each layer
PUBLISHED = {"CG": 0.26, "TracIn": 0.15, "TRAK-1": 0.11, "Grad-Dot": 0.10, "TRAK-50": 0.45}
SHOWN, QUERIES = 5, 3


class Flipped(NamedTuple):
    """What is known of the training digits with wrong labels, and of the test digits that are shown."""

    x: Tensor
    y: Tensor
    wrong: Tensor  # whether the label was changed
    ranks: dict[str, Tensor]  # scores, the most suspicious highest
    queries: tuple[Tensor, Tensor]
    influence: Tensor  # (queries, N)


def trained(x: Tensor, y: Tensor, subsets: Tensor, epochs: int, what: str) -> list[torch.nn.Module]:
    """One model for each row of `subsets` (models, examples), all at once."""
    model = perceptron(*NETWORK, dropout=DROPOUT)
    members = [perceptron(*NETWORK, dropout=DROPOUT) for _ in subsets]
    values, _ = torch.func.stack_module_state(members)  # type: ignore[arg-type]
    values = {name: value.detach() for name, value in values.items()}
    speed = {name: torch.zeros_like(value) for name, value in values.items()}

    def loss(values: dict[str, Tensor], chosen: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, values, (x[chosen],)), y[chosen])

    slopes = vmap(grad(loss), randomness="different")
    for _ in tqdm(range(epochs), desc=what, mininterval=0.5, leave=False):
        order = torch.stack([subset[torch.randperm(len(subset))] for subset in subsets])
        for chosen in order.split(BATCH, 1):
            for name, g in slopes(values, chosen).items():
                values[name].sub_(speed[name].mul_(MOMENTUM).add_(g), alpha=LR)
    for i, member in enumerate(members):
        member.load_state_dict({name: value[i] for name, value in values.items()})
    return [member.eval() for member in members]


@torch.no_grad()
def losses(model: Any, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(model(x), y, reduction="none")


def curvature_of(model: torch.nn.Module, x: Tensor, y: Tensor) -> Any:
    loader = list(zip(x.split(500), y.split(500), strict=True))
    return fit_curvature(model, "categorical", loader, structure="eigen", estimator="exact", progress=False)


def flipped(x: Tensor, labels: Tensor, test: tuple[Tensor, Tensor], epochs: int) -> Flipped:
    """Self-influence and its rivals where 10% of the labels are wrong."""
    wrong = torch.rand(len(x)) < FLIPPED
    y = torch.where(wrong, (labels + torch.randint(1, 10, labels.shape)) % 10, labels)
    (model,) = trained(x, y, torch.arange(len(x))[None], epochs, "wrong labels")
    curvature = curvature_of(model, x, y)
    ranks = {
        "self-influence": curvature.self_scores((x, y)),
        "norm of the gradient": curvature.self_scores((x, y), damping=1e6),
        "loss": losses(model, x, y),
    }
    hard = losses(model, *test).argsort(descending=True)[: 4 * QUERIES : 4]
    queries = (test[0][hard], test[1][hard])
    print(f"{int(wrong.sum())} of {len(x)} labels are wrong; accuracy on the test digits {accuracy(model, *test):.3f}")
    return Flipped(x, y, wrong, ranks, queries, curvature.scores(queries, (x, y)))


def precision(rank: Tensor, wrong: Tensor) -> np.ndarray:
    """Of the k examples that come first the share with a wrong label, for each k."""
    found = wrong[rank.argsort(descending=True)].double().cumsum(0)
    return (found / torch.arange(1, len(wrong) + 1)).numpy()


def datamodeling(x: Tensor, y: Tensor, test: tuple[Tensor, Tensor], epochs: int, models: int) -> dict[float, Tensor]:
    """The linear datamodeling score of each test digit (q,), for each damping."""
    halves = torch.stack([torch.randperm(len(x))[: len(x) // 2] for _ in range(models)])
    truth = torch.stack([losses(model, *test) for model in trained(x, y, halves, epochs, "retraining")])
    (model,) = trained(x, y, torch.arange(len(x))[None], epochs, "all of the data")
    curvature, member = curvature_of(model, x, y), torch.zeros(models, len(x)).scatter_(1, halves, 1.0)
    means = [float(block.eigenvalues.mean()) for block in curvature.eigen]
    found = {}
    for d in tqdm(DAMPINGS, desc="damping", leave=False):
        predicted = -member @ curvature.scores(test, (x, y), damping=[d * mean for mean in means]).mT
        found[d] = rank_correlation(predicted, truth)
    return found


def rank_correlation(predicted: Tensor, truth: Tensor) -> Tensor:
    """Spearman's, of each column."""
    u, v = (z.argsort(0).argsort(0).double() for z in (predicted, truth))
    u, v = u - u.mean(0), v - v.mean(0)
    return (u * v).sum(0) / (u.norm(dim=0) * v.norm(dim=0))


def draw(figure: Figure, case: Flipped, scores: dict[float, Tensor]) -> None:
    upper, lower = figure.subfigures(2, 1, height_ratios=(1, 1.15))
    left, right = upper.subplots(1, 2)
    share = np.arange(1, len(case.x) + 1) / len(case.x)
    for (name, rank), colour in zip(case.ranks.items(), COLOURS.values(), strict=False):
        left.plot(share[20:], precision(rank, case.wrong)[20:], color=colour, label=name)
    left.axhline(FLIPPED, color=FAINT, linewidth=1, linestyle=":", label="chance")
    left.set(xlim=(0, 0.4), ylim=(0, 1.02), title="Wrong labels among those ranked first", xlabel="share ranked")
    left.legend(frameon=False)
    means = [float(score.mean()) for score in scores.values()]
    right.plot(list(scores), means, "o-", color=COLOURS["K-FAC"])
    for name, score in PUBLISHED.items():
        right.axhline(score, color=FAINT, linewidth=1, linestyle=":")
        side = "top" if name == "Grad-Dot" else "bottom"
        right.text(0.01, score, name, transform=right.get_yaxis_transform(), va=side, color=INK)
    right.set(xscale="log", title="Linear datamodeling score of EKFAC", xlabel="damping / mean eigenvalue of a layer")
    right.set_ylim(min(0, *means), 0.5)
    panels = lower.subplots(QUERIES, 2 * SHOWN + 1)
    for row, x, y, scored in zip(panels, *case.queries, case.influence, strict=True):
        order = scored.argsort(descending=True)
        chosen = [*order[:SHOWN].tolist(), *reversed(order[-SHOWN:].tolist())]
        digit(row[SHOWN], x, f"test: {int(y)}", INK)
        for panel, i in zip([*row[:SHOWN], *row[SHOWN + 1 :]], chosen, strict=True):
            digit(panel, case.x[i], f"{int(case.y[i])}", COLOURS["Nesterov"] if case.wrong[i] else INK)
    lower.suptitle("Most helpful (left), most harmful (right) digits and their labels; red: a wrong one", fontsize=10.5)


def digit(panel: Any, x: Tensor, title: str, colour: str) -> None:
    panel.imshow(x.view(28, 28), cmap="gray_r")
    panel.set_title(title, color=colour, loc="center", fontsize=9)
    panel.axis("off")


def main() -> None:
    args = arguments(__doc__, retrainings=16)
    train, test, epochs, models = (600, 60, 8, 4) if args.quick else (5000, 500, 50, args.retrainings)
    (x, y), tested = mnist(train, test)
    case = flipped(x, y, tested, max(epochs // 2, 8))
    scores = datamodeling(x, y, tested, epochs, models)
    count = int(case.wrong.sum())
    rows = [["ranked by", "wrong among as many as are wrong"]]
    rows += [[name, f"{precision(rank, case.wrong)[count - 1]:.3f}"] for name, rank in case.ranks.items()]
    rows += [["damping / mean eigenvalue", f"datamodeling score, {models} halves"]]
    for damping, score in scores.items():
        rows.append([f"{damping:g}", f"{float(score.mean()):.3f} ± {float(score.std()) / len(score) ** 0.5:.3f}"])
    rows += [[f"{name}, published by dattri", f"{score:.2f}"] for name, score in PUBLISHED.items()]
    publish(args.out / "influence.png", rows, lambda figure: draw(figure, case, scores), (10, 8.4))


if __name__ == "__main__":
    main()
