"""What the documents say about the code is compared with the code."""

from __future__ import annotations

from pathlib import Path

import rama_ebpf.layers
from rama_ebpf.config.layers import LAYERS
from rama_ebpf.config.reference import with_reference
from rama_ebpf.metrics import definitions

ROOT = Path(__file__).parent.parent


def test_configuration_reference_is_what_the_model_says() -> None:
    text = (ROOT / "docs/config.md").read_text()
    assert text == with_reference(text), "run: .venv/bin/python -m rama_ebpf.config.reference docs/config.md"


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
