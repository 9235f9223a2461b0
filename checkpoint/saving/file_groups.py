"""Groups the tensors of a source into files: changed ones apart from unchanged ones.

The groups are a pure function of the previous save.
"""

from collections.abc import Collection, Mapping

from ..layout import MAX_FILES

WORTHWHILE = 64 * 1024
"""Bytes that must be unchanged before they get a file of their own."""


def group_by_change(
    sizes: Mapping[str, int], before: Mapping[str, str], changed: Collection[str]
) -> list[list[str]]:
    """Group the tensors of a source into files.

    A file is split if a part of it changed, so that later saves can link the unchanged part. A file
    that changed as a whole, or not at all, stays one file.

    Args:
        sizes: bytes of each tensor by name, in the order of the result.
        before: name of the file that held each tensor in the previous save; lacks new tensors.
        changed: names of tensors that are new or have changed.

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
    # Changed tensors are written anyway, so joining their files costs nothing.
    standing = [group for group in groups if not any(name in changed for name in group)]
    moving = [name for group in groups if group not in standing for name in group]
    # Joining unchanged files writes them again, so the smallest ones are joined.
    while len(standing) > MAX_FILES - bool(moving):
        standing.sort(key=lambda group: sum(sizes[name] for name in group), reverse=True)
        smallest = standing.pop()
        standing[-1] += smallest
    return [*standing, moving] if moving else standing
