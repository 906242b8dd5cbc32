"""Tasks of classic control with a few actions each."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

TORQUES = 5
"""Actions of Pendulum, evenly spaced from full torque one way to full torque the other."""


def gym() -> Any:
    """The module ``gymnasium``.

    Raises:
        ImportError: If it is not installed; says how to install it.
    """
    try:
        import gymnasium
    except ImportError as error:
        raise ImportError('the RL demo needs gymnasium: pip install "traindiag[rl]"') from error
    return gymnasium


class Task:
    """An environment of gymnasium whose actions are numbers from 0.

    Args:
        name: ``CartPole-v1``, ``Acrobot-v1``, ``Pendulum-v1`` or another one with few actions or one torque.
        seed: Of its first episode; later ones follow from it.

    Raises:
        ImportError: If gymnasium is not installed.
        ValueError: If its actions are neither numbers nor one torque.

    Example:
        >>> task = Task("Pendulum-v1", seed=0)
        >>> task.actions, task.features
        (5, 3)
        >>> task.step(2)
        >>> task.reward < 0, task.ended, task.terminal
        (True, False, False)
    """

    def __init__(self, name: str, seed: int) -> None:
        gymnasium = gym()
        self._env: Any = gymnasium.make(name)
        space = self._env.action_space
        if isinstance(space, gymnasium.spaces.Discrete):
            self._torques = None
            self.actions = int(space.n)
        elif isinstance(space, gymnasium.spaces.Box) and space.shape == (1,):
            self._torques = np.linspace(space.low, space.high, TORQUES, dtype=np.float32)
            self.actions = TORQUES
        else:
            raise ValueError(f"expected a task with few actions or one torque, {name} has {space}")
        self.features = int(np.prod(self._env.observation_space.shape or ()))
        self.state = self._flat(self._env.reset(seed=seed)[0])
        self.following = self.state
        self.reward, self.terminal, self.ended, self.total = 0.0, False, False, 0.0

    def step(self, action: int) -> None:
        """Does one action: ``reward``, the state ``following``, ``terminal``, ``ended`` and ``total`` tell the rest.

        ``terminal`` is the end of what there is to win; an episode that was cut off has ``ended`` only.
        """
        if self.ended:
            self.total = 0.0
        taken = action if self._torques is None else self._torques[action]
        following, reward, terminal, cut, _ = self._env.step(taken)
        self.following = self._flat(following)
        self.reward, self.terminal, self.ended = float(reward), bool(terminal), bool(terminal or cut)
        self.total += self.reward

    def go_on(self) -> None:
        """On to the state that followed, or to a new episode."""
        self.state = self._flat(self._env.reset()[0]) if self.ended else self.following

    @staticmethod
    def _flat(state: Any) -> NDArray[np.float32]:
        return np.asarray(state, np.float32).reshape(-1)
