"""What the processor of this machine can do."""

import functools
import platform
from collections.abc import Collection
from pathlib import Path

NEEDED = {
    "fp32": frozenset[str](),
    "bf16": frozenset({"amx_bf16", "avx512_bf16"}),
    "int8": frozenset({"amx_int8", "avx512_vnni", "avx_vnni"}),
}
"""Number format -> instruction sets: with one of them it is faster than fp32, else slower."""
CPU_INFO = Path("/proc/cpuinfo")


@functools.cache
def cpu_features(cpu_info: Path = CPU_INFO) -> frozenset[str]:
    """Instruction sets of this processor, in the words of Linux; empty where there is no Linux."""
    try:
        lines = cpu_info.read_text("ascii", "replace").splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), ":")
    return frozenset(flags.partition(":")[2].split())


def runs_well(precision: str, features: Collection[str]) -> bool:
    """Whether a processor with these instruction sets gains by `precision`."""
    needed = NEEDED.get(precision)
    return needed is not None and (not needed or not needed.isdisjoint(features))


def engines_for(precision: str) -> tuple[str, ...]:
    """Engines that have this number format, the one to try first before the other.

    A rule and no measurement at the start: a measured choice would fall out differently from one
    start to the next, and with it the last bits of a result whose UIDs are the same. On a quiet
    machine OpenVINO was the faster one for every network in bf16 and for all but one (by 10 %) in
    fp32, and beside other work PyTorch loses far more (docs/PERFORMANCE.md).
    """
    return ("openvino",) if precision == "int8" else ("openvino", "torch")


def cpu_words(features: Collection[str]) -> str:
    """The architecture and those instruction sets that a compiled form may rely on."""
    vector = sorted(f for f in features if f.startswith(("amx", "avx", "sse4", "fma", "asimd")))
    return " ".join([platform.machine(), *vector])
