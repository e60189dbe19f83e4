"""Every parameter followed through a program, to the equations that are sites and to those that are none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from . import _versions as versions
from ._results import Path, Result, passed
from ._rules import RULES, common, moved, vouched
from ._sites import Scale, Site
from ._views import View


class Search:
    """What is found: sites by their paths, and for each parameter the uses that are none, with their places."""

    def __init__(self, grows: Mapping[Path, int]) -> None:
        self.grows = grows  # which axis of what an equation gives counts the examples, where one does
        self.sites: dict[Path, Site] = {}
        self.spares: dict[Path, Site] = {}  # additions of a bias, in case it is none
        self.factors: dict[Path, int] = {}  # of a product with a parameter, which operand is the other
        self.others: dict[int, list[str]] = {}
        self.said: dict[str, dict[str, Any]] = {}  # of a layer, by the user
        self.vouched: set[int] = set()  # weights of which the user has said so

    def program(self, jaxpr: Any, tags: Sequence[Any], path: Path, lengths: tuple[int, ...]) -> list[Any]:
        """Follow the tags of the variables that go in; those of the ones that come out."""
        known = {v: tag for v, tag in zip(jaxpr.invars, tags, strict=True) if tag is not None}
        uses = Counter(v for eqn in jaxpr.eqns for v in eqn.invars if not versions.is_literal(v))
        uses.update(v for v in jaxpr.outvars if not versions.is_literal(v))

        def tag_of(v: Any) -> Any:
            tag = None if versions.is_literal(v) else known.get(v)
            return tag._replace(alone=tag.alone and uses[v] == 1) if isinstance(tag, Result) else tag

        for i, eqn in versions.numbered(jaxpr):
            found = [tag_of(v) for v in eqn.invars]
            if word := versions.word(eqn):
                known |= zip(eqn.outvars, self.word(eqn, word, found, (*path, i), lengths), strict=False)
            elif any(tag is not None for tag in found):
                outs = self.equation(eqn, found, (*path, i), lengths)
                known |= {v: tag for v, tag in zip(eqn.outvars, outs, strict=False) if tag is not None}
        return [tag_of(v) for v in jaxpr.outvars]

    def equation(self, eqn: Any, tags: list[Any], path: Path, lengths: tuple[int, ...]) -> list[Any]:
        """The tags of what comes out of one equation."""
        views = [i for i, tag in enumerate(tags) if isinstance(tag, View)]
        if inner := versions.inside(eqn) or versions.rematerialised(eqn):
            return self.program(inner[0], tags, path, lengths)
        if not views:
            return [passed(eqn, next(tag for tag in tags if tag is not None))]
        if eqn.primitive.name == "scan":
            return self.scan(eqn, tags, path, lengths)
        if len(views) == 1 and views[0] == 0 and (through := moved(eqn, tags[0])) is not None:
            return [through]
        if len(views) == 1 and eqn.primitive.name in RULES:
            return self.site(eqn, tags, views[0], path, lengths)
        for i in views if eqn.primitive.name != "stop_gradient" else ():
            self.other(tags[i], versions.place(eqn))
        return []

    def site(self, eqn: Any, tags: list[Any], at: int, path: Path, lengths: tuple[int, ...]) -> list[Any]:
        """A site of its own, or a bias of one that was found before."""
        view, name = tags[at], eqn.primitive.name
        beside = tags[1 - at] if len(tags) == 2 else None
        if name in ("mul", "add"):
            if not view.shape:  # a number, which a primitive may broadcast
                view = view.broadcast(tuple(eqn.outvars[0].aval.shape), ())
            if name == "add" and versions.is_literal(eqn.invars[1 - at]):
                return [view]  # 1 + scale: the gradient is the same
            if name == "mul" and self.grows and path not in self.grows and not (lengths or view.factor):
                whole = view.shape == tuple(eqn.outvars[0].aval.shape)
                if view.is_broadcast or not whole or versions.is_literal(eqn.invars[1 - at]):
                    return self.none(view, eqn)
                self.factors[path] = 1 - at
                return [view._replace(factor=path)]
        found = RULES[name](eqn, at, view, common(eqn, view, path, lengths))
        if found is None or not jnp.issubdtype(found.dtype, jnp.floating):
            return self.none(view, eqn)
        found = found.seen_at(self.grows.get(path))
        if name == "add" and isinstance(found, Scale):
            found = replace(found, operand=-1, owner=self.owner(view, beside))
            if isinstance(beside, Result) and self.merged(view, beside, path):
                self.spares[path] = found
                return [beside]
        self.sites[path] = found
        axes = [i if i in found.labels else None for i in range(len(found.shape))]
        return [Result(path, tuple(axes))]

    def none(self, view: View, eqn: Any) -> list[Any]:
        """A use that is no site."""
        self.other(view, versions.place(eqn))
        return []

    def word(self, eqn: Any, word: tuple[str, str], tags: list[Any], path: Path, lengths: tuple[int, ...]) -> list[Any]:
        """What the user says of a layer: its inputs, then its weight, then its outputs."""
        number, role = word
        said = self.said.setdefault(number, {})
        said[role] = path if role == "inputs" else tags[0]
        view = said.get("weight")
        if role != "outputs" or not isinstance(view, View):
            return []
        self.factors[said["inputs"]] = 0
        site = vouched(view, said["inputs"], common(eqn, view, path, lengths)).seen_at(self.grows.get(path))
        self.sites[path] = site
        self.vouched.add(view.leaf)
        return [Result(path, tuple(i if i in site.labels else None for i in range(len(site.shape))))]

    def merged(self, view: View, result: Result, path: Path) -> bool:
        """Take the parameter for the bias of a site, if it is that."""
        site = self.sites[result.site]
        labelled = {i for i, axis in enumerate(result.axes) if axis is not None and view.shape[i] > 1}
        stack = tuple(level for level, loop in enumerate(site.loops) if loop.slices)
        if isinstance(site, Scale) or site.bias or view.factor or not result.alone:
            return False
        if view.levels != stack or labelled != set(view.places):
            return False
        order = tuple(result.axes.index(axis) for axis in site.labels if axis in result.axes)
        part = view.part(order)
        whole = ("reshape", (*site.matrix[:-1], 1))
        self.sites[result.site] = replace(site, bias=part._replace(ops=(*part.ops, whole)), bias_at=path)
        return True

    def owner(self, view: View, beside: Any) -> Path | None:
        """The scale whose outputs a shift shifts."""
        if isinstance(beside, Result) and isinstance(self.sites[beside.site], Scale):
            axes = [i for i, axis in enumerate(beside.axes) if axis is not None]
            if tuple(axes) == view.places and self.sites[beside.site].operand >= 0:
                return beside.site
        return None

    def scan(self, eqn: Any, tags: list[Any], path: Path, lengths: tuple[int, ...]) -> list[Any]:
        """The program inside: constants are used in every step, what is scanned is sliced."""
        scan = versions.Scan.of(eqn)
        inner: list[Any] = [tag if isinstance(tag, View) else None for tag in tags]
        for i, tag in enumerate(inner):
            if tag is None or i < scan.consts:
                continue
            inner[i] = None if i < scan.consts + scan.carries else tag.sliced(len(lengths))
            if inner[i] is None:
                self.other(tag, f"carry of {versions.place(eqn)}")
        for tag in self.program(scan.body.jaxpr, inner, path, (*lengths, scan.length)):
            if isinstance(tag, View):
                self.other(tag, f"result of {versions.place(eqn)}")
        return []

    def other(self, view: View, where: str) -> None:
        self.others.setdefault(view.leaf, []).append(where)


def search(jaxpr: Any, leaves: Sequence[Any], grows: Mapping[Path, int]) -> Search:
    """All uses of the parameters, the first inputs of the program."""
    found = Search(grows)
    views: list[Any] = [View.whole(i, tuple(leaf.shape)) for i, leaf in enumerate(leaves)]
    others = [None] * (len(jaxpr.invars) - len(views))
    for tag in found.program(jaxpr, [*views, *others], (), ()):
        if isinstance(tag, View):
            found.other(tag, "it is what the function returns")
    return found
