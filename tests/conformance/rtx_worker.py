"""Parse and build ONNX files with TensorRT-RTX, one after another: `rtx_builds.py` feeds this process file names.

A process of its own, because some graphs make the builder end the process it runs in. Reads one path a line; answers
one JSON object a line: {"stage": "built" | "parse" | "build", "messages": [the parser's or builder's errors]}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import tensorrt_rtx


class Messages(tensorrt_rtx.ILogger):
    """Keeps the library's errors."""

    def __init__(self) -> None:
        tensorrt_rtx.ILogger.__init__(self)
        self.lines: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        if severity <= tensorrt_rtx.ILogger.ERROR:
            self.lines.append(message)


def build(builder: tensorrt_rtx.Builder, messages: Messages, path: Path) -> dict[str, Any]:
    """Build one file: strongly typed, portable over GPUs, shapes fixed."""
    messages.lines.clear()
    network = builder.create_network(1 << int(tensorrt_rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = tensorrt_rtx.OnnxParser(network, messages)
    if not parser.parse(path.read_bytes()):
        errors = [parser.get_error(k).desc() for k in range(parser.num_errors)]
        return {"stage": "parse", "messages": [*errors, *messages.lines]}
    engine = builder.build_serialized_network(network, builder.create_builder_config())
    return {"stage": "build" if engine is None else "built", "messages": list(messages.lines)}


def main() -> None:
    messages = Messages()
    builder = tensorrt_rtx.Builder(messages)
    for line in sys.stdin:
        print(json.dumps(build(builder, messages, Path(line.rstrip("\n")))), flush=True)


if __name__ == "__main__":
    main()
