"""Flushing: does what the retention plan says to the checkpoints on disk."""

import logging
from collections.abc import Callable, Mapping

from ..errors import CheckpointError, CorruptCheckpoint, MissingCheckpoint
from ..format.manifest import Manifest
from ..layout import COPY, MANIFEST, UNFINISHED, Position
from ..machine_errors import cause_and_cure
from ..run_folder import deletion
from ..run_folder import folder_contents as remains
from ..run_folder.catalog import Catalog
from ..run_folder.claims import deleting_alone
from ..run_folder.manifest_file import is_committed
from ..storage.log_once import LogOnce
from ..units import format_bytes
from . import plan as retention
from .disk_budget import GB, remaining
from .facts import CheckpointFacts
from .inventory import Inventory
from .rules import Policy
from .verdict_text import describe_verdict

# What a flush goes on after: the next one tries again.
_REFUSALS = (CheckpointError, OSError, MemoryError)

logger = logging.getLogger(__name__)


class Flusher:
    """Keeps the checkpoints of a run that a policy wants, and deletes the others.

    Args:
        catalog: the checkpoints.
        policy: which stay.
    """

    def __init__(self, catalog: Catalog, policy: Policy) -> None:
        self._catalog, self._policy = catalog, policy
        self._survey = Inventory(catalog, by_age=policy.keep_hours is not None)
        # What was warned of already.
        self._once = LogOnce(logger)
        self._is_too_much = False
        self._left_alone: set[Position] = set()

    def plan(self) -> list[retention.Verdict]:
        """Say which checkpoints stay, and why, from what is on disk; touches nothing."""
        return retention.plan(self._survey.existing(self._catalog.outlines()), self._policy)

    def flush(self, check: Callable[[], None]) -> None:
        """Delete what is stale, and what interrupted saves before the newest checkpoint left.

        The caller holds the storage's lock, so that no other process is writing there. Each change
        is logged with its reason. What cannot be looked at or deleted is warned about once, and
        tried again at each flush. A folder that holds what is not ours is left alone, and so is
        what another thread of this process saves or deletes now.

        Args:
            check: raises CannotSave when the lock is lost; called before each change.
        """
        try:
            self._flush(check)
        except _REFUSALS as error:
            # Nothing that was saved is in danger, and other ranks would not know of an error.
            text = _text(error, self._catalog.storage.describe())
            self._once.warning(f"Could not flush: {text}", text)

    def _flush(self, check: Callable[[], None]) -> None:
        outlines = self._catalog.outlines()
        self._refuse_without_newest(outlines)
        existing = self._survey.existing(outlines)
        verdicts = retention.plan(existing, self._policy)
        for verdict in verdicts:
            check()
            try:
                self._apply(verdict, outlines[verdict.position])
            except _REFUSALS as error:
                text = _text(error, self._catalog.storage.describe(verdict.position.name))
                self._once.warning(f"Could not flush {verdict.position.name}: {text}", text)
        self._warn_if_too_much(existing, verdicts)
        self._delete_interrupted(check)

    def _refuse_without_newest(self, outlines: Mapping[Position, Manifest]) -> None:
        newest = max((at.order for at in outlines), default=())
        for position, problem in self._catalog.unread.items():
            if position.order > newest:
                raise CheckpointError(
                    f"{problem}. The newest checkpoint says what else has to stay, so nothing is "
                    "deleted until it can be read, or there is a newer one"
                )
            self._once.warning(f"Leaving {position.name} as it is: {problem}", problem)

    def _apply(self, verdict: retention.Verdict, outline: Manifest) -> None:
        with deleting_alone(self._catalog.storage.describe(verdict.position.name)) as is_free:
            if is_free:
                self._apply_alone(verdict, outline)

    def _apply_alone(self, verdict: retention.Verdict, outline: Manifest) -> None:
        storage, name = self._catalog.storage, verdict.position.name
        if verdict.action != "keep" and self._survey.is_marked(verdict.position):
            # Since the plan was made: what came before in it may have taken a while.
            return
        if verdict.action == "delete":
            deletion.delete(storage, name)
        elif verdict.action == "thin":
            self._thin(verdict.position, verdict.kept_sources)
        elif deletion.leftovers(self._survey.names(verdict.position), outline):
            self._thin(verdict.position, frozenset(outline.sources))
        elif COPY not in self._survey.names(verdict.position):
            # It could not be written, or an older version saved this.
            remains.renew_copy(storage, name)
        if verdict.action != "keep":
            logger.info("%s", describe_verdict(verdict))

    def _thin(self, position: Position, kept: frozenset[str]) -> None:
        manifest = self._catalog.manifest(position)
        deletion.drop_sources(self._catalog.storage, position.name, manifest, kept)

    def _warn_if_too_much(
        self, existing: list[CheckpointFacts], verdicts: list[retention.Verdict]
    ) -> None:
        limit = self._policy.max_gb
        kept = {v.position: None if v.action == "delete" else v.kept_sources for v in verdicts}
        size = 0 if limit is None else remaining(existing, kept)
        was, self._is_too_much = self._is_too_much, limit is not None and size > limit * GB
        if self._is_too_much and not was:
            logger.warning(
                "The %d checkpoints that have to stay take %s, and checkpoint.max_gb=%g: see "
                "`checkpoint plan` for what keeps each, raise the limit, or unpin some",
                *(sum(one is not None for one in kept.values()), format_bytes(size), limit),
            )

    def _delete_interrupted(self, check: Callable[[], None]) -> None:
        for position in self._catalog.abandoned():
            check()
            try:
                with deleting_alone(self._catalog.storage.describe(position.name)) as is_free:
                    # Another thread may have been saving it, and have committed it by now.
                    if is_free and not is_committed(self._catalog.storage, position.name):
                        self._delete_if_ours(position)
            except _REFUSALS as error:
                text = _text(error, self._catalog.storage.describe(position.name))
                self._once.warning(f"Could not remove an interrupted save: {text}", text)

    def _delete_if_ours(self, position: Position) -> None:
        storage = self._catalog.storage
        found = remains.examine(storage, position.name)
        if not found.may_be_deleted:
            what = found.what
        elif self._catalog.is_ours(position):
            storage.delete_marked_folder(position.name, UNFINISHED)
            return
        else:
            what = (
                f"{storage.describe(position.name)} has no {MANIFEST}, and holds files that "
                "are not of a checkpoint"
            )
        if position not in self._left_alone and found.kind != "committed":
            self._left_alone.add(position)
            logger.warning("Left this folder alone: %s", what)


def _text(error: Exception, where: str) -> str:
    if isinstance(error, CheckpointError):
        return str(error)
    return "{}: {}; {}".format(where, *cause_and_cure(error, "check the file system"))


def stored_policy(catalog: Catalog) -> Policy:
    """Read the policy of the run from its newest checkpoint that is not damaged.

    Raises:
        MissingCheckpoint: there is none, or it does not say; such as what was not saved by a run.
        CorruptCheckpoint: what it says is no policy.
    """
    return policy_of(catalog, catalog.newest())


def policy_of(catalog: Catalog, manifest: Manifest) -> Policy:
    """Take the policy of the run that saved a checkpoint from its manifest.

    Raises:
        MissingCheckpoint, CorruptCheckpoint: see `stored_policy`.
    """
    where = catalog.storage.describe(f"{manifest.position.name}/{MANIFEST}")
    if not isinstance(manifest.info.get("policy"), dict):
        raise MissingCheckpoint(f"{where} does not say by which rules checkpoints stay")
    try:
        return Policy.from_plain(manifest.info["policy"])
    except ValueError as error:
        raise CorruptCheckpoint(f"{where} holds a policy that cannot be: {error}") from error
