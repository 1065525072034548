"""The policy for sources, asked again where the client's true address is known.

The kernel has judged the address that the connection came from. Behind a load balancer that is the balancer's; put
this layer inside the one that reads the PROXY header, and the same rules judge the client. Without privileges it is
the only place where they are applied.
"""

from __future__ import annotations

from ..core.client import client_address
from ..core.errors import PolicyDenied
from ..core.service import Output, Service
from ..core.source_policy import SourcePolicy, SourceVerdict
from ..core.stream import Stream

__all__ = ["PolicyLayer", "SourcePolicy", "SourceVerdict"]


class PolicyLayer:
    """Refuses streams whose client the policy does not allow. Raises :class:`PolicyDenied` naming the rule.

    Clients of a Unix socket have no address and pass: its file mode is their policy.
    """

    accepts = Stream

    def __init__(self, policy: SourcePolicy) -> None:
        self._policy = policy

    def __call__(self, inner: Service[Stream, Output], /) -> Service[Stream, Output]:
        async def serve(stream: Stream, /) -> Output:
            client, local = client_address(stream), stream.local
            if client is not None:
                verdict = await self._policy.verdict(client.ip, 0 if local is None else local.port)
                if not verdict.allowed:
                    raise PolicyDenied(f"policy refuses {client.ip} (rule {verdict.rule})", rule=verdict.rule)
            return await inner(stream)

        return serve
