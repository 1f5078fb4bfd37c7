"""A blinded reader study: cases, the order of its questions, and its answers on disk.

A case is a folder with `real` and `synthetic`, each an image file (PNG, NIfTI, MetaImage, DICOM) or
a folder with one DICOM series, of equal size. A reader gets three questions per case: whether
the real image alone is real and how free of artefacts it is, the same of the synthetic one, and how
similar the two are side by side. Order and sides are drawn for each reader from the study's seed.
"""

import csv
import hashlib
import hmac
import io
import os
import random
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dicomnode.imaging.units import Unit
from training.errors import TrainingError
from training.images import read_image, voxels_of

Kind = Literal["single", "pair"]
SIMILARITY = ("very different", "different", "neutral", "similar", "very similar")
ARTEFACTS = ("none", "some, reading not impaired", "reading impaired")
NATURES = ("real", "synthetic")
_SUFFIXES = (".png", ".nii.gz", ".nii", ".mha", ".nrrd", ".dcm")


@dataclass(frozen=True, slots=True)
class Question:
    """One screen.

    Attributes:
        key: names it in the answers; says nothing of what is shown.
        shown: of a single question the image shown; of a pair those on the left and on the right.
    """

    key: str
    kind: Kind
    case: str
    shown: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """One line of answers.csv.

    Attributes:
        shown: what was shown, from left to right, for example ``real`` or ``synthetic real``.
        nature: single questions: real or synthetic, as the reader holds it; else empty.
        artefacts: single questions: 1 (none) to 3; else 0.
        similarity: pairs: 1 (very different) to 5; else 0.
        seconds: from the screen to the answer.
    """

    reader: str
    key: str
    kind: str
    case: str
    shown: str
    nature: str
    artefacts: int
    similarity: int
    seconds: float


class Study:
    """The cases of a folder, and the answers given to them in `answers`."""

    def __init__(
        self,
        folder: Path,
        answers: Path,
        *,
        seed: int = 1,
        unit: Unit = "HU",
        window: tuple[float, float] | None = None,
    ) -> None:
        """Find the cases.

        Args:
            answers: CSV file, made if it is not there.
            window: grey 0 and 255 in `unit`; None: 1st and 99th percentile of the real image.

        Raises:
            TrainingError: no case, or one without `real` or `synthetic`.
        """
        self.folder, self.seed, self._unit, self._window = folder, seed, unit, window
        self._log = AnswerLog(answers)
        self.cases = {path.name: _images_of(path) for path in sorted(folder.glob("*/"))}
        if not self.cases:
            raise TrainingError(f"{folder}: no cases; want CASE/real and CASE/synthetic in it")
        self._planes: dict[str, dict[str, NDArray[np.uint8]]] = {}
        self._lock = threading.Lock()

    def questions(self, reader: str) -> list[Question]:
        """All questions in this reader's order: single images first, pairs afterwards.

        A side-by-side view would give away which image is which, so it comes last.
        """
        rng = random.Random(f"{self.seed} {reader}")  # noqa: S311  # an order, not a secret
        singles: list[tuple[str, tuple[str, ...]]]
        singles = [(case, (nature,)) for case in self.cases for nature in NATURES]
        pairs = [(case, tuple(rng.sample(NATURES, 2))) for case in self.cases]
        rng.shuffle(singles)
        rng.shuffle(pairs)
        ordered: list[tuple[Kind, str, tuple[str, ...]]]
        ordered = [("single", *single) for single in singles] + [("pair", *pair) for pair in pairs]
        return [
            Question(self._key(reader, kind, case, shown), kind, case, shown)
            for kind, case, shown in ordered
        ]

    def open_questions(self, reader: str) -> list[Question]:
        """Those that this reader has not answered yet."""
        done = {answer.key for answer in self._log.read() if answer.reader == reader}
        return [question for question in self.questions(reader) if question.key not in done]

    def give(
        self,
        reader: str,
        key: str,
        *,
        nature: str = "",
        artefacts: int = 0,
        similarity: int = 0,
        seconds: float = 0.0,
    ) -> None:
        """Record an answer, durably; the same question again changes nothing.

        Raises:
            TrainingError: no such question of this reader, or an answer that does not fit it.
        """
        question = next((q for q in self.questions(reader) if q.key == key), None)
        if question is None:
            raise TrainingError("no such question")
        single = question.kind == "single"
        fits = (
            nature in NATURES and 1 <= artefacts <= len(ARTEFACTS) and not similarity
            if single
            else 1 <= similarity <= len(SIMILARITY) and not nature and not artefacts
        )
        if not fits:
            raise TrainingError("the answer does not fit the question")
        with self._lock:
            if key in {answer.key for answer in self._log.read() if answer.reader == reader}:
                return
            shown = " ".join(question.shown)
            self._log.append(
                Answer(
                    reader,
                    key,
                    question.kind,
                    question.case,
                    shown,
                    nature,
                    artefacts,
                    similarity,
                    round(seconds, 3),
                )
            )

    def planes(self, question: Question, side: int) -> NDArray[np.uint8]:
        """(slices, rows, columns), uint8: one image of a question, in the same window as its twin.

        Raises:
            TrainingError: it cannot be read, or real and synthetic differ in size.
        """
        with self._lock:
            if question.case not in self._planes:
                self._planes = {question.case: self._grey(question.case)}  # one case at a time
            return self._planes[question.case][question.shown[side]]

    def _grey(self, case: str) -> dict[str, NDArray[np.uint8]]:
        eight_bit = (0.0, 255.0)
        images = {
            nature: voxels_of(read_image(path, self._unit, eight_bit))
            for nature, path in self.cases[case].items()
        }
        if len({image.shape for image in images.values()}) > 1:
            raise TrainingError(f"{case}: real and synthetic have different sizes")
        low, high = self._window or tuple(np.percentile(images["real"], (1, 99)))
        width = max(float(high) - float(low), 1e-6)
        return {
            nature: np.asarray(np.clip((image - low) / width, 0, 1) * 255, np.uint8)
            for nature, image in images.items()
        }

    def _key(self, reader: str, kind: str, case: str, shown: tuple[str, ...]) -> str:
        words = f"{reader}|{kind}|{case}|{shown}".encode()
        return hmac.new(str(self.seed).encode(), words, hashlib.sha256).hexdigest()[:16]


class AnswerLog:
    """answers.csv: one line per answer, on disk before the next question is shown."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Answer]:
        """All whole lines; a last one that a crash cut off does not count.

        Raises:
            TrainingError: it is another file.
        """
        return list(self._lines()) if self.path.exists() else []

    def append(self, answer: Answer) -> None:
        """Write one line and wait until it is on disk."""
        names = [field.name for field in fields(Answer)]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        with self.path.open("r+", newline="", encoding="utf-8") as stream:
            whole = _whole_lines(stream.read())
            stream.seek(0)
            stream.truncate(len(whole.encode()))
            stream.seek(0, os.SEEK_END)
            writer = csv.DictWriter(stream, names, lineterminator="\n")
            if not whole:
                writer.writeheader()
            writer.writerow(asdict(answer))
            stream.flush()
            os.fsync(stream.fileno())

    def _lines(self) -> Iterator[Answer]:
        names = [field.name for field in fields(Answer)]
        with self.path.open(newline="", encoding="utf-8") as stream:
            text = _whole_lines(stream.read())
        rows = csv.DictReader(io.StringIO(text, newline=""))
        if text and list(rows.fieldnames or []) != names:
            raise TrainingError(f"{self.path}: not the answers of a reader study")
        for row in rows:
            if None in row.values() or None in row:
                raise TrainingError(f"{self.path}: line {rows.line_num} is not an answer")
            try:
                numbers = int(row["artefacts"]), int(row["similarity"]), float(row["seconds"])
            except ValueError as error:
                raise TrainingError(
                    f"{self.path}: line {rows.line_num} is not an answer"
                ) from error
            reader, key, kind, case, shown, nature = (row[name] for name in names[:6])
            yield Answer(reader, key, kind, case, shown, nature, *numbers)


def _whole_lines(text: str) -> str:
    """Without a last line that a crash cut off."""
    return text[: text.rfind("\n") + 1]


def _images_of(case: Path) -> dict[str, Path]:
    found = {}
    for nature in NATURES:
        paths = [path for path in sorted(case.glob(f"{nature}*")) if _is_image(path, nature)]
        if len(paths) != 1:
            raise TrainingError(f"{case}: {len(paths)} images named {nature}; want one")
        found[nature] = paths[0]
    return found


def _is_image(path: Path, nature: str) -> bool:
    return (path.name == nature and path.is_dir()) or path.name in {nature + s for s in _SUFFIXES}
