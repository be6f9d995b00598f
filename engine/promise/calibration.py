"""The quality promise: what was measured for it, and the rule that keeps it.

A *rule* says by how many spreads an exit's predicted score must lie below the threshold's, for each cache age
(`margin`); margins are made from a bundle's calibration whenever a quality is named, so that any threshold and any
confidence can be asked of one bundle. What is asked for is in `promised_quality`, the manifest's record in
`promise_record`; their names are here too.

Consumers answer before branches: where a consumer is eligible no branch may answer, however cheap. So a frame is lost
at a margin when one of its eligible consumers is worse than the threshold, or, where it has none, one of its eligible
branches. One margin serves all exits of an age; were branches to count where a consumer is eligible, a branch that is
badly predicted would raise it for the consumers, which are the exits that save most.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..bundle.bundle import Bundle
from ..errors import BundleError, InputError
from .conformal import allowed_losses, risk_control_margin
from .quality import PROMISABLE, Quality, canonical_metric, from_score, in_range, metric_option, score_value, to_score
from .record import METHOD, PromiseRecord

__all__ = [
    "LEAST_MARGIN",
    "METHOD",
    "PROMISABLE",
    "Calibration",
    "Outcome",
    "PromiseRecord",
    "Quality",
    "Rule",
    "canonical_metric",
    "evaluate",
    "from_score",
    "metric_option",
    "score_value",
    "to_score",
]

LEAST_MARGIN: Final = 1.0
"""An exit must be expected to be better than the threshold by a spread at least, however much a calibration allows: its
frames are a few stretches of a clip, and what holds on them all by a hair does not hold on the next."""
_LEAST_ELIGIBLE_SHARE = 0.1
_MAX_NPZ_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Rule:
    """When an exit is eligible: when its predicted score lies `margin` spreads or more below the threshold's.

    Attributes:
        quality: What is promised.
        margins: Spreads by calibrated age in frames; age 0 is a frame without a cache.
        surprise: By how many spreads a true score may lie above the predicted one: among frames like the calibration's,
            at most the share 1 - confidence of those that an eligible exit answers lies as far above or further,
            whichever of the exits that may answer at these margins or tighter ones does. inf where there are too few
            to say.
    """

    quality: Quality
    margins: Mapping[int, float]
    surprise: float = math.inf

    def margin(self, age: int | None) -> float:
        """The margin at `age` frames; None is no cache, as 0 is. inf (nothing is eligible) where none is calibrated."""
        return self.margins.get(0 if age is None else age, math.inf)

    def beyond(self, score: float, predicted: float, spread: float) -> float:
        """How many spreads a true score lies beyond what the prediction leaves open; 0 or more is a surprise.

        It tells whether the predictor is right where a miss cannot: where the threshold is far, or the margin has been
        tightened.
        """
        return (score - predicted) / spread - self.surprise


@dataclass(frozen=True)
class Outcome:
    """What a rule gives at one age on a calibration's frames, each answered as `evaluate` says.

    Attributes:
        age: Age in frames; 0 is without a cache.
        coverage: Share of the frames whose answer keeps the threshold.
        saved: Share of the whole generator's cost that is saved, the predictor's cost taken off.
        shares: Share of the frames by exit that answered; exits that answered none are left out.
    """

    age: int
    coverage: float
    saved: float
    shares: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Predicted and measured scores on frames that nothing was fitted to: what margins are made from.

    A row is one frame at one cache age. Rows of age 0 are frames without a cache: their predictions are the cold
    predictor's, and only the columns of `cold_exits` count there.

    Attributes:
        metric: The metric of the scores.
        exits: Names of the E columns.
        cold_exits: Those that need no cache: the branches, which alone count at age 0. The others are consumers.
        ages: Calibrated ages in frames, rising from 1 or more.
        predicted: Predicted scores, float32 [N, E].
        spread: Their spreads, above 0, float32 [N, E].
        measured: Scores as they were measured, float32 [N, E]; NaN where an exit has no meaning, and there the other
            two may hold anything.
        age: Age in frames, int32 [N].
        frame: Index of the frame, int32 [N].

    Raises:
        InputError: If the arrays do not fit each other, or a number is not finite.
    """

    metric: str
    exits: tuple[str, ...]
    cold_exits: tuple[str, ...]
    ages: tuple[int, ...]
    predicted: NDArray[np.float32]
    spread: NDArray[np.float32]
    measured: NDArray[np.float32]
    age: NDArray[np.int32]
    frame: NDArray[np.int32]

    def __post_init__(self) -> None:
        object.__setattr__(self, "metric", canonical_metric(self.metric))
        for name in ("exits", "cold_exits", "ages"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        # As they are stored: a rule does not depend on whether the file was in between.
        for name, dtype in _ARRAYS.items():
            object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name), dtype))
        problem = self._problem()
        if problem:
            raise InputError(f"the calibration cannot be used: {problem}; measure it again")

    @classmethod
    def read(cls, bundle: Bundle) -> Calibration:
        """Read a bundle's calibration.

        Raises:
            InputError: If the bundle has none.
            BundleError: If the manifest's record or the file is malformed, or they do not fit each other.
        """
        record = PromiseRecord.of(bundle.manifest)
        if record is None:
            raise InputError(
                f"bundle {bundle.path} has no quality promise, so no quality can be asked of it; compile it again "
                "with --exits N and --metric lpips, flip, psnr or ms-ssim"
            )
        arrays = _read_arrays(bundle, record)
        try:
            calibration = cls(record.metric, record.exits, record.cold_exits, record.ages, **arrays)
        except InputError as exc:
            raise BundleError(f"bundle {bundle.path}: file {record.file!r}: {exc}") from exc
        return calibration

    def to_npz(self) -> bytes:
        """The rows as the bytes of an ``.npz`` file; the same rows give the same bytes."""
        buffer = BytesIO()
        np.savez(buffer, **{name: getattr(self, name) for name in _ARRAYS})
        return buffer.getvalue()

    def rule(self, quality: Quality) -> Rule:
        """The rule that keeps `quality`.

        Raises:
            InputError: If it cannot be promised: it is in another metric, the confidence asks for more rows than
                there are, or so few frames have an eligible exit that nothing would be gained. The message says what
                can be promised.
        """
        if quality.metric != self.metric:
            mine, other = metric_option(self.metric), metric_option(quality.metric)
            raise InputError(
                f"the bundle is calibrated for {mine}, so nothing can be promised in {other}; "
                f"ask for a quality in {mine}, or compile the bundle again with --metric {other}"
            )
        self._check_confidence(quality.confidence)
        rule, share = self._made(quality)
        if share >= _LEAST_ELIGIBLE_SHARE:
            return replace(rule, surprise=self._surprise(rule))
        best = self.best(quality.confidence)
        raise InputError(
            f"{quality} at confidence {quality.confidence:g} cannot be promised: all exits but the whole generator "
            f"would be ruled out for {1 - share:.0%} of the frames; the best that can be promised at this confidence "
            f"is {metric_option(self.metric)}={best:.6g}"
        )

    def best(self, confidence: float) -> float:
        """The best threshold that can be promised, with at least one frame in ten answered by more than exact exits.

        Found among the measured scores, refined between the last that fails and the first that holds, and rounded to
        three digits towards what can be kept.

        Raises:
            InputError: If `confidence` cannot be had with so few rows, or no threshold can be promised.
        """
        Quality(self.metric, _any_threshold(self.metric), confidence)
        self._check_confidence(confidence)
        scores = np.unique(self.measured[np.isfinite(self.measured)].astype(np.float64))
        candidates = np.unique(np.quantile(scores, np.linspace(0.0, 1.0, 129)))
        failed: float | None = None
        for candidate in map(float, candidates):
            if not self._holds(candidate, confidence):
                failed = candidate
                continue
            if failed is not None:
                candidate = self._refined(failed, candidate, confidence)
            threshold = self._rounded(candidate, confidence)
            if threshold is not None:
                return threshold
            failed = candidate
        raise InputError(
            f"no threshold of {metric_option(self.metric)} can be promised at confidence {confidence:g}: the "
            "predictor expects every exit to be worse than it ever was; compile the bundle again with more frames"
        )

    def groups(self) -> tuple[int, ...]:
        """The ages that have a margin: 0 where there are cold exits, then the calibrated ones."""
        return (0, *self.ages) if self.cold_exits else self.ages

    def rows(self, age: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Indices of the rows of one age group and of the columns that count in it."""
        counts = self.cold_exits if age == 0 else self.exits
        columns = np.array([index for index, name in enumerate(self.exits) if name in counts], np.intp)
        return np.flatnonzero(self.age == age), columns

    def slack(self, age: int, score: float) -> NDArray[np.float64]:
        """How many spreads each prediction lies below `score`, [rows, columns] of one age; -inf without a meaning."""
        rows, columns = self.rows(age)
        where = np.ix_(rows, columns)
        counts = np.isfinite(self.measured[where])
        difference = score - self.predicted[where].astype(np.float64)
        slack = np.full(counts.shape, -np.inf)
        np.divide(difference, self.spread[where], out=slack, where=counts)
        return slack

    def consumer_columns(self, age: int) -> NDArray[np.bool_]:
        """Which of the columns of one age group are consumers' (the others are branches'), [columns]."""
        _, columns = self.rows(age)
        return np.array([self.exits[column] not in self.cold_exits for column in columns], bool)

    def answering(self, age: int, eligible: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Those of the eligible exits that may answer: the consumers, or where there are none the branches.

        Args:
            age: The age group.
            eligible: Which exits are eligible, bool [rows, columns] of that age.

        Returns:
            Which of them may answer, of the same shape.
        """
        consumers = self.consumer_columns(age)
        served = (eligible & consumers).any(axis=1, keepdims=True)
        return np.asarray(eligible & (consumers | ~served))

    def _made(self, quality: Quality) -> tuple[Rule, float]:
        """The rule of least margins, and the share of rows that have an eligible exit under it."""
        score = quality.score
        margins: dict[int, float] = {}
        eligible = total = 0
        for age in self.groups():
            slack = self.slack(age, score)
            rows, columns = self.rows(age)
            # NaN compares false: what has no meaning is neither bad nor eligible.
            bad = self.measured[np.ix_(rows, columns)] > score
            # Below the slack of a bad branch there can be margins at which a good consumer answers; the row counts as
            # lost there too, since a loss has to fall with the margin, and margins are tightened while running.
            lost_at = np.where(bad & self._ever_answering(age, slack), slack, -np.inf).max(axis=1)
            margins[age] = max(LEAST_MARGIN, risk_control_margin(lost_at, 1.0 - quality.confidence))
            eligible += int((slack.max(axis=1) >= margins[age]).sum())
            total += rows.size
        return Rule(quality, margins), eligible / total

    def _surprise(self, rule: Rule) -> float:
        """See `Rule.surprise`; over all ages together, since at some there may be too few rows for it."""
        worst = []
        for age in self.groups():
            where = np.ix_(*self.rows(age))
            slack = self.slack(age, rule.quality.score)
            # A tightened margin may put a branch in a consumer's place: its errors must be no surprise then.
            eligible = (slack >= rule.margin(age)) & self._ever_answering(age, slack)
            error = np.full(eligible.shape, -np.inf)
            difference = self.measured[where].astype(np.float64) - self.predicted[where]
            np.divide(difference, self.spread[where], out=error, where=eligible)
            # Whichever of these exits answers, its error is at most the largest of theirs.
            worst.append(error[eligible.any(axis=1)].max(axis=1))
        return risk_control_margin(np.concatenate(worst), 1.0 - rule.quality.confidence)

    def _ever_answering(self, age: int, slack: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which exits may answer at some margin, [rows, columns]: consumers, and branches of more slack than theirs.

        A branch of no more slack is eligible only where the consumer of most slack is too.
        """
        consumers = self.consumer_columns(age)
        most = np.where(consumers, slack, -np.inf).max(axis=1, keepdims=True)
        return np.asarray(consumers | (slack > most))

    def _holds(self, score: float, confidence: float) -> bool:
        threshold = float(from_score(self.metric, score))
        if not in_range(self.metric, threshold):
            return False
        return self._made(Quality(self.metric, threshold, confidence))[1] >= _LEAST_ELIGIBLE_SHARE

    def _refined(self, failed: float, holding: float, confidence: float) -> float:
        """Halve between a score that cannot be promised and one that can, down to what three digits show."""
        while holding - failed > 1e-3:
            middle = 0.5 * (failed + holding)
            if self._holds(middle, confidence):
                holding = middle
            else:
                failed = middle
        return holding

    def _rounded(self, score: float, confidence: float) -> float | None:
        """The threshold of `score` with three digits, rounded to the worse side; None where that does not hold."""
        threshold = float(from_score(self.metric, score))
        if self.metric == "ms_ssim":
            rounded = 1.0 - _up(1.0 - threshold)
            rounded = float(f"{rounded:.9g}")
        else:
            rounded = -_up(-threshold) if self.metric == "psnr_db" else _up(threshold)
        for value in (rounded, threshold):
            if in_range(self.metric, value) and self._holds(float(to_score(self.metric, value)), confidence):
                return value
        return None

    def _check_confidence(self, confidence: float) -> None:
        """Refuse a confidence for which some age has too few rows."""
        fewest, age = min((self.rows(age)[0].size, age) for age in self.groups())
        if allowed_losses(fewest, 1.0 - confidence) < 0:
            highest = math.floor(fewest / (fewest + 1) * 1e6) / 1e6
            raise InputError(
                f"confidence {confidence:g} cannot be promised from {fewest} calibration frames (age {age}); "
                f"they allow {highest:g} at the most: ask for less, or compile with more frames"
            )

    def _problem(self) -> str | None:
        """What is wrong with the arrays, None where nothing is."""
        shape = (len(self.age), len(self.exits))
        if self.age.ndim != 1 or self.frame.shape != self.age.shape or not shape[0] or not shape[1]:
            return f"age and frame have the shapes {self.age.shape} and {self.frame.shape} for {shape[1]} exits"
        for name in ("predicted", "spread", "measured"):
            if getattr(self, name).shape != shape:
                return f"{name} has the shape {getattr(self, name).shape}, not {shape}"
        if not set(self.exits).issuperset(self.cold_exits) or len(set(self.exits)) != len(self.exits):
            return f"cold exits {self.cold_exits} are not among the exits {self.exits}"
        groups = self.groups()
        if any(age < 1 for age in self.ages) or list(self.ages) != sorted(set(self.ages)) or not groups:
            return f"the ages {self.ages} do not rise from 1 on"
        stray = sorted(set(self.age.tolist()) - set(groups))
        if stray:
            return f"there are rows of age {stray[0]}, which is not calibrated"
        for age in groups:
            rows, columns = self.rows(age)
            where = np.ix_(rows, columns)
            measured = self.measured[where]
            if rows.size == 0 or np.isnan(measured).all():
                return f"there is no measured row of age {age}"
            if np.isinf(measured).any():
                return f"a measured score of age {age} is infinite"
            counts = ~np.isnan(measured)
            predicted, spread = self.predicted[where][counts], self.spread[where][counts]
            if not np.isfinite(predicted).all() or not (np.isfinite(spread) & (spread > 0)).all():
                return f"a prediction of age {age} is not finite, or its spread is not above 0"
        return None


_ARRAYS: Final[Mapping[str, Any]] = {
    "predicted": np.float32,
    "spread": np.float32,
    "measured": np.float32,
    "age": np.int32,
    "frame": np.int32,
}


def evaluate(calibration: Calibration, rule: Rule, costs: Mapping[str, float]) -> tuple[Outcome, ...]:
    """What a rule gives on a calibration's frames (or, made into one, on any others), by age.

    Every frame is answered by the cheapest of the whole generator and the exits that may answer: its eligible
    consumers, or, where none is, its eligible branches.

    Args:
        calibration: The frames.
        rule: The rule.
        costs: Costs as fractions of the whole generator's, of every exit of the calibration; where it has
            ``predictor`` and ``predictor_cold``, every frame pays for the one of its age.

    Raises:
        InputError: If an exit's cost is missing.
    """
    missing = [name for name in calibration.exits if name not in costs]
    if missing:
        raise InputError(f"the cost of exit {missing[0]!r} is missing; there are: {', '.join(costs)}")
    score = rule.quality.score
    outcomes = []
    for age in calibration.groups():
        rows, columns = calibration.rows(age)
        names = [calibration.exits[column] for column in columns] + ["whole"]
        price = np.array([costs[name] for name in names[:-1]] + [1.0])
        eligible = np.ones((rows.size, len(names)), bool)
        eligible[:, :-1] = calibration.answering(age, calibration.slack(age, score) >= rule.margin(age))
        chosen = np.where(eligible, price, np.inf).argmin(axis=1)
        bad = np.zeros(eligible.shape, bool)
        bad[:, :-1] = calibration.measured[np.ix_(rows, columns)] > score
        paid = float(price[chosen].mean()) + costs.get("predictor" if age else "predictor_cold", 0.0)
        counts = np.bincount(chosen, minlength=len(names))
        outcomes.append(
            Outcome(
                age=age,
                coverage=1.0 - float(bad[np.arange(rows.size), chosen].mean()),
                saved=1.0 - paid,
                shares={name: count / rows.size for name, count in zip(names, counts.tolist(), strict=True) if count},
            )
        )
    return tuple(outcomes)


def _read_arrays(bundle: Bundle, record: PromiseRecord) -> dict[str, NDArray[Any]]:
    """The five arrays of a calibration file, each header read before anything is allocated for it."""
    where = f"bundle {bundle.path}: file {record.file!r}"
    path = bundle.file(record.file)
    arrays: dict[str, NDArray[Any]] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            found = sorted(archive.namelist())
            if found != sorted(f"{name}.npy" for name in _ARRAYS):
                raise BundleError(f"{where} holds {', '.join(found)}; it should hold {', '.join(_ARRAYS)}")
            size_bytes = sum(info.file_size for info in archive.infolist())
            if size_bytes > _MAX_NPZ_BYTES:
                raise BundleError(f"{where} unpacks to {size_bytes} bytes, over the limit of {_MAX_NPZ_BYTES}")
            if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                raise BundleError(f"{where} is compressed, which no calibration is; compile the bundle again")
            for name, dtype in _ARRAYS.items():
                shape = (record.samples,) if dtype is np.int32 else (record.samples, len(record.exits))
                arrays[name] = _read_array(archive.read(f"{name}.npy"), np.dtype(dtype), shape, f"{where}: {name}")
    except (OSError, zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, RuntimeError) as exc:
        raise BundleError(f"{where} cannot be read: {exc}; copy the bundle again") from exc
    frames = len(set(arrays["frame"].tolist()))
    if frames != record.frames:
        raise BundleError(f"{where} has {frames} frames, the manifest says {record.frames}; compile the bundle again")
    return arrays


def _read_array(data: bytes, dtype: np.dtype[Any], shape: tuple[int, ...], where: str) -> NDArray[Any]:
    """One ``.npy`` of a known dtype and shape; a header that says otherwise is refused, objects among them."""
    stream = BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise BundleError(f"{where} is of .npy version {version}, not (1, 0); compile the bundle again")
    found_shape, fortran, found_dtype = np.lib.format.read_array_header_1_0(stream)
    if found_shape != shape or found_dtype != dtype or fortran:
        raise BundleError(
            f"{where} is {found_dtype} of shape {found_shape}, not {dtype} of shape {shape}; compile the bundle again"
        )
    content: bytes = data[stream.tell() :]
    if len(content) != dtype.itemsize * math.prod(shape):
        raise BundleError(f"{where} has {len(content)} bytes of data, which do not fit its shape; copy it again")
    array: NDArray[Any] = np.frombuffer(content, dtype).reshape(shape)
    return array


def _any_threshold(metric: str) -> float:
    return 30.0 if metric == "psnr_db" else 0.5


def _up(value: float) -> float:
    """`value` with three significant digits, rounded up."""
    if value == 0.0:
        return 0.0
    scale = 10.0 ** (2 - math.floor(math.log10(abs(value))))
    return math.ceil(value * scale) / scale
