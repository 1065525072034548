"""Connections by the way that routes choose (:mod:`rama_ebpf.routes`): dialling, failing over, explaining."""

from __future__ import annotations

from .connector import RouteConnector
from .datagrams import RoutedSocks
from .question import protocol_of, question_of
from .urls import hidden_url, parse_parent

__all__ = ["RouteConnector", "RoutedSocks", "hidden_url", "parse_parent", "protocol_of", "question_of"]
