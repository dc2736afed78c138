"""scripts/scaling.py: figures of hand-made runs, programs that make their files at once, and the
shipped programs in the tiny world."""

import json
import shutil
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tiny

from model import UserError, read_json, save
from sample import read_jsonl, write_jsonl
from scripts import ablate, figures, scaling
from scripts.ablate import bootstrap_ratio
from scripts.report import load_oracle

ROOT = Path(__file__).resolve().parents[1]


# ---- intervals -------------------------------------------------------------------------------


def test_the_interval_of_a_ratio_is_that_of_resampling_whole_prompts():
    rng = np.random.default_rng(0)
    wholes = rng.integers(0, 5, 60)
    parts = rng.binomial(wholes, 0.7)
    result = bootstrap_ratio(parts, wholes)
    ratios = []
    for _ in range(10000):
        prompts = rng.integers(0, 60, 60)
        ratios.append(parts[prompts].sum() / wholes[prompts].sum())
    low, high = np.percentile(ratios, [2.5, 97.5])
    assert result["value"] == parts.sum() / wholes.sum()
    assert result["low"] == pytest.approx(low, abs=0.01)
    assert result["high"] == pytest.approx(high, abs=0.01)


def test_nothing_counted_has_no_ratio_and_a_resample_of_nothing_does_not_count():
    assert bootstrap_ratio([0, 0], [0, 0]) is None
    assert bootstrap_ratio([], []) is None
    assert bootstrap_ratio([0, 1], [0, 2]) == {"value": 0.5, "low": 0.5, "high": 0.5}


# ---- programs that make their files at once --------------------------------------------------

ANSWERS = {  # model -> by seed: the grades of its answers to four test prompts, which they are
    "SFT": ("1111", "1111"),
    "M1": ("1111", "0112"),
    "M2": ("1133", "1133"),
}
EXAMS = {  # by seed: the scores of the responses to two held-out prompts
    0: [[5, 3, None], [2, 2]],
    1: [[1, 3, 2], [0, 4]],
}
RANKS = [[0, 1, 2], [1, 0]]
TRAIN = """
import json, sys
from pathlib import Path
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out, iters, seed = Path(flags["--out"]), int(flags["--iters"]), int(flags["--seed"])
with (out.parent / "starts.txt").open("a") as f:
    f.write(f"{out.name} {iters} {flags['--init']}\\n")
if (out.parent / f"crash {out.name}").exists():
    sys.exit("error: the disk is full")
for t, name in enumerate(["SFT", *(f"M{i}" for i in range(1, iters + 1))]):
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    if t == 2 and (out.parent / f"no pairs {out.name}").exists():
        sys.exit(f"error: {folder}: no prompt gave a pair")
    answers = []
    for i, digit in enumerate(ANSWERS[name][seed]):
        answers.append({"id": i, "prompt": "?", "response": digit, "tokens": [1]})
    exam = []
    for i, scores in enumerate(EXAMS[seed]):
        for k, score in enumerate(scores):
            exam.append({"id": i, "k": k, "vote": 0, "score": None if name == "SFT" else score})
    for file, rows in (("test.jsonl", answers), ("exam.jsonl", exam)):
        (folder / file).write_text("".join(json.dumps(row) + "\\n" for row in rows))
    (folder / "config.json").write_text("{}")
(out / "config.json").write_text(json.dumps({"data": flags["--data"]}))
"""
PREPARE = """
import shutil, sys
from pathlib import Path
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out = Path(flags["--out"])
with (out.parent / "bases.txt").open("a") as f:
    f.write(f"{out.name} {flags['--dim']} {flags.get('--steps')} {flags.get('--tries')}\\n")
if flags["--dim"] == "100":
    sys.exit("error: no multiple of 96")
shutil.copytree("data/base", out / "base")
"""


@pytest.fixture
def fake(tmp_path, net, tok, monkeypatch):
    """A folder with a train.py and a data.zoo.prepare that make files at once, and tell how they
    were started. The data folder has a base of width 32."""
    tables = f"ANSWERS = {ANSWERS}\nEXAMS = {EXAMS}\n"
    (tmp_path / "train.py").write_text(tables + TRAIN)
    (tmp_path / "data" / "zoo").mkdir(parents=True)
    (tmp_path / "data" / "zoo" / "prepare.py").write_text(PREPARE)
    oracle = "def grade(prompt, response):\n    return int(response)\n"
    (tmp_path / "data" / "oracle.py").write_text(oracle)
    rankings = []
    for ranks in RANKS:
        rankings.append({"prompt": "?", "responses": ["a"] * len(ranks), "ranks": ranks})
    write_jsonl(tmp_path / "data" / "eft_eval.jsonl", rankings)
    save(net, tok, tmp_path / "data" / "base")
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ablate, "ROOT", tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return tmp_path


class Call(NamedTuple):
    """What a call of scaling.py started, and its table."""

    runs: list[str]
    bases: list[str]
    rows: dict[tuple[int, str], dict]  # by width and model
    text: str
    error: str


def scale_with(fake: Path, *flags) -> Call:
    out, error = fake / "out", ""
    logs = [out / "starts.txt", out / "bases.txt"]
    for log in logs:
        log.write_text("")
    places = ("--data", "data", "--out", "out", "--figure", "out/figure.svg")
    try:
        scaling.main([str(flag) for flag in (*places, "--seeds", 0, 1, "--iters", 2, *flags)])
    except UserError as e:
        error = str(e)
    rows = {}
    for row in read_json(out / "scaling.json")["rows"]:
        rows[row["dim"], row["model"]] = row
    starts, bases = (sorted(log.read_text().splitlines()) for log in logs)
    return Call(starts, bases, rows, (out / "scaling.md").read_text(), error)


def bounds(result: dict, *keys: str) -> list:
    return [pytest.approx(result[key]) for key in keys]


def test_the_table_holds_what_is_counted_by_hand(fake, capsys):
    call = scale_with(fake, "--dims", 32)
    assert not call.error and not call.bases
    assert list(call.rows) == [(32, "SFT"), (32, "M1"), (32, "M2")]
    row = call.rows[32, "M2"]
    assert row["seeds"] == 2
    # prompts have means of 1, 1, 3, 3: one resample in 16 is 1, one is 3
    assert bounds(row["true_mean"], "value", "low", "high") == [2, 1, 3]
    assert call.rows[32, "M1"]["true_mean"]["value"] == 1
    # seed 0: ties and two wins; seed 1: a win, a tie, two wins
    assert bounds(row["vs_before"], "points", "win", "lose") == [62.5, 62.5, 0]
    assert bounds(row["vs_sft"], "points", "win", "lose") == [50, 50, 0]
    assert call.rows[32, "M1"]["vs_before"] == call.rows[32, "M1"]["vs_sft"]
    assert call.rows[32, "M1"]["vs_sft"]["by_seed"] == [0, 0]
    # the first prompt: 1 pair of 1 right, then 1 of 3; the second: none of 0, then 1 of 1
    assert bounds(row["pairs_right"], "value", "low", "high") == [3 / 5, 2 / 4, 1]
    # of 5 votes 4 can be read, then all
    assert bounds(row["parse_rate"], "value", "low", "high") == [9 / 10, 5 / 6, 1]
    assert call.rows[32, "SFT"]["pairs_right"] is None

    assert call.text in capsys.readouterr().out
    cells = "2.00 [1.00, 3.00] | +62.5 [+25.0, +100.0] | +50.0 [+0.0, +100.0]"
    parameters = row["parameters"]
    line = f"| 32 | {parameters:,} | M2 | 2 | {cells} | 60.0% [50.0%, 100.0%] |"
    assert line in call.text
    assert f"| 32 | {parameters:,} | SFT | 2 | 1.00 [1.00, 1.00] |  |  | - | 0.0%" in call.text


def test_bases_are_made_once_but_for_the_one_that_the_data_folder_has(fake):
    flags = ("--dims", 32, 64, "--steps", 7)
    call = scale_with(fake, *flags)
    assert call.bases == ["base-64 64 7 None"], "a trial: one base of 7 steps"
    expected = [f"d32-seed-{seed} 2 data/base" for seed in (0, 1)]
    assert call.runs == expected + [f"d64-seed-{seed} 2 out/base-64/base" for seed in (0, 1)]
    assert {dim for dim, _ in call.rows} == {32, 64}
    again = scale_with(fake, *flags)
    assert again.runs == again.bases == []
    assert again.rows == call.rows


def test_a_run_that_fails_is_told_and_the_others_stand_and_it_alone_is_tried_again(fake):
    crash = fake / "out" / "crash d64-seed-1"
    crash.touch()
    flags = ("--dims", 64, 32)
    call = scale_with(fake, *flags)
    assert call.bases == ["base-64 64 None 4"], "up to four bases, until one compares"
    assert call.error.startswith("d64-seed-1 failed")
    assert "- `d64-seed-1` failed: out/d64-seed-1.log: train.py ended with status 1: " in call.text
    assert "the disk is full" in call.text
    seeds = {key: row["seeds"] for key, row in call.rows.items()}
    assert seeds == {(d, m): {32: 2, 64: 1}[d] for d, m in product((64, 32), ANSWERS)}
    assert call.rows[64, "M1"]["true_mean"] == {"value": 1, "low": 1, "high": 1}  # seed 0's
    crash.unlink()
    again = scale_with(fake, *flags)
    assert [start.split()[0] for start in again.runs] == ["d64-seed-1"] and not again.bases
    assert not again.error and "failed" not in again.text
    assert again.rows[64, "M2"]["true_mean"] == again.rows[32, "M2"]["true_mean"]


def test_a_base_that_fails_fails_its_runs_and_no_others(fake):
    call = scale_with(fake, "--dims", 100, 32)
    assert call.error.startswith("d100-seed-0, d100-seed-1 failed")
    assert call.text.count("data.zoo.prepare ended with status 1: error: no multiple") == 2
    assert {dim for dim, _ in call.rows} == {32}
    assert len(call.runs) == 2


def test_a_run_that_cannot_go_on_stands_with_the_models_that_it_has(fake):
    (fake / "out" / "no pairs d32-seed-0").touch()
    call = scale_with(fake, "--dims", 32)
    assert not call.error
    assert "- `d32-seed-0` ended with M1: " in call.text and "no prompt gave a pair" in call.text
    assert [row["seeds"] for row in call.rows.values()] == [2, 2, 1]
    assert call.rows[32, "M2"]["vs_before"]["by_seed"] == [75]
    assert call.rows[32, "M2"]["pairs_right"]["value"] == 2 / 4


# ---- the figure ------------------------------------------------------------------------------


def test_the_figure_has_a_line_for_each_base_in_both_panels_and_the_tables_intervals(monkeypatch):
    rows = []
    for dim, name in product((96, 192), ("SFT", "M1", "M2")):
        rate = {"value": 0.5, "low": 0.25, "high": 1.0}
        row = {"dim": dim, "parameters": dim * 10000, "model": name, "true_mean": rate}
        rows.append(row | {"pairs_right": None if name == "SFT" else rate})
    svg = figures.scaling(rows)
    for text in ("96 (1.0 M)", "192 (1.9 M)", "SFT", "pairs ordered right (%)"):
        assert text in svg
    axes = []
    monkeypatch.setattr(figures, "to_svg", lambda ax, caption: axes.extend(ax.figure.axes))
    figures.scaling(rows)
    for ax, points, scale in zip(axes, (3, 2), (1, 100), strict=True):
        assert len(ax.containers) == 2
        for line, _, (bars,) in ax.containers:
            assert line.get_ydata().tolist() == [scale * 0.5] * points
            ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
            assert ends == [[scale * 0.25, scale * 1.0]] * points


# ---- the shipped programs in the tiny world --------------------------------------------------

ORACLE = "def grade(prompt, response):\n    return len(response.split()) % 6\n"


def test_the_shipped_command_gives_a_table_that_the_runs_files_bear_out(
    world, tmp_path, monkeypatch
):
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(world.data, data)
    shutil.copytree(world.base, data / "base")
    (data / "oracle.py").write_text(ORACLE)
    monkeypatch.setitem(tiny.SHAPE, "dim", 24)
    tiny.make_base(out / "base-24" / "base", steps=40)
    command = [sys.executable, "-m", "scripts.scaling", "--data", data, "--out", out]
    command += ["--dims", "48", "24", "--seeds", "0", "--iters", "2", "--args", "--prompts 6"]
    command += ["--figure", out / "figures" / "scaling.svg"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    rows = read_json(out / "scaling.json")["rows"]
    models = [(row["dim"], row["model"]) for row in rows]
    assert models[:3] == [(48, "SFT"), (48, "M1"), (48, "M2")]
    assert models[3:5] == [(24, "SFT"), (24, "M1")]  # its judge may give no pair
    oracle = load_oracle(data / "oracle.py")
    for row in rows:
        run = out / f"d{row['dim']}-seed-0"
        answers = read_jsonl(run / row["model"] / "test.jsonl")
        grades = [oracle.grade("", answer["response"]) for answer in answers]
        assert row["true_mean"]["value"] == np.mean(grades)
        exam = read_jsonl(run / row["model"] / "exam.jsonl")
        readable = [vote["score"] is not None for vote in exam]
        assert row["parse_rate"]["value"] == pytest.approx(np.mean(readable))
        config = json.loads((run / row["model"] / "config.json").read_text())
        assert config["hidden_size"] == row["dim"]
    assert (out / "figures" / "scaling.svg").read_text().startswith("<svg")
