"""The pictures of README and docs, made of generated data only: `make docs-images`.

before-after.png is what the demo writes; phantom.png is the phantom itself.
"""

import math
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from dicomnode.demo import run_demo
from dicomnode.imaging.phantom import phantom_volume

HERE = Path(__file__).parent
SLICES = (2, 12, 22)


def window(hu: NDArray[np.float32], centre: float, width: float) -> NDArray[np.uint8]:
    """(rows, columns), HU -> the same in grey levels 0 to 255."""
    return np.rint(np.clip((hu - centre) / width + 0.5, 0, 1) * 255).astype(np.uint8)


def phantom_picture(path: Path) -> None:
    """Three slices: without noise and at low dose in the soft-tissue window, and as lungs."""
    clean, noisy = phantom_volume(photons=math.inf), phantom_volume()
    rows = ((clean, 40, 400, "no noise"), (noisy, 40, 400, "low dose"), (noisy, -600, 1500, "lung"))
    crop = (slice(40, 450), slice(0, 512))
    sheet = np.vstack(
        [
            np.hstack([window(v[i][crop], centre, width) for i in SLICES])
            for v, centre, width, _ in rows
        ]
    )
    image = Image.fromarray(sheet)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(22)
    for number, (_, centre, width, name) in enumerate(rows):
        text = f"GENERATED PHANTOM, {name}, window {width} about {centre} HU"
        draw.text((10, number * 410 + 8), text, 255, font)
    _smaller(image, path)


def _smaller(image: Image.Image, path: Path) -> None:
    """At two thirds of the size: it goes into the repository."""
    size = (image.width * 2 // 3, image.height * 2 // 3)
    image.resize(size, Image.Resampling.LANCZOS).save(path, optimize=True)


def main() -> int:
    """Write both pictures beside this file."""
    phantom_picture(HERE / "phantom.png")
    with tempfile.TemporaryDirectory() as work:
        code = run_demo(HERE.parents[1] / "config.yaml", Path(work), None)
        if code == 0:
            _smaller(Image.open(Path(work) / "before-after.png"), HERE / "before-after.png")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
