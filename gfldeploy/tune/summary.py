"""A choice in plain words."""

from __future__ import annotations

from gfldeploy.bench.cell import Cell
from gfldeploy.bench.estimates import Estimate
from gfldeploy.engines.registry import title_of
from gfldeploy.tune.deploy_file import Configuration, Deploy, Evidence
from gfldeploy.tune.measured import TAIL_COUNT, Measured, speed_ratio
from gfldeploy.tune.search import TIE, Miss

__all__ = ["miss_in_words", "summarize"]


def summarize(deploy: Deploy, choice: Measured, runner_up: Measured | None = None) -> str:
    """One paragraph for who decides: what to deploy, how fast, what it costs, what came second and why, the knee."""
    machine, one = deploy.machine, deploy.choice
    where = f"{machine.cpu} with {_count(machine.threads, 'CPU')}"
    if one.cell.device == "gpu" and machine.gpus:
        where = machine.gpus[0]
    sentences = [
        f"Deploy {_what(one.cell)}, on {where}.",
        _speed(one, deploy),
        _care(one.evidence),
        _cost(one.evidence, deploy),
        _second(deploy, choice, runner_up),
        _knee(deploy),
        _search(deploy),
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def miss_in_words(miss: Miss) -> str:
    """Such as "ONNX Runtime in INT8 of hist, one image at a time with 2 threads, whose latency of ..."."""
    if miss.unit == "mAP":
        value = f"{miss.what} of {miss.value:.4f} is above {miss.bound:g}"
    else:
        more = f"{miss.percent:.0f}%" if miss.percent >= 1 else f"{miss.percent:.1g}%"
        what = f"{miss.what} from file to boxes" if miss.what == "latency" else miss.what
        note = f" ({miss.note})" if miss.note else ""
        value = f"{what} of {miss.value:.1f} {miss.unit}{note} is {more} above {miss.bound:g} {miss.unit}"
    return f"{_what(miss.cell)}, whose {value}"


def _what(cell: Cell) -> str:
    """Such as "int8 in OpenVINO (INT8), 4 images of one size at a time with 2 threads"."""
    shape = "one image at a time"
    if cell.batch_size > 1:
        how = "of one size at a time" if cell.order == "bucketed" else "at a time as they are listed"
        shape = f"{cell.batch_size} images {how}"
    threads = "" if cell.device == "gpu" else f" with {_count(cell.threads, 'thread')}"
    engine = f"{title_of(cell.engine)} ({cell.precision.upper()})"
    return f"{cell.bundle.directory} in {engine}, {shape}{threads}"


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.3f}"


def _interval(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    return f" (95% interval {_number(estimate.low)} to {_number(estimate.high)})"


def _speed(one: Configuration, deploy: Deploy) -> str:
    found, bound = one.evidence, deploy.bounds.max_latency_ms
    network = f"the network alone does {_number(found.network_images_per_s.value)}"
    if found.images_per_s is None or found.latency_p50_ms is None or found.latency_max_ms is None:
        return f"From file to boxes it was not measured; {network} images a second."
    noun = "batch" if one.cell.batch_size > 1 else "image"
    allowed = "" if bound is None else f", where {bound:g} ms were allowed"
    speed = (
        f"From file to boxes it handles {_number(found.images_per_s.value)} images a second"
        f"{_interval(found.images_per_s)}, one {noun} after the other; {network}."
    )
    half = (
        f"From file to boxes {'a' if noun == 'batch' else 'an'} {noun} takes {_number(found.latency_p50_ms.value)} ms "
        "or less half of the time"
    )
    if found.latency_p99_ms is None:
        return (
            f"{speed} {half}; the longest of {found.latency_p50_ms.n} took {_number(found.latency_max_ms)} ms{allowed}."
            f" These are too few to know the 99th percentile, which takes {TAIL_COUNT}."
        )
    high = f"{_number(found.latency_p99_ms.value)} ms or less 99 times in 100{_interval(found.latency_p99_ms)}"
    return f"{speed} {half}, and {high}{allowed}."


def _care(found: Evidence) -> str:
    """What the figures must not be taken for."""
    sentences = []
    if found.quick:
        sentences.append("It was measured too briefly for figures to be quoted: this is a first look.")
    if found.padded:
        sentences.append(
            "Its batches hold images of several sizes, padded to the largest, which changes boxes and scores; mAP is "
            "of one image at a time."
        )
    return " ".join(sentences)


def _cost(found: Evidence, deploy: Deploy) -> str:
    bounds = deploy.bounds
    allowed = "" if bounds.max_memory_mb is None else f" of the {bounds.max_memory_mb:g} MB allowed"
    memory = f"It takes {found.memory_mb:.0f} MB of memory{allowed}"
    if found.ap is None:
        return f"{memory}; its accuracy was not measured."
    accuracy = f"its accuracy is {found.ap:.3f} mAP on {_count(found.ap_images or 0, 'image')}"
    if found.ap_drop is None:
        return f"{memory}; {accuracy}."
    limit = "" if bounds.max_drop is None else f" ({bounds.max_drop:g} may be lost)"
    if found.ap_drop <= 0:
        return f"{memory}; {accuracy}, no less than the FP32 model{limit}."
    return f"{memory}; {accuracy}, {found.ap_drop:.4f} less than the FP32 model{limit}."


def _second(deploy: Deploy, choice: Measured, runner_up: Measured | None) -> str:
    second = deploy.runner_up
    if second is None or runner_up is None:
        return "Nothing else kept the bounds." if deploy.bounds != type(deploy.bounds)() else ""
    ratio = speed_ratio(choice, runner_up)
    what = f"Second came {_what(second.cell)}"
    speed = f"{_number(runner_up.images_per_s)} images a second from file to boxes"
    if ratio.high is not None and ratio.high < 1:
        return f"{what}: {speed}, {100 * (1 - ratio.value):.0f}% fewer."
    if ratio.value < 1 - TIE:
        return f"{what}: {speed}, {100 * (1 - ratio.value):.0f}% fewer, though so few measurements leave that open."
    return f"{what}: {speed}, as fast within the noise; it lost by {_lost_by(choice, runner_up)}."


def _lost_by(choice: Measured, runner_up: Measured) -> str:
    return "longer waits" if choice.median_ms < runner_up.median_ms else "a little speed"


def _knee(deploy: Deploy) -> str:
    knee = deploy.knee
    if knee is None:
        return ""
    tried = f"(tried up to {knee.curve[-1].batch_size})"
    if knee.last:
        return f"Throughput still rises at {knee.batch_size} images at a time, the most that was measured."
    if knee.batch_size == 1:
        return f"More than one image at a time makes it no faster {tried}."
    return f"More than {knee.batch_size} images at a time make it no faster {tried}."


def _search(deploy: Deploy) -> str:
    search = deploy.search
    how = f"{search.measured} of {search.cells} configurations were measured on {deploy.created[:10]}"
    if not search.complete:
        return f"{how}, when the time was up: there may be a better one."
    return f"{how}; figures hold for this machine and bundle alone."
