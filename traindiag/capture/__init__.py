"""How numbers leave a live model."""
