"""The way in for operators: the control API and the Unix socket that carries it."""
