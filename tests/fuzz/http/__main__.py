"""Coverage-guided fuzzing of HTTP and the PROXY protocol with Atheris (libFuzzer): the extra ``fuzz``.

``python -m tests.fuzz.http requests -runs=1000000 -max_len=600``. New inputs that reach new code are added to the
target's corpus beside this file, or to the first directory that is named; an input that breaks a guarantee is written
to the working directory as ``crash-…``. All libFuzzer options pass through. ``python -m tests.fuzz.http.seeds``
adds inputs to begin with.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

from ..corpus import fuzz

# Not h11: it is a judge here, and instrumented it takes most of the time.
with atheris.instrument_imports(include=["rama_ebpf.services.http", "rama_ebpf.services.proxy_protocol"]):
    from .targets import TARGETS


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: python -m tests.fuzz.http {{{'|'.join(TARGETS)}}} [libFuzzer options]")
    name = sys.argv[1]
    words = Path(__file__).with_name("words.dict")
    again = f"{sys.executable} -m tests.fuzz.http {name}"  # how libFuzzer starts it anew, for -merge=1

    def run(directory: Path) -> None:
        atheris.Setup([again, f"-dict={words}", *sys.argv[2:], str(directory)], TARGETS[name])
        atheris.Fuzz()

    fuzz("tests.fuzz.http", Path(__file__).with_name(f"{name}.corpus"), run)


if __name__ == "__main__":
    main()
