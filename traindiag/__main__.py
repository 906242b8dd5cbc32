"""``python -m traindiag``, the same as ``traindiag``."""

from traindiag.cli import app

app(prog_name="traindiag")
