"""TLS alerts (RFC 8446 section 6): the codes we send and the record that carries one."""

from __future__ import annotations

import enum

__all__ = ["Alert"]


class Alert(enum.IntEnum):
    """Alert descriptions of RFC 8446 section 6, RFC 6066 and RFC 7301."""

    CLOSE_NOTIFY = 0
    UNEXPECTED_MESSAGE = 10
    RECORD_OVERFLOW = 22
    HANDSHAKE_FAILURE = 40
    BAD_CERTIFICATE = 42
    CERTIFICATE_UNKNOWN = 46
    ILLEGAL_PARAMETER = 47
    UNKNOWN_CA = 48
    ACCESS_DENIED = 49
    DECODE_ERROR = 50
    PROTOCOL_VERSION = 70
    INTERNAL_ERROR = 80
    UNRECOGNIZED_NAME = 112
    NO_APPLICATION_PROTOCOL = 120

    @property
    def record(self) -> bytes:
        """The alert as a plaintext record of level fatal, as it is sent before any key is agreed on."""
        return bytes((21, 3, 1, 0, 2, 2, self.value))
