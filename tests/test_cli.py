"""The commands as a user types them: what they print, and the exit code that follows."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pydicom import Dataset, dcmread
from pynetdicom import AE
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]

from dicomnode.cli import main
from dicomnode.config import json_schema
from dicomnode.imaging.manifest import Bounds, Range, manifest_from_yaml
from dicomnode.imaging.package import write_package
from dicomnode.imaging.volume import volume_from_datasets
from dicomnode.jobs import Jobs
from dicomnode.journal import Arrival, Journal
from dicomnode.lifecycle import Event
from dicomnode.serving import Serving, tell
from dicomnode.tables import Database
from tests.classifiers import brightness
from tests.factories import NAMES, changed, ct_series, localizer, write_series
from tests.fuzz import wire
from tests.fuzz.wire import Wire
from tests.peers import ROOT, Node, free_port, identity_package, running_node, wait_for

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def site(tmp_path: Path, models_dir: Path) -> Path:
    """A folder with a config.yaml: one route for CT of the chest, one peer that is absent."""
    route = {"name": "chest", "match": {"Modality": "CT", "BodyPartExamined": "CHEST"}}
    data = {
        "node": {"data_dir": "data", "bind": "127.0.0.1", "port": 0, "reserve_free_gb": 0},
        "http": {"port": 0},
        "peers": {"pacs": {"ae_title": "PACS", "host": "127.0.0.1", "port": free_port()}},
        "device": "cpu",
        "models_dir": str(models_dir),
        "routes": [{**route, "model": "identity", "send_to": ["pacs"]}],
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(data))
    return tmp_path


@pytest.fixture
def run(site: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """A command with the config of the site: exit code, standard output, standard error."""

    def run(command: str, *arguments: str | Path) -> tuple[int, str, str]:
        words = [command, "--config", str(site / "config.yaml"), *map(str, arguments)]
        capsys.readouterr()
        try:
            code = main(words)
        except SystemExit as stopped:  # argparse
            code = int(stopped.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def _edit(site: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = yaml.safe_load((site / "config.yaml").read_text())
    change(data)
    (site / "config.yaml").write_text(yaml.safe_dump(data))


def _journal(site: Path) -> Database:
    """The journal of a node that has received one series and translated it in vain."""
    (site / "data").mkdir()
    database = Database(site / "data" / "journal.db")
    facts = ("1.2.3", "1.2", "CT", "1.2", "1.2", "0" * 64, 1, "CT1", "DICOMNODE", None, None)
    Journal(database).record_instance(Arrival("1.2.3.4", *facts), 10.0)
    (seen,) = Journal(database).open_series()
    Jobs(database).close_series(seen, "routed: chest", [("chest", "routine")], ["complete"], 20.0)
    job = Jobs(database).claim(21.0)
    assert job is not None
    Jobs(database).finish(job, Event.BROKE, 22.0, code="OutOfResources", detail="disk full")
    return database


# exit codes


@pytest.mark.parametrize("words", [[], ["serv"], ["status", "--jason"], ["discard", "job-1"]])
def test_wrong_usage_ends_with_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert "usage: dicomnode" in capsys.readouterr().err


COMMANDS: list[Sequence[str]] = [
    ["serve"],
    ["check"],
    ["explain", "."],
    ["run", "--model", "identity", "--out", "out", "."],
    ["echo", "pacs"],
    ["send", "pacs", "."],
    ["status"],
    ["retry", "job-1"],
    ["discard", "job-1", "--why", "x"],
    ["models", "list"],
]


@pytest.mark.parametrize("words", COMMANDS, ids=[words[0] for words in COMMANDS])
def test_a_wrong_config_ends_with_1_and_one_line(
    words: Sequence[str], site: Path, run: Run
) -> None:
    _edit(site, lambda data: data.update(sires={}))
    code, out, err = run(*words)
    assert (code, out) == (1, "")
    assert err.startswith(f"dicomnode {words[0]}: sires: unknown key; known here: node,")
    assert len(err.splitlines()) == 1


def test_no_config_ends_with_1_and_says_how_to_name_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--config", "/nowhere/config.yaml"]) == 1
    assert capsys.readouterr().err == (
        "dicomnode status: /nowhere/config.yaml: No such file or directory;"
        " name another file with --config\n"
    )


def test_a_bug_ends_with_70(site: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("dicomnode.offline.explain", broken)
    code, _, err = run("explain", site)
    assert code == 70
    assert "this is a bug of dicomnode" in err
    assert "ZeroDivisionError" in err


def test_a_reader_that_has_seen_enough_is_no_error(site: Path) -> None:
    command = [sys.executable, "-m", "dicomnode", "check", "--schema"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert (process.stderr.read(), process.wait(60)) == ("", 0)


# check


def test_the_schema_is_json(run: Run) -> None:
    code, out, _ = run("check", "--schema")
    assert (code, json.loads(out)) == (0, json_schema())


@contextlib.contextmanager
def _answering(ae_title: str) -> Iterator[int]:
    """An AE that answers C-ECHO."""
    ae = AE(ae_title)
    ae.add_supported_context(Verification)
    server = ae.start_server(("127.0.0.1", 0), block=False)
    yield server.server_address[1]
    server.shutdown()


@pytest.mark.network
def test_check_names_an_absent_peer_and_the_models_that_are_well(run: Run) -> None:
    code, out, err = run("check")
    assert code == 1
    assert out.startswith("model identity 1.0.0: ok, sha256 ")
    assert err.startswith("peers.pacs: ")
    assert len(err.splitlines()) == 1


@pytest.mark.network
def test_check_is_content_when_everything_answers(site: Path, run: Run) -> None:
    with _answering("PACS") as port:
        _edit(site, lambda data: data["peers"]["pacs"].update(port=port))
        code, out, err = run("check")
        assert (code, err, out.splitlines()[-1]) == (0, "", "peer pacs: answers C-ECHO")
        assert run("echo", "pacs")[0] == 0


def test_check_names_a_model_that_is_not_there(site: Path, run: Run) -> None:
    _edit(site, lambda data: data["routes"][0].update(model="absent", send_to=[]))
    code, _, err = run("check")
    assert code == 1
    assert err.startswith("routes[0].model: absent: ")


@pytest.mark.parametrize("command", ["echo", "send"])
def test_a_peer_that_is_not_configured_is_named(command: str, site: Path, run: Run) -> None:
    code, _, err = run(command, "archive", *([site] if command == "send" else []))
    assert (code, err) == (1, f"dicomnode {command}: no peer named 'archive'; known: pacs\n")


# explain


def test_explain_says_per_series_what_would_become_of_it(site: Path, run: Run) -> None:
    chest, head = ct_series(4, 16, 16), ct_series(4, 16, 16, seed=2, BodyPartExamined="HEAD")
    write_series([*chest[:2], chest[3], localizer(chest[0])], site / "in" / "deep" / "a")
    write_series(head, site / "in" / "b")
    write_series(changed(head[:1], SyntheticData="YES", SeriesInstanceUID="1.9"), site / "in" / "c")
    (site / "in" / "readme.txt").write_text("no DICOM")
    code, out, _ = run("explain", site / "in")
    lines = out.splitlines()
    assert code == 0
    gap = lines.index(f"series {chest[0].SeriesInstanceUID}: 4 instances")
    assert lines[gap + 1] == "  MISSING_SLICES: 1 slices are missing; send the whole series"
    why = "  route 'chest' does not match: BodyPartExamined is HEAD, not CHEST"
    assert lines[gap + 2].startswith("  one stack: 3 CT slices, 2.5 mm apart: MISSING_SLICES: 1 ")
    assert lines[gap + 3] == "  set aside as LOCALIZER: 1"
    other = lines.index(f"series {head[0].SeriesInstanceUID}: 4 instances")
    assert lines[other + 1 : other + 3] == ["  one stack: 4 CT slices, 2.5 mm apart", why]
    assert lines[lines.index("series 1.9: 1 instances") + 2].startswith(f"{why}; ALREADY_SYNTHETIC")
    assert lines[-1] == "1 files are no DICOM instances of a series: ignored"


def _two_kernels() -> list[Dataset]:
    """Five slices of one kernel and four of another under one SeriesInstanceUID."""
    first, second = ct_series(5, 16, 16), ct_series(5, 16, 16, seed=2)[:4]
    same = {k: first[0][k].value for k in ("StudyInstanceUID", "SeriesInstanceUID")}
    same["FrameOfReferenceUID"] = first[0].FrameOfReferenceUID
    soft = changed(first, ConvolutionKernel="SOFT")
    return [*soft, *changed(second, ConvolutionKernel="BONE", **same)]


def test_explain_names_every_stack_and_the_rule_that_found_it(site: Path, run: Run) -> None:
    series = _two_kernels()
    write_series([*series, localizer(series[0])], site / "in")
    _, out, _ = run("explain", site / "in")
    shown = [line for line in out.splitlines()[1:] if not line.startswith("    ")]
    assert shown[:3] == [
        "  stack (ConvolutionKernel SOFT): 5 CT slices, 2.5 mm apart",
        "  stack (ConvolutionKernel BONE): 4 CT slices, 2.5 mm apart",
        "  set aside as LOCALIZER: 1",
    ]
    (one,) = json.loads(run("explain", "--json", site / "in")[1])
    assert [(s["rule"], s["slices"]) for s in one["stacks"]] == [
        ("ConvolutionKernel SOFT", 5),
        ("ConvolutionKernel BONE", 4),
    ]
    assert one["ignored"] == {"LOCALIZER": 1}


def test_explain_says_what_the_model_of_a_route_would_refuse(site: Path, run: Run) -> None:
    settings = yaml.safe_load((site / "config.yaml").read_text())
    kept = identity_package(site / "models")
    manifest = manifest_from_yaml((kept / "manifest.yaml").read_bytes())
    within = Bounds(
        ("CT",), slices=Range(2), rows=Range(64), exclude={"ConvolutionKernel": ("B7*",)}
    )
    golden = np.zeros((1, 16, 16), np.float32)
    write_package(
        site / "models" / "narrow", replace(manifest, name="narrow", bounds=within), {}, golden, "#"
    )
    settings["models_dir"] = "models"
    (route,) = settings["routes"]
    settings["routes"] = [{**route, "name": name, "model": name} for name in ("identity", "narrow")]
    (site / "config.yaml").write_text(yaml.safe_dump(settings))
    series = ct_series(3, 32, 32, BodyPartExamined="CHEST")
    write_series(series, site / "in")
    _, out, _ = run("explain", site / "in")
    assert "the model of route 'identity': may take it; pixels not looked at" in out
    refused = "the model of route 'narrow': would be refused: OUT_OF_BOUNDS: model narrow 1.0.0"
    assert refused in out
    assert "rows is 32, allowed 64 to any" in out
    (one,) = json.loads(run("explain", "--json", site / "in")[1])
    (stack,) = one["stacks"]
    assert stack["models"]["identity"] == ""
    assert stack["models"]["narrow"].startswith("OUT_OF_BOUNDS")
    for change, code in (
        ({"LossyImageCompression": "01"}, "LOSSY"),
        ({"BurnedInAnnotation": "YES"}, "BURNED_IN"),
        ({"RescaleType": "US"}, "NOT_HU"),
        ({"HighBit": 15}, "NOT_16_BIT"),
        ({"PixelSpacing": ["0", "0"]}, "NO_GEOMETRY"),
    ):
        write_series(changed(ct_series(3, BodyPartExamined="CHEST"), **change), site / "in")
        assert f"'identity': would be refused: {code}: " in run("explain", site / "in")[1]
    write_series(ct_series(1, BodyPartExamined="CHEST"), site / "one")
    assert "would be refused: SINGLE_SLICE: " in run("explain", site / "one")[1]


def test_explain_says_why_there_is_no_stack(site: Path, run: Run) -> None:
    write_series([localizer(ct_series(2, 16, 16)[0])], site / "in")
    out = run("explain", site / "in")[1]
    assert "  no stack: LOCALIZER: none of 1 instances is a slice; send slices\n" in out
    assert "    no stack of it would be translated: nothing is made or sent\n" in out
    assert "the result is" not in out


def test_explain_tells_programs_the_same(site: Path, run: Run) -> None:
    write_series(ct_series(3, 16, 16), site / "in")
    code, out, _ = run("explain", "--json", site / "in")
    (one,) = json.loads(out)
    assert (code, one["instances"], one["missing_slices"]) == (0, 3, 0)
    assert one["routes"] == [{"name": "chest", "matches": True, "why_not": []}]


def test_explain_shows_nothing_of_the_patient(site: Path, run: Run) -> None:
    write_series(ct_series(3, 16, 16, private=True), site / "in")
    matches = {"PatientID": {"not": "P1"}, "SeriesDescription": "MR*", "PatientName": "X"}
    _edit(site, lambda data: data["routes"][0].update(match=matches))
    out = run("explain", site / "in")[1] + run("explain", "--json", site / "in")[1]
    assert "not match" in out
    told = ("P1", NAMES["ISO_IR 100"], "Thorax", "CANARY", "19600229", "A77")
    assert [text for text in told if text in out] == []


def test_a_folder_without_dicom_ends_with_1(site: Path, run: Run) -> None:
    (site / "empty").mkdir()
    assert run("explain", site / "empty")[0] == 1
    code, _, err = run("run", "--model", "identity", "--out", site / "out", site / "empty")
    assert (code, err) == (1, "no DICOM series found\n")


# run


ENCODINGS: list[dict[str, Any]] = [
    {},
    {"slope": "0.5", "intercept": "-512.25", "bits_stored": 16},
    {"slope": "2", "intercept": "-1000", "signed": True, "bits_stored": 16},
    {"slope": "1", "intercept": "0", "signed": True, "bits_stored": 16, "padding": -2000},
    {"slope": "1.7", "intercept": "-8192", "bits_stored": 16},
]


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_the_identity_model_returns_the_sources_hu_exactly(
    encoding: dict[str, Any], site: Path, run: Run
) -> None:
    source = ct_series(4, 32, 32, **encoding)
    write_series(source[::-1], site / "in")
    code, out, err = run("run", "--model", "identity", "--out", site / "out", site / "in")
    assert (code, err) == (0, "")
    made = {path: dcmread(path) for path in (site / "out").rglob("*.dcm")}
    assert sorted({ds.Modality for ds in made.values()}) == ["CT", "PR", "SR"]
    derived = [ds for ds in made.values() if "PixelData" in ds]
    (folder,) = {path.parent for path, ds in made.items() if "PixelData" in ds}
    said = (
        f"series {source[0].SeriesInstanceUID}: 4 instances in {folder}, 2 companions beside it; "
    )
    assert out.startswith(said)
    before, _ = volume_from_datasets(source)
    after, ordered = volume_from_datasets(derived)
    np.testing.assert_array_equal(after.voxels, before.voxels)
    np.testing.assert_array_equal(after.positions, before.positions)
    assert {ds.get("SyntheticData") for ds in ordered} == {"YES"}


def test_run_writes_a_folder_per_stack_and_names_the_refused_one(site: Path, run: Run) -> None:
    series = _two_kernels()
    write_series([*series[:7], series[8]], site / "in")  # the last one but one of BONE is missing
    code, out, _ = run("run", "--model", "identity", "--out", site / "out", site / "in")
    (folder,) = (site / "out").iterdir()
    uid = series[0].SeriesInstanceUID
    first, second = out.splitlines()
    assert code == 0
    assert first.startswith(f"series {uid}, ConvolutionKernel SOFT: 5 instances in {folder}, 2 ")
    assert second.startswith(f"series {uid}, ConvolutionKernel BONE: MISSING_SLICES: 1 slice(s)")
    write_series(series, site / "all")
    words = ("--json", "--model", "identity", "--out", site / "whole", site / "all")
    told = json.loads(run("run", *words)[1])
    assert len(list((site / "whole").iterdir())) == 2
    assert [one["stack"] for one in told[uid]["series"]] == [
        "ConvolutionKernel SOFT",
        "ConvolutionKernel BONE",
    ]


def test_running_again_makes_the_same_uids(site: Path, run: Run) -> None:
    write_series(ct_series(3, 32, 32), site / "in")
    names = []
    for out in ("first", "second"):
        run("run", "--model", "identity", "--out", site / out, site / "in")
        names.append({str(path.relative_to(site / out)) for path in (site / out).rglob("*.dcm")})
    assert names[0] == names[1]
    assert len(names[0]) == 3 + 2  # a presentation state and a report


def test_a_series_that_is_refused_says_why_and_ends_with_1(site: Path, run: Run) -> None:
    stack = ct_series(6, 32, 32)
    write_series(stack[:2] + stack[3:], site / "in")
    code, out, _ = run("run", "--model", "identity", "--out", site / "out", site / "in")
    assert code == 1
    assert out.startswith(f"series {stack[0].SeriesInstanceUID}: MISSING_SLICES: ")
    assert list((site / "out").iterdir()) == []


def test_what_run_made_it_does_not_take_again(site: Path, run: Run) -> None:
    write_series(ct_series(3, 32, 32), site / "in")
    run("run", "--model", "identity", "--out", site / "out", site / "in")
    code, out, _ = run("run", "--model", "identity", "--out", site / "again", site / "out")
    assert code == 1
    assert "ALREADY_SYNTHETIC" in out


def test_run_puts_the_report_of_a_classifier_beside_the_images(site: Path, run: Run) -> None:
    models = yaml.safe_load((site / "config.yaml").read_text())["models_dir"]
    shutil.copytree(models, site / "own")
    brightness(site / "own")
    _set(site, models_dir="own", device="auto")
    write_series(ct_series(3, 32, 32), site / "in")
    words = ("run", "--model", "identity", "--out", site / "out", "--classifier")
    code, out, _ = run(*words, "brightness", site / "in")
    assert code == 0
    assert ", 3 companions beside it; " in out
    found = [dcmread(path) for path in (site / "out").rglob("*.dcm")]
    told = [ds for ds in found if "Adenocarcinoma of lung" in str(ds)]
    assert [ds.Modality for ds in told] == ["SR"]
    code, _, err = run(*words, "absent", site / "in")
    assert code == 1
    assert err.startswith("dicomnode run: absent: ")


def _set(site: Path, **keys: str) -> None:
    settings = yaml.safe_load((site / "config.yaml").read_text())
    (site / "config.yaml").write_text(yaml.safe_dump(settings | keys))


def test_an_unknown_model_is_named(site: Path, run: Run) -> None:
    code, _, err = run("run", "--model", "absent", "--out", site / "out", site)
    assert code == 1
    assert err.startswith("dicomnode run: absent: ")


# models


def test_a_classifier_is_listed_and_verified_and_translates_nothing(run: Run, site: Path) -> None:
    brightness(site / "models")
    _set(site, models_dir="models")
    code, out, _ = run("models", "verify")
    assert (code, out) == (0, "brightness 1.0.0: passed on cpu: torch, fp32 on cpu\n")
    (listed,) = json.loads(run("models", "list", "--json")[1])
    assert (listed["task"], listed["architecture"]) == ("classify", "brightness")
    assert run("models", "bench") == (0, "\n", "")
    for action in ("bench", "export-monai"):
        code, _, err = run("models", action, "brightness")
        assert code == 1
        assert "brightness is a classifier; name another package" in err


def test_models_are_listed_and_verified(run: Run) -> None:
    code, out, _ = run("models", "list")
    assert code == 0
    assert out.startswith("identity 1.0.0  identity  sha256 ")
    code, out, _ = run("models", "verify")
    assert code == 0
    assert out.startswith("identity 1.0.0: passed on cpu: ")
    (listed,) = json.loads(run("models", "list", "--json")[1])
    assert (listed["name"], len(listed["sha256"])) == ("identity", 64)


@pytest.mark.parametrize("action", ["list", "verify"])
def test_a_damaged_package_hides_no_other(action: str, run: Run, site: Path) -> None:
    settings = yaml.safe_load((site / "config.yaml").read_text())
    (site / "config.yaml").write_text(yaml.safe_dump({**settings, "models_dir": "models"}))
    bad, _ = identity_package(site / "models", "bad"), identity_package(site / "models")
    (bad / "MODEL_CARD.md").write_text("Changed.")
    code, out, _ = run("models", action)
    good, damaged = out.splitlines()
    assert (code, good.split()[0]) == (1, "identity")
    assert damaged.startswith("bad: ")
    assert "MODEL_CARD.md" in damaged
    assert json.loads(run("models", action, "--json")[1])[1]["damaged"] in damaged
    code, _, err = run("models", action, "bad")
    assert (code, "MODEL_CARD.md" in err) == (1, True)
    assert run("models", action, "identity")[0] == 0


def test_a_model_is_timed_and_described_for_monai(run: Run) -> None:
    code, out, _ = run("models", "bench", "identity", "--json")
    (timed,) = json.loads(out)
    assert (code, timed["matrix"], timed["precision"]) == (0, 512, "fp32")
    assert 0 < timed["median_seconds"] <= timed["slowest_seconds"]
    code, out, _ = run("models", "export-monai", "identity")
    assert (code, json.loads(out)["name"]) == (0, "identity")
    code, _, err = run("models", "export-monai")
    assert (code, err) == (1, "dicomnode models: models export-monai: name the package\n")


# status, retry, discard


def test_status_before_the_first_start_says_so(site: Path, run: Run) -> None:
    code, _, err = run("status")
    assert code == 1
    assert err.startswith(f"dicomnode status: no journal at {site / 'data' / 'journal.db'};")
    assert not (site / "data").exists()


def test_status_tells_the_queue_and_a_series(site: Path, run: Run) -> None:
    _journal(site)
    code, out, _ = run("status")
    assert code == 0
    assert "jobs: 1 failed" in out
    assert "job 1, route 'chest', failed, OutOfResources, disk full" in out
    code, out, _ = run("status", "1.2.3")
    assert code == 0
    assert [line[23:] for line in out.splitlines()[-4:]] == [
        "first instance from CT1",
        "complete",
        "job 1 translating",
        "job 1 failed: OutOfResources: disk full",
    ]
    assert json.loads(run("status", "--json", "1.2.3")[1])["jobs"][0]["state"] == "failed"
    assert json.loads(run("status", "--json")[1])["counts"]["jobs"] == {"failed": 1}
    assert run("status", "9.9")[::2] == (1, "dicomnode status: no series 9.9 was received\n")
    tell(site / "data", {"m": Serving("torch 2", "bf16", "cpu", "0.1 HU")}, {})
    line = "model m: torch 2, bf16 on cpu; self-test: 0.1 HU"
    assert run("status")[1].splitlines()[0] == line
    assert json.loads(run("status", "--json")[1])["models"]["m"]["precision"] == "bf16"


def test_a_failed_job_can_be_retried_and_then_given_up(site: Path, run: Run) -> None:
    _journal(site)
    assert run("retry", "job-1")[:2] == (0, "job 1 queued again\n")
    assert run("retry", "job-1")[::2] == (
        1,
        "dicomnode retry: a job that is queued cannot be retried\n",
    )
    assert run("discard", "job-1", "--why", "not wanted")[:2] == (0, "job 1 discarded\n")
    assert "discarded: not wanted" in run("status", "1.2.3")[1]


def test_all_that_failed_can_be_retried_at_once(site: Path, run: Run) -> None:
    _journal(site)
    words = "1 jobs, 0 deliveries and 0 storage commitments queued again\n"
    assert run("retry", "--all-failed")[:2] == (0, words)


@pytest.mark.parametrize("what", ["job-x", "thing-1", "-", "job-9", "delivery-9", "commitment:9.9"])
def test_what_cannot_be_retried_is_named(what: str, site: Path, run: Run) -> None:
    _journal(site)
    code, _, err = run("retry", "--", what)
    assert code == 1
    assert len(err.splitlines()) == 1


# serve


@pytest.mark.network
def test_a_port_in_use_ends_serve_with_1(site: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        _edit(site, lambda data: data["node"].update(port=port))
        command = [sys.executable, "-m", "dicomnode", "serve", "--config", site / "config.yaml"]
        ended = subprocess.run(
            command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False
        )
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert last == f"dicomnode serve: node.port: cannot listen on 127.0.0.1:{port}: " + (
        os.strerror(98)
    )


@pytest.fixture
def idle_node(tmp_path: Path) -> Iterator[Node]:
    settings = {"node": {"unknown_callers": "accept"}, "device": "cpu"}
    with running_node(tmp_path, settings) as node:
        yield node


@pytest.mark.network
def test_a_second_sigterm_stops_at_once(idle_node: Node) -> None:
    process = idle_node.process
    assert process is not None
    with Wire(idle_node.port) as peer:
        peer.associate()
        peer.send(wire.store(bytes(1000), "1.2.3")[:-1])  # what a stop waits for
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: "draining" in idle_node.log, "the node to drain")
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 128 + signal.SIGTERM


@pytest.mark.network
def test_an_idle_association_does_not_keep_a_stop_longer_than_docker_waits(idle_node: Node) -> None:
    ae = AE("CT1")
    ae.add_requested_context(Verification)
    association = ae.associate("127.0.0.1", idle_node.port, ae_title="DICOMNODE")
    assert association.is_established
    assert idle_node.process is not None
    idle_node.process.send_signal(signal.SIGTERM)
    assert idle_node.process.wait(10) == 0
    association.join(5)
    assert association.is_aborted
