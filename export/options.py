"""What a user may choose of a compile."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engine.errors import InputError
from ..engine.metrics.lpips import LPIPS_VARIABLE
from ..engine.promise.calibration import canonical_metric
from .adapter.distill import DistillOptions
from .adapter.layout import AdapterConfig
from .adapter.training import AdapterOptions
from .branches.branches import BranchOptions
from .cut.candidate import AUTO
from .promise.promise import PromiseOptions

__all__ = ["DEFAULT_STEPS", "CompileOptions"]

DEFAULT_STEPS = 3000
# Of the adapter's steps: a branch begins with the generator's own weights, and a step of it costs several of theirs.
_BRANCH_STEPS = 2 / 3


@dataclass(frozen=True)
class CompileOptions:
    """What a user may choose.

    Attributes:
        cut: "auto", or names of values or modules joined by commas.
        budget: The largest consumer's cost as a fraction of the generator's.
        steps: Training steps; 0 trains nothing.
        max_age: Ages 1..max_age are trained and calibrated.
        seed: Of the training.
        lpips: Weights file of LPIPS: used as a training loss and in the calibration.
        resume: Go on from the checkpoint of an interrupted compile of the same bundle.
        adapter: The adapter's size, instead of the largest that the budget allows; with exits a size a consumer, the
            largest first, all with the same encoding.
        train: What else the adapter's training takes, see `DistillOptions`.
        exits: How many exits to train, half of them (rounded up) consumers, the others branches, for a promise of
            quality; None: one consumer and no promise.
        metric: What quality is promised in, with exits: ``lpips``, ``flip``, ``psnr_db`` or ``ms_ssim``; None:
            ``lpips`` where its weights are given, else ``flip``.
        branch: Options of the branches, instead of the defaults: `BranchOptions`, or those of its fields that differ.
        branch_steps: Training steps of the branches; None: two thirds of `steps`.
        bank_size: Entries of a branch's guide bank; 0: none; None: as many as `BranchOptions` says.
        promise: How much is measured for the promise, instead of the defaults and `seed`.
        state: What the generator carries from frame to frame: output of a frame -> input of the next one. The first
            frame's value is the array of the input's name in the stream, or zeros.

    Raises:
        InputError: If a number is out of its range, a metric is unknown or cannot be measured, or options exclude
            each other.
    """

    cut: str = AUTO
    budget: float = 0.1
    steps: int = DEFAULT_STEPS
    max_age: int = 4
    seed: int = 0
    lpips: Path | None = None
    resume: bool = False
    adapter: AdapterConfig | Sequence[AdapterConfig] | None = None
    train: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    exits: int | None = None
    metric: str | None = None
    branch: BranchOptions | Mapping[str, Any] | None = None
    branch_steps: int | None = None
    bank_size: int | None = None
    promise: PromiseOptions | None = None
    state: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value, ok, range_ in (
            ("budget", self.budget, 0 < self.budget <= 1, "above 0 and at most 1"),
            ("steps", self.steps, self.steps >= 0, "0 or more"),
            ("max_age", self.max_age, self.max_age >= 1, "1 or more"),
            ("exits", self.exits, self.exits is None or self.exits >= 1, "1 or more"),
            ("branch_steps", self.branch_steps, self.branch_steps is None or self.branch_steps >= 1, "1 or more"),
            ("bank_size", self.bank_size, self.bank_size is None or self.bank_size >= 0, "0 or more"),
        ):
            if not ok:
                raise InputError(f"{name} is {value}; it must be {range_}")
        if self.metric is not None:
            object.__setattr__(self, "metric", canonical_metric(self.metric))
        if self.exits is None:
            self._refuse_without_exits()
        else:
            self._check_exits(self.exits)
        if self.state and self.exits is not None:
            raise InputError(
                f"{self.exits} exits were asked for of a generator that carries state, which a promise of quality does "
                "not cover yet; leave out --exits, or --state"
            )
        sizes = self.adapters
        if sizes and len(sizes) != self.consumers:
            raise InputError(
                f"adapter gives {len(sizes)} sizes for {self.consumers} consumers; give one a consumer, the largest "
                "first, or none"
            )
        if len({(size.stride, size.features, size.encoder_width) for size in sizes}) > 1:
            raise InputError(
                "the sizes in adapter differ in stride, features or encoder_width; consumers of one bundle read one "
                "encoding, so only width and blocks may differ"
            )

    @property
    def consumers(self) -> int:
        """How many warp consumers are trained."""
        return 1 if self.exits is None else (self.exits + 1) // 2

    @property
    def branches(self) -> int:
        """How many branches are trained."""
        return 0 if self.exits is None else self.exits // 2

    @property
    def adapters(self) -> tuple[AdapterConfig, ...]:
        """The consumers' sizes where they are given, the largest first."""
        if self.adapter is None:
            return ()
        return (self.adapter,) if isinstance(self.adapter, AdapterConfig) else tuple(self.adapter)

    @property
    def promised_metric(self) -> str:
        """What quality is promised in, by its name in `quality.METRICS`."""
        return self.metric or ("lpips" if self.lpips is not None else "flip")

    def adapter_options(self) -> AdapterOptions:
        """How the adapter is trained."""
        train = DistillOptions(steps=self.steps, max_age=self.max_age, seed=self.seed, **self.train)
        return AdapterOptions(train, self.budget, self.consumers, self.adapters, self.lpips)

    def branch_options(self) -> BranchOptions:
        """How the branches are trained.

        Raises:
            InputError: If there are none, or `branch` gives a field that is unknown or out of its range.
        """
        if isinstance(self.branch, BranchOptions):
            return self.branch
        fields: dict[str, Any] = {"count": self.branches, "seed": self.seed}
        fields["steps"] = max(1, round(self.steps * _BRANCH_STEPS)) if self.branch_steps is None else self.branch_steps
        if self.bank_size is not None:
            fields["bank_size"] = self.bank_size
        fields |= dict(self.branch or {})
        known = {field.name for field in dataclasses.fields(BranchOptions)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise InputError(f"branch holds {unknown[0]!r}, which no branch has; it takes {', '.join(sorted(known))}")
        return BranchOptions(**fields)

    def _refuse_without_exits(self) -> None:
        for name in ("metric", "branch", "branch_steps", "bank_size", "promise"):
            if getattr(self, name) is not None:
                raise InputError(f"{name} is given, but no exits that it is for; give exits (--exits N) too")

    def _check_exits(self, exits: int) -> None:
        if self.steps == 0:
            raise InputError(
                f"{exits} exits were asked for with 0 steps, but exits are trained; leave out --steps 0, or --exits"
            )
        if self.promised_metric == "lpips" and self.lpips is None:
            raise InputError(
                f"quality cannot be promised in lpips without its weights; give --lpips FILE or set {LPIPS_VARIABLE}, "
                "or choose another --metric"
            )
        if not self.branches:
            if self.branch is not None or self.branch_steps is not None or self.bank_size is not None:
                raise InputError("one exit is a consumer, so there are no branches to give options for; ask for more")
            return
        if isinstance(self.branch, BranchOptions) and (self.branch_steps, self.bank_size) != (None, None):
            raise InputError("branch is a whole BranchOptions, which says steps and bank_size itself; give those there")
        count = self.branch_options().count
        if count != self.branches:
            raise InputError(
                f"branch asks for {count} branches, but {exits} exits make it {self.branches}; leave count out"
            )
