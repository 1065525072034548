"""What an OpenSSL context can do and Python's :mod:`ssl` does not offer: ticket keys, groups, keys shared by contexts.

The ``SSL_CTX`` is the first member of CPython's ``SSLContext`` object, in every version from 3.7 to 3.14. It is taken
from there, and before anything is written OpenSSL is asked for the context's options and its answer compared with
Python's: where the two differ, or the interpreter or the library is another one, nothing is guessed and
:class:`OpenSslUnavailable` is raised.
"""

from __future__ import annotations

import ctypes
import functools
import ssl
import sys
from typing import Final

__all__ = ["TICKET_KEY_BYTES", "OpenSslUnavailable", "set_certificate", "set_groups", "set_ticket_keys"]

TICKET_KEY_BYTES: Final = 80
"""Name (16), HMAC secret (32) and AES-256 key (32)."""

# Numbers of OpenSSL's ssl.h, part of its ABI.
_CTRL_SET_TLSEXT_TICKET_KEYS: Final = 59
_CTRL_SET_CHAIN: Final = 88
_CTRL_SET_GROUPS_LIST: Final = 92
_CTRL_GET_CHAIN: Final = 115


class OpenSslUnavailable(RuntimeError):
    """This interpreter's OpenSSL contexts cannot be reached."""


def set_ticket_keys(context: ssl.SSLContext, keys: bytes) -> None:
    """Set the keys that protect session tickets: :data:`TICKET_KEY_BYTES` bytes."""
    if len(keys) != TICKET_KEY_BYTES:
        raise ValueError(f"ticket keys are {TICKET_KEY_BYTES} bytes, not {len(keys)}")
    _control(context, _CTRL_SET_TLSEXT_TICKET_KEYS, TICKET_KEY_BYTES, keys)


def set_groups(context: ssl.SSLContext, groups: str) -> None:
    """Set the groups for the key exchange, for example ``"X25519:P-256"``. Raises ValueError for an unknown one."""
    try:
        _control(context, _CTRL_SET_GROUPS_LIST, 0, groups.encode())
    except _Refused:
        raise ValueError(f"OpenSSL does not know all of the groups {groups}") from None


def set_certificate(context: ssl.SSLContext, certificate: bytes, model: ssl.SSLContext) -> None:
    """Give a context a certificate (DER) for the private key of ``model``, with the chain of ``model``.

    The key is shared as OpenSSL holds it. To decode it from a file, which is the only way that Python knows, takes
    OpenSSL 3.0 some 0.7 ms for each context.
    """
    library = _libssl()
    target, source = _pointer(context), _pointer(model)
    chain = ctypes.c_void_p()
    _check(library.SSL_CTX_use_certificate_ASN1(target, len(certificate), certificate), "the certificate")
    _check(library.SSL_CTX_use_PrivateKey(target, library.SSL_CTX_get0_privatekey(source)), "the key")
    _check(library.SSL_CTX_ctrl(source, _CTRL_GET_CHAIN, 0, ctypes.byref(chain)), "to tell the chain")
    _check(library.SSL_CTX_ctrl(target, _CTRL_SET_CHAIN, 1, chain), "the chain")


class _Refused(OpenSslUnavailable):
    pass


def _control(context: ssl.SSLContext, command: int, number: int, data: bytes) -> None:
    _check(_libssl().SSL_CTX_ctrl(_pointer(context), command, number, data), f"command {command}")


def _pointer(context: ssl.SSLContext) -> int:
    """Return the address of a context's ``SSL_CTX``."""
    pointer = ctypes.c_void_p.from_address(id(context) + object.__basicsize__).value
    if pointer is None or _libssl().SSL_CTX_get_options(pointer) != int(context.options) & 0xFFFFFFFFFFFFFFFF:
        raise OpenSslUnavailable("the layout of ssl.SSLContext is not the known one")
    return pointer


def _check(result: int, what: str) -> None:
    if result != 1:
        _libssl().ERR_clear_error()  # or the next call of ssl's would report it as its own
        raise _Refused(f"OpenSSL refuses {what}")


@functools.cache
def _libssl() -> ctypes.CDLL:
    """The very libssl that Python's ssl is linked to, found through the symbols of its extension module."""
    import _ssl

    if sys.implementation.name != "cpython" or ssl.OPENSSL_VERSION_INFO[0] < 3:
        raise OpenSslUnavailable("known for CPython with OpenSSL 3 only")
    try:
        library = ctypes.CDLL(getattr(_ssl, "__file__", None))
        library.SSL_CTX_get_options.argtypes = [ctypes.c_void_p]
        library.SSL_CTX_get_options.restype = ctypes.c_uint64
        library.SSL_CTX_ctrl.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_void_p]
        library.SSL_CTX_ctrl.restype = ctypes.c_long
        library.SSL_CTX_use_certificate_ASN1.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p]
        library.SSL_CTX_use_certificate_ASN1.restype = ctypes.c_int
        library.SSL_CTX_use_PrivateKey.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        library.SSL_CTX_use_PrivateKey.restype = ctypes.c_int
        library.SSL_CTX_get0_privatekey.argtypes = [ctypes.c_void_p]
        library.SSL_CTX_get0_privatekey.restype = ctypes.c_void_p
        library.ERR_clear_error.argtypes = []
        library.ERR_clear_error.restype = None
    except (OSError, AttributeError) as error:
        raise OpenSslUnavailable(f"libssl cannot be reached: {error}") from error
    return library
