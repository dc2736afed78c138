"""The README's promises, as far as a quick test can hold them: what it names is there."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import train

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
BLOCKS = "\n".join(re.findall(r"```\n(.*?)```", README, re.DOTALL))
COMMANDS = [line.split("  #")[0].strip() for line in BLOCKS.splitlines() if line and not line.startswith("#")]


def test_every_make_target_it_names_exists_and_has_help():
    named = {word for line in COMMANDS if line.startswith("make ") for word in re.findall(r"(?<= )[a-z]+\b(?!=)", line)}
    assert {"run", "test", "setup", "reproduce", "zoo"} <= named
    for target in named:
        assert re.search(rf"^{target}:.*## ", MAKEFILE, re.MULTILINE), target


def test_every_flag_it_names_exists():
    known = {"--" + f.name.replace("_", "-") for f in fields(train.Config)} | {"--valid", "--nproc-per-node", "--help"}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README))
    assert named and named <= known, named - known


@pytest.mark.parametrize(
    "script", ["train.py", "judge.py", "sample.py", "data/zoo/prepare.py", "data/oasst/prepare.py"]
)
def test_every_script_it_names_explains_itself(script):
    assert script in README or script in MAKEFILE
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "usage:" in done.stdout


def test_it_leaves_no_place_to_fill_in():
    assert "@@" not in README
