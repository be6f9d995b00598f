"""From a PyTorch generator to ONNX: load the factory and its weights, trace it, and check the trace.

Errors name the line of the user's code that cannot be traced; the exporter's own chatter is kept away from the user.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import io
import logging
import os
import re
import struct
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from onnx import ModelProto
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ...engine.errors import ExportError, InputError
from ...engine.spec import Array
from .index import first_line
from .run import run_model
from .surgery import normalise, rename_values

__all__ = ["OPSET", "load_factory", "load_weights", "trace_generator"]

# 20 is the newest operator set that every executor here takes: from 23 on attention becomes one operator that
# TensorRT-RTX cannot build.
OPSET = 20
_DTYPES = ("float32", "int64", "bool")
_RELATIVE_TOLERANCE = 1e-3
_LOUD = ("torch", "torch.onnx", "torch.export", "onnxscript", "onnx_ir")
_FILE_LINE = re.compile(r'File "([^"]+)", line (\d+)')
_UNSUPPORTED = re.compile(r"No ONNX function found for <OpOverload\(op='([^']+)'")
_FX_NODE = re.compile(r"Error when translating node %(\w+)")


def trace_generator(module: nn.Module, example: Mapping[str, Array]) -> ModelProto:
    """Trace a generator into an ONNX model and check that it computes the same.

    Args:
        module: The generator. It is traced in evaluation mode; its mode is put back afterwards.
        example: One frame's inputs: the names of forward's parameters -> float32, int64 or bool arrays. Shapes become
            fixed.

    Returns:
        The model in normal form, operator set 20. Inputs have forward's parameter names. One tensor returned becomes
        the output ``"image"``, a dict gives its keys, a tuple or list is named by the module's attribute
        ``output_names``, or else ``"output_0"``, ``"output_1"`` and so on. An output that has the name of an input
        gets ``"_out"`` added, as names are unique in a graph. Nodes keep the torch module paths.

    Raises:
        InputError: If the example's names or dtypes do not fit forward.
        ExportError: If forward fails, cannot be traced, uses an unsupported operator, returns something other than
            tensors, or ONNX Runtime's result differs from PyTorch's by more than 1e-3 of its range.
    """
    names = _input_names(module, example)
    tensors = {name: _tensor(name, example[name]) for name in names}
    was_training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        with torch.no_grad(), _quiet():
            try:
                result = module(**tensors)
            except Exception as exc:
                raise ExportError(f"the generator fails on the example{_where(exc)}: {_reason(exc)}") from exc
            expected = _apart(_named_outputs(module, result), names)
            model = _export(module, tensors)
    finally:
        for part in was_training:
            part.training = True
    model = normalise(_rename_interface(model, names, list(expected)))
    _check_against(model, {name: example[name] for name in names}, expected)
    return model


def export_module(
    module: nn.Module, example: tuple[Tensor, ...], inputs: Sequence[str], outputs: Sequence[str]
) -> ModelProto:
    """Export one of our own modules: positional tensors in and out, named as given, in normal form."""
    with torch.no_grad(), _quiet():
        exported = _to_onnx(torch.export.export(module.eval(), example, strict=False))
    return normalise(_rename_interface(exported, inputs, outputs))


def export_call(
    call: Callable[[dict[str, Tensor]], Tensor | tuple[Tensor, ...]],
    example: Mapping[str, Tensor],
    outputs: Sequence[str],
    **parts: nn.Module,
) -> ModelProto:
    """Export a function of named tensors, as `export_module` does.

    Args:
        call: Takes tensors by the names of `example`, gives the outputs in order.
        example: Its inputs.
        outputs: Their names.
        parts: The modules that `call` runs; their weights are called after them.
    """
    return export_module(_Called(call, list(example), parts), tuple(example.values()), list(example), outputs)


class _Called(nn.Module):
    """A function of named tensors as the exporter takes it: positional tensors in."""

    def __init__(self, call: Callable[..., Tensor | tuple[Tensor, ...]], names: list[str], parts: dict[str, nn.Module]):
        super().__init__()
        self.call, self.names = call, names
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.call(dict(zip(self.names, tensors, strict=True)))


def _to_onnx(program: torch.export.ExportedProgram) -> ModelProto:
    exported = torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False, optimize=True)
    if exported is None:  # torch's annotation allows it; with a program given it does not happen
        raise ExportError("the exporter returned no model; update torch")
    model: ModelProto = exported.model_proto
    return model


def input_names_of(module: nn.Module) -> list[str]:
    """Names of forward's parameters: what a stream of inputs may hold."""
    return list(inspect.signature(module.forward).parameters)


def load_factory(reference: str) -> nn.Module:
    """Make a generator by calling ``MODULE:FACTORY``.

    Args:
        reference: A dotted module path or a ``.py`` file, a colon, and the name of something in it that takes no
            arguments and returns an `nn.Module` (a function or a class). The current folder is searched first.

    Raises:
        InputError: If the reference is malformed, or names no module or factory; the nearest names are listed.
        ExportError: If the module or the factory fails, or it returns something else.
    """
    module_name, colon, attribute = reference.rpartition(":")
    if not colon or not module_name or not attribute:
        raise InputError(f"{reference!r} is not of the form MODULE:FACTORY, e.g. my_model:make_generator")
    module = _import(module_name)
    target: Any = module
    for part in attribute.split("."):
        if not hasattr(target, part):
            public = [name for name in dir(target) if not name.startswith("_")]
            raise InputError(f"{module_name} has no {part!r}{_nearest(part, public)}")
        target = getattr(target, part)
    if isinstance(target, nn.Module):
        return target
    if not callable(target):
        raise InputError(f"{reference} is a {type(target).__name__} and cannot be called; name a function or class")
    try:
        made = target()
    except Exception as exc:
        raise ExportError(f"{reference} fails when called without arguments{_where(exc)}: {_reason(exc)}") from exc
    if not isinstance(made, nn.Module):
        raise ExportError(f"{reference} returns a {type(made).__name__}; it must return a torch.nn.Module")
    return made


def load_weights(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a ``.safetensors`` file into `module`, every key and shape checked before anything is changed.

    Keys left out because they share memory with a stored one (tied weights) are filled by it.

    Raises:
        InputError: If the file is missing, damaged, of another kind, or keys or shapes do not fit.
    """
    file = Path(path)
    if file.suffix in (".pt", ".pth", ".ckpt", ".bin", ".pkl"):
        raise InputError(f"{file.name} is a pickle, and pickle is never loaded; save it with safetensors")
    if not file.is_file():
        raise InputError(f"there is no weights file {file}; give the path of a .safetensors file")
    try:
        stored = load_file(file)
    except (SafetensorError, OSError, ValueError, struct.error) as exc:
        raise InputError(f"{file.name} is no intact safetensors file ({_reason(exc)}); save it again") from exc
    own = module.state_dict()
    covered = {own[key].data_ptr() for key in stored if key in own and own[key].numel()}
    missing = [key for key, value in own.items() if key not in stored and value.data_ptr() not in covered]
    unexpected = [key for key in stored if key not in own]
    shapes = [
        f"{key} is {tuple(value.shape)} in the file and {tuple(own[key].shape)} in the module"
        for key, value in stored.items()
        if key in own and value.shape != own[key].shape
    ]
    problems = [
        f"{what}: {_listed(found)}"
        for what, found in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if found
    ]
    if problems:
        raise InputError(f"{file.name} does not fit the generator; {'; '.join(problems)}")
    module.load_state_dict(stored, strict=False)


def _input_names(module: nn.Module, example: Mapping[str, Array]) -> list[str]:
    """Names of the example in forward's order."""
    parameters = inspect.signature(module.forward).parameters
    kinds = inspect.Parameter
    for name, parameter in parameters.items():
        if parameter.kind in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD, kinds.POSITIONAL_ONLY):
            raise ExportError(
                f"forward takes {parameter}, which has no fixed name; give it named parameters instead of {name!r}"
            )
    required = [name for name, p in parameters.items() if p.default is kinds.empty]
    unknown = [name for name in example if name not in parameters]
    if unknown:
        raise InputError(f"forward has no input {unknown[0]!r}{_nearest(unknown[0], list(parameters))}")
    missing = [name for name in required if name not in example]
    if missing:
        raise InputError(
            f"forward needs input {missing[0]!r}, which is not given; given are {', '.join(example) or 'none'}"
        )
    names = [name for name in parameters if name in example]
    if not names:
        raise InputError("the generator takes no input, so there is nothing to answer")
    return names


def _tensor(name: str, array: Array) -> Tensor:
    if array.dtype.name not in _DTYPES:
        raise InputError(f"input {name!r} has dtype {array.dtype}; convert it to one of {', '.join(_DTYPES)}")
    return torch.from_numpy(np.array(array, copy=True, order="C"))


def _named_outputs(module: nn.Module, result: object) -> dict[str, Tensor]:
    """The generator's result as name -> tensor, in its own order."""
    named: dict[str, Any]
    if isinstance(result, Tensor):
        named = {"image": result}
    elif isinstance(result, Mapping):
        named = {str(key): value for key, value in result.items()}
    elif isinstance(result, (tuple, list)):
        given = getattr(module, "output_names", None)
        names = [f"output_{k}" for k in range(len(result))] if given is None else [str(name) for name in given]
        if len(names) != len(result) or len(set(names)) != len(names):
            raise ExportError(
                f"output_names is {names}, but forward returns {len(result)} tensors; name each of them once"
            )
        named = dict(zip(names, result, strict=True))
    else:
        raise ExportError(
            f"forward returns a {type(result).__name__}; it must return a tensor, a dict or a tuple of tensors"
        )
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise ExportError(f"output {name!r} is a {type(value).__name__}; every output must be a tensor")
    if not named:
        raise ExportError("forward returns no tensor, so there is nothing to show")
    return named


def _apart(outputs: Mapping[str, Tensor], inputs: Sequence[str]) -> dict[str, Tensor]:
    """The outputs under names that no input has."""
    apart: dict[str, Tensor] = {}
    for name, value in outputs.items():
        fresh = name
        while fresh in inputs or (fresh != name and (fresh in outputs or fresh in apart)):
            fresh += "_out"
        apart[fresh] = value
    return apart


def _export(module: nn.Module, tensors: Mapping[str, Tensor]) -> ModelProto:
    try:
        program = torch.export.export(module, (), dict(tensors), strict=False)
    except Exception as exc:
        raise ExportError(f"the generator cannot be traced{_where(exc)}: {_reason(exc)}") from exc
    try:
        return _to_onnx(program)
    except Exception as exc:
        text = "\n".join(str(link) for link in _chain(exc))
        operators = list(dict.fromkeys(_UNSUPPORTED.findall(text)))
        line = _where(exc) or _line_of_node(program, _FX_NODE.findall(text), operators)
        if operators:
            raise ExportError(
                f"the generator uses an operator that ONNX does not have{line}: {', '.join(operators)}; "
                "write it with others"
            ) from exc
        raise ExportError(f"the generator cannot be exported to ONNX{line}: {_reason(list(_chain(exc))[-1])}") from exc


def _rename_interface(model: ModelProto, inputs: Sequence[str], outputs: Sequence[str]) -> ModelProto:
    """Give inputs and outputs their names by position; torch renames an input that it also returns, for one."""
    # A value returned twice is listed twice; renaming by position then needs a value of its own for each.
    seen: set[str] = {value.name for value in model.graph.input}
    fixed = {tensor.name for tensor in model.graph.initializer}
    for position, value in enumerate(model.graph.output):
        if value.name in seen or value.name in fixed:
            node = model.graph.node.add(op_type="Identity", name=f"node_output_{position}")
            node.input.append(value.name)
            value.name = f"{value.name}.output_{position}"
            node.output.append(value.name)
        seen.add(value.name)
    old = [value.name for value in model.graph.input] + [value.name for value in model.graph.output]
    new = [*inputs, *outputs]
    if len(old) != len(new):
        raise ExportError(
            f"the trace has {len(model.graph.input)} inputs and {len(model.graph.output)} outputs, but the generator "
            f"has {len(inputs)} and {len(outputs)}; return tensors only, each a result of the inputs"
        )
    inner = {name for node in model.graph.node for name in node.output} | fixed
    aside = {name: f"{name}.inner" for name in inner - set(old) if name in new}
    return rename_values(model, {**aside, **dict(zip(old, new, strict=True))})


def _check_against(model: ModelProto, feeds: Mapping[str, Array], expected: Mapping[str, Tensor]) -> None:
    names = [value.name for value in model.graph.output]
    if names != list(expected):
        raise ExportError(f"the trace gives {names}, but the generator gives {list(expected)}; please report this")
    actual = run_model(model, feeds, threads=1)
    for name, tensor in expected.items():
        want = tensor.detach().numpy()
        got = actual[name]
        if got.shape != want.shape or got.dtype != want.dtype:
            raise ExportError(
                f"output {name!r} is {got.dtype} {got.shape} in ONNX, but {want.dtype} {want.shape} in PyTorch"
            )
        if not want.size:
            continue
        difference = float(np.max(np.abs(got.astype(np.float64) - want.astype(np.float64))))
        scale = float(np.max(np.abs(want.astype(np.float64))))
        # "not <=" so that NaN counts as a difference.
        if not difference <= _RELATIVE_TOLERANCE * max(scale, 1e-6):
            raise ExportError(
                f"output {name!r} of the trace differs from PyTorch by up to {difference:.3g} (its largest value is "
                f"{scale:.3g}); a generator must be deterministic and free of Python state"
            )


def _import(name: str) -> ModuleType:
    # As `python -m` does: what lies in the current folder is found, and found first.
    folder = os.getcwd()
    if sys.path[:1] != [folder]:
        sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        if name.endswith(".py"):
            return _import_file(Path(name))
        return importlib.import_module(name)
    except InputError:
        raise
    except ModuleNotFoundError as exc:
        if exc.name is not None and (name == exc.name or name.startswith(exc.name + ".")):
            raise InputError(f"there is no module {name!r} in {folder} or among the installed packages") from exc
        raise ExportError(f"importing {name} fails{_where(exc)}: {_reason(exc)}") from exc
    except Exception as exc:
        raise ExportError(f"importing {name} fails{_where(exc)}: {_reason(exc)}") from exc


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"there is no file {path}; give MODULE:FACTORY with a module or a .py file")
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    if spec is None or spec.loader is None:
        raise InputError(f"{path} cannot be imported as a Python module")
    module = importlib.util.module_from_spec(spec)
    # torch looks classes up by their module's name while tracing.
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's prints, warnings and log lines from the user; what matters is raised."""
    loggers = [logging.getLogger(name) for name in _LOUD]
    loggers += [
        logger
        for name, logger in list(logging.root.manager.loggerDict.items())
        if isinstance(logger, logging.Logger) and name.startswith(tuple(f"{loud}." for loud in _LOUD))
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _chain(exc: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = exc
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def _is_user_file(name: str) -> bool:
    if name.startswith("<"):
        return False
    path = os.path.realpath(name)
    own = os.path.realpath(os.path.dirname(__file__)) + os.sep
    torch_folder = os.path.realpath(os.path.dirname(torch.__file__)) + os.sep
    if path.startswith((own, torch_folder)):
        return False
    if f"{os.sep}site-packages{os.sep}onnx" in path:
        return False
    library = os.path.realpath(sysconfig.get_path("stdlib")) + os.sep
    # Installed packages lie inside the library's folder; a generator may well be one of them.
    return not path.startswith(library) or f"{os.sep}site-packages{os.sep}" in path


def _where(exc: BaseException) -> str:
    """ " (file.py:12)" for the innermost line of the user's code that an exception or its message points to."""
    for link in _chain(exc):
        frames = [frame for frame in traceback.extract_tb(link.__traceback__) if _is_user_file(frame.filename)]
        if frames:
            return f" ({frames[-1].filename}:{frames[-1].lineno})"
    return next((found for link in _chain(exc) if (found := _user_line(str(link)))), "")


def _user_line(text: str) -> str:
    lines = [(file, line) for file, line in _FILE_LINE.findall(text) if _is_user_file(file)]
    return f" ({lines[-1][0]}:{lines[-1][1]})" if lines else ""


def _line_of_node(program: torch.export.ExportedProgram, nodes: Sequence[str], operators: Sequence[str]) -> str:
    """The user's line that made a node which ONNX cannot express, by the node's name or operator."""
    try:
        # The exporter decomposes first, so its node names are those of the decomposed program.
        graphs = [program.run_decompositions().graph, program.graph]
    except Exception:  # the line is a help, not worth a second error
        graphs = [program.graph]
    for graph in graphs:
        for node in graph.nodes:
            # A decomposition may end in another namespace: aten.special_bessel_j0 becomes prims.bessel_j0.
            made = any(operator.rpartition(".")[2] in str(node.target) for operator in operators)
            if node.name in nodes or made:
                found = _user_line(node.meta.get("stack_trace") or "")
                if found:
                    return found
    return ""


def _reason(exc: BaseException) -> str:
    """One line that says why, without the framework's advice to its own developers."""
    if "data-dependent" in str(exc):
        return (
            "it depends on the values of a tensor (an if, a loop or a size), which a fixed graph cannot follow; "
            "use torch.where"
        )
    return f"{type(exc).__name__}: {first_line(exc)[:300]}"


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    if close:
        return f"; did you mean {', '.join(close)}?"
    return f"; there are {_listed(list(known))}" if known else ""


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:8])
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown
