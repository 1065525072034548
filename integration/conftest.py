"""The fixtures of the suites are the end-to-end scenarios' too."""

from tests.conftest import (
    _nothing_is_left,
    _state_of_our_own,
    instance,
    lab,
    pytest_sessionstart,
    pytest_xdist_make_scheduler,
    shared_lab,
    start_proxy,
    start_shared,
)

__all__ = [
    "_nothing_is_left",
    "_state_of_our_own",
    "instance",
    "lab",
    "pytest_sessionstart",
    "pytest_xdist_make_scheduler",
    "shared_lab",
    "start_proxy",
    "start_shared",
]
