"""Which settings were read: one that the user set and that no code read has no effect.

Reads are recorded inside the configuration object itself, until the end of the first epoch.
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
    """Let a block read without a record: it checks or copies settings, and does not use them."""
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
        # Reads of a copy are not seen, so that the copy counts as a read of all.
        if not _is_paused:
            vars(self)["_reads"].update(vars(self)["_content"] or ())
        return super().__deepcopy__(memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # In another process it is a plain one.
        return object.__new__, (DictConfig,), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        state.pop("_reads", None)
        return state


class Reads:
    """Records which keys of a configuration are read.

    Args:
        configs: objects that hold the same configuration. They stay the same objects.
    """

    def __init__(self, *configs: DictConfig) -> None:
        self._noted: set[str] = set()
        self._sections = [
            pair for config in {id(one): one for one in configs}.values() for pair in _in(config)
        ]
        for _, section in self._sections:
            # Another solver may record in the same object.
            vars(section).setdefault("_reads", set())
            object.__setattr__(section, "__class__", _Recording)

    @property
    def is_complete(self) -> bool:
        """Whether all reads since the beginning were recorded."""
        return bool(self._sections) and all("_reads" in vars(one) for _, one in self._sections)

    def note(self, *keys: str) -> None:
        """Record reads of settings that were read before, and have an effect only now."""
        self._noted.update(keys)

    def keys(self) -> set[str]:
        """Return the full names of the keys that were read so far."""
        return self._noted | {
            f"{prefix}{name}"
            for prefix, section in self._sections
            for name in vars(section).get("_reads", ())
        }

    def stop(self) -> None:
        """Record no more; reads cost then what they did before."""
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
    """Settings that have an effect only where the solver uses them.

    Attributes:
        names: keys, or sections of keys.
        reader: what reads them, in words.
        is_optional: whether files often set them for another choice; only a value that was given
            on the command line is named then.
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
    # Each configuration has a batch size, also where the solver makes batches by itself.
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
    """Name the settings with another value than their default that no code read, by section.

    Args:
        cfg: the configuration.
        read: the keys that were read, see `Reads`.
        overridden: the keys that were given on the command line; none where that is not known.

    Returns:
        A sentence for each section: the settings, and what would read them.
    """
    found: dict[_Watched, list[str]] = {}
    for key, knob in keys().items():
        watched = next((one for one in _WATCHED if _is_in(key, one.names)), None)
        if watched is None or key in read:
            continue
        value = OmegaConf.select(cfg, key, default=knob.default)
        plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        is_off = plain is None or (knob.is_off_at_zero and plain == 0)
        if plain == knob.default or is_off:
            continue
        # Of a choice that was not made, a file may hold the settings all the same.
        is_choice = watched.is_optional or (bool(overridden) and key.count(".") > 1)
        if not is_choice or key in overridden:
            found.setdefault(watched, []).append(f"{key}={plain}")
    return [
        f"{', '.join(settings)}: no code read this in the first epoch, so it has no effect. "
        f"{watched.reader}"
        for watched, settings in found.items()
    ]


def _is_in(key: str, names: Collection[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)
