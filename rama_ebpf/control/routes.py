"""The control methods of routes: what there is, where a connection would go and why, and an operator's word on it."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from ..core.address import Authority, IPAddress
from ..core.errors import PolicyDenied
from ..kernel.instance import Instance
from ..policy.rule import PolicyError
from ..routes.choice import Board, Chooser, LocalBoard
from ..routes.health import Health
from ..routes.model import Chain, Direct, Group, Key, Parent, Protocol, Refuse, Route, Way
from ..routes.table import Decision, Question

if TYPE_CHECKING:
    from ..config.model import Config
    from ..config.routes import RouteBook
    from ..process.ways import SharedBoard
    from ..services.connect import Egress

__all__ = ["RouteControl", "explained_route", "route_key"]

log = logging.getLogger("rama_ebpf")

Json = dict[str, object]

_KEY_BYTES: Final = 32


def route_key(instance: Instance) -> bytes:
    """Return the secret that the choices of groups are hashed with; it is made when it is needed first, and kept: a
    restart moves nobody to another member."""
    path = instance.state_dir / "route-key"
    with contextlib.suppress(FileNotFoundError):
        if len(found := path.read_bytes()) == _KEY_BYTES:
            return found
    made = secrets.token_bytes(_KEY_BYTES)
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        fresh = path.with_name(f"{path.name}.{os.getpid()}")
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(made)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except OSError as error:
        log.warning("keys of groups will go to other members after a restart: %s cannot be kept: %s", path, error)
    return made


class RouteControl:
    """Answers for one server. ``params`` returns what its application was given: the configuration, if there is one.
    ``egress`` returns the policy by which addresses are judged now."""

    def __init__(
        self,
        params: Callable[[], Mapping[str, object]],
        board: Callable[[], SharedBoard],
        egress: Callable[[], Egress],
    ) -> None:
        self._params = params
        self._board = board
        self._egress = egress
        self._read: tuple[Mapping[str, object], Config, list[RouteBook]] | None = None

    def call(self, method: str, params: Mapping[str, object]) -> Json:
        """Run one method. Raises :class:`PolicyError`."""
        handler = {
            "route-list": self.list,
            "route-test": self.test,
            "route-set": self.set,
            "route-drain": self.drain,
            "route-enable": self.enable,
        }.get(method)
        if handler is None:
            raise PolicyError(f"unknown method {method!r}")
        from ..process.ways import TooManyWays

        try:
            return handler(params)
        except TooManyWays as error:
            raise PolicyError(str(error)) from error

    def _books(self) -> list[RouteBook]:
        """The routes of the configuration in force, and those that ``via`` makes. Raises :class:`PolicyError`."""
        given = self._params()
        if self._read is None or self._read[0] is not given:
            if "config" not in given:
                raise PolicyError("this server has no configuration file, and so no routes")
            from ..config.load import config_of  # it knows every service, and takes half a second to import

            config = config_of(cast("Mapping[str, Any]", given["config"]))
            self._read = given, config, list(books_of(config))
        if not self._read[2]:
            raise PolicyError("the configuration has no [[routes]] and no connect.via")
        return self._read[2]

    def list(self, _params: Mapping[str, object]) -> Json:
        """Return all routes and ways, with what an operator has set and how ways do."""
        board, books = self._board(), self._books()
        overrides = board.overrides()
        routes = [
            {"index": index, **described_route(route), "set": overrides.get(route.name)}
            for book in books
            for index, route in enumerate(book.table.routes)
        ]
        ways = [
            {"name": name, **described_way(way)}
            | ({} if isinstance(way, Group | Refuse) or name == "direct" else board.described(name))
            for book in books
            for name, way in book.ways.items()
            if name not in ("refuse", "reset") or book is books[0]
        ]
        return {"routes": routes, "ways": list({cast("str", way["name"]): way for way in ways}.values())}

    def test(self, params: Mapping[str, object]) -> Json:
        """Say where a connection would go now, and why: ``target``, and what is known of its client."""
        book, given = self._books()[0], self._params()
        board = self._board()
        secret = bytes.fromhex(str(given.get("route_key", "")))
        place = given.get("file")
        return explained_route(
            book, board, secret, params, board.overrides(), None if place is None else Path(str(place)), self._egress()
        )

    def set(self, params: Mapping[str, object]) -> Json:
        """Have a ``route`` lead to another ``way`` in all workers, None: as it is written. It lasts until the server
        ends."""
        books, name, way = self._books(), str(params.get("route")), params.get("way")
        book = next((book for book in books if any(route.name == name for route in book.table.routes)), None)
        if book is None:
            known = ", ".join(route.name for book in books for route in book.table.routes[:20])
            raise PolicyError(f"there is no route {name!r}; there are {known}")
        if way is not None and str(way) not in book.ways:
            raise PolicyError(f"there is no way {str(way)!r}; there are {', '.join(sorted(book.ways))}")
        self._board().override(name, None if way is None else str(way))
        log.warning("route %s leads to %s now", name, "its own way" if way is None else way)
        return {"route": name, "way": way}

    def drain(self, params: Mapping[str, object]) -> Json:
        """Let no new connection take ``way``, or any way of a group; those that live go on."""
        return self._change(params, "drained", _drained)

    def enable(self, params: Mapping[str, object]) -> Json:
        """Undo a drain, or have a way that is down or quarantined tried now."""
        return self._change(params, "enabled", Health.enable)

    def _change(self, params: Mapping[str, object], done: str, change: Callable[[Health, float], None]) -> Json:
        books, name = self._books(), str(params.get("way"))
        book = next((book for book in books if name in book.ways), None)
        if book is None:
            known = ", ".join(sorted(name for book in books for name in book.ways))
            raise PolicyError(f"there is no way {name!r}; there are {known}")
        leaves = [leaf for leaf in book.ways.leaves(name) if leaf != "direct"]
        if not leaves:
            raise PolicyError(f"{name} is always as it is: set the route that leads there (rama-ebpf route set)")
        board, now = self._board(), time.monotonic()
        for leaf in leaves:
            board.change(leaf, functools.partial(_changed, change, now))
            log.warning("way %s is %s", leaf, done)
        return {done: leaves}


def books_of(config: Config) -> Iterator[RouteBook]:
    """Yield the routes of a configuration, and those that ``via`` makes in stacks."""
    from ..config.routes import make_routes

    book = make_routes(config.routes, config.ways)
    if book is not None:
        yield book
    for name, stack in config.stacks.items():
        if stack.connect.via:
            yield stack.connect.via_book(name)


def described_route(route: Route) -> Json:
    """Return a route as JSON, without what it does not say."""
    said: Json = {"name": route.name, "way": route.way}
    for field in ("hosts", "regexes", "networks", "users", "listeners", "clients", "server_names"):
        if values := getattr(route, field):
            said[field] = [str(value) for value in values]
    if route.ports:
        said["ports"] = [
            str(part.first) if part.first == part.last else f"{part.first}-{part.last}" for part in route.ports
        ]
    if route.protocols:
        said["protocols"] = [protocol.value for protocol in route.protocols]
    return said | ({"resolve": True} if route.resolve else {})


def described_way(way: Way) -> Json:
    """Return a way as JSON, without secrets."""
    if isinstance(way, Parent):
        return {"kind": "proxy", "is": str(way)}
    if isinstance(way, Chain):
        return {"kind": "chain", "is": " → ".join(way.hops)}
    if isinstance(way, Group):
        tiers = " | ".join(", ".join(tier) for tier in way.tiers)
        return {"kind": "group", "is": f"{way.choose.value}: {tiers}"}
    if isinstance(way, Direct):
        parts = [*map(str, way.sources), *([] if way.interface is None else [way.interface])]
        return {"kind": "direct", "is": ", ".join(parts) or "as the host's routing says"}
    return {"kind": "refuse", "is": "no answer" if way.reset else "an answer that says no"}


def _changed(change: Callable[[Health, float], None], now: float, health: Health) -> bool:
    change(health, now)
    return True


def _drained(health: Health, _now: float) -> None:
    health.drained = True


@dataclass(frozen=True, slots=True)
class _Asked:
    question: Question
    target: Authority
    session: str | None


def _asked(params: Mapping[str, object]) -> _Asked:
    """Read what a test is about. Raises :class:`PolicyError`."""
    from ..services.route.question import literal_of

    text = str(params.get("target"))
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 1 <= int(port) <= 65535:
        raise PolicyError(f"target {text!r}: write host:port")
    target = Authority.of(host, int(port))
    ip = literal_of(target.host)
    client = params.get("client")
    try:
        protocol = Protocol(params.get("protocol") or "socks")
        source = None if client is None else ip_address(str(client))
    except ValueError as error:
        raise PolicyError(str(error)) from None
    word = {name: None if params.get(name) is None else str(params[name]) for name in ("user", "listener")}
    name = params.get("server_name")
    question = Question(
        target.port,
        None if ip is not None else str(target.host),
        ip,
        protocol,
        word["user"],
        word["listener"],
        source,
        None if name is None else str(name),
    )
    session = params.get("session")
    return _Asked(question, target, None if session is None else str(session))


def explained_route(
    book: RouteBook,
    board: Board | None,
    secret: bytes,
    params: Mapping[str, object],
    overrides: Mapping[str, str],
    file: Path | None,
    egress: Egress,
) -> Json:
    """Say where a connection would go: the route with its place in ``file``, the way, and who is asked in which order.
    A target that is an address is judged by ``egress``, as services judge it. Raises :class:`PolicyError`."""
    asked = _asked(params)
    question = asked.question
    decision: Decision = book.table.decide(question)
    way_name = overrides.get(decision.name, decision.way)
    way_name = way_name if way_name in book.ways else decision.way
    way = book.ways[way_name]
    result: Json = {
        "target": str(asked.target),
        "route": None if decision.route is None else decision.name,
        "index": None if decision.route is None else decision.index,
        **_place(file, decision),
        "way": way_name,
        "set": way_name != decision.way,
        **described_way(way),
        "looked_up_first": decision.asks,
        "refused": isinstance(way, Refuse),
    }
    if isinstance(way, Refuse):
        return result | {"why": "no route matches" if decision.route is None else f"the route {decision.name} says so"}
    kept: Board = LocalBoard() if board is None else board
    chooser = Chooser(book.ways, kept, secret)
    order = [member.name for member in chooser.order(way_name, _key(way, asked), time.monotonic())]
    if way_name == "direct":
        order = ["direct"]
    left_out = [leaf for leaf in book.ways.leaves(way_name) if leaf not in order]
    denials = [] if question.ip is None else [_denial(book, name, question.ip, question.port, egress) for name in order]
    why = "no way of it is up" if not order else "" if not all(denials) else "; ".join(dict.fromkeys(denials))
    return result | {
        "refused": bool(why),
        "order": [_member(book, kept, name) for name in order],
        "left_out": [_member(book, kept, name) for name in left_out],
        "why": why,
    }


def _denial(book: RouteBook, name: str, ip: IPAddress, port: int, egress: Egress) -> str:
    """Why a way may not be asked for an address; the empty text if it may."""
    from ..services.route.private import judge_beyond

    way = book.ways[name]
    last = book.ways[way.hops[-1]] if isinstance(way, Chain) else way
    try:
        judge_beyond(egress, ip, port, trusted=isinstance(last, Parent) and last.trusted)
    except PolicyDenied as error:
        return str(error)
    return ""


def _key(way: Way, asked: _Asked) -> bytes:
    from ..core.auth import User
    from ..core.extensions import Extensions
    from ..services.route.question import key_of

    key = way.key if isinstance(way, Group | Direct) else None
    if key is None:
        return b""
    extensions = Extensions()
    if asked.question.user is not None:
        options = {} if asked.session is None else {"session": asked.session}
        extensions.add(User(asked.question.user, options))
    return key_of(Key(key), asked.question, extensions)


def _member(book: RouteBook, board: Board, name: str) -> Json:
    health = board.read(name)
    state = "drained" if health.drained else health.state.name.lower()
    said: Json = {"way": name, **described_way(book.ways[name]), "state": state}
    return said | ({"cause": health.cause} if health.cause else {})


def _place(file: Path | None, decision: Decision) -> Json:
    """Where the route stands, as the file is now."""
    if file is None or decision.route is None:
        return {"file": None if file is None else str(file), "line": None}
    from ..config.positions import key_lines

    with contextlib.suppress(OSError, ValueError, KeyError):
        return {"file": str(file), "line": key_lines(file.read_text())["routes", decision.index]}
    return {"file": str(file), "line": None}
