"""``init``: a configuration to begin with, for one of five jobs, checked before it is said to be there."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Final

from .config import examine
from .output import OK, print_json

__all__ = ["JOBS", "register"]

JOBS: Final = {
    "socks5": "a public SOCKS5 proxy for users with passwords",
    "egress": "the way out of a company's network, by HTTP and SOCKS",
    "reverse": "HTTPS and HTTP/2 in front of web servers",
    "sni": "TLS to the backend whose name the client asks for",
    "shield": "rules before accept in front of a service of this host",
}
"""Each has its file in the directory ``jobs``."""

_Write = Callable[[Path, bytes, int], None]
_USERS: Final = "# name:hash lines, made by: rama-ebpf passwd NAME >> users.txt\n"


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser], shared: argparse.ArgumentParser) -> None:
    """Add the command."""
    text = "write a commented configuration to begin with, and check it"
    parser = commands.add_parser(
        "init",
        parents=[shared],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        help=text,
        description=text,
        epilog="\n".join(
            [
                "jobs:",
                *(f"  {job:8} {what}" for job, what in JOBS.items()),
                "",
                "example: rama-ebpf init socks5 && rama-ebpf run --config rama.toml",
            ]
        ),
    )
    parser.add_argument("job", choices=tuple(JOBS), metavar="JOB", help=f"what for: {', '.join(JOBS)}")
    parser.add_argument(
        "file", nargs="?", type=Path, default="rama.toml", help="must not be there yet (default: %(default)s)"
    )
    parser.set_defaults(main=_init)


def _init(args: argparse.Namespace) -> int:
    file: Path = args.file
    with contextlib.ExitStack() as undo:  # what is not good is not left behind
        made: list[Path] = []

        def write(path: Path, data: bytes, mode: int) -> None:
            _create(path, data, mode, undo)
            made.append(path)

        text = resources.files(__package__).joinpath("jobs", f"{args.job}.toml").read_text("utf-8")
        try:
            write(file, text.replace("rama.toml", file.name).encode(), 0o644)
        except FileExistsError as error:
            raise ValueError(f"{file} exists: name another file, or remove it if nothing needs it") from error
        kept = _beside(args.job, file.parent, write)
        config, warnings = examine(file, args.instance)
        undo.pop_all()
    if args.json:
        names = {"file": str(file), "made": list(map(str, made)), "kept": list(map(str, kept))}
        print_json({"job": args.job, **names, "warnings": warnings})
        return OK
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    listeners = ", ".join(f"{name} on {listener}" for name, listener in config.listeners.items())
    print(f"made {', '.join(map(str, made))}: good: {listeners}")
    if kept:
        print(f"kept {', '.join(map(str, kept))}")
    if made[1:] and args.job == "socks5":
        print(f"next: rama-ebpf passwd NAME >> {made[1]}: nobody gets in before there is a user")
    print(f"{'then' if made[1:] else 'next'}: read {file}, and rama-ebpf run --config {file}")
    return OK


def _create(path: Path, data: bytes, mode: int, undo: contextlib.ExitStack) -> None:
    """Make a file that is not there, also not as a link. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    undo.callback(path.unlink, missing_ok=True)
    with os.fdopen(fd, "wb") as out:
        out.write(data)


def _beside(job: str, directory: Path, write: _Write) -> list[Path]:
    """Make the files that the configuration of a job names, if they are not there; return those that are."""
    if job == "socks5":
        users = directory / "users.txt"
        if users.exists():
            return [users]
        write(users, _USERS.encode(), 0o600)
    elif job == "reverse":
        chain, key = directory / "server.crt", directory / "server.key"
        there = [path for path in (chain, key) if path.exists()]
        if len(there) == 1:
            raise ValueError(f"{there[0]} is there without its other half: bring both {chain.name} and {key.name}")
        if there:
            return there
        certificate, private = _certificate()
        write(chain, certificate, 0o644)
        write(key, private, 0o600)
    return []


def _certificate() -> tuple[bytes, bytes]:
    """A certificate for localhost by an authority that nobody has, and its key: to try with."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    from ..services.tls.ca import CertificateAuthority, Leaf

    key = ec.generate_private_key(ec.SECP256R1())
    authority = CertificateAuthority.create("rama-ebpf init: not to be trusted")
    certificate = authority.issue(Leaf.of_name("localhost"), key.public_key())
    return certificate.public_bytes(serialization.Encoding.PEM), key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
