"""Optimizers by name, schedules against Audiocraft's formulas, and their exact resumption."""

import json
import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from solvers.optim.builders import (
    get_lr_scheduler,
    get_optim_parameter_groups,
    get_optimizer,
    make_grad_scaler,
)
from solvers.settings.errors import ConfigError

LR = 0.01
NULLS: dict[str, Any] = {
    "lr_scheduler": None,
    "step": {"step_size": None, "gamma": None},
    "exponential": {"lr_decay": None},
    "cosine": {"warmup": None, "lr_min_ratio": 0.0, "cycle_length": 1.0},
    "polynomial_decay": {"warmup": None, "zero_lr_warmup_steps": 0, "end_lr": 0.0, "power": 1},
    "inverse_sqrt": {"warmup": None, "warmup_init_lr": 0.0},
    "linear_warmup": {"warmup": None, "warmup_init_lr": 0.0},
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "step": {"step_size": 3, "gamma": 0.5},
    "exponential": {"lr_decay": 0.9},
    "cosine": {"warmup": 4, "lr_min_ratio": 0.1, "cycle_length": 0.8},
    "polynomial_decay": {"warmup": 3, "zero_lr_warmup_steps": 2, "end_lr": 1e-4, "power": 2.0},
    "inverse_sqrt": {"warmup": 5, "warmup_init_lr": 1e-3},
    "linear_warmup": {"warmup": 4, "warmup_init_lr": 1e-3},
}


def schedule_cfg(name: str | None, **section: Any) -> Any:
    cfg = {**NULLS, "lr_scheduler": name}
    if name is not None:
        cfg[name] = {**NULLS[name], **section}
    return OmegaConf.create(cfg)


def new_optimizer(lr: float = LR) -> torch.optim.Optimizer:
    torch.manual_seed(0)
    return torch.optim.AdamW(nn.Linear(2, 1).parameters(), lr=lr)


def rates(optimizer: torch.optim.Optimizer, scheduler: Any, updates: int) -> list[float]:
    found = []
    for _ in range(updates):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def rates_of(name: str, total: int, updates: int, **section: Any) -> list[float]:
    optimizer = new_optimizer()
    cfg = schedule_cfg(name, **section)
    return rates(optimizer, get_lr_scheduler(optimizer, cfg, total), updates)


# Audiocraft's formulas, in the words of its papers: t is the update, from 0; T the total.


def cosine(t: int, T: int, warmup: float, lr_min_ratio: float, cycle_length: float) -> float:
    if t < warmup:
        return LR * t / warmup
    if t > T:
        return LR * lr_min_ratio
    angle = math.pi * (t - warmup) / (T - warmup) / cycle_length
    return LR * (lr_min_ratio + (1 - lr_min_ratio) * math.cos(angle / 2) ** 2)


def polynomial_decay(
    t: int, T: int, warmup: float, zero_lr_warmup_steps: float, end_lr: float, power: float
) -> float:
    start = warmup + zero_lr_warmup_steps
    if zero_lr_warmup_steps > 0 and t <= zero_lr_warmup_steps:
        return 0.0
    if warmup > 0 and t <= start:
        return LR * (t - zero_lr_warmup_steps) / warmup
    return end_lr if t >= T else end_lr + (LR - end_lr) * ((T - t) / (T - start)) ** power


def inverse_sqrt(t: int, T: int, warmup: float, warmup_init_lr: float) -> float:
    return (
        linear_warmup(t + 1, T, warmup, warmup_init_lr)
        if t + 1 < warmup
        else LR * math.sqrt(warmup / (t + 1))
    )


def linear_warmup(t: int, T: int, warmup: float, warmup_init_lr: float) -> float:
    share = min(t / warmup, 1) if warmup else 1
    return (1 - share) * warmup_init_lr + share * LR


FORMULAS: list[tuple[Callable[..., float], dict[str, Any]]] = [
    (cosine, {"lr_min_ratio": 0.0, "cycle_length": 1.0}),
    (cosine, {"lr_min_ratio": 0.05, "cycle_length": 0.7}),
    (polynomial_decay, {"zero_lr_warmup_steps": 0, "end_lr": 0.0, "power": 1}),
    (polynomial_decay, {"zero_lr_warmup_steps": 2, "end_lr": 1e-5, "power": 2.5}),
    (linear_warmup, {"warmup_init_lr": 0.0}),
    (linear_warmup, {"warmup_init_lr": 1e-4}),
    (inverse_sqrt, {"warmup_init_lr": 0.0}),
    (inverse_sqrt, {"warmup_init_lr": 1e-4}),
]


def has_the_formulas_rates(
    formula: Callable[..., float], section: dict[str, Any], warmup: float, total: int
) -> bool:
    found = rates_of(formula.__name__, total, total + 8, warmup=warmup, **section)
    wanted = [formula(t, total, warmup, **section) for t in range(total + 8)]
    return found == pytest.approx(wanted, rel=1e-12, abs=1e-17)


@pytest.mark.parametrize("total", [2, 5, 40])
@pytest.mark.parametrize("warmup", [1, 3, 7.5, 60])
@pytest.mark.parametrize(("formula", "section"), FORMULAS)
def test_every_update_has_the_rate_of_audiocrafts_formula(
    formula: Callable[..., float], section: dict[str, Any], warmup: float, total: int
) -> None:
    assert has_the_formulas_rates(formula, section, warmup, total)


@pytest.mark.parametrize("total", [1, 40])
@pytest.mark.parametrize(("formula", "section"), FORMULAS[:6])
def test_the_formulas_hold_without_a_warmup_too(
    formula: Callable[..., float], section: dict[str, Any], total: int
) -> None:
    assert has_the_formulas_rates(formula, section, 0, total)


def test_rates_are_those_that_audiocraft_itself_computes_to_the_last_bit() -> None:
    """Values noted from Audiocraft 1.4.0a2, total 12, with the sections of SCHEDULES."""
    noted: dict[str, dict[int, float]] = {
        "cosine": {0: 0.0, 3: 0.0075, 5: 0.009468645689567597, 7: 0.0059410771314830245, 13: 0.001},
        "polynomial_decay": {2: 0.0, 4: 0.006666666666666666, 8: 0.0033326530612244895, 12: 0.0001},
        "inverse_sqrt": {0: 0.0028000000000000004, 4: 0.01, 5: 0.009128709291752768},
        "linear_warmup": {1: 0.0032500000000000003, 3: 0.007750000000000001, 4: 0.01},
    }
    for name, values in noted.items():
        found = rates_of(name, 12, 14, **SCHEDULES[name])
        assert {t: found[t] for t in values} == values


def test_step_and_exponential_are_torchs() -> None:
    assert rates_of("step", 9, 7, step_size=3, gamma=0.5) == pytest.approx(
        [LR, LR, LR, LR / 2, LR / 2, LR / 2, LR / 4]
    )
    wanted = pytest.approx([LR * 0.9**t for t in range(7)])
    assert rates_of("exponential", 9, 7, lr_decay=0.9) == wanted
    for section in ({"gamma": 0.9}, {"lr_decay": None, "gamma": 0.9}, 0.9):
        optimizer = new_optimizer()
        cfg = {"lr_scheduler": "exponential", "exponential": section}
        assert rates(optimizer, get_lr_scheduler(optimizer, cfg, 9), 7) == wanted


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("stop", [0, 1, 4, 9, 14])
def test_a_schedule_goes_on_bit_by_bit_from_a_state_of_plain_numbers(name: str, stop: int) -> None:
    cfg = schedule_cfg(name, **SCHEDULES[name])
    optimizer = new_optimizer()
    whole = rates(optimizer, get_lr_scheduler(optimizer, cfg, 12), 20)

    optimizer = new_optimizer()
    scheduler = get_lr_scheduler(optimizer, cfg, 12)
    assert scheduler is not None
    first = rates(optimizer, scheduler, stop)
    saved = json.loads(json.dumps(scheduler.state_dict(), allow_nan=False))
    assert saved == scheduler.state_dict()
    saved_optimizer = optimizer.state_dict()

    optimizer = new_optimizer()
    scheduler = get_lr_scheduler(optimizer, cfg, 12)
    assert scheduler is not None
    optimizer.load_state_dict(saved_optimizer)
    scheduler.load_state_dict(saved)
    assert first + rates(optimizer, scheduler, 20 - stop) == whole
    assert scheduler.get_last_lr() == [optimizer.param_groups[0]["lr"]]


def test_a_schedule_goes_on_from_the_state_that_audiocraft_saved() -> None:
    state = {
        "warmup_steps": 4,
        "total_steps": 12,
        "lr_min_ratio": 0.1,
        "cycle_length": 0.8,
        "base_lrs": [LR],
        "last_epoch": 7,
        "_step_count": 8,
        "verbose": False,
        "_get_lr_called_within_step": False,
        "_last_lr": [0.0059410771314830245],
    }
    optimizer = new_optimizer()
    scheduler = get_lr_scheduler(optimizer, schedule_cfg("cosine", **SCHEDULES["cosine"]), 12)
    assert scheduler is not None
    scheduler.load_state_dict(state)
    optimizer.param_groups[0]["lr"] = 0.0059410771314830245
    assert rates(optimizer, scheduler, 8) == rates_of("cosine", 12, 15, **SCHEDULES["cosine"])[7:]


def test_each_group_has_its_own_base_rate() -> None:
    one, two = nn.Linear(1, 1), nn.Linear(1, 1)
    groups = [{"params": one.parameters()}, {"params": two.parameters(), "lr": 1.0}]
    optimizer = get_optimizer(groups, {"optimizer": "sgd", "lr": 0.1})
    cfg = schedule_cfg("linear_warmup", warmup=4)
    scheduler = get_lr_scheduler(optimizer, cfg, 9)
    assert scheduler is not None
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.025, 0.25]


def test_another_total_than_the_saved_one_is_a_warning_and_the_saved_one_stands(caplog) -> None:
    cfg = schedule_cfg("cosine")
    short = get_lr_scheduler(new_optimizer(), cfg, 100)
    longer, alone = (get_lr_scheduler(new_optimizer(), cfg, total) for total in (200, 0))
    assert short is not None
    assert longer is not None
    assert alone is not None
    alone.load_state_dict(short.state_dict())
    assert caplog.text == ""
    longer.load_state_dict(short.state_dict())
    assert "saved with total_steps=100 and is 200 now: it goes on with 100" in caplog.text


def test_a_warmup_that_takes_the_whole_training_ends_at_the_base_rate() -> None:
    """E18: Audiocraft divides by zero."""
    found = rates_of("cosine", 4, 7, warmup=4, lr_min_ratio=0.1)
    assert found == pytest.approx([0, LR / 4, LR / 2, 3 * LR / 4, LR, LR / 10, LR / 10])
    assert rates_of("cosine", 0, 2, warmup=0) == [LR, 0]


def test_a_warmup_of_null_is_none_where_the_schedule_makes_sense_without() -> None:
    """E18: Audiocraft's own default, null, ends in a TypeError there."""
    for name in ("cosine", "polynomial_decay"):
        assert rates_of(name, 9, 9) == rates_of(name, 9, 9, warmup=0)
        assert rates_of(name, 9, 9)[0] == LR


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_without_updates_is_built_as_for_a_stage_alone(name: str) -> None:
    assert get_lr_scheduler(new_optimizer(), schedule_cfg(name, **SCHEDULES[name]), 0) is not None


def test_a_warmup_longer_than_the_training_is_a_warning(caplog) -> None:
    caplog.set_level(logging.WARNING)
    get_lr_scheduler(new_optimizer(), schedule_cfg("cosine", warmup=1000), 100)
    assert "schedule.cosine.warmup is 1000 updates, longer than the whole training" in caplog.text


def test_no_schedule_is_none() -> None:
    assert get_lr_scheduler(new_optimizer(), schedule_cfg(None), 10) is None
    assert get_lr_scheduler(new_optimizer(), None, 10) is None


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (schedule_cfg("inverse_sqrt"), r"inverse_sqrt needs schedule\.inverse_sqrt\.warmup, which"),
        (schedule_cfg("linear_warmup"), r"needs schedule\.linear_warmup\.warmup, which is not set"),
        (schedule_cfg("step", gamma=0.5), r"needs schedule\.step\.step_size, which is not set"),
        (schedule_cfg("step", step_size=2), r"needs schedule\.step\.gamma, which is not set"),
        (schedule_cfg("exponential"), r"needs schedule\.exponential\.lr_decay, which is not set"),
        (
            schedule_cfg("inverse_sqrt", warmup=0),
            r"schedule\.inverse_sqrt\.warmup=0: expected 1 or",
        ),
        (
            schedule_cfg("cosine", warmup=-1),
            r"schedule\.cosine\.warmup=-1: expected a number of at",
        ),
        (schedule_cfg("cosine", warmup=0.1), r"cosine\.warmup=0\.1: expected a number of updates"),
        (schedule_cfg("cosine", warmup="many"), r"schedule\.cosine\.warmup='many': expected a num"),
        (schedule_cfg("cosine", warmup=True), r"schedule\.cosine\.warmup=True: expected a number"),
        (schedule_cfg("cosine", cycle_length=0), r"schedule\.cosine\.cycle_length=0: expected a n"),
        (
            schedule_cfg("cosine", warmups=3),
            r"unknown key schedule\.cosine\.warmups: did you mean w",
        ),
        ({"lr_scheduler": "cosine", "cosine": 3}, r"schedule\.cosine=3: expected a section"),
        ({"lr_scheduler": "cosin"}, r"schedule\.lr_scheduler=cosin: .* did you mean cosine"),
        ({"lr_scheduler": "plateau"}, r"=plateau: .* there is cosine, exponential, inverse_sqrt"),
        ({"scheduler": "cosine"}, r"schedule\.lr_scheduler is not set \(what is given must be cfg"),
    ],
)
def test_a_schedule_that_cannot_be_is_one_line_with_the_full_key(cfg: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        get_lr_scheduler(new_optimizer(), cfg, 10)
    assert "\n" not in str(raised.value)


def test_a_negative_number_of_updates_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be made for -1 updates"):
        get_lr_scheduler(new_optimizer(), schedule_cfg("cosine"), -1)


def optim_cfg(optimizer: str, **sections: Any) -> Any:
    adam = {"betas": [0.8, 0.99], "weight_decay": 0.05}
    sgd = {"momentum": 0.9}
    cfg = {"epochs": 1, "lr": LR, "optimizer": optimizer, "adam": adam, "sgd": sgd, **sections}
    cfg = OmegaConf.create(cfg)
    OmegaConf.set_struct(cfg, True)
    return cfg


@pytest.mark.parametrize(
    ("name", "kind", "arguments"),
    [
        ("adam", torch.optim.Adam, {"betas": (0.8, 0.99), "weight_decay": 0.05}),
        ("adamw", torch.optim.AdamW, {"betas": (0.8, 0.99), "weight_decay": 0.05}),
        ("AdamW", torch.optim.AdamW, {"betas": (0.8, 0.99), "weight_decay": 0.05}),
        ("sgd", torch.optim.SGD, {"momentum": 0.9}),
        ("rmsprop", torch.optim.RMSprop, {"alpha": 0.9}),
        ("adagrad", torch.optim.Adagrad, {}),
        ("NAdam", torch.optim.NAdam, {}),
        ("rprop", torch.optim.Rprop, {"etas": (0.4, 1.5)}),
    ],
)
def test_an_optimizer_is_built_by_its_name_with_its_section(
    name: str, kind: type[torch.optim.Optimizer], arguments: dict[str, Any]
) -> None:
    sections = {"rmsprop": {"alpha": 0.9}, "rprop": {"etas": [0.4, 1.5]}}
    optimizer = get_optimizer(nn.Linear(2, 1), optim_cfg(name, **sections))
    assert type(optimizer) is kind
    assert {key: optimizer.defaults[key] for key in arguments} == arguments
    assert optimizer.defaults["lr"] == LR


def test_the_state_of_an_optimizer_holds_nothing_of_the_configuration() -> None:
    state = get_optimizer(nn.Linear(2, 1), optim_cfg("adamw")).state_dict()
    assert all(type(v) in (int, float, bool, tuple, list, type(None)) for v in options(state))


def options(state: dict[str, Any]) -> list[Any]:
    return [value for group in state["param_groups"] for value in group.values()]


def test_interpolations_and_plain_dicts_are_read_alike() -> None:
    root = OmegaConf.create({"decay": 0.3, "optim": {"adam": {"weight_decay": "${decay}"}}})
    adam = root.optim.adam
    for cfg in (
        {"optimizer": "adamw", "lr": 1, "adam": adam},
        {"optimizer": "adamw", "lr": 1, "adam": {"weight_decay": 0.3}},
    ):
        assert get_optimizer(nn.Linear(2, 1), cfg).defaults["weight_decay"] == 0.3


class Bias(nn.Module):
    def __init__(self, wanted: list[nn.Parameter] | None = None) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(2))
        self.wanted = wanted

    def make_optim_group(self) -> dict[str, Any]:
        return {"params": iter(self.wanted or [self.bias]), "lr": 0.5}


def test_modules_give_groups_of_their_own_after_that_of_all_others() -> None:
    model = nn.Sequential(nn.Linear(2, 2), Bias())
    groups = get_optim_parameter_groups(model)
    assert [len(group["params"]) for group in groups] == [2, 1]
    optimizer = get_optimizer(model, optim_cfg("sgd"))
    assert [group["lr"] for group in optimizer.param_groups] == [LR, 0.5]
    assert len(get_optimizer(Bias(), optim_cfg("adam")).param_groups) == 2


def test_a_wrapper_that_answers_for_its_inner_module_adds_no_second_group() -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("inner"), name)

    assert [len(g["params"]) for g in get_optim_parameter_groups(Wrapper(Bias()))] == [0, 1]


def test_a_parameter_that_two_modules_put_into_their_groups_is_an_error_that_names_them() -> None:
    first = Bias()
    with pytest.raises(ValueError, match="modules '0' and '1' give the same parameter"):
        get_optim_parameter_groups(nn.Sequential(first, Bias([first.bias])))


def test_parameters_may_come_as_a_generator_by_name_or_in_groups() -> None:
    model = nn.Linear(2, 1)
    for params in (
        model.parameters(),
        model.named_parameters(),
        [{"params": model.parameters()}],
        [{"params": model.weight}, {"params": [model.bias]}],
    ):
        optimizer = get_optimizer(params, optim_cfg("adam"))
        assert sum(len(group["params"]) for group in optimizer.param_groups) == 2


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (
            optim_cfg("adamv"),
            r"optim\.optimizer=adamv: torch\.optim has no such .* did you mean ad",
        ),
        (optim_cfg("???"), r"optim\.optimizer is not set \(what is given must be cfg\.optim\)"),
        ({"optim": optim_cfg("adam")}, r"optim\.optimizer is not set \(what is given must be cfg"),
        (optim_cfg("adam", lr="???"), r"optim\.lr is not set"),
        (optim_cfg("adam", lr="fast"), r"optim\.lr='fast': expected a number"),
        (optim_cfg("adam", lr=-1), r"optim\.lr=-1: expected a number of at least 0"),
        (
            optim_cfg("adam", adam={"foo": 1}),
            r"unknown key optim\.adam\.foo: there is amsgrad, bet",
        ),
        (
            optim_cfg("adamw", adam={"beta": 1}),
            r"unknown key optim\.adam\.beta: did you mean betas",
        ),
        (optim_cfg("adam", adam={"lr": 1}), r"unknown key optim\.adam\.lr"),
        (optim_cfg("sgd", sgd={"momentums": 1}), r"optim\.sgd\.momentums: did you mean momentum"),
        (optim_cfg("adamw", adamw={"eps": 1}), r"optim\.adamw is not read: .* in optim\.adam"),
        (optim_cfg("adam", adam=3), r"optim\.adam=3: expected a section"),
        (optim_cfg("adam", adam={"betas": 0.9}), r"optimizer=adam does not work with .*betas=0\.9"),
        (
            optim_cfg("adam", adam={"betas": [0, 2]}),
            r"does not work with .*: Invalid beta parameter",
        ),
    ],
)
def test_an_optimizer_that_cannot_be_is_one_line_with_the_full_key(cfg: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        get_optimizer(nn.Linear(2, 1), cfg)
    assert "\n" not in str(raised.value)


def test_nothing_to_train_is_an_error() -> None:
    frozen = nn.Linear(2, 1).requires_grad_(False)
    for params in (frozen, nn.Module(), [], frozen.named_parameters()):
        with pytest.raises(ConfigError, match="nothing to train"):
            get_optimizer(params, optim_cfg("adam"))


def test_frozen_parameters_stay_in_the_groups_for_the_day_they_are_thawed() -> None:
    model = nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    assert len(get_optimizer(model, optim_cfg("adam")).param_groups[0]["params"]) == 2


def scaled_step(scaler: torch.amp.GradScaler) -> torch.Tensor:
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler.scale(model(torch.ones(3, 2)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    return model.weight.detach()


def test_the_gradient_scaler_works_for_float16_only_and_else_changes_nothing() -> None:
    for dtype in (torch.float16, "float16"):
        scaler = make_grad_scaler("cpu", dtype)
        assert scaler.is_enabled()
        assert json.loads(json.dumps(scaler.state_dict())) == scaler.state_dict()
    off = [
        make_grad_scaler("cpu", torch.bfloat16),
        make_grad_scaler(torch.device("cpu"), torch.float32),
        make_grad_scaler("cuda:0", "bfloat16"),
        make_grad_scaler("cpu", torch.float16, enabled=False),
    ]
    for scaler in off:
        assert not scaler.is_enabled()
        assert scaler.state_dict() == {}
        scaler.load_state_dict({})
    assert torch.equal(scaled_step(off[0]), scaled_step(off[-1]))
    assert torch.allclose(scaled_step(make_grad_scaler("cpu", "float16")), scaled_step(off[0]))
