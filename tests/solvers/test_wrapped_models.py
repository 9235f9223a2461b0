"""Models that are compiled, replicated or sharded: used, saved and loaded as if they were not."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import good, on_ranks
from torch import nn
from toy import Regression, built

from solvers.distributed.wrappers import matched, plain_state, unwrapped
from solvers.state.swap import swapped
from solvers.weights.ema import ModuleDictEMA

Report = Callable[[Any], None]
SHARDED = ["fsdp.use=true", "fsdp.param_dtype=float32"]
EMA = ["optim.ema.use=true", "optim.ema.updates=1"]


class Parts(nn.Module):
    """Has a part that is called as the one inside of a wrapper."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(4, 4)
        self.head = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.module(x))


NAMES = set(Parts().state_dict())


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def in_parts(solver: Any, model: nn.Module) -> Any:
    model = solver.wrap(model)
    model.head[1] = compiled(model.head[1])
    model.head = compiled(model.head)
    return model


def in_place(solver: Any, model: nn.Module) -> Any:
    model.compile(backend="eager")
    return solver.wrap(model)


WAYS: dict[str, Callable[[Any, nn.Module], Any]] = {
    "plain": lambda solver, model: solver.wrap(model),
    "compiled-then-wrapped": lambda solver, model: solver.wrap(compiled(model)),
    "wrapped-then-compiled": lambda solver, model: compiled(solver.wrap(model)),
    "compiled-in-place": in_place,
    "compiled-in-parts": in_parts,
}


class Wrapped(Regression):
    """Trains a model that is wrapped in the way that the experiment's configuration names."""

    def build_model(self) -> None:
        self.model = WAYS[self.cfg.way](self, Parts())
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.lr_scheduler = None
        self.register_stateful("model", "optimizer")
        self.register_best_state("model")
        self.register_ema("model")

    def names(self) -> list[set[str]]:
        """Names in the model, the best state, the average and the optimizer."""
        state = self._saver.state()
        named = {name.removeprefix("model.") for name in state["optimizer"]["state"]}
        return [set(state["model"]), set(self.best_state.states["model"]), named]

    def weights(self) -> list[float]:
        with torch.no_grad():
            values = [getattr(p, "full_tensor", p.detach)() for p in self.model.parameters()]
            return torch.cat([value.flatten() for value in values]).tolist()


def way(name: str) -> list[str]:
    return ["optim.epochs=2", f"way={name}", *EMA]


def trained(report: Report, root: str, name: str, settings: list[str]) -> None:
    torch.manual_seed(0)
    with built(Wrapped, Path(root), "aaaa", *way(name), *settings) as solver:
        solver.run()
        with solver.swap_ema_state(), solver.swap_best_state():
            pass
        names = [*solver.names(), set(solver.ema.state["model"])]
        report([sorted(one) for one in names])
        report(solver.weights())


def taken_up(report: Report, root: str, name: str, settings: list[str]) -> None:
    with built(Wrapped, Path(root), "aaaa", *way(name), *settings) as solver:
        assert solver.restore()
        report(solver.weights())


def check_names(model: list[str], best: list[str], optimizer: list[str], ema: list[str]) -> None:
    assert set(model) == set(best) == NAMES
    assert set(optimizer) == {name for name, _ in Parts().named_parameters()}
    assert set(ema) == NAMES - {"head.0.num_batches_tracked"}


# The compiler asks tensors inside of a graph for their gradients.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("name", WAYS)
def test_whatever_wraps_a_model_its_names_are_plain_and_every_other_way_takes_it_up(
    tmp_path: Path, name: str
) -> None:
    reports: list[Any] = []
    trained(reports.append, str(tmp_path), name, [])
    names, weights = reports
    check_names(*names)
    for other in WAYS:
        taken_up(reports.append, str(tmp_path), other, [])
        assert reports.pop() == weights, other


@pytest.mark.parametrize("name", [*WAYS, "sharded"])
def test_on_two_ranks_names_are_plain_too_and_one_process_takes_it_up(
    tmp_path: Path, name: str
) -> None:
    settings = SHARDED if name == "sharded" else []
    both = good(on_ranks(2, trained, tmp_path, name.replace("sharded", "plain"), settings))
    assert both[0] == both[1]
    names, weights = both[0]
    check_names(*names)
    reports: list[Any] = []
    taken_up(reports.append, str(tmp_path), "plain", [])
    assert reports == [weights]


def test_files_of_other_code_are_loaded_with_their_prefixes(tmp_path: Path) -> None:
    torch.manual_seed(1)
    weights = Parts().state_dict()
    for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."):
        path = tmp_path / f"{prefix}th"
        torch.save({prefix + key: value for key, value in weights.items()}, path)
        with built(Wrapped, tmp_path, "bbbb", "way=plain", f"continue_from={path}") as solver:
            solver.restore()
            for key, value in solver.model.state_dict().items():
                assert torch.equal(value, weights[key]), (prefix, key)


def test_prefixes_are_matched_where_the_plain_names_do_not_fit() -> None:
    assert matched({"a.module.w", "a._orig_mod.b.w"}, {"a.w", "a.b.w"}) == {
        "a.module.w": "a.w",
        "a._orig_mod.b.w": "a.b.w",
    }
    assert matched({"module.w"}, {"module.w"}) == {}
    assert matched({"_orig_mod.module.w"}, {"module.w"}) == {"_orig_mod.module.w": "module.w"}
    # Two that could be meant, and a name that a hook of the module is to change afterwards.
    assert matched({"x.module.w"}, {"x.w", "module.x.w"}) == {}
    assert matched({"module.old", "module.w"}, {"new", "w"}) == {
        "module.old": "old",
        "module.w": "w",
    }


def test_a_model_compiled_in_parts_is_swapped_and_averaged_by_plain_names() -> None:
    model = Parts()
    model.head = compiled(model.head)
    average = ModuleDictEMA({"model": model}, 0.5)
    before = copy.deepcopy(plain_state(model))
    assert average.state["model"].keys() == NAMES - {"head.0.num_batches_tracked"}
    with swapped({"model": (model, {"head.1.bias": torch.full((1,), 5.0)})}):
        assert unwrapped(model.head)[1].bias.tolist() == [5]
    for key, value in plain_state(model).items():
        assert torch.equal(value, before[key])


# --- a replicated model is used like the one inside


def used(report: Report, root: str) -> None:
    with built(Regression, Path(root)) as solver:
        model = solver.model
        report([len(model), type(model[0]).__name__, type(model[-1]).__name__, model[0] in model])
        report([type(one).__name__ for one in model])
        model[2] = nn.Tanh()
        report([type(unwrapped(model)[2]).__name__, type(model[1:3]).__name__])
        solver.run_stage("train", solver.train)
    with built(Wrapped, Path(root), "bbbb", "way=plain") as solver:
        solver.model.head = nn.Sequential(solver.model.head[1])
        solver.model.note = 3
        report(
            [len(unwrapped(solver.model).head), unwrapped(solver.model).note, bool(solver.model)]
        )
        report([hasattr(type(solver.model), name) for name in ("__len__", "__iter__")])
        del solver.model.note
        report(hasattr(solver.model, "note"))


def test_code_written_for_one_process_uses_a_replicated_model_in_the_same_way(
    tmp_path: Path,
) -> None:
    (alone,) = good(on_ranks(1, used, tmp_path / "one"))
    assert good(on_ranks(2, used, tmp_path / "two")) == [alone, alone]


# --- a sharded model


class Speaking(nn.Module):
    """Has None in its list of blocks, and methods beside `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), None, nn.Linear(4, 4)])  # type: ignore[list-item]
        self.head = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x if block is None else block(x)
        return self.head(x)

    def generate(self, x: torch.Tensor) -> torch.Tensor:
        return self.encode(x) @ self.head.weight.t() + self(x)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.head.weight.t() * self.head.weight


class Speaks(Regression):
    def build_model(self) -> None:
        torch.manual_seed(0)
        self.model = self.wrap(Speaking(), methods=("encode",))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.lr_scheduler = None
        self.register_stateful("model", "optimizer")


def spoken(report: Report, root: str, settings: list[str]) -> None:
    with built(Speaks, Path(root), "aaaa", "optim.epochs=1", *settings) as solver:
        solver.run_stage("train", solver.train)
        solver.model.eval()
        with torch.no_grad():
            for _ in range(2):
                x = torch.ones(2, 4)
                report([solver.model.generate(x).tolist(), solver.model.encode(x).tolist()])


def test_a_sharded_model_may_have_none_in_a_list_and_methods_beside_forward(
    tmp_path: Path,
) -> None:
    both = good(on_ranks(2, spoken, tmp_path / "two", SHARDED))
    assert both[0] == both[1]
    assert both[0][0] == both[0][1]


class Renaming(Speaking):
    """Knows the names of before."""

    def __init__(self) -> None:
        super().__init__()
        self.end = self.head
        del self.head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.end(self.blocks[2](self.blocks[0](x)))

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        for key in [key for key in state if key.startswith(f"{prefix}head.")]:
            state[key.replace("head.", "end.")] = state.pop(key)
        super()._load_from_state_dict(state, prefix, *rest)  # type: ignore[no-untyped-call]


def renamed(report: Report, root: str, sig: str, settings: list[str]) -> None:
    now = sig == "aaaa" and (Path(root) / "xps/aaaa/checkpoints").exists()
    kind = type("Renames", (Regression,), {"make_model": lambda _: [Speaking, Renaming][now]()})
    torch.manual_seed(0)
    with built(kind, Path(root), sig, "optim.epochs=2", *EMA, *settings) as solver:
        if sig == "aaaa" and not now:
            solver.should_stop_training = lambda: solver.epoch > 1
        solver.run()
        with solver.swap_best_state(), solver.swap_ema_state():
            pass
        report([value.tolist() for value in whole(solver._saver.state()["model"])])


def whole(state: dict[str, Any]) -> list[torch.Tensor]:
    return [getattr(value, "full_tensor", lambda v=value: v)() for value in state.values()]


def test_a_sharded_run_goes_on_after_its_module_renamed_its_weights(tmp_path: Path) -> None:
    expected = good(on_ranks(2, renamed, tmp_path, "whole", SHARDED))
    good(on_ranks(2, renamed, tmp_path, "aaaa", SHARDED))
    assert good(on_ranks(2, renamed, tmp_path, "aaaa", SHARDED)) == expected


def test_a_method_that_the_model_lacks_is_named(tmp_path: Path) -> None:
    with (
        built(Regression, tmp_path) as solver,
        pytest.raises(ValueError, match="'sing', and Linear has no method of that name"),
    ):
        solver.wrap(nn.Linear(1, 1), methods=("sing",))
