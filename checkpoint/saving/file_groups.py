"""Which tensors of a source go into one file: those that change, apart from those that do not.

A pure function of how it was at the save before.
"""

from collections.abc import Collection, Mapping

from ..layout import MAX_FILES

WORTHWHILE = 64 * 1024
"""Bytes that have to stand still before they are put into a file of their own."""


def group_by_change(
    sizes: Mapping[str, int], before: Mapping[str, str], changed: Collection[str]
) -> list[list[str]]:
    """Sort the tensors of a source into files.

    A file of which a part changed is split, so that the part that did not can be linked from then
    on. Files that changed as a whole, or not at all, stay together.

    Args:
        sizes: bytes of each tensor, by name, in the order in which they are to be given back.
        before: the file that each one was in at the save before; new ones are not in it.
        changed: those that are new, or not what they were.

    Returns:
        At most `MAX_FILES` groups of names.
    """
    if not before:
        return [list(sizes)]
    files: dict[str | None, list[str]] = {}
    for name in sizes:
        files.setdefault(before.get(name), []).append(name)
    new = files.pop(None, [])
    groups: list[list[str]] = []
    for members in files.values():
        moved = [name for name in members if name in changed]
        stood = [name for name in members if name not in changed]
        if moved and sum(sizes[name] for name in stood) >= WORTHWHILE:
            groups += [stood, moved]
        else:
            groups.append(members)
    return _few(_with_new(groups, new, changed), sizes, changed)


def _with_new(groups: list[list[str]], new: list[str], changed: Collection[str]) -> list[list[str]]:
    if not new:
        return groups
    for group in groups:
        if any(name in changed for name in group):
            group += new
            return groups
    return [*groups, new]


def _few(
    groups: list[list[str]], sizes: Mapping[str, int], changed: Collection[str]
) -> list[list[str]]:
    if len(groups) <= MAX_FILES:
        return groups
    # What changed is written anyway: to put it together costs nothing.
    standing = [group for group in groups if not any(name in changed for name in group)]
    moving = [name for group in groups if group not in standing for name in group]
    # Those that stand are written anew when they come together: the smallest cost least.
    while len(standing) > MAX_FILES - bool(moving):
        standing.sort(key=lambda group: sum(sizes[name] for name in group), reverse=True)
        smallest = standing.pop()
        standing[-1] += smallest
    return [*standing, moving] if moving else standing
