"""What is routed through this host and taken to our listeners: put with a revision, taken away with the last server."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..core.binding import Binding
from ..kernel.instance import Instance

__all__ = ["Diverter"]

log = logging.getLogger("rama_ebpf")


class Diverter:
    """The diversion of an instance, where a listener wants one. Its library takes a quarter of a second to import, so
    it is not touched before there is something to divert, or to take away."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self.bindings: tuple[Binding, ...] = ()
        """What is diverted now."""

    def put(self, bindings: Sequence[Binding]) -> None:
        """Divert these and nothing else. Not on an event loop. Raises OSError."""
        if bindings or self._instance.diversion.exists():
            from ..kernel.diversion import Diversion

            Diversion(self._instance).put(bindings)
        self.bindings = tuple(bindings)

    def close(self) -> None:
        """Divert nothing any more."""
        try:
            self.put(())
        except OSError as error:
            log.error("%s: rama-ebpf unload tries again", error)
