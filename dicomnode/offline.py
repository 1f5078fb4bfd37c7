"""A folder of DICOM without a network: which series are there, what would become of them, `run`."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from dicomnode import qa
from dicomnode.classification import load_classifiers
from dicomnode.config import Companions, NodeConfig, Route
from dicomnode.errors import CannotUnderstand, PackageError, SeriesRefused
from dicomnode.imaging.classifier import read_classifier
from dicomnode.imaging.layout import check_headers
from dicomnode.imaging.marks import is_synthetic
from dicomnode.imaging.package import read_package
from dicomnode.imaging.pixels import declared_encoding
from dicomnode.imaging.stacks import StackOfImages, split_stacks, usable_stacks
from dicomnode.orders import Order, Outcome
from dicomnode.outputs import check_source
from dicomnode.part10 import MALFORMED, damage_in, read_header, read_instances
from dicomnode.routing import Decision, decide, keywords_of
from dicomnode.series import ARRIVAL_KEYWORDS, common_header, missing_slices, plane_of, read_headers
from dicomnode.translating import translate
from dicomnode.worker import load_models


@dataclass(frozen=True, slots=True)
class ExplainedStack:
    """One stack of a series, by its headers alone."""

    rule: str
    """What tells it from the others; empty: there are no others."""
    modality: str
    slices: int
    step_mm: float
    tilt_degrees: float
    """Of the stack's axis from the slice normal; 0 unless sheared."""
    refusal: str = ""
    """Code and sentence; empty: nothing in the headers is against it."""
    models: dict[str, str] = field(default_factory=dict)
    """By the name of each route that matches: why its model would refuse the stack by its headers;
    empty: nothing is against it but, perhaps, its pixels."""

    def __str__(self) -> str:
        words = [f"{self.slices} {self.modality} slices"]
        if self.step_mm:
            words.append(f"{self.step_mm:g} mm apart")
        if self.tilt_degrees:
            words.append(f"sheared by {self.tilt_degrees:.1f} degrees")
        which = f"stack ({self.rule})" if self.rule else "one stack"
        return f"{which}: {', '.join(words)}{f': {self.refusal}' if self.refusal else ''}"


@dataclass(frozen=True, slots=True)
class Explained:
    """What the configuration makes of one series found in files."""

    series_uid: str
    instances: int
    missing: int
    """Slices that are missing between those that are there."""
    decisions: list[Decision]
    stacks: list[ExplainedStack]
    """What could become a derived series each."""
    ignored: dict[str, int]
    """Instances, or frames, that are no slice: how many, by code."""
    refusal: str = ""
    """Code and sentence if no stack can be made at all."""

    def may_give(self, route: Route) -> bool:
        """Whether the model of a route that matches may take one of the stacks."""
        return any(stack.models.get(route.name) == "" for stack in self.stacks)


def find_series(paths: Iterable[Path]) -> tuple[dict[str, list[Path]], int]:
    """Files by SeriesInstanceUID, folders searched to any depth, and how many are no DICOM."""
    found: dict[str, list[Path]] = defaultdict(list)
    others = 0
    for path in _files(paths):
        try:
            header = read_header(path, [0x0020000E])
            uid = str(header.get("SeriesInstanceUID") or "")
        except (CannotUnderstand, *MALFORMED):
            uid = ""
        if uid:
            found[uid].append(path)
        else:
            others += 1
    return dict(found), others


def explain(paths: Iterable[Path], config: NodeConfig) -> tuple[list[Explained], int]:
    """Per series which routes match, and of the others why not; runs nothing.

    Calling and called AE title are not in files: routes that ask for them do not match here.
    """
    series, others = find_series(paths)
    return [_explain(uid, files, config) for uid, files in sorted(series.items())], others


def _explain(series_uid: str, files: Sequence[Path], config: NodeConfig) -> Explained:
    keywords = sorted({*keywords_of(config.routes), *ARRIVAL_KEYWORDS})
    headers = read_headers(files, keywords)
    facts: dict[str, str | float] = {"Instances": float(len(files))}
    header = common_header(headers, keywords, facts)
    decisions = decide(header, config.routes, any(map(is_synthetic, headers)))
    missing = missing_slices(map(plane_of, headers))
    taken = [decision.route for decision in decisions if decision.taken]
    stacks, ignored, refusal = _stacks(files, taken, config)
    return Explained(series_uid, len(files), missing, decisions, stacks, ignored, refusal)


def _stacks(
    files: Sequence[Path], routes: Sequence[Route], config: NodeConfig
) -> tuple[list[ExplainedStack], dict[str, int], str]:
    """The stacks of a series, what is no slice by its code, and why there are none."""
    try:
        headers = read_instances(files, pixels=False)
        ignored = Counter(item.code for item in split_stacks(headers).ignored)
        split = usable_stacks(headers)
    except SeriesRefused as refusal:
        return [], {}, f"{refusal.code}: {refusal.message}; {refusal.remedy}"
    stacks = []
    for stack in split.stacks:
        why = stack.refusal
        words = "" if why is None else f"{why.code}: {why.message}; {why.remedy}"
        tilt = stack.tilt_degrees if stack.sheared else 0.0
        step = round(stack.step_mm, 3)
        count = len(stack.datasets)
        models = {} if words else {r.name: _why_not(stack, r, config) for r in routes}
        stacks.append(ExplainedStack(stack.rule, stack.modality, count, step, tilt, words, models))
    return stacks, dict(sorted(ignored.items())), ""


def _why_not(stack: StackOfImages, route: Route, config: NodeConfig) -> str:
    """Why the model of a route would refuse a stack by its headers; empty: it would not."""
    try:
        package = read_package(config.models_dir / route.model)
        manifest, headers = package.manifest, stack.datasets
        least = int(manifest.bounds.slices.min or 1)
        check_headers(headers, manifest.input.unit, min_slices=least, allow_lossy=route.allow_lossy)
        check_source(headers, manifest.task, accept_synthetic=True)
        qa.check_headers(headers, package)
        for header in headers:
            declared_encoding(header)
    except SeriesRefused as refusal:
        return f"{refusal.code}: {refusal.message}; {refusal.remedy}"
    except PackageError as error:
        return str(error)
    except MALFORMED:
        what = damage_in(stack.datasets) or "a value cannot be read"
        return f"UNREADABLE: {what}; send it again"
    return ""


def run(
    paths: Iterable[Path], model: str, out: Path, config: NodeConfig, classifier: str | None = None
) -> dict[str, Outcome]:
    """Translate every series found with one model; results go to ``out/<derived series UID>/``.

    Args:
        model, classifier: folders of packages in `models_dir`; the classifier's report goes beside
            the images.

    Returns:
        What became of each series, by its SeriesInstanceUID.

    Raises:
        PackageError: the model or the classifier cannot be used.
    """
    package = read_package(config.models_dir / model)
    models, failures, device = load_models({model: package}, config.device, 0, config.precision)
    if failures:
        raise PackageError(failures[model])
    named = {classifier: read_classifier(config.models_dir / classifier)} if classifier else {}
    classifiers = load_classifiers(named, device)
    for failure in classifiers.failures.values():
        raise PackageError(failure)
    beside = Companions(classifier=classifier)
    route = Route("offline", match={}, model=model, send_to=(), qa="flag", companions=beside)
    series, _ = find_series(paths)
    out.mkdir(parents=True, exist_ok=True)
    now = datetime.now(UTC)
    outcomes = {}
    for uid, files in sorted(series.items()):
        headers = read_headers(files, keywords_of(()))
        if any(map(is_synthetic, headers)):
            refusal = SeriesRefused("ALREADY_SYNTHETIC", "the series is synthetic", "send a source")
            outcomes[uid] = Outcome(refusal=refusal.code, detail=refusal.message)
        else:
            order = Order.of(route, tuple(files), out, now)
            outcomes[uid] = translate(order, models, failures, classifiers)
    return outcomes


def _files(paths: Iterable[Path]) -> Iterable[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(p for p in path.rglob("*") if p.is_file())
        else:
            yield path
