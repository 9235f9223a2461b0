"""The checkpointer of a run, from the settings."""

from collections.abc import Callable

from checkpoint import Checkpointer

from ..metrics import Mode
from ..run_context import RunContext
from ..settings.errors import ConfigError

# Thinned checkpoints keep these too. They are small, and a run starts over without them.
_ALWAYS_KEPT = (
    *("history", "progress", "random_state", "loader_state", "generator_state", "module_modes"),
)


def new_checkpointer(
    context: RunContext, best_metric: Callable[[], tuple[str | None, Mode]]
) -> Checkpointer:
    """Return the checkpointer of a run, as the section `checkpoint` says.

    Args:
        context: of the run.
        best_metric: returns name and direction of the metric that says what is best. It is called
            only with `keep_best`, because a solver may not know the metric before `build_model`.

    Raises:
        ConfigError: `checkpoint.keep_best` needs a metric, and there is none.
    """
    settings = context.settings.checkpoint
    metric, mode = best_metric() if settings.keep_best else (None, "min")
    if settings.keep_best and metric is None:
        raise ConfigError(
            f"checkpoint.keep_best={settings.keep_best} needs a metric: set "
            f"checkpoint.best_metric, or best_metric_name in {context.solver_name}"
        )
    return Checkpointer(
        context.folder,
        save_last=settings.save_last,
        save_every=settings.save_every,
        every_steps=settings.every_steps,
        every_minutes=settings.every_minutes,
        background=settings.async_,
        compress=settings.compress or (),
        verify_after_save=settings.verify_after_save,
        on_error=settings.on_error,
        ranks=context.ranks,
        **settings.retention(),
        best_metric=metric,
        best_mode=mode,
        always_kept=_ALWAYS_KEPT,
    )
