"""K-FAC as a `torch.optim.Optimizer`: a model, its layers and the state of `kfaclinalg.kfac_step`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kfaclinalg import Factors, KFACOptions, KFACState, StepInfo, kfac_step

from ._checkpoint import check, check_generator, check_keys, check_run, packed, restored
from ._layers import trained_layers
from ._likelihoods import Likelihood, likelihood_of, new_generator
from ._problem import Batch, NetworkProblem


class KFAC(torch.optim.Optimizer):
    """Algorithm 2 of Martens & Grosse (2015) for a model whose trained parameters belong to `nn.Linear` layers.

    A step needs the mini-batch, not a loss: targets for the curvature are sampled from the model's own distribution,
    and the length of the step comes from the exact quadratic model. There is no learning rate.

    Args:
        model: any module; each trained `nn.Linear` is used once a forward pass, on inputs (N, features).
        likelihood: "bernoulli" (outputs are logits), "categorical" (logits; targets are class indices) or "gaussian"
            (means, unit variance), or an object with the methods of `kfaclinalg_torch.Likelihood`.
        options: the fields of `kfaclinalg.KFACOptions`, by name. Without a `generator` one is made, seeded from
            torch's global one.

    Raises:
        ValueError: a trainable parameter outside `nn.Linear`, a tied one, a wrong option; all are named.

    >>> model = nn.Linear(2, 1)
    >>> optimizer = KFAC(model, "gaussian", damping=0.1)
    >>> loss = optimizer.step(torch.ones(4, 2), torch.zeros(4, 1))
    >>> optimizer.info.refused
    \'\'
    """

    info: StepInfo | None  #: what happened in the last step

    def __init__(self, model: nn.Module, likelihood: str | Likelihood, **options: Any) -> None:
        self.model, self.layers, self.likelihood = model, trained_layers(model), likelihood_of(likelihood)
        self.options = KFACOptions(**options).checked()
        if self.options.generator is None:
            self.options = self.options._replace(generator=new_generator(self.layers[0].module.weight.device))
        self.info = None
        self._state: KFACState | None = None
        super().__init__([p for p in model.parameters() if p.requires_grad], {})
        self.param_groups = [_Group(group) for group in self.param_groups]

    @property
    def factors(self) -> Factors | None:
        """The moving averages of the second moments; None before the first step."""
        return self._state.factors if self._state else None

    def step(self, inputs: Tensor | tuple[Tensor, ...], targets: Tensor) -> float:  # type: ignore[override]
        """One iteration on this mini-batch; returns the loss before it, weight decay included.

        A step that would not be finite is refused: the parameters stay, and `info.refused` says why.

        Args:
            inputs: what the model takes, the batch first; a tuple for a model of several arguments.
            targets: what the likelihood takes, the batch first.

        Raises:
            ValueError: no examples, wrong shapes, targets outside the likelihood's range, a layer that is not used
                exactly once, a parameter that was replaced or frozen. Nothing has changed then, nor after an interrupt.
        """
        for layer in self.layers:
            layer.check()
        options = self.options
        if self._state is not None:
            options = options._replace(curvature_fraction=self._state.curvature_fraction)
        problem = NetworkProblem(self.model, self.layers, self.likelihood, Batch(inputs, targets), options)
        weights = tuple(layer.matrix() for layer in self.layers)
        before, drawn = (self._state, self.info), self.options.generator.get_state()
        statistics = [(buffer, buffer.clone()) for buffer in self.model.buffers()]  # running ones
        try:
            moved, self._state, self.info = kfac_step(problem, weights, self._state, self.options)
            self._assign(weights if self.info.refused else moved)
            if self.info.refused:
                _restore(statistics)
        except BaseException:  # an interrupt too leaves nothing half done
            self._assign(weights)
            _restore(statistics)
            self._state, self.info = before
            self.options.generator.set_state(drawn)
            raise
        return self.info.loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only while it is made: the layers are those of the model.

        Raises:
            ValueError: afterwards.
        """
        if self.param_groups:
            raise ValueError("KFAC takes its parameters from the model: make a new one for a model that has changed")
        super().add_param_group(param_group)

    def _assign(self, weights: tuple[Tensor, ...]) -> None:
        for layer, W in zip(self.layers, weights, strict=True):
            layer.assign(W)

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: all of it, the model too, which one deepcopy of both shares."""
        generator = self.options.generator
        names = ("model", "layers", "likelihood", "options", "info", "_state")
        own = {name: getattr(self, name) for name in names} | {"options": self.options._replace(generator=None)}
        return super().__getstate__() | own | {"generator": (str(generator.device), generator.get_state())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        device, drawn = state.pop("generator")
        generator = torch.Generator(device)
        generator.set_state(drawn)
        super().__setstate__(state | {"options": state["options"]._replace(generator=generator)})

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, the generator's state too, in tensors, numbers and lists."""
        return {
            "state": {} if self._state is None else packed(self._state),
            "param_groups": super().state_dict()["param_groups"],
            "generator": self.options.generator.get_state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict`, bitwise as if there had been no stop.

        Raises:
            ValueError: it is none, or of a model with other layers, or another structure. Nothing has changed then.
        """
        check_keys(state_dict, ("state", "param_groups", "generator"))
        check_generator(self.options.generator, state_dict["generator"])
        weights = tuple(layer.matrix() for layer in self.layers)
        check(isinstance(state_dict["state"], dict), "no dictionary")
        state = restored(state_dict["state"], weights[0]) if state_dict["state"] else None
        if state is not None:
            check_run(state, [(len(W), W.shape[1]) for W in weights], self.options.structure)
        self._state = state
        self.options.generator.set_state(state_dict["generator"])


def _restore(buffers: list[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for buffer, held in buffers:
            buffer.copy_(held)


class _Group(dict[str, Any]):
    """A parameter group that tells a learning-rate scheduler why there is no "lr"."""

    def __missing__(self, key: str) -> Any:
        if key == "lr":
            raise ValueError("KFAC has no learning rate to schedule: the exact quadratic model sets the step's length")
        raise KeyError(key)
