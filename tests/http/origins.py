"""Origins of other people: an aiohttp application, and nginx in front of it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from ..tls.pki import Leaf
from .conftest import free_ports
from .peers import spawn

__all__ = ["Application", "Nginx", "nginx", "python_origin"]

BIG = bytes(range(256)) * 8192  # 2 MiB
BIG_SHA256 = hashlib.sha256(BIG).hexdigest()

PAGE = """<!doctype html><title>test</title>
<link rel=stylesheet href=/style.css><script src=/script.js></script><img src=/image.svg id=image>
<a id=download href=/download download=big.bin>download</a>
<script>
  const report = (name, value) => fetch("/report?" + new URLSearchParams({name, value}), {method: "POST"});
  addEventListener("load", async () => {
    await report("style", getComputedStyle(document.body).color);
    await report("script", window.loaded);
    await report("image", String(document.getElementById("image").naturalWidth));
    const big = await (await fetch("/download")).arrayBuffer();
    await report("fetch", String(big.byteLength));
    const echo = await fetch("/echo", {method: "POST", body: "x".repeat(300000)});
    await report("echo", String((await echo.text()).length));
    const socket = new WebSocket(location.origin.replace("http", "ws") + "/ws");
    socket.onopen = () => socket.send("hello");
    socket.onmessage = async event => { await report("websocket", event.data); socket.close(); };
    socket.onerror = () => report("websocket", "error");
  });
</script>"""


@dataclass
class Application:
    """A running aiohttp application and what was reported to it."""

    port: int
    reports: dict[str, str]
    seen: list[str]


@contextlib.asynccontextmanager
async def python_origin(tls: ssl.SSLContext | None = None) -> AsyncIterator[Application]:
    """Serve pages, echoes, a download and a WebSocket with aiohttp."""
    application = Application(0, {}, [])

    async def hello(request: web.Request) -> web.StreamResponse:
        application.seen.append(f"{request.method} {request.path_qs} {request.headers.get('Via')}")
        return web.Response(text=f"hello {request.method} {request.path_qs}")

    async def echo(request: web.Request) -> web.StreamResponse:
        # nginx, for one, forwards no more of a request once its response has begun: all of it is read first.
        return web.Response(body=await request.read())

    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        async for chunk in request.content.iter_any():
            await response.write(chunk)
        return response

    async def download(request: web.Request) -> web.StreamResponse:
        return web.Response(body=BIG, headers={"Content-Disposition": "attachment; filename=big.bin"})

    async def socket(request: web.Request) -> web.StreamResponse:
        connection = web.WebSocketResponse()
        await connection.prepare(request)
        async for message in connection:
            await connection.send_str(f"echo {message.data}")
        return connection

    async def report(request: web.Request) -> web.StreamResponse:
        application.reports[request.query["name"]] = request.query["value"]
        return web.Response()

    def static(text: str, kind: str) -> object:
        async def serve(request: web.Request) -> web.StreamResponse:
            return web.Response(text=text, content_type=kind)

        return serve

    app = web.Application(client_max_size=2**30)
    app.router.add_route("*", "/hello", hello)
    app.router.add_post("/echo", echo)
    app.router.add_post("/stream", stream)
    app.router.add_get("/download", download)
    app.router.add_get("/ws", socket)
    app.router.add_post("/report", report)
    app.router.add_get("/page", static(PAGE, "text/html"))
    app.router.add_get("/style.css", static("body { color: rgb(1, 2, 3) }", "text/css"))
    app.router.add_get("/script.js", static("window.loaded = 'yes'", "text/javascript"))
    svg = '<svg xmlns="http://www.w3.org/2000/svg" width="17" height="17"/>'
    app.router.add_get("/image.svg", static(svg, "image/svg+xml"))
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
        await site.start()
        application.port = int(runner.addresses[0][1])
        yield application
    finally:
        await runner.cleanup()


@dataclass
class Nginx:
    """A running nginx: its plain and its TLS (HTTP/2 and 1.1) port."""

    port: int
    tls_port: int


@contextlib.asynccontextmanager
async def nginx(directory: Path, leaf: Leaf, application: Application) -> AsyncIterator[Nginx]:
    """Run nginx: ``/big`` is a file of :data:`BIG`, all else is the application's."""
    root = directory / "root"
    root.mkdir()
    (root / "big").write_bytes(BIG)
    plain, secure = free_ports(2)
    config = directory / "nginx.conf"
    user = "user root;" if os.geteuid() == 0 else ""
    config.write_text(
        f"""
        daemon off; {user} pid {directory}/pid; error_log stderr warn; worker_processes 1;
        events {{ worker_connections 256; }}
        http {{
            access_log off;
            client_max_body_size 0;
            client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy;
            fastcgi_temp_path {directory}/f; uwsgi_temp_path {directory}/u; scgi_temp_path {directory}/s;
            server {{
                listen 127.0.0.1:{plain};
                listen 127.0.0.1:{secure} ssl http2;
                ssl_certificate {leaf.chain}; ssl_certificate_key {leaf.key};
                location = /big {{ root {root}; }}
                location / {{
                    proxy_pass http://127.0.0.1:{application.port};
                    proxy_http_version 1.1;
                    proxy_request_buffering off;
                    proxy_set_header Host $http_host;
                    proxy_set_header Upgrade $http_upgrade;
                    proxy_set_header Connection $http_connection;
                }}
            }}
        }}
        """
    )
    async with spawn("nginx", "-p", directory, "-c", config, ports=[plain, secure], log=directory / "nginx.log"):
        yield Nginx(plain, secure)
