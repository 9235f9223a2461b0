"""A denoiser, with a learned scale that is registered late and metrics by range of noise."""

import math

import flashy
import torch
from omegaconf import DictConfig
from torch import nn

import solvers as base
from solvers.optim import builders

from .compression import CompressionSolver
from .data import all_splits


class PerStageMetrics:
    """Metrics by range of noise: not every batch has all of them."""

    def __init__(self, num_stages: int) -> None:
        self.num_stages = num_stages

    def __call__(self, loss: torch.Tensor, step: torch.Tensor) -> dict:
        stages = (step * self.num_stages).long()
        found = stages.unique().tolist()
        return {f"loss_{stage}": loss[stages == stage].mean() for stage in found}


class SampleProcessor(nn.Module):
    """Learns the scale of its input, in buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(1))
        self.register_buffer("sum_x2", torch.zeros(4))

    def project_sample(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.counts += len(x)
            self.sum_x2 += x.square().sum(0)
        return x / (self.sum_x2 / self.counts).sqrt().clamp(min=0.1)


class DiffusionSolver(base.StandardSolver):
    def __init__(self, cfg: DictConfig) -> None:
        super().__init__(cfg)
        self.cfg = cfg
        self.device = cfg.device
        self.sample_rate: int = self.cfg.sample_rate
        self.codec_model = CompressionSolver.model_from_checkpoint(
            cfg.compression_model_checkpoint, device=self.device
        )
        self.sample_processor = SampleProcessor()
        self.register_stateful("sample_processor")
        self.sample_processor.to(self.device)
        # Theirs is a schedule of noise.
        self.schedule = dict(cfg.schedule)
        self.eval_metric: nn.Module | None = None

    @property
    def best_metric_name(self) -> str | None:
        return "rvm" if self._current_stage == "evaluate" else "loss"

    def build_model(self) -> None:
        self.model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
        self.optimizer = builders.get_optimizer(self.model.parameters(), self.cfg.optim)
        self.register_stateful("model", "optimizer")
        self.register_best_state("model")
        self.register_ema("model")

    def build_dataloaders(self) -> None:
        self.dataloaders = all_splits()

    def show(self) -> None:
        raise NotImplementedError

    def run_step(self, idx: int, batch: torch.Tensor, metrics: dict) -> dict:
        x = self.sample_processor.project_sample(batch.to(self.device))
        step = torch.rand(len(x), 1)
        angle = step * math.pi / 2
        noise = torch.randn_like(x)
        out = self.model(torch.cat([x * angle.cos() + noise * angle.sin(), step], 1))
        loss = (out - noise).square().mean(1)
        if self.is_training:
            loss.mean().backward()
            flashy.distrib.sync_model(self.model)
            self.optimizer.step()
            self.optimizer.zero_grad()
        metrics = {"loss": loss.mean()}
        metrics.update(self.per_stage(loss, step[:, 0]))
        return metrics

    def run_epoch(self) -> None:
        self.rng = torch.Generator()
        self.rng.manual_seed(1234 + self.epoch)
        self.per_stage = PerStageMetrics(self.cfg.metrics.num_stage)
        super().run_epoch()

    def evaluate(self) -> dict:
        self.model.eval()
        loader = self.dataloaders["evaluate"]
        lp = self.log_progress(
            f"{self.current_stage} estimate", loader, total=len(loader), updates=self.log_updates
        )
        metrics: dict = {}
        for n, batch in enumerate(lp, 1):
            rvm = {"rvm": (self.regenerate(batch) - batch).abs().mean()}
            lp.update(**rvm)
            for key, value in rvm.items():
                metrics[key] = (metrics.get(key, 0) * (n - 1) + value) / n
        return flashy.distrib.average_metrics(metrics)

    @torch.no_grad()
    def regenerate(self, wav: torch.Tensor) -> torch.Tensor:
        estimate: torch.Tensor = self.model(torch.cat([torch.randn_like(wav), wav[:, :1]], 1))
        return estimate

    def generate(self) -> None:
        self.model.eval()
        for batch in self.log_progress(f"{self.current_stage}", self.dataloaders["generate"]):
            self.regenerate(batch)
        flashy.distrib.barrier()
