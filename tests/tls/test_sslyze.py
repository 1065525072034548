"""sslyze against the default listener: nothing outside Mozilla's "intermediate" profile, and no known hole."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from sslyze import (
    ScanCommand,
    ScanCommandsExtraArguments,
    Scanner,
    ServerNetworkLocation,
    ServerScanRequest,
    ServerScanStatusEnum,
)
from sslyze.mozilla_tls_profile.tls_config_checker import (
    SCAN_COMMANDS_NEEDED_BY_MOZILLA_CHECKER,
    MozillaTlsConfiguration,
    ServerNotCompliantWithTlsConfiguration,
    TlsConfigurationEnum,
    check_server_against_tls_configuration,
)
from sslyze.plugins.certificate_info.implementation import CertificateInfoExtraArgument

from rama_ebpf.core import Stream, stack
from rama_ebpf.services.tls import CertificateStore, KeyPair, ServerTls, TlsTerminateLayer

from .conftest import HOST, Serve
from .pki import Authority


async def swallow(stream: Stream) -> None:
    while await stream.read():
        pass


def scan(port: int, ca: Path) -> dict[str, str]:
    """Return what sslyze finds wrong, by its own names."""
    scanner = Scanner()
    scanner.queue_scans(
        [
            ServerScanRequest(
                server_location=ServerNetworkLocation(hostname="a.test", ip_address=HOST, port=port),
                scan_commands={*SCAN_COMMANDS_NEEDED_BY_MOZILLA_CHECKER, ScanCommand.TLS_1_3_EARLY_DATA},
                scan_commands_extra_arguments=ScanCommandsExtraArguments(
                    certificate_info=CertificateInfoExtraArgument(custom_ca_file=ca)
                ),
            )
        ]
    )
    (result,) = scanner.get_results()
    assert result.scan_status is ServerScanStatusEnum.COMPLETED
    found = result.scan_result
    assert found is not None
    issues: dict[str, str] = {}
    try:
        check_server_against_tls_configuration(
            result, MozillaTlsConfiguration.get(TlsConfigurationEnum.MOZILLA_INTERMEDIATE)
        )
    except ServerNotCompliantWithTlsConfiguration as error:
        issues |= error.issues
    renegotiation = found.session_renegotiation.result
    early_data = found.tls_1_3_early_data.result
    assert renegotiation is not None
    assert early_data is not None
    if renegotiation.is_vulnerable_to_client_renegotiation_dos:
        issues["renegotiation"] = "clients can make the server renegotiate"
    if early_data.supports_early_data:
        issues["early data"] = "replayable data is accepted"
    return issues


@pytest.mark.filterwarnings("ignore:Parsed a serial number")  # of a root in the trust stores that sslyze brings
async def test_sslyze_finds_nothing_wrong_with_the_default_listener(serve: Serve, authority: Authority) -> None:
    leaf = authority.issue("a.test", stem="sslyze")
    store = CertificateStore.of_files(ServerTls(), KeyPair(leaf.chain, leaf.key))
    running = serve(stack(TlsTerminateLayer(store), swallow))
    assert await asyncio.to_thread(scan, running.port, authority.certificate) == {}
