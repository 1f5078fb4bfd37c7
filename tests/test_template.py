"""What a derived series shares is built once, leaks nothing, and says the right time."""

import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from pydicom import Dataset
from pydicom.uid import ExplicitVRBigEndian

from dicomnode.derived import OutputOptions, derive_series
from dicomnode.imaging.volume import volume_from_datasets
from tests.factories import ct_series, file_bytes, mr_series, write_series
from tests.tasks import KINDS, ge_pet, made_of, translated
from tests.test_derived import DENOISER, as_task, derive, received

HANGUL = "\\ISO 2022 IR 149"
KOREAN = "Hong^Gildong=洪^吉洞=홍^길동"


def with_sixteen_canaries(ds: Dataset) -> Dataset:
    """`CANARY01` to `CANARY16` where nothing may be copied from."""
    canaries = iter(f"CANARY{number:02}" for number in range(1, 17))
    nested = {"RequestAttributesSequence": Dataset(), "ProcedureCodeSequence": Dataset()}
    code = nested["ProcedureCodeSequence"]
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "1", "99T", "any"
    nested["RequestAttributesSequence"].ScheduledProcedureStepID = "R1"
    for keyword, item in nested.items():
        item.private_block(0x0029, "OTHER", create=True).add_new(1, "LO", next(canaries))
        setattr(ds, keyword, [item])
    ds.private_block(0x0029, "OTHER", create=True).add_new(1, "LO", next(canaries))
    for keyword in (
        "OperatorsName",
        "PerformingPhysicianName",
        "ImageComments",
        "DerivationDescription",
        "PerformedProcedureStepID",
        "PerformedProcedureStepDescription",
        "CommentsOnThePerformedProcedureStep",
        "InstitutionAddress",
    ):
        setattr(ds, keyword, next(canaries))
    for keyword, inside in (
        ("UDISequence", "UniqueDeviceIdentifier"),
        ("DigitalSignaturesSequence", "DigitalSignatureUID"),
        ("OriginalAttributesSequence", "SourceOfPreviousValues"),
    ):
        item = Dataset()
        setattr(item, inside, next(canaries))
        setattr(ds, keyword, [item])
    icon = Dataset()
    icon.add_new("PixelData", "OB", next(canaries).encode())
    ds.IconImageSequence = [icon]
    ds.add_new(0x60000022, "LO", next(canaries))
    assert next(canaries, None) is None
    return ds


@pytest.mark.parametrize("task", KINDS)
def test_no_canary_leaves(task: str, tmp_path: Path) -> None:
    source = {"delayed_pet": ge_pet, "syn_ct": mr_series}.get(task, ct_series)(2)
    planted = [with_sixteen_canaries(ds) for ds in source]
    assert b"".join(map(file_bytes, planted)).count(b"CANARY") >= 16 * len(planted)
    write_series(made_of(task, received(planted), tmp_path), tmp_path / "out")
    done = subprocess.run(
        ["/usr/bin/grep", "-c", "CANARY", "-r", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert [line.rsplit(":", 1)[1] for line in done.stdout.splitlines()] == ["0", "0"]


def test_times_are_in_the_zone_of_the_source_whatever_the_clocks_zone_is() -> None:
    now = datetime.now(UTC)
    for ds in derive(ct_series(2, TimezoneOffsetFromUTC="+0900"), now=now)[2]:
        written = datetime.strptime(
            ds.InstanceCreationDate + ds.InstanceCreationTime, "%Y%m%d%H%M%S.%f"
        ).replace(tzinfo=UTC)
        assert abs(written - now - timedelta(hours=9)) < timedelta(minutes=2)
        moments = [str(e.value) for e in ds.iterall() if e.VR == "DT"]
        assert len(moments) == 3
        assert all(moment.endswith("+0900") for moment in moments)


def test_the_template_gives_the_same_bytes_as_the_plain_way() -> None:
    series = ct_series(140, 16, 16, private=True, character_set=HANGUL)
    for index, ds in enumerate(series):  # what is shared changes half-way, and back
        ds.ProtocolName = "other" if 40 < index < 60 else "same"
        if index % 50 == 3:
            ds.PatientWeight = "71.0"
    source, ordered = volume_from_datasets(received(series))
    now = datetime.now(UTC)
    given = (source, source, ordered, DENOISER, OutputOptions(), now)
    plain = list(derive_series(*given, use_template=False))
    quick = list(derive_series(*given))
    for one, other in zip(plain, quick, strict=True):
        assert file_bytes(one) == file_bytes(other)


@pytest.mark.parametrize("task", KINDS)
def test_the_template_gives_the_same_bytes_for_every_type(task: str, tmp_path: Path) -> None:
    many = {"delayed_pet": ge_pet, "syn_ct": mr_series}.get(task, ct_series)(6)
    done = translated(KINDS[task], many, tmp_path)
    now = datetime.now(UTC)
    ways = [
        derive_series(
            *(done.prediction, done.source, done.datasets, as_task(task), OutputOptions(), now),
            use_template=way,
        )
        for way in (False, True)
    ]
    for one, other in zip(*ways, strict=True):
        assert file_bytes(one) == file_bytes(other)


def test_setting_an_attribute_of_one_instance_changes_no_other() -> None:
    _, one, other = derive(ct_series(3))[2]
    one.PatientID = "changed"
    one.DerivationDescription = "changed"
    one.file_meta.ImplementationVersionName = "changed"
    assert other.PatientID == "P1"
    assert "not acquired" in other.DerivationDescription
    assert one.file_meta.MediaStorageSOPInstanceUID == one.SOPInstanceUID
    assert other.file_meta.ImplementationVersionName == "DICOMNODE"


def test_a_template_is_not_kept_across_transfer_syntaxes() -> None:
    """The same bytes are 256 in little endian and 1 in big endian."""
    little = ct_series(3, PregnancyStatus=256)[:2]
    big = ct_series(3, PregnancyStatus=1, syntax=ExplicitVRBigEndian)[2]
    assert [ds.PregnancyStatus for ds in derive([*little, big])[2]] == [256, 256, 1]
