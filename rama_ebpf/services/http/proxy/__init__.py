"""Proxies: forward and reverse, their duties, and the connections to upstreams that they keep."""
