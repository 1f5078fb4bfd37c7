"""What a worker does first, what it keeps in memory, what it does while a series still arrives."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import Dataset

from dicomnode.ahead import Ahead
from dicomnode.config import Route
from dicomnode.imaging.engines import EngineError
from dicomnode.imaging.inference import Model, load_model, predict
from dicomnode.imaging.manifest import GeneratorSpec, Tiling
from dicomnode.imaging.package import ModelPackage, read_package
from dicomnode.imaging.volume import volume_from_datasets
from dicomnode.jobs import PRIORITIES
from dicomnode.orders import Arriving, Cancel, Order, Outcome, Reply, Request
from dicomnode.shelf import ModelShelf, bytes_of
from dicomnode.translating import translate
from dicomnode.worker import Settings, Worker
from tests.factories import changed, ct_series, write_series
from tests.peers import wait_for
from tests.test_package import DENOISER, write
from tests.test_stages import CASES, model_of

NOW = datetime(2026, 11, 21, 10, 30, tzinfo=UTC)
ROUTINE, STAT = PRIORITIES["routine"], PRIORITIES["stat"]


def slow_package(models: Path, name: str = "slow") -> ModelPackage:
    """Some 50 ms per slice of 128 x 128, so that something can come between two of them."""
    options = {"width": 64, "blocks": 8}
    generator = GeneratorSpec("residual_denoiser", options)
    manifest = replace(DENOISER, name=name, generator=generator, tiling=Tiling())
    return read_package(write(models / name, manifest))


def order_of(model: str, files: list[Path], results: Path) -> Order:
    route = Route(name="r", match={}, model=model, send_to=(), qa="off")
    return Order.of(route, tuple(files), results, NOW)


def contents(outcome: Outcome, results: Path) -> dict[str, bytes]:
    (made,) = outcome.series
    return {path.name: path.read_bytes() for path in (results / made.uid).iterdir()}


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    package = slow_package(tmp_path_factory.mktemp("models"))
    running = Worker({"slow": package}, Settings("cpu", precision="fp32", ahead_bytes=10**9))
    try:
        wait_for(lambda: running.wait_ready(1), "the model to be loaded", 120)
        yield running
    finally:
        running.stop(0.5)


def next_reply(worker: Worker) -> Reply:
    reply: Reply = wait_for(lambda: worker.reply(1), "a reply", 200)
    return reply


@pytest.mark.slow
def test_a_stat_series_overtakes_between_batches_and_changes_no_bit(
    worker: Worker, tmp_path: Path
) -> None:
    long = sorted(write_series(ct_series(40, 128, 128, seed=1), tmp_path / "long"))
    short = sorted(write_series(ct_series(3, 128, 128, seed=2), tmp_path / "short"))
    alone = {}
    for name, files in (("long", long), ("short", short)):
        results = tmp_path / f"alone-{name}"
        worker.send(Request(1, ROUTINE, order_of("slow", files, results)))
        alone[name] = contents(next_reply(worker).outcome, results)
    results = tmp_path / "results"
    worker.send(Request(7, ROUTINE, order_of("slow", long, results)))
    wait_for(lambda: results.is_dir() and any(results.iterdir()), "the long job to begin")
    worker.send(Request(8, STAT, order_of("slow", short, results)))
    first, second = next_reply(worker), next_reply(worker)
    assert (first.job, second.job) == (8, 7)
    assert contents(first.outcome, results) == alone["short"]
    assert contents(second.outcome, results) == alone["long"]


def test_a_less_urgent_series_waits(worker: Worker, tmp_path: Path) -> None:
    files = sorted(write_series(ct_series(4, 128, 128), tmp_path / "in"))
    for job, priority in ((1, ROUTINE), (2, ROUTINE), (3, PRIORITIES["offpeak"])):
        worker.send(Request(job, priority, order_of("slow", files, tmp_path / f"out{job}")))
    assert [next_reply(worker).job for _ in range(3)] == [1, 2, 3]


def test_a_job_that_is_not_wanted_ends_between_two_batches(worker: Worker, tmp_path: Path) -> None:
    files = sorted(write_series(ct_series(40, 128, 128), tmp_path / "in"))
    worker.send(Request(4, ROUTINE, order_of("slow", files, tmp_path / "out")))
    wait_for(lambda: (tmp_path / "out").is_dir(), "the job to begin")
    worker.send(Cancel(4))
    reply = next_reply(worker)
    assert (reply.job, reply.outcome.broken) == (4, "Cancelled")
    assert list((tmp_path / "out").iterdir()) == []


def shelf_of(models: Path, budget: int, names: str = "abc") -> tuple[ModelShelf, list[str]]:
    """A shelf of models of one size, and which were loaded, in order."""
    loads: list[str] = []

    def load(package: ModelPackage) -> Model:
        loads.append(package.name)
        return load_model(package, precision="fp32")

    packages = {n: read_package(write(models / n, replace(DENOISER, name=n))) for n in names}
    return ModelShelf(packages, load, budget), loads


def test_models_beyond_the_budget_take_turns(tmp_path: Path) -> None:
    model = model_of(tmp_path)
    shelf, loads = shelf_of(tmp_path / "models", 2 * bytes_of(model))
    assert set(shelf) == set("abc")  # all were tested
    assert shelf.loaded == ("b", "c")
    _ = shelf["b"], shelf["a"]
    assert shelf.loaded == ("b", "a")  # c was used longest ago
    assert loads == ["a", "b", "c", "a"]


def test_a_budget_smaller_than_a_model_keeps_the_one_in_use(tmp_path: Path) -> None:
    shelf, _ = shelf_of(tmp_path, 1)
    assert shelf["a"].package.name == "a"
    assert shelf.loaded == ("a",)


def test_without_a_budget_all_models_stay(tmp_path: Path) -> None:
    shelf, loads = shelf_of(tmp_path, 0)
    assert [shelf[name].package.name for name in "abc"] == loads == ["a", "b", "c"]


def test_the_shelf_tells_what_runs_a_model_by_now(tmp_path: Path) -> None:
    """Also after its engine failed, and after it was put away."""

    class Failing:
        name, precision = "failing 1", "fp32"

        def batch(self, rows: int, columns: int) -> int:
            return 1

        def run(self, x: np.ndarray) -> np.ndarray:
            raise EngineError("failing 1: no more")

    shelf, _ = shelf_of(tmp_path, 1)
    model = shelf["a"]
    assert shelf.serving["a"].refused == ()
    model.engine = Failing()  # type: ignore[assignment]
    predict(model, volume_from_datasets(ct_series(2, 32, 32))[0])
    assert shelf["b"].package.name == shelf.loaded[0] == "b"
    assert shelf.serving["a"].engine.startswith("torch")
    assert shelf.serving["a"].refused[-1] == "failing 1: no more"
    assert set(shelf.serving) == set("abc")


def test_a_model_that_was_put_away_gives_the_same_bits(tmp_path: Path) -> None:
    shelf, _ = shelf_of(tmp_path / "models", 1)
    files = sorted(write_series(ct_series(3, 64, 70), tmp_path / "in"))
    made = []
    for turn, name in enumerate("aba"):
        results = tmp_path / f"out{turn}"
        made.append(contents(translate(order_of(name, files, results), shelf, {}), results))
    assert made[0] == made[2] != made[1]


# --- ahead of the job


class _Counting:
    """An engine that counts the slices it is asked for."""

    def __init__(self, model: Model) -> None:
        self._engine, self.slices = model.engine, 0
        self.name, self.precision = model.engine.name, model.engine.precision

    def batch(self, rows: int, columns: int) -> int:
        return 1

    def run(self, x: np.ndarray) -> np.ndarray:
        self.slices += len(x)
        return self._engine.run(x)


def ahead_of(model: Model, files: list[Path], most: int = 10**9) -> Ahead:
    """What is kept when a worker had time for all `files`."""
    ahead = Ahead({"m": model}, most)
    ahead.expect(Arriving("1.2", "m", tuple(files)))
    while ahead.step():
        pass
    return ahead


def made_of(
    model: Model, files: list[Path], results: Path, ahead: Ahead | None = None
) -> tuple[dict[str, bytes], Outcome]:
    outcome = translate(order_of("m", files, results), {"m": model}, {}, known=ahead)
    return contents(outcome, results), outcome


def test_slices_inferred_ahead_are_not_inferred_again_and_have_the_same_bits(
    tmp_path: Path,
) -> None:
    model = model_of(tmp_path)
    files = write_series(ct_series(9, 64, 70, padding=0), tmp_path / "in")
    expected, _ = made_of(model, files, tmp_path / "plain")
    engine = model.engine = _Counting(model)  # type: ignore[assignment]
    ahead = ahead_of(model, files[:6][::-1])
    assert (ahead.made, engine.slices) == (6, 6)
    found, outcome = made_of(model, files, tmp_path / "quick", ahead)
    assert found == expected
    assert (outcome.ahead, engine.slices) == (6, 9)  # the late ones only


@pytest.mark.parametrize(
    "change",
    [
        {"RescaleIntercept": "-1000"},
        {"RescaleSlope": "1.5"},
        {"PixelPaddingValue": 3},
        {"PixelData": np.full((64, 70), 1234, np.uint16).tobytes()},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_slice_that_was_replaced_finds_nothing(change: dict[str, Any], tmp_path: Path) -> None:
    """Its file is another one when the job comes: what was made of the first is of no use."""
    model, datasets = model_of(tmp_path), ct_series(5, 64, 70)
    files = write_series(datasets, tmp_path / "in")
    ahead = ahead_of(model, files)
    datasets[2] = changed(datasets[2:3], **change)[0]
    files = write_series(datasets, tmp_path / "in")
    expected, _ = made_of(model, files, tmp_path / "plain")
    found, outcome = made_of(model, files, tmp_path / "quick", ahead)
    assert found == expected
    assert outcome.ahead == 4


def test_another_model_finds_nothing(tmp_path: Path) -> None:
    model, other = model_of(tmp_path / "a"), model_of(tmp_path / "b", version="9")
    files = write_series(ct_series(4, 64, 70), tmp_path / "in")
    _, outcome = made_of(other, files, tmp_path / "out", ahead_of(model, files))
    assert outcome.ahead == 0


def test_the_oldest_results_are_forgotten_beyond_the_budget(tmp_path: Path) -> None:
    model = model_of(tmp_path)
    files = write_series(ct_series(6, 64, 70), tmp_path / "in")
    ahead = ahead_of(model, files, most=3 * 64 * 70 * 4)
    _, outcome = made_of(model, files, tmp_path / "out", ahead)
    assert (ahead.made, outcome.ahead) == (6, 3)


def test_without_a_budget_nothing_is_inferred_ahead(tmp_path: Path) -> None:
    files = write_series(ct_series(4, 64, 70), tmp_path / "in")
    assert ahead_of(model_of(tmp_path), files, most=0).made == 0


@pytest.mark.parametrize("case", ["three slices", "resampled", "percentiles"])
def test_what_needs_more_than_its_slice_is_not_inferred_ahead(case: str, tmp_path: Path) -> None:
    make: Callable[[Path], Model] = CASES[case][0]
    datasets: list[Dataset] = CASES[case][1]()
    files = write_series(datasets, tmp_path / "in")
    assert ahead_of(make(tmp_path), files).made == 0


def test_what_cannot_be_read_or_is_no_slice_is_left_to_the_job(tmp_path: Path) -> None:
    files = write_series(ct_series(3, 64, 70), tmp_path / "in")
    files[0].write_bytes(b"no DICOM")
    files.append(tmp_path / "absent.dcm")
    assert ahead_of(model_of(tmp_path), files).made == 2


@pytest.mark.parametrize(
    "change",
    [{"PixelData": b"\0" * 100}, {"BitsStored": [12, 12]}, {"RescaleIntercept": None}],
    ids=lambda change: next(iter(change)),
)
def test_a_slice_that_cannot_be_decoded_is_left_to_the_job(
    change: dict[str, Any], tmp_path: Path
) -> None:
    """Nothing ahead of a job may end the worker: another series would be blamed for it."""
    datasets = ct_series(3, 64, 70)
    for keyword, value in change.items():
        setattr(datasets[1], keyword, value)
    files = write_series(datasets, tmp_path / "in")
    assert ahead_of(model_of(tmp_path), files).made == 2


def test_a_series_that_arrives_is_inferred_while_the_worker_is_idle(
    worker: Worker, tmp_path: Path
) -> None:
    """The process itself: what it was told of is there when the job comes."""
    files = sorted(write_series(ct_series(5, 128, 128, seed=9), tmp_path / "in"))
    worker.send(Request(1, ROUTINE, order_of("slow", files, tmp_path / "plain")))
    plain = next_reply(worker).outcome
    worker.send(Arriving("1.2", "slow", tuple(files[:4])))
    used = [-1.0, 0.0]

    def idle() -> bool:
        used[:] = [used[1], _cpu_seconds(worker.pid)]
        return used[1] == used[0]

    wait_for(idle, "the worker to have nothing to do", every=1.0)
    worker.send(Request(2, ROUTINE, order_of("slow", files, tmp_path / "quick")))
    quick = next_reply(worker).outcome
    assert (plain.ahead, quick.ahead) == (0, 4)
    assert contents(quick, tmp_path / "quick") == contents(plain, tmp_path / "plain")


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
