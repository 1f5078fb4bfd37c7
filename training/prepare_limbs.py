"""Pairs of T1 MR and CT of limbs for models/mr-to-ct and models/ct-to-mr, aligned by their bones.

    python training/prepare_limbs.py ../shared/data runs/limb-pairs

Writes for each patient of Soft-tissue-Sarcoma OUT/HASH/ with mr.nii.gz and ct.nii.gz, both on the
lattice of the MR, to be given to a network, and mr-sure.nii.gz and ct-sure.nii.gz, to be aimed at:
without the table of the CT, and far below any value where the two do not agree on what is body or
one shows nothing, so that nothing is learned there. A patient whose bones cannot be found in the MR
is left out, with the reason. How: training/limbs.py.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from dicomnode.errors import ConfigError, DicomNodeError
from training.errors import TrainingError
from training.images import read_image, voxels_of
from training.limbs import Aligned, align
from training.pairs import files_by_patient, partners

FOLDERS = ("training/sarcoma_ct_mr_pet/*/{}_image.nii.gz", "dicom/paired_mr_ct_pet/*/{}")
PATIENT = "(STS_[0-9]+)/"
UNSURE_HU, UNSURE_AU = -2000.0, -1000.0
"""In the files named sure: below any value that there is."""
LEAST_ALIKE = 0.15
"""Mutual information near the bones, nats; below it they were not found."""


def main(argv: Sequence[str]) -> None:
    if len(argv) != 2:
        raise ConfigError("usage: python training/prepare_limbs.py DATA OUT")
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)  # the same sums on every machine
    data, out = Path(argv[0]), Path(argv[1])
    kinds = (
        files_by_patient(data, [folder.format(name) for folder in FOLDERS], PATIENT)
        for name in ("MR_T1", "CT")
    )
    mr, ct = kinds
    for patient in sorted(mr):
        ((signal, hu),) = partners(mr[patient], ct.get(patient, ()))
        print(f"{patient}: {prepare(out / patient, signal, hu)}", flush=True)


def prepare(folder: Path, mr: Path, ct: Path) -> str:
    """Align one pair and write it; returns what became of it, in words."""
    signal, hu = read_image(mr, "AU"), read_image(ct, "HU")
    try:
        aligned = align(hu, signal)
    except TrainingError as error:
        return f"left out: {error}"
    words = (
        f"{aligned.moved}; alike {aligned.alike:.2f}; cortical bone on dark MR "
        f"{aligned.dark_before:.2f} before, {aligned.dark_after:.2f} after"
    )
    if aligned.alike < LEAST_ALIKE:
        return f"left out: {words}; want {LEAST_ALIKE} or more alike"
    write(folder, signal, aligned)
    return f"{words}; sure {aligned.sure.mean():.2f}"


def write(folder: Path, mr: Any, aligned: Aligned) -> None:
    """The four images of a pair."""
    folder.mkdir(parents=True, exist_ok=True)
    signal = voxels_of(mr)
    _write(folder / "mr.nii.gz", signal, mr)
    _write(folder / "ct.nii.gz", aligned.hu, mr)
    limb = np.where(aligned.body, aligned.hu, np.float32(-1000.0))
    for name, values, unsure in (("mr", signal, UNSURE_AU), ("ct", limb, UNSURE_HU)):
        sure = np.where(aligned.sure, values, np.float32(unsure))
        _write(folder / f"{name}-sure.nii.gz", sure, mr)


def _write(path: Path, values: NDArray[np.float32], like: Any) -> None:
    image = sitk.GetImageFromArray(values.astype(np.float32))
    image.CopyInformation(like)
    sitk.WriteImage(image, str(path), True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DicomNodeError as error:
        raise SystemExit(str(error)) from None
