"""A bundle's graphs in another precision, given which layers are kept: choices in, graphs out, nothing measured."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from onnx import ModelProto

from ...engine.bundle.bundle import Bundle
from ...engine.bundle.manifest import CACHE_PREFIX
from ...engine.bundle.roles import Role
from ...engine.errors import InputError
from ..frames.state import State
from ..graph.index import GraphIndex, load_model
from ..graph.lookups import lookup_nodes
from ..graph.surgery import normalise
from .casting import Casting, HalfType, Reason, cast_model, coordinate_values
from .quantize import Histogram, QuantType, quantisable, quantise, scales

__all__ = ["Choice", "Conversion", "Rule"]

Rule = Reason | Literal["lookup", "predictor"]
"""Why a node is in float32 without being asked for: by a rule of `casting`, because it decides what a look-up finds, or
because a predictor reads what it makes."""

# A module with more nodes of its own than this is glue between layers, not a layer: its nodes are kept one by one.
_LARGEST_LAYER = 12


@dataclass(frozen=True)
class Choice:
    """What is left open by the precision itself.

    Attributes:
        half_cache: Whether the cache is in float16, but for coordinates.
        kept: Layers that compute in float32.
        ranges: How ranges are made of histograms; None quantises nothing.
        unquantised: Layers that are not quantised.
    """

    half_cache: bool
    kept: tuple[str, ...] = ()
    ranges: str | None = None
    unquantised: tuple[str, ...] = ()


class Conversion:
    """The float32 graphs of a bundle, and what they become.

    Layers are the unit of keeping: a PyTorch module's own nodes, by its path; a node by its name where it is of no
    module or of one that is glue. A layer of that name is kept in every module of the bundle: they are parts of one
    network, share its weights, and answer alike at age 0.

    Predictors stay as they are, and so does what they read: a quality promise was calibrated with their numbers, and a
    change that no picture shows may move them. What a converted exit is worth, their numbers do not know; audits do.

    Args:
        bundle: In float32.
        half: What is computed in.
        quant: What convolutions and matrix products are quantised to, if at all.
        keep: Module paths and node names that stay in float32 whatever is chosen.

    Attributes:
        models: Module -> float32 graph.
        state: What the generator carries; it stays in its own type, as frames do.
        layers: Module that is converted -> layer -> its nodes, in the graph's order.
        rules: Module that is converted -> node -> the rule that keeps it in float32.
        histograms: Module -> value -> distribution; has to be set before anything is quantised.

    Raises:
        InputError: If a name to keep names nothing.
    """

    def __init__(self, bundle: Bundle, half: HalfType, quant: QuantType | None, keep: Sequence[str]) -> None:
        manifest = bundle.manifest
        self.half, self.quant = half, quant
        self._roles = {name: module.role for name, module in manifest.modules.items()}
        self.models: dict[str, ModelProto] = {}
        for name, module in manifest.modules.items():
            model = load_model(bundle.file(module.file))
            self.models[name] = model if module.role.predicts else normalise(model)
        self._indices = {name: GraphIndex(self.models[name]) for name, role in self._roles.items() if not role.predicts}
        self._cache = manifest.cache
        first = bundle.first_state()
        self.state = tuple(State(one.output, one.input, first[one.input.name]) for one in manifest.state)
        # What a consumer samples at is a coordinate in the producer too, and in the cache between them.
        self._coordinates = {
            value
            for name, index in self._indices.items()
            if self._roles[name] is not Role.PRODUCER
            for value in coordinate_values(index)
            if value.startswith(CACHE_PREFIX)
        }
        self._predicted_from = {
            spec.name
            for module in manifest.modules.values()
            if module.role.predicts
            for spec in module.inputs
            if spec.name.startswith(CACHE_PREFIX)
        }
        self._asked = {name: self._named(index, keep) for name, index in self._indices.items()}
        for wanted in keep:
            if not any(self._named(index, [wanted]) for index in self._indices.values()):
                raise self._unknown(wanted)
        self._quantisable = {name: frozenset(quantisable(self.models[name])) for name in self._indices}
        self.layers = {name: _layers(index) for name, index in self._indices.items()}
        self.histograms: dict[str, dict[str, Histogram]] = {}
        self._ours = {name: self._own_rules(name) for name in self._indices}
        self.rules: dict[str, dict[str, Rule]] = {name: {} for name in self._indices}
        for name, casting in self.convert(Choice(half_cache=True), self._indices).items():
            ours, asked = self._ours[name], self._asked[name]
            self.rules[name] = {
                node: ours.get(node, reason)
                for node, reason in casting.kept.items()
                if reason != "asked" or (node in ours and node not in asked)
            }

    def convert(self, choice: Choice, modules: Iterable[str] | None = None) -> dict[str, Casting]:
        """The graphs of some modules (all by default) under a choice."""
        return {name: self._convert(name, choice) for name in (modules if modules is not None else self.models)}

    def model_of(self, role: Role) -> ModelProto:
        """The float32 graph of a role that the bundle has one module of."""
        return next(self.models[name] for name, known in self._roles.items() if known is role)

    def cache_types(self, *, half_cache: bool) -> dict[str, str]:
        """Cache tensor -> its dtype in the result; coordinates, and what a predictor reads, stay in float32."""
        exact = self._coordinates | self._predicted_from
        return {
            spec.name: "float16" if half_cache and spec.dtype == "float32" and spec.name not in exact else spec.dtype
            for spec in self._cache
        }

    def lowered(self, module: str, *, quantised: bool) -> frozenset[str]:
        """Nodes that no rule and no wish keeps in float32: all, or those that can be quantised."""
        free = frozenset(self._indices[module].names) - self.rules[module].keys() - self._asked[module]
        return free & self._quantisable[module] if quantised else free

    def layers_of(self, modules: Sequence[str], *, quantised: bool) -> list[str]:
        """Layers with nodes that are converted, or quantised: from the answer backwards, the producer's last."""
        found: dict[str, None] = {}
        for name in sorted(modules, key=lambda name: self._roles[name] is Role.PRODUCER):
            nodes = self.lowered(name, quantised=quantised)
            found.update(
                (layer, None) for layer, members in reversed(self.layers[name].items()) if nodes.intersection(members)
            )
        return list(found)

    def asked_layers(self, module: str) -> list[str]:
        """Layers with nodes that the user wants in float32."""
        return [layer for layer, members in self.layers[module].items() if self._asked[module].intersection(members)]

    def _convert(self, name: str, choice: Choice) -> Casting:
        model = self.models[name]
        role = self._roles[name]
        if role.predicts:
            return Casting(model, {}, {})
        layers = self.layers[name]
        keep = (
            self._asked[name]
            | self._ours[name].keys()
            | {node for layer in choice.kept for node in layers.get(layer, ())}
        )
        if self.quant is not None and choice.ranges is not None:
            spared = {node for layer in choice.unquantised for node in layers.get(layer, ())}
            nodes = self.lowered(name, quantised=True) - keep - spared
            model = quantise(model, self.quant, scales(self.histograms[name], self.quant, choice.ranges), nodes)
        types = self.cache_types(half_cache=choice.half_cache)
        io = {tensor: dtype for tensor, dtype in types.items() if dtype == "float16"}
        coordinates = self._coordinates if role is Role.PRODUCER else ()
        return cast_model(model, self.half, keep=keep, io=io, coordinates=coordinates)

    def _own_rules(self, name: str) -> dict[str, Rule]:
        """Node -> the rule that keeps it, for the rules that single graphs do not know."""
        index = self._indices[name]
        rules: dict[str, Rule] = dict.fromkeys(lookup_nodes(index), "lookup")
        if self._roles[name] is Role.PRODUCER:
            read = index.closure(self._predicted_from)
            rules.update(dict.fromkeys((index.names[number] for number in read), "predictor"))
        return rules

    def _named(self, index: GraphIndex, wanted: Collection[str]) -> set[str]:
        """Nodes of these names, or within modules of these paths."""
        names = set(wanted) - {""}
        return {node for i, node in enumerate(index.names) if node in names or names.intersection(index.scopes(i))}

    def _unknown(self, wanted: str) -> InputError:
        known = [name for index in self._indices.values() for name in (*index.module_paths(), *index.names)]
        close = difflib.get_close_matches(wanted, list(dict.fromkeys(known)), n=3, cutoff=0.0)
        return InputError(f"no module path or node to keep is called {wanted!r}; the closest are {', '.join(close)}")


def _layers(index: GraphIndex) -> dict[str, list[str]]:
    """Layer -> its nodes, in the order of the layers' first nodes."""
    paths = [scopes[-1] if (scopes := index.scopes(number)) else "" for number in range(len(index.nodes))]
    layers: dict[str, list[str]] = {}
    for path, name in zip(paths, index.names, strict=True):
        is_layer = path and paths.count(path) <= _LARGEST_LAYER
        layers.setdefault(path if is_layer else name, []).append(name)
    return layers
