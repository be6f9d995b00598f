"""How long it takes from a cold process to the first answered frame.

    python -m benchmarks.startup --json startup.json

Every run is a fresh interpreter, so nothing is warm but the disk cache; medians over the runs. The clock starts after
the interpreter has, and the interpreter's own start is shown beside it. Inputs are zeros: the time does not depend on
what they show.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np

from benchmarks.measuring import Figure, print_figures
from benchmarks.records import write_record
from warpcache.tasks.demo import demo_bundle

__all__ = ["STAGES", "measure_start"]

STAGES = ("import", "open", "load", "frame")
"""Import the package; open the bundle (every file hashed); load what the policy runs; answer one frame."""

TARGET_S = 1.0

_CHILD = """
import time
marks = [time.perf_counter()]
import json, sys
import warpcache
warpcache.Engine
marks.append(time.perf_counter())
bundle = warpcache.Bundle.open(sys.argv[1])
marks.append(time.perf_counter())
with warpcache.Engine(bundle, policy=sys.argv[2]) as engine:
    marks.append(time.perf_counter())
    import numpy as np
    specs = [record.spec for record in bundle.manifest.inputs]
    inputs = {spec.name: np.zeros((1, *spec.shape[1:]), spec.dtype) for spec in specs}
    next(iter(engine.session().render(inputs)))
    marks.append(time.perf_counter())
assert "torch" not in sys.modules
print(json.dumps([after - before for before, after in zip(marks, marks[1:])]))
"""


@click.command(epilog="Example:  python -m benchmarks.startup --runs 15 --json startup.json")
@click.option("--bundle", type=click.Path(path_type=Path), help="Default: the demo's.")
@click.option("--policy", default="async", show_default=True)
@click.option("--runs", type=click.IntRange(min=1), default=9, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(bundle: Path | None, policy: str, runs: int, json_path: Path | None) -> None:
    """Measure the way to the first frame in fresh processes."""
    path = demo_bundle().path if bundle is None else bundle
    samples = [measure_start(path, policy) for _ in range(runs)]
    figures = summarise(samples)
    print_figures(f"{path.name}, {policy}: to the first frame", figures)
    records = [figure.to_record() for figure in figures]
    write_record(json_path, "startup", bundle=path.name, policy=policy, figures=records, samples_s=samples)


def measure_start(bundle: Path, policy: str) -> dict[str, float]:
    """Answer one frame in a fresh process.

    Args:
        bundle: The bundle.
        policy: As people write it.

    Returns:
        Seconds of every stage in `STAGES`, and ``interpreter``: what the process took besides, its end included.
    """
    begin = time.perf_counter()
    # -P: a checkout's warpcache/ must not hide the installed package.
    command = [sys.executable, "-P", "-c", _CHILD, str(bundle), policy]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    taken = time.perf_counter() - begin
    if result.returncode:
        raise click.ClickException(f"the child process failed: {result.stderr.strip().splitlines()[-1]}")
    stages = dict(zip(STAGES, json.loads(result.stdout), strict=True))
    return {**stages, "interpreter": taken - sum(stages.values())}


def summarise(samples: list[dict[str, float]]) -> list[Figure]:
    """Medians of the stages and of their sum; the sum is what was promised."""
    totals = [sum(sample[stage] for stage in STAGES) for sample in samples]
    figures = [Figure("import + open to the first frame, median", float(np.median(totals)), TARGET_S, "s")]
    figures.append(Figure("the slowest run", max(totals), None, "s"))
    for stage in (*STAGES, "interpreter"):
        figures.append(Figure(stage, float(np.median([sample[stage] for sample in samples])), None, "s"))
    return figures


if __name__ == "__main__":
    main()
