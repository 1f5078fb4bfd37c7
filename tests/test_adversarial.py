"""Adversarial training: published numbers, analytic cases, and every recipe learns and resumes."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dicomnode.imaging.networks import Generator, build_generator
from training.adversarial import (
    ImagePool,
    PatchDiscriminator,
    PixelDiscriminator,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    linear_decay,
)
from training.errors import TrainingError
from training.recipes import Batch, Recipe
from training.recipes.adversarial import Adversarial, Discriminator, Run
from training.recipes.aps import Aps
from training.recipes.cyclegan import CycleGan
from training.recipes.gan_circle import GanCircle, total_variation
from training.recipes.pix2pix import Pix2Pix


def _count(network: nn.Module) -> int:
    return sum(weight.numel() for weight in network.parameters())


@pytest.mark.parametrize(
    ("channels", "norm", "weights"),
    [
        (3, "batch", 2_765_633),
        (3, "instance", 2_764_737),
        (1, "batch", 2_763_585),
        (1, "instance", 2_762_689),
        (2, "batch", 2_764_609),
    ],
)
def test_the_patch_discriminator_has_the_published_size(
    channels: int, norm: Any, weights: int
) -> None:
    assert _count(PatchDiscriminator(channels, norm=norm)) == weights


def test_the_pixel_discriminator_has_the_published_size() -> None:
    assert _count(PixelDiscriminator(3)) == 8_705
    assert _count(PixelDiscriminator(1)) == 8_577


@pytest.mark.parametrize(("side", "patches"), [(256, 30), (288, 34)])
def test_a_patch_map_has_the_published_side(side: int, patches: int) -> None:
    network = PatchDiscriminator(1, width=2)
    assert network(torch.zeros(1, 1, side, side)).shape == (1, 1, patches, patches)


def test_losses_of_known_logits() -> None:
    real, fake = torch.tensor([[2.0]]), torch.tensor([[-1.0]])
    assert discriminator_loss("lsgan", real, fake).item() == pytest.approx((1 + 1) / 2)
    assert generator_loss("lsgan", fake).item() == pytest.approx(4.0)
    vanilla = (math.log1p(math.exp(-2)) + math.log1p(math.exp(-1))) / 2
    assert discriminator_loss("vanilla", real, fake).item() == pytest.approx(vanilla)
    assert discriminator_loss("wgangp", real, fake).item() == pytest.approx(-3.0)
    assert discriminator_loss("hinge", real, fake).item() == pytest.approx(0.0)
    assert generator_loss("hinge", fake).item() == pytest.approx(1.0)


class _Linear(nn.Module):
    """D(x) = w . x"""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) @ self.weight)[:, None]


def test_the_gradient_penalty_of_a_linear_critic_is_known() -> None:
    weight = torch.linspace(-1, 1, 12)
    real, fake = torch.rand(3, 1, 3, 4), torch.rand(3, 1, 3, 4)
    penalty = gradient_penalty(_Linear(weight), real, fake, torch.rand(3), weight=10.0)
    assert penalty.item() == pytest.approx(10 * (weight.norm().item() - 1) ** 2, rel=1e-5)


def test_the_pool_gives_back_held_images_half_of_the_time() -> None:
    draw, pool = torch.Generator().manual_seed(1), ImagePool(10)
    given = [pool.exchange(torch.full((1, 1), float(i)), draw).item() for i in range(2000)]
    assert given[:10] == list(range(10))  # it fills first
    old = np.mean([value != i for i, value in enumerate(given)][10:])
    assert 0.45 < old < 0.55
    again = [value for value in set(given) if given.count(value) > 1]
    assert max(again) < 10  # only what filled it was given back at once and once more


def test_a_pool_of_nothing_gives_back_what_it_gets() -> None:
    images = torch.rand(4, 1, 2, 2)
    assert torch.equal(ImagePool(0).exchange(images, torch.Generator()), images)


def test_the_learning_rate_is_constant_and_then_falls_evenly() -> None:
    rates = [linear_decay(epoch * 7 + 3, 7, 100, 100) for epoch in range(200)]
    assert rates[:100] == [1.0] * 100
    steps = -np.diff(rates[99:])
    assert np.allclose(steps, 1 / 101)
    assert rates[-1] == pytest.approx(1 / 101)


def test_total_variation_is_the_sum_of_differences() -> None:
    image = torch.tensor([[[[0.0, 1.0], [3.0, -1.0]]]])
    assert total_variation(image.repeat(2, 1, 1, 1)).item() == 3 + 2 + 1 + 4


# recipes

RUN = Run(seed=3, residual=True, epoch_steps=10)
SMALL = Discriminator(width=8, layers=2)


def _generator() -> Generator:
    torch.manual_seed(5)
    return build_generator("residual_denoiser", {"width": 8, "blocks": 1, "gain": 1.0})


def _settings(**changed: Any) -> Adversarial:
    given = {"discriminator": SMALL, "learning_rate": 1e-3, "constant_epochs": 10_000, "pool": 3}
    return Adversarial(**(given | {"initial_spread": 0.0} | changed))


def _pix2pix() -> Recipe:
    conditional = Discriminator(width=8, layers=2, conditional=True, norm="batch")
    settings = _settings(gan="vanilla", discriminator=conditional, pool=0)
    return Pix2Pix(_generator(), settings, RUN)


def _cyclegan(**changed: Any) -> Recipe:
    settings = _settings(**changed)
    return CycleGan(_generator(), _generator(), settings, RUN)


def _sccyclegan() -> Recipe:
    return _cyclegan(structure="mind", structure_weight=5.0)


def _aps() -> Recipe:
    settings = _settings(structure="sc_map", structure_divide=16, pool=0)
    return Aps(_generator(), settings, RUN)


def _gan_circle() -> Recipe:
    settings = _settings(gan="wgangp", cycle_weight=1.0, pool=0)
    return GanCircle(_generator(), _generator(), settings, RUN)


RECIPES = [_pix2pix, _cyclegan, _sccyclegan, _aps, _gan_circle]
PAIRED = [_pix2pix, _aps]


def _image(rng: np.random.Generator, count: int) -> Tensor:
    """Random soft blobs in [-0.5, 0.5]."""
    coarse = torch.from_numpy(rng.uniform(-0.5, 0.5, (count, 1, 5, 5)).astype(np.float32))
    return nn.functional.interpolate(coarse, (32, 32), mode="bicubic", align_corners=False)


def _mapped(source: Tensor) -> Tensor:
    """What the second kind of image looks like: contrast and brightness changed."""
    return 0.5 * source + 0.3


def _batch(step: int, *, paired: bool) -> Batch:
    rng = np.random.default_rng([7, step])
    source = _image(rng, 2)
    target = _mapped(source if paired else _image(rng, 2))
    return Batch(source, target, torch.ones(2, 1, 32, 32))


@pytest.mark.parametrize("make", RECIPES)
def test_a_resumed_recipe_goes_on_to_the_bit(make: Callable[[], Recipe], tmp_path: Any) -> None:
    whole = make()
    for step in range(4):
        expected = whole.step(_batch(step, paired=True), step)
    first, second = make(), make()
    for step in range(2):
        first.step(_batch(step, paired=True), step)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for step in range(2, 4):
        losses = second.step(_batch(step, paired=True), step)
    assert losses == expected
    for name, network in whole.results().items():
        again = second.results()[name].state_dict()
        assert all(torch.equal(value, again[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("make", RECIPES)
def test_every_part_of_a_recipe_learns(make: Callable[[], Recipe]) -> None:
    recipe = make()
    before = {
        name: [weight.clone() for weight in part.parameters()]
        for name, part in recipe.parts.items()  # type: ignore[attr-defined]
        if isinstance(part, nn.Module)
    }
    for step in range(3):
        recipe.step(_batch(step, paired=True), step)
    for name, weights in before.items():
        now = list(recipe.parts[name].parameters())  # type: ignore[attr-defined]
        assert not all(map(torch.equal, weights, now)), name


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_result_is_the_weights_of_now_or_their_mean_and_keeps_still(decay: float) -> None:
    recipe = _pix2pix() if decay == 0 else Pix2Pix(_generator(), _settings(ema_decay=decay), RUN)
    mean = [weight.detach().clone() for weight in recipe.parts["generator"].parameters()]  # type: ignore[attr-defined]
    for step in range(3):
        recipe.step(_batch(step, paired=True), step)
        share = min(decay, (1 + step) / (10 + step))
        now = list(recipe.parts["generator"].parameters())  # type: ignore[attr-defined]
        mean = [share * old + (1 - share) * new for old, new in zip(mean, now, strict=True)]
    assert (len(recipe.state_dict()["average"]) == 0) == (decay == 0)
    result = recipe.results()["forward"]
    for wanted, got in zip(mean, result.parameters(), strict=True):
        torch.testing.assert_close(got, wanted)
    assert not result.training
    assert recipe.parts["generator"].training  # type: ignore[attr-defined]
    held = [weight.clone() for weight in result.parameters()]
    recipe.step(_batch(3, paired=True), 3)
    if decay == 0:  # what was given away is no longer trained
        assert all(map(torch.equal, held, result.parameters()))


@pytest.mark.parametrize("make", PAIRED)
def test_a_paired_recipe_halves_the_error_of_doing_nothing(make: Callable[[], Recipe]) -> None:
    recipe = make()
    for step in range(150):
        recipe.step(_batch(step, paired=True), step)
    batch = _batch(10_000, paired=True)
    with torch.no_grad():
        prediction = batch.source + recipe.results()["forward"](batch.source)
    error = (prediction - batch.target).abs().mean()
    assert error < 0.5 * (batch.source - batch.target).abs().mean()


def test_an_unpaired_recipe_finds_the_other_kinds_brightness() -> None:
    recipe = _cyclegan(identity_weight=0.0, learning_rate=2e-3)
    for step in range(250):
        recipe.step(_batch(step, paired=False), step)
    batch = _batch(10_000, paired=True)
    with torch.no_grad():
        there = batch.source + recipe.results()["forward"](batch.source)
        back = there + recipe.results()["backward"](there)
    assert (there - batch.target).abs().mean() < 0.6 * (batch.source - batch.target).abs().mean()
    assert (back - batch.source).abs().mean() < 0.1


def test_a_step_of_cyclegan_is_that_of_the_paper() -> None:
    """The same step written out plainly, from the same weights, on the same batch."""
    recipe = _cyclegan(pool=0, identity_weight=0.5)
    other = _cyclegan(pool=0, identity_weight=0.5)
    assert isinstance(other, CycleGan)
    a, b, _ = batch = _batch(0, paired=False)
    recipe.step(batch, 0)
    g, f, d_a, d_b = other.g_ab, other.g_ba, other.d_a, other.d_b
    fake_b, fake_a = a + g(a), b + f(b)
    loss = (d_b(fake_b) - 1).square().mean() + (d_a(fake_a) - 1).square().mean()
    loss = loss + 10 * ((fake_b + f(fake_b) - a).abs().mean())
    loss = loss + 10 * ((fake_a + g(fake_a) - b).abs().mean())
    loss = loss + 5 * (g(b).abs().mean() + f(a).abs().mean())
    optimizer = torch.optim.Adam([*g.parameters(), *f.parameters()], lr=1e-3, betas=(0.5, 0.999))
    loss.backward()
    optimizer.step()
    assert isinstance(recipe, CycleGan)
    for ours, plain in zip(recipe.g_ab.parameters(), g.parameters(), strict=True):
        assert (ours - plain).abs().max() <= 1e-6


@pytest.mark.parametrize("make", RECIPES)
def test_a_loss_that_is_not_finite_stops_the_run(make: Callable[[], Recipe]) -> None:
    batch = _batch(0, paired=True)
    with pytest.raises(TrainingError, match="not finite"):
        make().step(batch._replace(source=batch.source * math.inf), 0)
