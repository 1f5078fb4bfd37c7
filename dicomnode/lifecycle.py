"""The life cycles of jobs and deliveries, as literal tables, and how much each state still owes.

A series is only open (instances may come) or closed; its generation counts how often it closed
with more instances. Everything else is a job, one per route that matched or per earlier result to
be withdrawn, and a delivery, one per destination of a job. Nothing else ever changes a state:
`after` raises for what is not here.
"""

from enum import StrEnum

from dicomnode.errors import JournalError


class State(StrEnum):
    """Of a job."""

    QUEUED = "queued"
    TRANSLATING = "translating"
    SENDING = "sending"
    DONE = "done"
    HELD = "held"
    """Derived, but QA found it implausible: nothing is sent."""
    REFUSED = "refused"
    """The series is not what the model may translate; the code says why."""
    FAILED = "failed"
    """Something broke that should not; an operator may retry."""
    SUPERSEDED = "superseded"
    """Late instances came: a later generation of the series took its place."""
    DISCARDED = "discarded"


class Event(StrEnum):
    """What can happen to a job."""

    CLAIMED = "claimed"
    DERIVED = "derived"
    NOTHING_TO_SEND = "nothing to send"
    IMPLAUSIBLE = "implausible"
    UNFIT = "unfit"
    BROKE = "broke"
    WORKER_LOST = "worker lost"
    GAVE_UP = "gave up"
    DELIVERED = "delivered"
    NOT_COMMITTED = "not committed"
    OVERTAKEN = "overtaken"
    RETRIED = "retried"
    DROPPED = "dropped"


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.QUEUED, Event.CLAIMED): State.TRANSLATING,
    (State.QUEUED, Event.OVERTAKEN): State.SUPERSEDED,
    (State.QUEUED, Event.DROPPED): State.DISCARDED,
    (State.TRANSLATING, Event.DERIVED): State.SENDING,
    (State.TRANSLATING, Event.NOTHING_TO_SEND): State.DONE,  # shadow, or no destination
    (State.TRANSLATING, Event.IMPLAUSIBLE): State.HELD,
    (State.TRANSLATING, Event.UNFIT): State.REFUSED,
    (State.TRANSLATING, Event.BROKE): State.FAILED,
    (State.TRANSLATING, Event.WORKER_LOST): State.QUEUED,  # again, with the same UIDs
    (State.TRANSLATING, Event.GAVE_UP): State.FAILED,  # lost too many workers
    (State.TRANSLATING, Event.OVERTAKEN): State.SUPERSEDED,
    (State.SENDING, Event.DELIVERED): State.DONE,
    (State.SENDING, Event.OVERTAKEN): State.SUPERSEDED,  # what was sent is withdrawn
    (State.SENDING, Event.DROPPED): State.DISCARDED,
    (State.DONE, Event.OVERTAKEN): State.SUPERSEDED,  # what was sent is withdrawn
    (State.DONE, Event.NOT_COMMITTED): State.SENDING,  # what a destination lost is sent again
    (State.HELD, Event.RETRIED): State.QUEUED,
    (State.HELD, Event.OVERTAKEN): State.SUPERSEDED,
    (State.HELD, Event.DROPPED): State.DISCARDED,
    (State.REFUSED, Event.RETRIED): State.QUEUED,
    (State.REFUSED, Event.OVERTAKEN): State.SUPERSEDED,
    (State.REFUSED, Event.DROPPED): State.DISCARDED,
    (State.FAILED, Event.RETRIED): State.QUEUED,
    (State.FAILED, Event.OVERTAKEN): State.SUPERSEDED,
    (State.FAILED, Event.DROPPED): State.DISCARDED,
}

FINAL = frozenset({State.DONE, State.SUPERSEDED, State.DISCARDED})
"""Nothing more is owed, unless late instances supersede what is done, or a destination that was to
commit it has not."""


class Delivery(StrEnum):
    """State of a delivery: one job's series on its way to one destination."""

    WAITING = "waiting"
    DELIVERED = "delivered"
    PARKED = "parked"
    """Refused for good, or too old; the detail says why; an operator may retry."""
    DISCARDED = "discarded"


DELIVERY_TRANSITIONS: dict[tuple[Delivery, str], Delivery] = {
    (Delivery.WAITING, "accepted"): Delivery.DELIVERED,
    (Delivery.WAITING, "refused"): Delivery.PARKED,
    (Delivery.WAITING, "dropped"): Delivery.DISCARDED,
    (Delivery.DELIVERED, "not committed"): Delivery.WAITING,  # a few times: see `promises`
    (Delivery.PARKED, "retried"): Delivery.WAITING,
    (Delivery.PARKED, "dropped"): Delivery.DISCARDED,
}


def after(state: State, event: Event) -> State:
    """The state that follows.

    Raises:
        JournalError: `event` cannot happen in `state`.
    """
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise JournalError(f"a job that is {state} cannot be {event}") from None


def delivery_after(state: Delivery, event: str) -> Delivery:
    """The state that follows.

    Raises:
        JournalError: `event` cannot happen in `state`.
    """
    try:
        return DELIVERY_TRANSITIONS[state, event]
    except KeyError:
        raise JournalError(f"a delivery that is {state} cannot be {event}") from None


ACCEPTED = (0x0000, 0x0111, 0xB000, 0xB006, 0xB007)
"""C-STORE response statuses with which a destination has an instance (PS3.4 B.2.3, PS3.7 C.5.6).

Success, already there, and stored with a remark: coercion, elements discarded, does not match SOP
class.
"""
