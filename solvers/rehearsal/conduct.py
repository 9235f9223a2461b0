"""The course of a rehearsal: which runs there are, and what is made of their records."""

import itertools
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ..settings.errors import ConfigError
from .causes import Diagnosis, after_restart, of_itself
from .comparison import (
    ATTRIBUTES,
    TRAINING,
    Difference,
    Found,
    Reference,
    compare,
    counted,
    differences,
    noise_of,
    up_to,
)
from .plan import Kill, Options, RehearsalJob, Subject, kill_points
from .processes import Ended, RehearsalFailed, Run, nursery
from .report import Rehearsal
from .resharded import NOT_COMPARED, OF_FIRST_RANK, compare_resharded
from .scratch import Scratch, scratch_folder
from .suspects import suspicious_calls

_Result = TypeVar("_Result")
_PATIENCE = 600  # seconds for one run
_NUMBERS = itertools.count()
_LAST_LINES = 8


def rehearse(subject: Subject, options: Options) -> Rehearsal:
    """Hold a rehearsal.

    Raises:
        ConfigError: the configuration cannot work.
        RehearsalFailed: a run crashed by itself, or could not be followed.
    """
    with scratch_folder() as scratch:
        result = _Course(subject, options, scratch).run()
        if options.keep or not result.same:
            scratch.keep()
            result = replace(result, scratch=str(scratch.path))
        return result


@dataclass
class _Leg:
    """A kill, and what the run that resumed from it did."""

    order: int
    kill: Kill
    found: Found


class _Course:
    """One rehearsal."""

    def __init__(self, subject: Subject, options: Options, scratch: Scratch) -> None:
        self._subject, self._options, self._scratch = subject, options, scratch.path
        self._began = time.monotonic()
        self._longest = 0.0
        self._stop = threading.Event()
        self._active: set[Run] = set()
        self._compared: dict[str, int] = {}
        self._reference = Reference([])
        self._noise: set[tuple[str, str]] = set()
        self._files: tuple[str, ...] = ()
        self._about: dict[str, Any] = {}

    def run(self) -> Rehearsal:
        try:
            return self._run()
        finally:
            # After ctrl-C, or when a run failed beside another one.
            self._stop.set()
            for run in list(self._active):
                run.kill()

    def _run(self) -> Rehearsal:
        with ThreadPoolExecutor(2) as threads:
            first = threads.submit(self._undisturbed, "undisturbed", 0)
            second = threads.submit(self._undisturbed, "twin", 1)
            one, other = self._result(first), self._result(second)
        self._about = _last_event(one)
        self._reference = Reference(one.records)
        unstable = self._of_itself(other)
        if unstable is not None:
            return self._report("differs from itself", [], [], unstable)
        self._noise = noise_of(self._reference, other.records)
        self._files = tuple(self._about["files"])
        kills = kill_points([r.event for r in one.records[0] if r.event])
        if not kills:
            raise RehearsalFailed("the run saved nothing before its end: nothing could be resumed")
        return self._judged(kills, self._all_legs(kills))

    def _result(self, future: Future[_Result]) -> _Result:
        # In short pieces, so that ctrl-C comes through.
        while not future.done():
            wait([future], timeout=0.2)
        return future.result()

    # Runs.

    def _undisturbed(self, name: str, server: int) -> Ended:
        return self._done(name, server, self._options.ranks)

    def _done(
        self,
        name: str,
        server: int,
        ranks: int,
        kill: Kill | None = None,
        folder: str | None = None,
        resumed: bool = False,
    ) -> Ended:
        """Start a run and wait for its end."""
        began = time.monotonic()
        number = next(_NUMBERS)
        jobs = [
            RehearsalJob(
                subject=self._subject,
                folder=str(self._scratch / (folder or name)),
                trace=str(self._scratch / f"{name}.{rank}.jsonl"),
                resumed=resumed,
                kill=kill,
                rank=rank,
                ranks=ranks,
                files=self._files,
            )
            for rank in range(ranks)
        ]
        run = Run(nursery(server), f"{name}-{number}", jobs, self._scratch)
        self._active.add(run)
        ended = run.wait(_PATIENCE)
        self._active.discard(run)
        self._longest = max(self._longest, time.monotonic() - began)
        self._refuse(name, ended, kill)
        return ended

    def _refuse(self, name: str, ended: Ended, kill: Kill | None) -> None:
        """Raise what a run failed with."""
        if ended.how == "refused":
            raise ConfigError(ended.error)
        if ended.how in ("crashed", "late"):
            lines = ended.log.read_text().splitlines()[-_LAST_LINES:] if ended.log.exists() else []
            reached = [one.label for one in ended.records[0] if one.label]
            raise RehearsalFailed(
                f"the {name} run failed after {reached[-1] if reached else 'its start'}: "
                + "\n    ".join([ended.error, *lines])
            )
        if ended.how == "ended" and kill is not None:
            raise RehearsalFailed(f"the {name} run ended before it was to be killed {kill}")

    def _is_late(self) -> bool:
        limit = self._options.limit
        return limit is not None and time.monotonic() - self._began + self._longest > limit

    def _of_itself(self, twin: Ended) -> Diagnosis | None:
        first = self._first_difference(twin)
        if first is None:
            return None
        again = self._undisturbed("again", 0)
        by_hash = self._first_difference(again) is None
        held = [
            one
            for rank, records in enumerate(twin.records)
            for one in differences(self._reference, up_to(records, first.where), rank, ATTRIBUTES)
        ]
        calls = suspicious_calls(self._about["code"])
        return of_itself(first, held, calls, by_hash)

    def _first_difference(self, twin: Ended) -> Difference | None:
        for rank, records in enumerate(twin.records):
            for one in differences(self._reference, records, rank, TRAINING):
                return one
        return None

    # Killed runs.

    def _all_legs(self, kills: Sequence[Kill]) -> list[_Leg]:
        numbered = list(enumerate(kills))
        if self._options.then != self._options.ranks:
            chains = [[one] for one in numbered]
        else:
            chains = [chain for chain in (numbered[0::2], numbered[1::2]) if chain]
        with ThreadPoolExecutor(2) as threads:
            futures = [
                threads.submit(self._chain, number, chain) for number, chain in enumerate(chains)
            ]
            try:
                return [leg for future in futures for leg in self._result(future)]
            except BaseException:
                self._stop.set()
                for run in list(self._active):
                    run.kill()
                raise

    def _chain(self, number: int, kills: Sequence[tuple[int, Kill]]) -> list[_Leg]:
        """Run, die, resume, die again and so on; the last one goes on to the end."""
        legs: list[_Leg] = []
        folder, ranks = f"killed-{number}", self._options.ranks
        for place, (_order, kill) in enumerate([*kills, (-1, None)]):
            if self._stop.is_set() or (place == 0 and number > 1 and self._is_late()):
                return legs
            if place and self._is_late():
                return legs
            name = f"{folder}-{place}"
            ended = self._done(
                *(name, number + place, ranks, kill, folder),
                resumed=place > 0,
            )
            if place:
                before_order, before = kills[place - 1]
                found = self._compare(ended, is_last=kill is None)
                legs.append(_Leg(before_order, before, found))
                self._options.tell(f"killed and resumed {before}")
                if not found.is_same:
                    self._stop.set()
                    return legs
            ranks = self._options.then
        return legs

    def _compare(self, ended: Ended, is_last: bool) -> Found:
        if self._options.then != self._options.ranks:
            resharded, counts = compare_resharded(self._reference, ended.records, self._noise)
            self._count(counts)
            return resharded
        found = []
        for rank, records in enumerate(ended.records):
            self._count(counted(records))
            found.append(compare(self._reference, records, rank, self._noise, is_last))
        return next((one for one in found if not one.is_same), found[0])

    def _count(self, counts: Any) -> None:
        for section, count in counts.items():
            self._compared[section] = self._compared.get(section, 0) + count

    # The result.

    def _judged(self, kills: Sequence[Kill], legs: Sequence[_Leg]) -> Rehearsal:
        legs = sorted(legs, key=lambda leg: leg.order)
        bad = next((leg for leg in legs if not leg.found.is_same), None)
        done = [leg.kill for leg in legs]
        missing = [one for one in kills if one not in done]
        if not legs:
            raise RehearsalFailed(
                "the limit is too short: no run could be killed and resumed in that time"
            )
        if bad is None:
            return self._report("same", done, missing, None)
        return self._report("differs", done, missing, after_restart(bad.found), bad.kill)

    def _report(
        self,
        verdict: Any,
        done: Sequence[Kill],
        missing: Sequence[Kill],
        diagnosis: Diagnosis | None,
        killed: Kill | None = None,
    ) -> Rehearsal:
        ranks, then = self._options.ranks, self._options.then
        left_out = NOT_COMPARED if then != ranks else OF_FIRST_RANK if ranks > 1 else ()
        return Rehearsal(
            verdict,
            self._about["solver"],
            time.monotonic() - self._began,
            [str(one) for one in done],
            [str(one) for one in missing],
            dict(sorted(self._compared.items(), key=_in_order)),
            diagnosis,
            None if killed is None else str(killed),
            sorted(name for _, name in self._noise),
            (self._options.ranks, self._options.then),
            left_out,
        )


def _in_order(item: tuple[str, int]) -> int:
    order = (*TRAINING, *ATTRIBUTES)
    return order.index(item[0]) if item[0] in order else len(order)


def _last_event(ended: Ended) -> dict[str, Any]:
    return dict(ended.records[0][-1].event or {})
