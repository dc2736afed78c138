"""scripts/ablate.py: the table of hand-made runs, runs by a train.py that makes them at once, and
the controls in the tiny world."""

import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tiny
import torch
import torch.distributed as dist

import judge
import train
from model import UserError, load, read_json, write_json
from sample import read_jsonl
from scripts import ablate
from scripts.ablate import FULL, VARIANTS, write_jsonl
from scripts.report import head_to_head

ROOT = Path(__file__).resolve().parents[1]
ZOO = ROOT / "data" / "zoo"
BY_NAME = {v.name: v for v in VARIANTS}


# ---- the variants ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", BY_NAME)
def test_every_variant_is_a_run_that_train_can_make_and_a_full_one_but_for_its_flags(name):
    v = BY_NAME[name]
    flags = ["--data", str(ZOO), "--iters", str(v.iters)]
    full = vars(train.parse_args(flags))
    cfg = vars(train.parse_args([*flags, *v.flags.split()]))
    changed_fields = {field for field in cfg if cfg[field] != full[field]}
    assert changed_fields == {flag[2:].replace("-", "_") for flag in v.flags.split()[::2]}
    assert v == FULL or v.flags or v.note


def test_variants_have_names_of_their_own_and_the_full_method_comes_first():
    assert len(BY_NAME) == len(VARIANTS)
    assert VARIANTS[0] == FULL == BY_NAME["full"]


# ---- the controls' files ---------------------------------------------------------------------


def make_judgements(num_prompts: int, owners=(0, 1, 3), votes: int = 3) -> list[dict]:
    """Judgements whose texts name the owner, each with a score of its own."""
    rows = []
    for i, k, vote in product(range(num_prompts), owners, range(votes)):
        row = {"id": i, "k": k, "vote": vote, "text": f"response {k}"}
        rows.append(row | {"score": k + vote / 10})
    return rows


def columns(rows: list[dict], *names: str) -> list[tuple]:
    return [tuple(row[name] for name in names) for row in rows]


def test_shuffled_judgements_stay_whole_and_stay_with_their_prompt():
    before = make_judgements(300)
    after = ablate.shuffle_owners(before, seed=0)
    assert columns(after, "id", "k", "vote") == columns(before, "id", "k", "vote")
    names = ("id", "vote", "text", "score")
    assert sorted(columns(after, *names)) == sorted(columns(before, *names))
    sources = defaultdict(set)  # of a response: whose judgements it has
    for row in after:
        sources[row["id"], row["k"]].add(row["text"])
    assert all(len(texts) == 1 for texts in sources.values())  # all votes of an owner together
    counts = Counter(text for (_, k), (text,) in sources.items() if k == 0)
    assert len(counts) == 3 and min(counts.values()) > 70  # those of each about as often


def test_who_gets_which_judgements_depends_on_the_seed_and_not_on_the_order_of_rows():
    rows = make_judgements(20)
    assert ablate.shuffle_owners(rows, seed=0) == ablate.shuffle_owners(rows[::-1], seed=0)
    assert ablate.shuffle_owners(rows, seed=0) != ablate.shuffle_owners(rows, seed=1)
    lone = make_judgements(5, owners=[2])
    assert ablate.shuffle_owners(lone, seed=0) == lone


def test_a_positive_has_a_mean_of_exactly_5_and_an_end(tmp_path):
    responses = []
    for k in range(5):
        row = {"id": 0, "k": k, "prompt": "What is it?", "response": f"It is {k}."}
        responses.append(row | {"tokens": [k], "truncated": k == 3})
    scores = {0: [5, 4], 1: [5, 5], 2: [None, 5], 3: [5, 5], 4: [None, None]}
    judgements = []
    for k, votes in scores.items():
        judgements += [{"id": 0, "k": k, "score": score} for score in votes]
    (tmp_path / "M2").mkdir()
    write_jsonl(tmp_path / "M2" / "candidates.jsonl", responses)
    write_jsonl(tmp_path / "M2" / "judgements.jsonl", judgements)
    assert ablate.best_responses(tmp_path) == [
        {"prompt": "What is it?", "response": "It is 1."},
        {"prompt": "What is it?", "response": "It is 2."},
    ]


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def changed_files(data: Path, other: Path) -> set[str]:
    """The files that are not the same in two data folders; neither README nor programs count."""
    old, new = read_files(data), read_files(other)
    names = {name for name in {*old, *new} if old.get(name) != new.get(name)}
    return names - {"README.md", "prepare.py"}


def test_the_positive_folder_differs_in_its_seed_data_alone(tmp_path, monkeypatch):
    best = [{"prompt": "What is an owl?", "response": "A bird."}]
    monkeypatch.setattr(ablate, "best_responses", lambda run: best)
    ablate.make_positive_data(ZOO, tmp_path / "full-0", tmp_path / "data")
    assert changed_files(ZOO, tmp_path / "data") == {"ift.jsonl", "positives.jsonl"}
    rows = read_jsonl(tmp_path / "data" / "ift.jsonl")
    assert rows == read_jsonl(ZOO / "ift.jsonl") + best
    assert ablate.count_examples(tmp_path / "positive-0", tmp_path / "data") == {"M1": 1}


# ---- intervals -------------------------------------------------------------------------------


def graded(*grades: int) -> dict[int, int]:
    """Grades by prompt id."""
    return dict(enumerate(grades))


def test_wins_minus_losses_are_counted_over_prompts_and_seeds_whatever_their_order():
    first = graded(5, 3, 2, 0), graded(4, 3, 1, 1)  # two wins, a tie, a loss
    reverse = {3: 1, 2: 1, 1: 1, 0: 1}
    second = reverse, graded(0, 0, 0, 2)  # three wins, a loss
    result = ablate.compare_over_seeds([first, second])
    assert (result["win"], result["tie"], result["lose"]) == (62.5, 12.5, 25)
    assert result["points"] == 37.5
    assert result["by_seed"] == [25, 50]
    same = ablate.compare_over_seeds([(reverse, reverse)])
    assert ablate.points_cell(same) == "same"
    assert same["low"] == same["high"] == 0
    more = first[0] | {9: 5}, first[1] | {8: 1}  # prompts that only one has answered
    assert ablate.compare_over_seeds([more]) == ablate.compare_over_seeds([first])


def random_grades(rng, count: int = 40) -> tuple[dict, dict]:
    """Of two models on the same prompts."""
    return graded(*rng.integers(0, 6, count)), graded(*rng.integers(0, 6, count))


def test_the_interval_is_that_of_resampling_whole_prompts():
    rng = np.random.default_rng(1)
    pairs = [random_grades(rng) for _ in range(3)]
    result = ablate.compare_over_seeds(pairs)
    grades = np.array([[list(a.values()), list(b.values())] for a, b in pairs])
    signs = np.sign(grades[:, 0] - grades[:, 1])  # (seeds, prompts)
    assert result["points"] == pytest.approx(100 * signs.mean())
    means = []
    for _ in range(10000):
        prompts = rng.integers(0, 40, 40)
        means.append(100 * signs[:, prompts].mean())
    low, high = np.percentile(means, [2.5, 97.5])
    assert result["low"] == pytest.approx(low, abs=1)
    assert result["high"] == pytest.approx(high, abs=1)


def test_one_seed_gives_the_reports_figures_and_the_same_seed_thrice_tells_no_more():
    a, b = random_grades(np.random.default_rng(2))
    once = ablate.compare_over_seeds([(a, b)])
    expected = head_to_head(list(a.values()), list(b.values()))
    for key in ("win", "tie", "lose"):
        assert once[key] == pytest.approx(expected[key]), key
    for key in ("low", "high"):  # the resampling is another; a prompt is 2.5 points
        assert once[key] == pytest.approx(expected[key], abs=2.5), key
    thrice = ablate.compare_over_seeds([(a, b)] * 3)
    for key in ("points", "low", "high"):
        assert thrice[key] == pytest.approx(once[key]), key


# ---- the table -------------------------------------------------------------------------------


class Oracle:
    @staticmethod
    def grade(prompt: str, response: str) -> int:
        return int(response)


JUDGEMENT = {"id": 0, "k": 0, "vote": 0, "text": "Score: 3", "score": 3}
PAIR = {"prompt": "?", "chosen_tokens": [1], "rejected_tokens": [1]}


def make_run(run: Path, answers: dict[str, str], num_pairs: dict[str, int], error: str = ""):
    """A run folder as train.py and ablate.py leave it.

    answers: model -> its grades, a digit each, which its answers are; num_pairs: model -> pairs of
    its round, 0 where the round failed.
    """
    run.mkdir(parents=True)
    write_json(run / "config.json", {"data": str(run.parent)})
    write_json(run / "outcome.json", {"flags": [], "error": error})
    for name, digits in answers.items():
        (run / name).mkdir()
        write_json(run / name / "config.json", {})
        rows = []
        for i, digit in enumerate(digits):
            row = {"id": i, "prompt": "?", "response": digit}
            rows.append(row | {"tokens": [1] * int(digit)})
        write_jsonl(run / name / "test.jsonl", rows)
        exam = []
        for k, score in enumerate([None, None] if name == "SFT" else [0, 1]):
            exam.append({"id": 0, "k": k, "score": score})
        write_jsonl(run / name / "exam.jsonl", exam)
    for name, count in num_pairs.items():
        (run / name).mkdir(exist_ok=True)
        write_jsonl(run / name / "judgements.jsonl", [JUDGEMENT])
        if count:
            write_jsonl(run / name / "pairs.jsonl", [PAIR] * count)
    return ablate.read_run(run, Oracle)


@pytest.fixture
def rows(tmp_path):
    """Rows of the table from two seeds of four variants."""
    people = {"prompt": "?", "responses": ["a", "b"], "ranks": [1, 0]}
    write_jsonl(tmp_path / "eft_eval.jsonl", [people])
    m2 = {"SFT": "1111", "M1": "1111", "M2": "2221"}
    m3 = m2 | {"M3": "3333"}
    m5 = m3 | {"M4": "3334", "M5": "2333"}
    pairs = {"M2": 2, "M3": 4}
    five_pairs = pairs | {"M4": 6, "M5": 6}

    def make_runs(name, first_seed, second_seed, num_pairs, error=""):
        runs = []
        for seed, answers in enumerate((first_seed, second_seed)):
            runs.append(make_run(tmp_path / f"{name}-{seed}", answers, num_pairs, error))
        return runs

    alone = {"SFT": "1111", "M1": "0111"}
    runs = {
        "full": make_runs("full", m3, m3, pairs),
        "ift-only": make_runs("ift-only", alone, alone, {"M2": 0}, "no pair"),
        "votes-1": make_runs("votes-1", m2 | {"M3": "3344"}, m2 | {"M3": "1111"}, pairs),
        "five-iterations": make_runs("five-iterations", m5, m5, five_pairs),
    }
    rows = {}
    for name in runs:
        rows[name] = ablate.compare_variant(BY_NAME[name], runs[name], runs["full"])
    return rows


def test_a_row_compares_models_of_the_same_iteration(rows):
    full, votes = rows["full"], rows["votes-1"]
    assert full["m2_vs_sft"]["points"] == 75
    assert full["last_vs_sft"]["points"] == 100
    assert full["full_vs_m2"] is full["full_vs_last"] is None
    steps = {step: result["points"] for step, result in full["steps"].items()}
    assert steps == {"M1 vs SFT": 0, "M2 vs M1": 75, "M3 vs M2": 100}
    assert ablate.points_cell(votes["full_vs_m2"]) == "same"
    assert votes["last"] == ["M3", "M3"]
    assert votes["last_vs_sft"]["by_seed"] == [100, 0]
    assert votes["full_vs_last"]["by_seed"] == [-50, 100]
    assert votes["full_vs_last"]["points"] == 25
    assert votes["true_mean"] == votes["tokens"] == [3.5, 1]
    assert votes["examples"] == {"M2": [2, 2], "M3": [4, 4]}
    assert votes["pairwise"] == votes["parse_rate"] == [1, 1]


def test_where_a_model_is_missing_the_last_one_before_it_stands(rows):
    alone, five = rows["ift-only"], rows["five-iterations"]
    assert alone["last"] == ["M1", "M1"]
    assert alone["errors"] == ["no pair", "no pair"]
    assert alone["m2_vs_sft"] == alone["last_vs_sft"]
    assert alone["last_vs_sft"]["points"] == -25
    assert alone["full_vs_m2"]["points"] == 75
    assert alone["full_vs_last"]["points"] == 100
    assert alone["examples"] == {"M2": [0, 0]}
    assert alone["steps"].keys() == {"M1 vs SFT"}
    assert five["last"] == ["M5", "M5"]
    assert five["full_vs_last"]["points"] == 25  # M3 and M5
    assert five["steps"]["M5 vs M4"]["points"] == -50
    assert five["steps"]["M4 vs M3"]["points"] == 25


def test_the_table_says_what_the_rows_hold(rows):
    text = ablate.table_text(list(rows.values()), [0, 1])
    lines = text.splitlines()
    cells = "+75.0 [+25.0, +100.0] |  | M3 | +100.0 [+100.0, +100.0] |  |"
    assert f"| `full` |  | {FULL.paper} | {cells}" in lines
    assert text.count("\n| `ift-only` | `--eft-size 0` | scores collapse") == 1
    assert "| `ift-only` | 0.75 | 0.8 | 0 | 100.0% | 100.0% |" in lines
    assert "| `five-iterations` | 2.75 | 2.8 | 2, 4, 6, 6 | 100.0% | 100.0% |" in lines
    assert "than the last one of: ift-only; not of: votes-1, five-iterations." in text
    assert "- `ift-only` of seed 1 ended with M1: no pair" in lines
    for block in text.split("\n\n"):  # every table is rectangular
        bars = {line.count("|") for line in block.splitlines() if line.startswith("|")}
        assert len(bars) <= 1, block


# ---- runs, by a train.py that makes their files in no time -----------------------------------


def test_files_are_ordered_as_a_run_writes_them():
    files = ["SFT/config.json", "M3/prompts.jsonl", "M1/config.json"]
    round_files = ["candidates.jsonl", "judgements.jsonl", "pairs.jsonl", "model.safetensors"]
    for name in ("M2", "M3", "M4", "M10"):
        files += [f"{name}/{file}" for file in round_files]
    mixed_files = files[1::2] + files[::2]
    assert sorted(mixed_files, key=ablate.write_order) == files


def test_the_words_that_tell_that_there_are_no_pairs_are_those_of_train():
    assert ablate.NO_PAIRS.search((ROOT / "train.py").read_text())


TRAIN = """
import json, sys, time
from pathlib import Path
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out, iters = Path(flags["--out"]), int(flags["--iters"])
with (out.parent / "starts.txt").open("a") as f:
    f.write(f"{out.name} {iters} {sorted(p.name for p in out.glob('*'))}\\n")
if (out.parent / f"stand still {out.name}").exists():
    time.sleep(60)
if (out.parent / f"crash {out.name}").exists():
    sys.exit(3)
for t, name in enumerate(["SFT", *(f"M{i}" for i in range(1, iters + 1))]):
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    if t > 1:
        judgement = {"id": 0, "k": 0, "vote": 0, "score": None}
        (folder / "judgements.jsonl").write_text(json.dumps(judgement) + "\\n")
    if t > 1 and flags.get("--eft-size") == "0":
        sys.exit(f"error: {folder}: no prompt gave a pair")
    row = {"id": 0, "prompt": "?", "response": str(t), "tokens": [1], "truncated": False}
    (folder / "test.jsonl").write_text(json.dumps(row) + "\\n")
    (folder / "config.json").write_text("{}")
(out / "config.json").write_text(json.dumps({"data": flags["--data"]}))
(out / "metrics.jsonl").touch()
"""


@pytest.fixture
def fake(tmp_path):
    """A folder with a train.py that makes a run's files at once, and tells how it was started."""
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "data").mkdir()
    oracle = "def grade(prompt, response):\n    return int(response)\n"
    (tmp_path / "data" / "oracle.py").write_text(oracle)
    (tmp_path / "out").mkdir()
    return tmp_path


def ablate_with(fake: Path, *flags) -> list[str]:
    """What train.py was started for by one more call of ablate.py."""
    starts = fake / "out" / "starts.txt"
    starts.write_text("")
    folders = ("--data", fake / "data", "--out", fake / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablate, "ROOT", fake)
        patch.setattr(signal, "signal", lambda *_: None)
        ablate.main([str(flag) for flag in (*folders, "--workers", 2, *flags)])
    return starts.read_text().splitlines()


def test_runs_are_made_once_and_one_that_cannot_go_on_is_evaluated_as_far_as_it_came(fake, capsys):
    flags = ("--seeds", 0, 1, "--only", "ift-only", "five-iterations")
    starts, out = ablate_with(fake, *flags), fake / "out"
    assert len(starts) == 8
    for seed in (0, 1):
        first, *others = [line for line in starts if f"-{seed} " in line]
        assert first == f"full-{seed} 3 []"
        assert set(others) == {
            f"ift-only-{seed} 3 ['SFT', 'metrics.jsonl']",
            f"ift-only-{seed} 1 ['M1', 'M2', 'SFT', 'metrics.jsonl']",
            f"five-iterations-{seed} 5 ['M1', 'M2', 'M3', 'SFT', 'metrics.jsonl']",
        }
    printed = capsys.readouterr().out
    assert (out / "table.md").read_text() in printed
    assert "`ift-only` of seed 1 ended with M1: " in printed and "no prompt gave a pair" in printed
    rows = read_json(out / "ablations.json")["rows"]
    assert {row["name"]: row["last"] for row in rows} == {
        "full": ["M3", "M3"],
        "ift-only": ["M1", "M1"],
        "five-iterations": ["M5", "M5"],
    }
    assert [row["last_vs_sft"]["points"] for row in rows] == [100, 100, 100]
    assert rows[1]["examples"] == {"M2": [0, 0]}
    assert rows[2]["full_vs_last"]["points"] == -100  # M3's answers have grade 3, M5's 5

    assert ablate_with(fake, *flags) == []  # all is there
    assert len(ablate_with(fake, *flags, "--args", "--beta 0.5")) == 8  # but with other flags


def test_a_run_that_fails_stops_the_others_and_the_next_start_makes_what_is_missing(fake):
    flags = ("--seeds", 0, 1, "--only", "votes-1", "--workers", 1)
    crash = fake / "out" / "crash votes-1-1"
    crash.touch()
    with pytest.raises(UserError, match=r"votes-1-1.log: train.py ended with status 3"):
        ablate_with(fake, *flags)
    assert not (fake / "out" / "table.md").exists()
    crash.unlink()
    assert [line.split()[0] for line in ablate_with(fake, *flags)] == ["votes-1-1"]


COMMAND = """
import pathlib, sys
from scripts import ablate
ablate.ROOT = pathlib.Path(sys.argv.pop(1))
ablate.run_command(ablate.main)
"""


def wait_for(condition, seconds: float = 60):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.05)


def test_a_killed_ablation_leaves_no_process_behind(fake):
    out = fake / "out"
    (out / "stand still full-0").touch()
    command = [sys.executable, "-c", COMMAND, fake, "--data", fake / "data", "--out", out]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    starts = out / "starts.txt"
    wait_for(lambda: starts.exists() and "full-0" in starts.read_text())
    process.send_signal(signal.SIGTERM)
    began = time.time()
    _, error = process.communicate(timeout=60)
    assert error == "error: interrupted; the same command goes on\n" and process.returncode == 1
    assert time.time() - began < 30  # train.py, which would have slept for a minute, has ended


# ---- the controls in the tiny world ----------------------------------------------------------

ORACLE = "def grade(prompt, response):\n    return len(response.split()) % 6\n"
FLAGS = "--votes 1 --max-response 9"  # one vote: many means of 5; and some responses are truncated


def train_here(flags: list[str], log: Path) -> str:
    """ablate.train in this process, which has imported torch already."""
    try:
        train.main(train.parse_args(flags))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return ""


class Training(NamedTuple):
    """What a model was trained on, and from which weights."""

    examples: list[tuple]
    start: dict[str, torch.Tensor]


class Ablation(NamedTuple):
    """A full run and the two controls that start from it."""

    data: Path
    out: Path
    rows: dict[str, dict]  # of the table
    trainings: dict[tuple[str, str], Training]  # of (run, model)

    def models_trained(self, run: str) -> list[str]:
        return [name for folder, name in self.trainings if folder == run]


@pytest.fixture(scope="module")
def ablation(world, tmp_path_factory) -> Ablation:
    data = tmp_path_factory.mktemp("ablation") / "data"
    out = tmp_path_factory.mktemp("runs")
    shutil.copytree(world.data, data)
    (data / "oracle.py").write_text(ORACLE)
    trainings = {}
    train_model = train.train_model

    def watch(run, model, name, batches, examples, *rest):
        start = {key: p.detach().clone() for key, p in model.named_parameters()}
        trainings[run.folder.name, name] = Training(examples, start)
        train_model(run, model, name, batches, examples, *rest)

    flags = ["--data", data, "--out", out, "--seeds", 0, "--workers", 1]
    flags += ["--only", "shuffled", "positive", "--args", f"--init {world.base} {FLAGS}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablate, "train", train_here)
        patch.setattr(train, "train_model", watch)
        patch.setattr(signal, "signal", lambda *_: None)
        ablate.main([str(flag) for flag in flags])
    rows = {row["name"]: row for row in read_json(out / "ablations.json")["rows"]}
    return Ablation(data, out, rows, trainings)


def same_files(run: Path, other: Path) -> set[str]:
    """The files that two runs have both, byte for byte."""
    files, others = tiny.products(run), tiny.products(other)
    return {name for name in files if files[name] == others.get(name)}


def test_the_shuffled_run_starts_from_the_full_runs_files(ablation):
    full, shuffled = ablation.out / "full-0", ablation.out / "shuffled-0"
    same = same_files(shuffled, full)
    before_m2 = {name for name in tiny.products(full) if name.startswith(("SFT/", "M1/"))}
    assert before_m2 | {"M2/prompts.jsonl", "M2/candidates.jsonl"} <= same
    assert not {"M2/judgements.jsonl", "M2/pairs.jsonl", "M2/model.safetensors"} & same
    for name in ("SFT", "M1"):
        assert tiny.read_metrics(shuffled, name) == tiny.read_metrics(full, name)
    assert ablation.models_trained("shuffled-0") == ["M2"]
    assert ablation.rows["shuffled"]["last"] == ["M2"]


def test_the_shuffled_runs_pairs_are_made_of_the_judgements_of_other_responses(ablation):
    full, shuffled = ablation.out / "full-0" / "M2", ablation.out / "shuffled-0" / "M2"
    judgements = read_jsonl(shuffled / "judgements.jsonl")
    assert judgements == ablate.shuffle_owners(read_jsonl(full / "judgements.jsonl"), seed=0)
    prompts = read_jsonl(full / "prompts.jsonl")
    candidates = read_jsonl(full / "candidates.jsonl")
    pairs, _ = judge.prefer(prompts, candidates, judge.mean_scores(judgements))
    for pair, row in zip(pairs, read_jsonl(shuffled / "pairs.jsonl"), strict=True):
        assert pair.items() <= row.items()


def test_positive_trains_m0_on_the_seed_rows_and_exactly_the_responses_of_mean_score_5(
    world, ablation
):
    base, tok = load(world.base)
    full_round = ablation.out / "full-0" / "M2"
    judgements = read_jsonl(full_round / "judgements.jsonl")
    best_keys = {(row["id"], row["k"]) for row in judgements if row["score"] == 5}
    candidates = read_jsonl(full_round / "candidates.jsonl")
    best = [row for row in candidates if (row["id"], row["k"]) in best_keys]
    finished = [row for row in best if not row["truncated"]]
    assert 0 < len(finished) < len(best)

    examples, start = ablation.trainings["positive-0", "M1"]
    seed_examples, _ = ablation.trainings["full-0", "M1"]
    num_ift = len(read_jsonl(world.data / "ift.jsonl"))
    positives = examples[num_ift : num_ift + len(finished)]
    texts = [(tok.chat(row["prompt"]), tok.response(row["response"])) for row in finished]
    assert positives == texts
    assert examples == seed_examples[:num_ift] + positives + seed_examples[num_ift:]
    for name, p in base.named_parameters():
        assert torch.equal(start[name], p), name
    assert ablation.models_trained("positive-0") == ["M1"]


def test_the_positive_m1_stands_beside_the_full_methods_m2(ablation):
    full, positive = ablation.out / "full-0", ablation.out / "positive-0"
    sft_files = {name for name in tiny.products(full) if name.startswith("SFT/")}
    assert sft_files <= same_files(positive, full)  # the baseline is the full method's
    oracle = ablate.load_oracle(ablation.data / "oracle.py")
    grades = []
    for folder in (full / "M2", positive / "M1"):
        answers = read_jsonl(folder / "test.jsonl")
        grades.append({row["id"]: oracle.grade("", row["response"]) for row in answers})
    row = ablation.rows["positive"]
    expected = ablate.compare_over_seeds([tuple(grades)])
    assert row["full_vs_last"] == row["full_vs_m2"] == expected
    assert row["last"] == ["M1"]
    assert row["steps"].keys() == {"M1 vs SFT"}
    positives = read_jsonl(ablation.out / "data" / "positive-0" / "positives.jsonl")
    assert row["examples"] == {"M1": [len(positives)]}


@pytest.mark.parametrize("name", ["shuffled-0", "positive-0"])
def test_the_controls_are_finished_runs_that_the_same_command_leaves_alone(world, ablation, name):
    run = ablation.out / name
    before = tiny.products(run)
    config = read_json(run / "config.json")
    flags = ("--iters", config["iters"], *FLAGS.split())
    tiny.run(world, run, *flags, data=config["data"])
    tiny.assert_same(tiny.products(run), before)


# ---- what a variant copies from the full run -------------------------------------------------


@pytest.mark.parametrize("name", ["votes-1", "candidates-8", "five-iterations"])
def test_a_variant_copies_all_that_it_shares_and_ends_as_if_it_had_copied_nothing(
    world, whole, tmp_path, name
):
    v = BY_NAME[name]
    flags = ("--iters", v.iters, *v.flags.split())
    alone, run = tmp_path / "alone", tmp_path / "run"
    tiny.run(world, alone, *flags)
    same = same_files(alone, whole) - {"config.json", "metrics.jsonl"}
    first = v.first.replace("config.json", "model.safetensors")
    assert first not in same  # what comes later may still be the same, by chance

    ablate.copy_run(whole, run, v, seed=0)
    copies = {file for file in tiny.products(run) if "/" in file}
    assert copies == {f for f in same if ablate.write_order(f) < ablate.write_order(v.first)}
    models = {file.split("/")[0] for file in copies if file.endswith("/config.json")}
    assert models == {row["model"] for row in tiny.read_metrics(run)}
    tiny.run(world, run, *flags)
    tiny.assert_same(tiny.products(run), tiny.products(alone))
