"""What a stop, or a crash, left behind; and that only one node has a data folder."""

import fcntl
import logging
from pathlib import Path
from typing import IO

from dicomnode.errors import ConfigError, InstanceRefused
from dicomnode.jobs import Jobs
from dicomnode.journal import Journal
from dicomnode.scp import read_arrival_header
from dicomnode.spool import Spool

log = logging.getLogger(__name__)


def lock_folder(data_dir: Path) -> IO[str]:
    """One node per data folder: the lock goes with the process, whatever ends it.

    Raises:
        ConfigError: another node has it.
    """
    file = (data_dir / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ConfigError("node.data_dir: another dicomnode is using this folder") from error
    return file


def recover(spool: Spool, journal: Journal, jobs: Jobs, now: float) -> None:
    """Bring files and rows together again."""
    spool.prepare()
    journal.recover(now)
    jobs.recover(now)
    unsaid = []
    for part, placed in spool.leftovers():
        if placed and not _is_journalled(part, journal):
            unsaid.append(part)
        else:
            part.unlink()
    if unsaid:
        spool.drop(unsaid)
        words = "removed %d instances that the stop kept from being acknowledged"
        log.info(words, len(unsaid))


def _is_journalled(part: Path, journal: Journal) -> bool:
    """Was this instance acknowledged, or about to be?

    Where it was not its sender will send it again, and its file may have been cut off by a power
    failure: the journal knows an instance only when its file is durable.
    """
    try:
        header = read_arrival_header(part)
    except (InstanceRefused, OSError):
        return False
    known = journal.known(str(header.get("SOPInstanceUID")))
    return known is not None and known[0] == header.get("SeriesInstanceUID") and not known[2]
