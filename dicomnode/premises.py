"""What the node needs of its machine: a folder it can use, and addresses that are its own."""

import contextlib
import os
import socket
import uuid
from pathlib import Path

from dicomnode.config import NodeConfig


def problems(config: NodeConfig) -> list[str]:
    """What would keep a node from running here with `config`; may run beside a running node."""
    found = {
        "node.data_dir": folder_problem(config.node.data_dir),
        "node.bind": address_problem(config.node.bind),
        "http.bind": address_problem(config.http.bind),
    }
    return [f"{key}: {why}" for key, why in found.items() if why]


def folder_problem(folder: Path) -> str:
    """Why no node could keep its data in `folder`, which need not be there yet; empty: it could."""
    there = folder
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    if not there.is_dir():
        return f"{there} is not a folder"
    if there != folder:
        return link_problem(there, there)
    parts = [part for name in _LINKED if (part := folder / name).is_dir()]
    found = [link_problem(parts[0] if parts else folder, part) for part in parts or [folder]]
    return next(filter(None, found), "")


SETTLING = ("ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "zfs", "tmpfs")
"""File systems that `syncfs` is known to sync as a whole; FUSE does nothing, for one."""


def kind_of(folder: Path) -> str:
    """The type of the file system that a folder is on, as Linux names it; empty: not known."""
    place, best = os.path.realpath(folder), ("", "")
    try:
        mounts = Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape")
    except OSError:
        return ""
    for line in mounts.splitlines():
        first, _, second = line.partition(" - ")
        point = first.split()[4].replace(r"\040", " ")
        beneath = place == point or place.startswith(point.rstrip("/") + "/")
        if beneath and len(point) >= len(best[0]):  # of two at one point the later hides the other
            best = (point, second.split()[0])
    return best[1]


def link_problem(source: Path, target: Path) -> str:
    """Why a file made in `source` cannot have a second name in `target`; empty: it can."""
    name = f".probe-{uuid.uuid4().hex}"
    first, second = source / name, target / f"{name}-2"
    try:
        first.touch()
        os.link(first, second)
    except OSError as error:
        return f"{target}: {error.strerror}; {_WANTED}"
    finally:
        for probe in (first, second):
            with contextlib.suppress(OSError):  # it is not there
                probe.unlink()
    return ""


_LINKED = ("incoming", "received", "quarantine")
"""Folders of data_dir between which files are linked and moved."""
_WANTED = "it must be writable, on one file system with what is beside it, and have hard links"


def address_problem(bind: str) -> str:
    """Why nobody could listen on the address `bind` of this machine; empty: one could."""
    family = socket.AF_INET6 if ":" in bind else socket.AF_INET
    try:
        socket.create_server((bind, 0), family=family).close()
    except OSError as error:
        return f"{bind}: {reason_of(error)}; give an address of this machine, or 0.0.0.0 for all"
    return ""


def reason_of(error: OSError) -> str:
    """The system's words, without the address that Python adds."""
    return (error.strerror or str(error)).partition(" (while ")[0]
