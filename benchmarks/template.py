"""How much faster a derived series is built from a template than instance by instance.

    python -m benchmarks.template [--repeats 7] [--slices 140]

Both build the same instances (tests/test_template.py compares their bytes) in turn, in one process;
processor time, so that other work on the machine counts little.
"""

import argparse
import statistics
import time
from datetime import UTC, datetime

from benchmarks.peers import machine
from dicomnode.derived import OutputOptions, derive_series
from dicomnode.imaging.volume import volume_from_datasets
from tests.factories import ct_series
from tests.test_derived import DENOISER, received


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--slices", type=int, default=140)
    options = parser.parse_args()
    series = ct_series(options.slices, 16, 16, private=True)
    source, ordered = volume_from_datasets(received(series))
    given = (source, source, ordered, DENOISER, OutputOptions(), datetime.now(UTC))
    plain, quick = [], []
    for _ in range(options.repeats):
        for times, use_template in ((plain, False), (quick, True)):
            began = time.process_time()
            built = sum(1 for _ in derive_series(*given, use_template=use_template))
            times.append((time.process_time() - began) / built * 1000)
    ratios = sorted(one / other for one, other in zip(plain, quick, strict=True))
    print(machine())
    print(f"plain {statistics.median(plain):.2f}, template {statistics.median(quick):.2f} ms each")
    print(f"ratio: median {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
