"""The proxy among containers. See :mod:`.daemon` for what is started and how nothing of it stays."""
