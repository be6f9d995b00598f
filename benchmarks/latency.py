"""How long a caller waits for a picture: this project's cut bundle against the whole generator in other executors.

    python -m benchmarks.latency demo --against onnxruntime --json latency.json
    python -m benchmarks.latency B.warp --inputs CLIP.npz --device cuda:0 --backend tensorrt \\
        --against torch,torch-compile,onnxruntime,tensorrt --generator MODULE:FACTORY --weights W.safetensors

Every contender gets the same frames on the host and gives its picture back on the host, one frame after the other; the
time is from handing in to having it. Contenders take turns in blocks, in one process, so that a busy machine or a
throttled GPU hits all alike. Ratios are over the first contender of ``--against``.

This project's answers come from caches that are some frames old, so quality stands beside speed: PSNR against the whole
generator in float32 by ONNX Runtime on the CPU, on the same frames.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import click
import numpy as np
from numpy.typing import NDArray

from benchmarks import flags
from benchmarks.records import show_table, write_record
from warpcache.engine.bundle.bundle import Bundle
from warpcache.engine.cuda.options import CudaOptions, parse_device
from warpcache.engine.engine import Engine
from warpcache.engine.errors import InputError
from warpcache.engine.metrics.images import measure_frames
from warpcache.engine.schedule.policy import Policy
from warpcache.report.tables import Column
from warpcache.tasks.options import COUNT, option, takes

__all__ = ["CONTENDERS", "Contender", "compare", "main"]

CONTENDERS = ("torch", "torch-compile", "onnxruntime", "tensorrt", "tensorrt-rtx")

_COLUMNS = {"contender": Column("")} | {
    key: Column.number(heading, ".3f")
    for key, heading in (
        ("p50_ms", "p50 ms"),
        ("p95_ms", "p95 ms"),
        ("p99_ms", "p99 ms"),
        ("worst_ms", "worst ms"),
        ("ratio", "ratio"),
        ("psnr_db", "PSNR dB"),
    )
}
"""Of a row's keys: how the table shows them."""

Frames = Mapping[str, NDArray[Any]]


class Contender(Protocol):
    """Answers frames one at a time."""

    name: str

    def answer(self, frame: Frames) -> NDArray[np.float32]:
        """The image of one frame's inputs (leading axis 1), on the host."""
        ...


class WarpcacheContender:
    """An engine: the cut bundle under a policy, or the whole generator in one of our backends."""

    def __init__(self, name: str, engine: Engine, image: str) -> None:
        self.name = name
        self._image = image
        self._needed = engine.required_inputs
        self._session = engine.session()
        self._frames = self._session.frames()

    def answer(self, frame: Frames) -> NDArray[np.float32]:
        self._session.submit({name: array for name, array in frame.items() if name in self._needed})
        return np.asarray(next(self._frames).outputs[self._image])


class TorchContender:
    """The PyTorch module itself, as its authors would run it: inference mode, channels last, fp32 or half."""

    def __init__(
        self, name: str, module: Any, inputs: Sequence[str], device: str, *, compiled: bool, half: bool
    ) -> None:
        import torch

        self.name = name
        self._torch = torch
        self._device = torch.device(device)
        self._inputs = inputs
        self._dtype = torch.float16 if half else torch.float32
        module = module.to(self._device, self._dtype, memory_format=torch.channels_last).eval()
        if compiled:
            # On a GPU this mode replays CUDA graphs, which is the fair rival of an engine that does so too.
            module = torch.compile(module, mode="reduce-overhead" if self._device.type == "cuda" else "default")
        self._module = module

    def answer(self, frame: Frames) -> NDArray[np.float32]:
        torch = self._torch
        with torch.inference_mode():
            given = [torch.from_numpy(frame[name]).to(self._device, non_blocking=True) for name in self._inputs]
            given = [array.to(self._dtype) if array.is_floating_point() else array for array in given]
            result = self._module(*given)
            image = result[0] if isinstance(result, tuple | list) else result
            return np.asarray(image.float().cpu().numpy())


@dataclass(frozen=True)
class Options(flags.Recorded):
    """Who is compared, on what."""

    inputs: Path | None = option("--inputs", "Frames, .npz or .mp4; the demo draws its own.", default=None)
    against: str = option("--against", f"Some of {','.join(CONTENDERS)}.", default="onnxruntime")
    device: str = option("--device", "cpu or cuda:N.", default="cpu")
    backend: str = option("--backend", "What runs this project's bundle.", default="onnxruntime")
    policy: str = option("--policy", default="async")
    generator: str | None = option(
        "--generator", "The PyTorch generator, for torch and torch-compile.", default=None, metavar="MODULE:FACTORY"
    )
    weights: Path | None = option(
        "--weights", "Its weights, .safetensors; else as the factory made it, and its PSNR says nothing.", default=None
    )
    half: bool = option("--half", "Run torch in float16.", default=False)
    frames: int = option("--frames", "Frames a block.", default=120, type=click.IntRange(min=8))
    blocks: int = option("--blocks", default=3, type=COUNT)
    threads: int | None = option(
        "--threads", "CPU threads of our engines; default: all cores.", default=None, type=COUNT
    )


@click.command(epilog="Example:  python -m benchmarks.latency demo --against onnxruntime --frames 60")
@click.argument("bundle", metavar="B.warp|demo")
@takes(Options)
def main(bundle: str, options: Options) -> None:
    """Compare a bundle's latency with the whole generator's in other executors."""
    rivals = _checked_rivals(options.against, options.generator, options.device)
    with ExitStack() as stack:
        stack.enter_context(flags.one_sentence())
        chosen = Policy.parse(options.policy)
        opened, arrays = _open(bundle, options.inputs, options.frames)
        contenders: list[Contender] = [_make(name, stack, opened, options) for name in rivals]
        ours = stack.enter_context(_engine(opened, chosen, options.device, options.backend, options.threads))
        contenders.append(WarpcacheContender(f"warpcache {options.policy}", ours, _image(opened)))
        reference = _reference(opened, arrays, options.frames)
        rows = compare(contenders, arrays, frames=options.frames, blocks=options.blocks, reference=reference)
    title = f"{opened.path.name} on {options.device}; this project by {options.backend}"
    show_table(title, list(_COLUMNS.values()), [[row[key] for key in _COLUMNS] for row in rows])
    asked = {key: getattr(options, key) for key in ("device", "backend", "policy", "half", "frames", "blocks")}
    write_record(options.json_path, "latency", bundle=opened.path.name, **asked, rows=rows)


def compare(
    contenders: Sequence[Contender],
    arrays: Frames,
    *,
    frames: int,
    blocks: int,
    reference: NDArray[np.float32],
    warmup: int = 8,
    clock: Callable[[], float] = time.perf_counter,
) -> list[dict[str, Any]]:
    """Time every contender on the same frames, in alternating blocks.

    Args:
        contenders: Whom to time; ratios are over the first.
        arrays: Inputs by name, leading axis time.
        frames: Frames a block, from the start of the arrays.
        blocks: Blocks of each.
        reference: float32 [frames, C, H, W]: what the pictures of the last block are compared with.
        warmup: Frames answered and not counted before every block.
        clock: Seconds.

    Returns:
        One JSON-ready row a contender: percentiles in milliseconds, ratio of medians, PSNR in dB, all samples.
    """
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    images: dict[str, list[NDArray[np.float32]]] = {}
    for _ in range(blocks):
        for contender in contenders:
            for index in range(warmup):
                contender.answer(_frame(arrays, index))
            shown = images[contender.name] = []
            for index in range(frames):
                frame = _frame(arrays, index)
                begin = clock()
                image = contender.answer(frame)
                times[contender.name].append((clock() - begin) * 1e3)
                shown.append(np.array(image[0], np.float32))
    base = float(np.median(times[contenders[0].name]))
    rows = []
    for contender in contenders:
        samples = times[contender.name]
        p50, p95, p99 = (float(value) for value in np.percentile(samples, [50, 95, 99]))
        psnr = measure_frames(np.stack(images[contender.name]), reference, ["psnr_db"])["psnr_db"]
        rows.append(
            {
                "contender": contender.name,
                "p50_ms": p50,
                "p95_ms": p95,
                "p99_ms": p99,
                "worst_ms": float(max(samples)),
                "ratio": p50 / base,
                "psnr_db": float(np.mean(psnr)),
                "samples_ms": [round(sample, 4) for sample in samples],
            }
        )
    return rows


def _checked_rivals(against: str, generator: str | None, device: str) -> list[str]:
    """The names in ``--against``, before anything is loaded."""
    names = [name.strip() for name in against.split(",") if name.strip()]
    unknown = [name for name in names if name not in CONTENDERS]
    if unknown or not names:
        raise click.BadParameter(f"{against!r}: choose some of {', '.join(CONTENDERS)}, joined by commas")
    if any(name.startswith("torch") for name in names) and generator is None:
        raise click.UsageError("torch runs the PyTorch generator, which a bundle does not hold; name it by --generator")
    try:
        on_cpu = parse_device(device) is None
    except InputError as exc:
        raise click.BadParameter(str(exc)) from exc
    for name in names:
        if on_cpu and name.startswith("tensorrt"):
            raise click.UsageError(f"{name} runs on a GPU only; give --device cuda:0, or leave it out of --against")
    return names


def _open(bundle: str, inputs: Path | None, frames: int) -> tuple[Bundle, Frames]:
    from warpcache.media.inputs import load_inputs
    from warpcache.tasks.demo import demo_bundle, demo_inputs

    if bundle == "demo":
        opened = demo_bundle()
        return opened, demo_inputs(opened, frames).arrays
    opened = Bundle.open(bundle)
    if inputs is None:
        raise click.UsageError("name the frames to stream by --inputs")
    stream = load_inputs(inputs, opened.manifest.inputs)
    if stream.frames < frames:
        raise click.UsageError(f"{inputs} holds {stream.frames} frames; lower --frames {frames}")
    return opened, stream.arrays


def _make(name: str, stack: ExitStack, bundle: Bundle, options: Options) -> Contender:
    if not name.startswith("torch"):
        whole = stack.enter_context(_engine(bundle, Policy.parse("full"), options.device, name, options.threads))
        return WarpcacheContender(name, whole, _image(bundle))
    from warpcache.export.graph.trace import input_names_of, load_factory, load_weights

    assert options.generator is not None
    module = load_factory(options.generator)
    if options.weights is not None:
        load_weights(module, options.weights)
    compiled = name == "torch-compile"
    return TorchContender(name, module, input_names_of(module), options.device, compiled=compiled, half=options.half)


def _engine(bundle: Bundle, policy: Policy, device: str, backend: str, threads: int | None) -> Engine:
    options: dict[str, Any] = {"threads": threads} if parse_device(device) is None else {"cuda": CudaOptions()}
    return Engine(bundle, policy=policy, device=device, backend=backend, **options)


def _reference(bundle: Bundle, arrays: Frames, frames: int) -> NDArray[np.float32]:
    with Engine(bundle, policy="full") as engine:
        contender = WarpcacheContender("reference", engine, _image(bundle))
        return np.stack([np.array(contender.answer(_frame(arrays, index))[0], np.float32) for index in range(frames)])


def _frame(arrays: Frames, index: int) -> dict[str, NDArray[Any]]:
    return {name: array if len(array) == 1 else array[index : index + 1] for name, array in arrays.items()}


def _image(bundle: Bundle) -> str:
    if bundle.manifest.image_output is None:
        raise click.UsageError(f"{bundle.path.name} has no image output; latency is compared on pictures")
    return bundle.manifest.image_output


if __name__ == "__main__":
    main()
