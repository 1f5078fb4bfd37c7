"""Run a model package over a volume: the fastest engine and number format that is exact enough."""

import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load

from dicomnode.errors import PackageError, SeriesRefused
from dicomnode.imaging.engines import (
    Engine,
    EngineError,
    FormStore,
    OpenVinoEngine,
    Precision,
    Starting,
    TorchEngine,
    WithinMemory,
    cpu_features,
    engines_for,
    installed,
    is_out_of_memory,
    runs_well,
)
from dicomnode.imaging.gate import why_not_int8
from dicomnode.imaging.grid import Regrid, regrid_for
from dicomnode.imaging.intensity import Intensity
from dicomnode.imaging.layout import Layout
from dicomnode.imaging.manifest import Manifest
from dicomnode.imaging.networks import (
    Generator,
    is_tiled,
    padded,
    plan_generator,
    run_slices,
    run_tiled,
)
from dicomnode.imaging.package import ModelPackage, check_generator, read_golden, read_weights
from dicomnode.imaging.pending import Pending, Ready
from dicomnode.imaging.percentiles import Whole
from dicomnode.imaging.volume import Volume

log = logging.getLogger(__name__)

Voxels = NDArray[np.float32]
Run = Callable[[Voxels], Voxels]
Start = Callable[[Voxels], Pending[Voxels]]


class Model:
    """A package ready to run on one device; made by `load_model`, used by `predict`."""

    def __init__(
        self,
        package: ModelPackage,
        generator: Generator,
        device: str,
        engine: Engine,
        refused: tuple[str, ...] = (),
    ) -> None:
        """`refused`: why no faster engine or number format, one sentence each."""
        self.package = package
        self.generator = generator
        self.device = device
        self.engine = engine
        self.refused = refused
        self.self_test = ""
        """What it found, and what is allowed, in words; empty: not run."""

    @property
    def precision(self) -> Precision:
        return self.engine.precision

    @property
    def words(self) -> str:
        """Engine, number format and device, and why not faster: for logs and status."""
        chosen = f"{self.engine.name}, {self.precision} on {self.device}"
        return "; ".join([chosen, *self.refused, *self.forms])

    @property
    def forms(self) -> tuple[str, ...]:
        """How the engine computes each size of batch it has met, where it has a choice."""
        return self.engine.remarks if isinstance(self.engine, Starting) else ()

    def fall_back(self, error: EngineError) -> None:
        """From now on the reference runs it.

        Raises:
            EngineError: it did already.
            PackageError: the reference fails its self-test.
        """
        if isinstance(self.engine, TorchEngine):
            raise error
        log.warning("%s: from now on torch fp32: %s", self.package.name, error)
        self.engine = TorchEngine(self.generator, self.device, "fp32")
        self.refused = (*self.refused, str(error))
        self.self_test = _self_test(self)


@dataclass(frozen=True, slots=True)
class _Choice:
    """One way to run a generator, not tried yet."""

    words: str
    make: Callable[[], Engine]


def load_model(
    package: ModelPackage, device: str = "cpu", precision: str = "auto", cache: Path | None = None
) -> Model:
    """Build the generator, load its weights and choose what runs it on `device`.

    Engines and number formats are tried from the fastest on; the first whose result of the golden
    input is as near to fp32 as the package demands is taken. A number format that the package was
    not accepted for is never tried, nor one that this processor has no instructions for.

    Args:
        precision: auto, fp32, bf16 or int8: the lowest number format wanted. auto is bf16 (fp16 on
            a GPU) where that is possible.
        cache: folder for compiled forms; None: compiled at every start.

    Raises:
        PackageError: the weights do not fit the generator, the device cannot be used, or even in
            fp32 the result of the golden input is out of tolerance.
    """
    generator = _load_generator(package, device)
    check_generator(package.manifest, generator)
    refused = _formats_refused(package.manifest, device, precision)
    choices = list(_choices(package, generator, device, precision, cache))
    for place, choice in enumerate(choices):
        try:
            model = Model(package, generator, device, choice.make(), tuple(refused))
            model.self_test = _self_test(model)
            warm_up(model)
        except PackageError as error:
            if place == len(choices) - 1:
                raise PackageError(f"{package.name}: {error}") from error
            refused.append(f"not {choice.words}: {error}")
            log.warning("%s %s: not %s: %s", package.name, package.version, choice.words, error)
            continue
        log.info("%s %s: %s; self-test: %s", *_told(model))
        return model
    raise AssertionError("the reference is always a choice")


def warm_up(model: Model) -> None:
    """Let an engine that has a choice make it now for the one matrix a model takes, if it is one.

    Otherwise the first series waits for that.
    """
    engine, spec = model.engine, model.package.manifest.input
    matrix = spec.trained_matrix()
    if isinstance(engine, Starting) and engine.ahead and matrix:
        side, *_ = padded((matrix,), spec.padding.multiple)
        noise = np.random.default_rng(0).uniform(-1, 1, (1, model.generator.slices, side, side))
        try:
            engine.run(noise.astype(np.float32))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise


def _told(model: Model) -> tuple[str, ...]:
    return model.package.name, model.package.version, model.words, model.self_test


def predict(model: Model, source: Volume) -> Volume:
    """Translate `source` slice by slice; the result is on the same grid, in the output unit.

    A slice's result depends on that slice, for a model of several slices on its neighbours, and on
    the window that percentiles of the whole volume make where the package wants them: neither on
    the batch nor on the order of work. Voxels that the source marks as padding come back as they
    were. A source of another grid than the model's is resampled to it and the result back, if
    the package says so; that is logged. When an engine fails on the way, the whole volume is done
    again with the reference, and the model stays with it.

    Raises:
        PackageError: `source` is not in the unit the model takes, or not on its grid.
        SeriesRefused: NO_CONTRAST: percentiles of a volume without an image.
    """
    manifest = model.package.manifest
    regrid = checked_grid(model, source)
    run = functools.partial(_run, model, manifest.intensities_of(source))
    if regrid is None:
        voxels = run(source.voxels)
    else:
        log.info("%s: %s", model.package.name, regrid)
        voxels = regrid.run(source.voxels, run, residual=manifest.output.residual)
    if source.padding is not None:
        voxels = np.where(source.padding, source.voxels, voxels)
    return source.with_voxels(voxels, manifest.output.unit)


def checked_grid(model: Model, source: Volume | Layout) -> Regrid | None:
    """How `source` comes to the model's grid, see `regrid_for`.

    Raises:
        PackageError: `source` is not in the unit the model takes, or not on its grid.
    """
    manifest = model.package.manifest
    if source.unit != manifest.input.unit:
        raise PackageError(
            f"{model.package.name} takes {manifest.input.unit}, got {source.unit}; "
            "route this series to another model"
        )
    try:
        return regrid_for(source, manifest)
    except PackageError as error:
        raise PackageError(f"{model.package.name}: {error}; route this series elsewhere") from error


Scales = tuple[Intensity, Intensity]
"""Of the input and of the output of one volume."""


def _run(model: Model, scales: Scales, voxels: Voxels) -> Voxels:
    try:
        return _run_on(model.engine, model.package.manifest, scales, voxels)
    except EngineError as error:
        model.fall_back(error)
        return _run_on(model.engine, model.package.manifest, scales, voxels)


def tiled(run: Run, manifest: Manifest) -> Run:
    """`run` over the tiles of a slice, where the manifest has them."""
    if not manifest.tiling.allowed:
        return run
    return functools.partial(run_tiled, run, _cut(manifest))


def started(fitting: WithinMemory, manifest: Manifest) -> Start:
    """`tiled`, begun; the tiles of a slice are run at once."""

    def start(x: Voxels) -> Pending[Voxels]:
        if manifest.tiling.allowed and is_tiled(_cut(manifest), x.shape):
            return Ready(run_tiled(fitting.run, _cut(manifest), x))
        return fitting.start(x)

    return start


def _cut(manifest: Manifest) -> tuple[int, int, int]:
    return manifest.tiling.overlap, manifest.tiling.side, manifest.input.padding.multiple


def _run_on(engine: Engine, manifest: Manifest, scales: Scales, voxels: Voxels) -> Voxels:
    fitting = WithinMemory(engine)
    return run_slices(
        tiled(fitting.run, manifest),
        voxels,
        *scales,
        (manifest.input.slices, manifest.input.padding.multiple),
        residual=manifest.output.residual,
        padding=manifest.input.padding.mode,
        batch=fitting.batch(*padded(voxels.shape[1:], manifest.input.padding.multiple)),
        extra=manifest.input.extra,
    )


def _load_generator(package: ModelPackage, device: str) -> Generator:
    spec = package.manifest.generator
    generator = plan_generator(spec.architecture, spec.options)
    try:
        state = load(read_weights(package))
        if strange := sorted(k for k, v in state.items() if v.dtype not in _STORED):
            raise PackageError(f"{package.name}: weights must be float32: {', '.join(strange[:3])}")
        generator.load_state_dict(state, strict=True, assign=True)
        return generator.eval()
    except (RuntimeError, SafetensorError) as error:
        raise PackageError(f"{package.name}: cannot load on {device}: {error}") from error


_STORED = (torch.float32, torch.int64)
"""Of weights, and of the counter that batch normalisation keeps."""


def _formats(manifest: Manifest, device: str, precision: str) -> tuple[list[Precision], list[str]]:
    """Number formats to try beside fp32, fastest first; and why not the other ones wanted."""
    wanted: list[Precision] = ["int8", "bf16"] if precision == "int8" else ["bf16"]
    on_gpu = device.startswith("cuda")
    if on_gpu and precision == "auto":
        wanted = ["fp16", "bf16"]
    wanted = [] if precision == "fp32" else wanted
    accepted = [kind for kind in wanted if kind in manifest.acceptance]
    why = [
        f"not {kind}: the package was not accepted for it"
        for kind in wanted
        if kind not in accepted and precision != "auto"
    ]
    if on_gpu:
        return accepted, why
    if "int8" in accepted and (
        reason := why_not_int8(manifest.output, manifest.acceptance["int8"])
    ):
        why.append(f"not int8: accepted with too much: {reason}")
        accepted.remove("int8")
    features = cpu_features()
    slow = [kind for kind in accepted if not runs_well(kind, features)]
    why += [f"not {kind}: this processor has no instructions for it" for kind in slow]
    return [kind for kind in accepted if kind not in slow], why


def _formats_refused(manifest: Manifest, device: str, precision: str) -> list[str]:
    return _formats(manifest, device, precision)[1]


def _choices(
    package: ModelPackage, generator: Generator, device: str, precision: str, cache: Path | None
) -> Iterator[_Choice]:
    """Every engine and number format to try, fastest first, the reference last."""
    manifest, store = package.manifest, None if cache is None else FormStore(cache)
    limits = manifest.int8_ranges()
    for kind in (*_formats(manifest, device, precision)[0], "fp32"):
        compiled = functools.partial(
            OpenVinoEngine, generator, kind, digest=package.digest, store=store, limits=limits
        )
        eager = functools.partial(TorchEngine, generator, device, kind)
        makers: dict[str, Callable[[], Engine]] = {"openvino": compiled, "torch": eager}
        for name in engines_for(kind):
            if name == "torch" or (device == "cpu" and installed()):
                yield _Choice(f"{name} {kind}", makers[name])


def _self_test(model: Model) -> str:
    """What was found, in words.

    Raises:
        PackageError: the golden result is missed by more than fp32, or this number format, may.
    """
    golden = read_golden(model.package.path)
    manifest, device = model.package.manifest, model.device
    try:
        scales = manifest.intensities_of(Whole(golden.source))
    except SeriesRefused as error:
        raise PackageError(f"golden.npz: {error.message}") from error
    difference = np.abs(_run_on(model.engine, manifest, scales, golden.source) - golden.result)
    unit = manifest.output.unit
    if model.precision == "fp32":
        worst = float(difference.max())
        if not worst <= golden.tolerance:  # also true for NaN
            raise PackageError(
                f"self-test on {device} differs by {worst:g} {unit}, allowed "
                f"{golden.tolerance:g}; do not serve it on this device"
            )
        return f"{worst:.2g} {unit} at most, allowed {golden.tolerance:g}"
    limits = manifest.acceptance[model.precision]
    mean, high = float(difference.mean()), float(np.quantile(difference, 0.999))
    if not (mean <= limits.mean_abs and high <= limits.p999_abs):
        raise PackageError(
            f"self-test on {device} in {model.precision} differs by {mean:.3g} {unit} on average, "
            f"{high:.3g} at the 99.9th percentile; accepted are {limits.mean_abs:g} and "
            f"{limits.p999_abs:g}"
        )
    return (
        f"{mean:.2g} {unit} on average, {high:.2g} at the 99.9th percentile, allowed "
        f"{limits.mean_abs:g} and {limits.p999_abs:g}"
    )
