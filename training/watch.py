"""Which validation was the best, and when to stop looking for a better one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from training.errors import TrainingError


@dataclass(frozen=True, slots=True)
class Stopping:
    """Early stopping on the validation patients; the package then has the best weights."""

    figure: str
    """Of log.jsonl, a mean over patients in the unit of the target: mae, bias, gain_db ..."""
    goal: Literal["lowest", "highest"] = "lowest"
    patience: int = 10
    """So many validations in a row without a better one end the run; 0: all steps are done."""
    least: float = 0.0
    """What counts as better, in the unit of the figure."""


class Watch:
    """The best value of the figure so far, and how long ago it was."""

    def __init__(self, stopping: Stopping | None) -> None:
        self.stopping = stopping
        self.best: float | None = None
        self.best_step, self.since = 0, 0

    def better(self, figures: Mapping[str, float], step: int) -> bool:
        """Note a validation; whether it is the best so far.

        Raises:
            TrainingError: there is no such figure.
        """
        if self.stopping is None:
            return False
        if self.stopping.figure not in figures:
            known = ", ".join(figures)
            raise TrainingError(f"stopping.figure: no {self.stopping.figure!r}; known: {known}")
        value = figures[self.stopping.figure]
        sign = 1.0 if self.stopping.goal == "lowest" else -1.0
        if self.best is None or sign * (self.best - value) > self.stopping.least:
            self.best, self.best_step, self.since = value, step, 0
            return True
        self.since += 1
        return False

    @property
    def over(self) -> bool:
        """Whether patience is at its end."""
        return self.stopping is not None and 0 < self.stopping.patience <= self.since

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "best_step": self.best_step, "since": self.since}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best, self.best_step = state["best"], int(state["best_step"])
        self.since = int(state["since"])
