"""`compile` compiles in place; `fsdp.param_dtype` trains, or is refused with what to write."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import good, on_ranks
from torch import nn
from toy import Regression, assert_same, built, ran

from checkpoint import load_checkpoint
from solvers import ConfigError
from solvers.optim.builders import get_optimizer, make_grad_scaler

Report = Callable[[Any], None]


class Blocky(nn.Module):
    """Batch norm, and blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh()) for _ in range(2)
        )
        self.last = nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


class Blocks(Regression):
    def make_model(self) -> nn.Module:
        torch.manual_seed(0)
        return Blocky()

    def build_model(self) -> None:
        super().build_model()
        self.optimizer = get_optimizer(self.model, {"lr": 0.01, "optimizer": "sgd"})


class Unwrapped(Blocks):
    def build_model(self) -> None:
        self.model = self.make_model()
        self.optimizer = get_optimizer(self.model, {"lr": 0.01, "optimizer": "sgd"})
        self.lr_scheduler = None
        self.register_stateful("model", "optimizer")


@pytest.mark.parametrize("kind", [Blocks, Unwrapped])
def test_a_compiled_model_trains_the_same_under_plain_names_and_resumes(
    tmp_path: Path, kind: type[Regression]
) -> None:
    plain = ran(kind, tmp_path, "plain")
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    whole = ran(kind, tmp_path, "whole", "compile=eager")
    assert torch._dynamo.utils.counters["stats"]["calls_captured"] > 0
    assert_same(plain.weights, whole.weights)
    saved = load_checkpoint(whole.solver.checkpoint_path()).state["model"]
    assert saved.keys() == Blocky().state_dict().keys()
    ran(kind, tmp_path, "again", "compile=eager", until=1)
    again = ran(kind, tmp_path, "again", "compile=eager", seed=5)
    assert_same(whole.weights, again.weights)


def test_a_backend_that_does_not_exist_is_named_at_start(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match=r"compile=aot_eagre: did you mean aot_eager\?"),
        built(Blocks, tmp_path, "aaaa", "compile=aot_eagre"),
    ):
        pass
    with (
        pytest.raises(ConfigError, match="compile=fast: torch.compile has no such mode or backend"),
        built(Blocks, tmp_path, "bbbb", "compile=fast"),
    ):
        pass


def test_a_section_of_that_name_belongs_to_the_user(tmp_path: Path) -> None:
    with built(Blocks, tmp_path, "aaaa", "compile.mode=mine") as solver:
        assert solver.model._compiled_call_impl is None
    with built(Blocks, tmp_path, "bbbb", "compile=aot_eager") as solver:
        assert solver.model._compiled_call_impl is not None


def learned(report: Report, root: str, sig: str, settings: list[str]) -> None:
    solver = ran(Blocks, Path(root), sig, *settings).solver
    weight = solver.model.last.weight
    whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    report([whole.flatten().tolist(), sorted(solver.model.state_dict())])


FULL = ["fsdp.use=true", "fsdp.param_dtype=float32"]


@pytest.mark.parametrize("spread", [[], FULL, [*FULL, "fsdp.per_block=false"]], ids=str)
def test_two_ranks_train_compiled_what_they_train_otherwise(
    tmp_path: Path, spread: list[str]
) -> None:
    ((plain, names),), _ = good(on_ranks(2, learned, tmp_path, "plain", spread))
    compiled = good(on_ranks(2, learned, tmp_path, "compiled", [*spread, "compile=aot_eager"]))
    for ((weights, theirs),) in compiled:
        assert theirs == names
        assert weights == pytest.approx(plain, abs=1e-5)


class Scaled(Blocks):
    def build_model(self) -> None:
        super().build_model()
        self.scaler = make_grad_scaler(self.device, "float16")
        self.register_stateful("scaler")

    def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        x, y = batch
        loss = (self.model(x).float() - y).square().mean()
        if self.is_training:
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return {"loss": loss.detach()}


def narrow(report: Report, root: str, dtype: str, has_scaler: bool) -> None:
    settings = ("fsdp.use=true", f"fsdp.param_dtype={dtype}")
    kind = Scaled if has_scaler else Blocks
    try:
        solver = ran(kind, Path(root), f"{dtype}{has_scaler}", *settings).solver
    except ConfigError as error:
        report(str(error))
    else:
        report([epoch["train"]["loss"] for epoch in solver.history])


def test_batch_norm_trains_under_narrow_parameters_and_float16_needs_a_scaler(
    tmp_path: Path,
) -> None:
    (full,), _ = good(on_ranks(2, narrow, tmp_path, "float32", False))
    (half,), _ = good(on_ranks(2, narrow, tmp_path, "bfloat16", False))
    assert half == pytest.approx(full, abs=0.1)
    (scaled,), _ = good(on_ranks(2, narrow, tmp_path, "float16", True))
    # The scaler leaves out the first updates.
    assert full[-1] < scaled[-1] < full[0]
    for (refused,) in good(on_ranks(2, narrow, tmp_path, "float16", False)):
        assert "fsdp.param_dtype=float16 needs a scaler" in refused
        assert "fsdp.param_dtype=bfloat16" in refused
