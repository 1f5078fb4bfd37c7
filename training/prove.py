"""Print the figures of a demonstration model's card, from its package and its test patients.

    python training/prove.py training/configs/mr-to-ct.yaml
    python training/prove.py training/configs/cect.yaml part=validation package=/tmp/cect

    python training/prove.py training/configs/cect.yaml "plain=training/ct_slices_*/*CONTRAST_0*"

The last is for contrast-enhanced CT: real slices without agent, below `../shared/data`, of patients
who did not train. Which figures depends on the task of the package: see training/proofs.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from pydicom import dcmread

from dicomnode.errors import ConfigError, DicomNodeError
from dicomnode.imaging.inference import load_model
from dicomnode.imaging.package import read_package
from training.config import Images, load_config
from training.data import patient_hash
from training.pairs import find_images, patient_of
from training.proofs import contrast, delayed_pet, mr_ct
from training.proofs.case import Case
from training.split import PARTS, read_split
from training.translation import translator

PLAIN_ROOT = Path("../shared/data")
PROOFS: Mapping[str, Callable[[Case], list[str]]] = {
    "syn_ct": mr_ct.ct_from_mr,
    "syn_mr": mr_ct.mr_from_ct,
    "delayed_pet": delayed_pet.lines,
    "ce_ct": contrast.lines,
}


def main(argv: Sequence[str]) -> None:
    if not argv:
        raise ConfigError("usage: python training/prove.py CONFIG [part=PART] [package=FOLDER]")
    options = {"part": "test", "package": "", "plain": ""}
    own = [word for word in argv[1:] if word.partition("=")[0] in options]
    config = load_config(Path(argv[0]), [word for word in argv[1:] if word not in own])
    options |= dict(word.split("=", 1) for word in own)
    if not isinstance(config.data, Images) or config.publish is None:
        raise ConfigError("data.kind: this judges translations; see training/evaluate.py")
    if options["part"] not in PARTS:
        raise ConfigError(f"part: want one of {', '.join(PARTS)}")
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
