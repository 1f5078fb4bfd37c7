"""Real peers for tests: the node itself as a process, Orthanc, DCMTK's storescp and senders.

Foreign programs are named by absolute path: pynetdicom installs scripts of the same names.
"""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from dicomnode.imaging.intensity import Unscaled
from dicomnode.imaging.manifest import (
    Bounds,
    DicomSpec,
    GeneratorSpec,
    InputSpec,
    Manifest,
    OutputSpec,
    Range,
    Tiling,
)
from dicomnode.imaging.package import write_package

ROOT = Path(__file__).parents[1]
STORESCU, DCMSEND, ECHOSCU = "/usr/bin/storescu", "/usr/bin/dcmsend", "/usr/bin/echoscu"
STORESCP, ORTHANC = "/usr/bin/storescp", "/usr/sbin/Orthanc"
_ENVIRONMENT = {**os.environ, "TCP_NODELAY": "1"}  # else DCMTK stalls on Nagle


def shared_data() -> Path:
    """Where real images lie, beside the checkout; it need not exist."""
    return ROOT.parent / "shared" / "data"


def needs(*programs: str) -> pytest.MarkDecorator:
    """Skip, with the name, where a foreign program is not installed."""
    missing = [program for program in programs if not Path(program).exists()]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def wait_for(
    condition: Callable[[], Any], what: str, seconds: float = 60.0, every: float = 0.05
) -> Any:
    """The first true value of `condition`, asked each `every` s; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain: {what}"
        time.sleep(every)
    return value


def free_port() -> int:
    """A port nobody listens on, below those that the system gives to outgoing connections.

    One of the system's own would be taken now and then before its listener starts.
    """
    while True:
        port = random.SystemRandom().randrange(10_240, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def identity_package(
    models: Path, name: str = "identity", *, architecture: str = "identity", **options: Any
) -> Path:
    """A package that returns its input (or `affine`: scaled and shifted), for any CT."""
    manifest = Manifest(
        format=1,
        name=name,
        version="1.0.0",
        task="identity",
        generator=GeneratorSpec(architecture, options),
        input=InputSpec("CT", "HU", Unscaled()),
        output=OutputSpec("CT", "HU", Unscaled()),
        normalisation="none",
        tiling=Tiling(True, 0),
        bounds=Bounds(("CT",), slices=Range(min=2)),
        dicom=DicomSpec(name, "test", "1.0.0"),
        licence="MIT",
        intended_use="Tests only.",
    )
    golden = np.linspace(-1000, 1000, 256, dtype=np.float32).reshape(1, 16, 16)
    write_package(models / name, manifest, {}, golden, "# For tests\n")
    return models / name


@dataclass
class Archive:
    """A destination under test, and how to ask what it has."""

    ae_title: str
    port: int
    http: int = 0
    folder: Path = Path()

    def count(self) -> int:
        """Instances that it has."""
        if self.http:
            return int(self.get("statistics")["CountInstances"])
        return len(list(self.folder.glob("*")))

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http}/{path}", timeout=20) as answer:
            return json.load(answer)

    def derived_series(self) -> list[dict[str, Any]]:
        """Orthanc's series of images whose SeriesDescription carries our marker."""
        series = [(s, s["MainDicomTags"]) for s in self.series()]
        marked = "[SYN "
        return [
            s
            for s, tags in series
            if marked in tags.get("SeriesDescription", "")
            and tags["Modality"] not in ("KO", "PR", "SR")
        ]

    def series(self) -> list[dict[str, Any]]:
        """Every series that Orthanc has."""
        return [self.get(f"series/{key}") for key in self.get("series")]

    def fetch(self, series: dict[str, Any], folder: Path) -> list[Path]:
        """Every instance of a series as Orthanc stores it, as files."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for key in series["Instances"]:
            url = f"http://127.0.0.1:{self.http}/instances/{key}/file"
            path = folder / f"{key}.dcm"
            with urllib.request.urlopen(url, timeout=20) as answer:
                path.write_bytes(answer.read())
            paths.append(path)
        return paths


@contextlib.contextmanager
def orthanc(folder: Path, ae_title: str = "ORTHANC", port: int = 0) -> Iterator[Archive]:
    """Debian's Orthanc on loopback with an empty storage."""
    archive = Archive(ae_title, port or free_port(), free_port(), folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "Name": ae_title,
        "DicomAet": ae_title,
        "DicomPort": archive.port,
        "HttpPort": archive.http,
        "StorageDirectory": str(folder / "db"),
        "IndexDirectory": str(folder / "db"),
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "DicomAlwaysAllowStore": True,
        "OverwriteInstances": False,
        "Plugins": [],
        "ConcurrentJobs": 1,
    }
    config = folder / "orthanc.json"
    config.write_text(json.dumps(settings))
    with (folder / "orthanc.log").open("wb") as log:
        process = subprocess.Popen([ORTHANC, str(config)], stdout=log, stderr=log, env=_ENVIRONMENT)
        try:
            wait_for(lambda: _answers(archive), "Orthanc to start")
            yield archive
        finally:
            process.terminate()
            process.wait(20)


def _answers(archive: Archive) -> bool:
    try:
        return "Version" in archive.get("system")
    except OSError:
        return False


@contextlib.contextmanager
def storescp(
    folder: Path, ae_title: str = "DCMTK", port: int = 0, *options: str
) -> Iterator[Archive]:
    """DCMTK's storescp, storing into `folder`."""
    archive = Archive(ae_title, port or free_port(), folder=folder)
    folder.mkdir(parents=True, exist_ok=True)
    command = [STORESCP, "--fork", "-aet", ae_title, "-od", str(folder), *options]
    process = subprocess.Popen(
        [*command, str(archive.port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=_ENVIRONMENT,
    )
    try:
        wait_for(lambda: listens(archive.port), "storescp to listen")
        yield archive
    finally:
        process.terminate()
        process.wait(20)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def send(
    program: str, files: Sequence[Path] | Path, port: int, calling: str = "CT1", *options: str
) -> subprocess.CompletedProcess[str]:
    """Send files with DCMTK's storescu or dcmsend; what it printed is in the result."""
    paths = [files] if isinstance(files, Path) else files
    command = [program, "-aet", calling, "-aec", "DICOMNODE", *options, "127.0.0.1", str(port)]
    return subprocess.run(
        [*command, *map(str, paths)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=_ENVIRONMENT,
    )


@dataclass
class Node:
    """`dicomnode serve` as a process group of its own, with its config and data folder."""

    folder: Path
    settings: dict[str, Any]
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0
    port: int = field(default_factory=free_port)
    http: int = field(default_factory=free_port)

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def log(self) -> str:
        return "".join(p.read_text() for p in sorted(self.folder.glob("node-*.log")))

    def start(self) -> "Node":
        self.folder.mkdir(parents=True, exist_ok=True)
        node = {"bind": "127.0.0.1", "port": self.port, "data_dir": "data", "reserve_free_gb": 0}
        node["redo_log_mb"] = 70  # two segments: hundreds of nodes are started
        settings = {
            **self.settings,
            "node": {**node, **self.settings.get("node", {})},
            "http": {"port": self.http, **self.settings.get("http", {})},
        }
        self.config.write_text(yaml.safe_dump(settings, sort_keys=False))
        self.starts += 1
        with (self.folder / f"node-{self.starts:03}.log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dicomnode", "serve", "--config", str(self.config)],
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=ROOT,
            )
        wait_for(self._is_up, "the node to be ready", 90)
        return self

    def _is_up(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            pytest.fail(f"the node ended with {self.process.returncode}:\n{self.log[-3000:]}")
        return self.get("readyz")[0] == 200

    def get(self, path: str) -> tuple[int, Any]:
        """Status and body of a GET on the node's HTTP port; (0, None): no answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.http}/{path}", timeout=10) as page:
                body = page.read()
                is_json = page.headers["Content-Type"] == "application/json"
                return page.status, json.loads(body) if is_json else body.decode()
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())
        except OSError:
            return 0, None

    def status(self, series_uid: str) -> dict[str, Any]:
        """`dicomnode status --json SERIES_UID`, as another program would read it."""
        data: dict[str, Any] = json.loads(self.run("status", "--json", series_uid).stdout)
        return data

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A command of dicomnode with this node's config."""
        command = [sys.executable, "-m", "dicomnode", arguments[0], "--config", str(self.config)]
        return subprocess.run(
            [*command, *arguments[1:]], capture_output=True, text=True, timeout=200, check=False
        )

    def wait_settled(
        self, series_uid: str, seconds: float = 120.0, every: float = 0.05
    ) -> dict[str, Any]:
        """The series when nothing more will happen to it by itself."""
        busy = {"queued", "translating", "sending"}

        def settled() -> Any:
            status, series = self.get(f"api/v1/series/{series_uid}")
            if status != 200 or series["open"]:
                return None
            return None if any(job["state"] in busy for job in series["jobs"]) else series

        series: dict[str, Any] = wait_for(settled, f"series {series_uid} to settle", seconds, every)
        return series

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def children(self) -> list[tuple[str, int]]:
        """The helper processes that run now: ("worker" or "courier", process id)."""
        found = []
        for path in Path(f"/proc/{self.pid}/task").glob("*/children"):
            for pid in path.read_text().split():
                with contextlib.suppress(OSError):  # it has ended meanwhile
                    maps = Path(f"/proc/{pid}/maps").read_text()
                    found.append(("worker" if "libtorch" in maps else "courier", int(pid)))
        return found

    def kill_one(self, pid: int) -> None:
        """kill -9 of one process."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def kill(self) -> None:
        """kill -9 of the node and of everything it started."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(20)

    def stop(self, seconds: float = 60.0) -> int:
        """SIGTERM, and the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)


@contextlib.contextmanager
def running_node(folder: Path, settings: dict[str, Any]) -> Iterator[Node]:
    """A started node, stopped (or killed) at the end; its log is printed when the test fails."""
    node = Node(folder, settings)
    try:
        yield node.start()
    finally:
        if node.process is not None and node.process.poll() is None:
            node.kill()
        print(node.log[-6000:])


def node_settings(
    models: Path,
    destinations: Sequence[Archive],
    *,
    model: str = "identity",
    match: dict[str, Any] | None = None,
    companions: bool = False,
    **series: Any,
) -> dict[str, Any]:
    """A configuration with one route for every CT, short waits and the destinations as peers.

    Args:
        companions: as configured by default; False: images only, for tests that count them.
    """
    peers: dict[str, Any] = {"scanner": {"ae_title": "CT1", "host": "127.0.0.1"}}
    for archive in destinations:
        name = archive.ae_title.lower()
        peers[name] = {"ae_title": archive.ae_title, "host": "127.0.0.1", "port": archive.port}
    waits = {"quiet_seconds": 3, "quiet_seconds_if_released": 1, "hold_incomplete_seconds": 5}
    route: dict[str, Any] = {
        "name": "every CT",
        "match": match or {"Modality": "CT"},
        "model": model,
        "send_to": [archive.ae_title.lower() for archive in destinations],
    }
    if not companions:
        route["companions"] = {"gsps": "none", "report": False}
    return {
        "peers": peers,
        "series": {**waits, **series},
        "device": "cpu",
        "models_dir": str(models),
        "routes": [route],
    }
