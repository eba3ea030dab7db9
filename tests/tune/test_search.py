"""The search on made-up response surfaces: what it finds, what it leaves out, and what it does not ask for."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pytest

from gfldeploy.batching.buckets import Order, Size
from gfldeploy.bench.cell import BundleIdentity, Cell
from gfldeploy.engines.base import Precision
from gfldeploy.tune.measured import Measured, Tail
from gfldeploy.tune.search import Bounds, Model, Search, Step, choose, model_of

MODELS: tuple[tuple[str, str, Precision], ...] = (
    ("fp32", "paddle", "fp32"),
    ("fp32", "paddle", "bf16"),
    ("int8", "paddle", "int8"),
    ("fp32", "onnxruntime", "fp32"),
    ("int8", "onnxruntime", "int8"),
)
SIZES = (1, 2, 4, 8, 16, 32)


def cell(model: tuple[str, str, Precision], size: int, threads: int = 2, order: Order = "bucketed") -> Cell:
    bundle, engine, precision = model
    return Cell(
        bundle=BundleIdentity(bundle, bundle, bundle),
        engine=engine,
        precision=precision,
        device="cpu",
        threads=threads,
        batch_size=size,
        order=order if size > 1 else "listed",
        scenario="single-stream" if size == 1 else "offline" if order == "bucketed" else "multi-stream",
    )


def search(
    bounds: Bounds = Bounds(),  # noqa: B008 - immutable
    models: Sequence[tuple[str, str, Precision]] = MODELS,
    sizes: Sequence[int] = SIZES,
    threads: Sequence[int] = (1, 2),
    orders: Sequence[Order] = ("listed", "bucketed"),
    known: Mapping[Cell, Measured | None] | None = None,
) -> Search:
    cells = (
        cell(model, size, count, order)
        for model in models
        for size in sizes
        for count in threads
        for order in (orders if size > 1 else orders[:1])
    )
    return Search(tuple(cells), bounds, dict(known or {}))


def found(images_per_s: float, size: int = 1, memory_mb: float = 100) -> Measured:
    latency_ms = 1e3 * size / images_per_s
    return Measured(((images_per_s,) * 6,), latency_ms, Tail(latency_ms, latency_ms, 400, True), memory_mb)


@dataclass(frozen=True)
class Surface:
    """How a made-up machine behaves: throughput rises with the batch towards a limit, then falls.

    `rough`: how much single cells lie off that, as their standard deviation: kernels suit some shapes better.
    """

    base: dict[Model, float]
    gain: dict[Model, float]
    fall: dict[Model, float]
    thread: float
    padding: float
    memory_mb: float
    drops: dict[Model, float]
    rough: float
    seed: int

    def images_per_s(self, one: Cell) -> float:
        speed: float
        model, steps = model_of(one), math.log2(one.batch_size)
        speed = self.base[model] * self.gain[model] ** (1 - 0.5**steps) * self.fall[model] ** max(steps - 2, 0)
        seed = f"{self.seed} {model} {one.threads} {one.batch_size} {one.order}"
        speed *= (one.threads / 2) ** self.thread * math.exp(random.Random(seed).gauss(0, self.rough))
        speed *= pixels(OWN) / pixels(one.input_size)
        return speed / self.padding ** (1 - 0.5**steps) if one.order == "listed" else speed

    def measured(self, one: Cell, noise: float, runs: int, generator: random.Random) -> Measured:
        def run() -> tuple[float, ...]:
            centre = self.images_per_s(one) * math.exp(generator.gauss(0, noise))
            return tuple(centre * math.exp(generator.gauss(0, 0.01)) for _ in range(4))

        passes = tuple(run() for _ in range(runs))
        median_ms = 1e3 * one.batch_size / sorted(passes[0])[1]
        tail = Tail(1.2 * median_ms, 1.2 * median_ms, 400, True)
        return Measured(passes, median_ms, tail, self.memory_mb * (1 + 0.1 * one.batch_size))


def random_surface(seed: int, rough: float = 0.0) -> Surface:
    generator = random.Random(seed)
    models = tuple(search().by_model)
    return Surface(
        base={model: math.exp(generator.gauss(4, 0.5)) for model in models},
        gain={model: generator.uniform(1, 1.8) for model in models},
        fall={model: generator.uniform(0.85, 1.02) for model in models},
        thread=generator.uniform(-0.1, 0.95),
        padding=generator.uniform(1, 1.6),
        memory_mb=generator.uniform(100, 300),
        drops={model: generator.choice((0.0, 0.0, 0.004, 0.02)) for model in models},
        rough=rough,
        seed=seed,
    )


def run_race(surface: Surface, where: Search, seed: int = 0) -> tuple[Cell | None, list[Cell], list[Model]]:
    """The choice, the cells that were measured, and the models whose accuracy was asked for."""
    generator = random.Random(seed)
    measured: list[Cell] = []
    asked: list[Model] = []

    def look(step: Step) -> dict[Cell, Measured | None]:
        measured.extend(step.cells)
        return {one: surface.measured(one, 0.02, 1, generator) for one in step.cells}

    def finish(cells: Sequence[Cell]) -> dict[Cell, Measured | None]:
        measured.extend(cells)
        return {one: surface.measured(one, 0.01, 3, generator) for one in cells}

    def drop(model: Model) -> float:
        asked.append(model)
        return surface.drops[model]

    where.run(look, finish, drop)
    return next(iter(where.finished), None), measured, asked


def true_best(surface: Surface, where: Search) -> float:
    """Images a second of the fastest that keeps the bounds with some room, 0 without one."""
    speeds = [0.0]
    exact = random.Random(0)
    for one in where.cells:
        drop = surface.drops[model_of(one)]
        fits = where.bounds.excess(surface.measured(one, 0, 1, exact)) <= 0.95
        if fits and (where.bounds.max_drop is None or drop <= where.bounds.max_drop):
            speeds.append(surface.images_per_s(one))
    return max(speeds)


BOUNDS = (Bounds(), Bounds(max_latency_ms=60), Bounds(max_latency_ms=150, max_memory_mb=300), Bounds(max_drop=0.01))


@pytest.mark.parametrize("rough", [0.0, 0.03])
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
def test_within_five_per_cent_of_an_exhaustive_search_for_a_third_of_the_cells(bounds: Bounds, rough: float) -> None:
    shares, short, missed = [], 0, 0
    surfaces = 50
    for seed in range(surfaces):
        surface, where = random_surface(seed, rough), search(bounds)
        choice, measured, _ = run_race(surface, where, seed)
        best = true_best(surface, where)
        shares.append(len(set(measured)) / len(where.cells))
        if choice is None:
            missed += best > 0
        else:
            short += surface.images_per_s(choice) < 0.95 * best
    assert missed == 0
    assert short <= 1
    assert sum(shares) / surfaces < 1 / 4 and max(shares) <= 1 / 2


def test_the_accuracy_of_losers_is_never_asked_for() -> None:
    surface = random_surface(3)
    where = search(Bounds(max_drop=0.01))
    ranked = sorted(where.by_model, key=lambda model: -max(map(surface.images_per_s, where.by_model[model])))
    surface = replace(surface, drops=dict(zip(ranked, (0.02, 0.0, 0.0, 0.0, 0.0), strict=True)))
    choice, _, asked = run_race(surface, where)
    assert asked == ranked[:2], "the fastest is refused, and the next one taken"
    assert choice is not None and model_of(choice) == ranked[1]
    assert all(model_of(one) != ranked[0] for one in where.finished)


def test_the_first_look_is_at_every_model_once() -> None:
    where = search()
    step = where.next_step()
    assert step is not None
    assert [(model_of(one), one.batch_size, one.threads) for one in step.cells] == [(m, 1, 2) for m in where.by_model]


def test_a_slow_model_is_given_up_after_the_first_look() -> None:
    fast, slow = MODELS[4], MODELS[0]
    where = search(models=(fast, slow), known={cell(fast, 1): found(100), cell(slow, 1): found(20)})
    while (step := where.next_step()) is not None:
        for one in step.cells:
            assert model_of(one) == model_of(cell(fast, 1))
            where.known[one] = found(50, one.batch_size)


def one_line(known: Mapping[Cell, Measured | None], bounds: Bounds = Bounds()) -> Step | None:  # noqa: B008 - immutable
    """What comes next of a single model with one number of threads, bucketed."""
    return search(bounds, MODELS[:1], threads=(2,), orders=("bucketed",), known=known).next_step()


def test_a_larger_batch_of_what_is_too_slow_already_is_not_measured() -> None:
    known = {cell(MODELS[0], 1): found(50, 1), cell(MODELS[0], 2): found(60, 2)}
    assert one_line(known, Bounds(max_latency_ms=30)) is None, "33 ms in twos"
    assert one_line(known, Bounds(max_latency_ms=40)) is not None


def test_a_failed_cell_ends_its_climb() -> None:
    assert one_line({cell(MODELS[0], 1): found(50), cell(MODELS[0], 2): None}) is None
    assert one_line({cell(MODELS[0], 1): None}) is None


def test_a_flat_step_does_not_end_a_climb() -> None:
    known = {cell(MODELS[0], 1): found(50), cell(MODELS[0], 2): found(51, 2)}
    step = one_line(known)
    assert step is not None and step.cells == (cell(MODELS[0], 4),)
    assert one_line(known | {cell(MODELS[0], 4): found(50, 4)}) is None, "two do"


def test_what_is_known_is_not_measured_again() -> None:
    where, surface, exact = search(), random_surface(1), random.Random(0)
    where.known = {one: surface.measured(one, 0, 1, exact) for one in where.cells}
    assert where.next_step() is None


def test_an_exhaustive_search_measures_every_cell_once() -> None:
    where, surface, exact = search(threads=(2,)), random_surface(2), random.Random(0)
    measured: list[Cell] = []

    def finish(cells: Sequence[Cell]) -> dict[Cell, Measured | None]:
        measured.extend(cells)
        return {one: surface.measured(one, 0, 3, exact) for one in cells}

    assert where.run(lambda step: pytest.fail(str(step)), finish, lambda model: None, exhaustive=True)
    assert sorted(map(str, measured)) == sorted(map(str, where.cells))
    assert surface.images_per_s(next(iter(where.finished))) >= 0.98 * true_best(surface, where)


def test_out_of_time_still_finishes() -> None:
    where, surface, exact = search(), random_surface(5), random.Random(0)

    def look(step: Step) -> dict[Cell, Measured | None]:
        return {one: surface.measured(one, 0, 1, exact) for one in step.cells}

    complete = where.run(look, lambda cells: look(Step(tuple(cells), "")), lambda model: None, out_of_time=lambda: True)
    assert not complete and where.finished
    assert {one.batch_size for one in where.known} == {1}


def test_of_equals_the_least_latency_is_chosen() -> None:
    one, two, four = (cell(MODELS[0], size) for size in (1, 2, 4))
    assert choose({one: found(99), two: found(100, 2), four: found(90, 4)}) == (one, two, four)
    assert choose({one: found(97), two: found(100, 2)}) == (two, one)
    assert choose({}) == ()


def test_nothing_keeps_the_bounds() -> None:
    where = search(Bounds(max_latency_ms=1, max_drop=0.01))
    choice, measured, asked = run_race(random_surface(4), where)
    assert (choice, asked) == (None, [])
    assert {one.batch_size for one in measured} == {1}, "larger ones take longer still"
    miss = where.nearest()
    assert miss is not None and (miss.what, miss.bound) == ("latency", 1)
    assert miss.value == min(found.tail.ms for found in where.known.values() if found)


def test_the_nearest_is_the_one_that_misses_least_whatever_it_misses() -> None:
    where = search(Bounds(max_latency_ms=10, max_memory_mb=100, max_drop=0.01))
    assert where.nearest() is None
    where.known = {
        cell(MODELS[0], 1): found(50, memory_mb=90),  # 20 ms: twice the bound
        cell(MODELS[1], 1): found(200, memory_mb=130),
        cell(MODELS[2], 1): found(200, memory_mb=90),
        cell(MODELS[3], 1): None,
    }
    where.drops[model_of(cell(MODELS[2], 1))] = 0.02
    miss = where.nearest()
    assert miss is not None and (miss.cell, miss.what) == (cell(MODELS[1], 1), "memory")
    assert miss.percent == pytest.approx(30)
    where.drops[model_of(cell(MODELS[2], 1))] = 0.0125
    miss = where.nearest()
    assert miss is not None and miss.what == "mAP drop" and miss.percent == pytest.approx(25)


def test_fewer_threads_are_tried_where_a_bound_is_nearly_kept() -> None:
    where = search(Bounds(max_memory_mb=100), models=MODELS[:1], orders=("bucketed",))
    where.known = {cell(MODELS[0], 1): found(50, memory_mb=110)}
    step = where.next_step()
    assert step is not None and step.cells == (cell(MODELS[0], 1, threads=1),)
    where.known = {cell(MODELS[0], 1): found(50, memory_mb=200)}
    assert where.next_step() is None


def test_a_line_is_bucketed_where_there_are_buckets() -> None:
    model = model_of(cell(MODELS[0], 1))
    assert [(one.order, one.batch_size) for one in search().line(model)][:2] == [("listed", 1), ("bucketed", 2)]
    listed = search(orders=("listed",)).line(model, threads=1)
    assert [(one.order, one.threads) for one in listed][:2] == [("listed", 1), ("listed", 1)]
    assert search(sizes=(4,)).start(model) == cell(MODELS[0], 4)


@pytest.mark.parametrize("bad", [{"max_latency_ms": 0}, {"max_memory_mb": -1}, {"max_drop": 1.5}, {"max_drop": -0.1}])
def test_bounds_that_make_no_sense(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Bounds(**bad)


def test_streams_are_looked_at_first_unless_latency_is_bounded() -> None:
    """A first look with all CPUs in streams, from which one inference with all threads is one step; or the reverse."""
    two = cell(MODELS[0], 1, threads=4)
    four = replace(two, threads=2, streams=2, scenario="offline")
    idle = replace(two, threads=1, streams=3, scenario="offline")
    for bounds, first, second in ((Bounds(), four, two), (Bounds(max_latency_ms=100), two, four)):
        where = Search((two, four, idle), bounds)
        step = where.next_step()
        assert step is not None and step.cells == (first,)
        where.known[first] = found(50)
        steps: list[Cell] = []
        while (step := where.next_step()) is not None:
            steps += step.cells
            where.known |= {one: found(40) for one in step.cells}
        assert second in steps


OWN: Size = (320, 512)
INPUT_SIZES: tuple[Size | None, ...] = ((192, 320), (224, 320), (256, 384), (320, 448), None)


def pixels(size: Size | None) -> int:
    return math.prod(size or OWN)


def sized_search(bounds: Bounds, known: Mapping[Cell, Measured | None] | None = None) -> Search:
    """The cells of `search` at each of the input sizes."""
    one = search(bounds)
    cells = tuple(replace(cell, input_size=size) for cell in one.cells for size in INPUT_SIZES)
    sizes = {(cell.bundle, cell.input_size): float(pixels(cell.input_size)) for cell in cells}
    return Search(cells, bounds, dict(known or {}), pixels=sizes)


def sized_surface(seed: int) -> Surface:
    """Throughput goes with a power of the pixels, and each size costs about the same mAP in every engine."""
    surface, generator = random_surface(seed), random.Random(seed)
    power = generator.uniform(0.6, 1)
    costs: dict[Size | None, float] = {None: 0.0}
    cost = 0.0
    for size in INPUT_SIZES[-2::-1]:
        cost += generator.choice((0.001, 0.005, 0.02))
        costs[size] = cost
    models = sized_search(Bounds()).by_model

    def scaled(values: Mapping[Model, float], model: Model) -> float:
        part: float = (pixels(model.input_size) / pixels(OWN)) ** (1 - power)
        return values[model.own] * part

    return replace(
        surface,
        base={model: scaled(surface.base, model) for model in models},
        gain={model: surface.gain[model.own] for model in models},
        fall={model: surface.fall[model.own] for model in models},
        drops={
            model: 0.0
            if model.own == model and model.precision == "fp32"
            else (surface.drops[model.own] if model.precision != "fp32" else 0.0)
            + costs[model.input_size]
            + generator.uniform(-0.001, 0.001)
            for model in models
        },
    )


def test_input_sizes_are_searched_in_little_more_time_and_few_are_asked_for_their_accuracy() -> None:
    short, counts, plain, asks, surfaces = 0, [], [], [], 20
    bounds = Bounds(max_drop=0.02)
    for seed in range(surfaces):
        surface, where = sized_surface(seed), sized_search(bounds)
        choice, measured, asked = run_race(surface, where, seed)
        assert choice is not None and surface.drops[model_of(choice)] <= 0.02
        short += surface.images_per_s(choice) < 0.95 * true_best(surface, where)
        assert len(asked) == len(set(asked))
        assert all(one.input_size is None or model_of(one) in where.drops for one in where.finished)
        if choice.input_size:
            assert where.own_size is not None and where.own_size[0].input_size is None
        counts.append(len(set(measured)))
        plain.append(len(set(run_race(surface, search(bounds), seed)[1])))
        asks.append(len(asked))
    assert short <= 1
    assert sum(counts) < 2 * sum(plain), "for five sizes"
    assert sum(asks) / surfaces < 6, "of 25 models"


def sized(model: tuple[str, str, Precision], size: Size | None) -> Model:
    return model_of(replace(cell(model, 1), input_size=size))


def test_which_input_size_is_asked_for_its_accuracy_next() -> None:
    """Of the fastest its own size, then the middle; smaller than what was refused none; none twice."""
    fast, slow = MODELS[4], MODELS[3]
    cells = [replace(cell(model, 1), input_size=size) for model in (fast, slow) for size in INPUT_SIZES]
    sizes = {(one.bundle, one.input_size): float(pixels(one.input_size)) for one in cells}
    where = Search(tuple(cells), Bounds(max_drop=0.02), pixels=sizes)
    first = where.next_step()
    assert first is not None and [one.input_size for one in first.cells] == [None, None] and first.model is None
    where.known = {cell(fast, 1): found(100), cell(slow, 1): found(40)}
    asked: list[Size | None] = []
    lost = {None: 0.002, (320, 448): 0.004, (256, 384): 0.012, (224, 320): 0.06}
    while (step := where.next_step()) is not None and step.model is not None:
        where.known |= {one: found(200) for one in step.cells}
        asked.append(step.model.input_size)
        where.drops[step.model] = lost[step.model.input_size]
    assert asked == [None, (256, 384), (224, 320)], "192x320 loses no less than 224x320, 320x448 is no faster"
    assert where.refused(sized(fast, (192, 320))) and not where.refused(sized(fast, (320, 448)))
    # In FP32 a size costs about what it costs in INT8.
    assert where.refused(sized(slow, (224, 320))) and not where.refused(sized(slow, (256, 384)))
    chosen = where.no_smaller(cell(slow, 1)), where.no_smaller(replace(cell(fast, 1), input_size=(256, 384)))
    assert chosen == ((sized(slow, (320, 448)), "was not looked at"), None), "the summary has what was measured"
    lacking = where.no_smaller(replace(cell(slow, 1), input_size=(256, 384)))
    assert lacking is not None and lacking[0] == sized(slow, (224, 320))
    assert lacking[1] == f"was left out, as it costs 0.0580 mAP in {fast[1]} {fast[2]}"
    where.known[replace(cell(slow, 1), input_size=(320, 448))] = found(40)
    assert where.no_smaller(cell(slow, 1)) == (sized(slow, (320, 448)), "is no faster")
    assert step is None, "twice the pixels of the fastest, and at most 1.7 times as fast at 256x384"
    where.drops[sized(fast, None)] = 0.5
    assert where.refused(sized(fast, (256, 384)).own) and not where.refused(sized(slow, (224, 320)))


def test_a_size_that_gains_nothing_is_not_chosen() -> None:
    own = cell(MODELS[0], 1)
    small = replace(own, input_size=(192, 320))
    assert choose({own: found(99), small: found(100)}) == (own, small)
    assert choose({own: found(90), small: found(100)}) == (small, own)


def test_a_size_is_measured_beside_the_own_one_before_it_is_chosen() -> None:
    own = cell(MODELS[0], 1)
    small = replace(own, input_size=(192, 320))
    sizes = {(one.bundle, one.input_size): float(pixels(one.input_size)) for one in (own, small)}
    speeds = {own: found(50), small: found(100)}
    where, together = Search((own, small), Bounds(max_drop=0.1), pixels=sizes), []

    def finish(cells: Sequence[Cell]) -> dict[Cell, Measured | None]:
        together.append(set(cells))
        return {one: speeds[one] for one in cells}

    assert where.run(lambda step: {one: speeds[one] for one in step.cells}, finish, lambda model: 0.0)
    assert list(where.finished) == [small, own] and together == [{small, own}]
    assert where.own_size == (own, speeds[own])
