"""Every operation and call of a run is killed, fails, or is interrupted: nothing is lost.

`scripts/campaign` runs the long form, and prints the table that the README has.
"""

import errno
import itertools
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import faults
import pytest
from campaign import WAYS, Course, Fault, Tally, Telling, Way, restored, train_on
from faults import OPTIONS, expected, fingerprint, train
from lives import Life, Trouble

from checkpoint import Checkpointer, CheckpointError, UnreadableCheckpoint
from checkpoint.layout import CHECKPOINTS
from checkpoint.storage import LocalStorage
from checkpoint.testing import FaultyStorage, PowerLoss, Tree, contents, failing, fill, flipping
from checkpoint.testing.faulty_storage import QUESTIONS

DONE = 6
"""Epochs that a run has behind it; the flushes of the next two thin one and delete others."""
DONE_BY_A_RUN = {"link", "write", "commit", "turn_into_mark", "delete_marked_folder"}
STARTS = {"nothing": (0, 2), "six epochs": (DONE, 8), "a damaged newest": (DONE, 8)}
FORMS = [
    pytest.param("short", id="short"),
    pytest.param("long", id="long", marks=[pytest.mark.nightly, pytest.mark.timeout(3600)]),
]
CASES = pytest.mark.parametrize("form", FORMS)
EACH_WAY = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
# On one rank, `test_faults.py` does the same at each call to the system.
MOST_WAYS = pytest.mark.parametrize(
    "way", [pytest.param(WAYS[0], marks=pytest.mark.nightly), *WAYS[1:]], ids=lambda way: way.name
)


@pytest.fixture(scope="module")
def tally() -> Iterator[Tally]:
    tally = Tally()
    yield tally
    print(f"\n\n{tally.table()}")


@pytest.fixture(scope="module")
def work() -> Iterator[Path]:
    with faults.memory_folder() as folder:
        train(folder / "six epochs", 1, DONE)
        train(folder / "a damaged newest", 1, DONE + 1)
        file = folder / f"a damaged newest/checkpoints/epoch_{DONE + 1:04d}/model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
        yield folder


def some(cases: list[Any], form: str, way: Way, questions: bool) -> list[Any]:
    """Return all cases, or in the short form some of them; less of what takes long."""
    step = 1 if form == "long" else 5 if way.ranks == 1 else 23
    many = (form == "short" or way.ranks > 1) and questions
    return cases[:: step * 4 if many else step]


def tried(
    tally: Tally, work: Path, way: Way, row: str, start: str, acts: list[dict[str, Any]], form: str
) -> None:
    """Run into each fault at each operation of each rank; none may leave anything wrong."""
    course = Course(work, work / start, *STARTS[start], way)
    questions = acts[0].get("questions", False)
    cases = [
        (Fault(**act, at=at, rank=rank), operation)
        for act in acts
        for rank, operations in enumerate(course.operations(questions=questions))
        for at, operation in enumerate(operations)
        if not act["options"].get("half") or operation[0] == "write"
    ]
    kinds = {kind for _, (kind, _) in cases}
    assert questions or start == "nothing" or kinds >= DONE_BY_A_RUN
    wrong = []
    for fault, operation in some(cases, form, way, questions):
        found = course.findings(fault, operation)
        tally.count(f"{row}, {way.name}", found)
        if found:
            wrong.append((found, fault, operation))
    assert not wrong, "\n".join(map(str, wrong[:20]))


@CASES
@MOST_WAYS
@pytest.mark.parametrize("start", STARTS)
def test_killed(tally: Tally, work: Path, way: Way, start: str, form: str) -> None:
    acts = [{"act": "dying", "options": {"half": half}} for half in (False, True)]
    tried(tally, work, way, "killed", start, acts, form)


@CASES
@MOST_WAYS
@pytest.mark.parametrize("for_good", [False, True], ids=["once", "for good"])
def test_failed(tally: Tally, work: Path, way: Way, for_good: bool, form: str) -> None:
    acts = [
        {"act": "failing", "options": {"code": code, "for_good": for_good}}
        for code in (errno.ENOSPC, errno.EIO)
    ]
    row = "failed for good" if for_good else "failed once"
    tried(tally, work, way, row, "six epochs", acts, form)


@CASES
@EACH_WAY
def test_torn(tally: Tally, work: Path, way: Way, form: str) -> None:
    acts = [{"act": "tearing", "options": {"late": late}} for late in (False, True)]
    tried(tally, work, way, "torn, or failed when done", "six epochs", acts, form)


@CASES
@EACH_WAY
def test_unanswered(tally: Tally, work: Path, way: Way, form: str) -> None:
    acts = [
        {"act": "failing", "options": {"for_good": for_good}, "questions": True}
        for for_good in (False, True)
    ]
    tried(tally, work, way, "unanswered questions", "six epochs", acts, form)


@CASES
@pytest.mark.parametrize("way", WAYS[:2], ids=lambda way: way.name)
def test_power_lost(tally: Tally, work: Path, way: Way, form: str) -> None:
    """Whatever a storage need not keep is lost, in every combination, at each operation."""
    acknowledged = [DONE]
    seen: set[tuple[int, Tree]] = set()
    wrong: list[Any] = []

    def look(trees: set[Tree]) -> None:
        for tree in sorted(trees, key=names)[:: 1 if form == "long" else 5]:
            if (acknowledged[-1], tree) in seen:
                continue
            seen.add((acknowledged[-1], tree))
            found = after_power_loss(work, tree, acknowledged[-1])
            tally.count(f"power lost, {way.name}", found)
            if found:
                wrong.append((found, acknowledged[-1], names(tree)))

    start = contents(LocalStorage(work / "six epochs" / CHECKPOINTS))
    storage = LocalStorage(work / f"power-{way.name}-{form}")
    fill(storage, start)
    faulty = FaultyStorage(storage, PowerLoss(look, start))
    with closing(Checkpointer(faulty, background=way.background, **OPTIONS)) as checkpointer:
        train_on(checkpointer, way.background, DONE + 1, DONE + 2, acknowledged.append)
    assert not wrong, "\n".join(map(str, wrong[:20]))


def names(tree: Tree) -> list[str]:
    return sorted(name for name, _ in tree)


def after_power_loss(work: Path, tree: Tree, acknowledged: int) -> list[str]:
    """Restore from a tree and go on; return what is wrong."""
    with TemporaryDirectory(dir=work) as folder:
        fill(LocalStorage(Path(folder) / CHECKPOINTS), tree)
        try:
            found, epoch = restored(Path(folder), acknowledged)
            train(Path(folder), epoch + 1, epoch + 2)
            return found + restored(Path(folder), epoch + 2)[0]
        except CheckpointError:
            return [*found, "unusable"]


@CASES
def test_other_bits_read(tally: Tally, work: Path, form: str) -> None:
    """A flipped bit anywhere in what is read of the newest is noticed, and named."""
    root = work / "six epochs" / CHECKPOINTS
    name = f"epoch_{DONE:04d}"
    cases = [
        (f"{name}/{file.name}", offset)
        for file in sorted((root / name).iterdir())
        # The second record is read where the first one is missing.
        if not file.name.startswith(".")
        for offset in range(file.stat().st_size)
    ]
    wrong = []
    for file, offset in cases[:: 1 if form == "long" else 97]:
        found = with_a_flipped_bit(root, file, offset)
        tally.count("bits flipped on reading, one rank", found)
        if found:
            wrong.append((found, file, offset))
    assert not wrong, "\n".join(map(str, wrong[:20]))


def with_a_flipped_bit(root: Path, file: str, offset: int) -> list[str]:
    """Load while one bit reads wrong; return what is wrong with what loads."""
    told: list[str] = []
    storage = FaultyStorage(LocalStorage(root), flipping(file, offset, offset % 8))
    with warnings_of_checkpoints(told):
        loaded = Checkpointer(storage).load_newest()
    if loaded is None:
        return ["lost"]
    epoch = loaded.manifest.position.epoch
    if fingerprint(loaded.state) != expected(epoch, tuple(loaded.state)):
        return ["silently wrong"]
    is_told = any(str(root / file) in message for message in told)
    # The manifest has a copy, and nothing else has.
    due = DONE if file.endswith("/manifest.json") else DONE - 1
    return [] if epoch == due and is_told else ["unclear errors"]


@contextmanager
def warnings_of_checkpoints(told: list[str]) -> Iterator[None]:
    handler = Telling(told.append)
    logger = logging.getLogger("checkpoint")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@pytest.mark.parametrize("for_good", [False, True], ids=["once", "for good"])
def test_unreadable(tally: Tally, work: Path, for_good: bool) -> None:
    """A restore that cannot read never takes an older checkpoint, nor starts from nothing."""
    root = work / "six epochs" / CHECKPOINTS
    counting = FaultyStorage(LocalStorage(root), only=QUESTIONS)
    Checkpointer(counting).load_newest()
    for operation in counting.operations:
        fault = failing(operation.number, for_good=for_good)
        found: list[str] = []
        faulty = FaultyStorage(LocalStorage(root), fault, only=QUESTIONS)
        try:
            loaded = Checkpointer(faulty).load_newest()
        except UnreadableCheckpoint as error:
            if str(root) not in str(error) or os.strerror(errno.EIO) not in str(error):
                found.append("unclear errors")
        else:
            # What only helps may go without an answer.
            if loaded is None or loaded.manifest.position.epoch != DONE:
                found.append("lost")
        tally.count("unreadable, one rank", found)
        assert not found, operation


# --- a machine in trouble


ERRNOS = tuple(
    getattr(errno, name)
    for name in (
        *("EIO", "ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "ENOMEM", "EMFILE", "ENFILE"),
        *("EINTR", "EAGAIN", "EBUSY", "ESTALE", "ETIMEDOUT", "EXDEV", "EMLINK", "ENOLCK"),
        *("ENOTSUP", "ENAMETOOLONG", "ELOOP", "EINVAL", "ENODEV", "ENXIO", "EREMOTEIO"),
    )
)
AGAIN = 13
"""At a point that comes again there is trouble one time in so many, or for each that there is."""
ONE_RANK = pytest.mark.parametrize("way", WAYS[:2], ids=lambda way: way.name)
JUMPS: list[tuple[str, dict[str, Any]]] = [
    *(("jump", {"hours": hours}) for hours in (-1, 1, 25)),
    *(("jump", {"years": years}) for years in (-55, 30)),
    ("suspend", {"seconds": 12 * 3600}),
    ("move", {"zone": "Pacific/Kiritimati"}),
]


def endured(
    tally: Tally, life: Life, row: str, troubles: Iterable[Trouble], step: int, way: Way
) -> None:
    """Live through every `step`-th of these; none may leave anything wrong."""
    wrong = []
    for trouble in itertools.islice(troubles, step // 2, None, step):
        found = life.trouble(trouble)
        tally.count(f"{row}, {way.name}", found)
        if found:
            wrong.append((found, trouble, life.told))
    assert not wrong, "\n".join(map(str, wrong[:20]))


def each_point(life: Life, means: str, choices: Iterable[tuple[str, Any]]) -> Iterator[Trouble]:
    """Give each trouble at each point of each rank, and at points that come again one at a time."""
    choices = list(choices)
    for rank, points in enumerate(life.points(means)):
        known: set[tuple[str, ...]] = set()
        for at, point in enumerate(points):
            # Memory has no path to tell one point from another by.
            is_new = point not in known or means == "memory"
            turn = at % max(len(choices), AGAIN)
            known.add(point)
            for act, options in choices if is_new else choices[turn : turn + 1]:
                yield Trouble(means, at, options, act, rank)


@CASES
@EACH_WAY
@pytest.mark.parametrize("act", ["once", "for good", "late"])
def test_a_call_to_the_system_fails(
    tally: Tally, work: Path, way: Way, act: str, form: str
) -> None:
    """Each with every errno; less of what takes long."""
    life = Life(work, work / "six epochs", *STARTS["six epochs"], way)
    codes = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT) if act == "late" else ERRNOS
    kind = "tearing" if act == "late" else "failing"
    more = {"once": {}, "for good": {"for_good": True}, "late": {"late": True}}[act]
    troubles = each_point(life, "calls", [(kind, {"code": code, **more}) for code in codes])
    step = {"once": 1, "for good": 3, "late": 1}[act] * (1, 5, 31, 37)[WAYS.index(way)]
    row = f"a system call fails {act}"
    endured(tally, life, row, troubles, step if form == "long" else step * 211, way)


@CASES
@ONE_RANK
def test_memory_cannot_be_had(tally: Tally, work: Path, way: Way, form: str) -> None:
    life = Life(work, work / "six epochs", *STARTS["six epochs"], way)
    options: list[tuple[str, Any]] = [("failing", {"for_good": good}) for good in (False, True)]
    troubles = each_point(life, "memory", options)
    endured(tally, life, "no memory", troubles, 1 if form == "long" else 11, way)
    limits = (Trouble("limit", room) for room in range(0, 128 * 2**20, 2**20))
    endured(tally, life, "little memory", limits, 1 if form == "long" else 31, way)


@CASES
@ONE_RANK
@pytest.mark.parametrize("means", ["line", "signal"])
def test_interrupted(tally: Tally, work: Path, way: Way, means: str, form: str) -> None:
    life = Life(work, work / "six epochs", *STARTS["six epochs"], way)
    troubles = each_point(life, means, [("", {})])
    step = {"line": 1, "signal": 2}[means] * (1, 3)[WAYS.index(way)]
    endured(tally, life, "interrupted", troubles, step if form == "long" else step * 307, way)


@CASES
@ONE_RANK
def test_a_clock_jumps(tally: Tally, work: Path, way: Way, form: str) -> None:
    life = Life(work, work / "six epochs", *STARTS["six epochs"], way)
    troubles = each_point(life, "clock", JUMPS)
    endured(tally, life, "the clock jumps", troubles, 3 if form == "long" else 199, way)
