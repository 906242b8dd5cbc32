"""What TensorBoard imports at its start.

It loads this module unguarded, so an import that fails here would keep TensorBoard from starting at all. Nothing but
TensorBoard's own base class is imported before :meth:`Loader.load`, inside which faults cost the tab only.
"""

from __future__ import annotations

from argparse import Namespace

from tensorboard.plugins import base_plugin

SAMPLES = 1000
"""Samples of a signal that TensorBoard keeps in memory where the log can be read through it only; it keeps 10 to 100
by itself."""


class Loader(base_plugin.TBLoader):  # type: ignore[misc]
    """The entry point ``traindiag`` of the group ``tensorboard_plugins``."""

    def fix_flags(self, flags: Namespace) -> None:
        """Asks for more samples, unless the user says how many with ``--samples_per_plugin``."""
        samples = getattr(flags, "samples_per_plugin", None)
        if isinstance(samples, dict):
            samples.setdefault("traindiag", SAMPLES)

    def load(self, context: base_plugin.TBContext) -> base_plugin.TBPlugin | None:
        """Makes the tab; None where a package is missing or broken, and TensorBoard goes on without it."""
        try:
            from traindiag.tensorboard_plugin.tab import Tab

            return Tab(context)
        except Exception as error:
            import logging

            logging.getLogger("tensorboard").warning(
                "the tab 'Training diagnostics' is left out: %s: %s", type(error).__name__, error
            )
            return None
