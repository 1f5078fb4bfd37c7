"""Would several acceptor processes help? One receiver with all associations, two with half each.

Two whole nodes share nothing: no interpreter, no journal, no log. So what they gain together is the
most that a node with two acceptor processes could gain on this machine. The acceptor alone syncs
nothing.
"""

import argparse
import contextlib
import itertools
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter

from benchmarks.peers import Running, instances, machine, node, ours, scratch, settle
from benchmarks.receive import by_dcmsend

_Receiver = Callable[[Path], contextlib.AbstractContextManager[Running]]
_RECEIVERS: dict[str, _Receiver] = {"node": node, "acceptor": ours}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ct", type=int, default=400, help="instances of 512x512")
    parser.add_argument("--pet", type=int, default=2000, help="instances of 128x128")
    parser.add_argument("--associations", type=int, default=4)
    parser.add_argument("--receivers", nargs="+", choices=_RECEIVERS, default=list(_RECEIVERS))
    parser.add_argument("--scratch", type=Path, help="folder on the disk to measure")
    options = parser.parse_args()
    print(machine())
    for name, kind in itertools.product(options.receivers, ("ct", "pet")):
        count = getattr(options, kind)
        rates: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(options.repeats):
            for number in rates:
                with scratch(options.scratch) as folder:
                    files = instances(kind, count, folder / kind)
                    receivers = [(_RECEIVERS[name], folder / f"receiver{n}") for n in range(number)]
                    rates[number].append(count / _seconds(receivers, files, options.associations))
        for number, found in rates.items():
            print(
                f"{name}, {kind}, {options.associations} associations to {number}: "
                f"{statistics.median(found):.0f}/s ({min(found):.0f} - {max(found):.0f})"
            )
        one, two = map(statistics.median, rates.values())
        print(f"{name}, {kind}: two to one {two / one:.2f}", flush=True)


def _seconds(
    receivers: Sequence[tuple[_Receiver, Path]], files: Sequence[Path], associations: int
) -> float:
    number = len(receivers)
    with contextlib.ExitStack() as stack:
        ports = [stack.enter_context(receiver(folder)).port for receiver, folder in receivers]
        settle()
        with ThreadPoolExecutor(number) as pool:
            start = perf_counter()
            each = [files[n::number] for n in range(number)]
            list(pool.map(by_dcmsend, ports, each, [associations // number] * number))
            return perf_counter() - start


if __name__ == "__main__":
    main()
