"""Judge a derived series: ``python tests/judge_dicom.py SRC_DIR DERIVED_DIR [COMPANION ...]``.

One line per judge, then ``JUDGES ALL PASS``; exit 1 if one finds something. A judge that is not
installed is named as skipped, and then not all have passed. DERIVED_DIR/prediction.npy, where it
lies, is what the model gave: (slices, rows, columns), float32, in the derived unit, NaN for voxels
that do not count. A COMPANION is a file, or a folder of files.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.judges import every_verdict, files_in, in_slice_order


def judge_folders(source: Path, derived: Path, companions: Sequence[Path] = ()) -> tuple[int, str]:
    """Exit code and what is printed."""
    prediction = derived / "prediction.npy"
    expected = np.load(prediction) if prediction.exists() else None
    verdicts = every_verdict(
        sorted(source.rglob("*.dcm")),
        in_slice_order(derived.rglob("*.dcm")),
        [
            file
            for given in companions
            for file in ([given] if given.is_file() else files_in(given))
        ],
        expected,
    )
    lines = []
    for verdict in verdicts:
        word = "SKIP" if verdict.skipped else "FAIL" if verdict.findings else "PASS"
        lines.append(f"{word} {verdict.name}: {verdict.skipped or verdict.looked_at}")
        lines += [f"     {finding}" for finding in verdict.findings[:20]]
    failed = [verdict.name for verdict in verdicts if verdict.findings]
    skipped = [verdict.name for verdict in verdicts if verdict.skipped]
    if failed:
        lines.append(f"JUDGES FAIL: {', '.join(failed)}")
    elif skipped:
        lines.append(f"JUDGES PASS, SKIPPED: {', '.join(skipped)}")
    else:
        lines.append("JUDGES ALL PASS")
    return int(bool(failed)), "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(f"{__doc__}")
    code, text = judge_folders(*map(Path, sys.argv[1:3]), companions=list(map(Path, sys.argv[3:])))
    print(text)
    sys.exit(code)
