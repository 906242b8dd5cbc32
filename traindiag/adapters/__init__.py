"""Hooks of training frameworks, mapped onto the engine."""
