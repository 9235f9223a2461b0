"""What the tools found out -> lines for people."""

import json
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..layout import Position
from ..retention.plan import Verdict
from ..retention.verdict_text import why
from ..tools.describe import CheckpointDescription, SourceDescription
from ..tools.listing import Row
from ..tools.repair import Repair
from ..tools.verify import Damage, Verified
from ..units import format_bytes, format_table
from . import text

_METRICS = 2  # of a stage, in a list
_WIDTH = 100
_DAMAGED, _UNREAD = "DAMAGED", "NOT READ"


def listed(rows: Sequence[Row]) -> list[str]:
    """Write a list of checkpoints as a table, with their sum; `own` only where files are shared."""
    head = ("checkpoint", "saved (UTC)", "size", "own", "why", "metrics")
    cells = [head, *map(_cells, rows)]
    if all(row.own == row.size for row in rows):
        cells = [(*cell[:3], *cell[4:]) for cell in cells]
    lines = format_table(cells, (2, 3) if len(cells[0]) == len(head) else (2,))
    problems = [f"  {row.problem}" for row in rows if row.problem]
    whole = sum(row.kind == "checkpoint" for row in rows)
    return [
        *lines,
        *problems,
        f"{whole} checkpoints, {format_bytes(sum(r.own for r in rows))} on disk",
    ]


def planned(verdicts: Sequence[Verdict]) -> list[str]:
    """Write a retention plan as a table, oldest checkpoint first, with the sum of the sizes."""
    rows = [("checkpoint", "size", "action", "why")]
    rows += [(v.position.name, format_bytes(v.size), v.action, why(v)) for v in verdicts]
    rows.append(("in all", format_bytes(sum(v.size for v in verdicts)), "", ""))
    return format_table(rows, (1,))


def _cells(row: Row) -> tuple[str, ...]:
    sizes = format_bytes(row.size), format_bytes(row.own)
    short = _metrics_in_short(row.metrics or {}, row.best_metric)
    return row.name, text.when(row.created), *sizes, _why(row), short


def experiments(rows: Iterable[tuple[str, Sequence[Row]]]) -> list[str]:
    """Write one line for each experiment: how many checkpoints, the newest, and the size."""
    head = ("experiment", "checkpoints", "newest", "saved (UTC)", "on disk", "metrics")
    return format_table([head, *(_experiment(name, found) for name, found in rows)], (1, 4))


def _experiment(name: str, rows: Sequence[Row]) -> tuple[str, ...]:
    # Checkpoints with names of their own come last, and are not the newest.
    whole = [row for row in rows if row.kind == "checkpoint"]
    newest = next((row for row in reversed(whole) if Position.parse(row.name)), None)
    size = format_bytes(sum(row.own for row in rows))
    if newest is None:
        return name, str(len(whole)), "none", "", size, ""
    short = _metrics_in_short(newest.metrics or {}, newest.best_metric)
    return name, str(len(whole)), newest.name, text.when(newest.created), size, short


def _why(row: Row) -> str:
    if row.kind == "interrupted":
        return "interrupted, or being saved"
    marks = ["pinned"] if row.pins.pinned is not None else []
    marks += [f"continued by {by}" for by, _ in row.pins.continued]
    state = {"damaged": ["DAMAGED"], "set aside": ["set aside, damaged"]}.get(row.kind)
    return ", ".join([*(state or row.reasons), *marks])


def _metrics_in_short(metrics: Mapping[str, Any], best: str | None) -> str:
    stage = next((name for name in ("valid", "train") if metrics.get(name)), None)
    values = metrics[stage] if stage else {}
    if not isinstance(values, Mapping):
        return ""
    names = [best] if best in values else list(values)[:_METRICS]
    return " ".join([stage or "", *(f"{name}={text.number(values[name])}" for name in names)])


def shown(one: CheckpointDescription) -> list[str]:
    """Write out what a checkpoint says of itself, without its tensors."""
    lines = [
        line
        for label, value in _facts(one)
        for line in textwrap.wrap(f"{label:<13} {value}", _WIDTH, subsequent_indent=" " * 16)
        if value
    ]
    head = ("source", "tensors", "numbers", "size", "files")
    return [one.path, *lines, "", *format_table([head, *map(_source, one.sources)], (1, 2, 3))]


def _facts(one: CheckpointDescription) -> Iterator[tuple[str, str]]:
    yield "position", _position(one)
    by = "one process" if one.world_size == 1 else f"{one.world_size} processes"
    yield "saved", f"{text.when(one.created)} UTC, by {by}"
    yield "why", ", ".join(one.reasons)
    if one.pins.pinned is not None:
        yield "pinned", one.pins.pinned or "yes"
    for by, where in one.pins.continued:
        yield "continued by", f"{by}  {where}".rstrip()
    yield "signature", one.sig or ""
    yield "started from", _lineage(one.lineage)
    yield "versions", ", ".join(f"{name} {version}" for name, version in one.versions.items())
    label = "metrics"
    for stage, values in one.metrics.items():
        pairs = values.items() if isinstance(values, Mapping) else ()
        yield label, " ".join([stage, *(f"{k}={text.number(v)}" for k, v in pairs)])
        label = ""
    yield "thinned out", ", ".join(one.dropped)
    files = [file for source in one.sources for file in source.files]
    yield "size", f"{format_bytes(sum(file.size for file in files))} in {len(files)} files"


def _position(one: CheckpointDescription) -> str:
    if one.step is None:
        return f"end of epoch {one.epoch}"
    stages = f", {one.stages} stages of it finished" if one.stages else ""
    return f"in epoch {one.epoch}, after {one.step} updates in all{stages}"


def _lineage(lineage: Any) -> str:
    """Write where the run began, and where that one did."""
    chain: list[str] = []
    while isinstance(lineage, Mapping) and len(chain) < 20:
        epoch = f" epoch {lineage['epoch']}" if lineage.get("epoch") is not None else ""
        step = f" step {lineage['step']}" if lineage.get("step") is not None else ""
        chain.append(f"{lineage.get('sig') or lineage.get('path') or '?'}{epoch}{step}")
        lineage = lineage.get("from")
    return " <- ".join(chain)


def _source(source: SourceDescription) -> tuple[str, ...]:
    if not source.tensors:
        return source.name, "", "", "", "values in the manifest"
    names = [file.name for file in source.files]
    files = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
    counts = (f"{len(source.tensors):,}", f"{source.numbers:,}", format_bytes(source.size))
    return source.name, *counts, files


def tensors(sources: Iterable[SourceDescription]) -> list[str]:
    """Write one line for each tensor."""
    rows = [
        (source.name, one.name, one.dtype, str(list(one.shape)), ", ".join(one.files))
        for source in sources
        for one in source.tensors
    ]
    return format_table([("source", "tensor", "dtype", "shape", "file"), *rows])


def config_of(one: CheckpointDescription) -> Iterator[str]:
    """Say whose configuration it is and what the user changed in it, then write it."""
    if one.config is None:
        yield f"# {one.path} holds no configuration"
        return
    run = f"run {one.sig}" if one.sig else "run"
    yield f"# the configuration of the {run} when it saved {one.path}"
    yield from (f"# changed at the start after {_start(change)}" for change in one.changes)
    yield from config(one.config)


def _start(change: Mapping[str, Any]) -> str:
    where = f"epoch {change.get('epoch')}, update {change.get('step')}"
    return f"{where}: {change.get('change')}"


def config(value: Any, key: str = "") -> Iterator[str]:
    """Write a configuration as overrides, one a line."""
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from config(item, f"{key}.{name}" if key else str(name))
    elif key:
        yield f"{key}={json.dumps(value, default=str)}"


def verified(found: Iterable[Verified]) -> list[str]:
    """Write what became of each checkpoint, and below it each damage with its path."""
    lines = []
    for one in found:
        lines.append(f"{one.name}: {_verdict(one)}, {one.files} files, {format_bytes(one.size)}")
        lines += [f"  {damage(each)}" for each in one.damages]
        lines += [f"  {tensor} is not finite (and was saved so)" for tensor in one.nonfinite]
    return lines


def summary(found: Sequence[Verified]) -> str:
    """Write how many checkpoints are damaged, and how many could not be read."""
    verdicts = [_verdict(one) for one in found]
    damaged, unread = verdicts.count(_DAMAGED), verdicts.count(_UNREAD)
    parts = [f"{damaged} of {len(found)} checkpoints damaged"] if damaged else []
    parts += [f"{unread} of {len(found)} could not be read, and may be good"] if unread else []
    return "; ".join(parts) or f"all {len(found)} are good"


def _verdict(one: Verified) -> str:
    if one.is_damaged:
        return _DAMAGED
    return _UNREAD if one.damages else "good"


def damage(one: Damage) -> str:
    """Write one damage: path, what is wrong, and what may help."""
    return (
        f"{one.path}: {one.kind}: {one.what}"
        if one.kind != "damaged"
        else (f"{one.path} is damaged: {one.what}")
    )


def repaired(one: Repair, dry_run: bool) -> list[str]:
    """Write what was found, what was done about it, and what is left."""
    lines = [damage(each) for each in one.found]
    would = "would be " if dry_run else ""
    lines += [f"{would}{act.kind}: {act.path} ({act.what})" for act in one.acts]
    if one.left:
        lines.append(
            f"{len(one.left)} of {len(one.found)} could not be mended: name folders that may hold "
            "the same bytes, such as a backup, with --from"
        )
    return lines or ["nothing is damaged"]
