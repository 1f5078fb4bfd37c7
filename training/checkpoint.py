"""Stop anywhere, go on exactly there: recipe, step and watch, written whole or not at all.

No random state is kept: the batch of a step is a function of the seed and the step alone.
"""

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from training.errors import TrainingError
from training.recipes import Recipe

DAMAGE = (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile)
"""What torch raises for a file that is not whole."""


def save_checkpoint(path: Path, recipe: Recipe, step: int, config_digest: str, **more: Any) -> None:
    """Write beside, fsync, rename: a crash leaves the old checkpoint or the new one.

    Args:
        more: plain values that `load_more` gives back.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    state = {"step": step, "config": config_digest, "recipe": recipe.state_dict(), "more": more}
    with partial.open("wb") as stream:
        torch.save(state, stream)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load_checkpoint(path: Path, recipe: Recipe, config_digest: str) -> int:
    """Restore `recipe`; returns the step to go on from (0: there is no checkpoint).

    Raises:
        TrainingError: the file is damaged, or belongs to a run with other settings.
    """
    if not path.exists():
        return 0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["config"] != config_digest:
            raise TrainingError(
                f"{path} belongs to a run with other settings; choose another name or delete it"
            )
        recipe.load_state_dict(state["recipe"])
        return int(state["step"])
    except DAMAGE as error:
        raise TrainingError(_damaged(path, error)) from error


def load_more(path: Path) -> dict[str, Any]:
    """What else the checkpoint holds; nothing where there is none, or an older one.

    Raises:
        TrainingError: the file is damaged.
    """
    if not path.exists():
        return {}
    try:
        more = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get("more", {})
        return dict(more)
    except DAMAGE as error:
        raise TrainingError(_damaged(path, error)) from error


def _damaged(path: Path, error: Exception) -> str:
    size = path.stat().st_size
    return (
        f"{path} is damaged ({size} bytes, {type(error).__name__}); put back a whole one, or "
        "delete it to start again"
    )
