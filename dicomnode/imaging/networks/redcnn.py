"""RED-CNN (Chen 2017), the usual baseline of low-dose CT, with the keys of its known versions."""

from torch import Tensor, nn
from torch.nn import functional as F

from dicomnode.imaging.networks.base import Generator, check, in_float32


class RedCnn(Generator):
    """Five 5 x 5 convolutions without padding, five transposed ones back, three shortcuts.

    (batch, 1, rows, columns), float32 -> the same shape. Its own shortcut adds the input.
    """

    def __init__(self, width: int = 96, last_relu: bool = False, shortcut: bool = True) -> None:
        """Options as a package names them.

        Args:
            last_relu: the paper's last ReLU, for intensities that are never negative.
            shortcut: False: the input is not added here, for packages whose result is a difference.
        """
        super().__init__()
        check(1 <= width <= 512, "width: from 1 to 512")
        self.last_relu, self.shortcut = last_relu, shortcut
        self.receptive_field = 41
        self.conv1 = nn.Conv2d(1, width, 5)
        self.conv2, self.conv3 = nn.Conv2d(width, width, 5), nn.Conv2d(width, width, 5)
        self.conv4, self.conv5 = nn.Conv2d(width, width, 5), nn.Conv2d(width, width, 5)
        self.tconv1 = nn.ConvTranspose2d(width, width, 5)
        self.tconv2 = nn.ConvTranspose2d(width, width, 5)
        self.tconv3 = nn.ConvTranspose2d(width, width, 5)
        self.tconv4 = nn.ConvTranspose2d(width, width, 5)
        self.tconv5 = nn.ConvTranspose2d(width, 1, 5)

    def forward(self, x: Tensor) -> Tensor:
        second = F.relu(self.conv2(F.relu(in_float32(self.conv1, x))))
        fourth = F.relu(self.conv4(F.relu(self.conv3(second))))
        up = self.tconv1(F.relu(self.conv5(fourth))) + fourth
        up = self.tconv3(F.relu(self.tconv2(F.relu(up)))) + second
        up = F.relu(self.tconv4(F.relu(up)))
        result = in_float32(self.tconv5, up)
        result = x + result if self.shortcut else result
        return F.relu(result) if self.last_relu else result
