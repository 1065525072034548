"""XDP on interfaces: attached by a link that its descriptor holds, natively where the driver can, and never in place of
another program.

Reference: ``include/uapi/linux/if_link.h`` (XDP_FLAGS_*), ``net/core/dev.c`` (``dev_xdp_attach``).
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from dataclasses import dataclass
from typing import Final

from . import abi, bpf, netdev
from .bpf import AttachType

__all__ = ["XdpAttachment", "XdpError", "adopted", "attach", "is_attached", "traits"]

_MODES: Final = (("native", 1 << 2), ("generic", 1 << 1))  # XDP_FLAGS_DRV_MODE, XDP_FLAGS_SKB_MODE
_SIOCGIFHWADDR: Final = 0x8927
_ETHERNET: Final = (1, 772)  # ARPHRD_ETHER, ARPHRD_LOOPBACK: what has an Ethernet header
_TAKEN: Final = (errno.EBUSY, errno.EEXIST)


class XdpError(RuntimeError):
    """The program cannot be attached to an interface; the text says why, and nothing was changed."""


@dataclass(frozen=True, slots=True)
class XdpAttachment:
    """Where the program is attached. It is detached when ``link``, a descriptor, is closed.

    ``mode`` is ``native`` (the driver runs it) or ``generic`` (the stack does, after it has made a packet of the
    frame); ``why`` is then what the driver said to native. ``hardware`` is the interface's address. ``why_silent`` says
    why no answer may be sent from there, empty if one may: it would be lost, or go out without its VLAN tag.
    ``answers`` is how one is sent, of ``enum answers``.
    """

    interface: str
    index: int
    hardware: bytes
    link: int
    link_id: int
    mode: str
    why: str = ""
    why_silent: str = ""
    answers: int = 0


def attach(program: int, interface: str) -> XdpAttachment:
    """Attach an XDP program to an interface of this network namespace. Raises :class:`XdpError`."""
    try:
        index = socket.if_nametoindex(interface)
    except OSError:
        raise XdpError(f"there is no interface {interface!r} (ip link lists them)") from None
    _hardware_address(interface)
    refused: list[str] = []
    for mode, flags in _MODES:
        try:
            link = bpf.link_create(program, index, AttachType.XDP, flags)
        except OSError as error:
            if error.errno in _TAKEN:
                raise XdpError(
                    f"{interface} has an XDP program already, which stays (ip link show dev {interface} names it): "
                    "detach it, or run without --xdp there"
                ) from error
            refused.append(os.strerror(error.errno or errno.EIO))
        else:
            why, link_id = "".join(refused), bpf.link_info(link).id
            try:
                hardware, silent, answers = traits(interface, index, mode)
            except BaseException:
                os.close(link)
                raise
            return XdpAttachment(interface, index, hardware, link, link_id, mode, why, silent, answers)
    raise XdpError(f"XDP cannot be attached to {interface}: {', '.join(dict.fromkeys(refused))}")


def adopted(link: int, interface: str, index: int, mode: str) -> XdpAttachment:
    """Describe an attachment that another process has made. Raises :class:`XdpError` or OSError."""
    hardware, silent, answers = traits(interface, index, mode)
    return XdpAttachment(interface, index, hardware, link, bpf.link_info(link).id, mode, "", silent, answers)


def traits(interface: str, index: int, mode: str) -> tuple[bytes, str, int]:
    """Return the hardware address of an interface with XDP, why nothing may be answered there, and how it is, as
    :class:`XdpAttachment` has them. Raises :class:`XdpError` or OSError."""
    return _hardware_address(interface), *_answers(interface, index, native=mode == "native")


def _answers(interface: str, index: int, *, native: bool) -> tuple[str, int]:
    """Say why XDP may send nothing back there, or nothing, and how it does."""
    constant = abi.constants()
    if native and netdev.strips_vlan_tags(interface) and netdev.has_vlans():
        why = f"VLAN tags are taken off before XDP (ethtool -K {interface} rxvlan off leaves them on)"
    elif native and netdev.driver(interface) == "veth":
        if netdev.receives_from_xdp(index):
            return "", constant["ANSWERS_REDIRECT"]
        why = "the other end of this veth takes no frames from XDP (ethtool -K PEER gro on lets it; Linux 6.3)"
    else:
        return "", constant["ANSWERS_TRANSMIT"]
    return why, constant["ANSWERS_NONE"]


def is_attached(link_id: int) -> bool:
    """Whether a link still is on its interface: the kernel detaches it from one that is removed."""
    try:
        fd = bpf.link_by_id(link_id)
    except FileNotFoundError:
        return False
    try:
        return bpf.link_info(fd).ifindex != 0
    finally:
        os.close(fd)


def _hardware_address(interface: str) -> bytes:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            answer = fcntl.ioctl(sock, _SIOCGIFHWADDR, struct.pack("16s24x", interface.encode()))
        except OSError as error:
            raise XdpError(f"{interface} has no hardware address: {error.strerror}") from error
    kind, address = struct.unpack_from("=H6s", answer, 16)
    if kind not in _ETHERNET:
        raise XdpError(f"{interface} has no Ethernet frames, which is what the gate's XDP reads")
    return bytes(address)
