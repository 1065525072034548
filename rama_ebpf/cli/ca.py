"""``ca create``: make the authority with which TLS is intercepted."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..services.tls.ca import CertificateAuthority
from .output import OK, print_json

__all__ = ["register"]

_MAX_DAYS = 36500


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser], shared: argparse.ArgumentParser) -> None:
    """Add the command group."""
    text = "the certificate authority for intercepting TLS"
    group = commands.add_parser("ca", help=text, description=text)
    actions = group.add_subparsers(dest="action", required=True, metavar="ACTION")
    text = "make an authority: its certificate for the clients to trust, its key (0600) for the proxy alone"
    create = actions.add_parser("create", parents=[shared], help=text, description=text)
    create.add_argument("--cert", type=Path, default=Path("ca.pem"), metavar="FILE", help="default: %(default)s")
    create.add_argument("--key", type=Path, default=Path("ca.key"), metavar="FILE", help="default: %(default)s")
    create.add_argument("--name", default="rama-ebpf CA", metavar="TEXT", help="common name (default: %(default)s)")
    create.add_argument("--days", type=_days, default=3650, metavar="N", help="default: %(default)s")
    create.set_defaults(main=_create)


def _days(text: str) -> int:
    value = int(text)
    if not 1 <= value <= _MAX_DAYS:
        raise argparse.ArgumentTypeError(f"{text!r}: use 1 to {_MAX_DAYS} days")
    return value


def _create(args: argparse.Namespace) -> int:
    authority = CertificateAuthority.create(args.name, days=args.days)
    try:
        authority.save(args.cert, args.key)
    except FileExistsError as error:
        raise ValueError(f"{error.filename} exists: name other files, or remove it if no client trusts it") from error
    until = authority.certificate.not_valid_after_utc
    if args.json:
        print_json(
            {
                "certificate": str(args.cert),
                "key": str(args.key),
                "sha256": authority.fingerprint,
                "not_after": until.isoformat(),
            }
        )
    else:
        print(f"certificate {args.cert}, for the clients to trust, until {until:%Y-%m-%d}")
        print(f"key         {args.key}, for the proxy alone: who has it can be any server to these clients")
        print(f"SHA-256     {authority.fingerprint}")
    return OK
