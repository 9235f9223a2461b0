"""Imports that a first training step makes, done once, before processes are forked.

A forked rank inherits the modules of its parent process. An import that is left to the rank is
repeated by every rank of every test: torch imports its compiler at the first optimizer step, which
takes half of the CPU time of a short run.
"""
# ruff: noqa: F401

import torch._dynamo
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor

import checkpoint.saving.sharded_parts
import solvers.base
import solvers.launch.hydra_main
import solvers.launch.run
