"""Slim remainders: what is kept, that the graphs run, and that dropping channels that do nothing changes nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[2] / "conformance"))
import random_graphs

from warpcache.engine.errors import ExportError, InputError
from warpcache.export.branches.slim import GroupWidth, SlimBranch, depths, slim
from warpcache.export.graph.index import GraphIndex
from warpcache.export.graph.macs import count_macs
from warpcache.export.graph.run import run_model
from warpcache.export.graph.surgery import merge, normalise
from warpcache.export.graph.trace import trace_generator
from warpcache.models.renderer import DeferredNeuralRenderer

Trace = Callable[[str], Any]


def _noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _parsed(text: str, **arrays: np.ndarray) -> ModelProto:
    """A model from ONNX's text form, and weights, for which that has no room."""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]>\n{text}')
    for name, array in arrays.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return normalise(model)


def join(branch: SlimBranch) -> ModelProto:
    """One graph of a branch: the generator's inputs -> its outputs."""
    if branch.prefix is None:
        return branch.rest
    links = {name: name for name in branch.depth}
    return merge(branch.prefix, branch.rest, links, [value.name for value in branch.rest.graph.output])


def _widths(groups: tuple[GroupWidth, ...]) -> dict[str, tuple[int, int]]:
    return {group.layer: (group.kept, group.total) for group in groups}


def _check_runs(
    model: ModelProto, depth: tuple[str, ...], width: float, feeds: Mapping[str, np.ndarray], m: int
) -> int:
    """Slim, join and run; gives the MACs of the joined graph."""
    branch = slim(model, depth, width, multiple=m)
    joined = join(branch)
    onnx.checker.check_model(joined, full_check=True)
    whole = GraphIndex(model)
    assert tuple(value.name for value in joined.graph.input) == whole.inputs
    want, got = run_model(model, feeds, threads=1), run_model(joined, feeds, threads=1)
    assert list(got) == list(want)
    for name, value in want.items():
        assert (got[name].shape, got[name].dtype) == (value.shape, value.dtype)
        assert np.isfinite(got[name]).all() == np.isfinite(value).all()
        if width == 1.0:
            assert np.array_equal(got[name], value)
    return count_macs(joined)


def _headed(model: ModelProto) -> ModelProto:
    """The random graph with a convolution behind each output: channels that are given out cannot be dropped."""
    model = normalise(model)
    outputs = [(value.name, [d.dim_value for d in value.type.tensor_type.shape.dim]) for value in model.graph.output]
    del model.graph.output[:]
    for k, (name, shape) in enumerate(outputs):
        model.graph.initializer.append(numpy_helper.from_array(_noise(3, shape[1], 1, 1, seed=k), f"head{k}.weight"))
        model.graph.node.append(helper.make_node("Conv", [name, f"head{k}.weight"], [f"head{k}"], name=f"node_head{k}"))
        model.graph.output.append(helper.make_tensor_value_info(f"head{k}", TensorProto.FLOAT, [1, 3, *shape[2:]]))
    return normalise(model)


@settings(max_examples=20, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(random_graphs.models())
def test_random_graphs_slim_or_say_that_they_cannot(model: ModelProto) -> None:
    model = _headed(model)
    feeds = {"x": _noise(*random_graphs.INPUT_SHAPE, seed=1)}
    costs = dict.fromkeys(GraphIndex(model).names, 1.0)
    places = [(), *(depth.values for depth in depths(model, costs))]
    for depth in places[:: max(1, len(places) // 3)]:
        _check_runs(model, depth, 1.0, feeds, 8)
        try:
            macs = _check_runs(model, depth, 0.5, feeds, 1)
        except ExportError as exc:
            if "can be slimmed to a width of 0.5" not in str(exc):
                raise
        else:
            assert macs < count_macs(model)


def test_generators_slim_at_every_depth(traced: Any) -> None:
    feeds = traced.frame(1)
    found = depths(traced.model, traced.costs)
    assert found
    slimmed = []
    for depth in found[:: max(1, len(found) // 3)]:
        _check_runs(traced.model, depth.values, 1.0, feeds, 8)
        try:
            slimmed.append(_check_runs(traced.model, depth.values, 0.5, feeds, 2))
        except ExportError as exc:
            if "can be slimmed to a width of 0.5" not in str(exc):
                raise
    assert slimmed
    assert min(slimmed) < count_macs(traced.model)


class _Parts(nn.Module):
    """Every layer that ties channels: norms, skips, gates, depthwise, grouped and transposed convolutions, a GLU.

    Args:
        c: Channels; all layers have c or 2 c.
    """

    def __init__(self, c: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, c, 3, padding=1)
        self.norm = nn.GroupNorm(2, c)
        self.down = nn.Conv2d(c, 2 * c, 3, 2, 1, bias=False)
        self.depthwise = nn.Conv2d(2 * c, 2 * c, 3, padding=1, groups=2 * c)
        self.instance = nn.InstanceNorm2d(2 * c, affine=True)
        self.gate = nn.Conv2d(2 * c, 2 * c, 1)
        self.up = nn.ConvTranspose2d(2 * c, c, 4, 2, 1)
        self.grouped = nn.Conv2d(2 * c, c, 3, padding=1, groups=2)
        self.slope = nn.PReLU(c)
        self.glu = nn.Conv2d(c, 2 * c, 1)
        self.batch = nn.BatchNorm2d(c)
        self.shuffle = nn.Conv2d(c, 4 * c, 1)
        self.last = nn.Conv2d(c, 3, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        skip = functional.silu(self.norm(self.first(image)))
        x = functional.relu(self.down(skip))
        x = x + self.instance(self.depthwise(x))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        x = self.slope(self.grouped(torch.cat([self.up(x), skip], 1)))
        a, b = self.glu(x).chunk(2, dim=1)
        x = self.batch(functional.avg_pool2d(a * torch.sigmoid(b), 2))
        return torch.tanh(self.last(functional.pixel_shuffle(self.shuffle(x), 2)))


def _places(rng: np.random.Generator, total: int, kept: int, groups: int = 1) -> np.ndarray:
    """`kept` of `total` positions in order, equally many in each group."""
    each = total // groups
    picks = [g * each + np.sort(rng.choice(each, kept // groups, replace=False)) for g in range(groups)]
    return np.concatenate(picks)


def _widened(narrow: _Parts, c: int) -> _Parts:
    """A network of twice the channels whose further ones do nothing: their filters, scales and biases are 0.

    The norm over groups would see them; dropping all of them must give the narrow network all the same.
    """
    rng = np.random.default_rng(3)
    wide = _Parts(2 * c)
    first, down = _places(rng, 2 * c, c, 2), _places(rng, 4 * c, 2 * c)
    up, grouped, glu = _places(rng, 2 * c, c), _places(rng, 2 * c, c, 2), _places(rng, 2 * c, c)
    shuffled = _places(rng, 2 * c, c)
    both = np.concatenate([up, 2 * c + first])  # what the grouped convolution reads
    rows = {
        "first": first, "norm": first, "down": down, "depthwise": down, "instance": down, "gate": down,
        "grouped": grouped, "slope": grouped, "glu": np.concatenate([glu, 2 * c + glu]), "batch": glu,
        "shuffle": (4 * shuffled[:, None] + np.arange(4)).ravel(), "last": np.arange(3),
    }  # fmt: skip
    reads = {"down": first, "gate": down, "glu": grouped, "shuffle": glu, "last": shuffled, "first": np.arange(3)}
    state = wide.state_dict()
    for name, value in narrow.state_dict().items():
        layer, _, kind = name.rpartition(".")
        target = torch.zeros_like(state[name])
        if kind == "running_var":
            target += 1.0
        if layer == "up":
            if kind == "weight":
                target[np.ix_(down, up)] = value
            else:
                target[up] = value
        elif layer == "grouped" and kind == "weight":
            for g, half in enumerate(np.split(grouped, 2)):
                part = both[c * g : c * (g + 1)] - 2 * c * g
                target[np.ix_(half, part)] = value[c // 2 * g : c // 2 * (g + 1)]
        elif value.ndim == 0:
            target = value
        elif value.ndim == 4 and layer != "depthwise":
            target[np.ix_(rows[layer], reads[layer])] = value
        else:
            target[rows[layer]] = value
        state[name] = target
    wide.load_state_dict(state)
    return wide


def test_what_is_dropped_is_what_does_nothing() -> None:
    torch.manual_seed(2)
    narrow = _Parts(8).eval()
    with torch.no_grad():
        for value in (*narrow.parameters(), narrow.batch.running_mean):
            value += 0.3 * torch.randn_like(value)
    image = _noise(1, 3, 16, 16)
    wide = _widened(narrow, 8).eval()
    model = trace_generator(wide, {"image": image})
    slimmed = join(slim(model, (), 0.5, multiple=1))
    want = run_model(trace_generator(narrow, {"image": image}), {"image": image}, threads=1)
    got = run_model(slimmed, {"image": image}, threads=1)
    (want_image,), (got_image,) = want.values(), got.values()
    # The same weights in the same order: nothing may differ, not even in the last place.
    assert np.array_equal(got_image, want_image)
    # The norm over groups saw the idle channels before.
    (whole,) = run_model(model, {"image": image}, threads=1).values()
    assert np.abs(whole - want_image).max() > 0.01


def test_the_reference_generator_slims_behind_its_skips() -> None:
    torch.manual_seed(1)
    condition = np.random.default_rng(1).uniform(0, 1, (1, 6, 32, 32)).astype(np.float32)
    model = trace_generator(DeferredNeuralRenderer(32, (16, 32, 32), 4, 16), {"condition": condition})
    index = GraphIndex(model)
    heavy = {"Conv": 10.0}
    costs = {name: heavy.get(node.op_type, 0.1) for name, node in zip(index.names, index.nodes, strict=True)}
    found = depths(model, costs)
    assert [depth.share for depth in found] == sorted(depth.share for depth in found)
    scopes = [{index.scopes(index.producer[name])[-1] for name in depth.values} for depth in found]
    # A level's output is also its skip: behind level 1 both levels' outputs are needed.
    assert {"down.0"} in scopes
    assert {"down.0", "down.1"} in scopes
    inner = found[scopes.index({"down.0", "down.1"})]
    whole = count_macs(model)
    macs = [_check_runs(model, inner.values, width, {"condition": condition}, 8) for width in (1.0, 0.75, 0.5, 0.25)]
    assert macs[0] == whole
    assert macs == sorted(macs, reverse=True)
    assert len(set(macs)) == 4
    branch = slim(model, inner.values, 0.5)
    widths = _widths(branch.groups)
    assert set(widths.values()) == {(16, 32), (8, 16), (3, 3)}
    # What stays as it is can be shared with the generator: same names, same bytes.
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    assert branch.prefix is not None
    assert all(tensor == tensors[tensor.name] for tensor in branch.prefix.graph.initializer)


def test_channels_that_cannot_be_followed_are_kept() -> None:
    model = _parsed(
        """pinned (float[1, 3, 4, 4] x) => (float[1, 3, 4, 4] y, float[1, 8, 4, 4] given)
        <int64[3] flat = {1, 8, 16}, int64[4] image = {1, 8, 4, 4}> {
            a = Conv <kernel_shape = [1, 1]> (x, wa)
            tokens = Reshape (a, flat)
            turned = Transpose <perm = [0, 2, 1]> (tokens)
            scores = MatMul (turned, tokens)
            mixed = MatMul (tokens, scores)
            back = Reshape (mixed, image)
            given = Conv <kernel_shape = [1, 1]> (back, wb)
            c = Conv <kernel_shape = [1, 1]> (given, wc)
            d = Softmax <axis = 1> (c)
            e = Conv <kernel_shape = [1, 1]> (d, wd)
            y = Conv <kernel_shape = [1, 1]> (e, we)
        }""",
        wa=_noise(8, 3, 1, 1),
        wb=_noise(8, 8, 1, 1),
        wc=_noise(8, 8, 1, 1),
        wd=_noise(8, 8, 1, 1),
        we=_noise(3, 8, 1, 1),
    )
    branch = slim(model, (), 0.5, multiple=2)
    # Attention mixes a's channels, b's are given out, c's go through a softmax: only d's are free.
    assert [(g.kept, g.total) for g in branch.groups] == [(8, 8), (8, 8), (8, 8), (4, 8), (3, 3)]
    _check_runs(model, (), 0.5, {"x": _noise(1, 3, 4, 4)}, 2)


def test_the_strongest_filters_are_kept_in_order() -> None:
    weights = _noise(8, 3, 1, 1)
    strength = np.array([1, 9, 2, 8, 7, 1, 2, 6], np.float32) / np.abs(weights).sum((1, 2, 3))
    reader = _noise(2, 8, 1, 1, seed=1)
    model = _parsed(
        """order (float[1, 3, 4, 4] x) => (float[1, 2, 4, 4] y) {
            a = Conv <kernel_shape = [1, 1]> (x, wa, ba)
            b = Relu (a)
            y = Conv <kernel_shape = [1, 1]> (b, wb)
        }""",
        wa=weights * strength[:, None, None, None],
        ba=np.arange(8, dtype=np.float32),
        wb=reader,
    )
    tensors = {t.name: numpy_helper.to_array(t) for t in slim(model, (), 0.5, multiple=4).rest.graph.initializer}
    assert tensors["ba"].tolist() == [1, 3, 4, 7]
    assert np.array_equal(tensors["wb"], reader[:, [1, 3, 4, 7]])


@pytest.mark.parametrize(
    ("width", "multiple", "kept"),
    [(0.5, 8, 16), (0.5, 1, 10), (0.3, 8, 8), (0.3, 1, 6), (0.05, 1, 4), (0.9, 8, 20), (1.0, 8, 20)],
)
def test_widths_are_rounded_up_to_multiples(width: float, multiple: int, kept: int) -> None:
    model = _parsed(
        """plain (float[1, 3, 4, 4] x) => (float[1, 2, 4, 4] y) {
            a = Conv <kernel_shape = [1, 1]> (x, wa)
            s = Sigmoid (a)
            y = Conv <kernel_shape = [1, 1]> (s, wb)
        }""",
        wa=_noise(20, 3, 1, 1),
        wb=_noise(2, 20, 1, 1),
    )
    if kept == 20 and width < 1.0:
        with pytest.raises(
            ExportError, match=r"nothing behind the inputs can be slimmed to a width of 0.9 in multiples"
        ):
            slim(model, (), width, multiple=multiple)
    else:
        assert slim(model, (), width, multiple=multiple).groups[0].kept == kept


def test_groups_keep_equally_many_channels_across_a_concatenation() -> None:
    # Groups of 8 over 16 + 8 channels: the parts that groups and halves cut them into are 8, 8 and 8 wide.
    model = _parsed(
        """concatenated (float[1, 3, 4, 4] x) => (float[1, 2, 4, 4] y)
        <int64[3] folded = {0, 3, -1}, int64[4] image = {1, 24, 4, 4}> {
            a = Conv <kernel_shape = [1, 1]> (x, wa)
            b = Conv <kernel_shape = [1, 1]> (x, wb)
            both = Concat <axis = 1> (a, b)
            f = Reshape (both, folded)
            n = InstanceNormalization (f, ones, zeros)
            u = Reshape (n, image)
            scaled = Mul (u, scale)
            y = Conv <kernel_shape = [1, 1]> (scaled, wc)
        }""",
        wa=_noise(16, 3, 1, 1) * np.repeat([9, 1], 8).astype(np.float32)[:, None, None, None],
        wb=_noise(8, 3, 1, 1) * 100,  # b outweighs a, and a's first half its second: yet as many of each go
        wc=_noise(2, 24, 1, 1),
        ones=np.ones(3, np.float32),
        zeros=np.zeros(3, np.float32),
        scale=np.arange(24, dtype=np.float32).reshape(24, 1, 1),
    )
    branch = slim(model, (), 0.5, multiple=4)
    assert [(g.kept, g.total) for g in branch.groups] == [(8, 16), (4, 8), (2, 2)]
    feeds = {"x": _noise(1, 3, 4, 4)}
    _check_runs(model, (), 0.5, feeds, 4)
    tensors = {t.name: numpy_helper.to_array(t) for t in branch.rest.graph.initializer}
    (scale,) = (value for value in tensors.values() if value.shape == (12, 1, 1))
    assert (scale.ravel() // 8).tolist() == [0] * 4 + [1] * 4 + [2] * 4
    # 0 and -1 still say the same; the image's channels are fewer.
    assert tensors["folded"].tolist() == [0, 3, -1]
    assert [1, 12, 4, 4] in [value.tolist() for value in tensors.values() if value.dtype == np.int64]


def test_channels_are_followed_through_shapes_and_constants() -> None:
    model = _parsed(
        """shapes (float[1, 3, 4, 4] x, int64[1] who) => (float[1, 2, 8, 10] y, float[1, 5] z)
        <int64[4] sizes = {1, 16, 8, 8}, int64[1] from = {2}, int64[1] to = {8}, int64[1] axis = {1},
         int64[2] halves = {8, 8}, int64[2] last = {2, 3}, int64[4] large = {1, 16, 4, 4}> {
            a = Conv <kernel_shape = [1, 1]> (x, wa)
            who_is = Gather (people, who)
            person = Unsqueeze (who_is, last)
            spread = Expand (person, large)
            named = Add (a, spread)
            resized = Resize <mode = "nearest"> (named, none, none, sizes)
            beside = Concat <axis = 3> (resized, border)
            first, second = Split <axis = 1> (beside, halves)
            product = Mul (first, second)
            b = Conv <kernel_shape = [1, 1]> (product, wb)
            part = Slice (b, from, to, axis)
            y = Conv <kernel_shape = [1, 1]> (part, wy)
            c = Conv <kernel_shape = [1, 1]> (x, wc)
            blocks = SpaceToDepth <blocksize = 2> (c)
            flat = Flatten <axis = 1> (blocks)
            hidden = Gemm <transB = 1> (flat, wh, bh)
            active = Gelu (hidden)
            z = Gemm (active, wz)
        }""",
        people=_noise(4, 16),
        none=np.zeros(0, np.float32),
        border=_noise(1, 16, 8, 2),
        wa=_noise(16, 3, 1, 1),
        wb=_noise(8, 8, 1, 1),
        wy=_noise(2, 6, 1, 1),
        wc=_noise(4, 3, 1, 1),
        wh=_noise(12, 64),
        bh=_noise(12),
        wz=_noise(12, 5),
    )
    feeds = {"x": _noise(1, 3, 4, 4), "who": np.array([2], np.int64)}
    branch = slim(model, (), 0.5, multiple=1)
    # a and the table of people are one group; its halves, which are multiplied, are tied. Of b what the Slice leaves
    # out is a part of its own. Four channels are the least that is kept.
    assert [(g.kept, g.total) for g in branch.groups] == [(4, 8), (6, 8), (2, 2), (4, 4), (6, 12), (5, 5)]
    _check_runs(model, (), 0.5, feeds, 1)


def test_a_depth_reads_what_it_needs_of_the_inputs(trace: Trace) -> None:
    many = trace("many")
    found = depths(many.model, many.costs)
    deep = next(depth for depth in found if depth.share > 0.5)
    branch = slim(many.model, deep.values, 0.5, multiple=4)
    assert branch.depth == deep.values
    names = [value.name for value in branch.rest.graph.input]
    # The pose is an output by itself, and the switch is read at the end alone; both come from the inputs.
    assert names == [*deep.values, "pose", "inverted"]
    assert [value.name for value in join(branch).graph.input] == list(GraphIndex(many.model).inputs)


def test_depths_that_separate_nothing_are_refused(trace: Trace) -> None:
    unet = trace("unet")
    (depth, *_) = depths(unet.model, unet.costs)
    with pytest.raises(InputError, match="the width is 0; it must be above 0"):
        slim(unet.model, depth.values, 0)
    with pytest.raises(InputError, match="channels cannot be rounded up to a multiple of 0"):
        slim(unet.model, depth.values, 0.5, multiple=0)
    with pytest.raises(InputError, match="there is no value 'nowhere' computed from"):
        slim(unet.model, ["nowhere"], 0.5)
    with pytest.raises(InputError, match="there is no value 'condition' computed from"):
        slim(unet.model, ["condition"], 0.5)
    with pytest.raises(ExportError, match="the depth value 'image' is an output of the generator"):
        slim(unet.model, ["image"], 0.5)
    inner = GraphIndex(unet.model)
    early = inner.nodes[inner.producer[depth.values[0]]].input[0]
    with pytest.raises(ExportError, match=f"the generator's outputs do not need the depth value '{early}'"):
        slim(unet.model, [*depth.values, early], 0.5)
    with pytest.raises(InputError, match="the costs lack node"):
        depths(unet.model, {})
