"""From verdicts to what a person is told."""
