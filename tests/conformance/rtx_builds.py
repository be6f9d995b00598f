"""TensorRT-RTX builds in worker processes, which are started again where a graph ends them."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["Build", "build_all"]

WORKER = Path(__file__).with_name("rtx_worker.py")
# A build takes some 20 milliseconds; what takes a thousand times that hangs.
_LIMIT_S = 60.0


@dataclass(frozen=True)
class Build:
    """What became of one file.

    Attributes:
        stage: Where it ended: ``"built"`` is success.
        messages: The library's errors, the parser's first.
    """

    stage: Literal["built", "parse", "build", "crash", "hang"]
    messages: tuple[str, ...] = ()


def build_all(paths: Iterable[Path], *, worker: Path = WORKER, limit_s: float = _LIMIT_S) -> dict[Path, Build]:
    """Build every file.

    A file that ends its process is tried once more in a fresh one, so that what is told of it does not depend on the
    files before it.

    Args:
        paths: ONNX files.
        worker: The script of the worker processes.
        limit_s: Seconds after which a build counts as hanging.
    """
    results: dict[Path, Build] = {}
    process: _Worker | None = None
    for path in paths:
        fresh = process is None
        if process is None:
            process = _Worker(worker)
        answer = process.build(path, limit_s)
        if answer.stage in ("crash", "hang"):
            process.kill()
            process = None
            if not fresh and answer.stage == "crash":
                process = _Worker(worker)
                answer = process.build(path, limit_s)
                if answer.stage in ("crash", "hang"):
                    process.kill()
                    process = None
        results[path] = answer
    if process is not None:
        process.close()
    return results


class _Worker:
    def __init__(self, script: Path) -> None:
        # No GPU, also where there is one: the table is the same on every machine.
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def build(self, path: Path, limit_s: float) -> Build:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{path}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return Build("crash")
        try:
            line = self._lines.get(timeout=limit_s)
        except queue.Empty:
            return Build("hang")
        if not line:
            return Build("crash")
        answer = json.loads(line)
        return Build(answer["stage"], tuple(answer["messages"]))

    def close(self) -> None:
        """Let the process end by itself."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self) -> None:
        """Hand on lines; an empty one says that the process has ended."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")
