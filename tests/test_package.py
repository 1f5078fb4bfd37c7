"""Packages are written whole, read back equal, and refused with the file and reason otherwise."""

import hashlib
import io
import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dicomnode.errors import PackageError
from dicomnode.imaging.bundle import monai_metadata
from dicomnode.imaging.intensity import Unscaled, Window
from dicomnode.imaging.manifest import (
    Bounds,
    DicomSpec,
    GeneratorSpec,
    InputSpec,
    Manifest,
    OutputSpec,
    Padding,
    Range,
    Tiling,
    manifest_from_yaml,
    manifest_to_yaml,
)
from dicomnode.imaging.networks import build_generator
from dicomnode.imaging.package import (
    FILES,
    read_golden,
    read_package,
    read_weights,
    write_package,
)

WINDOW = Window(-1024.0, 3071.0)
DENOISER = Manifest(
    format=1,
    name="small-denoiser",
    version="1.2.0",
    task="denoise",
    generator=GeneratorSpec("residual_denoiser", {"width": 8, "blocks": 1}),
    input=InputSpec("CT", "HU", WINDOW, spacing_mm=Range(0.5, 1.0), padding=Padding("reflect", 2)),
    output=OutputSpec("CT", "HU", WINDOW, residual=True),
    normalisation="none",
    tiling=Tiling(True, 24),
    bounds=Bounds(("CT",), rows=Range(64, 1024), exclude={"ConvolutionKernel": ("BONE*",)}),
    dicom=DicomSpec("small-denoiser", "CNN", "1.2.0"),
    licence="MIT",
    intended_use="tests",
    training={"seed": 1, "slices": {"train": 3}},
    validation={"gain_db": [4.0, 3.5, 4.5]},
    qa={"max_mean_change": 5.0},
)


def golden() -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(40, 30, (1, 64, 64)).astype(np.float32)


def write(path: Path, manifest: Manifest = DENOISER) -> Path:
    torch.manual_seed(1)
    generator = build_generator(manifest.generator.architecture, manifest.generator.options)
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    write_package(path, manifest, generator.state_dict(), golden(), "# Card\n")
    return path


def reseal(path: Path) -> None:
    """New sums, as someone who changes a package on purpose would write them."""
    lines = [
        f"{hashlib.sha256((path / name).read_bytes()).hexdigest()}  {name}\n" for name in FILES
    ]
    (path / "SHA256SUMS").write_text("".join(lines))


def test_a_package_reads_back_equal(tmp_path: Path) -> None:
    package = read_package(write(tmp_path / "m"))
    assert package.manifest == DENOISER
    assert (package.name, package.version) == ("small-denoiser", "1.2.0")


def test_the_digest_is_the_sum_of_the_sums(tmp_path: Path) -> None:
    path = write(tmp_path / "m")
    sums = (path / "SHA256SUMS").read_bytes()
    assert read_package(path).digest == hashlib.sha256(sums).hexdigest()


@pytest.mark.skipif(not Path("/usr/bin/sha256sum").exists(), reason="no sha256sum")
def test_sha256sum_agrees(tmp_path: Path) -> None:
    path = write(tmp_path / "m")
    subprocess.run(["/usr/bin/sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=path, check=True)


def test_the_same_model_gives_the_same_digest(tmp_path: Path) -> None:
    digests = {read_package(write(tmp_path / name)).digest for name in ("a", "b")}
    assert len(digests) == 1


@pytest.mark.parametrize("name", sorted(FILES))
def test_one_changed_byte_is_found(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "m")
    data = bytearray((path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (path / name).write_bytes(data)
    with pytest.raises(PackageError, match=f"{name} differs"):
        read_package(path)


@pytest.mark.parametrize("name", [*sorted(FILES), "SHA256SUMS"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "m")
    (path / name).unlink()
    with pytest.raises(PackageError, match=name):
        read_package(path)


def test_a_file_that_is_not_listed_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m")
    (path / "weights.pt").write_bytes(b"pickle")
    with pytest.raises(PackageError, match=r"not listed.*weights\.pt"):
        read_package(path)


def test_a_huge_manifest_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    path = write(tmp_path / "m")
    with (path / "manifest.yaml").open("ab") as stream:
        stream.write(b"#" * FILES["manifest.yaml"])
    reseal(path)
    with pytest.raises(PackageError, match=r"manifest\.yaml is larger"):
        read_package(path)


def test_a_golden_file_that_unpacks_to_gigabytes_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m")
    with zipfile.ZipFile(path / "golden.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("source.npy", bytes(65 << 20))
    with pytest.raises(PackageError, match="more than 64 MiB"):
        read_golden(path)


def test_a_golden_file_with_pickled_objects_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m")
    evil = np.array([os.getcwd], dtype=object)
    np.savez(path / "golden.npz", source=evil, result=evil, tolerance=1.0)
    with pytest.raises(PackageError, match="golden"):
        read_golden(path)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("format: 1", "format: 2", r"manifest\.format: 2"),
        ("task: denoise", "task: improve", r"manifest\.task: 'improve'"),
        ("licence: MIT", "license: MIT", "unknown keys: license"),
        ("residual: true", "residual: 'yes'", r"manifest\.output\.residual: want bool"),
        ("kind: window", "kind: histogram", r"intensity\.kind: 'histogram'"),
        ("low: -1024.0", "low: 4000.0", "is empty"),
        ("slices: 1\n", "slices: 4\n", r"input\.slices"),
        ("name: small-denoiser\nv", "name: ../../etc\nv", r"manifest\.name"),
        ("version: 1.2.0\ntask", "task", r"manifest\.version: missing"),
        ("max_mean_change: 5.0", "max_mean_change: many", r"qa\.max_mean_change: want float"),
        ("max_mean_change: 5.0", "max_mean_change: .nan", "not a number"),
        ("licence: MIT", "licence: &a MIT\nintended_use: *a", "aliases"),
        ("licence: MIT", "licence: [", "not YAML"),
        ("licence: MIT", "licence: !!python/name:os.getcwd", "not YAML"),
    ],
)
def test_a_wrong_manifest_is_refused_with_its_key(old: str, new: str, reason: str) -> None:
    text = manifest_to_yaml(DENOISER)
    assert old in text
    with pytest.raises(PackageError, match=reason):
        manifest_from_yaml(text.replace(old, new, 1).encode())


def test_weights_that_do_not_fit_are_not_written(tmp_path: Path) -> None:
    state = build_generator("residual_denoiser", {"width": 4, "blocks": 1}).state_dict()
    with pytest.raises(PackageError, match="size mismatch"):
        write_package(tmp_path / "m", DENOISER, state, golden(), "# Card\n")
    assert not (tmp_path / "m").exists()


def test_a_new_version_replaces_the_old_one(tmp_path: Path) -> None:
    write(tmp_path / "m")
    path = write(tmp_path / "m", replace(DENOISER, version="1.3.0"))
    assert read_package(path).version == "1.3.0"
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_padding_that_the_generator_cannot_take_is_refused(tmp_path: Path) -> None:
    wrong = replace(DENOISER, input=replace(DENOISER.input, padding=Padding("reflect", 1)))
    with pytest.raises(PackageError, match="multiple of 2"):
        write(tmp_path / "m", wrong)


def test_reading_a_package_does_not_import_torch(tmp_path: Path) -> None:
    """The node process reads packages; torch would cost it 250 MB."""
    path = write(tmp_path / "m")
    code = (
        "import sys, pathlib; from dicomnode.imaging.package import read_package; "
        "read_package(pathlib.Path(sys.argv[1])); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)


def test_an_identity_package_needs_no_window(tmp_path: Path) -> None:
    manifest = replace(
        DENOISER,
        name="identity",
        task="identity",
        generator=GeneratorSpec("identity"),
        input=InputSpec("CT", "HU", Unscaled()),
        output=OutputSpec("CT", "HU", Unscaled()),
    )
    package = write_package(tmp_path / "m", manifest, {}, golden(), "# Card\n", tolerance=0.0)
    assert package.manifest.input.intensity == Unscaled()


def test_a_link_out_of_a_package_is_not_followed(tmp_path: Path) -> None:
    path = write(tmp_path / "m")
    outside = tmp_path / "outside.md"
    (path / "MODEL_CARD.md").rename(outside)
    (path / "MODEL_CARD.md").symlink_to(outside)
    with pytest.raises(PackageError, match=r"MODEL_CARD\.md is not a plain file"):
        read_package(path)


def test_a_pipe_in_a_package_does_not_hang_the_node(tmp_path: Path) -> None:
    path = write(tmp_path / "m")
    (path / "golden.npz").unlink()
    os.mkfifo(path / "golden.npz")
    with pytest.raises(PackageError, match=r"golden\.npz is not a plain file"):
        read_package(path)


def test_sums_of_files_elsewhere_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m")
    text = (path / "SHA256SUMS").read_text()
    (path / "SHA256SUMS").write_text(text.replace("golden.npz", "../m/golden.npz"))
    with pytest.raises(PackageError, match="must list exactly"):
        read_package(path)


@pytest.mark.parametrize("length", [1 << 62, 5 << 20, 10**6])
def test_a_header_of_weights_that_claims_too_much_is_not_parsed(
    tmp_path: Path, length: int
) -> None:
    path = write(tmp_path / "m")
    weights = path / "weights.safetensors"
    body = b"{" * (6 << 20) if length == 5 << 20 else weights.read_bytes()[8:]
    weights.write_bytes(length.to_bytes(8, "little") + body)
    reseal(path)
    with pytest.raises(PackageError, match=f"header claims {length} bytes"):
        read_weights(read_package(path))


def test_weights_that_change_after_they_were_verified_are_refused(tmp_path: Path) -> None:
    package = read_package(write(tmp_path / "m"))
    weights = package.path / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))
    with pytest.raises(PackageError, match="changed since"):
        read_weights(package)
    reseal(package.path)  # and new sums do not help: the digest was another one
    with pytest.raises(PackageError, match="changed since"):
        read_weights(package)


def test_an_array_that_promises_terabytes_is_refused_without_the_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "m")
    header = io.BytesIO()
    shape = {"descr": "<f4", "fortran_order": False, "shape": (1 << 20, 1 << 10, 1 << 10)}
    np.lib.format.write_array_header_1_0(header, shape)
    with zipfile.ZipFile(path / "golden.npz", "w") as archive:
        archive.writestr("source.npy", header.getvalue() + bytes(64))
    with pytest.raises(PackageError, match="less than it promises"):
        read_golden(path)


@pytest.mark.parametrize("cut", [10, 200, -30])
def test_a_golden_file_that_was_cut_is_refused(tmp_path: Path, cut: int) -> None:
    path = write(tmp_path / "m")
    (path / "golden.npz").write_bytes((path / "golden.npz").read_bytes()[:cut])
    with pytest.raises(PackageError, match="golden"):
        read_golden(path)


def test_versions_live_side_by_side(tmp_path: Path) -> None:
    newer = replace(DENOISER, version="1.3.0")
    write(tmp_path / "small-denoiser")
    write(tmp_path / "small-denoiser@1.3.0", newer)
    found = [read_package(p).version for p in sorted(tmp_path.iterdir())]
    assert found == ["1.2.0", "1.3.0"]
    (tmp_path / "small-denoiser@1.3.0").rename(tmp_path / "small-denoiser@2.0.0")
    with pytest.raises(PackageError, match=r"holds small-denoiser@1\.3\.0"):
        read_package(tmp_path / "small-denoiser@2.0.0")


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("normalisation: none", "normalisation: instance", r"input\.grid: exact needs both ends"),
        ("acceptance: {}", "acceptance: {fp4: {mean_abs: 1, p999_abs: 2}}", "no number format fp4"),
        ("acceptance: {}", "acceptance: {bf16: {mean_abs: 1}}", r"bf16\.p999_abs: missing"),
        ("  side: 1024", "  side: 8", r"tiling\.side"),
        ("multiple: 2", "multiple: 0", r"padding\.multiple"),
    ],
)
def test_a_manifest_that_cannot_be_kept_is_refused(old: str, new: str, reason: str) -> None:
    text = manifest_to_yaml(DENOISER)
    assert old in text
    with pytest.raises(PackageError, match=reason):
        manifest_from_yaml(text.replace(old, new).encode())


def test_monai_reads_what_a_package_takes_and_gives(tmp_path: Path) -> None:
    metadata = monai_metadata(read_package(write(tmp_path / "m")))
    image = metadata["network_data_format"]["inputs"]["image"]
    assert (image["format"], image["num_channels"], image["value_range"]) == (
        "hounsfield",
        1,
        [-1, 1],
    )
    assert image["spatial_shape"] == ["2*n", "2*n"]
    assert metadata["version"] == "1.2.0"
    assert json.loads(json.dumps(metadata)) == metadata
    required = ["version", "monai_version", "pytorch_version", "numpy_version", "task"]
    assert not {*required, "description", "authors", "copyright"} - metadata.keys()
