"""HTTP/2 (RFC 9113): the ``h2`` library behind a guard, and the two sides of a connection."""
