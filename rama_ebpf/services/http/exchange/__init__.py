"""What both versions of HTTP share in serving a request: the answer, its record, its tunnel, its time."""
