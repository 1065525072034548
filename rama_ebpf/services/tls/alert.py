"""TLS alerts (RFC 8446 section 6): the codes we send, the record that carries one, and the errors that ask for it."""

from __future__ import annotations

import enum

from ...core.errors import ProtocolError

__all__ = ["Alert", "AlertError", "NotTls"]


class Alert(enum.IntEnum):
    """Alert descriptions of RFC 8446 section 6 and RFC 6066 that this package sends."""

    CLOSE_NOTIFY = 0
    UNEXPECTED_MESSAGE = 10
    RECORD_OVERFLOW = 22
    HANDSHAKE_FAILURE = 40
    CERTIFICATE_UNKNOWN = 46
    ILLEGAL_PARAMETER = 47
    ACCESS_DENIED = 49
    DECODE_ERROR = 50
    PROTOCOL_VERSION = 70
    INTERNAL_ERROR = 80
    UNRECOGNIZED_NAME = 112

    @property
    def record(self) -> bytes:
        """The alert as a plaintext record of level fatal, as it is sent before any key is agreed on."""
        return bytes((21, 3, 1, 0, 2, 2, self.value))


class AlertError(ProtocolError):
    """The peer broke the TLS protocol or asked for what is not served; :attr:`alert` is what it is to be told."""

    kind = "tls_protocol"

    def __init__(self, message: str, alert: Alert) -> None:
        super().__init__(message, alert.record)
        self.alert = alert


class NotTls(AlertError):
    """What the peer sent is not TLS at all: another protocol came to a TLS port."""

    kind = "not_tls"

    def __init__(self, message: str) -> None:
        super().__init__(message, Alert.UNEXPECTED_MESSAGE)
