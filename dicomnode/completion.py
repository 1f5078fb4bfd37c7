"""From an open series to queued jobs: is it complete, why, and which routes does it take?"""

import logging
from collections.abc import Callable
from dataclasses import replace

from dicomnode import metrics
from dicomnode.config import NodeConfig
from dicomnode.errors import JournalBusy
from dicomnode.expected import Expected, expected_count
from dicomnode.imaging.marks import is_synthetic
from dicomnode.jobs import Jobs
from dicomnode.journal import Journal, OpenSeries
from dicomnode.routing import decide, keywords_of
from dicomnode.series import (
    Carriers,
    Verdict,
    common_header,
    judge,
    missing_slices,
    read_headers,
)
from dicomnode.spool import Spool

log = logging.getLogger(__name__)

Performed = Callable[[str], frozenset[str] | None]
"""SOP instances that completed procedure steps say a series has; None: no word."""


class Completion:
    """Looks at the open series; used by one thread."""

    def __init__(
        self,
        config: NodeConfig,
        spool: Spool,
        journal: Journal,
        jobs: Jobs,
        carriers: Carriers,
        performed: Performed,
    ) -> None:
        self._config, self._spool = config, spool
        self._journal, self._jobs = journal, jobs
        self._carriers, self._performed = carriers, performed
        self._missing: dict[str, tuple[float, int]] = {}
        self._said: dict[str, tuple[float, int, Expected | None]] = {}
        self._changed: dict[str, tuple[float, float]] = {}
        self._explained: set[str] = set()

    def step(self, now: float, clock: float) -> tuple[int, int]:
        """Close what is complete; how many series were looked at, and how many closed.

        `now`, seconds since the epoch, is what the journal notes. `clock`, seconds of a clock that
        nobody sets, measures every wait: a clock set back must not keep a series open, nor one set
        forward end its waiting. A wait begins when we first see the state of a series, after a
        start at the earliest: while the node was down nobody could send.
        """
        open_series = self._journal.open_series()
        closed, before, self._changed = 0, self._changed, {}
        for series in open_series:
            seen = before.get(series.series_uid)
            if seen is None or seen[0] != series.last_received:
                seen = (series.last_received, clock)
            self._changed[series.series_uid] = seen
        for series in open_series:
            try:
                closed += self._judge(series, now, clock)
            except JournalBusy:  # nor would the others get further
                raise
            except Exception:  # one series that breaks must not hold up the others
                log.exception("series %s could not be judged", series.series_uid)
        return len(open_series), closed

    def _judge(self, series: OpenSeries, now: float, clock: float) -> bool:
        changed = self._changed[series.series_uid][1]
        verdict = judge(
            replace(series, last_received=changed),
            lambda: self._missing_slices(series),
            self._carriers.released_at(series.series_uid),
            self._config.series,
            clock,
            changed,
            lambda released: self._announced(series, released),
        )
        if not verdict.complete:
            self._say_why(series, verdict, now)
            return False
        notes = [f"complete: {verdict.reason}"]
        routes, outcome, why = self._route(series)
        notes += why
        if verdict.missing:  # the worker refuses the stack with the gap, and no other
            notes.append(
                "MISSING_SLICES: stacks with a gap are refused; send the whole series again"
            )
        notes.append(outcome)
        superseded = self._config.series.on_superseded
        if not self._jobs.close_series(
            series,
            outcome,
            routes,
            notes,
            now,
            on_superseded=superseded,
            overtaken=lambda: self._journal.waiting.has_of(series.series_uid),
        ):
            return False
        self._carriers.forget(series.series_uid)
        self._missing.pop(series.series_uid, None)
        self._said.pop(series.series_uid, None)
        self._explained.discard(series.series_uid)
        metrics.series_completed.labels(verdict.kind).inc()
        log.info("series %s %s; %s", series.series_uid, notes[0], outcome)
        return True

    def _say_why(self, series: OpenSeries, verdict: Verdict, now: float) -> None:
        """Once per opening, in the timeline: what an incomplete series waits for, and how long."""
        uid = series.series_uid
        if verdict.kind == "held" and uid not in self._explained:
            self._journal.remark(uid, verdict.reason, now)
            self._explained.add(uid)

    def _missing_slices(self, series: OpenSeries) -> int:
        """Counted once per state of the series: it is asked for every tick."""
        seen = self._missing.get(series.series_uid)
        if seen is None or seen[0] != series.last_received:
            missing = missing_slices(self._journal.planes(series.series_uid))
            seen = self._missing[series.series_uid] = (series.last_received, missing)
        return seen[1]

    def _announced(self, series: OpenSeries, released: bool) -> str | None:
        """Who says that all instances of the series are here; None: nobody does."""
        seen = self._said.get(series.series_uid)
        if seen is None or seen[0] != series.last_received:
            said = self._journal.announcements(series.series_uid)
            received = sum(number for _, number in said)
            expected = expected_count((words for words, _ in said), received)
            seen = self._said[series.series_uid] = (series.last_received, received, expected)
        _, received, count = seen
        performed = self._performed(series.series_uid)
        if (
            performed is not None
            and len(performed) <= received
            and performed <= set(self._journal.instance_uids(series.series_uid))
        ):
            return "MPPS completed"
        if count is not None and received == count.count and (count.alone or released):
            return count.keyword
        return None

    def _route(self, series: OpenSeries) -> tuple[list[tuple[str, str]], str, list[str]]:
        """The (route, priority) pairs a series takes, the outcome in words, every decision."""
        uids = self._journal.instance_uids(series.series_uid)
        paths = [self._spool.path(series.series_uid, uid) for uid in uids]
        keywords = keywords_of(self._config.routes)
        headers = read_headers(paths, keywords)
        extra: dict[str, str | float] = {
            "CallingAETitle": series.calling_ae,
            "CalledAETitle": series.called_ae,
            "Instances": float(len(paths)),
        }
        header = common_header(headers, keywords, extra)
        decisions = decide(header, self._config.routes, any(map(is_synthetic, headers)))
        taken: list[tuple[str, str]] = [
            (d.route.name, d.route.priority) for d in decisions if d.taken
        ]
        outcome = (
            f"routed: {', '.join(name for name, _ in taken)}"
            if taken
            else "ignored: no route matches"
        )
        return taken, outcome, [str(decision) for decision in decisions]
