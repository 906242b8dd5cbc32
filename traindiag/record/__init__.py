"""Names, numbers, history and log: plain data that needs no torch."""
