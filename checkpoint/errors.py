"""What can go wrong with checkpoints, as a small tree that users can catch.

CheckpointError
  MissingCheckpoint      nothing lies there                                (also FileNotFoundError)
  CorruptCheckpoint      something lies there and cannot be trusted        (also ValueError)
  UnreadableCheckpoint   the storage, or the machine, refused to read it   (also OSError)
  UnsupportedFormat      another format, or ours from the future           (also ValueError)
  CheckpointExists       committed already, and committed files never change (also FileExistsError)
  CannotSave             the storage, or the machine, refused to write     (also OSError)
  UnsupportedState       a value that the format cannot hold               (also TypeError)
  StateMismatch          checkpoint and live object do not fit             (also ValueError)
  BadReference           what the user wrote cannot refer to a checkpoint  (also ValueError)
  RankFailed             another process of the run failed                 (also RuntimeError)

Every message says what is wrong, with which path or key, and what to do now.
"""


class CheckpointError(Exception):
    """Base of everything that this package raises on purpose."""


class MissingCheckpoint(CheckpointError, FileNotFoundError):
    """Nothing lies there."""


class CorruptCheckpoint(CheckpointError, ValueError):
    """Something lies there and cannot be trusted."""


class UnreadableCheckpoint(CheckpointError, OSError):
    """The storage refused to read what lies there, or memory, threads or descriptors are short.

    It may be good, so nothing is given up.
    """


class UnsupportedFormat(CheckpointError, ValueError):
    """The file is of another format, or of a version that this code does not know."""


class CheckpointExists(CheckpointError, FileExistsError):
    """The checkpoint is committed already, and committed files never change."""


class CannotSave(CheckpointError, OSError):
    """The storage refused to write (full, read-only, failing), or memory or threads are short."""


class UnsupportedState(CheckpointError, TypeError):
    """A value that the format cannot hold; the message names the source and the key."""


class StateMismatch(CheckpointError, ValueError):
    """Checkpoint and live object do not fit; the message lists names and shapes."""


class BadReference(CheckpointError, ValueError):
    """What the user wrote cannot refer to a checkpoint."""


class RankFailed(CheckpointError, RuntimeError):
    """Another process of the run failed; the message says which, and with what."""
