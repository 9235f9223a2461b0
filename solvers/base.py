"""The base class of all solvers: one epoch, what is kept of it, and how a run goes on."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from flashy.solver import BaseSolver
from omegaconf import DictConfig, OmegaConf
from torch import nn

from checkpoint import Position
from checkpoint.integration import Ranks

from . import metrics
from .data.ordered_loaders import with_resumable_order_endless
from .data.several_loaders import Endless
from .discovery.attributes import AttributeNames, name_is_taken
from .distributed.parallelism import Parallelism
from .distributed.wrappers import compilable
from .experiment import lookup
from .experiment.history_file import HistoryLink
from .health.monitor import HealthMonitor
from .health.nonfinite_guard import FiniteGuard
from .health.unregistered_state import UnregisteredState
from .health.update_watch import UpdateWatch
from .log import is_live
from .loop.batch_loop import BatchLoop, LoopHooks
from .loop.early_stop import why_to_stop
from .loop.metric_agreement import average_over
from .loop.optimize import Optimization
from .loop.profiler import DeadlockDetect, Profiler
from .loop.progress_bar import ProgressBar, nothing
from .loop.stages import LAST_STAGES, StageRunner
from .loop.train_data import data_order, prepare_loaders
from .optim.update import Window
from .persistence.found_state import FoundState
from .persistence.mid_epoch import MidEpochSaver
from .persistence.new_checkpointer import new_checkpointer
from .persistence.preemption import StopAsked
from .persistence.restore_plan import PRETRAINED
from .persistence.resume_check import ResumeCheck
from .persistence.run_restorer import RunRestorer
from .persistence.run_saver import RunSaver
from .persistence.state_loader import StateLoader
from .run_context import RunContext
from .settings.errors import ConfigError
from .settings.unread_keys import Reads, unrecorded
from .settings.validate import changed_keys, parse
from .state.places import NoPlace, get_place
from .state.progress import Progress
from .state.registry import NOT_STATE, StateRegistry, guess
from .state.rng import RngState
from .state.source_loading import load_sources
from .state.sources import Attribute
from .weights.ema import ModuleDictEMA
from .weights.optimizer_modes import OptimizerModes
from .weights.shadow_weights import ShadowWeights


class StandardSolver(BaseSolver, ABC):
    """Trains a model, keeps its state safe, and goes on where it was.

    ================  ============================================================================
    must override     `build_model`, `build_dataloaders`, `run_step`
    may call          `optimize`, which makes an update, or `is_update_due`; `register_best_state`,
                      `register_ema`, `register_per_rank`, `register_stateless`; `autocast`,
                      `is_training`, `common_train_valid`, `log_model_summary`; `wrap`,
                      `wrap_with_fsdp`, `no_sync` and `average_over_ranks`, for several processes;
                      `endless`, for a second stream; `epoch_checkpoint_path`,
                      `checkpoint_path_with_name`, `run_one_stage`, `get_eval_solver_from_sig`
    may override      `train`, `valid`, `evaluate`, `generate`, `show`, `best_metric_name`,
                      `best_metric_mode`, `load_from_pretrained`, `should_run_stage`,
                      `should_stop_training`, `samples_in`, `log_updates`, `sets_all_modes`; of
                      flashy `get_formatter`, `log_hyperparams`
    call super        `__init__` (first), `run_epoch`, `load_checkpoints`, `save_checkpoints`,
                      `update_best_state_from_stage`, `initialize_ema`; of flashy `commit`,
                      `restore`, `state_dict`, `load_state_dict`
    never             of flashy `run_stage`; `swap_best_state`, `swap_ema_state`; names with an
                      underscore
    attributes        `ema`, `finite_guard`, and those below
    ================  ============================================================================

    All other names are free for a subclass. All registered modules are in evaluation mode during
    valid, evaluate and generate, and each submodule is in its mode again afterwards; a subclass
    with `sets_all_modes = False` sets the modes of all modules but `self.model` itself. In
    training, a submodule that was put in evaluation mode stays there. `requires_grad` and
    `training` are in every checkpoint where they differ from the choice of `build_model`.

    `__init__` calls `build_dataloaders`, then `build_model`, then builds the EMA, so attributes
    that a subclass sets after `super().__init__` do not exist yet in these. `build_model` sets
    `self.model` and ends with `self.register_stateful('model', 'optimizer')`, and where they are
    wanted `self.register_best_state('model')` and `self.register_ema('model')`.

    Metrics that `run_step` returns are averaged over samples and ranks, see `samples_in`.

    A run that was interrupted goes on in the middle of the epoch: `run_epoch` and `train` are
    entered again, and stages that were finished are passed over. Keep the values that a stage needs
    of an earlier stage in a registered source, and not in an attribute.

    Args:
        cfg: the composed configuration, see `config/solver/standard.yaml`. Keys that are missing
            have the defaults of that file.

    Attributes:
        cfg: the configuration.
        device: `cpu` or `cuda`, a str.
        dataloaders: split -> iterable of batches, or a dict or list of several, see
            `dataset.combine`; set by `build_dataloaders`. Plain loaders are rebuilt afterwards, so
            that their order can be resumed.
        ranks: the processes that train together.
        checkpointer: saves and loads the checkpoints of the run.
        best_state: copies of the best weights.
        fsdp_best_state: Audiocraft's second best state; empty.
        ema: the running average, or None.
        finite_guard: finds gradients and losses that are not finite.
        profiler, deadlock_detect: watch the loop over batches.
        autocast_dtype: the type in which `autocast` computes; a subclass may assign another.
        train_updates_per_epoch: optimizer updates of an epoch.
        total_updates: optimizer updates in the whole run, known before `build_model`.

    Raises:
        ConfigError: the configuration cannot work.
        ValueError: a subclass forgot something; the message names the line that is missing.
    """

    sets_all_modes: ClassVar[bool] = True
    model: nn.Module

    def __init__(self, cfg: DictConfig) -> None:
        names = AttributeNames(type(self), self.__dict__)
        super().__init__()
        settings = parse(cfg)
        self.cfg, self.dataloaders = cfg, cast(dict[str, Any], {})
        self.ranks, self.device = Ranks.here(), lookup.device(settings.device)
        self.autocast_dtype: torch.dtype = getattr(torch, settings.autocast_dtype)
        HistoryLink.put_into(self.xp)
        self.logger.info("Solver %s for XP %s in %s", type(self).__name__, self.xp.sig, self.folder)
        registry = StateRegistry(self.stateful.sources, lambda: self.__dict__)
        self.stateful: StateRegistry = registry
        context = self._context = RunContext(
            settings,
            self.xp,
            self.ranks,
            self.device,
            self.logger,
            type(self).__name__,
            metrics=lambda: self._pending_metrics,
            stage=lambda: self._current_stage,
        )
        self._names, self._progress = names, Progress()
        progress, window, walk = self._progress, Window(settings.optim.accumulation), names.walk
        reads = Reads(cfg, self.xp.cfg)
        unregistered = UnregisteredState(
            type(self), partial(walk, self), partial(get_place, self), registry
        )
        found = FoundState(lambda: self.dataloaders, partial(walk, self), registry.modules)
        self._parallelism = Parallelism(context, registry.attributes)
        modes = OptimizerModes(registry)
        self._weights = ShadowWeights(context, registry, progress, modes, self._own_best_metric)
        self._monitor = HealthMonitor(context, registry, progress, reads, unregistered)
        watch = UpdateWatch(context, registry, self._monitor, self._parallelism, window)
        self._check = ResumeCheck(context, registry, progress, found, self._monitor.counts)
        self.checkpointer = new_checkpointer(context, self._weights.best_metric)
        shared: dict[str, Any] = {"weights": self._weights, "found": found, "watch": watch}
        self._saver = RunSaver(
            *(context, self.checkpointer, registry, progress),
            **shared,
            monitor=self._monitor,
            check=self._check,
            state_dict=lambda: self.state_dict(),
            register_found=self._register_found,
        )
        loader = StateLoader(
            *(context, registry, progress, self._saver),
            **shared,
            load_state_dict=lambda state: self.load_state_dict(state),
            initialize_ema=lambda: self.initialize_ema(),
        )
        self._restorer = RunRestorer(
            *(context, registry, progress, self._saver, loader),
            weights=self._weights,
            found=found,
            check=self._check,
            unregistered=unregistered,
            register=self.register_stateful,
            load_from_pretrained=lambda name: self.load_from_pretrained(name),
            reads_in_place=not self._overrides("load_state_dict"),
        )
        self._mid_epoch = MidEpochSaver(context, registry, progress, self._saver, **shared)
        self._optimization = Optimization(
            context, registry, self._parallelism, watch, window, reads
        )
        loop = BatchLoop(
            *(context, progress, self._optimization, self._mid_epoch),
            check=self._check,
            guard=self._monitor.guard,
            parallelism=self._parallelism,
            weights=self._weights,
        )
        self._stages = StageRunner(
            *(context, registry, progress, loop, self._saver, self._mid_epoch),
            weights=self._weights,
            found=found,
            modules=self._moded_modules,
            overrides=self._overrides,
        )
        self._keep_own_sources(found)
        self._init_loggers()
        self._build()
        names.end_of_building()

    # Building.

    def _overrides(self, method: str) -> bool:
        """Whether a subclass, or an attribute, replaces a method of this class."""
        mine = getattr(getattr(self, method), "__func__", None)
        return mine is not vars(StandardSolver)[method]

    def _keep_own_sources(self, found: FoundState) -> None:
        self.best_state, self.fsdp_best_state = self._weights.best, self._weights.fsdp_best
        keep = self.stateful.keep
        keep("best_state", Attribute(self, "best_state"))
        keep("fsdp_best_state", Attribute(self, "fsdp_best_state"))
        keep("progress", self._progress)
        keep("random_state", RngState())
        keep("loader_state", found.loaders)
        keep("generator_state", found.generators)
        keep("module_modes", found.modes)

    def _init_loggers(self) -> None:
        logging = self._context.settings.logging
        trackers = {"tensorboard": logging.log_tensorboard, "wandb": logging.log_wandb}
        for name, wanted in trackers.items():
            if wanted and find_spec(name) is None:
                raise ConfigError(
                    f"logging.log_{name}=true needs {name}, which is not installed: "
                    f"pip install standard-solver[{name}]"
                )
        if logging.log_tensorboard:
            self.init_tensorboard(**self.cfg.get("tensorboard", {}))
        if logging.log_wandb:
            self.init_wandb(**self.cfg.get("wandb", {}))

    def _build(self) -> None:
        context, settings = self._context, self._context.settings
        with self._names.users_turn():
            self.build_dataloaders()
        batches = prepare_loaders(context, self.dataloaders)
        self._stages.loop.train_batches = batches
        # The last update of an epoch may have fewer batches.
        self.train_updates_per_epoch: int = -(-batches // settings.optim.accumulation)
        self.total_updates = self.train_updates_per_epoch * settings.optim.epochs
        self._saver.total_updates = self.total_updates
        with self._names.users_turn():
            self.build_model()
        if not isinstance(getattr(self, "model", None), nn.Module):
            raise ValueError("set self.model to a torch.nn.Module in build_model")
        if "model" not in self.stateful.sources:
            raise ValueError("add self.register_stateful('model') at the end of build_model")
        # For a model that did not go through `self.wrap`.
        self._parallelism.compile(compilable(self.model))
        self._parallelism.follow_buffers(self.model)
        self.profiler = Profiler(self.model, settings.profiler.enabled, self.folder)
        self.deadlock_detect = DeadlockDetect(settings.deadlock.use, settings.deadlock.timeout)
        self.initialize_ema()
        # Not of the solver: a subclass may set `ema = None` in its body, in place of the property.
        self.stateful.keep("ema", Attribute(self._weights, "ema"))
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self.logger.info("The model has %.2f M parameters that are trained", trained / 1e6)

    @abstractmethod
    def build_model(self) -> None:
        """Set `self.model`, optimizer and schedule, and register them; `__init__` calls it."""

    @abstractmethod
    def build_dataloaders(self) -> None:
        """Set `self.dataloaders`; called once by `__init__`, before `build_model`."""

    def endless(self, loader: Any, name: str) -> Endless:
        """Return the batches of a second loader, without end: `next(self.unlabelled)`.

        For `build_dataloaders`. The order of the loader can be resumed as that of
        `self.dataloaders`: a resumed run goes on with the batch that comes next.

        Args:
            loader: an iterable of batches.
            name: name of the source that keeps the position in checkpoints.
        """
        loader = with_resumable_order_endless(loader, name, data_order(self._context))
        endless = Endless(loader, name, self.ranks.size)
        self.stateful.register(name, endless)
        self.register_per_rank(name)
        return endless

    # Registration.

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
            self.stateful.register(name, Attribute(self, name), write_only)

    def register_stateless(self, *args: str) -> None:
        """Declare that attributes, with all that they hold, are no state, though they change.

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
                    f"{guess(error.missing, error.there)}"
                ) from error
            self.stateful.stateless.add(name)

    def register_per_rank(self, *names: str) -> None:
        """Declare that each rank has its own state of these sources, such as a place in a stream.

        Where another number of ranks goes on, they are left as they are, and the log says so.

        Raises:
            ValueError: `register_stateful` does not know one of them.
        """
        self.stateful.register_per_rank(*names)

    def register_best_state(self, *args: str) -> None:
        """Keep the best state of sources that `register_stateful` knows.

        Raises:
            ValueError: it does not know one of them.
        """
        self._weights.register_best(*args)

    def register_ema(self, *args: str) -> None:
        """Average these modules while training; call it in `build_model`.

        Raises:
            ValueError: too late, or not a module.
        """
        for name in args:
            try:
                module = attrgetter(name)(self)
            except AttributeError as error:
                near = guess(name, vars(self))
                raise ValueError(f"register_ema({name!r}): set self.{name} before{near}") from error
            self._weights.register_ema(name, module)

    # Several processes.

    def wrap(
        self,
        model: nn.Module,
        *,
        block_classes: Collection[type] = (),
        methods: Collection[str] = (),
        **options: Any,
    ) -> nn.Module:
        """Return a model made ready for the ranks there are, as `fsdp.*` and `optim.*` say.

        Call it in `build_model`, before optimizer and `register_*`. On one process it is the model
        itself; else sharded with `fsdp.use`, and replicated without. Names in its state dict stay.
        With `compile`, its forward pass is compiled in place.

        Args:
            model: on `self.device`.
            block_classes: classes of the modules that repeat; none for the items of each
                `nn.ModuleList`.
            methods: names of methods beside `forward` that compute with the parameters, and that
                the solver calls, such as `encode`: a sharded model gathers its parameters for
                these. `generate` is always one of them.
            options: of `DistributedDataParallel`, for a model that is replicated.

        Raises:
            ValueError: the model has no method of such a name.
        """
        self._monitor.reads.note("optim.activation_checkpointing")
        model = self._parallelism.prepared(model, block_classes, methods)
        if self._parallelism.is_sharded:
            return self.wrap_with_fsdp(model, block_classes=block_classes, methods=methods)
        return self._parallelism.replicated(model, **options)

    def wrap_with_fsdp(
        self,
        model: nn.Module,
        *args: Any,
        block_classes: Collection[type] = (),
        methods: Collection[str] = (),
        **kwargs: Any,
    ) -> nn.Module:
        """Return a model sharded over the ranks as `fsdp.*` says; on one process, as it is."""
        self._monitor.reads.note("fsdp")
        return self._parallelism.sharded(model, block_classes, methods)

    def no_sync(self, *, sharded: bool = True) -> AbstractContextManager[None]:
        """Leave the gradients of a block on each rank: for batches that are only added up.

        Args:
            sharded: whether sharded models do so too. They then hold whole gradients.
        """
        return self._parallelism.no_sync(sharded=sharded)

    def average_over_ranks(self, metrics: Mapping[str, Any], weight: float = 1) -> dict[str, float]:
        """Average what each rank measured on its own part of the data; all ranks call it.

        For evaluate and other stages of your own: `return self.average_over_ranks({"accuracy":
        right / seen}, weight=seen)` is what one process would give. On one process the metrics
        come back as floats.

        Args:
            metrics: of this rank's part, numbers or tensors with one element.
            weight: of this part, such as its number of samples; at 0 it has no say.
        """
        return average_over(self.ranks, metrics, weight)

    # One step.

    @abstractmethod
    def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        """Train or validate on one batch and return its metrics; `self.is_training` says which.

        Args:
            idx: number of the batch in this stage, from 0.
            batch: what the loader gave.
            metrics: an empty dict to fill; numbers or tensors with one element.
        """

    def samples_in(self, batch: Any) -> float | None:
        """Return the weight of a batch in the averages that train and valid return.

        None, as here, stands for the samples that the loader took for the batch. That makes the
        averages means over samples, whatever the batch size and the number of ranks. A batch of
        a loader that does not tell its samples (an iterable data set, a batch sampler of your own,
        a list of batches, several loaders together) counts as 1: the averages are means over
        batches then. Return a number where metrics are means over something else, such as tokens
        or graphs. 0 leaves the batch out.

        Args:
            batch: what the loader gave; called before `run_step`, for each batch.
        """
        return None

    @property
    def is_update_due(self) -> bool:
        """Whether this batch ends a window of `optim.accumulation` batches: time for a step."""
        return self._optimization.window.is_due

    def optimize(
        self, loss: torch.Tensor, optimizer: str = "optimizer", *, schedules: bool = True
    ) -> torch.Tensor | None:
        """Make an update of an optimizer with the gradients of a loss; in `run_step`, in training.

        In this order: backward of `loss`; gradient scaling with autocast in float16, by the
        `GradScaler` that is an attribute of this solver, else by a scaler that the framework makes
        and saves; clipping to `optim.max_norm`; step of the optimizer; step of its schedules;
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
        return self._optimization.optimize(loss, optimizer, schedules=schedules)

    @property
    def autocast(self) -> Any:
        """A fresh context in which the forward pass runs, as `autocast` and its dtype say."""
        is_on = self._context.settings.autocast
        self._monitor.note_autocast(is_on)
        if not is_on:
            return nullcontext()
        return torch.autocast(torch.device(self.device).type, dtype=self.autocast_dtype)

    # Stages.

    def train(self) -> dict[str, Any]:
        """Train stage."""
        return self.common_train_valid("train")

    def valid(self) -> dict[str, Any]:
        """Valid stage; runs with the EMA weights if there are any."""
        return self.common_train_valid("valid")

    def evaluate(self) -> dict[str, Any] | None:
        """Measure the best model; return metrics. Runs every `evaluate.every` epochs and last.

        On several ranks each of them calls it. Where each looks at its own part of the data, return
        `self.average_over_ranks(metrics, weight=samples)`, or `self.common_train_valid(split)`,
        which averages what `run_step` returns. Numbers that differ between ranks are refused.
        """
        return None

    def generate(self) -> dict[str, Any] | None:
        """Make samples with the best model; runs every `generate.every` epochs and at the end."""
        return None

    def common_train_valid(self, dataset_split: str, **kwargs: Any) -> dict[str, Any]:
        """Run `run_step` over a split and return the averages; trains in the `train` stage only."""
        hooks = LoopHooks(
            self.dataloaders,
            self.run_step,
            self.samples_in if self._overrides("samples_in") else None,
            self.log_progress,
            self.log_updates,
            self.train_updates_per_epoch,
            self.profiler,
            self.deadlock_detect,
        )
        return self._stages.run_batches(dataset_split, hooks)

    @property
    def is_training(self) -> bool:
        """Whether the stage that runs now is `train`."""
        return bool(self.current_stage == "train")

    @property
    def log_updates(self) -> int:
        """Progress lines in a stage."""
        return self._context.settings.logging.log_updates

    def log_progress(
        self, stage_name: str, iterable: Any, total: int | None = None, updates: int = 5
    ) -> ProgressBar:
        """Wrap an iterable so that its progress is seen; see `ProgressBar.update`."""
        # Several ranks may have unequal numbers of batches: they stop at the end of a stage.
        stops_between_batches = self.ranks.size == 1 and not self.is_training
        return ProgressBar(
            self.logger,
            iterable,
            updates=updates,
            total=total,
            name=f"{stage_name.capitalize()} | Epoch {self.epoch}",
            formatter=self.formatter,
            live=is_live(self._context.settings.logging.progress_bar),
            check=self._mid_epoch.stop_if_asked if stops_between_batches else nothing,
        )

    def log_metrics(self, stage_name: str, metrics_: dict[str, Any], formatter: Any = None) -> None:
        """Log the metrics of a stage and keep them, as plain numbers, for the commit."""
        values = metrics.plain(stage_name, metrics_)
        super().log_metrics(stage_name, metrics.numbers(values), formatter)
        self._pending_metrics[stage_name] = values

    def log_model_summary(self, model: nn.Module) -> None:
        """Log architecture, and size in memory."""
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        self.logger.info("%s\nParameters: %.1f MiB", model, size / 2**20)

    def show(self) -> None:
        """Log what would be trained, for `show=true`."""
        self.log_model_summary(self.model)

    def should_run_stage(self, stage_name: str) -> bool:
        """Whether this epoch runs a stage: every `<stage>.every` epochs, and in the last."""
        return self._stages.is_due(stage_name, self.cfg)

    def run_stage(self, stage_name: str, method: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Run one stage and keep its metrics for the commit.

        A stage that was finished before the run was interrupted is not run again.
        """
        if (done := self._stages.finished(stage_name)) is not None:
            return done
        checked = partial(self._stages.metrics_of, stage_name, method)
        with self._stages.around(stage_name):
            return cast(dict[str, Any], super().run_stage(stage_name, checked, *args, **kwargs))

    def _run_named_stage(self, stage: str) -> dict[str, Any]:
        return self.run_stage(stage, self._stages.prepared(stage, getattr(self, stage)))

    def run_one_stage(self, stage_name: str) -> None:
        """Run only `valid`, `evaluate` or `generate`, with the best state; for `execute_only`.

        Raises:
            ValueError: another stage.
            ConfigError: the solver has no such stage.
        """
        self._stages.check_single(stage_name, type(self).__name__)
        if not self.history:
            # Stages that this experiment ran alone before; no checkpoint holds these.
            self.xp.link.load()
        inside = self._progress.training is not None or bool(self._progress.stages)
        trained = self.ranks.broadcast(bool(self.checkpointer.positions()))
        self._start_epoch()
        self._progress.finished.clear()
        # The stage evaluates the last epoch that was finished, not one that comes after it.
        last = [self.history.pop()] if trained and self.history and not inside else []
        try:
            with torch.no_grad(), self.swap_best_state():
                self._run_named_stage(stage_name)
        finally:
            self.history.extend(last)
        if self._context.settings.execute_inplace:
            return
        if last:
            self.history[-1] = last[0] | self._pending_metrics
            self._saver.write_history(anyway=True)
        else:
            self.commit(save_checkpoints=False)

    def _moded_modules(self) -> dict[str, nn.Module]:
        """Return the modules whose mode the framework sets."""
        modules = self.stateful.modules()
        return modules if self.sets_all_modes else {"model": modules["model"]}

    # Best state and EMA.

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

    def _own_best_metric(self) -> tuple[str | None, str]:
        return self.best_metric_name, self.best_metric_mode

    @property
    def ema(self) -> ModuleDictEMA | None:
        """The running average of the modules that `register_ema` names; None without one."""
        return self._weights.ema

    @ema.setter
    def ema(self, value: ModuleDictEMA | None) -> None:
        if "_weights" not in vars(self) or self._names.is_users_turn:
            raise ValueError(name_is_taken(type(self), "ema"))
        self._weights.ema = value

    @property
    def finite_guard(self) -> FiniteGuard:
        """Finds gradients and losses that are not finite, see `optim.on_nonfinite`."""
        return self._monitor.guard

    def initialize_ema(self) -> None:
        """Build the EMA of the registered modules from their present weights."""
        self._monitor.reads.note("optim.ema")
        self._weights.initialize_ema(self.train_updates_per_epoch, self.total_updates)

    def update_best_state_from_stage(self, stage_name: str = "valid") -> None:
        """Take the present weights as the best state if the stage's metric is the best so far.

        A metric that is not finite is never the best; equal metrics keep the older state. As long
        as no epoch has given the metric, the latest weights are taken, since untrained weights are
        worse.
        """
        self._weights.update_best(stage_name)

    def swap_best_state(self) -> AbstractContextManager[None]:
        """Run a block with the best state in place, then put everything back bit by bit."""
        return self._weights.swap_best()

    def swap_ema_state(self, *, skip_unstepped: bool = False) -> AbstractContextManager[None]:
        """Run a block with the EMA weights in place; without an EMA, with the present weights.

        Args:
            skip_unstepped: whether an EMA without a step counts as none. Its weights are those of
                the start of the run.
        """
        return self._weights.swap_ema(skip_unstepped=skip_unstepped)

    # Saving and restoring.

    def _register_found(self) -> None:
        """Register a new gradient scaler, and schedules that `build_model` did not register."""
        scaler = self._optimization.new_scaler(self.autocast_dtype)
        if scaler is not None:
            self.scaler = scaler
            self.register_stateful("scaler")
        for name in self.stateful.unregistered_schedules():
            self.logger.info("Registering %r, which build_model did not", name)
            self.register_stateful(name)

    def commit(self, save_checkpoints: bool = True) -> None:
        """End the epoch: history, checkpoint, flush, `history.json`, in this order."""
        self.history.append(self._pending_metrics)
        if save_checkpoints:
            self._saver.note_scores()
            self.save_checkpoints()
        self._start_epoch()
        self._progress.finished.clear()
        self._saver.write_history()

    def save_checkpoints(self) -> None:
        """Save the end of the epoch that was just appended to the history, and flush."""
        self._saver.save(self.epoch - 1)

    def load_from_pretrained(self, name: str) -> dict[str, Any]:
        """Return `{'best_state': {'model': weights}}` for `continue_from=//pretrained/<name>`."""
        raise ConfigError(
            f"{type(self).__name__} has no pretrained models: override load_from_pretrained(name), "
            f"or set continue_from to something else than {PRETRAINED}{name}"
        )

    def restore(
        self,
        load_best: bool = False,
        replay_metrics: bool = False,
        ignore_state_keys: Collection[str] = (),
    ) -> bool:
        """Take up the state of the experiment, or of what it continues from.

        Args:
            load_best: make the best weights the present ones for good.
            replay_metrics: log the summary of every past epoch.
            ignore_state_keys: sources to leave as they are.

        Returns:
            False if there was nothing to restore from.

        Raises:
            CheckpointError: there is something to restore from, and it cannot be used.
            ValueError: a name in `ignore_state_keys` is misspelt.
        """
        self._names.check()
        self._register_found()
        self._restorer.prepare(self._moded_modules())
        state = self.load_checkpoints(load_best, ignore_state_keys)
        self._restorer.compare_ranks()
        if replay_metrics:
            for epoch, stages in enumerate(self.history, start=1):
                for stage, values in stages.items():
                    self.result_logger._log_summary(
                        stage,
                        metrics.numbers(values),
                        step=epoch,
                        formatter=self.get_formatter(stage),
                    )
        self._restorer.restore_generators(state, load_best)
        return state is not None

    def load_checkpoints(
        self, load_best: bool = False, ignore_state_keys: Collection[str] = ()
    ) -> dict[str, Any] | None:
        """Load the state that `restore` takes up; return the state, None if there is none."""
        return self._restorer.load(load_best, ignore_state_keys, self.train_updates_per_epoch)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the registered sources, each strictly; the random generators come later."""
        load_sources(dict(self.stateful.sources), state, ignored=("random_state", *NOT_STATE))

    def checkpoint_path(self, **kwargs: Any) -> Path:  # type: ignore[override]
        """Folder of the newest committed checkpoint; of the one to come when there is none."""
        positions = self.checkpointer.positions()
        position = positions[-1] if positions else Position(self.epoch)
        return self.checkpoint_path_with_name(position.name)

    def epoch_checkpoint_path(self, epoch: int, **kwargs: Any) -> Path:
        """Folder of the checkpoint at the end of an epoch."""
        return self.checkpoint_path_with_name(Position(epoch).name)

    def checkpoint_path_with_name(self, name: str, **kwargs: Any) -> Path:
        """Folder for a checkpoint of the user's own, which no policy touches."""
        return Path(self.checkpointer.storage.describe(name))

    # The run.

    def run(self) -> None:
        """Restore, then train until the last epoch is committed."""
        self._names.check()
        lookup.leave_evaluation(self)
        if changed := changed_keys(self._context.settings, self.cfg):
            self.logger.warning(
                "%s: changed after the solver was built, which has no effect. Build the solver "
                "with the new configuration",
                ", ".join(changed),
            )
        self._restorer.owns_run = True
        self._weights.check_kept()
        # Before anything is read: another run may commit between a look and the lock.
        self.checkpointer.lock()
        self.restore(replay_metrics=True)
        self._parallelism.check_precision(self.stateful.scalers().values())
        self._saver.check_savable()
        with unrecorded():
            everything = OmegaConf.to_container(self.cfg, resolve=True)
        self.log_hyperparams(cast(dict[Any, Any], everything))
        if self._progress.training is None:
            self._check.check()
        settings = self._context.settings
        epochs = 1 if settings.fast_dev_run else settings.optim.epochs
        if self.epoch > epochs:
            self.logger.info(
                "Nothing left to do: all %d epochs are done. To train on from here, start a new "
                "experiment with continue_from=//sig/%s",
                *(epochs, self.xp.sig),
            )
        with self._mid_epoch.signals:
            try:
                for _ in range(self.epoch, epochs + 1):
                    if self._ends_early():
                        self._run_last_stages()
                        break
                    self._mid_epoch.stop_if_asked()
                    self._saver.begin_epoch()
                    self._run_epoch()
                    self.commit()
                # A signal that comes while the last save is written finds nothing to stop.
                self._saver.finish()
            except StopAsked:
                self._mid_epoch.leave()
            except BaseException as error:
                self._mid_epoch.say_what_is_lost(error)
                raise

    def should_stop_training(self) -> bool:
        """Whether to stop before the epoch that comes next; asked once before each epoch.

        If it returns True before `optim.epochs` are done, evaluate and generate run on the best
        state as in a last epoch, and their metrics are added to those of the epoch before.
        """
        return bool(self.epoch > self._context.settings.optim.epochs)

    def _ends_early(self) -> bool:
        best_mode: Callable[[], metrics.Mode] = lambda: self._weights.best_metric()[1]  # noqa: E731
        return why_to_stop(self._context, best_mode, self.should_stop_training) is not None

    def _run_last_stages(self) -> None:
        """Run what a last epoch runs and the last committed epoch did not; save after each."""
        for stage in LAST_STAGES if self.history else ():
            self._mid_epoch.stop_if_asked()
            self._stages.run_last(stage, self._run_named_stage, self.should_run_stage)

    def _run_epoch(self) -> None:
        progress = self._progress
        is_whole = not (self._context.keeps_nothing or progress.finished or progress.training)
        self._mid_epoch.begin_epoch()
        try:
            self.run_epoch()
        except Exception as error:
            self._mid_epoch.save_after(error)
            raise
        self._mid_epoch.end_epoch()
        self._names.check()
        if is_whole:
            self._monitor.name_unread_settings(self.cfg)

    def run_epoch(self) -> None:
        """Run all stages of an epoch; `commit` then keeps what they did."""
        self.run_stage("train", self.train)
        self._weights.broadcast()
        with torch.no_grad():
            self._mid_epoch.between_stages("valid")
            with self._stages.under_ema():
                self.run_stage("valid", self.valid)
                self.update_best_state_from_stage("valid")
            for stage in LAST_STAGES:
                if self._stages.wants(stage, self.should_run_stage):
                    self._mid_epoch.between_stages(stage)
                    with self._stages.under_best_state():
                        self._run_named_stage(stage)

    @classmethod
    def get_eval_solver_from_sig(
        cls,
        sig: str,
        dtype: str | None = None,
        device: str | None = None,
        autocast: bool | None = None,
        batch_size: int | None = None,
        override_cfg: Mapping[str, Any] | DictConfig | None = None,
        **kwargs: Any,
    ) -> "StandardSolver":
        """Build the solver of another experiment for evaluation: best weights, no EMA.

        Args:
            sig: Dora's signature of the experiment.
            dtype: value for the key `dtype`.
            device: value for the key `device`.
            autocast: value for the key `autocast`; None for that of the experiment.
            batch_size: value for the key `dataset.batch_size`.
            override_cfg: nested values that go before all of these.
            kwargs: passed on to `get_solver_from_sig` of the package's `train` module.
        """
        ours: dict[str, Any] = {"optim": {"ema": {"use": False}}}
        given = {"dtype": dtype, "device": device, "autocast": autocast}
        ours |= {key: value for key, value in given.items() if value is not None}
        if batch_size is not None:
            ours["dataset"] = {"batch_size": batch_size}
        train = importlib.import_module(f"{cls.__module__.partition('.')[0]}.train")
        overrides = cast(DictConfig, OmegaConf.merge(ours, override_cfg or {}))
        options: dict[str, Any] = {"load_best": True, "ignore_state_keys": ["optimizer", "ema"]}
        if hasattr(train, "get_solver_from_sig"):
            options |= {"override_cfg": overrides, "disable_fsdp": True}
            solver = train.get_solver_from_sig(sig, **options | kwargs)
        else:
            xp = train.main.get_xp_from_sig(sig)
            solver = lookup.build(cls, xp, override_cfg=overrides, **options | kwargs)
        solver.model.eval()
        return cast(StandardSolver, solver)
