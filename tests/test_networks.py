"""Generators: closed registry, right sizes, no dependence on what lies far away."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from dicomnode.errors import PackageError
from dicomnode.imaging.intensity import Unscaled, Window
from dicomnode.imaging.networks import (
    GENERATORS,
    Generator,
    build_generator,
    count_weights,
    load_upstream,
    pad_to_multiple,
    plan_generator,
    read_pth,
    run_generator,
    run_slices,
    run_tiled,
)
from dicomnode.imaging.networks.gan_circle import filters

SMALL = {"width": 8, "blocks": 2}
CT = Window(-1024.0, 3071.0)


def trained(options: dict[str, int] | None = None) -> Generator:
    """A denoiser whose last layer is not zero, as after training."""
    torch.manual_seed(3)
    generator = build_generator("residual_denoiser", options or SMALL)
    torch.nn.init.normal_(generator.last.weight, std=0.05)
    return generator


def noisy(slices: int, rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(0).normal(40, 30, (slices, rows, columns)).astype(np.float32)


def run(generator: Generator, hu: np.ndarray) -> np.ndarray:
    return run_generator(generator, hu, CT, CT, residual=True)


def test_an_untrained_denoiser_changes_nothing() -> None:
    hu = noisy(2, 64, 64)
    np.testing.assert_array_equal(run(build_generator("residual_denoiser", SMALL), hu), hu)


@pytest.mark.parametrize("shape", [(64, 64), (65, 64), (64, 67), (97, 130)])
def test_any_matrix_comes_back_in_its_own_size(shape: tuple[int, int]) -> None:
    assert run(trained(), noisy(1, *shape)).shape == (1, *shape)


def test_nothing_beyond_the_receptive_field_matters() -> None:
    generator = trained()
    hu, changed = noisy(1, 96, 96), noisy(1, 96, 96)
    reach = generator.receptive_field // 2
    changed[0, :, 48 + reach + generator.multiple :] += 500
    before, after = run(generator, hu), run(generator, changed)
    np.testing.assert_array_equal(after[0, 48, :48], before[0, 48, :48])


def test_the_receptive_field_is_not_larger_than_declared_but_reached() -> None:
    generator = trained()
    reach = generator.receptive_field // 2
    hu, changed = noisy(1, 96, 96), noisy(1, 96, 96)
    changed[0, :, 48 + reach - 2 * generator.multiple :] += 500
    assert (run(generator, changed)[0, 48, :49] != run(generator, hu)[0, 48, :49]).any()


def test_air_around_the_patient_does_not_change_the_patient() -> None:
    generator = trained()
    hu = noisy(1, 128, 128)
    wider = np.pad(hu, ((0, 0), (32, 32), (32, 32)), constant_values=-1000)
    margin = generator.receptive_field
    inner = (0, slice(margin, -margin), slice(margin, -margin))
    np.testing.assert_allclose(
        run(generator, wider)[:, 32:-32, 32:-32][inner], run(generator, hu)[inner], atol=1e-3
    )


def test_a_slice_does_not_depend_on_the_slices_beside_it() -> None:
    generator, hu = trained(), noisy(5, 64, 64)
    order = [3, 1, 4, 0, 2]
    alone = np.concatenate([run(generator, hu[i : i + 1]) for i in order])
    np.testing.assert_array_equal(alone, run(generator, hu)[order])


def test_values_outside_the_window_survive_a_residual_generator() -> None:
    hu = noisy(1, 64, 64)
    hu[0, 10, 10], hu[0, 50, 50] = 9000, -3024
    result = run(build_generator("residual_denoiser", SMALL), hu)
    assert result[0, 10, 10] == 9000
    assert result[0, 50, 50] == -3024


def test_autocast_keeps_the_first_and_last_layer_in_float32() -> None:
    generator = trained()
    x = torch.from_numpy(CT.to_network(noisy(1, 64, 64)))[None]
    seen: dict[str, torch.dtype] = {}
    generator.first.register_forward_hook(lambda m, i, o: seen.update(first=o.dtype))
    generator.last.register_forward_hook(lambda m, i, o: seen.update(last=o.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        generator(x)
    assert seen == {"first": torch.float32, "last": torch.float32}


def test_identity_and_affine_are_exact() -> None:
    hu, raw = noisy(2, 64, 64), Unscaled()
    np.testing.assert_array_equal(
        run_generator(build_generator("identity", {}), hu, raw, raw, residual=False), hu
    )
    affine = build_generator("affine", {"scale": 2.0, "offset": -1.0})
    np.testing.assert_array_equal(run_generator(affine, hu, raw, raw, residual=False), 2 * hu - 1)


@pytest.mark.parametrize(
    ("architecture", "options", "reason"),
    [
        ("resnet_50", {}, "no 'resnet_50'"),
        ("residual_denoiser", {"depth": 3}, "depth"),
        ("residual_denoiser", {"width": "wide"}, "residual_denoiser"),
    ],
)
def test_what_the_registry_does_not_know_is_refused(
    architecture: str, options: dict[str, object], reason: str
) -> None:
    with pytest.raises(PackageError, match=reason):
        build_generator(architecture, options)


COUNTS = [  # architecture, options, weights with one slice, with three in and out (ml.md 1.0)
    ("resnet_9", {"norm": "instance"}, 11_365_633, 11_378_179),
    ("resnet_9", {"norm": "batch"}, 11_370_881, 11_383_427),
    ("resnet_6", {"norm": "instance"}, 7_825_153, 7_837_699),
    ("resnet_9", {"antialias": True}, 11_365_633, 11_378_179),
    ("unet_256", {"norm": "batch"}, 54_407_809, 54_413_955),
    ("unet_256", {"norm": "instance"}, 54_403_457, 54_409_603),
    ("unet_128", {"norm": "batch"}, 41_822_849, 41_828_995),
]


@pytest.mark.parametrize(("architecture", "options", "one", "three"), COUNTS)
def test_a_generator_has_as_many_weights_as_its_original(
    architecture: str, options: dict[str, object], one: int, three: int
) -> None:
    wide = {"slices": 3, "outputs": 3}
    assert count_weights(plan_generator(architecture, options)) == one
    assert count_weights(plan_generator(architecture, {**options, **wide})) == three


@pytest.mark.parametrize(
    ("architecture", "options", "weights"),
    [
        ("red_cnn", {}, 1_848_865),
        ("gan_circle", {"width": 128, "stride": 2}, 611_418),
        ("mr_ct_full", {}, 671_041),
        ("resnet_9", {"separable": True}, 1_974_529),
        ("resnet_9", {"separable": True, "width": 32}, 508_033),
        ("resnet_9", {"separable": True, "width": 16}, 134_209),
    ],
)
def test_a_generator_of_one_slice_has_as_many_weights_as_its_original(
    architecture: str, options: dict[str, object], weights: int
) -> None:
    assert count_weights(plan_generator(architecture, options)) == weights


def test_gan_circle_has_the_filters_of_the_released_graph() -> None:
    assert filters(64) == [64, 54, 48, 43, 39, 35, 31, 28, 25, 22, 18, 16]
    assert filters(128) == [128, 105, 92, 80, 70, 61, 53, 45, 37, 30, 22, 16]


def _reach(generator: Generator, side: int) -> int:
    """Side of the square around an output pixel that it depends on, by gradients, worst phase."""
    for parameter in generator.parameters():  # all positive: nothing cancels, no ReLU is shut
        torch.nn.init.constant_(parameter, 0.5 / parameter[0].numel() if parameter.ndim > 1 else 0)
    worst = 0
    for phase in range(generator.multiple):
        x = torch.ones(1, generator.slices, side, side, requires_grad=True)
        at = side // 2 + phase
        (slope,) = torch.autograd.grad(generator(x)[0, 0, at, at], x)
        seen = slope[0].abs().sum((0, 1)).nonzero()
        worst = max(worst, 2 * max(at - int(seen.min()), int(seen.max()) - at) + 1)
    return worst


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("resnet", {"blocks": 1, "width": 2, "norm": "none", "head": "linear"}),
        ("resnet", {"blocks": 2, "width": 2, "norm": "none", "head": "linear", "antialias": True}),
        ("mr_ct_full", {"blocks": 2, "width": 2, "norm": "none", "head": "linear"}),
        ("gan_circle", {"width": 16}),
        ("gan_circle", {"width": 16, "stride": 2}),
        ("red_cnn", {"width": 2}),
        ("unshuffle_resnet", {"width": 2, "blocks": 1}),
        ("residual_denoiser", {"width": 2, "blocks": 1}),
        ("residual_denoiser", {"width": 2, "blocks": 2, "coarse": 1}),
    ],
)
def test_the_declared_receptive_field_covers_what_a_result_depends_on(
    architecture: str, options: dict[str, object]
) -> None:
    generator = build_generator(architecture, options)
    reached = _reach(generator, 96)
    assert reached <= generator.receptive_field <= reached + 2 * generator.multiple


ALL = [
    ("resnet", {"width": 4, "blocks": 2}),
    ("resnet_6", {"width": 4, "antialias": True, "norm": "batch"}),
    ("resnet_9", {"width": 4, "separable": True, "norm": "none"}),
    ("mr_ct_full", {"width": 4, "blocks": 2}),
    ("unet_128", {"width": 2}),
    ("unet_256", {"width": 2, "norm": "instance", "dropout": True}),
    ("gan_circle", {"width": 16}),
    ("gan_circle", {"width": 16, "stride": 2}),
    ("red_cnn", {"width": 2}),
    ("unshuffle_resnet", {"width": 4, "blocks": 1}),
    ("residual_denoiser", {"width": 4, "blocks": 1}),
    ("residual_denoiser", {"width": 4, "blocks": 2, "coarse": 1}),
    ("identity", {}),
    ("affine", {"scale": 2.0}),
]
"""Every architecture, small."""


def test_a_denoiser_of_three_slices_adds_to_the_middle_one() -> None:
    generator = build_generator("residual_denoiser", {"width": 4, "blocks": 1, "slices": 3})
    assert generator.slices == 3
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        generator.last.weight.normal_()  # type: ignore[union-attr,operator]
        made = generator(x)
        assert made.shape == (1, 1, 16, 16)
        x[:, 0] += 0.1
        assert not torch.equal(generator(x), made)


def test_every_architecture_is_tested() -> None:
    assert {name for name, _ in ALL} == set(GENERATORS)


@pytest.mark.parametrize(("architecture", "options"), ALL)
def test_a_generator_keeps_the_size_of_a_slice_and_repeats_itself(
    architecture: str, options: dict[str, object]
) -> None:
    generator = build_generator(architecture, options)
    side = 256 if architecture == "unet_256" else 128
    x = torch.rand(1, 1, side, side)
    with torch.no_grad():
        first, second = generator(x), generator(x)
    assert first.shape == x.shape
    assert torch.equal(first, second)  # nothing is dropped when serving


@pytest.mark.parametrize(("architecture", "options"), ALL)
def test_a_generator_says_whether_it_uses_statistics(
    architecture: str, options: dict[str, object]
) -> None:
    generator = build_generator(architecture, options)
    kinds = {type(module) for module in generator.modules()}
    assert generator.uses_statistics == (torch.nn.InstanceNorm2d in kinds)


@pytest.mark.parametrize("architecture", ["resnet", "unet_128", "gan_circle", "unshuffle_resnet"])
@pytest.mark.parametrize("head", ["tanh", "linear", "residual"])
def test_heads_bound_leave_or_add(architecture: str, head: str) -> None:
    torch.manual_seed(2)
    options = {"width": 16, "slices": 3, "head": head}
    generator = build_generator(architecture, options)
    last = [
        m for m in generator.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.ConvTranspose2d)
    ][-1]
    if architecture == "gan_circle":
        last = generator.last
    x = torch.rand(1, 3, 128, 128) * 6
    with torch.no_grad():
        torch.nn.init.normal_(last.weight, std=5.0)
        bold = generator(x)
        torch.nn.init.zeros_(last.weight)
        if last.bias is not None:
            torch.nn.init.zeros_(last.bias)
        calm = generator(x)
    assert bool((bold.abs() <= 1).all()) == (head == "tanh")
    assert torch.equal(calm, x[:, 1:2] if head == "residual" else torch.zeros_like(calm))


def test_upstream_names_its_weights_as_we_do() -> None:
    resnet = plan_generator("resnet_9", {"norm": "batch"}).state_dict()
    blurred = plan_generator("resnet_9", {"antialias": True}).state_dict()
    unet = plan_generator("unet_256", {}).state_dict()
    assert {"model.1.weight", "model.10.conv_block.5.weight", "model.26.bias"} <= resnet.keys()
    assert {"model.7.filt", "model.12.conv_block.1.weight", "model.30.weight"} <= blurred.keys()
    inner = "model.model.1.model.3.model.3.model.3.model.3.model.3.model.3"
    assert {"model.model.0.weight", "model.model.3.bias"} <= unet.keys()
    assert unet[f"{inner}.model.1.weight"].shape == (512, 512, 4, 4)
    assert unet["model.model.1.model.2.running_mean"].shape == (128,)


def test_weights_of_an_old_parallel_upstream_load(tmp_path: Path) -> None:
    torch.manual_seed(4)
    trained_there = build_generator("resnet", {"width": 4, "blocks": 1})
    old = {f"module.{key}": value for key, value in trained_there.state_dict().items()}
    old["module.model.2.running_mean"] = torch.ones(4)  # kept once, never used
    old["module.model.2.num_batches_tracked"] = torch.tensor(7)
    torch.save(old, tmp_path / "latest_net_G.pth")
    ours = build_generator("resnet", {"width": 4, "blocks": 1})
    load_upstream(ours, read_pth(tmp_path / "latest_net_G.pth"))
    x = torch.rand(1, 1, 32, 32)
    assert torch.equal(ours(x), trained_there(x))


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("made-by-a-pickle",)


def test_a_pickle_that_would_run_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model.1.weight": _Evil()}, tmp_path / "evil.pth")
    with pytest.raises(PackageError, match=r"evil\.pth"):
        read_pth(tmp_path / "evil.pth")
    assert not (tmp_path / "made-by-a-pickle").exists()


def test_weights_that_do_not_fit_are_refused() -> None:
    generator = build_generator("resnet", {"width": 4, "blocks": 1})
    with pytest.raises(PackageError, match="do not fit"):
        load_upstream(generator, {"model.1.weight": torch.zeros(4, 1, 7, 7)})


def test_too_many_weights_are_refused_before_they_take_memory() -> None:
    with pytest.raises(PackageError, match="weights; at most"):
        build_generator("resnet", {"width": 512, "blocks": 64})


def test_neighbours_at_the_ends_of_a_volume_are_repeated() -> None:
    hu = np.arange(5, dtype=np.float32)[:, None, None] * np.ones((5, 64, 64), np.float32)
    seen: list[list[float]] = []

    def note(x: np.ndarray) -> np.ndarray:
        seen.extend(x[:, :, 0, 0].tolist())
        return x[:, 1:2]

    raw = Unscaled()
    result = run_slices(note, hu, raw, raw, (3, 1), residual=False, batch=2)
    assert seen == [[0, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 4]]
    np.testing.assert_array_equal(result, hu)


def test_a_slice_too_small_to_be_reflected_is_refused() -> None:
    generator = build_generator("unet_128", {"width": 2})
    with pytest.raises(PackageError, match="cannot be padded to a multiple of 128"):
        run(generator, noisy(1, 60, 60))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "air"])
def test_padding_grows_the_far_ends_alone(mode: str) -> None:
    x = noisy(1, 5, 6)
    grown = pad_to_multiple(x, 4, mode)
    assert grown.shape == (1, 8, 8)
    np.testing.assert_array_equal(grown[:, :5, :6], x)
    expected = {"reflect": x[0, 3, 0], "replicate": x[0, 4, 0], "air": -1}[mode]
    assert grown[0, 5, 0] == expected


@pytest.mark.parametrize("shape", [(160, 128), (131, 200), (64, 192)])
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("residual_denoiser", {"width": 8, "blocks": 1, "centre": 0.0, "gain": 1.0}),
        (
            "residual_denoiser",
            {"width": 8, "blocks": 0, "coarse": 1, "centre": 0.0, "gain": 1.0},
        ),
        ("resnet", {"width": 4, "blocks": 1, "norm": "none", "head": "linear"}),
        ("unshuffle_resnet", {"width": 8, "blocks": 1}),
    ],
)
def test_tiles_that_cover_the_receptive_field_change_no_bit(
    architecture: str, options: dict[str, object], shape: tuple[int, int]
) -> None:
    """In whole numbers, of which every sum is exact in any order."""
    torch.manual_seed(6)
    generator = build_generator(architecture, options)
    for parameter in generator.parameters():
        keep = torch.rand(parameter.shape) < 0.2
        parameter.data = torch.randint(-1, 2, parameter.shape) * keep.float()

    def whole(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return generator(torch.from_numpy(x)).numpy()

    x = pad_to_multiple(noisy(1, *shape)[None].round(), generator.multiple, "reflect")
    cut = (generator.receptive_field, 96, generator.multiple)
    expected = whole(x)
    assert 10 < np.abs(expected).max() < 2**23
    np.testing.assert_array_equal(run_tiled(whole, cut, x), expected)
    short = (generator.receptive_field // 3, 96, generator.multiple)
    assert (run_tiled(whole, short, x) != expected).any()
