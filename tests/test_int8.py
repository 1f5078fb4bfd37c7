"""8-bit integers: calibrated on training slices, accepted through the gate, used only then."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dicomnode.errors import PackageError
from dicomnode.imaging.engines import (
    EngineError,
    FormStore,
    OpenVinoEngine,
    TorchEngine,
    in_int8,
    installed,
)
from dicomnode.imaging.engines.int8 import Int8Conv
from dicomnode.imaging.gate import HU, gate_for
from dicomnode.imaging.inference import load_model
from dicomnode.imaging.manifest import (
    Acceptance,
    GeneratorSpec,
    Manifest,
    OutputSpec,
    Range,
    Tiling,
)
from dicomnode.imaging.networks import Generator, build_generator
from dicomnode.imaging.package import ModelPackage, read_package, with_manifest, write_package
from dicomnode.imaging.percentiles import Percentiles
from tests.test_package import DENOISER, golden, write
from tests.test_training import write_config, write_series
from training import quantize
from training.calibrate import calibrate, most_that_pass
from training.config import load_config
from training.differences import ssim
from training.material import load_material

needs_openvino = pytest.mark.skipif(not installed(), reason="openvino is not installed")
SMALL = {"body_bias": 0.1, "ssim_drop": 0.001}
SPEC = GeneratorSpec("residual_denoiser", {"width": 8, "blocks": 2})
PLAIN = replace(DENOISER, generator=SPEC, tiling=Tiling())
NAMES = ["blocks.0.first", "blocks.0.second", "blocks.1.first", "blocks.1.second"]


def generator(spread: float = 0.05) -> Generator:
    torch.manual_seed(3)
    made = build_generator(SPEC.architecture, SPEC.options)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=spread)
    return made


def slices(count: int = 3, side: int = 64) -> list[np.ndarray]:
    rng = np.random.default_rng(4)
    return [rng.normal(-0.5, 0.05, (1, 1, side, side)).astype(np.float32) for _ in range(count)]


def accepted(path: Path, acceptance: Acceptance) -> ModelPackage:
    """A package accepted for int8 with these limits."""
    package = read_package(write(path, PLAIN))
    network = load_model(package, precision="fp32").generator
    ranges = {name: Range(low, high) for name, (low, high) in calibrate(network, slices()).items()}
    manifest = replace(package.manifest, acceptance={"int8": acceptance}, int8_limits=ranges)
    return with_manifest(package, manifest)


@pytest.fixture(autouse=True)
def processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor with instructions for bf16 and int8, whatever the one here has."""
    features = frozenset({"avx512_bf16", "avx512_vnni"})
    for module in ("dicomnode.imaging.inference", "training.quantize"):
        monkeypatch.setattr(f"{module}.cpu_features", lambda: features)


def test_an_8_bit_convolution_of_whole_steps_is_exact() -> None:
    rng = np.random.default_rng(1)
    layer = nn.Conv2d(3, 4, 3, padding=1)
    weights = rng.integers(-127, 128, (4, 3, 3, 3))
    weights[:, 0, 0, 0] = 127
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weights * 0.5))
    x = torch.from_numpy(rng.integers(-127, 128, (1, 3, 9, 9)).astype(np.float32))
    with torch.no_grad():
        torch.testing.assert_close(Int8Conv(layer, -127.0, 127.0)(x), layer(x))


def test_an_8_bit_convolution_clips_at_its_limit() -> None:
    layer = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.ones_(layer.weight)
    x = torch.tensor([-300.0, -1.0, 2.4, 255.0, 999.0]).reshape(1, 1, 1, 5)
    with torch.no_grad():
        result = Int8Conv(layer, 0.0, 255.0)(x).flatten()
    torch.testing.assert_close(result, torch.tensor([0.0, 0.0, 2.0, 255.0, 255.0]))


@pytest.mark.parametrize("limits", [{}, {"blocks.7.first": (0.0, 1.0)}])
def test_limits_of_another_generator_are_refused(limits: dict[str, tuple[float, float]]) -> None:
    with pytest.raises(EngineError, match="not convolutions of this generator"):
        in_int8(generator(), limits)


def test_first_and_last_convolution_are_not_calibrated() -> None:
    limits = calibrate(generator(), slices())
    assert list(limits) == NAMES
    assert limits["blocks.0.first"][0] == -limits["blocks.0.first"][1]  # may be negative
    assert limits["blocks.0.second"][0] == 0.0  # follows a ReLU


def test_calibration_takes_a_limit_that_costs_least() -> None:
    """One value far out of 16,000 is clipped, since steps as wide as it cost more."""
    given = slices(1, 128)
    given[0][0, 0, 5, 5] = 5.0
    network = generator()
    limit = calibrate(network, given)["blocks.0.first"][1]
    with torch.no_grad():
        scaled = (torch.from_numpy(given[0]) - network.centre) * network.gain
        largest = float(network.first(nn.functional.pixel_unshuffle(scaled, 2)).abs().max())
    assert limit < largest
    assert limit > calibrate(network, slices(1, 128))["blocks.0.first"][1]


def test_as_many_convolutions_are_in_8_bits_as_pass() -> None:
    network = generator()
    limits = calibrate(network, slices())

    def at_most(count: int) -> dict[str, tuple[float, float]]:
        def passes(changed: Generator) -> bool:
            return sum(isinstance(m, Int8Conv) for m in changed.modules()) <= count

        return most_that_pass(NAMES[::-1], network, limits, passes)

    assert list(at_most(4)) == NAMES[::-1]
    assert list(at_most(3)) == NAMES[:0:-1]
    assert list(at_most(1)) == [NAMES[-1]]
    assert at_most(0) == {}


@needs_openvino
def test_openvino_rounds_to_8_bits_where_the_generator_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the rest in fp32, so that nothing else rounds."""
    monkeypatch.setattr("dicomnode.imaging.engines.openvino_engine.cpu_features", frozenset)
    network = generator()
    limits = calibrate(network, slices())
    x = slices(1)[0]
    exact = TorchEngine(network, "cpu", "fp32").run(x)
    rounded = TorchEngine(in_int8(network, limits), "cpu", "fp32").run(x)
    result = OpenVinoEngine(network, "int8", limits=limits).run(x)
    rounding = np.abs(rounded - exact).mean()
    assert np.abs(result - rounded).mean() < 0.01 * rounding
    assert 0 < rounding < 0.05 * np.abs(exact).mean()


@needs_openvino
def test_openvino_computes_int8_in_8_bit_integers(tmp_path: Path) -> None:
    network, store = generator(), FormStore(tmp_path)
    limits = calibrate(network, slices())
    for _ in ("compiled", "from the disk"):
        engine = OpenVinoEngine(network, "int8", digest="d", store=store, limits=limits)
        engine.run(slices(1)[0])
        assert "i8" in engine.kernels
    assert engine.restored == 1
    plain = OpenVinoEngine(network, "fp32")
    plain.run(slices(1)[0])
    assert plain.kernels == {"f32"}


@needs_openvino
def test_compiled_forms_of_bf16_and_int8_are_told_apart(tmp_path: Path) -> None:
    """Both may run what is not in 8 bits with the same options."""
    network, store = generator(), FormStore(tmp_path)
    limits = calibrate(network, slices())
    plain = OpenVinoEngine(network, "bf16", digest="d", store=store)
    coarse = OpenVinoEngine(network, "int8", digest="d", store=store, limits=limits)
    assert not np.array_equal(plain.run(slices(1)[0]), coarse.run(slices(1)[0]))
    assert (coarse.compiled, coarse.restored) == (1, 0)


@needs_openvino
def test_int8_is_used_when_asked_for_and_accepted(tmp_path: Path) -> None:
    package = accepted(tmp_path / "m", Acceptance(1.0, 10.0, 20, SMALL))
    assert load_model(package, precision="int8").precision == "int8"
    assert load_model(package).precision == "fp32"  # auto never is


@pytest.mark.parametrize(
    ("acceptance", "reason"),
    [
        (Acceptance(1.5, 10.0, 20, SMALL), "mean_abs 1.5, allowed 1"),
        (Acceptance(1.0, 10.5, 20, SMALL), "p999_abs 10.5, allowed 10"),
        (Acceptance(1.0, 10.0, 20, {**SMALL, "body_bias": 0.6}), "body_bias 0.6, allowed 0.5"),
        (Acceptance(1.0, 10.0, 20, {**SMALL, "ssim_drop": 0.003}), "ssim_drop 0.003"),
        (Acceptance(1.0, 10.0, 20), "body_bias nan"),
    ],
)
def test_int8_that_was_accepted_with_too_much_is_not_used(
    tmp_path: Path, acceptance: Acceptance, reason: str
) -> None:
    model = load_model(accepted(tmp_path / "m", acceptance), precision="int8")
    assert model.precision == "fp32"
    assert f"not int8: accepted with too much: {reason}" in model.words


@needs_openvino
def test_a_package_whose_int8_exceeds_its_tolerance_is_refused_it(tmp_path: Path) -> None:
    package = accepted(tmp_path / "m", Acceptance(1e-5, 1e-4, 20, SMALL))
    model = load_model(package, precision="int8")
    assert model.precision == "fp32"
    assert "not openvino int8: self-test on cpu in int8 differs by" in model.words


def test_limits_in_a_manifest_have_two_ends() -> None:
    with pytest.raises(PackageError, match=r"manifest\.int8_limits"):
        replace(DENOISER, int8_limits={"first": Range(0.0, None)})


def test_the_gate_of_another_unit_is_the_same_share_of_its_window() -> None:
    suv = OutputSpec("PT", "SUV", replace(DENOISER.output.intensity, low=0.0, high=20.0))  # type: ignore[type-var]
    gate = gate_for(suv)
    assert gate is not None
    assert (gate.mean_abs, gate.body_bias) == pytest.approx((0.01, 0.005))
    assert gate.ssim_drop == HU.ssim_drop
    assert gate_for(OutputSpec("MR", "AU", Percentiles(1.0, 99.0))) is None


def test_similarity_is_that_of_scikit_image() -> None:
    from skimage.metrics import structural_similarity

    rng = np.random.default_rng(2)
    truth = rng.normal(40, 60, (96, 80)).astype(np.float32)
    image = truth + rng.normal(0, 20, truth.shape).astype(np.float32)
    x, y = (np.clip(one, -160, 240).astype(np.float64) for one in (image, truth))
    wanted = structural_similarity(
        x,
        y,
        data_range=400,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )[1].mean()
    assert ssim(image, truth, -160, 240) == pytest.approx(wanted, abs=1e-4)


# --- the command


def after_quantizing(folder: Path, spread: float, *options: str) -> Manifest:
    """The manifest of a package, with weights that spread so, after `training/quantize.py`."""
    for number in range(4):
        write_series(folder / "data" / "ct", f"P{number}", number + 1)
    config = write_config(folder / "data" / "ct", folder)
    load_material(load_config(config))  # writes the split, as training did
    manifest = replace(PLAIN, acceptance={"int8": Acceptance(1.0, 10.0)})
    state = generator(spread).state_dict()
    write_package(folder / "m", manifest, state, golden(), "# Card")
    sizes = ["--calibration", "4", "--slices", "2"]
    quantize.main([str(folder / "m"), "--data", str(config), *sizes, *options])
    return read_package(folder / "m").manifest


@needs_openvino
def test_quantizing_writes_what_the_package_is_accepted_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = after_quantizing(tmp_path, 0.05)
    assert manifest.acceptance.keys() == {"bf16", "int8"}
    assert list(manifest.int8_limits) == NAMES
    accepted = manifest.acceptance["int8"]
    assert accepted.slices == 2
    assert not HU.broken_by(accepted.measured)
    assert accepted.measured["mean_abs"] < accepted.mean_abs <= 1.0
    model = load_model(read_package(tmp_path / "m"), precision="int8")
    assert model.precision == "int8"
    assert "int8 openvino: mean_abs" in capsys.readouterr().out


@needs_openvino
def test_what_breaks_the_gate_is_taken_out_of_the_package(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = after_quantizing(tmp_path, 0.6)
    assert "int8" not in manifest.acceptance
    assert not manifest.int8_limits
    out = capsys.readouterr().out
    assert "bf16 torch" in out
    assert "REFUSED: mean_abs" in out


@needs_openvino
def test_a_dry_run_leaves_the_package_as_it_is(tmp_path: Path) -> None:
    manifest = after_quantizing(tmp_path, 0.05, "--dry-run")
    assert manifest.acceptance == {"int8": Acceptance(1.0, 10.0)}
