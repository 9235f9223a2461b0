"""What a file may claim of memory and time, so that a small one cannot exhaust the machine."""

from ..errors import CorruptCheckpoint

_SPARE_MEMORY = 56 * 2**20
_SPARE_INSTRUCTIONS = 1_500_000
_BYTES_PER_INSTRUCTION = 100


class MemoryBudget:
    """What a file may claim: twice its size of memory, and time by its size, and a little more.

    Attributes:
        instructions: that its pickle may have; a million take about a second.
    """

    def __init__(self, file_size: int) -> None:
        self._limit = self._left = 2 * file_size + _SPARE_MEMORY
        self.instructions = _SPARE_INSTRUCTIONS + file_size // _BYTES_PER_INSTRUCTION

    def spend(self, size: int) -> None:
        """Account for `size` bytes before they are allocated.

        Raises:
            CorruptCheckpoint: the file has claimed more than a file of its size may.
        """
        self._left -= size
        if self._left < 0:
            raise CorruptCheckpoint(
                f"reading it would need more than the {self._limit // 2**20} MiB of memory that a "
                "file of its size may take: it is made to exhaust memory, or holds very many small "
                "values"
            )
