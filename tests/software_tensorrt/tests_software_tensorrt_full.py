"""Full TensorRT's Python surface in software: `tests_software_tensorrt` without what only TensorRT-RTX has."""

from __future__ import annotations

import enum

import tests_software_tensorrt as rtx
from tests_software_tensorrt import (
    DataType,
    ExecutionContextAllocationStrategy,
    IBuilderConfig,
    ICudaEngine,
    IExecutionContext,
    ILogger,
    INetworkDefinition,
    IOptimizationProfile,
    IProgressMonitor,
    ITensor,
    MemoryPoolType,
    NetworkDefinitionCreationFlag,
    OnnxParser,
    ParserError,
    TensorIOMode,
    TensorLocation,
)

__version__ = "10.16.0.0"
MAGIC = b"ftrt"


class BuilderFlag(enum.IntEnum):
    TF32 = 0


class Builder(rtx.Builder):
    _magic = MAGIC
    _version = __version__
    _config = IBuilderConfig


class Runtime(rtx.PlainRuntime):
    _magic = MAGIC
    _version = __version__


SURFACE: tuple[type, ...] = (
    *(DataType, NetworkDefinitionCreationFlag, BuilderFlag, MemoryPoolType, TensorIOMode, TensorLocation),
    *(ExecutionContextAllocationStrategy, ILogger, IProgressMonitor, ITensor, INetworkDefinition, ParserError),
    *(OnnxParser, IOptimizationProfile, IBuilderConfig, Builder, IExecutionContext, ICudaEngine, Runtime),
)
REAL_NAMES: dict[type, str] = {}
