"""Layers: each bounds, watches or changes what passes to the service inside. ``docs/layers.md`` has a line on each."""

from ..core.chain import ProxyChainLayer
from .access_log import AccessLogLayer, AccessRecord
from .auth import AuthLayer, PasswordFile, StaticUsers
from .breaker import CircuitBreakerLayer, CircuitOpen
from .catch import CatchLayer
from .concurrency import ConcurrencyExceeded, ConcurrencyLimitLayer
from .count import ByteCounter, ByteCountLayer
from .hijack import FilterLayer, HijackLayer
from .mapping import AddExtensionLayer, MapInputLayer, MapOutputLayer
from .metrics import MetricsLayer
from .password_table import PasswordTable
from .policy import PolicyLayer
from .rate import RateExceeded, RateLimitLayer
from .retry import RetryBudget, RetryLayer
from .source import by_source
from .strikes import StrikeLayer, strike
from .throttle import Bandwidth, ThrottleLayer, UserThrottleLayer
from .timeout import TimeoutLayer
from .trace import TraceLayer
from .username import DashedUsername, UsernameOptionsLayer

__all__ = [
    "AccessLogLayer",
    "AccessRecord",
    "AddExtensionLayer",
    "AuthLayer",
    "Bandwidth",
    "ByteCountLayer",
    "ByteCounter",
    "CatchLayer",
    "CircuitBreakerLayer",
    "CircuitOpen",
    "ConcurrencyExceeded",
    "ConcurrencyLimitLayer",
    "DashedUsername",
    "FilterLayer",
    "HijackLayer",
    "MapInputLayer",
    "MapOutputLayer",
    "MetricsLayer",
    "PasswordFile",
    "PasswordTable",
    "PolicyLayer",
    "ProxyChainLayer",
    "RateExceeded",
    "RateLimitLayer",
    "RetryBudget",
    "RetryLayer",
    "StaticUsers",
    "StrikeLayer",
    "ThrottleLayer",
    "TimeoutLayer",
    "TraceLayer",
    "UserThrottleLayer",
    "UsernameOptionsLayer",
    "by_source",
    "strike",
]
