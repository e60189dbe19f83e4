"""A small ResNet on MNIST's digits, trained by AdamW with and without K-FAC's preconditioner.

    python docs/examples/resnet_digits.py            # under 4 minutes on one core
    python docs/examples/resnet_digits.py --quick    # about 15 seconds

The learning rate of both is from the same sweep: AdamW's has the lowest final loss, the other gets to that loss first.
The preconditioner's own options are below, and the same for all rates. Picture: build/figures/resnet_digits.png.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy

from _preconditioned_training import Plan, run
from kfaclinalg_torch import KFACPreconditioner
from mnist_autoencoder import load_digits

# By hand, at lr 0.01, seed 0: damping 1e-2 does as well, 0.1 is slower; a statistic every iteration gains 1 of 39.
KFAC = {"damping": 1e-3, "statistics_period": 5}
BATCH = 256
WIDTH = 8
PLAN = Plan(iterations=100, rates=(1e-3, 3e-3, 1e-2, 3e-2), seeds=(0, 1, 2), smoothing=10)
QUICK = Plan(iterations=30, rates=(3e-3, 1e-2), seeds=(0,), smoothing=5)

DIGITS = Path(__file__).with_name("data") / "mnist_10000.npz"


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.GroupNorm(4, outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.GroupNorm(4, outputs),
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.layers(x) + self.shortcut(x))


def resnet() -> nn.Sequential:
    """Images (N, 1, 14, 14) to the logits of the ten digits (N, 10)."""
    return nn.Sequential(
        nn.Conv2d(1, WIDTH, 3, padding=1, bias=False),
        nn.GroupNorm(4, WIDTH),
        nn.ReLU(),
        Block(WIDTH, WIDTH, stride=1),
        Block(WIDTH, 2 * WIDTH, stride=2),
        Block(2 * WIDTH, 4 * WIDTH, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * WIDTH, 10),
    )


def digits() -> tuple[Tensor, Tensor]:
    """Images (N, 1, 14, 14), the mean of each 2 x 2 pixels, and their labels (N,)."""
    images, labels = load_digits(DIGITS)
    return avg_pool2d(images.view(-1, 1, 28, 28), 2), torch.from_numpy(labels).long()


def batches(count: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """The first `count` mini-batches of the shuffled digits, shuffled anew each time all were seen."""
    while True:
        for chosen in torch.randperm(len(IMAGES), generator=generator).split(BATCH)[:-1]:
            if count == 0:
                return
            count -= 1
            yield IMAGES[chosen], LABELS[chosen]


def train(seed: int, lr: float, iterations: int, preconditioned: bool) -> Iterator[float]:
    """The training loop; it yields the loss of each mini-batch."""
    torch.manual_seed(seed)
    model = resnet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    if preconditioned:
        preconditioner = KFACPreconditioner(model, likelihood="categorical", **KFAC)

    for images, labels in batches(iterations, torch.Generator().manual_seed(seed)):
        optimizer.zero_grad()
        outputs = model(images)
        if preconditioned:
            preconditioner.update(outputs)
        loss = cross_entropy(outputs, labels)
        loss.backward()
        if preconditioned:
            preconditioner.step()
        optimizer.step()
        yield loss.item()


IMAGES, LABELS = digits()

if __name__ == "__main__":
    run(__doc__, "A ResNet on MNIST", "resnet_digits", train, PLAN, QUICK)
