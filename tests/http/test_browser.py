"""A browser through every mode of the proxy: a page with sub-resources, uploads, a WebSocket and a download."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ..lab import wait_for
from .browser import StartBrowser
from .browser import start_browser as start_browser
from .conftest import eventually
from .origins import BIG
from .test_clients import Setup
from .test_clients import setup as setup


async def test_page_with_everything_works(setup: Setup, start_browser: StartBrowser, tmp_path: Path) -> None:
    downloads = tmp_path / "downloads"
    async with start_browser(tmp_path, setup.proxy, None if setup.mode == "forward" else setup.ca) as chromium:
        await chromium.call(
            "Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads), eventsEnabled=True
        )
        await chromium.open(f"{setup.url}/page")
        reports = setup.application.reports
        await eventually(lambda: "websocket" in reports)
        await chromium.call("Runtime.evaluate", expression="document.getElementById('download').click()")
        await chromium.event("Browser.downloadProgress", state="completed")
    assert reports == {
        "style": "rgb(1, 2, 3)",
        "script": "yes",
        "image": "17",
        "fetch": str(len(BIG)),
        "echo": "300000",
        "websocket": "echo hello",
    }
    assert (downloads / "big.bin").read_bytes() == BIG


HANGS = """
import asyncio
from pathlib import Path
import pytest
from tests.http.browser import start_browser

@pytest.mark.timeout(5)
async def test_that_hangs(start_browser):
    async with start_browser(Path("{directory}"), "http://127.0.0.1:9", None) as chromium:
        await chromium.open("about:blank")
        Path("{directory}/runs").touch()
        await asyncio.sleep(1000)
"""


def _processes_of(directory: Path) -> list[str]:
    shown = subprocess.run(["ps", "-ww", "-eo", "pid,args"], check=True, capture_output=True, text=True).stdout
    return [line for line in shown.splitlines() if "chrom" in line and f"{directory}/" in line]


@pytest.mark.parametrize("end", ["time-out", "kill -9"])
def test_browser_does_not_outlive_a_test_that_is_stopped(tmp_path: Path, end: str) -> None:
    directory = tmp_path / "browser"
    directory.mkdir()
    (tmp_path / "test_hangs.py").write_text(HANGS.format(directory=directory))
    root = Path(__file__).resolve().parent.parent.parent
    test = str(tmp_path / "test_hangs.py")
    command = [sys.executable, "-m", "pytest", "-c", "pyproject.toml", "--rootdir", ".", test]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        try:
            wait_for((directory / "runs").exists, timeout=30, what="the page")
            assert _processes_of(directory)
            if end == "kill -9":
                run.kill()
            output = run.communicate(timeout=60)[0]
            assert end == "kill -9" or "Failed: Timeout" in output, output
        finally:
            run.kill()
    wait_for(lambda: not _processes_of(directory), what="the end of the browser's processes")
