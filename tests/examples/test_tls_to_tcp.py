from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import RunExample


def test_tls_is_terminated_in_front_of_a_plain_service(
    run_example: RunExample, certificate: Path, web: str, curl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACKEND", "127.0.0.1:8080")
    run_example("tls_to_tcp:proxy", "--allow-egress", "127.0.0.1", listen="127.0.0.1:8443")
    here = ("--cacert", str(certificate), "--resolve", "proxy.example:8443:127.0.0.1")
    assert curl(*here, "https://proxy.example:8443/").stdout == web
    refused = curl("--resolve", "proxy.example:8443:127.0.0.1", "https://proxy.example:8443/")
    assert refused.returncode == 60  # curl: the peer's certificate cannot be verified
