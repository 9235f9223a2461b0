"""What is checked whenever a run is saved, and when it resumes."""

from typing import Any, ClassVar

from torch import nn

from checkpoint import Checkpointer, Manifest, StateMismatch
from checkpoint.integration import Threshold, describe_newest

from ..data.contents import Contents, is_of_data
from ..data.loader_state import LoaderState
from ..discovery.generators import GeneratorState
from ..experiment.lookup import plain_config
from ..persistence.config_changes import Change, changed_settings
from ..persistence.resume_check import Fingerprint, differences, fingerprint, rate_of
from ..persistence.retuning import Groups, Retuning
from ..persistence.state_source import LoadedState
from ..settings.unread_keys import Reads, unrecorded, without_effect
from ..settings.validate import setting
from ..state.module_modes import ModuleModes, set_to_train
from ..state.optimizers import Optimizer, parameters_of
from ..state.pending_gradients import PendingGradients
from ..state.progress import Progress
from ..state.registry import named_parameters, unwrap_source
from ..state.rng import RngState
from ..weights.shadow_weights import Weights
from .nonfinite_guard import FiniteGuard, NonFinite
from .unregistered_state import Escapes, advice
from .update_counts import UpdateActivity, UpdateCounts, trained_by, unchanged_sources


class Checks(Weights):
    """Weights that are finite and change, updates that are counted, a run that is the same run."""

    sets_all_modes: ClassVar[bool] = True
    checkpointer: Checkpointer
    dataloaders: dict[str, Any]

    def __init__(self) -> None:
        super().__init__()
        self._reads = Reads(self.cfg, self.xp.cfg)
        self._progress = Progress()
        self._loader_state = LoaderState(lambda: self.dataloaders)
        self._module_modes = ModuleModes(self.registered_modules)
        self._generators = GeneratorState(self.reached, self._loader_state.kept)
        self._contents = Contents(lambda: self.dataloaders)
        self._escapes = Escapes(self, self.reached, lambda: self.stateful.sources, self._stateless)
        # Whether this process looked for what escapes at the end of an epoch.
        self._has_looked = False
        self.finite_guard = FiniteGuard(
            setting(self.cfg, "optim.on_nonfinite"),
            self.folder,
            self.ranks.rank,
            self._progress,
            (lambda number: self.ranks.all_reduce_max(number)[0]) if self.ranks.size > 1 else None,
        )
        self._counts = UpdateCounts()
        self._gradients = PendingGradients(lambda: named_parameters(self.stateful.sources))
        # Of each optimizer since the last save, and between that and the one before.
        self._moves: dict[str, UpdateActivity] = {}
        self._moved: dict[str, UpdateActivity] = {}
        self._on_mismatch: str = setting(self.cfg, "checkpoint.on_mismatch")
        self._threshold_of: tuple[str, str | None] = (
            setting(self.cfg, "checkpoint.threshold.stage"),
            setting(self.cfg, "checkpoint.threshold.metric"),
        )
        value = setting(self.cfg, "checkpoint.threshold.value")
        mode = setting(self.cfg, "checkpoint.threshold.mode")
        patience = setting(self.cfg, "checkpoint.threshold.patience")
        self._threshold = None if value is None else Threshold(value, mode, patience)
        # What the checkpoint that was restored says about itself, until it was compared.
        self._restored: LoadedState | None = None
        # What the user changed since then, with the value that counts; and all earlier changes.
        self._changed: list[tuple[Change, str | None]] = []
        self._past_changes: list[dict[str, Any]] = []
        self._retuned: set[str] = set()

    def set_to_train(self) -> None:
        """Put modules that were left in evaluation mode into training mode, see `modes`."""
        optimizers = self._optimizers().values()
        trained = {id(one) for optimizer in optimizers for one in parameters_of(optimizer)}
        set_to_train(self.moded_modules(), trained)

    def moded_modules(self) -> dict[str, nn.Module]:
        """Return the modules whose mode the framework sets."""
        modules = self.registered_modules()
        return modules if self.sets_all_modes else {"model": modules["model"]}

    def note_update(self, name: str, optimizer: Optimizer) -> None:
        """Count an update that an optimizer just made."""
        self._counts.note(name, optimizer)
        if (moves := self._moves.get(name)) is None:
            moves = self._moves[name] = UpdateActivity()
        moves.note(optimizer)

    def crosses_threshold(self) -> bool:
        """Whether a metric of this very epoch crosses its threshold; called once, at its end."""
        stage, metric = self._threshold_of
        given = self._pending_metrics.get(stage)
        if self._threshold is None or given is None:
            return False
        if metric not in given:
            self.logger.warning(
                "checkpoint.threshold.metric: stage %s gives no %r, only %s",
                *(stage, metric, ", ".join(given) or "nothing"),
            )
        self._threshold.held = self._progress.held
        crossed = self._threshold.observe(self.ranks.broadcast(given.get(metric)))
        self._progress.held = self._threshold.held
        return crossed

    def name_unread_settings(self) -> None:
        """Warn of settings that no code read since the start; once, after a whole epoch."""
        if not self._reads.is_complete:
            return
        # Keys that `dora.exclude` has are in the arguments alone.
        given = [one.lstrip("+").partition("=")[0] for one in self.xp.argv]
        overridden = {key for key, _ in self.xp.delta or ()} | set(given)
        with unrecorded():
            found = without_effect(self.cfg, self._reads.keys(), overridden)
        self._reads.stop()
        for sentence in found if self.ranks.is_first else ():
            self.logger.warning("%s", sentence)

    # What is in no source.

    def refuse_early_escapes(self) -> None:
        """Refuse, after the first update of a process, modules that it changed and nothing saves.

        Raises:
            ValueError: the message names the modules.
        """
        modules, values = self._escapes.compare(first=True)
        if modules:
            raise ValueError(self._escaped(modules))
        self._warn_of(values)

    def look_for_escapes(self) -> str | None:
        """Name what changed since the last look and is in no source; at the end of an epoch.

        Returns:
            Why the run must not go on: a module changes; at the first look only.
        """
        mine, values = self._escapes.compare()
        self._warn_of(values)
        modules, is_first = self.of_all_ranks(mine), not self._has_looked
        self._has_looked = True
        if modules and not is_first:
            self.logger.error("%s", self._escaped(modules))
        return self._escaped(modules) if modules and is_first else None

    def _warn_of(self, values: list[list[str]]) -> None:
        for paths in values:
            shown = ", ".join(f"self.{path}" for path in paths)
            self.logger.warning(
                "%s changes, and no checkpoint holds it, so a restart loses it: %s",
                *(shown, advice(self, paths)),
            )

    def _escaped(self, modules: list[str]) -> str:
        return "; ".join(
            f"self.{path} changes while the solver trains, and no checkpoint holds it, so a "
            f"restart loses it: {advice(self, [path])}"
            for path in modules
        )

    # Before and after each save.

    def check_before_save(self) -> None:
        """Look at what is to be saved, but for the weights, see `judge`.

        Raises:
            NonFinite: a gradient or a loss was not finite, and `optim.on_nonfinite` is `stop`.
            ConfigError: `self.ema` was set to None.
        """
        self._check_weights_kept()
        self.finite_guard.look()
        for what in self._counts.differences(self._optimizers()):
            self.logger.error("%s: updates were made elsewhere, or its state was replaced", what)
        self._progress.updates = {name: list(one) for name, one in self._counts.counts.items()}

    def judge(self, mine: list[str]) -> bool:
        """Say whether all weights are finite; on all ranks.

        Args:
            mine: what `odd_weights_here` says.

        Raises:
            NonFinite: they are not, and `optim.on_nonfinite` is `stop`.
        """
        odd = self.of_all_ranks(mine)
        if odd and self.finite_guard.policy == "stop":
            raise NonFinite(
                f"nothing is saved: {odd[0]} is not finite any more ({len(odd)} such tensors), and "
                f"optim.on_nonfinite is stop. {describe_newest(self.checkpointer.storage)}"
            )
        if odd:
            self.logger.warning(
                "%s is not finite: this checkpoint takes the place of no good one", odd[0]
            )
        return not odd

    def note_save(self) -> None:
        """Begin to count what is done between this save and the next one."""
        self._moved, self._moves = self._moves, {}
        self._gradients.note_save()

    def check_after_save(self, unchanged: frozenset[str]) -> None:
        """Say what training should have changed between the last two saves, and did not.

        Args:
            unchanged: sources whose tensors are the same in both.
        """
        live = {name: unwrap_source(source) for name, source in self.stateful.sources.items()}
        owners = trained_by(live, self._optimizers())
        for source, updates, rate in unchanged_sources(unchanged, owners, self._moved):
            if not rate:
                self.logger.warning("%r stands still: the learning rate is 0", source)
                continue
            self.logger.error(
                "%r is bit by bit what it was at the save before, after %d updates: nothing is "
                "learned. Does the optimizer have these very parameters, do gradients reach them, "
                "and is the learning rate large enough for their type?",
                *(source, updates),
            )

    # What comes next, in a checkpoint and when a run resumes.

    def _fingerprint(self, upcoming: list[int] | None) -> Fingerprint:
        return fingerprint(
            self._progress.step,
            self._optimizers(),
            RngState().state_dict(),
            self._loader_state.generators() | self._generators.shown(),
            upcoming,
            self._contents.steady(),
        )

    def take_changes(self, manifest: Manifest, built: dict[str, Groups]) -> None:
        """Apply what the user changed in the configuration since a checkpoint was saved.

        Args:
            manifest: of that checkpoint, whose state is restored.
            built: the arguments of the optimizers before the restore.
        """
        now = plain_config(self.xp.cfg)
        then = manifest.info.get("config", now)
        retuning = Retuning(built, self._optimizers(), vars(self))
        self._changed = [
            (change, retuning.apply(change))
            for change in changed_settings(then, now, self.xp.dora.exclude)
        ]
        self._retuned = retuning.retuned
        position = manifest.position
        self._past_changes = [
            *manifest.info.get("changes", []),
            *(
                {"epoch": position.epoch, "step": self._progress.step, "change": change.sentence(v)}
                for change, v in self._changed
            ),
        ]

    def check_resumed(self, upcoming: list[int] | None = None) -> None:
        """Compare what comes next to what the restored checkpoint says; once, before anything else.

        Args:
            upcoming: indices of the next batch, where they are known.

        Raises:
            StateMismatch: something differs, and `checkpoint.on_mismatch` is `refuse`.
        """
        # From here on it is known what changes in a run.
        self._contents.steady()
        restored, self._restored = self._restored, None
        if restored is None or restored.manifest is None:
            return
        mine = self._differences(restored.manifest, upcoming)
        of_all = self.ranks.all_gather(mine)
        found = {
            text if all(text in one for one in of_all) else f"on rank {rank}, {text}": None
            for rank, texts in enumerate(of_all)
            for text in texts
        }
        if agreed := [one.sentence(verdict) for one, verdict in self._changed if one.is_excluded]:
            self.logger.warning("Changed since %s: %s", restored.where, "; ".join(agreed))
        if found:
            self._mismatch(restored.where, "; ".join(found))

    def _differences(self, manifest: Manifest, upcoming: list[int] | None) -> list[str]:
        info = manifest.info
        self._counts.counts = {name: list(one) for name, one in self._progress.updates.items()}
        # Another number of ranks draws other numbers, and the log has said so.
        same = manifest.world_size == self.ranks.size and "next" in info
        then = dict(info["next"][self.ranks.rank]) if same else _same_on_all(info.get("next"))
        for name in self._retuned:
            then.pop(rate_of(name), None)
        return [
            *(one.sentence(verdict) for one, verdict in self._changed if not one.is_excluded),
            *self._counts.differences(self._optimizers()),
            *differences(then, self._fingerprint(upcoming)),
        ]

    def _mismatch(self, where: str, what: str) -> None:
        text = f"this is not the run that was saved as {where}: {what}"
        if self._on_mismatch == "refuse":
            raise StateMismatch(f"{text}. checkpoint.on_mismatch=warn goes on all the same")
        self.logger.warning("From here on %s", text)


def _same_on_all(fingerprints: list[Fingerprint] | None) -> Fingerprint:
    """Return what the data sets were, if each rank had the same ones."""
    first, *others = fingerprints or [{}]
    return {
        what: value
        for what, value in first.items()
        if is_of_data(what) and all(one.get(what) == value for one in others)
    }
