"""A setting of the framework that no code of the solver reads is named after the first epoch."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader, TensorDataset
from toy import Regression, config, experiment, ran

from solvers.optim.builders import get_lr_scheduler, get_optimizer
from solvers.settings.unread_keys import Reads, unrecorded

WORDS = "no code read this in the first epoch"


class Deaf(Regression):
    """Reads no setting: its loaders, optimizer and step have values of their own."""

    def build_model(self) -> None:
        self.model = self.make_model()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self.register_stateful("model", "optimizer")

    def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        x, y = batch
        loss = (self.model(x) - y).square().mean()
        if self.is_training:
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return {"loss": loss.detach()}


class Attentive(Deaf):
    """Reads all of them, each in another way."""

    def build_dataloaders(self) -> None:
        x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
        data = TensorDataset(x, x.sum(1, keepdim=True))
        loader = DataLoader(data, **self.cfg.dataset)
        self.dataloaders = {"train": loader, "valid": loader}

    def build_model(self) -> None:
        self.model = self.wrap(self.make_model())
        self.optimizer = get_optimizer(self.model, self.cfg.optim)
        schedule = copy.deepcopy(self.cfg.schedule)
        self.lr_scheduler = get_lr_scheduler(self.optimizer, schedule, self.total_updates)
        self.register_stateful("model", "optimizer", "lr_scheduler")

    def run_step(self, idx: int, batch: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        x, y = batch
        with self.autocast:
            loss = (self.model(x) - y).square().mean()
        if self.is_training:
            self.optimize(loss)
        return {"loss": loss.detach()}

    def evaluate(self) -> dict[str, Any]:
        return {}


SETTINGS = {
    "schedule": ("schedule.lr_scheduler=cosine", "schedule.cosine.warmup=3"),
    "autocast": ("autocast=true",),
    "loaders": ("dataset.num_workers=1",),
    "optimizer": ("optim.lr=0.02", "optim.optimizer=adamw", "optim.adam.weight_decay=0.1"),
    "blocks": ("optim.activation_checkpointing=true",),
    "evaluate": ("evaluate.every=1",),
    "norm": ("optim.max_norm=0.5",),
}
READERS = {
    "schedule": "Call get_lr_scheduler(",
    "autocast": "`with self.autocast:`",
    "loaders": "DataLoader(data, self.cfg.dataset.batch_size",
    "optimizer": "Call get_optimizer(self.model, self.cfg.optim)",
    "blocks": "self.model = self.wrap(model)",
    "evaluate": "A method `evaluate`",
    "norm": "Call self.optimize(loss) in run_step",
}


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if WORDS in one.getMessage()]


@pytest.mark.parametrize("name", SETTINGS)
def test_what_no_code_reads_is_named_once_with_what_would_read_it(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    ran(Deaf, tmp_path, "aaaa", *SETTINGS[name])
    (line,) = warnings(caplog)
    for setting in SETTINGS[name]:
        key, _, value = setting.partition("=")
        assert f"{key}={value.replace('true', 'True')}" in line
    assert READERS[name] in line


def test_there_is_no_false_alarm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ran(Deaf, tmp_path, "aaaa")
    everything = ["dataset.batch_size=16"]
    everything += [setting for several in SETTINGS.values() for setting in several]
    solver = ran(Attentive, tmp_path, "bbbb", *everything, until=1).solver
    # The first epoch of a process that goes on, too.
    ran(Attentive, tmp_path, "bbbb", *everything)
    assert warnings(caplog) == []
    assert type(solver.cfg.optim) is DictConfig


def test_of_a_choice_that_was_not_made_only_the_command_line_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = ("optim.lr=0.1", "optim.optimizer=sgd", "optim.adam.weight_decay=0.1")
    data = ("dataset.batch_size=8", "wandb.project=mine", "schedule.lr_scheduler=null")

    def run(sig: str, *overridden: str) -> list[str]:
        caplog.clear()
        cfg = config(*settings, *data)
        xp = experiment(tmp_path, sig, cfg)
        xp.delta = [(key, OmegaConf.select(cfg, key)) for key in overridden]
        with xp.enter(stack=True):
            Attentive(cfg).run()
        return warnings(caplog)

    assert run("aaaa", "optim.optimizer") == []
    adam, wandb = run("bbbb", "optim.adam.weight_decay", "wandb.project")
    assert adam.startswith("optim.adam.weight_decay=0.1: ")
    assert (
        wandb == f"wandb.project=mine: {WORDS}, so it has no effect. logging.log_wandb=true uses it"
    )


def test_reads_are_recorded_in_every_way_that_a_configuration_can_be_read() -> None:
    text = {"a": {"b": 1, "c": {"d": 2, "e": "${a.b}"}}, "f": 3}

    def read(*actions: Any) -> set[str]:
        cfg = OmegaConf.create(text)
        reads = Reads(cfg)
        for action in actions:
            action(cfg)
        keys = reads.keys()
        reads.stop()
        assert type(cfg) is type(cfg.a) is type(cfg.a.c) is DictConfig
        assert cfg == OmegaConf.create(text)
        return {key for key in keys if key in ("a.b", "a.c.d", "a.c.e", "f")}

    assert read() == set()
    assert read(lambda cfg: cfg.a.c) == set()
    assert read(lambda cfg: cfg.f, lambda cfg: cfg["a"].get("b")) == {"f", "a.b"}
    assert read(lambda cfg: OmegaConf.select(cfg, "a.c.d")) == {"a.c.d"}
    assert read(lambda cfg: cfg.a.c.e) == {"a.b", "a.c.e"}
    assert read(lambda cfg: dict(**cfg.a.c)) == {"a.b", "a.c.d", "a.c.e"}
    assert read(lambda cfg: OmegaConf.to_container(cfg.a)) == {"a.b", "a.c.d", "a.c.e"}
    assert read(copy.deepcopy) == {"a.b", "a.c.d", "a.c.e", "f"}
    assert read(lambda cfg: OmegaConf.merge({}, cfg.a.c)) >= {"a.c.d", "a.c.e"}

    def aside(cfg: Any) -> None:
        with unrecorded():
            OmegaConf.to_container(cfg, resolve=True)

    assert read(aside) == set()


def test_a_configuration_that_records_can_be_pickled() -> None:
    cfg = OmegaConf.create({"a": {"b": 1}})
    reads = Reads(cfg)
    again = pickle.loads(pickle.dumps(cfg))
    assert type(again) is type(again.a) is DictConfig
    assert again.a.b == 1
    assert reads.keys() == set()
