"""Training images of any kind as volumes: DICOM, NIfTI, MetaImage, NRRD, NPY, PNG.

DICOM goes through the node's own code, so that training and serving see the same values. A volume
is a SimpleITK image of float32 voxels in a physical unit; what has no geometry of its own (NPY,
PNG) gets voxels of 1 mm.
"""

import gzip
import math
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from pydicom import dcmread
from pydicom.errors import InvalidDicomError

from dicomnode.errors import SeriesRefused
from dicomnode.imaging.units import Unit
from dicomnode.imaging.volume import Volume, volume_from_datasets
from training.errors import TrainingError

ITK_SUFFIXES = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd")
IMAGE_SUFFIXES = (*ITK_SUFFIXES, ".npy", ".png")
"""Of images that are not DICOM."""


def read_image(path: Path, unit: Unit, eight_bit: tuple[float, float] | None = None) -> Any:
    """A file, or a folder with one DICOM series, as a SimpleITK image, float32, in `unit`.

    Args:
        eight_bit: physical values of grey 0 and 255, for 8-bit PNG; None: there should be none.

    Raises:
        TrainingError: it cannot be read, is an 8-bit image whose grey values are not declared, or
            holds values that cannot be in `unit`.
    """
    try:
        if path.is_dir():
            return _dicom(sorted(p for p in path.rglob("*") if p.is_file()), path, unit)
        if path.suffix == ".dcm":
            return _dicom([path], path, unit)
        if path.name.endswith(ITK_SUFFIXES):
            _check_whole(path)
            return _plausible(_deep(sitk.ReadImage(str(path)), path), unit, path)
        if path.suffix == ".npy":
            return _plausible(_plain(np.load(path, allow_pickle=False), path), unit, path)
        if path.suffix == ".png":
            image = _plain(_png(path, eight_bit), path)
            return _plausible(image, unit, path, grey=eight_bit is None)
    except (OSError, EOFError, RuntimeError, ValueError, UnidentifiedImageError) as error:
        raise TrainingError(
            f"{path}: cannot be read ({type(error).__name__}); is it whole?"
        ) from error
    raise TrainingError(f"{path}: not DICOM, NIfTI, MetaImage, NRRD, NPY or PNG")


def is_dicom(path: Path) -> bool:
    """Whether `read_image` reads it as DICOM."""
    return path.is_dir() or path.suffix == ".dcm"


def voxels_of(image: Any) -> NDArray[np.float32]:
    """(slices, rows, columns), float32."""
    voxels: NDArray[np.float32] = sitk.GetArrayFromImage(image)
    return voxels


def onto(image: Any, grid: Any, outside: float) -> tuple[Any, NDArray[np.bool_]]:
    """`image` on the lattice of `grid`, and where it lies inside its own.

    Linear; a lattice that differs by whole voxels gives the values themselves.

    Returns:
        A SimpleITK image, and (slices, rows, columns), bool.
    """
    inside = sitk.Image(image.GetSize(), sitk.sitkUInt8) + 1
    inside.CopyInformation(image)
    identity = sitk.Transform(3, sitk.sitkIdentity)
    moved = sitk.Resample(image, grid, identity, sitk.sitkLinear, outside)
    covered = sitk.Resample(inside, grid, identity, sitk.sitkNearestNeighbor, 0)
    return moved, sitk.GetArrayFromImage(covered).astype(np.bool_)


def with_spacing(image: Any, spacing_mm: float, outside: float) -> Any:
    """`image` with square pixels of `spacing_mm` within its slices, smoothed when made coarser."""
    row, column = image.GetSpacing()[1], image.GetSpacing()[0]
    if max(abs(row - spacing_mm), abs(column - spacing_mm)) < 1e-3 * spacing_mm:
        return image
    for axis, own in enumerate((column, row)):  # within slices, of which there may be one
        if own < spacing_mm:
            image = sitk.RecursiveGaussian(image, spacing_mm / 2.355, direction=axis)
    width, height, depth = image.GetSize()
    size = [round(width * column / spacing_mm), round(height * row / spacing_mm), depth]
    spacing = [spacing_mm, spacing_mm, image.GetSpacing()[2]]
    return sitk.Resample(
        image,
        [max(1, size[0]), max(1, size[1]), depth],
        sitk.Transform(3, sitk.sitkIdentity),
        sitk.sitkLinear,
        image.GetOrigin(),
        spacing,
        image.GetDirection(),
        outside,
    )


def _dicom(files: list[Path], path: Path, unit: Unit) -> Any:
    datasets = []
    for file in files:
        try:
            datasets.append(dcmread(file))
        except InvalidDicomError:
            continue
    if not datasets:
        raise TrainingError(f"{path}: no DICOM instance in it")
    try:
        volume, _ = volume_from_datasets(datasets, unit, min_slices=1, allow_lossy=True)
    except SeriesRefused as error:
        raise TrainingError(f"{path}: {error}") from error
    return image_of(volume)


def image_of(volume: Volume) -> Any:
    """A volume of the node as a SimpleITK image, with its position and direction."""
    image = sitk.GetImageFromArray(volume.voxels)
    row, column = volume.orientation[:3], volume.orientation[3:]
    normal = np.cross(row, column)
    between, rows, columns = volume.spacing_mm
    image.SetOrigin([float(x) for x in volume.positions[0]])
    image.SetSpacing([columns, rows, between if between > 0 else 1.0])
    image.SetDirection([float(x) for x in np.stack([row, column, normal], 1).ravel()])
    return image


def _png(path: Path, eight_bit: tuple[float, float] | None) -> NDArray[np.float32]:
    with Image.open(path) as picture:
        if picture.mode not in ("L", "I;16", "I", "RGB"):
            raise TrainingError(f"{path}: a PNG of mode {picture.mode}; want grey, 8 or 16 bits")
        deep = picture.mode in ("I;16", "I")
        grey = np.asarray(picture if deep else picture.convert("L"), np.float32)
    if deep:
        return grey
    if eight_bit is None:
        raise TrainingError(
            f"{path}: 8-bit grey values have no physical unit; say what 0 and 255 stand for "
            "(eight_bit: [low, high]), or give images of 16 bits"
        )
    low, high = eight_bit
    return low + grey * np.float32((high - low) / 255.0)


def _check_whole(path: Path) -> None:
    """ITK reads what is missing of a NIfTI file as zeros, and says nothing.

    Raises:
        TrainingError: the file is shorter than its header promises.
        EOFError: its compression ends too early.
    """
    if not path.name.endswith((".nii", ".nii.gz")):
        return
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    bits = int(reader.GetMetaData("bitpix")) * math.prod(reader.GetSize())
    promised = int(float(reader.GetMetaData("vox_offset"))) + bits // 8
    there = path.stat().st_size
    if path.suffix == ".gz":
        with gzip.open(path) as stream:
            there = sum(len(part) for part in iter(lambda: stream.read(1 << 20), b""))
    if there < promised:
        raise TrainingError(f"{path}: {there} bytes of {promised}: copy it again")


_POSSIBLE: dict[Unit, tuple[float, float]] = {"HU": (-33000, 66000), "SUV": (-10, 5000)}
"""No value is beyond in these units; Bq/ml and MR values have no bounds."""

_GREY_FROM = 100.0
"""HU without anything below 0 are those of a window; none of soft tissue reaches so far."""


def _plausible(image: Any, unit: Unit, path: Path, *, grey: bool = True) -> Any:
    """What has no header to say its unit must at least be able to have it.

    Args:
        grey: values from 0 to 255 are grey ones; nobody has said what these stand for.
    """
    voxels = voxels_of(image)
    if not np.isfinite(voxels).all():
        raise TrainingError(f"{path}: holds values that are not finite")
    low, high = float(voxels.min()), float(voxels.max())
    least, most = _POSSIBLE.get(unit, (-math.inf, math.inf))
    scaled = -1.0 <= low < high <= 1.0 or (grey and low >= 0 and _GREY_FROM < high <= 255)
    if (unit == "HU" and scaled) or low < least or high > most:
        raise TrainingError(f"{path}: values from {low:.6g} to {high:.6g} are not {unit}")
    return image


def _deep(image: Any, path: Path) -> Any:
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise TrainingError(f"{path}: colour; want one value per voxel")
    if image.GetDimension() not in (2, 3):
        raise TrainingError(f"{path}: {image.GetDimension()} axes; want 2 or 3")
    if image.GetPixelID() in (sitk.sitkUInt8, sitk.sitkInt8):
        raise TrainingError(f"{path}: 8-bit values have no physical unit; store float32 or int16")
    image = sitk.Cast(image, sitk.sitkFloat32)
    return sitk.JoinSeries(image) if image.GetDimension() == 2 else image


def _plain(values: NDArray[Any], path: Path) -> Any:
    if values.ndim not in (2, 3):
        raise TrainingError(f"{path}: {values.ndim} axes; want (rows, columns) or slices of them")
    if values.dtype == np.uint8:
        raise TrainingError(f"{path}: 8-bit values have no physical unit; store float32 or int16")
    volume = values[None] if values.ndim == 2 else values
    return sitk.GetImageFromArray(np.ascontiguousarray(volume, dtype=np.float32))
