"""Losses and gradients that are not finite: ignored, left out, or the end of the run."""

import logging
import math
import operator
import shutil
from collections import ChainMap, deque
from collections.abc import Callable, Iterator, Mapping
from numbers import Real
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import torch

from checkpoint import UnsupportedState, save_checkpoint

from ..state.finite import Gradients, any_nonfinite
from ..state.optimizers import Optimizer, groups_of
from ..state.progress import Progress
from ..state.rng import RngState

logger = logging.getLogger(__name__)

Policy = Literal["ignore", "skip", "stop"]
FOLDER = "nonfinite"
"""Folder of an experiment for what replays a batch that stopped the run."""
_LARGEST = 64 * 2**20
"""Bytes of batches that are kept in memory until an accelerator is looked at."""
_LOOK_EVERY = 100
"""Updates after which to wait for an accelerator, to see what it found."""
_NEVER = 2**62


class NonFinite(RuntimeError):
    """A loss, a gradient or a weight is not finite, and `optim.on_nonfinite` is `stop`."""


_Step = tuple[int, int, Any, tuple[dict[str, Any], ...]]
"""An update: its number and epoch, the batch, and what the generators began with. Made each time,
and named tuples take ten times as long to make."""


class _Noted:
    """Some generators, captured before each update only while code draws from them.

    Code that begins to draw is noticed within `_LOOK_EVERY` updates.
    """

    def __init__(self, capture: Callable[[], dict[str, Any]]) -> None:
        self.state: dict[str, Any] = {}
        self.moves = True
        self._capture = capture
        self._at_mark: dict[str, Any] = {}

    def note(self, *, at_mark: bool) -> None:
        """Note what they are now, if that is needed; see anew to that at each mark."""
        if self.moves or at_mark:
            self.state = self._capture()
        if at_mark:
            self.moves = not _same(self.state, self._at_mark)
            self._at_mark = self.state


class _Generators:
    """The global generators before each update, noted as cheaply as it can be."""

    def __init__(self) -> None:
        state = RngState()
        # By how long it takes: those of Python and NumPy take ten times as long.
        self._kinds = _Noted(state.of_others), _Noted(state.of_torch)
        self._noted: tuple[dict[str, Any], ...] = ()
        self._move = True

    def before(self, step: int) -> tuple[dict[str, Any], ...]:
        """Return the states of all of them, in parts, before the update of this number."""
        at_mark = step % _LOOK_EVERY == 0
        if self._move or at_mark:
            for kind in self._kinds:
                kind.note(at_mark=at_mark)
            self._noted = tuple(kind.state for kind in self._kinds)
            self._move = any(kind.moves for kind in self._kinds)
        return self._noted


_EQUAL: dict[str, Callable[[Any, Any], bool]] = {
    "python": operator.eq,
    "numpy": lambda one, other: all(map(np.array_equal, one, other)),
    "torch": torch.equal,
    "cuda": lambda one, other: all(map(torch.equal, one, other)),
}


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one.keys() == other.keys() and all(_EQUAL[name](one[name], other[name]) for name in one)


class FiniteGuard:
    """Looks at the gradients of each update, and at training metrics with `loss` in their name.

    On the CPU at once, so that an update that would spoil the weights is never made. On an
    accelerator the answers gather there, and `look` waits for them. `skip` has to know before each
    update, and waits each time. A gradient scaler that takes care of the gradients by itself is
    left to do so.

    Of several ranks, one may see what others do not: their answers gather too, and `look`, which
    all of them call after the same updates, agrees on the first one.

    Args:
        policy: what to do.
        folder: the experiment's folder.
        rank: of this process.
        progress: counts the updates that were left out.
        maximum: gives the largest number that any rank gives; None for a process alone.
    """

    def __init__(
        self,
        policy: Policy,
        folder: Path,
        rank: int,
        progress: Progress,
        maximum: Callable[[int], int] | None = None,
    ) -> None:
        self.policy = policy
        self._folder = folder / FOLDER
        self._rank = rank
        self._progress = progress
        self._maximum = maximum
        self._current: _Step | None = None
        # Those before it that were not looked at yet.
        self._recent: deque[_Step] = deque(maxlen=_LOOK_EVERY)
        self._random = _Generators()
        self._gradients = Gradients()
        # What may be wrong -> the update in which it first was, or -1, on the accelerator.
        self._first: dict[str, torch.Tensor] = {}

    def before(self, epoch: int, batch: Any) -> None:
        """Note what an update begins with: the epoch, and what the loader gave."""
        if self.policy != "stop":
            return
        step = self._progress.step + 1
        if self._first:
            self._keep_current()
        elif self._recent:
            self._recent.clear()
        self._current = step, epoch, batch, self._random.before(step)

    def _keep_current(self) -> None:
        """Keep the update that is over until an accelerator was looked at."""
        if self._current is not None:
            number, epoch, batch, generators = self._current
            is_large = _size(batch) * _LOOK_EVERY > _LARGEST
            self._recent.append((number, epoch, None if is_large else batch, generators))

    def before_update(self, name: str, optimizer: Optimizer) -> bool:
        """Look at the gradients that an optimizer is about to use; return whether it may.

        Without that they are taken away, so that its step does nothing.

        Raises:
            NonFinite: they are not finite, and this is known already.
        """
        # A scaler told a fused optimizer where it finds out by itself.
        if self.policy == "ignore" or getattr(optimizer, "found_inf", None) is not None:
            return True
        groups = groups_of(optimizer)
        grads = [g for group in groups for p in group["params"] if (g := p.grad) is not None]
        odd = self._gradients.have_odd(grads)
        if odd is False and self._maximum is None:
            return True
        if self.policy == "stop":
            self._note(f"a gradient of {name!r}", odd)
            return True
        if not (self._maximum(int(odd)) if self._maximum else odd):
            return True
        for group in groups:
            for parameter in group["params"]:
                parameter.grad = None
        self._count()
        return False

    def after(self, metrics: Mapping[str, Any]) -> None:
        """Look at the metrics of an update.

        Args:
            metrics: as `metrics.unchanging` returns them.

        Raises:
            NonFinite: one is not finite, and this is known already.
        """
        if self.policy != "stop":
            return
        for name, value in metrics.items():
            if "loss" in name.lower():
                # To ask a float first whether it is one is cheaper than the abstract class.
                odd = not math.isfinite(value) if type(value) is float else _odd(value)
                if odd is not False or self._maximum:
                    self._note(f"metric {name!r}", odd)
        if self._first and self._progress.step % _LOOK_EVERY == 0:
            self.look()

    def look(self) -> None:
        """Wait for the accelerator, if there is any, and say what it found.

        Raises:
            NonFinite: something was not finite in an update since the last look.
        """
        first, self._first = self._first, {}
        found = [(int(step), what) for what, step in first.items()]
        mine, what = min((one for one in found if one[0] >= 0), default=(_NEVER, ""))
        agreed = -self._maximum(-mine) if self._maximum else mine
        if agreed < _NEVER:
            self._stop(agreed, what if agreed == mine else "a number of another rank")

    def _note(self, what: str, odd: bool | torch.Tensor) -> None:
        step = self._progress.step + 1
        if self._maximum and not isinstance(odd, torch.Tensor):
            odd = torch.tensor(odd)
        if isinstance(odd, torch.Tensor):
            first = self._first.get(what)
            if first is None:
                first = torch.full((), -1, device=odd.device)
            self._first[what] = torch.where(odd & (first < 0), step, first)
        elif odd:
            self._stop(step, what)

    def _count(self) -> None:
        self._progress.skipped += 1
        count = self._progress.skipped
        # 1, 2, 4, 8, ...: a run of bad batches must not fill the log.
        if count & (count - 1) == 0:
            logger.warning(
                "Update %d is left out: its gradient is not finite (%d so far)",
                *(self._progress.step + 1, count),
            )

    def _stop(self, step: int, what: str) -> NoReturn:
        kept = "Its batch is not known any more"
        for one in (*self._recent, self._current):
            if one is not None and one[0] == step:
                kept = f"The batch, and the generators before it, are in {self._write(one, what)}"
        raise NonFinite(
            f"update {step}: {what} is not finite, and optim.on_nonfinite is stop. {kept}. "
            "Mend the data, or give a lower optim.lr; "
            "optim.on_nonfinite=skip leaves such updates out and goes on from the newest checkpoint"
        )

    def _write(self, one: _Step, what: str) -> Path:
        step, epoch, batch, generators = one
        path = self._folder / (f"step_{step:08d}" + (f"_rank_{self._rank}" * bool(self._rank)))
        # A run that was resumed comes here again.
        shutil.rmtree(path, ignore_errors=True)
        state = {"batch": batch, "random_state": dict(ChainMap(*generators))}
        info = {"step": step, "what": what}
        try:
            save_checkpoint(path, state, epoch=epoch, info=info)
        except UnsupportedState:
            # A batch of a class of the user's own.
            save_checkpoint(path, {**state, "batch": None}, epoch=epoch, info=info)
        return path


def _odd(value: Any) -> bool | torch.Tensor:
    if isinstance(value, torch.Tensor):
        return any_nonfinite([value])
    return isinstance(value, Real) and not math.isfinite(value)


def _size(value: Any) -> int:
    return sum(tensor.nbytes for tensor in _tensors(value))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
