"""What a save costs: how long training stands still, until when it is durable, and what it uses."""

from pathlib import Path
from statistics import mean
from threading import Thread
from typing import Any

import torch

from . import files, limits, peers
from .clock import Stopwatch, peak_memory, usage
from .peers.base import Peer, Setting
from .state import Decoder, Size
from .together import together

Row = dict[str, Any]

SAVES = 2
"""Saves that are timed, behind one that gets the memory that is used again."""


def save(folder: str, name: str, size: str, seconds: float) -> Row:
    """Measure saves of a state that changed whole; on several processes, as the first has it.

    Args:
        seconds: for which a training loop runs alone, before and after one that is saved.
    """
    return together(peers.kind(name).ranks, _save, folder, name, size, seconds)


def _save(folder: str, name: str, size: str, seconds: float) -> Row:
    setting = Setting(Path(folder), size)
    in_memory = files.is_in_memory(setting.folder)
    peer = peers.kind(name)(setting)
    limit = limits.measured(setting.folder, peer.world.nbytes)
    stalls, durables, cpu = [], [], 0.0
    with peak_memory() as peak:
        peer.save()
        peer.settle()
        for _ in range(SAVES):
            peer.world.change()
            before, watch = usage(in_memory), Stopwatch()
            peer.save()
            stalls.append(watch.seconds)
            peer.settle()
            durables.append(watch.seconds)
            cpu += (usage(in_memory) - before).cpu
    stall, durable = mean(stalls), mean(durables)
    lost = _lost(peer, seconds) if peer.is_async else stall
    peer.close()
    return {
        "bytes": limit.size,
        "stall_s": stall,
        "stall / memcpy": stall / limit.memcpy,
        "durable_s": durable,
        "durable / disk write": durable / limit.write,
        "syncs": peer.syncs,
        "training lost_s": lost,
        "training lost / stall": lost / stall,
        "CPU s / GB": cpu / SAVES / limit.size * 1e9,
        "memory / state": peak.bytes / limit.size,
        **{f"limit {key}": value for key, value in limit.as_dict().items()},
    }


def _lost(peer: Peer, seconds: float) -> float:
    """Seconds that a training loop loses to a save that goes on beside it, stall included."""
    training = _Training()
    alone = training.steps(seconds)
    peer.world.change()
    watch = Stopwatch()
    peer.save()
    # Another thread waits for its end, so that no step asks for it.
    waiting = Thread(target=peer.settle)
    waiting.start()
    beside = 0
    while waiting.is_alive():
        training.step()
        beside += 1
    taken = watch.seconds
    waiting.join()
    alone = (alone + training.steps(seconds)) / 2
    return max(taken - beside * alone, 0.0)


class _Training:
    """A loop that trains a small decoder with many small operations, as they hold the GIL most."""

    def __init__(self) -> None:
        self._model = Decoder(Size(64, 256), layers=2)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-3)
        self._words = torch.randint(256, (8, 32))

    def step(self) -> None:
        """Make an update."""
        scores = self._model(self._words)
        loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), self._words.flatten())
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()

    def steps(self, seconds: float) -> float:
        """Make updates for some seconds; return how many seconds one takes."""
        for _ in range(5):
            self.step()
        count, watch = 0, Stopwatch()
        while watch.seconds < seconds:
            self.step()
            count += 1
        return watch.seconds / count
