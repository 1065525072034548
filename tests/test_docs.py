"""What the documents say about the code is compared with the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import rama_ebpf.layers
from rama_ebpf.config.layers import LAYERS
from rama_ebpf.config.reference import with_reference
from rama_ebpf.metrics import definitions

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")])
SOURCES = sorted(
    path
    for folder in ("rama_ebpf", "bpf", "bench", "examples", "integration", "vagrant")
    for path in (ROOT / folder).rglob("*.*")
    if path.suffix in (".py", ".c", ".h", ".toml", ".md", ".sh")
)


@pytest.mark.parametrize("document", ["docs/config.md", "docs/layers.md"])
def test_configuration_reference_is_what_the_model_says(document: str) -> None:
    text = (ROOT / document).read_text()
    assert text == with_reference(text), f"run: .venv/bin/python -m rama_ebpf.config.reference {document}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text())
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (document.parent / target).exists()] == []


def test_documents_that_sources_name_exist() -> None:
    named = {name: path for path in SOURCES for name in re.findall(r"\bdocs/[a-z-]+\.md\b", path.read_text())}
    assert {name: path for name, path in named.items() if not (ROOT / name).exists()} == {}


def test_each_layer_has_its_line() -> None:
    text = (ROOT / "docs/layers.md").read_text()
    layers = [name for name in rama_ebpf.layers.__all__ if name.endswith("Layer")]
    assert [name for name in layers if f"`{name}" not in text] == []
    assert [name for name in LAYERS if name not in ("custom",) and f"`{name}`" not in text] == []


def test_each_metric_has_its_line() -> None:
    text = (ROOT / "docs/metrics.md").read_text()
    for attribute in definitions.__all__:
        metric = getattr(definitions, attribute)
        names = [family.name + ("_total" if family.type == "counter" else "") for family in metric.collect()]
        assert names
        assert [name for name in names if f"`{name}`" not in text] == []
