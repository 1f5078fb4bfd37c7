"""Do the judges see what is wrong? ``python tests/judge_selftest.py`` plants ten faults.

Prints which judge caught each, and ``caught 10 of 10``; exit 1 if one went unseen.
"""

import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from pydicom import Dataset, dcmread

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.factories import ct_series
from tests.judges import every_verdict, files_in, in_slice_order
from tests.tasks import KINDS, ge_pet, make_series


def slice_moved(ds: Dataset) -> None:
    x, y, z = ds.ImagePositionPatient
    ds.ImagePositionPatient = [x, y, float(z) + 0.2]


def intercept_plus_one(ds: Dataset) -> None:
    ds.RescaleIntercept = float(ds.RescaleIntercept) + 1


def wrong_character_set(ds: Dataset) -> None:
    ds.SpecificCharacterSet, ds.PatientName = "ISO_IR 100", "Bühler^Änne"


def other_patient_id(ds: Dataset) -> None:
    ds.PatientID = "SOMEONE"


def no_frame_of_reference(ds: Dataset) -> None:
    del ds.FrameOfReferenceUID


def private_element(ds: Dataset) -> None:
    ds.private_block(0x0029, "X", create=True).add_new(1, "LO", "x")


def contrast_agent(ds: Dataset) -> None:
    ds.ContrastBolusAgent = "Iomeprol"


def wrong_image_type(ds: Dataset) -> None:
    ds.ImageType = ["SYNTHETIC", "SECONDARY"]


def pet_times_plus_one_hour(ds: Dataset) -> None:
    for keyword in ("SeriesTime", "AcquisitionTime"):
        time = str(ds[keyword].value)
        ds[keyword].value = f"{int(time[:2]) + 1:02}{time[2:]}"


def pet_slope_plus_one_percent(ds: Dataset) -> None:
    ds.RescaleSlope = f"{float(ds.RescaleSlope) * 1.01:.10f}"


Fault = Callable[[Dataset], None]
FAULTS: dict[Fault, tuple[bool, set[str]]] = {
    # planted in every slice (else in one); the judges of which at least one must see it
    slice_moved: (False, {"contract"}),
    intercept_plus_one: (False, {"values"}),
    wrong_character_set: (True, {"dcentvfy", "dcmtk text", "contract"}),
    other_patient_id: (True, {"dcentvfy"}),
    no_frame_of_reference: (True, {"dciodvfy"}),
    private_element: (False, {"contract"}),
    contrast_agent: (False, {"contract"}),
    wrong_image_type: (True, {"dciodvfy"}),
    pet_times_plus_one_hour: (True, {"SUV factor", "contract"}),
    pet_slope_plus_one_percent: (True, {"values"}),
}


def verdicts_on(fault: Fault | None, made: tuple[Path, Path], everywhere: bool) -> set[str]:
    """The judges that find something in a copy of a derived series with a fault planted."""
    source, derived = made
    expected = np.load(derived / "prediction.npy")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(derived, Path(folder, "derived")))
        files = in_slice_order(copy.rglob("*.dcm"))
        for path in files if everywhere else files[1:2]:
            if fault is not None:
                ds = dcmread(path)
                fault(ds)
                ds.save_as(path)
        return {v.name for v in every_verdict(files_in(source), files, (), expected) if v.findings}


def self_test() -> tuple[int, list[str]]:
    """How many faults were caught, and a line for each."""
    lines, caught = [], 0
    with tempfile.TemporaryDirectory() as folder:
        korean = ct_series(3, character_set="\\ISO 2022 IR 149")
        ct = make_series(KINDS["denoise"], korean, Path(folder, "ct"))
        pet = make_series(KINDS["delayed_pet"], ge_pet(3), Path(folder, "pet"))
        for made in (ct, pet):
            if unfounded := verdicts_on(None, made, True):
                return 0, [f"without a fault: {sorted(unfounded)}"]
        for fault, (everywhere, must) in FAULTS.items():
            found = verdicts_on(fault, pet if fault.__name__.startswith("pet") else ct, everywhere)
            caught += bool(found & must)
            lines.append(f"{fault.__name__}: {', '.join(sorted(found)) or 'NOT SEEN'}")
    return caught, lines


if __name__ == "__main__":
    count, text = self_test()
    print(*text, f"caught {count} of {len(FAULTS)}", sep="\n")
    sys.exit(count != len(FAULTS))
