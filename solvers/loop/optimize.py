"""One line for an update: `self.optimize(loss)` in `run_step`."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from ..distributed.parallelism import Parallelism
from ..health.update_watch import UpdateWatch
from ..metrics import Metrics
from ..optim.builders import make_grad_scaler
from ..optim.update import Update, Window, schedules_of
from ..run_context import RunContext
from ..settings.unread_keys import Reads
from ..state.registry import StateRegistry

RunStep = Callable[[int, Any, Metrics], Metrics]
"""Trains or validates on one batch, see `StandardSolver.run_step`."""


class Optimization:
    """Makes the updates of optimizers, as the section `optim` of the configuration says.

    Args:
        context: of the run.
        registry: finds optimizers, schedules and gradient scalers.
        parallelism: leaves gradients on each rank until the last batch of a window.
        watch: says whether a step was made.
        window: the batches of one update.
        reads: the record of the settings that are used.

    Attributes:
        window: see above.
    """

    def __init__(
        self,
        context: RunContext,
        registry: StateRegistry,
        parallelism: Parallelism,
        watch: UpdateWatch,
        window: Window,
        reads: Reads,
    ) -> None:
        self._context, self._registry, self._parallelism = context, registry, parallelism
        self._watch, self.window, self._reads = watch, window, reads
        self._updates: dict[str, Update] = {}
        # Optimizers with gradients of this window. The last batch of the window must use them.
        self._gathering: set[str] = set()
        # A scaler that was used since its last `update`.
        self._scaled: torch.amp.GradScaler | None = None
        self._stepped: set[str] = set()
        self._scaler_name: str | None = None

    def optimize(self, loss: torch.Tensor, name: str, *, schedules: bool) -> torch.Tensor | None:
        """Make an update of an optimizer, see `StandardSolver.optimize`."""
        update = self._updates.get(name)
        if update is None or self._registry.attributes().get(name) is not update.optimizer:
            update = self._plan_update(name)
        self._check_call(loss, name, update)
        window, scaler = self.window, self._scaler()
        if scaler is not None and name in self._stepped and window.length == 1:
            # A second update in one batch.
            self._update_scaler()
        update.backward(loss, window.size, scaler)
        if not window.is_due:
            self._gathering.add(name)
            return None
        self._gathering.discard(name)
        if scaler is None:
            norm, made = update.step(None), True
        else:
            norm, made = self._scaled_step(name, update, scaler)
        if made and schedules and update.schedules:
            attributes = self._registry.attributes()
            for key, schedule in update.schedules.items():
                if attributes.get(key) is schedule:
                    schedule.step()
        return norm

    def _check_call(self, loss: torch.Tensor, name: str, update: Update) -> None:
        stage = self._context.stage()
        if stage != "train":
            raise RuntimeError(
                f"self.optimize was called in stage {stage!r}: call it only `if self.is_training`"
            )
        if not loss.requires_grad:
            raise ValueError(
                "self.optimize(loss): the loss has no graph, so that nothing can be learned from "
                "it: was it detached, or computed under torch.no_grad, or is nothing trainable?"
            )
        if self.window.length > 1:
            if update.batch == self.window.index:
                raise ValueError(
                    f"self.optimize was called twice for {name!r} in one batch, with "
                    f"optim.accumulation={self.window.length}: call it once with the sum of losses"
                )
            update.batch = self.window.index

    def _plan_update(self, name: str) -> Update:
        attributes, optimizers = self._registry.attributes(), self._registry.optimizers()
        optimizer = attributes.get(name)
        if not (hasattr(optimizer, "step") and hasattr(optimizer, "param_groups")):
            known = ", ".join(map(repr, optimizers)) or "none"
            raise ValueError(
                f"self.optimize: self.{name} is no optimizer. Set it in build_model, or give the "
                f"name of another attribute; optimizers of this solver: {known}"
            )
        update = Update(
            optimizer,
            list(optimizers.values()),
            schedules_of(optimizer, attributes),
            self._context.settings.optim.max_norm,
        )
        self._updates[name] = update
        self._reads.note("optim.max_norm")
        return update

    # Gradient scaling.

    def new_scaler(self, dtype: torch.dtype) -> torch.amp.GradScaler | None:
        """Return a gradient scaler for autocast in float16; None if the solver needs no new one.

        Args:
            dtype: the type of autocast.
        """
        needs_scaler = self._context.settings.autocast and dtype == torch.float16
        if not needs_scaler or "scaler" in self._registry.attributes() or self._registry.scalers():
            return None
        return make_grad_scaler(self._context.device, dtype)

    def _scaler(self) -> torch.amp.GradScaler | None:
        if self._scaler_name is None:
            return None
        scaler = self._registry.attributes().get(self._scaler_name)
        return scaler if scaler is not None and scaler.is_enabled() else None

    def _scaled_step(
        self, name: str, update: Update, scaler: torch.amp.GradScaler
    ) -> tuple[torch.Tensor | None, bool]:
        before, self._watch.made = self._watch.made, False
        norm = update.step(scaler)
        # The scaler does not tell whether it made the step. An optimizer without hooks cannot.
        made = self._watch.made or not self._watch.watches(name)
        self._watch.made = self._watch.made or before
        self._scaled = scaler
        self._stepped.add(name)
        return norm, made

    def _update_scaler(self) -> None:
        """Let the scaler choose its next factor, once all optimizers of a window made their step.

        Gradients of one window must have one factor.
        """
        if self._scaled is not None:
            self._scaled.update()
            self._scaled = None
            self._stepped.clear()

    # Windows of batches.

    def begin(self, batches: int, run_step: RunStep) -> RunStep:
        """Begin a train stage; return `run_step` in the context that each batch of a window needs.

        Args:
            batches: number of batches of the stage.
            run_step: of the solver.
        """
        self.window.begin(batches)
        self._updates.clear()
        self._gathering.clear()
        names = sorted(self._registry.scalers(), key=lambda name: name != "scaler")
        self._scaler_name = next(iter(names), None)
        return run_step if self.window.length == 1 else partial(self._in_window, run_step)

    @property
    def closes_windows(self) -> bool:
        """Whether `end_window` has work. A window of one batch has none, except for a scaler."""
        return self.window.length > 1 or self._scaler_name is not None

    def _in_window(self, run_step: RunStep, idx: int, batch: Any, metrics: Metrics) -> Metrics:
        """Run one batch of a window.

        Gradients of replicas are averaged in the last batch only. Sharded gradients are averaged
        in each batch, because whole gradients would take the memory that sharding saves.
        """
        self.window.enter(idx)
        # Around the forward pass too, because DDP reads the flag there.
        is_last = self.window.is_due
        with nullcontext() if is_last else self._parallelism.no_sync(sharded=False):
            return run_step(idx, batch, metrics)

    def end_window(self) -> None:
        """Close a window after its last batch.

        Raises:
            ValueError: gradients were gathered in it, and no update was made with them.
        """
        self._update_scaler()
        if self._gathering:
            names = ", ".join(map(repr, sorted(self._gathering)))
            raise ValueError(
                f"self.optimize was called for {names} in a window of optim.accumulation="
                f"{self.window.length} batches, but not in its last batch: call it in each batch "
                "of a window, or set optim.accumulation=1"
            )
