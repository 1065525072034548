"""Tunnels that a worker goes on with, which another one had begun: they count, are shown and logged as if they were its
own."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from ..core.adoption import AdoptedStream, adopts_of
from ..core.at_once import Entered
from ..core.lifecycle import Lifecycle, Stage
from ..relay import tunnels
from ..relay.wire import WireTunnel
from ..relay.wire_story import Story

__all__ = ["Adoption"]

log = logging.getLogger(__name__)


class Adoption:
    """Goes on with tunnels in the layers of ``services``, by the name of their listener."""

    def __init__(self, services: Mapping[str, object]) -> None:
        self._services = services

    def __call__(self, tunnel: WireTunnel, story: Story) -> None:
        """Account for a tunnel until it ends."""
        stream = AdoptedStream(story.source, story.listened, story.began)
        story.tell(stream.extensions)
        before = tunnel.moved
        stream.bytes_received, stream.bytes_sent = story.received + before[0], story.sent + before[1]
        Lifecycle.of(stream.extensions).reached(Stage.TUNNEL)
        entered: list[Entered] = []
        for adopt in adopts_of(self._services.get(story.listener)):
            entered.append(adopt(stream))
        tunnels.add(tunnel)

        def ended(_: object) -> None:
            report = tunnel.report()
            stream.bytes_received, stream.bytes_sent = (
                story.received + report.to_upstream,
                story.sent + report.to_client,
            )
            stream.extensions.add(report)
            tunnels.remove(tunnel, report)
            for one in reversed(entered):
                one.leave(None)

        tunnel.done.add_done_callback(ended)
        log.info("goes on with a tunnel of %s that is %.0f s old", story.client, time.monotonic() - story.began)
