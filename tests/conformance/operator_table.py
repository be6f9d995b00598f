"""`docs/operators.md`: which operators both backends take, made from what became of ONNX's node cases."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from onnx_cases import OPERATORS, OPSET, Collection, NodeCase
from rtx_builds import TARGETS

ROOT = Path(__file__).parents[2]
PATH = ROOT / "docs" / "operators.md"
COMMAND = "python -m pytest tests/conformance --write-operators"
VERSIONS = ("onnx", "onnxruntime", "tensorrt-rtx")
_DTYPES = ("float32", "float16")

# What the libraries say, in a few words that do not change from run to run; the first that fits.
_CLAUSES = (
    ("crashed while building it", "the builder's process ends"),
    ("in the graph, but .* was announced", "gives another shape than ONNX expects"),
    ("gives other values", "gives other values than ONNX expects"),
    ("does not support dilations other than 1", "dilation"),
    ("mode than 1 outputs for MaxPool", "the indices output"),
    ("keep_aspect_ratio_policy", "a `keep_aspect_ratio_policy` other than `stretch`"),
    ("tf_half_pixel_for_nn", "`tf_crop_and_resize` and `half_pixel_symmetric`"),
    ("antialias == 0", "antialiasing"),
    ("Unsupported reduction type|ScatterND with reduction", "a reduction"),
    ("Only L1 and L2 normalization", "a norm other than 1 and 2"),
    ("Setting softcap", "`softcap`"),
    ("Setting softmax precision", "`softmax_precision`"),
    ("only supports Attention nodes with one output", "more than one output"),
    ("Key and Value must have the same shape", "values of another width than the keys"),
    ("Option mask cannot be used together", "a causal mask beside another mask"),
    ("Attention operation was not supported by a dedicated kernel", "no kernel for this attention"),
    ("fmod attribute is set to 0", "floats with `fmod = 0`"),
    ("Non-zero zero point|input type of UINT8", "a zero point other than 0"),
    ("input type of BOOL", "truth values"),
    ("input types for Range", "float16"),
    ("reshape changes volume", "a vector with batched matrices"),
    (r"rank of operands should be the same.*First tensor rank is -1", "float16"),
    (r"[Pp]lugin.*not found|failed to load .* plugin|: false; use", "not known to the parser"),
    ("Network has dynamic or shape inputs", "sizes that are not constant"),
    ("is not supported with Scatter", "a reduction of float16"),
    ("fmod attribute must be true", "floats with `fmod = 0`"),
    ("inconsistent total_sequence_length", "a mask shorter than the keys"),
    ("Unrecognized attribute: (\\w+)", "the attribute `{}`"),
    (r"only \*guarantees\* support|Unsupported model IR version", "an operator set newer than the library"),
    (r"Could not find an implementation", "no kernel"),
)


@dataclass
class Row:
    """What became of one operator's cases.

    Attributes:
        operator: The operator.
        tried: (backend, dtype) -> cases.
        passed: (backend, dtype) -> those that passed.
        failures: (backend, clause) -> cases.
    """

    operator: str
    tried: Counter[tuple[str, str]]
    passed: Counter[tuple[str, str]]
    failures: Counter[tuple[str, str]]

    def builds(self) -> str:
        """``"yes"``, ``"partly"`` or ``"no"``: whether TensorRT-RTX builds the operator's cases."""
        tried = sum(self.tried["rtx", dtype] for dtype in _DTYPES)
        passed = sum(self.passed["rtx", dtype] for dtype in _DTYPES)
        return "yes" if passed == tried else "partly" if passed else "no"


def rows(cases: Iterable[NodeCase], ort: Mapping[str, str | None], rtx: Mapping[str, str | None]) -> dict[str, Row]:
    """Count: operator -> row.

    Args:
        cases: What was tried.
        ort: Case name -> None, or what ONNX Runtime did wrong.
        rtx: Case name -> None, or why TensorRT-RTX does not build it.
    """
    found: dict[str, Row] = {}
    for case in cases:
        row = found.setdefault(case.operator, Row(case.operator, Counter(), Counter(), Counter()))
        for backend, problem in (("ort", ort[case.name]), ("rtx", rtx[case.name])):
            # A float16 case whose float32 case fails has nothing to be compared with.
            if problem is not None and problem.startswith("not compared"):
                continue
            row.tried[backend, case.dtype] += 1
            if problem is None:
                row.passed[backend, case.dtype] += 1
            else:
                row.failures[backend, clause(problem)] += 1
    return found


def clause(problem: str) -> str:
    """A library's message in a few stable words."""
    for pattern, words in _CLAUSES:
        match = re.search(pattern, problem, re.DOTALL | re.MULTILINE)
        if match:
            return words.format(*match.groups())
    # Not seen before: its first sentence, without what changes from run to run.
    plain = re.sub(r"0x[0-9a-f]+|/\S+|\[[^\]]*\]|'[^']*'|\"[^\"]*\"", "", problem.splitlines()[0])
    return " ".join(plain.split())[:100]


def render(collection: Collection, found: Mapping[str, Row]) -> str:
    """The page."""
    versions = pinned_versions()
    tried = len(collection.tried)
    lines = [
        "# Operators",
        "",
        f"<!-- Made by `{COMMAND}`, which runs every case. Do not edit. -->",
        "",
        "Which ONNX operators of image generators the executors take, found by running ONNX's own node cases "
        f"(`onnx.backend.test`), {tried} in all: every float32 case is tried in float16 too.",
        "",
        f"- Versions: {', '.join(f'{name} {versions[name]}' for name in VERSIONS)}.",
        "- ONNX Runtime: our module on the CPU gives what ONNX expects, within the case's tolerance; float16 within 16 "
        "roundings of what float32 gives for the same inputs. A float16 case whose float32 case fails is not counted.",
        "- TensorRT-RTX: our builder parses the graph, holds its inputs and outputs against what ONNX says, and builds "
        f"an engine for {', '.join(TARGETS)}. Nothing was run: building needs no GPU, and says nothing of numerics or "
        "speed.",
        "- Cases are written as exporters write them: shapes, axes, sizes, pads and quantisation parameters are "
        f"constants, outputs that only training reads are left out, and the operator set is {OPSET} or older where the "
        "operator is there. The exporter here writes set 20, so that attention becomes MatMul and Softmax.",
        "- Numbers are passed / tried. *Builds* is TensorRT-RTX's part: yes, partly (see what fails) or no.",
        "",
    ]
    for group, names in OPERATORS.items():
        lines += [
            f"## {group}",
            "",
            "| operator | builds | ONNX Runtime float32 | float16 | TensorRT-RTX float32 | float16 | what fails |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        lines += [_line(found[name]) for name in sorted(names.split())]
        lines.append("")
    lines += ["## Left out", "", "| cases | because |", "| --- | --- |"]
    lines += [f"| {count} | {reason} |" for reason, count in sorted(collection.left_out.items())]
    return "\n".join(lines) + "\n"


def pinned_versions() -> dict[str, str]:
    """Package -> version that continuous integration runs with."""
    text = (ROOT / "constraints.txt").read_text()
    return dict(line.split("==") for line in text.splitlines() if "==" in line)


def building(page: str) -> frozenset[str]:
    """Operators that a page marks as building on TensorRT-RTX, wholly or partly."""
    return frozenset(re.findall(r"^\| (\w+) \| (?:yes|partly) \|", page, re.MULTILINE))


def _line(row: Row) -> str:
    cells = []
    for backend in ("ort", "rtx"):
        for dtype in _DTYPES:
            tried = row.tried[backend, dtype]
            cells.append(f"{row.passed[backend, dtype]} / {tried}" if tried else "-")
    names = {"ort": "ONNX Runtime", "rtx": "TensorRT-RTX"}
    failures = []
    for backend, name in names.items():
        clauses = sorted((c, n) for (b, c), n in row.failures.items() if b == backend)
        if clauses:
            failures.append(f"{name}: " + ", ".join(f"{text} ({count})" for text, count in clauses))
    return f"| {row.operator} | {row.builds()} | {' | '.join(cells)} | {'; '.join(failures)} |"
