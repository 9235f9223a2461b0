"""The settings of the framework as typed, frozen objects: one pydantic model a section.

The same keys, with a comment for people, are in `config/solver/standard.yaml`. A test compares the
two. `validate.parse` makes these objects from a configuration.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from .base_types import (
    UNSET,
    ClosedSection,
    Count,
    Device,
    Dtype,
    Every,
    Flag,
    Integer,
    Label,
    Level,
    Mode,
    Names,
    NonNegative,
    Number,
    OpenSection,
    Positive,
    Switch,
    Text,
    Unset,
    UsualNames,
)
from .optim_schema import OptimSettings, ScheduleSettings

_COMPILERS = (
    *("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    *("inductor", "eager", "aot_eager", "cudagraphs"),
)


class DatasetSettings(OpenSection):
    """The section `dataset`."""

    batch_size: Count | Unset | None = UNSET
    num_workers: Annotated[Integer, Field(ge=0)] = 0
    seed_samples: Flag = False
    restart_streams: Flag = False
    combine: Literal["shortest", "longest", "in_turn"] = "longest"
    allow_unshared: Flag = False


class EvaluateSettings(OpenSection):
    """The section `evaluate`."""

    every: Every | None = None


class GenerateSettings(OpenSection):
    """The section `generate`."""

    every: Every | None = None
    path: Text = "samples"


class EarlyStoppingSettings(ClosedSection):
    """The section `early_stopping`."""

    metric: Text | None = None
    stage: Text = "valid"
    mode: Mode | None = None
    patience: Count = 10
    min_delta: NonNegative = 0.0


class ThresholdSettings(ClosedSection):
    """The section `checkpoint.threshold`."""

    metric: Text | None = None
    stage: Text = "valid"
    value: Number | None = None
    mode: Literal["above", "below"] = "below"
    patience: Count = 1

    @model_validator(mode="after")
    def _require_metric_and_value(self) -> Self:
        if (self.metric is None) != (self.value is None):
            missing = "metric" if self.metric is None else "value"
            raise ValueError(
                "checkpoint.threshold needs both metric and value: set "
                f"checkpoint.threshold.{missing}"
            )
        return self


class RetentionSettings(ClosedSection):
    """The keys of the section `checkpoint` that say which checkpoints stay.

    Each has the name of a field of the retention policy of `checkpoint`.
    """

    keep_last: Every | None = None
    keep_rolling: Annotated[Integer, Field(ge=2)] = 2
    keep_every: Every | None = None
    keep_best: Every | None = None
    keep_hours: Positive | None = None
    keep_resumed: Flag = True
    keep_every_states: Names | None = None
    demote: Names | None = None
    keep_demoted: Count | None = None
    max_gb: Positive | None = None

    def retention(self) -> dict[str, Any]:
        """Return these keys alone, as keyword arguments of the retention policy."""
        return {name: getattr(self, name) for name in RetentionSettings.model_fields}

    @model_validator(mode="after")
    def _require_demotion(self) -> Self:
        if self.keep_demoted is not None and not self.demote:
            raise ValueError(
                "checkpoint.keep_demoted means nothing without checkpoint.demote: name the sources "
                "that stay, such as [model,best_state]"
            )
        return self


class CheckpointSettings(RetentionSettings):
    """The section `checkpoint`."""

    save_last: Flag = True
    save_every: Every | None = None
    every_steps: Every | None = None
    every_minutes: Positive | None = None
    interval: Literal["auto"] | None = None
    mtbf_hours: Positive | None = None
    max_overhead: Annotated[Number, Field(gt=0, le=1)] = 0.05
    threshold: ThresholdSettings
    save_on_exception: Flag = False
    # `async` is a keyword of Python.
    async_: Flag = Field(default=True, alias="async")
    on_error: Literal["stop", "warn"] = "stop"
    compress: Names | None = None
    verify_after_save: Flag = False
    on_mismatch: Literal["warn", "refuse"] = "warn"
    best_metric: Text | None = None
    best_mode: Mode | None = None

    @model_validator(mode="after")
    def _require_saved_epochs(self) -> Self:
        if self.save_last or self.save_every:
            return self
        for key, value in (("keep_every", self.keep_every), ("keep_best", self.keep_best)):
            if value:
                raise ValueError(
                    f"checkpoint.{key}={value} chooses among the epochs that are saved, and no "
                    "epoch is saved: set checkpoint.save_last=true or checkpoint.save_every"
                )
        return self

    @model_validator(mode="after")
    def _require_one_interval(self) -> Self:
        if self.interval == "auto" and self.every_minutes is not None:
            raise ValueError(
                "checkpoint.interval=auto chooses what "
                f"checkpoint.every_minutes={self.every_minutes:g} gives: leave one of them out"
            )
        if self.interval is None and self.mtbf_hours is not None:
            raise ValueError(
                f"checkpoint.mtbf_hours={self.mtbf_hours:g} needs checkpoint.interval=auto, which "
                "is not set"
            )
        return self


class LoggingSettings(ClosedSection):
    """The section `logging`."""

    level: Level = "INFO"
    log_updates: Annotated[Integer, Field(ge=0)] = 10
    progress_bar: Literal["auto", "always", "never"] = "auto"
    log_tensorboard: Flag = False
    log_wandb: Flag = False


class TensorboardSettings(OpenSection):
    """The section `tensorboard`."""

    with_media_logging: Flag = False
    name: Text | None = None
    sub_dir: Text | None = None


class WandbSettings(OpenSection):
    """The section `wandb`."""

    with_media_logging: Flag = True
    project: Text | None = None
    name: Text | None = None
    group: Text | None = None


class ProfilerSettings(ClosedSection):
    """The section `profiler`."""

    enabled: Flag = False


class DeadlockSettings(ClosedSection):
    """The section `deadlock`."""

    use: Flag = False
    timeout: Positive = 600


class FsdpSettings(ClosedSection):
    """The section `fsdp`."""

    use: Flag = False
    param_dtype: Dtype = "float16"
    reduce_dtype: Dtype = "float32"
    buffer_dtype: Dtype = "float32"
    sharding_strategy: Literal["shard_grad_op", "full_shard", "no_shard", "hybrid_shard"] = (
        "shard_grad_op"
    )
    per_block: Flag = True


class Settings(OpenSection):
    """All keys of the framework, as `validate.parse` reads them from a configuration."""

    solver: Text | None = None
    device: Device = "auto"
    seed: Annotated[Integer, Field(ge=0, le=2**32 - 1)] = 2036
    num_threads: Count | None = 1
    label: Label | None = None
    show: Flag = False
    fast_dev_run: Flag = False
    continue_from: Text | None = None
    execute_only: Literal["generate", "evaluate", "valid"] | None = None
    execute_inplace: Flag = False
    benchmark_no_load: Flag = False
    autocast: Flag = False
    autocast_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    compile: Annotated[Switch, UsualNames(_COMPILERS)] | None = False
    dataset: DatasetSettings
    optim: OptimSettings
    schedule: ScheduleSettings
    evaluate: EvaluateSettings
    generate: GenerateSettings
    early_stopping: EarlyStoppingSettings
    checkpoint: CheckpointSettings
    logging: LoggingSettings
    tensorboard: TensorboardSettings
    wandb: WandbSettings
    profiler: ProfilerSettings
    deadlock: DeadlockSettings
    fsdp: FsdpSettings

    @model_validator(mode="after")
    def _require_weights_for_stage(self) -> Self:
        if self.execute_only and not self.execute_inplace and self.continue_from is None:
            raise ValueError(
                f"execute_only={self.execute_only} needs weights: add execute_inplace=true for "
                "this experiment's own, or continue_from=//sig/SIG for another's"
            )
        return self

    @model_validator(mode="after")
    def _refuse_trial_in_place(self) -> Self:
        if self.fast_dev_run and self.execute_inplace:
            raise ValueError(
                "fast_dev_run=true keeps nothing, so there is nothing for execute_inplace=true to "
                "use: leave one of them out"
            )
        return self
