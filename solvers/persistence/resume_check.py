"""What comes next in a run, in a few words: a resumed run must be about to do just that."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from checkpoint import Manifest, StateMismatch

from ..data.contents import is_of_data
from ..experiment import lookup
from ..health.update_counts import UpdateCounts
from ..run_context import RunContext
from ..state.optimizers import Optimizer, rates_of
from ..state.progress import Progress
from ..state.registry import StateRegistry
from ..state.rng import RngState
from .config_changes import Change, changed_settings
from .found_state import FoundState
from .retuning import Groups, Retuning
from .state_source import LoadedState

Fingerprint = dict[str, str]
"""What it is -> its value, or a digest that begins with `#`; the most telling first."""

_ABSENT = "nothing"


def rate_of(optimizer: str) -> str:
    """Return what a fingerprint calls the learning rates of an optimizer."""
    return f"the learning rate of {optimizer!r}"


def fingerprint(
    step: int,
    optimizers: Mapping[str, Optimizer],
    random_state: Mapping[str, Any],
    generators: Mapping[str, Any],
    upcoming: list[int] | None = None,
    data: Mapping[str, str] | None = None,
) -> Fingerprint:
    """Take it, without drawing from anything.

    Args:
        step: optimizer updates since the start of the run.
        optimizers: by name.
        random_state: the global generators, as `RngState` captures them.
        generators: states of those of loaders and samplers, by name.
        upcoming: indices of the next batch, where they are known.
        data: what the data sets are, see `Contents`.
    """
    taken = {"the number of updates": str(step), **(data or {})}
    for name, optimizer in optimizers.items():
        taken[rate_of(name)] = ", ".join(map(_rate, rates_of(optimizer)))
    for name, state in random_state.items():
        for device, one in enumerate(state) if name == "cuda" else [(None, state)]:
            shown = name if device is None else f"{name}:{device}"
            taken[f"the generator of {shown}"] = _digest(one)
    for name, state in generators.items():
        taken[f"the generator {name}"] = _digest(state)
    if upcoming is not None:
        taken["the next batch"] = str(upcoming)
    return taken


def _rate(rate: Any) -> str:
    try:
        return f"{float(rate):g}"
    except (TypeError, ValueError, RuntimeError):
        # Optimizers that find their rate by themselves have None, or something of their own.
        return str(_plain(rate))


def differences(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Say in words what differs, the most telling first.

    Args:
        then: what a checkpoint says.
        now: that of the run that resumes from it.
    """
    found = []
    for what, was in then.items():
        value = now.get(what, _ABSENT)
        # What an epoch makes anew at its beginning is not there yet.
        is_later = what == "the next batch" or what.startswith("the generator self.")
        of_data = is_of_data(what)
        if value != was and not (what not in now and (is_later or of_data)):
            moved = f"{what} is not {'what' if of_data else 'where'} it was"
            found.append(moved if was.startswith("#") else f"{what} was {was}, is {value} now")
    return found


class ResumeCheck:
    """Proves that a resumed run does next what the restored checkpoint says comes next.

    Args:
        context: of the run.
        registry: of the sources.
        progress: of the run.
        found: the generators and loaders of the solver.
        counts: of the updates of each optimizer.

    Attributes:
        changes: all changes of the configuration since the first start, for checkpoints.
    """

    def __init__(
        self,
        context: RunContext,
        registry: StateRegistry,
        progress: Progress,
        found: FoundState,
        counts: UpdateCounts,
    ) -> None:
        self.changes: list[dict[str, Any]] = []
        self._context, self._registry, self._progress = context, registry, progress
        self._found, self._counts = found, counts
        # What the restored checkpoint says of itself, until it was compared.
        self._restored: LoadedState | None = None
        # Changes of the configuration since that checkpoint, with the value that counts.
        self._changed: list[tuple[Change, str | None]] = []
        self._retuned: set[str] = set()

    def fingerprint(self, upcoming: list[int] | None) -> Fingerprint:
        """Describe what comes next in this run.

        Args:
            upcoming: indices of the next batch, where they are known.
        """
        return fingerprint(
            self._progress.step,
            self._registry.optimizers(),
            RngState().state_dict(),
            self._found.shown(),
            upcoming,
            self._found.contents.steady(),
        )

    def expect(self, restored: LoadedState | None) -> None:
        """Compare with a restored checkpoint at the next `check`; with None, compare nothing."""
        self._restored = None if restored is None else replace(restored, state={})

    def take_changes(self, manifest: Manifest, built: dict[str, Groups]) -> None:
        """Apply what the user changed in the configuration since a checkpoint was saved.

        Args:
            manifest: of that checkpoint, whose state is restored.
            built: the arguments of the optimizers before the restore.
        """
        xp = self._context.xp
        now = lookup.plain_config(xp.cfg)
        then = manifest.info.get("config", now)
        retuning = Retuning(built, self._registry.optimizers(), self._registry.attributes())
        self._changed = [
            (change, retuning.apply(change))
            for change in changed_settings(then, now, xp.dora.exclude)
        ]
        self._retuned = retuning.retuned
        position = manifest.position
        self.changes = [
            *manifest.info.get("changes", []),
            *(
                {"epoch": position.epoch, "step": self._progress.step, "change": change.sentence(v)}
                for change, v in self._changed
            ),
        ]

    def check(self, upcoming: list[int] | None = None) -> None:
        """Compare what comes next with what the restored checkpoint says; only the first time.

        Args:
            upcoming: indices of the next batch, where they are known.

        Raises:
            StateMismatch: something differs, and `checkpoint.on_mismatch` is `refuse`.
        """
        # From the first call on, contents that change in the run are known.
        self._found.contents.steady()
        restored, self._restored = self._restored, None
        if restored is None or restored.manifest is None:
            return
        mine = self._differences(restored.manifest, upcoming)
        of_all = self._context.ranks.all_gather(mine)
        found = {
            text if all(text in one for one in of_all) else f"on rank {rank}, {text}": None
            for rank, texts in enumerate(of_all)
            for text in texts
        }
        if agreed := [one.sentence(verdict) for one, verdict in self._changed if one.is_excluded]:
            self._context.logger.warning("Changed since %s: %s", restored.where, "; ".join(agreed))
        if found:
            self._mismatch(restored.where, "; ".join(found))

    def _differences(self, manifest: Manifest, upcoming: list[int] | None) -> list[str]:
        info = manifest.info
        self._counts.counts = {name: list(one) for name, one in self._progress.updates.items()}
        # Another number of ranks draws other numbers, and the log has said so.
        ranks = self._context.ranks
        same = manifest.world_size == ranks.size and "next" in info
        then = dict(info["next"][ranks.rank]) if same else _same_on_all(info.get("next"))
        for name in self._retuned:
            then.pop(rate_of(name), None)
        return [
            *(one.sentence(verdict) for one, verdict in self._changed if not one.is_excluded),
            *self._counts.differences(self._registry.optimizers()),
            *differences(then, self.fingerprint(upcoming)),
        ]

    def _mismatch(self, where: str, what: str) -> None:
        text = f"this is not the run that was saved as {where}: {what}"
        if self._context.settings.checkpoint.on_mismatch == "refuse":
            raise StateMismatch(f"{text}. checkpoint.on_mismatch=warn goes on all the same")
        self._context.logger.warning("From here on %s", text)


def _same_on_all(fingerprints: list[Fingerprint] | None) -> Fingerprint:
    """Return what a checkpoint says of the data sets, if all ranks had the same ones."""
    first, *others = fingerprints or [{}]
    return {
        what: value
        for what, value in first.items()
        if is_of_data(what) and all(one.get(what) == value for one in others)
    }


def _digest(state: Any) -> str:
    data = state.numpy().tobytes() if isinstance(state, torch.Tensor) else repr(_plain(state))
    digest = hashlib.sha256(data if isinstance(data, bytes) else data.encode())
    return f"#{digest.hexdigest()[:16]}"


def _plain(state: Any) -> Any:
    # An array of NumPy shows only its ends.
    if isinstance(state, dict):
        return {key: _plain(item) for key, item in state.items()}
    if isinstance(state, list | tuple):
        return [_plain(item) for item in state]
    return state.tolist() if hasattr(state, "tolist") else state
