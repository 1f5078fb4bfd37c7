"""Print the figures of a demonstration model's card, from its package and its test patients.

    python training/prove.py training/configs/mr-to-ct.yaml
    python training/prove.py training/configs/cect.yaml part=validation package=/tmp/cect

    python training/prove.py training/configs/cect.yaml "plain=training/ct_slices_*/*CONTRAST_0*"

The last is for contrast-enhanced CT: real slices without agent, below `../shared/data`, of patients
who did not train. Which figures depends on the task of the package: see training/proofs.

    python training/prove.py training/configs/ldct-denoise.yaml against=models/ldct-denoise@1.0.0
    python training/prove.py training/configs/ldct-denoise.yaml pair=FOLDER
    python training/prove.py training/configs/ldct-denoise.yaml part=validation strengths=1,0.9,0.8

A denoiser at three doses beside its input and another version; `pair` is a scanned slice of quarter
and full dose (training/proofs/denoising.py), judged after the patients. `strengths` are tried in
the place of the package's own.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from pydicom import dcmread

from dicomnode.errors import ConfigError, DicomNodeError
from dicomnode.imaging.inference import load_model
from dicomnode.imaging.package import read_package
from dicomnode.imaging.percentiles import Percentiles
from training.config import Data, Images, TrainConfig, load_config
from training.data import load_samples, patient_hash
from training.errors import TrainingError
from training.figures import Denoiser, denoiser
from training.pairs import find_images, patient_of
from training.proofs import contrast, delayed_pet, denoising, mr_ct
from training.proofs.case import Case
from training.split import PARTS, read_split
from training.strength import at_strength
from training.translation import translator

PLAIN_ROOT = Path("../shared/data")
PROOFS: Mapping[str, Callable[[Case], list[str]]] = {
    "syn_ct": mr_ct.lines,
    "syn_mr": mr_ct.lines,
    "delayed_pet": delayed_pet.lines,
    "ce_ct": contrast.lines,
}


def main(argv: Sequence[str]) -> None:
    if not argv:
        raise ConfigError("usage: python training/prove.py CONFIG [part=PART] [package=FOLDER]")
    options = {"part": "test", "package": "", "plain": "", "against": "", "pair": ""}
    options["strengths"] = ""
    own = [word for word in argv[1:] if word.partition("=")[0] in options]
    config = load_config(Path(argv[0]), [word for word in argv[1:] if word not in own])
    options |= dict(word.split("=", 1) for word in own)
    if options["part"] not in PARTS:
        raise ConfigError(f"part: want one of {', '.join(PARTS)}")
    if isinstance(config.data, Data):
        prove_denoiser(config, config.data, options)
        return
    if not isinstance(config.data, Images) or config.publish is None:
        raise ConfigError("data.kind: this judges images; see training/downstream.py for classes")
    if config.publish.task not in PROOFS:
        raise ConfigError(f"publish.task: {config.publish.task} has no proof of its own")
    torch.set_num_threads(config.threads)
    model = load_model(read_package(Path(options["package"] or config.package)), device="cpu")
    case = Case(
        data=config.data,
        found=find_images(config.data),
        split=read_split(Path(config.data.split)),
        part=options["part"],
        apply=translator(model.generator, config, config.data),
    )
    if not case.patients():
        raise TrainingError(
            f"{config.data.split}: no patient is in {options['part']}; where all of them train, "
            "training/leave_out.py proves the method"
        )
    print(f"{model.package.name} {model.package.version}, digest {model.package.digest}")
    print(f"{options['part']}: {len(case.pairs())} slices of {len(case.patients())} patients\n")
    print(*PROOFS[config.publish.task](case), sep="\n")
    if options["plain"]:
        files = _not_trained(sorted(PLAIN_ROOT.glob(options["plain"])), case)
        print(
            f"\n{len(files)} slices without agent",
            *contrast.plain_lines(case.apply, case.data, files),
            sep="\n",
        )


def prove_denoiser(config: TrainConfig, data: Data, options: Mapping[str, str]) -> None:
    """A table per dose, and one of the scanned pair."""
    torch.set_num_threads(config.threads)
    methods: dict[str, Denoiser] = {}
    if options["against"]:
        methods |= _methods(options["against"], "", methods)
    methods |= _methods(options["package"] or config.package, options["strengths"], methods)
    samples, _ = load_samples(data, config.low_dose, config.seed, config.out / "cache")
    patients = read_split(Path(data.split))[options["part"]]
    mine = [sample for sample in samples if sample.patient in patients]
    print(f"{options['part']}: {len(mine)} slices of {len({s.patient for s in mine})} patients")
    for dose in denoising.DOSES:
        print(
            f"\n{dose:g} of the dose\n",
            *denoising.lines(denoising.at_dose(mine, dose), methods),
            sep="\n",
        )
    if options["pair"]:
        pair = denoising.scanned_pair(Path(options["pair"]))
        print("\nscanned pair, quarter dose\n", *denoising.lines(pair, methods), sep="\n")


def _methods(folder: str, strengths: str, others: Mapping[str, Denoiser]) -> dict[str, Denoiser]:
    """A package as a function of a slice, by its name; of each of `strengths` if there are any.

    Raises:
        ConfigError: a strength is not a number, or slices alone do not tell the package's scale.
        PackageError: the generator has no strength, or not that one.
    """
    package = read_package(Path(folder))
    model = load_model(package, device="cpu", precision="fp32")
    scale = package.manifest.input.intensity
    if isinstance(scale, Percentiles):
        raise ConfigError("package: percentiles are of a whole volume; this judges slices in HU")
    name = f"{package.name} {package.version}"
    print(f"{name}, digest {package.digest}")
    if not strengths:
        name = f"{name}, the second" if name in others else name
        return {name: denoiser(model.generator, scale)}
    try:
        shares = [float(word) for word in strengths.split(",")]
    except ValueError:
        raise ConfigError("strengths: want numbers, with commas between them") from None
    spec = package.manifest.generator
    return {
        f"strength {share:g}": denoiser(at_strength(spec, model.generator, share), scale)
        for share in shares
    }


def _not_trained(files: Sequence[Path], case: Case) -> list[Path]:
    """Those of patients in no part but the one judged."""
    trained = {patient for part in PARTS if part != case.part for patient in case.split[part]}
    kept = []
    for path in files:
        own = patient_hash(dcmread(path, stop_before_pixels=True))
        if patient_of(f"{own}/", case.data.patient) not in trained:
            kept.append(path)
    if not kept:
        raise ConfigError("plain: no such slice of a patient who did not train")
    return kept


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DicomNodeError as error:
        raise SystemExit(str(error)) from None
