"""PyTorch on a GPU: the pipeline and the captured graph change no result; memory may run out.

Skipped where there is no GPU. `benchmarks/gpu.sh` runs them on a machine that has one.
"""

import gc
from pathlib import Path

import numpy as np
import pytest
import torch

from dicomnode.imaging.engines import TorchEngine, WithinMemory, cuda
from dicomnode.imaging.inference import load_model, predict
from dicomnode.imaging.networks import build_generator
from dicomnode.imaging.package import read_package
from dicomnode.imaging.pending import in_order
from tests.factories import ct_series, write_series
from tests.test_engines import package, slices, trained
from tests.test_inference import volume
from tests.test_networks import ALL
from tests.test_package import DENOISER, write
from tests.test_stages import in_turn, streamed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
]
NETWORK = ("resnet", {"width": 16, "blocks": 2})
PRECISIONS = ["fp32", "bf16", "fp16"]
NEAR = {"fp32": 1e-4, "bf16": 0.1, "fp16": 0.02}
"""Of the largest value: how far a number format may be from fp32 on the CPU."""


def engine(precision: str, *, graphs: bool = True, size: int | None = None) -> TorchEngine:
    network = trained(*NETWORK)
    return TorchEngine(network, "cuda", precision, graphs=graphs, at_once=size)  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("architecture", "options"), ALL)
def test_a_gpu_computes_what_the_cpu_computes(
    architecture: str, options: dict[str, object], precision: str
) -> None:
    generator = trained(architecture, options)
    x = slices(2, 256 if architecture == "unet_256" else 128)
    x = np.repeat(x, generator.slices, axis=1)
    expected = TorchEngine(generator, "cpu", "fp32").run(x)
    result = TorchEngine(generator, "cuda", precision).run(x)  # type: ignore[arg-type]
    limit = NEAR[precision] * max(1.0, float(np.abs(expected).max()))
    assert float(np.abs(result - expected).mean()) <= limit / 10
    assert float(np.abs(result - expected).max()) <= limit


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_captured_graph_has_the_bits_of_single_kernels(precision: str) -> None:
    x = slices(8, 64)
    single, graph = engine(precision, graphs=False), engine(precision)
    np.testing.assert_array_equal(graph.run(x), single.run(x))
    assert "graphs are not wanted" in single.remarks[0]
    assert "bits" not in graph.remarks[0], graph.remarks
    print(precision, graph.remarks)


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_batches_under_way_at_once_have_the_bits_of_one_after_the_other(
    precision: str, graphs: bool
) -> None:
    x, own = slices(61, 64), engine(precision, graphs=graphs, size=4)
    alone = np.concatenate([own.run(x[i : i + 4]) for i in range(0, 61, 4)])
    for _ in range(5):
        memory, parts = np.empty((4, 1, 64, 64), np.float32), [*range(0, 61, 4)]

        def begun(memory: np.ndarray = memory, parts: list[int] = parts) -> object:
            for start in parts:
                part = x[start : start + 4]
                memory[: len(part)] = part
                yield own.start(memory[: len(part)])
                memory[:] = np.nan  # a batch that was begun needs it no more

        for ahead in (1, 2, 5):
            together = np.concatenate(list(in_order(begun(), ahead)))  # type: ignore[arg-type]
            np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_slice_has_its_bits_in_any_order_and_in_a_short_batch(precision: str) -> None:
    x, own = slices(11, 64), engine(precision, size=4)
    whole = own.run(x)
    np.testing.assert_array_equal(own.run(x), whole)
    np.testing.assert_array_equal(own.run(x[8:]), whole[8:])
    np.testing.assert_array_equal(own.run(x[::-1].copy())[::-1], whole)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_another_batch_size_gives_nearly_the_same(precision: str) -> None:
    x = slices(8, 64)
    one, eight = engine(precision, size=1).run(x), engine(precision, size=8).run(x)
    np.testing.assert_allclose(one, eight, atol=NEAR[precision] * np.abs(one).max())


def test_sizes_that_take_turns_do_not_meet() -> None:
    own = engine("bf16")
    sides = (64, 96, 128, 64, 128, 96)
    expected = {side: own.run(slices(5, side)) for side in set(sides)}
    for side in sides:
        np.testing.assert_array_equal(own.run(slices(5, side)), expected[side])


def test_two_engines_share_a_gpu_between_batches() -> None:
    x, first, second = slices(12, 64), engine("bf16", size=2), engine("fp16", size=3)
    expected = first.run(x), second.run(x)
    found: list[np.ndarray] = []

    def begun() -> object:
        for start in range(0, 12, 2):
            found.append(second.run(x))
            yield first.start(x[start : start + 2])

    whole = np.concatenate(list(in_order(begun(), 2)))  # type: ignore[arg-type]
    np.testing.assert_array_equal(whole, expected[0])
    for other in found:
        np.testing.assert_array_equal(other, expected[1])


def test_the_identity_is_exact_on_a_gpu() -> None:
    x = slices(5) * 4000
    for precision in PRECISIONS:
        own = TorchEngine(build_generator("identity", {}), "cuda", precision)  # type: ignore[arg-type]
        np.testing.assert_array_equal(own.run(x), x)


def test_fp32_is_no_tf32() -> None:
    torch.manual_seed(3)
    x, network = slices(1, 128), build_generator("resnet_6", {"width": 32})
    expected = TorchEngine(network, "cpu", "fp32").run(x)
    result = TorchEngine(network, "cuda", "fp32").run(x)
    assert float(np.abs(result - expected).max()) <= 1e-4 * float(np.abs(expected).max())


@pytest.fixture
def little_memory() -> object:
    """Another has all memory of the GPU but 600 MB."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    other = torch.empty(free - 600_000_000, dtype=torch.uint8, device="cuda")
    yield other
    del other
    torch.cuda.empty_cache()


@pytest.mark.parametrize("graphs", [False, True])
def test_what_does_not_fit_is_halved_and_goes_on(little_memory: object, graphs: bool) -> None:
    network = build_generator("resnet", {"width": 32, "blocks": 2})
    own = TorchEngine(network, "cuda", "fp32", graphs=graphs, at_once=32)
    fitting, x = WithinMemory(own), slices(40, 256)
    parts = (x[i : i + 32] for i in range(0, 40, 32))
    result = np.concatenate(list(in_order(map(fitting.start, parts), fitting.ahead)))
    assert fitting.halved > 0
    size = own.batch(256, 256)
    assert size < 32
    smaller = TorchEngine(network, "cuda", "fp32", graphs=False, at_once=size)
    np.testing.assert_array_equal(result[32:], smaller.run(x[32:]))
    own.run(x)
    assert own.batch(256, 256) == size  # and it is not tried again


def test_memory_does_not_grow_with_the_length_of_a_series() -> None:
    own, x = engine("bf16", size=4), slices(4, 64)

    def after(batches: int) -> int:
        torch.cuda.reset_peak_memory_stats()
        list(in_order((own.start(x) for _ in range(batches)), 2))
        return torch.cuda.max_memory_allocated()

    after(8)
    assert after(200) == after(8)


def test_a_fresh_engine_does_not_run_before_its_weights_are_there() -> None:
    network, x = build_generator("resnet_9", {}), slices(1, 64)
    first = TorchEngine(network, "cuda", "fp32", graphs=False).run(x)
    for _ in range(10):
        again = TorchEngine(network, "cuda", "fp32", graphs=False).run(x)
        np.testing.assert_array_equal(again, first)


def test_a_package_is_served_on_a_gpu_within_its_tolerance(tmp_path: Path) -> None:
    model = load_model(package(tmp_path / "gpu"), "cuda")
    reference = load_model(package(tmp_path / "cpu"), precision="fp32")
    assert "on cuda" in model.words
    assert "allowed" in model.self_test
    found, expected = predict(model, volume()).voxels, predict(reference, volume()).voxels
    np.testing.assert_allclose(found, expected, atol=0.5)


def test_a_series_has_the_same_bytes_with_and_without_the_pipeline(tmp_path: Path) -> None:
    model = load_model(read_package(write(tmp_path / "m", DENOISER)), "cuda")
    model.engine = TorchEngine(model.generator, "cuda", model.precision, at_once=4)
    datasets = ct_series(23, 64, 70)
    files = write_series(datasets, tmp_path / "in")
    for number in range(3):
        written, _ = streamed(files, model, tmp_path / f"out{number}")
        assert written == in_turn(datasets, model)


def test_an_engine_that_is_let_go_leaves_no_memory_behind() -> None:
    x = slices(9, 64)
    engine("bf16", size=4).run(x)  # what the libraries keep, they have now
    gc.collect()
    gc.disable()  # nothing may wait for a collection: a model that is put away makes room at once
    before = torch.cuda.memory_allocated()
    try:
        own = engine("bf16", size=4)
        own.run(x)
        assert torch.cuda.memory_allocated() > before
        del own
        assert torch.cuda.memory_allocated() <= before
    finally:
        gc.enable()


def test_room_for_a_batch_does_not_shrink_by_what_torch_keeps() -> None:
    device = torch.device("cuda")
    before = cuda.free_bytes(device)
    kept = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    del kept  # in torch's cache now
    assert abs(cuda.free_bytes(device) - before) < 64 << 20
