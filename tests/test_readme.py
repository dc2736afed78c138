"""The README's promises, as far as a quick test can hold them: what it names is there."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import judge
import sample
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
    sources = "".join((ROOT / f).read_text() for f in ("sample.py", "judge.py", "data/oasst/prepare.py"))
    known = {"--" + f.name.replace("_", "-") for f in fields(train.Config)} | {"--nproc-per-node", "--help"}
    known |= set(re.findall(r'(?:add_argument|flag)\("(--[a-z-]+)"', sources))
    known |= {"--plan", "--preset", *("--" + name.replace("_", "-") for name in train.MACHINE)}
    known |= {"--nnodes", "--rdzv-id", "--rdzv-backend", "--rdzv-endpoint", "--shutdown-timeout"}  # torchrun's
    slurm = set(re.findall(r"--[a-z-]+", " ".join(re.findall(r"^#SBATCH (.*)$", README, re.MULTILINE))))
    known |= slurm | {"--signal", "--requeue"}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README))
    assert named and named <= known, named - known


def test_what_the_paper_says_is_where_the_table_says_it_is():
    rows = re.findall(r"^\| .* \| (.*) \| (`.*`) \|$", README.split("## From the paper to the code")[1], re.MULTILINE)
    places = [place for code, _ in rows for place in re.findall(r"`([\w/]+\.py):(\w+)`", code)]
    assert len(places) >= 12
    for file, name in places:
        assert re.search(rf"^(def|class) {name}\b", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), (
            file,
            name,
        )
    tests = {f.name: f.read_text(encoding="utf-8") for f in (ROOT / "tests").glob("test_*.py")}
    for _, name in rows:
        name = name.strip("`")
        assert name in tests or any(f"def {name}(" in text for text in tests.values()), name


@pytest.mark.parametrize("command", [train, judge, sample], ids=lambda m: m.__name__)
def test_every_command_explains_itself(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{command.__name__}.py", "--help"])
    with pytest.raises(SystemExit) as e:
        command.parse_args()
    assert e.value.code == 0 and f"usage: {command.__name__}.py" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["data/zoo/prepare.py", "data/zoo/ablate.py", "data/oasst/prepare.py"])
def test_every_script_it_names_explains_itself(script):
    assert script in README or script in MAKEFILE
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "usage:" in done.stdout


def test_it_leaves_no_place_to_fill_in():
    assert "@@" not in README
