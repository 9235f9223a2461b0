"""What a user changed in the configuration between two starts of one experiment."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from ..settings.keys import keys

# These keys do not change what is trained, whatever `dora.exclude` says of them.
_TRAINS_THE_SAME = (
    *("checkpoint.*", "evaluate.*", "generate.*", "dora.*", "slurm.*", "hydra.*", "seed"),
    *("continue_from", "execute_only", "execute_inplace", "show", "label", "fast_dev_run"),
    *("device", "num_threads", "dataset.num_workers", "optim.on_nonfinite", "benchmark_no_load"),
    *("logging.*", "tensorboard.*", "wandb.*", "profiler.*", "deadlock.*"),
)
_ABSENT = "nothing"


@dataclass(frozen=True)
class Change:
    """A key whose value differs from that of the checkpoint.

    Attributes:
        key: full name.
        was: value in the configuration of the checkpoint.
        now: value in the configuration of the present run.
        is_excluded: whether `dora.exclude` of the user says that both are one experiment.
    """

    key: str
    was: Any
    now: Any
    is_excluded: bool = False

    def sentence(self, verdict: str | None = None) -> str:
        """Say what changed, and which value counts.

        Args:
            verdict: which value counts, in words; None for the configuration's, if the key is one
                of the framework, and for no statement otherwise.
        """
        if verdict is None:
            verdict = f"{self.now} counts" if self.key in keys() else ""
        text = f"{self.key} was {self.was}, is {self.now} now"
        return f"{text} ({verdict})" if verdict else text


def changed_settings(then: Any, now: Any, excluded: Collection[str] = ()) -> list[Change]:
    """List the keys with another value, without those that never change what is trained.

    Args:
        then: the configuration of a checkpoint, plain and nested.
        now: the configuration of the run that resumes from the checkpoint.
        excluded: the patterns of `dora.exclude`.
    """
    before, after = dict(_flat(then)), dict(_flat(now))
    changes = []
    for key in sorted(before.keys() | after.keys()):
        was, value = (side.get(key, _default(key)) for side in (before, after))
        # NaN is not equal to itself.
        is_same = was == value or (was != was and value != value)
        if not is_same and not _fits(key, _TRAINS_THE_SAME):
            changes.append(Change(key, was, value, _fits(key, excluded)))
    return changes


def _fits(key: str, patterns: Collection[str]) -> bool:
    return any(fnmatch(key, pattern) for pattern in patterns)


def _default(key: str) -> Any:
    return keys()[key].default if key in keys() else _ABSENT


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items() if isinstance(tree, Mapping) else ():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
