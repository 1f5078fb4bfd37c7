"""A blinded reader study in the browser, and what it says.

    python training/reader_study.py serve FOLDER answers.csv window=-160,240 port=8090
    python training/reader_study.py analyse answers.csv results.csv

FOLDER has a folder per case with `real` and `synthetic` (see reading.py). Each reader opens the
page, gives a name and answers with the keyboard; whoever comes back goes on where they stopped.
The server is for this machine (127.0.0.1) unless `bind` says otherwise: it checks no password.
"""

import csv
import io
import json
import sys
from collections.abc import Sequence
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from PIL import Image

from dicomnode.errors import ConfigError, DicomNodeError
from training.errors import TrainingError
from training.reading import ARTEFACTS, SIMILARITY, AnswerLog, Question, Study
from training.reading_figures import analyse

PAGE = Path(__file__).with_name("reader_study.html")
HEAD = ("reader", "what", "figure", "95 % interval", "answers")
_LONGEST_BODY, _LONGEST_NAME = 4096, 40
_USAGE = "usage: python training/reader_study.py serve FOLDER ANSWERS | analyse ANSWERS RESULTS"


def main(argv: Sequence[str]) -> None:
    words = [word for word in argv if "=" not in word]
    options = {"window": "", "port": "8090", "bind": "127.0.0.1", "seed": "1", "unit": "HU"}
    given = dict(word.split("=", 1) for word in argv if "=" in word)
    if unknown := sorted(given.keys() - options.keys()):
        raise ConfigError(f"no option {', '.join(unknown)}; known: {', '.join(options)}")
    options |= given
    if len(words) != 3 or words[0] not in ("serve", "analyse"):
        raise ConfigError(_USAGE)
    if words[0] == "analyse":
        write_results(Path(words[1]), Path(words[2]))
        return
    study = Study(
        Path(words[1]),
        Path(words[2]),
        seed=int(options["seed"]),
        unit=options["unit"],  # type: ignore[arg-type]  # read_image says which there are
        window=_window(options["window"]),
    )
    server = reader_server(study, options["bind"], int(options["port"]))
    print(
        f"{len(study.cases)} cases; open http://{options['bind']}:{server.server_port}/", flush=True
    )
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("stopped; every answer given is on disk")
    finally:
        server.server_close()


def _window(text: str) -> tuple[float, float] | None:
    if not text:
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"window: {text!r}; want low,high") from error
    return low, high


def write_results(answers: Path, results: Path) -> None:
    """Print the table and write it as CSV.

    Raises:
        TrainingError: no answers.
    """
    rows = analyse(AnswerLog(answers).read())
    if not rows:
        raise TrainingError(f"{answers}: no answers in it")
    with results.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([HEAD, *rows])
    widths = [max(len(row[i]) for row in [HEAD, *rows]) for i in range(len(HEAD))]
    for row in (HEAD, *rows):
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )


def reader_server(study: Study, bind: str, port: int) -> ThreadingHTTPServer:
    """The server of a study, listening.

    Raises:
        ConfigError: the port is in use.
    """
    try:
        return ThreadingHTTPServer((bind, port), partial(_Handler, study))
    except OSError as error:
        raise ConfigError(f"port: cannot listen on {bind}:{port}: {error.strerror}") from error


class _Handler(BaseHTTPRequestHandler):
    """GET / and /next?reader=, /image?reader=&key=&side=&slice=; POST /answer."""

    server_version, sys_version, timeout = "reader-study", "", 30

    def __init__(self, study: Study, *rest: Any) -> None:
        self.study = study
        super().__init__(*rest)

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        asked = {key: values[0] for key, values in parse_qs(url.query).items()}
        try:
            if url.path == "/":
                self._send(HTTPStatus.OK, "text/html; charset=utf-8", PAGE.read_bytes())
            elif url.path == "/next":
                self._json(self._next(_name(asked)))
            elif url.path == "/image":
                self._send(HTTPStatus.OK, "image/png", self._image(asked))
            else:
                self._json({"error": "no such page"}, HTTPStatus.NOT_FOUND)
        except (TrainingError, ValueError, IndexError, KeyError) as error:
            self._json({"error": _said(error)}, HTTPStatus.BAD_REQUEST)

    def do_POST(self) -> None:
        try:
            length = int(self.headers.get("Content-Length") or 0)
            if self.path != "/answer" or not 0 < length <= _LONGEST_BODY:
                raise TrainingError("want one answer at /answer")
            if "application/json" not in (self.headers.get("Content-Type") or ""):
                raise TrainingError("want application/json")  # no other site's form can send it
            body = json.loads(self.rfile.read(length))
            self.study.give(
                _name(body),
                str(body["key"]),
                nature=str(body.get("nature") or ""),
                artefacts=int(body.get("artefacts") or 0),
                similarity=int(body.get("similarity") or 0),
                seconds=float(body.get("seconds") or 0),
            )
            self._json(self._next(_name(body)))
        except (TrainingError, ValueError, KeyError, TypeError, AttributeError) as error:
            self._json({"error": _said(error)}, HTTPStatus.BAD_REQUEST)

    def _next(self, reader: str) -> dict[str, Any]:
        """The next question, without a word on what it shows."""
        total, left = len(self.study.questions(reader)), self.study.open_questions(reader)
        state: dict[str, Any] = {"total": total, "done": total - len(left)}
        if left:
            first = left[0]
            slices = len(self.study.planes(first, 0))
            state |= {"key": first.key, "kind": first.kind, "slices": slices}
            state |= {"similarity": SIMILARITY, "artefacts": ARTEFACTS}
        return state

    def _image(self, asked: dict[str, str]) -> bytes:
        question = self._question(_name(asked), asked["key"])
        plane = self.study.planes(question, int(asked["side"]))[int(asked["slice"])]
        buffer = io.BytesIO()
        Image.fromarray(plane).save(buffer, "PNG")
        return buffer.getvalue()

    def _question(self, reader: str, key: str) -> Question:
        found = [q for q in self.study.questions(reader) if q.key == key]
        if not found:
            raise TrainingError("no such question")
        return found[0]

    def _json(self, data: Any, status: HTTPStatus = HTTPStatus.OK) -> None:
        self._send(status, "application/json", json.dumps(data).encode())

    def _send(self, status: HTTPStatus, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", "default-src 'self' 'unsafe-inline'")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the screen: the terminal is for what goes wrong."""


def _name(asked: dict[str, Any]) -> str:
    name = str(asked.get("reader") or "").strip()
    if not name or len(name) > _LONGEST_NAME or not name.isprintable():
        raise TrainingError(f"reader: give a name of 1 to {_LONGEST_NAME} characters")
    return name


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, TrainingError) else "the request cannot be read"


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DicomNodeError as error:
        raise SystemExit(str(error)) from None
