"""Ending live connections: a block keeps new ones out, this ends those that are there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from ..core.address import IPAddress, unmap
from ..core.binding import Binding
from ..kernel import sock_diag
from ..kernel.sock_diag import Connection
from ..policy.rule import Action, IPNetwork, PolicyError, boottime_ns, parse_network
from ..policy.store import PolicyStore
from .api import Json

__all__ = ["ConnectionKiller", "Denials"]


class Denials:
    """When live connections are to be judged again: the policy has changed, or something in it has ended by itself (a
    rule, or a trial), which may deny whom it let in."""

    def __init__(self, store: PolicyStore, killer: ConnectionKiller) -> None:
        self._store = store
        self._killer = killer
        self._seen = (-1, -1)
        self._next: int | None = None

    @property
    def due(self) -> bool:
        """Whether it is time."""
        return self._revisions() != self._seen or (self._next is not None and boottime_ns() >= self._next)

    def end(self) -> int:
        """End the connections that the policy denies now; return how many. Raises like :meth:`ConnectionKiller.kill`;
        then it stays due."""
        seen, next_end = self._revisions(), self._store.next_end(boottime_ns())
        killed = self._killer.kill_denied(self._store)
        self._seen, self._next = seen, next_end
        return killed

    def _revisions(self) -> tuple[int, int]:
        return self._store.revision, self._store.ban_revision


class ConnectionKiller:
    """Ends connections of the proxy's clients: those to its listeners, and of its own cgroup where it has one.

    ``listeners`` returns what it serves now, ``cgroups`` the ids of its cgroups.
    """

    def __init__(
        self,
        listeners: Callable[[], Iterable[Binding]],
        cgroups: Callable[[], frozenset[int]] = frozenset,
    ) -> None:
        self._listeners = listeners
        self._cgroups = cgroups

    def call(self, params: Mapping[str, object]) -> Json:
        """The control method ``kill``: end the connections of ``source``, of one ``port`` of ours if it is given."""
        source, port = parse_network(str(params.get("source"))), params.get("port")
        return {"killed": self.kill(source, int(str(port)) if port is not None else None)}

    def kill(self, source: IPNetwork, port: int | None = None) -> int:
        """End the connections of a source, to one port of ours or to all; return how many there were.

        Raises :class:`PolicyError` where that is not allowed or the kernel cannot.
        """
        live = [found for found in self._live() if port in (None, found.local_port)]
        return self._end(found for found in live if unmap(found.peer) in source)

    def kill_denied(self, store: PolicyStore) -> int:
        """End the connections whose source the policy would not let in now. Raises like :meth:`kill`."""
        verdicts: dict[tuple[IPAddress, int], bool] = {}

        def is_denied(found: Connection) -> bool:
            key = unmap(found.peer), found.local_port
            if key not in verdicts:
                verdicts[key] = store.verdict(*key).action is not Action.ALLOW
            return verdicts[key]

        return self._end(filter(is_denied, self._live()))

    def _live(self) -> list[Connection]:
        served, cgroups = list(self._listeners()), self._cgroups()
        single = {binding.first for binding in served if binding.first == binding.last}
        # Of ranges all that there are: one by one would be up to 65,535 questions.
        ports = {0} if any(binding.first != binding.last for binding in served) else single
        try:
            live = [found for port in ports for found in sock_diag.connections(port)]
        except OSError as error:
            raise PolicyError(f"live connections cannot be listed: {error.strerror or error}") from error
        return [found for found in live if self._is_ours(found, served, cgroups)]

    @staticmethod
    def _is_ours(found: Connection, served: Iterable[Binding], cgroups: frozenset[int]) -> bool:
        if cgroups and found.cgroup is not None and found.cgroup not in cgroups:
            return False
        return any(binding.holds(found.local, found.local_port) for binding in served)

    @staticmethod
    def _end(connections: Iterable[Connection]) -> int:
        try:
            return sum(map(sock_diag.destroy, connections))
        except OSError as error:
            raise PolicyError(
                f"live connections cannot be ended: {error.strerror} (it takes CAP_NET_ADMIN, and a kernel with "
                "CONFIG_INET_DIAG_DESTROY)"
            ) from error
