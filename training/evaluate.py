"""Print every figure of a model card, from the package and the held-out patients.

    python training/evaluate.py training/configs/ldct-denoise.yaml
    python training/evaluate.py training/configs/ldct-denoise.yaml part=validation dose=0.1
    python training/evaluate.py training/configs/ldct-denoise.yaml patients=yes
    python training/evaluate.py training/configs/ldct-denoise.yaml compare=yes

Figures are means over patients; an interval is the 95 % bootstrap interval over patients.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from dicomnode.errors import ConfigError, DicomNodeError
from dicomnode.imaging.inference import load_model
from dicomnode.imaging.package import read_package
from dicomnode.imaging.percentiles import Percentiles
from training.compare import FILTERS, filter_at_same_noise, filter_at_same_psnr, turned_down
from training.config import Data, load_config
from training.data import Sample, load_samples
from training.figures import Denoiser, Figures, denoiser, evaluate_samples
from training.metrics import INSERTS, TISSUES
from training.split import PARTS, read_split


def main(argv: Sequence[str]) -> None:
    options = {"part": "test", "dose": "0.25", "package": "", "patients": "no", "compare": "no"}
    own = [word for word in argv[1:] if word.partition("=")[0] in options]
    config = load_config(Path(argv[0]), [word for word in argv[1:] if word not in own])
    options |= dict(word.split("=", 1) for word in own)
    if not isinstance(config.data, Data):
        raise ConfigError("data.kind: this judges low_dose runs")
    if options["part"] not in PARTS:
        raise ConfigError(f"part: want one of {', '.join(PARTS)}")
    torch.set_num_threads(config.threads)
    model = load_model(read_package(Path(options["package"] or config.package)))
    samples, _ = load_samples(config.data, config.low_dose, config.seed, config.out / "cache")
    patients = read_split(Path(config.data.split))[options["part"]]
    held_out = [sample for sample in samples if sample.patient in patients]
    dose = float(options["dose"])
    intensity = model.package.manifest.input.intensity
    if isinstance(intensity, Percentiles):
        raise ConfigError("package: percentiles are of a whole volume; this judges slices in HU")
    network = denoiser(model.generator, intensity)
    figures = evaluate_samples(network, held_out, dose)
    print(f"{model.package.name} {model.package.version}, digest {model.package.digest}")
    print(f"{options['part']} at {dose:g} of the dose: ", end="")
    print(f"{len(figures.patients)} patients, {len(figures.slices)} slices\n")
    print_figures(model.package.name, figures)
    if options["patients"] == "yes":
        print_patients(figures)
    if options["compare"] == "yes":
        compare(network, held_out, dose, figures)


def compare(network: Denoiser, samples: Sequence[Sample], dose: float, figures: Figures) -> None:
    """The network beside each filter, at equal PSNR and at equal noise."""
    for name in FILTERS:
        nearest = filter_at_same_psnr(name, samples, dose, figures)
        print_figures(f"{name}, strength of nearest PSNR", nearest)
        lowered = turned_down(network, samples, dose, nearest)
        print_figures(f"network turned down to the PSNR of that {name}", lowered)
        equal = filter_at_same_noise(name, samples, dose, figures)
        print_figures(f"{name}, strength of equal noise", equal)


def print_patients(figures: Figures) -> None:
    """A line per patient, who is named by the place in the sorted hashes."""
    for number, patient in enumerate(figures.patients, start=1):
        own = Figures([item for item in figures.slices if item.patient == patient])
        bias = ", ".join(f"{tissue} {own.bias_hu(tissue)[0]:.2f}" for tissue in TISSUES)
        print(
            f"patient {number}: {len(own.slices)} slices, gain {own.gain_db[0]:.2f} dB, "
            f"edges {own.edges[0]:.2f}, inserts "
            f"{', '.join(f'{own.insert(i)[0]:.2f}' for i in range(len(INSERTS)))}, bias HU: {bias}"
        )
    print(flush=True)


def print_figures(name: str, figures: Figures) -> None:
    """A table: what, mean over patients, 95 % interval over patients."""
    rows = {
        "PSNR of the input, dB": figures.psnr_low,
        "PSNR, dB": figures.psnr,
        "gain, dB": figures.gain_db,
        **{f"bias in {tissue}, HU": figures.bias_hu(tissue) for tissue in TISSUES},
        "noise left in soft tissue": figures.noise,
        "edge retention": figures.edges,
        **{f"recovery of {item}": figures.insert(i) for i, item in enumerate(INSERTS)},
    }
    print(name)
    for label, (mean, low, high) in rows.items():
        print(f"  {label:28} {mean:8.3f}  [{low:.3f}, {high:.3f}]")
    print(flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DicomNodeError as error:
        raise SystemExit(str(error)) from None
