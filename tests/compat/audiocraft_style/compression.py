"""An autoencoder with a codebook, trained against an adversary that has its own optimizer."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import flashy
import torch
from omegaconf import DictConfig
from torch import nn

import solvers as base
from solvers import audiocraft as checkpoint
from solvers.optim import builders

from .data import all_splits


class Quantizer(nn.Module):
    """A codebook that learns without gradients, with a flag in an integer buffer."""

    def __init__(self, bins: int, dimension: int) -> None:
        super().__init__()
        self.register_buffer("inited", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("codebook", torch.randn(bins, dimension))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        codes = torch.cdist(z.detach(), self.codebook).argmin(-1)
        if self.training:
            self.inited += 1
            # Not in place: the buffer is another tensor afterwards.
            means = torch.zeros_like(self.codebook).index_add(0, codes, z.detach())
            self.codebook = 0.9 * self.codebook + 0.1 * means
        return codes


class CompressionModel(nn.Module):
    def __init__(self, cfg: DictConfig) -> None:
        super().__init__()
        self.sample_rate = cfg.sample_rate
        self.cardinality = cfg.bins
        self.encoder = nn.Linear(4, 3)
        self.decoder = nn.Linear(3, 4)
        self.quantizer = Quantizer(cfg.bins, 3)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        codes: torch.Tensor = self.quantizer(self.encoder(x))
        return codes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.encoder(x)
        codes = self.quantizer(z)
        y: torch.Tensor = self.decoder(z + (self.quantizer.codebook[codes] - z).detach())
        return y


class AdversarialLoss(nn.Module):
    """Trains an adversary with an optimizer whose state is inside that of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.adversary = nn.Linear(4, 1)
        self.optimizer = torch.optim.Adam(self.adversary.parameters(), lr=0.01)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> Any:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "optimizer"] = self.optimizer.state_dict()
        return destination

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kw: Any) -> None:
        self.optimizer.load_state_dict(state_dict.pop(prefix + "optimizer"))
        super()._load_from_state_dict(state_dict, prefix, *args, **kw)

    def train_adv(self, fake: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        loss = (
            self.adversary(fake.detach()).relu().mean() - self.adversary(real).clamp(max=1).mean()
        )
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def forward(self, fake: torch.Tensor) -> torch.Tensor:
        return -self.adversary(fake).mean()


class CompressionSolver(base.StandardSolver):
    def __init__(self, cfg: DictConfig) -> None:
        super().__init__(cfg)
        self.rng: torch.Generator  # set at each epoch
        self.adv_losses = nn.ModuleDict({"msd": AdversarialLoss()})
        self.aux_losses = nn.ModuleDict()
        self.info_losses = nn.ModuleDict({"l1": nn.L1Loss()})
        assert not cfg.fsdp.use
        self.register_stateful("adv_losses")

    @property
    def best_metric_name(self) -> str | None:
        return None

    def build_model(self) -> None:
        self.model = CompressionModel(self.cfg).to(self.device)
        self.optimizer = builders.get_optimizer(self.model.parameters(), self.cfg.optim)
        self.register_stateful("model", "optimizer")
        self.register_best_state("model")
        self.register_ema("model")

    def build_dataloaders(self) -> None:
        self.dataloaders = all_splits()

    def show(self) -> None:
        self.log_model_summary(self.model)
        self.log_model_summary(self.adv_losses)
        self.logger.info(self.info_losses)

    def run_step(self, idx: int, batch: torch.Tensor, metrics: dict) -> dict:
        x = batch.to(self.device)
        y = self.model(x)
        if self.is_training and torch.rand(1, generator=self.rng).item() <= 0.7:
            metrics["d_loss"] = self.adv_losses["msd"].train_adv(y, x)
        metrics["adv"] = self.adv_losses["msd"](y)
        loss = (x - y).square().mean() + 0.1 * metrics["adv"]
        if self.is_training:
            loss.backward()
            flashy.distrib.sync_model(self.model)
            self.optimizer.step()
            self.optimizer.zero_grad()
        metrics["l1"] = self.info_losses["l1"](y, x)
        return metrics

    def run_epoch(self) -> None:
        self.rng = torch.Generator()
        self.rng.manual_seed(1234 + self.epoch)
        super().run_epoch()

    def evaluate(self) -> dict:
        self.model.eval()
        stage = str(self.current_stage)
        loader = self.dataloaders["evaluate"]
        lp = self.log_progress(
            f"{stage} inference", loader, total=len(loader), updates=self.log_updates
        )
        average = flashy.averager()
        with ThreadPoolExecutor(1) as pool:
            pendings = [pool.submit(_reconstruction, self.model(batch), batch) for batch in lp]
            metrics: dict = {}
            for pending in self.log_progress(
                f"{stage} metrics", pendings, updates=self.log_updates
            ):
                metrics = average(pending.result())
        return flashy.distrib.average_metrics(metrics, len(loader))

    def generate(self) -> None:
        self.model.eval()
        folder = Path(self.xp.folder) / self.xp.cfg.generate.get("path", "samples")
        folder.mkdir(exist_ok=True)
        for batch in self.log_progress(str(self.current_stage), self.dataloaders["generate"]):
            estimate = self.model(batch + 0.1 * torch.randn_like(batch))
            (folder / f"{self.epoch}.txt").write_text(str(estimate.tolist()))
        flashy.distrib.barrier()

    def load_from_pretrained(self, name: str) -> dict:
        torch.manual_seed(len(name))
        return {"best_state": {"model": CompressionModel(self.cfg).state_dict()}}

    @staticmethod
    def model_from_checkpoint(checkpoint_path: Path | str, device: str = "cpu") -> CompressionModel:
        path = checkpoint.resolve_checkpoint_path(str(checkpoint_path), use_fsdp=False)
        assert path is not None, f"Could not resolve: {checkpoint_path}"
        state = checkpoint.load_checkpoint(path)
        assert state is not None
        assert "xp.cfg" in state
        cfg = state["xp.cfg"]
        cfg.device = device
        model = CompressionModel(cfg).to(cfg.device)
        assert model.sample_rate == cfg.sample_rate
        assert "best_state" in state
        assert state["best_state"] != {}
        assert "exported" not in state
        model.load_state_dict(state["best_state"]["model"])
        model.eval()
        return model


def _reconstruction(y: torch.Tensor, x: torch.Tensor) -> dict:
    return {"sisnr": (x - y).square().mean()}
