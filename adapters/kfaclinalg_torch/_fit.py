"""The curvature of a model over a data set: means of A and G in one pass, EKFAC's eigenvalues in a second one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from itertools import chain
from operator import add
from typing import Any

import torch
from torch import Tensor, nn

from kfaclinalg import Factors, KroneckerEigen, Link

from ._batch import Batch, check_again, check_loader, is_pair
from ._blocks import Block
from ._curvature import Curvature
from ._example_squares import shows_gradients, squares_of_examples
from ._layer import Layer
from ._likelihoods import Likelihood
from ._links import chained, cross_sums, means
from ._masks import check_count
from ._parallel import tell_gone
from ._passes import Data, Passes
from ._spectra import at_device, spectra_of
from ._statistics import Statistic
from ._team import Team, group_of
from ._use import Use


def fit_curvature(
    model: nn.Module,
    likelihood: str | Likelihood,
    loader: Data,
    *,
    structure: Any = "block-diagonal",
    estimator: Any = "exact",
    offload: torch.device | str | None = None,
    progress: bool = True,
    group: Any = None,
    **options: Any,
) -> Curvature:
    """The `Curvature` of a trained model: A = E[a aᵀ] and G = E[g gᵀ] of each layer as means over a data set.

    One pass over the data, in evaluation mode; for "eigen" a second one, for the mean squares of the gradients along
    the eigenvectors (EKFAC, George et al. 2018), of which nothing is kept but their sum. With the exact and the
    empirical estimator the result does not depend on the size or the order of the batches, but for rounding; the
    eigenvectors of an eigenvalue that A or G has twice, and with them EKFAC's F, are anybody's. What no rule knows, or
    sees no examples, as an embedding of positions, is seen one example at a time. Under `torch.distributed` each
    process brings its share of the data, and all get the same; an error of one is everyone's, and "block-tridiagonal"
    is refused there.

    Args:
        model, likelihood, structure, estimator: as of `KFACPreconditioner`; the empirical Fisher is of the targets of
            the loader and the likelihood's loss.
        loader: gives pairs (inputs, targets), the batch first; "eigen" goes through it twice. A single pair is one
            batch.
        offload: where the sums, and then A and G, are kept, "cpu" for example; None: on the device of the model.
        progress: whether to show a progress bar, where tqdm is installed.
        group: the processes that share the data; None: those of DistributedDataParallel, or all.
        options: `layers`, `fallback`, `weight_sharing`, `outputs`, `skip`, `generator`, `factor_dtype` as of
            `KFACPreconditioner`; `mask`, a function of the model's inputs; `chunk_size`, examples at once.

    Raises:
        TypeError, ValueError: a wrong option, an empty loader, or nothing that has a curvature. The model is as it was.

    >>> model, x = nn.Linear(2, 3), torch.ones(4, 2)
    >>> curvature = fit_curvature(model, "categorical", [(x, torch.zeros(4, dtype=torch.int64))], progress=False)
    >>> curvature.layers[""].A.shape, float(curvature.shifted(1.0).logdet()) > 0
    (torch.Size([3, 3]), True)
    """
    passes = Passes(model, likelihood, structure=structure, estimator=estimator, **options)
    passes.team = Team(group_of(model, group), passes.device)
    check_loader("loader", loader)
    if passes.structure.observes or passes.structure.linked:
        check_again("loader", loader, f"{structure!r} takes two")
    if passes.structure.linked and passes.team.size > 1:
        raise ValueError(f"structure {structure!r} takes all of the data in one process, got several")
    device = _device(offload)
    state = passes.generator.get_state()
    with passes.open(), torch.no_grad():
        factors, examples = _moments(passes, watched(loader, progress, "A and G"), device)
        passes.generator.set_state(state)  # the same targets again
        eigen = None
        if passes.structure.linked:
            factors = factors._replace(links=_links(passes, watched(loader, progress, "links"), device))
        if passes.structure.observes:
            eigen = _corrected(passes, watched(loader, progress, "eigenvalues"), spectra_of(factors))
    return Curvature(passes, factors, examples, eigen)


def _device(offload: Any) -> torch.device | None:
    try:
        return None if offload is None else torch.device(offload)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"offload is {offload!r}, expected a torch.device, its name or None") from error


class _Kept(Statistic):
    """The uses alone, of which more than A and G is made."""

    def add(self, use: Use, g: Tensor, draw: int = 0) -> None:
        self.saw(use.of)
        self.uses.setdefault((use.of.number, draw), []).append((use, g))


def _moments(passes: Passes, loader: Data, device: torch.device | None) -> tuple[Factors, int]:
    """A and G of each layer, and of how many examples they are the means."""
    pieces = passes.pieces(loader)
    with passes.team.agreed("A and G", "the layers") as facts:
        facts["the layers"] = [(layer.name, *(tuple(p.shape) for p in layer.parameters)) for layer in passes.layers]
        first = next(pieces)
        passes.settle(first)
    tell_gone(passes.trained, passes.team)
    with passes.team.agreed("A and G"):
        apart = {block.name for block in passes.apart(first)}
    passes.put_apart(set().union(*passes.team.told(apart, "A and G")))
    statistics = _statistics(passes, passes.apart(first))
    with passes.team.agreed("A and G"):
        for piece in chain([first], pieces):
            for part, blocks in passes.parts(piece, passes.trained.found.blocks):
                passes.take(next(one for one in statistics if blocks[0] in one.all), part)
            for statistic in statistics:
                statistic.settle(device)
    found: dict[str, Any] = {}
    for statistic in statistics:
        found |= statistic.moments(1.0) if statistic.all else {}
    layers = tuple(layer.factors(found) or layer.no_factors(passes.dtype, device) for layer in passes.layers)
    _, (N,) = passes.team.sums([], [max((one.examples for one in statistics), default=0)], "A and G")
    check_count(N)
    return Factors(layers), N


def _statistics(passes: Passes, apart: set[Block]) -> list[Statistic]:
    """That of the blocks that show every example, and that of the others."""
    blocks, kept = passes.trained.found.blocks, (passes.trained.sharing, passes.dtype, False, passes.team)
    return [Statistic([b for b in blocks if (b in apart) is alone], *kept) for alone in (False, True)]


def _corrected(passes: Passes, loader: Data, spectra: Sequence[KroneckerEigen]) -> tuple[KroneckerEigen, ...]:
    """The eigenvalues of each layer that says the gradients of its examples become their mean squares."""
    bases = {layer: F for layer, F in zip(passes.layers, spectra, strict=True) if shows_gradients(layer)}
    sums = {layer: torch.zeros_like(F.eigenvalues) for layer, F in bases.items()}  # type: ignore[arg-type]
    counts = dict.fromkeys(bases, 0)
    with passes.team.agreed("the eigenvalues"):
        for piece in passes.pieces(loader):
            for part, layers in _parts(passes, piece, bases):
                kept = _kept(passes, layers)
                passes.take(kept, part)
                for layer in layers:
                    counts[layer] += passes.capture.now.counted
                    squares = squares_of_examples(kept, layer, at_device(bases[layer], passes.device))
                    if squares is not None:
                        sums[layer] += squares.to(sums[layer].device)
    summed, N = passes.team.sums(list(sums.values()), list(counts.values()), "the eigenvalues")
    means = {layer: S / n for layer, S, n in zip(sums, summed, N, strict=True)}
    pairs = zip(passes.layers, spectra, strict=True)
    return tuple(KroneckerEigen(F.Q_A, F.Q_B, means[layer]) if layer in means else F for layer, F in pairs)


def _parts(passes: Passes, piece: Batch, layers: Iterable[Layer]) -> Iterator[tuple[Batch, list[Layer]]]:
    """As `Passes.parts`, of layers: where one of the tied blocks is apart all are."""
    apart = passes.apart(piece)
    at = {next((block for block in layer.blocks if block in apart), layer.blocks[0]): layer for layer in layers}
    for part, blocks in passes.parts(piece, at):
        yield part, [at[block] for block in blocks]


def _links(passes: Passes, loader: Data, device: torch.device | None) -> tuple[Link, ...]:
    """E[a_i a_{i+1}ᵀ] and E[g_i g_{i+1}ᵀ] of neighbouring layers."""
    chain = chained(passes.layers)
    total: list[Tensor] = []
    totals: list[int] = []
    for piece in passes.pieces(loader):
        shown = passes.apart(piece).isdisjoint(layer.blocks[0] for layer in chain)
        for _, part in piece.chunks(len(piece) if shown else 1):
            kept = _kept(passes, chain)
            passes.take(kept, part)
            tensors, counts = cross_sums(kept, chain, 1.0)
            total = list(map(add, total, tensors)) if totals else tensors
            totals = list(map(add, totals, counts)) if totals else counts
    return means([x.to(device or x.device) for x in total], totals)


def _kept(passes: Passes, layers: Iterable[Layer]) -> Statistic:
    return _Kept([block for layer in layers for block in layer.blocks], passes.trained.sharing, passes.dtype, True)


def watched(loader: Any, progress: bool, what: str) -> Any:
    """With a progress bar, where it is wanted and tqdm is there."""
    if not progress or find_spec("tqdm") is None:
        return loader
    from tqdm import tqdm

    return loader if is_pair(loader) else tqdm(loader, desc=what, leave=False)
