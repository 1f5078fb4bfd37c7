"""config.yaml: what is wrong is named with its path, all of it at once, and nothing is guessed."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dicomnode.config import NodeConfig, config_from_mapping, json_schema, load_config
from dicomnode.errors import ConfigError, NotYetError

ROOT = Path(__file__).parents[1]
HERE = Path("/etc/dicomnode")
PEERS = {"pacs": {"ae_title": "ORTHANC", "host": "127.0.0.1", "port": 4242}}
ROUTE = {"name": "r", "match": {"Modality": "CT"}, "model": "m", "send_to": ["pacs"]}


def _with_route(**keys: Any) -> dict[str, Any]:
    return {"peers": PEERS, "routes": [{**ROUTE, **keys}]}


def _problems(data: Any) -> list[str]:
    """The lines of the error, sorted; [] if the configuration is accepted."""
    try:
        config_from_mapping(data, HERE)
    except ConfigError as error:
        return sorted(str(error).splitlines())
    return []


def _from_text(tmp_path: Path, text: str) -> NodeConfig:
    path = tmp_path / "config.yaml"
    path.write_text(text, "utf-8")
    return load_config(path)


def test_the_shipped_config_loads() -> None:
    config = load_config(ROOT / "config.yaml")
    assert [route.name for route in config.routes] == ["low-dose chest CT"]
    assert config.node.data_dir == ROOT / "data"
    assert config.routes[0].match["SliceThickness"].max == 3.0


def test_the_shipped_values_are_the_defaults() -> None:
    shipped = load_config(ROOT / "config.yaml")
    default = config_from_mapping({}, ROOT)
    assert dataclasses.replace(shipped, peers=default.peers, routes=()) == default
    pacs = config_from_mapping({"peers": PEERS}, ROOT).peers["pacs"]
    assert shipped.peers["pacs"] == pacs
    route = shipped.routes[0]
    least = {key: getattr(route, key) for key in ("name", "model")}
    plain = config_from_mapping({"routes": [{**least, "match": {}, "send_to": []}]}, ROOT).routes[0]
    assert dataclasses.replace(route, match=plain.match, send_to=()) == plain


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert _from_text(tmp_path, "# nothing\n") == config_from_mapping({}, tmp_path)


WRONG: list[tuple[Any, str]] = [
    ({"nodes": {}}, "nodes: unknown key; known here: node, http,"),
    ({"node": {"aetitle": "X"}}, "node.aetitle: unknown key; known here: ae_title,"),
    ({"node": None}, "node: expected a mapping"),
    ([], "config.yaml: expected a mapping"),
    ({"node": {"port": "11112"}}, "node.port: expected a whole number, got '11112'"),
    ({"node": {"port": True}}, "node.port: expected a whole number, got True"),
    ({"node": {"port": 65536}}, "node.port: must be between 0 and 65535"),
    ({"node": {"ae_title": "SEVENTEEN_LETTERS"}}, "node.ae_title: must be 1 to 16 ASCII"),
    ({"node": {"ae_title": "A\\B"}}, "node.ae_title: must be 1 to 16 ASCII"),
    ({"node": {"ae_title": ""}}, "node.ae_title: must be 1 to 16 ASCII"),
    ({"node": {"ae_title": " A"}}, "node.ae_title: spaces at the ends"),
    ({"node": {"ae_title": "A\tB"}}, "node.ae_title: control characters"),
    ({"node": {"unknown_callers": "ignore"}}, "node.unknown_callers: must be refuse or accept"),
    ({"series": {"quiet_seconds": -1}}, "series.quiet_seconds: must be between 0 and"),
    ({"series": {"quiet_seconds": float("nan")}}, "series.quiet_seconds: must be between"),
    ({"series": {"on_late_instances": "drop"}}, "series.on_late_instances: must be regenerate or"),
    ({"device": "gpu"}, "device: must be auto, cpu, cuda or cuda:N"),
    ({"peers": {"a": {"host": "h"}}}, "peers.a.ae_title: must be 1 to 16 ASCII"),
    ({"peers": {"a": {"ae_title": "A", "host": "10.0.0.1/8"}}}, "peers.a.host: 10.0.0.1/8 has"),
    ({"peers": {7: {"ae_title": "A"}}}, "peers: expected a mapping with text keys"),
    ({"http": {"bind": "192.0.2.1"}}, "http.token: required when http.bind is not loopback"),
    ({"http": {"bind": ""}}, "http.bind: must not be empty"),
    ({"node": {"bind": "a..b"}}, "node.bind: is no host name and no address"),
    ({"node": {"bind": "a" * 64}}, "node.bind: is no host name and no address"),
    ({"node": {"data_dir": "a\0b"}}, "node.data_dir: control characters are not allowed"),
    ({"node": {"data_dir": ""}}, "node.data_dir: must not be empty"),
    ({"peers": {"a\nb": {"ae_title": "A"}}}, "peers: a name is empty, or has control characters"),
    ({"peers": {" ": {"ae_title": "A"}}}, "peers: a name is empty, or has control characters"),
    ({"series": {"quiet_seconds": 10**400}}, "series.quiet_seconds: must be between 0"),
    ({"http": {"bind": "127.0.0.1.example"}}, "http.token: required when http.bind is not"),
    ({"http": {"token": ""}}, "http.token: must not be empty"),
    ({"routes": {}}, "routes: expected a list"),
    ({"routes": [{"name": "r", "match": {}, "model": "m"}]}, "routes[0].send_to: missing"),
    (_with_route(send_to=["archive"]), "routes[0].send_to: no peer named 'archive'"),
    (_with_route(send_to="pacs"), "routes[0].send_to: expected a list"),
    (_with_route(model="../m"), "routes[0].model: not the name of a folder in models_dir"),
    (_with_route(priority="now"), "routes[0].priority: must be stat or routine or offpeak"),
    (_with_route(qa=False), "routes[0].qa: must be gate or flag or off, not False"),
    (_with_route(shadow="no"), "routes[0].shadow: expected true or false, got 'no'"),
    (_with_route(series_number=0), "routes[0].series_number: must be a number from 1 on"),
    (_with_route(series_number=-1), "routes[0].series_number: must be a number from 1 on"),
    (_with_route(series_number="+"), "routes[0].series_number: must be a number from 1 on"),
    (_with_route(description="{source}"), "routes[0].description: may use {source} and {model}"),
    (_with_route(description="{source} {model}"), "routes[0].description: may use {source} and"),
    (_with_route(description=" "), "routes[0].description: may use {source} and {model}"),
    (_with_route(description="SYN {patient}"), "routes[0].description: may use {source} and"),
    (_with_route(description="SYN {model.x}"), "routes[0].description: may use {source} and"),
    (_with_route(description="SYN {model"), "routes[0].description: may use {source} and"),
    (_with_route(description="SYN\\{model}"), "routes[0].description: must be ASCII"),
    (_with_route(description="künstlich"), "routes[0].description: must be ASCII"),
    (_with_route(description="S" * 31), "routes[0].description: at most 30 characters"),
    (_with_route(match={"Modalty": "CT"}), "routes[0].match.Modalty: not a DICOM keyword"),
    (_with_route(match={"Modality": {}}), "routes[0].match.Modality: says nothing"),
    (_with_route(match={"Modality": {"is": 1}}), "routes[0].match.Modality.is: unknown; known"),
    (_with_route(match={"Modality": None}), "routes[0].match.Modality: expected a text"),
    (_with_route(match={"Modality": True}), "routes[0].match.Modality: expected a text"),
    (_with_route(match={"Modality": []}), "routes[0].match.Modality: expected a text"),
    (_with_route(match={"Modality": {"not": [[]]}}), "routes[0].match.Modality.not: expected a"),
    (_with_route(match={"KVP": {"max": "3"}}), "routes[0].match.KVP.max: expected a number"),
    (_with_route(match={"KVP": {"present": 1}}), "routes[0].match.KVP.present: expected true or"),
    (_with_route(match={"Modality": {"regex": "("}}), "routes[0].match.Modality.regex: not a reg"),
    (_with_route(match={"Modality": {"regex": 1}}), "routes[0].match.Modality.regex: not a reg"),
    ({"peers": PEERS, "routes": [ROUTE, ROUTE]}, "routes: two are named 'r'"),
    (
        {"peers": {"a": {"ae_title": "A", "storage_commitment": True}}},
        "peers.a.storage_commitment: needs a host and a port",
    ),
    (
        {"retention": {"watermark_free_gb": 5}},
        "retention.watermark_free_gb: must be above node.reserve_free_gb (5), or 0",
    ),
    (
        {"peers": {"pacs": {"ae_title": "O", "host": "10.0.0.0/8", "port": 1}}, "routes": [ROUTE]},
        "routes[0].send_to: peer 'pacs' needs a host and a port",
    ),
]


@pytest.mark.parametrize(("data", "problem"), WRONG, ids=[problem for _, problem in WRONG])
def test_a_wrong_key_is_named_with_its_path(data: Any, problem: str) -> None:
    assert [line[: len(problem)] for line in _problems(data)] == [problem]


def test_all_problems_are_told_at_once() -> None:
    data = {
        "node": {"port": "x", "tsl": 1},
        "peers": {"a": {"prot": 2}},
        "routes": [{"name": "r", "match": {"KVP": {"min": "1"}}, "model": "m"}],
    }
    assert [line.partition(":")[0] for line in _problems(data)] == [
        "node.port",
        "node.tsl",
        "peers.a.prot",
        "routes[0].match.KVP.min",
        "routes[0].send_to",
    ]


NOT_YET: list[tuple[dict[str, Any], str]] = [
    ({"node": {"journal": "postgresql://h/d"}}, "node.journal"),
    ({"peers": {"a": {"dicomweb": "https://a/b"}}}, "peers.a.dicomweb"),
    ({"engine": {"ray": {"address": "auto"}}}, "engine"),
]


@pytest.mark.parametrize(("data", "key"), NOT_YET, ids=[key for _, key in NOT_YET])
def test_what_this_version_cannot_do_is_refused_by_name(data: dict[str, Any], key: str) -> None:
    with pytest.raises(NotYetError, match=f"^{key}: not yet in this version"):
        config_from_mapping(data, HERE)


def test_a_plus_sign_stays_an_offset(tmp_path: Path) -> None:
    text = yaml.safe_dump(_with_route()) + "  series_number: {}\n"
    offset = _from_text(tmp_path, text.replace("{}", "+1000"))
    number = _from_text(tmp_path, text.replace("{}", "1000"))
    assert (offset.routes[0].series_number, number.routes[0].series_number) == ("+1000", 1000)


def test_yes_no_and_off_are_text_as_dicom_means_them(tmp_path: Path) -> None:
    text = yaml.safe_dump({"peers": PEERS}) + (
        "routes: [{name: r, match: {BurnedInAnnotation: NO, PatientIdentityRemoved: [YES]},"
        " model: m, send_to: [], qa: off, shadow: true}]"
    )
    route = _from_text(tmp_path, text).routes[0]
    assert (route.qa, route.shadow) == ("off", True)
    assert [condition.any for condition in route.match.values()] == [("NO",), ("YES",)]


def test_a_key_given_twice_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="key routes given twice"):
        _from_text(tmp_path, "routes: []\npeers: {}\nroutes: []\n")


NOT_YAML = ["a: [", "!!python/object/apply:os.getcwd []", "a: \x00", "a: 2020-13-45", "a: !!bool x"]


@pytest.mark.parametrize("text", [*NOT_YAML, f"a: {'9' * 5000}"])
def test_what_is_no_yaml_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="not YAML"):
        _from_text(tmp_path, text)


def test_yaml_that_is_nested_without_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nested too deep"):
        _from_text(tmp_path, f"peers: {'[' * 5000}")


@pytest.mark.parametrize("text", ["0104", "1:30", "1_000", "0x50", "0b1"])
def test_a_number_is_decimal_or_no_number(tmp_path: Path, text: str) -> None:
    """YAML 1.1 would read 68, 90, 1000, 80 and 1."""
    with pytest.raises(ConfigError, match=rf"node\.port: expected a whole number, got '{text}'"):
        _from_text(tmp_path, f"node: {{port: {text}}}")


def test_numbers_are_read_as_they_are_written(tmp_path: Path) -> None:
    section = _from_text(tmp_path, "series: {quiet_seconds: 0.5, quiet_seconds_if_released: 0}")
    assert section.series.quiet_seconds == 0.5
    assert section.series.quiet_seconds_if_released == 0


def test_an_absent_file_says_how_to_name_another(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"No such file or directory; .*--config"):
        load_config(tmp_path / "none.yaml")


def test_secrets_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN_OF_TEST", "s3cret")
    config = config_from_mapping({"http": {"token": "${TOKEN_OF_TEST}"}}, HERE)
    assert config.http.token == "s3cret"  # noqa: S105


def test_an_absent_or_empty_secret_never_opens_the_door(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOKEN_OF_TEST", raising=False)
    data = {"http": {"bind": "192.0.2.1", "token": "${TOKEN_OF_TEST}"}}
    assert "http.token: the environment has no variable TOKEN_OF_TEST" in _problems(data)
    monkeypatch.setenv("TOKEN_OF_TEST", "")
    assert _problems(data) == ["http.token: must not be empty"]


def test_no_other_key_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME_OF_TEST", "elsewhere")
    data = {"node": {"data_dir": "${HOME_OF_TEST}"}, **_with_route(name="${HOME_OF_TEST}")}
    config = config_from_mapping(data, HERE)
    assert config.node.data_dir == HERE / "${HOME_OF_TEST}"
    assert config.routes[0].name == "${HOME_OF_TEST}"


def test_relative_folders_start_at_the_file() -> None:
    data = {"node": {"data_dir": "spool"}, "models_dir": "/srv/models"}
    config = config_from_mapping(data, HERE)
    assert (config.node.data_dir, config.models_dir) == (HERE / "spool", Path("/srv/models"))


_TEXTS = st.text("abAB +*{}$./0", max_size=8)
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXTS, inner),
    max_leaves=6,
)
_KEYS = st.sampled_from([field.name for field in dataclasses.fields(NodeConfig)])


@given(st.dictionaries(_KEYS, _VALUES, min_size=1, max_size=3))
def test_any_value_is_taken_or_refused_in_words(data: dict[str, Any]) -> None:
    try:
        config_from_mapping(data, HERE)
    except ConfigError as error:
        lines = str(error).splitlines()
        assert all(line.partition(":")[0].startswith(tuple(data)) for line in lines)


# the JSON Schema


def _fits(schema: Any, value: Any) -> bool:
    """Whether `value` fits a JSON Schema that uses only the words `_KNOWN`."""
    assert schema.keys() <= _KNOWN, f"this check does not know {schema.keys() - _KNOWN}"
    if "anyOf" in schema:
        return any(_fits(part, value) for part in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    kinds = schema.get("type", [])
    if kinds and not any(_is(kind, value) for kind in ([kinds] if type(kinds) is str else kinds)):
        return False
    if isinstance(value, list):
        least = schema.get("minItems", 0)
        return len(value) >= least and all(_fits(schema.get("items", {}), v) for v in value)
    if not isinstance(value, dict):
        return True
    known, other = schema.get("properties", {}), schema.get("additionalProperties", {})
    return (
        set(schema.get("required", ())) <= value.keys()
        and len(value) >= schema.get("minProperties", 0)
        and all(
            _fits(known[key], v) if key in known else other is not False and _fits(other, v)
            for key, v in value.items()
        )
    )


_KNOWN = {"$schema", "title", "description", "type", "enum", "anyOf", "items", "minItems"} | {
    "properties",
    "additionalProperties",
    "required",
    "minProperties",
}


def _is(kind: str, value: Any) -> bool:
    if kind == "number":
        return type(value) in (int, float)
    types = {"string": str, "boolean": bool, "integer": int, "array": list, "object": dict}
    return type(value) is types.get(kind, type(None))


def test_the_schema_takes_what_the_loader_takes() -> None:
    text = (ROOT / "config.yaml").read_text("utf-8").replace("+1000", "'+1000'")
    assert _fits(json_schema(), yaml.safe_load(text))
    assert _fits(json_schema(), _with_route(match={"KVP": {"min": 80, "not": [120]}, "Rows": 512}))


_SHAPES = ("unknown", "expected", "missing", "must be gate", "must be refuse", "must be stat")
_BY_SHAPE = [
    (data, problem)
    for data, problem in WRONG
    if any(f": {word}" in problem for word in (*_SHAPES, "says nothing"))
    if "text keys" not in problem  # JSON has no other keys than text
]


@pytest.mark.parametrize(("data", "problem"), _BY_SHAPE, ids=[problem for _, problem in _BY_SHAPE])
def test_the_schema_refuses_what_has_the_wrong_shape(data: Any, problem: str) -> None:
    assert not _fits(json_schema(), data)


def test_every_key_is_described_in_the_schema() -> None:
    def silent(schema: Any, path: str) -> list[str]:
        found = []
        for key, part in schema.get("properties", {}).items():
            found += [] if part.get("description") else [f"{path}{key}"]
            found += silent(part, f"{path}{key}.")
        for word in ("items", "additionalProperties"):
            if isinstance(schema.get(word), dict):
                found += silent(schema[word], path)
        return found

    schema = json_schema()
    schema["properties"]["routes"]["items"]["properties"].pop("match")  # checked by its SHAPE
    assert silent(schema, "") == []
