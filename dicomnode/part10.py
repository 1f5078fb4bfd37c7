"""Part 10 files of strangers, read in bounded memory and time whatever their bytes say.

pydicom builds every element of a nested sequence and inflates a deflated data set at once, so a
small file can cost gigabytes. `read_header` looks for a few attributes and only steps over the
rest; `read_instances` lets pydicom read whole files once their size is known to be reasonable.
"""

import contextlib
import io
import math
import os
import struct
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal

from pydicom import Dataset, dcmread
from pydicom.charset import convert_encodings
from pydicom.datadict import (
    dictionary_has_tag,
    dictionary_VR,
    keyword_for_tag,
    tag_for_keyword,
)
from pydicom.dataelem import DataElement, RawDataElement, empty_value_for_VR
from pydicom.dataset import FileMetaDataset
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.filereader import read_sequence
from pydicom.tag import BaseTag
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
)
from pydicom.valuerep import VR

from dicomnode.deferred import read_later
from dicomnode.errors import CannotUnderstand, SeriesRefused
from dicomnode.imaging.verbatim import keep_text

MOST_ELEMENTS = 1_000_000
"""Elements that `read_header` steps over before it gives up: about a second."""
DEEPEST = 64
"""Sequences of undefined length within each other."""
MOST_NESTED = 500_000
"""Elements of a whole series beyond `USUAL_ELEMENTS` in each instance: pydicom makes an object of
each, a gigabyte of a million; an enhanced CT of 1,000 frames has 100,000."""
USUAL_ELEMENTS = 2_000
LONGEST_VALUE = 65_536
"""Bytes of an attribute that is looked for."""
MOST_INFLATED = 64 << 20
"""Bytes that are inflated of a deflated data set, beyond what its pixel data shall have."""
LARGEST_INFLATED = 1 << 30
"""Bytes of pixel data in one deflated instance."""
LARGEST_SERIES = 4 << 30
"""Bytes of all instances of a series together, deflated ones inflated."""

MALFORMED = (
    InvalidDicomError,
    BytesLengthException,
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    NotImplementedError,
    OverflowError,
    RecursionError,
    struct.error,
    zlib.error,
    OSError,
)
"""What pydicom raises for a damaged file or value."""

UNDEFINED = 0xFFFFFFFF
ENDS = (0xFFFEE00D, 0xFFFEE0DD)
"""Item Delimitation Item, Sequence Delimitation Item."""
_CHARACTER_SET = 0x00080005
_TRANSFER_SYNTAX = 0x00020010
LONG_VRS = {f"O{kind}".encode() for kind in "BDFLVW"} | {b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT"}
LONG_VRS.add(b"UV")  # VRs with a 4-byte length (PS3.5 7.1.2)
VRS = {vr.value.encode() for vr in VR if len(vr.value) == 2}
_IDENTITY = ("SOPClassUID", "SOPInstanceUID", "PatientID", "StudyInstanceUID", "SeriesInstanceUID")
_SIZES = ("SamplesPerPixel", "NumberOfFrames", "Rows", "Columns", "BitsAllocated")


def read_header(path: Path, tags: Collection[int]) -> Dataset:
    """The named attributes, and SpecificCharacterSet; values are decoded on access.

    Elements are looked at in the order of the file up to the largest tag asked for (elements come
    in increasing order, PS3.5 7.1), so pixel data are never touched. Values that are not asked for
    are not even read.

    Raises:
        CannotUnderstand: the file is damaged up to there, an attribute is there twice, or finding
            them takes too much.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        syntax = _read_syntax(file)
        header = _collect(_data_set(file, syntax), tags)
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = UID(syntax)
    return header


def _collect(elements: "_Elements", tags: Collection[int]) -> Dataset:
    """The attributes asked for."""
    wanted = {_CHARACTER_SET, *tags}
    last = max(wanted)
    header = Dataset()
    for tag, vr, length in elements:
        if tag > last:
            break
        if tag not in wanted:
            elements.skip(length)
        elif tag in header:
            raise CannotUnderstand("an attribute is there twice")
        else:
            header[BaseTag(tag)] = elements.value(tag, vr, length)
    header.set_original_encoding(elements.implicit, elements.little, elements.character_set)
    return header


def read_instances(
    paths: Sequence[Path], *, pixels: bool | Literal["later"] = True
) -> list[Dataset]:
    """Instances of one series, whole or without their pixel data, in the order of `paths`.

    Args:
        pixels: "later": see `deferred.read_later`.

    Raises:
        SeriesRefused: UNREADABLE (one is damaged, or contradicts itself), TOO_LARGE (all together).
    """
    datasets: list[Dataset] = []
    budget, nested = LARGEST_SERIES, MOST_NESTED
    for number, path in enumerate(paths, start=1):
        what = f"instance {number} of {len(paths)}"
        try:
            budget = (budget if pixels else LARGEST_SERIES) - _size(path, budget)
            nested -= max(0, _count(path) - USUAL_ELEMENTS)
            if budget < 0 or nested < 0:
                words = f"more than {LARGEST_SERIES >> 30} GiB or {MOST_NESTED} nested elements"
                raise SeriesRefused("TOO_LARGE", words, "send it as several series")
            header = read_header(path, [tag_for_keyword(name) or 0 for name in _IDENTITY])
            later = pixels == "later"
            dataset = read_later(path) if later else dcmread(path, stop_before_pixels=not pixels)
            keep_text(dataset)
            _check_identity(header, dataset)
        except (*MALFORMED, CannotUnderstand) as error:
            why = str(error) if isinstance(error, CannotUnderstand) else type(error).__name__
            raise SeriesRefused("UNREADABLE", f"{what}: {why}", "send it again") from error
        datasets.append(dataset)
    return datasets


def _check_identity(header: Dataset, dataset: Dataset) -> None:
    """What `read_header` found must be what pydicom makes of the file, else CannotUnderstand."""
    for name in _IDENTITY:
        if name in header and name not in dataset:  # pydicom gives up what it read before
            raise CannotUnderstand("the data set is cut off")
        if header.get(name) != dataset.get(name):
            raise CannotUnderstand("an attribute is there twice")
    if not dataset.get("SOPInstanceUID"):
        raise CannotUnderstand("SOPInstanceUID is missing")


def damage_in(datasets: Iterable[Dataset]) -> str:
    """Which attribute cannot be decoded, or, if all can, is in another VR; empty: none."""
    looked_at = list(datasets)
    try:
        found = (_damage(dataset, vrs) for vrs in (False, True) for dataset in looked_at)
        return next(filter(None, found), "")
    except RecursionError:
        return "sequences are nested too deep"


def _damage(dataset: Dataset, vrs: bool) -> str:
    """`vrs`: another VR than the standard's counts too."""
    for tag in dataset.keys():  # noqa: SIM118 - a Dataset iterates elements
        name = f"{keyword_for_tag(tag) or tag} cannot be read"
        try:
            element = dataset[tag]
            items = element.value if element.VR == "SQ" else ()
            nested = next(filter(None, (_damage(item, vrs) for item in items)), "")
        except RecursionError:
            raise
        except MALFORMED:
            return name
        known = dictionary_VR(tag).split(" or ") if dictionary_has_tag(tag) else [element.VR]
        numbers = element.value if element.VM > 1 else [element.value]
        text = element.VR in ("DS", "IS") and any(isinstance(x, str) and x for x in numbers)
        if nested or text or (vrs and element.VR not in (*known, "UN")):
            return nested or name
    return ""


def _size(path: Path, most: int) -> int:
    """Bytes that pydicom will hold of a file.

    Raises:
        CannotUnderstand: it is deflated, and inflates to far more than its pixel data shall have.
    """
    with path.open("rb") as file:
        if _read_syntax(file) != DeflatedExplicitVRLittleEndian:
            return os.fstat(file.fileno()).st_size
        block, size = bytearray(1 << 18), 0
        inflating = _Inflating(file, min(most, _declared(path), LARGEST_INFLATED) + MOST_INFLATED)
        while count := inflating.readinto(block):
            size += count
        return size


def _count(path: Path) -> int:
    """Elements of a data set, as far as it is in order; those of defined lengths are read late."""
    with path.open("rb") as file:
        elements = _data_set(file, _read_syntax(file))
        with contextlib.suppress(CannotUnderstand):  # pydicom finds its own words for it
            for _, _, length in elements:
                elements.skip(length)
    return elements.seen


def _declared(path: Path) -> int:
    """Bytes of pixel data that an instance says it has."""
    header = read_header(path, [tag_for_keyword(name) or 0 for name in _SIZES])
    numbers = [header.get(name) or 1 for name in _SIZES]
    return math.prod(number for number in numbers if isinstance(number, int) and number > 0) // 8


def _read_syntax(file: io.BufferedReader) -> str:
    """The transfer syntax that the File Meta Information names; leaves `file` behind it."""
    if file.read(132)[128:] != b"DICM":
        raise CannotUnderstand("no Part 10 file")
    elements, syntax = _Elements(file, os.fstat(file.fileno()).st_size, False, True), ""
    while file.peek(2)[:2] == b"\2\0":
        tag, _, length = next(elements)
        if tag == _TRANSFER_SYNTAX:
            syntax = elements.take(length).decode("ascii", "replace").rstrip("\0 ")
        else:
            elements.skip(length)
    return syntax


def _data_set(file: io.BufferedReader, syntax: str) -> "_Elements":
    source, size = file, os.fstat(file.fileno()).st_size
    if syntax == DeflatedExplicitVRLittleEndian:
        source, size = io.BufferedReader(_Inflating(file, MOST_INFLATED), 1 << 16), -1
    implicit = is_implicit(syntax, source.peek(6))
    return _Elements(source, size, implicit, syntax != ExplicitVRBigEndian)


def is_implicit(syntax: str, first: bytes) -> bool:
    """Has a data set that begins with `first` no VRs? Some that are called implicit have them."""
    return syntax == ImplicitVRLittleEndian and first[4:6] not in VRS


class _Inflating(io.RawIOBase):
    """A deflated stream (PS3.5 A.5), inflated as far as it is read, up to `most` bytes."""

    def __init__(self, file: IO[bytes], most: int) -> None:
        self._file, self._left = file, most
        self._inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        self._pending = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "bytearray | memoryview") -> int:  # type: ignore[override]
        while True:
            self._pending = self._pending or self._file.read(1 << 16)
            try:
                data = self._inflater.decompress(self._pending, len(buffer))
            except zlib.error as error:
                raise CannotUnderstand("the deflated data set is damaged") from error
            ended = not self._pending
            self._pending = self._inflater.unconsumed_tail
            if data or ended or self._inflater.eof:
                break
        self._left -= len(data)
        if self._left < 0:
            raise CannotUnderstand("the deflated data set is too long")
        buffer[: len(data)] = data
        return len(data)


class _Elements(Iterator[tuple[int, bytes, int]]):
    """Element after element of one data set: tag, VR (empty: implicit), length.

    The caller takes or skips the value of each before it asks for the next.
    """

    def __init__(self, file: IO[bytes], size: int, implicit: bool, little: bool) -> None:
        """`size`: of the file, bytes; -1: unknown, and it cannot seek."""
        self._file, self._size = file, size
        self.implicit, self.little = implicit, little
        self.character_set: str | list[str] = "iso8859"
        order = "<" if little else ">"
        self._tag, self._short, self._long = (
            struct.Struct(f"{order}{kind}") for kind in ("HH", "H", "L")
        )
        self.seen = 0
        self._kept: bytearray | None = None  # what was read, while a value is collected

    def __next__(self) -> tuple[int, bytes, int]:
        head = self._file.read(8)
        if not head:
            raise StopIteration
        self.seen += 1
        if len(head) < 8:
            raise CannotUnderstand("the data set is cut off")
        if self.seen > MOST_ELEMENTS:
            raise CannotUnderstand(f"more than {MOST_ELEMENTS} elements before what is needed")
        self._keep(head)
        group, element = self._tag.unpack_from(head)
        vr = head[4:6]
        if group == 0xFFFE or self.implicit or vr not in VRS:
            return group << 16 | element, b"", self._long.unpack_from(head, 4)[0]
        if vr in LONG_VRS:
            return group << 16 | element, vr, self._long.unpack(self.take(4))[0]
        return group << 16 | element, vr, self._short.unpack_from(head, 6)[0]

    def take(self, length: int) -> bytes:
        if length > LONGEST_VALUE:
            raise CannotUnderstand("a value is too long")
        data = self._file.read(length)
        if len(data) < length:
            raise CannotUnderstand("the data set is cut off")
        self._keep(data)
        return data

    def skip(self, length: int) -> None:
        """Step over a value."""
        if length == UNDEFINED:
            self._skip_items()
        elif self._kept is not None:
            self.take(length)
        elif self._size >= 0:
            if self._file.seek(length, os.SEEK_CUR) > self._size:
                raise CannotUnderstand("a length is beyond the end")
        else:
            while length > 0:
                length -= len(self.take(min(length, LONGEST_VALUE)))

    def _skip_items(self) -> None:
        """Step over a value of undefined length, whatever is nested in it, without recursion."""
        open_ones = 1
        while open_ones:
            tag, _, length = next(self, (0, b"", -1))
            if length < 0:
                raise CannotUnderstand("the data set is cut off")
            if tag in ENDS:
                open_ones -= 1
            elif length == UNDEFINED:
                open_ones += 1
                if open_ones > 2 * DEEPEST:
                    raise CannotUnderstand("sequences are nested too deep")
            else:
                self.skip(length)

    def value(self, tag: int, vr: bytes, length: int) -> RawDataElement | DataElement:
        """The value of the current element; of a sequence its items."""
        if length != UNDEFINED:
            data = self.take(length)
            if tag == _CHARACTER_SET:
                self._use_character_set(data)
            name = vr.decode() if vr else None
            raw: Any = data or empty_value_for_VR(name, raw=True)
            return RawDataElement(BaseTag(tag), name, length, raw, 0, not vr, self.little)
        self._kept = bytearray()
        self._skip_items()
        data, self._kept = bytes(self._kept), None
        if vr not in (b"SQ", b"UN", b"") or not _is_sequence(tag):
            raise CannotUnderstand("a value of undefined length that is no sequence")
        items = read_sequence(
            io.BytesIO(data), self.implicit, self.little, UNDEFINED, self.character_set
        )
        return DataElement(BaseTag(tag), "SQ", items, already_converted=True)

    def _keep(self, data: bytes) -> None:
        if self._kept is not None:
            self._kept += data
            if len(self._kept) > LONGEST_VALUE:
                raise CannotUnderstand("a value is too long")

    def _use_character_set(self, value: bytes) -> None:
        names = [name.strip(b"\0 ").decode("ascii", "replace") for name in value.split(b"\\")]
        try:
            self.character_set = convert_encodings(names)
        except LookupError:  # unknown: text stays readable as far as it is ASCII
            self.character_set = "iso8859"


def _is_sequence(tag: int) -> bool:
    return dictionary_has_tag(tag) and dictionary_VR(tag) == "SQ"
