"""Pairs that are made by calculation: early and delayed PET, CT without and with enhancement."""

import re
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray

from tests.peers import shared_data
from training import prove, simulate_contrast, simulate_delayed_pet, train
from training.errors import TrainingError
from training.pet_anatomy import CLASSES, ActivityMap, drawn_body
from training.simulate_contrast import MOST_HU, PLAIN_HU, enhancement_of, pair_of
from training.simulate_delayed_pet import frames, write_pair

SIDE, MM = 160, 0.8


def box(label: str, suv: float) -> ActivityMap:
    """Muscle with a box of something in its middle."""
    labels = np.full((12, 32, 32), CLASSES.index("muscle"), np.uint8)
    labels[3:9, 8:24, 8:24] = CLASSES.index(label)
    parts = 1 + (labels != labels[0, 0, 0]).astype(np.int32)
    values = np.where(parts == 2, suv, 0.7).astype(np.float32)
    return ActivityMap(labels, parts, values, (3.27, 4.7, 4.7))


@pytest.mark.parametrize(
    ("label", "gains"), [("grey matter", True), ("liver", False), ("urine", True)]
)
def test_organs_gain_or_lose_between_the_frames(label: str, gains: bool) -> None:
    body = box(label, 6.0)
    early, delayed = frames(body, np.random.default_rng(3))
    inside = np.s_[4:8, 11:21, 11:21]
    assert (delayed[inside].mean() > 1.15 * early[inside].mean()) == gains
    assert (delayed[inside].mean() < early[inside].mean()) != gains
    assert early.min() >= 0
    assert early.dtype == np.float32


def test_noise_is_unbiased_and_grows_with_activity() -> None:
    body = box("grey matter", 6.0)
    many = np.stack([frames(body, np.random.default_rng(9))[1] for _ in range(2)])
    assert np.array_equal(many[0], many[1])
    spread = [
        np.std([frames(box("fat", suv), np.random.default_rng(n))[1][6, 16, 16] for n in range(60)])
        for suv in (0.7, 11.2)
    ]
    assert spread[1] > 1.8 * spread[0]


def test_drawn_bodies_differ_and_are_made_again_from_their_seed() -> None:
    bodies = [drawn_body(np.random.default_rng(seed), slices=24) for seed in (1, 1, 2)]
    assert np.array_equal(bodies[0].suv, bodies[1].suv)
    assert not np.array_equal(bodies[0].labels, bodies[2].labels)
    for body in bodies:
        assert ((body.parts > 0) == (body.labels > 0)).all()
        assert body.suv.max() < 60
        for part in range(1, body.parts.max() + 1):
            assert len(set(body.labels[body.parts == part])) == 1
    with pytest.raises(ValueError, match="at least 8"):
        drawn_body(np.random.default_rng(1), slices=7)


def test_twenty_bodies_hold_every_tissue() -> None:
    seen = {
        int(v) for n in range(20) for v in np.unique(drawn_body(np.random.default_rng(n)).labels)
    }
    assert seen == set(range(len(CLASSES)))


def chest() -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.bool_]]:
    """Noisy soft tissue of 50 HU with a vessel of 250 HU and a vertebra with a shell."""
    rng = np.random.default_rng(4)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    hu = np.where(np.hypot(rows - 80, columns - 80) < 70, 50.0, -1000.0)
    vessel = np.hypot(rows - 60, columns - 60) < 14
    bone = np.hypot(rows - 100, columns - 100) < 16
    hu[vessel] = 250
    hu[bone] = 700
    hu[np.hypot(rows - 100, columns - 100) < 12] = 220
    return (hu + rng.normal(0, 8, hu.shape)).astype(np.float32), vessel, bone


def test_the_enhancement_of_a_vessel_is_found_and_bone_is_left_alone() -> None:
    hu, vessel, bone = chest()
    found = enhancement_of(hu, MM)
    assert found[vessel].mean() == pytest.approx(250 - PLAIN_HU, abs=8)
    assert np.abs(found[bone]).mean() < 2
    assert (found[~vessel & ~bone] > 20).mean() < 0.005


def test_a_pair_keeps_its_noise_and_bounds_the_enhancement() -> None:
    hu, vessel, _ = chest()
    plain, enhanced = pair_of(hu, MM)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    middle = np.hypot(rows - 60, columns - 60) < 8
    assert plain[middle].mean() == pytest.approx(PLAIN_HU, abs=6)
    assert plain[middle].std() == pytest.approx(8, rel=0.2)
    change = enhanced - plain
    assert change[middle].mean() == pytest.approx(MOST_HU, rel=0.1)
    assert np.abs(change[~vessel]).mean() < 2


def test_a_slice_without_enhancement_is_its_own_partner() -> None:
    hu = np.random.default_rng(1).normal(40, 8, (64, 64)).astype(np.float32)
    plain, enhanced = pair_of(hu, 0.7)
    assert np.array_equal(plain, hu)
    assert np.array_equal(enhanced, hu)


@pytest.mark.parametrize("simulate", [simulate_delayed_pet.main, simulate_contrast.main])
def test_data_that_are_not_there_are_named(simulate, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(TrainingError, match="usage"):
        simulate([str(tmp_path)])
    with pytest.raises(TrainingError, match=str(tmp_path)):
        simulate([str(tmp_path), str(tmp_path / "out")])


def test_the_enhancement_of_a_real_slice_is_where_the_agent_is(tmp_path: Path) -> None:
    path = sorted((shared_data() / "training/ct_slices_contrast_labelled").glob("*CONTRAST_1*"))[4]
    simulate_contrast.write_pair(tmp_path, path)
    plain, enhanced = (
        sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / f"{name}.nii.gz"))).astype(float)
        for name in ("plain", "enhanced")
    )
    change = enhanced - plain
    assert change.min() >= 0
    assert 0.002 < (change > 30).mean() < 0.2
    assert np.abs(plain[change > 30].mean() - PLAIN_HU) < 25


def test_a_model_of_delayed_pet_is_trained_and_proven_per_tissue(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "pairs"
    for number in range(3):
        rng = np.random.default_rng([number, 7])
        write_pair(data / f"BODY_{number:03}", drawn_body(rng, slices=10), rng)
    (tmp_path / "card.md").write_text("# {name}\n")
    config = Path("training/configs/delayed-pet.yaml").resolve()
    changes = [
        *(
            f"data.root={data}",
            f"data.split={tmp_path / 'split.yaml'}",
            f"runs={tmp_path / 'runs'}",
        ),
        *(f"package={tmp_path / 'package'}", f"card={tmp_path / 'card.md'}", "data.slices=3"),
        *("data.validation_fraction=0.34", "data.test_fraction=0.34", "data.least_body=0.0"),
        *("optimisation.steps=12", "optimisation.batch_size=2", "optimisation.patch=32"),
        "generator.options={blocks: 1, width: 8, shuffle: 2, slices: 3}",
    ]
    train.main([str(config), *changes])
    prove.main([str(config), *changes])
    printed = capsys.readouterr().out
    assert re.search(r"^delayed-pet [0-9.]+, digest", printed, re.MULTILINE)
    assert "| fat | 1 |" in printed
    assert "bias of the model" in printed
