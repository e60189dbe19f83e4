"""K-FAC as a `torch.optim.Optimizer`: a model, its layers and the state of `kfaclinalg.kfac_step`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kfaclinalg import Factors, KFACState, LayerFactors, StepInfo, kfac_step

from . import _resume as resume
from ._discovery import FALLBACKS, check_whole, found, unwrapped
from ._divided import divided
from ._estimators import Empirical, estimator_of
from ._likelihoods import Likelihood, likelihood_of, new_generator
from ._once import restore
from ._parallel import BEGIN, facts_of, probe, problem_of
from ._part import batch_of, part_of
from ._settings import check_choice, options_of, tensor_of
from ._table import table_of
from ._team import Kept, Team, check_alone, group_of
from ._trained import Group, Trained


class KFAC(torch.optim.Optimizer):
    """Algorithm 2 of Martens & Grosse (2015), for every layer that `KFACPreconditioner` knows.

    A step needs the mini-batch, not a loss: targets for the curvature are sampled from the model's own distribution,
    and the length of the step comes from the exact quadratic model. There is no learning rate.

    Args:
        model: any module. Its layers, what becomes of other parameters (`fallback`, `layers`, `skip`), `weight_sharing`
            and `outputs` are as in `KFACPreconditioner`.
        likelihood: "bernoulli" (outputs are logits), "categorical" (logits; targets are class indices) or "gaussian"
            (means, unit variance), or an object with the methods of `kfaclinalg_torch.Likelihood`.
        estimator: `Sampled(samples)` or `ExactFisher()`, or short "sampled" or "exact".
        mask: which positions count, from the model's inputs: a function that gives a boolean tensor (N, ...).
        group: the processes that share the mini-batch, each with a part of it; None: those of DistributedDataParallel,
            or all. Their step is that of one process on all of the examples.
        options: the fields of `kfaclinalg.KFACOptions`, by name. Without a `generator` one is made, seeded from
            torch's global one.

    Raises:
        TypeError, ValueError: nothing is trained, a wrong option, or parameters of several dtypes or devices, by name.

    >>> model = nn.Linear(2, 1)
    >>> optimizer = KFAC(model, "gaussian", damping=0.1)
    >>> loss = optimizer.step(torch.ones(4, 2), torch.zeros(4, 1))
    >>> optimizer.info.refused
    \'\'
    """

    info: StepInfo | None  #: what happened in the last step
    _problem = problem_of

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        *,
        estimator: Any = "sampled",
        weight_sharing: str | Mapping[str, str] = "expand",
        layers: Mapping[type, Any] | None = None,
        fallback: str = "diagonal",
        outputs: Any = None,
        mask: Any = None,
        skip: Sequence[str] = (),
        group: Any = None,
        **options: Any,
    ) -> None:
        self._group, model = group_of(model, group), unwrapped(model)
        self.model, self.likelihood, self.estimator = model, likelihood_of(likelihood), estimator_of(estimator)
        if isinstance(self.estimator, Empirical):
            raise ValueError("KFAC takes its targets from the model: estimator is 'empirical', expected 'sampled'")
        check_choice("fallback", fallback, FALLBACKS)
        check_whole(model)
        self.options = options_of(options)
        known = found(model, skip, table_of(layers), fallback)
        linked = self.options.structure_value.linked
        self._trained = Trained(model, known, linked=linked, weight_sharing=weight_sharing, fallback=fallback)
        if self.options.generator is None:
            self.options = self.options._replace(generator=new_generator(known.layers[0].parameters[0].device))
        self.outputs, self.mask = outputs, mask
        self.info = None
        self._state: KFACState | None = None
        super().__init__([p for p in model.parameters() if p.requires_grad], {})
        self.param_groups = [Group(group) for group in self.param_groups]
        if message := known.message():
            warnings.warn(f"KFAC {message}", stacklevel=2)

    @property
    def factors(self) -> Factors | None:
        """The moving averages of the second moments; None before the first step."""
        return self._state.factors if self._state else None

    @property
    def layers(self) -> dict[str, LayerFactors]:
        """The same by the names of the layers."""
        return dict(zip(self._trained.names, self.factors.layers, strict=True)) if self.factors else {}

    @property
    def fallback(self) -> dict[str, str]:
        """By their names the parameters of which the diagonal is taken, and why."""
        return dict(self._trained.found.fallback)

    @property
    def skipped(self) -> dict[str, str]:
        """By their names the parameters that are left alone, and why."""
        return dict(self._trained.found.skipped)

    def step(self, inputs: Any, targets: Tensor, *, mask: Tensor | None = None) -> float:  # type: ignore[override]
        """One iteration on this mini-batch; returns the loss before it, weight decay included.

        A step that would not be finite is refused: the parameters stay, and `info.refused` says why.

        Args:
            inputs: what the model takes, the batch first; a tuple or list for several arguments, a dictionary for
                those that have names.
            targets: what the likelihood takes, the batch first.
            mask: which positions count, a boolean tensor (N, ...); the others enter neither the loss nor the curvature.

        Raises:
            ValueError: no examples, wrong shapes, targets outside the likelihood's range, a layer that is not used, a
                parameter that was replaced or frozen. Nothing has changed then, nor after an interrupt.
        """
        check_alone(self._group is not None, "KFAC")
        team = Team(self._group, self._trained.layers[0].parameters[0].device)
        with team.agreed(*BEGIN) as facts:
            self._trained.check()
            batch = batch_of(team, inputs, targets, mask, self.mask)
            facts.update(facts_of(self, team))
        before, drawn = (self._state, self.info), self.options.generator.get_state()
        batch = part_of(team, batch, self.options.generator)
        statistics, capture, weights = [(b, b.clone()) for b in self.model.buffers()], None, None  # running ones
        try:
            probe(self._trained, team, batch, self.options.chunk_size, self._tensor_of)
            capture, weights = self._trained.capture(), self._trained.network.weights()
            problem = self._problem(batch, capture, self.options, team)
            options = divided(self.options, self._state, team)
            moved, self._state, self.info = kfac_step(problem, weights, self._state, options)
            self._trained.network.assign(weights if self.info.refused else moved)
            if self.info.refused:
                restore(statistics)
        except BaseException:  # an interrupt too leaves nothing half done
            if weights is not None:
                self._trained.network.assign(weights)
            restore(statistics)
            self._state, self.info = before
            self.options.generator.set_state(drawn)
            raise
        finally:
            if capture:
                capture.remove()
        return self.info.loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only while it is made: the layers are those of the model.

        Raises:
            ValueError: afterwards.
        """
        if self.param_groups:
            raise ValueError("KFAC takes its parameters from the model: make a new one for a model that has changed")
        super().add_param_group(param_group)

    def _tensor_of(self, returned: Any) -> Tensor:
        return tensor_of(self.outputs, returned)

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: all of it, the model too, which one deepcopy of both shares."""
        generator = self.options.generator
        left = "defaults", "param_groups", "state", "_group"
        own = {name: value for name, value in vars(self).items() if name not in left}
        own["options"] = self.options._replace(generator=None)
        own["group"], own["generator"] = Kept(self._group), (str(generator.device), generator.get_state())
        return super().__getstate__() | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        device, drawn = state.pop("generator")
        generator = torch.Generator(device)
        generator.set_state(drawn)
        state["_group"] = group_of(state["model"], state.pop("group").group)
        super().__setstate__(state | {"options": state["options"]._replace(generator=generator)})

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, the generator's state too, in tensors, numbers and lists."""
        return resume.kfac_state(self, super().state_dict()["param_groups"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict`, bitwise as if there had been no stop.

        Raises:
            ValueError: it is none, or of another structure or estimator, or of other layers. Nothing has changed then.
        """
        resume.load_kfac(self, state_dict)
