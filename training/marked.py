"""Pixels whose errors count more, because a label image says what they are (a lesion)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from training.errors import TrainingError


@dataclass(frozen=True, slots=True)
class Marked:
    """What a label image beside each target says of its pixels."""

    file: str
    """Its name, in the folder of the target; it lies on the target's lattice."""
    labels: tuple[int, ...]
    """Its values that mark."""
    weight: float
    """What the error of a marked pixel counts; of others 1."""

    def problem(self, two_ways: bool, spacing_mm: float | None) -> str | None:
        """Why the settings cannot be; None: they can. `two_ways`: the recipe knows no truth."""
        if two_ways:
            return "this recipe has no truth to weigh errors by"
        if spacing_mm is not None:
            return "not with data.spacing_mm: labels are not resampled"
        if Path(self.file).name != self.file or not self.labels or self.weight <= 0:
            return "want a file's name without folders, one label or more, and a weight above 0"
        return None

    def beside(self, target: Path, shape: tuple[int, ...]) -> NDArray[np.bool_]:
        """(slices, rows, columns), bool: which voxels of the image `target` are marked.

        Raises:
            TrainingError: there is no such label image, it cannot be read, or has another shape.
        """
        path = target.parent / self.file
        try:
            labels = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
        except RuntimeError as error:
            raise TrainingError(f"data.marked: {path}: is missing or cannot be read") from error
        if labels.shape != shape:
            raise TrainingError(
                f"data.marked: {path}: {labels.shape} voxels; its target has {shape}"
            )
        return np.isin(labels, self.labels)

    def weight_of(self, share: NDArray[np.float32]) -> NDArray[np.float32]:
        """Share of a pixel that is marked, 0 to 1, any shape -> its weight, same shape, float32."""
        return 1 + np.float32(self.weight - 1) * np.clip(share, 0, 1)
