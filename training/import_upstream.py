"""Make a model package of weights that pytorch-CycleGAN-and-pix2pix or one of its relatives wrote.

    python training/import_upstream.py latest_net_G.pth manifest.yaml card.md out=models/mine
    python training/import_upstream.py latest_net_G.pth manifest.yaml card.md out=FOLDER grey=yes

The manifest (docs/MODELS.md) says what the file does not: architecture and options, what the
network was given and what its results mean. The file is read as tensors alone and never unpickled.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from dicomnode.errors import ConfigError, DicomNodeError
from dicomnode.imaging.manifest import manifest_from_yaml
from dicomnode.imaging.networks import build_generator, count_weights, load_upstream, read_pth
from dicomnode.imaging.package import ModelPackage, write_package
from training.publish import golden_body

SEED = 0
"""Of the generated input of the self-test."""


def main(argv: Sequence[str]) -> None:
    options = {"out": "", "grey": "no"}
    own = [word for word in argv if word.partition("=")[0] in options]
    files = [Path(word) for word in argv if word not in own]
    options |= dict(word.split("=", 1) for word in own)
    if len(files) != 3 or not options["out"] or options["grey"] not in ("yes", "no"):
        raise ConfigError("want FILE.pth MANIFEST.yaml CARD.md out=FOLDER [grey=yes]")
    weights, manifest, card = files
    out, grey = Path(options["out"]), options["grey"] == "yes"
    package = import_weights(weights, manifest, card, out, grey=grey)
    print(f"wrote {package.path}: {package.name} {package.version}, digest {package.digest}")


def import_weights(
    weights: Path, manifest: Path, card: Path, out: Path, *, grey: bool = False
) -> ModelPackage:
    """Write the package `out`; it is read back and passes its self-test like any other.

    Args:
        grey: the file is of a network for colours (3 in, 3 out), the manifest of one for grey.

    Raises:
        PackageError: a file is not what it should be, or the weights do not fit the manifest.
        ConfigError: manifest or card cannot be read.
    """
    try:
        described, text = manifest_from_yaml(manifest.read_bytes()), card.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{error}") from error
    generator = build_generator(described.generator.architecture, described.generator.options)
    state = read_pth(weights)
    load_upstream(generator, in_grey(state) if grey else state)
    print(f"{count_weights(generator)} weights for {described.generator.architecture}")
    golden = golden_body(SEED, described.input.intensity, generator)
    return write_package(out, described, generator.state_dict(), golden, text)


def in_grey(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same network for grey: exact for equal colours in, and the mean of the colours out.

    First weights are summed over the colours. The last ones are averaged, before the tanh.
    """
    names = [name for name, value in state.items() if value.dim() == 4]
    first, last = names[0], names[-1]
    bias = last.removesuffix("weight") + "bias"
    outputs = 1 if "model.model." in last else 0  # where a U-Net's transposed convolution has them
    return state | {
        first: state[first].sum(1, keepdim=True),
        last: state[last].mean(outputs, keepdim=True),
        bias: state[bias].mean(0, keepdim=True),
    }


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DicomNodeError as error:
        raise SystemExit(str(error)) from None
