"""A training run as data: every key of training/configs/*.yaml, with its unit."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from dicomnode.errors import ConfigError, PackageError
from dicomnode.imaging.intensity import Intensity, Window
from dicomnode.imaging.manifest import Bounds, GeneratorSpec, read_as
from dicomnode.imaging.percentiles import Percentiles
from dicomnode.imaging.units import Unit
from training.recipes.adversarial import Adversarial


@dataclass(frozen=True, slots=True)
class Folder:
    """Where slices of one public collection lie."""

    path: str
    """Below `data.root`; searched with its sub-folders."""
    collection: str
    """Name and licence of the collection, for the model card."""
    use: Literal["split", "train"] = "split"
    """train: these patients are never held out (whole series, many slices of one patient)."""


@dataclass(frozen=True, slots=True)
class Data:
    """Which slices, and which patients are held out."""

    root: str
    """Relative to where the command runs."""
    folders: tuple[Folder, ...]
    split: str
    """File with the patients (hashed) of each part; written if it does not exist yet."""
    validation_fraction: float = 0.12
    test_fraction: float = 0.3
    exclude: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """DICOM keyword -> values (``*``, ``?``) whose slices are out of scope."""
    kind: Literal["low_dose"] = "low_dose"


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two kinds of images of a translation."""

    files: tuple[str, ...]
    """Patterns below `data.root` of files, or of folders that hold one DICOM series each."""
    modality: Literal["CT", "MR", "PT"]
    unit: Unit
    intensity: Intensity | Percentiles
    """How physical values become [-1, 1]; percentiles are those of the whole volume."""
    outside: float = 0.0
    """Value where there is no image (air: -1000 HU)."""
    eight_bit: tuple[float, ...] = ()
    """What grey 0 and 255 of an 8-bit PNG stand for; empty: such images are refused."""


@dataclass(frozen=True, slots=True)
class Images:
    """Two kinds of images, paired by patient or not."""

    kind: Literal["images"]
    root: str
    """Relative to where the command runs."""
    split: str
    """File with the patients (hashed) of each part; written if it does not exist yet."""
    source: Side
    target: Side
    collection: str
    """Name and licence of the collection, for the model card."""
    paired: bool = True
    """Source and target of a patient show the same place; the source is put on its lattice."""
    patient: str = ""
    """Regular expression on the path below `root`; its first group names the patient (and with
    paired images the pair). Empty: each file is a patient of its own, which is then said."""
    slices: int = 1
    """Neighbouring source slices the generator is given (odd); the last one is repeated."""
    spacing_mm: float | None = None
    """Pixel spacing everything is brought to; None: as it is."""
    body_above: float | None = None
    """A pixel is the patient where the target, in its unit, is above this; None: everywhere."""
    least_body: float = 0.05
    """Slices with a smaller share of such pixels are left out."""
    mirror: bool = True
    """Patches are mirrored left to right at random."""
    validation_fraction: float = 0.15
    test_fraction: float = 0.2


@dataclass(frozen=True, slots=True)
class LowDose:
    """How the lower-dose versions of a slice are made and drawn."""

    realisations: int = 4
    """Independent noise images per slice."""
    views: int = 360
    """Projections per half turn that make the noise."""
    lowest: float = 0.1
    highest: float = 0.6
    """Doses are drawn between these fractions of the slice's own, evenly on a log scale."""
    full_dose_share: float = 0.1
    """Share of the samples with no noise added, which must stay as they are."""


@dataclass(frozen=True, slots=True)
class Details:
    """Small known details put into source and target alike, so that they are not taken for noise.

    Round to elongated spots at random places. The images hold few lesions; without this a network
    learns that what is small and faint is noise.
    """

    share: float = 0.0
    """Share of the samples that get any."""
    most: int = 6
    """Up to so many in a patch."""
    smallest: float = 1.0
    largest: float = 6.0
    """Half axes, pixels."""
    faintest_hu: float = 15.0
    strongest_hu: float = 100.0
    """Contrast, to either side, evenly on a log scale."""
    weight: float = 10.0
    """What an error inside a detail counts more than one outside."""


@dataclass(frozen=True, slots=True)
class Optimisation:
    """How the generator is fitted."""

    steps: int
    batch_size: int = 16
    patch: int = 96
    """Side of a training patch, pixels; a multiple of the generator's."""
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-5
    charbonnier_hu: float = 10.0
    """Below this error, in HU, the loss is quadratic, above it is linear."""
    bias_weight: float = 0.5
    """Weight of the mean error of 16 x 16 pixel squares."""
    ema_decay: float = 0.999
    """The package holds this running mean of the weights."""
    gradient_clip: float = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: the middle of the network only; losses, first and last layer stay fp32."""


@dataclass(frozen=True, slots=True)
class Publish:
    """What the package of a translation says of itself; see docs/MODELS.md for each key."""

    task: Literal["denoise", "ce_ct", "syn_ct", "syn_mr", "delayed_pet"]
    bounds: Bounds
    licence: str
    intended_use: str
    algorithm_family: str
    remark: str = ""
    """Of a demonstration: what follows the name in every SeriesDescription."""
    padding: Literal["reflect", "replicate"] = "reflect"
    qa: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Backward:
    """The package of the way back, of recipes that train both."""

    name: str
    package: str
    card: str
    publish: Publish


RecipeName = Literal["supervised", "pix2pix", "cyclegan", "sccyclegan", "aps", "gan_circle"]


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """One run, from data to package."""

    name: str
    version: str
    recipe: RecipeName
    seed: int
    data: Data | Images
    generator: GeneratorSpec
    optimisation: Optimisation
    package: str
    """Folder the package is written to."""
    card: str
    """Template of MODEL_CARD.md; {figures} in it are filled in."""
    runs: str = "runs"
    """Checkpoint, log and cached slices go to a folder `name` in here."""
    low_dose: LowDose = LowDose()
    details: Details = Details()
    adversarial: Adversarial = field(default_factory=Adversarial)
    """Of the recipes with a discriminator."""
    residual: bool = False
    """The generator gives the difference to its (middle) source slice. Always so for low_dose."""
    publish: Publish | None = None
    """What the package of `images` says; required there."""
    backward: Backward | None = None
    """Where the second package of a cycle goes; None: it is not written."""
    window: tuple[float, ...] = (-1024.0, 3071.0)
    """HU mapped to [-1, 1]."""
    save_every: int = 500
    """Steps between checkpoints, each with a line of the log and a validation."""
    stop_at: int | None = None
    """Stop after this step, to go on later."""
    threads: int = 2

    @property
    def out(self) -> Path:
        return Path(self.runs) / self.name

    def digest(self) -> str:
        """SHA-256 of everything that shapes the weights: what a checkpoint belongs to."""
        shaping = asdict(self)
        for key in _NOT_SHAPING:
            del shaping[key]
        del shaping["data"]["root"]
        if isinstance(self.data, Data):  # such runs have no discriminator and are always residual
            for key in ("adversarial", "residual"):
                del shaping[key]
            del shaping["data"]["kind"]
        return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()


_NOT_SHAPING = (
    *("package", "card", "runs", "stop_at", "threads", "save_every", "version"),
    *("publish", "backward"),
)


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a run; `overrides` are ``key=value``, with dots for nested keys.

    Raises:
        ConfigError: the file cannot be read, or a key is unknown, missing or wrong.
    """
    try:
        data = yaml.safe_load(path.read_text("utf-8"))
        for override in overrides:
            key, _, value = override.partition("=")
            _set(data, key.split("."), yaml.safe_load(value))
        config: TrainConfig = read_as(TrainConfig, data, path.name)
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}") from error
    except PackageError as error:
        raise ConfigError(str(error)) from error
    if problem := _problem(config):
        raise ConfigError(f"{path.name}.{problem}")
    return config


def _problem(config: TrainConfig) -> str | None:
    """The first thing that does not fit together, after its key; None: all does."""
    if len(config.window) != 2:
        return "window: want two values, low and high"
    if isinstance(config.data, Data):
        return None if config.recipe == "supervised" else "recipe: low_dose data are supervised"
    if config.publish is None:
        return "publish: missing; it says what the package is for"
    if config.data.slices % 2 == 0 or config.data.slices < 1:
        return "data.slices: want an odd number of slices"
    if config.recipe in ("supervised", "pix2pix", "aps") and not config.data.paired:
        return f"data.paired: {config.recipe} needs pairs"
    if config.recipe in ("cyclegan", "sccyclegan", "gan_circle") and config.data.slices != 1:
        return f"data.slices: {config.recipe} goes both ways, slice by slice (1)"
    if config.residual and config.data.source.unit != config.data.target.unit:
        return "residual: source and target have different units"
    for name, side in (("source", config.data.source), ("target", config.data.target)):
        if len(side.eight_bit) not in (0, 2):
            return f"data.{name}.eight_bit: want two values, those of grey 0 and 255"
    if isinstance(config.data.target.intensity, Percentiles):
        return "data.target.intensity: a result needs a fixed window; percentiles have no inverse"
    return None


def window_of(config: TrainConfig) -> Window:
    """The intensity window of a run."""
    low, high = config.window
    return Window(low, high)


def _set(data: Any, keys: Sequence[str], value: Any) -> None:
    for key in keys[:-1]:
        if not isinstance(data, dict) or not isinstance(data.get(key, {}), dict):
            raise ConfigError(f"{'.'.join(keys)}: {key} has no keys below it")
        data = data.setdefault(key, {})
    data[keys[-1]] = value
