"""The RL demo as its user sees it: two runs, the story of each, and what tells them apart."""

from __future__ import annotations

from pathlib import Path

import rich

from traindiag.demo.rl.agent import AgentSettings
from traindiag.demo.rl.run import PRIMING, Settings, train
from traindiag.demo.rl.story import Story
from traindiag.demo.telling import say_how_to_look, tell
from traindiag.lightning import TrainingDiagnostics
from traindiag.monitors.critic_plasticity import CriticPlasticity

REWARD_BOUND = 16.3
"""Of Pendulum: pi**2 + 0.1 * 8**2 + 0.001 * 2**2, from its documentation, rounded up."""

LOOK_EVERY = 200
"""Updates. A run of the demo has fewer than ten thousand."""


def monitor(settings: Settings) -> CriticPlasticity:
    """What the demo watches its critic with."""
    bound = REWARD_BOUND if settings.agent.task.startswith("Pendulum") else 1.0
    return CriticPlasticity("critic", gamma=settings.agent.gamma, reward_bound=bound, every=LOOK_EVERY)


def show(seed: int, log_root: Path, settings: Settings | None = None) -> tuple[Story, Story]:
    """Trains both agents with the callback, prints the stories and how to open the panels.

    Args:
        seed: Of both.
        log_root: Where a folder for each is made.
        settings: The ruined agent, for runs of another size; the healthy one is the same without priming.
    """
    console = rich.get_console()  # the one that the progress bar writes to, so that neither tears the other
    ruined = settings or Settings(AgentSettings(seed=seed), priming=PRIMING)
    healthy = Settings(ruined.agent, ruined.steps, ruined.ratio)
    console.print(
        f"[bold]traindiag demo rl[/]: double DQN swings up a pendulum for {ruined.steps:,} environment steps, twice. "
        f"At step {ruined.primed_at:,} the second critic is trained for {ruined.priming:,} updates on "
        f"{ruined.primed_on} transitions, at a learning rate of {ruined.priming_lr:g} in the place of "
        f"{ruined.agent.lr:g}; all else is the same."
    )
    stories: list[Story] = []
    for name, run in (("healthy", healthy), ("primed", ruined)):
        diagnostics = TrainingDiagnostics(monitors=[monitor(run)])
        outcome = train(run, [diagnostics], log_root / f"rl-{name}")
        stories.append(Story.of(outcome, diagnostics.alerts, diagnostics.history))
        tell(
            console,
            f"What happened to the {name} critic",
            stories[-1].lines(stories[0] if len(stories) > 1 else None),
            outcome.seconds,
        )
    console.print(
        "\nAfter priming both agents see the same kind of transitions with the same learning rate. What the second "
        "one lacks are units that can still change: fresh weights would mend it, more data would not.",
        highlight=False,
    )
    say_how_to_look(console, log_root)
    return stories[0], stories[1]
