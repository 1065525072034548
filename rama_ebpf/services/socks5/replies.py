"""Which REP code tells a client about an error (RFC 1928 section 6)."""

from __future__ import annotations

import errno
from typing import Final

from ...core.errors import Busy, LimitExceeded, PolicyDenied
from ..resolver import ResolveError, ResolveTimeout
from .wire import Reply

__all__ = ["reply_for"]

_BY_ERRNO: Final = {
    # EPERM and EACCES are how a firewall, a prohibit route and the kernel's own egress check say no.
    errno.EPERM: Reply.NOT_ALLOWED,
    errno.EACCES: Reply.NOT_ALLOWED,
    errno.ENETUNREACH: Reply.NETWORK_UNREACHABLE,
    errno.ENETDOWN: Reply.NETWORK_UNREACHABLE,
    errno.EHOSTUNREACH: Reply.HOST_UNREACHABLE,
    errno.EHOSTDOWN: Reply.HOST_UNREACHABLE,
    errno.ECONNREFUSED: Reply.CONNECTION_REFUSED,
    errno.ETIMEDOUT: Reply.TTL_EXPIRED,
    errno.EAFNOSUPPORT: Reply.ADDRESS_TYPE_NOT_SUPPORTED,
}


def reply_for(error: BaseException) -> Reply:
    """Return the code for an error of a connector; what the RFC has no code for is a general failure."""
    if isinstance(error, Busy):
        return Reply.GENERAL_FAILURE
    if isinstance(error, ResolveTimeout):
        return Reply.TTL_EXPIRED
    if isinstance(error, PolicyDenied | LimitExceeded):
        return Reply.NOT_ALLOWED
    if isinstance(error, ResolveError):
        return Reply.HOST_UNREACHABLE
    if isinstance(error, OSError) and error.errno in _BY_ERRNO:
        return _BY_ERRNO[error.errno]
    if isinstance(error, TimeoutError):
        return Reply.TTL_EXPIRED
    return Reply.GENERAL_FAILURE
