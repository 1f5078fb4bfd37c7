"""manifest.yaml of a model package, key by key: what the model is, takes and gives.

Data only. Unknown, missing or wrong keys are errors that name the key; nothing is executed.
"""

import types
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from dicomnode.errors import PackageError
from dicomnode.imaging.equalise import Equalisation
from dicomnode.imaging.intensity import Equalised, Intensity
from dicomnode.imaging.percentiles import Percentiles, Slices, intensity_of
from dicomnode.imaging.volume import Unit

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

SMALLEST_TILE = 256
"""Pixels: below 128 PyTorch computes a convolution another way, and the last bit moves."""


@dataclass(frozen=True, slots=True)
class Range:
    """From `min` to `max`, both included; None: no limit on that side."""

    min: float | None = None
    max: float | None = None

    def __contains__(self, value: float) -> bool:
        above = self.min is None or value >= self.min
        return above and (self.max is None or value <= self.max)


@dataclass(frozen=True, slots=True)
class GeneratorSpec:
    """Which network of dicomnode.imaging.networks, and its options."""

    architecture: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Padding:
    """How a slice is brought to the generator's multiple; the result is cropped back."""

    mode: Literal["reflect", "replicate", "air"] = "reflect"
    multiple: int = 1


@dataclass(frozen=True, slots=True)
class InputSpec:
    """What the model was trained to take."""

    modality: str
    unit: Unit
    intensity: Intensity | Percentiles
    """Percentiles: of each volume as a whole, for AU only, which has no scale of its own."""
    slices: int = 1
    equalised: Literal["none", "global", "clahe"] = "none"
    """The middle slice goes in once more, its histogram equalised, as the first channel."""
    spacing_mm: Range = Range()
    matrix: Range = Range()
    field_of_view_mm: Range = Range()
    padding: Padding = Padding()
    grid: Literal["any", "exact", "resample"] | None = None
    """Slices of another matrix or field of view than `matrix` and `field_of_view_mm` say: taken as
    they are, refused, or brought to the trained grid and the result back. None: `exact` with
    instance normalisation, else `any`."""

    @property
    def extra(self) -> Equalisation | None:
        """How the additional channel is equalised; None: there is none."""
        return None if self.equalised == "none" else self.equalised

    @property
    def channels(self) -> int:
        """What the generator is given: slices, and maybe one more."""
        return self.slices + (self.extra is not None)

    def trained_matrix(self) -> int:
        """Rows and columns of the one matrix the model was trained on; 0: it is not one."""
        low, high = self.matrix.min, self.matrix.max
        return int(low) if low is not None and low == high else 0


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """What the model gives; `residual`: the generator gives the difference to its input."""

    modality: str
    unit: Unit
    intensity: Intensity | Percentiles
    """Percentiles: those of the input, which the result then has the window of."""
    residual: bool = False


@dataclass(frozen=True, slots=True)
class Tiling:
    """Whether a slice may be cut in tiles, and by how many pixels they must then overlap.

    Only where it changes no bit: no statistics of the slice, and an overlap that covers the
    receptive field.
    """

    allowed: bool = False
    overlap: int = 0
    side: int = 1024
    """Slices with more rows or columns are cut into tiles of at most this side."""


@dataclass(frozen=True, slots=True)
class Acceptance:
    """For one number format: how far it may be from fp32, in the output's unit."""

    mean_abs: float
    p999_abs: float
    """The 99.9th percentile of the absolute difference of voxels."""
    slices: int = 0
    """Validation slices on which this was found to hold."""
    measured: Mapping[str, float] = field(default_factory=dict)
    """What was found there, by name."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Input in scope; a series outside is refused with the bound it breaks."""

    modality: tuple[str, ...]
    pixel_spacing_mm: Range = Range()
    slice_thickness_mm: Range = Range()
    """SliceThickness (0018,0050)."""
    rows: Range = Range()
    columns: Range = Range()
    slices: Range = Range()
    hu_range: Range = Range()
    """Every voxel that is not padding, in the input's unit, lies inside."""
    exclude: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """DICOM keyword -> values (``*`` and ``?`` wildcards) that are out of scope."""
    require: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """DICOM keyword -> values, one of which every instance must have; no value is none of them."""
    minutes_after_injection: Range = Range()
    """Of PET: every slice was acquired so long after the tracer was given."""


@dataclass(frozen=True, slots=True)
class DicomSpec:
    """Algorithm Identification of the derived series (PS3.3 10.16)."""

    algorithm_name: str
    algorithm_family: str
    algorithm_version: str
    remark: str = ""
    """ASCII that follows the model's name in every SeriesDescription: what a reader must know of a
    demonstration before looking, for example ``LIMB DEMO``. At most 12 characters."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """manifest.yaml, key by key."""

    format: Literal[1]
    name: str
    version: str
    task: Literal["denoise", "ce_ct", "syn_ct", "syn_mr", "delayed_pet", "identity"]
    generator: GeneratorSpec
    input: InputSpec
    output: OutputSpec
    normalisation: Literal["none", "batch", "instance"]
    tiling: Tiling
    bounds: Bounds
    dicom: DicomSpec
    licence: str
    intended_use: str
    training: Mapping[str, Any] = field(default_factory=dict)
    validation: Mapping[str, Any] = field(default_factory=dict)
    qa: Mapping[str, float] = field(default_factory=dict)
    """Limits of a plausible result, by name (dicomnode/qa.py)."""
    acceptance: Mapping[str, Acceptance] = field(default_factory=dict)
    """Number formats beside fp32 that this model may be run in: fp16, bf16, int8."""
    int8_limits: Mapping[str, Range] = field(default_factory=dict)
    """Convolution -> the values that go into it, of training images: those run in int8."""

    def __post_init__(self) -> None:
        if not self.name or not self.name.replace("-", "").replace("_", "").isalnum():
            raise PackageError("manifest.name: use letters, digits, '-' and '_'")
        if not 1 <= self.input.slices <= 31 or self.input.slices % 2 == 0:
            raise PackageError("manifest.input.slices: an odd number from 1 to 31")
        if not 1 <= self.input.padding.multiple <= 1024:
            raise PackageError("manifest.input.padding.multiple: from 1 to 1024")
        if unknown := sorted(self.acceptance.keys() - {"fp16", "bf16", "int8"}):
            raise PackageError(f"manifest.acceptance: no number format {', '.join(unknown)}")
        if any(None in (range_.min, range_.max) for range_ in self.int8_limits.values()):
            raise PackageError("manifest.int8_limits: every one needs min and max")
        remark = self.dicom.remark
        if not (remark.isascii() and (remark + "x").isprintable() and len(remark) <= 12):
            raise PackageError("manifest.dicom.remark: at most 12 characters of printable ASCII")
        if "\\" in remark or set(remark) & set("{}"):
            raise PackageError("manifest.dicom.remark: no backslash, no braces")
        self._check_grid()
        if self.output.residual and self.input.unit != self.output.unit:
            raise PackageError("manifest.output.residual: the units of input and output differ")

    def int8_ranges(self) -> dict[str, tuple[float, float]]:
        """`int8_limits` as least and largest value."""
        return {
            name: (range_.min, range_.max)
            for name, range_ in self.int8_limits.items()
            if range_.min is not None and range_.max is not None
        }

    @property
    def grid(self) -> Literal["any", "exact", "resample"]:
        """What happens to slices of another grid than the trained one."""
        return self.input.grid or ("exact" if self.normalisation == "instance" else "any")

    def _check_grid(self) -> None:
        """Statistics of a slice hold for its trained matrix and field of view, and nowhere else."""
        ranges = (self.input.matrix, self.input.field_of_view_mm)
        bounded = all(range_.min and range_.max for range_ in ranges)
        if self.grid != "any" and not bounded:
            raise PackageError(
                f"manifest.input.grid: {self.grid} needs both ends of input.matrix and of"
                " input.field_of_view_mm"
            )
        if self.grid == "resample" and not self.input.trained_matrix():
            raise PackageError("manifest.input.matrix: resample needs min equal to max")
        if self.normalisation == "instance" and self.grid == "any":
            raise PackageError(
                "manifest.input.grid: with instance normalisation a result depends on matrix and"
                " field of view; give exact or resample"
            )
        if self.normalisation == "instance" and self.tiling.allowed:
            raise PackageError("manifest.tiling: not with instance normalisation")
        if self.tiling.allowed and self.tiling.side < SMALLEST_TILE:
            raise PackageError(f"manifest.tiling.side: at least {SMALLEST_TILE}")
        self._check_percentiles()
        self._check_equalised()

    @property
    def not_hu(self) -> bool:
        """Whether the result is a CT image whose values are no HU."""
        return self.output.modality == "CT" and self.output.unit != "HU"

    def _check_equalised(self) -> None:
        """Grey values of ranks are nobody's HU, and nothing can be added to them."""
        if isinstance(self.output.intensity, Equalised) and self.output.unit != "AU":
            raise PackageError("manifest.output.unit: an equalised result has no unit: give AU")
        if self.not_hu and self.task != "ce_ct":
            raise PackageError(f"manifest.output.unit: {self.task} gives HU")
        if self.not_hu and len(self.dicom.remark) > 5:
            raise PackageError("manifest.dicom.remark: at most 5 characters beside NOT HU")

    def _check_percentiles(self) -> None:
        """A window of percentiles belongs to the source: only there can it be measured."""
        given, made = self.input, self.output
        if isinstance(given.intensity, Percentiles) and given.unit != "AU":
            raise PackageError(f"manifest.input.intensity: {given.unit} has a scale; use a window")
        measured = (made.intensity, made.unit) == (given.intensity, given.unit)
        if isinstance(made.intensity, Percentiles) and not measured:
            raise PackageError(
                "manifest.output.intensity: percentiles of a result are not known before it is "
                "made; use a window, or the input's own percentiles"
            )

    def intensities_of(self, volume: Slices) -> tuple[Intensity, Intensity]:
        """How the values of one volume, in the input's unit, and those of its result are mapped.

        Raises:
            SeriesRefused: NO_CONTRAST: percentiles of a volume without an image.
        """
        given = intensity_of(self.input.intensity, volume)
        made = self.output.intensity
        return given, given if isinstance(made, Percentiles) else made


def manifest_from_yaml(text: bytes) -> Manifest:
    """Parse manifest.yaml.

    Raises:
        PackageError: it is not YAML, or a key is unknown, missing or wrong; the key is named.
    """
    manifest: Manifest = read_as(Manifest, values_in(text), "manifest")
    return manifest


def values_in(text: bytes) -> Any:
    """The plain values of a manifest.yaml, not looked at yet.

    Raises:
        PackageError: it is not YAML, or uses aliases (a few lines of them make a huge value).
    """
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise PackageError("manifest.yaml: YAML aliases are not allowed")
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise PackageError(f"manifest.yaml is not YAML: {error}") from error


def manifest_to_yaml(manifest: "DataclassInstance") -> str:
    """manifest.yaml of `manifest`; `manifest_from_yaml` reads it back to an equal one."""
    plain = _plain(asdict(manifest))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100)


def _plain(value: Any) -> Any:
    """Plain YAML values: an absent key instead of None, lists instead of tuples."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def read_as(kind: Any, value: Any, path: str) -> Any:
    """`value` as `kind`: a dataclass, a union, Literal, tuple, Mapping or a scalar type.

    Raises:
        PackageError: something does not fit; the message starts with the path of the key.
    """
    if is_dataclass(kind):
        return _read_dataclass(kind, value, path)
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return _read_union(get_args(kind), value, path)
    if origin is Literal:
        if value not in get_args(kind) or isinstance(value, bool):
            choices = ", ".join(map(str, get_args(kind)))
            raise PackageError(f"{path}: {value!r} is not one of: {choices}")
        return value
    if origin is tuple:
        items = value if isinstance(value, list) else [value]
        return tuple(read_as(get_args(kind)[0], v, f"{path}[{i}]") for i, v in enumerate(items))
    if origin is Mapping:
        return _read_mapping(get_args(kind)[1], value, path)
    return _read_scalar(kind, value, path)


def _read_dataclass(kind: Any, value: Any, path: str) -> Any:
    if not isinstance(value, dict):
        raise PackageError(f"{path}: want a mapping, got {value!r}")
    known = {item.name: item for item in fields(kind)}
    if unknown := sorted(str(key) for key in value if key not in known):
        raise PackageError(f"{path}: unknown keys: {', '.join(unknown)}")
    for name, item in known.items():
        required = item.default is MISSING and item.default_factory is MISSING
        if required and name not in value:
            raise PackageError(f"{path}.{name}: missing")
    hints = get_type_hints(kind)
    return kind(**{key: read_as(hints[key], v, f"{path}.{key}") for key, v in value.items()})


def _read_union(kinds: tuple[Any, ...], value: Any, path: str) -> Any:
    """`X | None`, or dataclasses told apart by their `kind`."""
    choices = [kind for kind in kinds if kind is not type(None)]
    if len(choices) == 1:
        return None if value is None else read_as(choices[0], value, path)
    by_kind = {get_args(get_type_hints(kind)["kind"])[0]: kind for kind in choices}
    name = value.get("kind") if isinstance(value, dict) else None
    if name not in by_kind:
        raise PackageError(f"{path}.kind: {name!r} is not one of: {', '.join(by_kind)}")
    return read_as(by_kind[name], value, path)


def _read_mapping(kind: Any, value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise PackageError(f"{path}: want a mapping with text keys")
    return {key: read_as(kind, item, f"{path}.{key}") for key, item in value.items()}


def _read_scalar(kind: Any, value: Any, path: str) -> Any:
    if kind is Any:
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise PackageError(f"{path}: want {kind.__name__}, got {value!r}")
    if isinstance(value, float) and value != value:
        raise PackageError(f"{path}: not a number")
    return value
