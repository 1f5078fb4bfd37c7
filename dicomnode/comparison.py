"""A source series beside the series derived from it: is it right, and how does it look?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pydicom import Dataset

from dicomnode.errors import DicomNodeError
from dicomnode.imaging.units import Unit
from dicomnode.imaging.volume import Volume, volume_from_datasets

_BLOCK = 8
"""Noise is measured in blocks of this many rows and columns."""
_PANEL = 480
_UNITS: Mapping[str, Unit] = {"CT": "HU", "MR": "AU", "PT": "SUV"}
_WINDOWS = {"HU": (40.0, 400.0), "SUV": (3.0, 6.0)}
_INK, _WARNING, _PAPER = (235, 235, 235), (255, 190, 60), (16, 16, 16)


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """Two series on one grid, checked, and what was measured.

    Attributes:
        source: what was sent, in HU, SUV or, of MR, arbitrary units.
        result: what came back.
        mean_change: mean of result - source in the body; nan where their units differ.
        mean_absolute_change: mean of |result - source| in the body; nan likewise.
        noise_before_hu: standard deviation in soft tissue of the source, median of small blocks;
            nan unless both are in HU.
        noise_after_hu: the same blocks of the result.
        description: SeriesDescription of the result.
        model: the last SoftwareVersions of the result: model and version.
    """

    source: Volume
    result: Volume
    mean_change: float
    mean_absolute_change: float
    noise_before_hu: float
    noise_after_hu: float
    description: str
    model: str

    def sentences(self) -> list[str]:
        """What was checked and measured, without patient data."""
        slices, rows, columns = self.result.voxels.shape
        return [
            f"{slices} derived instances, one for each source instance, in one new series "
            "of the same study",
            "every one says Synthetic Data YES and names its own source in SourceImageSequence",
            f"geometry equal: {slices} x {rows} x {columns} voxels of "
            + " x ".join(f"{mm:g}" for mm in self.result.spacing_mm)
            + " mm",
            *self.measured(),
        ]

    def measured(self) -> list[str]:
        """What the values did, in words; the last is the most telling."""
        if self.source.unit != self.result.unit:
            inside = self.result.voxels[_body(self.source)]
            low, high = np.percentile(inside, (1, 99))
            return [
                f"in the body the values went from {self.source.unit} to {self.result.unit}, "
                f"{low:.0f} to {high:.0f} (1st and 99th percentile)"
            ]
        unit = self.source.unit
        digits = 1 if unit == "HU" else 2
        change = (
            f"in the body the {unit} changed by {self.mean_change:+.2f} on average, "
            f"by {self.mean_absolute_change:.{digits}f} in absolute value"
        )
        if unit != "HU":
            return [change]
        return [
            change,
            f"noise in soft tissue: {self.noise_before_hu:.1f} HU before, "
            f"{self.noise_after_hu:.1f} HU after",
        ]


def compare(source: Sequence[Dataset], derived: Sequence[Dataset]) -> Comparison:
    """Check a derived series against its source, and measure the difference.

    Raises:
        DicomNodeError: the first thing that is wrong with the derived series.
        SeriesRefused: one of the two is no volume.
    """
    images = [dataset for dataset in derived if "PixelData" in dataset]
    _check_series(source, images)
    before, sources = _volume(source)
    after, results = _volume(images)
    _check_geometry(before, after)
    _check_references(sources, results)
    change, noise = np.array([np.nan]), [float("nan"), float("nan")]
    if before.unit == after.unit and _body(before).any():
        change = (after.voxels - before.voxels)[_body(before)]
    if before.unit == after.unit == "HU":
        noise = _noise(before, after)
    return Comparison(
        before,
        after,
        float(change.mean(dtype=np.float64)),
        float(np.abs(change).mean(dtype=np.float64)),
        noise[0],
        noise[1],
        str(images[0].get("SeriesDescription", "")),
        str(np.atleast_1d(images[0].get("SoftwareVersions", ""))[-1]),
    )


def _volume(datasets: Sequence[Dataset]) -> tuple[Volume, list[Dataset]]:
    modality = str(datasets[0].get("Modality"))
    unit = _UNITS.get(modality)
    if unit is None:
        raise DicomNodeError(f"Modality is {modality}; a CT, MR or PT series can be compared")
    return volume_from_datasets(datasets, unit, min_slices=1, allow_lossy=True)


def _body(volume: Volume) -> NDArray[np.bool_]:
    """(slices, rows, columns): where the patient is, roughly."""
    if volume.unit == "HU":
        return volume.voxels > -300
    if volume.unit == "SUV":
        return volume.voxels > 0.2
    return volume.voxels > 0.1 * float(np.percentile(volume.voxels, 99))


def _noise(before: Volume, after: Volume) -> list[float]:
    blocks = [_blocks(volume.voxels) for volume in (before, after)]
    mean = blocks[1].mean(axis=-1)
    soft = (mean > 0) & (mean < 100) & (np.ptp(blocks[1], axis=-1) < 150)
    return [float(np.median(b.std(axis=-1)[soft])) if soft.any() else 0.0 for b in blocks]


def _check_series(source: Sequence[Dataset], images: Sequence[Dataset]) -> None:
    if len(images) != len(source):
        raise DicomNodeError(f"{len(source)} instances sent, {len(images)} derived came back")
    old, new = ({str(d.SeriesInstanceUID) for d in group} for group in (source, images))
    if len(new) != 1 or new & old:
        raise DicomNodeError(f"the derived instances are not one new series, but {len(new)}")
    if {d.StudyInstanceUID for d in images} != {d.StudyInstanceUID for d in source}:
        raise DicomNodeError("the derived series is not in the study of its source")
    unmarked = [d for d in images if d.get("SyntheticData") != "YES"]
    if unmarked:
        raise DicomNodeError(f"{len(unmarked)} derived instances do not say Synthetic Data YES")


def _check_geometry(before: Volume, after: Volume) -> None:
    same = (
        before.voxels.shape == after.voxels.shape
        and np.array_equal(before.positions, after.positions)
        and np.array_equal(before.orientation, after.orientation)
        and before.spacing_mm == after.spacing_mm
        and before.frame_of_reference_uid in ("", after.frame_of_reference_uid)
    )
    if not same:
        raise DicomNodeError("the derived series has another geometry than its source")


def _check_references(sources: Sequence[Dataset], results: Sequence[Dataset]) -> None:
    """Slice by slice, in the order of position: the same place, the right source."""
    for old, new in zip(sources, results, strict=True):
        items = new.get("SourceImageSequence") or []
        if not items or items[0].get("ReferencedSOPInstanceUID") != old.SOPInstanceUID:
            raise DicomNodeError(f"{new.SOPInstanceUID} does not name {old.SOPInstanceUID}")


def _blocks(voxels: NDArray[np.float32]) -> NDArray[np.float32]:
    """(slices, rows, columns) -> (slices, block rows, block columns, voxels of a block)."""
    slices, rows, columns = (n // m for n, m in zip(voxels.shape, (1, _BLOCK, _BLOCK), strict=True))
    whole = voxels[:, : rows * _BLOCK, : columns * _BLOCK]
    tiles = whole.reshape(slices, rows, _BLOCK, columns, _BLOCK).swapaxes(2, 3)
    return tiles.reshape(slices, rows, columns, _BLOCK * _BLOCK)


# --- the picture ------------------------------------------------------------------------------
def write_picture(comparison: Comparison, path: Path) -> None:
    """Source, result and difference of one slice and of a part of it.

    Where result and source have different units there is no difference: squares of the one and of
    the other in turn show whether they fit together.
    """
    index = len(comparison.source.voxels) // 3
    source, result = comparison.source, comparison.result
    rows, columns = _square_about(_body(source)[index])
    middle, part = (rows.start + rows.stop) // 2, (rows.stop - rows.start) // 6
    centre = (columns.start + columns.stop) // 2
    zoom = (slice(middle - part, middle + part), slice(centre - part, centre + part))
    first, second = (_grey(v.voxels[index], *_window(v)) for v in (source, result))
    if source.unit == result.unit:
        width = _window(source)[1]
        third = _grey(result.voxels[index] - source.voxels[index], 0, width)
        head = ("DIFFERENCE", "result - source, grey is 0")
    else:
        squares = (np.indices(first.shape) // max(8, first.shape[0] // 8)).sum(0) % 2 == 0
        third = np.where(squares, first, second)
        head = ("IN TURN", "squares of source and result")
    panels = [
        [_panel(grey[box]) for grey in (first, second, third)] for box in ((rows, columns), zoom)
    ]
    heads = (
        ("SOURCE", "as received", _INK),
        ("RESULT   SYNTHETIC, not acquired", f"{comparison.model}", _WARNING),
        (*head, _INK),
    )
    _sheet(panels, heads, comparison, index).save(path)


def _window(volume: Volume) -> tuple[float, float]:
    """Level and width that the images are shown in."""
    if volume.unit == "AU":
        high = float(np.percentile(volume.voxels, 99.5)) or 1.0
        return high / 2, high
    return _WINDOWS[volume.unit]


def _grey(values: NDArray[np.float32], level: float, width: float) -> NDArray[np.uint8]:
    shades = np.clip((values - level) / width + 0.5, 0, 1) * 255
    return np.asarray(np.rint(shades), np.uint8)


def _square_about(body: NDArray[np.bool_]) -> tuple[slice, slice]:
    """The smallest square about the body, inside the image."""
    if not body.any():
        return slice(0, body.shape[0]), slice(0, body.shape[1])
    rows, columns = (np.flatnonzero(body.any(axis=axis)) for axis in (1, 0))
    half = (max(np.ptp(rows), np.ptp(columns)) + 12) // 2
    spans = []
    for found, size in zip((rows, columns), body.shape, strict=True):
        middle = int(found[0] + found[-1]) // 2
        spans.append(slice(max(0, middle - int(half)), min(size, middle + int(half))))
    return spans[0], spans[1]


def _panel(grey: NDArray[np.uint8]) -> Image.Image:
    image = Image.fromarray(grey)
    scale = _PANEL / max(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return image.resize(size, Image.Resampling.BICUBIC)


def _sheet(
    panels: Sequence[Sequence[Image.Image]],
    heads: Sequence[tuple[str, str, tuple[int, int, int]]],
    comparison: Comparison,
    index: int,
) -> Image.Image:
    gap, head, foot = 6, 58, 32
    heights = [max(panel.height for panel in row) for row in panels]
    width = 3 * _PANEL + 4 * gap
    sheet = Image.new("RGB", (width, head + sum(heights) + 2 * gap + foot), _PAPER)
    draw = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(20), ImageFont.load_default(15)
    for column, (title, words, ink) in enumerate(heads):
        x = gap + column * (_PANEL + gap)
        draw.text((x + 4, 6), title, ink, large)
        draw.text((x + 4, 32), words, ink, small)
        y = head
        for row, height in zip(panels, heights, strict=True):
            sheet.paste(row[column], (x + (_PANEL - row[column].width) // 2, y))
            y += height + gap
        if title.startswith("RESULT"):
            draw.text((x + 10, head + heights[0] - 28), "SYNTHETIC", _WARNING, large)
    level, width_shown = _window(comparison.source)
    words = (
        f"slice {index + 1} of {len(comparison.source.voxels)}, source {width_shown:.0f} "
        f"{comparison.source.unit} wide about {level:.0f}; {comparison.measured()[-1]}. "
        "Research use, not a medical device."
    )
    draw.text((gap + 4, sheet.height - foot + 6), words, _INK, small)
    return sheet
