"""Generators: closed registry, right sizes, no dependence on what lies far away."""

import numpy as np
import pytest
import torch

from dicomnode.errors import PackageError
from dicomnode.imaging.intensity import Unscaled, Window
from dicomnode.imaging.networks import Generator, build_generator, run_generator

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
        ("resnet", {}, "no 'resnet'"),
        ("residual_denoiser", {"depth": 3}, "depth"),
        ("residual_denoiser", {"width": "wide"}, "residual_denoiser"),
    ],
)
def test_what_the_registry_does_not_know_is_refused(
    architecture: str, options: dict[str, object], reason: str
) -> None:
    with pytest.raises(PackageError, match=reason):
        build_generator(architecture, options)
