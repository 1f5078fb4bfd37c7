"""What a model may make of a series: one table entry per output type.

An entry says which IOD the result is, what it keeps of its source, and what it may not be made of.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from pydicom import Dataset
from pydicom.uid import UID, CTImageStorage, MRImageStorage, PositronEmissionTomographyImageStorage

from dicomnode.attributes import (
    COMMON,
    COMMON_OR_EMPTY,
    CT,
    CT_DOSE,
    PER_SLICE,
    PET,
    PET_OR_EMPTY,
    patient_and_study,
    tags_of,
)
from dicomnode.errors import SeriesRefused
from dicomnode.imaging.marks import is_synthetic
from dicomnode.imaging.volume import Unit


@dataclass(frozen=True, slots=True)
class Output:
    """One output type.

    Attributes:
        code: last value of ImageType, and the CodeValue of DerivationCodeSequence.
        meaning: its CodeMeaning; PS3.16 CID 7203 has no code for images made by a network.
        source: Modality of what it is made of.
        modality, sop_class: of the result.
        units: what the prediction may be in.
        image_type: ImageType before SYNTHETIC and `code`.
        stored: the rule for stored values, see encodings.py.
        kept: keywords copied if present, beside `COMMON`.
        kept_or_empty: type 2: copied, or written empty.
        constants: keywords with the same value in every instance; None: written empty.
        keeps_contrast: the Contrast/Bolus module is copied if an agent was given.
    """

    code: str
    meaning: str
    source: str
    modality: str
    sop_class: UID
    units: tuple[Unit, ...]
    image_type: tuple[str, ...]
    stored: Literal["as source", "signed HU", "12 bit", "grey", "activity"]
    kept: tuple[str, ...] = ()
    kept_or_empty: tuple[str, ...] = ()
    constants: Mapping[str, str | None] = field(default_factory=dict)
    keeps_contrast: bool = False

    @property
    def shared_tags(self) -> tuple[int, ...]:
        """Tags copied that are mostly the same in all slices of a series."""
        return (*patient_and_study(), *tags_of(self._kept(per_slice=False)))

    @property
    def slice_tags(self) -> tuple[int, ...]:
        """Tags copied that mostly differ from slice to slice."""
        return tags_of(self._kept(per_slice=True))

    @property
    def type_2(self) -> tuple[str, ...]:
        """Keywords that are written empty where the source has nothing to copy."""
        return (*COMMON_OR_EMPTY, *self.kept_or_empty)

    def _kept(self, per_slice: bool) -> list[str]:
        kept = (*COMMON, *self.kept, *self.type_2)
        return [keyword for keyword in kept if (keyword in PER_SLICE) == per_slice]


def _ct_from_ct(code: str, meaning: str, *, dose: bool, contrast: bool) -> Output:
    return Output(
        code,
        meaning,
        "CT",
        "CT",
        CTImageStorage,
        ("HU",),
        ("DERIVED", "SECONDARY", "AXIAL"),
        "as source",
        kept=(*CT, *(CT_DOSE if dose else ())),
        kept_or_empty=("KVP", "AcquisitionNumber", "PatientPosition"),
        constants={"RescaleType": "HU"},  # implied for ORIGINAL images only (PS3.3 C.8.2.1.1.2)
        keeps_contrast=contrast,
    )


_MR_EMPTY = ("ScanOptions", "MRAcquisitionType", "RepetitionTime", "EchoTime", "EchoTrainLength")
OUTPUTS: Mapping[str, Output] = {  # by task of the model package
    "denoise": _ct_from_ct("DENOISE", "Denoised by a trained model", dose=True, contrast=True),
    "identity": _ct_from_ct(
        "IDENTITY", "Passed through a model that changes nothing", dose=True, contrast=True
    ),
    # No agent was given: the Contrast/Bolus module stays away (usage C), as do dose indices, which
    # a registry would count for an examination that never was.
    # Of a model that equalises histograms, the contrast paper's option, the result is no HU.
    "ce_ct": replace(
        _ct_from_ct("CE_CT", "Contrast-enhanced CT predicted from CT", dose=False, contrast=False),
        units=("HU", "AU"),
    ),
    "syn_ct": Output(
        "SYN_CT",
        "CT predicted from MR",
        "MR",
        "CT",
        CTImageStorage,
        ("HU",),
        ("DERIVED", "SECONDARY", "AXIAL"),
        "signed HU",
        kept_or_empty=("AcquisitionNumber", "PatientPosition"),
        constants={"KVP": None, "RescaleType": "HU"},
    ),
    "syn_mr": Output(
        "SYN_MR",
        "MR predicted from CT",
        "CT",
        "MR",
        MRImageStorage,
        ("AU",),
        ("DERIVED", "SECONDARY", "OTHER"),
        "12 bit",
        kept_or_empty=("PatientPosition",),
        constants={
            "ScanningSequence": "RM",
            "SequenceVariant": "NONE",
            **dict.fromkeys(_MR_EMPTY),
        },
    ),
    "delayed_pet": Output(
        "DLY_PET",
        "Delayed PET predicted from early PET",
        "PT",
        "PT",
        PositronEmissionTomographyImageStorage,
        ("BQML", "SUV"),
        ("DERIVED", "PRIMARY"),  # value 2 shall be PRIMARY (PS3.3 C.8.9.4.1.1)
        "activity",
        kept=PET,
        kept_or_empty=PET_OR_EMPTY,
        constants={"Units": "BQML"},
    ),
}


def output_of(task: str, unit: Unit | None = None) -> Output:
    """The output type of a task; of a CT in AU: with values that are said to be no HU.

    Raises:
        SeriesRefused: UNKNOWN_TASK.
    """
    if task not in OUTPUTS:
        raise SeriesRefused("UNKNOWN_TASK", f"task {task}", f"use one of {', '.join(OUTPUTS)}")
    output = OUTPUTS[task]
    if output.modality == "CT" and unit == "AU":  # US: unspecified (PS3.3 C.11.1.1.2)
        constants = {**output.constants, "RescaleType": "US"}
        return replace(output, stored="grey", constants=constants)
    return output


def check_source(datasets: Sequence[Dataset], task: str, *, accept_synthetic: bool = False) -> None:
    """Refuse a series that the output type may not be made of; to be asked before the model runs.

    Raises:
        SeriesRefused: UNKNOWN_TASK, ALREADY_SYNTHETIC, WRONG_MODALITY, CONTRAST_GIVEN,
            MULTI_ENERGY, NOT_BQML, NOT_STATIC.
    """
    output = output_of(task)
    for dataset in datasets:
        found = _refusal(dataset, output, accept_synthetic)
        if found is not None:
            code, what, remedy = found
            raise SeriesRefused(code, f"instance {dataset.get('SOPInstanceUID')}: {what}", remedy)


def _refusal(
    dataset: Dataset, output: Output, accept_synthetic: bool
) -> tuple[str, str, str] | None:
    """Code, what and remedy; None: nothing against it."""
    if is_synthetic(dataset) and not accept_synthetic:
        return "ALREADY_SYNTHETIC", "is synthetic itself", "send what was acquired"
    if dataset.get("Modality") != output.source:
        what = f"Modality is not {output.source}"
        return "WRONG_MODALITY", what, f"send {output.source} images that say so"
    if output.code == "CE_CT" and any(
        dataset.get(keyword) for keyword in ("ContrastBolusAgent", "ContrastBolusAgentSequence")
    ):
        return "CONTRAST_GIVEN", "a contrast agent was given", "send the series without contrast"
    if dataset.get("MultienergyCTAcquisition") == "YES":
        return "MULTI_ENERGY", "is multi-energy CT", "send a single-energy image"
    if output.source == "PT":
        return _pet_refusal(dataset)
    return None


def _pet_refusal(dataset: Dataset) -> tuple[str, str, str] | None:
    if dataset.get("Units") not in ("BQML", "CNTS", "GML"):  # units.py says when these convert
        return "NOT_BQML", "Units is not BQML", "send PET in Bq/ml"
    series_type = dataset.get("SeriesType") or ()
    if set(series_type) & {"DYNAMIC", "GATED"}:
        return "NOT_STATIC", "is dynamic or gated PET", "send the static series"
    return None
