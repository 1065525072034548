"""A server of this tree for a bench, by the command, with a configuration file."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

__all__ = ["COMMAND", "served"]

COMMAND: Final = Path(sys.executable).with_name("rama-ebpf")
_END_SECONDS: Final = 5.0


@contextlib.contextmanager
def served(directory: Path, config: str) -> Iterator[str]:
    """Serve ``config``, the text of a rama.toml, in a directory, until the block ends; yields the instance's name.

    Raises RuntimeError, with its log, where it does not start.
    """
    file, log, instance = directory / "rama.toml", directory / "log", f"bench-{os.getpid()}"
    file.write_text(config)
    with log.open("w") as out:
        process = subprocess.Popen([COMMAND, "run", "--instance", instance, "--config", file], stderr=out)
        try:
            while "ready after" not in log.read_text():
                if process.poll() is not None:
                    raise RuntimeError(log.read_text())
                time.sleep(0.1)
            yield instance
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_SECONDS)
            process.terminate()  # a second signal cuts what is left
            process.wait()
            command = [COMMAND, "unload", "--purge", "--instance", instance]
            subprocess.run(command, check=False, stdout=subprocess.DEVNULL)
