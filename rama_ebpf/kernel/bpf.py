"""The bpf(2) system call: maps, pins, links, test runs and object queries.

BCC compiles and loads programs, but it has no API for links, map-in-map updates, batches or map layouts. This module
talks to the kernel directly: the ABI of bpf(2) is stable, and a worker process needs neither BCC nor LLVM for it.
Every function raises OSError with the kernel's errno. File descriptors are close-on-exec, as the kernel makes them.

Reference: ``include/uapi/linux/bpf.h``, ``union bpf_attr``.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import errno
import functools
import os
import platform
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

__all__ = [
    "BPF_EXIST",
    "BPF_NOEXIST",
    "AttachType",
    "LinkInfo",
    "MapFlags",
    "MapInfo",
    "MapReader",
    "MapType",
    "ProgInfo",
    "close",
    "effective_programs",
    "link_by_id",
    "link_create",
    "link_info",
    "link_update",
    "map_batches",
    "map_by_id",
    "map_create",
    "map_delete",
    "map_delete_batch",
    "map_info",
    "map_lookup",
    "map_lookup_batch",
    "map_lookup_slice",
    "map_next_key",
    "map_update",
    "map_update_batch",
    "obj_get",
    "obj_pin",
    "prog_attach",
    "prog_by_id",
    "prog_info",
    "prog_load",
    "prog_map_ids",
    "prog_test_run",
    "verifier_log",
]


class MapType(enum.IntEnum):
    """``enum bpf_map_type``, those used here."""

    HASH = 1
    ARRAY = 2
    PERCPU_HASH = 5
    PERCPU_ARRAY = 6
    LRU_HASH = 9
    LPM_TRIE = 11
    ARRAY_OF_MAPS = 12
    SOCKMAP = 15
    SOCKHASH = 18
    RINGBUF = 27


class MapFlags(enum.IntFlag):
    """Flags of BPF_MAP_CREATE, those used here."""

    NONE = 0
    NO_PREALLOC = 1
    MMAPABLE = 1 << 10
    INNER_MAP = 1 << 12


class AttachType(enum.IntEnum):
    """``enum bpf_attach_type``, those used here."""

    CGROUP_INET_INGRESS = 0
    CGROUP_INET_SOCK_CREATE = 2
    CGROUP_SOCK_OPS = 3
    CGROUP_INET4_CONNECT = 10
    CGROUP_INET6_CONNECT = 11
    CGROUP_UDP4_SENDMSG = 14
    CGROUP_UDP6_SENDMSG = 15
    CGROUP_SETSOCKOPT = 22
    SK_LOOKUP = 36
    XDP = 37
    SK_SKB_VERDICT = 38
    TCX_INGRESS = 46
    TCX_EGRESS = 47


BPF_ANY: Final = 0
BPF_NOEXIST: Final = 1
BPF_EXIST: Final = 2

_SYS_BPF: Final = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "s390x": 351, "ppc64le": 361}

_MAP_CREATE, _LOOKUP, _UPDATE, _DELETE, _NEXT_KEY = 0, 1, 2, 3, 4
_OBJ_PIN, _OBJ_GET = 6, 7
_PROG_LOAD = 5
_PROG_ATTACH = 8
_PROG_TEST_RUN = 10
_PROG_GET_FD_BY_ID, _MAP_GET_FD_BY_ID = 13, 14
_OBJ_GET_INFO = 15
_PROG_QUERY = 16
_QUERY_EFFECTIVE = 1
_MOST_PROGRAMS: Final = 256  # the kernel's own bound is 64 a cgroup (BPF_CGROUP_MAX_PROGS), with those above it more
_LINK_GET_FD_BY_ID = 30
_LOOKUP_BATCH, _UPDATE_BATCH, _DELETE_BATCH = 24, 26, 27
_LINK_CREATE, _LINK_UPDATE = 28, 29
_LINK_DETACH = 34

_libc = ctypes.CDLL(None, use_errno=True)
_ATTR_SIZE: Final = 128


def _bpf(command: int, attr: bytes) -> int:
    return _bpf_inout(command, ctypes.create_string_buffer(attr, max(_ATTR_SIZE, len(attr))))


def _bpf_inout(command: int, attr: ctypes.Array[ctypes.c_char]) -> int:
    result = int(_libc.syscall(_number(), command, ctypes.byref(attr), len(attr)))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"bpf({command}): {os.strerror(error)}")
    return result


@functools.cache
def _number() -> int:
    try:
        return _SYS_BPF[platform.machine()]
    except KeyError:
        raise OSError(38, f"no bpf(2) number known for machine {platform.machine()!r}") from None


def _buffer(data: bytes) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(data, len(data))


def _address(buffer: ctypes.Array[ctypes.c_char]) -> int:
    return ctypes.addressof(buffer)


# -- maps ------------------------------------------------------------------------------------------------------------


def map_create(
    kind: MapType,
    key_size: int,
    value_size: int,
    max_entries: int,
    *,
    flags: MapFlags = MapFlags.NONE,
    inner_fd: int = 0,
    name: str = "",
) -> int:
    """Create a map and return its descriptor. Sizes are bytes; ``name`` is cut to the kernel's 15 characters."""
    attr = struct.pack("=IIIIIII16s", kind, key_size, value_size, max_entries, flags, inner_fd, 0, name.encode()[:15])
    return _bpf(_MAP_CREATE, attr)


def map_by_id(identity: int, *, flags: int = 0) -> int:
    """Open a map by its id (as a map of maps names its inner maps to userspace) and return a descriptor; ``flags`` as
    BPF_F_RDONLY."""
    return _bpf(_MAP_GET_FD_BY_ID, struct.pack("=III", identity, 0, flags))


def close(fd: int) -> None:
    """Close a descriptor of this module."""
    os.close(fd)


def map_lookup(fd: int, key: bytes, value_size: int) -> bytes | None:
    """Return the value of ``key``, or None. For per-CPU maps ``value_size`` is 8-rounded size × possible CPUs."""
    key_buffer, value = _buffer(key), ctypes.create_string_buffer(value_size)
    try:
        _bpf(_LOOKUP, struct.pack("=IIQQQ", fd, 0, _address(key_buffer), _address(value), 0))
    except FileNotFoundError:
        return None
    return value.raw


class MapReader:
    """Looks keys up in one map, with buffers that are made once: a third of the time of :func:`map_lookup`. For one
    thread at a time."""

    def __init__(self, fd: int, key_size: int, value_size: int) -> None:
        self._key, self._value = ctypes.create_string_buffer(key_size), ctypes.create_string_buffer(value_size)
        attr = struct.pack("=IIQQQ", fd, 0, _address(self._key), _address(self._value), 0)
        self._attr = ctypes.create_string_buffer(attr, _ATTR_SIZE)
        self._call = (_number(), _LOOKUP, ctypes.byref(self._attr), _ATTR_SIZE)

    def __call__(self, key: bytes) -> bytes | None:
        """Return the value of ``key``, or None."""
        self._key.raw = key
        if _libc.syscall(*self._call) < 0:
            error = ctypes.get_errno()
            if error == errno.ENOENT:
                return None
            raise OSError(error, f"bpf({_LOOKUP}): {os.strerror(error)}")
        return self._value.raw


def map_update(fd: int, key: bytes, value: bytes, flags: int = BPF_ANY) -> None:
    """Set ``key`` to ``value``. Raises FileExistsError, FileNotFoundError (by ``flags``) or OSError E2BIG when full."""
    key_buffer, value_buffer = _buffer(key), _buffer(value)
    _bpf(_UPDATE, struct.pack("=IIQQQ", fd, 0, _address(key_buffer), _address(value_buffer), flags))


def map_delete(fd: int, key: bytes) -> bool:
    """Delete ``key``; return whether it was there."""
    key_buffer = _buffer(key)
    try:
        _bpf(_DELETE, struct.pack("=IIQQQ", fd, 0, _address(key_buffer), 0, 0))
    except FileNotFoundError:
        return False
    return True


def map_next_key(fd: int, key: bytes | None, key_size: int) -> bytes | None:
    """Return the key after ``key`` (None: the first), or None at the end."""
    current = _buffer(key) if key is not None else None
    following = ctypes.create_string_buffer(key_size)
    pointer = _address(current) if current is not None else 0
    try:
        _bpf(_NEXT_KEY, struct.pack("=IIQQQ", fd, 0, pointer, _address(following), 0))
    except FileNotFoundError:
        return None
    return following.raw


def map_lookup_batch(fd: int, key_size: int, value_size: int, chunk: int = 4096) -> list[tuple[bytes, bytes]]:
    """Return all entries of a hash map. A consistent view only if nobody writes meanwhile."""
    return [
        (keys[i * key_size : (i + 1) * key_size], values[i * value_size : (i + 1) * value_size])
        for keys, values in map_batches(fd, key_size, value_size, chunk)
        for i in range(len(keys) // key_size)
    ]


def map_batches(fd: int, key_size: int, value_size: int, chunk: int = 4096) -> Iterator[tuple[bytes, bytes]]:
    """Yield all entries of a hash map in batches: keys one after the other, and their values.

    What is there all the time is yielded; of what others write meanwhile, some may be.
    """
    token: bytes | None = None
    while True:
        keys, values, token = map_lookup_slice(fd, key_size, value_size, token, chunk)
        if keys:
            yield keys, values
        if token is None:
            return


def map_lookup_slice(
    fd: int, key_size: int, value_size: int, token: bytes | None, count: int
) -> tuple[bytes, bytes, bytes | None]:
    """Return about ``count`` keys of a map, one after the other, their values, and the token by which the next call
    goes on; None: that was the end."""
    before = None if token is None else _buffer(token)
    after = ctypes.create_string_buffer(max(4, key_size))
    while True:
        keys, values = ctypes.create_string_buffer(count * key_size), ctypes.create_string_buffer(count * value_size)
        where = (0 if before is None else _address(before), _address(after), _address(keys), _address(values))
        attr = _batch(*where, count, fd)
        done = False
        try:
            _bpf_inout(_LOOKUP_BATCH, attr)
        except FileNotFoundError:
            done = True
        except OSError as error:
            if error.errno != errno.ENOSPC:  # one hash bucket holds more
                raise
            count *= 2
            continue
        met = _batch_count(attr)
        return keys.raw[: met * key_size], values.raw[: met * value_size], None if done else after.raw


def map_update_batch(fd: int, keys: bytes, values: bytes, count: int) -> int:
    """Set ``count`` keys, given one after the other as their values are; return how many were set before the map was
    full. Raises OSError, also where the kernel is out of memory: that is no full map."""
    key_buffer, value_buffer = _buffer(keys), _buffer(values)
    attr = _batch(0, 0, _address(key_buffer), _address(value_buffer), count, fd)
    try:
        _bpf_inout(_UPDATE_BATCH, attr)
    except OSError as error:
        if error.errno not in (errno.E2BIG, errno.ENOSPC):
            raise
    return _batch_count(attr)


def map_delete_batch(fd: int, keys: bytes, count: int) -> int:
    """Delete ``count`` keys, given one after the other; return how many were there, up to the first that was not."""
    key_buffer = _buffer(keys)
    attr = _batch(0, 0, _address(key_buffer), 0, count, fd)
    with contextlib.suppress(FileNotFoundError):
        _bpf_inout(_DELETE_BATCH, attr)
    return _batch_count(attr)


def _batch(in_token: int, out_token: int, keys: int, values: int, count: int, fd: int) -> ctypes.Array[ctypes.c_char]:
    attr = struct.pack("=QQQQIIQQ", in_token, out_token, keys, values, count, fd, 0, 0)
    return ctypes.create_string_buffer(attr, _ATTR_SIZE)


def _batch_count(attr: ctypes.Array[ctypes.c_char]) -> int:
    return int(struct.unpack_from("=I", attr.raw, 32)[0])


# -- pins ------------------------------------------------------------------------------------------------------------


def obj_pin(fd: int, path: str) -> None:
    """Pin a map, program or link at ``path`` on a bpffs. Raises FileExistsError if the path is taken."""
    name = _buffer(os.fsencode(path) + b"\0")
    _bpf(_OBJ_PIN, struct.pack("=QII", _address(name), fd, 0))


def obj_get(path: str) -> int:
    """Open a pinned object. Raises FileNotFoundError, or PermissionError without CAP_BPF or the file's mode."""
    name = _buffer(os.fsencode(path) + b"\0")
    return _bpf(_OBJ_GET, struct.pack("=QII", _address(name), 0, 0))


# -- programs --------------------------------------------------------------------------------------------------------

_LICENSE: Final = b"GPL"  # what BCC says of a program that says nothing
_LOAD_TRIES: Final = 5  # the verifier ends with EAGAIN when a signal has come, as libbpf knows
_LOG_BYTES: Final = (1 << 20, 1 << 24)


def prog_load(kind: int, code: bytes, attach_type: int, name: str) -> int:
    """Load a program (``enum bpf_prog_type``, ``enum bpf_attach_type``) and return its descriptor.

    ``code`` is instructions of 8 bytes with map descriptors in place; ``name`` is cut to the kernel's 15 characters.
    """
    return _prog_load(kind, code, attach_type, name, None)


def verifier_log(kind: int, code: bytes, attach_type: int) -> str:
    """Return what the verifier says of a program that it refuses; empty if it says nothing, or loads it after all."""
    for size in _LOG_BYTES:
        said = ctypes.create_string_buffer(size)
        try:
            os.close(_prog_load(kind, code, attach_type, "", said))
        except OSError as error:
            if error.errno == errno.ENOSPC:
                continue
        return said.value.decode(errors="replace")
    return said.value.decode(errors="replace")


def _prog_load(kind: int, code: bytes, attach_type: int, name: str, log: ctypes.Array[ctypes.c_char] | None) -> int:
    instructions, license_text = _buffer(code), _buffer(_LICENSE + b"\0")
    logged = (0, 0, 0) if log is None else (1, len(log), _address(log))
    attr = struct.pack(
        "=IIQQIIQII16sII",
        kind,
        len(code) // 8,
        _address(instructions),
        _address(license_text),
        *logged,
        0,
        0,
        name.encode()[:15],
        0,
        attach_type,
    )
    for _ in range(_LOAD_TRIES - 1):
        try:
            return _bpf(_PROG_LOAD, attr)
        except BlockingIOError:
            continue
    return _bpf(_PROG_LOAD, attr)


# -- links -----------------------------------------------------------------------------------------------------------


def link_create(prog_fd: int, target_fd: int, attach_type: AttachType, flags: int = 0) -> int:
    """Attach a program to a cgroup or network namespace (by descriptor) or an interface (by index).

    The attachment lives as long as the returned descriptor, a copy of it, or a pin.
    """
    return _bpf(_LINK_CREATE, struct.pack("=IIII", prog_fd, target_fd, attach_type, flags))


def link_update(link_fd: int, prog_fd: int) -> None:
    """Put another program in place of a link's, at once: all who hold the link have that."""
    _bpf(_LINK_UPDATE, struct.pack("=IIII", link_fd, prog_fd, 0, 0))


def link_detach(link_fd: int) -> None:
    """End an attachment, whoever else holds the link."""
    _bpf(_LINK_DETACH, struct.pack("=I", link_fd))


def link_by_id(identity: int) -> int:
    """Open a link by its id and return a descriptor. Raises FileNotFoundError if it is gone."""
    return _bpf(_LINK_GET_FD_BY_ID, struct.pack("=III", identity, 0, 0))


def prog_by_id(identity: int) -> int:
    """Open a program by its id and return a descriptor. Raises FileNotFoundError if it is gone."""
    return _bpf(_PROG_GET_FD_BY_ID, struct.pack("=III", identity, 0, 0))


def prog_attach(prog_fd: int, map_fd: int, attach_type: AttachType) -> None:
    """Attach a program to a SOCKMAP or SOCKHASH, for as long as the map lives: sockets put in later are under it."""
    _bpf(_PROG_ATTACH, struct.pack("=IIII", map_fd, prog_fd, attach_type, 0))


# -- queries ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MapInfo:
    """Layout of a map, from ``struct bpf_map_info``."""

    kind: int
    id: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    name: str


@dataclass(frozen=True, slots=True)
class ProgInfo:
    """Identity of a program, from ``struct bpf_prog_info``.

    ``tag`` is the kernel's hash of its instructions, ``verified_insns`` how many the verifier walked through (of a
    million at most; 0 before Linux 5.16).
    """

    kind: int
    id: int
    tag: str
    name: str
    verified_insns: int


@dataclass(frozen=True, slots=True)
class LinkInfo:
    """Identity of a link, from ``struct bpf_link_info``. ``target`` is what it is attached to, 0 once it is detached: a
    cgroup's id, or a network namespace's inode; ``ifindex`` is that of an XDP link."""

    kind: int
    id: int
    prog_id: int
    target: int

    @property
    def ifindex(self) -> int:
        return self.target


_LINK_CGROUP: Final = 3  # enum bpf_link_type


def _info(fd: int, size: int) -> bytes:
    info = ctypes.create_string_buffer(size)
    _bpf(_OBJ_GET_INFO, struct.pack("=IIQ", fd, size, _address(info)))
    return info.raw


def _text(raw: bytes) -> str:
    return raw.partition(b"\0")[0].decode(errors="replace")


def map_info(fd: int) -> MapInfo:
    """Query a map's layout."""
    raw = _info(fd, 80)
    kind, identity, key, value, entries, flags = struct.unpack_from("=IIIIII", raw)
    return MapInfo(kind, identity, key, value, entries, flags, _text(raw[24:40]))


def prog_info(fd: int) -> ProgInfo:
    """Query a program's identity."""
    raw = _info(fd, 224)
    kind, identity, tag = struct.unpack_from("=II8s", raw)
    return ProgInfo(kind, identity, tag.hex(), _text(raw[64:80]), int.from_bytes(raw[216:220], sys.byteorder))


def prog_map_ids(fd: int, most: int = 64) -> list[int]:
    """Return the ids of the maps that a program uses, ``most`` of them at most."""
    ids = ctypes.create_string_buffer(4 * most)
    info = ctypes.create_string_buffer(224)
    struct.pack_into("=IQ", info, 52, most, _address(ids))  # nr_map_ids, map_ids
    _bpf(_OBJ_GET_INFO, struct.pack("=IIQ", fd, len(info), _address(info)))
    (count,) = struct.unpack_from("=I", info, 52)
    return list(struct.unpack_from(f"={min(count, most)}I", ids))


def link_info(fd: int) -> LinkInfo:
    """Query a link's identity."""
    raw = _info(fd, 64)
    kind, identity, program = struct.unpack_from("=III", raw)
    target = struct.unpack_from("=Q" if kind == _LINK_CGROUP else "=I", raw, 16)[0]
    return LinkInfo(kind, identity, program, target)


def effective_programs(cgroup_fd: int, attach_type: AttachType) -> frozenset[int]:
    """Return the ids of the programs that run for a cgroup: its own, and those of the ones above it."""
    ids = (ctypes.c_uint32 * _MOST_PROGRAMS)()
    attr = ctypes.create_string_buffer(
        struct.pack("=IIIIQI", cgroup_fd, attach_type, _QUERY_EFFECTIVE, 0, ctypes.addressof(ids), len(ids)), _ATTR_SIZE
    )
    _bpf_inout(_PROG_QUERY, attr)
    return frozenset(ids[: struct.unpack_from("=I", attr.raw, 24)[0]])


def prog_test_run(
    prog_fd: int, data: bytes = b"", *, context: bytes = b"", repeat: int = 1, output: int = 0
) -> tuple[int, int, bytes, bytes]:
    """Run a program on ``data`` (a frame) or a ``context`` without any network.

    Returns (return value, mean nanoseconds a run, output data up to ``output`` bytes, output context). See the
    kernel's ``Documentation/bpf/bpf_prog_run.rst``.
    """
    data_in = _buffer(data)
    data_out = ctypes.create_string_buffer(max(output, 1))
    context_in = _buffer(context)
    context_out = ctypes.create_string_buffer(max(len(context), 1))
    attr = ctypes.create_string_buffer(
        struct.pack(
            "=IIIIQQIIIIQQIII",
            prog_fd,
            0,
            len(data),
            output,
            _address(data_in) if data else 0,
            _address(data_out) if output else 0,
            repeat,
            0,
            len(context),
            len(context),
            _address(context_in) if context else 0,
            _address(context_out) if context else 0,
            0,
            0,
            0,
        ),
        _ATTR_SIZE,
    )
    _bpf_inout(_PROG_TEST_RUN, attr)
    retval = struct.unpack_from("=I", attr.raw, 4)[0]
    size_out = struct.unpack_from("=I", attr.raw, 12)[0]
    duration = struct.unpack_from("=I", attr.raw, 36)[0]
    return retval, duration, data_out.raw[: min(size_out, output)], context_out.raw[: len(context)]
