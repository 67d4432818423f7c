"""YAML that is data and nothing else, with the line of every key."""

from __future__ import annotations

from typing import Any

import yaml

KeyPath = tuple[str, ...]

_MOST_NODES, _MOST_NESTED = 10_000, 32
_MERGE = "tag:yaml.org,2002:merge"


class YamlFileError(ValueError):
    """YAML that cannot be used; the message says where."""


def parse(text: str) -> tuple[Any, dict[KeyPath, int]]:
    """The content of a YAML document as plain Python data, and the line of every key, counted from 1.

    Raises:
        YamlFileError: it is not YAML, asks for anything but plain data, has a key twice, or has aliases that expand it
            beyond 10,000 nodes or into itself.
    """
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}
        lines: dict[KeyPath, int] = {}
        _walk(node, (), lines, [0])
        return loader.construct_document(node), lines
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # A ValueError is a number or a date that has the form of one but is none.
        raise YamlFileError(" ".join(str(error).split())) from error
    finally:
        if loader is not None:
            loader.dispose()


def _walk(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], count: list[int], depth: int = 0) -> None:
    """Collect the lines of all keys, with every alias expanded as construction would."""
    count[0] += 1
    if count[0] > _MOST_NODES or depth > _MOST_NESTED:
        raise YamlFileError(
            f"line {_line(node)}: more than {_MOST_NODES} values or {_MOST_NESTED} levels with all aliases expanded"
        )
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _walk(item, path, lines, count, depth + 1)
    elif isinstance(node, yaml.MappingNode):
        seen: set[tuple[str, str]] = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise YamlFileError(f"line {_line(key)}: expected a name as key")
            if (key.tag, key.value) in seen:
                raise YamlFileError(f"line {_line(key)}: the key {'.'.join((*path, key.value))} stands there twice")
            seen.add((key.tag, key.value))
            below = path if key.tag == _MERGE else (*path, key.value)
            if key.tag != _MERGE:
                lines[below] = _line(key)
            _walk(value, below, lines, count, depth + 1)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
