"""The gate from Python."""
