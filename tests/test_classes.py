"""A classifier's training: pictures without leaks, honest figures, a package that is served."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import binomtest

from dicomnode.errors import ConfigError
from dicomnode.imaging.classifier import load_classifier, read_classifier
from tests.peers import ROOT, identity_package, shared_data
from training import evaluate
from training.agreement import area_under_curve, bootstrap, mcnemar, mean_area
from training.checkpoint import load_checkpoint, save_checkpoint
from training.config import Classes, load_config
from training.downstream import main as downstream
from training.downstream import pixel_poisson
from training.errors import TrainingError
from training.material import load_material
from training.pictures import find_pictures, plainly_known
from training.recipes.build import build_recipe
from training.split import read_split
from training.train import main as train

NAMES = ("across", "along", "plaid")


def drawn(kind: str, rng: np.random.Generator) -> NDArray[np.uint8]:
    """(32, 40), stripes across, stripes along, or both; a patient of its own each time."""
    rows, columns = np.mgrid[:32, :40].astype(float)
    period, phase = rng.uniform(5, 8), rng.uniform(0, 6)
    down, right = (np.sin(x * 2 * np.pi / period + phase) for x in (rows, columns))
    pattern = {"across": down, "along": right, "plaid": down + right}[kind]
    pattern = (pattern - pattern.mean()) / pattern.std()  # so that brightness tells nothing
    grey = 120 + 30 * pattern + rng.normal(0, 25, pattern.shape)
    return np.clip(grey, 0, 255).astype(np.uint8)


def write(folder: Path, grey: NDArray[np.uint8], name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grey).save(folder / f"{name}.png")


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    """24 pictures of each class in two folders, as public collections come."""
    rng = np.random.default_rng(3)
    for kind in NAMES:
        for number in range(24):
            part = "valid" if number % 4 == 0 else "train"
            write(tmp_path / "in" / part / f"{kind}_T1", drawn(kind, rng), str(number))
    return tmp_path


def settings(folder: Path) -> dict[str, Any]:
    codes = [{"value": str(n), "scheme": "SCT", "meaning": name} for n, name in enumerate(NAMES)]
    return {
        "name": "patterns",
        "version": "1.0.0",
        "recipe": "classifier",
        "seed": 4,
        "threads": 1,
        "package": str(folder / "models" / "patterns"),
        "card": str(ROOT / "training" / "cards" / "chest-classes.md"),
        "runs": str(folder / "runs"),
        "data": {
            "kind": "classes",
            "root": str(folder / "in"),
            "split": str(folder / "split.yaml"),
            "collection": "drawn",
            "grey_hu": [-1000, 1000],
            "matrix": 24,
            "shift": 1,
            "classes": [
                {"name": name, "files": [f"*/{name}*/*.png"], "code": code}
                for name, code in zip(NAMES, codes, strict=True)
            ],
        },
        "generator": {
            "architecture": "densenet121",
            "options": {
                "classes": 3,
                "channels": 1,
                "blocks": [2, 2],
                "growth": 8,
                "width": 16,
            },
        },
        "optimisation": {"steps": 60, "batch_size": 12, "learning_rate": 0.01, "ema_decay": 0.9},
        "save_every": 30,
        "classifier": {
            "bounds": {"modality": ["CT"]},
            "licence": "MIT",
            "intended_use": "Tests only.",
            "algorithm_family": "test",
        },
    }


def config_file(folder: Path, **changed: Any) -> Path:
    (folder / "run.yaml").write_text(yaml.safe_dump({**settings(folder), **changed}))
    return folder / "run.yaml"


def data_of(folder: Path) -> Classes:
    data = load_config(config_file(folder)).data
    assert isinstance(data, Classes)
    return data


# --- the pictures -------------------------------------------------------------------------------
def test_the_same_picture_twice_is_one_and_one_of_two_classes_is_none(collection: Path) -> None:
    rng = np.random.default_rng(9)
    twice, torn = drawn("plaid", rng), drawn("across", rng)
    for part in ("train", "valid"):
        write(collection / "in" / part / "plaid_T1", twice, "again")
    write(collection / "in" / "train" / "across_T1", torn, "torn")
    write(collection / "in" / "train" / "along_T1", torn, "torn")
    found = find_pictures(data_of(collection))
    assert len(found.pictures) == 3 * 24 + 1
    assert found.left_out == {
        "the same picture again": 1,
        "the same picture in folders of two classes": 2,
    }
    assert not any(np.array_equal(picture.grey, torn) for picture in found.pictures)


def test_neighbouring_slices_are_kept_in_one_part_of_the_split(collection: Path) -> None:
    rng = np.random.default_rng(10)
    slice_of = drawn("plaid", rng).astype(float)
    for number in range(8):  # as if of one patient, in both folders
        near = np.clip(slice_of + rng.normal(0, 3, slice_of.shape), 0, 255).astype(np.uint8)
        folder = "valid" if number % 2 else "train"
        write(collection / "in" / folder / "plaid_T1", near, f"near {number}")
    config = load_config(config_file(collection))
    load_material(config)
    assert isinstance(config.data, Classes)
    pictures = find_pictures(config.data).pictures
    alike = {p.group for p in pictures if np.abs(p.grey - slice_of).mean() < 10}
    assert len(alike) == 1
    split = read_split(collection / "split.yaml")
    assert sum(bool(alike & set(part)) for part in split.values()) == 1
    assert len({picture.group for picture in pictures}) == 3 * 24 + 1


def test_a_class_that_brightness_gives_away_is_named(collection: Path) -> None:
    honest = find_pictures(data_of(collection)).warnings
    assert len(honest) == 1
    assert "no patient ids" in honest[0]
    rng = np.random.default_rng(11)
    for path in (collection / "in").rglob("plaid*/*.png"):
        grey = drawn("plaid", rng).astype(int) // 2 + 127
        Image.fromarray(grey.astype(np.uint8)).save(path)
    (_, cheat) = find_pictures(data_of(collection)).warnings
    assert "class plaid: 100% of its pictures are found by size and brightness alone" in cheat


def test_plain_features_know_the_size_of_a_picture_and_not_its_pattern(collection: Path) -> None:
    pictures = find_pictures(data_of(collection)).pictures
    stripes = [picture for picture in pictures if picture.label < 2]
    guessed = plainly_known(stripes[::2], stripes[1::2])
    truth = np.array([picture.label for picture in stripes[1::2]])
    assert 0.2 < (guessed == truth).mean() < 0.8


@pytest.mark.parametrize(
    ("break_it", "what"),
    [
        (lambda root: [p.unlink() for p in root.rglob("plaid*/*")], "data.classes.2.: no file"),
        (lambda root: (root / "train/plaid_T1/1.png").write_bytes(b"no"), "1.png: cannot be read"),
        (
            lambda root: Image.fromarray(np.zeros((9, 9), np.uint16)).save(
                root / "train/plaid_T1/1.png"
            ),
            "want 8-bit grey",
        ),
    ],
)
def test_what_is_no_collection_of_pictures_is_named(
    collection: Path, break_it: Any, what: str
) -> None:
    break_it(collection / "in")
    with pytest.raises(TrainingError, match=what):
        find_pictures(data_of(collection))


WRONG: list[tuple[str, Any, str]] = [
    ("recipe", "supervised", "recipe: data.kind classes needs classifier"),
    ("classifier", None, "classifier: missing"),
    ("data.grey_hu", [1, 0], "data.grey_hu"),
    ("generator.options.classes", 2, "generator.options.classes: want 3"),
    ("data.colour", "red", "unknown keys: colour"),
]


@pytest.mark.parametrize(("key", "value", "what"), WRONG, ids=[what for _, _, what in WRONG])
def test_a_configuration_that_does_not_fit_a_classifier_is_refused(
    key: str, value: Any, what: str, tmp_path: Path
) -> None:
    path = config_file(tmp_path)
    with pytest.raises(ConfigError, match=what.replace(".", r"\.")):
        load_config(path, [f"{key}={json.dumps(value)}"])


def test_a_classifier_needs_classes(tmp_path: Path) -> None:
    side = {
        "files": ["*.npy"],
        "modality": "CT",
        "unit": "HU",
        "intensity": {"kind": "window", "low": 0, "high": 1},
    }
    data = {"kind": "images", "root": ".", "split": "s.yaml", "collection": "none"}
    path = config_file(tmp_path, data={**data, "source": side, "target": side})
    with pytest.raises(ConfigError, match=r"classifier needs data\.kind: classes"):
        load_config(path)


# --- from data to table -------------------------------------------------------------------------
def test_a_classifier_learns_is_written_served_and_judged_downstream(
    collection: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config_file(collection)
    train([str(path)])
    said = capsys.readouterr().out
    assert "wrote " in said
    package = read_classifier(collection / "models" / "patterns")
    right, low, high = package.manifest.validation["accuracy"]
    assert right >= 0.85, said
    assert low <= right <= high
    assert package.manifest.training["recipe"] == "classifier"
    assert "Must not be used for patients" in (package.path / "MODEL_CARD.md").read_text()
    rng = np.random.default_rng(12)
    classifier = load_classifier(package)
    for label, kind in enumerate(NAMES):
        hu = np.stack([drawn(kind, rng) for _ in range(6)]).astype(np.float32)
        found = classifier.probabilities(hu / 255 * 2000 - 1000)
        assert (found.argmax(1) == label).mean() >= 0.66, kind
    denoiser = identity_package(collection / "models")
    capsys.readouterr()
    evaluate.main([str(path), f"out={collection / 'out'}"])
    judged = json.loads((collection / "out" / "metrics.json").read_text())
    taken = np.array(judged["taken_for"]["pictures"])
    assert judged["accuracy"][0] == pytest.approx(taken.trace() / taken.sum(), abs=1e-4)
    assert (
        judged["pictures_judged"]
        == taken.sum()
        == sum(own["pictures"] for own in judged["classes"].values())
    )
    assert "<h2>Taken for</h2>" in (collection / "out" / "report.html").read_text()
    with pytest.raises(ConfigError, match=r"way: means nothing for data\.kind: classes"):
        evaluate.main([str(path), "way=backward"])
    downstream([str(path), f"denoiser={denoiser}", "dose=0.01"])
    table = capsys.readouterr().out
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[1:6]] == [
        "| full dose",
        "| dose 0.01",
        "| denoised, identity",
        "| denoised, Gaussian of 1 pixel",
        "| size and brightness alone, no network",
    ]
    assert rows[2].split(" | ")[1:] == rows[3].split(" | ")[1:]  # identity changes nothing
    assert "| dose 0.01 - denoised, identity | 0 | 0 | 1 |" in table
    assert "warning: no patient ids" in table


def test_half_a_run_and_the_other_half_are_the_whole_run(collection: Path) -> None:
    config = load_config(config_file(collection))
    material = load_material(config)
    torch.manual_seed(1)
    whole = build_recipe(config)
    for step in range(6):
        whole.step(material.batch(step), step)
    torch.manual_seed(1)
    first, second = build_recipe(config), build_recipe(config)
    for step in range(3):
        first.step(material.batch(step), step)
    save_checkpoint(collection / "c.pt", first, 3, "x")
    assert load_checkpoint(collection / "c.pt", second, "x") == 3
    for step in range(3, 6):
        second.step(material.batch(step), step)
    one, other = whole.results()["forward"], second.results()["forward"]
    for key, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def test_the_shipped_config_of_the_downstream_check_can_be_read() -> None:
    config = load_config(ROOT / "training" / "configs" / "chest-classes.yaml")
    assert isinstance(config.data, Classes)
    assert [one.code.value for one in config.data.classes] == [
        "254626006",
        "22687000",
        "254634000",
        "17621005",
    ]
    assert not config.package.startswith("models")  # its weights are not to be shipped


@pytest.mark.slow
def test_the_public_chest_pictures_are_cleaned_and_their_cheat_is_told() -> None:
    root = shared_data() / "training" / "chest_ct_4class"
    if not root.is_dir():
        pytest.skip(f"no real pictures at {root}")
    config = load_config(ROOT / "training/configs/chest-classes.yaml", [f"data.root={root}"])
    assert isinstance(config.data, Classes)
    found = find_pictures(config.data)
    assert found.left_out["the same picture in folders of two classes"] == 2
    assert found.left_out["the same picture again"] == 106
    assert "class normal: 71% of its pictures are found by size" in found.warnings[1]
    split = read_split(ROOT / config.data.split)
    assert {p.group for p in found.pictures} == {g for part in split.values() for g in part}


# --- the figures --------------------------------------------------------------------------------
def test_the_area_under_the_curve_counts_pairs_in_order() -> None:
    scores = np.array([0.1, 0.4, 0.35, 0.8])
    positive = np.array([False, False, True, True])
    assert area_under_curve(scores, positive) == 0.75  # scikit-learn's example of roc_auc_score
    assert area_under_curve(np.ones(4), positive) == 0.5
    assert math.isnan(area_under_curve(scores, np.ones(4, bool)))
    both = np.stack([1 - scores, scores], 1)
    assert mean_area(both, positive.astype(np.intp)) == 0.75


@pytest.mark.parametrize(("only", "other"), [(0, 0), (5, 5), (9, 1), (3, 20)])
def test_mcnemar_is_the_exact_binomial_test_of_the_cases_that_differ(only: int, other: int) -> None:
    right = np.array([True] * only + [False] * other + [True] * 7 + [False] * 4)
    second = np.array([False] * only + [True] * other + [True] * 7 + [False] * 4)
    found = mcnemar(right, second)
    assert found[:2] == (only, other)
    expected = binomtest(only, only + other).pvalue if only + other else 1.0
    assert found[2] == pytest.approx(expected)


def test_an_interval_over_groups_is_wider_where_cases_repeat() -> None:
    rng = np.random.default_rng(5)
    values = rng.random(30) < 0.7
    once = bootstrap(lambda index: float(values[index].mean()), [str(n) for n in range(30)])
    ten = np.repeat(values, 10)
    groups = [str(n) for n in range(30) for _ in range(10)]
    kept = bootstrap(lambda index: float(ten[index].mean()), groups)
    parted = bootstrap(lambda index: float(ten[index].mean()), [str(n) for n in range(300)])
    assert once.value == kept.value == parted.value
    assert kept.high - kept.low == pytest.approx(once.high - once.low, rel=0.1)
    assert parted.high - parted.low < 0.5 * (kept.high - kept.low)
    assert once.low <= once.value <= once.high


def test_pixel_poisson_noise_has_the_mean_and_variance_of_counts_at_the_dose() -> None:
    rng = np.random.default_rng(6)
    grey = np.full((200, 200), 100.0, np.float32)
    low = pixel_poisson(grey, 0.25, rng)
    assert low.mean() == pytest.approx(100, abs=0.1)
    counts = 100 / 255 * 4095
    assert low.std() == pytest.approx(math.sqrt(counts / 0.25) / 4095 * 255, rel=0.03)
