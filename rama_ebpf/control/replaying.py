"""What a set that is to be loaded would do to those who came, told and weighed: ``policy diff --replay``, ``load``."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from ..core.address import IPAddress, SocketAddress, unmap
from ..policy.client_file import ClientFile, merged
from ..policy.clients import Client
from ..policy.compiler import CompiledSet
from ..policy.kernel_store import KernelStore
from ..policy.replay import Attempt, Replayed, replay
from ..policy.rule import PolicyError, Verdict, parse_ttl
from ..policy.store import PolicyStore
from .enforced import Judge, any_of, targets

__all__ = ["CutBound", "Replaying", "generation_of"]

Json = dict[str, object]

DAY: Final = 86400.0
_TOP: Final = 10
_TRIAL_SECONDS: Final = 120.0


def generation_of(store: PolicyStore) -> int:
    """A number that the counts of a store's record have since they began; 0 for those of a process."""
    return store.counters.identity if isinstance(store, KernelStore) else 0


@dataclass(frozen=True, slots=True)
class CutBound:
    """When a load is held up: if it cuts ``share`` of those who connected in the last day, and at least ``least``;
    ``trial`` puts it on trial then instead of refusing it."""

    share: float = 0.2
    least: int = 10
    trial: bool = False


class Replaying:
    """Replays the record of a store. ``file`` is where it is on disk, if it is kept there."""

    def __init__(self, store: PolicyStore, judge: Judge, file: Path | None) -> None:
        self._store = store
        self._judge = judge
        self._file = file

    def record(self) -> list[Client]:
        """Return who came, by memory and disk."""
        present = self._store.clients.all()
        if self._file is None:
            return present
        return merged(ClientFile(self._file).read(), generation_of(self._store), present)

    def of(self, compiled: CompiledSet, span: float = DAY) -> Replayed:
        """Return what a set would do to those who came in the last ``span`` seconds."""
        judgement = self._store.judgement_of(compiled)
        return replay(self.record(), time.time() - span, self._present, judgement.verdict)

    def _present(self, asked: Sequence[Attempt]) -> list[Verdict]:
        targets = [(source, SocketAddress(any_of(source.version), port)) for source, port in asked]
        return [decision.verdict for decision in self._judge.decide(targets)]

    def told(self, replayed: Replayed, span: float = DAY) -> Json:
        """Return it as JSON."""
        return {
            "seconds": span,
            "clients": replayed.clients,
            "connected": replayed.connected,
            "cut": replayed.count(replayed.cut),
            "share": round(replayed.share, 4),
            "cut_by": dict(list(replayed.rules().items())[:_TOP]),
            "cut_top": [_row(*row) for row in replayed.cut[:_TOP]],
            "let_in": replayed.count(replayed.let_in),
            "let_in_top": [_row(*row) for row in replayed.let_in[:_TOP]],
            "missed": self._store.clients.missed(),
        }

    def hold_up(
        self, compiled: CompiledSet, replayed: Replayed, operators: Sequence[str], bound: CutBound
    ) -> float | None:
        """Look whether a load may go ahead: return for how many seconds it is to be on trial, None for no trial. Raises
        :class:`PolicyError` where it is refused: it cuts the operator's own session, or too many."""
        judgement = self._store.judgement_of(compiled)
        for text in operators:
            try:
                address: IPAddress = unmap(ip_address(text))
            except ValueError:
                continue
            for at in targets(self._judge, address.version)[0]:
                new = judgement.verdict(address, at.port)
                (now,) = self._judge.decide([(address, at)])
                if now.verdict.allowed and not new.allowed:
                    raise PolicyError(
                        f"this would shut out {address}, where you are logged in from (by {new.rule}): nothing is "
                        f"changed; --confirm-timeout 2m tries it, --yes loads it all the same"
                    )
        cut = replayed.count(replayed.cut)
        if cut < bound.least or replayed.share <= bound.share:
            return None
        if bound.trial:
            return _TRIAL_SECONDS
        worst = ", ".join(f"{client.source} ({client.let_in})" for client, _ in replayed.cut[:3])
        raise PolicyError(
            f"this would cut {cut} of {replayed.connected} clients that connected in the last 24 h ({worst}, …): "
            f"nothing is changed; policy diff --replay 24h says more, --confirm-timeout 2m tries it, --yes loads it "
            f"all the same"
        )


def span_of(params: Mapping[str, object]) -> float | None:
    """The span that is to be replayed, in seconds."""
    text = params.get("replay")
    return None if text is None else parse_ttl(str(text)) / 1e9


def _row(client: Client, rule: str) -> Json:
    return {
        "source": str(client.source),
        "port": client.port,
        "let_in": client.let_in,
        "denied": client.denied,
        "last": client.last,
        "rule": rule,
    }
