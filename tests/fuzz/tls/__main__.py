"""Coverage-guided fuzzing of the ClientHello parser with Atheris (libFuzzer): the extra ``fuzz``.

``python -m tests.fuzz.tls client_hello -runs=1000000``. New inputs that reach new code are added to the target's corpus
beside this file; an input that breaks a guarantee is written to the working directory as ``crash-…``. All libFuzzer
options pass through.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

from ..corpus import fuzz

with atheris.instrument_imports(include=["rama_ebpf.services.tls"]):
    from .targets import TARGETS


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: python -m tests.fuzz.tls {{{'|'.join(TARGETS)}}} [libFuzzer options]")
    name = sys.argv[1]

    def run(directory: Path) -> None:
        atheris.Setup([sys.argv[0], *sys.argv[2:], str(directory)], TARGETS[name])
        atheris.Fuzz()

    fuzz("tests.fuzz.tls", Path(__file__).with_name(f"{name}.corpus"), run)


if __name__ == "__main__":
    main()
