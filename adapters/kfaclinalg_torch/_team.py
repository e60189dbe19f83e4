"""The processes of torch.distributed that train one model together, and how they agree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from time import monotonic
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, distributed, nn

UNSAID = -(2**40)  # the vote of who got no further


def is_running() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def check_alone(was_running: bool, who: str) -> None:
    """A RuntimeError where what was made for one process is one of several: the weights would drift apart."""
    if not was_running and is_running() and distributed.get_world_size() > 1:
        raise RuntimeError(
            f"{who} was made before torch.distributed ran, for one process alone: make it after init_process_group"
        )


class Lost(RuntimeError):
    """Another process is gone, or was not heard of within the group's timeout: with it nothing can be agreed."""


class Team:
    """A group of processes; None where there is but one. Its collectives run in the order of the calls, everywhere.

    Whatever a process may meet alone, an error or a difference, is put to a vote, so that it is everyone's.
    """

    def __init__(self, group: Any = None, device: torch.device | str = "cpu") -> None:
        self.group, self.device = group, device
        self.size = 1 if group is None else distributed.get_world_size(group)
        self.rank = 0 if group is None else distributed.get_rank(group)

    def __deepcopy__(self, memo: dict[int, Any]) -> Team:
        return self

    def global_rank(self, rank: int) -> int:
        return distributed.get_global_rank(self.group, rank)

    @property
    def timeout(self) -> timedelta | None:
        """That of the group, which torch says in private; None where it does not."""
        try:
            return self.group._get_backend(torch.device(self.device)).options._timeout
        except (AttributeError, RuntimeError):
            return None

    def sums(
        self, tensors: Sequence[Tensor], counts: Sequence[int], what: str
    ) -> tuple[Sequence[Tensor], Sequence[int]]:
        """The sums over all processes; what came, where there is but one."""
        if self.size == 1:
            return tensors, counts
        tensors = list(tensors)
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            some = [i for i, t in enumerate(tensors) if t.dtype == dtype]
            flat = torch.cat([tensors[i].flatten() for i in some])
            with self.waiting(what):
                distributed.all_reduce(flat, group=self.group)
            for i, part in zip(some, flat.split([tensors[i].numel() for i in some]), strict=True):
                tensors[i] = part.view(tensors[i].shape)
        numbers = torch.tensor(counts, dtype=torch.float64, device=self.device)
        if counts:
            with self.waiting(what):
                distributed.all_reduce(numbers, group=self.group)
        return tensors, [int(n) for n in numbers.tolist()]

    def largest(self, numbers: Sequence[int], what: str) -> list[int]:
        """The largest of each over all processes."""
        if self.size == 1 or not numbers:
            return list(numbers)
        votes = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        with self.waiting(what):
            distributed.all_reduce(votes, distributed.ReduceOp.MAX, group=self.group)
            return votes.tolist()

    def told(self, thing: Any, what: str) -> list[Any]:
        """What every process says, by rank."""
        found: list[Any] = [thing] * self.size
        if self.size > 1:
            with self.waiting(what):
                distributed.all_gather_object(found, thing, group=self.group)
        return found

    @contextmanager
    def agreed(self, what: str, *names: str) -> Iterator[dict[str, Any]]:
        """An error under the `with`, or facts of these names that are not the same everywhere, are all processes'.

        Raises:
            RuntimeError: another process met an error.
            ValueError: the facts differ.
        """
        facts: dict[str, Any] = {}
        failure: Exception | None = None
        try:
            yield facts
        except Lost:  # there is nobody to vote with
            raise
        except Exception as error:
            failure = error
        if self.size > 1:
            hashes = [crc32(repr(facts[name]).encode()) if name in facts else UNSAID for name in names]
            signed = [sign * h if h != UNSAID else h for h in hashes for sign in (1, -1)]
            failed, *votes = self.largest([0 if failure is None else self.rank + 1, *signed], what)
            if failure is None and failed:
                raise RuntimeError(f"process {failed - 1} of {self.size} failed at {what}, and says why itself")
            for name, high, low in zip(names, votes[::2], votes[1::2], strict=True):
                if failure is None and high != -low and UNSAID not in (high, low):
                    raise ValueError(f"the processes differ in {name} at {what}; in this one: {facts.get(name)!r}")
        if failure is not None:
            raise failure

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """A process that is gone, or that is not heard of, is an error which says what was waited for, and how long."""
        start = monotonic()
        try:
            yield
        except RuntimeError as error:
            raise Lost(
                f"process {self.rank} of {self.size} waited in vain for the others, for {what}, "
                f"{monotonic() - start:.1f} s: {error}"
            ) from error


ALONE = Team()


class Kept:
    """The process group of an object that is copied: a copy has it too, and what is unpickled has none."""

    def __init__(self, group: Any = None) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Kept, ()


def group_of(model: nn.Module, given: Any) -> Any:
    """The process group that trains a model: DistributedDataParallel's, the given one, or else the default one.

    Raises:
        TypeError, ValueError: no group, one that this process is not in, or other processes than the model's.
    """
    if not is_running():
        return None
    if given == distributed.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group is one that this process is not in, expected one of its own")
    if not isinstance(given, distributed.ProcessGroup | None):
        raise TypeError(f"group is {given!r}, expected one of torch.distributed.new_group, or None")
    own = None
    while own is None and model is not None:
        own = model.process_group if isinstance(model, nn.parallel.DistributedDataParallel) else None
        model = getattr(model, "_orig_mod", None) or getattr(model, "module", None)  # type: ignore[assignment]
    if given is not None and own is not None:
        came, expected = (distributed.get_process_group_ranks(group) for group in (given, own))
        if came != expected:
            raise ValueError(f"group is of the processes {came}, expected {expected}, of DistributedDataParallel")
    return next(group for group in (given, own, distributed.group.WORLD) if group is not None)


def check_graph(model: nn.Module) -> None:
    """A ValueError where DistributedDataParallel would take the first backward pass of `update` for the loss's own."""
    model = getattr(model, "_orig_mod", model)
    seen = getattr(model, "_static_graph_delay_allreduce_enqueued", False)
    if isinstance(model, nn.parallel.DistributedDataParallel) and model.static_graph and not seen:
        raise ValueError(
            "model is DistributedDataParallel with static_graph=True, which averages the gradients in the first "
            "backward pass that it sees, that of update(): expected static_graph=False, or a backward pass of the loss "
            "before the preconditioner is made"
        )


def check_join(model: nn.Module | None) -> None:
    """A RuntimeError where a process may stop before the others, and DistributedDataParallel alone goes on for it."""
    config = getattr(getattr(model, "_orig_mod", model), "_join_config", None)
    if config is not None and config.enable and not config.throw_on_early_termination:
        raise RuntimeError(
            "model is in join(), where a process without more batches takes no further step: expected batches without "
            "examples there, or join(throw_on_early_termination=True); it stays so until join(enable=False)"
        )
