"""Long and short axis of lymph nodes, on masks whose axes are known."""

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray

from training import axes
from training.axes import axes_mm, match, measure, read_mask
from training.errors import TrainingError


def ellipse(
    long_mm: float, short_mm: float, degrees: float, spacing_mm: tuple[float, float] = (0.5, 0.5)
) -> NDArray[np.bool_]:
    row, column = np.indices((160, 160)) - 79.5
    row, column = row * spacing_mm[0], column * spacing_mm[1]
    turn = np.deg2rad(degrees)
    along = row * np.sin(turn) + column * np.cos(turn)
    across = row * np.cos(turn) - column * np.sin(turn)
    return np.hypot(along / long_mm, across / short_mm) < 0.5


def write(path: Path, labels: NDArray[np.int_], spacing: tuple[float, float, float]) -> Path:
    image = sitk.GetImageFromArray(labels.astype(np.uint8))
    image.SetSpacing(spacing)
    sitk.WriteImage(image, str(path))
    return path


@pytest.mark.parametrize("degrees", [0, 17, 45, 90, 130])
def test_an_ellipse_has_the_axes_it_was_made_with(degrees: float) -> None:
    long_mm, short_mm = axes_mm(ellipse(24, 12, degrees), (0.5, 0.5))
    assert long_mm == pytest.approx(24, abs=0.8)
    assert short_mm == pytest.approx(12, abs=0.8)


def test_pixels_that_are_not_square_are_measured_in_mm() -> None:
    long_mm, short_mm = axes_mm(ellipse(30, 15, 60, (0.4, 0.9)), (0.4, 0.9))
    assert long_mm == pytest.approx(30, abs=1.2)
    assert short_mm == pytest.approx(15, abs=1.2)


def test_a_single_pixel_has_its_diagonal_and_the_chord_across() -> None:
    assert axes_mm(np.array([[True]]), (3.0, 4.0)) == pytest.approx((5.0, 3.75))


def test_the_short_axis_is_a_chord_perpendicular_to_the_long_one() -> None:
    """A right-angled triangle of 3, 4 and 5: the height over its longest side is 2.4."""
    corner = np.tri(300, dtype=np.bool_)
    long_mm, short_mm = axes_mm(corner, (0.01, 4 / 300))
    assert long_mm == pytest.approx(5, rel=0.01)
    assert short_mm == pytest.approx(2.4, rel=0.01)


def test_a_node_is_measured_in_the_slice_of_its_largest_area() -> None:
    labels = np.zeros((3, 160, 160), np.intp)
    labels[0][ellipse(10, 8, 0)], labels[1][ellipse(24, 12, 30)] = 2, 2
    (node,) = measure(labels, (5.0, 0.5, 0.5))
    assert (node.label, node.slice) == (2, 1)
    assert node.ratio == pytest.approx(0.5, abs=0.03)


def test_parts_of_a_binary_mask_are_nodes_of_their_own(tmp_path: Path) -> None:
    labels = np.zeros((2, 60, 60), np.int_)
    labels[:, 5:15, 5:15] = labels[:, 40:50, 40:45] = 1
    found, spacing = read_mask(write(tmp_path / "m.nii.gz", labels, (0.5, 0.6, 3.0)))
    assert spacing == pytest.approx((3.0, 0.6, 0.5))
    assert len(measure(found, spacing)) == 2


def test_nodes_are_matched_by_overlap_whatever_their_numbers() -> None:
    one, two = np.zeros((1, 30, 30), np.intp), np.zeros((1, 30, 30), np.intp)
    one[0, 2:8, 2:8], one[0, 20:26, 20:26] = 1, 2
    two[0, 21:27, 20:26], two[0, 2:8, 3:9], two[0, 12:15, 12:15] = 1, 5, 6
    assert match(one, two) == [(1, 5), (2, 1)]


def test_two_sets_of_masks_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, factor in (("truth", 1.0), ("generated", 1.2)):
        (tmp_path / folder).mkdir()
        for number, short in enumerate((8.0, 10.0, 12.0)):
            labels = ellipse(20, short * factor, 40)[None].astype(np.int_)
            write(tmp_path / folder / f"case{number}.nii.gz", labels, (0.5, 0.5, 3.0))
    out = tmp_path / "axes.json"
    axes.main([str(tmp_path / "truth"), f"other={tmp_path / 'generated'}", f"out={out}"])
    assert "3 nodes in both, 0 in one only" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["agreement"]["short_mm"]["bias"] == pytest.approx(2.0, abs=0.4)
    assert found["agreement"]["ratio"]["bias"] == pytest.approx(0.1, abs=0.03)
    assert found["agreement"]["long_mm"]["bias"] == pytest.approx(0.0, abs=0.4)
    assert len(found["nodes"]) == 3


def test_one_mask_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = ellipse(20, 10, 0)[None].astype(np.int_)
    axes.main([str(write(tmp_path / "m.mha", labels, (0.5, 0.5, 3.0)))])
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["1", "1", "0"]


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (np.zeros((1, 4, 4)), "no node in the mask"),
        (np.full((1, 4, 4), 0.5), "not a mask"),
        (np.full((1, 4, 4), -1.0), "not a mask"),
    ],
)
def test_what_is_no_mask_is_refused(
    labels: NDArray[np.float64], reason: str, tmp_path: Path
) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(labels.astype(np.float32)), str(tmp_path / "m.nii.gz"))
    with pytest.raises(TrainingError, match=reason):
        measure(*read_mask(tmp_path / "m.nii.gz"))


def test_masks_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    square = np.ones((1, 4, 4), np.int_)
    one = write(tmp_path / "one.mha", square, (1, 1, 1))
    with pytest.raises(TrainingError, match="voxels of"):
        axes.compared(one, write(tmp_path / "two.mha", square, (2, 1, 1)))
    with pytest.raises(TrainingError, match="do not match"):
        axes.compared(one, write(tmp_path / "three.mha", np.ones((1, 4, 5), np.int_), (1, 1, 1)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(TrainingError, match="no mask in it"):
        axes.main([str(tmp_path / "empty")])
    with pytest.raises(TrainingError, match="cannot be read"):
        axes.main([str(tmp_path / "missing.mha")])
