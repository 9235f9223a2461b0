"""One command builds docs/: every link leads to a page, and the reference pages are complete."""

import html
import importlib
import os
import re
from pathlib import Path

import commands
import pytest
from documents import ROOT
from omegaconf import OmegaConf

from checkpoint.cli.parser import COMMANDS
from solvers.settings.yaml_docs import read_entries

STANDARD = ROOT / "config/solver/standard.yaml"
API = ("solvers", "solvers.optim", "checkpoint", "checkpoint.storage", "checkpoint.testing")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the site, built as `mkdocs build --strict` does."""
    folder = tmp_path_factory.mktemp("site")
    words = ("build", "--strict", "--site-dir", folder)
    done = commands.run("mkdocs", *words, cwd=ROOT, environment=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def page(site: Path, address: str) -> str:
    return (site / address).read_text(encoding="utf-8")


def test_every_configuration_key_is_there_with_its_comment(site: Path) -> None:
    text = page(site, "reference/config.html")
    words = html.unescape(re.sub(r"<[^>]+>", "", text))
    for entry in read_entries(STANDARD):
        anchor = ("" if entry.value else "section-") + entry.key.replace(".", "-")
        assert f'id="{anchor}"' in text, entry.key
        assert entry.comment.replace("`", "") in words, entry.key
        assert entry.value in ("", "???") or f"Default: {entry.value}." in words, entry.key


def test_the_keys_that_do_not_change_the_signature_are_those_of_dora(site: Path) -> None:
    text = page(site, "reference/config.html")
    start = text.index('id="keys-that-do-not-change-the-signature"')
    listed = set(re.findall(r'<a href="#[\w-]+"><code>([\w.]+)</code></a>', text[start:]))
    excluded = OmegaConf.load(STANDARD).dora.exclude
    assert {pattern for pattern in excluded if "*" not in pattern} <= listed
    assert {"logging.level", "wandb.name", "slurm.gpus"} <= listed
    assert not listed & {"optim.lr", "optim.epochs", "seed", "checkpoint.save_every"}


def test_every_command_is_there_as_its_help_prints_it(site: Path) -> None:
    text = page(site, "reference/commands.html")
    for name in COMMANDS:
        assert f'id="checkpoint-{name}"' in text, name
    for name in ("config", "help", "new", "plot", "rehearse"):
        assert f'id="standard-solver-{name}"' in text, name
    words = html.unescape(re.sub(r"<[^>]+>", "", text))
    assert "usage: checkpoint verify [-h]" in words
    assert "usage: standard-solver rehearse [-h]" in words


def test_every_public_name_is_there(site: Path) -> None:
    text = page(site, "reference/api.html")
    for module in API:
        for name in importlib.import_module(module).__all__:
            assert f'id="{module}.{name}"' in text, f"{module}.{name}"
    for name in ("solvers.StandardSolver.run_epoch", "checkpoint.Checkpointer.save"):
        assert f'id="{name}"' in text, name


def test_no_page_loads_anything_from_the_network(site: Path) -> None:
    for file in site.rglob("*.html"):
        text = file.read_text(encoding="utf-8")
        remote = re.findall(r'<(?:script|img|link|iframe)\b[^>]*(?:src|href)="(?:https?:)?//', text)
        assert not remote, f"{file.relative_to(site)}: {remote}"
        assert 'class="mermaid"' not in text, f"{file.relative_to(site)} has a mermaid diagram"


def test_every_page_is_in_the_navigation(site: Path) -> None:
    home = page(site, "index.html")
    for file in site.rglob("*.html"):
        address = file.relative_to(site).as_posix()
        if address not in ("404.html", "index.html"):
            assert f'href="{address}"' in home, address
