"""A training run as data: every key of training/configs/*.yaml, with its unit."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from dicomnode.errors import ConfigError, PackageError
from dicomnode.imaging.classes import Coded
from dicomnode.imaging.intensity import Equalised, Intensity, Window
from dicomnode.imaging.manifest import Bounds, GeneratorSpec, read_as
from dicomnode.imaging.percentiles import Percentiles
from dicomnode.imaging.units import MODALITY, Unit
from training.augment import Emphasis, Vary
from training.doses import Details, LowDose
from training.marked import Marked
from training.overrides import read_settings
from training.recipes.adversarial import Adversarial
from training.recipes.optimisation import Optimisation
from training.watch import Stopping


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
    paired images the pair). Empty: PatientID does; where there is none each file is a patient of
    its own, which is then said."""
    slices: int = 1
    """Neighbouring source slices the generator is given (odd); the last one is repeated."""
    equalised: Literal["none", "global", "clahe"] = "none"
    """The middle source slice is given once more, its histogram equalised, as a channel before the
    slices; the generator's option `slices` is then one more, and the result stays in HU."""
    spacing_mm: float | None = None
    """Pixel spacing everything is brought to; None: as it is."""
    body_above: float | None = None
    """A pixel is the patient where the target, in its unit, is above this; None: everywhere."""
    least_body: float = 0.05
    """Slices with a smaller share of such pixels are left out."""
    emphasis: Emphasis | None = None
    """What errors count by the true value, of paired images; None: all alike."""
    marked: Marked | None = None
    """What errors count where a label image marks the target, of paired images."""
    mirror: bool = True
    """Patches are mirrored left to right at random."""
    rotate_degrees: float = 0.0
    """Patches are turned at random by up to this, to either side."""
    jitter: float = 0.0
    """Contrast and brightness of the source are changed at random by up to this, in [-1, 1]; only
    where its values have no unit (AU)."""
    vary: Vary | None = None
    """Size of patches and values of the source, changed at random; values as with `jitter`."""
    without: tuple[str, ...] = ()
    """Patients (hashed, as in the split) whose images are not even read."""
    validation_fraction: float = 0.15
    test_fraction: float = 0.2

    @property
    def channels(self) -> int:
        """What the generator is given: slices, and maybe one equalised."""
        return self.slices + (self.equalised != "none")


@dataclass(frozen=True, slots=True)
class ClassFiles:
    """One class of pictures."""

    name: str
    files: tuple[str, ...]
    """Patterns below `data.root`."""
    code: Coded
    """The finding it stands for, as reports say it."""


@dataclass(frozen=True, slots=True)
class Classes:
    """Grey pictures in folders named by their class."""

    kind: Literal["classes"]
    root: str
    """Relative to where the command runs."""
    split: str
    """File with the groups of pictures (hashed) of each part; written if it does not exist yet."""
    classes: tuple[ClassFiles, ...]
    collection: str
    """Name and licence of the collection, for the model card."""
    grey_hu: tuple[float, ...]
    """HU that grey 0 and 255 are taken for; the pictures do not say."""
    matrix: int = 64
    """Rows and columns that every picture is resampled to."""
    alike_above: float = 0.95
    """Pictures whose thumbnails correlate more are kept in one part of the split."""
    mirror: bool = True
    shift: int = 4
    """Pixels, at random in each direction."""
    brightness: float = 0.2
    """Gain and offset are changed by up to this, at random."""
    validation_fraction: float = 0.15
    test_fraction: float = 0.25


@dataclass(frozen=True, slots=True)
class PublishClassifier:
    """What the package of a classifier says of itself; see docs/MODELS.md for each key."""

    bounds: Bounds
    licence: str
    intended_use: str
    algorithm_family: str
    site: Coded | None = None


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


RecipeName = Literal[
    "supervised", "pix2pix", "cyclegan", "sccyclegan", "aps", "gan_circle", "classifier"
]


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """One run, from data to package."""

    name: str
    version: str
    recipe: RecipeName
    seed: int
    data: Data | Images | Classes
    generator: GeneratorSpec
    """The network: of the recipe `classifier` a classifier."""
    optimisation: Optimisation
    package: str
    """Folder the package is written to."""
    card: str
    """Template of MODEL_CARD.md; {figures} in it are filled in."""
    runs: str = "runs"
    """Checkpoint, log and cached slices go to a folder `name` in here."""
    low_dose: LowDose = field(default_factory=LowDose)
    details: Details = field(default_factory=Details)
    adversarial: Adversarial = field(default_factory=Adversarial)
    """Of the recipes with a discriminator."""
    start: str = ""
    """Folder of a package whose weights the generator begins with; what is not in it begins as it
    would. Empty: all at random. For recipes of one generator."""
    residual: bool = False
    """The generator gives the difference to its (middle) source slice. Always so for low_dose."""
    publish: Publish | None = None
    """What the package of `images` says; required there."""
    classifier: PublishClassifier | None = None
    """What the package of a classifier says; required with the recipe `classifier`."""
    backward: Backward | None = None
    """Where the second package of a cycle goes; None: it is not written."""
    strength: float = 1.0
    """Share of the difference it was trained to predict that the package gives; the rest of the
    source's noise stays. Of `low_dose` data with the generator residual_denoiser."""
    window: tuple[float, ...] = (-1024.0, 3071.0)
    """HU mapped to [-1, 1]."""
    save_every: int = 500
    """Steps between checkpoints, each with a line of the log and a validation."""
    log_every: int = 50
    """Steps between rows of losses.csv."""
    stopping: Stopping | None = None
    """Stop early on the validation patients, and keep the best weights; None: all steps."""
    stop_at: int | None = None
    """Stop after this step, to go on later."""
    threads: int = 2
    """Of each process; the last bits of a sum depend on it."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto: CUDA where there is one."""

    @property
    def out(self) -> Path:
        return Path(self.runs) / self.name

    def digest(self) -> str:
        """SHA-256 of everything that shapes the weights: what a checkpoint belongs to."""
        shaping = asdict(self)
        for key in _NOT_SHAPING:
            del shaping[key]
        del shaping["data"]["root"]
        if isinstance(self.data, Data):  # such runs are always residual
            del shaping["residual"], shaping["data"]["kind"]
            if self.recipe == "supervised":
                del shaping["adversarial"]
        _leave_out(shaping, self)
        if isinstance(self.data, Images):  # what came later and is not used changes nothing
            for key in _LATER_IMAGES:
                if shaping["data"][key] == Images.__dataclass_fields__[key].default:
                    del shaping["data"][key]
        return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()


def _leave_out(shaping: dict[str, Any], config: TrainConfig) -> None:
    """Drop what came later and is not used: it changes nothing, and older runs go on."""
    if not config.start:
        del shaping["start"]
    if not config.low_dose.mixed:
        del shaping["low_dose"]["mixed"]
    if not config.optimisation.texture_weight:
        del shaping["optimisation"]["texture_weight"]


_LATER_IMAGES = ("equalised", "rotate_degrees", "jitter", "emphasis", "marked", "vary", "without")
_NOT_SHAPING = (
    *("package", "card", "runs", "stop_at", "threads", "save_every", "version"),
    *("publish", "classifier", "backward", "log_every", "stopping", "device", "strength"),
)


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a run; `overrides` are ``key=value``, with dots for nested keys.

    Raises:
        ConfigError: the file cannot be read, or a key is unknown, missing or wrong.
    """
    data = read_settings(path, overrides)
    try:
        config: TrainConfig = read_as(TrainConfig, data, path.name)
    except PackageError as error:
        raise ConfigError(str(error)) from error
    if problem := _problem(config):
        raise ConfigError(f"{path.name}.{problem}")
    return config


TWO_WAYS = ("cyclegan", "sccyclegan", "gan_circle")
"""Recipes that train the way there and the way back."""


def _problem(config: TrainConfig) -> str | None:
    """The first thing that does not fit together, after its key; None: all does."""
    if config.strength != 1.0 and not has_strength(config):
        return "strength: only of low_dose data with the generator residual_denoiser"
    if len(config.window) != 2:
        return "window: want two values, low and high"
    if min(config.save_every, config.log_every, config.optimisation.steps) < 1:
        return "save_every, log_every, optimisation.steps: want 1 or more"
    least = config.adversarial.discriminator.least_patch
    if config.recipe not in ("supervised", "classifier") and config.optimisation.patch < least:
        return f"optimisation.patch: the discriminator's layers need {least} pixels or more"
    if isinstance(config.data, Data):
        return _problem_of_low_dose(config)
    if isinstance(config.data, Classes):
        return _problem_of_classes(config, config.data)
    if config.recipe == "classifier":
        return "recipe: classifier needs data.kind: classes"
    if config.start and config.recipe in TWO_WAYS:
        return f"start: {config.recipe} has two generators"
    if config.publish is None:
        return "publish: missing; it says what the package is for"
    if config.data.slices % 2 == 0 or config.data.slices < 1:
        return "data.slices: want an odd number of slices"
    if config.recipe in ("supervised", "pix2pix", "aps") and not config.data.paired:
        return f"data.paired: {config.recipe} needs pairs"
    if config.recipe in TWO_WAYS and config.data.emphasis is not None:
        return f"data.emphasis: {config.recipe} has no truth to weigh errors by"
    spacing, marked = config.data.spacing_mm, config.data.marked
    if marked and (problem := marked.problem(config.recipe in TWO_WAYS, spacing)):
        return f"data.marked: {problem}"
    if config.recipe in TWO_WAYS and config.data.slices != 1:
        return f"data.slices: {config.recipe} goes both ways, slice by slice (1)"
    if config.recipe in TWO_WAYS and config.data.equalised != "none":
        return f"data.equalised: {config.recipe} goes both ways; use intensity: equalised"
    if config.residual and isinstance(config.data.target.intensity, Equalised):
        return "residual: nothing can be added to an equalised image"
    vary = config.data.vary or Vary()
    if config.data.source.unit != "AU" and (config.data.jitter or vary.curve or vary.shade):
        name = "jitter" if config.data.jitter else "vary"
        return f"data.{name}: {config.data.source.unit} mean something; they are not to be changed"
    if config.residual and config.data.source.unit != config.data.target.unit:
        return "residual: source and target have different units"
    for name, side in (("source", config.data.source), ("target", config.data.target)):
        if MODALITY[side.unit] != side.modality:
            return f"data.{name}.unit: {side.unit} is of {MODALITY[side.unit]}, not {side.modality}"
        if len(side.eight_bit) not in (0, 2):
            return f"data.{name}.eight_bit: want two values, those of grey 0 and 255"
    if isinstance(config.data.target.intensity, Percentiles):
        return "data.target.intensity: a result needs a fixed window; percentiles have no inverse"
    return None


def _problem_of_low_dose(config: TrainConfig) -> str | None:
    if config.recipe == "classifier":
        return "recipe: classifier needs data.kind: classes"
    if config.backward is not None:
        return "backward: low_dose data give the package of one way"
    if not 0.0 < config.strength <= 1.0:
        return "strength: above 0, at most 1"
    return None


def _problem_of_classes(config: TrainConfig, data: Classes) -> str | None:
    if config.recipe != "classifier":
        return "recipe: data.kind classes needs classifier"
    if config.classifier is None:
        return "classifier: missing; it says what the package is for"
    if len(data.grey_hu) != 2 or not data.grey_hu[0] < data.grey_hu[1]:
        return "data.grey_hu: want two values, those of grey 0 and 255"
    if config.generator.options.get("classes") != len(data.classes):
        return f"generator.options.classes: want {len(data.classes)}, as data.classes has"
    if len({one.name for one in data.classes}) < len(data.classes):
        return "data.classes: two have the same name"
    return None


def has_strength(config: TrainConfig) -> bool:
    """Whether the generator can give less than the whole difference."""
    return isinstance(config.data, Data) and config.generator.architecture == "residual_denoiser"


def window_of(config: TrainConfig) -> Window:
    """The intensity window of a run."""
    low, high = config.window
    return Window(low, high)
