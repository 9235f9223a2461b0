"""Optimizers as libraries write them: each resumes with the state that was saved, bit by bit."""

import logging
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from toy import Regression, assert_same, built, ran

from checkpoint import StateMismatch
from checkpoint.integration import digests

Parameters = Iterable[Any]


class Momentum(torch.optim.Optimizer):
    """SGD with momentum in a type of its own, and master weights in float32 if wanted."""

    def __init__(
        self, params: Parameters, kind: torch.dtype = torch.float32, masters: bool = False
    ) -> None:
        super().__init__(params, {"lr": 0.01})
        self.kind, self.masters = kind, masters

    def start(self, parameter: torch.Tensor) -> dict[str, Any]:
        state = {"momentum": torch.zeros_like(parameter, dtype=self.kind)}
        if self.masters:
            state["master"] = parameter.detach().float().clone()
        return state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    if not state:
                        state.update(self.start(parameter))
                    self.update(group, parameter, state)

    def update(self, group: dict[str, Any], parameter: torch.Tensor, state: dict[str, Any]) -> None:
        assert parameter.grad is not None
        momentum = state["momentum"]
        momentum.lerp_(parameter.grad.to(momentum.dtype), 0.1)
        weight = state.get("master", parameter)
        weight.sub_(momentum.to(weight.dtype), alpha=0.1)
        if weight is not parameter:
            parameter.copy_(weight)


class Nested(Momentum):
    """Dicts in dicts, lists of tensors, a short queue of gradients, None and text."""

    def start(self, parameter: torch.Tensor) -> dict[str, Any]:
        zeros = torch.zeros_like(parameter)
        return {
            "moments": {"first": zeros, "others": [zeros.clone(), (zeros.double(), None)]},
            "recent": deque([zeros.clone()], maxlen=2),
            "name": "momentum",
            "nothing": None,
        }

    def update(self, group: dict[str, Any], parameter: torch.Tensor, state: dict[str, Any]) -> None:
        assert parameter.grad is not None
        assert state["name"] == "momentum"
        state["recent"].append(parameter.grad.clone())
        assert len(state["recent"]) <= 2
        first, (second, (third, _)) = state["moments"]["first"], state["moments"]["others"]
        first.lerp_(sum(state["recent"]), 0.1)
        second.lerp_(first, 0.5)
        third.lerp_(second.double() / 3, 0.5)
        parameter.sub_(third.float(), alpha=0.3)


class WithoutRate(Momentum):
    """Finds its learning rate by itself, and keeps numbers under keys that are no parameters."""

    def __init__(self, params: Parameters, key: Any = "whole", rate: Any = None) -> None:
        super().__init__(params)
        self.key = key
        for group in self.param_groups:
            group.pop("lr")
            if rate is not None:
                group["lr"] = rate[0]
        self.state[key] = {"distance": torch.zeros(()), "updates": 0}

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        whole = self.state[self.key]
        whole["updates"] += 1
        whole["distance"] += whole["updates"]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.sub_(parameter.grad, alpha=1e-5 * float(whole["distance"]))


class Scaled(torch.Tensor):
    """Numbers in 8 bits with one scale, as optimizers keep moments that are to be small."""

    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor, power: int) -> "Scaled":
        made: Scaled = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, codes.shape, dtype=torch.float32, device=codes.device
        )
        made.codes, made.scale, made.power = codes, scale, power
        return made

    codes: torch.Tensor
    scale: torch.Tensor
    power: int

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, int]]:
        return ["codes", "scale"], {"power": self.power}

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, torch.Tensor], context: dict[str, int], size: Any, stride: Any
    ) -> "Scaled":
        return cls(inner["codes"], inner["scale"], context["power"])

    @classmethod
    def of(cls, value: torch.Tensor) -> "Scaled":
        scale = value.abs().max().clamp(min=1e-12) / 127
        return cls((value / scale).round().to(torch.int8), scale, 1)

    def dense(self) -> torch.Tensor:
        return self.codes.float() * self.scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func in (aten._to_copy.default, aten.detach.default, aten.clone.default):
            one = args[0]
            return cls(one.codes.clone(), one.scale.clone(), one.power)
        raise NotImplementedError(str(func))


class Narrow(Momentum):
    def start(self, parameter: torch.Tensor) -> dict[str, Any]:
        return {"momentum": Scaled.of(torch.zeros_like(parameter))}

    def update(self, group: dict[str, Any], parameter: torch.Tensor, state: dict[str, Any]) -> None:
        momentum = state["momentum"].dense().lerp_(parameter.grad, 0.1)
        state["momentum"] = Scaled.of(momentum)
        parameter.sub_(momentum, alpha=0.1)


class Slow(torch.optim.Optimizer):
    """A wrapper like Lookahead: never calls `Optimizer.__init__`, shares the groups inside."""

    def __init__(self, inside: torch.optim.Optimizer) -> None:
        self.inside = inside
        self.slow = [[p.detach().clone() for p in g["params"]] for g in inside.param_groups]
        self.updates = 0

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.inside.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inside.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inside.step()
        self.updates += 1
        for group, slow in zip(self.param_groups, self.slow, strict=True):
            for parameter, one in zip(group["params"], slow, strict=True):
                if self.updates % 3 == 0:
                    parameter.copy_(one.lerp_(parameter, 0.5))

    def state_dict(self) -> dict[str, Any]:
        return {"inside": self.inside.state_dict(), "slow": self.slow, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inside.load_state_dict(state["inside"])
        self.slow, self.updates = state["slow"], state["updates"]


class Plain:
    """A wrapper that is no class of torch's, and hides what it wraps from `vars`."""

    __slots__ = ("__dict__", "hidden")

    def __init__(self, inside: torch.optim.Optimizer) -> None:
        self.hidden = inside

    @property
    def param_groups(self) -> Any:
        return self.hidden.param_groups

    def step(self) -> None:
        self.hidden.step()

    def zero_grad(self) -> None:
        self.hidden.zero_grad()

    def state_dict(self) -> Any:
        return self.hidden.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.hidden.load_state_dict(state)


class Averaged(torch.optim.SGD):
    """Schedule-free: trains at y, and evaluates x; which of both it has is in no state."""

    def __init__(self, params: Parameters) -> None:
        super().__init__(params, lr=0.05)
        self.trains = False

    def train(self) -> None:
        self._move(not self.trains, 0.1)
        self.trains = True

    def eval(self) -> None:
        self._move(self.trains, 1 - 1 / 0.9)
        self.trains = False

    @torch.no_grad()
    def _move(self, moves: bool, weight: float) -> None:
        for parameter in self.param_groups[0]["params"] if moves else ():
            if "z" in self.state[parameter]:
                parameter.lerp_(self.state[parameter]["z"], weight)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert self.trains, "call train() before"
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if not state:
                state.update(z=parameter.clone(), updates=0)
            state["updates"] += 1
            parameter.lerp_(state["z"], 1 - 1 / 0.9)
            state["z"].sub_(parameter.grad, alpha=0.05)
            parameter.lerp_(state["z"], 1 / state["updates"]).lerp_(state["z"], 0.1)


def adam(params: Parameters) -> torch.optim.Adam:
    return torch.optim.Adam(params, lr=0.01)


KINDS: dict[str, Callable[[Any], Any]] = {
    "float32 moments of bfloat16 weights": Momentum,
    "master weights of bfloat16 weights": lambda params: Momentum(params, masters=True),
    "bfloat16 moments of float32 weights": lambda params: Momentum(params, torch.bfloat16),
    "nested state": Nested,
    "no rate, and text as a key": WithoutRate,
    "rate None, and a number as a key": lambda params: WithoutRate(params, 1000, [None]),
    "rate as a tensor": lambda params: torch.optim.Adam(params, lr=torch.tensor(0.01)),
    "tensors of a subclass": Narrow,
    "a wrapper without __init__": lambda params: Slow(adam(params)),
    "master weights in a wrapper": lambda params: Slow(Momentum(params, masters=True)),
    "a wrapper of no class of torch": lambda params: Plain(adam(params)),
    "schedule-free": Averaged,
    "schedule-free in a wrapper": lambda params: Slow(Averaged(params)),
}


class Trains(Regression):
    """Trains with a given optimizer; a process may be killed in an update."""

    make: ClassVar[Callable[[Any], Any]]
    dtype = torch.float32
    kill_at: int | None = None

    def make_model(self) -> nn.Module:
        # Its last layer has no gradient: no optimizer has a state for it.
        return nn.ModuleDict({"used": super().make_model(), "unused": nn.Linear(2, 2)}).to(
            self.dtype
        )

    def build_model(self) -> None:
        self.model = self.wrap(self.make_model())
        self.optimizer = self.make(self.model.parameters())
        self.register_stateful("model", "optimizer")
        self.register_best_state("model")

    def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        x, y = (one.to(self.dtype) for one in batch)
        loss = (self.model["used"](x) - y).square().mean()
        if self.is_training:
            if self.kill_at == self._progress.step:
                os.kill(os.getpid(), signal.SIGKILL)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return {"loss": loss.detach().float()}


def killed(kind: type[Trains], *arguments: Any) -> None:
    """Run a solver in a process that kills itself in an update."""
    pid = os.fork()
    if pid == 0:
        try:
            ran(kind, *arguments)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


def solver_of(name: str) -> type[Trains]:
    # The unused layer has no gradient: most have no state for it, and some need all gradients.
    strict = ("a wrapper", "no rate", "rate None", "schedule-free")
    kind, is_strict = KINDS[name], name.startswith(strict) or "in a wrapper" in name

    def make(params: Any) -> Any:
        return kind(list(params)[: -2 if is_strict else None])

    half = torch.bfloat16 if "of bfloat16" in name or "master" in name else torch.float32
    return type("Solver", (Trains,), {"make": staticmethod(make), "dtype": half})


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]


@pytest.mark.parametrize("name", KINDS)
def test_an_optimizer_that_was_killed_in_an_epoch_resumes_bit_by_bit(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kind = solver_of(name)
    whole = ran(kind, tmp_path, "whole")
    # Saved after update 5 of 12, in the middle of an epoch, and killed in the next but one.
    settings = ("checkpoint.every_steps=5", "checkpoint.async=false")
    killed(type("Dying", (kind,), {"kill_at": 6}), tmp_path, "killed", *settings)
    caplog.clear()
    resumed = ran(kind, tmp_path, "killed", *settings, seed=9)
    for key in ("model", "optimizer", "best_state", "history"):
        states = {key: whole.state[key]}, {key: resumed.state[key]}
        assert digests(states[0]) == digests(states[1]), key
    assert not warnings(caplog)


@pytest.mark.parametrize("name", ["schedule-free", "nested state", "tensors of a subclass"])
def test_an_optimizer_resumes_bit_by_bit_at_the_end_of_an_epoch(name: str, tmp_path: Path) -> None:
    kind = solver_of(name)
    whole = ran(kind, tmp_path, "whole")
    ran(kind, tmp_path, "again", until=1)
    resumed = ran(kind, tmp_path, "again", seed=9)
    assert digests({"model": whole.weights}) == digests({"model": resumed.weights})


def test_a_schedule_free_optimizer_is_in_training_mode_in_the_train_stage_alone(
    tmp_path: Path,
) -> None:
    seen: dict[str, set[bool]] = {}

    class Looks(solver_of("schedule-free")):  # type: ignore[misc]
        def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
            seen.setdefault(self.current_stage, set()).add(self.optimizer.trains)
            result: dict[str, Any] = super().run_step(idx, batch, metrics)
            return result

        def evaluate(self) -> dict[str, Any]:
            seen.setdefault("evaluate", set()).add(self.optimizer.trains)
            return {}

        def update_best_state_from_stage(self, stage_name: str = "valid") -> None:
            seen.setdefault("best", set()).add(self.optimizer.trains)
            super().update_best_state_from_stage(stage_name)

        def commit(self, save_checkpoints: bool = True) -> None:
            seen.setdefault("commit", set()).add(self.optimizer.trains)
            super().commit(save_checkpoints)

    ran(Looks, tmp_path)
    rest = ("valid", "best", "evaluate", "commit")
    assert seen == {"train": {True}, **{stage: {False} for stage in rest}}


def test_weights_swapped_in_the_train_stage_leave_a_schedule_free_optimizer_in_training_mode(
    tmp_path: Path,
) -> None:
    class Swaps(solver_of("schedule-free")):  # type: ignore[misc]
        def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
            if self.is_training:
                with self.swap_best_state():
                    assert not self.optimizer.trains
                assert self.optimizer.trains
            result: dict[str, Any] = super().run_step(idx, batch, metrics)
            return result

    ran(Swaps, tmp_path)


class AddsAGroup(Trains):
    """Trains the unused layer from epoch 2 on, with a group of its own."""

    make = staticmethod(lambda params: torch.optim.Adam(list(params)[:-2], lr=0.01))
    rebuilds: ClassVar[str] = ""

    def add_group(self) -> None:
        self.optimizer.add_param_group({"params": self.model["unused"].parameters(), "lr": 0.02})

    def train(self) -> dict[str, Any]:
        if self.epoch == 2 and len(self.optimizer.param_groups) == 1:
            self.add_group()
        return super().train()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        groups = state.get("optimizer", {}).get("param_groups", [])
        if self.rebuilds == "load_state_dict" and len(groups) == 2:
            self.add_group()
        super().load_state_dict(state)

    def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        if self.is_training and self.epoch > 1:
            for parameter in self.model["unused"].parameters():
                parameter.grad = torch.ones_like(parameter)
        return super().run_step(idx, batch, metrics)


def test_a_group_that_the_solver_adds_again_is_restored(tmp_path: Path) -> None:
    kind = type("Rebuilds", (AddsAGroup,), {"rebuilds": "load_state_dict"})
    whole = ran(kind, tmp_path, "whole")
    ran(kind, tmp_path, "again", until=2)
    resumed = ran(kind, tmp_path, "again", seed=9)
    assert_same(whole.state["optimizer"], resumed.state["optimizer"])
    assert_same(whole.weights, resumed.weights)


def test_the_error_for_a_group_that_nothing_adds_again_says_how_to_rebuild_it(
    tmp_path: Path,
) -> None:
    ran(AddsAGroup, tmp_path, until=2)
    with pytest.raises(StateMismatch) as found:
        ran(AddsAGroup, tmp_path)
    text = str(found.value)
    assert "'optimizer'" in text
    assert "group 1 has the parameters model.unused.weight, model.unused.bias" in text
    assert "lr=0.02" in text
    assert "add_param_group" in text


def test_moments_follow_weights_whose_type_changed(tmp_path: Path) -> None:
    kind = solver_of("master weights of bfloat16 weights")
    wide = type("Wide", (kind,), {"dtype": torch.float32, "make": staticmethod(Momentum)})
    ran(wide, tmp_path, until=1)
    narrow = type("Narrowed", (wide,), {"dtype": torch.bfloat16})
    with built(narrow, tmp_path) as solver:
        solver.restore()
        state = next(iter(solver.optimizer.state.values()))
        assert state["momentum"].dtype == torch.bfloat16


class Forgetful:
    """A source whose `load_state_dict` makes something else of what it gets."""

    def __init__(self) -> None:
        self.seen, self.kept = 0, torch.zeros(2)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "kept": self.kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # As one that takes apart what it is given.
        self.seen, self.kept = state.pop("seen") // 10, state.pop("kept")


def test_a_source_that_makes_something_else_of_its_state_is_named_with_the_key(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Counts(Regression):
        def build_model(self) -> None:
            super().build_model()
            self.counter = Forgetful()
            self.register_stateful("counter")

        def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
            self.counter.seen += 1
            return super().run_step(idx, batch, metrics)

    ran(Counts, tmp_path, until=1)
    caplog.clear()
    ran(Counts, tmp_path)
    (text,) = [one for one in warnings(caplog) if "load_state_dict" in one]
    assert "'counter'" in text
    assert "'seen'" in text
    assert "'kept'" not in text


def test_an_optimizer_inside_a_registered_wrapper_needs_no_line_of_its_own(tmp_path: Path) -> None:
    class Holds(solver_of("a wrapper without __init__")):  # type: ignore[misc]
        def build_model(self) -> None:
            super().build_model()
            self.base_optimizer = self.optimizer.inside

    ran(Holds, tmp_path, until=1)
    ran(Holds, tmp_path)
