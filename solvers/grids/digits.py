"""The digits demo at two learning rates and two averages: `dora grid digits`."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import treetable
from dora.explore import Explorer, Launcher

from ..metrics import best_score


class DigitsExplorer(Explorer):
    """Shows, for each experiment, its losses and what its drawn digits are worth."""

    def get_grid_metrics(self) -> list[Any]:
        """Return the columns of the table."""
        columns = {
            "train": {"epoch": "d", "loss": ".4f"},
            "valid": {"loss": ".4f", "best": ".4f"},
            "evaluate": {"accuracy": ".1%", "distance": ".4f"},
        }
        return [
            treetable.group(stage, [treetable.leaf(name, form) for name, form in leaves.items()])
            for stage, leaves in columns.items()
        ]

    def process_history(self, history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the row of one experiment: the latest value of each metric, and the best loss."""
        row: dict[str, Any] = {"train": {"epoch": len(history)}}
        for stages in history:
            for stage, metrics in stages.items():
                row.setdefault(stage, {}).update(metrics)
        best = best_score(history, "valid", "loss", "min")
        if best is not None:
            row["valid"]["best"] = best[0]
        return row


@DigitsExplorer
def explorer(launcher: Launcher) -> None:
    launcher.bind_({"solver": "digits"})
    with launcher.job_array():
        for lr, decay in product([1e-3, 2e-3], [0.99, 0.995]):
            launcher({"optim.lr": lr, "optim.ema.decay": decay})
