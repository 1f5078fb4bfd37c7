"""HTTP as a load balancer, Prometheus and a person's program see it."""

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dicomnode import metrics
from dicomnode.errors import ConfigError
from dicomnode.history import History
from dicomnode.jobs import Jobs
from dicomnode.journal import Arrival, Journal
from dicomnode.tables import Database
from dicomnode.web.server import Pages, WebServer

pytestmark = pytest.mark.network
SERIES = "1.2.3"


def _nothing() -> None:
    """No gauge to refresh."""


@dataclass
class Site:
    """A web server over a journal with one series and one queued job."""

    folder: Path
    token: str | None = None
    reasons: list[str] = field(default_factory=list)
    refresh: Callable[[], None] = _nothing
    models: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        database = Database(self.folder / "journal.db")
        facts = ("1.2", "CT", "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.1.2", "0" * 64, 1)
        arrival = Arrival("1.2.3.4", SERIES, *facts, "CT1", "DICOMNODE", None, None)
        Journal(database).record_instance(arrival, 10.0)
        (seen,) = Journal(database).open_series()
        Jobs(database).close_series(seen, "routed: r", [("r", "routine")], ["complete"], 20.0)
        given = (History(database), lambda: self.reasons, self.refresh, self.token)
        self.pages = Pages(*given, lambda: self.models)
        self.server = WebServer("127.0.0.1", 0, self.pages)
        self.server.start()

    def get(self, path: str, **headers: str) -> tuple[int, str, str]:
        """Status, content type and body."""
        url = f"http://127.0.0.1:{self.server.port}{path}"
        request = urllib.request.Request(url, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, answer.headers["Content-Type"], answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.headers["Content-Type"], error.read().decode()

    def json(self, path: str, **headers: str) -> tuple[int, Any]:
        status, content_type, body = self.get(path, **headers)
        assert content_type == "application/json"
        return status, json.loads(body)


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    opened: list[Site] = []

    def make(**options: Any) -> Site:
        opened.append(Site(tmp_path, **options))
        return opened[-1]

    yield make
    for site in opened:
        site.server.stop()


def test_a_living_process_is_healthy_even_when_it_is_not_ready(
    sites: Callable[..., Site],
) -> None:
    site = sites(reasons=["the models are not loaded yet"])
    assert site.json("/healthz")[0] == 200


def test_readiness_names_every_reason(sites: Callable[..., Site]) -> None:
    site = sites(reasons=["the disk is full", "the worker was lost"])
    status, body = site.json("/readyz")
    assert status == 503
    assert body == {"ready": False, "reasons": ["the disk is full", "the worker was lost"]}
    site.reasons.clear()
    assert site.json("/readyz") == (200, {"ready": True, "reasons": []})


def test_metrics_are_what_prometheus_reads(sites: Callable[..., Site]) -> None:
    refreshed = []
    site = sites(refresh=lambda: refreshed.append(1))
    metrics.jobs_by_state.labels("queued").set(1)
    status, content_type, body = site.get("/metrics")
    families = {family.name: family for family in text_string_to_metric_families(body)}
    ours = {name: family for name, family in families.items() if name.startswith("dicomnode_")}
    assert (status, content_type.partition(";")[0], refreshed) == (200, "text/plain", [1])
    assert {"dicomnode_instances_received", "dicomnode_jobs", "dicomnode_associations_open"} <= (
        ours.keys()
    )
    assert all(family.documentation for family in ours.values())
    units = ("milliseconds", "_ms", "megabytes", "_mb", "_gb", "_minutes", "_hours")
    assert [name for name in ours if name.endswith(units)] == []


def test_no_label_can_take_any_number_of_values(sites: Callable[..., Site]) -> None:
    body = sites().get("/metrics")[2]
    labels = {
        label
        for family in text_string_to_metric_families(body)
        if family.name.startswith("dicomnode_")
        for sample in family.samples
        for label in sample.labels
    }
    stranger = {"ae_title", "calling", "host", "series", "uid", "job", "study", "patient"}
    assert labels & stranger == set()


def test_the_api_tells_counts_series_and_timelines(sites: Callable[..., Site]) -> None:
    site = sites()
    status, counts = site.json("/api/v1/status")
    assert (status, counts["jobs"], counts["series"]) == (200, {"queued": 1}, {"closed": 1})
    (listed,) = site.json("/api/v1/series")[1]
    assert (listed["series_uid"], listed["jobs"][0]["state"]) == (SERIES, "queued")
    status, one = site.json(f"/api/v1/series/{SERIES}")
    assert (status, one["instances"], one["open"]) == (200, 1, False)
    assert [event["text"] for event in one["timeline"]] == ["first instance from CT1", "complete"]


def test_the_api_tells_what_runs_each_model(sites: Callable[..., Site]) -> None:
    site = sites()
    assert site.json("/api/v1/status")[1]["models"] == {}  # none is loaded yet
    site.models["m"] = {"engine": "openvino 1", "self_test": "0.1 HU at most", "refused": []}
    site.models["n"] = {"failed": "a file was changed"}
    assert site.json("/api/v1/status")[1]["models"] == site.models


def test_what_is_not_there_is_not_found(sites: Callable[..., Site]) -> None:
    site = sites()
    uids = ("9.9", "", "'%20OR%201=1", f"{SERIES}/x")
    paths = ["/nothing", "//", *(f"/api/v1/series/{uid}" for uid in uids)]
    assert [site.json(path)[0] for path in paths] == [404] * len(paths)


def test_without_the_token_only_health_and_metrics_answer(sites: Callable[..., Site]) -> None:
    site = sites(token="s3cret")  # noqa: S106
    for path in ("/api/v1/status", "/api/v1/series", "/nothing"):
        assert site.json(path) == (401, {"error": "give the bearer token of http.token"})
        for given in ("", "s3cret", "Bearer", "Bearer ", "Bearer S3CRET", "Bearer s3cret2"):
            assert site.json(path, Authorization=given)[0] == 401


def test_with_the_token_everything_answers(sites: Callable[..., Site]) -> None:
    site = sites(token="s3cret")  # noqa: S106
    assert site.json("/api/v1/status", Authorization="Bearer s3cret")[0] == 200
    assert [site.get(path)[0] for path in ("/healthz", "/readyz", "/metrics")] == [200] * 3


def test_nothing_can_be_changed_over_http(sites: Callable[..., Site]) -> None:
    site = sites()
    url = f"http://127.0.0.1:{site.server.port}/api/v1/series"
    for method in ("POST", "PUT", "DELETE"):
        request = urllib.request.Request(url, data=b"{}", method=method)
        with pytest.raises(urllib.error.HTTPError) as refusal:
            urllib.request.urlopen(request, timeout=10)
        assert refusal.value.code in (405, 501)


def test_a_port_in_use_is_named(sites: Callable[..., Site]) -> None:
    site = sites()
    with pytest.raises(ConfigError, match=r"^http\.port: cannot listen on 127\.0\.0\.1:\d+: Addr"):
        WebServer("127.0.0.1", site.server.port, site.pages)


def test_a_server_that_never_ran_can_be_stopped(tmp_path: Path) -> None:
    pages = Pages(History(Database(tmp_path / "journal.db")), list, _nothing, None)
    WebServer("127.0.0.1", 0, pages).stop()
