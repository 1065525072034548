"""A private network to try things on: a veth pair in a network namespace that only this process is in."""

from __future__ import annotations

import ctypes
import os
from ipaddress import IPv4Interface
from typing import Final

from pyroute2 import IPRoute

__all__ = ["isolate_with_veth"]

_CLONE_NEWNET: Final = 0x40000000


def isolate_with_veth(near: tuple[str, str], far: tuple[str, str], address: IPv4Interface, neighbour: str) -> None:
    """Move this process for good into a new network namespace with a veth pair.

    ``near`` and ``far`` are name and MAC address of its ends. ``near`` gets ``address`` and takes ``neighbour`` to be
    behind ``far``, which has no address. The kernel removes all of it when the process ends. Raises OSError; call it
    before any thread is started.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"cannot make a network namespace: {os.strerror(number)}")
    with IPRoute() as netlink:
        netlink.link("set", index=1, state="up")
        netlink.link("add", ifname=near[0], kind="veth", address=near[1], peer={"ifname": far[0], "address": far[1]})
        (index,) = netlink.link_lookup(ifname=near[0])
        (far_index,) = netlink.link_lookup(ifname=far[0])
        netlink.addr("add", index=index, address=str(address.ip), prefixlen=address.network.prefixlen)
        for link in (index, far_index):
            netlink.link("set", index=link, state="up")
        netlink.neigh("add", dst=neighbour, lladdr=far[1], ifindex=index, state="permanent")
