"""How a rehearsal is held, and what each of its processes does: values that travel as JSON."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

MID_EPOCH = 2
"""Updates between two saves in the middle of an epoch."""

_WHOLE_PASS = 16  # An epoch of at most so many updates stays whole.
_CUT_EPOCH = 8  # Updates of an epoch that is cut.
_NEXT_PASS = 2  # Updates in the next pass of an epoch that has several.

SCRATCH: dict[str, Any] = {
    "evaluate.every": 1,
    "generate.every": 1,
    "checkpoint.save_last": True,
    "checkpoint.every_steps": MID_EPOCH,
    "checkpoint.every_minutes": None,
    "checkpoint.interval": None,
    "logging.log_tensorboard": False,
    "logging.log_wandb": False,
    "logging.progress_bar": "never",
    "profiler.enabled": False,
    "deadlock.use": False,
    "execute_only": None,
    "execute_inplace": False,
    "fast_dev_run": False,
    "show": False,
}
"""What is set otherwise in a rehearsal. None of these keys changes how an update is computed."""


@dataclass(frozen=True)
class Subject:
    """What is rehearsed: a package as `dora run` starts it, or a solver class with a configuration.

    Attributes:
        package: name of the package; None for a class.
        main: module of the package that holds `main`.
        overrides: `key=value`, as for `dora run`.
        module: module of the class.
        file: file of that module, for a module that cannot be imported by its name.
        name: qualified name of the class.
        config: configuration of the class, plain and nested.
    """

    package: str | None = None
    main: str = "train"
    overrides: tuple[str, ...] = ()
    module: str = ""
    file: str = ""
    name: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Kill:
    """Where a run kills itself.

    Attributes:
        after: `update`, or the name of the stage at whose end the run dies.
        epoch: of that.
        step: updates of the whole run; 0 for a stage.
        saved: the last save before it, for people.
    """

    after: str
    epoch: int
    step: int
    saved: str

    def __str__(self) -> str:
        what = f"update {self.step}" if self.after == "update" else f"{self.after}"
        return f"in epoch {self.epoch} after {what}, last save {self.saved}"


@dataclass(frozen=True)
class Options:
    """How a rehearsal is held.

    Attributes:
        ranks: processes of each run.
        then: processes of a resumed run.
        limit: seconds after which no further run begins; None for no limit.
        keep: whether the scratch folder stays.
        tell: is called with a line about each run.
    """

    ranks: int = 1
    then: int = 1
    limit: float | None = None
    keep: bool = False
    tell: Callable[[str], None] = field(default=lambda line: None)


@dataclass(frozen=True)
class RehearsalJob:
    """One process.

    Attributes:
        subject: what it runs.
        folder: where its experiment goes; a resumed run has that of the run before it.
        trace: file for its records.
        epochs: how many epochs it runs at most.
        resumed: whether it resumes; the global generators then start from another seed.
        kill: where it kills itself; None to run to the end.
        rank: of this process.
        ranks: number of processes.
        files: that the undisturbed run wrote, by the names of `Probe.describe`.
    """

    subject: Subject
    folder: str
    trace: str
    epochs: int = 2
    resumed: bool = False
    kill: Kill | None = None
    rank: int = 0
    ranks: int = 1
    files: tuple[str, ...] = ()

    def to_plain(self) -> dict[str, Any]:
        """Return it as JSON takes it."""
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "RehearsalJob":
        """Build it from what `to_plain` returns."""
        kill = plain["kill"]
        return cls(
            **{
                **plain,
                "subject": Subject(**plain["subject"]),
                "files": tuple(plain["files"]),
                "kill": None if kill is None else Kill(**kill),
            }
        )


def updates_of_an_epoch(configured: int | None, batches: int | None) -> int | None:
    """Choose how many updates an epoch of the rehearsal has; None for as many as configured.

    An epoch that is one pass over little data stays as it is. A longer one is cut. An epoch of
    several passes goes on into the next pass, if one pass is short enough.

    Args:
        configured: `optim.updates_per_epoch`.
        batches: in one pass over the training data; None where that is not known.
    """
    whole = configured or batches
    if whole is None or whole <= _WHOLE_PASS:
        return configured
    if batches is not None and batches + _NEXT_PASS <= min(whole, _WHOLE_PASS):
        return batches + _NEXT_PASS
    return _CUT_EPOCH


def kill_points(events: Sequence[Mapping[str, Any]]) -> list[Kill]:
    """Choose where to kill, from what the undisturbed run did.

    Each kill comes after a save, and after at least one update or stage that the save does not
    hold: after a save in the middle of each epoch, at the end of each stage of the first epoch, and
    after the save at the end of that epoch.

    Args:
        events: in order; `kind` is `saved`, `update` or `stage`, beside `epoch`, `step`, `stages`
            (how many are finished) and `stage`.
    """
    found: dict[tuple[Any, ...], Kill] = {}
    saved: Mapping[str, Any] | None = None
    for event in events:
        if event["kind"] == "saved":
            saved = event
        elif saved is not None and event["kind"] in ("update", "stage"):
            what, kill = _kill(event, saved)
            found.setdefault(what, kill)
    return list(found.values())


def _kill(event: Mapping[str, Any], saved: Mapping[str, Any]) -> tuple[tuple[Any, ...], Kill]:
    is_update = event["kind"] == "update"
    kill = Kill(
        "update" if is_update else event["stage"],
        event["epoch"],
        event["step"] if is_update else 0,
        _place(saved),
    )
    if is_update:
        # One for each kind of save and epoch.
        return ("update", event["epoch"], saved["ends_epoch"]), kill
    # A stage of a later epoch is the same stage.
    return ("stage", event["stage"]), kill


def _place(saved: Mapping[str, Any]) -> str:
    if saved["ends_epoch"]:
        return f"at the end of epoch {saved['epoch']}"
    if saved["stages"]:
        return f"in epoch {saved['epoch']} after {saved['stages']} stages"
    return f"in epoch {saved['epoch']} after update {saved['step']}"
