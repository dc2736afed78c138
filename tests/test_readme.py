"""What the pages promise (README.md, RESULTS.md, docs/, Makefile), as far as quick tests tell."""

import ast
import importlib
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

import train
from scripts import plan

ROOT = Path(__file__).resolve().parents[1]
PATHS = [ROOT / "README.md", ROOT / "RESULTS.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in PATHS}
README, DIFFERENCES = PAGES["README.md"], PAGES["differences.md"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")

# Programs of ours, by the words that start them, and the modules they are in.
PROGRAMS = {"train.py": "train", "sample.py": "sample", "judge.py": "judge"}
PROGRAMS |= {"data/oasst/prepare.py": "data.oasst.prepare"}
MODULES = ["data.zoo.prepare"]
MODULES += [f"scripts.{name}" for name in ("report", "compare", "answer", "plan", "ablate", "gpu")]
MODULES += ["scripts.convert_meta", "scripts.pick_checkpoint", "scripts.scaling"]
TORCHRUN_FLAGS = "--nproc-per-node --nnodes --rdzv-id --rdzv-backend --rdzv-endpoint".split()
TORCHRUN_FLAGS += ["--shutdown-timeout"]
SLURM_FLAGS = "--signal --requeue".split()


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a page in a language, such as sh; "" for those that name none."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for name, block in fences if name == language]


def commands(text: str) -> list[list[str]]:
    """The words of each command in the blocks of a page, comments left out."""
    lines = []
    for block in blocks(text, "sh"):
        lines += block.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines]


@cache
def help_text(module: str) -> str:
    """What a program answers to --help."""
    program = importlib.import_module(module)
    parse = getattr(program, "parse_args", None) or program.main
    with pytest.MonkeyPatch.context() as patch:
        pieces = []
        patch.setattr(sys, "argv", ["program", "--help"])
        patch.setattr(sys, "stdout", type("Out", (), {"write": pieces.append, "flush": list}))
        with pytest.raises(SystemExit) as e:
            parse(*[["--help"]] if inspect.signature(parse).parameters else [])
    assert e.value.code == 0
    return "".join(pieces)


def flags_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))


def target_lines(target: str) -> tuple[str, list[str]]:
    """The head of a target in the Makefile, and its commands."""
    match = re.search(rf"^({target}:.*)\n((?:\t.*\n)*)", MAKEFILE, re.MULTILINE)
    assert match, target
    return match[1], match[2].splitlines()


# ---- pages


def test_the_two_first_pages_are_short():
    assert len(README.splitlines()) <= 150
    assert len(PAGES["RESULTS.md"].splitlines()) <= 130


def test_the_main_of_the_readme_is_the_main_of_the_code():
    assert blocks(README, "python") == [inspect.getsource(train.main)]


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    folder = next(path.parent for path in PATHS if path.name == page)
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", PAGES[page]):
        assert (folder / target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_no_page_has_a_place_to_fill_in(page):
    assert "@@" not in PAGES[page] and "TODO" not in PAGES[page]


def places(file: str) -> dict[str, tuple[int, int]]:
    """Function, class or constant -> its first and last line in a file."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    lines = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            lines[node.name] = first, node.end_lineno
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            lines[node.targets[0].id] = node.lineno, node.end_lineno
    return lines


def test_what_to_read_is_there_and_as_long_as_the_readme_says():
    row = r"^\| `(\w+\.py)` \| `(\w+)` to `(\w+)` \| (\d+) \|"
    rows = re.findall(row, README, re.MULTILINE)
    assert {file for file, *_ in rows} == {
        f"{n}.py" for n in "train judge dpo sample model".split()
    }
    for file, first, last, count in rows:
        lines = places(file)
        length = lines[last][1] - lines[first][0] + 1
        assert 0.9 * length - 5 <= int(count) <= 1.1 * length + 5, (file, first, last, length)


def test_every_place_in_the_code_that_the_pages_name_is_there():
    text = "\n".join(PAGES[page] for page in ("README.md", "differences.md", "exercises.md"))
    names = re.findall(r"`([\w/]+\.py):(\w+)`", text)
    assert len(names) >= 20
    for file, name in names:
        assert name in places(file), (file, name)
    for file in re.findall(r"`(test_\w+\.py)`", DIFFERENCES):
        assert (ROOT / "tests" / file).exists(), file


def test_the_table_of_overridden_knobs_is_the_recipe():
    names, defaults, zoo = (
        [cell.strip() for cell in line.strip("|").split("|")[1:]]
        for line in re.findall(r"^\| (?:knob|default|zoo) \|.*", README, re.MULTILINE)
    )
    recipe = json.loads((ROOT / "data" / "zoo" / "recipe.json").read_text())
    assert names == list(recipe)
    types = {field.name: field.type for field in fields(train.Config)}
    for name, default, value in zip(names, defaults, zoo, strict=True):
        assert types[name](default) == getattr(train.Config, name), name
        assert types[name](value) == recipe[name], name


def test_rows_of_a_data_folder_have_the_keys_of_the_table():
    table = re.findall(r"^\| `(\w+\.jsonl)` \| `\{(.*?)\}`", PAGES["files.md"], re.MULTILINE)
    keys = {file: set(re.findall(r'"(\w+)"', row)) for file, row in reversed(table)}
    for file in ("ift.jsonl", "eft_ranked.jsonl"):
        with (ROOT / "data" / "zoo" / file).open(encoding="utf-8") as f:
            assert set(json.loads(f.readline())) == keys[file], file


def test_what_may_change_in_a_run_is_what_the_page_says():
    (sentence,) = re.findall(r"Only these may change(.*?)\n\n", PAGES["files.md"], re.DOTALL)
    knobs = {flag.removeprefix("--").replace("-", "_") for flag in flags_in(sentence)}
    assert knobs == set(train.MUTABLE_FIELDS)


def test_the_plans_on_the_page_are_what_the_planner_prints(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    examples = [block for block in blocks(PAGES["large-runs.md"], "") if block.startswith("$ ")]
    assert examples
    for block in examples:
        command, text = block.split("\n", 1)
        plan.main(shlex.split(command)[4:])
        assert text.strip() in capsys.readouterr().out, command


# ---- commands


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_commands_is_shell(page):
    for block in blocks(PAGES[page], "sh"):
        result = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
        assert result.returncode == 0 and not result.stderr, result.stderr


@pytest.mark.parametrize("module", [*PROGRAMS.values(), *MODULES])
def test_every_program_explains_itself(module, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert "usage:" in help_text(module)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_has_only_flags_that_its_program_knows(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in commands(PAGES[page]):
        known_flags = set()
        if "torchrun" in words:
            known_flags |= set(TORCHRUN_FLAGS)
        if "scripts.plan" in words:
            known_flags |= flags_in(help_text("train"))
        modules = [PROGRAMS[word] for word in words if word in PROGRAMS]
        modules += [word for word in words if word in MODULES]
        for module in modules:
            known_flags |= flags_in(help_text(module))
        if words[:2] == ["python", "-m"]:
            assert words[2] in MODULES, words
        if modules:
            flags = {word for word in words if word.startswith("--")}
            assert flags <= known_flags, (words, flags - known_flags)


def test_every_flag_that_the_pages_name_exists(monkeypatch):
    monkeypatch.chdir(ROOT)
    known_flags = {"--help", *TORCHRUN_FLAGS, *SLURM_FLAGS}
    for module in (*PROGRAMS.values(), *MODULES):
        known_flags |= flags_in(help_text(module))
    for page, text in PAGES.items():
        if page in ("lab-book.md", "RESULTS.md"):  # they tell of older flags
            continue
        text = text.split("## What changed since")[0]
        flags = flags_in(re.sub(r"^#SBATCH.*", "", text, flags=re.MULTILINE))
        assert flags <= known_flags, (page, flags - known_flags)


def test_every_make_target_that_a_page_names_exists():
    targets = set()
    for text in PAGES.values():
        for words in commands(text):
            if words[:1] == ["make"]:
                targets |= {word for word in words[1:] if "=" not in word}
        targets |= set(re.findall(r"`make ([a-z-]+)", text))
    assert {"run", "test", "lint", "help"} <= targets
    for target in targets:
        target_lines(target)


def output_of_make(*words: str) -> list[str]:
    """Lines that make prints; not as a part of the make that may have started the tests."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "--no-print-directory", *words]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=env)
    return result.stdout.splitlines()


def test_every_target_has_help_and_at_most_three_commands():
    (phony,) = re.findall(r"^\.PHONY: (.*)", MAKEFILE, re.MULTILINE)
    for target in phony.split():
        head, lines = target_lines(target)
        assert "## " in head and len(lines) <= 3, target
    assert [line.split()[0] for line in output_of_make("help")] == phony.split()


def test_a_run_folder_may_have_a_space_in_its_name():
    out = "runs/my run"
    lines = output_of_make("-n", "-o", ".venv/report", "run", f"OUT={out}", "ARGS=")
    training, reporting = (shlex.split(line) for line in lines)
    assert training[-2:] == ["--out", out] and reporting[-1] == out


def test_what_the_commands_write_is_no_part_of_the_repository():
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    paths = ["runs/zoo/config.json", "mine/ift.jsonl", "rows/ift.jsonl", "M3.json", "M3.jsonl"]
    paths += ["judge_cache.jsonl", "Llama-2-7b-hf/config.json", "runs/zoo/M2/test.jsonl.part"]
    for path in paths:
        result = subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT)
        assert result.returncode == 0, path
