"""config.yaml as frozen dataclasses.

A wrong file never starts the node: unknown keys, missing keys and wrong values are reported with
the path of the key (``routes[0].model: ...``), all of them at once. Keys of the contract that this
version cannot honour yet are refused by name, never silently ignored.
"""

import dataclasses
import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydicom.datadict import tag_for_keyword

from dicomnode import credentials, schema, sop_classes
from dicomnode.conditions import Condition
from dicomnode.credentials import NodeTls, PeerTls
from dicomnode.errors import ConfigError, NotYetError
from dicomnode.schema import Builder, Check, setting


def _ae_title(value: str) -> str | None:
    if value and len(value) <= 16 and value.isascii() and "\\" not in value:
        outer = "spaces at the ends are not significant; leave them out"
        inner = None if value.isprintable() else "control characters are not allowed"
        return outer if value != value.strip(" ") else inner
    return "must be 1 to 16 ASCII characters without a backslash (PS3.5 6.2, VR AE)"


def _between(low: float, high: float) -> Check:
    return lambda value: None if low <= value <= high else f"must be between {low:g} and {high:g}"


def _not_empty(value: str) -> str | None:
    return None if value.strip() else "must not be empty"


def _host(value: str) -> str | None:
    try:
        return None if value.encode("idna").strip() else "must not be empty"
    except UnicodeError:
        return "is no host name and no address"


def _device(value: str) -> str | None:
    known = re.fullmatch(r"auto|cpu|cuda(:\d+)?", value)
    return None if known else "must be auto, cpu, cuda or cuda:N"


_PORT = _between(0, 65535)
_NOT_NEGATIVE = _between(0, 1e6)


@dataclass(frozen=True, slots=True)
class NodeSection:
    ae_title: str = setting("DICOMNODE", "our AE title, at most 16 characters", check=_ae_title)
    bind: str = setting("0.0.0.0", "address the Storage SCP listens on", check=_host)  # noqa: S104
    port: int = setting(11112, "TCP port of the Storage SCP; 0 takes a free one", check=_PORT)
    data_dir: Path = setting(Path("data"), "spool, journal and results")
    unknown_callers: Literal["refuse", "accept"] = setting(
        "refuse", "AE titles and hosts not listed in peers"
    )
    max_associations: int = setting(100, "associations at a time", check=_between(1, 10000))
    max_pdu_bytes: int = setting(131072, "longest PDU we ask for", check=_between(4096, 2**27))
    reserve_free_gb: float = setting(
        5.0, "free space in GB below which C-STORE answers 0xA700", check=_between(0, 1e6)
    )
    redo_log_mb: int = setting(
        512, "disk space in MB for the redo log; 0: none", check=_between(0, 100_000)
    )
    tls: NodeTls | None = setting(None, "DICOM TLS; the node then listens with it, and only so")
    journal: str | None = setting(None, "a PostgreSQL URL: not yet; null keeps SQLite in data_dir")


@dataclass(frozen=True, slots=True)
class HttpSection:
    bind: str = setting("127.0.0.1", "address of the HTTP port", check=_host)
    port: int = setting(8080, "HTTP port; 0 takes a free one", check=_PORT)
    token: str | None = setting(
        None, "bearer token; required when bind is not loopback", check=_not_empty, secret=True
    )


@dataclass(frozen=True, slots=True)
class Peer:
    ae_title: str = setting("", "AE title of the peer")
    host: str | None = setting(None, "its host name, address or network (10.0.0.0/8)", check=_host)
    port: int | None = setting(None, "its port, when we send to it", check=_between(1, 65535))
    storage_commitment: bool = setting(False, "ask it to commit what it accepted from us")
    max_associations: int = setting(2, "associations to it at a time", check=_between(1, 64))
    tls: bool | PeerTls = setting(False, "DICOM TLS to it; a mapping says how it differs from node")
    retry_for_hours: float = setting(
        72.0, "hours after which a delivery is parked", check=_NOT_NEGATIVE
    )
    sop_classes: tuple[str, ...] = setting(
        ("*",),
        "what it may store: CT, MR, PT, keywords or UIDs of SOP classes; * is all",
        check=sop_classes.problem_with,
    )
    max_incoming_associations: int = setting(
        0, "associations from it at a time; 0: a fair share", check=_between(0, 10000)
    )
    max_instances_per_second: float = setting(0.0, "then slowed; 0: never", check=_NOT_NEGATIVE)
    max_megabytes_per_second: float = setting(0.0, "then slowed; 0: never", check=_NOT_NEGATIVE)
    dicomweb: str | None = setting(None, "STOW-RS address instead of DIMSE: not yet")
    token: str | None = setting(None, "bearer token for dicomweb: not yet", secret=True)


@dataclass(frozen=True, slots=True)
class SeriesSection:
    quiet_seconds: float = setting(
        10.0,
        "a series is complete when nothing new came for this many seconds ...",
        check=_NOT_NEGATIVE,
    )
    quiet_seconds_if_released: float = setting(
        2.0,
        "... or this many after the last association that carried it was released, without a gap",
        check=_NOT_NEGATIVE,
    )
    hold_incomplete_seconds: float = setting(
        300.0,
        "seconds to wait for missing slices, or for a sender we cut off, before going on",
        check=_NOT_NEGATIVE,
    )
    on_late_instances: Literal["regenerate", "hold"] = setting(
        "regenerate", "instances after completion: translate the whole series again, or only keep"
    )
    on_superseded: Literal["retract", "keep"] = setting(
        "retract", "an earlier result that was sent: withdraw it (KO) before the new one, or keep"
    )


@dataclass(frozen=True, slots=True)
class RetentionSection:
    received_hours: float = setting(24.0, "hours to keep received instances", check=_NOT_NEGATIVE)
    results_hours: float = setting(168.0, "hours to keep derived instances", check=_NOT_NEGATIVE)
    require_commitment: bool = setting(
        True, "delete nothing that a peer with storage_commitment has not committed"
    )
    watermark_free_gb: float = setting(
        0.0,
        "free space in GB below which what is delivered is deleted before its time; 0: never",
        check=_NOT_NEGATIVE,
    )


@dataclass(frozen=True, slots=True)
class WorkerSection:
    speculative: bool = setting(
        True, "infer slices while their series still arrives; only a complete series is ever sent"
    )
    speculative_gb: float = setting(
        1.0,
        "memory in GB for results inferred ahead; the oldest is forgotten",
        check=_NOT_NEGATIVE,
    )
    models_gb: float = setting(
        4.0,
        "memory in GB for loaded models together; the least recently used is unloaded; 0: no limit",
        check=_NOT_NEGATIVE,
    )


@dataclass(frozen=True, slots=True)
class Companions:
    gsps: Literal["window", "label", "none"] = setting(
        "window", "presentation state: label and windows of the images, only the label, or none"
    )
    report: bool = setting(True, "structured report: model identity and QA measurements")
    classifier: str | None = setting(
        None, "folder of a classifier's package in models_dir: a report of its probabilities"
    )


@dataclass(frozen=True, slots=True)
class Route:
    name: str = setting(doc="shown in status, logs and metrics")
    match: Mapping[str, Condition] = setting(doc="DICOM keyword: what it must be in all instances")
    model: str = setting(doc="folder of the model package in models_dir")
    send_to: tuple[str, ...] = setting(doc="names in peers")
    priority: Literal["stat", "routine", "offpeak"] = setting("routine", "order of translation")
    qa: Literal["gate", "flag", "off"] = setting(
        "gate", "what fails QA: hold it, send it marked, or do not look"
    )
    shadow: bool = setting(False, "run and record, send nothing")
    final: bool = setting(False, "a match stops the search")
    accept_synthetic: bool = setting(False, "translate what is synthetic already")
    allow_lossy: bool = setting(False, "translate lossily compressed sources")
    series_number: int | str = setting("+1000", "offset (+N) on the source's number, or a number")
    description: str = setting("{source} [SYN {model}]", "SeriesDescription of the result")
    companions: Companions = setting(Companions(), "what goes with the result, beside its images")
    label: Literal["none", "burned"] = setting(
        "none", "burned: SYNTHETIC - NOT ACQUIRED in the pixels, whose values are lost"
    )


@dataclass(frozen=True, slots=True)
class NodeConfig:
    node: NodeSection = setting(NodeSection(), "the receiving AE")
    http: HttpSection = setting(HttpSection(), "health, metrics and status over HTTP")
    peers: Mapping[str, Peer] = setting({}, "every AE we talk with, by a name of our own")
    series: SeriesSection = setting(SeriesSection(), "when a series is complete")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N", check=_device)
    precision: Literal["auto", "fp32", "bf16", "int8"] = setting(
        "auto", "lowest number format wanted; never below what a model was accepted for"
    )
    models_dir: Path = setting(Path("models"), "folder of the model packages")
    worker: WorkerSection = setting(WorkerSection(), "the process that translates")
    engine: str | Mapping[str, Any] = setting("local", "local; ray: not yet")
    retention: RetentionSection = setting(RetentionSection(), "when stored instances are deleted")
    routes: tuple[Route, ...] = setting((), "every matching route runs, in this order")

    @property
    def committing_peers(self) -> frozenset[str]:
        """Names of the peers that are to commit what they accept."""
        return frozenset(name for name, peer in self.peers.items() if peer.storage_commitment)

    def peer_by_title(self, ae_title: str) -> str | None:
        """The name of the first peer with this AE title."""
        return next((n for n, p in self.peers.items() if p.ae_title == ae_title), None)


def load_config(path: Path) -> NodeConfig:
    """Read and check `path`; relative folders are taken from the folder of the file.

    Raises:
        NotYetError: the only problem is a key this version cannot honour.
        ConfigError: the file cannot be read or is wrong; the message has a line per problem.
    """
    try:
        data = yaml.load(path.read_text("utf-8"), Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; name another file with --config") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: nested too deep") from error
    except (yaml.YAMLError, ValueError, KeyError) as error:  # no UTF-8, 2020-13-45, !!bool maybe
        raise ConfigError(f"{path}: not YAML: {error}") from error
    return config_from_mapping(data, path.parent)


def config_from_mapping(data: Any, folder: Path) -> NodeConfig:
    """`data` as parsed from YAML -> the configuration; `folder` is where relative paths start."""
    builder = Builder()
    config: NodeConfig = builder.build(NodeConfig, {} if data is None else data, "")
    if not builder.problems:
        builder.problems += _references(config)
    if builder.problems:
        raise ConfigError("\n".join(builder.problems))
    if missing := _not_yet(config):
        raise NotYetError("\n".join(missing))
    tls, data_dir = credentials.in_folder(config.node.tls, folder), folder / config.node.data_dir
    node = dataclasses.replace(config.node, data_dir=data_dir, tls=tls)
    peers = {
        name: dataclasses.replace(peer, tls=credentials.in_folder(peer.tls, folder))
        for name, peer in config.peers.items()
    }
    models_dir = folder / config.models_dir
    return dataclasses.replace(config, node=node, peers=peers, models_dir=models_dir)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of config.yaml, for editors that complete it (``check --schema``)."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "dicomnode config.yaml",
        **schema.json_schema(NodeConfig),
    }


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with four traps closed.

    ``+1000`` stays text: the sign says that it is an offset. YES, NO and off stay text, as DICOM
    and `qa` mean them; only true and false are booleans. Numbers are decimal: 0104 is not 68, nor
    1:30 ninety; both stay text. A key given twice is an error.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := sorted({str(key) for key in keys if keys.count(key) > 1}):
            problem = f"key {', '.join(twice)} given twice"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_mapping(node, deep)


_BOOL, _INT, _FLOAT = (f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "float"))
_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in resolvers if pair[0] not in (_BOOL, _INT, _FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    if first != "+"
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"(?i:true|false)$"), list("tTfF"))
_Loader.add_implicit_resolver(_INT, re.compile(r"-?(0|[1-9][0-9]*)$"), list("-0123456789"))
_DECIMAL = r"-?(([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|\.(inf|nan))$"
_Loader.add_implicit_resolver(_FLOAT, re.compile(_DECIMAL), list("-.0123456789"))


def _references(config: NodeConfig) -> list[str]:
    """Keys whose values are right alone and wrong together."""
    problems = []
    for name, peer in config.peers.items():
        where = f"peers.{name}"
        if not peer.dicomweb and (why := _ae_title(peer.ae_title)):
            problems.append(f"{where}.ae_title: {why}")
        if peer.host and "/" in peer.host:
            try:
                ipaddress.ip_network(peer.host)
            except ValueError as error:
                problems.append(f"{where}.host: {error}")
        if peer.storage_commitment and not peer.dicomweb and not _can_be_called(peer):
            problems.append(f"{where}.storage_commitment: needs a host and a port to ask it")
    watermark, reserve = config.retention.watermark_free_gb, config.node.reserve_free_gb
    if 0 < watermark <= reserve:
        text = f"must be above node.reserve_free_gb ({reserve:g}), or 0"
        problems.append(f"retention.watermark_free_gb: {text}")
    for index, route in enumerate(config.routes):
        problems += _route_problems(route, f"routes[{index}]", config)
    calls = {name: (peer.tls, peer.host or "") for name, peer in config.peers.items() if peer.tls}
    problems += credentials.problems(config.node.tls, calls)
    names = [route.name for route in config.routes]
    problems += [
        f"routes: two are named {n!r}" for n in sorted({n for n in names if names.count(n) > 1})
    ]
    if config.http.token is None and not _is_loopback(config.http.bind):
        problems.append("http.token: required when http.bind is not loopback")
    return problems


def _can_be_called(peer: Peer) -> bool:
    return peer.port is not None and peer.host is not None and "/" not in peer.host


def _route_problems(route: Route, where: str, config: NodeConfig) -> list[str]:
    problems = []
    for keyword in route.match:
        if tag_for_keyword(keyword) is None and keyword not in EXTRA_KEYWORDS:
            problems.append(f"{where}.match.{keyword}: not a DICOM keyword")
    for name in route.send_to:
        peer = config.peers.get(name)
        if peer is None:
            problems.append(f"{where}.send_to: no peer named {name!r}")
        elif not peer.dicomweb and not _can_be_called(peer):
            problems.append(f"{where}.send_to: peer {name!r} needs a host and a port to send to")
    folders = {"model": route.model, "companions.classifier": route.companions.classifier}
    for key, folder in folders.items():
        if folder is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}", folder):
            problems.append(f"{where}.{key}: not the name of a folder in models_dir")
    if not re.fullmatch(r"\+[0-9]{1,9}|[1-9][0-9]{0,8}", str(route.series_number)):
        problems.append(f"{where}.series_number: must be a number from 1 on, or +N for an offset")
    if why := _description_problem(route.description):
        problems.append(f"{where}.description: {why}")
    return problems


EXTRA_KEYWORDS = ("CallingAETitle", "CalledAETitle", "Instances")
"""What `match` may name beside DICOM attributes."""


def _description_problem(template: str) -> str | None:
    fields = set(re.findall(r"\{(.*?)\}", template))
    marker = re.sub(r"\{.*?\}", "", template)
    if fields - {"source", "model"} or "{" in marker or "}" in marker or not marker.strip():
        return "may use {source} and {model}, and must say that the series is synthetic"
    if not (marker.isascii() and marker.isprintable()) or "\\" in marker:
        return "must be ASCII, which every character set has, without a backslash"
    fits = len(marker) <= 30  # "QA FAILED " may come before it
    return None if fits else "at most 30 characters beside {source} and {model}"


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def _not_yet(config: NodeConfig) -> list[str]:
    """Keys of the contract that later versions honour: refused, so that nobody relies on them."""
    later = {
        "node.journal": config.node.journal is not None,
        "engine": config.engine != "local",
    }
    for name, peer in config.peers.items():
        later[f"peers.{name}.dicomweb"] = peer.dicomweb is not None
    return [f"{key}: not yet in this version; remove it" for key, used in later.items() if used]
