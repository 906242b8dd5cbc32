"""The order of one step."""
