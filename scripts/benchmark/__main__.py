"""The command: measures, prints Markdown tables, and writes all figures as JSON."""

import argparse
import json
import logging
import os
import platform
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Imported here once, for all the processes that are forked from this one.
import torch
import torch._dynamo
import torch.distributed.checkpoint
from torch.distributed import fsdp  # noqa: F401

import solvers.base  # noqa: F401

from . import measures, peers
from .apart import Failed
from .measures import Measure
from .report import middle, spread, table


def main() -> int:
    """Measure what the command line asks for; return the exit code."""
    arguments = _arguments()
    os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    results = []
    print(f"# Benchmark\n\n{_machine()}\n")
    if peers.missing():
        print(f"Not installed: {', '.join(peers.missing())}\n")
    for measure in _wanted(arguments):
        rows = list(_measured(measure, arguments.folder, arguments.rounds))
        print(table(measure.title, measure.names, measure.columns, rows), flush=True)
        results.append({"measure": measure.key, "title": measure.title, "rows": rows})
        if arguments.json:
            _write(arguments.json, results, arguments)
    if arguments.plot:
        from .plots import draw

        draw(results, arguments.plot)
    return 1 if any("error" in row for one in results for row in one["rows"]) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("--short", action="store_true", help="less of everything: does it work?")
    parser.add_argument("--rounds", type=int, default=None, help="of each measurement; 3, short: 1")
    parser.add_argument("--size", action="append", choices=["10m", "98m"], help="parameters")
    parser.add_argument("--peer", action="append", help="only these frameworks, by name")
    parser.add_argument("--only", action="append", help="only measures that begin like this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw how the cost grows")
    folder = Path("outputs/bench")
    parser.add_argument("--folder", type=Path, default=folder, help=f"on the disk; {folder}")
    arguments = parser.parse_args()
    known = {*peers.names(), *peers.steppers()}
    if unknown := set(arguments.peer or ()) - known:
        parser.error(f"--peer {', '.join(unknown)}: give some of {', '.join(sorted(known))}")
    arguments.rounds = arguments.rounds or (1 if arguments.short else 3)
    arguments.size = arguments.size or (["10m"] if arguments.short else ["10m", "98m"])
    return arguments


def _wanted(arguments: argparse.Namespace) -> Iterator[Measure]:
    short = arguments.short
    names = _chosen(peers.names(), arguments)
    everything = [m for size in arguments.size for m in measures.of_states(size, names, short)]
    few = [name for name in names if name in measures.SHORT] or names
    everything += measures.of_epochs("10m", few if short else names, short)
    everything.append(measures.of_steps(_chosen(peers.steppers(), arguments), short))
    everything += measures.of_growth(short, arguments.folder)
    for measure in everything:
        if not arguments.only or measure.key.startswith(tuple(arguments.only)):
            yield measure


def _chosen(names: Sequence[str], arguments: argparse.Namespace) -> Sequence[str]:
    if arguments.peer:
        return [name for name in names if name in arguments.peer]
    if arguments.short and peers.missing():
        return [name for name in names if name in measures.SHORT]
    return names


def _measured(measure: Measure, folder: Path, rounds: int) -> Iterator[dict[str, Any]]:
    for name, case in measure.cases.items():
        found: dict[str, Any] = {"name": name, "rounds": []}
        for number in range(1, rounds + 1):
            print(f"{measure.key}, {name}, round {number}", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix="run-") as place:
                try:
                    found["rounds"].append(case(place))
                except Failed as error:
                    found["error"] = str(error)
                    break
        if found["rounds"]:
            found["median"] = middle(found["rounds"])
            found["spread"] = spread(found["rounds"])
        yield found


def _machine() -> str:
    return (
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}; one thread"
    )


def _write(path: Path, results: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    given = {key: str(value) for key, value in vars(arguments).items()}
    path.write_text(json.dumps({"machine": _machine(), "given": given, "results": results}))


if __name__ == "__main__":
    sys.exit(main())
