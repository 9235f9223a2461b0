"""The base class of all solvers: one epoch, what is kept of it, and how a run goes on."""

import importlib
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from .data.ordered_loaders import (
    Order,
    has_fixed_order,
    with_resumable_order,
    with_resumable_order_endless,
)
from .data.several_loaders import Endless, combined
from .distributed.process_group import buffers
from .distributed.wrappers import compilable
from .experiment import lookup
from .loop.batch_loop import FirstBatches, length
from .loop.early_stop import LAST_STAGES, Ending
from .loop.profiler import DeadlockDetect, Profiler
from .loop.stages import FAST_BATCHES
from .persistence.preemption import StopAsked
from .settings.errors import ConfigError
from .settings.unread_keys import unrecorded
from .settings.validate import setting
from .state.registry import Attribute
from .state.rng import preserved_rng


class StandardSolver(Ending):
    """Trains a model, keeps its state safe, and goes on where it was.

    ================  ============================================================================
    must override     `build_model`, `build_dataloaders`, `run_step`
    may call          `optimize`, which makes an update, or `is_update_due`; `wrap`, `no_sync`
                      and `average_over_ranks`, for several processes; `endless`, for a second
                      stream
    may override      `evaluate`, `generate`, `show`, `best_metric_name`, `best_metric_mode`,
                      `get_formatter`, `load_from_pretrained`, `should_run_stage`,
                      `should_stop_training`, `log_hyperparams`, `samples_in`,
                      `sets_all_modes`
    call super        `__init__` (first), `run_epoch`, `train`, `valid`, `commit`, `restore`,
                      `state_dict`, `load_state_dict`, `initialize_ema`
    never             `run_stage`, `swap_best_state`, `swap_ema_state`, names with an underscore
    ================  ============================================================================

    All registered modules are in evaluation mode during valid, evaluate and generate, and each
    submodule is in its mode again afterwards; a subclass with `sets_all_modes = False` sets those
    of all modules but `self.model` itself. In training, a submodule that was put in evaluation mode
    stays there. `requires_grad` and `training` are in every checkpoint where they differ from what
    `build_model` chose.

    `__init__` calls `build_dataloaders`, then `build_model`, then builds the EMA, so attributes
    that a subclass sets after `super().__init__` do not exist yet in these. `build_model` sets
    `self.model` and ends with `self.register_stateful('model', 'optimizer')`, and where they are
    wanted `self.register_best_state('model')` and `self.register_ema('model')`.

    Metrics that `run_step` returns are averaged over samples and ranks, see `samples_in`.

    A run that was interrupted goes on in the middle of the epoch: `run_epoch` and `train` are
    entered again, and stages that were finished are passed over. What a stage needs of another one
    is in a registered source, then, and not in an attribute.

    Args:
        cfg: the composed configuration, see `config/solver/standard.yaml`. Keys that are missing
            have the defaults of that file.

    Attributes:
        device: `cpu` or `cuda`, a str.
        dataloaders: split -> iterable of batches, or a dict or list of several, see
            `dataset.combine`; set by `build_dataloaders`, after which plain loaders are rebuilt as
            `loaders.with_resumable_order` says.
        ema: the running average, or None.
        ranks: the processes that train together.
        best_state: copies of the best weights.
        autocast_dtype: what `autocast` computes in; a subclass may assign another.
        total_updates: optimizer updates in the whole run, known before `build_model`.

    Raises:
        ConfigError: the configuration cannot work.
        ValueError: a subclass forgot something; the message names the line that is missing.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self._begin_building()
        super().__init__(cfg)
        self.logger.info("Solver %s for XP %s in %s", type(self).__name__, self.xp.sig, self.folder)
        self.device: str = lookup.device(setting(cfg, "device"))
        with unrecorded():
            self.autocast_dtype: torch.dtype = getattr(torch, setting(cfg, "autocast_dtype"))
        self._is_autocast_used = False
        self._init_loggers()
        self._build()
        self._end_of_building()

    def _init_loggers(self) -> None:
        for name in ("tensorboard", "wandb"):
            if setting(self.cfg, f"logging.log_{name}") and find_spec(name) is None:
                raise ConfigError(
                    f"logging.log_{name}=true needs {name}, which is not installed: "
                    f"pip install standard-solver[{name}]"
                )
        if setting(self.cfg, "logging.log_tensorboard"):
            self.init_tensorboard(**self.cfg.get("tensorboard", {}))
        if setting(self.cfg, "logging.log_wandb"):
            self.init_wandb(**self.cfg.get("wandb", {}))

    def _order(self) -> Order:
        return Order(
            seed=setting(self.cfg, "seed"),
            seed_samples=setting(self.cfg, "dataset.seed_samples"),
            rank=self.ranks.rank,
            world_size=self.ranks.size,
            # Sharded weights are gathered in each forward pass, by all ranks or none.
            all_even=setting(self.cfg, "fsdp.use"),
            allow_unshared=setting(self.cfg, "dataset.allow_unshared"),
        )

    def _build(self) -> None:
        with self._users_turn():
            self.build_dataloaders()
        self.dataloaders.update(with_resumable_order(self.dataloaders, self._order()))
        if setting(self.cfg, "execute_only") is None:
            for split in ("train", "valid"):
                if split not in self.dataloaders:
                    raise ValueError(f"set self.dataloaders[{split!r}] in build_dataloaders")
        loader = combined(self.dataloaders.get("train"), setting(self.cfg, "dataset.combine"))
        each, updates = self._window.length, setting(self.cfg, "optim.updates_per_epoch")
        self._train_batches = (
            updates * each if updates else 0 if loader is None else length(loader, "train")
        )
        # The last update of an epoch may have fewer batches.
        self.train_updates_per_epoch: int = -(-self._train_batches // each)
        self._say_what_is_never_seen(loader)
        self._same_batches_on_all_ranks()
        self.total_updates = self.train_updates_per_epoch * setting(self.cfg, "optim.epochs")
        if self._fast:
            rule = setting(self.cfg, "dataset.combine")
            self.dataloaders = {
                split: FirstBatches(combined(loader, rule), FAST_BATCHES)
                for split, loader in self.dataloaders.items()
            }
        with self._users_turn():
            self.build_model()
        if not isinstance(getattr(self, "model", None), nn.Module):
            raise ValueError("set self.model to a torch.nn.Module in build_model")
        if "model" not in self.stateful.sources:
            raise ValueError("add self.register_stateful('model') at the end of build_model")
        # For a model that did not go through `self.wrap`.
        self.compile_model(compilable(self.model))
        if self.ranks.size > 1 and setting(self.cfg, "fsdp.use"):
            # As DDP does it by itself before each forward pass.
            self._of_all_ranks = [one for _, one in sorted(buffers(self.model))]
        self.profiler = Profiler(self.model, setting(self.cfg, "profiler.enabled"), self.folder)
        self.initialize_ema()
        self.stateful.register("ema", Attribute(self, "ema"))
        self.deadlock_detect = DeadlockDetect(
            setting(self.cfg, "deadlock.use"), setting(self.cfg, "deadlock.timeout")
        )
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self.logger.info("The model has %.2f M parameters that are trained", trained / 1e6)

    def _say_what_is_never_seen(self, loader: Any) -> None:
        if has_fixed_order(loader) and 0 < self._train_batches < len(loader):
            self.logger.warning(
                "optim.updates_per_epoch: each epoch trains on the same %d of the %d batches of "
                "'train', and never on the others, since their order is fixed. Give the loader "
                "shuffle=True",
                *(self._train_batches, len(loader)),
            )

    def _same_batches_on_all_ranks(self) -> None:
        batches = self.ranks.all_gather(self._train_batches)
        if len(set(batches)) > 1:
            raise ValueError(
                f"the ranks have {', '.join(map(str, batches))} batches in an epoch: they would "
                "wait for each other for ever. Give each as many batches, or set "
                "optim.updates_per_epoch"
            )

    # What a subclass says.

    @abstractmethod
    def build_model(self) -> None:
        """Set `self.model`, optimizer and schedule, and register them; `__init__` calls it."""

    @abstractmethod
    def build_dataloaders(self) -> None:
        """Set `self.dataloaders`; called once by `__init__`, before `build_model`."""

    def endless(self, loader: Any, name: str) -> Endless:
        """Return the batches of a second loader, without end: `next(self.unlabelled)`.

        For `build_dataloaders`. The loader is put in order as those of `self.dataloaders` are, and
        a resumed run goes on with the batch that comes next.

        Args:
            loader: an iterable of batches.
            name: under which checkpoints keep how far it is.
        """
        loader = with_resumable_order_endless(loader, name, self._order())
        endless = Endless(loader, name, self.ranks.size)
        self.stateful.register(name, endless)
        self.register_per_rank(name)
        return endless

    def show(self) -> None:
        """Log what would be trained, for `show=true`."""
        self.log_model_summary(self.model)

    # Conveniences.

    @property
    def autocast(self) -> Any:
        """A fresh context in which the forward pass runs, as `autocast` and its dtype say."""
        if not self._is_autocast_used:
            self._is_autocast_used = True
            self._reads.note("autocast", *(["autocast_dtype"] if self._autocast else []))
        if not self._autocast:
            return nullcontext()
        return torch.autocast(torch.device(self.device).type, dtype=self.autocast_dtype)

    def log_model_summary(self, model: nn.Module) -> None:
        """Log architecture, and size in memory."""
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        self.logger.info("%s\nParameters: %.1f MiB", model, size / 2**20)

    # The run.

    def run(self) -> None:
        """Restore, then train until the last epoch is committed."""
        lookup.leave_evaluation(self)
        self._owns_run = True
        self._check_weights_kept()
        # Before anything is read: another run may commit between a look and the lock.
        self.checkpointer.lock()
        self.restore(replay_metrics=True)
        self.check_precision()
        if not self._keeps_nothing:
            self.checkpointer.check(self._with_stable(self.plain_state()))
        with unrecorded():
            everything = OmegaConf.to_container(self.cfg, resolve=True)
        self.log_hyperparams(cast(dict[Any, Any], everything))
        if self._progress.training is None:
            self.check_resumed()
        epochs = 1 if self._fast else setting(self.cfg, "optim.epochs")
        if self.epoch > epochs:
            self.logger.info(
                "Nothing left to do: all %d epochs are done. To train on from here, start a new "
                "experiment with continue_from=//sig/%s",
                epochs,
                self.xp.sig,
            )
        with self._preemption:
            try:
                for _ in range(self.epoch, epochs + 1):
                    if self.ends_early():
                        self.run_last_stages()
                        break
                    self.stop_if_asked()
                    if not self._keeps_nothing:
                        self._pace.begin(self.total_updates)
                    self._run_epoch()
                    self.commit()
                # A signal that comes while the last save is written finds nothing to stop.
                self._finish()
            except StopAsked:
                self._leave()
            except BaseException as error:
                if self.ranks.size == 1:
                    # What was committed is there when the error is seen.
                    self.checkpointer.join()
                    self.say_what_is_lost(error)
                raise

    def _run_epoch(self) -> None:
        self.watch_updates()
        is_whole = not (self._fast or self._finished or self._progress.training)
        try:
            self.run_epoch()
        except Exception as error:
            self.save_after(error)
            raise
        self._boundary.forget()
        if is_whole:
            self.name_unread_settings()

    def run_epoch(self) -> None:
        """Run all stages of an epoch; `commit` then keeps what they did."""
        self.run_stage("train", self.train)
        self._same_on_all_ranks()
        with torch.no_grad():
            self.between_stages("valid")
            with preserved_rng(), self.swap_ema_state(skip_unstepped=True):
                self.run_stage("valid", self.valid)
                self.update_best_state_from_stage("valid")
            for stage in filter(self._wants, LAST_STAGES):
                self.between_stages(stage)
                # Each by itself: what one leaves behind is not there when a run resumes behind it.
                with preserved_rng(), self.swap_best_state():
                    self.run_stage(stage, self._stage(stage))

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
