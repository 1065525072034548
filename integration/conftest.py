"""The fixtures of the suites are the end-to-end scenarios' too."""

from tests.conftest import _no_stale_labs, instance, lab, start_proxy

__all__ = ["_no_stale_labs", "instance", "lab", "start_proxy"]
