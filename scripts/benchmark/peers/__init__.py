"""Every framework that is measured, by name, and whether it is installed."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .base import Peer

Loop = Callable[[Path, int], Callable[[], Any]]

_HOMES = {
    "ours": "ours:Ours",
    "ours, sync": "ours:OursSync",
    "ours, alone": "ours:Alone",
    "ours, alone, sync": "ours:AloneSync",
    "torch.save": "plain:TorchSave",
    "safetensors": "plain:Safetensors",
    "dcp": "dcp:Dcp",
    "dcp thread": "dcp:DcpThread",
    "dcp thread, cached": "dcp:DcpThreadCached",
    "dcp process, cached": "dcp:DcpProcess",
    "dcp fsdp2 x2": "fsdp:DcpSharded",
    "ours, alone, fsdp2 x2": "fsdp:AloneSharded",
    "audiocraft": "audiocraft:Audiocraft",
    "flashy": "flashy:Flashy",
    "lightning": "lightning:Lightning",
    "lightning async": "lightning:LightningAsync",
    "accelerate": "accelerate:Accelerate",
    "torchsnapshot": "torchsnapshot:Torchsnapshot",
    "torchsnapshot async": "torchsnapshot:TorchsnapshotAsync",
}
"""Name in the tables -> module and class."""

_PACKAGES = {
    "audiocraft": "audiocraft",
    "lightning": "lightning",
    "lightning async": "lightning",
    "accelerate": "accelerate",
    "torchsnapshot": "torchsnapshot",
    "torchsnapshot async": "torchsnapshot",
}
"""What has to be installed for some of them."""


_KEEPERS = ("ours", "audiocraft", "lightning")
_STEPPERS = {
    "ours": "ours_steps:defaults",
    "ours, all on": "ours_steps:all_on",
    "audiocraft": "audiocraft:stepping",
    "flashy": "flashy:stepping",
    "lightning": "lightning:stepping",
    "accelerate": "accelerate:stepping",
}


def names() -> list[str]:
    """Names of all that are installed."""
    return [name for name in _HOMES if _is_installed(name)]


def missing() -> list[str]:
    """Names of all that are not."""
    return [name for name in _HOMES if name not in names()]


def keepers() -> list[str]:
    """Names of those installed that do something with weights beside saving them."""
    return [name for name in names() if name in _KEEPERS]


def steppers() -> list[str]:
    """Names of those installed that run the training loop."""
    return [name for name in _STEPPERS if _is_installed(name)]


def kind(name: str) -> type[Peer]:
    """Return the class of that name; imports what it needs."""
    found: type[Peer] = _found(_HOMES[name])
    return found


def stepping(name: str) -> Loop:
    """Return what makes, in a folder, a loop of so many updates by that framework."""
    found: Loop = _found(_STEPPERS[name])
    return found


def _found(home: str) -> Any:
    module, _, attribute = home.partition(":")
    return getattr(import_module(f".{module}", __name__), attribute)


def _is_installed(name: str) -> bool:
    package = _PACKAGES.get(name)
    return package is None or find_spec(package) is not None
