"""What goes wrong with a gate. Each text names the remedy."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from ..control.enforced import InForce
from ..control.reach import NotLoaded
from ..control.socket import ControlUnavailable, RequestFailed
from ..core.errors import RamaError
from ..kernel.btf import BtfUnavailable
from ..kernel.compile import CompileError
from ..policy.rule import PolicyError

__all__ = ["GateError", "GateFailed", "GateRefused", "GateUnavailable", "GuardRefused", "told"]


class GateError(RamaError):
    """Base of what a gate raises, besides TypeError and ValueError for wrong arguments."""

    kind = "gate"


class GateUnavailable(GateError):
    """The instance is not loaded, or its server does not answer (any more)."""


class GateRefused(GateError, ValueError):
    """What was asked for cannot be: nothing is changed."""


class GuardRefused(GateRefused):
    """A listener is not put under a guard."""


class GateFailed(GateError):
    """The kernel, the disk or the server could not do it, or not all of it; the text says what is in force."""


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Raise what is raised within as one of these."""
    try:
        yield
    except GateError:
        raise
    except (NotLoaded, ControlUnavailable) as error:
        raise GateUnavailable(str(error)) from error
    except PolicyError as error:
        raise GateRefused(str(error)) from error
    except (RequestFailed, InForce, CompileError, BtfUnavailable) as error:
        raise GateFailed(str(error)) from error
    except OSError as error:
        hint = ": run it as root" if error.errno in (errno.EPERM, errno.EACCES) else ""
        raise GateFailed(f"{error}{hint}") from error
