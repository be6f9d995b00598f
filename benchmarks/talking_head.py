"""Neural caching of real talking heads: train the reference generator, compile it, measure every promised figure.

    python -m benchmarks.talking_head --data CLIPS --lpips squeeze_v0.1.safetensors --json talking_head.json

For each clip: the deferred renderer is trained on the earlier part of it at 128x128, `warpcache compile` makes a
bundle (in a process of its own, whose time and memory are figures too), and the later part is measured. Every stage
keeps its result in the work folder and is skipped where that is there. Ratios are within one run, medians of
interleaved rounds; quality is measured on every frame of the test part.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from benchmarks import flags
from benchmarks.clips import TalkingHead, load_talking_head
from benchmarks.making import compiled, trained
from benchmarks.measuring import (
    BareModule,
    Figure,
    answers,
    in_blocks_ms,
    interleaved_ms,
    means,
    print_figures,
    ratio_of_medians,
)
from benchmarks.records import show_table, write_record
from benchmarks.talking_head_model import generator
from warpcache.engine import Engine
from warpcache.engine.bundle.bundle import Bundle
from warpcache.engine.bundle.roles import Role
from warpcache.engine.metrics.lpips import Lpips
from warpcache.engine.schedule.policy import Policy
from warpcache.export.cut.split import split
from warpcache.export.graph.index import load_model
from warpcache.export.graph.run import open_session, run_session
from warpcache.report.tables import Column
from warpcache.tasks.options import option, takes

AGES = (1, 2, 3, 4)
METRICS = ("psnr_db", "ssim", "flip", "lpips")
ROUNDS = 300
BUDGET = 0.1
CONSUMER = "warp"
"""The exit, and the module, of the trained consumer, as the compiler names it."""


@dataclass(frozen=True)
class Options(flags.Staged):
    """What is trained and measured, and where it is kept."""

    clips: tuple[str, ...] = option("--clip", default=("d6", "d3"))
    work: Path = option("--work", default="out/talking_head")
    steps: int | None = option(
        "--steps", "Training steps of the warp adapter; default: that of `warpcache compile`.", default=None
    )
    budget: float = option("--budget", default=BUDGET)


@click.command(epilog="Example:  python -m benchmarks.talking_head --data clips --lpips squeeze_v0.1.safetensors")
@takes(Options)
def main(options: Options) -> None:
    """Train, compile and measure the reference generator on real clips."""
    options.work.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {}
    for name in options.clips:
        clip = load_talking_head(options.data, name)
        weights = train_generator(clip, options.work, options.generator_steps)
        if options.stage == flags.Stage.GENERATOR:
            continue
        bundle = compile_clip(clip, weights, options.lpips, options.steps, options.budget)
        if options.stage == flags.Stage.BUNDLE:
            continue
        figures = measure_clip(clip, bundle, Lpips.load(options.lpips))
        print_figures(f"{name}: figures", figures)
        report[name] = {"figures": [figure.to_record() for figure in figures]}
    if options.stage == flags.Stage.MEASURE:
        write_record(options.json_path, "talking_head", clips=report)


def train_generator(clip: TalkingHead, work: Path, steps: int) -> Path:
    """Train the reference generator on the clip's earlier part; its weights."""
    path = work / f"{clip.name}.safetensors"
    if not path.exists():
        trained(generator, clip.train, path, steps)
    return path


def compile_clip(clip: TalkingHead, weights: Path, lpips: Path, steps: int | None, budget: float) -> Bundle:
    """Run `warpcache compile` as a user would, beside the weights, and note what it took."""
    options = ["--budget", str(budget), "--lpips", str(lpips), *([] if steps is None else ["--steps", str(steps)])]
    train, test = ({**frames, "fps": clip.fps} for frames in (clip.train, clip.test))
    return compiled(weights.with_suffix(".warp"), f"{generator.__module__}:generator", weights, train, test, options)


def measure_clip(clip: TalkingHead, bundle: Bundle, lpips: Lpips) -> list[Figure]:
    """Every figure of one clip, from its test part; prints what they come from."""
    arrays = {record.spec.name: clip.test[record.spec.name] for record in bundle.manifest.inputs}
    truth = clip.test["truth"]
    figures = _latency(bundle, arrays) + _streaming(bundle, arrays, clip.fps)
    whole = np.stack(list(answers(bundle, arrays, policy=Policy("full")).values()))
    best = means(whole, truth, METRICS, lpips)
    rows: list[Sequence[Any]] = [("whole generator", 0, *(best[m] for m in METRICS), *(None for _ in METRICS))]
    first = max(AGES)  # the same frames for every age
    best = means(whole[first:], truth[first:], METRICS, lpips)
    for age in AGES:
        shown = answers(bundle, arrays, policy=Policy.lockstep(age))
        warp = np.stack([shown[t] for t in range(first, len(whole))])
        frozen = whole[first - age : len(whole) - age]
        of_truth = {n: means(a, truth[first:], METRICS, lpips) for n, a in (("warp", warp), ("frozen", frozen))}
        of_whole = {n: means(a, whole[first:], METRICS, lpips) for n, a in (("warp", warp), ("frozen", frozen))}
        for label, key in (("consumer", "warp"), ("last frame again", "frozen")):
            rows.append((label, age, *(of[key][m] for of in (of_truth, of_whole) for m in METRICS)))
        if age in (1, 3):
            limit, lpips_limit = (0.5, 0.003) if age == 1 else (2.0, 0.008)
            for metric in ("psnr_db", "ssim"):
                lost = 100 * (1 - of_truth["warp"][metric] / best[metric])
                figures.append(Figure(f"{metric} lost against truth, age {age}", lost, limit, "%"))
            lost = of_truth["warp"]["lpips"] - best["lpips"]
            figures.append(Figure(f"lpips lost against truth, age {age}", lost, lpips_limit))
        for metric in ("lpips", "flip"):
            ratio = of_whole["warp"][metric] / of_whole["frozen"][metric]
            figures.append(Figure(f"{metric} against whole, consumer / last frame again, age {age}", ratio, 0.7))
        if age == 2:
            reuse_figures, reuse_rows = _against_plain_reuse(bundle, arrays, whole, of_whole["warp"], first, lpips)
            figures += reuse_figures
            rows += reuse_rows
    against = [Column.number(f"{metric} / {what}", ".4f") for what in ("truth", "whole") for metric in METRICS]
    show_table(f"{clip.name}: test part, {len(whole)} frames", (Column("answer"), Column.number("age"), *against), rows)
    taken = bundle.path.with_suffix(".compile.json")
    if taken.exists():
        record = json.loads(taken.read_text(encoding="utf-8"))
        figures.append(Figure("compile time", record["minutes"], 20, "min"))
        figures.append(Figure("compile peak memory", record["peak_gb"], 4, "GB"))
    return figures


def _latency(bundle: Bundle, arrays: Mapping[str, NDArray[Any]]) -> list[Figure]:
    """Consumer against whole generator, bare, and what the engine adds to a bare consumer."""
    figures = []
    cache = BareModule(bundle, Role.PRODUCER).run({name: array[:1] for name, array in arrays.items()})
    feeds = {**{name: array[1:2] for name, array in arrays.items()}, **cache}
    compared: dict[str, str | Role] = {Role.WHOLE: Role.WHOLE, Role.WARP: CONSUMER}
    bare = {name: BareModule(bundle, module) for name, module in compared.items()}
    times = interleaved_ms({name: partial(module.run, feeds) for name, module in bare.items()}, ROUNDS // 2)
    # In turns the consumer finds its weights and inputs pushed out of the CPU's caches every time: its worst case.
    figures.append(Figure("consumer p50 / whole p50, 1 thread, in turns", ratio_of_medians(times), 0.10))
    del bare
    for threads, label in ((1, "1 thread"), (2, "2 threads")):
        times = in_blocks_ms(
            {name: partial(BareModule, bundle, module, threads) for name, module in compared.items()}, feeds
        )
        figures.append(Figure(f"consumer p50 / whole p50, {label}, in blocks", ratio_of_medians(times), 0.10))
        figures.append(Figure(f"whole p50, {label}", float(np.median(times[Role.WHOLE])), None, "ms"))
        figures.append(Figure(f"consumer p50, {label}", float(np.median(times[Role.WARP])), None, "ms"))
    # The same work on both sides: a producer between two answers, so that both find equally cold CPU caches.
    frames = min(ROUNDS, len(next(iter(arrays.values()))))
    called: list[float] = []
    answered: list[float] = []
    with Engine(bundle, age=1, threads=1) as engine:
        producer, consumer = BareModule(bundle, Role.PRODUCER), BareModule(bundle, CONSUMER)
        stream = engine.session().render({name: array[:frames] for name, array in arrays.items()})
        cache = producer.run({name: array[:1] for name, array in arrays.items()})
        for t, frame in enumerate(stream):
            feeds = {name: array[t : t + 1] for name, array in arrays.items()}
            begin = time.perf_counter()
            consumer.run({**feeds, **cache})
            called.append((time.perf_counter() - begin) * 1000)
            cache = producer.run(feeds)
            if bundle.manifest.role_of(frame.route) is Role.WARP:
                answered.append(frame.latency_ms)
    base, ours = float(np.median(called[1:])), float(np.median(answered))
    figures.append(Figure("engine overhead over a bare call", ours - base, max(0.2, 0.03 * base), "ms"))
    return figures


def _streaming(bundle: Bundle, arrays: Mapping[str, NDArray[Any]], fps: float) -> list[Figure]:
    """Latency under `async` with producers running, paced as the clip is."""
    latency: list[float] = []
    ages: list[int] = []
    with Engine(bundle, policy="async") as engine:
        for frame in engine.session().render(arrays, fps=fps):
            if frame.index > 2:  # the first frame waits for the first cache
                latency.append(frame.latency_ms)
                ages.append(frame.age)
    p50, p99 = (float(q) for q in np.quantile(latency, [0.5, 0.99]))
    return [
        Figure("async p99 / p50", p99 / p50, 1.5),
        Figure("async p50", p50, None, "ms"),
        Figure("async mean cache age", float(np.mean(ages)), None, "frames"),
    ]


def dearer_cuts(bundle: Bundle) -> list[dict[str, Any]]:
    """The candidates that the cut was chosen among that cost no less than the trained consumer, cheapest first."""
    cost = bundle.manifest.exit(CONSUMER).cost_ratio
    candidates = () if bundle.manifest.cut is None else bundle.manifest.cut.candidates
    return sorted((c for c in candidates if c["cost_ratio"] >= cost), key=lambda c: float(c["cost_ratio"]))


def _against_plain_reuse(
    bundle: Bundle,
    arrays: Mapping[str, NDArray[Any]],
    whole: NDArray[np.float32],
    warp: Mapping[str, float],
    first: int,
    lpips: Lpips,
) -> tuple[list[Figure], list[Sequence[Any]]]:
    """Quality at age 2 against plain reuse of the cache by a consumer that costs at least as much."""
    chosen = dearer_cuts(bundle)
    rivals = chosen[:1] + [c for c in chosen[1:] if c["reads_input"]][:1]
    model = load_model(bundle.file("generator.onnx"))
    figures: list[Figure] = []
    rows: list[Sequence[Any]] = []
    names = [spec.name for spec in bundle.manifest.generator_inputs]
    for rival in rivals:
        parts = split(model, rival["tensors"])
        producer, plain = open_session(parts.producer), open_session(parts.plain)
        image = bundle.manifest.image_output or bundle.manifest.outputs[0].name
        shown = []
        for t in range(first, len(whole)):
            cache = run_session(producer, {name: arrays[name][t - 2 : t - 1] for name in names})
            feeds = {name: arrays[name][t : t + 1] for name in names}
            shown.append(run_session(plain, {**feeds, **cache}, [image])[image][0])
        quality = means(np.stack(shown), whole[first:], METRICS, lpips)
        label = f"plain reuse, {rival['cost_ratio']:.0%} of the whole ({', '.join(rival['labels'])})"
        rows.append((label, 2, *(None for _ in METRICS), *(quality[m] for m in METRICS)))
        for metric in METRICS:
            better = warp[metric] - quality[metric] if metric in ("psnr_db", "ssim") else quality[metric] - warp[metric]
            name = f"{metric} gained over plain reuse at {rival['cost_ratio']:.1%} of the cost, age 2"
            figures.append(Figure(name, better, 0.0, at_least=True))
    return figures, rows


if __name__ == "__main__":
    main()
