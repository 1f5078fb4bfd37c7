"""Overlapped steps give the bytes of steps one after the other, in bounded memory."""

import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydicom import Dataset
from pydicom.tag import BaseTag
from pydicom.uid import JPEGLSLossless

from dicomnode.companions import CompanionOptions
from dicomnode.deferred import with_pixels
from dicomnode.derived import OutputOptions
from dicomnode.errors import Cancelled, OutOfMemory, OutOfResources, SeriesRefused
from dicomnode.imaging.engines import EngineError
from dicomnode.imaging.inference import Model, load_model, predict
from dicomnode.imaging.manifest import GeneratorSpec, Padding, Tiling
from dicomnode.imaging.package import read_package
from dicomnode.imaging.volume import volume_from_datasets
from dicomnode.part10 import read_instances
from dicomnode.pipeline import Task, translate_series
from dicomnode.results import Draft
from dicomnode.spool import DRAFTS
from dicomnode.stages import Stream
from tests.factories import changed, ct_series, enhanced, file_bytes, mr_series, write_series
from tests.peers import ROOT, wait_for
from tests.tasks import KINDS, SOURCES, package_for
from tests.test_inference import INSTANCE
from tests.test_package import DENOISER, write
from tests.test_percentiles import TO_CT, mr

PIXEL_DATA = BaseTag(0x7FE00010)
NOW = datetime(2026, 11, 21, 9, 30, tzinfo=UTC)
BESIDE = CompanionOptions()


def model_of(path: Path, **changes: Any) -> Model:
    return load_model(read_package(write(path / "m", replace(DENOISER, **changes))))


def three_slices(path: Path) -> Model:
    return model_of(
        path,
        generator=GeneratorSpec("unshuffle_resnet", {"width": 8, "blocks": 1, "slices": 3}),
        input=replace(DENOISER.input, slices=3, padding=Padding("reflect", 4)),
        tiling=Tiling(),
    )


def resampling(path: Path) -> Model:
    spec = replace(INSTANCE.input, grid="resample")
    return load_model(read_package(write(path / "m", replace(INSTANCE, input=spec))))


def by_percentiles(path: Path) -> Model:
    return load_model(read_package(write(path / "m", TO_CT)))


def task_of(**more: Any) -> Task:
    return Task(OutputOptions(), NOW, companions=BESIDE, **more)


def streamed(
    files: Sequence[Path], model: Model, results: Path, task: Task | None = None
) -> tuple[dict[str, bytes], Stream]:
    """What the worker writes, by file name, and the stream that made it."""
    with Draft(results) as draft:
        stream = Stream(read_instances(files, pixels="later"), model, task or task_of(), draft)
        stream.run(with_pixels)
        made = draft.commit()
    folder = results / made.uid
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(written) == sorted(f"{uid}.dcm" for uid, _ in made.files())
    return written, stream


def in_turn(
    datasets: Sequence[Dataset], model: Model, task: Task | None = None
) -> dict[str, bytes]:
    """The same, one step after the other."""
    task = task or task_of()
    names = ("allow_lossy", "flag_findings", "companions", "withdrawn", "ignored")
    more = {name: getattr(task, name) for name in names}
    translation = translate_series(datasets, model, task.options, task.now, **more)
    return {f"{ds.SOPInstanceUID}.dcm": file_bytes(ds) for ds in translation.derived}


def shuffled(datasets: list[Dataset]) -> list[Dataset]:
    random.Random(4).shuffle(datasets)
    return datasets


CASES: dict[str, tuple[Callable[[Path], Model], Callable[[], list[Dataset]]]] = {
    "one slice": (model_of, lambda: ct_series(7, 64, 70, padding=0)),
    "three slices": (three_slices, lambda: ct_series(7, 64, 72)),
    "resampled": (resampling, lambda: ct_series(5, 80, 96, pixel_spacing=["0.5", "0.45"])),
    "percentiles": (by_percentiles, mr),
    "compressed": (model_of, lambda: ct_series(5, 64, 70, syntax=JPEGLSLossless)),
}


@pytest.mark.parametrize("case", CASES)
def test_overlapped_and_in_turn_give_the_same_bytes(case: str, tmp_path: Path) -> None:
    make, series = CASES[case]
    model, datasets = make(tmp_path), shuffled(series())
    files = write_series(datasets, tmp_path / "in")
    written, _ = streamed(files, model, tmp_path / "out")
    assert written == in_turn(datasets, model)


@pytest.mark.parametrize("case", CASES)
def test_slice_by_slice_gives_the_bits_of_the_whole_volume(case: str, tmp_path: Path) -> None:
    make, series = CASES[case]
    model, datasets = make(tmp_path), series()
    translation = translate_series(datasets, model, OutputOptions(), NOW)
    source, _ = volume_from_datasets(datasets, model.package.manifest.input.unit)
    np.testing.assert_array_equal(translation.prediction.voxels, predict(model, source).voxels)
    np.testing.assert_array_equal(translation.source.voxels, source.voxels)
    if source.padding is not None:
        np.testing.assert_array_equal(translation.source.padding, source.padding)


def test_what_fits_is_built_while_later_slices_are_inferred(tmp_path: Path) -> None:
    kind = replace(KINDS["denoise"], scale=1.0, offset=0.0)
    model = load_model(package_for(kind, tmp_path / "models"))
    datasets = ct_series(9, 16, 20)
    files = write_series(datasets, tmp_path / "in")
    out, seen = tmp_path / "out", list[int]()

    def between() -> None:
        if len(seen) > 2:  # the third slice waits until the first is on the disk
            wait_for(lambda: list(out.glob("*/*.dcm")), "an instance to be written")
        seen.append(len(list(out.glob("*/*.dcm"))))

    with Draft(out) as draft:
        stream = Stream(read_instances(files, pixels="later"), model, task_of(), draft)
        stream.run(with_pixels, between)
        draft.commit()
    assert stream.early
    assert seen[-1] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_every_output_type_is_the_same_overlapped(kind: str, tmp_path: Path) -> None:
    model = load_model(package_for(KINDS[kind], tmp_path / "models"))
    datasets = SOURCES[kind]()
    files = write_series(datasets, tmp_path / "in")
    assert streamed(files, model, tmp_path / "out")[0] == in_turn(datasets, model)


class _Engine:
    """The reference, asked for several slices at once; `seen` are the sizes it was asked for."""

    precision = "fp32"

    def __init__(self, model: Model, batch: int, most: int = 99) -> None:
        self._reference, self._batch, self._most = model.engine, batch, most
        self.name, self.seen = model.engine.name, list[int]()

    def batch(self, rows: int, columns: int) -> int:
        return self._batch

    def run(self, x: np.ndarray) -> np.ndarray:
        self.seen.append(len(x))
        if len(x) > self._most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self._reference.run(x)


@pytest.mark.parametrize("batch", [2, 3, 8])
@pytest.mark.parametrize("make", [model_of, three_slices])
def test_the_batch_changes_no_bit(
    batch: int, make: Callable[[Path], Model], tmp_path: Path
) -> None:
    datasets, model = ct_series(7, 64, 72), make(tmp_path)
    singly = in_turn(datasets, model)
    engine = model.engine = _Engine(model, batch)  # type: ignore[assignment]
    files = write_series(datasets, tmp_path / "in")
    assert streamed(files, model, tmp_path / "out")[0] == singly
    assert max(engine.seen) == min(batch, 7)


def test_out_of_memory_halves_the_batch_counts_it_and_changes_no_bit(tmp_path: Path) -> None:
    datasets, model = ct_series(9, 64, 70), model_of(tmp_path)
    expected = in_turn(datasets, model)
    engine = model.engine = _Engine(model, 8, most=2)  # type: ignore[assignment]
    files = write_series(datasets, tmp_path / "in")
    written, stream = streamed(files, model, tmp_path / "out")
    assert written == expected
    assert stream.halved == 2
    assert engine.seen == [8, 4, 2, 2, 2, 2, 1]  # 8 and 4 did not fit, and are not tried again


def test_not_even_one_slice_that_fits_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    model = model_of(tmp_path)
    model.engine = _Engine(model, 8, most=0)  # type: ignore[assignment]
    files = write_series(ct_series(5, 64, 70), tmp_path / "in")
    with pytest.raises(OutOfMemory):
        streamed(files, model, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_engine_that_fails_on_the_way_begins_again_with_the_reference(tmp_path: Path) -> None:
    class Failing(_Engine):
        def run(self, x: np.ndarray) -> np.ndarray:
            if len(self.seen) == 4:
                raise EngineError("it fell over")
            return super().run(x + 1)  # what it made before must not be used

    datasets, model = ct_series(7, 64, 70), model_of(tmp_path)
    files = write_series(datasets, tmp_path / "in")
    model.engine = Failing(model, 1)  # type: ignore[assignment]
    written, _ = streamed(files, model, tmp_path / "out")
    assert model.engine.name.startswith("torch")
    assert written == in_turn(datasets, model)


def test_results_that_do_not_fit_the_sources_encoding_are_built_again(tmp_path: Path) -> None:
    """The fifth of seven slices is beyond 12 bits: whole HU for all of them."""
    kind = replace(KINDS["denoise"], scale=1.0, offset=200.0)
    model = load_model(package_for(kind, tmp_path / "models"))
    stored = np.full((7, 16, 16), 1000)
    stored[4] = 4000
    datasets = ct_series(7, 16, 16, stored=stored)
    files = write_series(datasets, tmp_path / "in")
    written, stream = streamed(files, model, tmp_path / "out")
    assert not stream.early
    assert written == in_turn(datasets, model)
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_a_result_that_fails_qa_is_built_again_with_its_mark(tmp_path: Path) -> None:
    shift = GeneratorSpec("affine", {"scale": 1.0, "offset": 0.002})  # 4 HU: they fit
    spec = (replace(DENOISER.input, padding=Padding()), replace(DENOISER.output, residual=False))
    model = model_of(
        tmp_path,
        generator=shift,
        input=spec[0],
        output=spec[1],
        tiling=Tiling(),
        qa={"max_mean_abs_change": 1e-6},
    )
    datasets, task = ct_series(5, 64, 70), task_of(flag_findings=True)
    files = write_series(datasets, tmp_path / "in")
    written, stream = streamed(files, model, tmp_path / "out", task)
    assert not stream.plausible
    assert not stream.early
    assert written == in_turn(datasets, model, task)
    assert sum(b"QA FAILED" in data for data in written.values()) >= 5


def test_a_burned_label_is_the_same_overlapped(tmp_path: Path) -> None:
    model = load_model(package_for(KINDS["denoise"], tmp_path / "models"))
    datasets = ct_series(5, 64, 320)
    task = replace(task_of(), options=OutputOptions(label="burned"))
    files = write_series(datasets, tmp_path / "in")
    assert streamed(files, model, tmp_path / "out", task)[0] == in_turn(datasets, model, task)


@pytest.mark.parametrize("broken", [[0], [6], [0, 1, 6]])
@pytest.mark.parametrize("make", [model_of, three_slices])
def test_a_slice_that_cannot_be_decoded_is_left_out_at_an_end(
    broken: list[int], make: Callable[[Path], Model], tmp_path: Path
) -> None:
    datasets = _broken(ct_series(7, 64, 72, syntax=JPEGLSLossless), broken)
    files = write_series(datasets, tmp_path / "in")
    model = make(tmp_path)
    written, _ = streamed(files, model, tmp_path / "out", replace(task_of(), companions=None))
    whole = [ds for index, ds in enumerate(datasets) if index not in broken]
    source, ordered = volume_from_datasets(whole)
    assert len(written) == len(ordered)
    np.testing.assert_array_equal(
        translate_series(datasets, model, OutputOptions(), NOW).prediction.voxels,
        predict(model, source).voxels,
    )


def test_a_slice_that_cannot_be_decoded_in_the_middle_refuses_the_stack(tmp_path: Path) -> None:
    datasets = _broken(ct_series(7, 64, 70, syntax=JPEGLSLossless), [3])
    files = write_series(datasets, tmp_path / "in")
    with pytest.raises(SeriesRefused, match="UNDECODABLE"):
        streamed(files, model_of(tmp_path), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def _broken(datasets: list[Dataset], which: Sequence[int]) -> list[Dataset]:
    for index in which:
        data = bytearray(datasets[index].PixelData)
        data[len(data) // 3 :] = bytes(len(data) - len(data) // 3)
        datasets[index].PixelData = bytes(data)
    return datasets


def test_frames_of_an_enhanced_instance_stream_too(tmp_path: Path) -> None:
    datasets = [enhanced(ct_series(6, 64, 70))]
    (path,) = write_series(datasets, tmp_path / "in")
    model, task = model_of(tmp_path), replace(task_of(), companions=None)
    with Draft(tmp_path / "out") as draft:
        stream = Stream(read_instances([path]), model, task, draft)
        stream.run(with_pixels)
        made = draft.commit()
    written = {p.name: p.read_bytes() for p in (tmp_path / "out" / made.uid).iterdir()}
    assert written == in_turn(datasets, model, task)


def test_given_up_between_two_batches_nothing_is_left(tmp_path: Path) -> None:
    files = write_series(ct_series(7, 64, 70), tmp_path / "in")
    calls = []

    def between() -> None:
        calls.append(threading.current_thread())
        if len(calls) == 4:
            raise Cancelled("not wanted any more")

    headers, model = read_instances(files, pixels="later"), model_of(tmp_path)
    with Draft(tmp_path / "out") as draft:
        stream = Stream(headers, model, task_of(), draft)
        with pytest.raises(Cancelled):
            stream.run(with_pixels, between)
    assert set(calls) == {threading.current_thread()}
    assert list((tmp_path / "out").iterdir()) == []


def test_a_result_is_out_of_sight_until_it_is_whole(tmp_path: Path) -> None:
    datasets, model = ct_series(7, 64, 70), model_of(tmp_path)
    files = write_series(datasets, tmp_path / "in")
    out, seen = tmp_path / "out", set[str]()

    def between() -> None:
        seen.update(path.name[: len(DRAFTS)] for path in out.iterdir())

    with Draft(out) as draft:
        Stream(read_instances(files, pixels="later"), model, task_of(), draft).run(
            with_pixels, between
        )
        draft.commit()
    assert seen == {DRAFTS}


def test_a_file_that_is_there_already_is_kept(tmp_path: Path) -> None:
    datasets, model, out = ct_series(4, 64, 70), model_of(tmp_path), tmp_path / "out"
    files = write_series(datasets, tmp_path / "in")
    written, _ = streamed(files, model, out)
    (folder,) = out.iterdir()
    first, second, *_ = sorted(folder.iterdir())
    first.write_bytes(b"somebody may have it")
    second.unlink()
    again, _ = streamed(files, model, out)
    assert again == {**written, first.name: b"somebody may have it"}
    assert [path.name for path in out.iterdir()] == [folder.name]


def test_a_disk_that_refuses_leaves_nothing(tmp_path: Path) -> None:
    """What stands for the disk: a folder that is taken away, for root may write anywhere."""
    out, datasets = tmp_path / "out", ct_series(20, 16, 16)

    def write_all(draft: Draft) -> None:
        for number, dataset in enumerate(datasets):
            draft.add(dataset)
            for folder in out.iterdir():  # in one step: others are writing there
                folder.rename(tmp_path / f"gone-{number}")
        draft.commit()

    with Draft(out) as draft, pytest.raises(OutOfResources):
        write_all(draft)
    assert list(out.iterdir()) == []


def test_pixel_data_stay_in_the_file_until_they_are_decoded(tmp_path: Path) -> None:
    (path,) = write_series(ct_series(1, 512, 512, private=True), tmp_path)
    (header,) = read_instances([path], pixels="later")
    whole = with_pixels(header)
    assert len(whole.PixelData) == 512 * 512 * 2
    assert dict(header.items())[PIXEL_DATA].value is None  # what was read is not kept
    assert file_bytes(with_pixels(header)) == path.read_bytes()


SCRIPT = """
import sys
from datetime import UTC, datetime
from pathlib import Path
from dicomnode.companions import CompanionOptions
from dicomnode.deferred import with_pixels
from dicomnode.derived import OutputOptions
from dicomnode.imaging.inference import load_model
from dicomnode.imaging.package import read_package
from dicomnode.part10 import read_instances
from dicomnode.pipeline import Task
from dicomnode.results import Draft
from dicomnode.stages import Stream

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

model = load_model(read_package(Path(sys.argv[1])))
task = Task(OutputOptions(), datetime(2026, 1, 1, tzinfo=UTC), companions=CompanionOptions())

def run(files, out):
    with Draft(out) as draft:
        Stream(read_instances(files, pixels="later"), model, task, draft).run(with_pixels)
        draft.commit()

files = sorted(Path(sys.argv[2]).iterdir())
run(files[:2], Path(sys.argv[3]) / "first")
before = peak()
run(files, Path(sys.argv[3]) / "second")
print(peak() - before)
"""


def grown(model: Path, files: Path, out: Path) -> int:
    """Bytes by which the peak memory of a process grows while it translates a series."""
    command = [sys.executable, "-c", SCRIPT, str(model), str(files), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return int(done.stdout)


def big_series(slices: int, folder: Path, one: Dataset) -> Path:
    """The files of one slice, of noise, are the pattern of the others."""
    folder.mkdir()
    for index in range(slices):
        (ds,) = changed([one], SOPInstanceUID=f"1.2.3.{index + 1}", InstanceNumber=index + 1)
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
        ds.ImagePositionPatient = [0, 0, index]
        ds.save_as(folder / f"{index:05}.dcm", enforce_file_format=True)
    return folder


def fixed(folder: Path) -> tuple[Path, Dataset]:
    """A package with one window for every volume, and a slice for it, 512 x 512."""
    return package_for(KINDS["denoise"], folder).path, ct_series(1, 512, 512)[0]


def percentiles(folder: Path) -> tuple[Path, Dataset]:
    """The same with a window of the volume's own foreground."""
    return write(folder / "m", TO_CT), mr_series(1, 512, 512)[0]


@pytest.mark.parametrize(("kind", "slices"), [(fixed, 60), (fixed, 120), (percentiles, 90)])
def test_memory_is_less_than_twice_the_volume(
    kind: Callable[[Path], tuple[Path, Dataset]], slices: int, tmp_path: Path
) -> None:
    """Stored values are half of a float32 volume, results are one: more must not be kept."""
    model, one = kind(tmp_path / "models")
    used = grown(model, big_series(slices, tmp_path / "in", one), tmp_path / "out")
    volume = slices * 512 * 512 * 4
    assert used < 1.75 * volume + 40e6, f"{used / volume:.2f} volumes"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", [fixed, percentiles])
@pytest.mark.skipif("DICOMNODE_LONG" not in os.environ, reason="minutes: set DICOMNODE_LONG=1")
def test_two_thousand_slices_need_less_than_their_volume_twice(
    kind: Callable[[Path], tuple[Path, Dataset]], tmp_path: Path
) -> None:
    model, one = kind(tmp_path / "models")
    used = grown(model, big_series(2000, tmp_path / "in", one), tmp_path / "out")
    volume = 2000 * 512 * 512 * 4
    print(f"2000 slices, {kind.__name__}: {used / volume:.2f} volumes of {volume / 1e9:.1f} GB")
    assert used < 2 * volume
