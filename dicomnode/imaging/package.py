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
import os
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dicomnode.errors import PackageError
from dicomnode.imaging.manifest import Manifest, manifest_from_yaml, manifest_to_yaml

if TYPE_CHECKING:
    from torch import Tensor

MiB = 1 << 20
FILES: Mapping[str, int] = {
    "manifest.yaml": MiB // 4,
    "weights.safetensors": 2048 * MiB,
    "golden.npz": 16 * MiB,
    "MODEL_CARD.md": MiB,
}
"""Every file of a package, with the largest size in bytes that is read."""
SUMS = "SHA256SUMS"


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


@dataclass(frozen=True, slots=True, eq=False)
class Golden:
    """The self-test: (slices, rows, columns), float32, in the manifest's units."""

    source: NDArray[np.float32]
    result: NDArray[np.float32]
    tolerance: float
    """Largest allowed difference of a voxel, in the output's unit."""


def read_package(path: Path) -> ModelPackage:
    """Read and verify a package.

    Raises:
        PackageError: a file is missing, too large, not listed or differs from its sum, or the
            manifest does not follow its schema. The message names the file or key.
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
    try:
        manifest = manifest_from_yaml(text)
    except PackageError as error:
        raise PackageError(f"{name}: {error}") from error
    return ModelPackage(path, manifest, hashlib.sha256(sums).hexdigest())


def read_golden(path: Path) -> Golden:
    """Read the self-test arrays of a package that `read_package` has verified.

    Raises:
        PackageError: golden.npz does not hold `source`, `result` and `tolerance` as it should.
    """
    data = _read(path, "golden.npz", FILES["golden.npz"])
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > 64 * MiB:
                raise PackageError(f"{path.name}: golden.npz unpacks to more than 64 MiB")
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            source, result = arrays["source"], arrays["result"]
            golden = Golden(source, result, float(arrays["tolerance"]))
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError) as error:
        raise PackageError(f"{path.name}: golden.npz: {error}") from error
    if source.ndim != 3 or source.shape != result.shape or source.dtype != np.float32:
        raise PackageError(f"{path.name}: golden.npz: want float32 (slices, rows, columns) twice")
    return golden


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
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _write(partial / "manifest.yaml", manifest_to_yaml(manifest).encode())
    _write(partial / "MODEL_CARD.md", model_card.encode())
    _write_arrays(partial, manifest, state, golden_input, tolerance)
    sums = "".join(f"{_sum_of_file(partial, f, FILES[f])}  {f}\n" for f in sorted(FILES))
    _write(partial / SUMS, sums.encode())
    replaced = path.with_name(f".{path.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if path.exists():
        path.rename(replaced)
    partial.rename(path)
    shutil.rmtree(replaced, ignore_errors=True)
    return read_package(path)


def _write_arrays(
    folder: Path,
    manifest: Manifest,
    state: Mapping[str, "Tensor"],
    golden_input: NDArray[np.float32],
    tolerance: float,
) -> None:
    from safetensors.torch import save  # torch only where a package is made: the node stays light

    from dicomnode.imaging.networks import build_generator, run_generator

    generator = build_generator(manifest.generator.architecture, manifest.generator.options)
    if manifest.input.padding.multiple % generator.multiple:
        raise PackageError(
            f"manifest.input.padding.multiple: {manifest.generator.architecture} "
            f"needs a multiple of {generator.multiple}"
        )
    try:
        generator.load_state_dict(dict(state), strict=True)
    except RuntimeError as error:
        raise PackageError(f"{manifest.name}: {error}") from error
    _write(
        folder / "weights.safetensors",
        save({key: value.detach().cpu().contiguous() for key, value in state.items()}),
    )
    result = run_generator(
        generator,
        golden_input,
        manifest.input.intensity,
        manifest.output.intensity,
        residual=manifest.output.residual,
        padding=manifest.input.padding.mode,
    )
    buffer = io.BytesIO()
    np.savez_compressed(buffer, source=golden_input, result=result, tolerance=np.float64(tolerance))
    _write(folder / "golden.npz", buffer.getvalue())


def _parse_sums(name: str, data: bytes) -> dict[str, str]:
    try:
        lines = [line.split("  ", 1) for line in data.decode("ascii").splitlines()]
        return {file: digest for digest, file in lines}
    except ValueError as error:  # also UnicodeDecodeError
        raise PackageError(f"{name}: SHA256SUMS is not what sha256sum writes") from error


def _read(folder: Path, file: str, limit: int) -> bytes:
    try:
        with (folder / file).open("rb") as stream:
            data = stream.read(limit + 1)
    except OSError as error:
        raise PackageError(f"{folder.name}: cannot read {file}: {error.strerror}") from error
    if len(data) > limit:
        raise PackageError(f"{folder.name}: {file} is larger than {limit} bytes")
    return data


def _sum_of_file(folder: Path, file: str, limit: int) -> str:
    try:
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
