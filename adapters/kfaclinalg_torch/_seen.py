"""The estimate of a preconditioner, from outside: what it is given, what can be seen of it, and how it is stopped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from kfaclinalg import LayerFactors

from ._estimate import Estimate
from ._estimators import Empirical


class Seen:
    """A preconditioner, but for what it does to the gradients."""

    estimator: Any
    _estimate: Estimate

    @property
    def layers(self) -> dict[str, LayerFactors]:
        """The moving averages of A and G, by the names of the modules."""
        return dict(self._estimate.averages.layers)

    @property
    def fallback(self) -> dict[str, str]:
        """By their names the parameters of which the diagonal is taken, and why."""
        return dict(self._estimate.found.fallback)

    @property
    def skipped(self) -> dict[str, str]:
        """By their names the parameters that are left alone, and why."""
        return dict(self._estimate.found.skipped)

    @property
    def rejected(self) -> int:
        """How many statistics held a NaN or an infinity."""
        return self._estimate.rejected

    @property
    def mask(self) -> Any:
        """Which positions count."""
        return self._estimate.mask

    @mask.setter
    def mask(self, mask: Any) -> None:
        self._estimate.mask = mask

    def update(self, outputs: Any) -> None:
        """Take the statistics of the forward pass that gave these outputs, before the loss's backward pass.

        Each sample, or column of the exact factor, is one backward pass, without weight gradients. Where no statistic
        is due, nothing happens.

        Args:
            outputs: what the model returned, of which the option `outputs` takes the tensor; or that tensor.

        Raises:
            ValueError: the estimator is "empirical", which takes the loss's own backward pass; a loss, or outputs of
                a pass that was not seen.
            RuntimeError: the loss's backward pass came before, or `remove`; or this is a copy, which has no hooks.
        """
        if isinstance(self.estimator, Empirical):
            raise ValueError("estimator 'empirical' takes its statistics from loss.backward(): do not call update()")
        capture = self._estimate.capture
        if capture.removed:
            raise RuntimeError("update() after remove(), or of a copy, has no hooks: make a new preconditioner")
        if not capture.now.number and not capture.called:
            raise ValueError("update() got outputs of a pass that was not seen: call the model after this was made")
        self._estimate.update(outputs)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Capture nothing in the passes under the `with`."""
        capture = self._estimate.capture
        before, capture.paused = capture.paused, True
        try:
            yield
        finally:
            capture.paused = before

    def remove(self) -> None:
        """Take all hooks away; the model is then as it was."""
        self._estimate.capture.remove()

    @property
    def device(self) -> torch.device:
        return self._estimate.device
