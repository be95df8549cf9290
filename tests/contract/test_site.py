"""The site of the documentation is built without a warning, and has what users look for."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pyro_blora import guides, likelihoods, models, testing

ROOT = Path(__file__).resolve().parents[2]
NAMES = [f"{room.__name__}.{n}" for room in (models, guides, likelihoods) for n in room.__all__]
NAMES += [f"pyro_blora.testing.{name}" for name in testing.__all__]


def test_it_is_built_without_a_warning(tmp_path):
    """Sphinx warns of a page without a place in the menu, and of a name that is not there."""
    for name in ("sphinx", "furo", "myst_nb"):
        pytest.importorskip(name)
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-E", "-d"]
    done = subprocess.run(
        [*command, str(tmp_path / "trees"), str(ROOT / "docs"), str(tmp_path / "site")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    pages = sorted((tmp_path / "site" / "reference").glob("*.html"))
    ids = set(re.findall(r' id="([\w.]+)"', "".join(page.read_text("utf-8") for page in pages)))
    assert {name for name in NAMES if name not in ids} == set()
    assert "pyro_blora.BayesianLoRA.save_pretrained" in ids  # inherited
    assert "pyro_blora.BayesianLoRA.zero_grad" not in ids  # torch's
