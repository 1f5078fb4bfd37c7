"""U-Net generators of pix2pix (Isola 2017), with upstream's keys."""

from torch import Tensor, cat, nn

from dicomnode.imaging.networks.base import (
    Generator,
    centre_slice,
    check,
    check_common,
    in_float32,
    norm_layer,
)


class UNet(Generator):
    """Down by two `levels` times and up again, each level joined to its counterpart.

    (batch, slices, rows, columns), float32, in [-1, 1] -> (batch, outputs, rows, columns).
    7 levels are upstream's unet_128, 8 its unet_256: rows and columns are multiples of 2**levels.
    """

    def __init__(
        self,
        levels: int = 8,
        width: int = 64,
        norm: str = "batch",
        slices: int = 1,
        outputs: int = 1,
        head: str = "tanh",
        dropout: bool = False,
    ) -> None:
        """`dropout`: upstream's key names with dropout; nothing is dropped when serving."""
        super().__init__()
        check_common(slices, outputs, head, norm)
        check(5 <= levels <= 10 and 1 <= width <= 512, "levels (5 to 10), width: out of range")
        self.slices, self.head, self.uses_statistics = slices, head, norm == "instance"
        self.multiple = 2**levels
        self.receptive_field = 2 * 3 * 2**levels  # the innermost level sees beyond any slice
        block = _Level(8 * width, 8 * width, norm, None)
        for _ in range(levels - 5):
            block = _Level(8 * width, 8 * width, norm, block, dropout=dropout)
        for factor in (4, 2, 1):
            block = _Level(factor * width, 2 * factor * width, norm, block)
        self.model = _Outermost(slices, width, outputs, norm, head == "tanh", block)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.model(x)
        return centre_slice(x) + result if self.head == "residual" else result


class _Level(nn.Module):
    """Beside its input: what comes from half the resolution."""

    def __init__(
        self, outer: int, inner: int, norm: str, submodule: nn.Module | None, dropout: bool = False
    ) -> None:
        super().__init__()
        bias = norm != "batch"
        make_norm = norm_layer(norm)
        down: list[nn.Module] = [nn.LeakyReLU(0.2), nn.Conv2d(outer, inner, 4, 2, 1, bias=bias)]
        joined = inner if submodule is None else 2 * inner
        up = [nn.ReLU(), nn.ConvTranspose2d(joined, outer, 4, 2, 1, bias=bias), make_norm(outer)]
        if submodule is not None:
            down += [make_norm(inner), submodule]
        self.model = nn.Sequential(*down, *up, *([nn.Dropout(0.5)] if dropout else []))

    def forward(self, x: Tensor) -> Tensor:
        return cat([x, self.model(x)], 1)


class _Outermost(nn.Module):
    """First and last convolution of the U-Net; both stay float32 under autocast."""

    def __init__(
        self,
        slices: int,
        width: int,
        outputs: int,
        norm: str,
        tanh: bool,
        submodule: nn.Module,
    ) -> None:
        super().__init__()
        first = nn.Conv2d(slices, width, 4, 2, 1, bias=norm != "batch")
        last = nn.ConvTranspose2d(2 * width, outputs, 4, 2, 1)
        self.model = nn.Sequential(
            first, submodule, nn.ReLU(), last, *([nn.Tanh()] if tanh else [])
        )

    def forward(self, x: Tensor) -> Tensor:
        return in_float32(self.model[2:], self.model[1](in_float32(self.model[0], x)))
