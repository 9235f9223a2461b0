"""What each subcommand of `checkpoint` does; each returns the exit code."""

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path

from ..errors import BadReference, CheckpointError, MissingCheckpoint
from ..loading.reader import refuse_unknown
from ..retention.flusher import Flusher, stored_policy
from ..run_folder import pins
from ..run_folder.catalog import Catalog
from ..run_folder.locate import CheckpointRef, experiments, locate, locate_checkpoint
from ..run_folder.manifest_file import read_manifest
from ..storage import LocalStorage, Storage, guarded, locked
from ..tools.advise import GivenValues, advise
from ..tools.describe import describe
from ..tools.listing import Row, list_checkpoints
from ..tools.remove import plan_removal, remove
from ..tools.repair import repair
from ..tools.verify import Verified, committed, total_size, verify
from ..units import format_bytes
from . import plot_advice, render, render_advice, text

DAMAGED = 3
"""Exit code when something is damaged, or could not be mended."""


def run(args: argparse.Namespace) -> int:
    """Do what was asked for, with what `arguments.parser` has read.

    Raises:
        CheckpointError: it cannot be done.
    """
    commands: dict[str, Callable[[argparse.Namespace], int]] = {
        "ls": _ls,
        "show": _show,
        "verify": _verify,
        "plan": _plan,
        "advise": _advise,
        "pin": _pin,
        "unpin": _unpin,
        "repair": _repair,
        "rm": _rm,
    }
    return commands[args.command](args)


def _print(args: argparse.Namespace, value: object, lines: Iterable[str]) -> None:
    print(text.to_json(value) if args.json else "\n".join(lines))


def _fitting(lines: Iterable[str]) -> list[str]:
    """Cut lines that are longer than the terminal, if they go to one."""
    if not sys.stdout.isatty():
        return list(lines)
    width = shutil.get_terminal_size().columns
    return [line if len(line) <= width else f"{line[: width - 1]}…" for line in lines]


def _ls(args: argparse.Namespace) -> int:
    named = [locate(xp, args.xps) for xp in args.xp]
    places = named or [locate(str(xp)) for xp in experiments(args.xps)]
    found = [(place.root, _rows(place)) for place in places]
    value = [{"experiment": str(root.parent), "checkpoints": rows} for root, rows in found]
    if not named:
        lines = render.experiments((root.parent.name, rows) for root, rows in found)
    else:
        tables = ([str(root), *render.listed(rows), ""] for root, rows in found)
        lines = list(chain.from_iterable(tables))[:-1]
    _print(args, value, _fitting(lines))
    return 0


def _rows(place: CheckpointRef) -> list[Row]:
    rows = list_checkpoints(place.storage)
    return [row for row in rows if place.name in (None, row.name)]


def _show(args: argparse.Namespace) -> int:
    storage, name = _one_or_newest(args.checkpoint, args.xps)
    one = describe(storage, name)
    if args.config:
        _print(args, one.config, render.config_of(one))
        return 0
    if args.tensors is None:
        _print(args, one, render.shown(one))
        return 0
    if args.tensors:
        refuse_unknown([args.tensors], read_manifest(storage, name), one.path)
    sources = [source for source in one.sources if args.tensors in ("", source.name)]
    _print(args, sources, render.tensors(sources))
    return 0


def _one_or_newest(reference: str, xps: Path) -> tuple[Storage, str]:
    """Find a checkpoint; the name of an experiment means its newest checkpoint."""
    found = locate(reference, xps)
    if found.name is not None:
        return found.storage, found.name
    return found.storage, Catalog(found.storage).newest().position.name


def _verify(args: argparse.Namespace) -> int:
    found: list[Verified] = []
    for place in [locate(xp, args.xps) for xp in args.xp]:
        names = committed(place.storage) if place.name is None else [place.name]
        if not names:
            raise MissingCheckpoint(f"there is no committed checkpoint in {place.root}")
        with _Meter(total_size(place.storage, names)) as meter:
            chosen = None if place.name is None else names
            found += verify(place.storage, chosen, deep=args.deep, progress=meter)
    _print(args, found, [*render.verified(found), render.summary(found)])
    if any(one.is_damaged for one in found):
        return DAMAGED
    return 1 if any(one.damages for one in found) else 0


def _plan(args: argparse.Namespace) -> int:
    planned = []
    for place in [_whole(xp, args.xps) for xp in args.xp]:
        catalog = Catalog(place.storage)
        planned.append((place, Flusher(catalog, stored_policy(catalog)).plan()))
    value = [
        {
            "experiment": str(place.root.parent),
            "plan": [{"name": v.position.name, "verdict": v} for v in verdicts],
        }
        for place, verdicts in planned
    ]
    tables = (
        "\n".join([str(place.root), *render.planned(verdicts)]) for place, verdicts in planned
    )
    _print(args, value, ["\n\n".join(tables)])
    return 0


def _advise(args: argparse.Namespace) -> int:
    if args.plot is not None and len(args.xp) > 1:
        raise BadReference("--plot draws one experiment: name one")
    if not 0 < args.max_overhead <= 1:
        raise BadReference(
            f"--max-overhead {args.max_overhead:g}: give a share, above 0 and at most 1"
        )
    given = GivenValues(
        total_updates=args.steps,
        update_seconds=args.step_seconds,
        save_seconds=args.save_seconds,
        size=args.size,
        mtbf=None if args.mtbf_hours is None else 3600 * args.mtbf_hours,
    )
    places = [_whole(xp, args.xps) for xp in args.xp]
    found = [advise(place.storage, given, args.max_overhead) for place in places]
    lines = ["\n".join(render_advice.advised(one)) for one in found]
    if args.plot is not None:
        plot_advice.plot(found[0], args.plot)
        lines.append(f"drawn in {args.plot}")
    _print(args, found, ["\n\n".join(lines)])
    return 0


def _whole(reference: str, xps: Path) -> CheckpointRef:
    """Find an experiment; one checkpoint of it is not meant."""
    place = locate(reference, xps)
    if place.name is not None:
        raise BadReference(
            f"{place.root / place.name} is one checkpoint: name its experiment, {place.root.parent}"
        )
    return place


def _pin(args: argparse.Namespace) -> int:
    storage, name = locate_checkpoint(args.checkpoint, args.xps)
    pins.pin(storage, name, args.note)
    print(f"pinned {storage.describe(name)}")
    return 0


def _unpin(args: argparse.Namespace) -> int:
    storage, name = locate_checkpoint(args.checkpoint, args.xps)
    if pins.read_pins(storage, name).pinned is None:
        raise MissingCheckpoint(f"{storage.describe(name)} is not pinned")
    pins.unpin(storage, name)
    print(f"unpinned {storage.describe(name)}")
    return 0


def _repair(args: argparse.Namespace) -> int:
    others = [locate(xp, args.xps).storage for xp in args.others]
    code = 0
    results = []
    for place in [_whole(xp, args.xps) for xp in args.xp]:
        with _Meter(total_size(place.storage, committed(place.storage))) as meter:
            one = repair(place.storage, others, dry_run=args.dry_run, progress=meter)
        results.append((place, one))
        code = DAMAGED if one.left else code
    _print(
        args,
        [{"experiment": str(place.root.parent), "repair": one} for place, one in results],
        [line for _, one in results for line in render.repaired(one, args.dry_run)],
    )
    return code


def _rm(args: argparse.Namespace) -> int:
    by_root: dict[Path, list[str]] = {}
    for reference in args.checkpoint:
        storage, name = locate_checkpoint(reference, args.xps)
        by_root.setdefault(storage.root, []).append(name)
    for root, names in by_root.items():
        storage = LocalStorage(root)
        with locked(storage) as lock:
            # The answer to its question may take hours.
            _remove(guarded(storage, lock.check), names, args)
    return 0


def _remove(storage: Storage, names: Sequence[str], args: argparse.Namespace) -> None:
    planned = plan_removal(storage, names)
    if planned.obstacles and not args.force:
        raise CheckpointError(
            f"nothing was deleted in {storage.describe()}: {'; '.join(planned.obstacles)}. "
            "With --force they are deleted all the same"
        )
    question = f"{', '.join(planned.names)} in {storage.describe()}"
    if not args.yes and not _agreed(
        f"delete {question}? It frees {format_bytes(planned.freed)} [y/N]"
    ):
        raise CheckpointError(f"nothing was deleted in {storage.describe()}")
    remove(storage, planned.names)
    print(f"deleted {question}; that freed {format_bytes(planned.freed)}")


def _agreed(question: str) -> bool:
    if not sys.stdin.isatty():
        raise BadReference("there is no terminal to ask at: give --yes to delete without asking")
    print(question, end=" ", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


class _Meter:
    """Shows on a terminal how much was read, when that takes long."""

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0
        self._shown_at = time.monotonic()
        self._is_shown = False

    def __call__(self, path: str, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if sys.stderr.isatty() and now - self._shown_at > 0.5:
            self._shown_at, self._is_shown = now, True
            done = f"{format_bytes(self._done)} of {format_bytes(self._total)}"
            print(f"\r\x1b[K{done}  {path[-70:]}", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> "_Meter":
        return self

    def __exit__(self, *error: object) -> None:
        if self._is_shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
