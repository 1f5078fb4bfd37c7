"""Register the pairs of a data set: the moving image of each patient onto the fixed one.

    python training/register.py training/preparation/register-limbs.yaml
    python training/register.py FILE.yaml out=/tmp/pairs deformable=null

Writes OUT/PAIR/{fixed,moving}.nii.gz (moving on the lattice of fixed), transform.h5,
before-after.png and quality.json. That comes last: a pair that has it is not done again, unless
settings or files changed. A pair that did not go well keeps its picture and its quality.json with
the reason, and no images, so that training never sees it. PAIR is a hash of what names the patient.
"""

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import yaml
from numpy.typing import NDArray
from PIL import Image

from dicomnode.errors import ConfigError, DicomNodeError, PackageError
from dicomnode.imaging.manifest import read_as
from dicomnode.imaging.units import Unit
from training.alignment import body_of
from training.errors import TrainingError
from training.images import read_image, voxels_of
from training.pairs import files_by_patient, partners
from training.registration import Deformable, Quality, Registered, Rigid, register

FORMAT = 2
"""Raise it when the method changes: older pairs are then done anew."""
_LARGEST_PICTURE = 320
"""Pixels of the longer side of one view."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One of the two kinds of images."""

    files: tuple[str, ...]
    """Patterns below `root` of files, or of folders that hold one DICOM series each."""
    unit: Unit
    outside: float = 0.0
    """Value where there is no image (air: -1000 HU)."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a pair must keep to, or it is dropped."""

    least_dice: float = 0.85
    """Of the two bodies, where both have an image."""
    least_covered: float = 0.3
    """Share of the fixed body that the moving image shows."""
    most_folded: float = 0.0005
    """Share of the body where space is turned inside out."""
    least_nmi_gain: float = -0.005
    """Images that lay well before may lose this much by interpolation."""


@dataclass(frozen=True, slots=True)
class RegisterConfig:
    """One data set, from files to registered pairs."""

    root: str
    """Relative to where the command runs."""
    out: str
    fixed: Kind
    moving: Kind
    patient: str
    """Regular expression on the path below `root`; its first group names the patient."""
    rigid: Rigid = field(default_factory=Rigid)
    deformable: Deformable | None = field(default_factory=Deformable)
    """null: rigid only."""
    limits: Limits = Limits()
    threads: int = 2


def main(argv: Sequence[str]) -> None:
    if not argv:
        raise TrainingError("usage: python training/register.py FILE.yaml [key=value ...]")
    config = read_config(Path(argv[0]), argv[1:])
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(config.threads)
    pairs = find_pairs(config)
    results: Counter[str] = Counter()
    for number, (name, fixed, moving) in enumerate(pairs, 1):
        folder, line = Path(config.out) / name, f"pair {number} of {len(pairs)}, {name}: "
        state = _state(config, (fixed, moving))
        told = _done(folder, state)
        if told is None:
            told = register_pair(config, folder, fixed, moving, _progress(line))
            told |= {"state": state}
            _write_whole(folder / "quality.json", json.dumps(told, indent=1).encode())
            words = "kept" if told["kept"] else f"dropped, {told['reason']}: {told['words']}"
        else:
            words = f"done before ({told['reason']})"
        print(f"\r{line}{words}", flush=True)
        results[str(told["reason"])] += 1
    print(f"kept {results['KEPT']} of {len(pairs)} in {config.out}: {dict(results)}")
    if not results["KEPT"]:
        raise TrainingError("no pair could be kept; look at the pictures and at `limits`")


def read_config(path: Path, overrides: Sequence[str] = ()) -> RegisterConfig:
    """Read the settings; `overrides` are ``key=value`` of the first level.

    Raises:
        ConfigError: the file cannot be read, or a key is unknown, missing or wrong.
    """
    try:
        data = yaml.safe_load(path.read_text("utf-8"))
        for override in overrides:
            key, _, value = override.partition("=")
            data[key] = yaml.safe_load(value)
        config: RegisterConfig = read_as(RegisterConfig, data, path.name)
    except (OSError, yaml.YAMLError, TypeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    except PackageError as error:
        raise ConfigError(str(error)) from error
    return config


def find_pairs(config: RegisterConfig) -> list[tuple[str, Path, Path]]:
    """Name, fixed and moving file of every pair.

    Raises:
        TrainingError: no files, or a patient with one kind only.
    """
    root = Path(config.root)
    fixed = files_by_patient(root, config.fixed.files, config.patient)
    moving = files_by_patient(root, config.moving.files, config.patient)
    if odd := set(fixed) ^ set(moving):
        raise TrainingError(f"{len(odd)} patients have only one kind of image")
    found = []
    for patient in sorted(fixed):
        pairs = partners(fixed[patient], moving[patient])
        names = [patient] if len(pairs) == 1 else [f"{patient}-{n + 1}" for n in range(len(pairs))]
        found += [(name, *files) for name, files in zip(names, pairs, strict=True)]
    return found


def register_pair(
    config: RegisterConfig, folder: Path, fixed: Path, moving: Path, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Register one pair and write its folder, but for quality.json, which is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("fixed.nii.gz", "moving.nii.gz", "transform.h5"):
        (folder / name).unlink(missing_ok=True)
    try:
        progress("reading")
        images = read_image(fixed, config.fixed.unit), read_image(moving, config.moving.unit)
        units, outside = (config.fixed.unit, config.moving.unit), config.moving.outside
        result = register(*images, units, outside, config.rigid, config.deformable, progress)
    except TrainingError as error:
        words = str(error).replace(str(fixed), "the fixed image")
        words = words.replace(str(moving), "the moving image")  # its path may name the patient
        return {"kept": False, "reason": "UNUSABLE", "words": words}
    except RuntimeError as error:  # SimpleITK: the optimiser left the image
        words = str(error).strip().splitlines()[-1]
        return {"kept": False, "reason": "DIVERGED", "words": words}
    picture(*images, result, units).save(folder / "before-after.png")
    reason, words = judge(result.quality, config.limits)
    if reason == "KEPT":
        sitk.WriteImage(images[0], str(folder / "fixed.nii.gz"), True)
        sitk.WriteImage(result.moved, str(folder / "moving.nii.gz"), True)
        sitk.WriteTransform(result.transform, str(folder / "transform.h5"))
    figures = {key: round(value, 5) for key, value in asdict(result.quality).items()}
    return {
        "kept": reason == "KEPT",
        "reason": reason,
        "words": words,
        **figures,
        "stages": list(result.stages),
    }


def judge(quality: Quality, limits: Limits) -> tuple[str, str]:
    """KEPT, or the first limit that is broken, with both values."""
    gain = quality.nmi_after - quality.nmi_before
    checks = (
        ("LITTLE_OVERLAP", "part of the body covered", quality.covered, limits.least_covered, 1),
        ("BODIES_DIFFER", "Dice of the bodies", quality.dice_after, limits.least_dice, 1),
        ("FOLDED", "share of folded space", quality.folded, limits.most_folded, -1),
        ("NO_GAIN", "gain of mutual information", gain, limits.least_nmi_gain, 1),
    )
    for reason, what, value, limit, sign in checks:
        if not sign * value >= sign * limit:
            return reason, f"{what} is {value:.4g}, limit {limit:g}"
    return "KEPT", ""


def picture(fixed: Any, moving: Any, result: Registered, units: tuple[Unit, Unit]) -> Image.Image:
    """Before above, after below; axial and coronal. Fixed green, moving magenta: grey is alike."""
    flat = fixed.GetDepth() == 1
    if flat:  # wherever the slices lie along the body
        before = _cropped(voxels_of(moving), voxels_of(fixed).shape)
    else:
        identity = sitk.Transform(3, sitk.sitkIdentity)
        before = voxels_of(sitk.Resample(moving, fixed, identity, sitk.sitkLinear, 0.0))
    ours = _grey(voxels_of(fixed), _ends(fixed, units[0]))
    ends = _ends(result.moved, units[1])  # the same before and after: only places may differ
    rows = []
    for voxels in (before, voxels_of(result.moved)):
        theirs = _grey(voxels, ends)
        slices, lines, _ = (n // 2 for n in ours.shape)
        views = [_view(ours[slices], theirs[slices], 1.0)]
        if not flat:
            tall = fixed.GetSpacing()[2] / fixed.GetSpacing()[0]
            views.append(_view(ours[::-1, lines], theirs[::-1, lines], tall))
        rows.append(_beside(views))
    return Image.fromarray(np.concatenate(rows))


def _cropped(voxels: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Cut, or filled with the lowest value, to a shape."""
    whole = np.full(shape, voxels.min(), np.float32)
    common = tuple(slice(0, min(pair)) for pair in zip(voxels.shape, shape, strict=True))
    whole[common] = voxels[common]
    return whole


def _ends(image: Any, unit: Unit) -> tuple[float, float]:
    """1st and 99th percentile of the body."""
    voxels, body = voxels_of(image), body_of(image, unit)
    low, high = np.percentile(voxels[body] if body.any() else voxels, (1, 99))
    return float(low), float(high)


def _grey(voxels: NDArray[np.float32], ends: tuple[float, float]) -> NDArray[np.uint8]:
    """0 to 255 between two values."""
    low, high = ends
    grey = (voxels - low) / max(high - low, 1e-6) * 255
    return np.asarray(np.clip(grey, 0, 255), np.uint8)


def _view(ours: NDArray[np.uint8], theirs: NDArray[np.uint8], tall: float) -> NDArray[np.uint8]:
    image = Image.fromarray(np.stack([theirs, ours, theirs], axis=-1))
    width, height = image.width, image.height * tall
    scale = _LARGEST_PICTURE / max(width, height)
    return np.asarray(image.resize((max(1, round(width * scale)), max(1, round(height * scale)))))


def _beside(views: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Views in a row of one size, black around."""
    side = _LARGEST_PICTURE
    row = np.zeros((side, side * len(views), 3), np.uint8)
    for number, view in enumerate(views):
        row[: view.shape[0], number * side : number * side + view.shape[1]] = view
    return row


def _state(config: RegisterConfig, files: Sequence[Path]) -> str:
    """What a finished pair was made of: settings, and sizes and times of the files."""
    method = [FORMAT, asdict(config.rigid), config.deformable and asdict(config.deformable)]
    rest = [asdict(config.limits), asdict(config.fixed), asdict(config.moving)]
    found = []
    for path in files:
        every = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        found += [[s.st_size, s.st_mtime_ns] for s in (p.stat() for p in every)]
    return hashlib.sha256(json.dumps([method, rest, found]).encode()).hexdigest()


def _done(folder: Path, state: str) -> dict[str, Any] | None:
    """quality.json of a pair that need not be done again."""
    try:
        told = json.loads((folder / "quality.json").read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(told, dict) or told.get("state") != state:
        return None
    whole = not told["kept"] or (folder / "moving.nii.gz").exists()
    return told if whole else None


def _progress(line: str) -> Callable[[str], None]:
    """Words on the same line of a terminal; nothing in a file."""

    def tell(words: str) -> None:
        if sys.stdout.isatty():
            print(f"\r{line}{words:24}", end="", flush=True)

    return tell


def _write_whole(path: Path, data: bytes) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DicomNodeError as error:
        raise SystemExit(str(error)) from None
