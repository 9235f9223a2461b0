import logging
import os
from pathlib import Path

from dora.explore import ProcessException

from solvers import ConfigError
from solvers.launch.command_errors import _mistake
from solvers.log import setup_logging


def test_each_problem_is_a_line_also_from_the_processes_in_which_a_grid_composes() -> None:
    for problems in (("one",), ("one", 'it\'s "two"')):
        error = ConfigError(*problems)
        told = "\nerror: ".join(problems)
        assert _mistake(error) == _mistake(ProcessException(repr(error))) == told
    assert _mistake(ProcessException(repr(KeyError("one")))) is None


def test_a_path_with_bytes_that_are_no_text_can_be_logged(tmp_path: Path) -> None:
    handlers = logging.getLogger().handlers[:]
    logging.getLogger().handlers = []
    try:
        setup_logging(tmp_path, "solver.log.0", "INFO", live=False)
        logging.getLogger().info("Saved %s", os.fsdecode(b"a\xff"))
        for handler in logging.getLogger().handlers:
            handler.close()
    finally:
        logging.getLogger().handlers = handlers
    assert "Saved a\\udcff" in (tmp_path / "solver.log.0").read_text()
