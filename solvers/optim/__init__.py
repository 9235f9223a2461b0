"""Optimizers, schedules and gradient scaling from the configuration."""

from .builders import (
    get_lr_scheduler,
    get_optim_parameter_groups,
    get_optimizer,
    make_grad_scaler,
)

__all__ = ["get_lr_scheduler", "get_optim_parameter_groups", "get_optimizer", "make_grad_scaler"]
