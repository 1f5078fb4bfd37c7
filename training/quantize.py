"""Measure a package in every number format and engine here, and write what it is accepted for.

    python training/quantize.py models/ldct-denoise --data training/configs/ldct-denoise.yaml
    python training/quantize.py PACKAGE --data CONFIG --dry-run

Calibrates 8-bit integers on slices of the training patients, then compares every format with fp32
torch on slices of the validation patients. Where 8 bits everywhere are too coarse, the
convolutions that suffer most stay as they are. A format that keeps the limits of
dicomnode/imaging/gate.py in every engine is written into the package with what was measured; one
that does not is taken out of it. The package has another digest then. Test patients are not looked
at.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dicomnode.errors import DicomNodeError, PackageError
from dicomnode.imaging.engines import (
    Engine,
    Limits,
    OpenVinoEngine,
    TorchEngine,
    cpu_features,
    in_int8,
    installed,
    runs_well,
)
from dicomnode.imaging.gate import Gate, gate_for
from dicomnode.imaging.inference import load_model
from dicomnode.imaging.manifest import Acceptance, Manifest, Range
from dicomnode.imaging.networks import Generator
from dicomnode.imaging.package import ModelPackage, read_package, with_manifest
from training.calibrate import calibrate, least_harmful, most_that_pass
from training.cases import Case, Image, load_cases
from training.config import load_config
from training.differences import Found, compare, worst_of
from training.errors import TrainingError

MARGIN = 2.0
"""Another processor may be so much farther off than was measured, within the gate."""
SIDE = 256
"""Of training slices the middle is looked at, where nothing looks at the whole slice."""
PROBES = 4
"""Training slices on which single convolutions are tried."""
Makers = dict[str, dict[str, Callable[[], Engine]]]
"""Number format -> engine -> how it is made."""


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path)
    parser.add_argument("--data", type=Path, required=True, metavar="CONFIG")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="as train.py")
    parser.add_argument("--calibration", type=int, default=100, help="training slices")
    parser.add_argument("--slices", type=int, default=20, help="validation slices")
    parser.add_argument("--dry-run", action="store_true", help="print, write nothing")
    args = parser.parse_args(argv)
    config = load_config(args.data, args.set)
    package = read_package(args.package)
    manifest = package.manifest
    gate = gate_for(manifest.output)
    if gate is None:
        raise TrainingError(f"{package.name}: a result without a window has no limits")
    generator = load_model(package, precision="fp32").generator
    whole = load_cases(config, manifest, "train", args.calibration)
    training = whole if generator.uses_statistics else [case.middle(SIDE) for case in whole]
    limits = int8_limits(generator, training, manifest, gate)
    print(f"int8: {len(limits)} convolutions, {len(training)} training slices", flush=True)
    cases = load_cases(config, manifest, "validation", args.slices)
    reports = measure(generator, limits, cases, manifest)
    judged = judge(reports, gate, len(cases))
    if not args.dry_run:
        written = accept(package, judged, limits)
        if reason := int8_misses_itself(written):
            print(f"int8 REFUSED: {reason}")
            written = accept(written, {"int8": None}, {})
        print(f"wrote {written.path}, digest {written.digest}")


def int8_limits(
    generator: Generator, training: Sequence[Case], manifest: Manifest, gate: Gate
) -> Limits:
    """Calibrated limits of those convolutions that, on training slices, keep within the gate."""
    limits = calibrate(generator, [case.given for case in training])
    probes = training[:: max(1, len(training) // PROBES)][:PROBES]
    reference = [_torch(generator)(case) for case in probes]

    def found(changed: Generator) -> Found:
        return compare(_torch(changed), probes, reference, manifest)

    order = least_harmful(generator, limits, lambda changed: found(changed).mean_abs)
    return most_that_pass(
        order, generator, limits, lambda changed: not gate.broken_by(found(changed).as_data())
    )


def _torch(generator: Generator) -> Callable[[Case], Image]:
    return _runs(TorchEngine(generator, "cpu", "fp32"))


def _runs(engine: Engine) -> Callable[[Case], Image]:
    return lambda case: engine.run(case.given)


def measure(
    generator: Generator, limits: Limits, cases: Sequence[Case], manifest: Manifest
) -> Iterator[tuple[str, str, Found | str]]:
    """Format, engine, and what was found, or why it does not run here."""
    reference = [_torch(generator)(case) for case in cases]
    for kind, makers in formats(generator, limits).items():
        for name, make in makers.items():
            try:
                found = compare(_runs(make()), cases, reference, manifest)
                yield kind, name, found
            except PackageError as error:
                yield kind, name, str(error)


def formats(generator: Generator, limits: Limits) -> Makers:
    """What this processor has: OpenVINO and torch in bf16, OpenVINO in 8-bit integers."""
    found: Makers = {"bf16": {}, "int8": {}}
    features = cpu_features()
    if runs_well("bf16", features):
        found["bf16"]["torch"] = lambda: TorchEngine(generator, "cpu", "bf16")
        if installed():
            found["bf16"]["openvino"] = lambda: OpenVinoEngine(generator, "bf16")
    if limits and installed() and runs_well("int8", features):
        found["int8"]["openvino"] = lambda: OpenVinoEngine(generator, "int8", limits=limits)
    if limits:
        rounded = in_int8(generator, limits)
        found["int8"]["torch, rounding only"] = lambda: TorchEngine(rounded, "cpu", "fp32")
    return found


def judge(
    reports: Iterator[tuple[str, str, Found | str]], gate: Gate, slices: int
) -> dict[str, Acceptance | None]:
    """Print every report; per format what it is accepted with, or None: refused."""
    every: dict[str, list[Found]] = {}
    failed: set[str] = set()
    for kind, name, found in reports:
        if isinstance(found, str):
            print(f"{kind} {name}: {found}", flush=True)
            continue
        broken = gate.broken_by(found.as_data())
        verdict = f"REFUSED: {'; '.join(broken)}" if broken else "within the limits"
        print(f"{kind} {name}: {found}; {verdict}", flush=True)
        every.setdefault(kind, []).append(found)
        failed |= {kind} if broken else set()
    return {
        kind: None if kind in failed else _acceptance(worst_of(found), gate, slices)
        for kind, found in every.items()
    }


def _acceptance(found: Found, gate: Gate, slices: int) -> Acceptance:
    measured = {name: float(f"{value:.3g}") for name, value in found.as_data().items()}
    return Acceptance(
        min(gate.mean_abs, float(f"{MARGIN * found.mean_abs:.2g}")),
        min(gate.p999_abs, float(f"{MARGIN * found.p999_abs:.2g}")),
        slices,
        measured,
    )


def accept(
    package: ModelPackage, judged: Mapping[str, Acceptance | None], limits: Limits
) -> ModelPackage:
    """Write the package with what it is accepted for; what was not measured here stays."""
    judged = {"int8": None, **judged}  # without limits there is no int8 to measure
    earlier = package.manifest.acceptance.items()
    kept = {kind: one for kind, one in earlier if kind not in judged}
    accepted = kept | {kind: one for kind, one in judged.items() if one is not None}
    ranges = {name: Range(low, high) for name, (low, high) in sorted(limits.items())}
    manifest = replace(
        package.manifest,
        acceptance=accepted,
        int8_limits=ranges if "int8" in accepted else {},
    )
    return with_manifest(package, manifest)


def int8_misses_itself(package: ModelPackage) -> str:
    """Why the node would not run an accepted int8: its self-test; empty: it would, or is not asked.

    The self-test is no slice of the training patients: values beyond the limits show there.
    """
    possible = installed() and runs_well("int8", cpu_features())
    if "int8" not in package.manifest.acceptance or not possible:
        return ""
    model = load_model(package, precision="int8")
    return "" if model.precision == "int8" else "; ".join(model.refused)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    try:
        main(sys.argv[1:])
    except DicomNodeError as error:
        raise SystemExit(str(error)) from None
