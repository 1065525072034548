"""A browser through every mode of the proxy: a page with sub-resources, uploads, a WebSocket and a download."""

from __future__ import annotations

from pathlib import Path

from .browser import browser
from .conftest import eventually
from .origins import BIG
from .test_clients import Setup
from .test_clients import setup as setup


async def test_page_with_everything_works(setup: Setup, tmp_path: Path) -> None:
    downloads = tmp_path / "downloads"
    async with browser(tmp_path, setup.proxy, None if setup.mode == "forward" else setup.ca) as chromium:
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
