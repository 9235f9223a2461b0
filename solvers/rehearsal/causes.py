"""The probable cause of a difference, and what makes it go away."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from .comparison import Difference, Found

_ABSENT = "nothing"


@dataclass(frozen=True)
class Diagnosis:
    """What a report says of a run that is not the same.

    Attributes:
        first: the first thing that differs.
        shows: the first difference of the training itself; None if it shows nowhere yet.
        cause: probably.
        remedy: the line that fixes it, or what to do.
        more: further differences, for people.
    """

    first: Difference
    shows: Difference | None
    cause: str
    remedy: str
    more: Sequence[Difference] = ()


def after_restart(found: Found) -> Diagnosis:
    """Diagnose a resumed run that is not the same."""
    training = found.training
    own = training is not None and (training.is_restored or training.section in _OWN)
    suspects = [] if own else [*(found.suspects or found.lasting)]
    if training is not None and not own:
        suspects = [one for one in suspects if _may_explain(one)]
    if training is None:
        suspects = [*found.lasting]
    if not suspects:
        first = cast(Difference, training)
        cause, remedy = _of_training(first)
        more = [*found.more, *(found.suspects if own else ())]
        return Diagnosis(first, None, cause, remedy, more)
    first = suspects[0]
    cause, remedy = _of_attribute(first)
    if training is None:
        cause += ". No batch, loss or weight that was compared depends on it so far"
        remedy += f", or {stateless_line(first.name)} if it is no state"
    return Diagnosis(first, training, cause, remedy, _one_per_owner(suspects))


def _may_explain(one: Difference) -> bool:
    """Leave out what an undisturbed run has and a new process makes again when it is needed."""
    return not (one.section == "attributes" and one.now == _ABSENT and one.was.startswith("object"))


_OWN = ("training mode", "requires_grad", "generators")
"""Sections that are state by themselves: an attribute that differs too is no explanation."""


def _one_per_owner(suspects: Sequence[Difference]) -> list[Difference]:
    """Give one difference for each further attribute of the solver."""
    seen = {_owner(suspects[0])}
    more = []
    for one in suspects[1:]:
        if _owner(one) not in seen:
            seen.add(_owner(one))
            more.append(one)
    return more


def _owner(one: Difference) -> str:
    return one.section + _top(one.name)


def _top(path: str) -> str:
    return re.split(r"[.\[]", path)[0]


def register_line(path: str) -> str:
    """Return the line that registers what is at a path, or the nearest thing above it."""
    plain = re.match(r"[A-Za-z_]\w*(\.\w+)*", path)
    name = plain[0] if plain else path
    if name != path:
        # Inside of a container: the container is what is registered.
        name = name.partition("[")[0]
    return f'self.register_stateful("{name}")'


def stateless_line(path: str) -> str:
    """Return the line that says that an attribute is no state."""
    return f'self.register_stateless("{_top(path)}")'


def _of_attribute(one: Difference) -> tuple[str, str]:
    if one.section == "files":
        return (
            "the run reads a file that it wrote itself: after a kill the file is newer than the "
            "checkpoint",
            "keep the content in an attribute and register it with self.register_stateful, or "
            "write a file of its own for each update",
        )
    if one.name.startswith("os.environ"):
        return (
            "the run changes its own environment, and no checkpoint holds that",
            "keep the value in an attribute and register it with self.register_stateful",
        )
    if one.section == "globals":
        name = one.name.rpartition(".")[2].partition("[")[0]
        return (
            f"{one.name} belongs to a class or a module, and no checkpoint holds it",
            f"make it an attribute of the solver, self.{name}, and {register_line(name)}",
        )
    kind = one.was.partition(" ")[0] if one.was != _ABSENT else one.now.partition(" ")[0]
    return _of_data(one, kind) if one.name.startswith("dataloaders") else _of_own(one, kind)


def _of_own(one: Difference, kind: str) -> tuple[str, str]:
    top = _top(one.name)
    if kind == "iterator":
        return (
            f"self.{one.name} is an iterator, whose place nothing can save: a fresh process begins "
            "it again",
            "count in a registered attribute what it has given, and pass over as much after a "
            "restart; or give the solver an object with state_dict and load_state_dict",
        )
    if kind == "variable":
        name = one.name.rpartition(".")[2]
        return (
            f"{name} is a variable of the function self.{one.name.removesuffix('.' + name)}, and "
            "no checkpoint holds it",
            f"make it an attribute of the solver, self.{name}, and {register_line(name)}",
        )
    what = {
        "generator": f"self.{one.name} is a generator that no checkpoint holds",
        "tensor": f"no checkpoint holds the tensors of self.{top}",
        "module": f"no checkpoint holds the module self.{top}",
        "stateful": f"no checkpoint holds self.{top}, which has a state",
    }.get(kind, f"self.{one.name} changes while training, and no checkpoint holds it")
    # A plain object becomes a source by its methods, a value and a module as they are.
    is_inside = "." in one.name and kind in ("value", "generator", "object")
    line = register_line(one.name if is_inside else top)
    return f"{what}: a fresh process built it anew", line


def _of_data(one: Difference, kind: str) -> tuple[str, str]:
    owner = "data set" if ".dataset" in one.name else "loader"
    for part in ("batch_sampler", "sampler", "collate_fn", "transform"):
        if f".{part}" in one.name:
            owner = part.replace("_", " ")
    if kind == "generator":
        return (
            f"the {owner} draws from a generator that no checkpoint holds",
            "make the generator an attribute of the data set, the sampler or the loader, or set "
            "dataset.seed_samples=true",
        )
    return (
        f"the {owner} changes while it is read, and no checkpoint holds that",
        "give it state_dict and load_state_dict: loaders, samplers and data sets are asked for "
        "their state",
    )


_TRAINING = {
    "indices": (
        "the data comes in another order: a sampler or loader with an order of its own, which no "
        "checkpoint holds or which needs set_epoch",
        "leave out the sampler and the generator, so that the framework orders the data, or give "
        "the sampler state_dict and load_state_dict, or set_epoch",
    ),
    "content": (
        "the same samples have another content: what is random in a sample is drawn in a worker "
        "process, or from something that no checkpoint holds",
        "set dataset.seed_samples=true, leave out persistent_workers, or draw from the generators "
        "of torch, NumPy or Python",
    ),
    "training mode": (
        "something put this module into another mode in the middle of the run, and a fresh "
        "process does not",
        "register the module, which keeps its modes, or set the mode in run_step from self.epoch",
    ),
    "requires_grad": (
        "something froze or unfroze this parameter in the middle of the run, and a fresh process "
        "does not",
        "register the module, which keeps requires_grad, or set it in train from self.epoch",
    ),
    "learning rate": (
        "something set the learning rate that no checkpoint holds: a schedule of another library, "
        "or a value computed from an attribute",
        'self.register_stateful("<the schedule>"), or compute the rate from the number of updates',
    ),
    "generators": (
        "a global generator is not where it was: something drew from it between the restore and "
        "here",
        "draw from a generator of your own where the run starts, or before restore",
    ),
    "loss and metrics": (
        "run_step uses something that is in no source and no attribute: a file, the environment, "
        "a clock, a library's own state",
        "keep it in an attribute, and register that with self.register_stateful",
    ),
    "gradients": (
        "loss and weights are the same: the backward pass uses something that no source holds, or "
        "gradients were left over from before",
        "call zero_grad before the first backward pass, or register what the hook uses",
    ),
}


def _of_training(one: Difference) -> tuple[str, str]:
    if one.is_restored:
        source = _top(one.name)
        return (
            f"load_state_dict of {source!r} does not bring back what its state_dict gave",
            f"correct state_dict and load_state_dict of self.{source}: they have to give all of it",
        )
    if one.section in ("training mode", "requires_grad"):
        cause, remedy = _TRAINING[one.section]
        return cause, f"{register_line(_top(one.name))}: {remedy}"
    return _TRAINING.get(
        one.section,
        (
            "an update computed something else, although its inputs were the same",
            "look at what changes these values beside the optimizer",
        ),
    )


def of_itself(
    one: Difference, held: Sequence[Difference], calls: Sequence[str], by_hash: bool
) -> Diagnosis:
    """Diagnose a run that differs from itself when nothing was killed.

    Args:
        one: the first difference of the training.
        held: attributes that differ at that place or before.
        calls: of clocks and the like in the user's code.
        by_hash: whether the run is the same with the same seed of Python's hashes.
    """
    if by_hash:
        cause = "the order of a set, or hash() of a text, is another one in each process"
        return Diagnosis(one, None, cause, "iterate over sorted(...), or use a list", held)
    if one.section == "gradients":
        cause = "the batch, the weights and the metrics are the same: a kernel is not deterministic"
        remedy = "torch.use_deterministic_algorithms(True), or num_threads=1 on the CPU"
        if calls:
            cause += f", or the code uses {', '.join(calls[:4])}"
        return Diagnosis(one, None, cause, remedy, held)
    if files := [other.name for other in held if other.section == "files"]:
        cause = f"two runs write and read the same file: {', '.join(files[:3])}"
        return Diagnosis(one, None, cause, "keep files of a run in self.folder", held)
    where = {
        "indices": "the order of the data",
        "content": "the content of the samples",
    }.get(one.section, "what run_step computes")
    cause = f"{where} depends on a clock, on what the system draws, or on an unseeded generator"
    if calls:
        cause += f". The code calls {', '.join(calls[:4])}"
    remedy = "draw from torch's, NumPy's or Python's generators, which are seeded and saved"
    return Diagnosis(one, None, cause, remedy, held)
