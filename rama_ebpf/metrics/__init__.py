"""Metrics in Prometheus' terms: what is counted (``definitions``), how workers share it (``directory``).
``control/exposition`` serves it. No label ever holds a user or an address. ``docs/metrics.md`` lists them all.

Nothing is imported here: prometheus-client decides on import how values are kept, see ``definitions``.
"""
