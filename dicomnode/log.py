"""Logging set up once: one line per event, UIDs and states only, never patient attributes."""

import logging
import re
import sqlite3
import sys
import traceback
import warnings
from types import TracebackType

from dicomnode.errors import DicomNodeError

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


_QUOTED = re.compile(r"'.*'", re.DOTALL)
_TELLING = (DicomNodeError, sqlite3.Error, NameError, AttributeError, ImportError)
"""Of these the message may be shown; those of other libraries quote values of data sets."""


class _Formatter(logging.Formatter):
    """Tracebacks with the places and kinds of errors, but without foreign messages.

    What pynetdicom quotes comes from peers: a UID that is none may be a name.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:
        if record.name.startswith("pynetdicom"):
            record.message = _QUOTED.sub("'...'", record.message)
        return super().formatMessage(record)

    def formatException(
        self,
        ei: tuple[type[BaseException], BaseException, TracebackType | None]
        | tuple[None, None, None],
    ) -> str:
        parts, error = [], ei[1]
        while error is not None:
            words = f": {error}" if isinstance(error, _TELLING) else ""
            if isinstance(error, OSError):
                words = f": {error.strerror}"
            frames = "".join(traceback.format_tb(error.__traceback__))
            parts.append(f"{frames}{type(error).__name__}{words}")
            error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        return "\n... which came from:\n".join(parts)


def configure(level: str = "INFO") -> None:
    """Log to standard error; the libraries that print data sets stay at WARNING."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(FORMAT))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # pynetdicom logs identifiers (patient attributes) at INFO, pydicom values in warnings
    for library in ("pynetdicom", "highdicom"):
        logging.getLogger(library).setLevel(logging.WARNING)
    if level != "INFO":  # a command says in one line of its own that a peer did not answer
        logging.getLogger("pynetdicom.transport").setLevel(logging.CRITICAL)
    logging.getLogger("pydicom").setLevel(logging.ERROR)
    # every decoder that fails logs a traceback; what it means for the instance is in our words
    logging.getLogger("pydicom.pixels").setLevel(logging.CRITICAL)
    # their Python warnings go to standard error past the loggers: "Invalid value for VR DA: '...'"
    for library in ("pydicom", "pynetdicom", "highdicom"):
        warnings.filterwarnings("ignore", module=library)
