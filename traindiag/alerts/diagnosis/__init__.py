"""Signals joined into a named failure."""
