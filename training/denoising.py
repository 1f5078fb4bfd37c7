"""What is asked of a denoiser only: gain, tissue bias, edges and small details, beside filters."""

from collections.abc import Sequence
from pathlib import Path

from dicomnode.errors import ConfigError
from dicomnode.imaging.inference import Model
from dicomnode.imaging.percentiles import Percentiles
from training.compare import FILTERS, filter_at_same_noise, filter_at_same_psnr, turned_down
from training.config import Data, TrainConfig
from training.data import Sample, load_samples
from training.figures import Denoiser, Figures, denoiser, evaluate_samples
from training.metrics import INSERTS, TISSUES
from training.split import read_split


def judge_denoiser(
    config: TrainConfig,
    data: Data,
    model: Model,
    part: str,
    dose: float,
    patients: bool = False,
    compare: bool = False,
) -> None:
    """Print the figures; with `patients` a line for each, with `compare` those of filters too."""
    samples, _ = load_samples(data, config.low_dose, config.seed, config.out / "cache")
    wanted = read_split(Path(data.split))[part]
    held_out = [sample for sample in samples if sample.patient in wanted]
    intensity = model.package.manifest.input.intensity
    if isinstance(intensity, Percentiles):
        raise ConfigError("package: percentiles are of a whole volume; this judges slices in HU")
    network = denoiser(model.generator, intensity)
    figures = evaluate_samples(network, held_out, dose)
    print(f"{model.package.name} {model.package.version}, digest {model.package.digest}")
    print(f"{part} at {dose:g} of the dose: ", end="")
    print(f"{len(figures.patients)} patients, {len(figures.slices)} slices\n")
    print_figures(model.package.name, figures)
    if patients:
        print_patients(figures)
    if compare:
        compare_filters(network, held_out, dose, figures)


def compare_filters(
    network: Denoiser, samples: Sequence[Sample], dose: float, figures: Figures
) -> None:
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
