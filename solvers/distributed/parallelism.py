"""How a solver spreads its models over the processes of a run."""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..run_context import RunContext
from ..settings.errors import ConfigError
from . import process_group
from .compiling import compile_in_place, compile_options
from .replication import replicated
from .wrappers import layers


class Parallelism:
    """Wraps models for the ranks of a run, and keeps what the ranks share the same.

    Args:
        context: of the run.
        attributes: returns the attributes of the solver by name. Wrapped models are found there.

    Attributes:
        holds_gradients: whether FSDP2 holds whole gradients outside of `.grad`: a block of
            `no_sync` ran, and no update used these gradients yet.
    """

    def __init__(self, context: RunContext, attributes: Callable[[], dict[str, Any]]) -> None:
        self.holds_gradients = False
        self._context, self._attributes = context, attributes
        self._fsdp = context.settings.fsdp
        self._buffers: list[torch.Tensor] = []

    @property
    def is_sharded(self) -> bool:
        """Whether models are sharded (`fsdp.use`)."""
        return self._fsdp.use

    def prepared(
        self, model: nn.Module, block_classes: Collection[type], methods: Collection[str]
    ) -> nn.Module:
        """Return a model with activation checkpointing and compilation, as the settings say.

        Raises:
            ValueError: the model does not have one of the methods.
        """
        process_group.check_methods(model, methods)
        if self._context.settings.optim.activation_checkpointing:
            model = process_group.recomputing(model, block_classes)
        self.compile(model, block_classes)
        return model

    def replicated(self, model: nn.Module, **options: Any) -> nn.Module:
        """Return a model whose gradients are averaged over the ranks, see `replicated`."""
        return replicated(model, self._context.device, **options)

    def sharded(
        self, model: nn.Module, block_classes: Collection[type], methods: Collection[str]
    ) -> nn.Module:
        """Return a model sharded over the ranks as `fsdp.*` says; on one process, as it is."""
        fsdp = self._fsdp
        how = process_group.Sharding(
            param_dtype=getattr(torch, fsdp.param_dtype),
            reduce_dtype=getattr(torch, fsdp.reduce_dtype),
            buffer_dtype=getattr(torch, fsdp.buffer_dtype),
            strategy=fsdp.sharding_strategy,
            per_block=fsdp.per_block,
        )
        if self._context.ranks.size == 1:
            self._context.logger.info("fsdp.use: one process, so there is nothing to shard")
        names = process_group.check_methods(model, methods)
        return process_group.sharded(model, how, self._context.device, block_classes, names)

    def compile(self, model: nn.Module, block_classes: Collection[type] = ()) -> None:
        """Compile a model in place as `compile` says; block by block where blocks are sharded.

        Raises:
            ConfigError: `compile` names no mode or backend of `torch.compile`.
        """
        options = compile_options(self._context.settings.compile)
        if options is None:
            return
        by_block = self._fsdp.use and self._fsdp.per_block and self._context.ranks.size > 1
        parts = process_group.blocks(model, block_classes) if by_block else ()
        compile_in_place(model, options, parts)

    def check_precision(self, scalers: Iterable[torch.amp.GradScaler]) -> None:
        """Refuse to train sharded parameters in float16 without a gradient scaler.

        Args:
            scalers: the gradient scalers of the solver.

        Raises:
            ConfigError: small gradients would become 0; the message says what to set.
        """
        is_sharded = self._fsdp.use and self._context.ranks.size > 1
        if not is_sharded or self._fsdp.sharding_strategy == "no_shard":
            return
        if self._fsdp.param_dtype == "float16" and not any(one.is_enabled() for one in scalers):
            raise ConfigError(
                "fsdp.param_dtype=float16 needs a scaler, or small gradients become 0: set "
                "fsdp.param_dtype=bfloat16 (as little memory, no scaler) or float32, or set "
                "self.scaler = make_grad_scaler(self.device, 'float16') in build_model"
            )

    @contextmanager
    def no_sync(self, *, sharded: bool = True) -> Iterator[None]:
        """Run a block whose backward passes leave the gradients on each rank.

        Args:
            sharded: whether sharded models do so too. They hold whole gradients then.
        """
        with ExitStack() as undo:
            for value in chain.from_iterable(map(layers, self._attributes().values())):
                if isinstance(value, DistributedDataParallel):
                    undo.enter_context(value.no_sync())
                elif sharded and hasattr(value, "set_requires_gradient_sync"):
                    value.set_requires_gradient_sync(False)
                    self.holds_gradients = True
                    undo.callback(value.set_requires_gradient_sync, True)
            yield

    # Buffers of a sharded model: DDP broadcasts those of a replica before each forward pass.

    def follow_buffers(self, model: nn.Module) -> None:
        """Take the buffers that `broadcast_buffers` gives to all ranks from a sharded model."""
        if self._context.ranks.size > 1 and self._fsdp.use:
            self._buffers = [one for _, one in sorted(process_group.buffers(model))]

    @property
    def broadcasts_buffers(self) -> bool:
        """Whether `broadcast_buffers` has something to do."""
        return bool(self._buffers)

    def broadcast_buffers(self) -> None:
        """Give all ranks the buffers of rank 0; after each update."""
        process_group.same_as_first(self._buffers)
