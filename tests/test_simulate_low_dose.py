"""Lower doses that are simulated: noise as physics has it, instances that say what they are."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydicom import dcmread
from scipy import ndimage

from dicomnode.errors import ConfigError
from dicomnode.imaging.marks import is_synthetic
from dicomnode.imaging.volume import volume_from_datasets
from tests import judges
from tests.factories import ct_series, mr_series
from training import simulate_low_dose
from training.errors import TrainingError
from training.simulate_low_dose import LowDoseRun, lower_dose, pixel_poisson, projection_noise

SPACING_MM = 2.4
SIZE = 128
ROW, COLUMN = np.indices((SIZE, SIZE)) - (SIZE - 1) / 2
INSIDE = np.hypot(ROW, COLUMN) < 44
CENTRE, RIM = np.hypot(ROW, COLUMN) < 12, np.hypot(ROW, COLUMN - 40) < 6
AIR = np.hypot(ROW, COLUMN) > 58


def water(value: float = 0.0) -> NDArray[np.float32]:
    """Four slices of a cylinder of 240 mm across, (4, 128, 128), float32, HU."""
    disc = np.where(np.hypot(ROW, COLUMN) < 50, value, -1000.0)
    return np.repeat(disc[None], 4, axis=0).astype(np.float32)


def projected(photons: float, seed: int = 1, electronic: float = 0.0) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    return projection_noise(water(), SPACING_MM, photons, rng, electronic, views=60)


def by_pixel(dose: float, value: float = 0.0) -> NDArray[np.float32]:
    return pixel_poisson(water(value), dose, np.random.default_rng(1)) - water(value)


def correlation(noise: NDArray[np.float32]) -> float:
    """Of horizontal neighbours in the middle."""
    middle = noise[:, 44:84, 44:84]
    return float(np.corrcoef(middle[..., 1:].ravel(), middle[..., :-1].ravel())[0, 1])


# physics


def test_the_variance_of_projected_noise_goes_with_one_over_the_dose() -> None:
    full, quarter = projected(4e5)[:, INSIDE].var(), projected(1e5, seed=2)[:, INSIDE].var()
    assert quarter / full == pytest.approx(4.0, rel=0.1)


def test_the_variance_of_pixel_noise_goes_with_one_over_the_dose() -> None:
    assert by_pixel(0.25)[:, INSIDE].var() / by_pixel(1.0)[:, INSIDE].var() == pytest.approx(
        4.0, rel=0.05
    )


def test_projected_noise_is_correlated_and_strongest_in_the_middle() -> None:
    fine = projection_noise(water(), 0.8, 1e5, np.random.default_rng(1), views=60)
    assert correlation(fine) > 0.2
    noise = projected(1e5)
    assert noise[:, CENTRE].std() > 1.25 * noise[:, RIM].std()
    assert noise[:, AIR].std() > 0.1 * noise[:, CENTRE].std()


def test_pixel_noise_is_white_and_spares_the_air() -> None:
    noise = by_pixel(0.25)
    assert abs(correlation(noise)) < 0.03
    assert noise[:, CENTRE].std() == pytest.approx(noise[:, RIM].std(), rel=0.05)
    assert noise[:, AIR].std() < 0.2 * noise[:, CENTRE].std()


def test_hounsfield_units_are_not_shifted() -> None:
    noise = projected(4e5)[:, INSIDE]
    assert abs(noise.mean()) < 4 * noise.std() / np.sqrt(noise.size / 40) + 0.5
    assert abs(noise.mean()) < 1.0
    assert abs(by_pixel(0.25)[:, INSIDE].mean()) < 1.0


def test_electronic_noise_counts_where_photons_are_few() -> None:
    def share(photons: float) -> float:
        quiet, noisy = projected(photons), projected(photons, electronic=20.0)
        return float(noisy[:, CENTRE].var() / quiet[:, CENTRE].var())

    assert share(4e4) > 1.2 * share(4e6)
    assert share(4e6) == pytest.approx(1.0, abs=0.1)


def test_a_blocked_ray_counts_one_photon_and_stays_finite() -> None:
    lead = projection_noise(water(3000.0), SPACING_MM, 10.0, np.random.default_rng(1), views=20)
    assert np.isfinite(lead).all()


@pytest.mark.parametrize("method", ["projection", "pixel_poisson"])
def test_the_same_slice_has_the_same_noise_and_another_seed_another(method: str) -> None:
    run = LowDoseRun(method=method, views=20)  # type: ignore[arg-type]
    once, again = (lower_dose(water(), SPACING_MM, run) for _ in range(2))
    other = lower_dose(water(), SPACING_MM, LowDoseRun(method=run.method, views=20, seed=2))
    assert np.array_equal(once, again)
    assert not np.array_equal(once, other)


# the command


@pytest.fixture
def series(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    made = ct_series(3, 48, 56, padding=0, private=True, CTDIvol=7.5, pixel_spacing=("3", "3"))
    for index, dataset in enumerate(made):
        dataset.save_as(folder / f"{index}.dcm", enforce_file_format=True)
    return folder


def lowered(source: Path, out: Path, *settings: str) -> list[Path]:
    simulate_low_dose.main([str(source), str(out), "views=60", *settings])
    return sorted(out.iterdir())


def test_dicom_becomes_a_series_that_says_what_it_is(series: Path, tmp_path: Path) -> None:
    files = lowered(series, tmp_path / "low", "dose=0.25")
    sources = [dcmread(path) for path in sorted(series.iterdir())]
    made = [dcmread(path) for path in files]
    assert len(made) == 3
    assert len({ds.SeriesInstanceUID for ds in made}) == 1
    for ds, source in zip(made, sources, strict=True):
        assert ds.SOPInstanceUID != source.SOPInstanceUID
        assert ds.SeriesInstanceUID != source.SeriesInstanceUID
        assert ds.StudyInstanceUID == source.StudyInstanceUID
        assert ds.SourceImageSequence[0].ReferencedSOPInstanceUID == source.SOPInstanceUID
        assert is_synthetic(ds)
        assert ds.SyntheticData == "YES"
        assert ds.ImageType[:2] == ["DERIVED", "SECONDARY"]
        assert "SIMULATED 25% DOSE" in ds.SeriesDescription
        assert '"dose": 0.25' in ds.DerivationDescription
        assert "CTDIvol" not in ds
        assert "Exposure" not in ds
        assert not any(element.tag.is_private for element in ds.iterall())
        assert ds.ImagePositionPatient == source.ImagePositionPatient
    before, _ = volume_from_datasets(sources)
    after, _ = volume_from_datasets(made)
    assert before.padding is not None
    assert after.padding is not None
    assert np.array_equal(before.padding, after.padding)
    body = ndimage.binary_erosion(before.voxels > -500, np.ones((1, 3, 3)), iterations=2)
    change = (after.voxels - before.voxels)[body]
    assert 3 < change.std() < 200
    assert abs(change.mean()) < 3


def test_the_same_command_gives_the_same_bytes(series: Path, tmp_path: Path) -> None:
    one, two = (lowered(series, tmp_path / name) for name in ("a", "b"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    other = lowered(series, tmp_path / "c", "dose=0.5")
    assert dcmread(other[0]).SOPInstanceUID != dcmread(one[0]).SOPInstanceUID


@pytest.mark.peers
def test_dciodvfy_has_no_more_to_say_than_of_the_source(series: Path, tmp_path: Path) -> None:
    judges.require(judges.DCIODVFY)
    files = lowered(series, tmp_path / "low")
    assert judges.iod_findings(sorted(series.iterdir()), files) == []


def test_values_that_do_not_fit_the_source_are_stored_as_whole_hu(tmp_path: Path) -> None:
    (source := tmp_path / "source").mkdir()
    stored = np.full((1, 48, 56), 24)  # -1000 HU, the lowest stored value is -1024 HU
    stored[:, 10:38, 10:46] = 1024
    (dataset,) = ct_series(1, 48, 56, stored=stored, pixel_spacing=("6", "6"))
    dataset.save_as(source / "0.dcm", enforce_file_format=True)
    (file,) = lowered(source, tmp_path / "low", "dose=0.02")
    made = dcmread(file)
    assert (made.PixelRepresentation, made.RescaleIntercept, made.BitsStored) == (1, 0, 16)
    hu = volume_from_datasets([made], min_slices=1)[0].voxels
    assert hu.min() < -1024
    assert abs(hu[0, 14:34, 14:42].mean()) < 15


def test_npy_and_16_bit_png_are_taken_and_give_npy(series: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", water())
    (file,) = lowered(tmp_path / "a.npy", tmp_path / "low")
    assert np.load(file).shape == (4, SIZE, SIZE)
    (*planes,) = lowered(series, tmp_path / "planes", "format=npy")
    assert [np.load(path).shape for path in planes] == [(1, 48, 56)] * 3


def test_an_8_bit_image_needs_to_be_declared(tmp_path: Path) -> None:
    Image.fromarray(np.full((40, 40), 127, np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(TrainingError, match="8-bit"):
        lowered(tmp_path / "a.png", tmp_path / "low", "method=pixel_poisson")
    (file,) = lowered(
        tmp_path / "a.png",
        tmp_path / "low",
        "method=pixel_poisson",
        "eight_bit=[-1024, 3071]",
    )
    grey = np.load(file) + 1024
    assert grey.mean() == pytest.approx(127 / 255 * 4095, rel=0.01)
    assert grey.var() == pytest.approx(127 / 255 * 4095 / 0.25, rel=0.15)


def test_what_is_no_ct_is_left_out_by_name(tmp_path: Path) -> None:
    (folder := tmp_path / "source").mkdir()
    (folder / "notes.txt").write_text("no image")
    mr_series(1)[0].save_as(folder / "mr.dcm", enforce_file_format=True)
    left_out: Counter[str] = Counter()
    for path in sorted(folder.iterdir()):
        assert not list(simulate_low_dose.simulate_file(path, LowDoseRun(), left_out))
    assert left_out == {"NOT_DICOM": 1, "NOT_CT": 1}
    with pytest.raises(TrainingError, match="no CT image"):
        simulate_low_dose.main([str(folder), str(tmp_path / "low")])
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(TrainingError, match="no CT image"):
        simulate_low_dose.main([str(empty), str(tmp_path / "low")])


@pytest.mark.parametrize(
    "setting", ["dose=0", "dose=2", "photons=0", "method=magic", "colour=red", "eight_bit=[1]"]
)
def test_a_setting_that_makes_no_sense_is_refused(setting: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=setting.split("=")[0]):
        simulate_low_dose.main([str(tmp_path), str(tmp_path / "low"), setting])
