"""The metrics that the layers and the server write. Imported late: prometheus-client decides on import how values are
kept (``PROMETHEUS_MULTIPROC_DIR``)."""

from __future__ import annotations

from typing import Final

from prometheus_client import Counter, Gauge, Histogram

__all__ = [
    "ACCEPTED",
    "ACCEPT_PAUSES",
    "CONNECTIONS",
    "CONNECTION_SECONDS",
    "ERRORS",
    "HANDSHAKES",
    "HANDSHAKE_SECONDS",
    "HTTP_FIRST_BYTE_SECONDS",
    "HTTP_REQUESTS",
    "HTTP_REQUEST_SECONDS",
    "HTTP_SLOW_REQUESTS",
    "LOOKUPS",
    "LOOKUP_SECONDS",
    "PASSWORD_CHECKS",
    "RECEIVED_BYTES",
    "SENT_BYTES",
    "SOURCE_REFUSALS",
    "TUNNELS",
    "TUNNELS_CLOSED",
    "WAY_ATTEMPTS",
]

_BY_LISTENER: Final = ("listener",)

ACCEPTED: Final = Counter("rama_accepted_connections", "Connections that reached the services.", _BY_LISTENER)
CONNECTIONS: Final = Gauge(
    "rama_connections", "Connections that are being served.", _BY_LISTENER, multiprocess_mode="livesum"
)
HANDSHAKES: Final = Counter(
    "rama_handshakes", "Handshakes by outcome: established, or the kind of error.", ("listener", "outcome")
)
HANDSHAKE_SECONDS: Final = Histogram(
    "rama_handshake_duration_seconds",
    "From accept until the protocol's handshake was over.",
    _BY_LISTENER,
    buckets=(0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0),
)
CONNECTION_SECONDS: Final = Histogram(
    "rama_connection_duration_seconds",
    "Age of connections when they ended.",
    _BY_LISTENER,
    buckets=(0.01, 0.1, 1.0, 10.0, 60.0, 600.0, 3600.0, 36000.0),
)
RECEIVED_BYTES: Final = Counter("rama_received_bytes", "Bytes received from clients.", _BY_LISTENER)
SENT_BYTES: Final = Counter("rama_sent_bytes", "Bytes sent to clients.", _BY_LISTENER)
TUNNELS: Final = Gauge("rama_tunnels", "Tunnels that are live.", _BY_LISTENER, multiprocess_mode="livesum")
TUNNELS_CLOSED: Final = Counter("rama_closed_tunnels", "Tunnels that have ended.", ("listener", "relay", "reason"))
ERRORS: Final = Counter("rama_errors", "Connections that ended with an error, by its kind.", ("listener", "kind"))
LOOKUPS: Final = Counter(
    "rama_lookups", "Names looked up, by outcome: cached, answered, dropped, busy, or the kind of error.", ("outcome",)
)
LOOKUP_SECONDS: Final = Histogram(
    "rama_lookup_duration_seconds",
    "Look-ups that were not answered from what was known, from the question to the end of the wait.",
    buckets=(0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0),
)
HTTP_REQUESTS: Final = Counter(
    "rama_http_requests",
    "HTTP requests by route and class of status (2xx, …; none: broken off before a response).",
    ("listener", "route", "status"),
)
HTTP_REQUEST_SECONDS: Final = Counter(
    "rama_http_request_seconds",
    "Sum of the times from a request's head to the end of its response.",
    ("listener", "route"),
)
HTTP_FIRST_BYTE_SECONDS: Final = Counter(
    "rama_http_first_byte_seconds", "Sum of the times from a request's head to its response's.", ("listener", "route")
)
HTTP_SLOW_REQUESTS: Final = Counter(
    "rama_http_slow_requests", "HTTP requests that took longer than so many seconds.", ("listener", "route", "seconds")
)
PASSWORD_CHECKS: Final = Counter(
    "rama_password_checks", "Passwords that had to be checked, by outcome: right, wrong, busy or dropped.", ("outcome",)
)
WAY_ATTEMPTS: Final = Counter(
    "rama_way_attempts",
    "Attempts to connect by a way of the configuration: connected, or whose fault it was (way, unable, login, doubt, "
    "target, late).",
    ("way", "outcome"),
)
SOURCE_REFUSALS: Final = Counter(
    "rama_source_refusals", "What was refused because one source held as much of it as one may.", ("held",)
)
ACCEPT_PAUSES: Final = Counter(
    "rama_accept_pauses",
    "Refusals, and pauses of accepting, because the process was out of descriptors.",
    _BY_LISTENER,
)
