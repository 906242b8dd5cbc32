"""A small real training run that goes wrong on purpose, and the story of how early it was told."""
