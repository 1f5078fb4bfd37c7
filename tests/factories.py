"""CT series as scanners write them, made of generated voxels: every encoding, every oddity.

`ct_series` gives datasets as they are after a receiver has read them from a file, so that text and
numbers still carry the bytes a sender wrote.
"""

import hashlib
import mmap
import subprocess
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.uid import (
    UID,
    CTImageStorage,
    EnhancedCTImageStorage,
    EnhancedMRImageStorage,
    EnhancedPETImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    JPEGLosslessSV1,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from dicomnode.imaging.pixels import Encoding
from dicomnode.journal import Arrival
from dicomnode.redo import REDO, RedoLog
from dicomnode.segments import HEADROOM, SEGMENT_BYTES, Written

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
CORONAL = (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)
SAGITTAL = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)
TILTED = (1.0, 0.0, 0.0, 0.0, 0.9483237, -0.3173047)
"""Gantry tilt of 18.5 degrees: with `travel` along z the stack is sheared."""

NAMES: dict[str | None, str] = {  # SpecificCharacterSet -> PatientName in it
    None: "Phantom^Ann",
    "ISO_IR 100": "Bühler^Änne",
    "ISO_IR 192": "Hong^Gildong=洪^吉洞=홍^길동",
    "\\ISO 2022 IR 149": "Hong^Gildong=洪^吉洞=홍^길동",
    "\\ISO 2022 IR 87": "Yamada^Tarou=山田^太郎=やまだ^たろう",
}
CANARY = "CANARY"
"""Text in every attribute that must not leave the node, see `with_canaries`."""

JPEG_TOOL = Path("/usr/bin/dcmcjpeg")


def phantom_hu(slices: int, rows: int, columns: int, seed: int = 1) -> NDArray[np.float64]:
    """A body in air: (slices, rows, columns), float64, HU from -1000 to about 900, with noise."""
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in (slices, rows, columns)), indexing="ij")
    body = (x / 0.8) ** 2 + (y / 0.6) ** 2 < 1
    bone = (x - 0.1) ** 2 + (y - 0.2 * z) ** 2 < 0.02
    hu = np.where(body, 40 + 30 * z, -1000.0) + np.where(bone, 700, 0)
    return hu + np.where(body, rng.normal(0, 12, hu.shape), 0)


def ct_series(
    slices: int = 5,
    rows: int = 32,
    columns: int = 40,
    *,
    seed: int = 1,
    bits_stored: int = 12,
    signed: bool = False,
    slope: str = "1",
    intercept: str = "-1024",
    padding: int | None = None,
    padding_vr: str | None = None,
    stored: NDArray[Any] | None = None,
    orientation: Sequence[float] = AXIAL,
    origin: Sequence[float] = (-120.5, -90.25, 310.0),
    travel: Sequence[float] | None = None,
    step_mm: float = 2.5,
    pixel_spacing: Sequence[str] = ("0.703125", "0.6"),
    patient_position: str = "HFS",
    character_set: str | None = "ISO_IR 100",
    patient: str = "P1",
    private: bool = False,
    syntax: UID = ExplicitVRLittleEndian,
    **attributes: Any,
) -> list[Dataset]:
    """A CT series in slice order, valid against the CT Image IOD (`dciodvfy` finds no error).

    Args:
        seed: other voxels and other UIDs; the same seed gives the same bytes.
        slope, intercept: as DS text, kept as given.
        padding: stored value in the corners of every slice, declared as PixelPaddingValue.
        padding_vr: US or SS, if it shall not be what PixelRepresentation asks for.
        stored: (slices, rows, columns), stored values; otherwise a phantom in HU is encoded.
        travel: direction from slice to slice; default: the slice normal.
        character_set: a key of `NAMES`; the patient's name is written in it.
        syntax: transfer syntax of the result: uncompressed, deflated, RLE, JPEG-LS, JPEG 2000
            lossless (from 32 x 32 on), JPEG Lossless SV1 (by dcmcjpeg).
        attributes: further attributes by keyword, the same in all slices; None deletes one.
    """
    encoding = Encoding(bits_stored, signed, float(slope), float(intercept))
    if stored is None:
        hu = phantom_hu(slices, rows, columns, seed)
        stored = np.clip(encoding.to_stored(hu.astype(np.float32)), *encoding.limits)
        if padding is not None:
            stored = np.where(stored == padding, padding + 1, stored)
            stored[:, :2, :3] = padding
    stored = stored.astype(np.int16 if signed else np.uint16)
    directions = np.asarray(orientation, dtype=np.float64)
    normal = np.cross(directions[:3], directions[3:])
    along = normal if travel is None else np.asarray(travel) / np.dot(travel, normal)
    made = []
    for index, plane in enumerate(stored):
        ds = _ct_image(f"{patient}/{seed}", index, plane, encoding)
        position = np.asarray(origin) + index * step_mm * along
        ds.ImagePositionPatient = [f"{value:.6f}" for value in position]
        ds.ImageOrientationPatient = [f"{value:.7f}" for value in directions]
        ds.PixelSpacing = list(pixel_spacing)
        ds.SliceThickness = f"{step_mm:g}"
        ds.PatientPosition = patient_position
        ds.PatientID = patient
        ds.RescaleSlope, ds.RescaleIntercept = slope, intercept
        if padding is not None:
            vr = padding_vr or ("SS" if signed else "US")
            ds.add_new("PixelPaddingValue", vr, padding % 65536 if vr == "US" else padding)
        if character_set is not None:
            ds.SpecificCharacterSet = character_set.split("\\")
        ds.PatientName = NAMES[character_set]
        if private:
            with_canaries(ds)
        made.append(_changed(ds, attributes))
    return [_as_received(ds, syntax) for ds in made]


_NOT_CT = dict.fromkeys(
    [
        "KVP",
        "XRayTubeCurrent",
        "Exposure",
        "ExposureTime",
        "ConvolutionKernel",
        "GantryDetectorTilt",
        "RescaleType",
        "IrradiationEventUID",
        "WindowCenter",
        "WindowWidth",
        "WindowCenterWidthExplanation",
    ]
)


def mr_series(slices: int = 5, rows: int = 32, columns: int = 40, **options: Any) -> list[Dataset]:
    """An MR series in slice order; options as of `ct_series`, no rescale unless given."""
    given = {"intercept": "0", **_NOT_CT, "ScanningSequence": "SE", "SequenceVariant": "SK"}
    given |= {
        "SOPClassUID": MRImageStorage,
        "Modality": "MR",
        "EchoTime": "30",
        "MRAcquisitionType": "2D",
    }
    given |= {"ImageType": ["ORIGINAL", "PRIMARY", "M", "ND"], "RepetitionTime": "500"}
    given |= {"ScanOptions": None, "EchoTrainLength": "1"}
    stored = phantom_hu(slices, rows, columns, options.get("seed", 1)) + 1024
    return ct_series(
        slices, rows, columns, **{"stored": np.clip(stored, 0, 4095), **given, **options}
    )


def pet_series(
    slices: int = 5,
    rows: int = 16,
    columns: int = 20,
    *,
    slopes: Sequence[str] | None = None,
    tracer: dict[str, Any] | None = None,
    **options: Any,
) -> list[Dataset]:
    """A static FDG PET series in Bq/ml, corrected, in slice order, each slice with its own slope.

    Args:
        slopes: RescaleSlope of each slice as DS text.
        tracer: changes to the item of RadiopharmaceuticalInformationSequence; None deletes one.
        options: as of `ct_series`.
    """
    given = {**_NOT_CT, "SOPClassUID": PositronEmissionTomographyImageStorage, "Modality": "PT"}
    given |= {"ImageType": ["ORIGINAL", "PRIMARY"], "Units": "BQML", "CountsSource": "EMISSION"}
    given |= {"SeriesType": ["STATIC", "IMAGE"], "CorrectedImage": ["DECY", "ATTN", "SCAT"]}
    given |= {"DecayCorrection": "START", "PatientWeight": "70", "FrameReferenceTime": "0"}
    given |= {"ActualFrameDuration": "120000", "NumberOfSlices": slices, "DecayFactor": "1.0"}
    given |= {"AcquisitionTime": "102000", "bits_stored": 16, "intercept": "0"}
    stored = np.clip(
        (phantom_hu(slices, rows, columns, options.get("seed", 1)) + 1000) * 10, 0, 32767
    )
    made = ct_series(slices, rows, columns, **{"stored": stored, **given, **options})
    item = Dataset()
    item.RadiopharmaceuticalStartTime, item.RadionuclideTotalDose = "092000.00", "370000000"
    item.RadionuclideHalfLife, item.Radiopharmaceutical = "6586.2", "FDG"
    for keyword, value in (tracer or {}).items():
        item.pop(keyword, None)
        if value is not None:
            setattr(item, keyword, value)
    for index, ds in enumerate(made):
        ds.RescaleSlope = slopes[index] if slopes else f"{0.5 + 0.1 * index:.6f}"
        ds.ImageIndex = index + 1
        ds.RadiopharmaceuticalInformationSequence = [item]
    return [_as_received(ds, _syntax(ds)) for ds in made]


_ENHANCED = {
    CTImageStorage: (EnhancedCTImageStorage, "CT"),
    MRImageStorage: (EnhancedMRImageStorage, "MR"),
    PositronEmissionTomographyImageStorage: (EnhancedPETImageStorage, "PET"),
}
_IN_GROUPS = {  # functional group -> what it takes from a classic image, by its own keywords
    "PlanePositionSequence": {"ImagePositionPatient": "ImagePositionPatient"},
    "PlaneOrientationSequence": {"ImageOrientationPatient": "ImageOrientationPatient"},
    "PixelMeasuresSequence": {"PixelSpacing": "PixelSpacing", "SliceThickness": "SliceThickness"},
    "PixelValueTransformationSequence": {
        "RescaleSlope": "RescaleSlope",
        "RescaleIntercept": "RescaleIntercept",
        "RescaleType": "RescaleType",
    },
    "FrameVOILUTSequence": {"WindowCenter": "WindowCenter", "WindowWidth": "WindowWidth"},
    "MREchoSequence": {"EffectiveEchoTime": "EchoTime"},
    "CTReconstructionSequence": {"ConvolutionKernel": "ConvolutionKernel"},
}


def enhanced(
    series: Sequence[Dataset],
    *,
    shared: Iterable[str] = ("PlaneOrientationSequence", "PixelMeasuresSequence"),
    temporal: Sequence[int] | None = None,
    syntax: UID = ExplicitVRLittleEndian,
) -> Dataset:
    """An enhanced multi-frame instance with one frame per classic image, in the order given.

    Args:
        shared: functional groups which are the same in all frames.
        temporal: TemporalPositionIndex of each frame.
    """
    first = series[0]
    sop_class, kind = _ENHANCED[first.SOPClassUID]
    uid = generate_uid(entropy_srcs=[str(first.SOPInstanceUID), "enhanced", str(len(series))])
    moved = {keyword for group in _IN_GROUPS.values() for keyword in group.values()}
    ds = _changed(first, {**dict.fromkeys(moved), "SOPClassUID": sop_class, "SOPInstanceUID": uid})
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.NumberOfFrames = len(series)
    groups = [_groups(image, kind, number) for number, image in enumerate(series)]
    for index, item in enumerate(groups):
        content = item.FrameContentSequence[0]
        content.TemporalPositionIndex = temporal[index] if temporal else 1
    common = Dataset()
    for keyword in shared:
        setattr(common, keyword, groups[0][keyword].value)
        for item in groups:
            del item[keyword]
    ds.SharedFunctionalGroupsSequence = [common]
    ds.PerFrameFunctionalGroupsSequence = groups
    ds.add_new("PixelData", "OW", b"".join(image.PixelData for image in series))
    return _as_received(ds, syntax)


def _groups(image: Dataset, kind: str, index: int) -> Dataset:
    item = Dataset()
    for macro, keywords in _IN_GROUPS.items():
        content = Dataset()
        for theirs, ours in keywords.items():
            value = image.get(ours)
            if value is not None:
                setattr(content, theirs, float(value) if theirs == "EffectiveEchoTime" else value)
        if len(content):
            setattr(item, macro, [content])
    content = _item(item, "FrameContentSequence")
    content.StackID, content.InStackPositionNumber = "1", index + 1
    content.FrameAcquisitionNumber = 1
    content.FrameAcquisitionDateTime = f"{image.AcquisitionDate}{image.AcquisitionTime}"
    _item(item, f"{kind}{'' if kind == 'PET' else 'Image'}FrameTypeSequence").FrameType = list(
        image.ImageType
    )
    item.private_block(0x0029, "CANARY CREATOR", create=True).add_new(0x10, "LO", CANARY)
    return item


def _ct_image(entropy: str, index: int, plane: NDArray[Any], encoding: Encoding) -> Dataset:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.SOPClassUID = CTImageStorage
    ds.SOPInstanceUID = generate_uid(entropy_srcs=[entropy, "instance", str(index)])
    ds.StudyInstanceUID = generate_uid(entropy_srcs=[entropy, "study"])
    ds.SeriesInstanceUID = generate_uid(entropy_srcs=[entropy, "series"])
    ds.FrameOfReferenceUID = generate_uid(entropy_srcs=[entropy, "frame"])
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.StudyDate = ds.SeriesDate = ds.AcquisitionDate = ds.ContentDate = "20250102"
    ds.StudyTime, ds.SeriesTime, ds.ContentTime = "101500", "102000", "102130.25"
    ds.AcquisitionTime = f"1020{index % 60:02d}.5"
    ds.AccessionNumber, ds.StudyID, ds.ReferringPhysicianName = "A77", "S1", "Doe^Referring"
    ds.PatientBirthDate, ds.PatientSex, ds.PatientAge = "19600229", "O", "064Y"
    ds.Modality, ds.Manufacturer, ds.ManufacturerModelName = "CT", "Phantom Works", "Generator 1"
    ds.DeviceSerialNumber, ds.SoftwareVersions, ds.StationName = "0815", ["1.0", "2.0"], "CT1"
    ds.InstitutionName, ds.SeriesDescription = "Test Hospital", "Thorax 2.5 soft"
    ds.BodyPartExamined, ds.ProtocolName, ds.SeriesNumber = "CHEST", "Thorax routine", 4
    ds.AcquisitionNumber, ds.InstanceNumber, ds.PositionReferenceIndicator = 1, index + 1, "SN"
    ds.KVP, ds.XRayTubeCurrent, ds.Exposure, ds.ExposureTime = "120", 200, 100, 500
    ds.ConvolutionKernel, ds.GantryDetectorTilt, ds.SliceLocation = "B30f", "0", f"{index * 2.5}"
    ds.IrradiationEventUID = generate_uid(entropy_srcs=[entropy, "irradiation"])
    ds.WindowCenter, ds.WindowWidth = ["40", "-600"], ["400", "1600"]
    ds.WindowCenterWidthExplanation = ["SOFT", "LUNG"]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows, ds.Columns = plane.shape
    ds.BitsAllocated, ds.BitsStored = 16, encoding.bits_stored
    ds.HighBit, ds.PixelRepresentation = encoding.bits_stored - 1, int(encoding.signed)
    ds.RescaleType = "HU"
    ds.add_new("PixelData", "OW", plane.astype(plane.dtype.newbyteorder("<")).tobytes())
    return ds


def with_canaries(ds: Dataset) -> Dataset:
    """Put `CANARY` into what must not leave: private at three depths, and what describes others."""
    for holder in (ds, _item(ds, "RequestAttributesSequence"), _item(ds, "ProcedureCodeSequence")):
        block = holder.private_block(0x0029, "CANARY CREATOR", create=True)
        block.add_new(0x10, "LO", CANARY)
    request = ds.RequestAttributesSequence[0]
    request.ScheduledProcedureStepID = request.RequestedProcedureID = "R1"
    code = ds.ProcedureCodeSequence[0]
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "CT1", "99TEST", "CT of chest"
    for keyword in (
        "OperatorsName",
        "PerformingPhysicianName",
        "ImageComments",
        "DerivationDescription",
        "PerformedProcedureStepDescription",
        "PerformedProcedureStepID",
        "InstitutionAddress",
        "CommentsOnThePerformedProcedureStep",
    ):
        setattr(ds, keyword, CANARY)
    _item(ds, "UDISequence").UniqueDeviceIdentifier = CANARY
    _item(ds, "OriginalAttributesSequence").SourceOfPreviousValues = CANARY
    icon = _item(ds, "IconImageSequence")
    icon.add_new("PixelData", "OB", b"CANARY..")
    ds.add_new(0x60003000, "OW", b"CANARY  ")
    ds.add_new(0x60000022, "LO", CANARY)
    return ds


def localizer(like: Dataset) -> Dataset:
    """A localizer of the same series: another orientation."""
    return _companion(
        like,
        "localizer",
        ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"],
        ImageOrientationPatient=["1", "0", "0", "0", "0", "-1"],
        InstanceNumber=999,
    )


def not_an_image(like: Dataset) -> Dataset:
    """An object without pixels of the same series."""
    report = UID("1.2.840.10008.5.1.4.1.1.88.11")
    return _companion(like, "report", SOPClassUID=report, Modality="SR", PixelData=None, Rows=None)


def secondary_capture(like: Dataset) -> Dataset:
    """A screenshot of the same series."""
    return _companion(
        like, "shot", SOPClassUID=SecondaryCaptureImageStorage, ImagePositionPatient=None
    )


def _companion(like: Dataset, what: str, **attributes: Any) -> Dataset:
    uid = generate_uid(entropy_srcs=[str(like.SOPInstanceUID), what])
    return changed([like], SOPInstanceUID=uid, **attributes)[0]


def changed(datasets: Iterable[Dataset], **attributes: Any) -> list[Dataset]:
    """Copies with attributes replaced; None deletes one."""
    return [_as_received(_changed(ds, attributes), _syntax(ds)) for ds in datasets]


def write_series(datasets: Iterable[Dataset], folder: Path) -> list[Path]:
    """Write each dataset as a Part 10 file, named by its place; returns the paths in order."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, ds in enumerate(datasets):
        path = folder / f"{index:04d}.dcm"
        ds.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


def no_log(folder: Path) -> RedoLog:
    """A redo log that takes nothing: each file is synced for itself."""
    return RedoLog(folder / REDO, 0, lambda _: False, lambda: None)


def small_log(folder: Path) -> RedoLog:
    """A redo log of one segment that nobody settles."""
    log = RedoLog(folder / REDO, SEGMENT_BYTES, lambda _: True, lambda: None)
    log.restore(lambda *_: None)
    log.step()
    return log


def enter(log: RedoLog, series_uid: str, uid: str) -> Arrival:
    """Put an instance of 100 zeros into a redo log, and nowhere else."""
    digest = hashlib.sha256(bytes(100)).hexdigest()
    facts = (series_uid, "1", "CT", "1.2", "1.2", digest, 100, "CT1", "DICOMNODE", None, None)
    arrival = Arrival(uid, *facts)
    content = memoryview(mmap.mmap(-1, 2 * HEADROOM))
    label = {"received": 1.0, "arrival": arrival.plain()}
    with log.entry(label, Written(content, 100, 0, digest)) as logged:
        assert logged
    return arrival


def file_bytes(ds: Dataset) -> bytes:
    """The Part 10 file of a dataset."""
    buffer = BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _changed(ds: Dataset, attributes: dict[str, Any]) -> Dataset:
    copied = Dataset()
    copied.file_meta = FileMetaDataset()
    copied.file_meta.TransferSyntaxUID = _syntax(ds)
    copied.update({tag: ds[tag] for tag in ds.keys()})  # noqa: SIM118 - a Dataset iterates elements
    for keyword, value in attributes.items():
        if keyword in copied:
            del copied[keyword]
        if value is not None:
            setattr(copied, keyword, value)
    return copied


def _syntax(ds: Dataset) -> UID:
    return UID(ds.file_meta.get("TransferSyntaxUID", ExplicitVRLittleEndian))


def _item(ds: Dataset, keyword: str) -> Dataset:
    item = Dataset()
    setattr(ds, keyword, [item])
    return item


def _as_received(ds: Dataset, syntax: UID) -> Dataset:
    """Through a file and back, in a transfer syntax."""
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    already = _syntax(ds) == syntax and syntax.is_compressed
    if ExplicitVRBigEndian in (syntax, _syntax(ds)) and syntax != _syntax(ds):
        words = np.frombuffer(ds.PixelData, "<u2")  # nobody swaps pixels for us
        ds.add_new("PixelData", "OW", words.byteswap().tobytes())
    if syntax == JPEGLosslessSV1 and not already:
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        return _with_dcmcjpeg(ds)
    if syntax.is_compressed and syntax.is_encapsulated and not already:
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.compress(syntax, generate_instance_uid=False)
    ds.file_meta.TransferSyntaxUID = syntax
    return dcmread(BytesIO(file_bytes(ds)))


def _with_dcmcjpeg(ds: Dataset) -> Dataset:
    """JPEG Lossless SV1, which pydicom cannot write, by DCMTK."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        plain, packed = Path(folder, "plain.dcm"), Path(folder, "packed.dcm")
        plain.write_bytes(file_bytes(ds))
        subprocess.run([JPEG_TOOL, "+e1", plain, packed], check=True, capture_output=True)
        return dcmread(BytesIO(packed.read_bytes()))
