"""K-FAC as a `torch.optim.Optimizer`: a model, its layers and the state of `kfaclinalg.kfac_step`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kfaclinalg import Factors, KFACOptions, KFACState, StepInfo, Tridiagonal, kfac_step

from ._batch import Batch
from ._capture import Capture, misjudged
from ._checkpoint import check, check_generator, check_gone, check_keys, check_made, check_run, made, packed, restored
from ._discovery import FALLBACKS, Found, found
from ._estimators import Empirical, estimator_of
from ._layer import Layer, owners
from ._likelihoods import Likelihood, likelihood_of, new_generator
from ._links import chained
from ._network import Network
from ._once import still
from ._problem import NetworkProblem
from ._settings import check_choice, sharing_of, tensor_of
from ._table import table_of


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
        options: the fields of `kfaclinalg.KFACOptions`, by name. Without a `generator` one is made, seeded from
            torch's global one.

    Raises:
        ValueError: nothing is trained, a wrong option, parameters of several dtypes or devices; all are named.

    >>> model = nn.Linear(2, 1)
    >>> optimizer = KFAC(model, "gaussian", damping=0.1)
    >>> loss = optimizer.step(torch.ones(4, 2), torch.zeros(4, 1))
    >>> optimizer.info.refused
    \'\'
    """

    info: StepInfo | None  #: what happened in the last step
    fallback: dict[str, str]  #: by their names the parameters of which the diagonal is taken, and why
    skipped: dict[str, str]  #: by their names the parameters that are left alone, and why

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
        **options: Any,
    ) -> None:
        self.model, self.likelihood, self.estimator = model, likelihood_of(likelihood), estimator_of(estimator)
        if isinstance(self.estimator, Empirical):
            raise ValueError("KFAC takes its targets from the model: estimator is 'empirical', expected 'sampled'")
        check_choice("fallback", fallback, FALLBACKS)
        self.options = KFACOptions(**options).checked()
        known = found(model, skip, table_of(layers), fallback)
        _check_kinds(known.layers)
        if self.options.generator is None:
            self.options = self.options._replace(generator=new_generator(known.layers[0].parameters[0].device))
        self.outputs, self.mask, self.weight_sharing, self._fallback = outputs, mask, weight_sharing, fallback
        self._gone: dict[str, str] = {}  # layers that the first pass has shown to be none
        self._probed = False
        sharing_of(weight_sharing, known.layers)
        self._take(known)
        self.info = None
        self._state: KFACState | None = None
        super().__init__([p for p in model.parameters() if p.requires_grad], {})
        self.param_groups = [_Group(group) for group in self.param_groups]
        if message := known.message():
            warnings.warn(f"KFAC {message}", stacklevel=2)

    @property
    def factors(self) -> Factors | None:
        """The moving averages of the second moments, in the order of `layers`; None before the first step."""
        return self._state.factors if self._state else None

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers, in the order of the factors."""
        return tuple(layer.name for layer in self._layers)

    def step(self, inputs: Any, targets: Tensor, *, mask: Tensor | None = None) -> float:  # type: ignore[override]
        """One iteration on this mini-batch; returns the loss before it, weight decay included.

        A step that would not be finite is refused: the parameters stay, and `info.refused` says why.

        Args:
            inputs: what the model takes, the batch first; a tuple for a model of several arguments, a dictionary for
                those that have names.
            targets: what the likelihood takes, the batch first.
            mask: which positions count, a boolean tensor (N, ...); the others enter neither the loss nor the curvature.

        Raises:
            ValueError: no examples, wrong shapes, targets outside the likelihood's range, a layer that is not used, a
                parameter that was replaced or frozen. Nothing has changed then, nor after an interrupt.
        """
        for owner in self._owners:
            owner.check("optimizer")
        for layer in self._layers:
            if not all(p.requires_grad for p in layer.parameters):
                raise ValueError(
                    f"a parameter of {layer.name!r} was frozen since the optimizer was made: make a new one"
                )
        batch = Batch(inputs, targets, mask)
        if mask is None and self.mask is not None:
            batch = Batch(inputs, targets, batch.call(self.mask))
        options = self.options
        if self._state is not None:
            options = options._replace(curvature_fraction=self._state.curvature_fraction)
        before, drawn = (self._state, self.info), self.options.generator.get_state()
        statistics = [(buffer, buffer.clone()) for buffer in self.model.buffers()]  # running ones
        capture = self._capture()
        weights = None
        try:
            if not self._probed:
                self._probe(capture, batch)
            weights = self._network.weights()
            problem = self._problem(batch, capture, options)
            moved, self._state, self.info = kfac_step(problem, weights, self._state, self.options)
            self._network.assign(weights if self.info.refused else moved)
            if self.info.refused:
                _restore(statistics)
        except BaseException:  # an interrupt too leaves nothing half done
            if weights is not None:
                self._network.assign(weights)
            _restore(statistics)
            self._state, self.info = before
            self.options.generator.set_state(drawn)
            raise
        finally:
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

    def _take(self, known: Found) -> None:
        """These layers are trained; those of a chain come first."""
        layers = list(known.layers)
        if isinstance(self.options.structure_value, Tridiagonal):
            chain = chained(layers)
            layers = [*chain, *(layer for layer in layers if layer not in chain)]
        self._found, self._layers = known, tuple(layers)
        self.fallback, self.skipped = dict(known.fallback), dict(known.skipped)
        given = self.weight_sharing
        names = {block.name for block in known.blocks}
        kept = given if isinstance(given, str) else {name: value for name, value in given.items() if name in names}
        self._sharing, self._owners = sharing_of(kept, layers), owners(self.model, layers)
        self._network = Network(self.model, layers)

    def _problem(self, batch: Batch, capture: Capture, options: KFACOptions) -> NetworkProblem:
        return NetworkProblem(
            self._network,
            capture,
            self.likelihood,
            batch,
            options,
            estimator=self.estimator,
            sharing=self._sharing,
            tensor_of=self._tensor_of,
        )

    def _capture(self) -> Capture:
        capture = Capture(self.model, self._found.sites, _always, _never, _nothing, _nothing, always=True)
        capture.paused = True
        return capture

    def _tensor_of(self, returned: Any) -> Tensor:
        return tensor_of(self.outputs, returned)

    def _probe(self, capture: Capture, batch: Batch) -> None:
        """A first pass, to see which layers are none: what a subclass or a weight without a call does is unknown."""
        _, piece = next(batch.chunks(self.options.chunk_size))
        capture.paused = False
        with torch.random.fork_rng(_devices(self._layers)), still(self.model), torch.enable_grad():
            gone = misjudged(capture, self._found, self._tensor_of(piece.call(self.model)))
        capture.paused = True
        self._without(gone)
        self._probed = True

    def _without(self, gone: Mapping[Layer, str]) -> None:
        if gone:
            self._take(self._found.without(self.model, gone, self._fallback))
            self._gone |= {layer.name: why for layer, why in gone.items()}
            warnings.warn("; ".join(f"{layer.name}: {why}" for layer, why in gone.items()), stacklevel=4)

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: all of it, the model too, which one deepcopy of both shares."""
        generator = self.options.generator
        own = {name: value for name, value in vars(self).items() if name not in ("defaults", "param_groups", "state")}
        own |= {"options": self.options._replace(generator=None)}
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
            "made": made(self.options.structure_value, self.estimator, self._layers),
            "gone": dict(self._gone),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict`, bitwise as if there had been no stop.

        Raises:
            ValueError: it is none, or of another structure or estimator, or of other layers. Nothing has changed then.
        """
        check_keys(state_dict, ("state", "param_groups", "generator", "made", "gone"))
        check_generator(self.options.generator, state_dict["generator"])
        gone = state_dict["gone"]
        check_gone(gone)
        lost = {layer: gone[layer.name] for layer in self._found.layers if layer.name in gone}
        before = self._found
        try:
            if lost:
                self._take(self._found.without(self.model, lost, self._fallback))
            structure = self.options.structure_value
            check_made(state_dict["made"], made(structure, self.estimator, self._layers))
            check(isinstance(state_dict["state"], dict), "no dictionary")
            like = self._layers[0].parameters[0].detach()
            state = restored(state_dict["state"], like) if state_dict["state"] else None
            if state is not None:
                check_run(state, self._layers, structure)
        except ValueError:
            self._take(before)
            raise
        self._state, self._gone = state, self._gone | {layer.name: why for layer, why in lost.items()}
        self._probed = self._probed or state is not None
        self.options.generator.set_state(state_dict["generator"])


def _always(use: Any) -> bool:
    return True


def _never(use: Any) -> bool:
    return False


def _nothing(*args: Any) -> None:
    pass


def _devices(layers: Sequence[Layer]) -> list[torch.device]:
    return [device for device in {layers[0].parameters[0].device} if device.type == "cuda"]


def _check_kinds(layers: Sequence[Layer]) -> None:
    first = layers[0].parameters[0]
    for layer in layers:
        for p in layer.parameters:
            if p.dtype not in (torch.float32, torch.float64) or p.dtype != first.dtype:
                raise ValueError(
                    f"{layer.name} has dtype {p.dtype}, expected float32 or float64, the same for all: {first.dtype}"
                )
            if p.device != first.device:
                raise ValueError(f"{layer.name} is on {p.device}, expected {first.device}, as the others are")


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
