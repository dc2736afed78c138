"""The ablations' table from hand-made runs, their intervals, and the multiple-choice judge's rows.

What a variant shares with the full run is tested where the tiny world is, in test_train.py.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from tiny import write_rows

ZOO = Path(__file__).resolve().parents[1] / "data" / "zoo"
sys.path.insert(0, str(ZOO))

import ablate  # noqa: E402

import judge  # noqa: E402
import train  # noqa: E402
from model import BadInput, Tokenizer  # noqa: E402
from sample import read_rows  # noqa: E402

FULL, JUDGE_M1, FIVE = (
    next(v for v in ablate.VARIANTS if v.name == n) for n in ("full", "judge-M1", "five-iterations")
)
IFT_ONLY = ablate.VARIANTS[1]


@pytest.mark.parametrize("v", ablate.VARIANTS, ids=lambda v: v.name)
def test_every_variant_is_a_run_that_train_can_make_and_a_full_one_but_for_its_flags(v):
    flags = [flag.format(multiple_choice="runs/ablations/multiple-choice/zoo") for flag in v.flags.split()]
    cfg, full = (train.parse_args(["--data", str(ZOO), *f, "--iters", str(v.iters)])[0] for f in (flags, []))
    differ = {k for k, value in vars(cfg).items() if value != getattr(full, k)}
    recipe = set(json.loads((ZOO / "recipe.json").read_text())) if "--data" in flags else set()  # not made yet
    assert differ - recipe == {flag[2:].replace("-", "_") for flag in flags[::2]}


def test_variants_have_names_of_their_own_and_the_full_method_comes_first():
    assert len({v.name for v in ablate.VARIANTS}) == len(ablate.VARIANTS) and ablate.VARIANTS[0] == ablate.FULL == FULL


# ---- intervals ---------------------------------------------------------------------------------------------


def graded(*grades: int) -> dict:
    return dict(enumerate(grades))


def test_wins_minus_losses_are_counted_over_prompts_and_seeds_whatever_their_order():
    one = graded(5, 3, 2, 0), graded(4, 3, 1, 1)  # two wins, a tie, a loss
    two = dict(reversed(graded(1, 1, 1, 1).items())), graded(0, 0, 0, 2)  # three wins, a loss
    found = ablate.compare([one, two])
    assert (found["win"], found["tie"], found["lose"], found["points"]) == (62.5, 12.5, 25, 37.5)
    assert found["by_seed"] == [25, 50]
    same = ablate.compare([(one[0], one[0])])
    assert ablate.points(same) == "same" and (same["low"], same["high"]) == (0, 0)
    more = ablate.compare([(one[0] | {9: 5}, one[1] | {8: 1})])  # prompts that only one has answered
    assert more == ablate.compare([one])


def test_the_interval_is_that_of_drawing_whole_prompts():
    rng = np.random.default_rng(1)
    pairs = [tuple(graded(*rng.integers(0, 6, 40)) for _ in "ab") for _ in range(3)]
    found = ablate.compare(pairs)
    signs = np.array([[np.sign(a[i] - b[i]) for i in range(40)] for a, b in pairs])
    drawn = [signs[:, rng.integers(0, 40, 40)].mean() * 100 for _ in range(10000)]  # by hand, prompt after prompt
    assert found["points"] == pytest.approx(signs.mean() * 100)
    assert [found["low"], found["high"]] == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=1)
    alone = judge.head_to_head(*(list(grades.values()) for grades in pairs[0]))
    ours = ablate.compare(pairs[:1])
    assert [ours[k] for k in ("win", "tie", "lose")] == pytest.approx([alone[k] for k in ("win", "tie", "lose")])
    assert [ours[k] for k in ("low", "high")] == pytest.approx([alone[k] for k in ("low", "high")], abs=2)
    thrice = ablate.compare(pairs[:1] * 3)  # the same seed three times tells no more than once
    assert [thrice[k] for k in ("low", "high")] == pytest.approx([ours[k] for k in ("low", "high")])


# ---- the table ---------------------------------------------------------------------------------------------


class Oracle:
    @staticmethod
    def grade(prompt: str, response: str) -> int:
        return int(response)


def make_run(folder: Path, answers: dict[str, str], rounds: dict[str, tuple], error: str = "") -> dict:
    """A run folder as train.py and ablate.py leave it: answers are grades, one digit each; a round has a file and how
    many rows are in it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"data": str(folder.parent)}))
    (folder / "ended.json").write_text(json.dumps({"flags": [], "error": error}))
    for name in {*answers, *rounds}:
        (folder / name).mkdir()
    for name, digits in answers.items():
        (folder / name / "config.json").write_text("{}")
        rows = [{"id": i, "prompt": "?", "response": d, "tokens": [1] * int(d), "truncated": False}
                for i, d in enumerate(digits)]  # fmt: skip
        write_rows(folder / name / "test.jsonl", rows)
        votes = [{"id": 0, "k": k, "vote": 0, "text": "", "score": k if name != "SFT" else None} for k in (0, 1)]
        write_rows(folder / name / "exam.jsonl", votes)
    for name, (file, count) in rounds.items():
        for made, rows in (("candidates", [{"id": 0, "k": 0, "response": "1", "tokens": [1], "truncated": False}]),
                           ("prompts", [{"id": 0, "prompt": "?"}]),
                           ("judgements", [{"id": 0, "k": 0, "vote": 0, "score": 3}])):  # fmt: skip
            write_rows(folder / name / f"{made}.jsonl", rows)
        if file:
            pair = {"prompt": "?", "chosen_tokens": [1], "rejected_tokens": [1]}
            write_rows(folder / name / f"{file}.jsonl", [pair] * count)
    return ablate.read_run(folder, Oracle)


@pytest.fixture
def rows(tmp_path):
    write_rows(tmp_path / "eft_eval.jsonl", [{"prompt": "?", "responses": ["a", "b"], "ranks": [1, 0]}])
    both = {"M2": ("pairs", 2), "M3": ("pairs", 4)}
    base = {"SFT": "1111", "M1": "1111", "M2": "2221"}

    def runs(name, *models, rounds=both, error=""):
        return [make_run(tmp_path / f"{name}-{s}", m, rounds, error) for s, m in enumerate(models)]

    fulls = runs("full", *[base | {"M3": "3333"}] * 2)
    frozen = runs("judge-M1", base | {"M3": "3344"}, base | {"M3": "1111"})
    alone = runs("ift-only", *[{"SFT": "1111", "M1": "0111"}] * 2, rounds={"M2": ("", 0)}, error="no pair")
    five = runs("five", *[base | {"M3": "3333", "M4": "3334", "M5": "2333"}] * 2,
                rounds=both | {"M4": ("pairs", 6), "M5": ("pairs", 6)})  # fmt: skip
    made = {FULL: fulls, IFT_ONLY: alone, JUDGE_M1: frozen, FIVE: five}
    return {v.name: ablate.row(v, runs, fulls) for v, runs in made.items()}


def test_a_row_compares_models_of_the_same_iteration(rows):
    full, frozen = rows["full"], rows["judge-M1"]
    assert (full["m2_vs_sft"]["points"], full["last_vs_sft"]["points"]) == (75, 100)
    assert full["full_vs_m2"] is full["full_vs_last"] is None
    assert full["steps"].keys() == {"M1 vs SFT", "M2 vs M1", "M3 vs M2"}
    assert [full["steps"][f"{b} vs {a}"]["points"] for a, b in (("SFT", "M1"), ("M1", "M2"), ("M2", "M3"))] == [
        0,
        75,
        100,
    ]
    assert ablate.points(frozen["full_vs_m2"]) == "same" and frozen["last"] == ["M3", "M3"]
    assert frozen["last_vs_sft"]["by_seed"] == [100, 0]
    assert frozen["full_vs_last"]["by_seed"] == [-50, 100] and frozen["full_vs_last"]["points"] == 25
    assert frozen["true_mean"] == [3.5, 1] and frozen["tokens"] == [3.5, 1]
    assert frozen["learned"] == {"M2": [2, 2], "M3": [4, 4]} and frozen["pairwise"] == frozen["readable"] == [1, 1]


def test_where_a_model_is_missing_the_last_one_before_it_stands(rows):
    alone, five = rows["ift-only"], rows["five-iterations"]
    assert alone["last"] == ["M1", "M1"] and alone["errors"] == ["no pair", "no pair"]
    assert alone["m2_vs_sft"] == alone["last_vs_sft"] and alone["last_vs_sft"]["points"] == -25
    assert (alone["full_vs_m2"]["points"], alone["full_vs_last"]["points"]) == (75, 100)
    assert alone["learned"] == {"M2": [0, 0]} and alone["steps"].keys() == {"M1 vs SFT"}
    assert five["last"] == ["M5", "M5"] and five["full_vs_last"]["points"] == 25  # M3 against M5
    assert five["steps"]["M5 vs M4"]["points"] == -50 and five["steps"]["M4 vs M3"]["points"] == 25


def test_the_table_says_what_the_rows_hold(rows):
    text = ablate.tables(list(rows.values()), [0, 1])
    lines = text.splitlines()
    assert f"| `full` |  | {FULL.paper} | +75.0 [+25.0, +100.0] |  | M3 | +100.0 [+100.0, +100.0] |  |" in lines
    assert sum(line.startswith("| `ift-only` | `--eft-size 0` | scores collapse") for line in lines) == 1
    assert "| `ift-only` | 0.75 | 0.8 | 0 | 100.0% | 100.0% |" in lines
    assert "| `five-iterations` | 2.75 | 2.8 | 2, 4, 6, 6 | 100.0% | 100.0% |" in lines
    assert "is better, interval above zero, than that of: ift-only; not of: judge-M1, five-iterations." in text
    assert "- `ift-only` of seed 1 ended with M1: no pair" in lines
    for block in text.split("\n\n"):  # every table is rectangular
        bars = {line.count("|") for line in block.splitlines() if line.startswith("|")}
        assert len(bars) <= 1, block


def test_positives_count_as_what_was_learned_from(tmp_path):
    write_rows(tmp_path / "eft_eval.jsonl", [{"prompt": "?", "responses": ["a", "b"], "ranks": [1, 0]}])
    run = make_run(tmp_path / "run", {"SFT": "1", "M1": "1", "M2": "1"}, {"M2": ("positives", 7)})
    assert run["learned"] == {"M2": 7}


# ---- multiple choice ---------------------------------------------------------------------------------------


def test_multiple_choice_keeps_the_verdict_and_puts_a_sentence_for_the_walk():
    assert (
        ablate.multiple_choice("Relevance: yes, 1. Score: 2\nCoverage: no, 1.\nScore: 4")
        == ablate.GRADES[4] + "\nScore: 4"
    )
    for row in read_rows(ZOO / "eft.jsonl")[:600]:
        text = ablate.multiple_choice(row["judgement"])
        assert judge.parse_score(text) == max(1, judge.parse_score(row["judgement"]))
        assert "truth" not in text and text.count("\n") == 1
    assert len(set(ablate.GRADES.values())) == 5


def test_the_multiple_choice_folder_differs_in_the_judge_alone(tmp_path):
    made = ablate.make_multiple_choice(ZOO, tmp_path)
    ours = {p.name: p.read_bytes() for p in made.iterdir()}
    theirs = {p.name: p.read_bytes() for p in ZOO.iterdir() if p.is_file() and p.suffix != ".md"}
    assert {name for name in theirs if ours.get(name) != theirs[name]} == {
        "eft.jsonl",
        "judge.txt",
        "prepare.py",
        "ablate.py",
    }
    rows, before = (read_rows(folder / "eft.jsonl", "judgement") for folder in (made, ZOO))
    assert [(r["prompt"], r["response"]) for r in rows] == [(r["prompt"], r["response"]) for r in before]
    assert Counter(judge.parse_score(r["judgement"]) for r in rows).keys() == {1, 2, 3, 4, 5}
    template, tok = (
        judge.check_template(ours["judge.txt"].decode(), "judge.txt"),
        Tokenizer(ZOO / "base/tokenizer.model"),
    )
    longest = max(len(tok.chat(judge.judge_prompt(template, r["prompt"], r["response"]))) for r in rows[:600])
    assert longest + 160 <= 512  # the base's context


# ---- runs --------------------------------------------------------------------------------------------------


def test_files_are_ordered_as_a_run_writes_them():
    names = ["SFT/config.json", "M3/prompts.jsonl", "M1/config.json"]
    files = ("candidates.jsonl", "judgements.jsonl", "pairs.jsonl", "model.safetensors")
    names += [f"{m}/{f}" for m, f in product(("M2", "M3", "M4", "M10"), files)]
    mixed = [*names[1::2], *names[::2]]
    assert sorted(mixed, key=ablate.place) == names


def test_the_ends_of_the_method_are_told_in_the_words_that_are_looked_for():
    assert all(words in (ablate.ROOT / "train.py").read_text() for words in ablate.ENDS.pattern.split("|"))


TRAIN = """
import json, sys, time
from pathlib import Path
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out, iters = Path(flags["--out"]), int(flags["--iters"])
with (out.parent / "started.txt").open("a") as f:
    f.write(f"{out.name} {iters} {sorted(p.name for p in out.glob('*'))}\\n")
if (out.parent / f"stand still {out.name}").exists():
    time.sleep(60)
if (out.parent / f"crash {out.name}").exists():
    sys.exit(3)
for t, name in enumerate(["SFT", *(f"M{i}" for i in range(1, iters + 1))]):
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    if t > 1 and flags.get("--eft-size") == "0":
        (folder / "judgements.jsonl").write_text(json.dumps({"id": 0, "k": 0, "vote": 0, "score": None}) + "\\n")
        sys.exit(f"error: {folder}: none of 9 prompts gave a pair")
    row = {"id": 0, "prompt": "?", "response": str(t), "tokens": [1], "truncated": False}
    (folder / "test.jsonl").write_text(json.dumps(row) + "\\n")
    (folder / "config.json").write_text("{}")
(out / "config.json").write_text(json.dumps({"data": flags["--data"]}))
(out / "metrics.jsonl").touch()
"""


@pytest.fixture
def repository(tmp_path):
    """A copy whose train.py makes a run's files in no time, and says in started.txt how it was started."""
    for name in ("model.py", "sample.py", "judge.py", "data/zoo/ablate.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ablate.ROOT / name, tmp_path / name)
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "data/zoo/oracle.py").write_text("def grade(prompt, response):\n    return int(response)\n")
    write_rows(tmp_path / "data/zoo/eft.jsonl", [{"prompt": "?", "response": "1", "judgement": "Score: 0"}])
    (tmp_path / "out").mkdir()
    return tmp_path


def go(repository: Path, *flags) -> list[str]:
    """What train.py was started for by one more call of ablate.py."""
    log, fixed = repository / "out/started.txt", ("--data", repository / "data/zoo", "--out", repository / "out")
    log.write_text("")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(x) for x in ("ablate.py", *fixed, "--workers", 2, *flags)])
        patch.setattr(ablate, "ROOT", repository)
        patch.setattr(signal, "signal", lambda *_: None)
        ablate.main()
    return log.read_text().splitlines()


def test_runs_are_made_once_and_one_that_cannot_go_on_is_examined_as_far_as_it_came(repository, capsys):
    wanted = ("--seeds", 0, 1, "--only", "ift-only", "five-iterations")
    started, out = go(repository, *wanted), repository / "out"
    assert len(started) == 8 and {"full-0 3 []", "full-1 3 []"} <= set(started)
    for seed in (0, 1):
        ours = [line for line in started if line.split()[0].endswith(f"-{seed}")]
        assert ours[0].startswith("full") and set(ours[1:]) == {
            f"ift-only-{seed} 3 ['SFT', 'metrics.jsonl']",
            f"ift-only-{seed} 1 ['M1', 'M2', 'SFT', 'metrics.jsonl']",
            f"five-iterations-{seed} 5 ['M1', 'M2', 'M3', 'SFT', 'metrics.jsonl']",
        }
    said = capsys.readouterr().out
    assert (out / "table.md").read_text() in said
    assert "`ift-only` of seed 1 ended with M1: " in said and "none of 9 prompts gave a pair" in said
    rows = json.loads((out / "ablations.json").read_text())["rows"]
    assert [(r["name"], r["last"]) for r in rows] == [
        ("full", ["M3"] * 2), ("ift-only", ["M1"] * 2), ("five-iterations", ["M5"] * 2)]  # fmt: skip
    assert [r["last_vs_sft"]["points"] for r in rows] == [100] * 3 and rows[1]["learned"] == {"M2": [0, 0]}
    assert rows[2]["full_vs_last"]["points"] == -100  # M3's answers are graded 3, M5's 5

    assert go(repository, *wanted) == []  # all is there
    assert len(go(repository, *wanted, "--args", "--beta 0.5")) == 8  # but with other flags


def test_a_run_that_fails_stops_the_others_and_the_next_start_makes_what_is_missing(repository):
    wanted = ("--seeds", 0, 1, "--only", "shuffled", "--workers", 1)
    (repository / "out/crash shuffled-1").touch()
    with pytest.raises(BadInput, match=r"shuffled-1.log: train.py ended with status 3"):
        go(repository, *wanted)
    assert not (repository / "out/table.md").exists()
    (repository / "out/crash shuffled-1").unlink()
    assert [line.split()[0] for line in go(repository, *wanted)] == ["shuffled-1"]


def test_a_killed_ablation_leaves_no_process_behind(repository):
    out = repository / "out"
    (out / "stand still full-0").touch()
    command = [sys.executable, repository / "data/zoo/ablate.py", "--data", repository / "data/zoo", "--out", out]
    process, deadline = subprocess.Popen(command, stderr=subprocess.PIPE, text=True), time.time() + 60
    while "full-0" not in ((out / "started.txt").read_text() if (out / "started.txt").exists() else ""):
        assert time.time() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    began = time.time()
    _, said = process.communicate(timeout=60)
    assert said == "interrupted; the same command goes on\n" and process.returncode == 1
    assert time.time() - began < 30  # train.py, which would have slept for a minute, has been ended
