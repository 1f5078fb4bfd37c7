"""Pictures in folders named by their class: read, cleaned of leaks, kept together, drawn.

Public collections of this kind give grey pictures without patient, window or pixel size. So:
the same picture twice is one, one that lies in folders of two classes is none, and pictures so
alike that they may be of one patient (neighbouring slices, copies) are never parted.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from scipy.sparse.csgraph import connected_components
from torch.nn import functional as F

from dicomnode.imaging.networks import as_squares
from training.config import Classes
from training.errors import TrainingError
from training.recipes import Batch

_THUMBNAIL = 32
_AREA = Image.Resampling.BOX
_NEIGHBOURS = 5
PLAINLY_FOUND, PLAINLY_SURE = 0.6, 0.75
"""A class of which more is found from plain features, and more surely, is warned of."""


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """One picture.

    Attributes:
        grey: (rows, columns), float32, 0 to 255.
        label: number of its class.
        group: hash of the first picture of those it is kept together with.
    """

    grey: NDArray[np.float32]
    label: int
    group: str


@dataclass(frozen=True, slots=True)
class Pictures:
    """All of them; what was left out, by reason; what a reader of any figure must know."""

    pictures: list[Picture]
    left_out: dict[str, int]
    warnings: tuple[str, ...]


def find_pictures(data: Classes) -> Pictures:
    """Read every picture of every class.

    Raises:
        TrainingError: a class has no picture, or a file is none.
    """
    found: dict[str, list[tuple[int, NDArray[np.float32]]]] = defaultdict(list)
    for label, one in enumerate(data.classes):
        files = sorted(p for pattern in one.files for p in Path(data.root).glob(pattern))
        if not files:
            raise TrainingError(f"data.classes[{label}]: no file {', '.join(one.files)}")
        for path in files:
            grey = _read(path)
            key = hashlib.sha256(f"{grey.shape}".encode() + grey.tobytes()).hexdigest()
            found[key].append((label, grey))
    left_out: Counter[str] = Counter()
    kept: dict[str, tuple[int, NDArray[np.float32]]] = {}
    for key, copies in sorted(found.items()):
        if len({label for label, _ in copies}) > 1:
            left_out["the same picture in folders of two classes"] += len(copies)
            continue
        left_out["the same picture again"] += len(copies) - 1
        kept[key] = copies[0]
    groups = _alike([grey for _, grey in kept.values()], list(kept), data.alike_above)
    pictures = [
        Picture(grey, label, group)
        for (label, grey), group in zip(kept.values(), groups, strict=True)
    ]
    return Pictures(pictures, {k: n for k, n in left_out.items() if n}, _warnings(pictures, data))


def _read(path: Path) -> NDArray[np.float32]:
    """(rows, columns), float32, 0 to 255."""
    try:
        with Image.open(path) as picture:
            if picture.mode not in ("L", "RGB", "RGBA", "P"):
                raise TrainingError(f"{path}: a picture of mode {picture.mode}; want 8-bit grey")
            return np.asarray(picture.convert("L"), np.float32)
    except (OSError, ValueError, UnidentifiedImageError) as error:
        raise TrainingError(f"{path}: cannot be read: {type(error).__name__}") from error


def _alike(greys: Sequence[NDArray[np.float32]], names: Sequence[str], above: float) -> list[str]:
    """For each picture the name of the first of its group.

    Two are of one group if thumbnails of them correlate by more than `above`, or if both are of
    one group with a third.
    """
    thumbnails = np.stack([_thumbnail(grey) for grey in greys])
    _, group = connected_components(thumbnails @ thumbnails.T > above, directed=False)
    first = np.unique(group, return_index=True)[1]
    return [names[first[number]][:12] for number in group]


def _thumbnail(grey: NDArray[np.float32]) -> NDArray[np.float32]:
    """(1024,), float32, of mean 0 and length 1."""
    small = Image.fromarray(grey.astype(np.uint8)).resize((_THUMBNAIL, _THUMBNAIL), _AREA)
    flat = np.asarray(small, np.float32).ravel()
    flat = flat - flat.mean()
    result: NDArray[np.float32] = flat / max(float(np.linalg.norm(flat)), 1e-6)
    return result


def plain_features(grey: NDArray[np.float32]) -> NDArray[np.float64]:
    """What a picture is like without looking at anatomy: size, shape, brightness, black and white.

    (6,), float64.
    """
    rows, columns = grey.shape
    black, white = float((grey < 8).mean()), float((grey > 247).mean())
    return np.array([rows, columns, grey.mean(), grey.std(), black, white], np.float64)


def plainly_known(train: Sequence[Picture], other: Sequence[Picture]) -> NDArray[np.intp]:
    """The class of each picture of `other` as its nearest of `train` in plain features have it."""
    known = np.stack([plain_features(picture.grey) for picture in train])
    asked = np.stack([plain_features(picture.grey) for picture in other])
    mean, spread = known.mean(0), known.std(0) + 1e-9
    known, asked = (known - mean) / spread, (asked - mean) / spread
    labels = np.array([picture.label for picture in train])
    distance = ((asked[:, None] - known[None]) ** 2).sum(2)
    nearest = np.argsort(distance, axis=1, kind="stable")[:, :_NEIGHBOURS]
    return np.array([np.bincount(labels[row]).argmax() for row in nearest], np.intp)


def _warnings(pictures: Sequence[Picture], data: Classes) -> tuple[str, ...]:
    said = ["no patient ids: pictures that look alike are kept together, which need not be enough"]
    groups = sorted({picture.group for picture in pictures})
    side = {group: index % 2 for index, group in enumerate(groups)}
    halves = [[p for p in pictures if side[p.group] == half] for half in (0, 1)]
    if not all(halves):
        return tuple(said)
    guessed = np.concatenate([plainly_known(halves[1 - half], halves[half]) for half in (0, 1)])
    truth = np.array([picture.label for half in halves for picture in half])
    for label, one in enumerate(data.classes):
        right = float(((guessed == label) & (truth == label)).sum())
        found = right / max(1, int((truth == label).sum()))
        sure = right / max(1, int((guessed == label).sum()))
        if found > PLAINLY_FOUND and sure > PLAINLY_SURE:
            said.append(
                f"class {one.name}: {found:.0%} of its pictures are found by size and brightness "
                f"alone, and {sure:.0%} of those so found are of it: a network can know it without "
                "looking at anatomy"
            )
    return tuple(said)


def as_network_sees(picture: Picture, matrix: int) -> torch.Tensor:
    """(1, matrix, matrix), float32, in [-1, 1]."""
    grey = torch.from_numpy(picture.grey)[None] / 127.5 - 1.0
    return as_squares(grey, matrix)[0]


def draw_batch(
    seen: torch.Tensor,
    labels: NDArray[np.intp],
    data: Classes,
    size: int,
    rng: np.random.Generator,
) -> Batch:
    """Pictures of a step, each class as often as the others on average.

    Args:
        seen: (pictures, 1, matrix, matrix), as from `as_network_sees`.
        labels: (pictures,), the class of each.

    Returns:
        source (size, 1, matrix, matrix); target (size,), int64; weight (size,), all 1.
    """
    wanted = rng.integers(len(data.classes), size=size)
    index = np.array([rng.choice(np.flatnonzero(labels == label)) for label in wanted])
    source = torch.stack([_varied(seen[number], data, rng) for number in index])
    return Batch(source, torch.from_numpy(labels[index].astype(np.int64)), torch.ones(size))


def _varied(x: torch.Tensor, data: Classes, rng: np.random.Generator) -> torch.Tensor:
    """Mirrored, shifted, brighter or darker, at random; (1, matrix, matrix) in [-1, 1]."""
    if data.mirror and rng.random() < 0.5:
        x = x.flip(-1)
    down, right = rng.integers(0, 2 * data.shift + 1, size=2)
    wide = F.pad(x, [data.shift] * 4, value=-1.0)
    x = wide[:, down : down + x.shape[1], right : right + x.shape[2]]
    low, high = 1 - data.brightness, 1 + data.brightness
    gain, offset = rng.uniform(low, high), rng.uniform(-data.brightness, data.brightness)
    return (x * gain + offset).clamp(-1.0, 1.0)
