"""What a run leaves in its folder: settings, losses, validations, pictures.

run.yaml        the settings as they were, the git commit and the SHA-256 of the data
losses.csv      the losses every `log_every` steps
log.jsonl       one line per validation
pictures/       one PNG per validation: source | result | truth | error
events.out.tfevents.*   the same for TensorBoard
"""

import csv
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image

from training.tensorboard import EventFile

GIT = "/usr/bin/git"


class Records:
    """Of the run in `out`; made when it begins or goes on at `step`."""

    def __init__(self, out: Path, settings: Mapping[str, Any], data_digest: str, step: int) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.losses, self.log = out, out / "losses.csv", out / "log.jsonl"
        about = {
            "git_commit": git_commit(),
            "data_sha256": data_digest,
            "torch": str(torch.__version__),
            "settings": dict(settings),
        }
        (out / "run.yaml").write_text(yaml.safe_dump(about, sort_keys=False), "utf-8")
        self._forget_after(step)
        self.events = EventFile(out)

    def step(self, step: int, losses: Mapping[str, float]) -> None:
        """A row of losses.csv."""
        new = not self.losses.exists()
        with self.losses.open("a", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream)
            if new:
                writer.writerow(["step", *losses])
            writer.writerow([step, *(f"{value:.6g}" for value in losses.values())])
        self.events.scalars({f"loss/{name}": value for name, value in losses.items()}, step)

    def validation(self, line: Mapping[str, float], figures: Mapping[str, float]) -> None:
        """A line of log.jsonl; `figures` are also drawn."""
        with self.log.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        named = {f"validation/{name}": value for name, value in figures.items()}
        self.events.scalars(named, int(line["step"]))

    def picture(self, pixels: NDArray[np.uint8], step: int) -> None:
        """(rows, columns), uint8."""
        folder = self.out / "pictures"
        folder.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / f"step-{step:07d}.png")
        self.events.picture("validation", pixels, step)

    def _forget_after(self, step: int) -> None:
        """Lines of steps that a crash undid, or cut short."""
        if self.losses.exists():
            head, *rows = self.losses.read_text("utf-8").splitlines()
            kept = [row for row in rows if row.count(",") and int(row.split(",")[0]) <= step]
            self.losses.write_text("\n".join([head, *kept]) + "\n", "utf-8")
        if self.log.exists():
            lines = self.log.read_text("utf-8").splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("}\n")]
            kept = [line for line in whole if json.loads(line)["step"] <= step]
            self.log.write_text("".join(kept), "utf-8")


def git_commit() -> str:
    """The commit of this code, with + where files differ from it; unknown outside a checkout."""
    root = Path(__file__).parents[1]
    try:
        commit = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+" if changed else "")


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(  # noqa: S603  # fixed words
        [GIT, "-C", str(root), *words], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()
