"""The weights that a solver keeps beside those it trains: the best ones, and their average."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import nn

from checkpoint.integration import is_sharded

from .. import metrics
from ..distributed.process_group import buffers, same_as_first
from ..distributed.wrappers import unwrapped
from ..settings.errors import ConfigError, nearest
from ..settings.validate import setting
from ..state.finite import nonfinite_names
from ..state.places import NoPlace, get_place
from ..state.registry import Attribute, held_object, unwrap_source
from ..state.swap import swapped
from .best_state import BestState
from .ema import ModuleDictEMA
from .optimizer_modes import OptimizerModes


class Weights(OptimizerModes):
    """Best state and EMA of a solver: registered, updated, swapped in and out."""

    train_updates_per_epoch: int
    total_updates: int

    def __init__(self) -> None:
        # Stages of the epoch in progress that were finished before the run was interrupted.
        self._finished: set[str] = set()
        # What a subclass says is no state.
        self._stateless: set[str] = set()
        # Sources that are there before a subclass registers any, and those that come after it.
        self._of_framework_sources: set[str] = {"ema"}
        super().__init__()
        self.best_state = BestState()
        # Audiocraft's second best state; kept so that its checkpoints and ours have the same names.
        self.fsdp_best_state: dict[str, Any] = {}
        self.ema: ModuleDictEMA | None = None
        self._ema_sources: dict[str, nn.Module] = {}
        self._ema_updates = 1
        self._has_ema = False
        self._swaps = 0
        # Buffers beside sharded parameters, which are those of rank 0 after each update.
        self._of_all_ranks: list[torch.Tensor] = []
        # Values that were not finite from the beginning, such as masks, by source.
        self._odd_at_first: dict[str, set[str]] = {}

    @property
    def best_metric_name(self) -> str | None:
        """Metric of the `valid` stage that decides what is best; None: the latest always is.

        It is a mean over samples where the loader says how many a batch has, see `samples_in`.
        Another batch size, or another number of ranks, does not change which epoch is the best.
        """
        return None

    @property
    def best_metric_mode(self) -> Literal["min", "max"]:
        """Whether less (`min`) or more (`max`) of `best_metric_name` is better."""
        return "min"

    def register_stateful(self, *args: str, write_only: bool = False) -> None:
        """Keep attributes in every checkpoint: objects with a state, and plain data.

        Args:
            args: names as after `self.`; `ema_teacher.steps` and `schedules['critic']` reach into
                attributes, lists and dicts.
            write_only: whether a restore leaves them as they are.

        Raises:
            ValueError: registered already, there is no such attribute, or the framework keeps the
                name for itself.
        """
        for name in args:
            self._refuse_name(name)
            try:
                place = Attribute(self, name)
                place.get()
            except NoPlace as error:
                raise ValueError(
                    f"cannot register {name!r}: {error}; set it before the call of "
                    f"register_stateful{_guess(error.missing, error.there)}"
                ) from error
            self.stateful.register(name, place, write_only)
            module = unwrap_source(self.stateful.sources[name])
            if isinstance(module, nn.Module):
                self._odd_at_first[name] = nonfinite_names(module)

    def register_stateless(self, *args: str) -> None:
        """Say that attributes, with all that they hold, are no state, though they change.

        Args:
            args: names as after `self.`, see `register_stateful`.

        Raises:
            ValueError: there is no such attribute.
        """
        for name in args:
            try:
                get_place(self, name)
            except NoPlace as error:
                raise ValueError(
                    f"register_stateless({name!r}): {error}; set it before the call"
                    f"{_guess(error.missing, error.there)}"
                ) from error
            self._stateless.add(name)

    def _refuse_name(self, name: str) -> None:
        if name in self._of_framework_sources:
            raise ValueError(
                f"register_stateful({name!r}): the framework keeps this name for a source of its "
                f"own; give self.{name} another name"
            )
        if name in self.stateful.sources:
            raise ValueError(f"register_stateful({name!r}): it is registered already")

    def registered_modules(self) -> dict[str, nn.Module]:
        """Return the modules that `register_stateful` knows, as the attributes hold them."""
        found: dict[str, nn.Module] = {}
        for name, source in self.stateful.sources.items():
            one = held_object(source)
            if isinstance(one, nn.Module):
                found[name] = one
        return found

    def register_best_state(self, *args: str) -> None:
        """Keep the best state of sources that `register_stateful` knows.

        Raises:
            ValueError: it does not know one of them.
        """
        for name in args:
            if name not in self.stateful.sources:
                raise ValueError(
                    f"call self.register_stateful({name!r}) before "
                    f"self.register_best_state({name!r})" + _guess(name, self.stateful.sources)
                )
            self.best_state.register(name, self.stateful.sources[name])

    def register_ema(self, *args: str) -> None:
        """Average these modules while training; call it in `build_model`.

        Raises:
            ValueError: too late, or not a module.
        """
        for name in args:
            if self.ema is not None:
                raise ValueError(f"call self.register_ema({name!r}) in build_model, not after it")
            try:
                module = unwrapped(attrgetter(name)(self))
            except AttributeError as error:
                raise ValueError(
                    f"register_ema({name!r}): set self.{name} before" + _guess(name, vars(self))
                ) from error
            if not isinstance(module, nn.Module):
                raise ValueError(f"register_ema({name!r}): self.{name} is not a torch.nn.Module")
            self._ema_sources[name] = module

    def initialize_ema(self) -> None:
        """Build the EMA of the registered modules from their present weights."""
        decay = setting(self.cfg, "optim.ema.decay")
        if not setting(self.cfg, "optim.ema.use") or decay is None:
            self.ema, self._has_ema = None, False
            return
        self._has_ema = True
        self._ema_updates = setting(self.cfg, "optim.ema.updates") or max(
            self.train_updates_per_epoch, 1
        )
        self.ema = ModuleDictEMA(
            self._ema_sources,
            decay,
            unbias=setting(self.cfg, "optim.ema.unbias"),
            device=setting(self.cfg, "optim.ema.device"),
        )
        self.logger.info("EMA with decay %g every %d updates", decay, self._ema_updates)
        if 0 < self.total_updates < self._ema_updates:
            self.logger.warning(
                "optim.ema.updates is %d and the whole run has %d updates: nothing is averaged",
                *(self._ema_updates, self.total_updates),
            )

    @contextmanager
    def own_state(self) -> Iterator[None]:
        """Run a block that loads a checkpoint of this very run, whose model may have grown."""
        kept: list[Any] = [one for one in (self.best_state, self.ema) if one is not None]
        for one in kept:
            one.keeps_misfits = True
        try:
            yield
        finally:
            for one in kept:
                one.keeps_misfits = False

    def update_best_state_from_stage(self, stage_name: str = "valid") -> None:
        """Take the present weights as the best state if the stage's metric is the best so far.

        One that is not finite never is; equal ones keep the older state. As long as no epoch has
        given the metric, the latest weights are taken rather than untrained ones.
        """
        if stage_name in self._finished:
            return
        name, mode = self._best_metric()
        why = "" if name is None else self.ranks.broadcast(self._why_best(stage_name, name, mode))
        if why is None:
            return
        if odd := self.odd_weights(self.best_state.states):
            self.logger.warning("No best state from this epoch: %s is not finite", odd[0])
            return
        if why:
            self.logger.info("New best state: %s", why)
        for source in self.best_state.states:
            self.best_state.update(source, self.stateful.sources[source])
        # What Audiocraft left there goes before `best_state`, and is not the best any more.
        self.fsdp_best_state.clear()

    def _best_metric(self) -> tuple[str | None, metrics.Mode]:
        """Name and direction of the metric that decides what is best: the configuration's first.

        Raises:
            ConfigError: the solver's direction is neither `min` nor `max`.
        """
        name = setting(self.cfg, "checkpoint.best_metric") or self.best_metric_name
        mode = setting(self.cfg, "checkpoint.best_mode") or self.best_metric_mode
        if mode not in ("min", "max"):
            raise ConfigError(
                f"best_metric_mode of {type(self).__name__} is {mode!r}: return 'min' if less of "
                "the metric is better, 'max' if more of it is"
            )
        return name, mode

    def _why_best(self, stage_name: str, name: str, mode: metrics.Mode) -> str | None:
        """Say why the present weights are the best by their metric; None if they are not."""
        best = metrics.best_score(self.history, stage_name, name, mode)
        given = self._pending_metrics.get(stage_name, {})
        score = given.get(name)
        if score is None:
            never = not any(name in stages.get(stage_name, {}) for stages in self.history)
            self.logger.warning(
                "Stage %s gives no metric %r to say what is best, only %s: %s",
                *(stage_name, name, ", ".join(given) or "nothing"),
                "the latest counts as the best" if never else "the best so far stays",
            )
            return "" if never else None
        if metrics.is_better(score, None if best is None else best[0], mode):
            was = "none" if best is None else f"{best[0]:.5g} in epoch {best[1]}"
            return f"{name}={score:.5g} (was {was})"
        if not metrics.is_better(score, None, mode):
            self.logger.warning("No best state from this epoch: %s is %s", name, score)
        return None

    def _check_weights_kept(self) -> None:
        """Refuse a solver that turned off what the base class keeps for it.

        Raises:
            ConfigError: see `_best_metric`, or `self.ema` was set to None.
        """
        self._best_metric()
        if self._has_ema and self.ema is None:
            raise ConfigError(
                f"{type(self).__name__} set self.ema to None, and optim.ema.use=true: the base "
                "class keeps the average in self.ema. Set optim.ema.use=false to train without "
                "one, or give your attribute another name"
            )

    def odd_weights(self, sources: Iterable[str]) -> list[str]:
        """Name the values of all ranks that are not finite and were when they were registered.

        Args:
            sources: names of sources; those that are no modules have none.
        """
        return self.of_all_ranks(self.odd_weights_here(sources))

    def odd_weights_here(self, sources: Iterable[str]) -> list[str]:
        """Name those that this rank sees; it may see a part of the values only."""
        return [
            f"{name}.{key}"
            for name in sources
            if isinstance(module := unwrap_source(self.stateful.sources[name]), nn.Module)
            for key in sorted(nonfinite_names(module) - self._odd_at_first.get(name, set()))
        ]

    def of_all_ranks(self, names: list[str]) -> list[str]:
        """Give the names that any rank gives, each once."""
        return list(dict.fromkeys(one for names_ in self.ranks.all_gather(names) for one in names_))

    @contextmanager
    def swap_best_state(self) -> Iterator[None]:
        """Run a block with the best state in place, then put everything back bit by bit."""
        # Where pointers cannot be exchanged, its values are overwritten in the block.
        self.best_state.before_change()
        with self._swapped(self.best_state.state_dict()):
            yield

    @contextmanager
    def swap_ema_state(self, *, skip_unstepped: bool = False) -> Iterator[None]:
        """Run a block with the EMA weights in place; without EMA, with the present ones.

        Args:
            skip_unstepped: whether an EMA without a step counts as none: its weights are those of
                the start of the run.
        """
        ema = None if skip_unstepped and self.ema is not None and not self.ema.count else self.ema
        with self._swapped({} if ema is None else ema.state):
            yield

    @contextmanager
    def _swapped(self, states: Mapping[str, Any]) -> Iterator[None]:
        # Before the exchange: an optimizer changes the weights that are in place.
        self.set_optimizer_modes(training=False)
        pairs = {name: (self._swap_target(name), state) for name, state in states.items()}
        self._swaps += 1
        try:
            with swapped(pairs):
                yield
        finally:
            self._swaps -= 1
            if self._current_stage == "train" and not self._swaps:
                self.set_optimizer_modes(training=True)

    def _same_on_all_ranks(self) -> None:
        """Give what every rank has whole, and its own of, the values of rank 0.

        Replicated models have buffers that each rank computes, and the first one's count.
        """
        if self.ranks.size == 1:
            return
        sources = {name: unwrap_source(one) for name, one in self.stateful.sources.items()}
        modules = {name: one for name, one in sources.items() if isinstance(one, nn.Module)}
        kept: list[torch.Tensor | None] = []
        for name, module in sorted(modules.items()):
            best = self.best_state.states.get(name, {})
            for key, buffer in sorted(buffers(module)):
                kept += [buffer, best.get(key)]
        averages = {} if self.ema is None else self.ema.state
        for name, average in sorted(averages.items()):
            kept += [average.get(key) for key, _ in sorted(buffers(self._ema_sources[name]))]
        same_as_first([one for one in kept if one is not None and not is_sharded(one)])

    def _swap_target(self, name: str) -> Any:
        if name not in self.stateful.sources:
            return self._ema_sources[name]
        source = self.stateful.sources[name]
        live = unwrap_source(source)
        return live if isinstance(live, nn.Module) else source


def _guess(name: str, names: Iterable[str]) -> str:
    near = nearest(name, (one for one in names if not one.startswith("_")))
    return f". Did you mean {near!r}?" if near and near != name else ""
