"""Forty places, one a module, in which the tests must find a break."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Break:
    """A small change of meaning in one module.

    Attributes:
        name: for the command line.
        what: what the broken code does.
        file: the module, from the root of the clone.
        old: text that the file has exactly once.
        new: the broken text.
        tests: test files that should find the break, the fastest first.
    """

    name: str
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


BREAKS: tuple[Break, ...] = (
    Break(
        "deletion-order",
        "a deletion removes the data while the commit record still stands",
        "checkpoint/run_folder/deletion.py",
        "    storage.turn_into_mark(name, MANIFEST, UNFINISHED)\n",
        "",
        (
            "tests/faults/test_kit.py",
            "tests/checkpoint/test_retention.py",
            "tests/faults/test_campaign.py",
        ),
    ),
    Break(
        "fsync-of-file",
        "a new file is not synced",
        "checkpoint/storage/new_file.py",
        "                os.fsync(handle)\n",
        "                pass\n",
        ("tests/faults/test_power_loss.py", "tests/checkpoint/test_storage.py"),
    ),
    Break(
        "fsync-before-commit",
        "the folder is not synced before its manifest is renamed into place",
        "checkpoint/storage/local.py",
        "                sync_folder(path.parent)\n                check()",
        "                check()",
        ("tests/faults/test_power_loss.py", "tests/checkpoint/test_storage.py"),
    ),
    Break(
        "link-rule",
        "a file is linked that the previous checkpoint shares, so one damage hits both newest ones",
        "checkpoint/saving/file_writer.py",
        "if seen is None or seen.identity in taken or seen",
        "if seen is None or seen",
        ("tests/checkpoint/test_links.py",),
    ),
    Break(
        "trust-of-damaged-file",
        "a file with another digest counts as whole and is linked",
        "checkpoint/run_folder/file_trust.py",
        "        if found != digest:\n",
        "        if False:\n",
        ("tests/checkpoint/test_trusted_links.py", "tests/checkpoint/test_links.py"),
    ),
    Break(
        "retention-count",
        "one rolling checkpoint fewer is kept, so there is no fallback",
        "checkpoint/retention/rules.py",
        "if ROLLING in one.reasons][-count:]",
        "if ROLLING in one.reasons][1 - count :]",
        ("tests/checkpoint/test_rules.py", "tests/checkpoint/test_retention.py"),
    ),
    Break(
        "disk-budget",
        "a linked file counts once for each name",
        "checkpoint/retention/disk_budget.py",
        "self.bytes += 0 if self._names[file.identity] else file.size",
        "self.bytes += file.size",
        ("tests/checkpoint/test_rules.py", "tests/checkpoint/test_keeping.py"),
    ),
    Break(
        "codec-parameter",
        "a frozen parameter comes back trainable",
        "checkpoint/format/codec.py",
        '"requires_grad": tensor.requires_grad}',
        '"requires_grad": True}',
        ("tests/checkpoint/test_codec.py", "tests/checkpoint/test_state_values.py"),
    ),
    Break(
        "decode-tied-strides",
        "a tensor with strides of its own is copied once for each of its names",
        "checkpoint/format/decode.py",
        "        if name not in self._copied:\n            self._copied[name] = rest",
        "        if True:\n            self._copied[name] = rest",
        (
            "tests/checkpoint/test_odd_strides.py",
            "tests/faults/test_damage.py",
        ),
    ),
    Break(
        "tree-digest",
        "the digest of a file leaves out a last part that is cut short",
        "checkpoint/format/digest.py",
        "        if self._is_within:\n            whole",
        "        if False:\n            whole",
        ("tests/checkpoint/test_hashing.py", "tests/faults/test_damage.py"),
    ),
    Break(
        "zstd-surplus",
        "a compressed file may hold more than its manifest says",
        "checkpoint/format/compression.py",
        "        if surplus:\n",
        "        if False:\n",
        ("tests/checkpoint/test_zstd.py",),
    ),
    Break(
        "pickle-memory",
        "a foreign file may claim any amount of memory",
        "checkpoint/foreign/memory_budget.py",
        "        if self._left < 0:\n",
        "        if False:\n",
        ("tests/checkpoint/test_unpickle.py", "tests/checkpoint/test_foreign.py"),
    ),
    Break(
        "lock-refusal",
        "a second process enters a folder that is locked",
        "checkpoint/storage/lock.py",
        "    if is_locked is False:\n        raise",
        "    if False:\n        raise",
        ("tests/checkpoint/test_locks.py",),
    ),
    Break(
        "lock-file-replaced",
        "a process goes on after its lock file was replaced by that of another one",
        "checkpoint/storage/lock_file.py",
        "        if _identity(there) != _identity(ours):\n",
        "        if False:\n",
        ("tests/checkpoint/test_locks.py", "tests/checkpoint/test_storage.py"),
    ),
    Break(
        "claim-of-deletion",
        "a checkpoint is deleted while another thread saves it",
        "checkpoint/run_folder/claims.py",
        "        yield claim.rival is None\n",
        "        yield True\n",
        (
            "tests/checkpoint/test_locks.py",
            "tests/checkpoint/test_retention.py",
            "tests/checkpoint/test_background.py",
        ),
    ),
    Break(
        "background-error",
        "the error of a save in the background is lost",
        "checkpoint/saving/background_worker.py",
        "            self._failure = error\n",
        "            pass\n",
        ("tests/checkpoint/test_background.py",),
    ),
    Break(
        "rank-that-failed",
        "the report of a rank that could not write its part is ignored",
        "checkpoint/saving/save_job.py",
        '            if "failed" in report:\n',
        "            if False:\n",
        (
            "tests/checkpoint/test_background.py",
            "tests/checkpoint/test_ranks.py",
            "tests/solvers/test_parallel.py",
        ),
    ),
    Break(
        "threshold-once",
        "a metric that stays beyond its threshold asks for a save in each epoch",
        "checkpoint/scheduling/triggers.py",
        "        return self.held == self.patience\n",
        "        return self.held >= self.patience\n",
        ("tests/checkpoint/test_threshold.py",),
    ),
    Break(
        "resolve-unfinished",
        "a folder with a copy of the manifest and the mark of a deletion counts as committed",
        "checkpoint/run_folder/resolve.py",
        "    return (path / COPY).exists() and not (path / UNFINISHED).exists()\n",
        "    return (path / COPY).exists()\n",
        ("tests/checkpoint/test_resolve.py", "tests/checkpoint/test_commit_records.py"),
    ),
    Break(
        "tensor-digest",
        "a tensor with another digest is loaded",
        "checkpoint/format/safetensors_reader.py",
        "    if str(digest) != expected:\n",
        "    if False:\n",
        (
            "tests/checkpoint/test_hashing.py",
            "tests/faults/test_damage.py",
        ),
    ),
    Break(
        "ema-decay",
        "the weight of the past does not decay",
        "solvers/weights/ema.py",
        "        self.count = self.count * self.decay + 1\n",
        "        self.count = self.count + 1\n",
        ("tests/solvers/test_best_and_ema.py",),
    ),
    Break(
        "best-comparison",
        "each epoch with a finite metric is the best",
        "solvers/weights/shadow_weights.py",
        "if metrics.is_better(score, None if best is None else best[0], mode):",
        "if metrics.is_better(score, None, mode):",
        ("tests/solvers/test_best_and_ema.py",),
    ),
    Break(
        "metric-weights",
        "each batch counts the same in an average, whatever its number of samples",
        "solvers/metrics.py",
        "                sum_ += weight\n",
        "                sum_ += 1\n",
        ("tests/solvers/test_metrics_of_batches.py",),
    ),
    Break(
        "swap-restore",
        "tensors that were replaced in a swap block stay replaced",
        "solvers/state/swap.py",
        "        for holder, kept in self._places:\n            holder.update(kept)\n",
        "",
        ("tests/solvers/test_swap.py",),
    ),
    Break(
        "sampler-order",
        "the second pass of an epoch has the order of the first",
        "solvers/data/epoch_sampler.py",
        "derived_seeds(1, self.seed, epoch, number)",
        "derived_seeds(1, self.seed, epoch, 0)",
        ("tests/solvers/test_sampling.py",),
    ),
    Break(
        "pass-position",
        "a resumed pass forgets where it began",
        "solvers/data/resumable_passes.py",
        'begun["offset"] + self._reading.given * sampler.step_size',
        "self._reading.given * sampler.step_size",
        (
            "tests/solvers/test_sampling.py",
            "tests/solvers/test_data.py",
            "tests/solvers/test_parallel.py",
        ),
    ),
    Break(
        "rng-restore",
        "NumPy's generator is not restored",
        "solvers/state/rng.py",
        '        np.random.set_state(state["numpy"])\n',
        "",
        ("tests/solvers/test_randomness.py", "tests/solvers/test_resume.py"),
    ),
    Break(
        "nonfinite-skip",
        "an update that is left out keeps its gradients",
        "solvers/health/nonfinite_guard.py",
        "                parameter.grad = None\n",
        "                pass\n",
        ("tests/solvers/test_nonfinite.py",),
    ),
    Break(
        "pending-gradients",
        "a gradient to which something was added counts as unchanged",
        "solvers/state/pending_gradients.py",
        " and gradient() is grad and grad._version == version\n",
        " and gradient() is grad\n",
        (
            "tests/solvers/test_gradients.py",
            "tests/solvers/test_exception.py",
        ),
    ),
    Break(
        "boundary-near",
        "after an error in an update, half of that update is saved",
        "solvers/persistence/rollback.py",
        "            and self._versions == [one._version for one in self._parameters]\n",
        "",
        ("tests/solvers/test_exception.py",),
    ),
    Break(
        "restore-plan",
        "continue_from goes before the checkpoint of the run itself",
        "solvers/persistence/restore_plan.py",
        "    if own is not None:\n        why",
        "    if own is not None and not continue_from:\n        why",
        (
            "tests/solvers/test_restore.py",
            "tests/compat/test_audiocraft_contract.py",
        ),
    ),
    Break(
        "settings-range",
        "keep_rolling may be 1, so there is no fallback",
        "solvers/settings/schema.py",
        "keep_rolling: Annotated[Integer, Field(ge=2)] = 2",
        "keep_rolling: Annotated[Integer, Field(ge=1)] = 2",
        (
            "tests/solvers/test_config.py",
            "tests/test_config_keys.py",
            "tests/checkpoint/test_keeping.py",
        ),
    ),
    Break(
        "optimizer-arguments",
        "lists of the configuration reach torch's optimizers as lists",
        "solvers/optim/builders.py",
        "{key: tuple(v) if isinstance(v, list) else v for key, v in arguments.items()}",
        "arguments",
        ("tests/solvers/test_optim.py",),
    ),
    Break(
        "progress-of-threshold",
        "a resumed run forgets how long a metric was beyond its threshold",
        "solvers/state/progress.py",
        '        self.held = state.get("held", 0)\n',
        "        self.held = 0\n",
        ("tests/checkpoint/test_threshold.py",),
    ),
    Break(
        "early-stopping",
        "min_delta makes it easier to be better",
        "solvers/loop/early_stop.py",
        'return best - self.min_delta if self.mode == "min" else best + self.min_delta',
        'return best + self.min_delta if self.mode == "min" else best - self.min_delta',
        ("tests/solvers/test_endings.py",),
    ),
    Break(
        "second-interrupt",
        "a second ctrl-C does not end the run",
        "solvers/persistence/preemption.py",
        "            raise KeyboardInterrupt\n",
        "            pass\n",
        ("tests/faults/test_interrupts.py",),
    ),
    Break(
        "rehearsal-globals",
        "the rehearsal does not look at globals",
        "solvers/rehearsal/probe.py",
        "of_globals(solver, hide) | of_environment(self._environment)",
        "of_environment(self._environment)",
        ("tests/solvers/test_rehearsal.py",),
    ),
    Break(
        "resume-check",
        "a resumed run does not compare its generators",
        "solvers/persistence/resume_check.py",
        '            taken[f"the generator of {shown}"] = _digest(one)\n',
        "            pass\n",
        ("tests/solvers/test_fingerprint.py", "tests/solvers/test_resume.py"),
    ),
    Break(
        "unregistered-optimizer",
        "an optimizer that no source keeps is accepted",
        "solvers/state/registry.py",
        "        if is_optimizer(value) and id(value) not in kept:\n",
        "        if False:\n",
        (
            "tests/solvers/test_registering.py",
            "tests/solvers/test_guards.py",
            "tests/solvers/test_unusual.py",
        ),
    ),
    Break(
        "save-before-evaluate",
        "a crash in evaluate loses the trained weights",
        "solvers/persistence/mid_epoch.py",
        'if due if before == "valid" else self._context.settings.checkpoint.save_last:',
        "if due:",
        ("tests/solvers/test_resume.py", "tests/solvers/test_mid_epoch.py"),
    ),
)
