"""The framework's configuration keys: type, range and default of each. Data and plain checks.

The same keys, with a comment for people, are in `config/solver/standard.yaml`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

UNSET = "???"
"""How the configuration writes a value that the user has to give."""

_KINDS: dict[str, tuple[str, type | tuple[type, ...]]] = {
    "flag": ("true or false", bool),
    "count": ("an integer", int),
    "number": ("a number", (int, float)),
    "text": ("a text", str),
    # YAML reads the texts nan, 007 and true as something else: all of these are labels.
    "label": ("a text", (str, int, float, bool)),
    "names": ("a list of names", list),
    "betas": ("a list of two numbers in [0, 1)", list),
    "switch": ("true, false or a name", (bool, str, dict)),
}


@dataclass(frozen=True)
class Knob:
    """What one key may hold.

    Args:
        kind: one of `flag`, `count`, `number`, `text`, `label`, `names`, `betas`, or `switch`,
            which also leaves a section of that name to the user.
        default: what a configuration without the key means; `UNSET` when there is none.
        least: smallest value; `above` is a bound that the value must exceed.
        most: largest value.
        choices: all that is allowed, for a closed set.
        known: names that are usual, for an open set: a near miss of one is refused.
        pattern: what a text must look like.
        null: whether null is allowed.
        off_at_zero: whether 0 means the same as null.
    """

    kind: str
    default: Any
    least: float | None = None
    above: float | None = None
    most: float | None = None
    choices: tuple[str, ...] = ()
    known: tuple[str, ...] = ()
    pattern: str = ""
    null: bool = False
    off_at_zero: bool = False

    @property
    def holds_list(self) -> bool:
        """Whether a value is a list."""
        return _KINDS[self.kind][1] is list

    def expected(self) -> str:
        """Say in words what is allowed."""
        if self.choices:
            words = "one of " + ", ".join(self.choices)
        else:
            words = _KINDS[self.kind][0] + self._range()
        return words + (", or null" if self.null else "")

    def accepts(self, value: Any) -> bool:
        """Tell whether `value`, resolved and plain, is allowed."""
        if value is None:
            return self.null
        types = _KINDS[self.kind][1]
        if not isinstance(value, types):
            return False
        if self.kind == "label":
            return True
        # Python's bool is an int, which is never meant here.
        if isinstance(value, bool) and self.kind not in ("flag", "switch"):
            return False
        return all(check(self, value) for check in _CHECKS)

    def _range(self) -> str:
        bounds = []
        if self.above is not None:
            bounds.append(f"above {_short(self.above)}")
        if self.least is not None:
            bounds.append(f"of at least {_short(self.least)}")
        if self.most is not None:
            bounds.append(f"of at most {_short(self.most)}")
        return " " + " and ".join(bounds) if bounds else ""


def _short(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def _in_range(knob: Knob, value: Any) -> bool:
    if not isinstance(value, int | float):
        return True
    # Written so that NaN fails.
    return (
        (knob.least is None or value >= knob.least)
        and (knob.above is None or value > knob.above)
        and (knob.most is None or value <= knob.most)
        and value == value
    )


def _in_choices(knob: Knob, value: Any) -> bool:
    return not knob.choices or value in knob.choices


def _looks_right(knob: Knob, value: Any) -> bool:
    return not knob.pattern or re.fullmatch(knob.pattern, value) is not None


def _items_fit(knob: Knob, value: Any) -> bool:
    if knob.kind == "names":
        return all(isinstance(item, str) for item in value)
    if knob.kind == "betas":
        return len(value) == 2 and all(Knob("number", 0, 0).accepts(b) and b < 1 for b in value)
    return True


_CHECKS: tuple[Callable[[Knob, Any], bool], ...] = (
    _in_range,
    _in_choices,
    _looks_right,
    _items_fit,
)

STAGES_ALONE = ("generate", "evaluate", "valid")
SCHEDULES = (
    "step",
    "exponential",
    "cosine",
    "polynomial_decay",
    "inverse_sqrt",
    "linear_warmup",
)
_COMPILERS = (
    *("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    *("inductor", "eager", "aot_eager", "cudagraphs"),
)
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_DTYPES = ("bfloat16", "float16", "float32", "float64")
_DEVICE = r"[a-z]+(:\d+)?"

_every = Knob("count", None, least=0, null=True, off_at_zero=True)
_warmup = Knob("number", None, least=0, null=True)
_share = Knob("number", 0.0, least=0)
_factor = Knob("number", None, above=0, null=True)
_positive = Knob("number", None, above=0, null=True)
_rate = Knob("number", 0.0, least=0, null=True)
_words = Knob("text", None, null=True)
_flag = Knob("flag", False)

KNOBS: dict[str, Knob] = {
    "solver": _words,
    "device": Knob("text", "auto", pattern=_DEVICE),
    "seed": Knob("count", 2036, least=0, most=2**32 - 1),
    "num_threads": Knob("count", 1, least=1, null=True),
    "label": Knob("label", None, null=True),
    "show": _flag,
    "fast_dev_run": _flag,
    "continue_from": _words,
    "execute_only": Knob("text", None, choices=STAGES_ALONE, null=True),
    "execute_inplace": _flag,
    "benchmark_no_load": _flag,
    "compile": Knob("switch", False, known=_COMPILERS, null=True),
    "autocast": _flag,
    "autocast_dtype": Knob("text", "bfloat16", choices=("bfloat16", "float16", "float32")),
    "dataset.batch_size": Knob("count", UNSET, least=1, null=True),
    "dataset.num_workers": Knob("count", 0, least=0),
    "dataset.seed_samples": _flag,
    "dataset.restart_streams": _flag,
    "dataset.combine": Knob("text", "longest", choices=("shortest", "longest", "in_turn")),
    "dataset.allow_unshared": _flag,
    "optim.epochs": Knob("count", UNSET, least=1),
    "optim.updates_per_epoch": Knob("count", None, least=1, null=True),
    "optim.accumulation": Knob("count", 1, least=1),
    "optim.max_norm": Knob("number", None, least=0, null=True, off_at_zero=True),
    "optim.lr": Knob("number", UNSET, least=0, null=True),
    "optim.optimizer": Knob("text", "adam"),
    "optim.on_nonfinite": Knob("text", "stop", choices=("ignore", "skip", "stop")),
    "optim.adam.betas": Knob("betas", [0.9, 0.999]),
    "optim.adam.weight_decay": _share,
    "optim.sgd.momentum": _share,
    "optim.sgd.weight_decay": _share,
    "optim.activation_checkpointing": _flag,
    "optim.ema.use": _flag,
    "optim.ema.updates": Knob("count", None, least=1, null=True),
    "optim.ema.device": Knob("text", "cpu", pattern=_DEVICE, null=True),
    "optim.ema.decay": Knob("number", 0.99, least=0, most=1, null=True),
    "optim.ema.unbias": Knob("flag", True),
    "schedule.lr_scheduler": Knob("text", None, known=SCHEDULES, null=True),
    "schedule.step.step_size": Knob("count", None, least=1, null=True),
    "schedule.step.gamma": _factor,
    "schedule.exponential.lr_decay": _factor,
    "schedule.cosine.warmup": _warmup,
    "schedule.cosine.lr_min_ratio": _rate,
    "schedule.cosine.cycle_length": Knob("number", 1.0, above=0, null=True),
    "schedule.polynomial_decay.warmup": _warmup,
    "schedule.polynomial_decay.zero_lr_warmup_steps": Knob("number", 0, least=0, null=True),
    "schedule.polynomial_decay.end_lr": _rate,
    "schedule.polynomial_decay.power": Knob("number", 1, above=0, null=True),
    "schedule.inverse_sqrt.warmup": _warmup,
    "schedule.inverse_sqrt.warmup_init_lr": _rate,
    "schedule.linear_warmup.warmup": _warmup,
    "schedule.linear_warmup.warmup_init_lr": _rate,
    "evaluate.every": _every,
    "generate.every": _every,
    "generate.path": Knob("text", "samples"),
    "early_stopping.metric": _words,
    "early_stopping.stage": Knob("text", "valid"),
    "early_stopping.mode": Knob("text", None, choices=("min", "max"), null=True),
    "early_stopping.patience": Knob("count", 10, least=1),
    "early_stopping.min_delta": Knob("number", 0.0, least=0),
    "checkpoint.save_last": Knob("flag", True),
    "checkpoint.save_every": _every,
    "checkpoint.keep_last": _every,
    "checkpoint.keep_rolling": Knob("count", 2, least=2),
    "checkpoint.keep_every": _every,
    "checkpoint.keep_best": _every,
    "checkpoint.keep_hours": _positive,
    "checkpoint.keep_resumed": Knob("flag", True),
    "checkpoint.every_steps": _every,
    "checkpoint.every_minutes": Knob("number", None, above=0, null=True),
    "checkpoint.interval": Knob("text", None, choices=("auto",), null=True),
    "checkpoint.mtbf_hours": Knob("number", None, above=0, null=True),
    "checkpoint.max_overhead": Knob("number", 0.05, above=0, most=1),
    "checkpoint.keep_every_states": Knob("names", None, null=True),
    "checkpoint.demote": Knob("names", None, null=True),
    "checkpoint.keep_demoted": Knob("count", None, least=1, null=True),
    "checkpoint.max_gb": _positive,
    "checkpoint.threshold.metric": _words,
    "checkpoint.threshold.stage": Knob("text", "valid"),
    "checkpoint.threshold.value": Knob("number", None, null=True),
    "checkpoint.threshold.mode": Knob("text", "below", choices=("above", "below")),
    "checkpoint.threshold.patience": Knob("count", 1, least=1),
    "checkpoint.save_on_exception": _flag,
    "checkpoint.async": Knob("flag", True),
    "checkpoint.on_error": Knob("text", "stop", choices=("stop", "warn")),
    "checkpoint.compress": Knob("names", None, null=True),
    "checkpoint.verify_after_save": _flag,
    "checkpoint.on_mismatch": Knob("text", "warn", choices=("warn", "refuse")),
    "checkpoint.best_metric": _words,
    "checkpoint.best_mode": Knob("text", None, choices=("min", "max"), null=True),
    "logging.level": Knob("text", "INFO", choices=(*_LEVELS, *map(str.lower, _LEVELS))),
    "logging.log_updates": Knob("count", 10, least=0),
    "logging.progress_bar": Knob("text", "auto", choices=("auto", "always", "never")),
    "logging.log_tensorboard": _flag,
    "logging.log_wandb": _flag,
    "tensorboard.with_media_logging": _flag,
    "tensorboard.name": _words,
    "tensorboard.sub_dir": _words,
    "wandb.with_media_logging": Knob("flag", True),
    "wandb.project": _words,
    "wandb.name": _words,
    "wandb.group": _words,
    "profiler.enabled": _flag,
    "deadlock.use": _flag,
    "deadlock.timeout": Knob("number", 600, above=0),
    "fsdp.use": _flag,
    "fsdp.param_dtype": Knob("text", "float16", choices=_DTYPES),
    "fsdp.reduce_dtype": Knob("text", "float32", choices=_DTYPES),
    "fsdp.buffer_dtype": Knob("text", "float32", choices=_DTYPES),
    "fsdp.sharding_strategy": Knob(
        "text", "shard_grad_op", choices=("shard_grad_op", "full_shard", "no_shard", "hybrid_shard")
    ),
    "fsdp.per_block": Knob("flag", True),
}

CLOSED_SECTIONS = (
    "checkpoint",
    "checkpoint.threshold",
    "early_stopping",
    "logging",
    "profiler",
    "deadlock",
    "fsdp",
    "optim.ema",
    *(f"schedule.{name}" for name in SCHEDULES if name != "exponential"),
)
"""Sections in which a key that is not ours is a mistake; elsewhere users add their own."""

PLAIN_SECTIONS = ("schedule.exponential",)
"""Sections for which Audiocraft also takes a plain number."""

NEEDED_BY_SCHEDULE = {
    "step": ("step_size", "gamma"),
    "inverse_sqrt": ("warmup",),
    "linear_warmup": ("warmup",),
}
"""Keys of a schedule's section that have no default once that schedule is chosen."""
