"""Names the settings that a user set and that no code read, because they have no effect.

The configuration object itself records which keys are read, until the end of the first epoch. Only
the user's code reads the configuration. The framework reads `Settings`, and notes a key when it
uses the feature that the key controls.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from .keys import keys

_is_paused = False


@contextmanager
def unrecorded() -> Iterator[None]:
    """Record no reads in a block that checks or copies settings and does not use them."""
    global _is_paused
    before, _is_paused = _is_paused, True
    try:
        yield
    finally:
        _is_paused = before


class _Recording(DictConfig):
    """A section that records the names that are read from it."""

    def _get_node(self, key: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_paused:
            vars(self)["_reads"].add(key)
        return super()._get_node(key, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> DictConfig:
        # The copy does not record, so that copying counts as reading every key.
        if not _is_paused:
            vars(self)["_reads"].update(vars(self)["_content"] or ())
        return super().__deepcopy__(memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Another process gets a plain section, because nothing asks for its record.
        return object.__new__, (DictConfig,), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        state.pop("_reads", None)
        return state


class Reads:
    """Records which keys of a configuration are read.

    Args:
        configs: objects that hold the same configuration. Each stays the same object, and its
            sections record until `stop`.
    """

    def __init__(self, *configs: DictConfig) -> None:
        self._noted: set[str] = set()
        self._sections = [
            pair for config in {id(one): one for one in configs}.values() for pair in _in(config)
        ]
        for _, section in self._sections:
            # Another solver may already record in the same object.
            vars(section).setdefault("_reads", set())
            object.__setattr__(section, "__class__", _Recording)

    @property
    def is_complete(self) -> bool:
        """Whether every read since this object was made was recorded."""
        return bool(self._sections) and all("_reads" in vars(one) for _, one in self._sections)

    def note(self, *names: str) -> None:
        """Record that the framework uses settings now.

        Args:
            names: full names of keys, or of sections, which stand for all their keys.
        """
        self._noted.update(key for key in keys() if _is_in(key, names))

    def keys(self) -> set[str]:
        """Return the full names of the keys that were read until now."""
        return self._noted | {
            f"{prefix}{name}"
            for prefix, section in self._sections
            for name in vars(section).get("_reads", ())
        }

    def stop(self) -> None:
        """Stop recording, so that a read costs what it costs without a record."""
        for _, section in self._sections:
            object.__setattr__(section, "__class__", DictConfig)
            vars(section).pop("_reads", None)
        self._sections = []


def _in(section: DictConfig, prefix: str = "") -> Iterator[tuple[str, DictConfig]]:
    yield prefix, section
    content = vars(section)["_content"]
    for name, node in content.items() if isinstance(content, dict) else ():
        if isinstance(node, DictConfig):
            yield from _in(node, f"{prefix}{name}.")


@dataclass(frozen=True)
class _Watched:
    """Settings that have an effect only if the solver uses them.

    Attributes:
        names: keys, or sections of keys.
        reader: which code reads them, in words.
        is_optional: whether files often set the keys for a choice that the user did not make. Then
            a warning names a key only if the user gave its value on the command line.
    """

    names: tuple[str, ...]
    reader: str
    is_optional: bool = False


_LOADERS = (
    "Give it to the loaders in build_dataloaders: DataLoader(data, self.cfg.dataset.batch_size, "
    "num_workers=self.cfg.dataset.num_workers)"
)
_WATCHED = (
    _Watched(
        ("schedule",),
        "Call get_lr_scheduler(self.optimizer, self.cfg.schedule, self.total_updates) in "
        "build_model: it reads the section of the schedule that schedule.lr_scheduler names",
    ),
    _Watched(("autocast",), "Compute the loss in run_step under `with self.autocast:`"),
    _Watched(("autocast_dtype",), "autocast=true uses it", is_optional=True),
    _Watched(("dataset.num_workers",), _LOADERS),
    # A configuration has a batch size even if the solver makes its batches without a loader.
    _Watched(("dataset.batch_size",), _LOADERS, is_optional=True),
    _Watched(
        ("optim.lr", "optim.optimizer", "optim.adam", "optim.sgd"),
        "Call get_optimizer(self.model, self.cfg.optim) in build_model: it reads optim.lr and the "
        "section of the optimizer that optim.optimizer names",
    ),
    _Watched(("optim.max_norm",), "Call self.optimize(loss) in run_step"),
    _Watched(
        ("optim.activation_checkpointing",),
        "Write self.model = self.wrap(model) in build_model",
    ),
    _Watched(("optim.ema",), "optim.ema.use=true uses it", is_optional=True),
    _Watched(("fsdp",), "fsdp.use=true and self.wrap in build_model use it", is_optional=True),
    _Watched(("tensorboard",), "logging.log_tensorboard=true uses it", is_optional=True),
    _Watched(("wandb",), "logging.log_wandb=true uses it", is_optional=True),
    _Watched(("generate.every",), "A method `generate` makes it a stage of the solver"),
    _Watched(("evaluate.every",), "A method `evaluate` makes it a stage of the solver"),
)


def without_effect(
    cfg: DictConfig, read: Collection[str], overridden: Collection[str]
) -> list[str]:
    """Name the settings that differ from their defaults and that no code read.

    Args:
        cfg: the configuration.
        read: the keys that were read, see `Reads`.
        overridden: the keys that the user gave on the command line; none if that is not known.

    Returns:
        A sentence for each row of `_WATCHED`: the settings, and which code would read them.
    """
    found: dict[_Watched, list[str]] = {}
    for name, key in keys().items():
        watched = next((one for one in _WATCHED if _is_in(name, one.names)), None)
        if watched is None or name in read:
            continue
        value = OmegaConf.select(cfg, name, default=key.default)
        plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        is_off = plain is None or (key.is_off_at_zero and plain == 0)
        if plain == key.default or is_off:
            continue
        # A file may hold the settings of a choice that the user did not make.
        is_choice = watched.is_optional or (bool(overridden) and name.count(".") > 1)
        if not is_choice or name in overridden:
            found.setdefault(watched, []).append(f"{name}={plain}")
    return [
        f"{', '.join(settings)}: no code read this in the first epoch, so it has no effect. "
        f"{watched.reader}"
        for watched, settings in found.items()
    ]


def _is_in(key: str, names: Collection[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)
