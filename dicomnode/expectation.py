"""Which slices the worker may infer before their series is complete.

What is told here binds nobody: routes are decided, and slices checked, when the series is complete.
"""

from dataclasses import dataclass, field

from dicomnode.config import NodeConfig
from dicomnode.imaging.marks import is_synthetic
from dicomnode.journal import Journal, OpenSeries
from dicomnode.orders import Arriving
from dicomnode.routing import decide, keywords_of
from dicomnode.series import common_header, read_headers
from dicomnode.spool import Spool


@dataclass(slots=True)
class _Told:
    """What the worker knows of one open series."""

    last_received: float = 0.0
    models: frozenset[str] = frozenset()
    """Of the routes that the series would take as it is now."""
    decided_at: int = 0
    """How many instances were there when that was found."""
    files: dict[str, set[str]] = field(default_factory=dict)
    """Per model the SOP Instance UIDs that were told."""


class Expectation:
    """Looks at open series; used by the thread that talks with the worker."""

    def __init__(self, config: NodeConfig, spool: Spool, journal: Journal) -> None:
        self._config, self._spool, self._journal = config, spool, journal
        self._told: dict[str, _Told] = {}
        self._spared: set[str] = set()

    def news(self) -> list[Arriving]:
        """What arrived since the last call, for every model that it is likely to be for."""
        if not self._config.worker.speculative:
            return []
        open_series = {series.series_uid: series for series in self._journal.open_series()}
        self._told = {uid: told for uid, told in self._told.items() if uid in open_series}
        self._spared &= open_series.keys()
        found: list[Arriving] = []
        for uid, series in open_series.items():
            told = self._told.setdefault(uid, _Told())
            if uid not in self._spared and told.last_received != series.last_received:
                told.last_received = series.last_received
                found += self._look(series, told)
        return found

    def worker_lost(self, *, busy: bool) -> None:
        """A new worker knows nothing. If no job ran, what it inferred ahead is to blame."""
        if not busy:
            self._spared |= self._told.keys()
        self._told.clear()

    def _look(self, series: OpenSeries, told: _Told) -> list[Arriving]:
        uids = self._journal.instance_uids(series.series_uid)
        if len(uids) >= 2 * told.decided_at:  # the more there are, the less will change
            told.models, told.decided_at = self._models(series, uids), len(uids)
        found = []
        for model in sorted(told.models):
            known = told.files.setdefault(model, set())
            new = [uid for uid in uids if uid not in known]
            known.update(new)
            paths = tuple(self._spool.path(series.series_uid, uid) for uid in new)
            if paths:
                found.append(Arriving(series.series_uid, model, paths))
        return found

    def _models(self, series: OpenSeries, uids: list[str]) -> frozenset[str]:
        routes = self._config.routes
        keywords = keywords_of(routes)
        headers = read_headers([self._spool.path(series.series_uid, uid) for uid in uids], keywords)
        extra: dict[str, str | float] = {
            "CallingAETitle": series.calling_ae,
            "CalledAETitle": series.called_ae,
            "Instances": float(len(uids)),
        }
        header = common_header(headers, keywords, extra)
        decisions = decide(header, routes, any(map(is_synthetic, headers)))
        return frozenset(decision.route.model for decision in decisions if decision.taken)
