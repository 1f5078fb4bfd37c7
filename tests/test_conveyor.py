"""Batches through a device, whatever the order in which its lanes happen to work."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dicomnode.deferred import with_pixels
from dicomnode.errors import Cancelled, DeviceLost
from dicomnode.imaging.engines import EngineError, TorchEngine, WithinMemory, cuda
from dicomnode.imaging.engines.conveyor import KEPT_SLOTS, Conveyor
from dicomnode.imaging.engines.forms import KEPT, Forms
from dicomnode.imaging.inference import load_model, warm_up
from dicomnode.imaging.manifest import Range
from dicomnode.imaging.networks import build_generator
from dicomnode.imaging.package import read_package
from dicomnode.imaging.pending import Pending, Ready, in_order
from dicomnode.part10 import read_instances
from dicomnode.results import Draft
from dicomnode.stages import Stream
from dicomnode.translating import translate
from tests.factories import ct_series, write_series
from tests.simulated import SimulatedEngine, SimulatedLanes, Upset, as_captured
from tests.test_engines import slices
from tests.test_package import DENOISER, write
from tests.test_stages import in_turn, model_of, resampling, streamed, task_of, three_slices
from tests.test_worker import order_of

SEEDS = range(40)


def doubled(x: Tensor) -> Tensor:
    return x[:, :1] * 2


def conveyor_of(seed: int) -> tuple[Conveyor, SimulatedLanes]:
    lanes = SimulatedLanes(seed)
    return Conveyor(lanes, as_captured(doubled)), lanes


def batches(*counts: int) -> list[np.ndarray]:
    """No value occurs twice; (batch, 2, 3, 5), float32."""
    numbers = np.arange(sum(counts) * 30, dtype=np.float32).reshape(-1, 2, 3, 5)
    return np.split(numbers, np.cumsum(counts)[:-1])


def started(conveyor: Conveyor, given: list[np.ndarray], size: int) -> Iterator[Pending]:
    """Every batch from one memory, which is written to as soon as the batch was begun."""
    memory = np.empty((size, 2, 3, 5), np.float32)
    for x in given:
        memory[: len(x)] = x
        yield conveyor.start(memory[: len(x)], size)
        memory[:] = -1


@pytest.mark.parametrize("ahead", [0, 1, 2, 5])
def test_results_are_the_same_whatever_the_lanes_do_first(ahead: int) -> None:
    given = batches(4, 4, 3, 4, 1, 4, 4, 2)
    for seed in SEEDS:
        conveyor, lanes = conveyor_of(seed)
        results = list(in_order(started(conveyor, given, 4), ahead))
        for x, y in zip(given, results, strict=True):
            np.testing.assert_array_equal(y, 2 * x[:, :1])
        assert not lanes.busy


def test_shapes_that_take_turns_do_not_meet() -> None:
    wide = np.arange(2 * 2 * 4 * 7, dtype=np.float32).reshape(2, 2, 4, 7)
    for seed in SEEDS:
        conveyor, _ = conveyor_of(seed)
        narrow = batches(2, 2, 2)
        given = [x for step in range(3) for x in (narrow[step], wide + step)]
        results = in_order((conveyor.start(x, 2) for x in given), 2)
        for x, y in zip(given, results, strict=True):
            np.testing.assert_array_equal(y, 2 * x[:, :1])


def test_a_short_batch_is_filled_up_with_its_last_slice() -> None:
    seen = []

    def note(x: Tensor) -> Tensor:
        seen.append(x.clone())
        return x[:, :1]

    conveyor = Conveyor(SimulatedLanes(0), note)
    (x,) = batches(3)
    assert conveyor.start(x, 5).result().shape == (3, 1, 3, 5)
    np.testing.assert_array_equal(seen[0].numpy(), x[[0, 1, 2, 2, 2]])


def test_as_many_slots_as_batches_are_under_way() -> None:
    for seed in SEEDS:
        conveyor, _ = conveyor_of(seed)
        for _ in in_order(started(conveyor, batches(*[2] * 20), 2), 2):
            assert conveyor.slots <= 3
    many = [conveyor.start(x, 2) for x in batches(*[2] * 9)]
    assert conveyor.slots == 9
    for pending in many:
        pending.give_up()
    assert conveyor.slots == KEPT_SLOTS
    conveyor.clear()
    assert conveyor.slots == 0


def test_a_batch_that_fails_spoils_no_other() -> None:
    given = batches(*[2] * 8)

    def one_fails(x: Tensor) -> Tensor:
        if x[0, 0, 0, 0] == given[4][0, 0, 0, 0]:
            raise Upset
        return doubled(x)

    for seed in SEEDS:
        lanes = SimulatedLanes(seed)
        conveyor, done = Conveyor(lanes, as_captured(one_fails)), list[np.ndarray]()
        with pytest.raises(Upset):
            done.extend(in_order(started(conveyor, given, 2), 2))
        assert len(done) == 4
        assert not lanes.busy
        done += list(in_order(started(conveyor, given[5:], 2), 2))
        for x, y in zip([*given[:4], *given[5:]], done, strict=True):
            np.testing.assert_array_equal(y, 2 * x[:, :1])
        assert conveyor.slots <= 3


def test_a_launch_that_fails_leaves_nothing_under_way() -> None:
    *first, second, third = batches(*[2] * 8)

    def refuse(x: Tensor) -> Tensor:
        if x[0, 0, 0, 0] == second[0, 0, 0, 0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return doubled(x)

    for seed in SEEDS:
        lanes = SimulatedLanes(seed, at_once=True)
        conveyor = Conveyor(lanes, refuse)
        before = [conveyor.start(x, 2) for x in first]
        with pytest.raises(torch.OutOfMemoryError):
            conveyor.start(second, 2)
        assert (lanes.busy, conveyor.slots) == (False, 6)
        after = conveyor.start(third, 2)
        for x, pending in zip(first, before, strict=True):
            np.testing.assert_array_equal(pending.result(), 2 * x[:, :1])
        np.testing.assert_array_equal(after.result(), 2 * third[:, :1])


@pytest.mark.parametrize("stop", ["cancelled", "not wanted"])
def test_who_stops_in_the_middle_leaves_nothing_under_way(stop: str) -> None:
    given = batches(*[2] * 9)
    for seed in SEEDS:
        conveyor, lanes = conveyor_of(seed)

        def begun(conveyor: Conveyor = conveyor) -> Iterator[Pending]:
            yield from started(conveyor, given[:6], 2)
            raise Cancelled("given up between two batches")

        results = in_order(begun(), 2)
        np.testing.assert_array_equal(next(results), 2 * given[0][:, :1])
        if stop == "cancelled":
            with pytest.raises(Cancelled):
                list(results)
        else:
            results.close()
        assert not lanes.busy
        assert conveyor.slots == 3


def test_a_series_that_overtakes_between_batches_disturbs_none() -> None:
    given = batches(*[2] * 6)
    for seed in SEEDS:
        conveyor, _ = conveyor_of(seed)
        urgent = list[np.ndarray]()

        def begun(conveyor: Conveyor = conveyor, urgent: list = urgent) -> Iterator[Pending]:
            for place, pending in enumerate(started(conveyor, given, 2)):
                if place == 3:
                    urgent += in_order(started(conveyor, [-x for x in given], 2), 2)
                yield pending

        for x, y in zip(given, in_order(begun(), 2), strict=True):
            np.testing.assert_array_equal(y, 2 * x[:, :1])
        for x, y in zip(given, urgent, strict=True):
            np.testing.assert_array_equal(y, -2 * x[:, :1])
        assert conveyor.slots <= KEPT_SLOTS


def test_a_generator_that_makes_more_than_one_slice_is_no_engine() -> None:
    conveyor = Conveyor(SimulatedLanes(1), lambda x: x)
    with pytest.raises(EngineError, match=r"made \(2, 2, 3, 5\) of \(2, 2, 3, 5\)"):
        conveyor.start(batches(2)[0], 2).result()


def test_no_more_is_begun_than_asked_for() -> None:
    begun = 0

    def counted() -> Iterator[Ready[int]]:
        nonlocal begun
        for number in range(6):
            begun += 1
            yield Ready(number)

    ahead = [(number, begun) for number in in_order(counted(), 2)]
    assert ahead == [(0, 3), (1, 4), (2, 5), (3, 6), (4, 6), (5, 6)]
    begun = 0
    assert [begun for _ in in_order(counted(), 0)] == [1, 2, 3, 4, 5, 6]


def reference() -> TorchEngine:
    return TorchEngine(build_generator("affine", {"scale": 1.5, "offset": 0.1}), "cpu", "fp32")


def test_an_engine_beside_this_thread_gives_the_bits_of_one_that_is_not() -> None:
    x, engine = slices(11, 16), reference()
    expected = engine.run(x)
    for size in (1, 3, 4, 16):
        np.testing.assert_array_equal(SimulatedEngine(engine, size).run(x), expected)


@pytest.mark.parametrize(("most", "halved"), [(8, 0), (5, 1), (3, 2), (1, 3)])
def test_what_does_not_fit_is_halved_while_others_are_under_way(most: int, halved: int) -> None:
    x, engine = slices(24, 16), reference()
    expected = engine.run(x)
    for seed in range(5):
        simulated = SimulatedEngine(engine, 8, seed=seed)
        fitting = WithinMemory(simulated)  # type: ignore[arg-type]

        def begun(fitting: WithinMemory = fitting, own: SimulatedEngine = simulated) -> Iterator:
            for start in range(0, 24, 8):
                own.most = 99 if start == 0 else most  # another process took the rest
                yield fitting.start(x[start : start + 8])

        results = list(in_order(begun(), fitting.ahead))
        np.testing.assert_array_equal(np.concatenate(results), expected)
        assert fitting.halved == halved
        assert simulated.failed == [8, 4, 2][:halved]
        assert fitting.batch(16, 16) == (8 >> halved if halved else 8)


CASES = {
    "one slice": (model_of, lambda: ct_series(7, 64, 70, padding=0)),
    "three slices": (three_slices, lambda: ct_series(7, 64, 72)),
    "resampled": (resampling, lambda: ct_series(5, 80, 96, pixel_spacing=["0.5", "0.45"])),
}


@pytest.mark.parametrize("case", CASES)
def test_a_series_has_the_same_bytes_from_an_engine_beside_this_thread(
    case: str, tmp_path: Path
) -> None:
    make, series = CASES[case]
    model, datasets = make(tmp_path), series()
    model.engine = TorchEngine(model.generator, "cpu", "fp32")
    expected = in_turn(datasets, model)
    files = write_series(datasets, tmp_path / "in")
    for size, slots in ((1, 3), (2, 3), (8, 1)):
        reference = TorchEngine(model.generator, "cpu", "fp32")
        engine = SimulatedEngine(reference, size, seed=size)
        model.engine = engine  # type: ignore[assignment]
        written, _ = streamed(files, model, tmp_path / f"out{size}")
        assert written == expected
        assert engine.conveyor.slots == slots


def test_batches_that_are_under_way_are_given_up_with_their_job(tmp_path: Path) -> None:
    model = model_of(tmp_path)
    engine = SimulatedEngine(TorchEngine(model.generator, "cpu", "fp32"), 2)
    model.engine = engine  # type: ignore[assignment]
    files = write_series(ct_series(12, 64, 70), tmp_path / "in")
    asked = 0

    def between() -> None:
        nonlocal asked
        asked += 1
        if asked == 5:
            raise Cancelled("given up between two batches")

    with Draft(tmp_path / "out") as draft, pytest.raises(Cancelled):
        Stream(read_instances(files, pixels="later"), model, task_of(), draft).run(
            with_pixels, between
        )
    assert not engine.lanes.busy
    assert engine.conveyor.slots <= KEPT_SLOTS


def test_a_lost_device_ends_the_worker_and_not_only_the_job(tmp_path: Path) -> None:
    """An outcome would leave a worker that fails with every job to come."""
    model = model_of(tmp_path)
    files = write_series(ct_series(12, 64, 70), tmp_path / "in")
    engine = SimulatedEngine(TorchEngine(model.generator, "cpu", "fp32"), 2)
    model.engine = engine  # type: ignore[assignment]
    whole, batch = engine.conveyor._compute, 0

    def fails_later(x: Tensor) -> Tensor:
        nonlocal batch
        batch += 1
        if batch == 4:
            raise DeviceLost("the GPU failed")
        return whole(x)

    engine.conveyor._compute = fails_later
    with pytest.raises(DeviceLost):
        translate(order_of("m", files, tmp_path / "out"), {"m": model}, {})
    assert not engine.lanes.busy
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "raised"),
    [
        ("CUDA error: an illegal memory access was encountered", DeviceLost),
        ("CUDA error: out of memory", torch.AcceleratorError),
    ],
)
def test_an_error_of_the_device_is_told_from_lack_of_memory(
    words: str, raised: type[Exception]
) -> None:
    class Event:
        def synchronize(self) -> None:
            raise torch.AcceleratorError(words)

    with pytest.raises(raised):
        cuda.EventMoment(Event()).wait()  # type: ignore[arg-type]


class _Device:
    """Says how long things take, from a table, and counts how often it was waited for."""

    def __init__(self, *seconds: float) -> None:
        self._seconds = iter(seconds * 3)
        self.settled = 0

    def seconds(self, work: object) -> float:
        work()  # type: ignore[operator]
        return next(self._seconds)

    def settle(self) -> None:
        self.settled += 1


def eager(x: Tensor) -> Tensor:
    return x * 3


def chosen(capture: object, *seconds: float) -> Forms:
    device = _Device(*seconds)
    forms = Forms(eager, capture, device.seconds, device.settle)  # type: ignore[arg-type]
    x = torch.rand(2, 1, 4, 4)
    assert torch.equal(forms(x), x * 3)
    assert torch.equal(forms(x + 1), (x + 1) * 3)
    assert device.settled
    return forms


def captured(compute: object, x: Tensor) -> object:
    return as_captured(compute)  # type: ignore[arg-type]


def refused(compute: object, x: Tensor) -> object:
    raise EngineError("3 MB are free, a capture needs 9")


def other(compute: object, x: Tensor) -> object:
    return lambda x: torch.nextafter(x * 3, torch.tensor(9.0))


@pytest.mark.parametrize(
    ("capture", "seconds", "words"),
    [
        (captured, (2.0, 1.0), "captured, 2.00 times as fast as kernel by kernel"),
        (captured, (1.0, 1.0), "kernel by kernel: captured only 1.00 times as fast"),
        (captured, (1.0, 2.0), "kernel by kernel: captured only 0.50 times as fast"),
        (other, (2.0, 1.0), "kernel by kernel: captured it gives other bits"),
        (refused, (), "kernel by kernel: 3 MB are free, a capture needs 9"),
    ],
)
def test_a_capture_is_used_where_it_is_faster_and_the_same(
    capture: object, seconds: tuple[float, ...], words: str
) -> None:
    assert chosen(capture, *seconds).words == (f"2 x 1 x 4 x 4: {words}",)


def test_few_captures_are_kept_and_all_can_be_given_back() -> None:
    device, made = _Device(*[2.0, 1.0] * 20), list[tuple[int, ...]]()

    def noted(compute: object, x: Tensor) -> object:
        made.append(tuple(x.shape))
        return captured(compute, x)

    forms = Forms(eager, noted, device.seconds, device.settle)  # type: ignore[arg-type]
    shapes = [(1, 1, 2, 2), (2, 1, 2, 2), (1, 1, 2, 2), (3, 1, 2, 2), (1, 1, 2, 2), (2, 1, 2, 2)]
    for shape in shapes:
        forms(torch.ones(shape))
    assert KEPT == 2
    assert made == [(1, 1, 2, 2), (2, 1, 2, 2), (3, 1, 2, 2), (2, 1, 2, 2)]
    before = device.settled
    forms.clear()
    assert (forms.words, device.settled) == ((), before + 1)


def test_a_failure_while_it_is_tried_is_told_and_tried_again() -> None:
    def upset(x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    device = _Device()
    forms = Forms(upset, captured, device.seconds, device.settle)  # type: ignore[arg-type]
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            forms(torch.ones(1, 1, 2, 2))
    assert forms.words == ()


@pytest.mark.parametrize(
    ("free", "each", "size"),
    [(100, 1000, 1), (16_000, 1000, 4), (31_999, 1000, 4), (32_000, 1000, 8), (10**12, 1000, 32)],
)
def test_a_batch_is_a_power_of_two_that_has_room(free: int, each: int, size: int) -> None:
    assert cuda.batch_for(free, each) == size


@pytest.mark.parametrize(("matrix", "warmed"), [(Range(64, 64), 1), (Range(64, 512), 0)])
def test_the_one_matrix_of_a_model_is_tried_before_a_series_waits_for_it(
    tmp_path: Path, matrix: Range, warmed: int
) -> None:
    model = model_of(tmp_path, input=replace(DENOISER.input, matrix=matrix))
    engine = SimulatedEngine(TorchEngine(model.generator, "cpu", "fp32"), 2)
    model.engine = engine  # type: ignore[assignment]
    warm_up(model)
    assert engine.conveyor.slots == warmed
    engine.most = 0  # nothing has room now: that is for the series to find out
    warm_up(model)


def test_how_it_is_computed_is_told_with_the_model(tmp_path: Path) -> None:
    model = load_model(read_package(write(tmp_path / "m", DENOISER)))
    engine = SimulatedEngine(TorchEngine(model.generator, "cpu", "fp32"), 2)
    engine.remarks = ("2 x 1 x 4 x 4: captured",)  # type: ignore[assignment]
    model.engine = engine  # type: ignore[assignment]
    assert "2 x 1 x 4 x 4: captured" in model.words
