"""The configuration file: ``rama.toml`` read, checked with file and line, and turned into services.

``docs/config.md`` describes every setting; it is made from the model in this package.
"""

from __future__ import annotations

from .load import ConfigError, load_config
from .model import Config

__all__ = ["Config", "ConfigError", "load_config"]
