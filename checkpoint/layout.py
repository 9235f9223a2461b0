"""Names on disk <-> what they mean. Pure: nothing here touches a disk."""

import re
from dataclasses import dataclass
from typing import Self
from urllib.parse import quote

CHECKPOINTS = "checkpoints"
"""Folder of an experiment that holds its checkpoints."""
MANIFEST = "manifest.json"
"""The commit record: written last, removed first."""
COPY = ".manifest.json"
"""The second commit record: the bytes of the first one, whose own digest proves them."""
TEMPORARY = ".tmp-"
"""How the name of a file begins that is to be renamed once it is whole."""
UNFINISHED = f"{TEMPORARY}unfinished"
"""The mark of a folder that a save or a deletion has begun, and not ended.

Older versions take a file of this name for one of theirs."""

ROLLING = "rolling"
"""Kept until two newer ones exist (`save_last`)."""
PERIODIC = "periodic"
"""Kept beside the rolling ones (`save_every`, limited by `keep_last`)."""
THRESHOLD = "threshold"
"""A metric crossed a value: kept for good, with all its sources."""
NONFINITE = "nonfinite"
"""Its weights are not all finite: stays only while it is the newest, and counts for no rule."""

MAX_FILES = 4
"""Most files that one process writes of one source."""

_NAME = re.compile(r"epoch_(\d{4,9})(?:_step_(\d{8,15})(?:_stages_([1-9]\d{0,2}))?)?")
_ASIDE = "damaged_"


@dataclass(frozen=True)
class Position:
    """Where in a run a checkpoint was taken.

    `step` counts optimizer updates since the start of the run and is None at the end of an epoch.
    A checkpoint in the middle of epoch 4 comes after the end of epoch 3 and before that of 4.
    `stages` counts those of the epoch that were finished by then.
    """

    epoch: int
    step: int | None = None
    stages: int = 0

    @classmethod
    def checked(cls, epoch: int, step: int | None = None, stages: int = 0) -> Self:
        """Make a position from values of a caller.

        Raises:
            ValueError: the values do not give a name that can be parsed.
        """
        position = cls(epoch, step, stages)
        if cls.parse(position.name) != position or type(epoch) is not int:
            raise ValueError(f"epoch {epoch!r} and step {step!r} are no position of a run")
        return position

    @property
    def order(self) -> tuple[int, float, int]:
        """Sort key: older first."""
        return self.epoch, float("inf") if self.step is None else self.step, self.stages

    @property
    def name(self) -> str:
        """Folder name, such as `epoch_0003` or `epoch_0004_step_00001200_stages_2`."""
        middle = "" if self.step is None else f"_step_{self.step:08d}"
        return f"epoch_{self.epoch:04d}{middle}" + (f"_stages_{self.stages}" if self.stages else "")

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """Read a folder name; None when it is not the name of a checkpoint."""
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        epoch, step, stages = match.groups()
        position = cls(int(epoch), None if step is None else int(step), int(stages or 0))
        return position if position.name == name else None


def quarantine_name(name: str, attempt: int) -> str:
    """Name under which a damaged checkpoint is kept; it no longer parses as a position."""
    return f"{_ASIDE}{name}" + (f"_{attempt}" if attempt else "")


def is_quarantined(name: str) -> bool:
    """Whether a folder is a damaged checkpoint that was put out of the way."""
    return name.startswith(_ASIDE)


def file_stem(source: str) -> str:
    """File name for a source, without suffix: readable names stay, others are percent-encoded."""
    quoted = quote(source, safe="")
    return f"%2E{quoted[1:]}" if quoted.startswith(".") else quoted


def tensor_file(source: str) -> str:
    """Name of the file with the tensors of a source."""
    return f"{file_stem(source)}.safetensors"


def shard_file(source: str, number: int, count: int, piece: int | None = None) -> str:
    """Name of the file with the part of a source that the `number`th (from 1) of its writers has.

    As the Hugging Face layout has it: `model-00001-of-00004.safetensors`. A writer that splits its
    part numbers its pieces: `model-00001-of-00004.2.safetensors`.
    """
    if count == 1:
        return tensor_file(source)
    numbered = f"{file_stem(source)}-{number:05d}-of-{count:05d}"
    return f"{numbered}.safetensors" if piece is None else f"{numbered}.{piece}.safetensors"


def index_file(source: str) -> str:
    """Name of the file that says, in the Hugging Face layout, which tensor lies in which file."""
    return f"{tensor_file(source)}.index.json"


def is_of_source(file: str, source: str) -> bool:
    """Whether a file name is one of those that a source may have."""
    shard = rf"{re.escape(file_stem(source))}(-\d{{5,}}-of-\d{{5,}}(\.\d+)?)?\.safetensors(\.zst)?"
    return file == index_file(source) or re.fullmatch(shard, file) is not None


def full_name(source: str, key: str) -> str:
    """Name of a tensor among the tensors of all sources; a file stem has no slash."""
    return f"{file_stem(source)}/{key}"


def may_be_of_save(file: str) -> bool:
    """Whether a file name may be one that a save left, of whatever source."""
    ends = (".safetensors", ".safetensors.zst", ".safetensors.index.json")
    return file.startswith(".") or file.endswith(ends)


def is_plain(name: str) -> bool:
    """Whether a file name that came from a file may be joined to a folder."""
    return (
        0 < len(name) <= 255
        and not name.startswith(".")
        and not {"/", "\\", "\0"} & set(name)
        and name.isprintable()
    )
