"""Loaded models that share one device: within a budget of memory, the least recently used go."""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from dicomnode.errors import PackageError
from dicomnode.imaging.package import ModelPackage
from dicomnode.serving import Serving

if TYPE_CHECKING:
    from dicomnode.imaging.inference import Model

log = logging.getLogger(__name__)

Load = Callable[[ModelPackage], "Model"]
"""Load a model and run its self-test."""


class ModelShelf(Mapping[str, "Model"]):
    """Models by name. Every one was loaded and tested once; one that was put away is so again."""

    def __init__(
        self, packages: Mapping[str, ModelPackage], load: Load, budget_bytes: int = 0
    ) -> None:
        """Load every model in turn.

        Args:
            budget_bytes: for all loaded models together, see `bytes_of`; 0: no limit. The one that
                is in use stays, whatever its size.
        """
        self._packages, self._load, self._budget = dict(packages), load, budget_bytes
        self._loaded: OrderedDict[str, Model] = OrderedDict()
        self.failures: dict[str, str] = {}
        """Why models are not here."""
        self.words: dict[str, str] = {}
        """Per model its engine, number format and device, and why no faster one."""
        self._serving: dict[str, Serving] = {}
        for name in packages:
            try:
                model = self._take(name)
                self.words[name] = model.words
            except PackageError as error:
                self.failures[name] = str(error)
                log.error("model %s not loaded: %s", name, error)

    @property
    def serving(self) -> dict[str, Serving]:
        """What runs each model that did not fail, as it is now, or was when it was put away."""
        for name, model in self._loaded.items():
            self._serving[name] = _serving(model)
        return dict(self._serving)

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the models in memory, the least recently used first."""
        return tuple(self._loaded)

    def __getitem__(self, name: str) -> "Model":
        """The model, loaded again if it was put away.

        Raises:
            KeyError: there is none, or it failed at the start.
            PackageError: it can no longer be loaded.
        """
        if name not in self.words:
            raise KeyError(name)
        return self._take(name)

    def __contains__(self, name: object) -> bool:
        return name in self.words

    def __iter__(self) -> Iterator[str]:
        return iter(self.words)

    def __len__(self) -> int:
        return len(self.words)

    def _take(self, name: str) -> "Model":
        model = self._loaded.pop(name, None)
        if model is None:
            package = self._packages[name]
            model = self._load(package)
            log.info("model %s %s loaded: %s", name, package.version, model.words)
        self._loaded[name] = model
        self._put_away()
        return model

    def _put_away(self) -> None:
        while (
            self._budget
            and len(self._loaded) > 1
            and sum(map(bytes_of, self._loaded.values())) > self._budget
        ):
            name, model = self._loaded.popitem(last=False)
            self._serving[name] = _serving(model)
            log.info("model %s put away: all models together are to keep to their budget", name)


def _serving(model: "Model") -> Serving:
    chosen = (model.engine.name, model.precision, model.device)
    return Serving(*chosen, model.self_test, model.refused, model.forms)


def bytes_of(model: "Model") -> int:
    """What a loaded model is reckoned to keep: its weights, and as much for its engine."""
    state = model.generator.state_dict().values()
    return 2 * sum(int(value.numel() * value.element_size()) for value in state)
