"""One monitor a family: what is measured, as states that ranks can join."""
