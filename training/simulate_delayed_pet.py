"""Make pairs of early and delayed FDG PET: the data of models/delayed-pet.

    python training/simulate_delayed_pet.py ../shared/data runs/pet-pairs

Every pair is one activity map seen at two times after injection: tissues follow the two-tissue
compartment model (kinetics.py) with rates drawn for each patient, organ and lesion. No early scan
is real. Writes OUT/NAME/{early,delayed,labels}.nii.gz; a pair that is there already is kept.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy import ndimage

from dicomnode.errors import DicomNodeError
from training.errors import TrainingError
from training.kinetics import TISSUES, activity, drawn, excreted
from training.pet_anatomy import CLASSES, ActivityMap, drawn_body, real_limb, real_whole_body

EARLY_MIN, DELAYED_MIN, MAP_MIN = (7.0, 21.0), (42.0, 63.0), (55.0, 65.0)
"""Frames of the delayed-PET paper, and when the activity maps stand, minutes after injection."""
BODIES, BODY_SLICES = 160, 24
"""Drawn bodies; every fifth is for testing, every tenth from the first on for validation."""
PATIENT_SPREAD, PART_SPREAD, LESION_SPREAD = 0.15, 0.1, 0.35
"""Log-normal spread of the rates among patients, organs of one patient, and lesions."""
NOISE_SUV, CORRELATION_MM = 0.06, 4.0
"""Noise of a delayed frame at 1 SUV; the early frame is shorter by a third and noisier."""


def main(argv: Sequence[str]) -> None:
    if len(argv) != 2:
        raise TrainingError("usage: python training/simulate_delayed_pet.py DATA OUT")
    data, out = Path(argv[0]), Path(argv[1])
    for number in range(BODIES):
        if not (out / f"BODY_{number:03}" / "labels.nii.gz").exists():
            rng = np.random.default_rng([number, 1])
            write_pair(out / f"BODY_{number:03}", drawn_body(rng, BODY_SLICES), rng)
    limbs = sorted(data.glob("training/sarcoma_ct_mr_pet/STS_*"))
    if not limbs:
        raise TrainingError(f"{data}: no training/sarcoma_ct_mr_pet/STS_* in it; correct DATA")
    for number, folder in enumerate(limbs):
        if folder.name == "STS_001":
            continue  # the whole body of this patient comes below
        rng = np.random.default_rng([number, 2])
        files = [folder / f"{name}.nii.gz" for name in ("PET_image", "CT_image", "PET_mask")]
        write_pair(out / folder.name, real_limb(*files), rng)
    for number, folder in enumerate(sorted(data.glob("dicom/paired_mr_ct_pet/STS_*"))):
        rng = np.random.default_rng([number, 3])
        write_pair(out / folder.name, real_limb(folder / "PET", folder / "CT", None), rng)
    whole = data / "dicom/pet/fdg_wholebody_STS_001_GE_BQML"
    write_pair(out / "STS_001", real_whole_body(whole), np.random.default_rng(4))
    print(f"{len(list(out.glob('*/labels.nii.gz')))} pairs in {out}")


def write_pair(folder: Path, body: ActivityMap, rng: np.random.Generator) -> None:
    """The early and the delayed frame of a body, with its labels, as NIfTI."""
    early, delayed = frames(body, rng)
    folder.mkdir(parents=True, exist_ok=True)
    named = (("early", early), ("delayed", delayed), ("labels", body.labels))  # labels: it is whole
    for name, voxels in named:
        image = sitk.GetImageFromArray(np.asarray(voxels))
        image.SetSpacing([float(mm) for mm in reversed(body.spacing_mm)])
        sitk.WriteImage(image, str(folder / f"{name}.nii.gz"))


def frames(
    body: ActivityMap, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(slices, rows, columns), float32, SUV: the early frame and the delayed one."""
    early, delayed = np.ones_like(body.suv), np.ones_like(body.suv)
    rates = {name: drawn(own, PATIENT_SPREAD, rng) for name, own in TISSUES.items()}
    for part in range(1, int(body.parts.max()) + 1):
        inside = body.parts == part
        name = CLASSES[body.labels[inside][0]]
        if name == "urine":
            levels = [excreted(*frame) for frame in (EARLY_MIN, DELAYED_MIN, MAP_MIN)]
        else:
            spread = LESION_SPREAD if name == "tumour" else PART_SPREAD
            own = drawn(rates[name], spread, rng)
            levels = [activity(own, *frame) for frame in (EARLY_MIN, DELAYED_MIN, MAP_MIN)]
        early[inside], delayed[inside] = levels[0] / levels[2], levels[1] / levels[2]
    soften = [2.5 / mm for mm in body.spacing_mm]  # 6 mm between tissues, as in the map itself
    seen = [body.suv * ndimage.gaussian_filter(ratio, soften) for ratio in (early, delayed)]
    longer = (DELAYED_MIN[1] - DELAYED_MIN[0]) / (EARLY_MIN[1] - EARLY_MIN[0])
    noise = (NOISE_SUV * longer**0.5, NOISE_SUV)
    first, second = (_noisy(*pair, body, rng) for pair in zip(seen, noise, strict=True))
    return first, second


def _noisy(
    suv: NDArray[np.float32], strength: float, body: ActivityMap, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Noise that grows with the root of the activity, correlated as by reconstruction."""
    grain = rng.standard_normal(suv.shape).astype(np.float32)
    grain = ndimage.gaussian_filter(grain, [CORRELATION_MM / 2.355 / mm for mm in body.spacing_mm])
    noisy = suv + strength * np.sqrt(np.maximum(suv, 0)) * grain / grain.std()
    return np.asarray(np.maximum(noisy, 0), np.float32)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DicomNodeError as error:
        raise SystemExit(str(error)) from None
