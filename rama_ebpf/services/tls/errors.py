"""What goes wrong with TLS, by who has to act: the peer's protocol, its certificate, its network, our configuration."""

from __future__ import annotations

from ...core.errors import PeerClosed, ProtocolError, RamaError
from .alert import Alert

__all__ = ["AlertError", "CertificateRejected", "HandshakeFailed", "NotTls", "TlsError", "TlsTruncated"]


_NOT_SERVED = frozenset(
    {
        Alert.HANDSHAKE_FAILURE,
        Alert.INTERNAL_ERROR,
        Alert.NO_APPLICATION_PROTOCOL,
        Alert.PROTOCOL_VERSION,
        Alert.UNRECOGNIZED_NAME,
    }
)
"""Alerts for what an honest client may ask, and we do not serve."""


class AlertError(ProtocolError):
    """A client broke the TLS protocol or asked for what is not served; :attr:`alert` is what it is to be told."""

    kind = "tls_protocol"

    def __init__(self, message: str, alert: Alert) -> None:
        not_served = alert in _NOT_SERVED and type(self) is AlertError
        super().__init__(message, alert.record, kind="tls_not_served" if not_served else None)
        self.alert = alert


class NotTls(AlertError):
    """What the client sent is not TLS at all: another protocol came to a TLS port."""

    kind = "not_tls"

    def __init__(self, message: str) -> None:
        super().__init__(message, Alert.UNEXPECTED_MESSAGE)


class TlsError(RamaError, ConnectionError):
    """An established TLS stream broke: a bad record, a fatal alert. Nothing that came after can be trusted."""

    kind = "tls"


class TlsTruncated(PeerClosed):
    """The transport ended without the peer's close_notify: an attacker may have cut off the rest (RFC 8446 6.1)."""

    kind = "tls_truncated"


class HandshakeFailed(TlsError):
    """A handshake came to no agreement. The peer has been sent the alert that OpenSSL prescribes.

    ``reason`` is OpenSSL's name of the error, for example ``TLSV1_ALERT_UNKNOWN_CA``.
    """

    kind = "tls_handshake"

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason

    @property
    def rejected_our_certificate(self) -> bool:
        """Whether the reason is an alert by which the peer refuses the certificate that it was shown."""
        return self.reason in _REJECTIONS


# The alerts of RFC 8446 section 6.2 by which a peer says that it does not accept a certificate. access_denied is not
# among them: it judges the sender, not the certificate.
_REJECTIONS = frozenset(
    {
        "SSLV3_ALERT_BAD_CERTIFICATE",
        "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE",
        "SSLV3_ALERT_CERTIFICATE_REVOKED",
        "SSLV3_ALERT_CERTIFICATE_EXPIRED",
        "SSLV3_ALERT_CERTIFICATE_UNKNOWN",
        "TLSV1_ALERT_UNKNOWN_CA",
    }
)


class CertificateRejected(HandshakeFailed):
    """The peer's certificate does not verify, or is not one of those that are pinned."""

    kind = "tls_certificate"
