"""Model packages: the folder that training writes and the node serves.

    manifest.yaml         what the model is, what it takes and gives; data only, no code
    weights.safetensors   the generator's state
    golden.npz            a small input and its result: the self-test at load
    MODEL_CARD.md         what it is for, what it must not be used for, figures
    SHA256SUMS            sums of the four, as sha256sum writes them; its own sum is the digest

Every file is checked for its size and its sum before anything of it is parsed.
"""

import hashlib
import io
import math
import os
import shutil
import stat
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from dicomnode.errors import PackageError
from dicomnode.imaging.manifest import Manifest, manifest_from_yaml, manifest_to_yaml
from dicomnode.imaging.percentiles import Whole

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from dicomnode.imaging.networks import Generator

MiB = 1 << 20
FILES: Mapping[str, int] = {
    "manifest.yaml": MiB // 4,
    "weights.safetensors": 2048 * MiB,
    "golden.npz": 16 * MiB,
    "MODEL_CARD.md": MiB,
}
"""Every file of a package, with the largest size in bytes that is read."""
SUMS = "SHA256SUMS"
LARGEST_HEADER = 4 * MiB
"""Of weights.safetensors: names, shapes and places of all tensors, as JSON."""
LARGEST_GOLDEN = 64 * MiB
"""Of golden.npz, unpacked."""


@dataclass(frozen=True, slots=True)
class ModelPackage:
    """A verified package; weights and golden arrays stay on disk until a model is loaded."""

    path: Path
    manifest: Manifest
    digest: str
    """SHA-256 of SHA256SUMS, hexadecimal: names these exact files everywhere."""

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def version(self) -> str:
        return self.manifest.version


class Installed(Protocol):
    """A verified package of any kind: where it is, and the digest that names it."""

    @property
    def path(self) -> Path: ...
    @property
    def name(self) -> str: ...
    @property
    def digest(self) -> str: ...


@dataclass(frozen=True, slots=True, eq=False)
class Golden:
    """The self-test: (slices, rows, columns), float32, in the manifest's units.

    Of a classifier the result is (slices, classes), float32, probabilities.
    """

    source: NDArray[np.float32]
    result: NDArray[np.float32]
    tolerance: float
    """Largest allowed difference of a voxel, in the output's unit, or of a probability."""


def read_package(path: Path) -> ModelPackage:
    """Read and verify a package.

    Raises:
        PackageError: a file is missing, too large, not listed or differs from its sum, or the
            manifest does not follow its schema. The message names the file or key.
    """
    text, digest = read_files(path)
    try:
        manifest = manifest_from_yaml(text)
    except PackageError as error:
        raise PackageError(f"{path.name}: {error}") from error
    check_folder(path, manifest.name, manifest.version)
    return ModelPackage(path, manifest, digest)


def read_files(path: Path) -> tuple[bytes, str]:
    """manifest.yaml of a package of any kind, unread, and its digest; every file was verified.

    Raises:
        PackageError: a file is missing, too large, not listed or differs from its sum.
    """
    name = path.name
    sums = _read(path, SUMS, MiB // 16)
    listed = _parse_sums(name, sums)
    if listed.keys() != FILES.keys():
        raise PackageError(f"{name}: SHA256SUMS must list exactly {', '.join(sorted(FILES))}")
    unlisted = {p.name for p in path.iterdir() if p.name[0] != "."} - FILES.keys() - {SUMS}
    if unlisted:
        raise PackageError(f"{name}: not listed in SHA256SUMS: {', '.join(sorted(unlisted))}")
    for file, limit in FILES.items():
        if _sum_of_file(path, file, limit) != listed[file]:
            raise PackageError(f"{name}: {file} differs from SHA256SUMS; install the package again")
    text = _read(path, "manifest.yaml", FILES["manifest.yaml"])
    return text, hashlib.sha256(sums).hexdigest()


def check_folder(path: Path, name: str, version: str) -> None:
    """
    Raises:
        PackageError: the folder is called ``name@version`` of another package.
    """
    folder, at, of_folder = path.name.partition("@")
    if at and (folder, of_folder) != (name, version):
        raise PackageError(f"{path.name}: holds {name}@{version}; name the folder so")


def read_weights(package: Installed) -> bytes:
    """weights.safetensors as it was when the package was verified.

    Raises:
        PackageError: it has changed since, or its header is not that of a file of weights.
    """
    name, file = package.name, "weights.safetensors"
    sums = _read(package.path, SUMS, MiB // 16)
    data = _read(package.path, file, FILES[file])
    listed = _parse_sums(name, sums).get(file)
    if hashlib.sha256(sums).hexdigest() != package.digest or (
        hashlib.sha256(data).hexdigest() != listed
    ):
        raise PackageError(f"{name}: {file} changed since the node started; restart the node")
    header = int.from_bytes(data[:8], "little")
    if len(data) < 8 or header > min(LARGEST_HEADER, len(data) - 8):
        raise PackageError(
            f"{name}: {file} is not a file of weights: its header claims {header} bytes"
        )
    return data


def read_golden(path: Path, classes: int = 0) -> Golden:
    """Read the self-test arrays of a package that `read_package` has verified.

    Args:
        classes: how many a classifier has; 0: it is none, and the result is an image.

    Raises:
        PackageError: golden.npz does not hold `source`, `result` and `tolerance` as it should.
    """
    data = _read(path, "golden.npz", FILES["golden.npz"])
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > LARGEST_GOLDEN:
                raise PackageError(f"{path.name}: golden.npz unpacks to more than 64 MiB")
            for entry in archive.infolist():
                _check_array(archive, entry)
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            source, result = arrays["source"], arrays["result"]
            golden = Golden(source, result, float(arrays["tolerance"]))
    except (zipfile.BadZipFile, zlib.error, KeyError, ValueError, TypeError, OSError) as error:
        raise PackageError(f"{path.name}: golden.npz: {error}") from error
    wanted = (len(source), classes) if classes else source.shape
    if source.ndim != 3 or result.shape != wanted or source.dtype != np.float32:
        and_what = "(slices, classes)" if classes else "twice"
        raise PackageError(
            f"{path.name}: golden.npz: want float32 (slices, rows, columns) {and_what}"
        )
    return golden


def _check_array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    """
    Raises:
        ValueError: the header promises more values than the entry holds: numpy would take the
            memory for them before it reads the first.
    """
    with archive.open(entry) as stream:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError(f"{entry.filename}: want format 1.0 of numpy")
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    if math.prod(shape) * dtype.itemsize > entry.file_size:
        raise ValueError(f"{entry.filename} holds less than it promises")


def write_package(
    path: Path,
    manifest: Manifest,
    state: Mapping[str, "Tensor"],
    golden_input: NDArray[np.float32],
    model_card: str,
    *,
    tolerance: float = 0.05,
) -> ModelPackage:
    """Write a package whole or not at all; one that is already at `path` is replaced.

    Args:
        golden_input: (slices, rows, columns), float32, in the input's unit; small and generated.
            Its result is computed here, in float32 on the CPU.
        tolerance: allowed by the self-test, in the output's unit.

    Raises:
        PackageError: the state does not fit the generator.
    """
    from dicomnode.imaging.networks import build_generator, run_generator

    generator = build_generator(manifest.generator.architecture, manifest.generator.options)
    check_generator(manifest, generator)
    weights = load_state(manifest.name, generator, state)
    result = run_generator(
        generator,
        golden_input,
        *manifest.intensities_of(Whole(golden_input)),
        residual=manifest.output.residual,
        padding=manifest.input.padding.mode,
        extra=manifest.input.extra,
    )
    golden = Golden(golden_input, result, tolerance)
    write_files(path, manifest_to_yaml(manifest), weights, golden, model_card)
    return read_package(path)


def with_manifest(package: ModelPackage, manifest: Manifest) -> ModelPackage:
    """Write the package again with another manifest; weights, self-test and card stay.

    Raises:
        PackageError: the package has changed on disk since it was verified.
    """
    weights = read_weights(package)
    card = _read(package.path, "MODEL_CARD.md", FILES["MODEL_CARD.md"]).decode()
    write_files(package.path, manifest_to_yaml(manifest), weights, read_golden(package.path), card)
    return read_package(package.path)


def load_state(name: str, network: "Module", state: Mapping[str, "Tensor"]) -> bytes:
    """Load `state` into `network`; weights.safetensors of it.

    Raises:
        PackageError: the state does not fit; the message starts with `name`.
    """
    from safetensors.torch import save  # torch only where a package is made: the node stays light

    try:
        network.load_state_dict(dict(state), strict=True)
    except RuntimeError as error:
        raise PackageError(f"{name}: {error}") from error
    return save({key: value.detach().cpu().contiguous() for key, value in state.items()})


def write_files(path: Path, manifest: str, weights: bytes, golden: Golden, card: str) -> None:
    """Write a package of any kind whole or not at all; one that is at `path` is replaced.

    Args:
        manifest: manifest.yaml.
        weights: weights.safetensors.
    """
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer, source=golden.source, result=golden.result, tolerance=np.float64(golden.tolerance)
    )
    _write(partial / "manifest.yaml", manifest.encode())
    _write(partial / "MODEL_CARD.md", card.encode())
    _write(partial / "weights.safetensors", weights)
    _write(partial / "golden.npz", buffer.getvalue())
    sums = "".join(f"{_sum_of_file(partial, f, FILES[f])}  {f}\n" for f in sorted(FILES))
    _write(partial / SUMS, sums.encode())
    replaced = path.with_name(f".{path.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if path.exists():
        path.rename(replaced)
    partial.rename(path)
    shutil.rmtree(replaced, ignore_errors=True)


def check_generator(manifest: Manifest, generator: "Generator") -> None:
    """Whether what the manifest promises of its generator is so.

    Raises:
        PackageError: it is not; the key is named.
    """
    name = manifest.generator.architecture
    if manifest.input.padding.multiple % generator.multiple:
        raise PackageError(
            f"manifest.input.padding.multiple: {name} needs a multiple of {generator.multiple}"
        )
    if manifest.input.channels != generator.slices:
        more = " and one equalised" if manifest.input.extra else ""
        raise PackageError(
            f"manifest.input.slices: {name} takes {generator.slices} with these options, not "
            f"{manifest.input.slices}{more}"
        )
    if generator.uses_statistics != (manifest.normalisation == "instance"):
        other = "uses" if generator.uses_statistics else "does not use"
        raise PackageError(f"manifest.normalisation: {name} {other} statistics of the slice")
    if manifest.tiling.allowed and not generator.tiles_exactly:
        raise PackageError(f"manifest.tiling: a tile of {name} may differ from the whole slice")
    if manifest.tiling.allowed and manifest.tiling.overlap < generator.receptive_field - 1:
        raise PackageError(
            f"manifest.tiling.overlap: the receptive field of {name} is "
            f"{generator.receptive_field} pixels; overlap by as many"
        )


def _parse_sums(name: str, data: bytes) -> dict[str, str]:
    try:
        lines = [line.split("  ", 1) for line in data.decode("ascii").splitlines()]
        return {file: digest for digest, file in lines}
    except ValueError as error:  # also UnicodeDecodeError
        raise PackageError(f"{name}: SHA256SUMS is not what sha256sum writes") from error


def _check_plain(folder: Path, file: str) -> None:
    """A link may lead out of the package, a pipe never ends.

    Raises:
        PackageError: the file is anything but a plain file in the folder.
    """
    if not stat.S_ISREG((folder / file).lstat().st_mode):
        raise PackageError(f"{folder.name}: {file} is not a plain file; copy it into the folder")


def _read(folder: Path, file: str, limit: int) -> bytes:
    try:
        _check_plain(folder, file)
        with (folder / file).open("rb") as stream:
            data = stream.read(limit + 1)
    except OSError as error:
        raise PackageError(f"{folder.name}: cannot read {file}: {error.strerror}") from error
    if len(data) > limit:
        raise PackageError(f"{folder.name}: {file} is larger than {limit} bytes")
    return data


def _sum_of_file(folder: Path, file: str, limit: int) -> str:
    try:
        _check_plain(folder, file)
        if (folder / file).stat().st_size > limit:
            raise PackageError(f"{folder.name}: {file} is larger than {limit} bytes")
        with (folder / file).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise PackageError(f"{folder.name}: cannot read {file}: {error.strerror}") from error


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
