"""manifest.yaml of a model package, key by key: what the model is, takes and gives.

Data only. Unknown, missing or wrong keys are errors that name the key; nothing is executed.
"""

import types
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from dicomnode.errors import PackageError
from dicomnode.imaging.intensity import Intensity
from dicomnode.imaging.volume import Unit


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

    mode: Literal["reflect", "replicate"] = "reflect"
    multiple: int = 1


@dataclass(frozen=True, slots=True)
class InputSpec:
    """What the model was trained to take."""

    modality: str
    unit: Unit
    intensity: Intensity
    slices: int = 1
    spacing_mm: Range = Range()
    matrix: Range = Range()
    field_of_view_mm: Range = Range()
    padding: Padding = Padding()


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """What the model gives; `residual`: the generator gives the difference to its input."""

    modality: str
    unit: Unit
    intensity: Intensity
    residual: bool = False


@dataclass(frozen=True, slots=True)
class Tiling:
    """Whether a slice may be cut in tiles, and by how many pixels they must then overlap."""

    allowed: bool = False
    overlap: int = 0


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


@dataclass(frozen=True, slots=True)
class DicomSpec:
    """Algorithm Identification of the derived series (PS3.3 10.16)."""

    algorithm_name: str
    algorithm_family: str
    algorithm_version: str


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

    def __post_init__(self) -> None:
        if not self.name or not self.name.replace("-", "").replace("_", "").isalnum():
            raise PackageError("manifest.name: use letters, digits, '-' and '_'")
        if self.input.slices != 1:
            raise PackageError("manifest.input.slices: this version runs 2-D generators only (1)")
        if self.output.residual and self.input.unit != self.output.unit:
            raise PackageError("manifest.output.residual: the units of input and output differ")


def manifest_from_yaml(text: bytes) -> Manifest:
    """Parse manifest.yaml.

    Raises:
        PackageError: it is not YAML, or a key is unknown, missing or wrong; the key is named.
    """
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise PackageError("manifest.yaml: YAML aliases are not allowed")
        data = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise PackageError(f"manifest.yaml is not YAML: {error}") from error
    manifest: Manifest = read_as(Manifest, data, "manifest")
    return manifest


def manifest_to_yaml(manifest: Manifest) -> str:
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
