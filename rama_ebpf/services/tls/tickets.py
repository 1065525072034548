"""Session tickets that every worker can open: one secret, and from it OpenSSL's ticket keys for each context.

A context makes its own random ticket keys, so a session is resumed only by the process that began it. Python's
:mod:`ssl` cannot set them; :mod:`.openssl` can.
"""

from __future__ import annotations

import hashlib
import hmac
import ssl
from pathlib import Path

from .openssl import TICKET_KEY_BYTES, set_ticket_keys

__all__ = ["TicketKeys"]


class TicketKeys:
    """A secret of at least 32 bytes that the workers (or hosts) share.

    The keys of a context are derived from it (HKDF-Expand, RFC 5869) and from the context's *scope*: its
    certificate and its demands on clients. So a ticket from a context that demands no client certificate cannot be
    used on one that does (CVE-2025-23419), and a new revocation list makes clients prove themselves anew.
    """

    def __init__(self, secret: bytes) -> None:
        if len(secret) < 32:
            raise ValueError(f"a ticket secret must have at least 32 bytes, not {len(secret)}")
        self._secret = hmac.digest(b"rama_ebpf ticket keys", secret, "sha256")

    @classmethod
    def from_file(cls, path: Path) -> TicketKeys:
        """Read the secret from a file, for example one made with ``openssl rand -out PATH 48``."""
        return cls(path.read_bytes())

    def install(self, context: ssl.SSLContext, scope: bytes) -> None:
        """Set the context's ticket keys. Raises :class:`~.openssl.OpenSslUnavailable`."""
        set_ticket_keys(context, _expand(self._secret, hashlib.sha256(scope).digest(), TICKET_KEY_BYTES))


def _expand(key: bytes, info: bytes, length: int) -> bytes:
    block, output, counter = b"", b"", 1
    while len(output) < length:
        block = hmac.digest(key, block + info + bytes((counter,)), "sha256")
        output += block
        counter += 1
    return output[:length]
