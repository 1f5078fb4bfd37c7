"""MPPS SCP: what a modality may say of a step, and what that tells of its series."""

from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom import Dataset
from pydicom.uid import ImplicitVRLittleEndian, generate_uid
from pynetdicom import AE, build_context, evt
from pynetdicom.dimse_primitives import N_CREATE
from pynetdicom.dsutils import encode
from pynetdicom.sop_class import ModalityPerformedProcedureStep  # type: ignore[attr-defined]
from sqlalchemy import select

from dicomnode import tables as t
from dicomnode.errors import OperationRefused
from dicomnode.history import History
from dicomnode.mpps import PerformedSteps, read_step
from dicomnode.tables import Database
from tests.factories import CANARY

pytestmark = pytest.mark.network

Series = dict[str, list[str]]
"""SOP Instance UIDs by Series Instance UID."""


class Ris:
    """The service behind a listening AE, and an open association to it."""

    path: Path
    database: Database
    steps: PerformedSteps

    def __init__(self) -> None:
        listening = AE("DICOMNODE")
        for abstract_syntax in PerformedSteps.contexts:
            listening.add_supported_context(abstract_syntax)
        handlers: list[Any] = [
            (evt.EVT_N_CREATE, lambda event: self._handler(evt.EVT_N_CREATE)(event)),
            (evt.EVT_N_SET, lambda event: self._handler(evt.EVT_N_SET)(event)),
            (evt.EVT_N_GET, lambda event: self._handler(evt.EVT_N_GET)(event)),
        ]
        self._server: Any = listening.start_server(
            ("127.0.0.1", 0), block=False, evt_handlers=handlers
        )
        modality = AE("CT1")
        modality.add_requested_context(ModalityPerformedProcedureStep)
        port = self._server.server_address[1]
        self._association = modality.associate("127.0.0.1", port, ae_title="DICOMNODE")
        assert self._association.is_established

    def renew(self, folder: Path) -> None:
        """An empty journal."""
        self.path = folder / "journal.db"
        self.database = Database(self.path)
        self.steps = PerformedSteps(self.database)

    def _handler(self, kind: Any) -> Any:
        return dict(self.steps.handlers)[kind]

    def create(self, uid: str | None, attributes: Dataset) -> Dataset:
        return self._association.send_n_create(attributes, ModalityPerformedProcedureStep, uid)[0]

    def change(self, uid: str, attributes: Dataset) -> Dataset:
        return self._association.send_n_set(attributes, ModalityPerformedProcedureStep, uid)[0]

    def ask(self, uid: str) -> Dataset:
        return self._association.send_n_get([], ModalityPerformedProcedureStep, uid)[0]

    def on_answer(self, handler: Callable[[Any], None]) -> None:
        """Bind what is told of the next messages from the service."""
        self._association.bind(evt.EVT_DIMSE_RECV, handler)

    def begin(self, **attributes: Any) -> str:
        uid = str(generate_uid())
        assert self.create(uid, beginning(**attributes)).Status == 0
        return uid

    def end(self, uid: str, status: str, series: Series) -> int:
        return int(self.change(uid, ending(status, series)).Status)

    def stop(self) -> None:
        self._association.release()
        self._server.shutdown()


@pytest.fixture(scope="module")
def listening_ris() -> Iterator[Ris]:
    under_test = Ris()
    yield under_test
    under_test.stop()


@pytest.fixture
def ris(listening_ris: Ris, tmp_path: Path) -> Iterator[Ris]:
    listening_ris.renew(tmp_path)
    yield listening_ris
    listening_ris.database.close()


def beginning(**attributes: Any) -> Dataset:
    """The attribute list of an N-CREATE, with whatever a test wants to be different."""
    step = Dataset()
    step.StudyInstanceUID = generate_uid()
    step.AccessionNumber = CANARY
    dataset = Dataset()
    dataset.ScheduledStepAttributesSequence = [step]
    dataset.PatientName = CANARY
    dataset.PatientID = CANARY
    dataset.PerformedProcedureStepID = "PPS1"
    dataset.PerformedStationAETitle = "CT1"
    dataset.PerformedProcedureStepStartDate = "20260101"
    dataset.PerformedProcedureStepStartTime = "101500"
    dataset.PerformedProcedureStepStatus = "IN PROGRESS"
    dataset.Modality = "CT"
    dataset.PerformedSeriesSequence = []
    for keyword, value in attributes.items():
        if value is None:
            del dataset[keyword]
        else:
            setattr(dataset, keyword, value)
    return dataset


def performed(series: Series, non_images: Series | None = None) -> list[Dataset]:
    """Items of a Performed Series Sequence."""
    items = []
    for series_uid, instances in series.items():
        item = Dataset()
        item.SeriesInstanceUID = series_uid
        item.SeriesDescription = CANARY
        item.ReferencedImageSequence = [reference(uid) for uid in instances]
        others = (non_images or {}).get(series_uid, [])
        item.ReferencedNonImageCompositeSOPInstanceSequence = [reference(uid) for uid in others]
        items.append(item)
    return items


def reference(uid: str) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    item.ReferencedSOPInstanceUID = uid
    return item


def ending(status: str, series: Series | None = None) -> Dataset:
    dataset = Dataset()
    dataset.PerformedProcedureStepStatus = status
    dataset.PerformedProcedureStepEndDate = "20260101"
    dataset.PerformedProcedureStepEndTime = "102500"
    if series is not None:
        dataset.PerformedSeriesSequence = performed(series)
    return dataset


def test_a_completed_step_says_what_its_series_have(ris: Ris) -> None:
    step = ris.begin()
    assert ris.steps.expected("1.2.1") is None
    assert ris.end(step, "COMPLETED", {"1.2.1": ["1.3.1", "1.3.2"], "1.2.2": ["1.3.3"]}) == 0
    assert ris.steps.expected("1.2.1") == {"1.3.1", "1.3.2"}
    assert ris.steps.expected("1.2.2") == {"1.3.3"}
    assert ris.steps.expected("1.2.9") is None


def test_what_was_said_survives_a_restart(ris: Ris) -> None:
    step = ris.begin()
    assert ris.end(step, "COMPLETED", {"1.2.1": ["1.3.1"]}) == 0
    again = Database(ris.path)
    assert PerformedSteps(again).expected("1.2.1") == {"1.3.1"}
    again.close()


def test_a_step_in_progress_is_not_the_last_word(ris: Ris) -> None:
    step = ris.begin()
    so_far = Dataset()
    so_far.PerformedSeriesSequence = performed({"1.2.1": ["1.3.1"]})
    assert ris.change(step, so_far).Status == 0
    assert ris.steps.expected("1.2.1") is None
    assert ris.change(step, ending("COMPLETED")).Status == 0  # the series as said before
    assert ris.steps.expected("1.2.1") == {"1.3.1"}


def test_a_sequence_that_is_set_again_replaces_the_former(ris: Ris) -> None:
    step = ris.begin(PerformedSeriesSequence=performed({"1.2.1": ["1.3.1"], "1.2.2": ["1.3.2"]}))
    assert ris.end(step, "COMPLETED", {"1.2.1": ["1.3.1", "1.3.7"]}) == 0
    assert ris.steps.expected("1.2.1") == {"1.3.1", "1.3.7"}
    assert ris.steps.expected("1.2.2") is None


def test_a_series_of_two_steps_needs_the_word_of_both(ris: Ris) -> None:
    first, second = ris.begin(), ris.begin(PerformedSeriesSequence=performed({"1.2.1": []}))
    assert ris.end(first, "COMPLETED", {"1.2.1": ["1.3.1"]}) == 0
    assert ris.steps.expected("1.2.1") is None
    assert ris.end(second, "COMPLETED", {"1.2.1": ["1.3.2"]}) == 0
    assert ris.steps.expected("1.2.1") == {"1.3.1", "1.3.2"}


def test_instances_that_are_no_images_belong_to_the_series(ris: Ris) -> None:
    step, dataset = ris.begin(), ending("COMPLETED")
    dataset.PerformedSeriesSequence = performed({"1.2.1": ["1.3.1"]}, {"1.2.1": ["1.3.9"]})
    assert ris.change(step, dataset).Status == 0
    assert ris.steps.expected("1.2.1") == {"1.3.1", "1.3.9"}


@pytest.mark.parametrize(
    ("status", "series"),
    [("DISCONTINUED", {"1.2.1": ["1.3.1"]}), ("COMPLETED", {"1.2.1": []})],
)
def test_a_step_that_broke_off_or_names_no_instances_says_nothing(
    ris: Ris, status: str, series: Series
) -> None:
    assert ris.end(ris.begin(), status, series) == 0
    assert ris.steps.expected("1.2.1") is None


@pytest.mark.parametrize("status", ["COMPLETED", "DISCONTINUED"])
def test_a_finished_step_may_no_longer_be_updated(ris: Ris, status: str) -> None:
    step = ris.begin()
    assert ris.end(step, status, {"1.2.1": ["1.3.1"]}) == 0
    answer = ris.change(step, ending("COMPLETED", {"1.2.1": ["1.3.1", "1.3.2"]}))
    assert (answer.Status, answer.ErrorID) == (0x0110, 0xA710)
    assert answer.ErrorComment == "Performed Procedure Step Object may no longer be updated"
    assert ris.steps.expected("1.2.1") == ({"1.3.1"} if status == "COMPLETED" else None)


def test_a_step_exists_once(ris: Ris) -> None:
    assert ris.create(ris.begin(), beginning()).Status == 0x0111


def test_a_step_is_not_read_out_by_this_class(ris: Ris) -> None:
    assert ris.ask(ris.begin()).Status == 0x0211


def test_an_unknown_step_cannot_be_changed(ris: Ris) -> None:
    assert ris.end("1.2.3.4", "COMPLETED", {"1.2.1": ["1.3.1"]}) == 0x0112


@pytest.mark.parametrize(
    ("attributes", "status"),
    [
        ({"PerformedProcedureStepStatus": None}, 0x0120),
        ({"ScheduledStepAttributesSequence": None}, 0x0120),
        ({"Modality": None}, 0x0120),
        ({"PerformedProcedureStepID": ""}, 0x0121),
        ({"PerformedProcedureStepStatus": "COMPLETED"}, 0x0106),
        ({"PerformedSeriesSequence": performed({"": []})}, 0x0106),
        ({"PerformedSeriesSequence": performed({"1.2.1": [""]})}, 0x0106),
    ],
)
def test_a_step_that_begins_wrongly_is_refused(
    ris: Ris, attributes: dict[str, Any], status: int
) -> None:
    assert ris.create("1.2.3.4", beginning(**attributes)).Status == status
    assert ris.end("1.2.3.4", "DISCONTINUED", {}) == 0x0112


@pytest.mark.parametrize(
    ("changed", "status"),
    [
        ({"PerformedProcedureStepEndDate": None}, 0x0120),
        ({"PerformedSeriesSequence": None}, 0x0120),
        ({"PerformedProcedureStepStatus": "DONE"}, 0x0106),
    ],
)
def test_a_step_that_ends_wrongly_goes_on(ris: Ris, changed: dict[str, Any], status: int) -> None:
    step, dataset = ris.begin(), ending("COMPLETED", {"1.2.1": ["1.3.1"]})
    for keyword, value in changed.items():
        if value is None:
            del dataset[keyword]
        else:
            setattr(dataset, keyword, value)
    assert ris.change(step, dataset).Status == status
    assert ris.steps.expected("1.2.1") is None
    assert ris.end(step, "COMPLETED", {"1.2.1": ["1.3.1"]}) == 0


def test_a_step_without_a_name_gets_one(ris: Ris) -> None:
    answers: list[Dataset] = []
    ris.on_answer(lambda event: answers.append(event.message.command_set))
    assert ris.create(None, beginning()).Status == 0
    assert ris.end(str(answers[0].AffectedSOPInstanceUID), "DISCONTINUED", {}) == 0


_VALID = encode(beginning(PerformedSeriesSequence=performed({"1.2.1": ["1.3.1"]})), True, True)


@pytest.mark.filterwarnings("ignore")
@given(st.data())
def test_a_damaged_step_is_refused_or_harmless(data: st.DataObject) -> None:
    """Bytes changed, cut off, or put in between: never an exception, whatever pydicom raises."""
    encoded = bytearray(_VALID or b"")
    del encoded[data.draw(st.integers(0, len(encoded))) :]
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(encoded)))
        encoded[at : at + data.draw(st.integers(0, 1))] = data.draw(st.binary(max_size=4))
    status = 0x0110
    try:
        read_step(lambda: event_of(bytes(encoded)).attribute_list, ("Modality",))
    except OperationRefused as refusal:
        status = refusal.status
    assert status in (0x0106, 0x0110)


def event_of(encoded: bytes) -> evt.Event:
    """A request whose attribute list is these bytes, as pynetdicom hands it over."""
    request = N_CREATE()
    request.AttributeList = BytesIO(encoded)
    context = build_context(ModalityPerformedProcedureStep, ImplicitVRLittleEndian)
    context.context_id = 1
    attributes = {"request": request, "context": context.as_tuple}
    return evt.Event(cast(Any, None), evt.EVT_N_CREATE, attributes)


def test_the_journal_keeps_nothing_of_the_patient(ris: Ris) -> None:
    assert ris.end(ris.begin(), "COMPLETED", {"1.2.1": ["1.3.1"]}) == 0
    kept = b"".join(path.read_bytes() for path in ris.path.parent.glob("journal.db*"))
    assert b"COMPLETED" in kept
    assert CANARY.encode() not in kept


def test_the_timeline_of_the_series_tells_of_the_step(ris: Ris) -> None:
    assert ris.end(ris.begin(), "COMPLETED", {"1.2.1": ["1.3.1", "1.3.2"]}) == 0
    [(text,)] = ris.database.read(select(t.events.c.text).where(t.events.c.series_uid == "1.2.1"))
    assert text == "performed procedure step COMPLETED: 2 instances"
    assert History(ris.database).one_series("1.2.1") is None  # nothing was received of it yet
