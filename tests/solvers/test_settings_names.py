"""A name that a user misspells is an error that gives the nearest name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy import Regression, built, config, ran

from checkpoint import CheckpointError, load_checkpoint
from solvers import ConfigError
from solvers.experiment.lookup import device
from solvers.settings.validate import parse


def test_a_source_that_a_checkpoint_lacks_is_an_error_that_names_the_nearest(
    tmp_path: Path,
) -> None:
    folder = ran(Regression, tmp_path, "aaaa", "optim.epochs=1").solver.checkpoint_path()
    with pytest.raises(CheckpointError, match="has no source 'modle': did you mean 'model'\\?"):
        load_checkpoint(folder, ["optimizer", "modle"])
    with pytest.raises(CheckpointError, match="has no source 'weights': it has .*model"):
        load_checkpoint(folder, ["weights"])
    assert load_checkpoint(folder, "model").state.keys() == {"model"}


def test_a_source_that_was_thinned_out_is_an_error_that_says_so(tmp_path: Path) -> None:
    thin = ("checkpoint.save_every=1", "checkpoint.keep_every_states=[model]")
    solver = ran(Regression, tmp_path, "aaaa", *thin).solver
    with pytest.raises(CheckpointError, match="has no source 'optimizer' any more: keep_every"):
        load_checkpoint(solver.epoch_checkpoint_path(1), ["model", "optimizer"])


def test_a_misspelt_source_to_ignore_is_refused(tmp_path: Path) -> None:
    ran(Regression, tmp_path, "aaaa", "optim.epochs=1")
    with built(Regression, tmp_path, "aaaa", "optim.epochs=1") as solver:
        with pytest.raises(ValueError, match="'modle', which is no source .*: did you mean model"):
            solver.restore(ignore_state_keys=["modle"])
        assert solver.restore(ignore_state_keys=["optimizer", "ema"])


REGISTER: dict[str, tuple[Callable[[Any], None], str]] = {
    "stateful": (lambda s: s.register_stateful("optimzer"), "no attribute 'optimzer' yet"),
    "best": (lambda s: s.register_best_state("modle"), r"register_stateful\('modle'\) before"),
    "ema": (lambda s: s.register_ema("modle"), r"set self\.modle before"),
}


@pytest.mark.parametrize("what", REGISTER)
def test_registering_a_misspelt_name_gives_the_nearest(tmp_path: Path, what: str) -> None:
    register, words = REGISTER[what]

    class Slips(Regression):
        def build_model(self) -> None:
            super().build_model()
            register(self)

    with (
        pytest.raises(ValueError, match=f"{words}.*Did you mean '(model|optimizer)'"),
        built(Slips, tmp_path),
    ):
        pass


def test_a_device_that_is_not_there_is_one_line() -> None:
    for name, words in (
        ("tpu", "torch knows no such device: give auto or cpu"),
        ("xpu", "torch finds no XPU device here: give auto or cpu"),
    ):
        with pytest.raises(ConfigError, match=f"device={name}: {words}"):
            device(name)


def test_an_average_that_never_moves_is_refused() -> None:
    with pytest.raises(ConfigError, match="optim.ema.decay=1 never changes the average"):
        parse(config("optim.ema.use=true", "optim.ema.decay=1.0"))
    parse(config("optim.ema.use=false", "optim.ema.decay=1.0"))
