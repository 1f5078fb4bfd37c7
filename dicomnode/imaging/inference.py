"""Run a model package over a volume."""

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file

from dicomnode.errors import PackageError
from dicomnode.imaging.networks import Generator, build_generator, run_generator
from dicomnode.imaging.package import ModelPackage, read_golden
from dicomnode.imaging.volume import Volume


class Model:
    """A package ready to run on one device; made by `load_model`, used by `predict`."""

    def __init__(
        self, package: ModelPackage, generator: Generator, device: str, precision: str
    ) -> None:
        self.package = package
        self.generator = generator
        self.device = device
        self.precision = precision


def load_model(package: ModelPackage, device: str = "cpu") -> Model:
    """Build the generator, load its weights and run the package's self-test on `device`.

    Raises:
        PackageError: the weights do not fit the generator, the device cannot be used, or the
            result of the golden input is out of tolerance.
    """
    spec = package.manifest.generator
    generator = build_generator(spec.architecture, spec.options)
    try:
        generator.load_state_dict(load_file(package.path / "weights.safetensors"), strict=True)
        generator.to(device).eval()
    except (OSError, RuntimeError, SafetensorError) as error:
        raise PackageError(f"{package.name}: cannot load on {device}: {error}") from error
    model = Model(package, generator, device, precision="fp32")
    _self_test(model)
    return model


def predict(model: Model, source: Volume) -> Volume:
    """Translate `source` slice by slice; the result is on the same grid, in the output unit.

    A slice's result depends on that slice alone: neither on the batch nor on the order of the
    slices. Voxels that the source marks as padding come back as they were.

    Raises:
        PackageError: `source` is not in the unit the model takes.
    """
    manifest = model.package.manifest
    if source.unit != manifest.input.unit:
        raise PackageError(
            f"{model.package.name} takes {manifest.input.unit}, got {source.unit}; "
            "route this series to another model"
        )
    voxels = _run(model, source.voxels)
    if source.padding is not None:
        voxels = np.where(source.padding, source.voxels, voxels)
    return source.with_voxels(voxels, manifest.output.unit)


def _run(model: Model, voxels: NDArray[np.float32]) -> NDArray[np.float32]:
    manifest = model.package.manifest
    return run_generator(
        model.generator,
        voxels,
        manifest.input.intensity,
        manifest.output.intensity,
        residual=manifest.output.residual,
        padding=manifest.input.padding.mode,
        device=model.device,
    )


def _self_test(model: Model) -> None:
    golden = read_golden(model.package.path)
    result = _run(model, golden.source)
    worst = float(np.abs(result - golden.result).max())
    if not worst <= golden.tolerance:  # also true for NaN
        raise PackageError(
            f"{model.package.name}: self-test on {model.device} differs by {worst:g} "
            f"{model.package.manifest.output.unit}, allowed {golden.tolerance:g}; "
            "do not serve it on this device"
        )
