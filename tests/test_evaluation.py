"""training/evaluate.py on two folders and on packages: figures, page, card, and what it refuses."""

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray

from dicomnode.errors import ConfigError
from dicomnode.imaging.inference import load_model
from dicomnode.imaging.package import read_package
from tests.factories import ct_series
from tests.test_pairs import anatomy, as_mr, served, write_config, write_nifti
from training import evaluate, train
from training.config import Images, load_config
from training.errors import TrainingError
from training.evaluation import evaluate as judge
from training.features import load_extractor
from training.measures import MEANING, PUBLISHED, Asked
from training.pairs import patient_of
from training.publish import turned_round
from training.split import read_split
from training.studies import Folders, folder_studies, image_studies, volumes_of

SLICES, SIZE = 8, 48


def body(seed: int) -> NDArray[np.float32]:
    """(8, 48, 48), float32, HU."""
    row, column = np.indices((SIZE, SIZE)) - SIZE / 2
    hu = np.full((SLICES, SIZE, SIZE), -1000.0, np.float32)
    hu[:, np.hypot(row / 20, column / 22) < 1] = 30 + 5 * seed
    hu[:, np.hypot(row + 4, column - 10) < 6] = -800
    hu[:, np.hypot(row - 10, column + 8) < 4] = 600
    return hu + np.random.default_rng(seed).normal(0, 8, hu.shape).astype(np.float32)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Four volumes each: truth, result (2 HU denser), other (noisier)."""
    for number in range(4):
        truth = body(number)
        noise = np.random.default_rng(number + 9).normal(0, 30 + number, truth.shape)
        for name, voxels in {"truth": truth, "result": truth + 2, "other": truth + noise}.items():
            write_nifti(tmp_path / name / f"P{number}.nii.gz", voxels.astype(np.float32))
    return tmp_path


def run(folders: Path, *words: str) -> dict[str, Any]:
    """metrics.json of two folders."""
    out = folders / "out"
    kinds = [f"result={folders / 'result'}", f"truth={folders / 'truth'}", f"out={out}"]
    evaluate.main([*kinds, "unit=HU", *words])
    found: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return found


# --- two folders


def test_a_constant_error_is_found_in_every_figure(folders: Path) -> None:
    found = run(folders)
    figures = {name: value["mean"] for name, value in found["figures"].items()}
    assert found["patients"] == found["volumes"] == 4
    for name in ("mae", "mae_body", "bias_body", "rmse_body", "histogram_distance", "mae_bone"):
        assert figures[name] == pytest.approx(2, abs=1e-3), name
    assert figures["jitter"] == pytest.approx(1, abs=1e-4)
    assert figures["psnr"] == pytest.approx(20 * np.log10(4095 / 2), abs=0.01)
    assert found["agreement"]["mean in the body"]["bias"] == pytest.approx(2, abs=1e-3)


def test_a_better_result_is_told_from_a_worse_one(folders: Path) -> None:
    found = run(folders, f"other={folders / 'other'}")
    error, similarity = (found["against_other"][name] for name in ("mae", "ssim"))
    assert error["high"] < 0 < similarity["low"]
    assert error["t_test"] < 0.001
    assert error["wilcoxon"] == pytest.approx(0.125)  # the least that four patients can give


@pytest.mark.parametrize("profile", ["standard", *PUBLISHED])
def test_every_profile_names_itself_and_its_figures(folders: Path, profile: str) -> None:
    found = run(folders, f"profile={profile}", "exam=chest")
    assert found["profile"] == profile
    assert set(found["figures"]) <= set(PUBLISHED.get(profile, MEANING))
    assert set(found["meaning"]) == set(found["figures"])
    page = (folders / "out" / "report.html").read_text()
    assert f"Profile <b>{profile}</b>" in page


def test_the_page_needs_nothing_else_and_shows_every_patient(folders: Path) -> None:
    run(folders, f"other={folders / 'other'}", "features=random:1")
    page = (folders / "out" / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "<script" not in page
    assert page.count("data:image/png") == 4 * 3  # result, truth, difference
    assert page.count("<svg") == 3  # body, soft tissue, bone
    assert "P0" not in re.sub(r"data:[^\"]*", "", page)


def test_volumes_of_one_patient_are_one_patient(folders: Path) -> None:
    for name in ("truth", "result"):
        shutil.copy(folders / name / "P0.nii.gz", folders / name / "P0b.nii.gz")
    found = run(folders, r"patient=^(P\d)")
    assert (found["patients"], found["volumes"]) == (4, 5)


def test_a_mask_replaces_the_body_that_is_found(folders: Path) -> None:
    for number in range(4):
        mask = (body(number) > 300).astype(np.float32)
        write_nifti(folders / "mask" / f"P{number}.nii.gz", mask)
    found = run(folders, f"mask={folders / 'mask'}", f"other={folders / 'other'}")
    assert "mean in soft tissue" not in found["agreement"]
    assert found["agreement"]["mean in bone"] == found["agreement"]["mean in the body"]


def test_a_dicom_series_is_one_volume(tmp_path: Path) -> None:
    for name in ("result", "truth"):
        for index, dataset in enumerate(ct_series(8, 64, 64, seed=3)):
            folder = tmp_path / name / "series-1"
            folder.mkdir(parents=True, exist_ok=True)
            dataset.save_as(folder / f"{index}.dcm", enforce_file_format=True)
    found = run(tmp_path)
    assert found["figures"]["mae"]["mean"] == 0
    assert "psnr" not in found["figures"]  # infinite: there is no error


def test_uptake_is_compared_in_the_patient_and_in_its_regions(tmp_path: Path) -> None:
    for number in range(3):
        suv = np.clip(body(number) / 100, 0, None)
        suv[:, 30:34, 12:16] = 8
        labels = np.zeros_like(suv)
        labels[:, 30:34, 12:16] = 1
        lower = np.where(labels > 0, suv * 0.9, suv)
        for name, voxels in {"truth": suv, "result": lower, "labels": labels}.items():
            write_nifti(tmp_path / name / f"P{number}.nii.gz", voxels.astype(np.float32))
    found = run(tmp_path, "unit=SUV", f"labels={tmp_path / 'labels'}")
    assert found["range"] == [0, 20]
    assert found["figures"]["suv_mean_error_regions"]["mean"] == pytest.approx(-10, abs=0.01)
    assert -10 < found["figures"]["suv_mean_error"]["mean"] < 0
    assert found["agreement"]["maximum"]["bias"] == pytest.approx(-0.8, abs=0.1)
    with pytest.raises(TrainingError, match="judges HU, not SUV"):
        run(tmp_path, "unit=SUV", "profile=synthrad2025")


def test_distances_of_features_name_their_network_and_warn(folders: Path) -> None:
    found = run(folders, "features=random:1")["features"]
    assert found["name"] == "FD[random:1]"
    assert (found["results"], found["truths"], found["length"]) == (32, 32, 16)
    assert found["warning"] is None
    asked = Asked("standard", "HU", -1024, 3071)
    studies = list(folder_studies(Folders(folders / "truth", folders / "truth", "HU")))
    spread = judge(studies[:2], asked, load_extractor("random:1")).spread
    assert spread is not None
    assert spread.frechet == pytest.approx(0, abs=1e-9)
    assert "32 or more" in str(spread.warning)


# --- what is refused


def test_folders_that_do_not_match_are_refused(folders: Path) -> None:
    with pytest.raises(TrainingError, match="no such folder"):
        run(folders, f"truth={folders / 'nowhere'}")
    (folders / "empty").mkdir()
    with pytest.raises(TrainingError, match=r"empty: no image in it"):
        run(folders, f"truth={folders / 'empty'}")
    (folders / "truth" / "P3.nii.gz").rename(folders / "truth" / "Q3.nii.gz")
    with pytest.raises(TrainingError, match="2 of the names in one are not in the other"):
        run(folders)


def test_volumes_of_other_size_or_place_are_refused(folders: Path) -> None:
    write_nifti(folders / "result" / "P0.nii.gz", body(0)[:, :-1])
    with pytest.raises(TrainingError, match=r"\(8, 47, 48\) and truth of \(8, 48, 48\)"):
        run(folders)
    write_nifti(folders / "result" / "P0.nii.gz", body(0), shift=2)
    with pytest.raises(TrainingError, match="at different places"):
        run(folders)


@pytest.mark.parametrize(
    ("voxels", "unit", "reason"),
    [
        (np.clip(body(0) / 8 + 128, 0, 255), "HU", "from 0 to .* are not HU"),
        (np.clip(body(0) / 1000, -1, 1), "HU", "are not HU"),
        (body(0) / 200, "SUV", "is not SUV"),
        (np.full((SLICES, SIZE, SIZE), -1000.0), "HU", "no body"),
    ],
)
def test_values_that_are_not_of_the_unit_are_refused(
    folders: Path, voxels: NDArray[np.float32], unit: str, reason: str
) -> None:
    for name in ("result", "truth"):
        write_nifti(folders / name / "P0.nii.gz", voxels.astype(np.float32))
    with pytest.raises(TrainingError, match=reason):
        run(folders, f"unit={unit}")


def test_values_that_are_no_numbers_are_refused(folders: Path) -> None:
    (folders / "result" / "P0.nii.gz").unlink()
    write_nifti(folders / "result" / "P0.mha", np.where(body(0) > 0, np.nan, body(0)))
    with pytest.raises(TrainingError, match="not finite"):
        run(folders)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["unit=hounsfield"], "unit: want one of HU"),
        (["unit=AU"], r"range: missing; AU have none of their own"),
        (["range=5"], "range: '' is not a number"),
        (["range=5,1"], "range: missing"),
        (["profile=best"], "profile: want one of standard, synthrad2023"),
        (["profile=ldctbench", "exam=knee"], "exam: want one of chest"),
        (["colour=blue"], "colour=blue: want result="),
        (["unit=SUV", "profile=synthrad2025"], "are not SUV"),
    ],
)
def test_words_that_mean_nothing_are_refused(folders: Path, words: list[str], reason: str) -> None:
    with pytest.raises((ConfigError, TrainingError), match=reason):
        run(folders, *words)


def test_a_network_that_is_none_is_refused(folders: Path) -> None:
    with pytest.raises(TrainingError, match="cannot be read"):
        run(folders, f"features=inception:{folders / 'missing.pth'}")
    with pytest.raises(TrainingError, match="or the folder of a classifier"):
        run(folders, f"features={folders / 'truth'}")


# --- packages


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a translation whose two packages are trained a little."""
    folder = tmp_path_factory.mktemp("evaluated")
    for number in range(6):
        hu = anatomy(number)
        write_nifti(folder / "data" / f"P{number}" / "CT.nii.gz", hu)
        write_nifti(folder / "data" / f"P{number}" / "MR.nii.gz", as_mr(hu))
    publish = {
        "task": "syn_mr",
        "bounds": {"modality": ["CT"]},
        "licence": "MIT",
        "intended_use": "Tests only.",
        "algorithm_family": "test",
    }
    package, card = str(folder / "ct-to-mr"), str(folder / "card.md")
    back = {"name": "ct-to-mr", "package": package, "card": card, "publish": publish}
    path = write_config(
        folder / "data", folder, recipe="cyclegan", backward=back, data={"test_fraction": 0.4}
    )
    train.main([str(path)])
    return path


def test_a_package_is_judged_and_its_card_holds_the_figures(trained: Path, tmp_path: Path) -> None:
    package = trained.parent / "mr-to-ct"
    before = read_package(package)
    evaluate.main([str(trained), f"out={tmp_path}", "card=yes"])
    found = json.loads((tmp_path / "metrics.json").read_text())
    after = read_package(package)
    assert found["package"] == f"mr-to-ct 0.1.0, digest {before.digest}"
    assert found["patients"] == 2
    mae = after.manifest.validation["evaluation"]["figures"]["mae_body"]
    assert mae[0] == found["figures"]["mae_body"]["mean"]
    own = before.manifest.validation["mae"]
    assert mae[0] == pytest.approx(own[0], rel=1e-3)  # what train.py found in the same pixels
    card = (package / "MODEL_CARD.md").read_text()
    assert f"| mae_body | {mae[0]:.4g} HU |" in card
    assert found["command"] in card
    load_model(after)  # the weights and the self-test are still those
    evaluate.main([str(trained), f"out={tmp_path}", "card=yes", "profile=synthrad2025"])
    card = (package / "MODEL_CARD.md").read_text()
    assert card.count("## Evaluation") == 1
    assert "| ms_ssim |" in card
    assert card.startswith("# mr-to-ct: 2 patients\n")


def test_the_way_back_is_judged_in_the_unit_of_its_target(trained: Path, tmp_path: Path) -> None:
    evaluate.main([str(trained), f"out={tmp_path}", "way=backward"])
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["package"].startswith("ct-to-mr")
    assert (found["unit"], found["range"]) == ("AU", [0, 600])
    assert "iou" not in found["figures"]
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png") == 2 * 4  # the source is shown too


def test_the_error_after_both_ways_is_that_of_the_served_packages(
    trained: Path, tmp_path: Path
) -> None:
    evaluate.main([str(trained), f"out={tmp_path}", "data.paired=false"])
    found = json.loads((tmp_path / "metrics.json").read_text())
    tested = read_split(trained.parent / "split.yaml")["test"]
    errors = []
    for number in range(6):
        if patient_of(f"P{number}/MR.nii.gz", r"(P\d+)/") in tested:
            mr = as_mr(anatomy(number))
            hu = served(trained.parent / "mr-to-ct", "AU", mr)
            again = served(trained.parent / "ct-to-mr", "HU", hu)
            errors.append(float(np.abs(again - mr).mean()))
    assert found["figures"]["cycle_error"]["mean"] == pytest.approx(np.mean(errors), rel=1e-3)


def test_two_packages_are_compared_on_the_same_patients(trained: Path, tmp_path: Path) -> None:
    """A package beside a copy of itself: no difference; one that takes other slices is refused."""
    package = trained.parent / "mr-to-ct"
    shutil.copytree(package, tmp_path / "copy")
    evaluate.main([str(trained), f"out={tmp_path}", f"other={tmp_path / 'copy'}"])
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["compared with"] == found["package"]
    assert found["against_other"]["mae_body"]["mean"] == 0
    assert found["against_other"]["mae_body"]["wilcoxon"] == 1
    assert (tmp_path / "report.html").read_text().count("data:image/png") == 2 * 4
    with pytest.raises(TrainingError, match=r"its input\.intensity is not that of the config"):
        evaluate.main([str(trained), "data.source.intensity.high=700"])
    with pytest.raises(TrainingError, match="other: its results are in AU, the truth in HU"):
        evaluate.main([str(trained), f"other={trained.parent / 'ct-to-mr'}"])


def test_images_without_pairs_are_judged_by_what_can_be_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A network that changes nothing: its way back gives the source, its values are not theirs."""
    for number in range(6):
        hu = anatomy(number)
        write_nifti(tmp_path / "data" / f"P{number}" / "CT.nii.gz", hu)
        write_nifti(tmp_path / "data" / f"P{number}" / "denser.nii.gz", hu + 50)
    side = {
        "modality": "CT",
        "unit": "HU",
        "intensity": {"kind": "window", "low": -1024, "high": 600},
    }
    back = {"name": "back", "package": str(tmp_path / "back"), "card": str(tmp_path / "card.md")}
    publish = {"task": "denoise", "bounds": {"modality": ["CT"]}, "licence": "MIT"}
    publish |= {"intended_use": "Tests only.", "algorithm_family": "test"}
    path = write_config(
        tmp_path / "data",
        tmp_path,
        recipe="cyclegan",
        residual=True,
        publish=publish,
        backward={**back, "publish": publish},
        adversarial={"learning_rate": 0.0, "initial_spread": 0},
        optimisation={"steps": 1, "batch_size": 1, "patch": 32, "learning_rate": 0.003},
        data={
            "paired": False,
            "test_fraction": 0.4,
            "source": {**side, "files": "*/CT.nii.gz"},
            "target": {**side, "files": "*/denser.nii.gz"},
        },
    )
    train.main([str(path)])
    evaluate.main([str(path), f"out={tmp_path}", "features=random:1", "card=yes"])
    found = json.loads((tmp_path / "metrics.json").read_text())
    figures = {name: own["mean"] for name, own in found["figures"].items()}
    assert found["profile"] == "unpaired"
    assert figures["cycle_error"] == pytest.approx(0, abs=1e-3)
    assert figures["information_kept"] == pytest.approx(2, abs=1e-6)
    assert 20 < figures["histogram_distance"] < 90  # 50 HU, and other organs
    assert found["histogram distance to compare with"].endswith("to those of this part")
    assert found["features"]["truths"] == found["features"]["results"] == 8
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png") == 2 * 2  # source and result; there is no truth
    assert "No slice has its truth" in page
    assert "| cycle_error |" in (tmp_path / "mr-to-ct" / "MODEL_CARD.md").read_text()
    capsys.readouterr()
    evaluate.main([str(path), f"out={tmp_path}", "way=backward"])
    assert "histogram_distance" in capsys.readouterr().out
    for words, reason in {
        "profile=synthrad2023": "have no truth",
        "dose=0.5": "dose: means nothing for data.kind: images",
        f"back={tmp_path / 'none'}": "back: no package .*; train it first",
    }.items():
        with pytest.raises(ConfigError, match=reason):
            evaluate.main([str(path), words])


def test_a_package_of_another_unit_is_refused(trained: Path) -> None:
    with pytest.raises(TrainingError, match="results are in AU, the truth in HU"):
        evaluate.main([str(trained), f"package={trained.parent / 'ct-to-mr'}"])


def test_slices_are_put_together_by_volume(trained: Path) -> None:
    config = load_config(trained)
    assert isinstance(config.data, Images)
    model = load_model(read_package(trained.parent / "ct-to-mr"))
    turned = turned_round(config.data)
    studies = list(image_studies(config, turned, model, "train"))
    assert [study.truth.shape[0] for study in studies] == [4] * len(studies)
    assert volumes_of([]) == []


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["part=all"], "part: want one of"),
        (["way=sideways"], "way: want one of"),
        (["card=maybe"], "card: want one of"),
        (["seed=x"], "seed: want int"),
    ],
)
def test_wrong_words_with_a_config_are_refused(
    trained: Path, words: list[str], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        evaluate.main([str(trained), *words])


def test_the_same_images_give_the_same_files(folders: Path) -> None:
    def digest() -> str:
        run(folders, f"other={folders / 'other'}", "features=random:1")
        both = (folders / "out" / "metrics.json", folders / "out" / "report.html")
        return hashlib.sha256(b"".join(path.read_bytes() for path in both)).hexdigest()

    assert digest() == digest()


def test_labels_and_masks_must_fit_too(folders: Path) -> None:
    image = sitk.GetImageFromArray(np.ones((2, 4, 4), np.float32))
    (folders / "mask").mkdir()
    for number in range(4):
        sitk.WriteImage(image, str(folders / "mask" / f"P{number}.nii.gz"))
    with pytest.raises(TrainingError, match=r"mask of \(2, 4, 4\)"):
        run(folders, f"mask={folders / 'mask'}")
