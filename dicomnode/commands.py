"""What each command does; `cli` parses the words. Each returns an exit code."""

import argparse
import json
import sys
import time
from dataclasses import asdict
from typing import Any

from dicomnode import console, premises, serving
from dicomnode.config import NodeConfig, Peer, Route, json_schema, load_config
from dicomnode.errors import ConfigError, DeliveryError, DicomNodeError
from dicomnode.history import History
from dicomnode.jobs import Jobs
from dicomnode.lifecycle import Delivery, State
from dicomnode.promises import Promises
from dicomnode.tables import Database
from dicomnode.transactions import Transactions

OK, MENDABLE = 0, 1
_WHAT = "a job (job-3), a delivery (delivery-5) or a commitment (commitment:UID)"


def check(args: argparse.Namespace) -> int:
    """validate config, models and destinations; every problem is named"""
    from dicomnode.node import load_classifiers, load_packages
    from dicomnode.scu import echo

    if args.schema:
        print(json.dumps(json_schema(), indent=2))
        return OK
    config = load_config(args.config)
    if args.storage:
        return _check_storage(config)
    problems = premises.problems(config)
    try:
        for name, package in load_packages(config).items():
            print(f"model {name} {package.version}: ok, sha256 {package.digest}")
        for name, classifier in load_classifiers(config).items():
            print(f"classifier {name} {classifier.version}: ok, sha256 {classifier.digest}")
    except ConfigError as error:
        problems.append(str(error))
    for name in sorted({name for route in config.routes for name in route.send_to}):
        try:
            echo(_address(config, name))
            print(f"peer {name}: answers C-ECHO")
        except DicomNodeError as error:
            problems.append(f"peers.{name}: {error}")
    weak = _tls_findings(config, problems)
    for line in weak:
        print(f"warning: {line}")
    for problem in problems:
        print(problem, file=sys.stderr)
    return MENDABLE if problems else OK


def _tls_findings(config: NodeConfig, problems: list[str]) -> list[str]:
    """Weak TLS settings of the node and its peers; what cannot be used goes to `problems`."""
    from dicomnode import tls
    from dicomnode.credentials import client_tls

    found, now = [], time.time()
    try:
        if config.node.tls is not None:
            tls.server_context(config.node.tls, now)
            found += tls.warnings(config.node.tls, now)
        for name, peer in config.peers.items():
            if peer.tls:
                client = client_tls(name, peer.tls, peer.host or "", config.node.tls)
                tls.client_context(client, now)
                found += tls.client_warnings(client, now)
    except ConfigError as error:
        problems.append(str(error))
    return found


def _check_storage(config: NodeConfig) -> int:
    from dicomnode.audit import Fault, storage_faults
    from dicomnode.spool import Spool

    faults, compared = 0, 0
    for found in storage_faults(_database(config), Spool(config.node.data_dir)):
        if isinstance(found, Fault):
            faults += 1
            print(f"instance {found.sop_instance_uid} of series {found.series_uid}: {found.what}")
        else:
            compared = found
    print(f"{compared} stored instances compared with the journal: {faults} faults")
    return MENDABLE if faults else OK


def backup(args: argparse.Namespace) -> int:
    """copy the journal and all stored files of a node, which may be running, to a folder"""
    from dicomnode.backup import back_up

    copied = back_up(load_config(args.config).node.data_dir, args.folder)
    print(
        f"{args.folder}: the journal, {copied.received} received and {copied.results} derived"
        f" instances, {copied.quarantined} in quarantine; {copied.linked} are hard links"
    )
    if copied.linked:
        print("hard links do not survive the loss of this disk: copy the folder to another one")
    if copied.purged:
        print(f"{copied.purged} instances were deleted by retention meanwhile, and are marked so")
    for fault in copied.faults:
        print(f"instance {fault.sop_instance_uid} of series {fault.series_uid}: {fault.what}")
    return MENDABLE if copied.faults else OK


def explain(args: argparse.Namespace) -> int:
    """for each series found: which routes match, which not and why"""
    from dicomnode import offline

    config = load_config(args.config)
    found, others = offline.explain(args.paths, config)
    if args.json:
        print(json.dumps([_explained_as_data(one) for one in found], indent=1))
        return OK if found else MENDABLE
    for one in found:
        print(f"series {one.series_uid}: {one.instances} instances")
        if one.missing:
            print(f"  MISSING_SLICES: {one.missing} slices are missing; send the whole series")
        for stack in one.stacks:
            print(f"  {stack}")
            for route, why in stack.models.items():
                said = f"would be refused: {why}" if why else "may take it; pixels not looked at"
                print(f"    the model of route '{route}': {said}")
        for code, count in one.ignored.items():
            print(f"  set aside as {code}: {count}")
        if one.refusal:
            print(f"  no stack: {one.refusal}")
        for decision in one.decisions:
            print(f"  {decision}")
            if decision.taken:
                print(f"    {_destinations(decision.route, config, one.may_give(decision.route))}")
    if others:
        print(f"{others} files are no DICOM instances of a series: ignored")
    return OK if found else MENDABLE


def _destinations(route: Route, config: NodeConfig, some: bool) -> str:
    """Where a result of this route goes, and who is to commit it; `some`: there may be one."""
    if not some:
        return "no stack of it would be translated: nothing is made or sent"
    if route.shadow or not route.send_to:
        return "the result is kept here, nothing is sent"
    commit = config.committing_peers
    names = [
        f"{name} (which is to commit it)" if name in commit else name for name in route.send_to
    ]
    return f"the result is sent to {', '.join(names)}"


def _explained_as_data(one: Any) -> dict[str, Any]:
    return {
        "series_uid": one.series_uid,
        "instances": one.instances,
        "missing_slices": one.missing,
        "stacks": [asdict(stack) for stack in one.stacks],
        "ignored": one.ignored,
        "refusal": one.refusal,
        "routes": [
            {"name": d.route.name, "matches": d.taken, "why_not": list(d.reasons)}
            for d in one.decisions
        ],
    }


def run(args: argparse.Namespace) -> int:
    """translate a folder of DICOM offline, without a network"""
    from dicomnode import offline

    config = load_config(args.config)
    outcomes = offline.run(args.paths, args.model, args.out, config, args.classifier)
    if args.json:
        print(json.dumps({uid: asdict(outcome) for uid, outcome in outcomes.items()}, indent=1))
    for uid, outcome in outcomes.items() if not args.json else ():
        made = {one.uid: one for one in outcome.series}
        for stack in outcome.stacks:
            print(f"series {uid}{f', {stack.rule}' if stack.rule else ''}: ", end="")
            if stack.refusal:
                print(f"{stack.refusal}: {stack.detail}")
            else:
                where = args.out / stack.derived_uid
                one = made[stack.derived_uid]
                beside = f", {len(one.companions)} companions beside it" if one.companions else ""
                print(f"{len(one.instances)} instances in {where}{beside}; {stack.detail}")
        if not outcome.stacks:
            print(f"series {uid}: {outcome.refusal or outcome.broken}: {outcome.detail}")
    done = [outcome for outcome in outcomes.values() if outcome.series]
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
        data: dict[str, Any] = {
            "counts": history.counts(),
            "series": history.series(),
            "commitments": history.commitments(),
            "commitment_requests": history.commitment_requests(),
        }
        models = serving.told(config.node.data_dir)
        words = [serving.in_words(*one) for one in models.items()]
        words.append(console.overview(*data.values()))
        print(json.dumps({**data, "models": models}, indent=1) if args.json else "\n".join(words))
        return OK
    one = history.one_series(args.series_uid)
    if one is None:
        raise ConfigError(f"no series {args.series_uid} was received")
    since = max(0.0, time.time() - one["last_received"])  # the clock may have been set back
    waiting = f"last instance {since:.0f} s ago" if one["open"] else ""
    print(json.dumps(one, indent=1) if args.json else console.one_series(one, waiting))
    return OK


def retry(args: argparse.Namespace) -> int:
    """take up again: job-3, delivery-5, commitment:UID, or --all-failed"""
    database = _database(load_config(args.config))
    jobs, transactions, now = Jobs(database), Transactions(database), time.time()
    promises = Promises(database)
    if args.all_failed:
        failed, parked = jobs.in_state(State.FAILED), jobs.deliveries_in_state(Delivery.PARKED)
        commitments, promised = transactions.parked(), promises.parked()
        for job in failed:
            jobs.retry_job(job, now)
        for delivery in parked:
            jobs.retry_delivery(delivery, now)
        for uid in commitments:
            transactions.retry(uid, now)
        for delivery in promised:
            promises.retry(delivery, now)
        print(
            f"{len(failed)} jobs, {len(parked)} deliveries and"
            f" {len(commitments) + len(promised)} storage commitments queued again"
        )
        return OK
    if args.what is None:
        raise ConfigError(f"name {_WHAT}, or --all-failed")
    if args.what.startswith("commitment:"):
        transactions.retry(args.what.removeprefix("commitment:"), now)
        print(f"{args.what} queued again")
        return OK
    kind, number = _numbered(args.what)
    if kind == "delivery" and number in promises.parked():
        promises.retry(number, now)
    elif kind == "delivery":
        jobs.retry_delivery(number, now)
    else:
        jobs.retry_job(number, now)
    print(f"{kind} {number} queued again")
    return OK


def discard(args: argparse.Namespace) -> int:
    """give a job up for good, its deliveries with it; of a complete delivery its commitment"""
    kind, number = _numbered(args.job)
    database = _database(load_config(args.config))
    if kind == "delivery":
        Promises(database).discard(number, args.why, time.time())
        print(f"delivery {number}: no commitment is asked for any more")
    else:
        Jobs(database).discard_job(number, args.why, time.time())
        print(f"job {number} discarded")
    return OK


def models(args: argparse.Namespace) -> int:
    """list packages; verify sums, schema, self-test; bench: seconds per slice; export-monai"""
    from dicomnode import catalogue
    from dicomnode.imaging.bundle import monai_metadata

    config = load_config(args.config)
    packages, damaged = catalogue.find_packages(config, args.name)
    if args.action == "export-monai":
        if args.name is None:
            raise ConfigError("models export-monai: name the package")
        package = catalogue.translator(packages[args.name], "models export-monai")
        print(json.dumps(monai_metadata(package), indent=2))
        return OK
    rows = {folder: catalogue.describe(folder, package) for folder, package in packages.items()}
    lines, code = [_model_line(row) for row in rows.values()], OK
    if args.action == "verify":
        lines = []
        device = args.device or config.device
        for folder, passed, words in catalogue.verify(config, packages, device):
            rows[folder]["self_test"], code = words, code if passed else MENDABLE
            lines.append(f"{folder} {rows[folder]['version']}: {words}")
    if args.action == "bench":
        lines = []
        for folder, found in packages.items():
            if args.name is None and found.manifest.task == "classify":
                continue
            package = catalogue.translator(found, "models bench")
            timing = catalogue.bench(package, args.device or config.device, config.precision)
            rows[folder] |= asdict(timing)
            lines.append(
                f"{folder} {package.version}: {timing.median_seconds:.3f} s per {timing.matrix} x "
                f"{timing.matrix} slice (median of {catalogue.SLICES}), slowest "
                f"{timing.slowest_seconds:.3f} s; {timing.words}"
            )
    for folder, why in damaged.items():
        rows[folder], code = {"folder": folder, "damaged": why}, MENDABLE
        lines.append(f"{folder}: {why}")
    print(json.dumps(list(rows.values()), indent=1) if args.json else "\n".join(lines))
    return code


def conformance(args: argparse.Namespace) -> int:
    """the DICOM Conformance Statement of this configuration, as Markdown"""
    from dicomnode.conformance import statement

    print(statement(load_config(args.config)), end="")
    return OK


def doctor(args: argparse.Namespace) -> int:
    """what a peer accepts, and whether we accept it, in plain words"""
    from dicomnode.credentials import own_port_tls
    from dicomnode.doctor import examine
    from dicomnode.scu import Address

    config = load_config(args.config)
    node = config.node
    peer = _address(config, args.peer)
    host = "127.0.0.1" if node.bind == "0.0.0.0" else node.bind  # noqa: S104
    secured = own_port_tls(node.tls) if node.tls else None
    ourselves = Address(host, node.port, node.ae_title, peer.called_ae, secured)
    diagnosis = examine(peer, ourselves)
    print("\n".join(diagnosis.lines))
    return OK if diagnosis.healthy else MENDABLE


def demo(args: argparse.Namespace) -> int:
    """send a phantom (or --dicom FOLDER) through a node of its own and look at the result"""
    from dicomnode.demo import run_demo

    return run_demo(args.config, args.out, args.dicom, args.model)


def _model_line(row: dict[str, Any]) -> str:
    return f"{row['name']} {row['version']}  {row['task']}  sha256 {row['sha256']}"


def _database(config: NodeConfig) -> Database:
    return Database(config.node.data_dir / "journal.db", create=False)


def _numbered(text: str) -> tuple[str, int]:
    """job-3, job 3 or 3 -> ("job", 3); delivery-5 -> ("delivery", 5)."""
    kind, _, number = text.rpartition("-")
    if kind not in ("", "job", "delivery") or not number.isdecimal():
        raise ConfigError(f"{text!r}: name {_WHAT}")
    return kind or "job", int(number)


def _address(config: NodeConfig, name: str) -> Any:
    from dicomnode.scu import address_of

    peer: Peer | None = config.peers.get(name)
    if peer is None:
        raise ConfigError(f"no peer named {name!r}; known: {', '.join(config.peers) or 'none'}")
    address = address_of(name, peer, config)
    if address is None:
        raise ConfigError(f"peers.{name}: needs a host and a port")
    return address
