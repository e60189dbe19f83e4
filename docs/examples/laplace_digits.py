"""How sure a network is of digits that are turned: a Laplace approximation with Kronecker-factored curvature.

    python docs/examples/laplace_digits.py            # about a minute on one core
    python docs/examples/laplace_digits.py --quick    # a few seconds

A perceptron trained on a thousand of MNIST's digits stays sure of itself when test digits are turned, where most of its
answers are wrong. With N(θ, P⁻¹), P = N F + δI, its outputs f vary by J P⁻¹ Jᵀ, and the probabilities are those of
f / √(1 + π/8 · variance) (MacKay 1992). The prior precision δ is the one that maximises the marginal likelihood

    log p(D | δ) = -loss(θ) - δ/2 |θ|² + d/2 log δ - 1/2 log det P

by its gradient through the eigenvalues of F, one decomposition for all steps.

Drawn against the angle: the accuracy and the mean confidence, the negative log likelihood, and the expected calibration
error (15 bins); and the marginal likelihood against δ. Shown: where the digits are turned, confidence and likelihood
are far better; upright they are a little worse, since this approximation is then less sure than it might be. Where
laplace-torch is installed the same is done with it in the same run, by its own steps with our factors
(`laplace_backend`); it takes weights and biases apart, which is all they differ in.
"""

import math
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import affine_grid, cross_entropy, grid_sample, nll_loss
from tqdm import tqdm

from _curvature_examples import arguments, mnist, perceptron, publish, train
from _demo_page import COLOURS, FAINT
from kfaclinalg_torch import fit_curvature, laplace_backend

PIXELS, BINS = 14, 15
MAP, OURS, THEIRS = "the weights alone", "Laplace", "laplace-torch"
COLOUR = {MAP: COLOURS["Nesterov"], OURS: COLOURS["K-FAC"], THEIRS: COLOURS["Adam"]}
Predict = Callable[[Tensor], Tensor]  # images to probabilities


class Fitted(NamedTuple):
    predict: Predict
    delta: float
    evidence: float
    seconds: float  # of the fit and the prior precision


def map_of(model: torch.nn.Module) -> Fitted:
    return Fitted(lambda x: torch.softmax(model(x), -1).detach(), math.nan, math.nan, 0.0)


def laplace_of(model: torch.nn.Module, x: Tensor, y: Tensor, steps: int) -> tuple[Fitted, Callable[[Tensor], Tensor]]:
    """The approximation at the δ of the largest marginal likelihood, and the latter as a function of δ."""
    start = time.perf_counter()
    curvature = fit_curvature(model, "categorical", [(x, y)], progress=False)
    N, parameters = curvature.examples, torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    loss, squares = cross_entropy(model(x), y, reduction="sum").detach(), parameters.square().sum()

    def evidence(delta: Tensor) -> Tensor:
        logdet = curvature.logdet(delta, scale=N)
        return -loss - (delta * squares - len(parameters) * delta.log() + logdet) / 2

    log_delta = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([log_delta], 0.1)
    for _ in tqdm(range(steps), desc="prior precision", leave=False):
        optimizer.zero_grad()
        (-evidence(log_delta.exp())).backward()
        optimizer.step()
    delta, seconds = float(log_delta.detach().exp()), time.perf_counter() - start

    def predict(x: Tensor) -> Tensor:
        variances = curvature.variances(list(x.split(500)), delta=delta, scale=N).diagonal(dim1=-2, dim2=-1)
        return torch.softmax(model(x).detach() / torch.sqrt(1 + math.pi / 8 * variances), -1)

    return Fitted(predict, delta, float(evidence(torch.tensor(delta))), seconds), evidence


def laplace_torch_of(model: torch.nn.Module, x: Tensor, y: Tensor, steps: int) -> Fitted:
    """The same by laplace-torch, with our factors."""
    from laplace import Laplace

    start = time.perf_counter()
    options = {"subset_of_weights": "all", "hessian_structure": "kron", "backend": laplace_backend()}
    la: Any = Laplace(model, "classification", **options)  # type: ignore[arg-type]
    data = torch.utils.data.TensorDataset(x, y)
    la.fit(torch.utils.data.DataLoader(data, batch_size=len(x)), progress_bar=False)
    la.optimize_prior_precision(method="marglik", n_steps=steps)
    seconds, predict = time.perf_counter() - start, lambda x: la(x, link_approx="probit").detach()
    return Fitted(predict, float(la.prior_precision), float(la.log_marginal_likelihood()), seconds)


def turned(x: Tensor, degrees: float) -> Tensor:
    """Each image (N, pixels²) about its middle."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    images = x.view(-1, 1, PIXELS, PIXELS)
    grid = affine_grid(torch.tensor([[[c, -s, 0.0], [s, c, 0.0]]]).expand(len(x), 2, 3), list(images.shape), False)
    return grid_sample(images, grid, align_corners=False).flatten(1)


def measures(p: Tensor, y: Tensor) -> dict[str, float]:
    """Accuracy, mean confidence, negative log likelihood, expected calibration error of probabilities (N, K)."""
    confidence, answer = p.max(-1)
    right = (answer == y).double()
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.float64).scatter_add_(0, bins, right - confidence.double())
    nll = nll_loss(p.clamp(min=1e-12).log(), y)
    error = gaps.abs().sum() / len(y)
    return {"accuracy": right.mean(), "confidence": confidence.mean(), "nll": nll, "calibration error": error}


def draw(figure: Figure, angles: np.ndarray, found: dict[str, dict[str, list[float]]], curve: Any, fitted: Any) -> None:
    panels = figure.subplots(2, 2).flat
    titles = {"accuracy": "Accuracy (dotted) and confidence", "nll": "Negative log likelihood"}
    titles |= {"calibration error": "Expected calibration error"}
    for (measure, title), panel in zip(titles.items(), panels, strict=False):
        for name, values in found.items():
            style = "--" if name == THEIRS else "-"
            shown = "confidence" if measure == "accuracy" else measure
            panel.plot(angles, values[shown], style, color=COLOUR[name], label=name)
            if measure == "accuracy":
                panel.plot(angles, values["accuracy"], ":", color=COLOUR[name])
        panel.set(title=title, xlabel="degrees", ylim=(0, None))
    deltas, evidence = curve
    last = list(figure.axes)[-1]
    last.plot(deltas, evidence, color=COLOUR[OURS])
    last.axvline(fitted.delta, color=FAINT, linewidth=1, linestyle=":")
    last.set(xscale="log", title="Marginal likelihood; dotted: found by its gradient", xlabel="prior precision δ")
    low = float(np.quantile(evidence, 0.3))
    last.set_ylim(low, max(evidence) + 0.1 * (max(evidence) - low))
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)


def main() -> None:
    args = arguments(__doc__)
    size, epochs, steps = (500, 30, 30) if args.quick else (1000, 100, 100)
    (x, y), (test, labels) = mnist(size, 200 if args.quick else 500, pixels=PIXELS)
    model = train(perceptron(PIXELS**2, 64, 32, 10, activation=torch.nn.Tanh), x, y, epochs, args.seed, lr=1e-3)
    ours, evidence = laplace_of(model, x, y, steps)
    fitted = {MAP: map_of(model), OURS: ours}
    if find_spec("laplace"):
        fitted[THEIRS] = laplace_torch_of(model, x, y, steps)
    angles = np.linspace(0, 180, 4 if args.quick else 10)
    found: dict[str, dict[str, list[float]]] = {}
    for name, fit in fitted.items():
        each = [measures(fit.predict(turned(test, angle)), labels) for angle in tqdm(angles, desc=name, leave=False)]
        found[name] = {measure: [float(m[measure]) for m in each] for measure in each[0]}
    rows = [["", *fitted], ["prior precision δ", *(f"{fit.delta:.3g}" for fit in fitted.values())]]
    rows.append(["log p(D | δ)", *(f"{fit.evidence:.1f}" for fit in fitted.values())])
    rows.append(["seconds of the fit and of δ", *(f"{fit.seconds:.2f}" for fit in fitted.values())])
    for m in found[MAP]:
        rows.append([f"{m}, upright", *(f"{values[m][0]:.3f}" for values in found.values())])
        rows.append([f"{m}, turned, mean", *(f"{np.mean(values[m][1:]):.3f}" for values in found.values())])
    deltas = np.geomspace(1e-2, 1e3, 60)
    curve = deltas, [float(evidence(torch.tensor(float(d)))) for d in deltas]
    publish(args.out / "laplace_digits.png", rows, lambda f: draw(f, angles, found, curve, ours), (10, 7))
    if THEIRS not in fitted:
        print("laplace-torch is not installed: it would be a third row (pip install -e '.[interop]').")


if __name__ == "__main__":
    main()
