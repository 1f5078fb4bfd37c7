"""A node that has nothing to do takes nothing: no route, no work, no processor time."""

import os
import threading
from pathlib import Path

from tests.peers import node_settings, running_node

WATCHED_SECONDS = 3.0


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_an_idle_node_without_routes_takes_no_processor_time(
    models_dir: Path, tmp_path: Path
) -> None:
    settings = node_settings(models_dir, []) | {"routes": []}
    with running_node(tmp_path, settings) as node:
        before = _cpu_seconds(node.pid)
        threading.Event().wait(WATCHED_SECONDS)
        used = _cpu_seconds(node.pid) - before
    assert used < WATCHED_SECONDS / 3  # a busy loop takes all of it; waiting takes a hundredth
