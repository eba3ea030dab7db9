"""INT8 bundles on trial: written, measured against FP32, mended where the gate does not hold, and timed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

from gfldeploy.bundle import Bundle
from gfldeploy.errors import GfldeployError, ParityError
from gfldeploy.quant.artefacts import Quantized, write_artefacts
from gfldeploy.quant.calibration import ConvUse
from gfldeploy.quant.fallback import Step, affordable, fall_back, not_held
from gfldeploy.quant.gate import Limits, Measured, failure
from gfldeploy.quant.groups import groups
from gfldeploy.quant.measurement import Yardstick, int8_engines
from gfldeploy.quant.sensitivity import Sensitivity, macs_shares, measure_sensitivity, rows
from gfldeploy.quant.speed import Speed, measure_speed

__all__ = ["Outcome", "Trial", "Workbench"]

_ROWS_SHOWN = 10


@dataclass(frozen=True)
class Trial:
    """One INT8 bundle, not published yet: what it was made from, what is `kept` in float, what was measured of it."""

    quantized: Quantized
    kept: frozenset[ConvUse]
    bundle: Bundle
    engines: Mapping[str, Measured]


@dataclass(frozen=True)
class Outcome:
    """What is published: `groups` went back to float for it.

    `ranked`: the sensitivity of all groups, empty if it was not measured. `steps`: what was tried to hold the gate, the
    failure that began it first; empty if it held at once.
    """

    trial: Trial
    ranked: tuple[Sensitivity, ...] = ()
    groups: tuple[Sensitivity, ...] = ()
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Workbench:
    """Where INT8 bundles are made and measured against `source`, whatever method quantised them.

    `scratch`: a directory for all that is tried. `limits`: what a bundle may lose and be published.
    """

    source: Bundle
    yardstick: Yardstick
    limits: Limits
    scratch: Path
    threads: int
    report: Callable[[str], None]
    progress: Callable[[str, int, int], None]

    def trial(self, quantized: Quantized, kept: frozenset[ConvUse], label: str) -> Trial:
        """Write and measure a bundle with `kept` in float. Raises `EngineError`, and `ParityError` for NaN."""
        bundle = self._write(quantized, kept)
        return Trial(quantized, kept, bundle, self.yardstick.measure(bundle, label, self.progress))

    def settle(self, trial: Trial, fallback: bool, sensitivity: bool) -> Outcome:
        """The trial if the gate lets it pass, else, with `fallback`, one with more in float that does.

        `sensitivity`: rank the groups even if it passes. Raises why it does not: `EngineError`, `ParityError`.
        """
        problem = self._problem(trial)
        ranked: tuple[Sensitivity, ...] = ()
        mend = isinstance(problem, ParityError) and fallback
        if mend or sensitivity:
            if problem:
                self.report(f"the gate does not hold: {problem.problem}")
            ranked = self._rank(trial)
            for row in rows(ranked, None if sensitivity else _ROWS_SHOWN):
                self.report(f"  {row}")
        if problem is None:
            return Outcome(trial, ranked)
        if not mend:
            raise problem
        return self._mended(trial, problem, ranked)

    def speeds(self, trial: Trial) -> list[Speed]:
        """FP32, the trial and, if that keeps something in float, all in INT8, timed in each engine."""
        self.report("timing FP32 and INT8 interleaved")
        everything = self._write(trial.quantized, frozenset()) if trial.kept else None
        found = []
        for name in int8_engines():
            batch = self.yardstick.batches[0]
            found.append(measure_speed(name, self.source, trial.bundle, everything, batch, self.threads))
            for line in found[-1].lines():
                self.report(line)
        return found

    def _mended(self, trial: Trial, problem: GfldeployError, ranked: tuple[Sensitivity, ...]) -> Outcome:
        shares = macs_shares(self.source)
        trials = {}

        def attempt(chosen: tuple[Sensitivity, ...]) -> Step:
            label = f"{len(chosen)} {'group' if len(chosen) == 1 else 'groups'} in float"
            self.report(f"trying with {label}, {sum(one.macs_share for one in chosen):.1%} of the multiply-accumulates")
            kept = trial.kept.union(*(one.uses for one in chosen))
            try:
                trials[chosen] = self.trial(trial.quantized, kept, label)
            except ParityError as error:
                return Step(chosen, {}, error)
            step = Step(chosen, trials[chosen].engines, self._problem(trials[chosen]))
            if step.problem:
                shutil.rmtree(trials[chosen].bundle.directory)
            self.report(f"  {step.problem.problem if step.problem else 'the gate holds'}")
            return step

        able = affordable(ranked, sum(shares[use] for use in trial.kept))
        steps, found = fall_back(able, attempt)
        if found is None:
            raise not_held(problem, steps)
        self.report(f"kept in float to hold the gate: {', '.join(one.name for one in found.groups)}")
        before = Step((), trial.engines, problem)
        return Outcome(trials[found.groups], ranked, found.groups, (before, *steps))

    def _problem(self, trial: Trial) -> GfldeployError | None:
        return failure(trial.engines, self.yardstick.accuracy, self.limits, len(trial.kept))

    def _rank(self, trial: Trial) -> tuple[Sensitivity, ...]:
        self.report("measuring what INT8 does in each group of convolutions alone")
        calibration = trial.quantized.calibration.keeping(trial.kept)
        return measure_sensitivity(
            trial.quantized.source,
            calibration,
            groups(self.source.layers(), calibration.uses),
            self.yardstick,
            self.scratch,
            self.threads,
            self.progress,
        )

    def _write(self, quantized: Quantized, kept: frozenset[ConvUse]) -> Bundle:
        folder = Path(mkdtemp(dir=self.scratch))
        return write_artefacts(quantized, kept, folder)
