"""The folder that is carried to a machine that runs a bundle and has nothing else of this project on it.

In it are the bundle, its engines, the runtime's sources, compiled kernels, and an example. It needs Python, NumPy,
cuda-python and the TensorRT that the engines were built with: neither the command line's packages, nor ONNX Runtime,
nor a compiler.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.errors import InputError
from ..engine.files.atomic import folder_beside
from ..media.files import explain_write_error
from ..report.words import size_text

if TYPE_CHECKING:
    from ..engine.bundle.bundle import Bundle
    from ..engine.tensorrt.flavour import Flavour

__all__ = ["Dependency", "Deployment", "add_bundle", "add_runtime", "check_place", "deployed_sources", "written_folder"]

BUNDLE_SUFFIX = ".warp"
ENGINES, CACHE, RUNTIME = "engines", "cache", "warpcache"

# What only measurements and the command line ask for.
LEFT_OUT = frozenset({"engine/cuda/gpu_facts.py", "engine/cuda/kernel_cubins.py", "engine/probes.py"})

# Metrics that audits compare in: what they need beside NumPy, and a value that shows how one is written.
_AUDIT_NEEDS = {
    "lpips": "`pip install safetensors`, and `WARPCACHE_LPIPS` set to the folder with the weights of LPIPS",
    "flip": "`pip install flip-evaluator`",
}
_EXAMPLES = {"lpips": "lpips=0.05", "flip": "flip=0.05", "psnr_db": "psnr=35", "ms_ssim": "ms-ssim=0.98"}
_AUDIT_EVERY = 30

# The ranges of pyproject.toml, and below the majors that nobody has looked at.
NUMPY = "numpy>=1.26,<3"
CUDA_PYTHON = "cuda-python>=13.4,<14"
_BROUGHT = {
    NUMPY: ("numpy",),
    CUDA_PYTHON: ("cuda-python", "cuda-bindings", "cuda-core", "cuda-pathfinder"),
}
_BROUGHT_BY_TENSORRT = {
    "tensorrt-rtx": ("tensorrt-rtx", *(f"tensorrt-rtx-cu13{part}" for part in ("", "-libs", "-bindings"))),
    "tensorrt": (
        "tensorrt",
        *(f"tensorrt-cu{major}{part}" for major in (12, 13) for part in ("", "-libs", "-bindings")),
    ),
}


@dataclass(frozen=True)
class Dependency:
    """What the folder needs beside it.

    Attributes:
        requirement: As pip takes it.
        size_bytes: What it and what it brings take up where it is installed here; None where it is not.
    """

    requirement: str
    size_bytes: int | None


@dataclass(frozen=True)
class Deployment:
    """A folder that was written.

    Attributes:
        path: Where.
        parts: What is in it, by its name there: size in bytes.
        dependencies: What it needs beside it.
    """

    path: Path
    parts: dict[str, int]
    dependencies: tuple[Dependency, ...]

    @property
    def size_bytes(self) -> int:
        """Size of all of it."""
        return sum(self.parts.values())


def check_place(out: Path, bundle: Path) -> None:
    """Refuse a place where the folder cannot be, before any work is done.

    Raises:
        InputError: If something stands there, or it lies in the bundle.
    """
    if out.exists() or out.is_symlink():
        raise InputError(f"{str(out)!r} already exists; remove it or choose another --out")
    if bundle.resolve() in out.resolve().parents:
        raise InputError(
            f"{str(out)!r} lies in the bundle {str(bundle)!r}, which holds only its own files; choose another --out"
        )


@contextlib.contextmanager
def written_folder(out: Path) -> Iterator[Path]:
    """Give a temporary folder beside `out`; at the end it takes that place in one step.

    Whatever goes wrong in the block, an interrupt included, the unfinished folder is removed.

    Raises:
        InputError: If it cannot be written.
    """
    try:
        with folder_beside(out) as temporary:
            yield temporary
            if out.exists() or out.is_symlink():
                raise InputError(f"{str(out)!r} was made by somebody else meanwhile; choose another --out")
    except OSError as exc:
        raise explain_write_error(out, exc) from exc


def add_bundle(folder: Path, bundle: Bundle) -> Bundle:
    """Copy a bundle into the folder, verified once more.

    Raises:
        BundleError: If it has changed since it was opened.
    """
    from ..engine.bundle.write import write_bundle

    return write_bundle(
        folder / bundle_name(bundle.path), bundle.manifest, {name: bundle.file(name) for name in bundle.manifest.files}
    )


def bundle_name(path: Path) -> str:
    """What a bundle's folder is called; its end is ``.warp``."""
    name = path.name or path.resolve().name
    return name if name.endswith(BUNDLE_SUFFIX) else name + BUNDLE_SUFFIX


def add_runtime(folder: Path, out: Path, bundle: Bundle, *, flavour: Flavour, targets: Sequence[str]) -> Deployment:
    """Add to a folder that holds a bundle and its engines all that is needed to run it.

    Args:
        folder: The folder, where it is written.
        out: Where it is going to be.
        bundle: The bundle in it.
        flavour: The TensorRT that its engines are for.
        targets: The GPUs that its engines are for; the kernels are compiled for them.

    Raises:
        BackendError: If NVRTC, which compiles the kernels, is missing or does not know a target.
    """
    from ..engine.cuda.kernel_cubins import compile_kernels

    for name, source in deployed_sources().items():
        target = folder / RUNTIME / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    licence = _licence()
    if licence is not None:
        (folder / RUNTIME / "LICENSE").write_text(licence, encoding="utf-8")
    compile_kernels(targets, folder / CACHE)
    # What only builders of engines use.
    (folder / ENGINES / ".lock").unlink(missing_ok=True)
    dependencies = _dependencies(flavour)
    words: dict[str, Any] = {
        "bundle": bundle_name(bundle.path),
        "backend": flavour.name,
        "tensorrt": f"{flavour.title} {flavour.version}",
        "ahead_of_time": flavour.ahead_of_time,
        "targets": ", ".join(targets),
        "fps": bundle.manifest.fps,
        "inputs": [record.spec for record in bundle.manifest.inputs],
        "outputs": bundle.manifest.outputs,
        "requirements": [dependency.requirement for dependency in dependencies],
        "promise": _promise(bundle),
    }
    for name in ("requirements.txt", "run.py"):
        _render(folder, name, words)
    parts = {entry.name: _size(entry) for entry in sorted(folder.iterdir())}
    _render(folder, "README.md", {**words, "parts": parts, "dependencies": dependencies, "size": size_text})
    parts["README.md"] = _size(folder / "README.md")
    _make_readable(folder)
    return Deployment(out, parts, dependencies)


def deployed_sources() -> dict[str, Path]:
    """The runtime's files: name in the package -> where it is installed here."""
    package = Path(str(resources.files("warpcache")))
    found = {name: package / name for name in ("__init__.py", "py.typed")}
    for layer in ("engine", "kernels"):
        root = Path(str(resources.files(f"warpcache.{layer}")))
        for path in sorted(root.rglob("*")):
            name = f"{layer}/{path.relative_to(root).as_posix()}"
            if path.suffix in (".py", ".cu", ".cuh") and name not in LEFT_OUT:
                found[name] = path
    return found


def _promise(bundle: Bundle) -> dict[str, Any] | None:
    """What the example and the page say of a bundle that promises a quality; None of one that does not."""
    from ..engine.promise.calibration import PromiseRecord

    record = PromiseRecord.of(bundle.manifest)
    if record is None:
        return None
    needs = _AUDIT_NEEDS.get(record.metric)
    return {
        "metric": record.metric,
        "example": _EXAMPLES[record.metric],
        # Not by itself where a package would be missing that the folder does not ask for.
        "audit_every": 0 if needs else _AUDIT_EVERY,
        "needs": needs,
    }


def _dependencies(flavour: Flavour) -> tuple[Dependency, ...]:
    # Engines are of no use to another version, so this one is pinned.
    tensorrt = f"{flavour.name}=={flavour.version}"
    brought = {**_BROUGHT, tensorrt: _BROUGHT_BY_TENSORRT[flavour.name]}
    return tuple(Dependency(requirement, _installed_bytes(names)) for requirement, names in brought.items())


def _installed_bytes(names: Sequence[str]) -> int | None:
    """Size of the distributions of these names that are installed here; None if the first is not."""
    total = 0
    for number, name in enumerate(names):
        try:
            files = importlib.metadata.distribution(name).files
        except importlib.metadata.PackageNotFoundError:
            if number == 0:
                return None
            continue
        for file in files or ():
            with contextlib.suppress(OSError):
                total += os.stat(str(file.locate())).st_size
    return total


def _render(folder: Path, name: str, words: dict[str, Any]) -> None:
    import jinja2

    template = resources.files("warpcache").joinpath("templates", f"edge_{name}.jinja")
    page = jinja2.Environment(
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    text = page.from_string(template.read_text(encoding="utf-8")).render(words)
    (folder / name).write_text(text, encoding="utf-8")


def _licence() -> str | None:
    """The text of the licence, which goes with the sources; None where the installation has lost it."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.distribution("warpcache").files or ():
            if file.name == "LICENSE":
                return file.read_text(encoding="utf-8")
    beside = Path(str(resources.files("warpcache"))).parent / "LICENSE"
    return beside.read_text(encoding="utf-8") if beside.is_file() else None


def _make_readable(folder: Path) -> None:
    """Make everything as readable as what its owner writes elsewhere: temporary files and folders are private."""
    mask = os.umask(0o022)
    os.umask(mask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
