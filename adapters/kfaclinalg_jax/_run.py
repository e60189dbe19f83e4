"""A program run with a probe, a zero, added to the output of each site: its gradient there is that of the probe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from . import _versions as versions
from ._results import Path
from ._sites import Site

Arrays = Mapping[Path, Any]


class Plan(NamedTuple):
    """The sites in a program, and the products of which the operand at this place is kept too."""

    sites: Mapping[Path, Site]
    factors: Mapping[Path, int]

    def inside(self, path: Path) -> Plan:
        """What of it is in the program that the equation at this path holds."""
        parts: Any = ({p: x for p, x in part.items() if p[: len(path)] == path} for part in self)
        return Plan(*parts)

    def kept(self, path: Path) -> int:
        """Which operand of an equation is kept; -1 where none is."""
        return self.sites[path].operand if path in self.sites else self.factors.get(path, -1)


def run(
    jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], plan: Plan, probes: Arrays, path: Path = ()
) -> tuple[list[Any], dict[Path, Any]]:
    """What the program returns, and what the parameter of each site acts on, over the scans around it."""
    seen: dict[Path, Any] = {}
    held = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def read(v: Any) -> Any:
        return v.val if versions.is_literal(v) else held[v]

    for i, eqn in versions.numbered(jaxpr):
        here, values = (*path, i), [read(v) for v in eqn.invars]
        inner = plan.inside(here)
        if here in plan.sites or here in plan.factors or not any(inner):
            outs = versions.evaluate(jaxpr, eqn, values)
            outs = [outs[0] + probes[here]] if here in plan.sites else outs
            if plan.kept(here) >= 0:
                seen[here] = values[plan.kept(here)]
        else:
            outs, found = _inside(eqn, values, inner, {p: probes[p] for p in inner.sites}, here)
            seen |= found
        held |= zip(eqn.outvars, outs, strict=True)
    return [read(v) for v in jaxpr.outvars], seen


def _inside(eqn: Any, values: list[Any], plan: Plan, probes: Arrays, path: Path) -> Any:
    """An equation with sites in the program that it holds."""
    if called := versions.inside(eqn):
        jaxpr, consts = called
        return run(jaxpr, consts, values, plan, probes, path)
    if again := versions.rematerialised(eqn):
        jaxpr, remade = again
        return remade(lambda values, probes: run(jaxpr, (), values, plan, probes, path))(values, probes)
    scan = versions.Scan.of(eqn)
    first = scan.consts + scan.carries

    def step(carry: Any, x: Any) -> Any:
        operands = [*values[: scan.consts], *carry, *x[0]]
        outs, seen = run(scan.body.jaxpr, scan.body.consts, operands, plan, x[1], path)
        return outs[: scan.carries], (outs[scan.carries :], seen)

    carry, (ys, seen) = scan.run(step, values[scan.consts : first], (values[first:], probes))
    return [*carry, *ys], seen
