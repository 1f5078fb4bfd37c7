"""GET only, one port: /healthz, /readyz, /metrics and /api/v1 as JSON."""

import hmac
import json
import logging
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from dicomnode.errors import ConfigError
from dicomnode.history import History

log = logging.getLogger(__name__)

_OPEN_TO_ALL = ("/healthz", "/readyz", "/metrics")
_JSON = "application/json"


@dataclass(frozen=True, slots=True)
class Pages:
    """What the pages are made of."""

    history: History
    reasons_not_ready: Callable[[], list[str]]
    refresh_metrics: Callable[[], None]
    token: str | None
    models: Callable[[], Mapping[str, Any]] = dict
    """What runs each model, see `serving.told`."""


class WebServer:
    """The HTTP server on threads of its own."""

    def __init__(self, bind: str, port: int, pages: Pages) -> None:
        """Take the port.

        Raises:
            ConfigError: it is in use, or the address is not ours.
        """
        handler = type("Handler", (_Handler,), {"pages": pages})
        kind = _Ipv6Server if ":" in bind else ThreadingHTTPServer
        try:
            self._server = kind((bind, port), handler)
        except OSError as error:
            raise ConfigError(
                f"http.port: cannot listen on {bind}:{port}: {error.strerror}; choose another"
            ) from error
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, name="http")

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        if self._thread.is_alive():  # else there is no loop that `shutdown` could end
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


class _Ipv6Server(ThreadingHTTPServer):
    address_family = socket.AF_INET6


class _Handler(BaseHTTPRequestHandler):
    pages: ClassVar[Pages]
    server_version = "dicomnode"
    sys_version = ""
    timeout = 30

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path not in _OPEN_TO_ALL and not self._may_read():
            self._answer(HTTPStatus.UNAUTHORIZED, {"error": "give the bearer token of http.token"})
        elif path == "/healthz":
            self._answer(HTTPStatus.OK, {"status": "alive"})
        elif path == "/readyz":
            reasons = self.pages.reasons_not_ready()
            status = HTTPStatus.SERVICE_UNAVAILABLE if reasons else HTTPStatus.OK
            self._answer(status, {"ready": not reasons, "reasons": reasons})
        elif path == "/metrics":
            self.pages.refresh_metrics()
            self._send(HTTPStatus.OK, CONTENT_TYPE_LATEST, generate_latest())
        elif path == "/api/v1/status":
            told = {**self.pages.history.counts(), "models": self.pages.models()}
            self._answer(HTTPStatus.OK, told)
        elif path == "/api/v1/series":
            self._answer(HTTPStatus.OK, self.pages.history.series())
        elif path.startswith("/api/v1/series/"):
            self._one_series(path.removeprefix("/api/v1/series/"))
        else:
            self._answer(HTTPStatus.NOT_FOUND, {"error": "no such page"})

    def _one_series(self, series_uid: str) -> None:
        found = self.pages.history.one_series(series_uid)
        if found is None:
            self._answer(HTTPStatus.NOT_FOUND, {"error": "no such series"})
        else:
            self._answer(HTTPStatus.OK, found)

    def _may_read(self) -> bool:
        token = self.pages.token
        given = self.headers.get("Authorization", "")
        return token is None or hmac.compare_digest(given.encode(), f"Bearer {token}".encode())

    def _answer(self, status: HTTPStatus, data: Any) -> None:
        self._send(status, _JSON, json.dumps(data, indent=1).encode())

    def _send(self, status: HTTPStatus, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        log.debug(format, *args)
