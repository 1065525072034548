"""The README's commands are run as they stand there."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.lab import Lab, wait_for

pytestmark = [pytest.mark.root, pytest.mark.ebpf]

ROOT = Path(__file__).resolve().parent.parent


def _commands() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return [line for block in re.findall(r"```sh\n(.*?)```", text, flags=re.S) for line in block.splitlines()]


def test_readme_shows_the_example_as_it_is() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert blocks[0] == (ROOT / "examples" / "newcomer.py").read_text(encoding="utf-8")


def test_readme_guards_what_it_says(lab: Lab, instance: str) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```bash\n(.*?)```", text, flags=re.S)
    guard, shut = block.splitlines()
    environment = {**os.environ, "RAMA_EBPF_INSTANCE": instance}
    host = lab.host("readme")
    running = host.popen(
        "sh", "-c", f"exec {guard.removesuffix(' &')}", cwd=ROOT, env=environment, stdout=subprocess.PIPE
    )
    assert running.stdout is not None
    assert running.stdout.readline().startswith("guarding port 22 ")
    subprocess.run(host.command("sh", "-c", shut), cwd=ROOT, env=environment, check=True, timeout=60)
    running.terminate()
    assert running.wait(60) == 0


def test_readme_commands_do_what_they_say(lab: Lab, instance: str, tmp_path: Path) -> None:
    host = lab.host("readme")
    environment = {**os.environ, "RAMA_EBPF_INSTANCE": instance}
    (tmp_path / "index.html").write_text("the page", encoding="utf-8")
    web = ["python3", "-m", "http.server", "8080", "--bind", "127.0.0.1", "--directory", str(tmp_path)]
    host.popen(*web, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    serve, *commands = _commands()
    assert serve.startswith("make run ")
    log = (tmp_path / "log").open("w+", encoding="utf-8")
    with log, contextlib.ExitStack() as cleanup:
        # `make run` execs the server only in its last step: it is ended through its instance.
        stop = [".venv/bin/rama-ebpf", "unload", "--stop"]
        cleanup.callback(subprocess.run, stop, cwd=ROOT, env=environment, check=True)
        server = host.popen("sh", "-c", f"exec {serve}", stderr=log, env=environment, cwd=ROOT)

        def ready() -> bool:
            assert server.poll() is None, (tmp_path / "log").read_text(encoding="utf-8")
            return "ready after" in (tmp_path / "log").read_text(encoding="utf-8")

        wait_for(ready, timeout=90, what="make run")  # the setup of the tests has installed all
        outputs = {}
        for command in commands:
            result = subprocess.run(
                host.command("sh", "-c", command), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
            )
            expected = 1 if " test " in command else 0  # `test` says no for a blocked client
            assert result.returncode == expected, (command, result)
            outputs[command.split()[1] if "rama-ebpf" in command else "curl"] = result.stdout
        assert outputs["curl"] == "the page"
        assert outputs["block"] == "blocked 127.0.0.9/32 for 1h\n"
        assert "too curious" in outputs["list"]
        assert "drop" in outputs["test"]
        assert outputs["unblock"] == "unblocked 127.0.0.9\n"
