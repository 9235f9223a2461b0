"""What a rehearsal found, as text and as plain values."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .causes import Diagnosis
from .comparison import Difference

Verdict = Literal["same", "differs", "differs from itself"]
EXIT_CODES: Mapping[str, int] = {"same": 0, "differs": 3, "differs from itself": 4}
"""Exit code of the command, by verdict."""
_WIDTH = 100
_LISTED = 5


@dataclass(frozen=True)
class Rehearsal:
    """The result of a rehearsal.

    Attributes:
        verdict: `same`; `differs` after a restart; or `differs from itself` without any kill.
        solver: name of the class.
        seconds: that it took.
        kills: where runs were killed, resumed and compared.
        not_tried: where no run was killed, since the time was over or something differed before.
        compared: how many values were compared, by what they are.
        diagnosis: what differs; None if nothing does.
        killed: the kill after which it differs.
        noise: attributes that differ between two undisturbed runs, and that nothing depends on.
        ranks: processes, before the kill and after it.
        not_compared: what cannot be compared, for people.
        scratch: the folder with all files, if it was kept.
    """

    verdict: Verdict
    solver: str
    seconds: float
    kills: Sequence[str]
    not_tried: Sequence[str] = ()
    compared: Mapping[str, int] = field(default_factory=dict)
    diagnosis: Diagnosis | None = None
    killed: str | None = None
    noise: Sequence[str] = ()
    ranks: tuple[int, int] = (1, 1)
    not_compared: Sequence[str] = ()
    scratch: str | None = None

    @property
    def same(self) -> bool:
        """Whether the resumed runs are the undisturbed run."""
        return self.verdict == "same"

    @property
    def differs(self) -> str | None:
        """Name of the first thing that differs; None if nothing does."""
        return None if self.diagnosis is None else self.diagnosis.first.name

    @property
    def exit_code(self) -> int:
        """That of the command."""
        return EXIT_CODES[self.verdict]

    def check(self) -> "Rehearsal":
        """Return itself.

        Raises:
            AssertionError: something differs; the message is the report.
        """
        if not self.same:
            raise AssertionError(str(self))
        return self

    def to_plain(self) -> dict[str, Any]:
        """Return it as JSON takes it."""
        found = self.diagnosis
        return {
            "verdict": self.verdict,
            "solver": self.solver,
            "seconds": round(self.seconds, 1),
            "ranks": list(self.ranks),
            "kills": list(self.kills),
            "not_tried": list(self.not_tried),
            "compared": dict(self.compared),
            "not_compared": list(self.not_compared),
            "noise": list(self.noise),
            "killed": self.killed,
            "scratch": self.scratch,
            "first": None if found is None else vars(found.first),
            "shows": vars(found.shows) if found and found.shows else None,
            "cause": found and found.cause,
            "remedy": found and found.remedy,
            "more": [vars(one) for one in found.more] if found else [],
        }

    def __str__(self) -> str:
        return "\n".join([self._headline(), *(_row(*row) for row in self._rows())])

    def _headline(self) -> str:
        of = f"{self.solver}{self._on_ranks()}, {self.seconds:.0f} s"
        if self.diagnosis is None:
            times = "once" if len(self.kills) == 1 else f"{len(self.kills)} times"
            if self.ranks[0] != self.ranks[1]:
                return (
                    f"The same state and samples: killed {times}, and resumed on other ranks ({of})"
                )
            tried = ", as far as the limit let it be tried" if self.not_tried else ""
            return f"The same run{tried}: killed {times} and resumed, bit by bit ({of})"
        name = _shown(self.diagnosis.first)
        if self.verdict == "differs":
            return f"NOT the same run: {name} differs after a restart ({of})"
        return f"The run differs from itself, without any kill: {name} ({of})"

    def _on_ranks(self) -> str:
        before, after = self.ranks
        if before == after:
            return "" if before == 1 else f" on {before} ranks"
        return f" on {before} ranks, then {after}"

    def _rows(self) -> list[tuple[str, str]]:
        rows = self._of_diagnosis(self.diagnosis) if self.diagnosis else []
        rows += [("killed" if not place else "", one) for place, one in enumerate(self.kills)]
        rows += [("not tried" if not i else "", one) for i, one in enumerate(self.not_tried)]
        listed = [f"{name} ({count:,})" for name, count in self.compared.items()]
        rows += [("compared", ", ".join(listed))] if listed else []
        rows += [("not compared", "; ".join(self.not_compared))] if self.not_compared else []
        if self.noise:
            text = f"{_few(self.noise)}: other values in each run, and nothing depends on them"
            rows.append(("left out", text))
        rows += [("kept", self.scratch)] if self.scratch else []
        return rows

    def _of_diagnosis(self, found: Diagnosis) -> list[tuple[str, str]]:
        first, shows = found.first, found.shows
        where = f"{first.where}, {self.killed}" if self.killed else first.where
        if first.is_restored:
            where = f"right after the restore; the run was killed {self.killed}"
        if max(self.ranks) > 1:
            where += f", rank {first.rank}"
        rows = [
            ("where", where),
            ("what", f"it was {_value(first.was)}, is {_value(first.now)}"),
        ]
        if shows:
            seen = f"{_shown(shows)}, {shows.where}: was {_value(shows.was)}"
            rows.append(("shows in", f"{seen}, is {_value(shows.now)}"))
        rows += [("cause", found.cause), ("remedy", found.remedy)]
        if found.more:
            rows.append((f"and {len(found.more)} more", _few([_shown(one) for one in found.more])))
        return rows


def _shown(one: Difference) -> str:
    if one.section == "attributes":
        return f"self.{one.name}"
    if one.section in ("globals", "files", "indices"):
        return one.name
    return f"{one.name} ({one.section})"


def _value(text: str) -> str:
    kind, _, plain = text.partition(" ")
    is_kind = kind in ("value", "tensor", "generator", "variable", "iterator")
    return (plain if is_kind else text).replace("#", "", 1).strip()


def _few(names: Sequence[str]) -> str:
    rest = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f", and {rest} more" if rest > 0 else "")


def _row(title: str, text: str) -> str:
    lead = f"  {title:12} "
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=lead,
        subsequent_indent=" " * len(lead),
        break_long_words=False,
        break_on_hyphens=False,
    )
