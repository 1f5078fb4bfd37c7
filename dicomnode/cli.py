"""The commands of dicomnode. Exit codes: 0 done, 1 you can mend it, 2 usage, 70 a bug."""

import argparse
import json
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dicomnode import __version__, console, log
from dicomnode.config import NodeConfig, Peer, json_schema, load_config
from dicomnode.errors import ConfigError, DeliveryError, DicomNodeError
from dicomnode.history import History
from dicomnode.jobs import Jobs
from dicomnode.lifecycle import Delivery, State
from dicomnode.tables import Database

OK, MENDABLE, BUG = 0, 1, 70


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = _parser().parse_args(argv)
    log.configure("INFO" if args.command in ("serve", "demo") else "WARNING")
    try:
        return int(args.run(args))
    except DicomNodeError as error:
        print(f"dicomnode {args.command}: {error}", file=sys.stderr)
        return MENDABLE
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        print(f"dicomnode {args.command}:{where} {error.strerror or error}", file=sys.stderr)
        return MENDABLE
    except BrokenPipeError:
        return OK
    except Exception:  # the one place where a bug ends the program, with its traceback
        logging.getLogger(__name__).exception("this is a bug of dicomnode")
        return BUG


def serve(args: argparse.Namespace) -> int:
    """run the node until SIGTERM; a second SIGTERM stops at once"""
    from dicomnode.node import Node

    stop = threading.Event()

    def on_signal(*_: object) -> None:
        if stop.is_set():
            raise SystemExit(128 + signal.SIGTERM)  # the second one: the journal recovers
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    node = Node(load_config(args.config))
    node.start()
    while not stop.wait(1.0):
        pass
    node.stop()
    return OK


def check(args: argparse.Namespace) -> int:
    """validate config, models and destinations; every problem is named"""
    from dicomnode.node import load_packages
    from dicomnode.scu import echo

    if args.schema:
        print(json.dumps(json_schema(), indent=2))
        return OK
    config = load_config(args.config)
    problems = []
    try:
        for name, package in load_packages(config).items():
            print(f"model {name} {package.version}: ok, sha256 {package.digest}")
    except ConfigError as error:
        problems.append(str(error))
    for name in sorted({name for route in config.routes for name in route.send_to}):
        try:
            echo(_address(config, name))
            print(f"peer {name}: answers C-ECHO")
        except DicomNodeError as error:
            problems.append(f"peers.{name}: {error}")
    for problem in problems:
        print(problem, file=sys.stderr)
    return MENDABLE if problems else OK


def explain(args: argparse.Namespace) -> int:
    """for each series found: which routes match, which not and why"""
    from dicomnode import offline

    found, others = offline.explain(args.paths, load_config(args.config))
    if args.json:
        print(json.dumps([_explained_as_data(one) for one in found], indent=1))
        return OK if found else MENDABLE
    for one in found:
        print(f"series {one.series_uid}: {one.instances} instances")
        if one.missing:
            print(f"  MISSING_SLICES: {one.missing} slices are missing; send the whole series")
        for decision in one.decisions:
            print(f"  {decision}")
    if others:
        print(f"{others} files are no DICOM instances of a series: ignored")
    return OK if found else MENDABLE


def _explained_as_data(one: Any) -> dict[str, Any]:
    return {
        "series_uid": one.series_uid,
        "instances": one.instances,
        "missing_slices": one.missing,
        "routes": [
            {"name": d.route.name, "matches": d.taken, "why_not": list(d.reasons)}
            for d in one.decisions
        ],
    }


def run(args: argparse.Namespace) -> int:
    """translate a folder of DICOM offline, without a network"""
    from dicomnode import offline

    outcomes = offline.run(args.paths, args.model, args.out, load_config(args.config))
    if args.json:
        print(json.dumps({uid: asdict(outcome) for uid, outcome in outcomes.items()}, indent=1))
    for uid, outcome in outcomes.items() if not args.json else ():
        if outcome.derived_uid:
            where = args.out / outcome.derived_uid
            print(f"series {uid}: {len(outcome.instances)} instances in {where}; {outcome.detail}")
        else:
            print(f"series {uid}: {outcome.refusal or outcome.broken}: {outcome.detail}")
    done = [outcome for outcome in outcomes.values() if outcome.derived_uid]
    if not outcomes:
        print("no DICOM series found", file=sys.stderr)
    return OK if outcomes and len(done) == len(outcomes) else MENDABLE


def echo(args: argparse.Namespace) -> int:
    """C-ECHO a peer"""
    from dicomnode.scu import echo

    echo(_address(load_config(args.config), args.peer))
    print(f"{args.peer}: answers C-ECHO")
    return OK


def send(args: argparse.Namespace) -> int:
    """C-STORE files or folders to a peer, one association per series"""
    from dicomnode.offline import find_series
    from dicomnode.scu import send_instances

    address = _address(load_config(args.config), args.peer)
    series, others = find_series(args.paths)
    sent, failures = 0, []
    for uid, files in sorted(series.items()):
        accepted: list[str] = []
        try:
            send_instances(files, address, lambda sop, _, done=accepted: done.append(sop))  # type: ignore[misc]
        except DeliveryError as error:
            failures.append(f"series {uid}: {error}")
        sent += len(accepted)
    print(f"{args.peer}: accepted {sent} instances of {len(series)} series; {others} files ignored")
    for failure in failures:
        print(failure, file=sys.stderr)
    return MENDABLE if failures or not series else OK


def status(args: argparse.Namespace) -> int:
    """queue, series, jobs, deliveries; one series as a timeline"""
    config = load_config(args.config)
    history = History(_database(config))
    if args.series_uid is None:
        counts, series = history.counts(), history.series()
        if args.json:
            print(json.dumps({"counts": counts, "series": series}, indent=1))
        else:
            print(console.overview(counts, series))
        return OK
    one = history.one_series(args.series_uid)
    if one is None:
        raise ConfigError(f"no series {args.series_uid} was received")
    since = time.time() - one["last_received"]
    waiting = f"last instance {since:.0f} s ago" if one["open"] else ""
    print(json.dumps(one, indent=1) if args.json else console.one_series(one, waiting))
    return OK


def retry(args: argparse.Namespace) -> int:
    """queue a job or a delivery again: job-3, delivery-5, or --all-failed"""
    database = _database(load_config(args.config))
    jobs, now = Jobs(database), time.time()
    if args.all_failed:
        failed, parked = jobs.in_state(State.FAILED), jobs.deliveries_in_state(Delivery.PARKED)
        for job in failed:
            jobs.retry_job(job, now)
        for delivery in parked:
            jobs.retry_delivery(delivery, now)
        print(f"{len(failed)} jobs and {len(parked)} deliveries queued again")
        return OK
    if args.what is None:
        raise ConfigError("name a job (job-3), a delivery (delivery-5), or --all-failed")
    kind, number = _numbered(args.what)
    if kind == "delivery":
        jobs.retry_delivery(number, now)
    else:
        jobs.retry_job(number, now)
    print(f"{kind} {number} queued again")
    return OK


def discard(args: argparse.Namespace) -> int:
    """give a job up for good, its deliveries with it"""
    kind, number = _numbered(args.job)
    if kind != "job":
        raise ConfigError("discard takes a job; its deliveries go with it")
    Jobs(_database(load_config(args.config))).discard_job(number, args.why, time.time())
    print(f"job {number} discarded")
    return OK


def models(args: argparse.Namespace) -> int:
    """list the model packages; verify: sums, schema and self-test; bench: seconds per slice"""
    from dicomnode.imaging.package import read_package

    config = load_config(args.config)
    names = [args.name] if args.name else _package_names(config.models_dir)
    packages = {name: read_package(config.models_dir / name) for name in names}
    rows = [
        {"name": p.name, "version": p.version, "task": p.manifest.task, "sha256": p.digest}
        for p in packages.values()
    ]
    if args.action == "bench":
        return _bench(packages.values(), args.device or config.device, rows, args.json)
    if args.action == "verify":
        from dicomnode.worker import load_models

        _, failures, device = load_models(packages, config.device, 0)
        for row in rows:
            row["self_test"] = failures.get(row["name"], f"passed on {device}")
        if args.json:
            print(json.dumps(rows, indent=1))
        for row in () if args.json else rows:
            print(f"{row['name']} {row['version']}: {row['self_test']}")
        return MENDABLE if failures else OK
    print(json.dumps(rows, indent=1) if args.json else "\n".join(map(_model_line, rows)))
    return OK


def _bench(packages: Any, device: str, rows: list[dict[str, Any]], as_json: bool) -> int:
    from dicomnode.offline import bench

    for package, row in zip(packages, rows, strict=True):
        used, row["median_seconds_per_slice"], row["slowest_seconds_per_slice"] = bench(
            package, device
        )
        row["device"] = used
        if not as_json:
            print(
                f"{package.name} {package.version} on {used}: "
                f"{row['median_seconds_per_slice']:.3f} s per 512x512 slice (median of 8), "
                f"slowest {row['slowest_seconds_per_slice']:.3f} s"
            )
    if as_json:
        print(json.dumps(rows, indent=1))
    return OK


def conformance(args: argparse.Namespace) -> int:
    """the DICOM Conformance Statement of this configuration, as Markdown"""
    from dicomnode.conformance import statement

    print(statement(load_config(args.config)), end="")
    return OK


def doctor(args: argparse.Namespace) -> int:
    """what a peer accepts, and whether we accept it, in plain words"""
    from dicomnode.doctor import examine
    from dicomnode.scu import Address

    config = load_config(args.config)
    peer = _address(config, args.peer)
    host = "127.0.0.1" if config.node.bind == "0.0.0.0" else config.node.bind  # noqa: S104
    ourselves = Address(host, config.node.port, config.node.ae_title, peer.called_ae)
    diagnosis = examine(peer, ourselves)
    print("\n".join(diagnosis.lines))
    return OK if diagnosis.healthy else MENDABLE


def demo(args: argparse.Namespace) -> int:
    """send a phantom (or --dicom FOLDER) through a node of its own and look at the result"""
    from dicomnode.demo import run_demo

    return run_demo(args.config, args.out, args.dicom, args.model)


def _model_line(row: dict[str, Any]) -> str:
    return f"{row['name']} {row['version']}  {row['task']}  sha256 {row['sha256']}"


def _package_names(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in folder.glob("*/manifest.yaml"))


def _database(config: NodeConfig) -> Database:
    return Database(config.node.data_dir / "journal.db", create=False)


def _numbered(text: str) -> tuple[str, int]:
    """job-3, job 3 or 3 -> ("job", 3); delivery-5 -> ("delivery", 5)."""
    kind, _, number = text.rpartition("-")
    if kind not in ("", "job", "delivery") or not number.isdecimal():
        raise ConfigError(f"{text!r}: name a job (job-3) or a delivery (delivery-5)")
    return kind or "job", int(number)


def _address(config: NodeConfig, name: str) -> Any:
    from dicomnode.scu import Address

    peer: Peer | None = config.peers.get(name)
    if peer is None:
        raise ConfigError(f"no peer named {name!r}; known: {', '.join(config.peers) or 'none'}")
    if peer.host is None or peer.port is None or "/" in peer.host:
        raise ConfigError(f"peers.{name}: needs a host and a port")
    return Address(peer.host, peer.port, peer.ae_title, config.node.ae_title)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dicomnode", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(run: Callable[[argparse.Namespace], int], *, as_json: bool = False) -> Any:
        command = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
        command.add_argument("--config", type=Path, default=Path("config.yaml"))
        if as_json:
            command.add_argument("--json", action="store_true", help="for programs")
        command.set_defaults(run=run)
        return command

    add(serve)
    add(check).add_argument("--schema", action="store_true", help="print the JSON Schema")
    add(explain, as_json=True).add_argument("paths", type=Path, nargs="+")
    command = add(run, as_json=True)
    command.add_argument("--model", required=True)
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("paths", type=Path, nargs="+")
    add(echo).add_argument("peer")
    command = add(send)
    command.add_argument("peer")
    command.add_argument("paths", type=Path, nargs="+")
    add(status, as_json=True).add_argument("series_uid", nargs="?")
    command = add(retry)
    command.add_argument("what", nargs="?", metavar="JOB|DELIVERY")
    command.add_argument("--all-failed", action="store_true")
    command = add(discard)
    command.add_argument("job")
    command.add_argument("--why", required=True)
    command = add(models, as_json=True)
    command.add_argument("action", choices=["list", "verify", "bench"])
    command.add_argument("--device", help="auto, cpu, cuda or cuda:N; default: as configured")
    command.add_argument("name", nargs="?")
    add(conformance)
    add(doctor).add_argument("peer")
    command = add(demo)
    command.add_argument("--dicom", type=Path)
    command.add_argument("--model")
    command.add_argument("--out", type=Path, default=Path("demo-out"))
    return parser
