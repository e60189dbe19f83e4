"""Progress per iteration against the size m of the mini-batch, early and late in training (the paper's Figure 9).

    python docs/examples/progress_against_batch.py            # about 80 seconds on two cores
    python docs/examples/progress_against_batch.py --quick    # about 10 seconds

K-FAC trains a small autoencoder of MNIST digits, averaged over 2 x 2 pixels, with a growing mini-batch. From two of
its iterates on, early and late, each method goes on for the same number of iterations with every fixed m, without the
velocity of before; K-FAC keeps its factors, λ and γ. Progress is the mean fall of the log of the reconstruction error
an iteration. The error is that of all digits, at the last iterate or the average of the iterates, whichever is lower
(Section 13).

Paper: progress per iteration tends to grow faster than m for K-FAC with momentum, as m or a little slower without,
and far less for Nesterov's gradient. Ours: late, K-FAC needs hundreds of digits for any progress at all, and from
there on progress grows with m, faster with momentum than without; Nesterov's hardly changes. Early, m matters little
beyond a few hundred. Where they differ: with momentum our progress grows less than in proportion to m (the exponents
are printed). The paper trains a larger network at every m from the first iteration on, and for much longer; here all
start from two given points.
"""

import argparse
import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, binary_cross_entropy_with_logits
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from _arguments import whole
from _demo_page import COLOURS, FAINT, STYLE
from kfaclinalg_torch import KFAC
from mnist_autoencoder import (
    DIGITS,
    WEIGHT_DECAY,
    autoencoder,
    growing_sizes,
    load_digits,
    print_table,
    reconstruction_error,
)

SIZES = (196, 100, 50, 25, 10, 25, 50, 100, 196)
DAMPING = 0.1  # λ at the start
LEARNING_RATES = (3e-4, 1e-3, 1e-2)  # of Nesterov's gradient: each m has the one with the most progress
PICTURE = Path(__file__).resolve().parents[2] / "build" / "figures" / "figure_9.png"
Step = Callable[[Tensor], object]  # one iteration on these digits


class Start(NamedTuple):
    """An iterate of K-FAC, from which every run goes on for so many iterations."""

    name: str
    model: nn.Module
    state: dict  # of the optimizer, as `state_dict` gives it
    error: float
    iterations: int


def starts(digits: Tensor, at: Sequence[int], iterations: Sequence[int], seed: int) -> list[Start]:
    """The iterates of one run of K-FAC at these two numbers of iterations."""
    model, generator = autoencoder(seed, SIZES), torch.Generator().manual_seed(seed)
    optimizer = KFAC(model, "bernoulli", damping=DAMPING, weight_decay=WEIGHT_DECAY, generator=generator)
    sizes = growing_sizes(500, len(digits) // 2, at[-1])
    found = []
    for k in tqdm(range(1, at[-1] + 1), desc="K-FAC to the starts", mininterval=0.5):
        batch = draw_batch(digits, next(sizes), generator)
        optimizer.step(batch, batch)
        if k in at:
            state = optimizer.state_dict()
            state["state"]["update"] = None  # δ0: nobody has a velocity
            name, error = f"after {k} iterations of K-FAC", reconstruction_error(model, digits)
            found.append(Start(name, copy.deepcopy(model), state, error, iterations[len(found)]))
    return found


def draw_batch(digits: Tensor, size: int, generator: torch.Generator) -> Tensor:
    return digits[torch.randperm(len(digits), generator=generator)[:size]]


def kfac(model: nn.Module, start: Start, generator: torch.Generator, momentum: str) -> Step:
    options = {"damping": DAMPING, "weight_decay": WEIGHT_DECAY, "momentum": momentum}
    optimizer = KFAC(model, "bernoulli", **options, generator=generator)
    optimizer.load_state_dict(start.state | {"generator": generator.get_state()})
    return lambda batch: optimizer.step(batch, batch)


def nesterov(model: nn.Module, start: Start, generator: torch.Generator, lr: float) -> Step:
    settings = {"momentum": 0.9, "nesterov": True, "weight_decay": WEIGHT_DECAY}
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, **settings)

    def step(batch: Tensor) -> None:
        optimizer.zero_grad()
        (binary_cross_entropy_with_logits(model(batch), batch, reduction="sum") / len(batch)).backward()
        optimizer.step()

    return step


METHODS = {
    "K-FAC": [(kfac, "quadratic-model")],
    "K-FAC without momentum": [(kfac, "none")],
    "Nesterov": [(nesterov, lr) for lr in LEARNING_RATES],
}


def progress(digits: Tensor, start: Start, method: Callable, setting: object, size: int, seed: int) -> float:
    """The mean fall of the log of the error an iteration, in percent."""
    model, generator = copy.deepcopy(start.model), torch.Generator().manual_seed(seed + 1)
    step = method(model, start, generator, setting)
    average = AveragedModel(model, avg_fn=lambda old, new, n: old + (new - old) * max(1 / (float(n) + 1), 0.1))
    for _ in range(start.iterations):
        step(draw_batch(digits, size, generator))
        average.update_parameters(model)
    errors = [reconstruction_error(m, digits) for m in (model, average)]
    error = min((e for e in errors if math.isfinite(e)), default=math.inf)
    return 100 * math.log(start.error / error) / start.iterations if math.isfinite(error) else -math.inf


def measure(digits: Tensor, found: list[Start], sizes: Sequence[int], seed: int) -> dict[tuple[str, str], np.ndarray]:
    """Progress for each m, by start and method."""
    curves = {}
    runs = [(start, name, size) for start in found for name in METHODS for size in sizes]
    for start, name, size in tqdm(runs, desc="runs", mininterval=0.5):
        best = max(progress(digits, start, *candidate, size, seed) for candidate in METHODS[name])
        curves.setdefault((start.name, name), []).append(best)
    return {key: np.array(values) for key, values in curves.items()}


def table(curves: dict[tuple[str, str], np.ndarray], sizes: Sequence[int]) -> list[list[str]]:
    rows = [["% an iteration", *(f"m = {size:,}" for size in sizes)]]
    return rows + [[f"{name}, {start}", *(f"{y:.3f}" for y in values)] for (start, name), values in curves.items()]


def verdict(curves: dict[tuple[str, str], np.ndarray], sizes: Sequence[int]) -> str:
    """The exponent p of progress ~ m^p between the largest m and a fifth of it."""
    lines, m = [], np.array(sizes)
    for (start, name), values in curves.items():
        largest, fifth = values[-1], values[np.argmin(abs(5 * m - m[-1]))]
        text = f"p = {math.log(largest / fifth) / math.log(5):.2f}" if min(largest, fifth) > 0 else "no p"
        if np.any(values <= 0):
            text += f", and no progress with m = {m[values <= 0].max():,}"
        lines.append(f"{name}, {start}: progress ~ m^p with {text}")
    return "\n".join(["Between the largest m and a fifth of it:", *lines])


def draw(curves: dict[tuple[str, str], np.ndarray], found: list[Start], sizes: Sequence[int]) -> None:
    """One panel a start. Of what lies below zero, where the error grew, only the end is shown."""
    mpl.rcParams.update(STYLE)
    figure, panels = plt.subplots(1, len(found), figsize=(10, 4.2), layout="constrained")
    for panel, start in zip(panels, found, strict=True):
        shown = [curves[start.name, name] for name in METHODS]
        top = max(values.max() for values in shown)
        for name, values, colour in zip(METHODS, shown, COLOURS.values(), strict=False):
            panel.plot(sizes, values, "o-", color=colour, markersize=4, label=name)
        panel.axhline(0, color=FAINT, linewidth=0.8)
        panel.set(xscale="log", ylim=(-0.5 * top if min(map(min, shown)) < 0 else 0, 1.1 * top), xlabel="mini-batch m")
        panel.set_title(f"{start.name} (error {start.error:.2f})")
        panel.set_xticks(sizes, [f"{size:,}" for size in sizes], minor=False)
        panel.minorticks_off()
    panels[0].set_ylabel("progress, % of the error an iteration")
    panels[-1].legend(frameon=False)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter runs with fewer m")
    parser.add_argument("--seed", type=whole, default=0, help="of the initial weights and all sampling (default 0)")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the layers are small: a second thread would only wait for the first
    images, _ = load_digits(DIGITS)
    digits = avg_pool2d(images.reshape(-1, 1, 28, 28), 2).flatten(1)
    at, iterations, sizes = (20, 150), (20, 40), (100, 200, 500, 1000, 2000, 5000)
    if args.quick:
        at, iterations, sizes = (6, 16), (4, 4), (200, 1000)
    found = starts(digits, at, iterations, args.seed)
    curves = measure(digits, found, sizes, args.seed)
    print_table(table(curves, sizes))
    print(verdict(curves, sizes))
    draw(curves, found, sizes)
    print(f"Picture: {PICTURE}")


if __name__ == "__main__":
    main()
