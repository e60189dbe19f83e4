"""A generated data set like CURVES (Hinton and Salakhutdinov 2006), which is not distributed with this project.

Theirs are synthetic images of 28 x 28 pixels, each of one curve that three random points determine: six numbers, as
many as the code of the autoencoder has. How they drew it is not said; here it is the quadratic Bézier curve through the
three points, with a soft edge.

    python docs/examples/curves.py            # draws the first curves, in build/figures/curves.png
"""

import argparse
import math
from pathlib import Path

import numpy as np

from _arguments import whole

PIXELS = 28
MARGIN = 4.0  # of the three points, in pixels: the curve leaves their box by less than 3
WIDTH = 0.8  # the standard deviation of the ink across the stroke, in pixels
DARKNESS = 3.0  # the middle of a stroke is 1 - exp(-3)
NODES = 64  # of ink on a curve

ROOT = Path(__file__).resolve().parents[2]


def curves(count: int, rng: np.random.Generator) -> np.ndarray:
    """Images (count, 784), float32 in [0, 1], of one curve each.

    >>> images = curves(3, np.random.default_rng(0))
    >>> images.shape, images.dtype, bool((images >= 0).all() and (images <= 1).all())
    ((3, 784), dtype('float32'), True)
    """
    points = rng.uniform(MARGIN, PIXELS - 1 - MARGIN, size=(count, 3, 2)).astype(np.float32)
    points[:, 1] = 2 * points[:, 1] - (points[:, 0] + points[:, 2]) / 2  # the curve is at the old one when t = 1/2
    return np.concatenate([draw(part) for part in np.array_split(points, max(1, count // 1000))])


def draw(points: np.ndarray) -> np.ndarray:
    """The Bézier curves of control points (count, 3, 2), as images (count, 784).

    Ink is a Gaussian moved along the curve. It is separable, so all its positions on one curve are added up by one
    product of a (28, nodes) and a (nodes, 28) matrix.
    """
    t = (np.arange(NODES, dtype=np.float32) + 0.5) / NODES
    weights = np.stack([(1 - t) ** 2, 2 * t * (1 - t), t**2])
    slopes = np.stack([-2 * (1 - t), 2 - 4 * t, 2 * t])
    x, y = np.moveaxis(np.einsum("cpd,pt->ctd", points, weights), -1, 0)
    length = np.linalg.norm(np.einsum("cpd,pt->ctd", points, slopes), axis=-1) / NODES  # of the curve around each node
    rows = bumps(y) * (length / (WIDTH * math.sqrt(2 * math.pi)))[:, None, :]  # on a straight line the ink is 1
    ink = rows @ bumps(x).swapaxes(-1, -2)
    return (1 - np.exp(-DARKNESS * ink)).reshape(len(points), PIXELS**2)


def bumps(centres: np.ndarray) -> np.ndarray:
    """Centres (count, nodes) to (count, 28, nodes): a Gaussian around each, at the pixels of one axis."""
    pixels = np.arange(PIXELS, dtype=np.float32)[:, None]
    return np.exp(-(((pixels - centres[:, None, :]) / WIDTH) ** 2) / 2)


def main() -> None:
    import matplotlib.image

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=whole, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "figures" / "curves.png")
    args = parser.parse_args()
    images = curves(80, np.random.default_rng(args.seed)).reshape(5, 16, PIXELS, PIXELS)
    sheet = np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2))).swapaxes(1, 2).reshape(5 * (PIXELS + 4), -1)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    matplotlib.image.imsave(args.out, sheet.repeat(2, 0).repeat(2, 1), cmap="gray_r", vmin=0, vmax=1)
    print(f"Picture: {args.out}")


if __name__ == "__main__":
    main()
