"""Waits, on all ranks, for a save in the background."""

from ..errors import CannotSave
from ..ranks import Ranks
from .background_worker import BackgroundWorker
from .save_job import SaveJob


def wait_for(job: SaveJob, background: BackgroundWorker, ranks: Ranks, *, is_given: bool) -> None:
    """Wait until a job is durable, and until nothing is left to do in the background.

    Args:
        job: of this rank; every rank calls this for its own job at the same time.
        background: does the job, and what is to be done after it.
        ranks: the processes that save together.
        is_given: whether `background` was given the job for certain. An interrupt may have come
            before that.

    Raises:
        CheckpointError: the job, or what was to be done after it, failed on this rank or another
            one. The job is abandoned, and `background` takes new work.
    """
    try:
        ranks.run_everywhere(lambda: _wait_until_written(job, background, ranks))
        ranks.run_on_rank0(lambda: _wait_until_saved(job, background, is_given or ranks.size > 1))
    except Exception:
        job.abandon()
        background.join()
        background.forget()
        raise


def _wait_until_written(job: SaveJob, background: BackgroundWorker, ranks: Ranks) -> None:
    job.wait_until_written(lambda: background.is_busy)
    if ranks.size > 1 and not (job.is_saved or ranks.is_first):
        raise CannotSave(f"cannot save {job.where}: the save was interrupted")


def _wait_until_saved(job: SaveJob, background: BackgroundWorker, is_given: bool) -> None:
    background.wait()
    if not job.is_saved and is_given:
        raise CannotSave(f"cannot save {job.where}: its thread ended before that was done")
