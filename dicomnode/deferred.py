"""Pixel data of Part 10 files, left in the file until somebody decodes it."""

from pathlib import Path

from pydicom import Dataset, dcmread
from pydicom.dataelem import RawDataElement
from pydicom.filereader import read_deferred_data_element
from pydicom.tag import BaseTag
from pydicom.uid import DeflatedExplicitVRLittleEndian

from dicomnode.errors import SeriesRefused

_PIXEL_DATA = BaseTag(0x7FE00010)
_LARGE = 4096
"""Bytes of a value that stays in the file until it is asked for."""


def read_later(path: Path) -> Dataset:
    """An instance whose Pixel Data element is there, but has no value before `with_pixels`.

    Multi-frame and deflated instances cannot be read in parts: they come without the element.
    """
    dataset = dcmread(path, defer_size=_LARGE)
    deflated = dataset.file_meta.TransferSyntaxUID == DeflatedExplicitVRLittleEndian
    if _PIXEL_DATA in dataset and (deflated or "NumberOfFrames" in dataset):
        del dataset[_PIXEL_DATA]
    return dataset


def with_pixels(header: Dataset) -> Dataset:
    """The same slice with its pixel data, which `header` does not keep.

    Raises:
        SeriesRefused: UNREADABLE: the file is not what it was.
    """
    elements = dict(header.items())  # as they are: to ask for one would read it
    element = elements.get(_PIXEL_DATA)
    if not isinstance(element, RawDataElement) or element.value is not None:
        return header  # it was read whole
    try:
        read = read_deferred_data_element(open, str(header.filename), None, element)
    except (OSError, ValueError, StopIteration, EOFError) as error:
        raise SeriesRefused("UNREADABLE", type(error).__name__, "send it again") from error
    whole = Dataset({**elements, _PIXEL_DATA: read})
    whole.file_meta = header.file_meta
    return whole
