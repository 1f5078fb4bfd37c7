"""How long a node takes to start on a full data folder, and what a look at it costs.

    python -m benchmarks.recovery [--instances 1000000] [--per-series 400] [--where FOLDER]

Journal and folders are made as a node would have left them that was killed while it received,
translated and delivered. The files are tiny, and 400 at a time hard links to one another: folders
and journal are as large as in life, the bytes are not. Seconds of the first run come after
`drop caches` where that is allowed, else from a warm cache; the output says which.
"""

import argparse
import json
import os
import resource
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import yaml

from benchmarks.peers import ROOT, instances, machine, scratch
from dicomnode.spool import Spool, dataset_digest
from dicomnode.tables import Database
from tests.peers import free_port, listens

OPEN_SERIES = 20
LEFTOVERS = 200
"""Files in `incoming`: cut off, or kept and not journalled."""
_PLANE = '{"position": [-250.0, -250.0, %.1f], "orientation": [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]}'
_DAY = 86_400.0


def uid(*numbers: int) -> str:
    """As long as real ones: 60 characters or so."""
    return "1.2.826.0.1.3680043.8.498.10520230519204851." + ".".join(
        f"{number + 10_000_000}" for number in numbers
    )


def build(data: Path, count: int, per_series: int, now: float) -> None:
    """A data folder with `count` received instances, all translated, and as many delivered."""
    spool = Spool(data)
    spool.prepare()
    (model,) = instances("pet", 1, data / "model")
    tiny = model.read_bytes()[:2048]
    digest, size = _digest(data / "tiny", tiny)
    Database(data / "journal.db").close()
    with closing(sqlite3.connect(data / "journal.db")) as db:
        db.execute("PRAGMA synchronous=OFF")
        series = range((count + per_series - 1) // per_series)
        for number in series:
            members = [uid(number, n) for n in range(min(per_series, count - number * per_series))]
            _files(spool, uid(number), members, tiny)
            is_open = number >= len(series) - OPEN_SERIES
            _rows(db, number, members, (digest, size), now, is_open=is_open)
            if number % 100 == 99:
                db.commit()
        db.commit()
    kept = list(spool.received.glob("*/*.dcm")) if count <= 10_000 else []
    for number in range(LEFTOVERS):
        part = spool.incoming / f"left{number}"
        if number % 2 and kept:
            os.link(kept[number % len(kept)], part)
        else:
            part.write_bytes(tiny[:500])


def _digest(path: Path, data: bytes) -> tuple[str, int]:
    path.write_bytes(data)
    try:
        return dataset_digest(path)
    finally:
        path.unlink()


def _files(spool: Spool, series: str, members: list[str], tiny: bytes) -> None:
    (spool.received / series).mkdir()
    first = spool.path(series, members[0])
    first.write_bytes(tiny)
    for member in members[1:]:
        os.link(first, spool.path(series, member))


def _rows(
    db: sqlite3.Connection,
    number: int,
    members: list[str],
    stored: tuple[str, int],
    now: float,
    *,
    is_open: bool,
) -> None:
    """What a series leaves in the journal: it came days ago, or is coming."""
    series, derived = uid(number), uid(number, 77)
    at = now - 1.0 if is_open else now - _DAY * (1 + number % 30)
    ended = (None, None) if is_open else (at, "released")
    _insert(db, "associations", [(number + 1, "CT1", "DICOMNODE", "127.0.0.1", at, *ended)])
    syntax, image = "1.2.840.10008.1.2.1", "1.2.840.10008.5.1.4.1.1.2"
    _insert(
        db,
        "instances",
        [
            (m, series, image, syntax, *stored, at, number + 1, _PLANE % n, None, 0)
            for n, m in enumerate(members)
        ],
    )
    outcome = "" if is_open else "routed: r"
    head = (series, uid(number, 1, 1), "CT", "CT1", "DICOMNODE", at, at)
    _insert(db, "series", [(*head, int(is_open), 1, 0, outcome)])
    _insert(db, "events", [(None, at, series, None, f"line {n} of the timeline") for n in range(8)])
    if is_open:
        return
    job = {"id": number + 1, "series_uid": series, "generation": 1, "route": "r", "state": "done"}
    job |= {"code": "", "detail": "", "priority": 1, "attempts": 1, "created": at, "updated": at}
    _insert_named(db, "jobs", {**job, "derived_uid": derived, "findings": "{}"})
    _insert_named(
        db,
        "outputs",
        *(
            {"job": number + 1, "sop_instance_uid": f"{m}.9", "sop_class_uid": image}
            | {"series_uid": derived}
            for m in members
        ),
    )
    delivery = (number + 1, number + 1, "pacs", "delivered", 1, at, at, "", 1)  # begun
    _insert(db, "deliveries", [delivery])
    _insert(db, "acceptances", [(number + 1, f"{m}.9", 0, at) for m in members])


def _insert(db: sqlite3.Connection, table: str, rows: list[tuple[Any, ...]]) -> None:
    marks = ",".join("?" * len(rows[0]))
    db.executemany(f"INSERT INTO {table} VALUES ({marks})", rows)  # noqa: S608


def _insert_named(db: sqlite3.Connection, table: str, *rows: dict[str, Any]) -> None:
    names = ",".join(rows[0])
    marks = ",".join(f":{name}" for name in rows[0])
    db.executemany(f"INSERT INTO {table} ({names}) VALUES ({marks})", rows)  # noqa: S608


def configure(folder: Path, dicom: int, http: int) -> Path:
    """A node without routes: the models would hide what recovery takes."""
    config = folder / "config.yaml"
    settings = {
        "node": {"bind": "127.0.0.1", "port": dicom, "data_dir": "data", "reserve_free_gb": 0},
        "http": {"port": http},
        "retention": {"received_hours": 100_000, "results_hours": 100_000},
        "routes": [],
    }
    config.write_text(yaml.safe_dump(settings))
    return config


def command(config: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "dicomnode", words[0], "--config", str(config), *words[1:]]


def start(config: Path, dicom: int) -> tuple[subprocess.Popen[bytes], float]:
    """A started node, and the seconds until it listens."""
    began = time.perf_counter()
    node = subprocess.Popen(command(config, "serve"), cwd=ROOT, stderr=subprocess.DEVNULL)
    while not listens(dicom):
        if node.poll() is not None:
            raise RuntimeError(f"the node ended with {node.returncode}")
        time.sleep(0.02)
    return node, time.perf_counter() - began


def peak_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM"))
    return int(peak) / 1024


def fetch(http: int, path: str) -> Callable[[], None]:
    def get() -> None:
        urllib.request.urlopen(f"http://127.0.0.1:{http}/{path}", timeout=600).read()

    return get


def timed(what: Callable[[], Any], repeats: int = 3) -> float:
    """The least seconds of some tries."""
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        what()
        best = min(best, time.perf_counter() - began)
    return best


def measured(config: Path, *words: str) -> tuple[float, float]:
    """Seconds and peak MB of a command."""
    began = time.perf_counter()
    child = subprocess.Popen(command(config, *words), cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode not in (0, 1):
        raise RuntimeError(f"{words[0]} ended with {child.returncode}")
    return time.perf_counter() - began, usage.ru_maxrss / 1024


def drop_caches() -> bool:
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def purge_in_child(data: Path) -> dict[str, float]:
    """One look of the retention, in a process of its own: with nothing old, then all but 20."""
    program = (
        "import sys,time,json,resource\n"
        "from pathlib import Path\n"
        "from dicomnode.config import RetentionSection\n"
        "from dicomnode.retention import Rules, purge\n"
        "from dicomnode.spool import Spool\n"
        "from dicomnode.tables import Database\n"
        "data=Path(sys.argv[1]); db=Database(data/'journal.db'); found={}\n"
        "for name,hours in (('nothing',1e6),('all',1.0),('again',1.0)):\n"
        "    b=time.perf_counter(); rules=Rules(RetentionSection(hours,"
        "hours))\n"
        "    n=purge(db,Spool(data),rules,time.time()); found[name]=time.perf_counter()-b\n"
        "found['mb']=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024\n"
        "print(json.dumps(found))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(data)], cwd=ROOT, stdout=subprocess.PIPE, check=True
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def figures(folder: Path) -> Iterator[tuple[str, float, float]]:
    """What was measured, seconds, and peak MB (nan: of the node, see its own line)."""
    nan, dicom, http = float("nan"), free_port(), free_port()
    config = configure(folder, dicom, http)
    cold = drop_caches()
    node, seconds = start(config, dicom)
    try:
        yield f"start until listening, {'cold' if cold else 'warm'}", seconds, peak_mb(node.pid)
        for path in ("metrics", "api/v1/status", "api/v1/series", "readyz"):
            yield f"GET /{path}", timed(fetch(http, path)), nan
        yield "the node after these", nan, peak_mb(node.pid)
        yield "dicomnode status", *measured(config, "status")
    finally:
        node.kill()
        node.wait()
    node, seconds = start(config, dicom)
    yield "start again after kill -9, warm", seconds, peak_mb(node.pid)
    node.kill()
    node.wait()
    yield "dicomnode check --storage", *measured(config, "check", "--storage")
    yield "dicomnode backup, hard links", *measured(config, "backup", str(folder / "backup"))
    found = purge_in_child(folder / "data")
    yield "retention: nothing to delete", found["nothing"], found["mb"]
    yield "retention: everything is old", found["all"], found["mb"]
    yield "retention: the look after that", found["again"], found["mb"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--instances", type=int, default=1_000_000)
    parser.add_argument("--per-series", type=int, default=400)
    parser.add_argument("--where", type=Path, help="a folder on the disk to measure")
    args = parser.parse_args()
    print(machine())
    with scratch(args.where) as folder:
        data = folder / "data"
        data.mkdir()
        began = time.perf_counter()
        build(data, args.instances, args.per_series, time.time())
        size = sum(path.stat().st_size for path in data.glob("journal.db*")) / 1e6
        built = time.perf_counter() - began
        print(f"{args.instances} instances, journal {size:.0f} MB, built in {built:.0f} s\n")
        print("| | seconds | peak MB |\n|---|---:|---:|")
        for what, seconds, megabytes in figures(folder):
            print(f"| {what} | {seconds:.2f} | {megabytes:.0f} |".replace("nan", ""), flush=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"\nlargest process of all: {peak:.0f} MB")


if __name__ == "__main__":
    main()
