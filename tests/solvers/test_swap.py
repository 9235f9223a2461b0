"""Other weights in place for a block, and every bit back afterwards, whatever the block did."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from toy import Regression, Zoo, assert_same, built

from checkpoint import StateMismatch
from solvers.state.swap import swapped


class ZooSolver(Regression):
    def make_model(self) -> nn.Module:
        return Zoo()

    def build_model(self) -> None:
        super().build_model()
        self.second = nn.Linear(2, 2)
        self.register_stateful("second")
        self.register_best_state("second")
        self.register_ema("second")


@pytest.fixture
def solver(tmp_path: Path) -> Iterator[Any]:
    """Build a solver whose weights, best state and EMA are all different, and look at the end."""
    torch.manual_seed(0)
    with built(ZooSolver, tmp_path, "aaaa", "optim.ema.use=true") as solver:
        for states in (solver.best_state.states, solver.ema.state):
            for state in states.values():
                for value in state.values():
                    if value.is_floating_point():
                        value.copy_(torch.randn(value.shape))
        lent = copy.deepcopy((solver.best_state.states, solver.ema.state))
        yield solver
        assert_same(lent, (solver.best_state.states, solver.ema.state), "the weights lent")


def places(solver: Any) -> dict[str, tuple[int, int, tuple[int, ...], bool]]:
    """Say which object each tensor is, where its memory lies and how it is laid out."""
    return {
        key: (id(tensor), tensor.data_ptr(), tensor.stride(), tensor.requires_grad)
        for module in (solver.model, solver.second)
        for key, tensor in module.state_dict(keep_vars=True).items()
    }


def weights(solver: Any) -> dict[str, Any]:
    return copy.deepcopy({"model": solver.model.state_dict(), "second": solver.second.state_dict()})


def write_in_place(solver: Any) -> None:
    with torch.no_grad():
        for tensor in (*solver.model.parameters(), *solver.model.buffers()):
            tensor.fill_(1)
        solver.second.weight.mul_(3)


def train_with_batch_norm(solver: Any) -> None:
    solver.model.train()
    solver.model(torch.arange(6))
    assert solver.model.norm.num_batches_tracked == 1


def take_a_step(solver: Any) -> None:
    with torch.enable_grad():
        solver.model(torch.arange(6)).sum().backward()
    solver.optimizer.step()
    solver.model.zero_grad()


def load(solver: Any) -> None:
    solver.model.load_state_dict({k: v + 1 for k, v in solver.model.state_dict().items() if k})


def load_by_assigning(solver: Any) -> None:
    state = {key: torch.ones_like(value) for key, value in solver.model.state_dict().items()}
    solver.model.load_state_dict(state, assign=True)


def replace_tensors(solver: Any) -> None:
    solver.model.norm.running_mean = torch.ones(4)
    solver.model.steps = solver.model.steps + 1
    solver.model.conv.weight = nn.Parameter(torch.zeros(4, 3, 3, 3))
    solver.model.conv.bias = None
    solver.model.nothing = torch.ones(1)


def point_elsewhere(solver: Any) -> None:
    for parameter in solver.model.parameters():
        parameter.data = torch.zeros_like(parameter)


def change_type(solver: Any) -> None:
    solver.model.double()


def read_only(solver: Any) -> None:
    solver.model(torch.arange(6))


BLOCKS: list[Callable[[Any], None]] = [
    write_in_place,
    train_with_batch_norm,
    take_a_step,
    load,
    load_by_assigning,
    replace_tensors,
    point_elsewhere,
    change_type,
    read_only,
]

NESTS = {
    "best": ["best"],
    "ema": ["ema"],
    "best in ema": ["ema", "best"],
    "ema in best": ["best", "ema"],
    "best in best": ["best", "best"],
    "ema in ema": ["ema", "ema"],
}


def swap(solver: Any, which: str) -> AbstractContextManager[None]:
    swaps = {"best": solver.swap_best_state, "ema": solver.swap_ema_state}
    made: AbstractContextManager[None] = swaps[which]()
    return made


@pytest.mark.parametrize("nest", NESTS)
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
def test_everything_is_put_back_bit_by_bit(
    solver: Any, nest: str, block: Callable[[Any], None], fails: bool
) -> None:
    values, where = weights(solver), places(solver)
    with ExitStack() as stack, torch.no_grad():
        if fails:
            stack.enter_context(pytest.raises(KeyError, match="inside"))
        for which in NESTS[nest]:
            stack.enter_context(swap(solver, which))
        block(solver)
        if fails:
            raise KeyError("inside")
    assert_same(values, weights(solver))
    assert where == places(solver)


def test_the_block_sees_the_best_weights(solver: Any) -> None:
    with solver.swap_best_state():
        assert_same(dict(solver.model.state_dict()), solver.best_state.states["model"])
        assert_same(dict(solver.second.state_dict()), solver.best_state.states["second"])


def test_the_block_sees_the_average_in_every_tensor_that_has_one(solver: Any) -> None:
    average, own = solver.ema.state["model"], weights(solver)["model"]
    assert average.keys() == own.keys() - {"head.weight", "steps", "mask"} - {
        "norm.num_batches_tracked"
    }
    with solver.swap_ema_state():
        assert solver.model.head.weight is solver.model.embed.weight
        for key, value in solver.model.state_dict().items():
            expected = average.get(key.replace("head", "embed"), own[key])
            assert torch.equal(value, expected.to(value.dtype)), key


def test_leaving_the_inner_swap_gives_back_what_the_outer_one_lent(solver: Any) -> None:
    with solver.swap_ema_state():
        outside = weights(solver)
        with solver.swap_best_state():
            write_in_place(solver)
        assert_same(outside, weights(solver))
        solver.second.weight.data.zero_()
        with solver.swap_ema_state():
            assert torch.equal(solver.second.weight, solver.ema.state["second"]["weight"])
        assert not solver.second.weight.any(), "what the outer block wrote is back too"


def test_the_best_state_taken_under_the_average_is_the_average(solver: Any) -> None:
    before = copy.deepcopy(solver.best_state.states)
    with solver.swap_ema_state():
        solver.best_state.update("second", solver.stateful.sources["second"])
        write_in_place(solver)
    assert_same(dict(solver.ema.state["second"]), solver.best_state.states["second"])
    for name, value in before["second"].items():
        solver.best_state.states["second"][name].copy_(value)


def test_a_buffer_that_is_not_persistent_is_left_to_its_module(solver: Any) -> None:
    with solver.swap_best_state():
        solver.model.cache = torch.ones(7)
    assert solver.model.cache.shape == (7,)


def test_without_average_the_present_weights_stay(tmp_path: Path) -> None:
    with built(ZooSolver, tmp_path) as solver:
        before = weights(solver)
        with solver.swap_ema_state():
            assert_same(before, weights(solver))


def test_a_narrow_best_state_goes_into_a_wide_model(solver: Any) -> None:
    narrow = {
        k: v.half() if v.is_floating_point() else v for k, v in solver.model.state_dict().items()
    }
    kept, before, where = copy.deepcopy(narrow), weights(solver), places(solver)
    with swapped({"model": (solver.model, narrow)}):
        assert solver.model.conv.weight.dtype == torch.float32
        assert torch.equal(solver.model.conv.weight, narrow["conv.weight"].float())
        solver.model.conv.weight.data.zero_()
    assert_same(before, weights(solver))
    assert where == places(solver)
    assert_same(kept, narrow)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda state: state | {"alien": torch.ones(1)}, "unexpected: alien"),
        (lambda state: state | {"weight": torch.ones(1, 2)}, r"reshaped: weight \(1, 2\) into"),
    ],
    ids=["unexpected", "reshaped"],
)
def test_when_a_second_source_does_not_fit_the_first_is_as_it_was(
    solver: Any, change: Callable[[Any], Any], named: str
) -> None:
    states = solver.best_state.states
    fitting = states["second"]
    states["second"] = change(dict(fitting))
    before, where = weights(solver), places(solver)
    with pytest.raises(StateMismatch, match=f"'second'.*{named}"), solver.swap_best_state():
        pytest.fail("the block was run")
    assert_same(before, weights(solver))
    assert where == places(solver)
    states["second"] = fitting


class WithOptimizer(nn.Module):
    """Keeps the state of an optimizer in its own, as Audiocraft's adversaries do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 2)
        self.optimizer = torch.optim.Adam(self.net.parameters())

    def learn(self) -> None:
        with torch.enable_grad():
            self.net(torch.ones(1, 2)).sum().backward()
        self.optimizer.step()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "optimizer"] = self.optimizer.state_dict()

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        self.optimizer.load_state_dict(state.pop(prefix + "optimizer"))
        super()._load_from_state_dict(state, prefix, *args)


class OddSources(Regression):
    def build_model(self) -> None:
        super().build_model()
        self.adversaries = nn.ModuleDict({"one": WithOptimizer()})
        self.register_stateful("adversaries", "lr_scheduler")
        self.register_best_state("optimizer", "adversaries", "lr_scheduler")


def test_an_optimizer_and_a_module_that_holds_one_are_swapped_too(tmp_path: Path) -> None:
    with built(OddSources, tmp_path, schedule={"lr_scheduler": "cosine"}) as solver:
        learn = solver.adversaries["one"].learn

        def state() -> dict[str, Any]:
            live = {name: solver.stateful.sources[name] for name in solver.best_state.states}
            return copy.deepcopy({name: source.state_dict() for name, source in live.items()})

        def step() -> None:
            solver.model(torch.randn(8, 4)).sum().backward()
            solver.optimizer.step()
            solver.lr_scheduler.step()
            learn()

        step()
        for name, source in solver.stateful.sources.items():
            if name in solver.best_state.states:
                solver.best_state.update(name, source)
        best = copy.deepcopy(solver.best_state.states)
        step()
        before = state()
        with solver.swap_best_state():
            assert_same(best, state())
            step()
        assert_same(before, state())
        assert_same(best, solver.best_state.states)
        assert before["optimizer"]["state"][0]["step"] == 2


def address(tensor: torch.Tensor) -> int:
    """Where the memory of a tensor lies; `data_ptr` would make a lazy clone copy itself."""
    place: int = torch._C._data_address(tensor)
    return place


def test_no_second_copy_is_made_of_what_is_only_read(solver: Any) -> None:
    lent = {key: address(value) for key, value in solver.best_state.states["model"].items()}
    solver.model.eval()
    with torch.no_grad(), solver.swap_best_state():
        solver.model(torch.arange(6))
        solver.model.conv(torch.randn(1, 3, 5, 5))
        now = {key: address(value) for key, value in solver.model.state_dict().items()}
        assert now == lent
        solver.model.norm.weight.zero_()
        assert address(solver.model.norm.weight) != lent["norm.weight"]
        now = {key: address(value) for key, value in solver.model.state_dict().items()}
        assert {key for key in now if now[key] != lent[key]} == {"norm.weight"}


def test_the_average_is_lent_without_a_copy_where_type_and_device_are_the_same(
    solver: Any,
) -> None:
    with solver.swap_ema_state():
        for key, value in solver.ema.state["model"].items():
            shared = address(solver.model.state_dict()[key]) == address(value)
            assert shared == (key != "narrow"), key


@pytest.mark.parametrize("kind", ["shared", "numpy"])
def test_memory_that_torch_does_not_own_is_copied_instead(kind: str) -> None:
    module = nn.Linear(2, 2)
    if kind == "shared":
        module.share_memory()
    else:
        module.weight.data = torch.from_numpy(module.weight.detach().numpy().copy())
    before, place = copy.deepcopy(module.state_dict()), module.weight.data_ptr()
    with swapped({"model": (module, {"bias": torch.ones(2)})}):
        module.weight.data.zero_()
        assert torch.equal(module.bias, torch.ones(2))
    assert_same(before, module.state_dict())
    assert module.weight.data_ptr() == place


@pytest.mark.parametrize("how", ["hook", "method"])
def test_a_module_that_names_its_tensors_otherwise_is_swapped_by_those_names(how: str) -> None:
    module = nn.Linear(2, 2)

    def renamed(*_: Any, **__: Any) -> dict[str, torch.Tensor]:
        return {"w": module.weight, "b": module.bias}

    if how == "hook":
        module._register_state_dict_hook(renamed)
    else:
        module.state_dict = renamed  # type: ignore[method-assign]
    before = copy.deepcopy(renamed())
    with torch.no_grad(), swapped({"model": (module, {"w": torch.ones(2, 2)})}):
        assert torch.equal(module.weight, torch.ones(2, 2))
        module.weight.zero_()
    assert_same(before, renamed())
    with pytest.raises(StateMismatch, match="unexpected: weight"):
        swapped({"model": (module, {"weight": torch.ones(2, 2)})}).__enter__()


def test_nothing_is_saved_while_other_weights_are_in_place(solver: Any) -> None:
    with solver.swap_best_state(), pytest.raises(RuntimeError, match="swap_best_state"):
        solver.commit()
    assert not solver.checkpointer.positions()
