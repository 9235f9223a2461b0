"""Turns the state of a run into what this process writes of it."""

from collections.abc import Collection, Mapping
from typing import Any

from ..format.codec import Encoded
from ..format.decode import Json
from ..machine_errors import saving
from ..ranks import Ranks
from ..run_folder.file_names import check_names
from ..storage import Storage
from .encode import encoded, versions_of
from .shards import SourceShard, shards_of_one_process


class StateSplitter:
    """Encodes each source, and splits the tensors over the ranks that save together.

    Args:
        storage: storage of the checkpoint, whose file names limit the names of sources.
        ranks: processes that save together.
        compress: sources whose files are compressed.
    """

    def __init__(self, storage: Storage, ranks: Ranks, compress: Collection[str]) -> None:
        self._storage, self._ranks, self._compress = storage, ranks, compress
        self._good_names: tuple[str, ...] = ()

    def encoded(self, state: Mapping[str, Any], where: str) -> dict[str, Encoded]:
        """Encode each source, and check that its files can have names; on all ranks.

        Args:
            state: by source.
            where: path of the checkpoint, for messages.

        Raises:
            UnsupportedState: a value or a name that the format, or the storage, cannot hold.
        """
        return self._ranks.run_everywhere(lambda: self._encoded(state, where))

    def _encoded(self, state: Mapping[str, Any], where: str) -> dict[str, Encoded]:
        with saving(where):
            found = encoded(state, self._ranks)
        # Each save has the same names as the one before, and asking the system takes time.
        if (names := tuple(found)) != self._good_names:
            check_names(names, self._storage, writers=self._ranks.size, compress=self._compress)
            self._good_names = names
        return found

    def split(
        self, state: Mapping[str, Any], where: str
    ) -> tuple[dict[str, Json], list[SourceShard]]:
        """Return the JSON tree of each source, and the tensors that this rank writes."""
        sources = self.encoded(state, where)
        if self._ranks.size == 1:
            with saving(where):
                trees = {source: tree for source, (tree, _, _) in sources.items()}
                return trees, shards_of_one_process(sources, versions_of(state))
        # The planners of torch take a second to import, and one process does not need them.
        from .sharded_parts import shards_of_rank, trees_of_all

        trees = trees_of_all(sources, self._ranks)
        return trees, shards_of_rank(sources, versions_of(state), self._ranks)
