"""``why``: walks what a client meets, from the gate to the target, and says where it would be turned away, and by what.

Nothing is charged, counted or dialled. The gate is asked as ``test`` asks it; what comes behind it is read from the
configuration in force. What happened before is told from two records: whom the gate turned away
(:mod:`rama_ebpf.policy.clients`), and what services refused (:mod:`.refusals`).
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING, Any, Final, cast

from ..core.address import Authority, IPAddress, SocketAddress, unmap
from ..core.binding import Binding
from ..core.errors import PolicyDenied, RamaError
from ..kernel import abi
from ..policy.clients import Client
from ..policy.egress import EgressPolicy, OwnHost
from ..policy.prefixes import IPNetwork, Prefixes
from ..policy.rule import Action, PolicyError, Rule, Stage, SynLimit, boottime_ns, source_text
from ..policy.store import PolicyStore
from .enforced import Decision, Judge, targets, told
from .options import DaemonOptions
from .refusals import KeptRefusal, RefusalBook

if TYPE_CHECKING:
    from ..config.model import Config, StackConfig

__all__ = ["ServerSide", "Step", "Why", "target_of"]

Json = dict[str, object]

_ID: Final = re.compile(r"[0-9a-f]{8}")
_REFUSALS_SHOWN: Final = 10
_YES, _NO, _ASKS = "yes", "no", "asks"


@dataclass(frozen=True, slots=True)
class Step:
    """What one part says to a client: ``answer`` is yes, no, or asks (for what was not given). ``kind`` is a word for
    the cause, ``rule`` what decided, ``where`` its file and line if they are known."""

    part: str
    answer: str
    kind: str
    text: str
    rule: str = ""
    where: str = ""


@dataclass(frozen=True, slots=True)
class ServerSide:
    """What a running server knows besides its policy. ``listeners`` are its rows of ``status``, ``networks`` what this
    host delivers to itself, ``own`` the listeners of this proxy."""

    options: Callable[[], DaemonOptions]
    listeners: Callable[[], Sequence[Mapping[str, object]]]
    networks: Callable[[], frozenset[IPNetwork]]
    own: Callable[[], Sequence[SocketAddress]]
    refusals: RefusalBook


@dataclass(frozen=True, slots=True)
class _Question:
    client: IPAddress
    user: str | None
    target: Authority | None
    addresses: tuple[IPAddress, ...]


class Why:
    """Answers over one store. ``server`` is None where none runs: then the gate alone is told of."""

    def __init__(self, store: PolicyStore, judge: Judge, server: ServerSide | None = None) -> None:
        self._store = store
        self._judge = judge
        self._server = server

    def call(self, params: Mapping[str, object]) -> Json:
        """The control method: ``client`` is an address, or the id of a refusal; optionally ``port`` or ``listener`` (a
        name, or address:port), ``user``, ``target`` (host:port) and the ``addresses`` that its name has. Raises
        :class:`PolicyError`."""
        text, refusal = _text(params, "client"), None
        if _ID.fullmatch(text):
            refusal = None if self._server is None else self._server.refusals.by_id(text)
            if refusal is None:
                raise PolicyError(
                    f"no refusal {text} is remembered: the server keeps the last 16 of each of 1,024 clients until "
                    f"it ends; ask for the client's address"
                )
            client = refusal.client
        else:
            client = _address(text)
        question = self._question(client, params, refusal)
        port, listener = params.get("port"), _optional(params, "listener")
        walks = [self._walk(at, name, question) for at, name in self._targets(client, port, listener)]
        if not walks:
            there = ", ".join(self._names()) or "none"
            raise PolicyError(f"there is no such listener for this client; there are {there}")
        return {
            "client": str(client),
            "serving": self._judge.serving,
            "listeners": walks,
            "let_in": all(walk["let_in"] for walk in walks),
            "seen": [_seen(row) for row in sorted(self._store.clients.of(client), key=lambda row: -row.last)],
            "missed": self._store.clients.missed() + (0 if self._server is None else self._server.refusals.missed),
            "refusal": None if refusal is None else refusal.json(),
            "refusals": self._refusals(client),
        }

    def _refusals(self, client: IPAddress) -> list[Json]:
        kept = [] if self._server is None else self._server.refusals.of(client)
        return [dict(refusal.json()) for refusal in kept[:_REFUSALS_SHOWN]]

    def _question(self, client: IPAddress, params: Mapping[str, object], refusal: KeptRefusal | None) -> _Question:
        user, target = _optional(params, "user"), _optional(params, "target")
        if refusal is not None:
            user = user or refusal.user or None
        addresses = params.get("addresses") or []
        if not isinstance(addresses, list):
            raise PolicyError("addresses must be a list")
        authority = None if target is None else target_of(target)
        return _Question(client, user, authority, tuple(unmap(_address(str(one))) for one in addresses))

    # -- listeners -----------------------------------------------------------------------------------------------

    def _rows(self) -> list[tuple[str, SocketAddress]]:
        rows = [] if self._server is None else self._server.listeners()
        found = []
        for row in rows:
            if "bindings" in row:
                continue  # _bound
            host, _, port = str(row["address"]).rpartition(":")
            try:
                found.append((str(row["name"]), SocketAddress(ip_address(host.strip("[]")), int(port))))
            except ValueError:
                continue  # a Unix socket
        return found

    def _bound(self) -> list[tuple[Binding, str]]:
        """Who serves prefixes and ranges of ports."""
        rows = [] if self._server is None else self._server.listeners()
        return [
            (Binding(ip_network(network), first, last, implied), str(row["name"]))
            for row in rows
            for network, first, last, implied in cast("list[tuple[str, int, int, bool]]", row.get("bindings", ()))
        ]

    def _names(self) -> list[str]:
        bound = [f"{name} ({binding})" for binding, name in self._bound()]
        return [*(f"{name} ({told(at)})" for name, at in self._rows()), *bound]

    def _targets(self, client: IPAddress, port: object, listener: str | None) -> Iterator[tuple[SocketAddress, str]]:
        if port is not None and (not isinstance(port, int) or not 1 <= port <= 65535):
            raise PolicyError(f"port {port}: use 1 to 65535")
        names, bound = {at: name for name, at in self._rows()}, self._bound()
        for at in targets(self._judge, client.version, port)[0]:
            holding = [(binding.rank, name) for binding, name in bound if binding.holds(at.ip, at.port)]
            name = names.get(at) or (min(holding)[1] if holding else "")
            if listener in (None, name, told(at)):
                yield at, name

    # -- the walk ------------------------------------------------------------------------------------------------

    def _walk(self, at: SocketAddress, name: str, question: _Question) -> Json:
        steps = [*self._listener(at), *self._gate(at, question.client)]
        if self._server is not None and self._server.options().params.get("config") is not None:
            steps += self._configured(name, question)
        elif self._server is not None:
            steps += self._unconfigured(question)
        no = next((step for step in steps if step.answer == _NO), None)
        return {
            "listener": told(at),
            "name": name,
            "let_in": no is None,
            "cause": None if no is None else asdict(no),
            "steps": [asdict(step) for step in steps],
        }

    def _listener(self, at: SocketAddress) -> Iterator[Step]:
        for row in [] if self._server is None else self._server.listeners():
            if str(row["address"]) == told(at) and row.get("open") is False:
                yield Step("listener", _NO, "closed", f"it is closed: {row.get('guard')}")

    def _gate(self, at: SocketAddress, client: IPAddress) -> Iterator[Step]:
        (decision,) = self._judge.decide([(client, at)])
        verdict = decision.verdict
        answer = _YES if verdict.allowed else _NO
        what = {Action.ALLOW: "lets it in", Action.DROP: "drops its SYN", Action.REJECT: "answers RST"}[verdict.action]
        if verdict.stage is Stage.FAILSAFE:
            yield Step("gate", answer, "failsafe", f"the failsafe {what}, whatever else is said")
        elif verdict.stage is Stage.BAN:
            yield self._ban(client, what, answer)
        elif verdict.stage is Stage.RULE:
            yield self._rule(decision, at, what, answer)
        else:
            yield Step("gate", answer, "default", f"no rule matches: the default {what}", "default")
        if verdict.dry_rule:
            text = f"without its dry run, {verdict.dry_rule} would {verdict.dry_action.name.lower()}"
            yield Step("gate", _YES, "dry_run", text, verdict.dry_rule, self._where(verdict.dry_rule))
        if verdict.allowed and verdict.stage in (Stage.RULE, Stage.DEFAULT):
            yield from self._limits(decision)

    def _ban(self, client: IPAddress, what: str, answer: str) -> Step:
        ban = self._store.covering_ban(client)
        if ban is None:
            return Step("gate", answer, "ban", f"a ban {what}; it has just ended", "ban")
        by = "a service made it" if ban.automatic else "an operator made it"
        ends = "without end" if ban.expires is None else f"for {_left(ban.expires)} more"
        reason = f": {ban.reason}" if ban.reason else ""
        made = _clock(ban.created / 1e9)
        return Step("gate", answer, "ban", f"the ban of {ban.source} {what} ({by} at {made}, {ends}{reason})", "ban")

    def _loaded(self, name: str) -> Rule | None:
        return next((rule for rule in self._store.ruleset().rules if rule.name == name), None)

    def _where(self, name: str) -> str:
        rule = self._loaded(name)
        return "" if rule is None else rule.at

    def _rule(self, decision: Decision, at: SocketAddress, what: str, answer: str) -> Step:
        name, client = decision.verdict.rule, decision.source
        loaded = self._loaded(name)
        for network in _around(client):
            for port in (at.port, None):
                found = self._store.rule_at(network, port)
                if found is not None and found.name == name:
                    return Step("gate", answer, "runtime_rule", self._runtime(name, network, what), name)
        if loaded is None:
            return Step("gate", answer, "rule", f"rule {name} {what}", name)
        sources = Prefixes.of(loaded.sources)
        within = next((network for network in _around(client) if network in sources), None)
        text = f"rule {name} {what}"
        if within is not None:
            text += f": {source_text(within)} of it covers the client"
        if loaded.feed is not None:
            text += f", from {loaded.feed.source}"
        if loaded.expires is not None:
            text += f", for {_left(loaded.expires)} more"
        if loaded.reason:
            text += f" ({loaded.reason})"
        return Step("gate", answer, "feed" if loaded.feed else "rule", text, name, loaded.at)

    def _runtime(self, name: str, network: IPNetwork, what: str) -> str:
        made = [
            entry
            for entry in self._store.journal()
            if entry.get("what") == "add" and entry.get("source") == str(network) and entry.get("rule") == name
        ]
        text = f"rule {name}, made at run time, {what}"
        if made:
            who = cast("Mapping[str, object]", made[-1].get("who") or {})
            by = who.get("sudo_user") or who.get("login_uid", who.get("uid"))
            reason = made[-1].get("reason")
            text += f" (at {made[-1].get('time')} by {by}{f': {reason}' if reason else ''})"
        return text

    def _limits(self, decision: Decision) -> Iterator[Step]:
        constant, client = abi.constants(), decision.source
        rule = decision.rule
        limits: list[tuple[int, SynLimit | None, str, str]]
        if decision.verdict.stage is Stage.RULE:
            limits = [(rule.id, rule.limit, "limit", f"rule {rule.name}")] if rule is not None and rule.limit else []
        else:
            settings = self._store.settings()
            limits = [
                (constant["BUCKET_SOURCE"], settings.per_source, "per_source", "the limit of each source"),
                (constant["BUCKET_GLOBAL"], settings.overall, "overall", "the limit of all sources together"),
            ]
        for bucket, limit, kind, by in limits:
            if limit is None:
                continue
            wait = self._store.seconds_until_due(bucket, client, limit)
            says = f"{by}: {limit.rate:.6g}/s, burst {limit.burst}"
            where = self._where(rule.name) if kind == "limit" and rule is not None else ""
            if wait:
                text = f"{says}; it is used up, and has room again in {wait:.2f} s"
                yield Step("limits", _NO, kind, text, rule.name if rule else kind, where)
            else:
                yield Step("limits", _YES, kind, f"{says}; there is room", rule.name if rule else kind, where)

    # -- behind the gate -----------------------------------------------------------------------------------------

    def _unconfigured(self, question: _Question) -> Iterator[Step]:
        assert self._server is not None
        users = cast("Mapping[str, Any]", self._server.options().params).get("users")
        yield from _auth(None if users is None else str(users), question.user, optional=False)
        yield from self._egress(question)

    def _configured(self, name: str, question: _Question) -> Iterator[Step]:
        from ..config.load import config_of  # it brings in every service

        assert self._server is not None
        config: Config = config_of(cast("Mapping[str, Any]", self._server.options().params["config"]))
        if name not in config.listeners:
            return
        stack_name = config.listeners[name].stack
        stack = config.stacks[stack_name]
        yield from _sources(stack, stack_name, question.client)
        service = stack.service
        users = getattr(service, "users", None)
        optional = bool(getattr(service, "auth_optional", False))
        yield from _auth(users, question.user, optional=optional)
        if question.target is not None:
            ports = getattr(service, "connect_ports", ())
            if ports and question.target.port not in ports:
                text = f"CONNECT to port {question.target.port} is not served (plain requests are)"
                yield Step("stack", _NO, "connect_ports", text, "connect_ports", f"stacks.{stack_name}.service")
            yield from _targets_of(stack, stack_name, question.target)
        yield from self._egress(question)

    def egress(self, server: ServerSide) -> EgressPolicy:
        """The egress policy as services and the kernel judge by it now, with this host's own addresses."""
        return replace(
            server.options().egress,
            host=OwnHost(
                server.networks(),
                frozenset((at.ip, at.port) for at in server.own()),
                tuple(one for one, _ in self._bound()),
            ),
        )

    def _egress(self, question: _Question) -> Iterator[Step]:
        server, target = self._server, question.target
        if server is None or target is None:
            return
        if not question.addresses:
            yield Step("egress", _NO, "resolve", f"{target.host} has no address")
            return
        policy = self.egress(server)
        denials, allowed = [], []
        for address in question.addresses:
            try:
                policy.check(address, target.port)
            except PolicyDenied as error:
                denials.append(error)
            else:
                allowed.append(address)
        if allowed:
            yield Step("egress", _YES, "egress", f"{', '.join(map(str, allowed))} may be connected to")
        elif denials:
            text = "; ".join(dict.fromkeys(map(str, denials)))
            yield Step("egress", _NO, "egress", text, denials[0].rule, "[egress]")


def _sources(stack: StackConfig, name: str, client: IPAddress) -> Iterator[Step]:
    from ..config.layers import SourcesSettings

    for layer in stack.layers:
        if isinstance(layer, SourcesSettings) and not any(client in network for network in layer.allow):
            text = "the layer sources does not name it"
            yield Step("stack", _NO, "sources", text, "sources", f"stacks.{name}.layers")


def _auth(users: str | None, user: str | None, *, optional: bool) -> Iterator[Step]:
    if users is None:
        yield Step("auth", _YES, "auth", "no password is asked for")
        return
    if user is None:
        if optional:
            yield Step("auth", _YES, "auth", f"who gives no password is served too; users are in {users}")
        else:
            yield Step("auth", _ASKS, "auth", f"a user of {users} is asked for (--user looks whether one is there)")
        return
    from ..layers.auth import PasswordFile

    try:
        known = user in PasswordFile(users).names
    except (RamaError, OSError) as error:
        yield Step("auth", _NO, "auth", f"the password file cannot be read: {error}", "auth", users)
        return
    if known:
        yield Step("auth", _YES, "auth", f"user {user} is in {users}; the password is not looked at", "auth", users)
    else:
        yield Step("auth", _NO, "auth", f"there is no user {user} in {users}", "auth", users)


def _targets_of(stack: StackConfig, name: str, target: Authority) -> Iterator[Step]:
    settings = stack.connect.targets
    if settings is None:
        return
    from ..config.layers import TargetsSettings

    for setting in ("allow_hosts", "allow_ports", "deny_hosts", "deny_networks", "deny_ports"):
        value = getattr(settings, setting)
        if value and not _passes(TargetsSettings(**{setting: value}), target):
            where = f"stacks.{name}.connect.targets.{setting}"
            verb = "does not name it" if setting.startswith("allow") else "names it"
            yield Step("stack", _NO, "targets", f"{setting} {verb}", "targets", where)
            return
    yield Step("stack", _YES, "targets", f"{target} may be asked for", "targets", f"stacks.{name}.connect.targets")


def _passes(settings: Any, target: Authority) -> bool:
    async def inner(_target: Authority) -> None:
        return None

    try:
        asyncio.run(settings.make(None)(inner)(target))
    except PolicyDenied:
        return False
    return True


def target_of(text: str) -> Authority:
    """Parse a target, ``host:port``. Raises :class:`PolicyError`."""
    from ..config.kinds import AUTHORITY

    try:
        return AUTHORITY.parse(text)
    except ValueError as error:
        raise PolicyError(f"target {text!r}: {error}") from error


def _around(client: IPAddress) -> Iterator[IPNetwork]:
    """The networks that an address is in, the smallest first."""
    for length in range(client.max_prefixlen, -1, -1):
        yield ip_network((client, length), strict=False)


def _seen(row: Client) -> Json:
    return {
        "port": row.port,
        "let_in": row.let_in,
        "let_in_last": row.let_in_last or None,
        "denied": row.denied,
        "denied_last": row.denied_last or None,
        "by": row.rule or (row.stage.name.lower() if row.denied else ""),
        "stage": row.stage.name.lower() if row.denied else "",
        "action": row.action.name.lower() if row.denied else "",
        "hook": row.hook,
    }


def _left(expires: int) -> str:
    return f"{max(0, expires - boottime_ns()) / 1e9:.0f} s"


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _address(text: str) -> IPAddress:
    try:
        return unmap(ip_address(text))
    except ValueError:
        raise PolicyError(f"{text!r} is neither an address nor the id of a refusal") from None


def _text(params: Mapping[str, object], name: str) -> str:
    value = params.get(name)
    if not isinstance(value, str) or not value:
        raise PolicyError(f"{name} is missing")
    return value


def _optional(params: Mapping[str, object], name: str) -> str | None:
    value = params.get(name)
    if value is not None and not isinstance(value, str):
        raise PolicyError(f"{name} must be text, not {value!r}")
    return value or None
