"""A choice in plain words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gfldeploy.batching.buckets import size_in_words
from gfldeploy.bench.cell import Cell, names
from gfldeploy.bench.estimates import Estimate
from gfldeploy.bench.results import CellResult
from gfldeploy.engines.base import with_tf32
from gfldeploy.engines.registry import title_of
from gfldeploy.tune.deploy_file import Deploy
from gfldeploy.tune.measured import TAIL_COUNT, Measured, speed_ratio
from gfldeploy.tune.search import Bounds, Miss, Model

# Reasons of failures in a summary; the terminal has all.
_MOST_REASONS = 5


def summarize(
    deploy: Deploy,
    choice: Measured,
    runner_up: Measured | None = None,
    failed: Sequence[CellResult] = (),
    no_smaller: tuple[Model, str] | None = None,
) -> str:
    """One paragraph for who decides: what to deploy, how fast, what it costs, what came second and why, the knee, and
    what `failed` and may have been faster. `no_smaller`: see `Search.no_smaller`."""
    return " ".join((*_sentences(deploy, choice, runner_up, no_smaller), *_failures(failed)))


def miss_in_words(miss: Miss) -> str:
    """Such as "hist in ONNX Runtime (INT8), one image at a time with 2 threads, whose latency of ..."."""
    if miss.unit == "mAP":
        value = f"{miss.what} of {miss.value:.4f} is above {miss.bound:g}"
    else:
        more = f"{miss.percent:.0f}%" if miss.percent >= 1 else f"{miss.percent:.1g}%"
        what = f"{miss.what} from file to boxes" if miss.what == "latency" else miss.what
        note = f" ({miss.note})" if miss.note else ""
        value = f"{what} of {miss.value:.1f} {miss.unit}{note} is {more} above {miss.bound:g} {miss.unit}"
    return f"{_what(miss.cell)}, whose {value}"


def _sentences(
    deploy: Deploy, choice: Measured, runner_up: Measured | None, no_smaller: tuple[Model, str] | None
) -> Iterator[str]:
    machine, cell, found = deploy.machine, deploy.choice.cell, deploy.choice.evidence
    on_gpu = cell.device == "gpu" and machine.gpus
    where = machine.gpus[0] if on_gpu else f"{machine.cpu} with {_count(machine.threads, 'CPU')}"
    yield f"Deploy {_what(cell)}, on {where}."
    yield from _speed(deploy)
    if found.quick:
        yield "The measurements were too short for the figures to be quoted: this is a first look."
    if found.padded:
        yield (
            "Batches hold images of several sizes, padded to the largest, which changes boxes and scores; mAP is of "
            "one image at a time."
        )
    yield _cost(deploy)
    yield from _input_size(deploy)
    if no_smaller and deploy.sizes:
        model, why = no_smaller
        yield f"The next smaller size, {size_in_words(model.input_size or deploy.sizes.own_size)}, {why}."
    if deploy.runner_up is not None and runner_up is not None:
        yield f"Second is {_what(deploy.runner_up.cell)}: {_compared(choice, runner_up)}."
    elif deploy.bounds != Bounds():
        yield "Nothing else kept the bounds."
    if knee := deploy.knee:
        most = knee.curve[-1][0]
        yield (
            f"Throughput still rises at {most} images, the largest batch that was measured."
            if knee.last
            else f"Batches of more than {_count(knee.batch_size, 'image')} are no faster (measured up to {most})."
        )
    search = deploy.search
    how = f"{search.measured} of {search.cells} configurations were measured on {deploy.created[:10]}"
    yield (
        f"{how}; the figures hold for this machine and bundle only."
        if search.complete
        else f"{how}, until the time was up: there may be a faster one."
    )


def _failures(failed: Sequence[CellResult]) -> Iterator[str]:
    cells = [one.cell for one in failed]
    for reason in list(dict.fromkeys(one.reason for one in failed))[:_MOST_REASONS]:
        some = [one.cell for one in failed if one.reason == reason]
        yield f"Left out: {names(some, cells, whole=False)}: {reason}."


def _what(cell: Cell) -> str:
    """Such as "int8 in OpenVINO (INT8), batches of 4 images of one size with 2 threads"."""
    how = "of one size" if cell.order == "bucketed" else "as listed"
    shape = f"batches of {cell.batch_size} images {how}" if cell.batch_size > 1 else "one image at a time"
    threads = "" if cell.device == "gpu" else f" with {_count(cell.threads, 'thread')}"
    if cell.streams > 1:
        threads = f" in {cell.streams} streams of {_count(cell.threads, 'thread')}"
    precision = with_tf32(cell.precision.upper(), cell.tf32)
    size = f" at {size_in_words(cell.input_size)}" if cell.input_size else ""
    return f"{cell.bundle.directory} in {title_of(cell.engine)} ({precision}){size}, {shape}{threads}"


def _speed(deploy: Deploy) -> Iterator[str]:
    found, bound = deploy.choice.evidence, deploy.bounds.max_latency_ms
    network = f"that of the network alone is {_number(found.network_images_per_s.value)} images/s"
    if found.images_per_s is None or found.latency_p50_ms is None or found.latency_max_ms is None:
        yield f"Throughput from file to boxes was not measured; {network}."
        return
    noun = "batch" if deploy.choice.cell.batch_size > 1 else "image"
    yield (
        f"Throughput from file to boxes is {_number(found.images_per_s.value)} images/s{_interval(found.images_per_s)},"
        f" one {noun} after the other{' in each stream' if deploy.choice.cell.streams > 1 else ''}; {network}."
    )
    latency = (
        f"Latency of {'a' if noun == 'batch' else 'an'} {noun} has a median of {_number(found.latency_p50_ms.value)} ms"
    )
    limit = "" if bound is None else f"; the bound is {bound:g} ms"
    if found.latency_p99_ms is not None:
        tail = f"{_number(found.latency_p99_ms.value)} ms{_interval(found.latency_p99_ms)}"
        yield f"{latency} and a 99th percentile of {tail}{limit}."
    else:
        yield (
            f"{latency} and is {_number(found.latency_max_ms)} ms at most{limit}. {found.latency_p50_ms.n} samples are "
            f"too few to know the 99th percentile, which takes {TAIL_COUNT}."
        )


def _cost(deploy: Deploy) -> str:
    found, bounds = deploy.choice.evidence, deploy.bounds
    allowed = "" if bounds.max_memory_mb is None else f" (bound: {bounds.max_memory_mb:g} MB)"
    memory = f"It takes {found.memory_mb:.0f} MB of memory{allowed}"
    if found.ap is None:
        return f"{memory}; mAP was not measured."
    accuracy = f"mAP is {found.ap:.3f} on {_count(found.ap_images or 0, 'image')}"
    if found.ap_drop is None:
        return f"{memory}; {accuracy}."
    limit = "" if bounds.max_drop is None else f" (bound: {bounds.max_drop:g})"
    drop = f"{found.ap_drop:.4f} below" if found.ap_drop > 0 else "not below"
    return f"{memory}; {accuracy}, {drop} FP32{limit}."


def _input_size(deploy: Deploy) -> Iterator[str]:
    """What the choice's input size costs and gains, and why it is no smaller one."""
    found, chosen = deploy.sizes, deploy.choice.cell.input_size
    if found is None:
        return
    if chosen:
        parts = [] if found.ap_less is None else [_less(found.ap_less)]
        parts += (
            [] if found.speed is None else [f"{found.speed.value:.2f} times the images/s{_interval(found.speed, 2)}"]
        )
        cost = ", ".join(parts) or "neither mAP nor throughput could be measured there"
        yield f"At {size_in_words(chosen)} in place of {size_in_words(found.own_size)}: {cost}."
    size = chosen or found.own_size
    pixels = size[0] * size[1]
    refused = [
        (one, lost)
        for one, lost in found.drops
        if one[0] * one[1] < pixels and deploy.bounds.max_drop is not None and lost > deploy.bounds.max_drop
    ]
    if refused:
        one, lost = max(refused, key=lambda item: item[0][0] * item[0][1])
        yield f"{size_in_words(one)} would lose {lost:.4f} mAP against FP32."


def _less(ap_less: float) -> str:
    return f"{abs(ap_less):.4f} mAP {'less' if ap_less > 0 else 'more'}"


def _compared(choice: Measured, second: Measured) -> str:
    ratio = speed_ratio(choice, second)
    speed = f"{_number(second.images_per_s)} images/s from file to boxes"
    if ratio.high is not None and ratio.high < 1:
        return f"{speed}, {100 * (1 - ratio.value):.0f}% less"
    reason = "a higher latency" if choice.median_ms < second.median_ms else "less throughput"
    return f"{speed}, as fast within the noise but with {reason}"


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.3f}"


def _interval(estimate: Estimate, digits: int | None = None) -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    low, high = (_number(one) if digits is None else f"{one:.{digits}f}" for one in (estimate.low, estimate.high))
    return f" (95% interval {low} to {high})"
