"""A model that FSDP2 spreads over two processes: saved by torch's checkpoints, and by ours."""

from typing import Any

from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh

from checkpoint import Checkpointer
from checkpoint.integration import Ranks

from ..state import World, make_model, make_optimizer
from .base import Folders, Setting
from .dcp import Dcp
from .ours import Alone


class DcpSharded(Dcp):
    """`dcp.save` and `dcp.load`: each rank writes and reads its part."""

    ranks = 2

    def __init__(self, setting: Setting) -> None:
        Folders.__init__(self, setting)
        self.world = sharded_world(setting)


class AloneSharded(Alone):
    """`Checkpointer` with two ranks; only parameters, and what is like them, are spread."""

    ranks = 2
    is_async = False

    def __init__(self, setting: Setting) -> None:
        self.world = sharded_world(setting)
        self.checkpointer = Checkpointer(
            setting.folder, save_every=setting.keep_every, ranks=Ranks.here()
        )
        self._epoch = 0

    def like(self) -> dict[str, Any]:
        """Have each rank read its part."""
        return {**self.state(), "best": self.world.best}


def sharded_world(setting: Setting) -> World:
    """Return the whole state, of which each rank has a part."""
    model = make_model(setting.size, setting.trained)
    mesh = init_device_mesh("cpu", (2,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = make_optimizer(model)
    copies = [{k: v.detach().clone() for k, v in model.state_dict().items()} for _ in range(2)]
    return World(model, optimizer, *copies)
