"""torch.distributed.checkpoint, as its recipes have it; with two ranks and FSDP2, too."""

import tempfile
from pathlib import Path
from typing import Any

from torch import distributed
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from ..state import make_world
from .base import Folders, Setting


class Dcp(Folders):
    """`dcp.save` and `dcp.load` of `get_state_dict`; the writer syncs files by default."""

    syncs = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        meet()
        self.world = make_world(setting.size, setting.trained)

    def state(self) -> dict[str, Any]:
        """Return what is saved, and loaded in place."""
        model, optimizer = get_state_dict(self.world.model, self.world.optimizer)
        world = self.world
        return {"model": model, "optimizer": optimizer, "ema": world.ema, "best": world.best}

    def write(self, path: Path) -> None:
        """Save and wait."""
        dcp.save(self.state(), checkpoint_id=path)

    def read(self, path: Path) -> None:
        """Load into the live tensors, and set what is no tensor."""
        state = self.state()
        dcp.load(state, checkpoint_id=path)
        set_state_dict(
            self.world.model,
            self.world.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )


class DcpThread(Dcp):
    """`dcp.async_save` in a thread, with the stager that it makes itself for each save."""

    is_async = True
    kind = AsyncCheckpointerType.THREAD
    stager: Any = None
    _saving: Any = None

    def write(self, path: Path) -> None:
        """Stage, and begin to save."""
        self._saving = dcp.async_save(
            self.state(),
            checkpoint_id=path,
            async_checkpointer_type=self.kind,
            async_stager=self.stager,
        )

    def settle(self) -> None:
        """Wait for the save in flight."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            (getattr(saving, "upload_completion", None) or saving).result()
            super().settle()


class DcpThreadCached(DcpThread):
    """The same with a stager that is kept, which uses its memory again."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=False,
                use_shared_memory=self.kind is AsyncCheckpointerType.PROCESS,
                use_async_staging=False,
                use_non_blocking_copy=False,
            )
        )


class DcpProcess(DcpThreadCached):
    """`dcp.async_save` in a process, with staging in memory that is shared with it, and kept."""

    kind = AsyncCheckpointerType.PROCESS


def meet() -> None:
    """Begin a process group, of this process alone unless there is one already."""
    if not distributed.is_initialized():
        with tempfile.NamedTemporaryFile(prefix="bench-", delete=False) as file:
            pass
        Path(file.name).unlink()
        distributed.init_process_group(
            "gloo", init_method=f"file://{file.name}", rank=0, world_size=1
        )
