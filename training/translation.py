"""How a translation does on held-out patients, in the unit of its target."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from dicomnode.imaging.inference import Model
from dicomnode.imaging.intensity import Intensity, Window
from dicomnode.imaging.networks import Generator, pad_to_multiple
from dicomnode.imaging.percentiles import Percentiles
from training.config import Images, TrainConfig
from training.errors import TrainingError
from training.pairs import Found, Plane

Translator = Callable[[Plane], NDArray[np.float32]]
_COMPARED = 4096
"""Values per slice whose distribution is compared."""


@dataclass(frozen=True, slots=True)
class PlaneFigures:
    """One slice: name -> value; a patient's are averaged first."""

    patient: str
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class TranslationFigures:
    """All slices of a part."""

    planes: tuple[PlaneFigures, ...]

    def by_patient(self) -> dict[str, dict[str, float]]:
        """Patient -> name -> mean over slices."""
        result = {}
        for patient in sorted({plane.patient for plane in self.planes}):
            own = [plane.values for plane in self.planes if plane.patient == patient]
            names = own[0].keys()
            result[patient] = {name: float(np.mean([v[name] for v in own])) for name in names}
        return result

    def means(self) -> dict[str, float]:
        """Name -> mean over patients."""
        patients = list(self.by_patient().values())
        return {name: float(np.mean([p[name] for p in patients])) for name in patients[0]}


def fixed(intensity: Intensity | Percentiles) -> Intensity:
    """An intensity that is the same for every volume.

    Raises:
        TrainingError: it is of percentiles; there is no way back from a network's result.
    """
    if isinstance(intensity, Percentiles):
        raise TrainingError("a result needs a fixed window; percentiles have no inverse")
    return intensity


def translator(generator: Generator, config: TrainConfig, data: Images) -> Translator:
    """A generator as a function of one source slice: (rows, columns), float32, target's unit."""
    scale = fixed(data.target.intensity)
    mode = config.publish.padding if config.publish is not None else "reflect"
    device = next((weight.device for weight in generator.parameters()), torch.device("cpu"))

    @torch.inference_mode()
    def apply(plane: Plane) -> NDArray[np.float32]:
        rows, columns = plane.physical.shape
        wide = pad_to_multiple(plane.network[None], generator.multiple, mode)
        made = (
            generator.eval()(torch.from_numpy(wide).to(device))[0, 0, :rows, :columns]
            .float()
            .cpu()
            .numpy()
        )
        if config.residual:
            result: NDArray[np.float32] = plane.physical + made * np.float32(scale.unit_per_network)
            return result
        return scale.from_network(made)

    return apply


def translator_of(model: Model, config: TrainConfig, data: Images) -> Translator:
    """A package as a function of one source slice, like `translator`.

    Raises:
        TrainingError: it is made for other intensities or slices than the config gives.
    """
    manifest = model.package.manifest
    for name, own, wanted in (
        ("input.intensity", manifest.input.intensity, data.source.intensity),
        ("input.slices", manifest.input.slices, data.slices),
        ("input.equalised", manifest.input.equalised, data.equalised),
        ("output.intensity", manifest.output.intensity, data.target.intensity),
    ):
        if own != wanted:
            raise TrainingError(f"{model.package.name}: its {name} is not that of the config")
    residual = manifest.output.residual
    return translator(model.generator, replace(config, residual=residual), data)


def evaluate_planes(
    apply: Translator, found: Found, patients: Sequence[str], data: Images
) -> TranslationFigures:
    """Every slice of `patients`: errors where both show one place, else how values are spread."""
    planes = [
        _paired(apply(source), target, data.target.intensity)
        for source, target in zip(found.sources, found.targets, strict=data.paired)
        if data.paired and source.patient in patients
    ]
    if not data.paired:
        wanted = pooled_values([plane for plane in found.targets if plane.patient in patients])
        planes = [
            _unpaired(plane, apply(plane), wanted)
            for plane in found.sources
            if plane.patient in patients
        ]
    return TranslationFigures(tuple(planes))


def _paired(
    result: NDArray[np.float32], target: Plane, intensity: Intensity | Percentiles
) -> PlaneFigures:
    error = (result - target.physical)[target.body].astype(np.float64)
    mean_square = float(np.mean(error**2))
    peak = _width(intensity, target.physical)
    return PlaneFigures(
        target.patient,
        {
            "mae": float(np.mean(np.abs(error))),
            "bias": float(np.mean(error)),
            "psnr_db": float(10 * np.log10(peak**2 / max(mean_square, 1e-12))),
        },
    )


def _unpaired(
    source: Plane, result: NDArray[np.float32], wanted: NDArray[np.float32]
) -> PlaneFigures:
    """Mean distance of sorted values (first Wasserstein) to those of the other kind's images."""
    made = np.sort(result[source.body])
    ranks = np.linspace(0, 1, _COMPARED)
    distance = np.abs(np.quantile(made, ranks) - np.quantile(wanted, ranks)).mean()
    return PlaneFigures(source.patient, {"histogram_distance": float(distance)})


def pooled_values(planes: Sequence[Plane]) -> NDArray[np.float32]:
    """Values inside the bodies of all of them, evenly chosen by rank, in their unit; (values,).

    Raises:
        TrainingError: there is no plane.
    """
    if not planes:
        raise TrainingError("data: no target slice among the patients to judge")
    parts = [
        np.sort(plane.physical[plane.body])[:: max(1, plane.body.sum() // _COMPARED)]
        for plane in planes
    ]
    return np.concatenate(parts)


def _width(intensity: Intensity | Percentiles, truth: NDArray[np.float32]) -> float:
    """Range of values that the peak of a PSNR stands for, in the unit: the window's width."""
    if isinstance(intensity, Window):
        return intensity.high - intensity.low
    return float(truth.max() - truth.min()) or 1.0
