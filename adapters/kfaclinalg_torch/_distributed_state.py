"""The state of a preconditioner for torch.distributed.checkpoint, whatever the number of processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kfaclinalg import Diagonal, Factors, LayerFactors

from ._checkpoint import check, made, packed
from ._inverses import Inverses
from ._layer import Layer
from ._payload import closed, filled, opened, template

ROOM, ROOM_A_PARAMETER = 16384, 1024  # bytes of the facts


class DistributedState:
    """A preconditioner as a value of a dictionary for `torch.distributed.checkpoint`, in tensors alone.

    Saved by any number of processes it is loaded by any other, to rounding, or to the last bit by as many. Everything
    is there from the start, as zeros or identities, since what is not there is not loaded. Every process must save and
    load.

    >>> model = torch.nn.Linear(2, 3)
    >>> from kfaclinalg_torch import KFACPreconditioner
    >>> state = {"kfac": DistributedState(KFACPreconditioner(model, likelihood="categorical"))}
    >>> sorted(state["kfac"].state_dict())[:3]
    ['averages..A', 'averages..G', 'facts']
    """

    def __init__(self, preconditioner: Any) -> None:
        if isinstance(preconditioner, torch.optim.Optimizer):
            kind = type(preconditioner).__name__
            raise TypeError(f"preconditioner is a {kind}, of which every process has the same state: take state_dict()")
        if preconditioner.structure.linked:
            raise ValueError(f"structure {preconditioner.structure!r} is the same in every process: take state_dict()")
        self.preconditioner = preconditioner

    def state_dict(self) -> dict[str, Tensor]:
        """What this process has of A, G and the inverses, and the facts that all know."""
        p, exchange = self.preconditioner, self.preconditioner._exchange
        found: dict[str, Tensor] = {"facts": self._facts()}
        for layer in p._layers:
            if exchange is None or exchange.grid.replicated or exchange.owns(layer.name):
                for block in layer.blocks:
                    pair = p._estimate.averages.layers.get(block.name) or _moments(
                        block.empty_moments(), p.factor_dtype
                    )
                    found |= {f"averages.{block.name}.{side}": _entries(M) for side, M in zip("AG", pair, strict=True)}
            if exchange is None or exchange.holds(layer.name):
                tensors: list[Tensor] = []
                template(self._closed(layer), tensors)
                found |= {f"inverse.{layer.name}.{i}": x.clone() for i, x in enumerate(tensors)}
        return found

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Continue from there.

        Raises:
            ValueError: it is none, or of another structure or estimator, or of other layers.
        """
        p = self.preconditioner
        facts = json.loads(bytes(state_dict["facts"].tolist()).decode())
        check(isinstance(facts, dict) and "rows" in facts, "its facts are none")
        moments = {
            block.name: LayerFactors(*map(_side, self._pair(state_dict, block.name)))
            for layer in p._layers
            for block in layer.blocks
            if block.name in facts["rows"] and f"averages.{block.name}.A" in state_dict
        }
        pairs = {
            layer.name: self._opened(layer, state_dict)
            for layer in p._layers
            if layer.name in facts["inverted"] and f"inverse.{layer.name}.0" in state_dict
            if facts["form"] == repr(p._inverses.structure)  # what another inverse_period has made is made anew
        }
        own = p.state_dict()
        fitted = {name: kept for name, (kept, _) in pairs.items() if p.structure.observes}
        inverses = {"inverses": {name: K for name, (_, K) in pairs.items()}, "fitted": fitted}
        inverses["failures"] = {name: n for name, n in facts["failures"].items() if name in pairs}
        averages = {"moments": moments, "links": (), "taken": facts["taken"], "rows": facts["rows"]}
        said = {name: facts[name] for name in ("steps", "gone", "periods", "seed", "made")}
        if len(facts["generator"]) == 2 * len(own["generator"]):  # that of one process alone, on such a device
            said["generator"] = torch.frombuffer(bytearray.fromhex(facts["generator"]), dtype=torch.uint8)
        p.load_state_dict(own | said | packed({"averages": averages, "inverses": inverses}))

    def _facts(self) -> Tensor:
        """What is no tensor, as text, with room to grow: a tensor is loaded into one of its size."""
        p, averages = self.preconditioner, self.preconditioner._estimate.averages
        team, inverses = p._estimate.team, p._inverses
        failures: dict[str, int] = {}
        for some in team.told(dict(inverses.failures), "the state"):
            failures |= some
        inverted = list(p._exchange.templates if p._exchange else inverses.inverses)
        facts = {
            "steps": p._steps,
            "taken": averages.taken,
            "rows": averages.rows,
            "inverted": sorted(inverted),
            "failures": failures,
            "gone": dict(p._gone),
            "periods": dict(p._periods),
            "seed": p._seed,
            "generator": "" if p._exchange else bytes(p.generator.get_state().tolist()).hex(),
            "made": made(p.structure, p.estimator, p._layers),
            "form": repr(inverses.structure),
        }
        text = json.dumps(facts).encode()
        room = ROOM + ROOM_A_PARAMETER * sum(1 for _ in p._model.parameters())
        if len(text) > room:
            raise ValueError(f"the names and reasons of the layers take {len(text)} bytes, expected at most {room}")
        return torch.tensor(list(text.ljust(room)), dtype=torch.uint8)

    def _closed(self, layer: Layer) -> dict[str, Any]:
        """The inverse, or that of identities where there is none yet."""
        inverses: Inverses = self.preconditioner._inverses
        if layer.name in inverses.inverses:
            return closed(inverses.fitted.get(layer.name), inverses.inverses[layer.name])
        dtype, structure = self.preconditioner.factor_dtype, inverses.structure
        blank = LayerFactors(*(_identity(M, dtype) for M in layer.empty_moments()))
        fitted = structure.fitted(Factors((blank,)), None)
        return closed(fitted[0] if structure.observes else None, structure.inverse(fitted, 1.0).blocks[0])

    def _opened(self, layer: Layer, state: dict[str, Tensor]) -> tuple[Any, Any]:
        tensors: list[Tensor] = []
        value = template(self._closed(layer), tensors)
        tensors = [state[f"inverse.{layer.name}.{i}"] for i in range(len(tensors))]
        exchange = self.preconditioner._exchange
        if exchange is not None and exchange.grid.column.size > 1:  # as they arrive from their owner: a product's last
            tensors = [x.contiguous() for x in tensors]  # bits follow from the strides
        return opened(filled(value, iter(tensors)), tensors[0])

    def _pair(self, state: dict[str, Tensor], name: str) -> Iterator[Tensor]:
        return (state[f"averages.{name}.{side}"] for side in "AG")


def _moments(sides: Any, dtype: torch.dtype) -> list[Any]:
    return [_side(M.to(dtype)) for M in sides]


def _side(M: Tensor) -> Any:
    return Diagonal(M) if M.ndim == 1 else M


def _entries(M: Any) -> Tensor:
    """A copy: what is loaded comes into it."""
    x: Any = M.d if isinstance(M, Diagonal) else M
    return x.clone()


def _identity(M: Tensor, dtype: torch.dtype) -> Any:
    if M.ndim == 1:
        return Diagonal(torch.ones_like(M, dtype=dtype))
    return torch.eye(M.shape[-1], dtype=dtype, device=M.device).expand(M.shape).contiguous()
