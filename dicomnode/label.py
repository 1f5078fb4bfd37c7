"""The words SYNTHETIC - NOT ACQUIRED on a derived series: as a presentation state, or burned in."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import highdicom
import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.uid import ExplicitVRLittleEndian, GrayscaleSoftcopyPresentationStateStorage

from dicomnode.attributes import WINDOW, copy_attributes, copy_laterality
from dicomnode.composite import companion_uids, finish
from dicomnode.errors import SeriesRefused
from dicomnode.outputs import output_of
from dicomnode.provenance import Identity, plain_text

LABEL = "SYNTHETIC - NOT ACQUIRED"
_LAYER = "SYNTHETIC"
_MODALITY_LUT = ("RescaleIntercept", "RescaleSlope")


def presentation_state(
    derived: Sequence[Dataset],
    identity: Identity,
    now: datetime,
    *,
    series_number: int,
    window: bool = True,
    part: int = 1,
) -> Dataset:
    """A GSPS that shows the label over every image, and presets their windows (PS3.3 A.33.1).

    Args:
        derived: headers of the images of one series, with one matrix, spacing and rescale.
        now: aware; the time of presentation creation.
        window: False: the label alone. A viewer that follows PS3.4 N.2.1 then shows the full
            range; it is for those that keep the window they had.
        part: 1, 2, ... where one series needs several, see `presentable_together`.

    Raises:
        ValueError: one presentation state cannot hold for all the images, or `now` is naive.
    """
    first = derived[0]
    if len({presentable_together(image) for image in derived}) > 1:
        raise ValueError("the images differ in matrix, spacing or rescale")
    state = highdicom.SOPClass(
        study_instance_uid=first.StudyInstanceUID,
        series_number=series_number,
        sop_class_uid=GrayscaleSoftcopyPresentationStateStorage,
        modality="PR",
        manufacturer=None,
        transfer_syntax_uid=ExplicitVRLittleEndian,
        **companion_uids(derived, "GSPS", window, number=part),
    )
    copy_attributes(state, first, ["BodyPartExamined", "Laterality"])
    copy_laterality(state, state)  # no ImageLaterality or anatomic region here says it instead
    state.ContentLabel, state.ContentCreatorName = _LAYER, None
    state.ContentDescription = "Label and windows" if window else "Label"
    state.PresentationCreationDate = state.PresentationCreationTime = ""
    _add_images(state, derived)
    _add_label(state, f"{LABEL} ({_words(identity)})")
    _add_modality_lut(state, first)
    if window:
        _add_windows(state, derived)
    state.PresentationLUTShape = "IDENTITY"
    finish(state, first, identity, now, plain_text(f"Label [SYN {identity.name}]", 64))
    return state


def presentable_together(image: Dataset) -> tuple[str, ...]:
    """What must be the same in all images of one presentation state: it has one Modality LUT."""
    keywords = ("Rows", "Columns", "PixelSpacing", *_MODALITY_LUT, "RescaleType")
    return tuple(str(image.get(keyword)) for keyword in keywords)


def _words(identity: Identity) -> str:
    code = output_of(identity.task).code
    return f"{code} {plain_text(identity.name, 64)} {plain_text(identity.version, 64)}"


def _add_images(state: Dataset, derived: Sequence[Dataset]) -> None:
    """The images, shown whole, with pixels as wide and high as they are (PS3.3 C.11.11, C.10.4)."""
    series = Dataset()
    series.SeriesInstanceUID = derived[0].SeriesInstanceUID
    series.ReferencedImageSequence = [_reference(image) for image in derived]
    state.ReferencedSeriesSequence = [series]
    area = Dataset()
    area.DisplayedAreaTopLeftHandCorner = [1, 1]
    area.DisplayedAreaBottomRightHandCorner = [derived[0].Columns, derived[0].Rows]
    area.PresentationSizeMode = "SCALE TO FIT"
    if derived[0].get("PixelSpacing"):
        area.PresentationPixelSpacing = derived[0].PixelSpacing
    else:
        area.PresentationPixelAspectRatio = [1, 1]
    state.DisplayedAreaSelectionSequence = [area]


def _add_label(state: Dataset, text: str) -> None:
    """A text at the top left of the display; without a list of images it is for all of them."""
    layer = Dataset()
    layer.GraphicLayer, layer.GraphicLayerOrder = _LAYER, 1
    layer.GraphicLayerDescription = "That the images are synthetic"
    layer.GraphicLayerRecommendedDisplayGrayscaleValue = 65535
    state.GraphicLayerSequence = [layer]
    words = Dataset()
    words.BoundingBoxAnnotationUnits = "DISPLAY"
    words.BoundingBoxTopLeftHandCorner = [0.02, 0.02]
    words.BoundingBoxBottomRightHandCorner = [0.98, 0.08]
    words.BoundingBoxTextHorizontalJustification = "LEFT"
    words.UnformattedTextValue = text
    annotation = Dataset()
    annotation.GraphicLayer = _LAYER
    annotation.TextObjectSequence = [words]
    state.GraphicAnnotationSequence = [annotation]


def _add_modality_lut(state: Dataset, image: Dataset) -> None:
    """The images' own: that of the presentation state stands instead (PS3.4 N.2.1)."""
    if image.get("RescaleSlope") is None:
        return
    copy_attributes(state, image, _MODALITY_LUT)
    state.RescaleType = image.get("RescaleType") or "US"  # type 1 here, C.11.1; US: unspecified


def _add_windows(state: Dataset, derived: Sequence[Dataset]) -> None:
    """An item per different window, naming its images where it is not for all (PS3.3 C.11.8)."""
    groups: dict[tuple[str, ...], list[Dataset]] = {}
    for image in derived:
        if image.get("WindowCenter") is not None and image.get("WindowWidth") is not None:
            groups.setdefault(tuple(str(image.get(word)) for word in WINDOW), []).append(image)
    items = []
    for images in groups.values():
        item = Dataset()
        copy_attributes(item, images[0], WINDOW)
        if len(images) < len(derived):
            item.ReferencedImageSequence = [_reference(image) for image in images]
        items.append(item)
    if items:
        state.SoftcopyVOILUTSequence = items


def _reference(image: Dataset) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = image.SOPClassUID
    item.ReferencedSOPInstanceUID = image.SOPInstanceUID
    return item


# --- burned in --------------------------------------------------------------------------------
_GLYPHS = {  # 5 wide, 7 high; a row is a number of five bits
    " ": (0, 0, 0, 0, 0, 0, 0),
    "-": (0, 0, 0, 31, 0, 0, 0),
    "A": (14, 17, 17, 31, 17, 17, 17),
    "C": (15, 16, 16, 16, 16, 16, 15),
    "D": (30, 17, 17, 17, 17, 17, 30),
    "E": (31, 16, 16, 30, 16, 16, 31),
    "H": (17, 17, 17, 31, 17, 17, 17),
    "I": (14, 4, 4, 4, 4, 4, 14),
    "N": (17, 25, 21, 19, 17, 17, 17),
    "O": (14, 17, 17, 17, 17, 17, 14),
    "Q": (14, 17, 17, 17, 21, 18, 13),
    "R": (30, 17, 17, 30, 20, 18, 17),
    "S": (15, 16, 16, 14, 1, 1, 30),
    "T": (31, 4, 4, 4, 4, 4, 4),
    "U": (17, 17, 17, 17, 17, 17, 14),
    "Y": (17, 17, 10, 4, 4, 4, 4),
}
_MARGIN = 2


def label_pixels(rows: int, columns: int) -> NDArray[np.bool_]:
    """Where a burned-in label has its strokes: (rows, columns), bool, at the top left.

    Their values are lost to it. The words are broken into lines to fit.

    Raises:
        SeriesRefused: LABEL_DOES_NOT_FIT, in a matrix too small for it.
    """
    mask = np.zeros((rows, columns), bool)
    scale, top = max(1, columns // 512), _MARGIN
    for line in _lines((columns // scale - 2 * _MARGIN + 1) // 6):
        drawn = np.kron(_drawn(line), np.ones((scale, scale), bool))
        height, width = drawn.shape
        if top + height > rows or _MARGIN + width > columns:
            raise SeriesRefused(
                "LABEL_DOES_NOT_FIT",
                f"{rows} x {columns} pixels are too few for a burned-in label",
                "use label: none on this route",
            )
        mask[top : top + height, _MARGIN : _MARGIN + width] = drawn
        top += height + _MARGIN * scale
    return mask


def _lines(width: int) -> list[str]:
    """`LABEL` broken between words into lines of at most `width` characters, where possible."""
    lines = [""]
    for word in LABEL.split():
        longer = f"{lines[-1]} {word}".strip()
        lines[-1:] = [longer] if len(longer) <= width or not lines[-1] else [lines[-1], word]
    return lines


def _drawn(line: str) -> NDArray[Any]:
    """(7, 6 * characters), bool."""
    numbers = np.array([_GLYPHS[character] for character in line], np.uint8)
    bits = np.unpackbits(numbers[:, :, None], axis=2)[:, :, 3:]
    spaced = np.pad(bits, ((0, 0), (0, 0), (0, 1)))
    return spaced.transpose(1, 0, 2).reshape(7, -1).astype(bool)[:, :-1]
