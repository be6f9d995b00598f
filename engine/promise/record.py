"""What a manifest says of its quality promise, read strictly."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from ..bundle.manifest import Manifest
from ..bundle.roles import Role
from ..bundle.strict_json import (
    Fields,
    a_name,
    a_number,
    a_string,
    an_integer,
    mapping_of,
    mistyped,
    refuse_duplicates,
    tuple_of,
)
from ..errors import BundleError
from .quality import PROMISABLE

__all__ = ["METHOD", "PromiseRecord"]

METHOD: Final = "conformal risk control"

_AT = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z")
_PREDICTORS = (Role.PREDICTOR, Role.PREDICTOR_COLD)


@dataclass(frozen=True)
class PromiseRecord:
    """What a manifest says of its promise, at ``calibration.promise``.

    Attributes:
        metric: The metric it is made in.
        exits: Exits with a predicted quality, in the order of the predictor's columns.
        cold_exits: Those of them that need no cache, in the order of the cold predictor's columns.
        ages: Calibrated ages in frames, rising from 1 or more.
        samples: Rows of the calibration.
        frames: Different frames among them.
        at: When it was made, UTC, ``2026-11-20T12:00:00Z``.
        file: The bundle's file with the rows.
        macs: Multiply-accumulates by exit, of ``whole``, ``plain``, and of the two predictors.
        errors: Median absolute error of the predicted score by exit.
        thresholds: For people: what was found at some thresholds.
        method: How margins are made; this library knows one way.
    """

    metric: str
    exits: tuple[str, ...]
    cold_exits: tuple[str, ...]
    ages: tuple[int, ...]
    samples: int
    frames: int
    at: str
    file: str
    macs: Mapping[str, float]
    errors: Mapping[str, float]
    thresholds: tuple[Mapping[str, Any], ...] = ()
    method: str = METHOD

    @classmethod
    def of(cls, manifest: Manifest) -> PromiseRecord | None:
        """Read a manifest's record strictly; None where the manifest makes no promise.

        Raises:
            BundleError: If a key is missing, unknown or mistyped, or the record does not fit the manifest.
        """
        value = (manifest.calibration or {}).get("promise")
        if value is None:
            return None
        record = cls._read(value, "calibration.promise")
        record._check(manifest, "calibration.promise")
        return record

    def to_record(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "method": self.method,
            "metric": self.metric,
            "exits": list(self.exits),
            "cold_exits": list(self.cold_exits),
            "ages": list(self.ages),
            "samples": self.samples,
            "frames": self.frames,
            "at": self.at,
            "file": self.file,
            "macs": dict(self.macs),
            "predictor": {"error": dict(self.errors)},
            "thresholds": [dict(threshold) for threshold in self.thresholds],
        }

    @classmethod
    def _read(cls, value: Any, where: str) -> PromiseRecord:
        fields = Fields(value, where)
        predictor = Fields(fields.take("predictor", lambda found, _: found), f"{where}.predictor")
        record = cls(
            method=fields.take("method", a_string),
            metric=fields.take("metric", a_string),
            exits=fields.take("exits", tuple_of(a_name)),
            cold_exits=fields.take("cold_exits", tuple_of(a_name)),
            ages=fields.take("ages", tuple_of(an_integer)),
            samples=fields.take("samples", an_integer),
            frames=fields.take("frames", an_integer),
            at=fields.take("at", a_string),
            file=fields.take("file", a_string),
            macs=fields.take("macs", mapping_of(_not_negative)),
            errors=predictor.take("error", mapping_of(_not_negative)),
            thresholds=fields.take("thresholds", tuple_of(_threshold)),
        )
        predictor.finish()
        fields.finish()
        return record

    def _check(self, manifest: Manifest, where: str) -> None:
        """What holds between the keys, and between them and the manifest."""
        if self.method != METHOD:
            raise mistyped(f"{where}.method", repr(METHOD), self.method)
        if self.metric not in PROMISABLE:
            raise mistyped(f"{where}.metric", f"one of {', '.join(PROMISABLE)}", self.metric)
        known = {record.name for record in manifest.exits_of(Role.WARP, Role.BRANCH)}
        refuse_duplicates(f"{where}.exits", self.exits)
        refuse_duplicates(f"{where}.cold_exits", self.cold_exits)
        if not self.exits or not known.issuperset(self.exits):
            raise mistyped(f"{where}.exits", f"some of the bundle's exits {', '.join(sorted(known))}", list(self.exits))
        if not set(self.exits).issuperset(self.cold_exits):
            raise mistyped(f"{where}.cold_exits", f"some of {', '.join(self.exits)}", list(self.cold_exits))
        # The rule lets consumers answer before branches, so it has to know which is which.
        cold = [name for name in self.exits if not manifest.reads_cache(name)]
        if cold != list(self.cold_exits):
            raise mistyped(f"{where}.cold_exits", f"those that read no cache: {', '.join(cold)}", list(self.cold_exits))
        if any(age < 1 for age in self.ages) or any(a >= b for a, b in zip(self.ages, self.ages[1:], strict=False)):
            raise mistyped(f"{where}.ages", "ages from 1 on, rising", list(self.ages))
        if not self.ages and not self.cold_exits:
            raise mistyped(f"{where}.ages", "at least one age where there are no cold exits", list(self.ages))
        if self.samples < 1 or not 1 <= self.frames <= self.samples:
            raise mistyped(f"{where}.frames", f"1 to {self.samples}, the samples", self.frames)
        if _AT.fullmatch(self.at) is None:
            raise mistyped(f"{where}.at", "a time such as 2026-11-20T12:00:00Z", self.at)
        if not self.file.endswith(".npz"):
            raise mistyped(f"{where}.file", "the name of an .npz file", self.file)
        exact = [record.name for record in manifest.exits_of(Role.WHOLE, Role.PLAIN)]
        counted = {*exact, *_PREDICTORS, *self.exits}
        if not self.macs.get(manifest.exact_exit or "") or not counted.issuperset(self.macs):
            raise mistyped(f"{where}.macs", f"counts for whole and others of {', '.join(sorted(counted))}", self.macs)
        if not set(self.exits).issuperset(self.errors):
            raise mistyped(f"{where}.predictor.error", f"errors of {', '.join(self.exits)}", self.errors)
        for role, columns in zip(_PREDICTORS, (self.exits if self.ages else (), self.cold_exits), strict=True):
            if not columns:
                continue
            name = manifest.module_of(role)
            if name is None:
                raise BundleError(f"manifest.json: {where} needs module {str(role)!r}, which is missing; compile again")
            for spec in manifest.modules[name].outputs:
                if spec.name in ("predicted", "spread") and spec.shape != (1, len(columns)):
                    raise BundleError(
                        f"manifest.json: module {name!r} gives {spec.name!r} of shape {list(spec.shape)}, "
                        f"but {where} has {len(columns)} exits for it; compile the bundle again"
                    )


def _threshold(value: Any, where: str) -> dict[str, Any]:
    fields = Fields(value, where)
    record = {
        "threshold": fields.take("threshold", a_number),
        "confidence": fields.take("confidence", a_number),
        "age": fields.take("age", an_integer),
        "coverage": fields.take("coverage", a_number),
        "saved": fields.take("saved", a_number),
        "shares": fields.take("shares", mapping_of(_not_negative)),
    }
    fields.finish()
    return record


def _not_negative(value: Any, where: str) -> float:
    number = a_number(value, where)
    if number < 0:
        raise mistyped(where, "a number of 0 or more", value)
    return number
