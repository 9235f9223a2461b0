"""What a solver does differently when several processes train one model."""

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from flashy.solver import BaseSolver
from omegaconf import DictConfig
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from checkpoint.integration import Ranks

from ..settings.errors import ConfigError
from ..settings.validate import setting
from . import process_group
from .compiling import compile_in_place, compile_options
from .replication import replicated
from .wrappers import layers


class Parallel(BaseSolver):
    """Spreads models over the ranks of a run.

    Attributes:
        ranks: the processes of this run.
    """

    cfg: DictConfig
    device: str

    def __init__(self) -> None:
        super().__init__()
        self.ranks = Ranks.here()
        self._per_rank: set[str] = set()
        # Whether FSDP2 holds whole gradients outside of `.grad`, since a block of `no_sync`.
        self._holds_back = False

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
        process_group.check_methods(model, methods)
        if setting(self.cfg, "optim.activation_checkpointing"):
            model = process_group.recomputing(model, block_classes)
        self.compile_model(model, block_classes)
        if setting(self.cfg, "fsdp.use"):
            return self.wrap_with_fsdp(model, block_classes=block_classes, methods=methods)
        return replicated(model, self.device, **options)

    def wrap_with_fsdp(
        self,
        model: nn.Module,
        *args: Any,
        block_classes: Collection[type] = (),
        methods: Collection[str] = (),
        **kwargs: Any,
    ) -> nn.Module:
        """Return a model sharded over the ranks as `fsdp.*` says; on one process, as it is."""
        how = process_group.Sharding(
            param_dtype=getattr(torch, setting(self.cfg, "fsdp.param_dtype")),
            reduce_dtype=getattr(torch, setting(self.cfg, "fsdp.reduce_dtype")),
            buffer_dtype=getattr(torch, setting(self.cfg, "fsdp.buffer_dtype")),
            strategy=setting(self.cfg, "fsdp.sharding_strategy"),
            per_block=setting(self.cfg, "fsdp.per_block"),
        )
        if self.ranks.size == 1:
            self.logger.info("fsdp.use: one process, so there is nothing to shard")
        names = process_group.check_methods(model, methods)
        return process_group.sharded(model, how, self.device, block_classes, names)

    def compile_model(self, model: nn.Module, block_classes: Collection[type] = ()) -> None:
        """Compile a model in place as `compile` says; block by block where blocks are sharded.

        Raises:
            ConfigError: `compile` names no mode or backend of `torch.compile`.
        """
        options = compile_options(setting(self.cfg, "compile"))
        if options is None:
            return
        by_block = setting(self.cfg, "fsdp.use") and setting(self.cfg, "fsdp.per_block")
        sharded = by_block and self.ranks.size > 1
        parts = process_group.blocks(model, block_classes) if sharded else ()
        compile_in_place(model, options, parts)

    def check_precision(self) -> None:
        """Refuse to train sharded parameters in float16 without a scaler of gradients.

        Raises:
            ConfigError: small gradients would become 0; the message says what to set.
        """
        is_sharded = setting(self.cfg, "fsdp.use") and self.ranks.size > 1
        if not is_sharded or setting(self.cfg, "fsdp.sharding_strategy") == "no_shard":
            return
        scalers = [one for one in vars(self).values() if isinstance(one, torch.amp.GradScaler)]
        if setting(self.cfg, "fsdp.param_dtype") == "float16" and not any(
            one.is_enabled() for one in scalers
        ):
            raise ConfigError(
                "fsdp.param_dtype=float16 needs a scaler, or small gradients become 0: set "
                "fsdp.param_dtype=bfloat16 (as little memory, no scaler) or float32, or set "
                "self.scaler = make_grad_scaler(self.device, 'float16') in build_model"
            )

    @contextmanager
    def no_sync(self, *, sharded: bool = True) -> Iterator[None]:
        """Leave the gradients of the block on each rank: for batches that are only added up.

        Args:
            sharded: whether sharded models do so too. These then hold whole gradients.
        """
        with ExitStack() as undo:
            for value in chain.from_iterable(map(layers, vars(self).values())):
                if isinstance(value, DistributedDataParallel):
                    undo.enter_context(value.no_sync())
                elif sharded and hasattr(value, "set_requires_gradient_sync"):
                    value.set_requires_gradient_sync(False)
                    self._holds_back = True
                    undo.callback(value.set_requires_gradient_sync, True)
            yield

    def register_per_rank(self, *names: str) -> None:
        """Say that each rank has its own state of these sources, such as its place in a stream.

        Where another number of ranks goes on, they are left as they are, and the log says so.

        Raises:
            ValueError: `register_stateful` does not know one of them.
        """
        for name in names:
            if name not in self.stateful.sources:
                raise ValueError(
                    f"call self.register_stateful({name!r}) before self.register_per_rank({name!r})"
                )
            self._per_rank.add(name)
