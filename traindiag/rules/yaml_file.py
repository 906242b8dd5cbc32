"""Plain data and registered names from a YAML file, and nothing in it that could run code."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml

from traindiag.record.catalogue import near

PLUGINS = "traindiag.plugins"
"""Entry points of installed packages, by the names that a file may use. Only one that a file names is loaded."""

Registered = Mapping[str, Mapping[str, Callable[..., Any]]]
"""By key: the names that entries of its list may have, and what they make."""

_ADDRESS = re.compile(r"\w+://[^\s'\"]+")  # may hold a secret, and errors end up in logs

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", NoneType: "null"}


def read_keywords(
    path: str | os.PathLike[str],
    target: Callable[..., Any],
    registered: Registered,
    passed_over: Collection[str] = (),
    *,
    lines: dict[str, int] | None = None,
) -> dict[str, Any]:
    """Keyword arguments for ``target`` from a file; an empty file has none.

    Args:
        path: The file.
        target: What the keys are arguments of.
        registered: Keys that hold lists of registered things, with the names built in.
        passed_over: Keys that belong to somebody else and are not looked at.
        lines: Takes the line of each key, and of each entry ``key.entry`` of one that holds a mapping.

    Raises:
        ValueError: With file, line, key, what was found and what was expected.
        OSError: If the file cannot be read.
    """
    file = _File(path, registered, passed_over)
    keywords = file.keywords(target)
    if lines is not None:
        lines.update(file.lines)
    return keywords


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with ``1e4`` a number, and without tags and aliases: settings need neither."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None) is not None:
            problem = "expected plain values, got a tag (!) or an alias (*)"
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        return super().compose_node(parent, index)


# YAML 1.2's numbers; PyYAML follows 1.1, where an exponent needs both a point and a sign
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


class _File:
    """One file, walked node by node, so that every error knows its line and key."""

    def __init__(self, path: str | os.PathLike[str], registered: Registered, passed_over: Collection[str]) -> None:
        self._path = os.fspath(path)
        self._content = Path(path).read_bytes()
        self._built_in, self._passed_over = registered, passed_over
        self.lines: dict[str, int] = {}

    def keywords(self, target: Callable[..., Any]) -> dict[str, Any]:
        try:
            self._loader = _Loader(self._content)
            root = self._loader.get_single_node()
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise ValueError(f"{self._path}:{line}: {error.problem}") from error
        except (yaml.YAMLError, RecursionError) as error:
            raise ValueError(f"{self._path}: expected YAML with settings: {error}") from error
        return {} if root is None else self._keywords(root, "", target, self._built_in, self._passed_over)

    def _keywords(
        self,
        node: yaml.Node,
        at: str,
        target: Callable[..., Any],
        lists: Collection[str] = (),
        passed_over: Collection[str] = (),
    ) -> dict[str, Any]:
        """The arguments of ``target``; those named in ``lists`` hold registered things."""
        parameters = inspect.signature(target).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        known = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        hints = _hints(target)
        keywords: dict[str, Any] = {}
        for name, key, value in self._pairs(node, at):
            inside = f"{at}.{name}" if at else name
            self.lines[inside] = key.start_mark.line + 1
            if name in passed_over:
                continue
            if name not in known and not open_ended:
                self._fail(key, inside, f"unknown key {name!r}, expected {_one_of(known)}.{near(name, known)}")
            if name not in lists:
                keywords[name] = self._fitted(value, inside, hints.get(name, Any))
            elif isinstance(value, yaml.SequenceNode):
                keywords[name] = [self._made(v, f"{inside}[{i}]", name) for i, v in enumerate(value.value)]
            else:
                self._fail(value, inside, f"expected a list, each entry begun with '- ', got {self._told(value)}")
        missing = [n for n in known if parameters[n].default is inspect.Parameter.empty and n not in keywords]
        if missing:
            self._fail(node, at, f"lacks {', '.join(missing)}")
        return keywords

    def _made(self, node: yaml.Node, at: str, kind: str) -> Any:
        """A registered thing from ``Name`` or ``Name: {argument: value}``."""
        key, arguments = node, None
        if isinstance(node, yaml.MappingNode):
            if len(node.value) != 1:
                self._fail(node, at, f"expected one name with its arguments, got {len(node.value)} keys")
            key, arguments = node.value[0]
        name = self._plain(key, at)
        if not isinstance(name, str):
            self._fail(key, at, f"expected a name, or a name with its arguments, got {self._told(key)}")
        at = f"{at}.{name}"
        registered = self._registered(key, at, kind, name)
        keywords: dict[str, Any] = {}
        if arguments is not None:
            keywords = self._keywords(arguments, at, registered)
        elif isinstance(registered, type):
            keywords = self._keywords(yaml.MappingNode("", [], key.start_mark), at, registered)
        else:
            return registered  # a function, such as an action
        try:
            return registered(**keywords)
        except (ValueError, TypeError) as error:
            self._fail(key, at, str(error))

    def _registered(self, key: yaml.Node, at: str, kind: str, name: str) -> Callable[..., Any]:
        built_in = self._built_in[kind]
        if name in built_in:
            return built_in[name]
        plugins = {point.name: point for point in entry_points(group=PLUGINS)}
        if name in plugins:
            found: Callable[..., Any] = plugins[name].load()
            return found
        known = [*built_in, *plugins]
        expected = _one_of(known) if known else f"what an installed package offers as entry point of {PLUGINS}"
        self._fail(key, at, f"unknown name {name!r}, expected {expected}.{near(name, known)}")

    def _pairs(self, node: yaml.Node, at: str) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
        if not isinstance(node, yaml.MappingNode):
            self._fail(node, at, f"expected keys with values, got {self._told(node)}")
        met: set[str] = set()
        for key, value in node.value:
            name = self._plain(key, at)
            if not isinstance(name, str):
                self._fail(key, at, f"expected a name as key, got {self._told(key)}")
            if name in met:  # YAML would silently take the last one
                self._fail(key, at, f"{name!r} is given twice")
            met.add(name)
            yield name, key, value

    def _fitted(self, node: yaml.Node, at: str, hint: Any) -> Any:
        if get_origin(hint) is Mapping and isinstance(node, yaml.MappingNode):
            fitted = {}
            for name, key, entry in self._pairs(node, at):
                self.lines[f"{at}.{name}"] = key.start_mark.line + 1
                fitted[name] = self._fitted(entry, f"{at}.{name}", get_args(hint)[1])
            return fitted
        value = self._plain(node, at)
        if isinstance(value, float) and value.is_integer() and not _fits(value, hint):
            value = int(value)  # 1e4 where a count is asked for
        if not _fits(value, hint):
            hinted = near(str(value), map(str, get_args(hint))) if get_origin(hint) is Literal else ""
            self._fail(node, at, f"expected {_words(hint)}, got {self._told(node)}{hinted and '.' + hinted}")
        return value

    def _plain(self, node: yaml.Node, at: str) -> Any:
        try:
            return self._loader.construct_object(node, deep=True)
        except (yaml.YAMLError, ValueError, TypeError) as error:  # no such date, a list as a key, ...
            self._fail(node, at, f"cannot be read: {getattr(error, 'problem', error)}")

    def _told(self, node: yaml.Node) -> str:
        value = self._plain(node, "")
        return "nothing" if value is None else f"{value!r:.200}"

    def _fail(self, node: yaml.Node, at: str, text: str) -> NoReturn:
        where = f"{self._path}:{node.start_mark.line + 1}: "
        raise ValueError(where + _ADDRESS.sub("<hidden>", f"{at}: {text}" if at else text))


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(inspect.getattr_static(target, "__init__") if isinstance(target, type) else target)
    except Exception:  # a plugin's types may exist for type checkers only; then its constructor decides
        return {}


def _fits(value: object, hint: Any) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if origin is Mapping:
        return isinstance(value, dict)
    if origin is Sequence:
        return isinstance(value, list) and all(_fits(v, parts[0]) for v in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in _WORDS else True  # a plugin's own type: its constructor decides


def _words(hint: Any) -> str:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(_words(part) for part in parts)
    if origin is Literal:
        return _one_of([str(part) for part in parts])
    if origin is Mapping:
        return f"names with {_words(parts[1])}"
    if origin is Sequence:
        return f"a list of {_words(parts[0])}"
    return _WORDS.get(hint, str(hint))


def _one_of(names: Sequence[str]) -> str:
    return f"one of {', '.join(names)}" if names else "nothing"
