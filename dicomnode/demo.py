"""What `make demo` runs: the shipped node between a scanner and a PACS, on this machine.

The node is started as anyone would start it, as a process of its own with a config.yaml; only
ports, folders, waits and peers are the demo's. Everything then goes over C-STORE.
"""

import contextlib
import http.client
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import yaml
from pydicom.errors import InvalidDicomError
from pynetdicom import AE, StoragePresentationContexts, build_context, evt

from dicomnode import sop_classes
from dicomnode.comparison import Comparison, compare, write_picture
from dicomnode.config import load_config
from dicomnode.errors import ConfigError, DeliveryError, DicomNodeError, WorkerLost
from dicomnode.imaging.package import ModelPackage, read_package
from dicomnode.imaging.phantom import phantom_series, phantom_volume
from dicomnode.imaging.phantoms import early_pet, thigh_ct, thigh_mr

SCANNER, NODE, PACS = "DEMOSCANNER", "DICOMNODE", "DEMOPACS"
READY_SECONDS, STOP_SECONDS, RESULT_SECONDS = 90.0, 20.0, 100.0
BUSY = {"queued", "translating", "sending"}


def run_demo(config_path: Path, out: Path, dicom: Path | None, model: str | None = None) -> int:
    """Send a CT series through a node of its own and check what comes back.

    Args:
        config_path: the config.yaml to start from; its routes and models are used, its peers,
            ports and data folder are not, so that nothing leaves this machine.
        out: folder for source/, derived/, companions/, before-after.png and node.log.
        dicom: folder with a series to send; None for the phantom.
        model: a model package for every route instead of the configured one.

    Returns:
        0 if the derived series came back and is right, else 1; the last line says why.
    """
    log = out / "node.log"
    previous = signal.signal(signal.SIGTERM, _terminated)
    try:
        log.unlink(missing_ok=True)
        _demo(config_path, out, dicom, model)
    except (DicomNodeError, OSError, subprocess.SubprocessError) as error:
        where = f"\nlog of the node: {log}" if log.exists() else ""
        print(f"demo failed: {error}{where}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0


def _terminated(*_: object) -> None:
    """Leave through every `finally`, so that the node is stopped."""
    raise SystemExit(1)


def _demo(config_path: Path, out: Path, dicom: Path | None, model: str | None) -> None:
    started = time.monotonic()
    package = _package(config_path, model)
    source, derived, beside = out / "source", out / "derived", out / "companions"
    for folder in (source, derived, beside):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    files = _phantom(source, package.manifest.task) if dicom is None else _copy(dicom, source)
    series_uid = str(pydicom.dcmread(files[0], stop_before_pixels=True).SeriesInstanceUID)
    ports = _free_ports(3)
    with (
        tempfile.TemporaryDirectory(prefix="dicomnode-demo-") as work,
        _pacs(derived, beside, ports[2]) as pacs,
    ):
        config = _derived_config(config_path, Path(work), ports, package if model else None)
        with _node(config, out / "node.log", ports[1]):
            _send(files, ports[0])
            _wait_for_result(config, series_uid, pacs, len(files))
            _say("The timeline of the series, as `dicomnode status` tells it:")
            print(_status(config, series_uid), flush=True)
        _say("the node has stopped")
    comparison = _compare(files, pacs.files, out)
    _say(f"beside the images came {_kinds(pacs.companions) or 'no companions'}")
    if dicom is None and package.manifest.task == "denoise":
        _compare_with_truth(comparison)
    _say(f"done in {time.monotonic() - started:.0f} s; look at {out / 'before-after.png'}")


def _say(text: str) -> None:
    print(f"demo: {text}", flush=True)


# --- the source -------------------------------------------------------------------------------
def _package(config_path: Path, model: str | None) -> ModelPackage:
    """The package that will run: the one asked for, else that of the first route."""
    config = load_config(config_path)
    if not config.routes:
        raise ConfigError(f"{config_path}: no routes; the demo needs one that takes its series")
    path = config.models_dir / (model or config.routes[0].model)
    if not path.is_dir():
        there = ", ".join(sorted(p.parent.name for p in config.models_dir.glob("*/manifest.yaml")))
        raise ConfigError(f"no model package {path.name} in {config.models_dir}; there: {there}")
    return read_package(path)


def _phantom(folder: Path, task: str) -> list[Path]:
    """A generated series that a package of `task` is for."""
    drawn = {"syn_ct": thigh_mr, "syn_mr": thigh_ct, "delayed_pet": early_pet}
    _say(f"drawing a phantom for a model of task {task} ...")
    files = []
    for number, dataset in enumerate(drawn.get(task, phantom_series)(), 1):
        files.append(folder / f"{number:04d}.dcm")
        dataset.save_as(files[-1], enforce_file_format=True)
    return files


def _copy(dicom: Path, folder: Path) -> list[Path]:
    """The largest series under `dicom`, copied under plain names."""
    if not dicom.is_dir():
        raise ConfigError(f"{dicom}: no such folder; name one that holds a series")
    series: dict[str, list[Path]] = {}
    for path in sorted(p for p in dicom.rglob("*") if p.is_file()):
        with contextlib.suppress(InvalidDicomError):
            uid = pydicom.dcmread(path, specific_tags=["SeriesInstanceUID"]).get(
                "SeriesInstanceUID"
            )
            series.setdefault(str(uid), []).append(path)
    series.pop("None", None)
    if not series:
        raise ConfigError(f"{dicom}: no DICOM instances in it; name a folder with a CT series")
    found = max(series.values(), key=len)
    if len(series) > 1:
        _say(f"{len(series)} series in that folder; sending the one with most instances")
    return [
        Path(shutil.copyfile(path, folder / f"{number:04d}.dcm"))
        for number, path in enumerate(found, 1)
    ]


# --- the three parties --------------------------------------------------------------------------
@dataclass(slots=True)
class _Pacs:
    """A small Storage SCP, and what it has received."""

    port: int
    files: list[Path]
    """Images."""
    companions: list[Path]


@contextlib.contextmanager
def _pacs(images: Path, beside: Path, port: int) -> Iterator[_Pacs]:
    pacs, lock = _Pacs(port, [], []), threading.Lock()

    def store(event: evt.Event) -> int:
        is_image = event.request.AffectedSOPClassUID not in sop_classes.COMPANIONS
        folder, files = (images, pacs.files) if is_image else (beside, pacs.companions)
        with lock:
            path = folder / f"{len(files) + 1:04d}.dcm"
            path.write_bytes(event.encoded_dataset())
            files.append(path)
        return 0x0000

    ae = AE(PACS)
    ae.supported_contexts = StoragePresentationContexts
    ae.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_STORE, store)])
    try:
        yield pacs
    finally:
        ae.shutdown()


def _derived_config(
    shipped: Path, work: Path, ports: Sequence[int], package: ModelPackage | None
) -> Path:
    """The shipped config.yaml with free ports, an own data folder, and only the demo's peers.

    With a `package` the first route is the only one, takes its modality and runs it.
    """
    text = shipped.read_text("utf-8")
    config = yaml.safe_load(text)
    config.setdefault("node", {}).update(
        ae_title=NODE, bind="127.0.0.1", port=ports[0], data_dir=str(work / "data"),
        unknown_callers="refuse", reserve_free_gb=0.1,
    )  # fmt: skip
    config.setdefault("http", {}).update(bind="127.0.0.1", port=ports[1], token=None)
    config["peers"] = {
        "scanner": {"ae_title": SCANNER, "host": "127.0.0.1"},
        "pacs": {"ae_title": PACS, "host": "127.0.0.1", "port": ports[2]},
    }
    config.setdefault("series", {}).update(
        quiet_seconds=4, quiet_seconds_if_released=1, hold_incomplete_seconds=10
    )
    config["models_dir"] = str((shipped.parent / config.get("models_dir", "models")).resolve())
    verbatim = yaml.load(text, yaml.BaseLoader)  # noqa: S506 (nothing but texts)
    for route, texts in zip(config["routes"], verbatim["routes"], strict=True):
        route.update({k: v for k, v in texts.items() if k == "series_number"})  # keeps the +
        route["send_to"] = ["pacs"]
    if package is not None:
        route = config["routes"][0]
        route |= {
            "name": package.path.name,
            "model": package.path.name,
            "match": {"Modality": package.manifest.input.modality},
        }
        config["routes"] = [route]
    path = work / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), "utf-8")
    return path


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def _node(config: Path, log: Path, http_port: int) -> Iterator[None]:
    """The node as a process of its own, stopped with SIGTERM, and in any case gone at the end."""
    command = [sys.executable, "-m", "dicomnode", "serve", "--config", str(config)]
    with log.open("wb") as sink:
        process = subprocess.Popen(  # noqa: S603 (our own interpreter and module)
            command, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        _wait_until_ready(process, http_port, log)
        yield
        process.terminate()
        if code := process.wait(STOP_SECONDS):
            raise WorkerLost(f"the node ended with exit code {code} instead of 0")
    except subprocess.TimeoutExpired as error:
        raise WorkerLost(f"the node still ran {STOP_SECONDS:.0f} s after SIGTERM") from error
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], http_port: int, log: Path) -> None:
    _say("starting the node ...")
    answer = "no answer"
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            words = log.read_text("utf-8", "replace").splitlines()[-1:] or ["it said nothing"]
            raise WorkerLost(f"the node did not start: {words[0]}")
        connection = http.client.HTTPConnection("127.0.0.1", http_port, timeout=5)
        try:
            connection.request("GET", "/readyz")
            response = connection.getresponse()
            answer = response.read(500).decode("utf-8", "replace").strip()
            if response.status == 200:
                _say("the node is ready")
                return
        except (OSError, http.client.HTTPException):
            pass  # not listening yet
        finally:
            connection.close()
        time.sleep(0.2)
    raise WorkerLost(f"the node is not ready after {READY_SECONDS:.0f} s: {answer}")


def _send(files: Sequence[Path], port: int) -> None:
    """Send over one association, each instance in the transfer syntax that it has."""
    kinds = {
        (str(d.file_meta.MediaStorageSOPClassUID), str(d.file_meta.TransferSyntaxUID))
        for d in (pydicom.dcmread(path, specific_tags=["SOPClassUID"]) for path in files)
    }
    contexts = [build_context(sop_class, syntax) for sop_class, syntax in sorted(kinds)]
    association = AE(SCANNER).associate("127.0.0.1", port, contexts, NODE)
    if not association.is_established:
        raise DeliveryError("the node rejected the association")
    try:
        for number, path in enumerate(files, 1):
            status = association.send_c_store(path).get("Status")
            if status != 0x0000:
                what = "no answer" if status is None else f"status 0x{status:04X}"
                raise DeliveryError(f"C-STORE of instance {number} of {len(files)}: {what}")
            if number % max(1, len(files) // 4) == 0 or number == len(files):
                _say(f"sent {number} of {len(files)} instances")
    finally:
        association.release()


# --- the result ---------------------------------------------------------------------------------
def _status(config: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "dicomnode", "status", "--config", str(config), *arguments]
    done = subprocess.run(  # noqa: S603 (our own interpreter and module)
        command, capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode:
        raise DicomNodeError(f"dicomnode status: {done.stderr.strip() or done.returncode}")
    return done.stdout.strip()


def _wait_for_result(config: Path, series_uid: str, pacs: _Pacs, sent: int) -> None:
    """Until the node has done with the series; the journal says so, through `dicomnode status`."""
    deadline = time.monotonic() + RESULT_SECONDS + sent
    told = ""
    while True:
        series = json.loads(_status(config, "--json", series_uid))
        if (words := _progress(series, pacs)) != told:
            _say(words)
            told = words
        if _settled(series):
            break
        if time.monotonic() > deadline:
            raise WorkerLost(f"no result after {RESULT_SECONDS + sent:.0f} s")
        time.sleep(2.0)
    if not pacs.files:
        _say("the node sent nothing; `dicomnode status` says:")
        print(_status(config, series_uid), flush=True)
        raise DicomNodeError("no derived series; the timeline above says why")


def _progress(series: dict[str, Any], pacs: _Pacs) -> str:
    if series["open"]:
        return "the node waits for more instances of the series ..."
    jobs = ", ".join(f"route '{job['route']}': {job['state']}" for job in series["jobs"])
    received = f"{len(pacs.files)} derived images, {len(pacs.companions)} companions"
    return f"{jobs or 'no route'}; the PACS has received {received}"


def _kinds(companions: Sequence[Path]) -> str:
    """What they are, by the name of their SOP class."""
    headers = [pydicom.dcmread(path, specific_tags=["SOPClassUID"]) for path in companions]
    names = sorted(header.file_meta.MediaStorageSOPClassUID.name for header in headers)
    return " and ".join(name.removesuffix(" Storage") for name in names)


def _settled(series: dict[str, Any]) -> bool:
    """Whether nothing more will happen to the series by itself."""
    return not series["open"] and not any(job["state"] in BUSY for job in series["jobs"])


def _compare(sent: Sequence[Path], received: Sequence[Path], out: Path) -> Comparison:
    comparison = compare(
        [pydicom.dcmread(path) for path in sent], [pydicom.dcmread(path) for path in received]
    )
    for sentence in comparison.sentences():
        _say(f"checked: {sentence}")
    write_picture(comparison, out / "before-after.png")
    return comparison


def _compare_with_truth(comparison: Comparison) -> None:
    """Of the phantom one knows what the scanner should have seen."""
    truth = phantom_volume(len(comparison.source.voxels), photons=math.inf)
    body = truth > -300
    before, after = (
        float(np.sqrt(np.mean((volume.voxels - truth)[body] ** 2, dtype=np.float64)))
        for volume in (comparison.source, comparison.result)
    )
    _say(
        "root mean square error in the body, against the phantom without noise: "
        f"{before:.1f} HU before, {after:.1f} HU after"
    )
