"""Names to addresses: a resolver of our own that waits without threads, and the system's."""

from .errors import ResolveError, ResolveTimeout
from .lookup import Lookup
from .resolver import DnsResolver
from .system import SystemLookups, SystemResolver

__all__ = ["DnsResolver", "Lookup", "ResolveError", "ResolveTimeout", "SystemLookups", "SystemResolver"]
