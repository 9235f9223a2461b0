"""The settings of the sections `optim` and `schedule`, see `schema`."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from .base_types import (
    UNSET,
    Betas,
    ClosedSection,
    Count,
    Device,
    Flag,
    NonNegative,
    Number,
    OpenSection,
    Positive,
    Text,
    Unset,
    UsualNames,
    off_at_zero,
)

SCHEDULES = (
    "step",
    "exponential",
    "cosine",
    "polynomial_decay",
    "inverse_sqrt",
    "linear_warmup",
)
"""The schedules of the learning rate that have a section in `schedule`."""


class AdamSettings(OpenSection):
    """The section `optim.adam`. The keys that torch has beside these belong to the user."""

    betas: Betas = (0.9, 0.999)
    weight_decay: NonNegative = 0.0


class SgdSettings(OpenSection):
    """The section `optim.sgd`. The keys that torch has beside these belong to the user."""

    momentum: NonNegative = 0.0
    weight_decay: NonNegative = 0.0


class EmaSettings(ClosedSection):
    """The section `optim.ema`."""

    use: Flag = False
    updates: Count | None = None
    device: Device | None = "cpu"
    decay: Annotated[Number, Field(ge=0, le=1)] | None = 0.99
    unbias: Flag = True

    @model_validator(mode="after")
    def _refuse_constant_average(self) -> Self:
        if self.use and self.decay == 1:
            raise ValueError(
                "optim.ema.decay=1 never changes the average: give less than 1, such as 0.999"
            )
        return self


class OptimSettings(OpenSection):
    """The section `optim`."""

    epochs: Count
    updates_per_epoch: Count | None = None
    accumulation: Count = 1
    max_norm: Annotated[NonNegative, AfterValidator(off_at_zero)] | None = None
    lr: NonNegative | Unset | None = UNSET
    optimizer: Text = "adam"
    on_nonfinite: Literal["ignore", "skip", "stop"] = "stop"
    adam: AdamSettings
    sgd: SgdSettings
    activation_checkpointing: Flag = False
    ema: EmaSettings


class StepSettings(ClosedSection):
    """The section `schedule.step`."""

    step_size: Count | None = None
    gamma: Positive | None = None


class ExponentialSettings(OpenSection):
    """The section `schedule.exponential`, for which Audiocraft also takes a plain number."""

    lr_decay: Positive | None = None


class CosineSettings(ClosedSection):
    """The section `schedule.cosine`."""

    warmup: NonNegative | None = None
    lr_min_ratio: NonNegative | None = 0.0
    cycle_length: Positive | None = 1.0


class PolynomialDecaySettings(ClosedSection):
    """The section `schedule.polynomial_decay`."""

    warmup: NonNegative | None = None
    zero_lr_warmup_steps: NonNegative | None = 0
    end_lr: NonNegative | None = 0.0
    power: Positive | None = 1


class WarmupSettings(ClosedSection):
    """The sections `schedule.inverse_sqrt` and `schedule.linear_warmup`."""

    warmup: NonNegative | None = None
    warmup_init_lr: NonNegative | None = 0.0


# The keys that have no default once their schedule is chosen.
_NEEDED_BY_SCHEDULE = {
    "step": ("step_size", "gamma"),
    "inverse_sqrt": ("warmup",),
    "linear_warmup": ("warmup",),
}


class ScheduleSettings(OpenSection):
    """The section `schedule`."""

    lr_scheduler: Annotated[Text, UsualNames(SCHEDULES)] | None = None
    step: StepSettings
    exponential: ExponentialSettings
    cosine: CosineSettings
    polynomial_decay: PolynomialDecaySettings
    inverse_sqrt: WarmupSettings
    linear_warmup: WarmupSettings

    @model_validator(mode="after")
    def _require_keys_of_schedule(self) -> Self:
        name = self.lr_scheduler or ""
        for key in _NEEDED_BY_SCHEDULE.get(name, ()):
            if getattr(getattr(self, name), key) is None:
                raise ValueError(
                    f"schedule.lr_scheduler={name} needs schedule.{name}.{key}, which is not set"
                )
        return self
