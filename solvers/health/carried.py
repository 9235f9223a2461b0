"""Whether a class reads an attribute before it writes it, as the source of its methods says."""

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

_EACH_TIME = frozenset({"run_epoch", "train", "valid", "evaluate", "generate", "run_step"})
"""Methods of a solver that a resumed run enters again before anything reads what they wrote."""
_BUILDS = frozenset({"__init__", "__post_init__", "build_model", "build_dataloaders"})
_OURS = ("builtins", "torch", "solvers", "flashy")


class _Use(NamedTuple):
    """How a method uses an attribute: the method, whether it reads first, and whether it writes."""

    method: str
    reads_first: bool
    writes: bool


def is_carried(kind: Any, name: str) -> bool:
    """Whether objects of a class may carry the value of an attribute from one step to the next.

    They do not where each method that reads the attribute wrote it before, such as the last loss
    that is shown; and where only the beginning of an epoch writes it. What the source does not
    tell counts as carried.
    """
    uses = [use for use in _uses(kind).get(name, ()) if use.method not in _BUILDS]
    if not uses:
        return True
    if not any(use.reads_first for use in uses):
        return False
    writers = [use for use in uses if use.writes]
    starts = [use for use in writers if use.method in _EACH_TIME and use.method != "run_step"]
    return not (starts == writers and starts and not any(use.reads_first for use in starts))


@functools.lru_cache(maxsize=1024)
def _uses(kind: Any) -> dict[str, list[_Use]]:
    found: dict[str, list[_Use]] = {}
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] in _OURS:
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            continue
        for method in _methods(tree):
            events: dict[str, list[bool]] = {}
            for name, writes in _events(method, method.args.args[0].arg):
                events.setdefault(name, []).append(writes)
            for name, order in events.items():
                found.setdefault(name, []).append(_Use(method.name, not order[0], any(order)))
    return found


def _methods(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    for node in tree.body[:1]:
        for one in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(one, ast.FunctionDef) and one.args.args:
                yield one


def _events(node: ast.AST, owner: str) -> Iterator[tuple[str, bool]]:
    """Give the attributes of `owner` that code uses, and whether it writes, as Python runs it."""
    if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if isinstance(node, ast.AugAssign) and _is_of(node.target, owner):
            yield node.target.attr, False  # type: ignore[union-attr]
        if node.value is not None:
            yield from _events(node.value, owner)
        for target in targets:
            yield from _events(target, owner)
    elif _is_of(node, owner):
        yield node.attr, isinstance(node.ctx, ast.Store)  # type: ignore[attr-defined]
    else:
        for child in ast.iter_child_nodes(node):
            yield from _events(child, owner)


def _is_of(node: ast.AST, owner: str) -> bool:
    return (
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == owner
    )
