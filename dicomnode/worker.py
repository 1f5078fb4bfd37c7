"""A translating process, and the node's handle on it; its crash is not the node's."""

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import MappingProxyType

from dicomnode.child import Child
from dicomnode.errors import WorkerLost
from dicomnode.imaging.classifier import ClassifierPackage
from dicomnode.imaging.package import ModelPackage
from dicomnode.orders import Arriving, Cancel, Order, Outcome, Reply, Request, Withdrawal
from dicomnode.serving import Serving
from dicomnode.shelf import ModelShelf
from dicomnode.translating import translate


@dataclass(frozen=True, slots=True)
class Ready:
    """The worker's first message: which models it has loaded, and why not the others."""

    device: str
    seconds: float
    failures: Mapping[str, str]
    engines: Mapping[str, Serving] = field(default_factory=dict)
    """What runs each loaded model."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How a worker process runs its models.

    Attributes:
        device: as in config.yaml; so is `precision`.
        threads: of torch; 0 leaves its own choice.
        compiled: folder where compiled forms of models are kept; None: they are not.
        models_bytes: of all loaded models together; 0: no limit.
        ahead_bytes: of results inferred while their series arrive; 0: nothing is inferred ahead.
    """

    device: str = "auto"
    threads: int = 0
    precision: str = "auto"
    compiled: Path | None = None
    models_bytes: int = 0
    ahead_bytes: int = 0


class Worker:
    """The node's handle on one translating process."""

    def __init__(
        self,
        packages: Mapping[str, ModelPackage],
        settings: Settings,
        classifiers: Mapping[str, ClassifierPackage] = MappingProxyType({}),
    ) -> None:
        """`classifiers`: packages by the names that routes give them."""
        self._child = Child("dicomnode-worker", run, dict(packages), settings, dict(classifiers))
        self.ready: Ready | None = None

    @property
    def pid(self) -> int:
        return self._child.pid

    def wait_ready(self, timeout: float) -> Ready | None:
        """The models are loaded; None: not within `timeout` seconds.

        Raises:
            WorkerLost: the process died while loading.
        """
        if self.ready is None:
            self.ready = self._child.receive(timeout)
        return self.ready

    def send(self, message: Request | Cancel | Arriving) -> None:
        """Hand over a job, or word of one.

        Raises:
            WorkerLost: the process died.
        """
        self._child.send(message)

    def reply(self, timeout: float) -> Reply | None:
        """What became of a job; None: of none within `timeout` seconds.

        Raises:
            WorkerLost: the process died; what it had can run again elsewhere.
        """
        reply = self._child.receive(timeout)
        if reply is not None and not isinstance(reply, Reply):
            raise WorkerLost("the worker sent no reply")
        return reply

    def stop(self, grace: float) -> None:
        self._child.stop(grace)


def run(
    connection: Connection,
    packages: Mapping[str, ModelPackage],
    settings: Settings,
    classifiers: Mapping[str, ClassifierPackage] = MappingProxyType({}),
) -> None:
    """The worker process: load the models, then translate until the pipe closes."""
    from dicomnode.ahead import Ahead
    from dicomnode.classification import load_classifiers
    from dicomnode.desk import Desk

    started = time.monotonic()
    how = (settings.device, settings.threads, settings.precision, settings.compiled)
    models, missing, used = load_models(packages, *how, settings.models_bytes)
    looking = load_classifiers(classifiers, used)
    failures = {**missing, **looking.failures}
    connection.send(Ready(used, time.monotonic() - started, failures, models.serving))
    _warm()

    def one(order: Order | Withdrawal, between: Callable[[], None], ahead: Ahead) -> Outcome:
        outcome = translate(order, models, missing, looking, between, ahead)
        return replace(outcome, serving=models.serving)

    with contextlib.suppress(EOFError):
        Desk(connection, one, Ahead(models, settings.ahead_bytes)).run()


def _warm() -> None:
    """What the first series would wait for otherwise: modules, and highdicom's tables of IODs."""
    from dicomnode import stages  # noqa: F401
    from dicomnode.attributes import patient_and_study

    patient_and_study()


def load_models(
    packages: Mapping[str, ModelPackage],
    device: str,
    threads: int,
    precision: str = "auto",
    compiled: Path | None = None,
    most_bytes: int = 0,
) -> tuple[ModelShelf, dict[str, str], str]:
    """Load models and run their self-tests: the models, why others failed, the device used.

    Args: as attributes of `Settings`.
    """
    import torch  # here, so that the node process never pays for it

    from dicomnode.imaging.inference import Model, load_model
    from dicomnode.qa import check_limits

    if threads:
        torch.set_num_threads(threads)
    used = device
    if used == "auto":
        used = "cuda" if torch.cuda.is_available() else "cpu"

    def load(package: ModelPackage) -> Model:
        check_limits(package)
        return load_model(package, used, precision, compiled)

    models = ModelShelf(packages, load, most_bytes)
    return models, models.failures, used
