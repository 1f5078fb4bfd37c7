"""What a stop, or a crash, left behind; and that only one node has a data folder."""

import fcntl
import logging
from pathlib import Path
from typing import IO

from dicomnode.errors import ConfigError
from dicomnode.jobs import Jobs
from dicomnode.journal import Journal
from dicomnode.scp import adopt
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
    for part, kept in spool.leftovers():
        if kept and adopt(part, journal, now):
            log.info("adopted an instance that was stored but not journalled at the stop")
        part.unlink()
