"""Part 3: training the MNIST autoencoder on the device, K-FAC beside Adam and Nesterov, each the same seconds.

The methods and their settings are the demo's, docs/examples/mnist_autoencoder.py; what is new is the device.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch

import mnist_autoencoder as demo
from _bench import DEVICE, DRY, Table, wait
from kfaclinalg_torch import KFAC

SECONDS = 2.0 if DRY else 45.0  # a method
BATCH = 500 if DRY else 2000
ADAM = {"lr": 2e-3, "weight_decay": demo.WEIGHT_DECAY, "fused": True}
NESTEROV = {"lr": 0.005, "momentum": 0.9, "nesterov": True, "weight_decay": demo.WEIGHT_DECAY, "fused": True}


def trained(method: str, digits: torch.Tensor, table: Table) -> None:
    """A row: how many steps, the milliseconds of one, the longest over the median, the error at half and at the end."""
    net = demo.autoencoder(0).to(DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    optimizer: torch.optim.Optimizer
    if method == "K-FAC":
        optimizer = KFAC(net, "bernoulli", damping=0.01, weight_decay=demo.WEIGHT_DECAY, generator=generator)
    elif method == "Adam":
        optimizer = torch.optim.Adam(net.parameters(), **ADAM)
    else:
        optimizer = torch.optim.SGD(net.parameters(), **NESTEROV)
    seconds, halfway = [], []
    while sum(seconds) < SECONDS:
        wait()
        start = time.perf_counter()
        x = digits[torch.randint(len(digits), (BATCH,), generator=generator, device=DEVICE)]
        if isinstance(optimizer, KFAC):
            optimizer.step(x, x)
        else:
            optimizer.zero_grad()
            loss = torch.nn.functional.binary_cross_entropy_with_logits(net(x), x, reduction="sum") / len(x)
            loss.backward()
            optimizer.step()
        wait()
        seconds.append(time.perf_counter() - start)
        if not halfway and sum(seconds) > SECONDS / 2:
            halfway.append(demo.reconstruction_error(net, digits))
    error, later = demo.reconstruction_error(net, digits), seconds[5:] or seconds
    middle = statistics.median(later)
    table.row(method, len(seconds), 1e3 * middle, max(later) / middle, *halfway, error, holds=error < 60)


if __name__ == "__main__":
    images, _ = demo.load_digits(demo.DIGITS)
    digits = images[: 1000 if DRY else None].to(DEVICE)
    columns = "steps", "ms a step", "longest/median", "error at half", "error"
    table = Table(f"MNIST autoencoder, {len(digits)} digits, {SECONDS:.0f} s a method, batch {BATCH}", *columns)
    for method in ("K-FAC", "Adam", "Nesterov"):
        with table.guarded(method):
            trained(method, digits, table)
    sys.exit(bool(table.failed))
