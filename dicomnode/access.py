"""Who may call, what they may store, and how much: the rules of `peers`, decided without waiting.

Nothing here looks a name up while a peer waits: `refresh` does, beforehand and off the accept path.
A peer that sends too much is slowed down, never refused: scanners handle failures badly.
"""

import ipaddress
import logging
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from dicomnode.config import NodeSection, Peer
from dicomnode.sop_classes import uids_of
from dicomnode.upper_layer.pdu import CALLED_AE, CALLING_AE, LOCAL_LIMIT, Rejection

log = logging.getLogger(__name__)

HOST = Rejection(1, 1, 3, "host not recognised")
PEER_LIMIT = Rejection(2, 3, 2, "peer limit exceeded")
"""Transient, by the service provider, local limit exceeded: the peer tries again (PS3.8 9.3.4)."""
LONGEST_WAIT_SECONDS = 10.0
"""A response held back for longer would look like a dead node; many peers give up after 30 s."""
_BURST_SECONDS = 1.0

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolve = Callable[[str], Iterable[str]]
"""The addresses of a host name, numeric; OSError where it has none."""


@dataclass(frozen=True, slots=True, eq=False)
class Admission:
    """An association that may be accepted; give it back with `Access.leave` when it has ended."""

    peer: str | None
    """Our name of the caller; None: not in `peers`, and `unknown_callers` accepts it."""
    since: float


class Access:
    """The rules of all peers, and what is open under them. Every method may be called by any
    thread; none but `refresh` waits."""

    def __init__(
        self, node: NodeSection, peers: Mapping[str, Peer], resolve: Resolve | None = None
    ) -> None:
        self._node, self._peers = node, peers
        self._resolve = resolve or addresses_of
        self._networks = {name: _network(peer.host) for name, peer in peers.items()}
        self._found: dict[str, frozenset[Address]] = {}
        self._sop_classes = {name: uids_of(peer.sop_classes) for name, peer in peers.items()}
        self._places = Places(node.max_associations, peers)
        self._open: set[Admission] = set()
        self._paces = {name: _paces(peer) for name, peer in peers.items()}
        self._lock = threading.Lock()

    def admit(
        self, calling_ae: str, called_ae: str, host: str, now: float
    ) -> Admission | Rejection:
        """May this caller have an association? `host` is its numeric address.

        Titles and address first, then whether there is a place for it.
        """
        if called_ae != self._node.ae_title:
            return CALLED_AE
        caller = self._caller(calling_ae, host)
        if isinstance(caller, Rejection) and self._node.unknown_callers == "refuse":
            return caller
        peer = None if isinstance(caller, Rejection) else caller
        with self._lock:
            why = self._places.take(peer)
            if why is not None:
                return why
            admission = Admission(peer, now)
            self._open.add(admission)
            return admission

    def leave(self, admission: Admission) -> None:
        """The association has ended; a second call changes nothing."""
        with self._lock:
            if admission in self._open:
                self._open.remove(admission)
                self._places.give(admission.peer)

    def allowed_sop_class(self, peer: str | None, uid: str) -> bool:
        """May the peer store instances of this SOP class?"""
        allowed = None if peer is None else self._sop_classes[peer]
        return allowed is None or uid in allowed

    def delay(self, peer: str | None, instances: int, size: int, now: float) -> float:
        """Seconds to wait before the response to these `instances` of `size` bytes.

        `now` is monotonic. All associations of a peer share one pace.
        """
        if peer is None:
            return 0.0
        by_instance, by_megabyte = self._paces[peer]
        with self._lock:
            return max(by_instance.wait(instances, now), by_megabyte.wait(size / 1e6, now))

    def refresh(self) -> None:
        """Look up the host names of all peers; a name that has no answer now keeps its last one."""
        hosts = {p.host for n, p in self._peers.items() if p.host and self._networks[n] is None}
        for name in sorted(hosts):
            try:
                found = frozenset(map(_address, self._resolve(name)))
            except OSError:
                if name not in self._found:
                    log.warning("host name %s has no address: this peer cannot call us", name)
                continue
            if found != self._found.get(name):
                log.info("host name %s has %d addresses", name, len(found))
            self._found = {**self._found, name: found}

    def caller(self, calling_ae: str, host: str) -> str | None:
        """Our name of the peer that calls with this title from this address, or None."""
        found = self._caller(calling_ae, host)
        return None if isinstance(found, Rejection) else found

    def _caller(self, calling_ae: str, host: str) -> str | Rejection:
        """The first peer with this title at this address, or why there is none."""
        try:
            address = _address(host)
        except ValueError:
            return HOST
        same_title = [name for name, peer in self._peers.items() if peer.ae_title == calling_ae]
        for name in same_title:
            if self._is_at(name, address):
                return name
        return HOST if same_title else CALLING_AE

    def _is_at(self, name: str, address: Address) -> bool:
        host, network = self._peers[name].host, self._networks[name]
        if network is not None:
            return address in network
        return host is None or address in self._found.get(host, ())


class Places:
    """Associations shared so that none can starve another.

    Half of all places is divided into shares, one per peer, that only this peer can take; the
    rest goes to whoever comes first, strangers included. So a peer below its share always gets in.
    """

    def __init__(self, total: int, peers: Mapping[str, Peer]) -> None:
        """`total`: node.max_associations."""
        callers = {name: peer for name, peer in peers.items() if peer.ae_title}
        share = max(1, total // (2 * len(callers))) if 0 < len(callers) <= total else 0
        limits = {name: peer.max_incoming_associations for name, peer in callers.items()}
        self._total = total
        self._limits = {name: limit for name, limit in limits.items() if limit}
        self._shares = {name: min(share, self._limits.get(name, share)) for name in callers}
        self._taken: Counter[str | None] = Counter()

    def share(self, peer: str | None) -> int:
        """Places that are kept for this peer."""
        return 0 if peer is None else self._shares.get(peer, 0)

    def take(self, peer: str | None) -> Rejection | None:
        """Take a place; None: it has one, else why it has not."""
        if peer in self._limits and self._taken[peer] >= self._limits[peer]:
            return PEER_LIMIT
        if self._taken[peer] >= self.share(peer) and self._free() < 1:
            return LOCAL_LIMIT
        self._taken[peer] += 1
        return None

    def give(self, peer: str | None) -> None:
        """Give back one place that was taken."""
        self._taken[peer] -= 1
        if not self._taken[peer]:
            del self._taken[peer]

    def _free(self) -> int:
        """Places that are neither taken nor kept for somebody."""
        names = self._taken.keys() | self._shares.keys()
        return self._total - sum(max(self._taken[name], self.share(name)) for name in names)


class Pace:
    """A token bucket that says how long to wait instead of saying no."""

    def __init__(self, per_second: float) -> None:
        """`per_second`: units per second in the long run; 0: no limit. A pause saves up for one
        second, no more."""
        self._per_second = per_second
        self._paid_until = float("-inf")

    def wait(self, amount: float, now: float) -> float:
        """Take `amount` units; seconds to wait until those before are paid for.

        So who comes no faster than the pace never waits, however large one amount is, and who
        waits each time stays within it. No wait is longer than LONGEST_WAIT_SECONDS. `now` is
        monotonic, in seconds.
        """
        if not self._per_second:
            return 0.0
        start = max(self._paid_until, now - _BURST_SECONDS)
        self._paid_until = start + amount / self._per_second
        self._paid_until = min(self._paid_until, now + LONGEST_WAIT_SECONDS)
        return min(max(0.0, start - now), LONGEST_WAIT_SECONDS)


def addresses_of(name: str) -> list[str]:
    """The numeric addresses of a host name, as the system knows them.

    Raises:
        OSError: it has none now.
    """
    try:
        return [str(info[4][0]) for info in socket.getaddrinfo(name, None)]
    except UnicodeError as error:  # an empty or overlong label
        raise OSError(f"{name!r} is not a host name") from error


def _paces(peer: Peer) -> tuple[Pace, Pace]:
    return Pace(peer.max_instances_per_second), Pace(peer.max_megabytes_per_second)


def _network(host: str | None) -> Network | None:
    """An address or a network; None for a name, or where any host may call."""
    try:
        return None if host is None else ipaddress.ip_network(host, strict=False)
    except ValueError:
        return None


def _address(host: str) -> Address:
    """The address without its zone; IPv4 where IPv6 only wraps it."""
    address = ipaddress.ip_address(host.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address
