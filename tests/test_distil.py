"""A student learns what its teacher gives, and its package names the teacher."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dicomnode.errors import ConfigError
from dicomnode.imaging.inference import load_model
from dicomnode.imaging.intensity import Window
from dicomnode.imaging.networks import build_generator
from dicomnode.imaging.package import ModelPackage, read_package, write_package
from tests.test_package import DENOISER, golden
from tests.test_training import slice_hu, write_config, write_series
from training import distil
from training.config import load_config
from training.distil import Taught, Teacher
from training.errors import TrainingError
from training.material import load_material

WINDOW = Window(-1024.0, 3071.0)


def teacher(path: Path, window: Window = WINDOW) -> ModelPackage:
    """A package that makes everything 30 HU denser: what no data would teach."""
    manifest = replace(
        DENOISER,
        input=replace(DENOISER.input, intensity=window),
        output=replace(DENOISER.output, intensity=window),
    )
    generator = build_generator(manifest.generator.architecture, manifest.generator.options)
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.zero_()
        generator.last.bias.fill_(30.0 / window.unit_per_network * generator.gain)
    return write_package(path, manifest, generator.state_dict(), golden(), "# Card")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A run of a few seconds with four generated patients."""
    for number in range(4):
        write_series(tmp_path / "data" / "ct", f"P{number}", number + 1)
    return write_config(
        tmp_path / "data" / "ct",
        tmp_path,
        optimisation={"steps": 60, "batch_size": 2, "patch": 32, "learning_rate": 0.01},
        save_every=60,
    )


def shift_of(package: Path) -> float:
    """By how many HU a package makes the inside of a body denser, on average."""
    model = load_model(read_package(package), precision="fp32")
    source = slice_hu(55)
    with torch.inference_mode():
        made = model.generator(torch.from_numpy(WINDOW.to_network(source)[None, None]))
    return float(made[0, 0].numpy()[40:90, 40:90].mean() * WINDOW.unit_per_network)


@pytest.mark.parametrize(("share", "least", "most"), [("1", 20.0, 40.0), ("0", -8.0, 8.0)])
def test_a_student_learns_what_its_teacher_gives(
    config: Path, tmp_path: Path, share: str, least: float, most: float
) -> None:
    taught = teacher(tmp_path / "teacher")
    distil.main([str(config), f"teacher={taught.path}", f"share={share}", "details.share=0"])
    student = read_package(tmp_path / "package")
    assert least < shift_of(student.path) < most
    said = student.manifest.training
    assert said["teacher"] == "small-denoiser 1.2.0"
    assert (said["teacher_sha256"], said["teacher_share"]) == (taught.digest, float(share))


def test_where_a_known_detail_is_the_truth_alone_counts(config: Path, tmp_path: Path) -> None:
    run = load_config(config, ["details.share=1", "optimisation.batch_size=4"])
    material = load_material(run)
    given = material.batch(3)
    taught = Taught(material, Teacher(teacher(tmp_path / "teacher"), 0.5, run)).batch(3)
    moved = ((taught.target - given.target) * WINDOW.unit_per_network).numpy()
    detail = (given.weight > 1).numpy()
    assert detail.any()
    assert (moved[detail] == 0).all()
    expected = 0.5 * (given.source - given.target).numpy() * WINDOW.unit_per_network + 15
    np.testing.assert_allclose(moved[~detail], expected[~detail], atol=0.6)  # bf16 teacher


def test_a_run_does_not_change_its_teacher(config: Path, tmp_path: Path) -> None:
    first, second = teacher(tmp_path / "a"), teacher(tmp_path / "b", Window(-1024.0, 3071.5))
    distil.main([str(config), f"teacher={first.path}", "stop_at=1"])
    with pytest.raises(TrainingError, match="belongs to a run with another teacher"):
        distil.main([str(config), f"teacher={first.path}", "share=0.2", "stop_at=2"])
    with pytest.raises(TrainingError, match="other intensities or slices"):
        distil.main([str(config), f"teacher={second.path}"])


@pytest.mark.parametrize(
    ("options", "reason"), [([], "teacher: missing"), (["teacher={}", "share=1.5"], "share: from")]
)
def test_a_teacher_and_its_share_are_checked(
    config: Path, tmp_path: Path, options: list[str], reason: str
) -> None:
    path = teacher(tmp_path / "teacher").path
    with pytest.raises(ConfigError, match=reason):
        distil.main([str(config), *(option.format(path) for option in options)])
