"""Drain: telling what is live that the server would like it to end."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Drain"]


class Drain:
    """One server's wish to stop; each of its connections carries it among its extensions.

    A protocol that can end early without harm (an idle keep-alive connection, HTTP/2 with GOAWAY) watches it. Others
    need not: at the drain's deadline the server cuts whatever is left.
    """

    def __init__(self) -> None:
        self.started = False
        self._watchers: dict[object, Callable[[], None]] = {}

    def watch(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call ``callback`` when the drain starts, at once if it has; return a function that ends the watch.

        The callback must not raise.
        """
        key = object()
        if self.started:
            callback()
        else:
            self._watchers[key] = callback
        return lambda: self._watchers.pop(key, None) and None

    def start(self) -> None:
        """Tell all watchers, once."""
        self.started = True
        watchers, self._watchers = self._watchers, {}
        for callback in watchers.values():
            callback()
