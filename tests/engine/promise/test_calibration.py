"""The quality promise: scores, what may be asked for, the rule against its definition, and strict reading."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper

from warpcache.engine.bundle.bundle import Bundle, ExitRecord, Manifest
from warpcache.engine.bundle.manifest import module_record
from warpcache.engine.bundle.write import write_bundle
from warpcache.engine.errors import BundleError, InputError
from warpcache.engine.metrics.images import METRICS
from warpcache.engine.promise.calibration import (
    LEAST_MARGIN,
    PROMISABLE,
    Calibration,
    PromiseRecord,
    Quality,
    Rule,
    canonical_metric,
    evaluate,
    from_score,
    score_value,
    to_score,
)
from warpcache.engine.spec import TensorSpec

EXITS = ("warp", "branch1", "branch2")
COLD = ("branch1", "branch2")
AGES = (1, 2)
COSTS = {"warp": 0.1, "branch1": 0.2, "branch2": 0.4}


def rows(count: int, seed: int = 0, *, shift: float = 0.0, noise: float = 1.0) -> dict[str, NDArray[Any]]:
    """`count` rows of each age 0, 1, 2, exchangeable with one another and with those of any other seed.

    Measured LPIPS lies about 0.02 (warp), 0.04 (branch1) and 0.025 (branch2); `shift` makes the predictor optimistic
    by so many spreads.
    """
    rng = np.random.default_rng(seed)
    age = np.repeat([0, *AGES], count)
    base = np.log(0.02) + 0.6 * rng.normal(size=age.size) + 0.2 * age
    predicted = np.stack([base, base + 0.7, base + 0.2], axis=1)
    spread = 0.25 * np.exp(0.3 * rng.normal(size=predicted.shape))
    errors = rng.standard_t(4, size=predicted.shape)
    measured = predicted + spread * (noise * errors + shift)
    measured[age == 0, 0] = np.nan  # no cache, no consumer
    frame = np.tile(np.arange(count), 3)
    return {"predicted": predicted, "spread": spread, "measured": measured, "age": age, "frame": frame}


def calibration(count: int = 99, seed: int = 0, **changes: Any) -> Calibration:
    return Calibration("lpips", EXITS, COLD, AGES, **{**rows(count, seed), **changes})


# Scores


@pytest.mark.parametrize("metric", PROMISABLE)
def test_a_score_rises_as_quality_falls_and_turns_back(metric: str) -> None:
    best_first = np.geomspace(1e-5, 0.9, 50)
    values = {"psnr_db": np.linspace(99.0, 3.0, 50), "ms_ssim": 1.0 - best_first}.get(metric, best_first)
    scores = to_score(metric, values)
    assert scores.dtype == np.float64
    assert (np.diff(scores) > 0).all()
    # 1 - (1 - x) loses the digits of x below 2^-53: 1e-11 relative to an x of 1e-5.
    np.testing.assert_allclose(from_score(metric, scores), values, rtol=1e-10)
    np.testing.assert_allclose(
        [score_value(metric, s) for s in scores.tolist()], from_score(metric, scores), rtol=1e-14
    )


def test_scores_are_logarithms_of_distances() -> None:
    assert to_score("lpips", 0.1) == pytest.approx(math.log(0.1))
    assert to_score("flip", 0.1) == pytest.approx(math.log(0.1))
    assert to_score("ms-ssim", 0.98) == pytest.approx(math.log(0.02))
    # 20 dB is a mean squared error of 0.01 on [0, 1].
    assert to_score("psnr", 20.0) == pytest.approx(math.log(0.01))


@pytest.mark.parametrize(
    ("metric", "identical"), [("lpips", 0.0), ("flip", 0.0), ("ms_ssim", 1.0), ("psnr_db", math.inf)]
)
def test_identical_images_have_a_finite_score_below_all_others(metric: str, identical: float) -> None:
    score = float(to_score(metric, identical))
    assert math.isfinite(score)
    slightly = {"psnr_db": 80.0, "ms_ssim": 0.99999}.get(metric, 1e-5)
    assert score < float(to_score(metric, slightly))
    assert np.isnan(to_score(metric, [np.nan])).all()


def test_a_hopeless_score_has_a_value() -> None:
    assert score_value("lpips", 1e6) > 1e100


# Quality


def test_promisable_metrics_are_known_ones() -> None:
    assert set(PROMISABLE) <= set(METRICS)
    for metric in PROMISABLE:
        assert canonical_metric(metric) == metric
        # A score says "larger is worse", whatever the metric's own direction is.
        worse, better = (0.2, 0.1) if not METRICS[metric].higher_is_better else (0.1, 0.2)
        assert to_score(metric, worse) > to_score(metric, better)


@pytest.mark.parametrize(
    ("text", "metric", "threshold"),
    [
        ("lpips=0.1", "lpips", 0.1),
        (" FLIP=1", "flip", 1.0),
        ("psnr=35", "psnr_db", 35.0),
        ("ms-ssim=.98", "ms_ssim", 0.98),
    ],
)
def test_a_quality_is_read_from_text(text: str, metric: str, threshold: float) -> None:
    quality = Quality.parse(text, confidence=0.9)
    assert quality == Quality(metric, threshold, confidence=0.9)
    assert quality.score == float(to_score(metric, threshold))
    assert Quality.parse(str(quality), confidence=0.9) == quality


@pytest.mark.parametrize("text", ["lpips", "lpips=", "lpips=much", "=", "0.1"])
def test_text_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is not of the form METRIC=THRESHOLD"):
        Quality.parse(text)


@pytest.mark.parametrize("metric", ["ssim", "LPIPS2", "", None, 3])
def test_an_unknown_metric_is_refused_with_the_known_ones(metric: Any) -> None:
    with pytest.raises(InputError, match=r"no quality can be promised in metric .*: lpips, flip, psnr, ms-ssim"):
        Quality(metric, 0.1)


@pytest.mark.parametrize(
    ("metric", "threshold"),
    [
        *((metric, value) for metric in PROMISABLE for value in (0.0, -1.0, math.nan, math.inf, True, "0.1", None)),
        ("flip", 1.001),
        ("ms_ssim", 1.0),
        ("psnr", 100.5),
    ],
)
def test_a_threshold_outside_the_metrics_range_is_refused(metric: str, threshold: Any) -> None:
    with pytest.raises(InputError, match=r"a threshold of (lpips|flip|psnr|ms-ssim) is a"):
        Quality(metric, threshold)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 1.5, -0.1, math.nan, True, "0.95", None])
def test_a_confidence_outside_its_range_is_refused(confidence: Any) -> None:
    with pytest.raises(InputError, match=r"confidence .* is not a number between 0 and 1"):
        Quality("lpips", 0.1, confidence)


def test_numpy_numbers_are_numbers() -> None:
    quality = Quality("lpips", np.float32(0.5), confidence=np.float64(0.9))
    assert type(quality.threshold) is float
    assert quality == Quality("lpips", 0.5, 0.9)


# The rule


def slacks_of(data: Calibration, index: int, score: float) -> dict[str, float]:
    """The slack of every exit that counts for one row."""
    return {
        name: (score - float(data.predicted[index, column])) / float(data.spread[index, column])
        for column, name in enumerate(EXITS)
        if data.age[index] > 0 or name in COLD
    }


def answering(slacks: dict[str, float], margin: float) -> set[str]:
    """The exits that may answer at a margin, as the definition says it: consumers, or where there are none branches."""
    eligible = {name for name, slack in slacks.items() if slack >= margin}
    return eligible - set(COLD) or eligible


def ever_answering(slacks: dict[str, float], margin: float) -> set[str]:
    """The exits that may answer at this margin or a larger one; who is eligible changes at slacks alone."""
    larger = [margin, *(slack for slack in slacks.values() if slack > margin)]
    return set().union(*(answering(slacks, m) for m in larger))


def brute_force_margin(data: Calibration, age: int, quality: Quality) -> float:
    """The definition, frame by frame and margin by margin: the least of all margins that loses few enough frames."""
    score = quality.score
    frames = [index for index in range(len(data.age)) if data.age[index] == age]
    slacks = {index: slacks_of(data, index, score) for index in frames}

    def lost(index: int, margin: float) -> bool:
        """Whether a bad exit may answer at this margin or a larger one: a loss has to fall with the margin."""
        names = ever_answering(slacks[index], margin)
        return any(float(data.measured[index, EXITS.index(name)]) > score for name in names)

    possible = {LEAST_MARGIN}
    for index in frames:
        possible |= {math.nextafter(slack, math.inf) for slack in slacks[index].values() if slack >= LEAST_MARGIN}
    for margin in sorted(possible):
        losses = sum(lost(index, margin) for index in frames)
        if (losses + 1) / (len(frames) + 1) <= 1 - quality.confidence + 1e-12:
            return margin
    raise AssertionError("at the last of these margins nothing is eligible")


@pytest.mark.parametrize("threshold", [0.02, 0.05, 0.1])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_margins_are_the_least_that_keep_the_promise(threshold: float, confidence: float) -> None:
    data, quality = calibration(59), Quality("lpips", threshold, confidence)
    rule = data.rule(quality)
    assert rule.quality == quality
    assert dict(rule.margins) == {age: brute_force_margin(data, age, quality) for age in (0, 1, 2)}


def test_some_margin_is_above_the_least() -> None:
    """The test above would pass on calibrations that ask for the least margin alone; this one does not."""
    rule = calibration(59).rule(Quality("lpips", 0.05))
    assert max(rule.margins.values()) > LEAST_MARGIN + 0.1
    assert min(rule.margins.values()) >= LEAST_MARGIN


def test_only_calibrated_ages_have_a_margin() -> None:
    rule = calibration().rule(Quality("lpips", 0.05))
    assert rule.margin(None) == rule.margin(0) == rule.margins[0]
    assert rule.margin(2) == rule.margins[2]
    assert rule.margin(3) == math.inf


@pytest.mark.parametrize("poor", [False, True], ids=["branches as good", "branches badly predicted"])
@pytest.mark.parametrize("confidence", [0.8, 0.9, 0.95])
def test_new_frames_keep_the_threshold_whichever_exit_answers(confidence: float, poor: bool) -> None:
    """Over many calibrations, the worst exit that may answer a new frame is within the threshold as often as promised.

    Also where the margin is tightened: then branches come in the place of consumers.
    """
    quality, draws, fresh = Quality("lpips", 0.05, confidence), 60, 200

    def sample(count: int, seed: int) -> Calibration:
        data = rows(count, seed)
        if poor:
            errors = data["measured"] - data["predicted"]
            data["measured"][:, 1:] = (data["predicted"] + 3.0 * errors)[:, 1:]
        return Calibration("lpips", EXITS, COLD, AGES, **data)

    lost = {(age, tightening): 0 for age in (0, 1, 2) for tightening in (0.0, 0.6)}
    margins = []
    for seed in range(draws):
        rule = sample(79, seed).rule(quality)
        margins += rule.margins.values()
        new = sample(fresh, 10_000 + seed)
        slack = (quality.score - new.predicted.astype(np.float64)) / new.spread
        bad = new.measured > quality.score
        for age, tightening in lost:
            of_age = new.age == age
            eligible = slack[of_age] >= rule.margin(age) + tightening
            consumer = eligible[:, 0] & (age > 0)
            loses = np.where(consumer, bad[of_age, 0], (eligible & bad[of_age])[:, 1:].any(axis=1))
            lost[age, tightening] += int(loses.sum())
    alpha = 1 - confidence
    # A calibration's own coverage is Beta distributed with n = 79 (Vovk 2012): that spread, over the draws, and the
    # binomial one of the new frames. Three standard deviations.
    tolerance = 3 * math.sqrt(alpha * (1 - alpha) * (1 / 81 + 1 / fresh) / draws)
    for count in lost.values():
        assert count / (draws * fresh) <= alpha + tolerance
    # And it is no matter of never using an exit: where not the least margin decides, what is lost is near what may be.
    if np.mean(np.array(margins) > LEAST_MARGIN) > 0.9:
        assert max(lost.values()) / (draws * fresh) > alpha / 2
    assert max(lost.values()) > 0


def test_a_badly_predicted_branch_does_not_raise_the_margin_where_a_consumer_answers() -> None:
    """Where consumers are eligible at whatever margin a branch is, branches may be anything: as if there were none."""
    data, quality = rows(99), Quality("lpips", 0.05)
    warm = data["age"] > 0
    slack = (quality.score - data["predicted"][warm, 0]) / data["spread"][warm, 0]
    rng = np.random.default_rng(3)
    for column in (1, 2):
        # A hundredth: what is stored is float32. Where only branches answer, at age 0, they are as good as before.
        less = slack - 0.01 - rng.exponential(size=slack.size)
        data["predicted"][warm, column] = quality.score - less * data["spread"][warm, column]
        data["measured"][warm, column] = rng.choice([-9.0, 9.0], size=slack.size)
    rule = Calibration("lpips", EXITS, COLD, AGES, **data).rule(quality)
    alone = {name: values[warm][:, :1] if values.ndim == 2 else values[warm] for name, values in data.items()}
    without = Calibration("lpips", ("warp",), (), AGES, **alone).rule(quality)
    assert {age: rule.margin(age) for age in AGES} == dict(without.margins)
    assert min(without.margins.values()) > 0.2
    assert rule.margin(0) == calibration().rule(quality).margin(0)


def test_a_branch_counts_where_it_is_eligible_beyond_the_consumers() -> None:
    """At margins that no consumer reaches it answers, and a bad one is held against the rule."""
    data, quality = rows(99), Quality("lpips", 0.05)
    warm = data["age"] > 0
    beyond = (quality.score - data["predicted"][warm, 0]) / data["spread"][warm, 0] + 1.0
    data["predicted"][warm, 1] = quality.score - beyond * data["spread"][warm, 1]
    data["measured"][warm, 1] = 9.0
    data["measured"][warm, 0] = -9.0
    rule = Calibration("lpips", EXITS, COLD, AGES, **data).rule(quality)
    # Of 99 frames 4 may be lost, by the branch, which lies one spread beyond the consumer: float32 tells 1e-5 apart.
    for number, age in enumerate(AGES):
        fifth = np.sort(beyond[number * 99 : (number + 1) * 99])[-5]
        assert rule.margin(age) == pytest.approx(fifth, abs=1e-5)


def test_branches_may_answer_where_no_consumer_is_eligible() -> None:
    eligible = np.zeros((297, 3), bool)[:4]
    eligible[:] = [[True, True, False], [False, True, True], [True, False, False], [False, False, False]]
    expected = [[True, False, False], [False, True, True], [True, False, False], [False, False, False]]
    np.testing.assert_array_equal(calibration().answering(1, eligible), expected)
    # Without a cache there are the two branches, and all that are eligible may answer.
    np.testing.assert_array_equal(calibration().answering(0, eligible[:, 1:]), eligible[:, 1:])


def test_columns_without_a_meaning_are_skipped() -> None:
    """What stands beside a NaN is never read, not even where it would decide everything."""
    data = rows(99)
    without = data["age"] == 0
    data["predicted"][without, 0] = -np.inf
    data["spread"][without, 0] = 0.0
    assert Calibration("lpips", EXITS, COLD, AGES, **data).rule(Quality("lpips", 0.05)) == calibration().rule(
        Quality("lpips", 0.05)
    )


def test_without_a_cache_only_cold_exits_count() -> None:
    """What stands in a consumer's column of age 0 is never read, even where it is a number."""
    data = rows(99)
    without = data["age"] == 0
    data["measured"][without, 0] = 5.0  # as bad as can be, and predicted to be perfect
    data["predicted"][without, 0] = -10.0
    quality = Quality("lpips", 0.05)
    assert Calibration("lpips", EXITS, COLD, AGES, **data).rule(quality) == calibration().rule(quality)


@pytest.mark.parametrize("confidence", [0.8, 0.9])
def test_a_surprise_is_as_rare_as_a_miss_may_be(confidence: float) -> None:
    """Against the definition: over the frames that some exit may answer, the worst of those exits' errors.

    Exits that may answer at a tightened margin are among them, so that tightening makes nothing a surprise.
    """
    data, quality = calibration(59), Quality("lpips", 0.05, confidence)
    rule = data.rule(quality)
    errors = []
    for index in range(len(data.age)):
        names = ever_answering(slacks_of(data, index, quality.score), rule.margin(int(data.age[index])))
        columns = [EXITS.index(name) for name in names]
        if columns:
            error = (data.measured[index].astype(float) - data.predicted[index]) / data.spread[index].astype(float)
            errors.append(max(float(error[column]) for column in columns))

    def keeps(value: float) -> bool:
        return (sum(error >= value for error in errors) + 1) / (len(errors) + 1) <= 1 - confidence + 1e-12

    assert keeps(rule.surprise)
    assert not keeps(math.nextafter(rule.surprise, -math.inf))
    # Two and a half spreads above the prediction, less what it leaves open.
    assert rule.beyond(-2.0, -3.0, 0.4) == pytest.approx(2.5 - rule.surprise)


def test_too_few_rows_tell_no_surprise() -> None:
    assert Rule(Quality("lpips", 0.05), {1: 1.0}).beyond(100.0, -3.0, 0.1) == -math.inf


def test_a_quality_in_another_metric_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"the bundle is calibrated for lpips, .* promised in ms-ssim.*--metric ms-ssim"
    ):
        calibration().rule(Quality("ms-ssim", 0.9))


@pytest.mark.parametrize("count", [19, 30, 99])
def test_a_confidence_beyond_the_samples_is_refused_with_the_highest(count: int) -> None:
    data = calibration(count)
    with pytest.raises(
        InputError, match=rf"confidence 0.999 cannot be promised from {count} calibration frames"
    ) as error:
        data.rule(Quality("lpips", 0.2, 0.999))
    highest = float(str(error.value).split("allow ")[1].split(" at")[0])
    assert highest == pytest.approx(count / (count + 1), abs=1e-6)
    data.rule(Quality("lpips", 0.5, highest))
    with pytest.raises(InputError, match="cannot be promised from"):
        data.rule(Quality("lpips", 0.5, highest + 2e-6))


def eligible_share(data: Calibration, rule: Rule) -> float:
    found = [(data.slack(age, rule.quality.score) >= rule.margin(age)).any(axis=1) for age in data.groups()]
    return float(np.concatenate(found).mean())


@pytest.mark.parametrize("metric", PROMISABLE)
def test_a_threshold_that_nothing_meets_is_refused_with_the_best(metric: str) -> None:
    scores = rows(99)
    data = Calibration(metric, EXITS, COLD, AGES, **scores)
    strict, a_little = {"psnr_db": (60.0, 1.03), "ms_ssim": (0.9999, 1.0005)}.get(metric, (0.0001, 0.93))
    with pytest.raises(InputError, match=r"at confidence 0.95 cannot be promised") as error:
        data.rule(Quality(metric, strict))
    shown = str(error.value).rsplit(" is ", 1)[1]
    quality = Quality.parse(shown)
    assert quality.threshold == data.best(0.95)
    assert eligible_share(data, data.rule(quality)) >= 0.1
    # What is shown has three digits; a threshold that is better by more than those is refused as well.
    with pytest.raises(InputError, match="cannot be promised"):
        data.rule(Quality(metric, quality.threshold * a_little))


def test_the_best_threshold_worsens_with_the_confidence() -> None:
    data = calibration()
    best = [data.best(confidence) for confidence in (0.5, 0.8, 0.9, 0.95, 0.99)]
    assert best == sorted(best)
    assert best[0] < best[-1]


def test_a_predictor_that_expects_the_worst_promises_nothing() -> None:
    data = rows(99)
    data["predicted"] = data["predicted"] + 50.0
    hopeless = Calibration("lpips", EXITS, COLD, AGES, **data)
    with pytest.raises(InputError, match=r"no threshold of lpips can be promised at confidence 0.95"):
        hopeless.rule(Quality("lpips", 0.05))


@settings(max_examples=20)
@given(st.integers(0, 1000), st.sampled_from([0.02, 0.05, 0.1]), st.sampled_from([0.6, 0.8, 0.9]))
def test_margins_rise_with_the_confidence(seed: int, threshold: float, confidence: float) -> None:
    data = calibration(40, seed)
    loose = data.rule(Quality("lpips", threshold, 0.5))
    try:
        strict = data.rule(Quality("lpips", threshold, confidence))
    except InputError:
        return
    assert all(strict.margin(age) >= loose.margin(age) >= 0 for age in (0, 1, 2))


# What a rule gives


@pytest.mark.parametrize("warp", [0.1, 0.3], ids=["a cheap consumer", "a branch that is cheaper"])
def test_outcomes_equal_the_frames_counted_one_by_one(warp: float) -> None:
    data = calibration(59)
    rule = data.rule(Quality("lpips", 0.05, 0.9))
    costs = {**COSTS, "warp": warp, "predictor": 0.01, "predictor_cold": 0.02}
    for outcome in evaluate(data, rule, costs):
        paid, good, shares = 0.0, 0, dict.fromkeys([*EXITS, "whole"], 0)
        frames = [index for index in range(len(data.age)) if data.age[index] == outcome.age]
        for index in frames:
            names = answering(slacks_of(data, index, rule.quality.score), rule.margin(outcome.age))
            best = min({"whole", *names}, key=lambda name: costs.get(name, 1.0))
            shares[best] += 1
            paid += costs.get(best, 1.0) + (0.01 if outcome.age else 0.02)
            good += best == "whole" or data.measured[index, EXITS.index(best)] <= rule.quality.score
        assert outcome.coverage == pytest.approx(good / len(frames))
        assert outcome.saved == pytest.approx(1 - paid / len(frames))
        assert outcome.shares == pytest.approx({name: n / len(frames) for name, n in shares.items() if n})
    assert [outcome.age for outcome in evaluate(data, rule, costs)] == [0, 1, 2]


def test_an_exit_without_a_cost_is_refused() -> None:
    data = calibration()
    with pytest.raises(InputError, match="the cost of exit 'branch2' is missing"):
        evaluate(data, data.rule(Quality("lpips", 0.05)), {"warp": 0.1, "branch1": 0.2})


# The calibration's own checks


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"age": np.zeros((4, 2))}, "age and frame have the shapes"),
        ({"frame": np.arange(3)}, "age and frame have the shapes"),
        ({"predicted": np.zeros((297, 2))}, "predicted has the shape"),
        ({"age": np.repeat([0, 1, 3], 99)}, "there are rows of age 3, which is not calibrated"),
        ({"age": np.repeat([0, 1, 1], 99)}, "there is no measured row of age 2"),
        ({"spread": np.zeros((297, 3))}, "a prediction of age 0 is not finite, or its spread is not above 0"),
        ({"predicted": np.full((297, 3), np.nan)}, "a prediction of age 0 is not finite"),
        ({"measured": np.full((297, 3), np.inf)}, "a measured score of age 0 is infinite"),
        ({"measured": np.full((297, 3), np.nan)}, "there is no measured row of age 0"),
        ({"exits": ("warp", "branch1", "branch1")}, "cold exits"),
        ({"cold_exits": ("branch7",)}, "cold exits"),
        ({"ages": (2, 1)}, "the ages"),
        ({"ages": (0, 1, 2)}, "the ages"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    fields = {"metric": "lpips", "exits": EXITS, "cold_exits": COLD, "ages": AGES, **rows(99), **changes}
    with pytest.raises(InputError, match=f"the calibration cannot be used: {message}"):
        Calibration(**fields)


# The bundle


def promise_record(data: Calibration) -> dict[str, Any]:
    return PromiseRecord(
        metric=data.metric,
        exits=data.exits,
        cold_exits=data.cold_exits,
        ages=data.ages,
        samples=len(data.age),
        frames=len(set(data.frame.tolist())),
        at="2026-11-20T12:00:00Z",
        file="calibration.npz",
        macs={"whole": 1000, "plain": 500, "warp": 100, "predictor": 3.0},
        errors={"warp": 0.1, "branch1": 0.2, "branch2": 0.15},
        thresholds=(
            {"threshold": 0.05, "confidence": 0.95, "age": 1, "coverage": 0.96, "saved": 0.8, "shares": {"warp": 1.0}},
        ),
    ).to_record()


def promising_manifest(plain: Manifest, record: Any) -> Manifest:
    """The tiny bundle's manifest with two branches, predictors and a promise."""
    image, inputs = plain.modules["warp"].outputs, plain.modules["generator"].inputs
    one = (1, 1)
    modules = dict(plain.modules)
    for name in COLD:
        modules[name] = module_record(name, inputs, image, file="generator.onnx")
    for name, count in (("predictor", 3), ("predictor_cold", 2)):
        outputs = [TensorSpec("predicted", "float32", (1, count)), TensorSpec("spread", "float32", (1, count))]
        outputs += [TensorSpec("novelty", "float32", one)]
        outputs += [TensorSpec("change", "float32", one)] if name == "predictor" else []
        modules[name] = module_record(name, inputs, tuple(outputs))
    exits = (*plain.exits, ExitRecord("branch1", ("branch1",), 0.2), ExitRecord("branch2", ("branch2",), 0.4))
    return dataclasses.replace(plain, modules=modules, exits=exits, calibration={"frames": 99, "promise": record})


@pytest.fixture
def make_promising(tiny_bundle: Path, tmp_path: Path) -> Callable[..., Bundle]:
    """Writes a bundle with a promise: `content` is its calibration file's, `record` its manifest's."""

    def make(content: bytes | None = None, record: Any = None) -> Bundle:
        data = calibration()
        tiny = Bundle.open(tiny_bundle)
        files: dict[str, Path | bytes] = {name: tiny.file(name) for name in tiny.manifest.files}
        empty = helper.make_model(helper.make_graph([], "empty", [], [])).SerializeToString()
        files |= {"predictor.onnx": empty, "predictor_cold.onnx": empty}
        files["calibration.npz"] = data.to_npz() if content is None else content
        manifest = promising_manifest(tiny.manifest, promise_record(data) if record is None else record)
        return write_bundle(tmp_path / "promising.warp", manifest, files)

    return make


def test_what_is_written_is_read(make_promising: Callable[..., Bundle]) -> None:
    bundle, data = make_promising(), calibration()
    read = Calibration.read(Bundle.open(bundle.path))
    for name in ("metric", "exits", "cold_exits", "ages"):
        assert getattr(read, name) == getattr(data, name)
    for name in ("predicted", "spread", "measured", "age", "frame"):
        np.testing.assert_array_equal(getattr(read, name), getattr(data, name))
    assert read.rule(Quality("lpips", 0.05)) == data.rule(Quality("lpips", 0.05))
    record = PromiseRecord.of(bundle.manifest)
    assert record is not None
    assert record.to_record() == promise_record(data)
    assert read.to_npz() == data.to_npz(), "the same rows give the same bytes"


def test_a_bundle_without_a_promise_is_told_so(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    assert PromiseRecord.of(bundle.manifest) is None
    with pytest.raises(InputError, match=r"bundle .* has no quality promise"):
        Calibration.read(bundle)


def compressed(*, damage: bool = False) -> bytes:
    """The stored rows deflated; what is damaged lies in the first array's data, where zlib trips over it."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **stored())
    data = bytearray(buffer.getvalue())
    if damage:
        data[200:260] = b"\xff" * 60
    return bytes(data)


def npz(**arrays: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def stored() -> dict[str, NDArray[Any]]:
    with np.load(io.BytesIO(calibration().to_npz())) as archive:
        return dict(archive)


def with_header(name: str, shape: tuple[int, ...]) -> bytes:
    """The calibration file with one array whose header claims another shape than its data has."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for other, array in stored().items():
            content = io.BytesIO()
            np.lib.format.write_array_header_1_0(
                content,
                {"descr": array.dtype.str, "fortran_order": False, "shape": shape if other == name else array.shape},
            )
            archive.writestr(f"{other}.npy", content.getvalue() + array.tobytes())
    return buffer.getvalue()


BROKEN_FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "no archive": (lambda: b"no archive at all", "cannot be read: File is not a zip file"),
    "compressed": (lambda: compressed(), "is compressed"),
    "compressed and damaged": (lambda: compressed(damage=True), "is compressed"),
    "cut off": (lambda: calibration().to_npz()[:500], "cannot be read"),
    "an array missing": (lambda: npz(**{k: v for k, v in stored().items() if k != "age"}), "holds frame.npy"),
    "an array more": (lambda: npz(**stored(), extra=np.zeros(3)), "holds age.npy, extra.npy"),
    "another dtype": (lambda: npz(**{**stored(), "spread": stored()["spread"].astype(float)}), "spread is float64"),
    "objects": (lambda: npz(**{**stored(), "age": np.array([None] * 297, object)}), "age is object"),
    "another shape": (lambda: npz(**{**stored(), "age": stored()["age"][:-1]}), "age is int32 of shape"),
    "Fortran order": (lambda: npz(**{**stored(), "spread": np.asfortranarray(stored()["spread"])}), "spread is"),
    "a header that lies": (lambda: with_header("measured", (2**40, 3)), "measured is float32 of shape"),
    "a spread of nothing": (lambda: npz(**{**stored(), "spread": 0 * stored()["spread"]}), "the calibration cannot"),
    "other frames": (lambda: npz(**{**stored(), "frame": 0 * stored()["frame"]}), "has 1 frames, the manifest says 99"),
}


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_a_broken_calibration_file_is_refused(case: str, make_promising: Callable[..., Bundle]) -> None:
    content, message = BROKEN_FILES[case]
    bundle = make_promising(content())
    with pytest.raises(BundleError, match=rf"bundle .*: file 'calibration.npz'.* {message}") as error:
        Calibration.read(bundle)
    assert "pickle" not in str(error.value)


def test_data_that_its_header_does_not_cover_is_refused(make_promising: Callable[..., Bundle]) -> None:
    short = with_header("measured", (297, 3))
    record = promise_record(calibration())
    data = stored()
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(short)) as source, zipfile.ZipFile(buffer, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            target.writestr(name, content[:-4] if name == "measured.npy" else content)
    bundle = make_promising(buffer.getvalue(), record)
    with pytest.raises(BundleError, match=f"measured has {data['measured'].nbytes - 4} bytes of data"):
        Calibration.read(bundle)


def test_a_file_that_is_not_there_is_told(tiny_bundle: Path) -> None:
    tiny = Bundle.open(tiny_bundle)
    manifest = promising_manifest(tiny.manifest, promise_record(calibration()))
    with pytest.raises(BundleError, match=r"has no file 'calibration.npz'"):
        Calibration.read(Bundle(tiny.path, manifest))


CHANGES: list[tuple[str, Any, str]] = [
    ("method", "hope", "must be 'conformal risk control'"),
    ("metric", "ssim", "must be one of lpips"),
    ("metric", 3, "must be a string"),
    ("exits", [], "must be some of the bundle's exits"),
    ("exits", ["warp", "branch1", "whole"], "must be some of the bundle's exits branch1, branch2, warp"),
    ("exits", ["warp", "branch1", "branch1"], "'branch1' occurs twice in calibration.promise.exits"),
    ("exits", "warp", "must be a list"),
    ("exits", ["warp", "branch1"], "must be some of warp, branch1"),
    ("cold_exits", ["branch1"], "key 'calibration.promise.cold_exits' must be those that read no cache"),
    ("ages", [0, 1], "must be ages from 1 on, rising"),
    ("ages", [2, 1], "must be ages from 1 on, rising"),
    ("ages", [1.5], "must be an integer"),
    ("samples", 0, "must be 1 to 0"),
    ("frames", 298, "must be 1 to 297"),
    ("frames", True, "must be an integer"),
    ("at", "yesterday", "must be a time such as"),
    ("file", "calibration.onnx", "must be the name of an .npz file"),
    ("macs", {"warp": 1}, "must be counts for whole"),
    ("macs", {"whole": 1, "warp9": 1}, "must be counts for whole"),
    ("macs", {"whole": -1}, "must be a number of 0 or more"),
    ("predictor", {}, "is missing"),
    ("predictor", {"error": {}, "more": 1}, "is unknown"),
    ("predictor", {"error": {"warp9": 1.0}}, "must be errors of"),
    ("thresholds", [{"threshold": 0.1}], "is missing"),
    ("thresholds", {}, "must be a list"),
]


@pytest.mark.parametrize(("key", "value", "message"), CHANGES)
def test_a_malformed_record_is_refused(key: str, value: Any, message: str, tiny_bundle: Path) -> None:
    record = {**promise_record(calibration()), key: value}
    manifest = promising_manifest(Bundle.open(tiny_bundle).manifest, record)
    with pytest.raises(BundleError, match=rf"manifest.json: .*{message}"):
        PromiseRecord.of(manifest)


@pytest.mark.parametrize("key", sorted(promise_record(calibration(19))))
def test_a_key_that_is_missing_or_unknown_is_named(key: str, tiny_bundle: Path) -> None:
    plain = Bundle.open(tiny_bundle).manifest
    record = promise_record(calibration())
    del record[key]
    with pytest.raises(BundleError, match=f"key 'calibration.promise.{key}' is missing"):
        PromiseRecord.of(promising_manifest(plain, record))
    record = {**promise_record(calibration()), f"{key}2": 1}
    with pytest.raises(BundleError, match=f"key 'calibration.promise.{key}2' is unknown"):
        PromiseRecord.of(promising_manifest(plain, record))


def test_a_promise_needs_its_predictors(tiny_bundle: Path) -> None:
    manifest = promising_manifest(Bundle.open(tiny_bundle).manifest, promise_record(calibration()))
    for name in ("predictor", "predictor_cold"):
        modules = copy.copy(manifest.modules)
        del modules[name]
        with pytest.raises(BundleError, match=f"calibration.promise needs module '{name}', which is missing"):
            PromiseRecord.of(dataclasses.replace(manifest, modules=modules))
    with pytest.raises(BundleError, match=r"key 'calibration.promise' must be an object"):
        PromiseRecord.of(promising_manifest(manifest, "yes"))
