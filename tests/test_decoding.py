"""Later slices are decoded while earlier ones are inferred, in the worker and on a thread of it."""

import threading
from pathlib import Path

from pydicom import Dataset
from pydicom.uid import JPEG2000Lossless

from dicomnode.deferred import with_pixels
from dicomnode.imaging.inference import load_model
from dicomnode.part10 import read_instances
from dicomnode.results import Draft
from dicomnode.stages import Stream
from tests.factories import ct_series, write_series
from tests.tasks import KINDS, package_for
from tests.test_stages import task_of

LATE = 5
"""The slice that is decoded after the first was inferred, and before the third is."""
SECONDS = 60.0


def test_decoding_and_inference_run_at_the_same_time(tmp_path: Path) -> None:
    model = load_model(package_for(KINDS["denoise"], tmp_path / "models"))
    files = write_series(ct_series(8, 64, 64, syntax=JPEG2000Lossless), tmp_path / "in")
    decoded, inferred, threads = list[int](), list[int](), set[int]()
    first_inferred, late_decoded = threading.Event(), threading.Event()

    def decode(header: Dataset) -> Dataset:
        threads.add(threading.get_ident())
        if len(decoded) == LATE:  # waits for inference: it must not have to wait for us
            assert first_inferred.wait(SECONDS), "everything is decoded before the first inference"
            late_decoded.set()
        decoded.append(len(decoded))
        return with_pixels(header)

    def between() -> None:
        if len(inferred) == 1:
            first_inferred.set()
        if len(inferred) == 2:
            assert late_decoded.wait(SECONDS), "nothing is decoded while slices are inferred"
        inferred.append(len(inferred))

    with Draft(tmp_path / "out") as draft:
        Stream(read_instances(files, pixels="later"), model, task_of(), draft).run(decode, between)
        assert len(draft.commit().instances) == len(files)
    assert len(decoded) == len(files)
    assert threading.get_ident() not in threads
