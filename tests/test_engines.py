"""Engines: held to fp32 torch, the same bits on every run, replaced when they fail."""

import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dicomnode.errors import OutOfMemory, PackageError
from dicomnode.imaging.engines import (
    EngineError,
    FormStore,
    OpenVinoEngine,
    TorchEngine,
    WithinMemory,
    hardware,
    installed,
)
from dicomnode.imaging.engines.subpixel import without_transposed
from dicomnode.imaging.inference import load_model, predict
from dicomnode.imaging.manifest import Acceptance, GeneratorSpec, Manifest, Padding, Tiling
from dicomnode.imaging.networks import Generator, build_generator, run_tiled
from dicomnode.imaging.package import ModelPackage, read_package
from tests.peers import identity_package
from tests.test_inference import volume
from tests.test_networks import ALL
from tests.test_package import DENOISER, reseal, write

needs_openvino = pytest.mark.skipif(not installed(), reason="openvino is not installed")
BF16 = {"bf16": Acceptance(mean_abs=1.0, p999_abs=10.0)}


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A processor with AMX, whatever the one here has."""
    _give(monkeypatch, "amx_bf16", "amx_int8")
    return monkeypatch


def _give(monkeypatch: pytest.MonkeyPatch, *features: str) -> None:
    monkeypatch.setattr(
        "dicomnode.imaging.inference.cpu_features", lambda: frozenset({"avx2", *features})
    )


def slices(count: int = 2, side: int = 128) -> np.ndarray:
    """(batch, 1, rows, columns), float32, about [-1, 1]."""
    rng = np.random.default_rng(8)
    return (rng.standard_normal((count, 1, side, side)) * 0.3).astype(np.float32)


def trained(architecture: str, options: dict[str, object]) -> Generator:
    torch.manual_seed(5)
    generator = build_generator(architecture, options)
    if architecture == "residual_denoiser":
        torch.nn.init.normal_(generator.last.weight, std=0.05)
        if generator.coarse is not None:
            torch.nn.init.normal_(generator.coarse[-1].weight, std=0.5)
    return generator


def package(path: Path, manifest: Manifest = DENOISER) -> ModelPackage:
    return read_package(write(path, manifest))


@needs_openvino
@pytest.mark.parametrize(("architecture", "options"), ALL)
def test_openvino_computes_what_torch_computes(
    architecture: str, options: dict[str, object]
) -> None:
    generator = trained(architecture, options)
    x = slices(1, 256 if architecture == "unet_256" else 128)
    expected = TorchEngine(generator, "cpu", "fp32").run(x)
    result = OpenVinoEngine(generator, "fp32").run(x)
    np.testing.assert_allclose(result, expected, atol=2e-5 * max(1.0, np.abs(expected).max()))


ENGINES = [
    pytest.param("openvino", "fp32", marks=needs_openvino),
    pytest.param("openvino", "bf16", marks=needs_openvino),
    ("torch", "fp32"),
    ("torch", "bf16"),
]


def _engine(kind: str, precision: str, generator: Generator) -> TorchEngine | OpenVinoEngine:
    if kind == "openvino":
        return OpenVinoEngine(generator, precision)  # type: ignore[arg-type]
    return TorchEngine(generator, "cpu", precision)  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "precision"), ENGINES)
def test_an_engine_repeats_its_bits_in_any_order_and_batch(kind: str, precision: str) -> None:
    engine = _engine(kind, precision, trained("resnet", {"width": 8, "blocks": 2}))
    x = slices(5, 64)
    alone = np.concatenate([engine.run(x[i : i + 1]) for i in range(5)])
    np.testing.assert_array_equal(engine.run(x), alone)
    np.testing.assert_array_equal(engine.run(x[::-1].copy())[::-1], alone)
    np.testing.assert_array_equal(engine.run(x[:3]), alone[:3])


@pytest.mark.parametrize(("kind", "precision"), ENGINES)
def test_the_identity_is_exact_in_every_engine(kind: str, precision: str) -> None:
    x = slices() * 4000
    engine = _engine(kind, precision, build_generator("identity", {}))
    np.testing.assert_array_equal(engine.run(x), x)


@needs_openvino
def test_an_identity_package_is_exact_in_bf16(tmp_path: Path, processor: object) -> None:
    path = identity_package(tmp_path)
    text = (path / "manifest.yaml").read_text()
    accepted = "acceptance: {bf16: {mean_abs: 0.0, p999_abs: 0.0}}"
    (path / "manifest.yaml").write_text(text.replace("acceptance: {}", accepted))
    reseal(path)
    model = load_model(read_package(path))
    source = volume()
    source.voxels[0, 0, :3] = [-8192.0, 0.1, 32767.0]
    assert model.precision == "bf16"
    np.testing.assert_array_equal(predict(model, source).voxels, source.voxels)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("resnet", {"width": 4, "blocks": 1}),
        ("unet_128", {"width": 2, "norm": "batch"}),
        ("gan_circle", {"width": 16, "stride": 2}),
        ("red_cnn", {"width": 4}),
    ],
)
def test_a_transposed_convolution_is_a_convolution_and_a_shuffle(
    architecture: str, options: dict[str, object]
) -> None:
    generator = trained(architecture, options)
    rewritten = without_transposed(generator)
    x = torch.from_numpy(slices())
    with torch.no_grad():
        torch.testing.assert_close(rewritten(x), generator(x), rtol=0, atol=2e-6)
    kinds = {type(module) for module in rewritten.modules()}
    assert torch.nn.ConvTranspose2d not in kinds


TILED = [
    ("residual_denoiser", {"width": 8, "blocks": 1}),
    ("residual_denoiser", {"width": 8, "blocks": 2, "coarse": 1}),
    ("unshuffle_resnet", {"width": 16, "blocks": 1}),
    ("resnet", {"width": 8, "blocks": 1, "norm": "none"}),
]


@pytest.mark.parametrize(("kind", "precision"), ENGINES)
@pytest.mark.parametrize(("architecture", "options"), TILED)
def test_tiles_give_the_bits_of_the_whole_slice(
    kind: str, precision: str, architecture: str, options: dict[str, object]
) -> None:
    generator = trained(architecture, options)
    assert generator.tiles_exactly
    overlap = -(-generator.receptive_field // 8) * 8
    engine = _engine(kind, precision, generator)
    x = np.random.default_rng(2).normal(0, 0.3, (1, 1, 264, 392)).astype(np.float32)
    tiled = run_tiled(engine.run, (overlap, 256, generator.multiple), x)
    np.testing.assert_array_equal(tiled, engine.run(x))


class _Small:
    """An engine with room for two slices."""

    name, precision = "small", "fp32"

    def __init__(self, error: Exception) -> None:
        self._error = error

    def batch(self, rows: int, columns: int) -> int:
        return 8

    def run(self, x: np.ndarray) -> np.ndarray:
        if len(x) > 2:
            raise self._error
        return x + 1


@pytest.mark.parametrize(("count", "halved", "then"), [(2, 0, 8), (3, 1, 2), (7, 2, 2), (8, 2, 2)])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("std::bad_alloc"),
    ],
    ids=["cuda", "python", "torch", "openvino"],
)
def test_out_of_memory_halves_the_batch_and_goes_on(
    count: int, halved: int, then: int, error: Exception
) -> None:
    fitting = WithinMemory(_Small(error))  # type: ignore[arg-type]
    x = slices(count, 8)
    np.testing.assert_array_equal(fitting.run(x), x + 1)
    assert fitting.halved == halved
    assert fitting.batch(8, 8) == then  # what did not fit is not tried again


def test_one_slice_that_does_not_fit_is_an_error() -> None:
    class Never(_Small):
        def run(self, x: np.ndarray) -> np.ndarray:
            raise self._error

    with pytest.raises(OutOfMemory, match="not even one slice"):
        WithinMemory(Never(MemoryError())).run(slices(4, 8))  # type: ignore[arg-type]


def test_another_error_is_not_taken_for_lack_of_memory() -> None:
    with pytest.raises(RuntimeError, match="shapes differ"):
        WithinMemory(_Small(RuntimeError("shapes differ"))).run(slices(4, 8))  # type: ignore[arg-type]


@needs_openvino
def test_bf16_is_used_where_it_was_accepted(tmp_path: Path, processor: object) -> None:
    model = load_model(package(tmp_path / "m", replace(DENOISER, acceptance=BF16)))
    assert (model.precision, model.refused) == ("bf16", ())
    assert model.words.startswith("openvino 20")


@pytest.mark.parametrize("precision", ["auto", "bf16", "int8"])
def test_bf16_is_never_used_where_it_was_not_accepted(
    tmp_path: Path, processor: object, precision: str
) -> None:
    model = load_model(package(tmp_path / "m"), precision=precision)
    assert model.precision == "fp32"
    if precision != "auto":
        assert f"not {precision}: the package was not accepted for it" in model.words


def test_fp32_can_be_asked_for(tmp_path: Path, processor: object) -> None:
    accepted = replace(DENOISER, acceptance=BF16)
    assert load_model(package(tmp_path / "m", accepted), precision="fp32").precision == "fp32"


def test_bf16_is_not_used_on_a_processor_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _give(monkeypatch)
    model = load_model(package(tmp_path / "m", replace(DENOISER, acceptance=BF16)))
    assert model.precision == "fp32"
    assert "not bf16: this processor has no instructions for it" in model.words


@needs_openvino
def test_a_package_whose_bf16_is_too_far_off_runs_in_fp32(
    tmp_path: Path, processor: object, caplog: pytest.LogCaptureFixture
) -> None:
    strict = replace(DENOISER, acceptance={"bf16": Acceptance(mean_abs=1e-4, p999_abs=1e-3)})
    with caplog.at_level(logging.WARNING):
        model = load_model(package(tmp_path / "m", strict))
    assert model.precision == "fp32"
    assert "not openvino bf16: self-test on cpu in bf16 differs by" in model.words
    assert "accepted are 0.0001 and 0.001" in caplog.text


def test_a_model_without_openvino_runs_on_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dicomnode.imaging.inference.installed", lambda: False)
    model = load_model(package(tmp_path / "m"))
    assert model.words == f"torch {torch.__version__}, fp32 on cpu"


def test_bf16_needs_no_openvino(tmp_path: Path, processor: pytest.MonkeyPatch) -> None:
    processor.setattr("dicomnode.imaging.inference.installed", lambda: False)
    model = load_model(package(tmp_path / "m", replace(DENOISER, acceptance=BF16)))
    assert model.words == f"torch {torch.__version__}, bf16 on cpu"


def test_an_openvino_that_cannot_be_imported_is_no_reason_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dicomnode.imaging.inference.installed", lambda: True)
    monkeypatch.setitem(sys.modules, "openvino", None)
    model = load_model(package(tmp_path / "m"))
    assert model.engine.name.startswith("torch")
    assert "openvino cannot be imported" in model.words


class _Broken:
    """An engine that passed its self-test and fails later."""

    name, precision = "broken 1", "fp32"

    def batch(self, rows: int, columns: int) -> int:
        return 1

    def run(self, x: np.ndarray) -> np.ndarray:
        raise EngineError("broken 1: no more")


def test_an_engine_that_fails_later_is_replaced_by_the_reference(tmp_path: Path) -> None:
    model = load_model(package(tmp_path / "m"))
    reference = load_model(package(tmp_path / "r"), precision="fp32")
    reference.engine = TorchEngine(reference.generator, "cpu", "fp32")
    model.engine = _Broken()  # type: ignore[assignment]
    np.testing.assert_array_equal(
        predict(model, volume()).voxels, predict(reference, volume()).voxels
    )
    assert model.engine.name.startswith("torch")
    assert "broken 1: no more" in model.words
    assert model.self_test.startswith("0 HU at most")


def test_a_reference_that_fails_its_self_test_replaces_nothing(tmp_path: Path) -> None:
    model = load_model(package(tmp_path / "m"))
    model.engine = _Broken()  # type: ignore[assignment]
    with torch.no_grad():
        next(model.generator.parameters()).mul_(2)
    with pytest.raises(PackageError, match="self-test on cpu differs by"):
        predict(model, volume())


@needs_openvino
def test_a_compiled_form_is_kept_and_gives_the_same_bits(tmp_path: Path) -> None:
    generator = trained("resnet", {"width": 8, "blocks": 1})
    store, x = FormStore(tmp_path / "cache"), slices()
    first = OpenVinoEngine(generator, "fp32", digest="d", store=store)
    second = OpenVinoEngine(generator, "fp32", digest="d", store=store)
    np.testing.assert_array_equal(second.run(x), first.run(x))
    second.run(x)
    made = [(engine.compiled, engine.restored) for engine in (first, second)]
    assert made in ([(1, 0), (0, 1)], [(0, 1), (1, 0)])


@needs_openvino
@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign", "resealed"])
def test_a_damaged_compiled_form_is_made_again(tmp_path: Path, damage: str) -> None:
    generator = trained("resnet", {"width": 8, "blocks": 1})
    folder, x = tmp_path / "cache", slices()
    expected = OpenVinoEngine(generator, "fp32", digest="d", store=FormStore(folder)).run(x)
    (form,) = folder.glob("*.form")
    data = bytearray(form.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 1
    form.write_bytes({"cut": data[:-100], "foreign": b"another file"}.get(damage, data))
    if damage == "resealed":  # whole by its sum, but not what OpenVINO wrote
        engine = OpenVinoEngine(generator, "fp32", digest="d", store=FormStore(folder))
        FormStore(folder).write(engine._key(x[:1].shape), b"nonsense" * 100)
    again = OpenVinoEngine(generator, "fp32", digest="d", store=FormStore(folder))
    np.testing.assert_array_equal(again.run(x), expected)
    assert (again.compiled, again.restored) == (1, 0)
    third = OpenVinoEngine(generator, "fp32", digest="d", store=FormStore(folder))
    third.run(x)
    assert third.restored == 1


@needs_openvino
def test_another_package_precision_or_processor_has_its_own_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, x = trained("resnet", {"width": 4, "blocks": 1}), slices(1, 32)
    store = FormStore(tmp_path)

    def compiled(digest: str, precision: str) -> int:
        engine = OpenVinoEngine(generator, precision, digest=digest, store=store)  # type: ignore[arg-type]
        engine.run(x)
        return engine.compiled

    assert [compiled("a", "fp32"), compiled("a", "fp32")] == [1, 0]
    assert [compiled("b", "fp32"), compiled("a", "bf16")] == [1, 1]
    monkeypatch.setattr(
        "dicomnode.imaging.engines.openvino_engine.cpu_features", lambda: frozenset({"avx2"})
    )
    assert compiled("a", "fp32") == 1


def test_a_store_that_cannot_be_written_is_no_reason_to_stop(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = FormStore(tmp_path / "file" / "cache")
    store.write("key", b"form")
    assert store.read("key") is None


def test_a_store_forgets_what_was_not_used_for_longest(tmp_path: Path) -> None:
    store = FormStore(tmp_path)
    for number in range(30):
        store.write(str(number), b"form")
        os.utime(store.path(str(number)), (number, number))
    store.write("30", b"form")
    assert store.read("0") is None
    assert store.read("29") == b"form"
    assert len(list(tmp_path.iterdir())) == 24


@needs_openvino
def test_nothing_is_told_to_a_server_by_openvino(tmp_path: Path) -> None:
    """No socket but those of the machine itself is opened while a model is converted and run."""
    code = (
        "import socket, sys, pathlib\n"
        "def refuse(*a, **k): print('CONNECTED', a); sys.exit(3)\n"
        "socket.socket.connect = refuse; socket.create_connection = refuse\n"
        "socket.getaddrinfo = refuse\n"
        "from dicomnode.imaging.inference import load_model\n"
        "from dicomnode.imaging.package import read_package\n"
        "print(load_model(read_package(pathlib.Path(sys.argv[1]))).words)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(write(tmp_path / "m"))],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert "CONNECTED" not in done.stdout
    assert done.stdout.startswith("openvino 20")
    assert not list(tmp_path.glob("**/openvino_ga*"))  # no consent file, no identifier


@pytest.mark.parametrize(
    ("lines", "precision", "well"),
    [
        ("flags\t\t: fpu avx2 avx512_bf16\n", "bf16", True),
        ("flags\t\t: fpu avx2 amx_bf16\n", "bf16", True),
        ("flags\t\t: fpu avx2\n", "bf16", False),
        ("Features\t: asimd fp\n", "bf16", False),
        ("", "fp32", True),
        ("flags\t\t: avx_vnni\n", "int8", True),
        ("flags\t\t: avx512_bf16\n", "fp16", False),
    ],
)
def test_what_a_processor_runs_well(tmp_path: Path, lines: str, precision: str, well: bool) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{lines}")
    assert hardware.runs_well(precision, hardware.cpu_features(tmp_path / "cpuinfo")) == well


@pytest.mark.parametrize(
    ("precision", "engines"),
    [("fp32", ("openvino", "torch")), ("bf16", ("openvino", "torch")), ("int8", ("openvino",))],
)
def test_openvino_is_tried_before_torch(precision: str, engines: tuple[str, ...]) -> None:
    assert hardware.engines_for(precision) == engines


def test_a_machine_without_cpuinfo_has_no_features(tmp_path: Path) -> None:
    assert hardware.cpu_features(tmp_path / "none") == frozenset()


@pytest.mark.parametrize(("engine", "precision"), [("torch", "int8"), ("openvino", "int8")])
def test_a_number_format_that_an_engine_does_not_run_is_refused(
    engine: str, precision: str
) -> None:
    with pytest.raises(EngineError, match=r"does not run int8|int8: not convolutions.*none at all"):
        _engine(engine, precision, build_generator("identity", {}))


def test_no_promise_of_a_manifest_about_its_generator_is_taken_on_trust(tmp_path: Path) -> None:
    resnet = GeneratorSpec("resnet", {"width": 4, "blocks": 1, "norm": "none"})
    multiple = replace(DENOISER.input, padding=Padding("reflect", 4))
    wrong = {
        "normalisation": replace(
            DENOISER, generator=replace(resnet, options={"width": 4, "blocks": 1}), input=multiple
        ),
        r"padding\.multiple": replace(DENOISER, generator=resnet, tiling=Tiling()),
        r"input\.slices": replace(
            DENOISER, generator=resnet, input=replace(multiple, slices=3), tiling=Tiling()
        ),
        r"tiling\.overlap": replace(DENOISER, tiling=Tiling(True, 8)),
        r"tiling: a tile of red_cnn": replace(DENOISER, generator=GeneratorSpec("red_cnn", {})),
    }
    for number, (reason, manifest) in enumerate(wrong.items()):
        with pytest.raises(PackageError, match=reason):
            write(tmp_path / str(number), manifest)
