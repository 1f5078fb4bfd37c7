"""What the commands print: the state of series, jobs and deliveries in plain words."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any


def clock(at: float) -> str:
    """Seconds since the epoch in the machine's own time zone, to the second."""
    return datetime.fromtimestamp(at).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def overview(
    counts: Mapping[str, Mapping[str, int]],
    series: list[dict[str, Any]],
    commitments: list[dict[str, Any]],
    requests: list[dict[str, Any]],
) -> str:
    """The queue at a glance, then a line per storage commitment that is owed, and per series.

    `commitments` are asked of us, `requests` by us.
    """
    lines = [
        f"{what.replace('_', ' ')}: "
        + (", ".join(f"{n} {state}" for state, n in states.items()) or "none")
        for what, states in counts.items()
    ]
    for owed in commitments:
        lines.append(_commitment(owed))
    for asked in requests:
        words = _promise(asked)
        lines.append(f"delivery {asked['delivery']} to {asked['destination']}, {words}")
    for one in series:
        lines.append("")
        state = "open" if one["open"] else one["outcome"] or "closed"
        lines.append(
            f"series {one['series_uid']}  {one['modality'] or '?'}  {one['instances']} instances"
            f"  last {clock(one['last_received'])}  {state}"
        )
        lines += _jobs(one["jobs"])
    return "\n".join(lines)


def one_series(series: Mapping[str, Any], waiting: str) -> str:
    """One series as a timeline; `waiting` says why an open one is not complete yet."""
    lines = [
        f"series {series['series_uid']}",
        f"study {series['study_uid']}",
        f"{series['instances']} instances, modality {series['modality'] or 'not given'},"
        f" from {series['calling_ae'] or 'an unknown sender'}",
        f"state: {f'open; {waiting}' if series['open'] else series['outcome']}",
    ]
    if series["quarantined"]:
        lines.append(
            f"quarantined: {len(series['quarantined'])} instances came again with other bytes;"
            " the first were kept"
        )
    lines += _jobs(series["jobs"])
    lines.append("timeline:")
    lines += [f"  {clock(event['at'])}  {event['text']}" for event in series["timeline"]]
    return "\n".join(lines)


def _jobs(jobs: list[dict[str, Any]]) -> list[str]:
    lines = []
    for job in jobs:
        words = [f"  job {job['id']}", f"route '{job['route']}'", job["state"]]
        if job["retracts"] is not None:
            words.insert(1, f"withdraws what job {job['retracts']} made")
        if job["state"] not in ("done", "sending"):
            words += [part for part in (job["code"], job["detail"]) if part]
        if job["attempts"] > 1:
            words.append(f"attempt {job['attempts']}")
        lines.append(", ".join(words))
        lines += [f"    {stack['text']}" for stack in job["stacks"]]
        lines += [
            f"    derived series {made['series_uid']}, {made['instances']} instances"
            for made in job["derived"]
        ]
        lines += [_delivery(delivery) for delivery in job["deliveries"]]
    return lines


def _delivery(delivery: Mapping[str, Any]) -> str:
    words = (
        f"    delivery {delivery['id']} to {delivery['destination']}: {delivery['state']},"
        f" {delivery['accepted']} of {delivery['instances']} accepted"
    )
    if delivery["state"] in ("waiting", "parked") and delivery["detail"]:
        words += f"; {delivery['detail']}"
    if delivery["commitment"] is not None:
        words += f"; {_promise(delivery['commitment'])}"
    return words


_PROMISE = {
    "asking": "to be asked to commit it since {since}",
    "asked": "asked to commit it, report awaited until {due}",
    "committed": "committed",
    "resending": "not committed, sent again",
    "parked": "not committed, parked",
    "discarded": "commitment given up",
}


def _promise(promise: Mapping[str, Any]) -> str:
    """What a destination was asked to commit, and why it has not."""
    times = {"since": clock(promise["since"]), "due": clock(promise["due"])}
    words = _PROMISE[promise["state"]].format(**times)
    why = promise["detail"] if promise["state"] != "committed" else ""
    if promise["state"] == "asking" and promise["attempts"]:
        words += f", again at {times['due']}"
    return f"{words}: {why}" if why else words


def _commitment(owed: Mapping[str, Any]) -> str:
    words = (
        f"commitment:{owed['transaction_uid']} of {owed['instances']} instances to {owed['peer']}:"
        f" {owed['state']} since {clock(owed['asked'])}"
    )
    return f"{words}; {owed['detail']}" if owed["detail"] else words
