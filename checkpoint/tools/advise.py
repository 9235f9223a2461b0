"""What saving more or less often would cost a run, from what it measured of itself."""

from dataclasses import dataclass, replace

from ..errors import BadReference, CorruptCheckpoint, MissingCheckpoint
from ..format.manifest import Manifest
from ..retention.flusher import policy_of
from ..run_folder.catalog import Catalog
from ..run_folder.run_stats import RunStats, read_run_stats
from ..scheduling.auto_interval import choose_interval
from ..scheduling.cost_model import CostModel, Costs
from ..scheduling.young_daly import PRIOR, estimated_mtbf
from ..storage import Storage
from ..units import format_duration

_ROUND = (1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 12 * 3600, 86400, 3 * 86400, 7 * 86400)
"""Intervals that people think in, in seconds."""
_ROWS = 6  # of these, around the optimum


@dataclass(frozen=True)
class GivenValues:
    """What the user says instead of what was measured; None for what was. Times in seconds."""

    total_updates: int | None = None
    update_seconds: float | None = None
    save_seconds: float | None = None
    size: float | None = None
    mtbf: float | None = None


@dataclass(frozen=True)
class ModelValue:
    """A value of the model, and where it comes from."""

    name: str
    value: float
    source: str


@dataclass(frozen=True)
class IntervalCosts:
    """The costs of one interval, and what it is: empty, `present`, `optimum`."""

    costs: Costs
    what: str = ""


@dataclass(frozen=True)
class Advice:
    """What there is to say on one experiment.

    Attributes:
        path: of its newest checkpoint.
        model: with all values in it.
        values: these, and where each comes from.
        lines: some intervals, the shortest first.
        auto: what `checkpoint.interval=auto` would do, in a sentence.
    """

    path: str
    model: CostModel
    values: tuple[ModelValue, ...]
    lines: tuple[IntervalCosts, ...]
    auto: str


def advise(storage: Storage, given: GivenValues, max_overhead: float) -> Advice:
    """Work out the costs of some intervals for the run whose checkpoints lie in a storage.

    Args:
        storage: with the checkpoints of one experiment.
        given: what goes before what the run measured.
        max_overhead: see `choose_interval`.

    Raises:
        MissingCheckpoint: there is none.
        BadReference: a value was neither measured nor given, or cannot be.
    """
    catalog = Catalog(storage)
    manifest = catalog.newest()
    record = read_run_stats(storage, manifest)
    values = [*_of_run(record, given), *_of_saves(record, manifest, given), _mtbf(record, given)]
    where = storage.describe(manifest.position.name)
    model = _model(where, values, _rolling(catalog, manifest))
    return Advice(
        path=where,
        model=model,
        values=tuple(values),
        lines=tuple(_lines(model, record)),
        auto=_auto(record, model, given, max_overhead),
    )


def _of_run(record: RunStats, given: GivenValues) -> list[ModelValue]:
    updates, seconds, restart = given.total_updates, given.update_seconds, record.restart_seconds
    return [
        ModelValue("total_updates", record.total_updates, "of this run")
        if updates is None
        else ModelValue("total_updates", updates, "--steps"),
        ModelValue(
            "update_seconds", record.update_seconds, f"measured in {record.updates:,} updates"
        )
        if seconds is None
        else ModelValue("update_seconds", seconds, "--step-seconds"),
        ModelValue("restart_seconds", restart, f"measured in {record.restarts} restarts")
        if record.restarts
        else ModelValue("restart_seconds", 0.0, "none was measured"),
    ]


def _of_saves(record: RunStats, manifest: Manifest, given: GivenValues) -> list[ModelValue]:
    seconds, size = given.save_seconds, sum(file.size for file in manifest.files.values())
    # Nothing measured is not nothing, and the model takes 0 for a save.
    measured = record.stall if record.saves else float("nan")
    return [
        ModelValue("save_seconds", measured, f"measured in {record.saves} saves")
        if seconds is None
        else ModelValue("save_seconds", seconds, "--save-seconds"),
        ModelValue("size", size, "of the newest checkpoint")
        if given.size is None
        else ModelValue("size", given.size, "--size"),
    ]


def _mtbf(record: RunStats, given: GivenValues) -> ModelValue:
    if given.mtbf is not None:
        return ModelValue("mtbf", given.mtbf, "--mtbf-hours")
    if record.mtbf is not None:
        return ModelValue("mtbf", record.mtbf, "checkpoint.mtbf_hours")
    source = (
        f"{record.failures} failures in {record.starts} starts "
        f"and {format_duration(record.running)}, and one in {format_duration(PRIOR)} assumed"
    )
    return ModelValue("mtbf", estimated_mtbf(record.running, record.failures), source)


_OPTIONS = {
    "total_updates": "--steps",
    "update_seconds": "--step-seconds",
    "save_seconds": "--save-seconds",
}


def _model(where: str, values: list[ModelValue], rolling: int) -> CostModel:
    given = {one.name: one.value for one in values}
    missing = [
        option
        for name, option in _OPTIONS.items()
        if not (given[name] >= 0 if name == "save_seconds" else given[name] > 0)
    ]
    if missing:
        raise BadReference(
            f"{where} does not say all that is needed, since too little was measured before it was "
            f"saved: give {' and '.join(missing)}, above 0"
        )
    try:
        return CostModel(**given, rolling=rolling)  # type: ignore[arg-type]
    except ValueError as error:
        raise BadReference(str(error)) from error


def _rolling(catalog: Catalog, manifest: Manifest) -> int:
    try:
        return policy_of(catalog, manifest).keep_rolling
    except (MissingCheckpoint, CorruptCheckpoint):
        return CostModel.rolling


def _lines(model: CostModel, record: RunStats) -> list[IntervalCosts]:
    marked = {model.optimum: "optimum"}
    if record.saves and record.between > 0:
        present = min(max(record.between / model.update_seconds, 1.0), float(model.total_updates))
        marked[present] = "present" if present not in marked else "present and optimum"
    fitting = [s / model.update_seconds for s in _ROUND]
    fitting = [n for n in fitting if 1 <= n <= model.total_updates]
    nearest = sorted(fitting, key=lambda n: max(n / model.optimum, model.optimum / n))[:_ROWS]
    # What is nearly the same says nothing more.
    others = [n for n in nearest if all(abs(n / one - 1) > 0.05 for one in marked)]
    return [IntervalCosts(model.at(n), marked.get(n, "")) for n in sorted([*marked, *others])]


def _auto(record: RunStats, model: CostModel, given: GivenValues, max_overhead: float) -> str:
    seconds = record.seconds if given.save_seconds is None else model.save_seconds
    measured = replace(record, saves=1, stall=model.save_seconds, seconds=seconds)
    mtbf = given.mtbf or record.mtbf
    choice = choose_interval(measured, mtbf, max_overhead)
    return "" if choice is None else choice.why
