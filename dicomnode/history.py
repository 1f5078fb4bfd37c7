"""Read-only views of the journal for `status`, HTTP and metrics: UIDs, states, counts, times."""

import json
from collections import defaultdict
from typing import Any

from sqlalchemy import func, select

from dicomnode import tables as t
from dicomnode.lifecycle import ACCEPTED
from dicomnode.tables import Database


class History:
    """What the journal tells people and other programs; changes nothing."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def series(self, limit: int = 100) -> list[dict[str, Any]]:
        """The most recent series first, each with its jobs and their deliveries."""
        s, i = t.series.c, t.instances.c
        recent = select(t.series).order_by(s.last_received.desc()).limit(limit).subquery()
        mine = i.series_uid == recent.c.series_uid
        query = select(
            recent,
            select(func.count()).where(mine).scalar_subquery().label("instances"),
            select(func.count()).where(mine, i.purged).scalar_subquery().label("purged"),
        ).order_by(recent.c.last_received.desc())
        rows = [dict(row._mapping) for row in self._db.read(query)]
        jobs = self._jobs([row["series_uid"] for row in rows])
        return [{**row, "jobs": jobs.get(row["series_uid"], [])} for row in rows]

    def one_series(self, series_uid: str) -> dict[str, Any] | None:
        """One series with its jobs, conflicts and timeline; None: never received."""
        rows = self._db.read(select(t.series).where(t.series.c.series_uid == series_uid))
        if not rows:
            return None
        i, c, e = t.instances.c, t.conflicts.c, t.events.c
        mine = i.series_uid == series_uid
        instances = self._db.read(select(func.count()).where(mine))[0][0]
        conflicts = self._db.read(select(c.sop_instance_uid).where(c.series_uid == series_uid))
        events = self._db.read(
            select(e.at, e.job, e.text).where(e.series_uid == series_uid).order_by(e.id)
        )
        return {
            **rows[0]._mapping,
            "instances": instances,
            "quarantined": [uid for (uid,) in conflicts],
            "jobs": self._jobs([series_uid]).get(series_uid, []),
            "timeline": [dict(event._mapping) for event in events],
        }

    def _jobs(self, series_uids: list[str]) -> dict[str, list[dict[str, Any]]]:
        j, d, a, o = t.jobs.c, t.deliveries.c, t.acceptances.c, t.outputs.c
        jobs: dict[int, dict[str, Any]] = {}
        for row in self._db.read(
            select(t.jobs).where(j.series_uid.in_(series_uids)).order_by(j.id)
        ):
            job = dict(row._mapping)
            job["findings"] = json.loads(job["findings"]) if job["findings"] else {}
            job["stacks"] = json.loads(job["stacks"]) if job["stacks"] else []
            jobs[job["id"]] = {**job, "derived": [], "deliveries": []}
        made = select(o.job, o.series_uid, func.count().label("instances"))
        made = made.where(o.job.in_(list(jobs))).group_by(o.job, o.series_uid)
        for row in self._db.read(made.order_by(func.min(o.position))):
            one = {"series_uid": row.series_uid, "instances": row.instances}
            jobs[row.job]["derived"].append(one)
        has = a.delivery == d.id, a.status.in_(ACCEPTED)
        sent = select(func.count()).where(*has).scalar_subquery()
        total = select(func.count()).where(o.job == d.job).scalar_subquery()
        query = select(t.deliveries, sent.label("accepted"), total.label("instances"))
        rows = self._db.read(query.where(d.job.in_(list(jobs))).order_by(d.id))
        promised = self._promised([row.id for row in rows])
        for row in rows:
            delivery = {**row._mapping, "commitment": promised.get(row.id)}
            jobs[row.job]["deliveries"].append(delivery)
        grouped = defaultdict(list)
        for job in jobs.values():
            grouped[job["series_uid"]].append(job)
        return dict(grouped)

    def _promised(self, deliveries: list[int]) -> dict[int, dict[str, Any]]:
        """What was asked of the destination of each delivery, if it is to commit it."""
        p = t.promises.c
        query = select(p.delivery, p.state, p.since, p.due, p.attempts, p.detail)
        rows = self._db.read(query.where(p.delivery.in_(deliveries)))
        return {row[0]: {k: v for k, v in row._mapping.items() if k != "delivery"} for row in rows}

    def commitment_requests(self, limit: int = 100) -> list[dict[str, Any]]:
        """Storage commitments that destinations still owe us, the latest first."""
        p, d, j = t.promises.c, t.deliveries.c, t.jobs.c
        query = select(p.delivery, p.state, p.since, p.due, p.attempts, p.detail)
        query = query.add_columns(d.destination, d.job, j.series_uid)
        query = query.join_from(t.promises, t.deliveries, p.delivery == d.id).join(t.jobs)
        owed = query.where(p.state.not_in(("committed", "discarded")))
        rows = self._db.read(owed.order_by(p.since.desc(), p.delivery).limit(limit))
        return [dict(row._mapping) for row in rows]

    def commitments(self, limit: int = 100) -> list[dict[str, Any]]:
        """Storage commitments still owed to a peer or parked, the latest request first."""
        c, r = t.commitments.c, t.commitment_items.c
        mine = r.transaction_uid == c.transaction_uid
        instances = select(func.count()).where(mine).scalar_subquery()
        query = select(t.commitments, instances.label("instances")).where(c.state != "reported")
        rows = self._db.read(query.order_by(c.asked.desc()).limit(limit))
        return [dict(row._mapping) for row in rows]

    def counts(self) -> dict[str, dict[str, int]]:
        """Jobs, deliveries, storage commitments (asked of us, asked by us), and series by state."""
        return {
            "jobs": self._count(t.jobs.c.state),
            "deliveries": self._count(t.deliveries.c.state),
            "commitments": self._count(t.commitments.c.state),
            "commitment_requests": self._count(t.promises.c.state),
            "series": {
                "open" if is_open else "closed": number
                for is_open, number in self._count(t.series.c.open).items()
            },
        }

    def _count(self, column: Any) -> dict[Any, int]:
        rows = self._db.read(select(column, func.count()).group_by(column))
        return {row[0]: int(row[1]) for row in rows}
