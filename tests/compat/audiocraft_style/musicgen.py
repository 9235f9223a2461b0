"""A language model on the codes of a codec that another experiment trained."""

from typing import Any

import flashy
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

import solvers as base
from solvers.optim import builders

from .compression import CompressionSolver
from .data import all_splits, audio


class CachedLoader:
    """Batches of another source; an epoch must be announced before it is read."""

    def __init__(self, batches: list[torch.Tensor]) -> None:
        self.batches = batches
        self.epoch: int | None = None

    def start_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        assert self.epoch is not None
        shift = self.epoch % len(self.batches)
        return iter(self.batches[shift:] + self.batches[:shift])


class LanguageModel(nn.Module):
    def __init__(self, card: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(card, 8)
        self.dropout = nn.Dropout(0.1)
        self.linear = nn.Linear(8, card, bias=False)
        self.linear.weight = self.emb.weight

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.linear(self.dropout(self.emb(codes)))
        return logits


class MusicGenSolver(base.StandardSolver):
    def __init__(self, cfg: DictConfig) -> None:
        super().__init__(cfg)
        self.generation_params = {"temp": 1.0, "top_k": 0}
        self._best_metric_name: str | None = "ce"
        self._cached_batch_loader = CachedLoader(audio(7, 6))
        self.dataloaders["original_train"] = self.dataloaders["train"]
        self.dataloaders["train"] = self._cached_batch_loader

    @staticmethod
    def get_eval_solver_from_sig(
        sig: str, autocast: bool = True, override_cfg: Any = None, **kwargs: Any
    ) -> Any:
        from . import train

        override_cfg = OmegaConf.merge(
            DictConfig(override_cfg or {}),
            DictConfig({"optim": {"ema": {"use": False}}, "autocast": autocast}),
        )
        solver = train.get_solver_from_sig(
            sig,
            override_cfg=override_cfg,
            load_best=True,
            disable_fsdp=True,
            ignore_state_keys=["optimizer", "ema"],
            **kwargs,
        )
        solver.model.eval()
        return solver

    def get_formatter(self, stage_name: str) -> flashy.Formatter:
        return flashy.Formatter({"lr": ".2E", "ce": ".3f"}, exclude_keys=["ppl*"])

    @property
    def best_metric_name(self) -> str | None:
        return self._best_metric_name

    def initialize_optimization(self) -> None:
        if self.cfg.fsdp.use:
            self.model = self.wrap_with_fsdp(self.model)
        self.register_ema("model")
        self.optimizer = builders.get_optimizer(
            builders.get_optim_parameter_groups(self.model), self.cfg.optim
        )
        self.lr_scheduler = builders.get_lr_scheduler(
            self.optimizer, self.cfg.schedule, self.total_updates
        )
        self.register_stateful("model", "optimizer", "lr_scheduler")
        self.register_best_state("model")
        self.autocast_dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16}[
            self.cfg.autocast_dtype
        ]
        self.scaler: Any = None
        if self.cfg.autocast and self.autocast_dtype is torch.float16:
            self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
            self.register_stateful("scaler")

    def build_model(self) -> None:
        # Magnet writes into its configuration here.
        self.cfg.transformer_lm.segment_duration = 3
        self.compression_model = CompressionSolver.model_from_checkpoint(
            self.cfg.compression_model_checkpoint, device=self.device
        )
        assert self.compression_model.sample_rate == self.cfg.sample_rate
        self.model = LanguageModel(self.compression_model.cardinality).to(self.device)
        self.initialize_optimization()

    def build_dataloaders(self) -> None:
        self.dataloaders = all_splits()

    def show(self) -> None:
        self.log_model_summary(self.compression_model)
        self.log_model_summary(self.model)

    def load_state_dict(self, state: dict) -> None:
        if "condition_provider" in state:
            for key, value in state.pop("condition_provider").items():
                state["model"][key] = value
        super().load_state_dict(state)

    def load_from_pretrained(self, name: str) -> dict:
        torch.manual_seed(len(name))
        return {"best_state": {"model": LanguageModel(self.cfg.bins).state_dict()}}

    def run_step(self, idx: int, batch: torch.Tensor, metrics: dict) -> dict:
        assert self.device == "cpu"
        with torch.no_grad():
            codes = self.compression_model.encode(batch.to(self.device))
        with self.autocast:
            conditions = torch.zeros(1)
        self.deadlock_detect.update("tokens_and_conditions")
        with self.autocast:
            logits = self.model(codes)
            ce = nn.functional.cross_entropy(logits.float(), codes.roll(1)) + conditions.sum()
        self.deadlock_detect.update("loss")
        if self.is_training:
            metrics["lr"] = self.optimizer.param_groups[0]["lr"]
            loss = ce if self.scaler is None else self.scaler.scale(ce)
            loss.backward()
            if self.scaler is None:
                self.optimizer.step()
            else:
                self.scaler.unscale_(self.optimizer)
                self.scaler.step(self.optimizer)
                self.scaler.update()
                metrics["grad_scale"] = self.scaler.get_scale()
            if self.lr_scheduler:
                self.lr_scheduler.step()
            self.optimizer.zero_grad()
            self.deadlock_detect.update("optim")
        metrics["ce"] = ce
        metrics["ppl"] = torch.exp(ce)
        return metrics

    def run_epoch(self) -> None:
        if self.cfg.cache.write and (self.epoch - 1) % self.cfg.cache.write_num_shards != 0:
            return
        super().run_epoch()

    def train(self) -> dict:
        self._cached_batch_loader.start_epoch(self.epoch)
        return super().train()

    def evaluate(self) -> dict:
        self.model.eval()
        with torch.no_grad():
            metrics: dict = {}
            metrics.update(self.common_train_valid("evaluate"))
            return {**metrics, "text_consistency": torch.tensor(0.5)}

    def generate(self) -> dict:
        self.model.eval()
        with torch.no_grad():
            return {"rtf": torch.rand(1)}
