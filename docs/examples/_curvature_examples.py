"""What the examples of `fit_curvature` share: the digits, the training of a model, the command line and the picture."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy
from tqdm import tqdm

from _arguments import count, folder, whole
from _demo_page import STYLE
from mnist_autoencoder import ROOT, load_digits, print_table

DIGITS = Path(__file__).with_name("data") / "mnist_10000.npz"


def mnist(*sizes: int, pixels: int = 28) -> list[tuple[Tensor, Tensor]]:
    """Parts of so many of MNIST's digits: images (N, pixels²) and labels (N,)."""
    images, labels = load_digits(DIGITS)
    images = avg_pool2d(images.view(-1, 1, 28, 28), 28 // pixels).flatten(1)
    count = sum(sizes)
    return list(zip(images[:count].split(sizes), torch.from_numpy(labels).long()[:count].split(sizes), strict=True))


def perceptron(*sizes: int, dropout: float = 0.0, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers of these sizes."""
    modules: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        modules += [nn.Linear(inputs, outputs), activation(), *([nn.Dropout(dropout)] if dropout else [])]
    return nn.Sequential(*modules[: -2 if dropout else -1])


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int, seed: int = 0, **options: Any) -> nn.Module:
    """Adam, in mini-batches of 100 shuffled by this seed; the model is in evaluation afterwards."""
    optimizer, generator = torch.optim.Adam(model.parameters(), **options), torch.Generator().manual_seed(seed)
    model.train()
    for _ in tqdm(range(epochs), desc="training", mininterval=0.5, leave=False):
        for chosen in torch.randperm(len(x), generator=generator).split(100):
            optimizer.zero_grad()
            cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> float:
    return float((model(x).argmax(-1) == y).double().mean())


def arguments(doc: str | None, **more: int) -> argparse.Namespace:
    """--quick, --seed, --out, and numbers by their names."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a run of seconds, which shows little")
    parser.add_argument("--seed", type=whole, default=0, help="of the initial weights and all sampling (default 0)")
    parser.add_argument("--out", type=folder, default=ROOT / "build" / "figures", help="folder (build/figures)")
    for name, default in more.items():
        parser.add_argument(f"--{name}", type=count, default=default, help=f"default {default}")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # layers of this size gain nothing from more
    return args


def publish(path: Path, rows: list[list[str]], draw: Callable[[Figure], None], size: tuple[float, float]) -> None:
    """Print the table, draw the picture."""
    print_table(rows)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    print(f"Picture: {path}")
