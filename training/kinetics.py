"""FDG in tissue over time: the two-tissue compartment model behind the delayed-PET phantoms.

Activities are decay-corrected to injection, in units of the input function; times in minutes after
injection. Only ratios of one tissue at two times are used, so that no absolute scale is needed.

Sources: input function, Feng 1993, model 2; grey and white matter, Reivich 1985; liver, lung and
myocardium, as collected by Karakatsanis 2013 (Phys Med Biol 58:7391). The other tissues are
assumptions of ours within what is published, which `drawn` spreads widely.
"""

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

STEP_MIN = 0.05
"""Of the numerical convolution; an eighth of the input function's fastest time constant."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Of one tissue: K1 in ml/min/ml, k2, k3, k4 in 1/min, blood volume as a fraction."""

    k1: float
    k2: float
    k3: float
    k4: float
    blood: float = 0.0


TISSUES: Mapping[str, Rates] = {
    "grey matter": Rates(0.095, 0.125, 0.069, 0.0055, 0.05),
    "white matter": Rates(0.065, 0.126, 0.066, 0.0054, 0.03),
    "liver": Rates(0.864, 0.981, 0.005, 0.016),
    "lung": Rates(0.108, 0.735, 0.016, 0.013, 0.15),
    "myocardium": Rates(0.6, 1.2, 0.1, 0.001, 0.1),
    "spleen": Rates(0.9, 1.3, 0.006, 0.01, 0.1),
    "kidney": Rates(0.7, 0.9, 0.012, 0.01, 0.15),
    "marrow": Rates(0.12, 0.4, 0.025, 0.005, 0.05),
    "muscle": Rates(0.03, 0.2, 0.015, 0.002, 0.02),
    "fat": Rates(0.012, 0.15, 0.012, 0.002, 0.01),
    "tumour": Rates(0.08, 0.3, 0.06, 0.004, 0.05),
    "blood": Rates(0.0, 1.0, 0.0, 0.0, 1.0),
}


def input_function(minutes: NDArray[np.float64]) -> NDArray[np.float64]:
    """FDG in plasma after a bolus (Feng 1993, model 2), in uCi/ml; 0 before injection."""
    fast = (851.1 * minutes - 21.9 - 20.8) * np.exp(-4.13 * minutes)
    rest = 21.9 * np.exp(-0.12 * minutes) + 20.8 * np.exp(-0.01 * minutes)
    return np.where(minutes < 0, 0.0, fast + rest)


def activity(rates: Rates, start: float, end: float) -> float:
    """Mean activity of a tissue from `start` to `end`, minutes after injection.

    Two-tissue compartment model: tissue = K1 / (a2 - a1) ((k3 + k4 - a1) e^(-a1 t) +
    (a2 - k3 - k4) e^(-a2 t)) convolved with the input function, and the blood in the tissue.
    """
    minutes, plasma = _plasma(end)
    sums = rates.k2 + rates.k3 + rates.k4
    root = np.sqrt(max(sums**2 - 4 * rates.k2 * rates.k4, 0.0))
    slow, fast = (sums - root) / 2, (sums + root) / 2
    response = (rates.k3 + rates.k4 - slow) * np.exp(-slow * minutes)
    response += (fast - rates.k3 - rates.k4) * np.exp(-fast * minutes)
    response *= rates.k1 / max(fast - slow, 1e-9)
    tissue = np.convolve(response, plasma)[: len(minutes)] * STEP_MIN
    whole = (1 - rates.blood) * tissue + rates.blood * plasma
    return float(whole[minutes >= start].mean())


def excreted(start: float, end: float) -> float:
    """Mean of what has left the blood by then: the activity of urine, in units of its own."""
    minutes, plasma = _plasma(end)
    return float((np.cumsum(plasma) * STEP_MIN)[minutes >= start].mean())


def drawn(rates: Rates, spread: float, rng: np.random.Generator) -> Rates:
    """The rates of one patient or lesion: each times a log-normal factor of that spread."""
    factors = np.exp(spread * rng.standard_normal(5))
    k1, k2, k3, k4, blood = np.array(astuple(rates)) * factors
    return Rates(float(k1), float(k2), float(k3), float(k4), min(float(blood), 1.0))


@cache
def _plasma(end: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    minutes = np.asarray((np.arange(round(end / STEP_MIN)) + 0.5) * STEP_MIN, np.float64)
    return minutes, input_function(minutes)
