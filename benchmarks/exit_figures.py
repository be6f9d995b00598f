"""The Pareto front of a case: what is computed on the latency path against the quality that is kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.exit_tables import COLD, ExitTable
from warpcache.engine.errors import InputError
from warpcache.engine.promise.calibration import Calibration, Quality

__all__ = ["draw_front", "simulate"]

_THRESHOLDS = np.geomspace(0.002, 0.2, 41)


def simulate(
    table: ExitTable,
    calibration: Calibration,
    macs: Mapping[str, float],
    age: int,
    threshold: float,
    confidence: float,
    *,
    oracle: bool = False,
) -> tuple[float, NDArray[np.float64]] | None:
    """Share of MACs spent, and every frame's quality, when the rule picks the cheapest eligible exit.

    Args:
        table: What every exit is worth.
        calibration: The bundle's.
        macs: Exit -> share of the whole generator's.
        age: Of the caches, 0 for none.
        threshold: In the metric.
        confidence: The promise's.
        oracle: Let a predictor that is always right decide instead; what is left is what the exits themselves lack.

    Returns:
        None where the rule refuses the threshold.
    """
    names = table.exits_at(age)
    values = np.stack([table.quality[age][name] for name in names], 1)
    known = np.isfinite(values).all(1)
    if oracle:
        eligible = values <= threshold
    else:
        quality = Quality(calibration.metric, float(threshold), confidence=confidence)
        try:
            margin = calibration.rule(quality).margin(age)
        except InputError:
            return None
        eligible = table.predicted[age] + margin * table.spread[age] <= quality.score
        eligible &= (table.novelty <= 1.0)[:, None]
    # As the router does: the cheapest consumer, where none is eligible the cheapest branch, else the whole.
    branches = table.exits_at(COLD)
    order = sorted(range(len(names)), key=lambda column: (names[column] in branches, macs[names[column]]))
    cost, worth = np.ones(len(values)), np.zeros(len(values))
    for column in reversed(order):
        chosen = eligible[:, column]
        cost[chosen], worth[chosen] = macs[names[column]], values[chosen, column]
    return float(cost[known].mean()), worth[known]


def draw_front(
    path: Path,
    title: str,
    table: ExitTable,
    calibration: Calibration,
    macs: Mapping[str, float],
    age: int,
    confidence: float,
) -> None:
    """Draw fixed exits as points; the router, and a router that is never wrong, as curves over the threshold."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.0, 4.4), dpi=110)
    for label, oracle, style in (("router", False, "-"), ("router that is never wrong", True, ":")):
        points = [
            (found[0], float(np.quantile(found[1], confidence)))
            for threshold in _THRESHOLDS
            if (found := simulate(table, calibration, macs, age, threshold, confidence, oracle=oracle)) is not None
        ]
        if points:
            spent, kept = zip(*points, strict=True)
            axes.plot(np.multiply(spent, 100), np.maximum(kept, 1e-4), style, color="tab:blue", label=label)
    for name in table.exits_at(age):
        values = table.quality[age][name]
        axes.plot(macs[name] * 100, np.nanquantile(values, confidence), "o", color="tab:orange")
        axes.annotate(
            name, (macs[name] * 100, np.nanquantile(values, confidence)), xytext=(5, 5), textcoords="offset points"
        )
    frozen = np.nanquantile(table.frozen[age], confidence)
    axes.axhline(frozen, linestyle="--", linewidth=1.0, color="tab:gray", label="last frame again, costs nothing")
    # Cheap exits lie at some percent: only a logarithmic axis keeps them apart.
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("computed on the latency path, % of the whole generator's MACs")
    axes.set_ylabel(f"{calibration.metric} against the whole, {confidence:.0%} of frames are below")
    axes.set_title(f"{title}: caches {age} {'frame' if age == 1 else 'frames'} old", loc="left")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
