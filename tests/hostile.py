"""Objects that a broken or hostile sender might store, each with what must become of it.

Every one carries `CANARY` where a patient's name and identifier are: it must appear nowhere else.
"""

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pydicom import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from tests.factories import CANARY, changed, ct_series, file_bytes

CT = "1.2.840.10008.5.1.4.1.1.2"
PLAIN, DEFLATED = str(ExplicitVRLittleEndian), str(DeflatedExplicitVRLittleEndian)
STORED, DUPLICATE, CANNOT, MISMATCH, NO_UID = 0x0000, 0x0111, 0xC000, 0xA900, 0x0117
UNDEFINED = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_LONG = {"OB", "OD", "OF", "OL", "OV", "OW", "SQ", "SV", "UC", "UN", "UR", "UT", "UV"}


@dataclass(frozen=True)
class Case:
    """One series of a hostile sender.

    Attributes:
        instances: (SOP Instance UID of the command set, data set) of each.
        status: of every instance.
        outcome: how its job must end: "done", codes of refusals (any of them), or "" where nothing
            is stored.
    """

    name: str
    series_uid: str
    instances: list[tuple[str, bytes]]
    status: int
    outcome: tuple[str, ...] = ()
    syntax: str = PLAIN
    sop_class: str = CT
    statuses: list[int] = field(default_factory=list)
    """Of each instance, where they differ."""

    @property
    def expected(self) -> list[int]:
        return self.statuses or [self.status] * len(self.instances)


def element(tag: int, vr: str, value: bytes, length: int | None = None) -> bytes:
    """An element in explicit VR little endian; `length`: what it claims instead."""
    size = len(value) if length is None else length
    head = struct.pack("<HH2s", tag >> 16, tag & 0xFFFF, vr.encode())
    head += struct.pack("<HL", 0, size) if vr in _LONG else struct.pack("<H", size & 0xFFFF)
    return head + value


def delimiter(tag: int, length: int = 0) -> bytes:
    return struct.pack("<HHL", tag >> 16, tag & 0xFFFF, length)


def elements(data_set: bytes) -> Iterator[tuple[int, int, int]]:
    """Tag, start and end of each top-level element of a data set of defined lengths."""
    at = 0
    while at < len(data_set):
        group, number, vr, length = struct.unpack_from("<HH2sH", data_set, at)
        start, at = at, at + 8
        if vr.decode() in _LONG:
            (length,) = struct.unpack_from("<L", data_set, at)
            at += 4
        if length == UNDEFINED:  # encapsulated pixel data: the last element
            yield group << 16 | number, start, len(data_set)
            return
        at += length
        yield group << 16 | number, start, at


def put(data_set: bytes, tag: int, raw: bytes, *, instead: bool = False) -> bytes:
    """`raw` where an element of this tag belongs; or in its place."""
    start = end = len(data_set)
    for other, begin, stop in elements(data_set):
        if other >= tag:
            start, end = begin, (stop if other == tag and instead else begin)
            break
    return data_set[:start] + raw + data_set[end:]


def encoded(dataset: Dataset) -> bytes:
    """The data set of an instance as it goes over the network."""
    whole = file_bytes(dataset)
    return whole[144 + int.from_bytes(whole[140:144], "little") :]


def series(number: int, slices: int = 3, **options: Any) -> list[Dataset]:
    """A small CT series with the canary for a patient; `number` gives it UIDs of its own."""
    made = ct_series(
        slices,
        **{"rows": 32, "columns": 32, "seed": number, "patient": f"{CANARY}-ID", **options},
    )
    return changed(made, PatientName=f"{CANARY}^HOSTILE") if "PatientName" not in options else made


Change = Callable[[bytes], bytes]


def bytes_case(
    name: str, change: Change, status: int, *outcome: str, **options: Any
) -> Callable[[int], Case]:
    """A case whose data sets are changed as bytes after they were written."""

    def make(number: int) -> Case:
        slices = series(number, **options)
        instances = [(str(ds.SOPInstanceUID), change(encoded(ds))) for ds in slices]
        syntax = str(slices[0].file_meta.TransferSyntaxUID)
        return Case(name, str(slices[0].SeriesInstanceUID), instances, status, outcome, syntax)

    return make


def attribute_case(
    name: str, status: int, *outcome: str, only: int | None = None, **attributes: Any
) -> Callable[[int], Case]:
    """A case with other attribute values, in slice number `only` or in all."""

    def make(number: int) -> Case:
        slices = series(number)
        uid = str(slices[0].SeriesInstanceUID)
        for index in range(len(slices)) if only is None else [only]:
            slices[index] = changed([slices[index]], **attributes)[0]
        instances = [(str(ds.SOPInstanceUID), encoded(ds)) for ds in slices]
        sop_class = str(slices[0].SOPClassUID)
        return Case(name, uid, instances, status, outcome, PLAIN, sop_class)

    return make


def raw_case(
    name: str, tag: int, vr: str, value: bytes, status: int, *outcome: str
) -> Callable[[int], Case]:
    """A case with one element written as given: another VR, a value that is none."""
    value += b" " * (len(value) % 2)
    return bytes_case(
        name, lambda data: put(data, tag, element(tag, vr, value), instead=True), status, *outcome
    )


def nested(levels: int, tag: int, *, defined: bool) -> bytes:
    """Sequences within each other."""
    if not defined:
        down = element(tag, "SQ", b"", UNDEFINED) + delimiter(_ITEM, UNDEFINED)
        return down * levels + (delimiter(_ITEM_END) + delimiter(_SEQUENCE_END)) * levels
    heads, inner = [], 0
    for _ in range(levels):
        heads.append(element(tag, "SQ", b"", inner + 8) + delimiter(_ITEM, inner))
        inner += 20
    return b"".join(reversed(heads))


def items(count: int, tag: int) -> bytes:
    """A sequence of `count` items with one element each."""
    item = delimiter(_ITEM, UNDEFINED) + element(0x00081155, "UI", b"1.2.3\0")
    return (
        element(tag, "SQ", b"", UNDEFINED)
        + (item + delimiter(_ITEM_END)) * count
        + delimiter(_SEQUENCE_END)
    )


def private_elements(count: int) -> bytes:
    """Elements of odd groups from 0009 on, in order."""
    made = io.BytesIO()
    for number in range(count):
        group, at = divmod(number, 0xE000)
        tag = (0x0009 + 2 * group) << 16 | (0x1000 + at)
        made.write(element(tag, "LO", b""))
    return made.getvalue()


def deflated_zeros(megabytes: int) -> bytes:
    """Part of a deflated stream, which inflates to so many MiB of zeros; about a thousandth."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return (packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)) * megabytes


def bomb(number: int, megabytes: int, tag: int, vr: str, *outcome: str) -> Case:
    """A deflated data set with an element that inflates to `megabytes`."""
    dataset = series(number)[0]
    plain, raw = encoded(dataset), element(tag, vr, b"", megabytes << 20)
    data = put(plain, tag, raw, instead=True)
    at = data.index(raw) + len(raw)
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    start = packer.compress(data[:at]) + packer.flush(zlib.Z_FULL_FLUSH)
    end = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    whole = start + deflated_zeros(megabytes) + end.compress(data[at:]) + end.flush()
    uid = str(dataset.SOPInstanceUID)
    status = STORED if outcome else CANNOT
    where = "pixel data" if outcome else "header"
    return Case(
        f"{where} that inflates to {megabytes} MB",
        str(dataset.SeriesInstanceUID),
        [(uid, whole)],
        status,
        outcome,
        DEFLATED,
    )


BAD_UIDS = {
    "parent folders": b"../../../../tmp/canary",
    "absolute path": b"/tmp/canary",
    "NUL inside": b"1.2.3\0.4/5",
    "10,000 digits": b"1." + b"7" * 9998,
    "65 characters": b"1." + b"7" * 63,
    "empty": b"",
    "unicode digits": "1.2.٣".encode(),
    "two dots": b"1..2",
    "a dot": b".",
}


def with_uid(data_set: bytes, tag: int, uid: bytes) -> bytes:
    return put(data_set, tag, element(tag, "UI", uid + bytes(len(uid) % 2)), instead=True)


Maker = Callable[[int], Case]
DONE = "done"
_CLASS, _SOP, _STUDY, _SERIES = 0x00080016, 0x00080018, 0x0020000D, 0x0020000E
_BEFORE, _PIXELS, _AFTER = 0x00081140, 0x7FE00010, 0xFFFCFFFC
_BROKEN = ("UNDECODABLE", "UNREADABLE")
_J2K_HEAD = b"\xff\x4f\xff\x51" + struct.pack(
    ">HHLLLLLLLLHBBB", 41, 0, *[65535] * 2, 0, 0, *[65535] * 2, 0, 0, 1, 15, 1, 1
)
_LS_HEAD = b"\xff\xd8\xff\xf7" + struct.pack(">HBHHBBBB", 11, 16, 65535, 65535, 1, 1, 0x11, 0)


def encapsulated(frame: bytes) -> bytes:
    """Pixel data of one frame with an empty offset table."""
    frame += bytes(len(frame) % 2)
    head = element(_PIXELS, "OB", b"", UNDEFINED) + delimiter(_ITEM)
    return head + delimiter(_ITEM, len(frame)) + frame + delimiter(_SEQUENCE_END)


def _without_most_of_it(data: bytes) -> bytes:
    """Encapsulated pixel data whose frame ends in its middle, lengths in order."""
    for tag, start, _ in elements(data):
        if tag == _PIXELS:
            (size,) = struct.unpack_from("<L", data, start + 24)
            frame = data[start + 28 : start + 28 + size]
            return data[:start] + encapsulated(frame[: len(frame) // 3])
    raise AssertionError("no pixel data")


def _sequences() -> list[Maker]:
    def insert(name: str, tag: int, raw: bytes, status: int, *outcome: str) -> Maker:
        return bytes_case(name, lambda data: put(data, tag, raw), status, *outcome)

    late = 0x00880200
    return [
        insert("10,000 levels before", _BEFORE, nested(10_000, _BEFORE, defined=False), CANNOT),
        insert(
            "10,000 levels after", late, nested(10_000, late, defined=False), STORED, "UNREADABLE"
        ),
        insert(
            "10,000 levels of defined length",
            _BEFORE,
            nested(10_000, _BEFORE, defined=True),
            STORED,
            *(DONE, "UNREADABLE"),
        ),
        insert("100,000 items before", _BEFORE, items(100_000, _BEFORE), STORED, "TOO_LARGE"),
        insert("100,000 items after", late, items(100_000, late), STORED, "TOO_LARGE"),
        insert("1,000,000 private elements", 0x00090000, private_elements(1_000_000), CANNOT),
        insert("100,000 private elements", 0x00090000, private_elements(100_000), STORED, DONE),
        insert(
            "a sequence that never ends", _BEFORE, element(_BEFORE, "SQ", b"", UNDEFINED), CANNOT
        ),
        insert("a delimiter alone", _BEFORE, delimiter(_SEQUENCE_END), CANNOT),
    ]


def _lengths() -> list[Maker]:
    lie = struct.pack("<L", 0xFFFFFFF0)
    groups = element(0x00080000, "UL", lie)

    def cut(data: bytes) -> bytes:
        return put(data, _PIXELS, element(_PIXELS, "OW", bytes(100), 0xFFFFFFFE), instead=True)

    beyond = element(0x00091001, "OB", b"", 0x7FFFFFFF)
    kind = 0x00080008
    long = element(kind, "UT", b"X" * 100_000)
    empty = element(_PIXELS, "OW", b"")
    return [
        bytes_case("group length lies", lambda data: put(data, 0x00080000, groups), STORED, DONE),
        bytes_case("pixel data beyond the end", cut, STORED, *_BROKEN),
        bytes_case("a length beyond the end", lambda data: put(data, 0x00091001, beyond), CANNOT),
        bytes_case(
            "a long ImageType", lambda data: put(data, 0x00080008, long, instead=True), CANNOT
        ),
        bytes_case("cut in an element", lambda data: data[:101], CANNOT),
        bytes_case("no data at all", lambda data: b"", CANNOT),
        bytes_case("noise", lambda data: bytes(range(1, 256)) * 20, CANNOT),
        bytes_case(
            "no pixel data",
            lambda data: put(data, _PIXELS, b"", instead=True),
            STORED,
            "NOT_AN_IMAGE",
        ),
        bytes_case(
            "pixel data of no length",
            lambda data: put(data, _PIXELS, empty, instead=True),
            STORED,
            "UNDECODABLE",
            "NOT_16_BIT",
        ),
        bytes_case(
            "half the pixel data", lambda data: data[:-1000], STORED, "UNDECODABLE", "UNREADABLE"
        ),
    ]


def _orders() -> list[Maker]:
    def twice(name: str, tag: int, at: int, vr: str, value: bytes, status: int, *out: str) -> Maker:
        return bytes_case(name, lambda data: put(data, at, element(tag, vr, value)), status, *out)

    def pixels_first(data: bytes) -> bytes:
        for tag, start, end in elements(data):
            if tag == _PIXELS:
                return data[start:end] + data[:start] + data[end:]
        raise AssertionError("no pixel data")

    late = (_AFTER, "UI", b"1.2\0", STORED, "UNREADABLE")
    return [
        twice("SOPInstanceUID twice", _SOP, _SOP, "UI", b"1.2.3.4\0", CANNOT),
        twice("SeriesInstanceUID twice", _SERIES, _SERIES, "UI", b"1.2.3.4\0", CANNOT),
        twice("SOPInstanceUID at the end too", _SOP, *late),
        twice("PatientID at the end too", 0x00100020, _AFTER, "LO", b"X1", STORED, "UNREADABLE"),
        twice("SeriesInstanceUID at the end too", _SERIES, *late),
        bytes_case("pixel data first", pixels_first, CANNOT),
        bytes_case(
            "SOP class of another", lambda data: with_uid(data, 0x00080016, b"1.2.3"), MISMATCH
        ),
        bytes_case(
            "SOP instance of another", lambda data: with_uid(data, _SOP, b"1.2.3"), MISMATCH
        ),
    ]


def _uids() -> list[Maker]:
    made: list[Maker] = []
    for name, uid in BAD_UIDS.items():
        for keyword, tag in (("SOP", _SOP), ("study", _STUDY), ("series", _SERIES)):
            made.append(_bad_uid(f"{keyword} instance UID: {name}", tag, uid))
    return made


def _bad_uid(name: str, tag: int, uid: bytes) -> Maker:
    return bytes_case(name, lambda data: with_uid(data, tag, uid), CANNOT, slices=1)


def _values() -> list[Maker]:
    made: list[Maker] = []
    for text in (b"NaN", b"inf", b"-inf", b"1e308", b"1e999", b"CANARY"):
        two, three, six = (b"\\".join([text] * count) for count in (2, 3, 6))
        bad = (STORED, "NO_GEOMETRY", "DUPLICATE_POSITIONS", "SINGLE_SLICE", "UNREADABLE")
        scale = (STORED, "NOT_HU", "OUT_OF_SCOPE")
        word = text.decode()
        made += [
            raw_case(f"ImagePositionPatient {word}", 0x00200032, "DS", three, *bad),
            raw_case(f"ImageOrientationPatient {word}", 0x00200037, "DS", six, *bad),
            raw_case(f"PixelSpacing {word}", 0x00280030, "DS", two, *bad),
            raw_case(f"RescaleSlope {word}", 0x00281053, "DS", text, *scale),
            raw_case(f"RescaleIntercept {word}", 0x00281052, "DS", text, *scale),
            raw_case(f"SliceThickness {word}", 0x00180050, "DS", text, STORED, DONE, "UNREADABLE"),
        ]
    return made


def _kinds() -> list[Maker]:
    """Values in another VR than the dictionary's (Modality, positions, counts)."""
    six = struct.pack("<6d", 1, 0, 0, 0, 1, 0)
    sequence = items(2, 0x00280008)
    return [
        raw_case("Modality as US", 0x00080060, "US", b"\1\0", STORED),
        raw_case("Modality as a sequence", 0x00080060, "SQ", b"", STORED),
        raw_case("ImageType as US", 0x00080008, "US", b"\1\0", STORED, DONE, "UNREADABLE"),
        raw_case("ImageType as FD", 0x00080008, "FD", six, STORED, DONE, "UNREADABLE"),
        raw_case("position as OB", 0x00200032, "OB", b"1\\2\\3", STORED, "NO_GEOMETRY"),
        raw_case("orientation as FD", 0x00200037, "FD", six, STORED, DONE),
        raw_case("Rows as LO", 0x00280010, "LO", b"CANARY", STORED, "NO_MATRIX"),
        raw_case("Columns as OB", 0x00280011, "OB", b"\1\0", STORED, "NO_MATRIX"),
        raw_case("two Rows", 0x00280010, "US", b"\x20\0\x20\0", STORED, "NO_MATRIX"),
        raw_case(
            "BitsStored as LO", 0x00280101, "LO", b"CANARY", STORED, "NOT_16_BIT", "UNREADABLE"
        ),
        raw_case("SOP instance UID as OW", _SOP, "OW", b"1.2.3.", CANNOT),
        raw_case("NumberOfFrames as LO", 0x00280008, "LO", b"CANARY", STORED, DONE, *_BROKEN),
        bytes_case(
            "NumberOfFrames as a sequence",
            lambda data: put(data, 0x00280008, sequence),
            CANNOT,
        ),
        raw_case("PatientName as US", 0x00100010, "US", b"\1\0\2\0", STORED, DONE, "UNREADABLE"),
    ]


def _texts() -> list[Maker]:
    sets = (b"ISO_IR 999", b"CANARY", b"\\ISO 2022 IR 87", b"ISO_IR 192", b"ISO 2022 IR 13\\\\x")
    name = b"\x1b$B\xff\xfeCANARY^\x80\xc3\x28"
    made: list[Maker] = []
    for number, value in enumerate(sets):

        def change(data: bytes, value: bytes = value) -> bytes:
            raw = element(0x00080005, "CS", value + b" " * (len(value) % 2))
            data = put(data, 0x00080005, raw, instead=True)
            return put(data, 0x00100010, element(0x00100010, "PN", name), instead=True)

        made.append(bytes_case(f"character set {number}", change, STORED, DONE))
    return made


def _pixels() -> list[Maker]:
    def pixels(name: str, frame: bytes, syntax: Any, *outcome: str, big: bool = True) -> Maker:
        def change(data: bytes) -> bytes:
            for tag in (0x00280010, 0x00280011) if big else ():
                data = put(data, tag, element(tag, "US", b"\xff\xff"), instead=True)
            return put(data, _PIXELS, encapsulated(frame), instead=True)

        return bytes_case(name, change, STORED, *outcome, syntax=syntax)

    rle = struct.pack("<16L", 2, 64, 66, *[0] * 13) + b"\x81\0" * 200
    frames = b"1000000000"
    made = [
        pixels("65,535 squared in RLE", rle, RLELossless, "TOO_LARGE"),
        pixels("65,535 squared in JPEG 2000", _J2K_HEAD, JPEG2000Lossless, "TOO_LARGE"),
        pixels("JPEG 2000 that says 65,535", _J2K_HEAD, JPEG2000Lossless, *_BROKEN, big=False),
        pixels("JPEG-LS that says 65,535", _LS_HEAD, JPEGLSLossless, *_BROKEN, big=False),
        pixels("an RLE bomb", rle * 500, RLELossless, *_BROKEN, big=False),
        pixels("a frame of no length", b"", JPEGLSLossless, *_BROKEN, big=False),
        attribute_case("65,535 squared plain", STORED, "TOO_LARGE", Rows=65535, Columns=65535),
        attribute_case("8,192 squared plain", STORED, *_BROKEN, Rows=8192, Columns=8192),
        raw_case("10^9 frames", 0x00280008, "IS", frames, STORED, "NOT_SINGLE_FRAME"),
    ]
    for syntax in (RLELossless, JPEGLSLossless, JPEG2000Lossless):
        name = f"a cut frame of {syntax.name}"
        made.append(bytes_case(name, _without_most_of_it, STORED, *_BROKEN, syntax=syntax))
    return made


def _classes() -> list[Maker]:
    root = "1.2.840.10008.5.1.4.1.1"
    enhanced, pdf, report = f"{root}.2.1", f"{root}.104.1", f"{root}.88.11"
    many = {"SOPClassUID": enhanced, "NumberOfFrames": 10**9}
    return [
        attribute_case("private SOP class", STORED, "NOT_CT_MR_PET", SOPClassUID="1.2.3.4.5.6.7"),
        attribute_case("a PDF", STORED, "NOT_CT_MR_PET", SOPClassUID=pdf),
        attribute_case("an SR", STORED, "NOT_AN_IMAGE", SOPClassUID=report, Rows=None),
        attribute_case("enhanced without frames", STORED, "NO_GEOMETRY", SOPClassUID=enhanced),
        attribute_case("10^9 enhanced", STORED, "NO_GEOMETRY", **many),
    ]


def _mixtures() -> list[Maker]:
    return [
        attribute_case("two PatientIDs", STORED, "MIXED_PATIENT", only=1, PatientID="CANARY-2"),
        attribute_case("two names", STORED, "MIXED_PATIENT", only=2, PatientName="CANARY^OTHER"),
        attribute_case("two birth dates", STORED, "MIXED_PATIENT", only=0, PatientBirthDate="1900"),
        attribute_case("no PatientID in one", STORED, "MIXED_PATIENT", only=1, PatientID=""),
        attribute_case("two studies", STORED, "MIXED_SERIES", only=1, StudyInstanceUID="1.2.3"),
    ]


def _twice_stored(number: int) -> Case:
    """One of whose SOP Instance UIDs comes again, in another series."""
    first, second, third = series(number)
    uid = first.SOPInstanceUID
    stolen = changed([second], SOPInstanceUID=uid, SeriesInstanceUID="1.2.3.99")[0]
    instances = [(str(ds.SOPInstanceUID), encoded(ds)) for ds in (first, stolen, third, second)]
    uid = str(first.SeriesInstanceUID)
    statuses = [STORED, DUPLICATE, STORED, STORED]
    return Case("an instance of two series", uid, instances, STORED, (DONE,), statuses=statuses)


def _many_slices(slices: int) -> Maker:
    """As many tiny slices as asked for, made from one by its position and UID."""

    def make(number: int) -> Case:
        first = series(number, 1, rows=8, columns=8)[0]
        uid, data = str(first.SOPInstanceUID)[:50], encoded(first)
        instances = []
        for index in range(slices):
            position = f"0\\0\\{index * 0.5:.1f}".encode()
            position += b" " * (len(position) % 2)
            one = f"{uid}.{index + 1}"
            changed_data = with_uid(data, _SOP, one.encode())
            raw = element(0x00200032, "DS", position)
            instances.append((one, put(changed_data, 0x00200032, raw, instead=True)))
        return Case(f"{slices} slices", str(first.SeriesInstanceUID), instances, STORED, (DONE,))

    return make


def cases(*, long: bool = False) -> list[Case]:
    """All of them; `long`: larger bombs and more slices."""
    makers = [
        *_sequences(),
        *_lengths(),
        *_orders(),
        *_uids(),
        *_values(),
        *_kinds(),
        *_texts(),
        *_pixels(),
        *_classes(),
        *_mixtures(),
        _twice_stored,
        _many_slices(5000 if long else 300),
        lambda number: bomb(number, 3800 if long else 500, 0x00090010, "OB"),
        lambda number: bomb(number, 3800 if long else 500, _PIXELS, "OW", "UNREADABLE"),
    ]
    return [make(number) for number, make in enumerate(makers, start=100)]
