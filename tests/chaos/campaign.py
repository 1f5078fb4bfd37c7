"""Random kill -9 of any process of the node's tree, or of the whole tree, under load.

    python -m tests.chaos.campaign --kills 200

Four DCMTK senders send series after series; each tries again until everything was acknowledged, as
a modality does. In the end every instance that was acknowledged must be stored, and Orthanc must
have exactly one derived series for each series, with every instance.
"""

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from pydicom import dcmread

from tests.factories import ct_series, write_series
from tests.peers import (
    STORESCU,
    Archive,
    Node,
    identity_package,
    node_settings,
    orthanc,
    send,
)

SENDERS, SLICES = 4, 12
SERIES_PER_KILL = 2
"""Of each sender; then it sends its series again, so that a slow machine is not buried in work."""
STANDSTILL_SECONDS = 240.0


@dataclass
class Tally:
    """What the campaign did and found."""

    kills: Counter[str] = field(default_factory=Counter)
    series: dict[str, set[str]] = field(default_factory=dict)
    """Acknowledged series: SeriesInstanceUID -> its SOP Instance UIDs."""
    lost: int = 0
    duplicated: int = 0
    stuck: int = 0
    trouble: list[str] = field(default_factory=list)
    """What was found of each series that is not as it should be, with its timeline."""

    @property
    def clean(self) -> bool:
        return (self.lost, self.duplicated, self.stuck) == (0, 0, 0)

    def __str__(self) -> str:
        kills = ", ".join(f"{number} {what}" for what, number in sorted(self.kills.items()))
        return (
            f"{sum(self.kills.values())} kills ({kills}); {len(self.series)} series of {SLICES}:"
            f" acknowledged and lost {self.lost}, duplicated {self.duplicated}, stuck {self.stuck}"
            + "".join(f"\n{line}" for line in self.trouble)
        )


class Campaign:
    """One node, one Orthanc, four senders and a killer."""

    def __init__(self, node: Node, archive: Archive, folder: Path, kills: int, seed: int) -> None:
        self._node, self._archive, self._folder = node, archive, folder
        self._kills, self._random = kills, random.Random(seed)
        self._over = threading.Event()
        self._lock = threading.Lock()
        self.tally = Tally()

    def run(self) -> Tally:
        """Kill and send, then count."""
        senders = [threading.Thread(target=self._send, args=(n,)) for n in range(SENDERS)]
        for thread in senders:
            thread.start()
        try:
            self._kill()
        finally:
            self._over.set()
            for thread in senders:
                thread.join()
        self._count()
        return self.tally

    def _send(self, number: int) -> None:
        for turn in range(10**6):
            if self._over.is_set():
                return
            seed = 10_000 * number + turn % (SERIES_PER_KILL * self._kills)
            files = sorted(
                write_series(ct_series(SLICES, 48, 48, seed=seed), self._folder / f"sender{number}")
            )
            while send(STORESCU, files, self._node.port).returncode != 0:
                time.sleep(0.3)  # a modality's pause before it tries again
            headers = [dcmread(path, stop_before_pixels=True) for path in files]
            with self._lock:
                uids = {str(header.SOPInstanceUID) for header in headers}
                self.tally.series[str(headers[0].SeriesInstanceUID)] = uids

    def _kill(self) -> None:
        while sum(self.tally.kills.values()) < self._kills:
            time.sleep(self._random.uniform(0.2, 2.5))  # the moment is the experiment
            victims = self._node.children()
            what, pid = self._random.choice([("tree", 0), ("node", self._node.pid), *victims])
            if what == "tree":
                self._node.kill()
            else:
                self._node.kill_one(pid)
            self.tally.kills[what] += 1
            if what in ("tree", "node"):
                self._node.kill()  # children of a killed node see that it is gone, in their time
                self._node.start()

    def _settle(self) -> None:
        """Wait until nothing is under way, as long as something still happens."""
        seen, since = None, time.monotonic()
        while time.monotonic() - since < STANDSTILL_SECONDS:
            status, found = self._node.get("api/v1/status")
            jobs, series = (found["jobs"], found["series"]) if status == 200 else ({}, {"open": 1})
            under_way = sum(jobs.get(state, 0) for state in ("queued", "translating", "sending"))
            if not under_way and not series.get("open"):
                return
            if found != seen:
                seen, since = found, time.monotonic()
            time.sleep(1.0)  # a look at a node that works

    def _count(self) -> None:
        self._settle()
        made = Counter[str]()
        whole: dict[str, set[str]] = {}
        for uid, instances in self.tally.series.items():
            try:
                self._node.wait_settled(uid, 5)
            except AssertionError:
                self.tally.stuck += 1
                self._tell("not settled", uid)
            kept = self._node.folder / "data" / "received" / uid
            if gone := instances - {path.stem for path in kept.glob("*.dcm")}:
                self.tally.lost += len(gone)
                self._tell(f"{len(gone)} lost", uid)
        for series in self._archive.derived_series():
            folder = self._folder / "derived" / series["ID"]
            sources = {
                str(dcmread(p, stop_before_pixels=True).SourceImageSequence[0][0x00081155].value)
                for p in self._archive.fetch(series, folder)
            }
            for uid, instances in self.tally.series.items():
                if sources & instances:
                    made[uid] += 1
                    whole[uid] = sources
        for uid, instances in self.tally.series.items():
            if made[uid] > 1:
                self.tally.duplicated += made[uid] - 1
                self._tell(f"{made[uid]} derived series at Orthanc", uid)
            if whole.get(uid) != instances:
                self.tally.stuck += 1
                self._tell(f"of {len(whole.get(uid, ()))} instances at Orthanc", uid)

    def _tell(self, what: str, series_uid: str) -> None:
        """Keep the node's own words of a series, for whoever reads why a campaign failed."""
        words = json.dumps(self._node.get(f"api/v1/series/{series_uid}")[1], indent=1)
        self.tally.trouble.append(f"series {series_uid}, {what}: {words}")


def campaign(folder: Path, kills: int, seed: int) -> Tally:
    """Run a campaign in `folder`."""
    identity_package(folder / "models")
    with orthanc(folder / "orthanc") as archive:
        settings = node_settings(
            folder / "models", [archive], quiet_seconds=4, hold_incomplete_seconds=90
        )
        node = Node(folder / "node", settings)
        try:
            return Campaign(node.start(), archive, folder, kills, seed).run()
        finally:
            node.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tally = campaign(Path(folder), options.kills, options.seed)
    print(f"{tally}; seed {options.seed}, {time.monotonic() - began:.0f} s")
    return 0 if tally.clean else 1


if __name__ == "__main__":
    sys.exit(main())
