"""What `gfldeploy quantize` refuses to publish, and what `--algo auto` chooses."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import demo_bundles
import numpy as np
import pytest
from demo_bundles import RunHere
from recorded_progress import RecordedProgress

from gfldeploy.accuracy import Accuracy
from gfldeploy.bundle import Bundle, Graph, GraphName
from gfldeploy.cli import main
from gfldeploy.engines.registry import capability
from gfldeploy.errors import DataError, EngineError, GfldeployError, ParityError, UnsupportedError
from gfldeploy.files import sha256, write_json
from gfldeploy.images.coco import CocoDataset
from gfldeploy.inspection import int8_lines
from gfldeploy.quant import evaluation, quantizer
from gfldeploy.quant.agreement import Agreement
from gfldeploy.quant.artefacts import GRAPHS, Quantized
from gfldeploy.quant.calibration import ConvUse, OutputRange
from gfldeploy.quant.gate import SIMULATED_TENSORRT, Candidate, GateLimits, Int8Measurement, best, failure, unjudgeable
from gfldeploy.quant.measurement import Fp32Reference, int8_engines
from gfldeploy.quant.methods import METHODS
from gfldeploy.quant.quantizer import quantize_bundle
from gfldeploy.quant.samples import digests, evaluation_record, refuse_overlap, spread
from gfldeploy.quant.sensitivity import Sensitivity
from gfldeploy.quant.speed import Speed

LIMITS = GateLimits(max_drop=0.005, min_agreement=0.9)


def accuracy(ap: float) -> Accuracy:
    return Accuracy(ap, ap, ap, ap, ap, ap, images=10, detections=100)


def measured(
    ap: float | None = None, found: float = 1.0, difference: float = 1e-3, ran: Mapping[str, int] | None = None
) -> Int8Measurement:
    ran = {"int8": 57} if ran is None else ran
    return Int8Measurement(Agreement(difference, 0.1, 40, found, ran), None if ap is None else accuracy(ap))


def both(onnxruntime: Int8Measurement, paddle: Int8Measurement) -> dict[str, Int8Measurement]:
    return {"onnxruntime": onnxruntime, "paddle": paddle}


# --- decisions --------------------------------------------------------------------------------------------------------


def test_a_drop_in_one_engine_names_everything_one_needs() -> None:
    fp32 = accuracy(0.868)
    assert failure(both(measured(0.8635), measured(0.9)), fp32, LIMITS) is None
    assert failure(both(measured(0.863), measured(0.863)), accuracy(0.863), GateLimits(max_drop=0.0)) is None
    problem = failure(both(measured(0.8635), measured(0.8557)), fp32, LIMITS)
    assert isinstance(problem, ParityError)
    assert str(problem).startswith(
        "INT8 in paddle loses 0.0123 mAP (FP32 0.8680, INT8 0.8557), more than the 0.005 of --max-drop. Try another"
    )
    for word in ("--algo", "--samples", "images like those you deploy on"):
        assert word in (problem.remedy or "")


def test_labels_decide_where_there_are_labels() -> None:
    lost, good = measured(0.9, found=0.2), measured(0.9)
    assert failure(both(lost, good), accuracy(0.9), LIMITS) is None
    problem = failure(both(measured(found=0.2), measured()), None, LIMITS)
    assert isinstance(problem, ParityError)
    assert "INT8 in onnxruntime finds only 20.0% of what FP32 finds" in str(problem)
    assert failure(both(measured(found=0.9), measured()), None, LIMITS) is None
    assert failure(both(measured(found=0.0), measured()), None, replace(LIMITS, min_agreement=0.0)) is None
    with pytest.raises(ValueError, match="not in every INT8 engine"):
        failure(both(measured(0.9), measured()), accuracy(0.9), LIMITS)


@pytest.mark.parametrize(
    ("ran", "refused"),
    [
        ({"int8": 57}, False),
        ({"int8": 90, "fp32": 10}, False),
        ({"int8": 89, "fp32": 11}, True),
        ({"fp32": 57}, True),
        ({}, False),  # an engine that cannot tell
    ],
)
def test_most_convolutions_must_run_in_int8(ran: dict[str, int], refused: bool) -> None:
    problem = failure(both(measured(0.9), measured(0.9, ran=ran)), accuracy(0.9), LIMITS)
    assert isinstance(problem, EngineError) == refused
    if refused:
        ratio = f"{ran.get('int8', 0)} of {sum(ran.values())}"
        assert f"paddle runs only {ratio} convolutions in int8 ({ran['fp32']} in fp32)" in str(problem)


@pytest.mark.parametrize(("ran", "refused"), [({"int8": 45, "fp32": 12}, False), ({"int8": 40, "fp32": 17}, True)])
def test_what_is_float_on_purpose_is_not_missed(ran: dict[str, int], refused: bool) -> None:
    problem = failure(both(measured(ran=ran), measured(ran=ran)), None, LIMITS, kept=12)
    assert isinstance(problem, EngineError) == refused
    assert isinstance(failure(both(measured(ran=ran), measured(ran=ran)), None, LIMITS), EngineError)
    if refused:
        assert "runs only 40 of 57 convolutions in int8 (17 in fp32, 12 of them on purpose): 90% of the rest" in str(
            problem
        )


def test_the_simulation_is_called_one() -> None:
    engines = both(measured(0.9), measured(0.9)) | {SIMULATED_TENSORRT: measured(0.8, found=0.5, ran={})}
    told = str(failure(engines, accuracy(0.9), LIMITS))
    assert told.startswith("INT8 in tensorrt, simulated by ONNX Runtime on the CPU, loses 0.1000 mAP")
    unlabelled = {name: replace(one, accuracy=None) for name, one in engines.items()}
    assert "INT8 in tensorrt, simulated by ONNX Runtime on the CPU, finds only 50.0%" in str(
        failure(unlabelled, None, LIMITS)
    )


def test_images_that_judge_nothing() -> None:
    assert unjudgeable(3, None, LIMITS) is None
    assert unjudgeable(0, accuracy(0.5), LIMITS) is None
    assert unjudgeable(0, None, replace(LIMITS, min_agreement=0.0)) is None
    assert "detects nothing on the calibration images" in str(unjudgeable(0, None, LIMITS))
    for ap in (0.0, -1.0):
        assert "reaches mAP 0.0000 on the evaluation images" in str(unjudgeable(9, accuracy(ap), LIMITS))


@pytest.mark.parametrize("limits", [{"max_drop": -0.1}, {"max_drop": float("nan")}, {"min_agreement": 1.1}])
def test_limits_are_shares(limits: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="from 0 to 1"):
        GateLimits(**limits)


# --- the choice -------------------------------------------------------------------------------------------------------


def candidate(name: str, *engines: Int8Measurement, error: GfldeployError | None = None) -> Candidate:
    return Candidate(name, dict(zip(("onnxruntime", "paddle"), engines, strict=False)), error)


FAILED = candidate("KL", error=EngineError("no memory"))


@pytest.mark.parametrize(
    ("candidates", "fp32", "wanted"),
    [
        # the worse of the two engines counts
        ([("a", measured(0.9), measured(0.5)), ("b", measured(0.7), measured(0.7))], 0.9, "b"),
        # of equals the first, which is the cheaper one
        ([("a", measured(0.7), measured(0.8)), ("b", measured(0.8), measured(0.7))], 0.9, "a"),
        ([("a", measured(), measured(found=0.8)), ("b", measured(found=0.9), measured(found=0.9))], None, "b"),
        ([("a", measured(difference=2e-3), measured()), ("b", measured(), measured())], None, "b"),
        # one that may be published before a better one that may not
        ([("a", measured(0.9), measured(0.9, ran={"fp32": 9})), ("b", measured(0.898), measured(0.898))], 0.9, "b"),
    ],
)
def test_the_best_is_chosen(candidates: list[Any], fp32: float | None, wanted: str) -> None:
    made = [candidate(name, *engines) for name, *engines in candidates]
    assert best([FAILED, *made], accuracy(fp32) if fp32 else None, LIMITS).algorithm == wanted


def test_nothing_to_choose_from() -> None:
    with pytest.raises(EngineError, match="no memory"):
        best([FAILED, candidate("mse", error=ParityError("NaN"))], None, LIMITS)


# --- algorithms -------------------------------------------------------------------------------------------------------


def test_algorithms_and_why_one_does_not_run() -> None:
    method = METHODS["ptq"]
    assert method.algorithms_of("mse") == ("mse",)
    assert method.algorithms_of("auto") == method.auto
    assert method.algorithms_of(None) == ("hist",)
    assert set(method.auto) <= set(method.algorithms)
    assert not set(method.unusable) & set(method.algorithms)
    with pytest.raises(UnsupportedError, match=r"min_max does not quantise on this stack: .* FP32") as caught:
        method.algorithms_of("min_max")
    assert "Use abs_max" in str(caught.value)
    with pytest.raises(UnsupportedError, match=r"no algorithm 'magic'.* Choose from: auto, hist"):
        method.algorithms_of("magic")


# --- images -----------------------------------------------------------------------------------------------------------


def test_calibration_images_are_not_evaluated_on(tiny_coco: Path, tmp_path: Path) -> None:
    dataset = CocoDataset.load(tiny_coco)
    paths = [image.path for image in dataset.images]
    copies = [Path(shutil.copy(path, tmp_path / f"copy{path.name}")) for path in paths[1:4]]
    with pytest.raises(DataError, match=r"3 of the 6 evaluation images are calibration images too, the first 2\.jpg"):
        refuse_overlap(digests(copies), digests(paths))
    refuse_overlap({}, digests(paths))
    refuse_overlap(digests(copies), digests(paths[:1]))
    with pytest.raises(DataError, match=r"cannot read .*gone"):
        digests([tmp_path / "gone.jpg"])


def test_what_was_evaluated_on_is_recorded(tmp_path: Path) -> None:
    for name, content in {"a.jpg": b"a", "b.jpg": b"b", "labels.json": b"{}"}.items():
        (tmp_path / name).write_bytes(content)
    images = digests([tmp_path / "b.jpg", tmp_path / "a.jpg"])
    record = evaluation_record(tmp_path / "labels.json", images)
    together = hashlib.sha256("".join(f"{digest}\n" for digest in sorted(images)).encode()).hexdigest()
    assert record == {
        "annotations_sha256": sha256(tmp_path / "labels.json"),
        "images_sha256": together,
        "images": 2,
    }
    assert evaluation_record(None, dict(reversed(images.items()))) == {**record, "annotations_sha256": None}


def test_spread(tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(10)]
    assert spread(paths, 3) == [paths[0], paths[3], paths[6]]
    assert spread(paths[:2], 3) == paths[:2]
    assert spread([], 3) == []


# --- the whole, without PaddleSlim ------------------------------------------------------------------------------------


EMPTY_PROGRAM = b"\x0a\x04\x08\x00\x10\x00"  # one block, number 0 of parent 0


def algorithm_of(bundle: Bundle) -> str:
    calibration = bundle.directory / "calibration.json"
    return str(json.loads(calibration.read_text())["algorithm"])


Arguments = dict[str, Any]


@pytest.fixture
def tiny(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Arguments:
    """Arguments of `quantize_bundle` that pass every check; what needs Paddle is replaced."""
    pytest.importorskip("onnxruntime")
    source = Path(shutil.copytree(tiny_bundle, tmp_path / "source"))
    (source / "paddle").mkdir()
    for name, content in (("model.pdmodel", EMPTY_PROGRAM), ("model.pdiparams", b"")):
        (source / "paddle" / name).write_bytes(content)
    (source / "infer_cfg.yml").write_bytes(b"x")
    write_json(source / "layers.json", {"weights": "head.conv"})
    manifest = json.loads((source / "manifest.json").read_text())
    manifest["graphs"]["paddle_program"] = {"model": "paddle/model.pdmodel", "params": "paddle/model.pdiparams"}
    for path in source.rglob("*"):
        if path.is_file() and path.name != "manifest.json":
            record = {"sha256": sha256(path), "bytes": path.stat().st_size}
            manifest["files"][path.relative_to(source).as_posix()] = record
    write_json(source / "manifest.json", manifest)

    def write(quantized: Quantized, kept: Any, directory: Path) -> Bundle:
        calibration = quantized.calibration.keeping(kept)
        write_json(directory / "calibration.json", calibration.to_dict())
        for name, graph in GRAPHS.items():
            (directory / graph.model).parent.mkdir(exist_ok=True)
            original: GraphName = "paddle_program" if name == "paddle_program" else "onnx"
            shutil.copyfile(quantized.source.graph(original)[0], directory / graph.model)
            if graph.params:
                (directory / graph.params).write_bytes(b"")
        return Bundle(directory, replace(quantized.source.manifest, precision="int8", graphs=GRAPHS, files={}))

    def speed(name: str, fp32: Bundle, int8: Bundle, all_int8: Bundle | None, *rest: Any) -> Speed:
        return Speed(name, 30.0, 10.0, 9.0 if all_int8 else None)

    monkeypatch.setattr(quantizer, "require", lambda *arguments: None)
    monkeypatch.setitem(METHODS, "ptq", replace(METHODS["ptq"], calibrate=lambda *arguments: {"weights": (3.0,)}))
    monkeypatch.setattr(evaluation, "write_artefacts", write)
    monkeypatch.setattr(evaluation, "measure_speed", speed)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(3):
        assert cv2.imwrite(str(pictures / f"{number}.png"), np.full((48, 80, 3), 50 * number, np.uint8))
    return {"bundle": source, "data": pictures, "samples": 3, "output": tmp_path / "out", "algo": "auto"}


def with_results(
    monkeypatch: pytest.MonkeyPatch, results: Mapping[str, dict[str, Int8Measurement] | GfldeployError]
) -> None:
    def measure(self: Fp32Reference, bundle: Bundle, label: str, progress: Any) -> dict[str, Int8Measurement]:
        assert algorithm_of(bundle) == label
        result = results[label]
        if isinstance(result, GfldeployError):
            raise result
        return result

    monkeypatch.setattr(Fp32Reference, "measure", measure)


def test_auto_publishes_the_best_and_the_table(
    tiny: Arguments,
    tiny_coco: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    results: dict[str, dict[str, Int8Measurement] | GfldeployError] = {
        "hist": both(measured(0.9), measured(0.997)),
        "avg": both(measured(0.996), measured(0.998)),
        "abs_max": EngineError("out of luck"),
        "mse": both(measured(0.999), measured(0.2)),
    }
    assert tuple(results) == METHODS["ptq"].auto
    with_results(monkeypatch, results)
    made = quantize_bundle(**tiny, eval_data=tiny_coco)
    assert made.manifest.provenance["quantized"]["algorithm"] == "avg"
    assert made.manifest.graphs["onnx"] == Graph("onnx/model.onnx")
    assert made.manifest.graphs["end_to_end"] == Graph("onnx/end_to_end.onnx") and not made.manifest.left_out
    assert algorithm_of(made) == "avg"
    assert {path.name for path in made.directory.iterdir()} == {
        "calibration.json",
        "golden",
        "infer_cfg.yml",
        "layers.json",
        "manifest.json",
        "onnx",
        "paddle",
        "parity.json",
    }
    parity = json.loads((made.directory / "parity.json").read_text())
    assert parity["accuracy"]["fp32"]["ap"] == pytest.approx(1)
    assert parity["accuracy"]["engines"]["onnxruntime"]["ap"] == 0.996
    assert parity["algorithms"]["chosen"] == "avg"
    assert parity["evaluation"]["images"] == 6
    assert parity["evaluation"]["annotations_sha256"] == sha256(tiny_coco)
    assert parity["speed"]["paddle"]["ratio"] == 3
    assert not {"kept_float", "fallback"} & set(parity)
    table = {one["algorithm"]: one for one in parity["algorithms"]["tried"]}
    assert tuple(table) == tuple(results)
    assert table["abs_max"]["error"] == "out of luck"
    assert table["mse"]["engines"]["paddle"]["ap"] == 0.2
    assert int8_lines(parity)[1] == (
        "paddle: 57 of 57 convolutions in int8, 100.0% of 40 FP32 detections found again, "
        "mAP 0.9980 (FP32 1.0000) on 6 images, 3.00 times as fast as FP32 (10.0 ms, FP32 30.0 ms)"
    )
    assert int8_lines({"comparisons": []}) == []


def test_other_input_sizes_are_judged_as_the_own_one(
    tiny: Arguments, tiny_coco: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(self: Fp32Reference, bundle: Bundle, label: str, progress: Any) -> dict[str, Int8Measurement]:
        size = bundle.manifest.preprocess.target_size
        assert self.source.manifest.preprocess.target_size == size
        assert self.batches[0].shape[2] == size[0] and self.accuracy is not None
        if size == (64, 160):
            raise EngineError("out of luck")
        lost = {(64, 96): 0.0, (64, 128): 0.004, (64, 112): 0.006}[size]
        return both(measured(self.accuracy.ap), measured(self.accuracy.ap - lost))

    monkeypatch.setattr(Fp32Reference, "measure", measure)
    progress = RecordedProgress()
    sizes = ((64, 128), (64, 96), (64, 112), (64, 160), (32, 64), (64, 128))
    made = quantize_bundle(**{**tiny, "algo": "hist"}, eval_data=tiny_coco, input_sizes=sizes, progress=progress)
    assert made.manifest.preprocess.target_size == (64, 96)
    parity = made.record("parity.json")
    assert parity is not None
    wide, narrow, wider, small = parity["sizes"]
    assert [one["size"] for one in parity["sizes"]] == [[64, 128], [64, 112], [64, 160], [32, 64]]
    assert wide["problem"] is None
    assert wide["accuracy"]["fp32"]["ap"] - wide["accuracy"]["engines"]["paddle"]["ap"] == pytest.approx(0.004)
    assert "INT8 in paddle loses 0.0060 mAP" in narrow["problem"]
    assert (wider["problem"], wider["engines"]) == ("out of luck", {})
    assert "FP32 itself reaches mAP 0.0000" in small["problem"]
    told = int8_lines(parity)[-4:]
    assert told[0].startswith("at 64x128 INT8 holds: mAP onnxruntime ") and "on 6 images" in told[0]
    assert told[1] == f"at 64x112 INT8 does not hold: {narrow['problem']}"
    assert told[0] in progress.stages and progress.notes == told[1:]


def test_a_size_at_which_fp32_sees_next_to_nothing_judges_no_int8(
    tiny: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    def detections(count: int) -> Any:
        monkeypatch.setattr(Fp32Reference, "detections", count)
        made = quantize_bundle(**{**tiny, "algo": "hist"}, min_agreement=0.8, input_sizes=((64, 128),), force=True)
        parity = made.record("parity.json")
        assert parity is not None
        return parity["sizes"][0]["problem"]

    monkeypatch.setattr(Fp32Reference, "measure", lambda *given: both(measured(None), measured(None)))
    assert "FP32 itself has 14 detections on the calibration images there, too few to judge INT8" in detections(14)
    assert detections(15) is None


# --- the fallback -----------------------------------------------------------------------------------------------------

USES = {name: ConvUse(name, 0) for name in ("stem", "res", "neck", "head")}


@pytest.fixture
def four(tiny: Arguments, monkeypatch: pytest.MonkeyPatch) -> Arguments:
    """With four convolutions, of which INT8 in `neck` and in `res` loses too much; `head` has most of the work."""
    layers = {name: f"model.{name}" for name in USES}
    write_json(tiny["bundle"] / "layers.json", layers)
    manifest = json.loads((tiny["bundle"] / "manifest.json").read_text())
    path = tiny["bundle"] / "layers.json"
    manifest["files"]["layers.json"] = {"sha256": sha256(path), "bytes": path.stat().st_size}
    write_json(tiny["bundle"] / "manifest.json", manifest)
    shares = dict(zip(USES.values(), (0.1, 0.1, 0.2, 0.6), strict=True))

    def rank(source: Bundle, calibration: Any, found: Any, *rest: Any) -> tuple[Sensitivity, ...]:
        order = ("head", "neck", "res", "stem")
        return tuple(
            Sensitivity(f"model.{name}", frozenset({USES[name]}), shares[USES[name]], 0.1, 0.1)
            for name in order
            if USES[name] not in calibration.kept_float
        )

    def measure(self: Fp32Reference, bundle: Bundle, label: str, progress: Any) -> dict[str, Int8Measurement]:
        kept = {name for name, _ in json.loads((bundle.directory / "calibration.json").read_text())["kept_float"]}
        found = 1 - 0.3 * len({"neck", "res"} - kept)
        ran = {"int8": 4 - len(kept), "fp32": len(kept)}
        return both(measured(found=found, ran=ran), measured(found=found, ran=ran))

    method = replace(METHODS["ptq"], calibrate=lambda *arguments: dict.fromkeys(USES, (3.0,)))
    monkeypatch.setitem(METHODS, "ptq", method)
    outputs = dict.fromkeys(USES, (OutputRange(-5, 49),))
    monkeypatch.setattr(quantizer, "observe_outputs", lambda *arguments: outputs)
    monkeypatch.setattr(quantizer, "weight_ranges", lambda *arguments: dict.fromkeys(USES, (0.005,) * 6))
    for module in (quantizer, evaluation):
        monkeypatch.setattr(module, "macs_shares", lambda source: shares)
    monkeypatch.setattr(evaluation, "measure_sensitivity", rank)
    monkeypatch.setattr(Fp32Reference, "measure", measure)
    return {**tiny, "algo": "hist"}


def test_the_most_sensitive_go_back_to_float(four: Arguments) -> None:
    progress = RecordedProgress()
    made = quantize_bundle(**four, progress=progress)
    kept = json.loads((made.directory / "calibration.json").read_text())["kept_float"]
    assert kept == [["neck", 0], ["res", 0]], "head alone has more than half of the work"
    assert [one.partition(":")[0] for one in progress.notes] == [
        "INT8 is fitted to 3 images, and judged by nothing else"
    ]
    parity = json.loads((made.directory / "parity.json").read_text())
    assert parity["kept_float"] == [
        {"name": f"model.{name}", "convolutions": 1, "why": "to hold the gate"} for name in ("neck", "res")
    ]
    fallback = parity["fallback"]
    assert fallback["before"]["worst_detections_found"] == pytest.approx(0.4)
    assert [(step["groups"], step["holds"]) for step in fallback["steps"]] == [
        (["model.neck"], False),
        (["model.neck", "model.res"], True),
    ]
    assert fallback["cost"]["paddle"] == {"all_int8_ms": 9.0, "int8_ms": 10.0}
    ranking = json.loads((made.directory / "sensitivity.json").read_text())["groups"]
    assert [one["name"] for one in ranking] == ["model.head", "model.neck", "model.res", "model.stem"]
    assert "paddle: the layers in float make it 10.0 ms an image, instead of 9.0 ms" in progress.stages
    assert "kept in float to hold the gate: model.neck, model.res" in progress.stages
    assert not (made.directory / "work").exists()


def test_what_was_asked_for_stays_in_float(four: Arguments) -> None:
    made = quantize_bundle(**four, keep_float=("*.res",))
    parity = json.loads((made.directory / "parity.json").read_text())
    assert [(one["name"], one["why"]) for one in parity["kept_float"]] == [
        ("model.res", "asked for"),
        ("model.neck", "to hold the gate"),
    ]
    made = quantize_bundle(**four, keep_float=("*.res", "model.neck"), force=True)
    parity = json.loads((made.directory / "parity.json").read_text())
    assert {one["why"] for one in parity["kept_float"]} == {"asked for"}
    assert "fallback" not in parity
    assert parity["speed"]["paddle"]["all_int8_ms"] == 9.0
    with pytest.raises(UnsupportedError, match="no convolution to run in INT8"):
        quantize_bundle(**four, keep_float=("*",), force=True)
    with pytest.raises(DataError, match="no layer and no group is called tail"):
        quantize_bundle(**four, keep_float=("tail",), force=True)


@pytest.mark.parametrize(
    ("changes", "message", "ranked"),
    [
        ({"fallback": False}, r"finds only 40\.0% of what FP32 finds.* --min-agreement\. Try", False),
        ({"fallback": False, "sensitivity": True}, r"finds only 40\.0%", True),
        # With head in float, which is 60 % of the work, nothing else may be.
        ({"keep_float": ("*.head",)}, r"finds only 40\.0%.*and no group can go back to float", True),
    ],
)
def test_when_nothing_goes_back(changes: dict[str, Any], message: str, ranked: bool, four: Arguments) -> None:
    progress = RecordedProgress()
    with pytest.raises(ParityError, match=message):
        quantize_bundle(**four, **changes, progress=progress)
    assert not four["output"].exists()
    assert bool([line for line in progress.stages if line.split()[0] == "model.neck"]) == ranked


def test_the_ranking_can_be_had_without_need(four: Arguments) -> None:
    made = quantize_bundle(**four, sensitivity=True, min_agreement=0.0)
    assert (made.directory / "sensitivity.json").is_file()
    assert "fallback" not in json.loads((made.directory / "parity.json").read_text())


def test_an_engine_without_int8_is_not_mended(four: Arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    with_results(monkeypatch, {"hist": both(measured(ran={"int8": 1, "fp32": 3}), measured(found=0.1))})
    progress = RecordedProgress()
    with pytest.raises(EngineError, match="runs only 1 of 4"):
        quantize_bundle(**four, progress=progress)
    assert not [line for line in progress.stages if "alone" in line]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hist": both(measured(), measured(found=0.5))}, "INT8 in paddle finds only 50.0%"),
        ({"hist": both(measured(ran={"int8": 1, "fp32": 3}), measured())}, "onnxruntime runs only 1 of 4"),
        ({"hist": ParityError("the quantised graph gives NaN")}, "gives NaN"),
    ],
)
def test_what_fails_is_not_published(
    changes: Any, message: str, tiny: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_results(monkeypatch, changes)
    with pytest.raises(GfldeployError, match=message) as caught:
        quantize_bundle(**{**tiny, "algo": "hist"}, fallback=False)
    assert caught.value.remedy or "NaN" in message
    assert {path.name for path in tiny["output"].parent.iterdir()} == {"source", "pictures"}


def test_evaluation_data_are_checked_before_the_work(tiny: Arguments, tiny_coco: Path, tmp_path: Path) -> None:
    progress = RecordedProgress()
    seen: Arguments = {**tiny, "data": tiny_coco, "samples": 2, "eval_data": tiny_coco, "progress": progress}
    with pytest.raises(DataError, match=r"2 of the 6 evaluation images are calibration images too, the first 1\.jpg"):
        quantize_bundle(**seen)
    content = json.loads(tiny_coco.read_text())
    content["categories"] = [{**content["categories"][0], "name": "unknown"}]
    known = content["categories"][0]["id"]
    content["annotations"] = [one for one in content["annotations"] if one["category_id"] == known]
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content))
    images = tiny_coco.parent / "images"
    with pytest.raises(DataError, match="the model has 2 classes, the annotations 1"):
        quantize_bundle(**tiny, eval_data=other, eval_images=images, progress=progress)
    assert all("calibration images" in line for line in progress.stages), "nothing but reading the images was begun"


def test_a_processor_without_vnni_is_told_first(
    tiny: Arguments, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    slow = "this CPU has neither VNNI nor AMX"
    monkeypatch.setattr(quantizer, "capability", lambda *what: replace(capability(*what), note=slow))
    progress = RecordedProgress()
    (tiny["data"] / "0.png").write_bytes(b"no image")
    with pytest.raises(DataError):
        quantize_bundle(**tiny, progress=progress)
    assert progress.notes == [slow]
    assert len(progress.stages) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--algo", "min_max"), "min_max does not quantise on this stack"),
        (("--algo", "magic"), "no algorithm 'magic'"),
        (("--max-drop", 0.01), "--max-drop needs --eval-data"),
        (("--eval-limit", 3), "--eval-limit needs --eval-data"),
        (("--eval-data", "COCO", "--min-agreement", 0.5), "With it, use --max-drop"),
        (("--max-drop", 2), "2.0 is not in the range 0<=x<=1"),
        (("--eval-data", "nowhere.json"), "nowhere.json cannot be read"),
    ],
)
def test_options_that_make_no_sense(
    options: tuple[object, ...], message: str, tiny_bundle: Path, tiny_coco: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = [tiny_coco if option == "COCO" else option for option in options]
    arguments = ("quantize", tiny_bundle, "--data", tiny_coco, "--samples", 1, "-o", "out", *given)
    with pytest.raises(SystemExit) as stopped:
        main(list(map(str, arguments)))
    assert message in demo_bundles.refusal_in(stopped.value.code, *capfd.readouterr())
    assert not Path("out").exists()


# --- the demo detector ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_good_calibration_passes_and_is_shown(calibrated: Path, run_here: RunHere) -> None:
    parity = json.loads((calibrated / "parity.json").read_text())
    assert parity["accuracy"]["fp32"]["images"] == demo_bundles.EVALUATED
    for name, one in parity["engines"].items():
        assert one["detections_found"] > 0.9, name
        assert list(one["convolutions"]) == (["int8"] if name in int8_engines() else [])
    sheet = run_here("inspect", calibrated).stdout
    assert " convolutions in int8, " in sheet
    assert f"mAP {parity['accuracy']['engines']['paddle']['ap']:.4f}" in sheet
    (small,) = parity["sizes"]
    assert (small["size"], small["problem"]) == ([256, 384], None)
    assert small["engines"].keys() == small["accuracy"]["engines"].keys() == {*int8_engines(), SIMULATED_TENSORRT}
    for name in int8_engines():
        assert small["engines"][name]["convolutions"] == parity["engines"][name]["convolutions"]
    assert 0 < small["accuracy"]["fp32"]["ap"] != parity["accuracy"]["fp32"]["ap"]
    assert "at 256x384 INT8 holds: mAP " in sheet


@pytest.mark.slow
@demo_bundles.needs_quant
def test_calibration_on_black_images_is_caught(
    labelled: Path, trained: Path, tmp_path: Path, run_here: RunHere
) -> None:
    black = tmp_path / "black"
    black.mkdir()
    for number in range(2):
        assert cv2.imwrite(str(black / f"{number}.png"), np.zeros((320 + number, 320, 3), np.uint8))
    sabotage = ("quantize", trained, "--data", black, "--samples", 2, "-o", tmp_path / "int8")
    shown = demo_bundles.refusal(run_here(*sabotage))
    assert "FP32 detects nothing on the calibration images" in shown
    labels = ("--eval-data", labelled / "val/annotations.json", "--algo", "abs_max", "--no-fallback")
    shown = demo_bundles.refusal(run_here(*sabotage, *labels))
    assert "mAP (FP32 0." in shown and "more than the 0.005 of --max-drop" in shown
    assert list(tmp_path.iterdir()) == [black]
