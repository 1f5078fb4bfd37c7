"""The two-tissue model against its differential equations, and what it says of organs."""

import numpy as np
import pytest
from scipy.integrate import solve_ivp

from training.kinetics import TISSUES, Rates, activity, drawn, excreted, input_function

EARLY, DELAYED = (7.0, 21.0), (42.0, 63.0)


@pytest.mark.parametrize("name", ["grey matter", "liver", "lung", "myocardium", "tumour"])
def test_activity_solves_the_equations_of_two_tissue_compartments(name: str) -> None:
    rates = TISSUES[name]

    def change(t: float, c: list[float]) -> list[float]:
        plasma = float(input_function(np.array([t]))[0])
        free, bound = c
        into = rates.k1 * plasma + rates.k4 * bound
        return [into - (rates.k2 + rates.k3) * free, rates.k3 * free - rates.k4 * bound]

    minutes = np.linspace(0, 63, 2001)
    solved = solve_ivp(change, (0, 63), [0.0, 0.0], t_eval=minutes, max_step=0.02, rtol=1e-6)
    whole = (1 - rates.blood) * solved.y.sum(0) + rates.blood * input_function(minutes)
    for start, end in (EARLY, DELAYED):
        inside = (minutes >= start) & (minutes <= end)
        wanted = np.trapezoid(whole[inside], minutes[inside]) / np.ptp(minutes[inside])
        assert activity(rates, start, end) == pytest.approx(wanted, rel=5e-3)


def test_trapping_tissues_gain_and_the_others_lose() -> None:
    gained = {name: activity(r, *DELAYED) / activity(r, *EARLY) for name, r in TISSUES.items()}
    assert all(gained[name] > 1.2 for name in ("grey matter", "myocardium", "tumour"))
    assert all(gained[name] < 0.8 for name in ("liver", "blood", "spleen"))
    assert excreted(*DELAYED) > excreted(*EARLY) > 0


def test_there_is_no_tracer_before_the_injection() -> None:
    assert input_function(np.array([-1.0, -0.01])).tolist() == [0.0, 0.0]
    assert 0.1 < np.argmax(input_function(np.arange(0, 60, 0.01))) * 0.01 < 0.5


def test_rates_are_drawn_around_their_mean_and_again_for_the_same_seed() -> None:
    rng = np.random.default_rng(1)
    many = [drawn(TISSUES["tumour"], 0.35, rng) for _ in range(2000)]
    logs = np.log([one.k3 / TISSUES["tumour"].k3 for one in many])
    assert abs(logs.mean()) < 0.03
    assert logs.std() == pytest.approx(0.35, rel=0.06)
    assert all(one.k1 > 0 and 0 <= one.blood <= 1 for one in many)
    assert drawn(Rates(1, 1, 1, 1, 1), 0.1, np.random.default_rng(2)) == drawn(
        Rates(1, 1, 1, 1, 1), 0.1, np.random.default_rng(2)
    )
