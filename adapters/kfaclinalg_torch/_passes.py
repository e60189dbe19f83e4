"""Passes of a trained model over a data set, and what they show of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ._attention import differentiable
from ._batch import Batch, check_loader, is_pair, taking
from ._blocks import Block
from ._capture import Capture
from ._discovery import FALLBACKS, check_whole, found, unwrapped
from ._entries import Entries
from ._estimators import Empirical, Sampled, slope_of_loss
from ._gather import gather
from ._layer import Layer
from ._likelihoods import Likelihood, likelihood_of, masked, new_generator
from ._masks import mask_of
from ._settings import check_choice, check_generator, check_known, dtype_of, tensor_of, values_of
from ._silenced import silenced
from ._statistics import Statistic
from ._table import table_of
from ._team import Team, group_of
from ._trained import Trained
from ._use import Use

Data = Iterable[Any]  # of pairs (inputs, targets)


class Passes:
    """A model in evaluation, its layers, and the options by which it is seen; `open` holds the hooks."""

    capture: Capture

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        *,
        structure: Any = "block-diagonal",
        estimator: Any = "exact",
        layers: Mapping[type, Any] | None = None,
        mask: Callable[..., Any] | None = None,
        fallback: str = "diagonal",
        weight_sharing: str | Mapping[str, str] = "expand",
        outputs: Any = None,
        skip: Sequence[str] = (),
        generator: torch.Generator | None = None,
        factor_dtype: torch.dtype | None = None,
        chunk_size: int | None = None,
        **unknown: Any,
    ) -> None:
        check_known(unknown)
        check_generator(generator)
        check_choice("fallback", fallback, FALLBACKS)
        if mask is not None and not callable(mask):
            raise TypeError(f"mask is a {type(mask).__name__}, expected a function of the model's inputs or None")
        if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
            raise ValueError(f"chunk_size is {chunk_size!r}, expected an integer >= 1 or None")
        self.estimator, self.structure = values_of(estimator, structure, {})
        self.likelihood: Likelihood = likelihood_of(likelihood)
        group, self.model = group_of(model, None), unwrapped(model)
        check_whole(self.model)
        known = found(self.model, skip, table_of(layers), fallback)
        options: dict[str, Any] = {"weight_sharing": weight_sharing, "fallback": fallback}
        self.trained = Trained(self.model, known, linked=self.structure.linked, **options)
        self.trained.who = "fit_curvature"
        self.dtype, self.device = dtype_of(factor_dtype, known.layers), known.layers[0].parameters[0].device
        self.team = Team(group, self.device)
        drawn = isinstance(self.estimator, Sampled)  # of others no result depends on what is drawn
        self.generator = generator or (new_generator(self.device) if drawn else torch.Generator(self.device))
        self.mask, self.outputs, self.chunk_size = mask, outputs, chunk_size
        self._apart: set[Block] | None = None

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self.trained.layers

    @contextmanager
    def open(self) -> Iterator[None]:
        """With hooks, and the model in evaluation; it is as it was afterwards."""
        self.capture = self.trained.capture()
        self.capture.mask_of = lambda *args, **kwargs: mask_of(self.mask, args, kwargs)
        try:
            with self.evaluated():
                yield
        finally:
            self.capture.remove()

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """The model in evaluation, in full precision and seen by nobody else, and as it was afterwards."""
        self.trained.check_held("curvature")
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            full = torch.autocast(self.device.type, enabled=False)
            with self.trained.thawed(), silenced(self.model), torch.inference_mode(False), full:
                yield
        finally:
            for module in training:
                module.training = True

    def pieces(self, data: Any, what: str = "loader") -> Iterator[Batch]:
        """The batches of a loader, or a single one, on the model's device and in chunks."""
        empty = True
        check_loader(what, data)
        for pair in [data] if is_pair(data) else data:
            if not is_pair(pair):
                raise TypeError(f"{what} gives a {type(pair).__name__}, expected pairs (inputs, targets) of tensors")
            batch = Batch(*(_moved(x, self.device) for x in pair))
            empty = False
            for _, piece in batch.chunks(self.chunk_size):
                yield piece
        if empty:
            raise ValueError(f"{what} is empty, expected one batch (inputs, targets) or more")

    def shown(self, piece: Batch) -> tuple[Tensor, list[Use], Likelihood]:
        """The outputs, what the pass has shown, and the likelihood of the positions that count."""
        self.capture.uses, self.capture.paused = [], False
        try:
            with torch.enable_grad(), differentiable(), taking(piece.inputs):
                outputs = tensor_of(self.outputs, piece.call(self.model))
        finally:
            self.capture.paused = True
        likelihood = masked(self.likelihood, self.capture.now.mask, outputs)
        return outputs, [use for use in self.capture.uses if use.block in self.trained.found.blocks], likelihood

    def settle(self, piece: Batch) -> None:
        """See in a first pass which layers are none."""
        with torch.enable_grad(), taking(piece.inputs):
            self.trained.probe(piece, lambda returned: tensor_of(self.outputs, returned))

    def apart(self, piece: Batch) -> set[Block]:
        """The blocks that show no examples: parameters that no rule knows, and what sees the same rows of two as of
        one, as an embedding of positions does."""
        if self._apart is None:
            single = next(piece.chunks(1))[1]
            both = torch.utils._pytree.tree_map(lambda x: torch.cat([x, x]), single.inputs)
            mask_of, self.capture.mask_of = self.capture.mask_of, None
            try:
                one, two = (
                    {(use.block, len(use.inputs)) for use in self.shown(of)[1] if not use.block.scattered}
                    for of in (single, Batch(both, torch.cat([single.targets] * 2)))
                )
            except ValueError:  # a model of one batch size
                one = two = set()
            finally:
                self.capture.mask_of = mask_of
            self._apart = {block for block, _ in one & two} | set(self.trained.found.entries)
        return self._apart

    def put_apart(self, names: Iterable[str]) -> None:
        """The blocks of these names are `apart`."""
        self._apart = {block for block in self.trained.found.blocks if block.name in names}

    def parts(self, piece: Batch, blocks: Iterable[Block]) -> Iterator[tuple[Batch, list[Block]]]:
        """The piece, with the blocks that show its examples; then each example alone, with the others."""
        apart, blocks = self.apart(piece), list(blocks)
        if seen := [block for block in blocks if block not in apart]:
            yield piece, seen
        if others := [block for block in blocks if block in apart]:
            for _, single in piece.chunks(1):
                if self.mask is None or bool(single.call(self.mask).any()):  # type: ignore[arg-type]
                    yield single, others

    def take(self, statistic: Statistic, piece: Batch) -> None:
        """A statistic of the gradients at the outputs that the estimator takes."""
        outputs, uses, likelihood = self.shown(piece)
        leaves = {block.parameter: block.parameter for block in statistic.all if isinstance(block, Entries)}
        uses = [use for use in uses if use.block in statistic.all]
        gather(statistic, uses, leaves, outputs, self.cotangents(likelihood, outputs, piece), self.capture.now)

    def cotangents(self, likelihood: Likelihood, outputs: Tensor, piece: Batch) -> Iterator[Tensor]:
        """∂(loss of one example)/∂z."""
        if isinstance(self.estimator, Empirical):
            return iter([slope_of_loss(likelihood, outputs, piece.targets)])
        return self.estimator.cotangents(likelihood, outputs, len(piece), self.generator)

    def slopes(self, piece: Batch, cotangents: Callable[..., Iterable[Tensor]]) -> Iterator[tuple[Any, int]]:
        """For each cotangent of (likelihood, outputs) what arrives at the uses, with them; and of how many examples."""
        outputs, uses, likelihood = self.shown(piece)
        edges: list[Any] = [use.outputs for use in uses]
        for v in cotangents(likelihood, outputs, piece):
            slopes = torch.autograd.grad(outputs, edges, v, retain_graph=True, allow_unused=True) if edges else ()
            yield [(use, g) for use, g in zip(uses, slopes, strict=True) if g is not None], len(piece)


def _moved(x: Any, device: torch.device) -> Any:
    return torch.utils._pytree.tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, x)
