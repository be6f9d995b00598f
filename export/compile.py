"""From a trained generator to a bundle: trace, cut, train, calibrate, write.

Nothing is written to the bundle's place before all is done. What an interrupted compile leaves is its checkpoints, that
of the adapter and that of the branches, beside the bundle; `resume` goes on from them.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx import ModelProto
from torch import nn

from ..engine.bundle.bundle import Bundle
from ..engine.bundle.manifest import ExitRecord
from ..engine.errors import ExportError, InputError
from ..engine.metrics.lpips import Lpips
from ..engine.spec import Array
from .adapter.distill import read_plan
from .adapter.layout import AdapterLayout, subject_layout
from .adapter.training import AdapterTraining, perceptual_loss
from .branches.branches import train_branches
from .bundle.manifest import WHOLE, Origin, draft_manifest, measure_costs
from .bundle.write import bundle_models, refuse_out
from .cut.candidate import AUTO, CutCandidate
from .cut.enumerate import enumerate_cuts
from .cut.rank import Trial, choose_cut, rank_cuts
from .cut.split import SplitModels, check_exact, split
from .cut.state import check_state, with_state
from .frames.clip import Clip, Stream, training_and_held
from .frames.state import STATE_FILE, State, apart, carried, first_values, state_of, unroll
from .frames.streams import Progress, frame_at
from .frames.subject import Subject
from .frames.surface import Surface
from .graph.index import GraphIndex, input_names, tensor_spec
from .graph.profile import profile_nodes
from .graph.surgery import fix_input_shapes, merge, normalise
from .graph.trace import input_names_of, trace_generator
from .options import DEFAULT_STEPS, CompileOptions
from .promise.calibrate import CalibrationTerms, calibrate
from .promise.check import check_promise
from .promise.exit_quality import ExitModels, PromiseTerms
from .promise.predictor import thumbnail_graph
from .promise.predictor_fit import PromiseFrames
from .promise.promise import CALIBRATION_FILE, PromiseOptions, make_promise

__all__ = ["DEFAULT_STEPS", "CompileOptions", "Footage", "Stream", "compile_generator", "split_model"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Footage:
    """The frames that a generator is compiled on.

    Attributes:
        stream: Frames to train on.
        holdout: Frames to calibrate on; without it the last quarter of `stream` is kept back.
        surface: Where the inputs carry motion; without it a module's attribute `surface` says so.
    """

    stream: Stream
    holdout: Stream | None = None
    surface: Surface | None = None


def compile_generator(
    module: nn.Module | ModelProto,
    footage: Footage,
    out: Path,
    *,
    options: CompileOptions,
    made_from: Mapping[str, Any],
    progress: Progress,
) -> Bundle:
    """Compile a generator into a bundle.

    Args:
        module: The trained generator, as a PyTorch module or as it was traced or exported before: an ONNX model, whose
            symbolic dimensions take the stream's sizes.
        footage: Frames to train and to calibrate on.
        out: The bundle to write, ``NAME.warp``.
        options: The user's choices.
        made_from: What the manifest is to say of where it comes from, JSON-ready.
        progress: Told how far it is: stage, done, total.

    Returns:
        The bundle, verified.

    Raises:
        InputError: If the inputs do not fit the generator.
        ExportError: If it cannot be traced, cut or trained as asked.
        BundleError: If the bundle cannot be written.
    """
    refuse_out(out)
    training = options.steps > 0
    holdout = footage.holdout
    surface = footage.surface if footage.surface is not None else getattr(module, "surface", None)
    # A stream made for training serves `--steps 0` as well; what the cut alone does not need is left out.
    spare = surface.atlas if surface is not None and not training else None
    frames, first = _apart_from_state(Clip.of(footage.stream, without=spare), options.state)
    train, held = training_and_held(
        frames, None if holdout is None else _apart_from_state(Clip.of(holdout), options.state)[0], training=training
    )
    surface = surface if training else None
    if isinstance(module, ModelProto):
        model = _fixed(
            module,
            train.arrays,
            first,
            more=set() if surface is None else {surface.atlas},
            state=set(options.state.values()),
        )
    else:
        names = set(input_names_of(module))
        motion = set() if surface is None else {surface.atlas} - names
        progress("tracing the generator", 0, 1)
        lacking = sorted(set(options.state.values()) & names - set(first))
        if lacking:
            raise InputError(
                f"state {lacking[0]!r} has no first value; add an array {lacking[0]!r} with a leading axis of 1 to the "
                "inputs, zeros where the state starts with nothing"
            )
        example = {name: train.arrays[name][:1] for name in train.arrays if name not in motion}
        model = trace_generator(module, example | first)
        progress("tracing the generator", 1, 1)
    state = state_of(model, options.state, first)
    return _Compilation(_subject(model, train, held, surface, state), out, options, progress).run(made_from)


def split_model(
    model: ModelProto,
    stream: Stream,
    out: Path,
    *,
    cut: str = AUTO,
    state: Mapping[str, str] | None = None,
    made_from: Mapping[str, Any],
    progress: Progress,
) -> Bundle:
    """Cut an ONNX model into a bundle; nothing is trained.

    Args:
        model: The generator; symbolic dimensions take the stream's sizes.
        stream: Sample frames: the cut is chosen, checked and calibrated on them.
        out: The bundle to write, ``NAME.warp``.
        cut: "auto", or names of values joined by commas.
        state: See `CompileOptions`.
        made_from: As for `compile_generator`.
        progress: Told how far it is.

    Raises:
        As `compile_generator`.
    """
    refuse_out(out)
    options = CompileOptions(cut=cut, steps=0, state=state or {})
    frames, first = _apart_from_state(Clip.of(stream), options.state)
    model = _fixed(model, frames.arrays, first, state=set(options.state.values()))
    subject = _subject(model, frames, frames, None, state_of(model, options.state, first))
    return _Compilation(subject, out, options, progress).run(made_from)


class _Compilation:
    """One compile after the graph is at hand, stage by stage.

    Args:
        subject: The generator and its frames.
        out: The bundle to write.
        options: The user's choices.
        progress: Told how far it is.
    """

    def __init__(self, subject: Subject, out: Path, options: CompileOptions, progress: Progress) -> None:
        self.subject, self.out, self.options, self.progress = subject, out, options, progress
        self.lpips = Lpips.load(options.lpips) if options.lpips is not None else None
        self.checkpoint = out.with_suffix(".checkpoint.safetensors")
        self.branch_checkpoint = out.with_suffix(".branches.checkpoint.safetensors")
        self.models: dict[str, ModelProto] = {"generator": subject.model}
        self.trained: list[str] = []  # exits besides the generator itself and its own remaining layers
        self.training: dict[str, Any] = {}
        self.more: dict[str, bytes] = {}

    def run(self, made_from: Mapping[str, Any]) -> Bundle:
        """Every stage in turn; the bundle, verified."""
        subject, options = self.subject, self.options
        subject.check()
        if options.steps:
            subject_layout(subject, ())  # refuses what no adapter can be trained for
        if options.exits is not None:
            check_promise(subject, options.promised_metric, options.max_age, self.lpips)
        plan = read_plan(self.checkpoint) if options.resume and options.steps else None
        candidates = _choose(subject, plan["cut"] if plan else options.cut, self.progress)
        cut, parts = _split(subject, candidates)
        self.models |= {"producer": parts.producer, "plain": parts.plain}
        adapter: AdapterTraining | None = None
        if options.steps:
            if not options.resume:
                self._forget()
            adapter = AdapterTraining(
                subject,
                parts,
                cut,
                options.adapter_options(),
                checkpoint=self.checkpoint,
                plan=plan,
                progress=self.progress,
            )
            branches = self._train_branches(adapter)
            trained = adapter.run()
            self.models |= {"producer": trained.producer, **trained.consumers, **branches}
            self.trained += [*trained.consumers, *branches]
            self.training |= trained.record
            if options.exits is not None:
                self.models["producer"] = merge(trained.producer, thumbnail_graph(adapter.layout), {})
            # The cut's tensors now leave a producer that does more: still the same bits.
            split_ = dataclasses.replace(parts, producer=self.models["producer"])
            feeds = frame_at(subject.train.arrays, 0)
            check_exact(subject.answering, split_, feeds)
            check_state(subject.model, split_.producer, subject.state_outputs, feeds)
        values = first_values(subject.state)
        if values is not None:
            self.more[STATE_FILE] = values
        costs = measure_costs(self.models, [WHOLE, "plain", *self.trained], subject)
        calibration = self._calibrate()
        if adapter is not None and options.exits is not None and calibration is not None:
            calibration["promise"] = self._promise(adapter.layout, costs)
        manifest = draft_manifest(
            Origin(self.out.stem, made_from, self.training),
            self.models,
            parts,
            subject,
            candidates=candidates,
            exits=costs,
            calibration=calibration,
        )
        self.progress("writing the bundle", 0, 1)
        bundle = bundle_models(self.out, manifest, self.models, more=self.more)
        self.progress("writing the bundle", 1, 1)
        self._forget()
        return bundle

    def _train_branches(self, adapter: AdapterTraining) -> dict[str, ModelProto]:
        """The branches by name, from what the generator made of the training frames.

        They come before the adapter's training, because a generator that no branch suits is found only here.
        """
        wanted = self.options.branches
        if not wanted:
            return {}
        adapter.keep()
        branches = train_branches(
            self.subject.model,
            self.subject.sample,
            adapter.recording.images.numpy(),
            options=self.options.branch_options(),
            perceptual=perceptual_loss(self.options.lpips, adapter.layout),
            progress=self.progress,
            checkpoint=self.branch_checkpoint,
        )
        if len(branches) < wanted:
            logger.warning("of %d branches only %d are cheap enough to be worth having", wanted, len(branches))
        self.training["branches"] = {branch.name: branch.record for branch in branches}
        return {branch.name: branch.graph for branch in branches}

    def _calibrate(self) -> dict[str, Any] | None:
        """Quality of every exit by age, on frames that training did not see; None where no output is a picture."""
        held = self.subject.held
        if self.subject.image_output is None:
            return None
        return calibrate(
            self.subject.answering,
            self.models["producer"],
            {name: self.models[name] for name in ("plain", *self.trained)},
            held.arrays,
            CalibrationTerms(self.subject.image_output, self.options.max_age, held.truth, self.lpips),
            progress=self.progress,
        )

    def _promise(self, layout: AdapterLayout, costs: Sequence[ExitRecord]) -> dict[str, Any]:
        """The promise's record; its predictors become modules, its rows a file of the bundle."""
        subject, options = self.subject, self.options
        assert subject.image_output is not None  # else `check_promise` had refused
        models = ExitModels(
            exits={name: self.models[name] for name in self.trained},
            generator=subject.model,
            producer=self.models["producer"],
            image_output=subject.image_output,
            plain=self.models["plain"],
            costs={record.name: record.cost_ratio for record in costs},
        )
        promise = make_promise(
            models,
            layout,
            PromiseFrames(subject.train.arrays, subject.held.arrays),
            PromiseTerms(options.promised_metric, range(1, options.max_age + 1), self.lpips),
            options=options.promise or PromiseOptions(seed=options.seed),
            progress=self.progress,
        )
        modules = {"predictor": promise.predictor, "predictor_cold": promise.predictor_cold}
        self.models |= {name: model for name, model in modules.items() if model is not None}
        self.more[CALIBRATION_FILE] = promise.calibration
        return promise.record

    def _forget(self) -> None:
        """Remove the checkpoints."""
        self.checkpoint.unlink(missing_ok=True)
        self.branch_checkpoint.unlink(missing_ok=True)


def _choose(subject: Subject, spec: str, progress: Progress) -> list[CutCandidate]:
    """The cuts, the best first; one alone where it was named."""
    progress("choosing the cut", 0, 2)
    model, sample = subject.answering, subject.sample
    feeds = {name: array[-1:] for name, array in sample.items()}
    frames = max(len(array) for array in sample.values())
    # Where no output is a picture, what reuse is worth is still measured on one.
    measured_on = subject.image_output or _first_float(model)
    # A typing mistake in a cut's name is found before anything is measured.
    if spec != AUTO:
        cut = choose_cut(model, spec, sample, measured_on, trial=Trial(state=subject.state_inputs))
        progress("choosing the cut", 2, 2)
        return [cut]
    if frames < 2:
        raise InputError(
            "choosing a cut needs at least 2 frames to see what an old cache is worth; give more, or a cut"
        )
    costs = profile_nodes(model, feeds)
    progress("choosing the cut", 1, 2)
    ranked = rank_cuts(enumerate_cuts(model, costs, state=subject.state_inputs), model, sample, measured_on)
    progress("choosing the cut", 2, 2)
    return ranked


def _split(subject: Subject, candidates: Sequence[CutCandidate]) -> tuple[CutCandidate, SplitModels]:
    """The best cut whose producer gives the state on bit for bit, and its halves; without state that is the best."""
    feeds = frame_at(subject.sample, 0)
    for later, cut in enumerate(candidates, 1):
        parts = split(subject.answering, cut.names, anchors=cut.anchors)
        check_exact(subject.answering, parts, feeds)
        try:
            return cut, with_state(subject.model, parts, subject.state_outputs, feeds)
        except ExportError as exc:
            if later == len(candidates):
                raise
            logger.info("cut %s is left out: %s", ", ".join(cut.names), exc)
    raise ExportError("there is no cut to choose from; name one yourself")


def _apart_from_state(clip: Clip, wanted: Mapping[str, str]) -> tuple[Clip, dict[str, Array]]:
    """The clip without the first values of state, and these."""
    arrays, first = apart(wanted, clip.arrays)
    return dataclasses.replace(clip, arrays=arrays), first


def _subject(model: ModelProto, train: Clip, held: Clip, surface: Surface | None, state: tuple[State, ...]) -> Subject:
    """What is compiled; with state every part begins with the first value."""
    if not state:
        return Subject(model, train, held, surface)
    model = carried(model, state)
    again = train if held is train else None
    train = unroll(model, state, train)
    return Subject(model, train, train if again is not None else unroll(model, state, held), surface, state)


def _fixed(
    model: ModelProto,
    arrays: Mapping[str, Array],
    first: Mapping[str, Array],
    more: AbstractSet[str] = frozenset(),
    state: AbstractSet[str] = frozenset(),
) -> ModelProto:
    """An ONNX model in normal form with the sizes of the stream and of the `first` values of its state.

    `more` may be in the stream beside its inputs.
    """
    known, given = [name for name in input_names(model) if name not in state], set(arrays)
    missing, unexpected = sorted(set(known) - given), sorted(given - set(known) - more)
    if missing or unexpected:
        faults = [f"lack {', '.join(missing)}"] if missing else []
        faults += [f"hold {', '.join(unexpected)}, which it does not take"] if unexpected else []
        raise InputError(f"the inputs {' and '.join(faults)}; the model takes {', '.join(known)}")
    shapes = {name: (1, *arrays[name].shape[1:]) for name in known}
    return normalise(fix_input_shapes(model, shapes | _symbolic(model, first)))


def _symbolic(model: ModelProto, first: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
    """Shapes of those first values whose inputs say none themselves."""
    given = {value.name for value in model.graph.input if tensor_spec(value) is None}
    return {name: array.shape for name, array in first.items() if name in given}


def _first_float(model: ModelProto) -> str | None:
    """The first floating-point output."""
    index = GraphIndex(model)
    return next((name for name in index.outputs if index.specs[name].dtype.startswith("float")), None)
