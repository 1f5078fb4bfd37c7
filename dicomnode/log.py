"""Logging set up once: one line per event, UIDs and states only, never patient attributes."""

import logging
import sys
import warnings

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def configure(level: str = "INFO") -> None:
    """Log to standard error; the libraries that print data sets stay at WARNING."""
    logging.basicConfig(level=level, format=FORMAT, stream=sys.stderr, force=True)
    # pynetdicom logs identifiers (patient attributes) at INFO, pydicom values in warnings
    for library in ("pynetdicom", "highdicom"):
        logging.getLogger(library).setLevel(logging.WARNING)
    if level != "INFO":  # a command says in one line of its own that a peer did not answer
        logging.getLogger("pynetdicom.transport").setLevel(logging.CRITICAL)
    logging.getLogger("pydicom").setLevel(logging.ERROR)
    # their Python warnings go to standard error past the loggers: "Invalid value for VR DA: '...'"
    for library in ("pydicom", "pynetdicom", "highdicom"):
        warnings.filterwarnings("ignore", module=library)
