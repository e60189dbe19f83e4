"""What the preconditioner costs a process: counted flops, entries and bytes, over stated speeds."""

from collections.abc import Sequence

from kfaclinalg_torch._places import Item, Place, critical_path, places_of

LINK = 25e9  # bytes/s each way of a process: 200 Gbit/s
FLOPS = 19.5e12  # flop/s of float32 products, an A100
BYTES = 4


def dense(n: int, m: int) -> Item:
    return [((n, False), (m, False), 1)]


def gpt2_small() -> list[Item]:
    """The 48 layers of its 12 blocks, [weight, bias]."""
    return [dense(*shape) for _ in range(12) for shape in ((769, 2304), (769, 768), (769, 3072), (3073, 768))]


def resnet50() -> list[Item]:
    """Its 53 convolutions, without biases, and the classifier."""
    shapes, width = [(3 * 49, 64)], 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        inner = 64 * 2**stage
        for block in range(blocks):
            shapes += [(width, inner), (9 * inner, inner), (inner, 4 * inner)]
            shapes += [(width, 4 * inner)] if block == 0 else []
            width = 4 * inner
    return [dense(*shape) for shape in [*shapes, (2049, 1000)]]


NETWORKS = {"ResNet-50": resnet50(), "GPT-2 small": gpt2_small()}


def most(places: Sequence[Place], sizes: Sequence[int]) -> int:
    """The largest sum of an owner."""
    sums: dict[int, int] = {}
    for place, size in zip(places, sizes, strict=True):
        sums[place.owner] = sums.get(place.owner, 0) + size
    return max(sums.values())


def model_of(items: Sequence[Item], P: int, placement: str, statistics: int, inverses: int) -> dict[str, float]:
    """Seconds a step of communication, refreshes (2 flops for each n³) and products; bytes held and sent.

    Of the process that has most, since layers are whole; sent, on average. Nothing is overlapped; latencies and the
    passes that make the statistics are left out.
    """
    shapes = [(n, m) for item in items for (n, _), (m, _), _ in item]
    T = sum((n * (n + 1) + m * (m + 1)) / 2 for n, m in shapes)
    V, own = sum(n * m for n, m in shapes), places_of(items, P) if placement == "owner" else [Place(0, 0)] * len(items)
    r, owner = (P - 1) / P, placement == "owner"
    sent = BYTES * ((1 if owner else 2) * r * T / statistics + (r * V if owner else r * T / inverses))
    products = most(own, [2 * n * m * (n + m) for n, m in shapes])
    refresh = 2 * critical_path(items, P, inverses)[0] / inverses
    memory = 2 * BYTES * most(own, [n * n + m * m for n, m in shapes])
    return {"seconds": sent / LINK + (products + refresh) / FLOPS, "memory": memory, "bytes": sent}
