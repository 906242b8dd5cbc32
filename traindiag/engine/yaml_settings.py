"""Settings from a YAML file: plain data and registered names, nothing that could run code."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml

from traindiag.monitors.attention import AttentionMonitor
from traindiag.monitors.gradient import GradientMonitor
from traindiag.monitors.loss import LossMonitor
from traindiag.record.catalogue import near
from traindiag.rules.forecast import Forecast
from traindiag.rules.nonfinite import NonFinite
from traindiag.rules.spike import Spike
from traindiag.rules.threshold import Threshold

PLUGINS = "traindiag.plugins"
"""Entry points of installed packages, by the names that a file may use. Only one that a file names is loaded."""

BUILT_IN: Mapping[str, Mapping[str, Callable[..., Any]]] = {
    "rules": {c.__name__: c for c in (Threshold, Forecast, Spike, NonFinite)},
    "monitors": {c.__name__: c for c in (AttentionMonitor, GradientMonitor, LossMonitor)},
    "actions": {},  # code that an alert runs: a file may only name what an installed package offers
}

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", NoneType: "null"}


def read_settings(path: str | os.PathLike[str], target: Callable[..., Any]) -> dict[str, Any]:
    """Keyword arguments for ``target`` from a file; an empty file has none.

    A rule, monitor or action is a name, or a name with its arguments::

        every_n_steps: 20
        rules:
          - Threshold: {signal: attention/max_logit, above: 1e4}
          - NonFinite

    Args:
        path: The file.
        target: What the keys are arguments of.

    Raises:
        ValueError: With file, line, key, what was found and what was expected.
        OSError: If the file cannot be read.

    Example:
        >>> import tempfile
        >>> from traindiag.engine.settings import Settings
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "diagnostics.yaml"
        ...     _ = file.write_text("max_overhead: 1e-2\\nrules: [{Spike: {signal: reward/kl}}]")
        ...     read_settings(file, Settings)["max_overhead"]
        0.01
    """
    return _File(path).settings(target)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with ``1e4`` a number, and without tags and aliases: settings need neither."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None) is not None:
            problem = "expected plain values, got a tag (!) or an alias (*)"
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        return super().compose_node(parent, index)  # type: ignore[no-any-return,no-untyped-call]


# YAML 1.2's numbers; PyYAML follows 1.1, where an exponent needs both a point and a sign
_Loader.add_implicit_resolver(  # type: ignore[no-untyped-call]
    "tag:yaml.org,2002:float",
    __import__("re").compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


class _File:
    """One file, walked node by node, so that every error knows its line and key."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._content = Path(path).read_bytes()

    def settings(self, target: Callable[..., Any]) -> dict[str, Any]:
        try:
            self._loader = _Loader(self._content)
            root = self._loader.get_single_node()  # type: ignore[no-untyped-call]
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise ValueError(f"{self.path}:{line}: {error.problem}") from error
        except (yaml.YAMLError, RecursionError) as error:
            raise ValueError(f"{self.path}: not a YAML file of settings: {error}") from error
        return {} if root is None else self._keywords(root, "", target, BUILT_IN)

    def _keywords(
        self, node: yaml.Node, at: str, target: Callable[..., Any], lists: Mapping[str, object]
    ) -> dict[str, Any]:
        """The arguments of ``target``; those in ``lists`` are lists of registered things."""
        parameters = inspect.signature(target).parameters
        known = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        hints = _hints(target)
        keywords: dict[str, Any] = {}
        for name, key, value in self._pairs(node, at):
            inside = f"{at}.{name}" if at else name
            if name not in known and not takes_any:
                expected = f"expected one of {', '.join(known)}" if known else f"{at} takes no arguments"
                self._fail(key, inside, f"unknown key {name!r}.{near(name, known)} {expected[0].upper()}{expected[1:]}")
            if name in lists:
                keywords[name] = [self._made(v, f"{inside}[{i}]", name) for i, v in enumerate(self._items(value, inside))]
            else:
                keywords[name] = self._fitted(value, inside, hints.get(name, Any))
        missing = [n for n in known if parameters[n].default is inspect.Parameter.empty and n not in keywords]
        if missing:
            self._fail(node, at, f"lacks {', '.join(missing)}")
        return keywords

    def _made(self, node: yaml.Node, at: str, kind: str) -> Any:
        """A registered thing from ``Name`` or ``Name: {argument: value}``."""
        if isinstance(node, yaml.MappingNode):
            pairs = list(self._pairs(node, at))
            if len(pairs) != 1:
                self._fail(node, at, f"expected one name with its arguments, got {len(pairs)} keys; begin each with '- '")
            name, key, arguments = pairs[0]
        else:
            name, key, arguments = self._plain(node, at), node, None
        registered = self._registered(key, at, kind, name)
        at = f"{at}.{name}"
        keywords = {} if arguments is None else self._keywords(arguments, at, registered, {})
        if arguments is None and not isinstance(registered, type):
            return registered
        if arguments is None:
            return
        try:
            return registered(**keywords)
        except (ValueError, TypeError) as error:
            self._fail(key, at, str(error), error)
