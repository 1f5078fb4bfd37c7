"""Which engine and number format runs each model is told by the worker, `status` and /metrics."""

from pathlib import Path

import pytest
from prometheus_client import generate_latest

from dicomnode.imaging.package import read_package
from dicomnode.serving import Serving, in_words, tell, told
from dicomnode.worker import Settings, Worker
from tests.peers import identity_package


def test_a_worker_tells_what_runs_its_models_and_which_failed(tmp_path: Path) -> None:
    good = read_package(identity_package(tmp_path))
    bad = read_package(identity_package(tmp_path, "bad"))
    (bad.path / "golden.npz").write_bytes(b"damaged after it was verified")
    worker = Worker({"identity": good, "bad": bad}, Settings(device="cpu"))
    try:
        ready = worker.wait_ready(120)
    finally:
        worker.stop(5)
    assert ready is not None
    one = ready.engines["identity"]
    assert (one.precision, one.device, one.refused) == ("fp32", "cpu", ())
    assert one.engine.startswith(("openvino", "torch"))
    assert one.self_test == "0 HU at most, allowed 0.05"
    tell(tmp_path, ready.engines, ready.failures)
    text = f'{{device="cpu",engine="{one.engine}",model="identity",precision="fp32"}} 1.0'
    assert f"dicomnode_model_info{text}" in generate_latest().decode()
    assert 'dicomnode_model_usable{model="identity"} 1.0' in generate_latest().decode()
    assert 'dicomnode_model_usable{model="bad"} 0.0' in generate_latest().decode()
    found = told(tmp_path)
    words = "self-test: 0 HU at most, allowed 0.05"
    assert in_words("identity", found["identity"]) == (
        f"model identity: {one.engine}, fp32 on cpu; {words}"
    )
    failed = in_words("bad", found["bad"])
    assert failed.startswith("model bad: not loaded: bad: ")
    assert "golden.npz: File is not a zip file" in failed


def test_a_model_that_is_gone_leaves_the_metrics(tmp_path: Path) -> None:
    serving = Serving("torch 2", "bf16", "cpu", "0.1 HU on average")
    tell(tmp_path, {"first": serving, "second": serving}, {})
    tell(tmp_path, {"second": serving}, {})
    text = generate_latest().decode()
    assert 'model="second"' in text
    assert 'model="first"' not in text


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff"])
def test_nothing_is_told_where_nothing_was_noted(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "models.json").write_bytes(content)
    assert told(tmp_path) == {}


def test_a_folder_that_cannot_be_written_is_no_reason_to_stop(tmp_path: Path) -> None:
    tell(tmp_path / "missing", {}, {})
    assert told(tmp_path / "missing") == {}


def test_how_a_gpu_computes_each_size_of_batch_is_told(tmp_path: Path) -> None:
    forms = ("8 x 1 x 512 x 512: captured, 1.20 times as fast as kernel by kernel",)
    tell(tmp_path, {"m": Serving("torch 2", "bf16", "cuda", "0 HU at most", (), forms)}, {})
    assert in_words("m", told(tmp_path)["m"]) == (
        f"model m: torch 2, bf16 on cuda; self-test: 0 HU at most; {forms[0]}"
    )
    older = {"engine": "torch 2", "precision": "fp32", "device": "cpu", "self_test": "0 HU"}
    assert in_words("m", older | {"refused": []}) == (
        "model m: torch 2, fp32 on cpu; self-test: 0 HU"
    )
