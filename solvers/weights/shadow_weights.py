"""The weights that a solver keeps beside those that it trains: the best state and the EMA."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from checkpoint.integration import is_sharded

from .. import metrics
from ..distributed.process_group import buffers, same_as_first
from ..distributed.wrappers import unwrapped
from ..run_context import RunContext
from ..settings.errors import ConfigError
from ..state.progress import Progress
from ..state.registry import StateRegistry, guess
from ..state.sources import unwrap_source
from ..state.swap import swapped
from .best_state import BestState
from .ema import ModuleDictEMA
from .optimizer_modes import OptimizerModes


class ShadowWeights:
    """Registers, updates and swaps the best state and the EMA of a solver.

    Args:
        context: of the run.
        registry: of the sources.
        progress: of the run.
        modes: of the optimizers, which are set before weights are swapped.
        best_metric: returns name and direction of the metric of the solver that says what is best.

    Attributes:
        best: copies of the best weights.
        fsdp_best: Audiocraft's second best state, so that checkpoints have the same names.
        ema: the running average, or None.
        ema_sources: name -> module that is averaged.
        modes: of the optimizers.
    """

    def __init__(
        self,
        context: RunContext,
        registry: StateRegistry,
        progress: Progress,
        modes: OptimizerModes,
        best_metric: Callable[[], tuple[str | None, str]],
    ) -> None:
        self.best = BestState()
        self.fsdp_best: dict[str, Any] = {}
        self.ema: ModuleDictEMA | None = None
        self.ema_sources: dict[str, nn.Module] = {}
        self._context, self._registry, self._progress = context, registry, progress
        self.modes, self._best_metric = modes, best_metric
        self._has_ema = False
        self._every = 1
        self._swaps = 0

    # Registration.

    def register_best(self, *names: str) -> None:
        """Keep the best state of registered sources.

        Raises:
            ValueError: one of them is not registered.
        """
        sources = self._registry.sources
        for name in names:
            if name not in sources:
                raise ValueError(
                    f"call self.register_stateful({name!r}) before "
                    f"self.register_best_state({name!r})" + guess(name, sources)
                )
            self.best.register(name, sources[name])

    def register_ema(self, name: str, module: Any) -> None:
        """Average a module while it is trained.

        Raises:
            ValueError: the EMA is built already, or it is not a module.
        """
        if self.ema is not None:
            raise ValueError(f"call self.register_ema({name!r}) in build_model, not after it")
        module = unwrapped(module)
        if not isinstance(module, nn.Module):
            raise ValueError(f"register_ema({name!r}): self.{name} is not a torch.nn.Module")
        self.ema_sources[name] = module

    def initialize_ema(self, updates_per_epoch: int, total_updates: int) -> None:
        """Build the EMA of the registered modules from their present weights, if it is used.

        Args:
            updates_per_epoch: optimizer updates of an epoch.
            total_updates: optimizer updates of the whole run.
        """
        ema = self._context.settings.optim.ema
        if not ema.use or ema.decay is None:
            self.ema, self._has_ema = None, False
            return
        self._has_ema = True
        self._every = ema.updates or max(updates_per_epoch, 1)
        self.ema = ModuleDictEMA(self.ema_sources, ema.decay, unbias=ema.unbias, device=ema.device)
        logger = self._context.logger
        logger.info("EMA with decay %g every %d updates", ema.decay, self._every)
        if 0 < total_updates < self._every:
            logger.warning(
                "optim.ema.updates is %d and the whole run has %d updates: nothing is averaged",
                *(self._every, total_updates),
            )

    def check_kept(self) -> None:
        """Refuse a solver that turned off the average that the base class keeps for it.

        Raises:
            ConfigError: see `best_metric`, or `self.ema` was set to None.
        """
        self.best_metric()
        if self._has_ema and self.ema is None:
            raise ConfigError(
                f"{self._context.solver_name} set self.ema to None, and optim.ema.use=true: the "
                "base class keeps the average in self.ema. Set optim.ema.use=false to train "
                "without one, or give your attribute another name"
            )

    # Updates.

    def step(self) -> None:
        """Take the present weights into the average, if that is due after this update."""
        if self.ema is not None and self._progress.step % self._every == 0:
            self.ema.step()

    def best_metric(self) -> tuple[str | None, metrics.Mode]:
        """Return name and direction of the metric that says what is best: the settings come first.

        Raises:
            ConfigError: the solver's direction is neither `min` nor `max`.
        """
        checkpoint = self._context.settings.checkpoint
        own_name, own_mode = self._best_metric()
        name, mode = checkpoint.best_metric or own_name, checkpoint.best_mode or own_mode
        if mode not in ("min", "max"):
            raise ConfigError(
                f"best_metric_mode of {self._context.solver_name} is {mode!r}: return 'min' if "
                "less of the metric is better, 'max' if more of it is"
            )
        return name, mode  # type: ignore[return-value]

    def update_best(self, stage: str) -> None:
        """Take the present weights as the best state if the metric of a stage is the best so far.

        A metric that is not finite is never the best; equal metrics keep the older state. As long
        as no epoch has the metric, the latest weights are taken, since untrained ones are worse.
        """
        if stage in self._progress.finished:
            return
        ranks, logger = self._context.ranks, self._context.logger
        name, mode = self.best_metric()
        why = "" if name is None else ranks.broadcast(self._why_best(stage, name, mode))
        if why is None:
            return
        if odd := self._context.on_any_rank(self._registry.odd_weights(self.best.states)):
            logger.warning("No best state from this epoch: %s is not finite", odd[0])
            return
        if why:
            logger.info("New best state: %s", why)
        self.take_as_best()
        # A restore takes what Audiocraft left there before `best_state`. It is not the best now.
        self.fsdp_best.clear()

    def take_as_best(self) -> None:
        """Take the present weights as the best state."""
        for name in self.best.states:
            self.best.update(name, self._registry.sources[name])

    def _why_best(self, stage: str, name: str, mode: metrics.Mode) -> str | None:
        """Return why the present weights are the best by their metric; None if they are not."""
        history, logger = self._context.history, self._context.logger
        best = metrics.best_score(history, stage, name, mode)
        given = self._context.metrics().get(stage, {})
        score = given.get(name)
        if score is None:
            never = not any(name in stages.get(stage, {}) for stages in history)
            logger.warning(
                "Stage %s gives no metric %r to say what is best, only %s: %s",
                *(stage, name, ", ".join(given) or "nothing"),
                "the latest counts as the best" if never else "the best so far stays",
            )
            return "" if never else None
        if metrics.is_better(score, None if best is None else best[0], mode):
            was = "none" if best is None else f"{best[0]:.5g} in epoch {best[1]}"
            return f"{name}={score:.5g} (was {was})"
        if not metrics.is_better(score, None, mode):
            logger.warning("No best state from this epoch: %s is %s", name, score)
        return None

    def broadcast(self) -> None:
        """Broadcast replicated buffers, and the copies kept of them, from rank 0.

        Each rank computes the buffers of a replicated model, such as running means. Those of rank
        0 count.
        """
        if self._context.ranks.size == 1:
            return
        live = self._registry.live()
        modules = {name: one for name, one in live.items() if isinstance(one, nn.Module)}
        kept: list[torch.Tensor | None] = []
        for name, module in sorted(modules.items()):
            best = self.best.states.get(name, {})
            for key, buffer in sorted(buffers(module)):
                kept += [buffer, best.get(key)]
        averages = {} if self.ema is None else self.ema.state
        for name, average in sorted(averages.items()):
            kept += [average.get(key) for key, _ in sorted(buffers(self.ema_sources[name]))]
        same_as_first([one for one in kept if one is not None and not is_sharded(one)])

    # Swaps.

    @property
    def is_swapped(self) -> bool:
        """Whether other weights than the trained ones are in place."""
        return self._swaps > 0

    @contextmanager
    def swap_best(self) -> Iterator[None]:
        """Run a block with the best state in place, then put everything back bit by bit."""
        # Where pointers cannot be exchanged, the block overwrites the values of the best state.
        self.best.before_change()
        with self._swapped(self.best.state_dict()):
            yield

    @contextmanager
    def swap_ema(self, *, skip_unstepped: bool = False) -> Iterator[None]:
        """Run a block with the EMA weights in place; without an EMA, with the present weights.

        Args:
            skip_unstepped: whether an EMA without a step counts as none. Its weights are those of
                the start of the run.
        """
        ema = None if skip_unstepped and self.ema is not None and not self.ema.count else self.ema
        with self._swapped({} if ema is None else ema.state):
            yield

    @contextmanager
    def _swapped(self, states: Mapping[str, Any]) -> Iterator[None]:
        # Before the exchange: an optimizer changes the weights that are in place.
        self.modes.set(training=False)
        pairs = {name: (self._swap_target(name), state) for name, state in states.items()}
        self._swaps += 1
        try:
            with swapped(pairs):
                yield
        finally:
            self._swaps -= 1
            if not self._swaps and self._context.stage() == "train":
                self.modes.set(training=True)

    def _swap_target(self, name: str) -> Any:
        if name not in self._registry.sources:
            return self.ema_sources[name]
        source = self._registry.sources[name]
        live = unwrap_source(source)
        return live if isinstance(live, nn.Module) else source

    # Loading.

    @contextmanager
    def loads_own_state(self) -> Iterator[None]:
        """Run a block that loads a checkpoint of this very run, whose model may have grown."""
        kept: list[Any] = [one for one in (self.best, self.ema) if one is not None]
        for one in kept:
            one.keeps_misfits = True
        try:
            yield
        finally:
            for one in kept:
                one.keeps_misfits = False
