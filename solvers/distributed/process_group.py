"""Several processes that train one model: how they meet, and how the model is spread over them."""

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from dora import distrib
from dora.xp import get_xp
from torch import distributed, nn
from torch.utils.checkpoint import checkpoint

from checkpoint.integration import Ranks

from .replication import replicated
from .wrappers import plain_state, unwrapped

_PDEATHSIG = 1  # of prctl(2)


def start() -> None:
    """Meet the other processes of the run, if there are any; again, nothing happens.

    Those that `dora run -d` and Slurm start meet through Dora; those of `torchrun` where it says.
    Tensors of the CPU go through gloo, those of GPUs through NCCL.
    """
    spec = distrib.get_distrib_spec()
    if spec.world_size == 1 or distributed.is_initialized():
        return
    _stop_with_parent()
    # Our own log is not set up yet, and this line would make Hydra write one.
    logging.getLogger("dora.distrib").setLevel(logging.WARNING)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(spec.local_rank)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        distributed.init_process_group(backend)
    elif get_xp().dora.use_rendezvous:
        _meet_through_file(get_xp().rendezvous_file, backend, spec.rank, spec.world_size)
    else:
        distrib.init(backend)


def _meet_through_file(file: Path, backend: str, rank: int, size: int) -> None:
    # Dora gives torch a URL, in which `#`, `?` and line breaks of a path get lost.
    store = distributed.FileStore(str(file.absolute()), size)  # type: ignore[attr-defined]
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size)
    # All ranks have met, so that a later start cannot take this file for its own.
    distributed.barrier()
    if rank == 0:
        file.unlink()


def finish() -> None:
    """Part from the other processes, at the end of a run that went well."""
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def _stop_with_parent() -> None:
    """Be asked to stop when the process dies that started this one: Dora's only kills its own."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGTERM)


@dataclass(frozen=True)
class Sharding:
    """How a model is sharded; the configuration's section `fsdp`.

    Attributes:
        param_dtype: in which parameters are gathered and compute; those of layers with running
            statistics do so in `buffer_dtype`.
        reduce_dtype: in which gradients are averaged.
        buffer_dtype: of the floating-point buffers.
        strategy: `full_shard`; `shard_grad_op`, which keeps parameters gathered between forward and
            backward; `hybrid_shard`, which shards inside a node and replicates over the nodes; or
            `no_shard`, which replicates.
        per_block: whether each block is gathered on its own, and not the model at once.
    """

    param_dtype: torch.dtype
    reduce_dtype: torch.dtype
    buffer_dtype: torch.dtype
    strategy: str
    per_block: bool


def sharded(
    model: nn.Module,
    how: Sharding,
    device: str,
    block_classes: Collection[type] = (),
    methods: Collection[str] = (),
) -> nn.Module:
    """Shard a model over the ranks with FSDP2; alone, it stays as it is.

    Args:
        model: on its device. All ranks start with the weights of rank 0.
        how: the options.
        device: where it is.
        block_classes: classes of the modules that are blocks; none for the items of each
            `nn.ModuleList`.
        methods: names of methods of the model that compute with its parameters, beside `forward`.
    """
    if Ranks.here().size == 1:
        return model
    if how.strategy == "no_shard":
        return replicated(model, device)
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    same_as_first([*model.parameters(), *model.buffers()])
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.to(how.buffer_dtype)
    shard = partial(
        fully_shard,
        mesh=_mesh(how.strategy, torch.device(device).type),
        reshard_after_forward=how.strategy != "shard_grad_op",
    )
    kept = MixedPrecisionPolicy(how.buffer_dtype, how.reduce_dtype, cast_forward_inputs=False)
    for module in _with_statistics(model) if how.param_dtype != how.buffer_dtype else ():
        shard(module, mp_policy=kept)
    shard = partial(shard, mp_policy=MixedPrecisionPolicy(how.param_dtype, how.reduce_dtype))
    for block in blocks(model, block_classes) if how.per_block else ():
        shard(block)
    # Not what `torch.compile` returned, which holds no parameters itself.
    shard(unwrapped(model))
    for name in methods:
        register_fsdp_forward_method(unwrapped(model), name)
    return model


def check_methods(model: nn.Module, names: Collection[str]) -> list[str]:
    """Return the names of methods that compute with the parameters; `generate` where there is one.

    Raises:
        ValueError: the model has no method of such a name.
    """
    for name in names:
        if not callable(getattr(model, name, None)):
            raise ValueError(
                f"self.wrap(methods=...) has {name!r}, and {type(unwrapped(model)).__name__} has "
                "no method of that name"
            )
    has_generate = callable(getattr(model, "generate", None))
    return list({**dict.fromkeys(names), **({"generate": None} if has_generate else {})})


def _with_statistics(model: nn.Module) -> Iterator[nn.Module]:
    """Give the layers whose parameters must have the type of their running statistics."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and list(module.parameters()):
            yield module


def _mesh(strategy: str, device: str) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    size = distributed.get_world_size()
    inside = int(os.environ.get("LOCAL_WORLD_SIZE", size // distrib.get_distrib_spec().num_nodes))
    if strategy == "hybrid_shard" and 1 < inside < size:
        return init_device_mesh(device, (size // inside, inside), mesh_dim_names=("node", "rank"))
    return init_device_mesh(device, (size,))


def blocks(model: nn.Module, classes: Collection[type] = ()) -> list[nn.Module]:
    """Return the blocks that a model repeats, outermost only.

    Args:
        model: what is made of them.
        classes: of the blocks; none for the items of each `nn.ModuleList`.
    """
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if id(module) in inside:
            continue
        # A list may have None in the place of a module.
        repeated: Iterable[nn.Module | None] = module if isinstance(module, nn.ModuleList) else ()
        for block in [module] if isinstance(module, tuple(classes)) else repeated:
            if block is None or (classes and not isinstance(block, tuple(classes))):
                continue
            found.append(block)
            inside |= {id(one) for one in block.modules()}
    return found


def recomputing(model: nn.Module, block_classes: Collection[type] = ()) -> nn.Module:
    """Make the blocks of a model forget what is inside them until the backward pass.

    Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016. Names stay what they are.
    """
    for block in blocks(model, block_classes):
        block.forward = partial(_recomputed, block.forward)
    return model


def _recomputed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def same_as_first(tensors: Sequence[torch.Tensor]) -> None:
    """Give tensors that each rank has whole the values that they have on rank 0."""
    for tensor in tensors if Ranks.here().size > 1 else ():
        whole = tensor.detach().contiguous()
        if whole.numel():
            # As bytes, since gloo does not know every type.
            # `as_strided`, since one element may have any stride.
            flat = whole.as_strided((whole.numel(),), (1,))
            distributed.broadcast(flat.view(torch.uint8), src=0)
            tensor.detach().copy_(whole)


def buffers(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Give the persistent buffers of a module by their plain names in its state dict."""
    found = {id(one) for one in unwrapped(module).buffers()}
    state = plain_state(module, keep_vars=True)
    yield from ((key, one) for key, one in state.items() if id(one) in found)
