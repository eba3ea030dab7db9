"""INT8 bundles before they are published: written, measured against FP32, mended if the gate fails, and timed."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

from gfldeploy.accuracy import Accuracy
from gfldeploy.batching.buckets import Size, size_in_words
from gfldeploy.bundle import Bundle
from gfldeploy.errors import DataError, EngineError, GfldeployError, ParityError
from gfldeploy.progress import Progress
from gfldeploy.quant.artefacts import Quantized, write_artefacts
from gfldeploy.quant.calibration import ConvUse
from gfldeploy.quant.fallback import FallbackStep, affordable, fall_back, not_held
from gfldeploy.quant.gate import GateLimits, Int8Measurement, failure, unjudgeable
from gfldeploy.quant.groups import groups
from gfldeploy.quant.measurement import Fp32Reference, int8_engines
from gfldeploy.quant.sensitivity import Sensitivity, macs_shares, measure_sensitivity, rows
from gfldeploy.quant.speed import Speed, measure_speed

_ROWS_SHOWN = 10


@dataclass(frozen=True)
class EvaluatedBundle:
    """One INT8 bundle that is not published yet: its source, the uses `kept` in float, and the measurements."""

    quantized: Quantized
    kept: frozenset[ConvUse]
    bundle: Bundle
    engines: Mapping[str, Int8Measurement]


@dataclass(frozen=True)
class Evaluation:
    """The bundle to publish, and the `groups` that went back to float for it.

    `ranked`: the sensitivity of all groups, empty if it was not measured. `steps`: the first failure and then every
    attempt to pass the gate; empty if it passed at once.
    """

    evaluated: EvaluatedBundle
    ranked: tuple[Sensitivity, ...] = ()
    groups: tuple[Sensitivity, ...] = ()
    steps: tuple[FallbackStep, ...] = ()


@dataclass(frozen=True)
class SizeEvaluation:
    """What an INT8 bundle gave at another input size than its own, `size` (height, width) in pixels.

    `accuracy`: of FP32 at the same size, None without labels. `engines`: what was measured, empty if nothing could be.
    `problem`: why INT8 does not hold there, None if it does.
    """

    size: Size
    accuracy: Accuracy | None
    engines: Mapping[str, Int8Measurement]
    problem: GfldeployError | None


@dataclass(frozen=True)
class Evaluator:
    """Writes INT8 bundles of any method and measures them against FP32.

    `scratch`: a directory for all attempts. `limits`: what a bundle may lose and still be published.
    """

    fp32_reference: Fp32Reference
    limits: GateLimits
    scratch: Path
    progress: Progress

    def evaluate(self, quantized: Quantized, kept: frozenset[ConvUse], label: str) -> EvaluatedBundle:
        """Write and measure a bundle with `kept` in float. Raises `EngineError`, and `ParityError` for NaN."""
        bundle = self._write(quantized, kept)
        return EvaluatedBundle(quantized, kept, bundle, self.fp32_reference.measure(bundle, label, self.progress))

    def settle(self, evaluated: EvaluatedBundle, fallback: bool, sensitivity: bool) -> Evaluation:
        """The bundle if it passes the gate, otherwise, with `fallback`, one with more in float that does.

        `sensitivity`: rank the groups even if it passes. Raises the reason why it fails: `EngineError`, `ParityError`.
        """
        problem = self._problem(evaluated)
        ranked: tuple[Sensitivity, ...] = ()
        mend = isinstance(problem, ParityError) and fallback
        if mend or sensitivity:
            if problem:
                self.progress.stage(f"the gate does not hold: {problem.problem}")
            ranked = self._rank(evaluated)
            for row in rows(ranked, None if sensitivity else _ROWS_SHOWN):
                self.progress.stage(f"  {row}")
        if problem is None:
            return Evaluation(evaluated, ranked)
        if not mend:
            raise problem
        return self._mended(evaluated, problem, ranked)

    def at_size(self, evaluated: EvaluatedBundle, size: Size, images: Sequence[Path]) -> SizeEvaluation:
        """Judge the bundle, as it is, at another input size by the same gate, against FP32 at that size.

        `images`: those whose detections are compared.
        """
        reference, accuracy = self.fp32_reference, None
        engines: Mapping[str, Int8Measurement] = {}
        label = size_in_words(size)
        self.progress.stage(f"judging INT8 at {label}")
        try:
            source = reference.source.at_size(size)
            where = self.progress, reference.cluster
            reference = Fp32Reference.of(source, images, reference.dataset, reference.threads, *where)
            accuracy = reference.accuracy
            problem = unjudgeable(reference.detections, accuracy, self.limits) or self._too_few(reference)
            if problem is None:
                engines = reference.measure(evaluated.bundle.at_size(size), f"INT8 at {label}", self.progress)
                problem = failure(engines, accuracy, self.limits, len(evaluated.kept))
        except (DataError, EngineError, ParityError) as error:  # an image too elongated for a small size, for one
            problem = error
        return SizeEvaluation(size, accuracy, engines, problem)

    def _too_few(self, reference: Fp32Reference) -> DataError | None:
        """Why FP32's detections at another size say nothing there, or None.

        If all n of them are found again, the share that is lost is below 3/n with 95% confidence (the rule of three):
        of 30 detections a tenth.
        """
        lost = 1 - self.limits.min_agreement
        if reference.accuracy is not None or lost == 1 or reference.detections >= round(3 / max(lost, 0.1)):
            return None
        return DataError(
            f"FP32 itself has {reference.detections} detections on the calibration images there, too few to judge INT8",
            "Give labels with --eval-data, or more calibration images.",
        )

    def speeds(self, evaluated: EvaluatedBundle) -> list[Speed]:
        """FP32, the bundle and, if that keeps something in float, all in INT8, timed in each engine."""
        self.progress.stage("timing FP32 and INT8 interleaved")
        everything = self._write(evaluated.quantized, frozenset()) if evaluated.kept else None
        fp32, found = self.fp32_reference, []
        for name in int8_engines():
            bundles = (fp32.source, evaluated.bundle, everything)
            found.append(measure_speed(name, *bundles, fp32.batches[0], fp32.threads))
            for line in found[-1].lines():
                self.progress.stage(line)
        return found

    def _mended(self, start: EvaluatedBundle, problem: GfldeployError, ranked: tuple[Sensitivity, ...]) -> Evaluation:
        shares = macs_shares(self.fp32_reference.source)
        tried: dict[tuple[Sensitivity, ...], EvaluatedBundle] = {}

        def attempt(chosen: tuple[Sensitivity, ...]) -> FallbackStep:
            label = f"{len(chosen)} {'group' if len(chosen) == 1 else 'groups'} in float"
            self.progress.stage(
                f"trying with {label}, {sum(one.macs_share for one in chosen):.1%} of the multiply-accumulates"
            )
            kept = start.kept.union(*(one.uses for one in chosen))
            try:
                tried[chosen] = self.evaluate(start.quantized, kept, label)
            except ParityError as error:
                return FallbackStep(chosen, {}, error)
            step = FallbackStep(chosen, tried[chosen].engines, self._problem(tried[chosen]))
            if step.problem:
                shutil.rmtree(tried[chosen].bundle.directory)
            self.progress.stage(f"  {step.problem.problem if step.problem else 'the gate holds'}")
            return step

        able = affordable(ranked, sum(shares[use] for use in start.kept))
        steps, found = fall_back(able, attempt)
        if found is None:
            raise not_held(problem, steps)
        self.progress.stage(f"kept in float to hold the gate: {', '.join(one.name for one in found.groups)}")
        before = FallbackStep((), start.engines, problem)
        return Evaluation(tried[found.groups], ranked, found.groups, (before, *steps))

    def _problem(self, evaluated: EvaluatedBundle) -> GfldeployError | None:
        return failure(evaluated.engines, self.fp32_reference.accuracy, self.limits, len(evaluated.kept))

    def _rank(self, evaluated: EvaluatedBundle) -> tuple[Sensitivity, ...]:
        self.progress.stage("measuring what INT8 does in each group of convolutions alone")
        calibration = evaluated.quantized.calibration.keeping(evaluated.kept)
        source = evaluated.quantized.source
        named = groups(source.layers(), calibration.uses)
        return measure_sensitivity(source, calibration, named, self.fp32_reference, self.scratch, self.progress)

    def _write(self, quantized: Quantized, kept: frozenset[ConvUse]) -> Bundle:
        return write_artefacts(quantized, kept, Path(mkdtemp(dir=self.scratch)))
