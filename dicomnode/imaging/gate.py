"""How far a result in fewer bits may be from fp32 before a package is not accepted for them.

The limits are those of the project (issue 7); `training/quantize.py` measures against them, and the
node looks at what a package says was measured before it runs it in int8.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from dicomnode.imaging.intensity import Window
from dicomnode.imaging.manifest import Acceptance, OutputSpec

REFERENCE_WIDTH = 2000.0
"""Of the window, in HU, that the limits of `HU` belong to: those of other units have its shares."""


@dataclass(frozen=True, slots=True)
class Gate:
    """Largest differences to fp32; all but the last in the output's unit."""

    mean_abs: float
    p999_abs: float
    body_bias: float
    """Mean of the signed difference inside the body, of any slice, without its sign."""
    ssim_drop: float
    """Of the structural similarity to the true image, mean over slices."""

    def broken_by(self, found: Mapping[str, float]) -> list[str]:
        """What of `found`, by the names above, is absent or too large, in words."""
        limits = {name: getattr(self, name) for name in self.__slots__}
        return [
            f"{name} {found.get(name, float('nan')):.3g}, allowed {limit:g}"
            for name, limit in limits.items()
            if not found.get(name, float("inf")) <= limit
        ]


HU = Gate(1.0, 10.0, 0.5, 0.002)


def gate_for(output: OutputSpec) -> Gate | None:
    """The limits for results of that unit; None: no window says what is much."""
    if output.unit == "HU":
        return HU
    if not isinstance(output.intensity, Window):
        return None
    share = (output.intensity.high - output.intensity.low) / REFERENCE_WIDTH
    return Gate(HU.mean_abs * share, HU.p999_abs * share, HU.body_bias * share, HU.ssim_drop)


def why_not_int8(output: OutputSpec, acceptance: Acceptance) -> str:
    """Why a package may not run in int8 by what it says was measured; empty: it may."""
    gate = gate_for(output)
    if gate is None:
        return "no limits for a result without a window"
    found = {"mean_abs": acceptance.mean_abs, "p999_abs": acceptance.p999_abs}
    return "; ".join(gate.broken_by({**acceptance.measured, **found}))
