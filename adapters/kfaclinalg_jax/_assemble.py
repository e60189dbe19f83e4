"""From sites to layers: which parameters share a matrix, and why the others are left to the fallback."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ._find import Search
from ._layers import Layer, Use, entries, is_scale, linear, scale
from ._sites import Embedding, Site
from ._views import Part

TOGETHER = ({"weight"}, {"table"}, {"weight", "table"}, {"bias"}, {"scale"}, {"shift"})


class Assembly:
    """The layers by name, and for each parameter without a site the reason."""

    def __init__(self, search: Search, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> None:
        self.names, self.shapes = names, shapes
        known = search.vouched  # other uses of these weights are parts of what the user has said
        self.sites: dict[Any, Site] = {
            path: site for path, site in search.sites.items() if site.source or site.weight.leaf not in known
        }
        self.spares = search.spares
        self.reasons = {
            leaf: f"used by {_several(where)}" for leaf, where in search.others.items() if leaf not in known
        }
        self.layers: list[Layer] = []
        self._roles()
        self._biases()
        for leaf in range(len(names)):
            self._linear(leaf)
        self._scales()
        taken = {leaf for layer in self.layers for leaf in layer.leaves}
        for leaf in range(len(names)):
            if leaf not in taken:
                self.reasons.setdefault(leaf, "no output depends on it")
                if size := int(np.prod(shapes[leaf], dtype=int)):
                    self.layers.append(entries(names[leaf], leaf, size))
        self.layers.sort(key=lambda layer: layer.leaves[0])
        self.skipped = {names[leaf]: why for leaf, why in sorted(self.reasons.items())}

    def _roles(self) -> None:
        """Without those that are used in two ways, or by a site that sees no examples."""
        roles: dict[int, dict[str, list[str]]] = {}
        for site in self.sites.values():
            roles.setdefault(site.weight.leaf, {}).setdefault(_role(site), []).append(site.place)
            if site.bias:
                roles.setdefault(site.bias.leaf, {}).setdefault("bias", []).append(site.place)
            if is_scale(site) and site.example is None:
                why = f"no axis of the result of {site.place} counts the examples"
                self.reasons.setdefault(site.weight.leaf, why)
        for leaf, found in roles.items():
            if set(found) not in TOGETHER:
                ways = ", ".join(f"{role} of {_several(where)}" for role, where in found.items())
                self.reasons.setdefault(leaf, f"used as {ways}")
        self._without(lambda site: site.weight.leaf in self.reasons)

    def _biases(self) -> None:
        """A bias belongs to one weight, and to each use of it."""
        by_weight: dict[int, set[Part | None]] = {}
        weights: dict[int, set[int]] = {}
        for site in self.sites.values():
            by_weight.setdefault(site.weight.leaf, set()).add(site.bias)
            if site.bias:
                weights.setdefault(site.bias.leaf, set()).add(site.weight.leaf)
        for site in self.sites.values():
            bias, weight = site.bias, self.names[site.weight.leaf]
            if bias and len(by_weight[site.weight.leaf]) > 1:
                self.reasons.setdefault(bias.leaf, f"not added to every output of {weight!r}")
            if bias and len(weights[bias.leaf]) > 1:
                self.reasons.setdefault(bias.leaf, "added to the outputs of several weights")
        for site in list(self.sites.values()):
            if site.bias and site.bias.leaf in self.reasons:
                self._alone(site)
        for leaf in {site.weight.leaf for site in self.spares.values() if site.path in self.sites}:
            del self.reasons[leaf]  # a shift of what it is added to is a layer too

    def _alone(self, site: Site) -> None:
        """Its bias is a shift, where that is one in every use."""
        self.sites[site.path] = replace(site, bias=None, bias_at=None)
        leaf = site.bias.leaf if site.bias else -1
        spares = [spare for spare in self.spares.values() if spare.weight.leaf == leaf]
        if all(spare.example is not None for spare in spares):
            self.sites |= {spare.path: spare for spare in spares}

    def _linear(self, leaf: int) -> None:
        sites = [site for site in self.sites.values() if site.weight.leaf == leaf and not is_scale(site)]
        if not sites:
            return
        groups: dict[Part, list[Site]] = {}
        for site in sites:
            groups.setdefault(site.weight, []).append(site)
        uses = self._uses(list(groups.items()))
        if uses is None:
            where = _several([site.place for site in sites])
            self.reasons[leaf] = f"used in shapes that do not agree by {where}"
            self._without(lambda site: site.weight.leaf == leaf)
        else:
            self.layers.append(linear(self.names[leaf], uses))

    def _uses(self, groups: list[tuple[Part, list[Site]]]) -> list[Use] | None:
        """The same way, or turned; None where a weight is seen in more shapes than these."""
        (first, sites), *others = groups
        uses = {False: list(sites), True: []}
        if others:
            size = int(np.prod(self.shapes[first.leaf], dtype=int))
            index = np.arange(size).reshape(self.shapes[first.leaf])
            mine = first.of(index)
            for part, more in others:
                yours = part.of(index)
                if np.array_equal(mine, yours):
                    uses[False] += more
                elif np.array_equal(mine, yours.swapaxes(-1, -2)):
                    uses[True] += more
                else:
                    return None
        kinds = [(turned, [s for s in of if isinstance(s, Embedding) == table]) for turned, of in uses.items()
                 for table in (False, True)]  # fmt: skip
        found = [Use(tuple(of), turned) for turned, of in kinds if of]
        for use in found if len(found) > 1 else []:
            for site in use.sites:
                if site.bias:
                    self.reasons[site.bias.leaf] = f"its weight {self.names[site.weight.leaf]!r} is tied"
        if len(found) > 1:
            found = [Use(tuple(replace(site, bias=None) for site in use.sites), use.turned) for use in found]
        return found

    def _scales(self) -> None:
        """A scale with the shift of its outputs; others alone."""
        by_leaf: dict[int, list[Any]] = {}
        for site in self.sites.values():
            if is_scale(site):
                by_leaf.setdefault(site.weight.leaf, []).append(site)
        shifts: dict[int, int] = {}  # of a scale
        for leaf, sites in by_leaf.items():
            owners = {self.sites[s.owner].weight.leaf if s.owner in self.sites else -1 for s in sites}
            if -1 not in owners and len(owners) == 1:
                shifts.setdefault(owners.pop(), leaf)
        paired = set(shifts.values())
        for leaf, sites in by_leaf.items():
            if leaf not in paired:
                both = [sites, by_leaf[shifts[leaf]]] if leaf in shifts else [sites]
                self.layers.append(scale(self.names[leaf], both))

    def _without(self, gone: Any) -> None:
        for site in [site for site in self.sites.values() if gone(site)]:
            del self.sites[site.path]
            if site.bias:
                self.reasons.setdefault(site.bias.leaf, f"its weight {self.names[site.weight.leaf]!r} has no site")


def _role(site: Any) -> str:
    if isinstance(site, Embedding):
        return "table"
    if is_scale(site):
        return "scale" if site.operand >= 0 else "shift"
    return "weight"


def _several(where: Sequence[str]) -> str:
    return where[0] + (f" and {len(where) - 1} more" if len(where) > 1 else "")
