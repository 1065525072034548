"""HTTP/1.1 (RFC 9112): one strict reader, one writer, and the two sides of a connection."""
