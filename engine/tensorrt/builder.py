"""Engines built in a process of their own, because some graphs make a library's builder crash and its process with it.

The process is this file, run with ``python -m``. A folder carries the requests in and the engines out; each answer is
written when it is there, so that a crash costs the module it happened in and no other.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import BackendError, DeviceError, InputError, WarpcacheError
from ..spec import TensorSpec
from .flavour import Flavour
from .network import BuildRequest, build_engine
from .options import BuildOptions, ShapeProfile

__all__ = [
    "BuildOptions",
    "BuildRequest",
    "ShapeProfile",
    "build_engine",
    "build_engine_isolated",
    "build_engines_isolated",
]

logger = logging.getLogger(__name__)

_MODULE = f"{__package__}.builder"
_REQUESTS = "requests.json"
_OUTPUT = "output.txt"
# What may come back by name; anything else is a bug in the process, and its traceback says so.
_ERRORS: dict[str, type[WarpcacheError]] = {kind.__name__: kind for kind in (BackendError, DeviceError, InputError)}


def build_engine_isolated(request: BuildRequest, *, flavour: Flavour, device: int = 0) -> bytes:
    """Build one engine in a process of its own.

    Raises:
        BackendError: As `build_engine`; also if the builder crashed, with the signal's name.
        DeviceError: As `build_engine`.
    """
    (built,) = build_engines_isolated([request], flavour=flavour, device=device)
    if isinstance(built, WarpcacheError):
        raise built
    return built


def build_engines_isolated(
    requests: Sequence[BuildRequest],
    *,
    flavour: Flavour,
    device: int = 0,
    rescue: Callable[[int, bytes], object] = lambda index, engine: None,
) -> list[bytes | WarpcacheError]:
    """Build several engines one after the other in one process, or in a further one after each crash.

    Ctrl-C ends the process and leaves nothing behind.

    Args:
        requests: What to build.
        flavour: The library.
        device: The number of the GPU that is built on and that ``"current"`` means.
        rescue: Where an interrupt ends this, told of every engine that is ready by then, by the number of its request:
            with full TensorRT each is minutes of work.

    Returns:
        For every request its engine, or the error that building it ended in: those that were built are not to be lost
        for one that was not.
    """
    built: list[bytes | WarpcacheError] = []
    while len(built) < len(requests):
        try:
            built += _build(requests[len(built) :], flavour, device)
        except _Interrupted as exc:
            for index, engine in enumerate([*built, *exc.ready]):
                if isinstance(engine, bytes):
                    rescue(index, engine)
            raise exc.cause from None
    return built


class _Interrupted(BaseException):
    """What ended a build from outside, and what was ready by then."""

    def __init__(self, cause: BaseException, ready: list[bytes | WarpcacheError]) -> None:
        super().__init__()
        self.cause = cause
        self.ready = ready


def _build(requests: Sequence[BuildRequest], flavour: Flavour, device: int) -> list[bytes | WarpcacheError]:
    """The answers to the first of the requests: all of them, or up to the one that crashed; never none."""
    with tempfile.TemporaryDirectory(prefix="warpcache-build-") as name:
        folder = Path(name)
        (folder / _REQUESTS).write_text(
            json.dumps(
                {
                    "flavour": flavour.name,
                    "module": flavour.module.__name__,
                    "device": device,
                    "requests": [_packed(request) for request in requests],
                }
            )
        )
        answers: list[bytes | WarpcacheError] = []
        said: set[str] = set()
        try:
            code = _run(folder)
        except (Exception, KeyboardInterrupt, SystemExit) as exc:
            # The last answer may be half written.
            with contextlib.suppress(ValueError, OSError):
                for index in range(len(requests)):
                    answer = _answer(folder, index, said)
                    if answer is None:
                        break
                    answers.append(answer)
            raise _Interrupted(exc, answers) from exc
        for index, request in enumerate(requests):
            answer = _answer(folder, index, said)
            if answer is None:
                return [*answers, _crash(request, flavour, code, folder)]
            answers.append(answer)
        if code != 0:
            # Libraries have crashed on their way out, with the work done.
            logger.warning("the process that built engines ended with %s after its work", _status(code))
        return answers


def _run(folder: Path) -> int:
    if not sys.executable:
        raise BackendError(
            "engines are built by a second Python process, and this one does not know its own executable; build them "
            "with `warpcache build` first"
        )
    # -P: the working directory may be a checkout, whose folders would hide the installed package.
    command = [sys.executable, "-P", "-m", _MODULE, str(folder)]
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    with (folder / _OUTPUT).open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": paths},
        )
        try:
            return process.wait()
        finally:
            # Reached while it runs only by Ctrl-C, or another exception from outside.
            if process.poll() is None:
                process.kill()
                process.wait()


def _answer(folder: Path, index: int, said: set[str]) -> bytes | WarpcacheError | None:
    """One request's answer; what is in `said` is not logged again: libraries repeat some lines for every layer."""
    try:
        answer = json.loads((folder / f"{index}.json").read_text())
    except FileNotFoundError:
        return None
    for level, text in answer["log"]:
        if text not in said:
            said.add(text)
            logger.log(level, "%s", text)
    if answer["error"] is None:
        return (folder / f"{index}.engine").read_bytes()
    return _ERRORS[answer["kind"]](answer["error"])


def _crash(request: BuildRequest, flavour: Flavour, code: int, folder: Path) -> BackendError:
    # Bytes of a dying process: whatever they are.
    lines = (folder / _OUTPUT).read_bytes().decode("utf-8", "replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
    return BackendError(
        f"module {request.name!r} ({request.path.name}): {flavour.title} crashed while building it "
        f"({_status(code)}; last words: {last[:200]}); use the backend 'onnxruntime', or compile the bundle from a "
        "model exported at opset 22 or lower"
    )


def _status(code: int) -> str:
    if code >= 0:
        return f"exit status {code}"
    with contextlib.suppress(ValueError):
        name = signal.Signals(-code).name
        return f"{name}, perhaps sent by the system for want of memory" if name == "SIGKILL" else name
    return f"signal {-code}"


def _packed(request: BuildRequest) -> dict[str, Any]:
    # The process may have another working directory by the time it reads this.
    return {**asdict(request), "path": str(request.path.resolve())}


def _unpacked(packed: dict[str, Any]) -> BuildRequest:
    options = dict(packed["options"])
    profiles = tuple(
        ShapeProfile(entry["name"], *(tuple(entry[key]) for key in ("min", "opt", "max")))
        for entry in options.pop("profiles")
    )
    return BuildRequest(
        path=Path(packed["path"]),
        name=packed["name"],
        inputs=_specs(packed["inputs"]),
        outputs=_specs(packed["outputs"]),
        targets=tuple(packed["targets"]),
        options=BuildOptions(**options, profiles=profiles),
    )


def _specs(packed: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(spec["name"], spec["dtype"], tuple(spec["shape"])) for spec in packed)


class _Lines(logging.Handler):
    """Keeps what is logged from `level` on, for the process that asked."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.lines: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.levelno, record.getMessage()))


def main(folder: Path) -> None:
    """Answer the requests in `folder`: what the second process does."""
    # Ctrl-C goes to both; the process that asked ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(ImportError):
        # A crash is expected here, and its memory image would be of use to nobody.
        resource = importlib.import_module("resource")
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    log = _Lines(logging.INFO)
    logging.getLogger().addHandler(log)
    logging.getLogger().setLevel(logging.INFO)
    order = json.loads((folder / _REQUESTS).read_text())
    for index, packed in enumerate(order["requests"]):
        error = kind = None
        try:
            # In here, so that a library which cannot be loaded is answered like every other error.
            flavour = Flavour.of(importlib.import_module(order["module"]), order["flavour"])
            engine = build_engine(_unpacked(packed), flavour=flavour, device=order["device"])
            (folder / f"{index}.engine").write_bytes(engine)
        except tuple(_ERRORS.values()) as exc:
            error, kind = str(exc), type(exc).__name__
        except OSError as exc:
            # Room for the answer, which would be lost too.
            (folder / f"{index}.engine").unlink(missing_ok=True)
            error, kind = (
                f"module {packed['name']!r}: its engine cannot be handed over in {str(folder.parent)!r} "
                f"({exc.strerror or exc}); free some space there, or set TMPDIR to another folder",
                InputError.__name__,
            )
        lines, log.lines = log.lines, []
        (folder / f"{index}.json").write_text(json.dumps({"error": error, "kind": kind, "log": lines}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
