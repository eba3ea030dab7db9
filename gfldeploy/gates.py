"""Limits that a change has to keep before it goes in: whether results keep them, and one line that says by how much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gfldeploy.accuracy import EvalResults
from gfldeploy.batching.audit import Audit
from gfldeploy.batching.buckets import Order, Size, size_in_words
from gfldeploy.bench.compare import Comparison, Slowness
from gfldeploy.engines.base import with_tf32

_FIGURES = {
    "network": "through the network alone",
    "file to boxes": "from file to boxes",
    "server latency": "in the latency of what the server answered",
    "answers in time": "in answers within the bound",
}
# By how much a cell may be slower: with less, gates failed with nothing changed (benchmarks/gate_noise.py).
DEFAULT_PERCENT = 10.0

_MOST_NAMED, _MOST_TEXT = 3, 200


@dataclass(frozen=True)
class Gate:
    """Whether results keep a limit.

    `text`: the figure and the limit in one line; where `passed` is False it ends with what to do.
    """

    passed: bool
    text: str


def accuracy_gate(found: EvalResults, min_map: float) -> Gate:
    """Say whether the mAP is high enough, at every input size that was measured.

    Args:
        found: What `evaluate` returned.
        min_map: The lowest mAP allowed, 0 to 1.

    Returns:
        Whether it is kept, in a line with the lowest mAP.
    """
    size, accuracy = min(
        found.at_sizes.items() if found.at_sizes else [(None, found.accuracy)], key=lambda one: one[1].ap
    )
    passed = accuracy.ap >= min_map
    digits = next((one for one in (4, 6) if f"{accuracy.ap:.{one}f}" != f"{min_map:.{one}f}"), 16)
    value = f"{accuracy.ap:.{4 if passed else digits}f}"
    classes = f", {found.matched} of {found.classes} classes" if found.matched < found.classes else ""
    how = f"{_at(size)} in {found.engine} {with_tf32(found.precision, found.tf32)}, {accuracy.images} images{classes}"
    if passed:
        return Gate(True, f"mAP {value}{how} is not below {min_map:g}")
    other = "the FP32 bundle" if found.precision != "fp32" else "the bundle before the change"
    return Gate(
        False,
        f"mAP {value}{how} is below {min_map:g}. Measure {other} on the same images to see what was lost, or lower "
        "the limit.",
    )


def padding_gate(found: Audit, max_padding: float, order: Order = "listed") -> Gate:
    """Say whether the network computes few enough pixels that are no image's, in batches of every size.

    What counts are the pixels of all batches by those of the resized images: what rounding up to the stride, or bars
    around an image, adds (`Audit.rounding`), times what its neighbours in a batch add (`AuditRow.padding`). Where
    images were cut into tiles, it is those of the tiles.

    Args:
        found: What `audit` returned.
        max_padding: The largest ratio allowed, 1 or more.
        order: How images are put into batches.

    Returns:
        Whether it is kept, at every batch size and input size, in a line with the worst.
    """
    audits = [one.in_tiles or one for one in (found, *found.at_sizes)]
    rows = [(one, row) for one in audits for row in one.rows if row.order == order or one.tiling]
    audit, row = max(rows, key=lambda one: one[0].rounding * one[1].padding)
    size = next(one.input_size for one in (found, *found.at_sizes) if audit in (one, one.in_tiles))
    value = audit.rounding * row.padding
    passed = value <= max_padding
    digits = next((one for one in (2, 4) if f"{value:.{one}f}" != f"{max_padding:.{one}f}"), 16)
    of = "tiles" if audit.tiling else "images"
    figure = (
        f"batches of {row.batch_size}, {row.order}{_at(size)}, have {value:.{2 if passed else digits}f}x the pixels of "
        f"the {of} ({audit.rounding:.2f}x by the input size, {row.padding:.2f}x by neighbours)"
    )
    unused = len(audit.left_out) + (len(found.left_out) if audit is not found else 0)
    left_out = f"; {_count(unused, 'image')} could not be used" if unused else ""
    if passed:
        return Gate(True, f"{figure}, not more than {max_padding:g}x{left_out}")
    remedy = (
        "Run batches of images of one size (--order bucketed)"
        if row.order != "bucketed" and row.padding > 1
        else "Allow more --buckets"
        if row.padding > 1
        else "Choose an --input-size with the shape of the images"
    )
    return Gate(False, f"{figure}, more than {max_padding:g}x{left_out}. {remedy}, smaller batches, or a higher limit.")


def speed_gate(found: Comparison, percent: float = DEFAULT_PERCENT) -> Gate:
    """Say whether nothing is slower in B than in A beyond the noise.

    A cell is slower if one of its figures is (`Pair.slowness`): with 97.5 % confidence for the whole comparison, by
    more than `percent`. The intervals know the noise within the runs that were compared; that a machine is slower on
    another day is what `percent` is for.

    Args:
        found: What `compare` returned.
        percent: By how much a cell may be slower.

    Returns:
        Whether the gate is passed. It is not where a cell is slower, and where that is not known: a cell of A was not
        measured in B, samples are too few, or both files hold the same run.
    """
    if found.identical:
        text = "A and B are the same run, so nothing was compared. Give the results of the change as B."
        return Gate(False, text)
    limit = 1 + percent / 100
    cells = [pair.cell for pair in found.pairs]
    worst = [(pair, max(pair.slowness, key=_least)) for pair in found.pairs]
    slower = sorted((both for both in worst if _least(both[1]) > limit), key=lambda both: -_least(both[1]))
    unknown = [pair for pair in found.pairs if any(one.at_least is None for one in pair.slowness)]
    problems, remedies = [], []
    if slower:
        pair, one = slower[0]
        more = f", and {_count(len(slower) - 1, 'more cell')}" if len(slower) > 1 else ""
        named = f"{pair.cell.name(cells)} takes {_ratio(one)} as long {_FIGURES[one.figure]}{more}"
        problems.append(f"{_count(len(slower), 'cell')} of {len(cells)} slower by more than {percent:g}%: {named}")
        remedies.append("Measure both again on an idle machine; if it stays, find what changed, or allow a PERCENT")
    if missing := [f"{one.cell.name(cells)}{f' ({one.reason})' if one.reason else ''}" for one in found.only_a]:
        problems.append(f"{_count(len(missing), 'cell')} of A not measured in B: {_first(missing)}")
        remedies.append("Measure all cells of A, or make A anew without them")
    if unknown:
        names = _first([pair.cell.name(cells) for pair in unknown])
        problems.append(f"too few samples to tell of {_count(len(unknown), 'cell')}: {names}")
        remedies.append("Measure longer (--min-count, --rounds)")
    notes = [
        f"{_count(len(some), 'cell')} {what}"
        for some, what in ((found.only_b, "of B not in A"), (found.failed, "failed in both"))
        if some
    ]
    notes += [f"on other {what}" for some, what in ((found.hardware, "hardware"), (found.data, "data")) if some]
    flags = dict.fromkeys(flag for pair in found.pairs for flag in (*pair.a_flags, *pair.b_flags) if flag != "padded")
    notes += [f"read with care: {', '.join(flags)}"] if flags else []
    told = "".join(f"; {note}" for note in notes)
    if problems:
        return Gate(False, f"{'; '.join(problems)}{told}. {'. '.join(remedies)}.")
    return Gate(True, f"none of {_count(len(cells), 'cell')} is slower by more than {percent:g}%{told}{_unseen(found)}")


def _unseen(found: Comparison) -> str:
    """What slowdown the noise may hide, the largest."""
    pair, one = max(
        ((pair, one) for pair in found.pairs for one in pair.slowness), key=lambda both: both[1].ratio.high or 0
    )
    most = 100 * ((one.ratio.high or 1) - 1)
    if most <= 0:
        return ""
    cells = [pair.cell for pair in found.pairs]
    return f"; noise may hide up to {most:.2g}% ({pair.cell.name(cells)}, {_FIGURES[one.figure]})"


def _least(one: Slowness) -> float:
    return one.at_least or 0.0


def _ratio(one: Slowness) -> str:
    """Such as "1.21 times (95% interval 1.15 to 1.27)"."""
    ratio = one.ratio
    interval = "" if ratio.low is None else f" (95% interval {ratio.low:.3g} to {ratio.high:.3g})"
    return f"{ratio.value:.3g} times{interval}"


def _first(names: Sequence[str]) -> str:
    shown = [one if len(one) <= _MOST_TEXT else f"{one[:_MOST_TEXT]} ..." for one in names[:_MOST_NAMED]]
    return "; ".join([*shown, *([f"{len(names) - _MOST_NAMED} more"] if len(names) > _MOST_NAMED else [])])


def _at(size: Size | None) -> str:
    return f" at {size_in_words(size)}" if size else ""


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
