"""Structure losses against plain loops, and what they must not see: brightness and contrast."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from training.errors import TrainingError
from training.structure import (
    Correlation,
    SpatialCorrelation,
    Vgg16,
    contrast_loss,
    correlative_map,
    mind,
    mind_loss,
    pixel_weight,
    structure_loss,
)


def _plain_map(features: Tensor, query: int, window: int) -> Tensor:
    """One query of one image, by its definition."""
    _, rows, columns = features.shape
    unit = F.normalize(features - features.mean((1, 2), keepdim=True), dim=0)
    row, column = divmod(query, columns)
    height, width = min(window, rows), min(window, columns)
    top = min(max(row - height // 2, 0), rows - height)
    left = min(max(column - width // 2, 0), columns - width)
    around = unit[:, top : top + height, left : left + width]
    return (unit[:, row, column, None, None] * around).sum(0).flatten()


@pytest.mark.parametrize("shape", [(12, 12), (9, 14), (20, 6), (4, 5)])
def test_a_correlative_map_is_what_a_loop_gives(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    features = torch.randn(2, 5, *shape)
    queries = torch.randperm(shape[0] * shape[1])[:15]
    maps = correlative_map(features, queries, window=8)
    for image in range(2):
        for place, query in enumerate(queries.tolist()):
            plain = _plain_map(features[image], query, 8)
            assert (maps[image, place] - plain).abs().max() < 5e-7


def test_alike_structure_costs_nothing_and_other_structure_much() -> None:
    torch.manual_seed(2)
    maps = torch.rand(2, 6, 40)
    assert structure_loss([Correlation(maps, maps)]).item() == pytest.approx(0, abs=1e-6)
    assert structure_loss([Correlation(torch.rand(2, 6, 40) - 0.5, maps)]).item() > 0.3


def test_the_encoders_loss_is_least_when_each_place_finds_itself() -> None:
    torch.manual_seed(3)
    maps, other = torch.randn(2, 10, 50), torch.randn(2, 10, 50)
    right = contrast_loss([Correlation(maps, maps)], [other])
    wrong = contrast_loss([Correlation(maps, maps.roll(1, 1))], [other])
    assert right < 0.1
    assert wrong > 5


def test_the_encoder_looks_at_three_depths() -> None:
    encoder = Vgg16(divide=8)
    shapes = [tuple(found.shape) for found in encoder(torch.rand(1, 1, 32, 48))]
    assert shapes == [(1, 32, 8, 12), (1, 64, 4, 6), (1, 64, 4, 6)]
    pairs = SpatialCorrelation(encoder.channels())(
        encoder(torch.rand(1, 1, 32, 48)), encoder(torch.rand(1, 1, 32, 48)), torch.Generator()
    )
    assert [pair.source.shape for pair in pairs] == [(1, 96, 96), (1, 24, 24), (1, 24, 24)]


def test_weights_of_vgg16_in_three_colours_are_taken_for_grey(tmp_path: Path) -> None:
    colour = dict(Vgg16().state_dict())
    grey = colour["features.0.weight"]
    colour["features.0.weight"] = grey.repeat(1, 3, 1, 1) / 3
    save_file(colour | {"classifier.0.bias": torch.zeros(2)}, tmp_path / "vgg.safetensors")
    loaded = Vgg16(tmp_path / "vgg.safetensors").state_dict()["features.0.weight"]
    assert torch.allclose(loaded, grey)


def test_what_is_not_vgg16_is_refused_by_name(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(TrainingError, match=r"other\.safetensors"):
        Vgg16(tmp_path / "other.safetensors")


def _picture() -> Tensor:
    torch.manual_seed(4)
    return F.interpolate(torch.rand(2, 1, 8, 8), (40, 40), mode="bicubic")


@pytest.mark.parametrize(("scale", "offset"), [(3.0, -0.5), (-2.0, 1.0), (0.1, 0.0)])
def test_mind_does_not_see_contrast_and_brightness(scale: float, offset: float) -> None:
    image = _picture()
    assert mind_loss(image, scale * image + offset).item() < 1e-4


def test_mind_sees_a_shift() -> None:
    image = _picture()
    assert mind_loss(image, image).item() == 0
    assert mind_loss(image, image.roll(2, 3)).item() > 0.05


def test_mind_of_a_flat_image_is_finite_and_has_a_gradient() -> None:
    flat = torch.zeros(1, 1, 16, 16, requires_grad=True)
    loss = (mind(flat) - 0.5).abs().mean()
    (slope,) = torch.autograd.grad(loss, flat)
    assert torch.isfinite(loss)
    assert torch.isfinite(slope).all()


@pytest.mark.parametrize("judged", [torch.full((2, 1, 4, 4), -3.0), torch.full((2, 1, 4, 4), 0.7)])
@pytest.mark.parametrize("kind", ["aps", "inverse", "uniform"])
def test_a_flat_map_of_the_discriminator_weighs_every_pixel_one(judged: Tensor, kind: str) -> None:
    weight = pixel_weight(judged, (16, 12), kind)  # type: ignore[arg-type]
    assert torch.equal(weight, torch.ones(2, 1, 16, 12))


def test_the_published_weight_favours_what_looks_real() -> None:
    judged = torch.tensor([[[[1.0, -1.0], [0.25, 0.5]]]])
    weight = pixel_weight(judged, (2, 2), "aps")
    assert torch.allclose(weight, torch.tensor([[[[1.0, 0.0], [0.25, 0.5]]]]))
    assert torch.allclose(pixel_weight(judged, (2, 2), "inverse"), 1 - weight)
