"""Put models into a bundle: the place is checked before any work, the weights are stored once, the rest is renamed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from onnx import ModelProto

from ...engine.bundle.bundle import Bundle
from ...engine.bundle.manifest import Manifest
from ...engine.bundle.write import write_bundle
from ...engine.errors import BundleError
from .weights import WEIGHTS_FILE, shared_weights

__all__ = ["bundle_models", "refuse_out"]


def refuse_out(out: Path) -> None:
    """Refuse, before any work is done, a place that the bundle cannot be written to.

    Raises:
        BundleError: If the name does not end in ``.warp``, or something is there already.
    """
    if out.suffix != ".warp":
        raise BundleError(f"a bundle's name ends in .warp, but {str(out)!r} was given; call it e.g. 'head.warp'")
    if os.path.lexists(out):
        raise BundleError(f"{out} exists already; remove it or choose another name")


def bundle_models(
    out: Path, manifest: Manifest, models: Mapping[str, ModelProto], *, more: Mapping[str, bytes] | None = None
) -> Bundle:
    """Write a bundle of these models, each as ``NAME.onnx``, with their large weights once.

    Args:
        out: Its place.
        manifest: Everything but the files' sizes and hashes.
        models: Module name -> model.
        more: Further files by name.

    Raises:
        BundleError: If it cannot be written; then nothing is.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            graphs = shared_weights(models, folder)
        except OSError as exc:
            raise BundleError(
                f"the weights cannot be put together in {folder}: {exc}; make room there, or set TMPDIR"
            ) from exc
        files: dict[str, Path | bytes] = {f"{name}.onnx": data for name, data in graphs.items()}
        files[WEIGHTS_FILE] = Path(folder) / WEIGHTS_FILE
        files |= more or {}
        return write_bundle(out, manifest, files)
