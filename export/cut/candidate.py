"""One place to cut a generator, with what it costs and keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...engine.spec import TensorSpec

__all__ = ["AUTO", "CutCandidate"]

AUTO = "auto"


_FLOATS = ("float32", "float16", "float64")


@dataclass(frozen=True)
class CutCandidate:
    """One way to cut, with what it costs and what it is worth.

    Attributes:
        tensors: The cached tensors: value names in the whole model, dtypes and shapes.
        labels: For each of them the name to show: the torch module whose output it is, else the value's name.
        consumer_ms: Time of the consumer, recomputed layers included.
        producer_ms: Time of the producer.
        whole_ms: Time of the whole model, measured with the other two.
        cache_bytes: Bytes of all tensors.
        recomputed_ms: The consumer's share that the producer computes too.
        reads_input: Whether the consumer reads any input of the new frame; if not, plain reuse shows the old frame.
        reuse_psnr_db: Age in frames -> PSNR of the consumer with a cache of that age against the whole, mean over
            the frames tried; empty until ranked.
        score: `rank_cuts`'s score in dB; None until ranked.
        consumer_nodes: Names of the consumer's nodes.
        anchors: Those of the tensors that the consumer anchors to stay exact, see `fusion`.
    """

    tensors: tuple[TensorSpec, ...]
    labels: tuple[str, ...]
    consumer_ms: float
    producer_ms: float
    whole_ms: float
    cache_bytes: int
    recomputed_ms: float = 0.0
    reads_input: bool = True
    reuse_psnr_db: Mapping[int, float] = field(default_factory=dict)
    score: float | None = None
    consumer_nodes: frozenset[str] = field(default_factory=frozenset, repr=False)
    anchors: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Value names of the cut's tensors."""
        return tuple(spec.name for spec in self.tensors)

    @property
    def cost_ratio(self) -> float:
        """The consumer's cost as a fraction of the whole's."""
        return self.consumer_ms / self.whole_ms if self.whole_ms else 0.0

    def to_record(self) -> dict[str, object]:
        """JSON-ready form for the manifest's ``cut.candidates``."""
        return {
            "tensors": list(self.names),
            "labels": list(self.labels),
            "shapes": [list(spec.shape) for spec in self.tensors],
            "consumer_ms": round(self.consumer_ms, 4),
            "producer_ms": round(self.producer_ms, 4),
            "whole_ms": round(self.whole_ms, 4),
            "cost_ratio": round(self.cost_ratio, 4),
            "cache_bytes": self.cache_bytes,
            "reads_input": self.reads_input,
            "reuse_psnr_db": {str(age): round(value, 3) for age, value in sorted(self.reuse_psnr_db.items())},
            "score": None if self.score is None else round(self.score, 3),
        }
