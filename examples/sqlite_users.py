"""A SOCKS5 proxy whose users are in a database: password, bytes a second, and where they may go::

sqlite3 users.db "CREATE TABLE users (name TEXT PRIMARY KEY, hash TEXT, rate REAL, allow TEXT)"
rama-ebpf run sqlite_users:proxy --listen 0.0.0.0:1080
"""

import sqlite3

from rama_ebpf.core import Credentials, Service, Stream, User, stack
from rama_ebpf.layers import PasswordTable, StrikeLayer, TimeoutLayer, UserThrottleLayer
from rama_ebpf.policy import EgressPolicy
from rama_ebpf.process import WorkerContext
from rama_ebpf.services import Socks5Server, UserEgressLayer


def proxy(context: WorkerContext) -> Service[Stream, object]:
    users = sqlite3.connect("file:users.db?mode=ro", uri=True)

    def find(credentials: Credentials) -> tuple[str, User] | None:
        row = users.execute("SELECT hash, rate, allow FROM users WHERE name = ?", [credentials.username]).fetchone()
        return row and (row[0], User(credentials.username, {"rate": str(row[1]), "allow": row[2]}))

    def egress(user: User) -> EgressPolicy:
        return EgressPolicy.of(allow=user.options["allow"].split(), deny=["0.0.0.0/0", "::/0"])

    connector = stack(
        UserThrottleLayer(lambda user: float(user.options["rate"])),
        UserEgressLayer(context.resolver, egress),
        context.connector(),
    )
    server = Socks5Server(connector, auth=PasswordTable(find))
    return stack(StrikeLayer(context.policy), TimeoutLayer(handshake=10, idle=300), server)
