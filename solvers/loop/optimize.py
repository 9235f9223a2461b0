"""One line for an update: `self.optimize(loss)` in `run_step`."""

from contextlib import AbstractContextManager, nullcontext

import torch
from omegaconf import DictConfig

from ..optim.builders import make_grad_scaler
from ..optim.update import Update, Window, schedules_of
from ..persistence.mid_epoch import Interruptible
from ..settings.unread_keys import unrecorded
from ..settings.validate import setting


class Optimizing(Interruptible):
    """Makes the updates of optimizers, as the section `optim` of the configuration says.

    Attributes:
        autocast_dtype: what `autocast` computes in.
    """

    autocast_dtype: torch.dtype

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__(cfg)
        # They have an effect only where `optimize` and `autocast` are used.
        with unrecorded():
            self._max_norm: float | None = setting(cfg, "optim.max_norm") or None
            self._autocast: bool = setting(cfg, "autocast")
        self._updates: dict[str, Update] = {}
        # Optimizers with gradients of this window, which its last batch has to use.
        self._gathering: set[str] = set()
        # A scaler that was used since its last `update`.
        self._scaled: torch.amp.GradScaler | None = None
        self._stepped: set[str] = set()
        self._scaler_name: str | None = None

    @property
    def is_update_due(self) -> bool:
        """Whether this batch ends a window of `optim.accumulation` batches: time for a step."""
        return self._window.is_due

    def optimize(
        self, loss: torch.Tensor, optimizer: str = "optimizer", *, schedules: bool = True
    ) -> torch.Tensor | None:
        """Make an update of an optimizer with the gradients of a loss; in `run_step`, in training.

        In this order: backward of `loss`; gradient scaling with autocast in float16, by the
        `GradScaler` that is an attribute of this solver, else by one that the framework makes and
        saves; clipping to `optim.max_norm`; step of the optimizer; step of its schedules;
        `zero_grad`. A step that the scaler leaves out steps no schedule.

        With `optim.accumulation` = N, gradients are averaged over N batches (fewer at the end of an
        epoch), without communication between replicas, and all after backward is done once.

        Schedules that step: each attribute of this solver that is a schedule of torch's for this
        optimizer. Not `ReduceLROnPlateau`, and not one inside another, which steps it.

        With several optimizers, call it once for each with its own loss. The backward pass leaves
        the gradients of parameters that only other optimizers have as they were.

        Args:
            loss: mean over this batch, a tensor with one element.
            optimizer: name of the attribute that holds the optimizer.
            schedules: False to step schedules elsewhere, such as once an epoch.

        Returns:
            With `optim.max_norm`, the norm of the gradients before clipping, where an update was
            made; else None.

        Raises:
            RuntimeError: the stage is not `train`.
            ValueError: the loss has no graph, or there is no such optimizer, or one that needs a
                closure, or the second call for it in one batch of several.
        """
        update = self._updates.get(optimizer)
        if update is None or vars(self).get(optimizer) is not update.optimizer:
            update = self._plan_update(optimizer)
        self._check_call(loss, optimizer, update)
        window, scaler = self._window, self._scaler()
        if scaler is not None and optimizer in self._stepped and window.length == 1:
            # A second update in one batch.
            self._update_scaler()
        update.backward(loss, window.size, scaler)
        if not window.is_due:
            self._gathering.add(optimizer)
            return None
        self._gathering.discard(optimizer)
        if scaler is None:
            norm, made = update.step(None), True
        else:
            norm, made = self._scaled_step(optimizer, update, scaler)
        if made and schedules and update.schedules:
            for name, schedule in update.schedules.items():
                if vars(self).get(name) is schedule:
                    schedule.step()
        return norm

    def _check_call(self, loss: torch.Tensor, optimizer: str, update: Update) -> None:
        if self._current_stage != "train":
            raise RuntimeError(
                f"self.optimize was called in stage {self._current_stage!r}: call it only "
                "`if self.is_training`"
            )
        if not loss.requires_grad:
            raise ValueError(
                "self.optimize(loss): the loss has no graph, so that nothing can be learned from "
                "it: was it detached, or computed under torch.no_grad, or is nothing trainable?"
            )
        if self._window.length > 1:
            if update.batch == self._window.index:
                raise ValueError(
                    f"self.optimize was called twice for {optimizer!r} in one batch, with "
                    f"optim.accumulation={self._window.length}: call it once with the sum of losses"
                )
            update.batch = self._window.index

    def _plan_update(self, name: str) -> Update:
        held = vars(self)
        optimizer = held.get(name)
        if not (hasattr(optimizer, "step") and hasattr(optimizer, "param_groups")):
            known = ", ".join(map(repr, self._optimizers())) or "none"
            raise ValueError(
                f"self.optimize: self.{name} is no optimizer. Set it in build_model, or give the "
                f"name of another attribute; optimizers of this solver: {known}"
            )
        update = Update(
            optimizer,
            list(self._optimizers().values()),
            schedules_of(optimizer, held),
            self._max_norm,
        )
        self._updates[name] = update
        self._reads.note("optim.max_norm")
        return update

    # Gradient scaling.

    def _register_schedules(self) -> None:
        self._make_scaler()
        super()._register_schedules()

    def _make_scaler(self) -> None:
        """Make and register a gradient scaler for autocast in float16, if there is none."""
        if not self._autocast or self.autocast_dtype != torch.float16:
            return
        held = vars(self)
        if "scaler" in held or any(isinstance(v, torch.amp.GradScaler) for v in held.values()):
            return
        self.scaler = make_grad_scaler(self.device, self.autocast_dtype)
        self.register_stateful("scaler")

    def _scaler(self) -> torch.amp.GradScaler | None:
        if self._scaler_name is None:
            return None
        scaler = vars(self).get(self._scaler_name)
        return scaler if scaler is not None and scaler.is_enabled() else None

    def _scaled_step(
        self, name: str, update: Update, scaler: torch.amp.GradScaler
    ) -> tuple[torch.Tensor | None, bool]:
        before, self._updated = self._updated, False
        norm = update.step(scaler)
        # The scaler does not say so; an optimizer without hooks cannot.
        made = self._updated or name not in self._watched
        self._updated = self._updated or before
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

    def begin_windows(self, batches: int) -> Window:
        """Begin a train stage of so many batches; return what says which of them end an update."""
        self._window.begin(batches)
        self._updates.clear()
        self._gathering.clear()
        names = [n for n, v in vars(self).items() if isinstance(v, torch.amp.GradScaler)]
        self._scaler_name = next(iter(sorted(names, key=lambda name: name != "scaler")), None)
        return self._window

    @property
    def has_scaler(self) -> bool:
        """Whether a gradient scaler may be used in the train stage that began last."""
        return self._scaler_name is not None

    def in_window(self, idx: int) -> AbstractContextManager[None]:
        """Begin a batch of a window; return what `run_step` runs in.

        Gradients of replicas meet in the last batch only. Sharded gradients meet in each batch:
        whole ones would take the memory that sharding saves.
        """
        self._window.enter(idx)
        # Around the forward pass too, since that is when DDP looks.
        return nullcontext() if self._window.is_due else self.no_sync(sharded=False)

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
                f"{self._window.length} batches, but not in its last batch: call it in each batch "
                "of a window, or set optim.accumulation=1"
            )
