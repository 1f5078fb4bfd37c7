"""Draw the curves of runs: losses on the left, validation on the right; no image of anyone.

python training/curves.py OUT.svg runs/NAME/losses.csv ...
"""

import csv
import json
import math
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from dicomnode.errors import DicomNodeError
from training.errors import TrainingError

Curve = Sequence[tuple[float, float]]
WIDTH, HEIGHT, LEFT, TOP, GAP = 320, 130, 46, 24, 34
COLOURS = ("#1b6ca8", "#c1521b", "#2f7d4f", "#7b4ea3", "#8a6d00", "#444444")
FIGURES = ("mae", "gain_db", "histogram_distance", "accuracy")
"""What is drawn of a validation: the first of these that it has."""


def main(argv: Sequence[str]) -> None:
    if len(argv) < 2:
        raise TrainingError("want OUT.svg and one or more losses.csv")
    Path(argv[0]).write_text(drawing([Path(word) for word in argv[1:]]), "utf-8")


def drawing(runs: Sequence[Path]) -> str:
    """An SVG with a row for each run.

    Raises:
        TrainingError: a run has no curve yet.
    """
    rows = []
    for index, path in enumerate(runs):
        down = index * (HEIGHT + TOP + GAP)
        losses, figures = losses_of(path), figures_of(path.parent / "log.jsonl")
        title = f"{path.parent.name}: losses, logarithmic"
        rows.append(_panel(LEFT, down + TOP, title, losses, logarithmic=True))
        title = f"validation: {', '.join(figures)}"
        rows.append(_panel(2 * LEFT + WIDTH + 30, down + TOP, title, figures, logarithmic=False))
    size = f'width="{2 * (LEFT + WIDTH) + 60}" height="{len(runs) * (HEIGHT + TOP + GAP)}"'
    style = "<style>text{font:10px sans-serif}polyline{fill:none;stroke-width:1.3}</style>"
    back = '<rect width="100%" height="100%" fill="white"/>'
    body = "\n".join(rows)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{style}{back}\n{body}\n</svg>\n'


def losses_of(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Name -> (step, value) of a losses.csv.

    Raises:
        TrainingError: it is not there or has no row.
    """
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
    except OSError as error:
        raise TrainingError(f"{path}: no losses there ({type(error).__name__})") from error
    if not rows:
        raise TrainingError(f"{path}: no losses yet")
    names = [name for name in rows[0] if name != "step"]
    return {name: [(float(row["step"]), float(row[name])) for row in rows] for name in names}


def figures_of(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Name -> (step, value) of the figure of a log.jsonl that is worth a curve."""
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    for name in FIGURES:
        if lines and name in lines[0]:
            return {name: [(line["step"], line[name]) for line in lines]}
    return {}


def _panel(x: int, y: int, title: str, curves: Mapping[str, Curve], *, logarithmic: bool) -> str:
    """Axes, one line per curve, its name below."""
    drawn = {
        name: [(at, math.log10(value) if logarithmic else value) for at, value in curve
               if math.isfinite(value) and (value > 0 or not logarithmic)]
        for name, curve in curves.items()
    }  # fmt: skip
    points = [point for curve in drawn.values() for point in curve]
    frame = f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#bbb"/>'
    head = f'<text x="{x}" y="{y - 8}">{escape(title)}</text>'
    if not points:
        return frame + head
    last = max(at for at, _ in points)
    low, high = min(value for _, value in points), max(value for _, value in points)
    scale = HEIGHT / ((high - low) or 1.0)
    parts = [frame, head]
    for value, down in ((high, 8), (low, HEIGHT)):
        shown = 10**value if logarithmic else value
        parts.append(f'<text x="{x - 4}" y="{y + down}" text-anchor="end">{shown:.3g}</text>')
    parts.append(f'<text x="{x + WIDTH}" y="{y - 8}" text-anchor="end">{last:.0f} steps</text>')
    for index, (name, curve) in enumerate(drawn.items()):
        colour = COLOURS[index % len(COLOURS)]
        line = " ".join(
            f"{x + WIDTH * at / last:.1f},{y + (high - value) * scale:.1f}" for at, value in curve
        )
        parts.append(f'<polyline points="{line}" stroke="{colour}"/>')
        place = f'x="{x + index * WIDTH // len(drawn)}" y="{y + HEIGHT + 12}" fill="{colour}"'
        parts.append(f"<text {place}>{escape(name.replace('discriminator', 'D'))}</text>")
    return "\n".join(parts)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DicomNodeError as error:
        raise SystemExit(str(error)) from None
