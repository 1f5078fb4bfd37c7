"""`tests.fuzz.receiver` as a process of its own, whose memory, threads and CPU can be read."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz import wire
from tests.fuzz.wire import Wire
from tests.peers import ROOT, wait_for

ARTIM_SECONDS = 3


@dataclass
class Receiver:
    """`tests.fuzz.receiver` as a process."""

    port: int
    pid: int
    folder: Path

    def alive(self, seconds: float = 2.0) -> float:
        """Seconds that association, echo and release took; fails beyond `seconds`."""
        start = time.perf_counter()
        with Wire(self.port, seconds) as peer:
            peer.associate()
            assert peer.echo() == 0
            assert peer.ask(wire.RELEASE_RQ_PDU)[0] == wire.RELEASE_RP
        took = time.perf_counter() - start
        assert took < seconds
        return took

    def status(self, key: str) -> int:
        """A number of /proc/<pid>/status: VmRSS in kB, Threads."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1])
        raise KeyError(key)

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def threads_are_back(self, before: int, seconds: float = 2 * ARTIM_SECONDS + 2) -> None:
        wait_for(lambda: self.status("Threads") <= before, "the threads to end", seconds)

    @contextlib.contextmanager
    def unharmed(self) -> Iterator[None]:
        """What happens inside leaves it answering, and its threads, files and memory as before."""
        before = self.status("Threads"), self.status("VmRSS"), self.descriptors
        yield
        self.alive()
        self.threads_are_back(before[0])
        wait_for(lambda: self.descriptors <= before[2], "the descriptors to be closed", 5)
        grown = self.status("VmRSS") - before[1]
        print(f"memory moved by {grown} kB")
        assert grown < 16_384
        assert not list((self.folder / "incoming").iterdir())


@contextlib.contextmanager
def running(folder: Path, *options: str) -> Iterator[Receiver]:
    """A receiver that keeps what it gets in `folder`, warmed up."""
    command = [sys.executable, "-m", "tests.fuzz.receiver", str(folder), *options]
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(
            [*command, "--artim", str(ARTIM_SECONDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=ROOT,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        port, pid = map(int, process.stdout.readline().split())
        receiver = Receiver(port, pid, folder)
        for _ in range(20):  # allocators
            receiver.alive()
        yield receiver
        process.stdin.close()
        assert process.wait(20) == 0
    assert "Traceback" not in (folder / "log").read_text(errors="replace")
