"""tests/test_train.py: the whole loop in a tiny world (tests/tiny.py): its files, resuming, many
processes, knobs, and what it refuses.

Runs are bitwise reproducible here (a CPU, one thread), so most properties compare files byte for
byte.
"""

import ast
import gc
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import weakref
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tiny import ROOT, Kill, assert_same, flags_of, products, read_metrics, run, start, write_rows

import judge
import sample
import train
from dpo import make_batches, micro_batches
from model import ModelConfig, UserError, check_tp, load
from sample import read_jsonl

SHARED = ROOT.parent / "shared" / "data"
MODEL_FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
}
ROUND_FILES = ["prompts.jsonl", "candidates.jsonl", "judgements.jsonl", "pairs.jsonl"]
FIVE_FILES = ["model.py", "sample.py", "judge.py", "dpo.py", "train.py"]


class Finished(Exception):
    """What a test waits for is there."""


def make_variant(world, folder: Path, files: dict) -> Path:
    """A copy of the data folder with other files: rows, texts, bytes, or None for none."""
    data = folder / "data"
    shutil.copytree(world.data, data)
    for name, content in files.items():
        if content is None:
            (data / name).unlink()
        elif isinstance(content, list):
            write_rows(data / name, content)
        else:
            text = content if isinstance(content, bytes) else content.encode()
            (data / name).write_bytes(text)
    return data


def copy_products(run_folder: Path, out: Path, *patterns: str) -> Path:
    """A run folder that stands where these files (globs) are all there is of another run's."""
    for pattern in patterns:
        for path in run_folder.glob(pattern):
            copy = out / path.relative_to(run_folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    return out


def copy_models(run_folder: Path, out: Path, *names: str) -> Path:
    """A run folder in which another run's models are all there is."""
    patterns = [f"{name}/{file}" for name in names for file in MODEL_FILES]
    return copy_products(run_folder, out, *patterns)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load(folder)[0].named_parameters())


def assert_close(lines: list[dict], others: list[dict], keys: list[str], tolerance: float):
    """Two lists of metrics are of the same steps, and equal but for rounding."""
    assert lines and [line["step"] for line in lines] == [line["step"] for line in others]
    for line, other in zip(lines, others, strict=True):
        for key in keys:
            expected = pytest.approx(other[key], rel=tolerance, abs=tolerance)
            assert line[key] == expected, (line["model"], line["step"], key)


def row_keys(rows: list[dict]) -> list[tuple]:
    return [(row.get("id"), row.get("k"), row.get("vote")) for row in rows]


def assert_same_rows(rows: list[dict], others: list[dict]):
    """No row is missing, and hardly any is another. Logits depend in their last bits on what is
    computed beside them, and a random number that falls between may take the next token."""
    assert row_keys(rows) == row_keys(others)
    num_different = 0
    for row, other in zip(rows, others, strict=True):
        values = {k: v for k, v in row.items() if not k.startswith("reference")}
        num_different += any(other[k] != v for k, v in values.items())
    assert num_different <= len(others) / 50


# ---- the command and its files ---------------------------------------------------------------


def test_the_shipped_command_leaves_every_file_and_a_second_start_changes_no_byte(
    world, whole, tmp_path
):
    out = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "train.py"]
    command = [*torchrun, *flags_of(world, out)]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert first.returncode == 0, first.stderr
    expected = {
        "config.json",
        "metrics.jsonl",
        ".lock",
    }  # and no report: that is scripts/report.py's
    for name in ("SFT", "M1", "M2", "M3"):
        expected |= {f"{name}/{file}" for file in (*MODEL_FILES, "exam.jsonl", "test.jsonl")}
    for name in ("M2", "M3"):
        expected |= {f"{name}/{file}" for file in ROUND_FILES}
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    times = {path: path.stat().st_mtime_ns for path in files}
    assert {str(path.relative_to(out)) for path in files} == expected
    assert_same(products(out), products(whole))  # it is the run that the tests below look at
    check_log(first.stdout, out)

    second = start(flags_of(world, out), tmp_path / "log")
    assert second.code == 0, second.err
    assert len(second.out.splitlines()) == 1 and second.out.startswith("done: SFT, M1, M2, M3")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == files
    newer = {path.name for path in files if path.stat().st_mtime_ns != times[path]}
    assert newer <= {"config.json"}  # the knobs are written anew


def check_log(text: str, out: Path):
    """A line a step of every model, as this is no terminal, and one for all that was sampled."""
    lines = text.splitlines()
    for name in ("SFT", "M1", "M2", "M3"):
        metrics = read_metrics(out, name)
        assert [m["step"] for m in metrics] == list(range(1, metrics[0]["steps"] + 1))
        step_lines = [line for line in lines if line.startswith(f"{name} step ")]
        steps = [line.split()[2] for line in step_lines]
        assert steps == [f"{m['step']}/{m['steps']}" for m in metrics]
        assert all("loss" in line and "tok/s" in line for line in step_lines)
    for file in ("M2/prompts", "M2/candidates", "M2/judgements", "M3/test", "SFT/exam"):
        titles = [line for line in lines if line.startswith(f"{file}.jsonl: ")]
        assert any("tok/s" in line for line in titles), file
    assert lines[-1].startswith("done: ") and f"python -m scripts.report {out}" in lines[-1]


def test_sft_lowers_the_loss_and_updates_follow_the_schedule(whole):
    for name, num_rows in (("SFT", 21), ("M1", 42)):
        metrics = read_metrics(whole, name)
        rates = [m["lr"] for m in metrics]
        steps_per_epoch = -(-num_rows // 5)
        assert len(metrics) == steps_per_epoch * 5
        first_epoch, last_epoch = metrics[:steps_per_epoch], metrics[-steps_per_epoch:]
        assert sum(m["loss"] for m in last_epoch) < 0.85 * sum(m["loss"] for m in first_epoch)
        assert max(rates) == 3e-3 and 0.2 * 3e-3 <= rates[-1] < 0.25 * 3e-3
        assert (rates[0] < 3e-3) == (len(metrics) >= 40)  # 5 % of the steps are warm-up
        assert rates[-steps_per_epoch:] == sorted(rates[-steps_per_epoch:], reverse=True)
    metrics = read_metrics(whole, "M2")
    num_pairs = len(read_jsonl(whole / "M2" / "pairs.jsonl"))
    assert len(metrics) == 3 * -(-num_pairs // 5)
    assert 0.1 * 1e-3 <= metrics[-1]["lr"] < 0.35 * 1e-3


@pytest.mark.parametrize("name, count", [("M2", 9), ("M3", 7)])
def test_rows_of_a_round_are_complete_and_ordered(whole, name, count):
    prompts, candidates, judgements, pairs = (
        read_jsonl(whole / name / file) for file in ROUND_FILES
    )
    assert [p["id"] for p in prompts] == list(range(count))
    ids_and_ks = [(i, k) for i in range(count) for k in range(3)]
    assert [(c["id"], c["k"]) for c in candidates] == ids_and_ks
    assert all(c["prompt"] == prompts[c["id"]]["prompt"] for c in candidates)
    assert all(c["truncated"] == (c["tokens"][-1] != 2) for c in candidates)
    assert all(c["tokens"].count(2) <= 1 for c in candidates)
    assert len({(c["id"], *c["tokens"]) for c in candidates}) > 2 * count  # those of one differ
    with_text = [(c["id"], c["k"]) for c in candidates if c["response"]]
    assert row_keys(judgements) == [(i, k, vote) for i, k in with_text for vote in range(2)]
    assert len(pairs) >= 2 and all(p["chosen_score"] > p["rejected_score"] for p in pairs)
    assert {p["prompt"] for p in pairs} <= {p["prompt"] for p in prompts}


def test_new_prompts_are_new(world, whole):
    old = set()
    for file in ("ift", "test", "eft_eval"):
        old |= {row["prompt"] for row in read_jsonl(world.data / f"{file}.jsonl")}
    new = []
    for name in ("M2", "M3"):
        new += [row["prompt"] for row in read_jsonl(whole / name / "prompts.jsonl")]
    assert len(set(new)) == len(new) == 16 and not old & set(new)


def test_prompts_of_a_round_are_held_against_all_that_came_before(
    world, whole, tmp_path, monkeypatch
):
    calls, propose = [], sample.propose

    def watch(write, tok, template, seeds, count, **settings):
        calls.append((seeds, settings["earlier"], settings["held_out"]))
        if len(calls) == 3:
            raise Finished
        return propose(write, tok, template, seeds, count, **settings)

    monkeypatch.setattr(sample, "propose", watch)
    out = copy_models(whole, tmp_path / "run", "SFT")
    with pytest.raises(Finished):
        run(world, out, "--iters", 4)
    first, second = (
        [row["prompt"] for row in read_jsonl(out / name / "prompts.jsonl")]
        for name in ("M2", "M3")
    )
    assert [earlier for _, earlier, _ in calls] == [[], first, first + second]
    ift, test, exam = (
        [row["prompt"] for row in read_jsonl(world.data / f"{file}.jsonl")]
        for file in ("ift", "test", "eft_eval")
    )
    for seeds, _, held_out in calls:
        assert seeds == ift and sorted(held_out) == sorted(test + exam)


@pytest.mark.parametrize("name", ["SFT", "M1", "M2", "M3"])
def test_every_model_answers_the_test_prompts_and_judges_the_exam(world, whole, name):
    prompts = [row["prompt"] for row in read_jsonl(world.data / "test.jsonl")]
    responses = read_jsonl(whole / name / "test.jsonl")
    assert [row["prompt"] for row in responses] == prompts
    assert row_keys(responses) == [(i, 0, None) for i in range(len(prompts))]
    exam = read_jsonl(whole / name / "exam.jsonl")
    assert row_keys(exam) == [(i, k, v) for i in range(3) for k in range(3) for v in range(2)]


def test_models_carry_the_sampling_settings_of_their_run(world, tmp_path):
    flags = ("--temperature", 0.8, "--top-p", 0.95, "--iters", 1, "--sft-epochs", 1)
    out = run(world, tmp_path / "run", *flags)
    for name in ("SFT", "M1"):
        settings = json.loads((out / name / "generation_config.json").read_text())
        assert settings["do_sample"] is True
        assert sample.sampling_settings(out / name) == {"temperature": 0.8, "top_p": 0.95}


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(world, whole, tmp_path):
    assert_same(products(run(world, tmp_path / "again")), products(whole))
    files = products(whole)
    others = products(run(world, tmp_path / "other", "--seed", 1, "--iters", 2))
    for name in ("SFT", "M1", "M2"):
        for file in ("model.safetensors", "test.jsonl", "exam.jsonl"):
            assert files[f"{name}/{file}"] != others[f"{name}/{file}"], (name, file)
    for file in ROUND_FILES:
        assert files[f"M2/{file}"] != others[f"M2/{file}"], file


def test_more_models_can_be_asked_of_a_finished_run(world, whole, tmp_path):
    out = run(world, tmp_path / "run", "--iters", 2)
    assert not (out / "M3").exists()
    run(world, out, "--iters", 3)
    assert_same(products(out), products(whole))


def test_training_never_reads_the_oracle(world, whole, tmp_path):
    data = make_variant(world, tmp_path, {"oracle.py": "raise RuntimeError('it was read')\n"})
    out = run(world, tmp_path / "run", "--iters", 2, data=data)
    files = products(whole)
    for name, content in products(out).items():
        if "/" in name:
            assert content == files[name], name


# ---- killed and started again ----------------------------------------------------------------


@pytest.fixture(scope="session")
def ranked_data(world, tmp_path_factory):
    """A data folder with human rankings and without eft.jsonl, as data/oasst makes it."""
    rng = random.Random(1)
    prompts = list(dict.fromkeys(tiny.question(rng) for _ in range(24)))
    rows = tiny.rankings(rng, prompts[:12])
    rows[5]["responses"][2] = " "  # a blank is judged
    rows[11]["responses"][2] = ""  # nothing is not
    files = {"eft.jsonl": None, "eft_ranked.jsonl": rows}
    return make_variant(world, tmp_path_factory.mktemp("ranked"), files)


KEEPING = (
    "--iters",
    2,
    "--dpo-epochs",
    3,
    "--save-every",
    4,
    "--keep-every",
    4,
    "--sft-lr",
    2.5e-3,
)


@pytest.fixture(scope="session")
def ranked_run(world, ranked_data):
    """An uninterrupted run whose EFT rows the baseline makes, and that keeps M2/step-4."""
    return run(world, world.folder / "ranked", *KEEPING, data=ranked_data)


DEATHS = [  # in the order in which a run comes by: each start gets as far as the next
    Kill("step", "SFT", 3),
    Kill("training state", "SFT", 8),
    Kill("save", "SFT"),
    Kill("sampling", "M1/eft_judgements.jsonl", 5),
    Kill("file", "M1/eft_judgements.jsonl"),
    Kill("file", "M1/eft.jsonl"),
    Kill("sampling", "M2/prompts.jsonl", 9),
    Kill("file", "M2/prompts.jsonl"),
    Kill("step", "M1", 11),
    Kill("save", "M1"),
    Kill("sampling", "M2/candidates.jsonl", 6),
    Kill("file", "M2/candidates.jsonl"),
    Kill("sampling", "M2/judgements.jsonl", 5),
    Kill("file", "M2/judgements.jsonl"),
    Kill("reference", "", 1),
    Kill("file", "M2/pairs.jsonl"),
    Kill("save", "step-4"),
    Kill("training state", "M2", 4),
    Kill("step", "M2", 6),
    Kill("save", "M2"),
    Kill("sampling", "SFT/test.jsonl", 4),
    Kill("file", "M1/test.jsonl"),
    Kill("sampling", "M2/exam.jsonl", 7),
    Kill("file", "M2/exam.jsonl"),
]


def test_killed_in_every_chapter_and_started_again_a_run_ends_in_the_same_bytes(
    world, ranked_data, ranked_run, tmp_path
):
    out, log = tmp_path / "run", ""
    expected = products(ranked_run)
    expected_metrics = read_metrics(ranked_run)
    flags = flags_of(world, out, *KEEPING, data=ranked_data)
    for number, death in enumerate(DEATHS):
        result = start(flags, tmp_path / f"log{number}", kill=death)
        assert result.code == -9, (death, result.out, result.err)
        log += result.out
        for file, content in products(out).items():  # what is there is what it will be in the end
            is_whole = file.endswith("s.jsonl") or (out / file).with_name("config.json").exists()
            if "/" in file and is_whole:
                assert content == expected[file], (death, file)
        assert all(m in expected_metrics for m in read_metrics(out)), death
    result = start(flags, tmp_path / "log")
    assert result.code == 0, result.err
    assert_same(products(out), expected)
    unfinished = [p for p in out.rglob("*") if p.suffix in (".tmp", ".part")]
    assert not unfinished and not list(out.rglob("checkpoint"))

    # a step is taken again only after a kill, and only from the last training state on
    steps = Counter(re.findall(r"^SFT step (\d+)/", log, re.MULTILINE))
    twice = [step for step in range(1, 26) if steps[str(step)] == 2]
    assert twice == [1, 2, 5, 6, 7, 8, 25] and set(steps.values()) == {1, 2}
    assert log.count("SFT: goes on after step 4") == 1
    assert log.count("SFT: goes on after step 24") == 1
    assert log.count("M1: goes on after step 8") == 1
    assert log.count("M2: goes on after step 4") == 2
    assert log.count("M2/prompts.jsonl: 0 requests") == 1  # written, when the file was not yet


def test_models_kept_along_the_way_are_those_of_their_steps(world, whole, tmp_path):
    """--keep-every: also the last step's, which is the finished model; of DPO only."""
    patterns = ("SFT/*", "M1/*", "M2/*s.jsonl")
    out = copy_products(whole, tmp_path / "run", *patterns)
    run(world, out, "--iters", 2, "--keep-every", 2)
    assert {p.name for p in out.glob("*/step-*")} == {"step-2", "step-4", "step-6"}
    assert {p.parent.name for p in out.glob("*/step-*")} == {"M2"}
    models = [out / "M1", *(out / "M2" / f"step-{step}" for step in (2, 4, 6))]
    for folder in models[1:]:
        assert {path.name for path in folder.iterdir()} == MODEL_FILES
    hashes = {sha256(folder / "model.safetensors") for folder in models}
    assert len(hashes) == 4
    for file in MODEL_FILES:
        assert (out / "M2" / file).read_bytes() == (models[-1] / file).read_bytes()
        assert (out / "M2" / file).read_bytes() == (whole / "M2" / file).read_bytes()
    assert read_metrics(out, "M2") == read_metrics(whole, "M2")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


IN_CHUNKS = ("--sample-batch", 2, "--iters", 2)  # 9 prompts are chunks of 5 and 4 rows


def ready_to_sample(whole: Path, out: Path) -> Path:
    """A run folder that stands before M1's first responses."""
    return copy_products(whole, out, "SFT/*", "M1/*", "M2/prompts.jsonl")


def test_sampling_goes_on_with_the_next_chunk(world, whole, tmp_path):
    straight = ready_to_sample(whole, tmp_path / "straight")
    run(world, straight, *IN_CHUNKS)
    out = ready_to_sample(whole, tmp_path / "run")
    flags = flags_of(world, out, *IN_CHUNKS)
    chunks = []
    for number, file in enumerate(("candidates", "judgements", "judgements")):
        kill = Kill("part", f"M2/{file}.jsonl", 2)  # each start gets to a second chunk
        result = start(flags, tmp_path / f"log{number}", kill=kill)
        assert result.code == -9, result.err
        lines = (out / f"M2/{file}.jsonl.part").read_text().splitlines(keepends=True)
        assert not lines[-1].endswith("\n")  # it is torn
        chunks.append([json.loads(line)["rows"] for line in lines[:-1]])
    result = start(flags, tmp_path / "log3")
    assert result.code == 0, result.err
    assert_same(products(out), products(straight))
    first, second = list(range(8)), list(range(8, 16))
    assert chunks == [[list(range(5))], [first], [first, second]]
    logs = [(tmp_path / f"log{n}" / "rank0.out").read_text() for n in (1, 2, 3)]
    assert "candidates.jsonl: 5 of 9 rows are there" in logs[0]
    assert "candidates.jsonl: 12 responses" in logs[0]  # what is there is not sampled again
    assert "judgements.jsonl: 8 of 27 rows are there" in logs[1]
    assert "judgements.jsonl: 16 of 27 rows are there" in logs[2]
    assert "judgements.jsonl: 22 judgements" in logs[2]


def test_stopped_while_sampling_a_run_keeps_its_chunks_for_a_world_of_another_size(
    world, whole, tmp_path
):
    """One process by Ctrl-C in its second chunk, then one of two by SIGTERM."""
    out = ready_to_sample(whole, tmp_path / "run")
    flags = flags_of(world, out, *IN_CHUNKS)
    kill = Kill("sampling", "M2/candidates.jsonl", 65, "int")
    result = start(flags, tmp_path / "log", kill=kill)
    check_stopped(result)
    (chunk,) = read_jsonl(out / "M2" / "candidates.jsonl.part")
    assert chunk["rows"] == list(range(5))
    of_other_rows = {"fingerprint": "0", "rows": [5, 99]}
    of_other_rows["results"] = [chunk["results"][0] | {"id": 5}]
    write_rows(out / "M2" / "candidates.jsonl.part", [chunk, of_other_rows])

    kill = Kill("sampling", "M2/judgements.jsonl", 120, "term", rank="1")
    result = start(flags, tmp_path / "log2", world_size=2, kill=kill)
    assert result.codes == [1, 130] and "Traceback" not in result.err, result.err
    assert "this process ends because another one has" in result.err
    assert "candidates.jsonl: 5 of 9 rows are there" in result.out
    rows = read_jsonl(out / "M2" / "candidates.jsonl")
    assert row_keys(rows) == [(i, k, None) for i in range(9) for k in range(3)]
    assert rows[:15] == sorted(chunk["results"], key=lambda row: (row["id"], row["k"]))
    (chunk,) = read_jsonl(out / "M2" / "judgements.jsonl.part")
    assert chunk["rows"] == list(range(16))


def check_stopped(result):
    """It ended in one line that says that nothing finished is lost."""
    assert result.code == 130 and len(result.err.splitlines()) == 1, result.err
    assert "interrupted" in result.err and "are whole" in result.err


def test_sigterm_ends_training_in_one_line_and_it_resumes(world, whole, tmp_path):
    flags = flags_of(world, tmp_path / "run", "--iters", 1, "--save-every", 4)
    check_stopped(start(flags, tmp_path / "log", kill=Kill("step", "SFT", 6, "term")))
    out = run(world, tmp_path / "run", "--iters", 1)
    expected = read_metrics(whole, "SFT") + read_metrics(whole, "M1")
    assert read_metrics(out) == expected
    assert sha256(out / "M1/model.safetensors") == sha256(whole / "M1/model.safetensors")


def test_stopped_while_it_saves_a_training_state_a_run_ends_in_the_same_line(
    world, tmp_path, monkeypatch, capsys
):
    """torch turns what is raised there, whatever it is, into an exception of its own."""

    def write_data(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", write_data)
    argv = flags_of(world, tmp_path / "run", "--iters", 1, "--save-every", 3)
    assert exit_code_of(argv) == 130
    assert "interrupted" in capsys.readouterr().err
    assert len(read_metrics(tmp_path / "run")) == 3


def test_stopped_while_it_reads_a_training_state_a_run_ends_in_the_same_line(
    world, tmp_path, monkeypatch, capsys
):
    """It is not called damaged, or the user would remove it."""
    argv = flags_of(world, tmp_path / "run", "--iters", 1, "--save-every", 3)
    assert start(argv, tmp_path / "log", kill=Kill("step", "SFT", 5)).code == -9

    def read_data(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(dcp.FileSystemReader, "read_data", read_data)
    assert exit_code_of(argv) == 130
    assert "interrupted" in capsys.readouterr().err
    monkeypatch.undo()
    run(world, tmp_path / "run", "--iters", 1, "--save-every", 3)
    assert "SFT: goes on after step 3" in capsys.readouterr().out


def test_a_full_disk_leaves_the_last_training_state_and_one_line(world, whole, tmp_path):
    out, flags = tmp_path / "run", ("--iters", 1, "--save-every")
    argv = flags_of(world, out, *flags, 3)
    result = start(argv, tmp_path / "log", kill=Kill("step", "SFT", 5, "full"))
    check_refused(result, "make room")
    argv = flags_of(world, out, *flags, 99)
    result = start(argv, tmp_path / "log2", kill=Kill("step", "SFT", 25, "full"))
    assert "SFT: goes on after step 3" in result.out
    check_refused(result, "File too large")  # the weights
    assert not (out / "SFT" / "config.json").exists()
    assert (out / "SFT" / "checkpoint" / "3").exists()
    run(world, out, *flags, 99)
    expected = products(whole)
    for name, content in products(out).items():
        if "/" in name:
            assert content == expected[name], name


def test_training_states_of_other_rows_and_damaged_ones_are_refused(world, tmp_path):
    out, flags = tmp_path / "run", ("--save-every", 3, "--iters", 1)
    result = start(flags_of(world, out, *flags), tmp_path / "log", kill=Kill("step", "SFT", 5))
    assert result.code == -9, result.err
    folder = out / "SFT" / "checkpoint" / "3"
    description = (folder / "training.json").read_text()
    other = json.loads(description) | {"rows": "0"}
    (folder / "training.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match=f"{folder}: .*other rows; remove {folder.parent}"):
        run(world, out, *flags)
    (folder / "training.json").write_text(description)
    os.truncate(folder / "__0_0.distcp", 1000)
    with pytest.raises(UserError, match=f"{folder}: damaged .*; remove"):
        run(world, out, *flags)


def test_torn_lines_are_cut_off_and_later_metrics_forgotten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"model": name, "step": step} for name in ("SFT", "M1") for step in (1, 2, 3)]
    write_rows(path, lines)
    with path.open("a") as f:
        f.write('{"model": "M1", "st')
    train.drop_later_metrics(path, "M1", 2)
    assert read_jsonl(path) == lines[:5]
    train.drop_later_metrics(path, "M1", 0)
    assert read_jsonl(path) == lines[:3]
    train.drop_later_metrics(path, "SFT", 0)
    assert read_jsonl(path, allow_empty=True) == []
    train.drop_later_metrics(tmp_path / "none.jsonl", "SFT", 0)


# ---- many processes --------------------------------------------------------------------------

# batch 5 over two processes: 3 and 2 rows, in micro-batches of one row or two; the last batch of
# an epoch is 1 row
UNEVEN = (
    *("--dropout", 0, "--batch", 5, "--micro-tokens", 70, "--iters", 2),
    *("--sft-lr", 2e-4, "--dpo-lr", 2e-4, "--sft-epochs", 1, "--dpo-epochs", 2),
)


@pytest.fixture(scope="session")
def one_process(world):
    return run(world, world.folder / "one", *UNEVEN)


LAYOUTS = {  # number of processes, and how they share the model
    "dp 2": (2, ()),
    "dp 4": (4, ()),
    "tp 2": (2, ("--tp", 2)),
    "dp 2 x tp 2": (4, ("--tp", 2, "--activation-checkpointing")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_processes_take_the_same_steps_as_one(world, one_process, tmp_path, layout):
    """Also, of pairs that one process has made, each layout computes the reference anew, equal to
    its own policy's log-probs to the last bit."""
    world_size, flags = LAYOUTS[layout]
    patterns = ("SFT/*", "M1/test.jsonl", "M1/exam.jsonl", "M2/[!p]*s.jsonl", "M2/prompts.jsonl")
    out = copy_products(one_process, tmp_path / "run", *patterns)
    argv = flags_of(world, out, *UNEVEN, *flags)
    result = start(argv, tmp_path / "log", world_size=world_size)
    assert result.codes == [0] * world_size and result.err == "", result.err
    for name, keys in (("M1", []), ("M2", ["margin", "logp_chosen"])):
        keys += ["loss", "grad_norm", "tokens"]
        assert_close(read_metrics(out, name), read_metrics(one_process, name), keys, 1e-5)
        others = weights(one_process / name)
        for parameter, p in weights(out / name).items():
            assert (p - others[parameter]).abs().max() < 1e-4, (name, parameter)
    check_first_step(read_metrics(out, "M2")[0])


def test_in_bfloat16_sharded_processes_take_the_same_steps_as_one(world, one_process, tmp_path):
    flags = (*UNEVEN, "--iters", 1, "--dtype", "bfloat16")
    runs = {}
    for world_size in (1, 2, 4):
        out = copy_products(one_process, tmp_path / str(world_size), "SFT/*")
        argv = flags_of(world, out, *flags)
        result = start(argv, tmp_path / f"log{world_size}", world_size=world_size)
        assert set(result.codes) == {0}, result.err
        runs[world_size] = read_metrics(out, "M1")
    for world_size in (2, 4):  # other micro-batches are rounded in another way
        assert_close(runs[world_size], runs[1], ["loss", "grad_norm"], 0.01)
        assert_close(runs[world_size], runs[1], ["tokens"], 0)


def check_first_step(metrics: dict):
    """Policy and reference are one model, to the last bit."""
    assert metrics["margin"] == metrics["reward_chosen"] == metrics["reward_rejected"] == 0
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-7)


def test_the_uneven_batches_are_uneven(world):
    tok = load(world.base)[1]
    rows = read_jsonl(world.data / "ift.jsonl")
    examples = [(tok.chat(row["prompt"]), tok.response(row["response"])) for row in rows]
    batches = make_batches(examples, 5, 1, (0, "SFT"))
    assert sorted(map(len, batches)) == [1, 5, 5, 5, 5]
    sizes = {i: len(examples[i][0]) + len(examples[i][1]) for i in max(batches, key=len)}
    num_rows = [[len(part) for part, _ in micro_batches(sizes, 70, r, 2)] for r in (0, 1)]
    assert sum(map(sum, num_rows)) == 5 and max(map(len, num_rows)) > 1


@pytest.mark.parametrize("tp", [1, 2])
def test_one_process_goes_on_from_the_training_state_of_two(world, one_process, tmp_path, tp):
    """Of which one is told to stop and the other ends with it, or both are killed."""
    out = copy_products(one_process, tmp_path / "run", "SFT/*")
    flags = (*UNEVEN, "--iters", 1)
    kill = Kill("step", "M1", 6)
    if tp == 1:
        kill = Kill("step", "M1", 6, "term", rank="1")
    argv = flags_of(world, out, *flags, "--save-every", 4, "--tp", tp)
    result = start(argv, tmp_path / "log", world_size=2, kill=kill)
    assert result.codes == ([1, 130] if tp == 1 else [-9, -9]), result.err
    assert "Traceback" not in result.err, result.err
    assert [path.name for path in (out / "M1" / "checkpoint").iterdir()] == ["4"]
    run(world, out, *flags)
    metrics = read_metrics(out, "M1")
    assert_close(metrics, read_metrics(one_process, "M1"), ["loss", "grad_norm"], 1e-5)


def test_the_processes_of_a_tensor_parallel_group_drop_the_same_activations(
    world, whole, tmp_path
):
    """Every hidden unit is on both, so both must drop what one process alone drops."""
    flags = flags_of(world, tmp_path / "run", "--tp", 2)
    result = start(flags, tmp_path / "log", world_size=2, kill=Kill("step", "SFT", 5))
    assert result.codes == [-9, -9], result.err
    metrics, others = read_metrics(tmp_path / "run"), read_metrics(whole, "SFT")
    assert_close(metrics, others[:4], ["loss", "grad_norm"], 1e-4)


@pytest.mark.parametrize("layout", ["dp 2", "tp 2"])
def test_two_processes_write_the_same_rows_as_one_and_lose_none(
    world, one_process, tmp_path, layout
):
    """Of equal weights: 9 prompts, 27 candidates and 9 ranked replies fall unevenly to two."""
    out = copy_models(one_process, tmp_path / "run", "SFT", "M1", "M2")
    argv = flags_of(world, out, *UNEVEN, *LAYOUTS[layout][1])
    result = start(argv, tmp_path / "log", world_size=2)
    assert result.codes == [0, 0], result.err
    files = [f"M2/{file}" for file in ROUND_FILES]
    for name in ("SFT", "M1", "M2"):
        files += [f"{name}/test.jsonl", f"{name}/exam.jsonl"]
    for file in files:
        assert_same_rows(read_jsonl(out / file), read_jsonl(one_process / file))
    assert not list(out.rglob("*.tmp"))
    assert result.out.count("candidates.jsonl: 27 responses, ") == 1  # one process speaks


def test_a_process_without_rows_waits_for_the_others(world, whole, tmp_path):
    """One test prompt and one ranked reply, two processes of which one sees files late."""
    exam = read_jsonl(world.data / "eft_eval.jsonl")[0]
    files = {
        "test.jsonl": read_jsonl(world.data / "test.jsonl")[:1],
        "eft_eval.jsonl": [exam | {"responses": ["It is so."], "ranks": [0]}],
    }
    data = make_variant(world, tmp_path, files)
    out = copy_models(whole, tmp_path / "run", "SFT", "M1")
    argv = flags_of(world, out, "--iters", 1, data=data)
    late = Kill("late", "exam.jsonl", 1, rank="1")
    result = start(argv, tmp_path / "log", world_size=2, kill=late)
    assert result.codes == [0, 0], result.err
    for name in ("SFT", "M1"):
        assert len(read_jsonl(out / name / "test.jsonl")) == 1
        assert len(read_jsonl(out / name / "exam.jsonl")) == 2


def test_all_processes_end_when_one_fails_and_only_that_one_says_why(world, whole, tmp_path):
    """While the other is in the middle of sampling."""
    out = ready_to_sample(whole, tmp_path / "run")
    kill = Kill("sampling", "M2/candidates.jsonl", 5, "fail", rank="1")
    result = start(flags_of(world, out), tmp_path / "log", world_size=2, kill=kill)
    assert result.codes == [1, 1] and "Traceback" not in result.err, result.err
    lines = [line for line in result.err.splitlines() if "error" in line]
    assert lines == ["error: it is lost; find it"]
    assert "this process ends because another one has" in result.err


def check_timeouts(rank: int, port: int, queue):
    """One of two processes: the timeouts of all groups of a mesh, and of torch's default."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": str(port)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "CUDA_VISIBLE_DEVICES": ""}
    mesh = train.init_distributed(train.Config())
    backends = []
    for group in (dist.group.WORLD, mesh["dp"].get_group(), mesh["tp"].get_group()):
        backends.append(group._get_backend(torch.device("cpu")))
    plain = dist.new_group([rank], timeout=timedelta(minutes=5), use_local_synchronization=True)
    backends.append(plain._get_backend(torch.device("cpu")))
    queue.put([backend.options._timeout for backend in backends])
    dist.destroy_process_group()


def test_the_groups_of_a_mesh_wait_a_day(world):
    """Ranks may finish their texts hours apart."""
    queue = tiny.FORKSERVER.Queue()
    port = tiny.free_port()
    arguments = [(rank, port, queue) for rank in (0, 1)]
    assert tiny.together(check_timeouts, arguments) == [0, 0]
    day, minutes = timedelta(days=1), timedelta(minutes=5)
    assert [queue.get(timeout=5) for _ in (0, 1)] == [[day, day, day, minutes]] * 2


@pytest.mark.parametrize("file", FIVE_FILES)
def test_no_private_name_of_others_is_used(file):
    assert private_names(ROOT / file) == []


def private_names(path: Path) -> list[str]:
    """Names with a leading underscore that a file takes from elsewhere."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            names.append(node.attr)
        elif isinstance(node, ast.ImportFrom):
            names += [*node.module.split("."), *(alias.name for alias in node.names)]
    return [name for name in names if re.match("_[a-zA-Z]", name)]


@pytest.mark.parametrize("dp_rank", [0, 1])
def test_rows_are_dealt_to_processes_by_length(dp_rank, tmp_path, monkeypatch):
    plain = SimpleNamespace()
    monkeypatch.setattr(train, "unsharded", lambda model, mesh: nullcontext(plain))
    monkeypatch.setattr(train, "all_gather", lambda run, rows: list(rows))
    monkeypatch.setattr(train, "progress", lambda *_: nullcontext(print))
    monkeypatch.setattr(train, "read_parts", lambda path: [])
    monkeypatch.setattr(train, "append_part", lambda path, part: None)
    rows = []
    for n in range(20):
        rows.append({"id": n, "k": 0, "prompt": "p" * n, "response": "r" * (50 - n * n % 50)})
    lengths = []

    def work(model, rows, callback):
        assert model is plain
        lengths.extend(train.text_length(row) for row in rows)
        return rows

    cfg = train.Config(sample_batch=4)
    run = train.Run(cfg, tmp_path, None, None, "cpu", dp_rank, 2)
    train.map_in_chunks(run, tmp_path / "x.jsonl", None, rows, work, 1, "texts")
    assert lengths == sorted(map(train.text_length, rows), reverse=True)[dp_rank::2]


# ---- batches and micro-batches (dpo.py) ------------------------------------------------------


@pytest.mark.parametrize("micro_tokens", [150, 1])
def test_micro_batches_of_any_size_take_the_same_steps(world, one_process, tmp_path, micro_tokens):
    out = copy_products(one_process, tmp_path / "run", "M2/*s.jsonl", "*/test.jsonl", "*/exam*")
    run(world, out, *UNEVEN, "--micro-tokens", micro_tokens)
    for name in ("SFT", "M1", "M2"):
        metrics = read_metrics(out, name)
        assert_close(metrics, read_metrics(one_process, name), ["loss", "grad_norm"], 1e-5)


def random_examples(count: int, seed: int = 0) -> list[tuple]:
    """Prompts and their two responses, of random lengths."""
    rng = random.Random(seed)
    examples = []
    for _ in range(count):
        lengths = [rng.randrange(1, 9), rng.randrange(1, 40), rng.randrange(1, 40)]
        examples.append(tuple([1] * length for length in lengths))
    return examples


@pytest.mark.parametrize(
    "count, size, epochs", [(1, 4, 1), (21, 5, 3), (100, 3, 2), (64, 16, 2), (7, 100, 1)]
)
def test_every_row_is_seen_once_an_epoch(count, size, epochs):
    examples = random_examples(count)
    batches = make_batches(examples, size, epochs, (0, "SFT"))
    steps_per_epoch = -(-count // size)
    assert len(batches) == epochs * steps_per_epoch
    for first in range(0, len(batches), steps_per_epoch):
        epoch = batches[first : first + steps_per_epoch]
        assert sorted(i for batch in epoch for i in batch) == list(range(count))
        full = [batch for batch in epoch if len(batch) == size]
        assert len(full) >= steps_per_epoch - 1
    assert batches == make_batches(examples, size, epochs, (0, "SFT"))


def test_batches_follow_the_key_and_hold_rows_of_like_length():
    examples = random_examples(100)
    batches = make_batches(examples, 10, 2, (0, "SFT"))
    assert batches != make_batches(examples, 10, 2, (1, "SFT"))
    assert batches != make_batches(examples, 10, 2, (0, "M1"))
    assert batches[:10] != batches[10:]  # another order each epoch
    assert batches[:10] == make_batches(examples, 10, 1, (0, "SFT"))  # whatever follows
    lengths = [len(prompt) + max(len(a), len(b)) for prompt, a, b in examples]
    spreads = [max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches]
    assert max(spreads) < max(lengths) / 2


def micro_batches_of_all(examples, batch, most_tokens: int, world_size: int) -> list[list]:
    """What every process of a world is given."""
    sizes = {i: sum(map(len, examples[i])) for i in batch}
    ranks = range(world_size)
    return [micro_batches(sizes, most_tokens, rank, world_size) for rank in ranks]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_processes_share_a_batch_in_equally_many_micro_batches_within_the_limit(world_size):
    rng = random.Random(0)
    examples = random_examples(99)
    sizes = [sum(map(len, example)) for example in examples]
    for length in (1, 2, 5, 8, 16, 17):
        batch = rng.sample(range(99), length)
        longest = max(sizes[i] for i in batch)
        for most_tokens in (1, 60, 200, 10000):
            ranks = micro_batches_of_all(examples, batch, most_tokens, world_size)
            assert len({len(parts) for parts in ranks}) == 1
            parts = [part for of_rank in ranks for part in of_rank]
            assert Counter(i for rows, weight in parts if weight for i in rows) == Counter(batch)
            for rows, weight in parts:
                assert rows and weight in (0, 1) and set(rows) <= set(batch)
                assert sum(sizes[i] for i in rows) <= max(most_tokens, longest)
            assert ranks == micro_batches_of_all(examples, batch, most_tokens, world_size)


@pytest.mark.parametrize("world_size, most_tokens", [(1, 500), (2, 500), (4, 300), (4, 10000)])
def test_micro_batches_are_few_and_processes_have_equally_much_to_do(world_size, most_tokens):
    examples = random_examples(64, seed=1)
    sizes = [sum(map(len, example)) for example in examples]
    ranks = micro_batches_of_all(examples, list(range(64)), most_tokens, world_size)
    loads = [[sum(sizes[i] for i in rows) for rows, _ in parts] for parts in ranks]
    assert len(loads[0]) <= math.ceil(sum(sizes) / world_size / most_tokens) + 1
    for step_loads in zip(*loads, strict=True):  # they end together
        assert max(step_loads) - min(step_loads) <= max(sizes) / 4


def test_metrics_count_every_token_once(world, whole):
    """Prompts, which the pair shares, and responses; the last token of a text is only a target."""
    tok = load(world.base)[1]
    counts = {"SFT": 0, "M2": 0}
    for row in read_jsonl(world.data / "ift.jsonl"):
        counts["SFT"] += len(tok.chat(row["prompt"])) - 1 + len(tok.response(row["response"]))
    for pair in read_jsonl(whole / "M2" / "pairs.jsonl"):
        counts["M2"] += len(tok.chat(pair["prompt"])) - 1
        counts["M2"] += len(pair["chosen_tokens"]) + len(pair["rejected_tokens"])
    for name, epochs in (("SFT", 5), ("M2", 3)):
        assert sum(m["tokens"] for m in read_metrics(whole, name)) == epochs * counts[name]


# ---- M_t, its pairs and its reference --------------------------------------------------------


@pytest.fixture(scope="session")
def watched_run(world):
    """A run without dropout whose training and sampling were watched."""
    record = SimpleNamespace(first_weights={}, examples={}, after={}, pairs={})
    record.requests = []
    train_model, generate_stream = train.train_model, sample.generate_stream

    def watch_training(run, model, name, batches, examples, *rest):
        record.first_weights[name] = {k: p.detach().clone() for k, p in model.named_parameters()}
        record.examples[name] = json.loads(json.dumps(examples))
        pairs = run.folder / name / "pairs.jsonl"
        record.pairs[name] = pairs.read_bytes() if pairs.exists() else None
        train_model(run, model, name, batches, examples, *rest)
        record.after[name] = json.loads(json.dumps(examples))

    def watch_sampling(model, prompts, keys, **settings):
        record.requests += zip(keys, prompts, strict=True)
        return generate_stream(model, prompts, keys, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_model", watch_training)
        patch.setattr(sample, "generate_stream", watch_sampling)
        record.out = run(world, world.folder / "watched_run", "--dropout", 0)
    return record


@torch.no_grad()
def logps(folder: Path, pairs: list[dict], side: str) -> list[float]:
    """log p(response | prompt) under a model, one response at a time, from all logits."""
    model, tok = load(folder)
    values = []
    for pair in pairs:
        prompt = [tok.bos, *tok.encode(f"[INST] {pair['prompt']} [/INST]")]
        response = pair[f"{side}_tokens"]
        logits = model(torch.tensor([prompt + response]))[0].double()
        table = logits.log_softmax(-1)[len(prompt) - 1 :]
        values.append(sum(table[i, token].item() for i, token in enumerate(response)))
    return values


@pytest.mark.parametrize("name, next_name", [("M1", "M2"), ("M2", "M3")])
def test_the_reference_column_is_the_log_prob_under_m_t_and_stands_still(
    watched_run, name, next_name
):
    path = watched_run.out / next_name / "pairs.jsonl"
    pairs = read_jsonl(path)
    for side in ("chosen", "rejected"):
        reference = [pair[f"reference_{side}"] for pair in pairs]
        assert reference == pytest.approx(logps(watched_run.out / name, pairs, side), abs=1e-3)
    assert path.read_bytes() == watched_run.pairs[next_name]  # as before the first update
    after = logps(watched_run.out / next_name, pairs, "rejected")
    differences = [abs(a - b) for a, b in zip(after, reference, strict=True)]
    assert max(differences) > 0.1  # the policy did not


def test_the_reference_is_computed_in_the_batches_of_the_first_epoch(
    world, whole, tmp_path, monkeypatch
):
    """A GPU's last bits depend on the batch: in others the first margin would not be 0."""
    batches_of, pair_logps = {}, train.pair_logps

    def watch_reference(run, model, examples, batches):
        batches_of.setdefault("reference", batches)
        return pair_logps(run, model, examples, batches)

    def watch_training(run, model, name, batches, *rest):
        batches_of["training"] = batches
        raise Finished

    monkeypatch.setattr(train, "pair_logps", watch_reference)
    monkeypatch.setattr(train, "train_model", watch_training)
    out = copy_products(
        whole, tmp_path / "run", "SFT/*", "M1/*", "M?/prompts.jsonl", "M2/[cj]*s.*"
    )
    with pytest.raises(Finished):
        run(world, out)
    steps_per_epoch = len(batches_of["training"]) // 3
    assert batches_of["reference"] == batches_of["training"][:steps_per_epoch]


def test_rows_are_not_changed_by_training_on_them(watched_run):
    assert watched_run.examples == watched_run.after
    assert set(watched_run.after) == {"SFT", "M1", "M2", "M3"}


@pytest.mark.parametrize("name", ["M2", "M3"])
def test_dpo_starts_at_ln_2_with_margins_of_zero_and_moves(watched_run, name):
    first, second = read_metrics(watched_run.out, name)[:2]
    check_first_step(first)
    assert abs(second["loss"] - math.log(2)) > 1e-5 and second["margin"] != 0


@pytest.mark.parametrize("world_size, tp", [(1, 1), (2, 1), (2, 2)])
def test_in_bfloat16_and_sharded_dpo_starts_at_ln_2_and_moves_every_tensor(
    world, whole, tmp_path, world_size, tp
):
    """Policy and reference agree to the last bit, and no gathered copies of weights are left to
    the optimizer."""
    out = copy_products(whole, tmp_path / "run", "SFT/*", "M1/*", "M2/[!p]*s.jsonl", "M2/prom*")
    flags = ("--dropout", 0, "--dtype", "bfloat16", "--dpo-lr", 1e-2, "--dpo-epochs", 1)
    argv = flags_of(world, out, *flags, "--iters", 2, "--tp", tp)
    result = start(argv, tmp_path / "log", world_size=world_size)
    assert set(result.codes) == {0}, result.err
    check_first_step(read_metrics(out, "M2")[0])
    before, after = weights(out / "M1"), weights(out / "M2")
    assert [name for name, p in before.items() if torch.equal(p, after[name])] == []
    config = json.loads((out / "M2" / "config.json").read_text())
    assert config["torch_dtype"] == "float32"  # master weights keep their type


def test_every_model_starts_from_the_saved_weights_of_the_one_before_and_all_are_kept(
    world, watched_run
):
    origins = {"SFT": world.base, "M1": world.base}
    origins |= {"M2": watched_run.out / "M1", "M3": watched_run.out / "M2"}
    for name, origin in origins.items():
        expected = weights(origin)
        assert watched_run.first_weights[name].keys() == expected.keys()
        for parameter, p in watched_run.first_weights[name].items():
            assert torch.equal(p, expected[parameter]), (name, parameter)
        after = weights(watched_run.out / name)
        assert any(not torch.equal(after[k], p) for k, p in expected.items()), name
    hashes = {sha256(watched_run.out / name / "model.safetensors") for name in origins}
    assert len(hashes) == 4


def test_one_prompt_builder_serves_sft_sampling_judging_and_dpo(world, watched_run):
    """One BOS at the front, never another; DPO trains on the very ids that were sampled."""
    tok = load(world.base)[1]
    for name, examples in watched_run.examples.items():
        num_responses = 1 if name in ("SFT", "M1") else 2
        for prompt, *responses in examples:
            assert prompt[0] == tok.bos and tok.eos not in prompt
            for ids in responses[:num_responses]:
                assert (prompt + ids).count(tok.bos) == 1
                assert ids.count(tok.eos) == (ids[-1] == tok.eos)
    for _, ids in watched_run.requests:
        assert ids[0] == tok.bos and ids.count(tok.bos) == 1
    requests = dict(watched_run.requests)
    for name in ("M2", "M3"):
        pairs = read_jsonl(watched_run.out / name / "pairs.jsonl")
        for pair, example in zip(pairs, watched_run.examples[name], strict=True):
            prompt, chosen, rejected, _ = example
            assert requests[0, name, "responses", pair["id"]] == prompt
            assert prompt == tok.chat(pair["prompt"])
            assert [chosen, rejected] == [pair["chosen_tokens"], pair["rejected_tokens"]]


SETTINGS = {  # beginning of a key -> temperature, top-p, samples, most tokens
    (3, 1, "prompts"): (0.6, 0.9, 1, 24),
    (3, "M2", "responses"): (0.8, 0.95, 3, 12),
    (3, "M2", "judgements"): (0.7, 0.9, 2, 24),
    (3, "test"): (0.8, 0.95, 1, 12),
    (3, "exam"): (0.7, 0.9, 2, 24),
}


def test_every_stage_samples_with_its_settings_and_its_own_random_numbers(
    world, whole, tmp_path, monkeypatch
):
    settings_of, generate_stream = {}, sample.generate_stream

    def watch(model, prompts, keys, **settings):
        names = ("temperature", "top_p", "n", "max_new")
        for key in keys:
            settings_of[key] = tuple(settings.get(name, 1) for name in names)
        return generate_stream(model, prompts, keys, **settings)

    monkeypatch.setattr(sample, "generate_stream", watch)
    out = copy_models(whole, tmp_path / "run", "SFT", "M1")
    flags = ("--seed", 3, "--iters", 2, "--temperature", 0.8, "--top-p", 0.95)
    run(world, out, *flags)
    for key, settings in settings_of.items():
        (stage,) = [stage for stage in SETTINGS if key[: len(stage)] == stage]
        assert settings == SETTINGS[stage], key
    assert {key[: len(stage)] for key in settings_of for stage in SETTINGS} >= set(SETTINGS)


def test_sft_learns_responses_and_m1_judgements_as_well(world, watched_run):
    tok = load(world.base)[1]
    rows = read_jsonl(world.data / "eft.jsonl")
    responses = [[tok.chat(row["prompt"]), tok.response(row["response"])] for row in rows]
    judgements = []
    for row in rows:
        prompt = judge.judge_prompt(tiny.JUDGE, row["prompt"], row["response"])
        judgements.append([tok.chat(prompt), tok.response(row["judgement"])])
    assert watched_run.examples["SFT"] == responses
    assert watched_run.examples["M1"] == responses + judgements


def test_pairs_that_another_model_has_made_are_refused(world, whole, tmp_path):
    patterns = ("SFT/*", "M1/*", "M2/*s.jsonl", "M3/prompts.jsonl", "*.json*")
    out = copy_products(whole, tmp_path / "run", *patterns)
    pairs = read_jsonl(out / "M2" / "pairs.jsonl")
    for pair in pairs:
        pair["reference_chosen"] += 0.5
    write_rows(out / "M2" / "pairs.jsonl", pairs)
    before = products(out)
    words = ("M2/pairs.jsonl", "reference log-probs differ by", "remove all files")
    check_ends(flags_of(world, out), *words)
    assert_same(products(out), before)


# ---- EFT rows by the SFT baseline ------------------------------------------------------------

VERDICTS = {  # prompt -> two judgements of each of its three replies, which people rank 0, 1, 2
    0: [["Good.\nScore: 5", "Score: 0"], ["Score: 3", "Score: 0"], ["Score: 3", "Score: 0"]],
    1: [["Score: 1", "Score: 4"], ["Score: 2", "Score: 4"], ["Score: 3", "Score: 3"]],
    2: [["Score: 3", "?"], ["Score: 3", "?"], ["Score: 3", "Score: 3"]],
    3: [["Score: 2", "Score: 2"], ["Score: 4", "Score: 3"], ["?", "Score: 1"]],
    5: [["Score: 3", "Score: 4"], ["Hm.", "Score: 3"], ["Score: 1", "Score: 2\nand"]],
}  # of 0 the first try agrees, of 1 the second, of 2 and 3 neither, of 5 both; all others say "?"
AGREEING = [
    (0, 0, "Good.\nScore: 5"),
    (0, 1, "Score: 3"),
    (0, 2, "Score: 3"),
    (1, 0, "Score: 4"),
    (1, 1, "Score: 4"),
    (1, 2, "Score: 3"),
    (5, 0, "Score: 3"),
    (5, 2, "Score: 1"),
]
REPORT = {
    "ranked_prompts": 12,
    "replies": 36,
    "not_judged": 1,
    "judgements": 70,
    "kept": 6,
    "dropped": {
        "no readable verdict": 44,
        "against the people's order": 8,
        "ties all that people rank apart": 6,
        "an earlier try agrees": 2,
        "most common score": 2,
        "the only readable reply": 1,
        "goes on after its verdict": 1,
    },
    "scores_before": {"1": 1, "3": 4, "4": 2, "5": 1},
    "scores_after": {"1": 1, "3": 2, "4": 2, "5": 1},
}


@pytest.fixture
def scripted_judge(world, monkeypatch):
    """Judges say what VERDICTS has for the prompt's id; the list of (model, ids, key) of all
    requests."""
    requests, (_, tok) = [], load(world.base)

    def generate(model, prompts, keys, *, n, **settings):
        requests.extend((model, ids, key) for ids, key in zip(prompts, keys, strict=True))
        unreadable = [["?"] * n] * 3
        samples = []
        for *_, i, k in keys:
            texts = VERDICTS.get(i, unreadable)[k]
            samples.append([tok.response(text) for text in texts])
        return samples

    monkeypatch.setattr(judge, "generate", generate)
    return requests


def test_m1_learns_from_what_the_baseline_says_in_agreement_with_people(
    world, ranked_data, tmp_path, scripted_judge, monkeypatch
):
    examples_of, train_model = {}, train.train_model

    def watch(run, model, name, batches, examples, *rest):
        examples_of[name] = list(examples)
        train_model(run, model, name, batches, examples, *rest)

    monkeypatch.setattr(train, "train_model", watch)
    out = run(world, tmp_path / "run", "--iters", 1, "--sft-epochs", 1, data=ranked_data)
    tok = load(world.base)[1]
    ranked = read_jsonl(ranked_data / "eft_ranked.jsonl")
    replies, inputs = {}, {}
    for i, row in enumerate(ranked):
        for k, text in enumerate(row["responses"]):
            if text:
                replies[i, k] = text
                inputs[i, k] = tok.chat(judge.judge_prompt(tiny.JUDGE, row["prompt"], text))

    # the SFT baseline judges every reply but the empty one, twice
    requests = [request for request in scripted_judge if request[2][:2] == (0, "eft")]
    assert {key[2:]: ids for _, ids, key in requests} == inputs
    assert len(requests) == len(inputs)
    baseline = weights(out / "SFT")
    for parameter, p in requests[0][0].named_parameters():
        assert torch.equal(p, baseline[parameter])
    judgements = read_jsonl(out / "M1" / "eft_judgements.jsonl")
    assert row_keys(judgements) == [(i, k, vote) for i, k in inputs for vote in range(2)]

    # what agrees with people becomes rows, the most common score thinned
    assert json.loads((out / "M1" / "eft_report.json").read_text()) == REPORT
    assert REPORT["kept"] + sum(REPORT["dropped"].values()) == len(judgements)
    rows = read_jsonl(out / "M1" / "eft.jsonl")
    possible = []
    for i, k, text in AGREEING:
        row = {"prompt": ranked[i]["prompt"], "response": replies[i, k], "judgement": text}
        possible.append(row)
    assert rows == [row for row in possible if row in rows] and len(rows) == 6
    for row in possible:
        assert row in rows or "3" in row["judgement"]

    # and M1 learns them, behind the instructions
    assert len(examples_of["SFT"]) == 21
    expected = examples_of["SFT"].copy()
    for row in rows:
        prompt = judge.judge_prompt(tiny.JUDGE, row["prompt"], row["response"])
        expected.append((tok.chat(prompt), tok.response(row["judgement"])))
    assert examples_of["M1"] == expected


def test_eft_size_cuts_the_rows_and_0_leaves_them_out_though_they_are_there(
    world, ranked_data, tmp_path, scripted_judge, capsys
):
    flags = ("--iters", 1, "--sft-epochs", 1, "--eft-size")
    out = run(world, tmp_path / "cut", *flags, 4, data=ranked_data)
    report = json.loads((out / "M1" / "eft_report.json").read_text())
    assert len(read_jsonl(out / "M1" / "eft.jsonl")) == report["kept"] == 4
    assert report["dropped"]["over --eft-size"] == 2
    assert "the SFT baseline makes EFT rows of eft_ranked.jsonl" in capsys.readouterr().out
    for data, name in ((ranked_data, "ranked"), (world.data, "eft")):
        out = run(world, tmp_path / name, *flags, 0, data=data)
        assert "M1 learns from ift.jsonl alone" in capsys.readouterr().out
        assert not list((out / "M1").glob("eft*"))
        assert len(read_metrics(out, "M1")) == -(-21 // 5)
    ranked, eft = (sha256(tmp_path / name / "M1/model.safetensors") for name in ("ranked", "eft"))
    assert ranked == eft


def test_a_judge_that_agrees_with_nobody_ends_the_run_and_eft_rows_of_ones_own_help(
    world, ranked_data, tmp_path, capsys
):
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(ranked_data, data)
    flags = ("--iters", 1, "--sft-epochs", 1, "--max-judgement", 2)
    argv = flags_of(world, out, *flags, data=data)
    words = ["M1: of 70 judgements of 36 ranked replies none", "cut by the length limit': 70"]
    words += ["--max-judgement", "eft.jsonl", "--eft-size 0"]
    check_ends(argv, *words)
    before = products(out)
    assert {"M1/eft_judgements.jsonl", "M1/eft_report.json", "SFT/config.json"} <= before.keys()
    capsys.readouterr()
    check_ends(argv, *words)
    assert "eft_judgements.jsonl: " not in capsys.readouterr().out  # they are there
    assert_same(products(out), before)
    (data / "eft_ranked.jsonl").write_text("")
    check_ends(argv, "eft_ranked.jsonl", "holds no rows")
    shutil.copy(ranked_data / "eft_ranked.jsonl", data)
    shutil.copy(world.data / "eft.jsonl", data)
    run(world, out, *flags, data=data)
    assert len(read_metrics(out, "M1")) == -(-42 // 5)
    assert not (out / "M1/eft.jsonl").exists()


LONG = "What does the owl eat at night? " * 60


def test_replies_that_leave_the_judge_no_room_are_no_eft(world, ranked_data, tmp_path):
    shutil.copytree(ranked_data, tmp_path / "data")
    (tmp_path / "data" / "judge.txt").write_text(LONG + "{prompt} {response}")
    argv = flags_of(world, tmp_path / "run", "--sft-epochs", 1, data=tmp_path / "data")
    words = ("of 0 judgements of 36 ranked replies none", "shorten judge.txt")
    check_ends(argv, *words)


# ---- knobs -----------------------------------------------------------------------------------


def test_a_config_has_at_most_30_fields():
    assert len(fields(train.Config)) <= 30


def test_every_field_is_a_flag_whose_help_is_its_comment(capsys):
    with pytest.raises(SystemExit) as e:
        train.parse_args(["--help"])
    assert e.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    source = (ROOT / "train.py").read_text()
    body = source[source.index("class Config") : source.index("MUTABLE_FIELDS")]
    for field in fields(train.Config):
        (line,) = [x for x in body.splitlines() if x.startswith(f"    {field.name}: ")]
        comment = " ".join(line.split("  # ")[1].split())
        assert flag_of(field.name) in text and comment in text, field.name


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


FIELDS = fields(train.Config)
OTHER_VALUES = {"prompts": "3,4", "dtype": "bfloat16"}
OTHER_VALUES_BY_TYPE = {int: "7", float: "0.25", str: "x"}


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_every_flag_parses_to_the_type_of_its_field(field):
    argv = ["--data", "/nowhere", flag_of(field.name)]  # no recipe.json there
    expected = True
    if field.type is not bool:
        argv.append(OTHER_VALUES.get(field.name, OTHER_VALUES_BY_TYPE[field.type]))
        expected = field.type(argv[-1])
    cfg = train.parse_args(argv)
    value = getattr(cfg, field.name)
    assert type(value) is field.type and value == expected != field.default
    others = asdict(train.Config()) | {"data": "/nowhere"}
    assert asdict(cfg) == others | {field.name: value}  # nothing else moves


def test_flags_override_the_recipe_and_the_recipe_the_defaults(tmp_path):
    (tmp_path / "recipe.json").write_text('{"iters": 2, "beta": 1, "prompts": "5"}')
    cfg = train.parse_args(["--data", str(tmp_path), "--iters", "4"])
    assert (cfg.iters, cfg.beta, cfg.prompts, cfg.seed) == (4, 1, "5", 0)


BAD_RECIPES = {
    '{"lr": 1}': "lr",
    '{"iters": "2"}': "iters",
    '{"beta": "x"}': "beta",
    '{"iters": true}': "iters",
    '{"activation_checkpointing": 1}': "activation_checkpointing",
    "{": "JSON",
    "[1]": "recipe.json",
}


@pytest.mark.parametrize("recipe", BAD_RECIPES)
def test_a_recipe_with_stray_keys_or_types_is_refused(tmp_path, recipe):
    (tmp_path / "recipe.json").write_text(recipe)
    with pytest.raises(UserError, match=BAD_RECIPES[recipe]):
        train.parse_args(["--data", str(tmp_path)])


def test_all_knobs_are_saved_with_the_run(whole):
    config = json.loads((whole / "config.json").read_text())
    argv = ["--data", config["data"], "--init", config["init"], "--out", str(whole)]
    knobs = asdict(train.parse_args(argv))
    assert config == knobs | {"threads": torch.get_num_threads(), "files": config["files"]}


@pytest.mark.parametrize(
    "seconds, threads",
    [
        ({1: 1.0, 2: 0.9}, 1),  # hardly faster is not worth a core
        ({1: 1.0, 2: 0.7}, 2),
        ({1: 1.0, 2: 3.0}, 1),  # a busy machine
        ({1: 1.0, 2: 0.6, 4: 0.4, 6: 0.38}, 4),
        ({1: 1.0}, 1),
    ],
)
def test_more_threads_are_taken_where_they_are_faster(
    world, monkeypatch, capsys, seconds, threads
):
    monkeypatch.setattr(train, "time_threads", lambda cfg: seconds)
    assert train.choose_threads(train.Config(init=str(world.base))) == threads
    assert (f"{threads} of {max(seconds)} threads" in capsys.readouterr().out) == (
        threads < max(seconds)
    )


def test_a_run_goes_on_with_the_threads_that_it_began_with(world, whole, tmp_path, monkeypatch):
    """Also behind a start of several processes, which have one each."""
    out = tmp_path / "run"
    copy_products(whole, out, "*/*")
    config = json.loads((whole / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"threads": 3}))
    monkeypatch.setattr(train, "choose_threads", lambda cfg: pytest.fail("timed again"))
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    for variable in (True, False):
        if not variable:
            monkeypatch.delenv("OMP_NUM_THREADS")
        run(world, out)
        assert json.loads((out / "config.json").read_text())["threads"] == 3
        assert chosen == ([] if variable else [3])


@pytest.mark.parametrize("most, counts", [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6])])
def test_threads_are_timed_by_powers_of_two_and_all(world, monkeypatch, most, counts):
    used = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: most)
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    seconds = train.time_threads(train.Config(init=str(world.base)))
    assert list(seconds) == counts and used[: len(counts)] == counts
    assert all(0 < time_taken < 1 for time_taken in seconds.values())


def test_one_process_looks_for_threads_unless_told(world, tmp_path):
    """The shipped command. More than one core is asked for; how many it takes is its matter."""
    flags = flags_of(world, tmp_path / "run", "--iters", 1, "--sft-epochs", 1)
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", *flags], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    cores = len(os.sched_getaffinity(0))
    threads = json.loads((tmp_path / "run" / "config.json").read_text())["threads"]
    assert 1 <= threads <= cores
    assert (f"{threads} of {cores} threads" in done.stdout) == (threads < cores)


FIXED_FIELDS = [field for field in FIELDS if field.name not in train.MUTABLE_FIELDS]


@pytest.mark.parametrize("field", FIXED_FIELDS, ids=lambda field: field.name)
def test_a_run_goes_on_with_the_knobs_that_it_began_with_or_not_at_all(tmp_path, field):
    cfg = train.Config()
    path = tmp_path / "config.json"
    saved = json.loads(json.dumps(asdict(cfg)))
    train.check_same_run(cfg, saved, {}, path)
    value = "x" if field.type is str else 7
    with pytest.raises(UserError, match=f"{field.name} = .*{field.default}.* now .*{value}"):
        train.check_same_run(replace(cfg, **{field.name: value}), saved, {}, path)


def test_the_run_folder_of_another_configuration_is_left_alone(world, whole):
    paths = [path for path in whole.rglob("*") if path.is_file()]
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in paths]
    argv = flags_of(world, whole, "--beta", 0.5)
    check_ends(argv, whole / "config.json", "beta = 0.1", "0.5", "--out")
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in paths] == before


def test_a_run_goes_on_with_the_data_that_it_began_with_or_not_at_all(world, tmp_path):
    data = make_variant(world, tmp_path, {})
    flags = ("--iters", 1, "--sft-epochs", 1)
    out = run(world, tmp_path / "run", *flags, data=data)
    names = {path.name for path in data.iterdir()} - {"recipe.json"}
    saved = json.loads((out / "config.json").read_text())["files"]
    assert saved.keys() == names | {"init", "writer"}
    before = products(out)
    words = "is not what it was when this run|not found"
    for name in names:
        text = (data / name).read_text()
        (data / name).write_text(text + "\n")  # a blank line more
        with pytest.raises(UserError, match=f"{re.escape(name)}.*({words})"):
            run(world, out, *flags, data=data)
        (data / name).unlink()
        with pytest.raises(UserError, match=f"{re.escape(name)}.*({words})"):
            run(world, out, *flags, data=data)
        (data / name).write_text(text)
    assert_same(products(out), before)
    write_rows(data / "valid.jsonl", [{"prompt": "Is it red?"}])
    run(world, out, *flags, data=data)  # a file more changes nothing that is there
    files = json.loads((out / "config.json").read_text())["files"]
    assert set(files) == names | {"valid.jsonl", "init", "writer"}


@pytest.mark.parametrize("flags", [[], ["--activation-checkpointing"]], ids=["plain", "FSDP"])
def test_one_model_at_a_time_is_in_memory(world, whole, tmp_path, monkeypatch, flags):
    """FSDP, which activation checkpointing brings along here, holds a model in cycles that only
    the collector takes apart."""
    references, num_alive, load_model = [], [], train.load_model

    def watch(*args):
        model, tok = load_model(*args)
        num_alive.append(sum(reference() is not None for reference in references))
        references.append(weakref.ref(model))
        return model, tok

    monkeypatch.setattr(train, "load_model", watch)
    gc.disable()
    try:
        epochs = ("--sft-epochs", 1, "--dpo-epochs", 1)
        run(world, tmp_path / "run", "--iters", 2, *epochs, *flags)
    finally:
        gc.enable()
    assert len(num_alive) >= 8 and set(num_alive) == {0}


EFFECTS = [  # a knob, another value, the first product that must change by it
    ("init", "{whole}/SFT", "SFT/model.safetensors"),
    ("data", "{data}", "SFT/model.safetensors"),
    ("seed", "1", "SFT/model.safetensors"),
    ("sft_lr", "1e-3", "SFT/model.safetensors"),
    ("sft_epochs", "4", "SFT/model.safetensors"),
    ("batch", "4", "SFT/model.safetensors"),
    ("dropout", "0.3", "SFT/model.safetensors"),
    ("dtype", "bfloat16", "SFT/model.safetensors"),
    ("eft_size", "0", "M1/model.safetensors"),
    ("writer", "{whole}/SFT", "M2/prompts.jsonl"),
    ("prompts", "3,4", "M2/prompts.jsonl"),
    ("rouge", "0.75", "M2/prompts.jsonl"),
    ("candidates", "2", "M2/candidates.jsonl"),
    ("temperature", "0.5", "M2/candidates.jsonl"),
    ("top_p", "0.5", "M2/candidates.jsonl"),
    ("max_response", "4", "M2/candidates.jsonl"),
    ("votes", "1", "M2/judgements.jsonl"),
    ("max_judgement", "11", "M2/judgements.jsonl"),
    ("dpo_lr", "1e-4", "M2/model.safetensors"),
    ("dpo_epochs", "2", "M2/model.safetensors"),
    ("beta", "0.3", "M2/model.safetensors"),
]
BEFORE = {  # the products that a run stands on when it makes this one
    "SFT/model.safetensors": [],
    "M1/model.safetensors": ["SFT/*", "M?/prompts.jsonl"],
    "M2/prompts.jsonl": ["SFT/*"],
    "M2/candidates.jsonl": ["SFT/*", "M1/*", "M?/prompts.jsonl"],
    "M2/judgements.jsonl": ["SFT/*", "M1/*", "M?/prompts.jsonl", "M2/candidates.jsonl"],
    "M2/model.safetensors": ["SFT/*", "M1/*", "M?/prompts.jsonl", "M2/*s.jsonl"],
}
TESTED_ELSEWHERE = {  # their effect is no other product
    "out",
    "iters",
    "max_prompt",
    "sample_batch",
    "micro_tokens",
    "save_every",
    "keep_every",
    "tp",
    "activation_checkpointing",
}


@pytest.mark.parametrize("name, value, product", EFFECTS, ids=[e[0] for e in EFFECTS])
def test_every_field_has_an_effect(world, whole, tmp_path, monkeypatch, name, value, product):
    out = copy_products(whole, tmp_path / "run", *BEFORE[product])
    data = world.data
    if name == "data":
        rows = read_jsonl(world.data / "ift.jsonl")[:20]
        data = make_variant(world, tmp_path, {"ift.jsonl": rows})
    exists = train.exists

    def stop_when_there(run, *args):
        if (out / product.replace("model.safetensors", "config.json")).exists():
            raise Finished
        return exists(run, *args)

    monkeypatch.setattr(train, "exists", stop_when_there)
    flags = [flag_of(name), value.format(whole=whole, data=data)]
    with pytest.raises(Finished):
        run(world, out, *flags, data=data)
    assert (out / product).read_bytes() != (whole / product).read_bytes()


def test_no_field_was_forgotten():
    names = {name for name, _, _ in EFFECTS} | TESTED_ELSEWHERE
    assert names == {field.name for field in FIELDS}


def test_the_sampling_batch_changes_no_row(world, whole, tmp_path):
    out = run(world, tmp_path / "run", "--sample-batch", 5, "--iters", 2)
    for file in ROUND_FILES[:3]:
        assert_same_rows(read_jsonl(out / "M2" / file), read_jsonl(whole / "M2" / file))


# ---- bad input: one clear line, and nothing overwritten --------------------------------------


def exit_code_of(argv: list[str]) -> int | str:
    """What the command, here in this process, gives to sys.exit."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as e:
            train.command(argv)
    finally:
        signal.signal(signal.SIGTERM, handler)
    return e.value.code


def check_ends(argv: list[str], *words):
    """The command, here in this process, ends with exit code 1 and one line with these words."""
    line = exit_code_of(argv)  # a text: it goes to stderr and the exit code is 1
    assert isinstance(line, str) and line.startswith("error: ") and "\n" not in line
    for word in words:
        assert str(word) in line, (word, line)


def check_refused(result, *words):
    """A process ended with exit code 1, and stderr is one line with these words."""
    assert result.code == 1 and len(result.err.splitlines()) == 1, result.err
    assert result.err.startswith("error: ")
    for word in words:
        assert str(word) in result.err, (word, result.err)


IFT = {"prompt": "What is it?", "response": "It is so."}
BAD_DATA = {
    "malformed row": (
        {"ift.jsonl": json.dumps(IFT) + '\n{"prompt": "x"\n'},
        ["ift.jsonl:2", "JSON"],
    ),
    "row without response": (
        {"ift.jsonl": [IFT, {"prompt": "x"}]},
        ["ift.jsonl:2", "no usable response"],
    ),
    "row that is no object": ({"ift.jsonl": [IFT, [1]]}, ["ift.jsonl:2"]),
    "row whose prompt is a number": (
        {"ift.jsonl": [IFT, IFT | {"prompt": 5}]},
        ["ift.jsonl:2", "prompt"],
    ),
    "no ift.jsonl": ({"ift.jsonl": None}, ["ift.jsonl", "not found"]),
    "empty ift.jsonl": ({"ift.jsonl": ""}, ["ift.jsonl", "no rows"]),
    "empty eft.jsonl": ({"eft.jsonl": ""}, ["eft.jsonl", "no rows"]),
    "judgement without score": (
        {"eft.jsonl": [IFT | {"judgement": "Score: 4"}, IFT | {"judgement": "Good."}]},
        ["eft.jsonl", "2", "Score: n"],
    ),
    "ranks that do not fit": (
        {"eft_eval.jsonl": [{"prompt": "x", "responses": ["a", "b"], "ranks": [0]}]},
        ["eft_eval.jsonl", "row 1"],
    ),
    "responses that are a number": (
        {"eft_eval.jsonl": [{"prompt": "x", "responses": 0.5, "ranks": [0]}]},
        ["eft_eval.jsonl:1", "no usable responses"],
    ),
    "ranks of eft_ranked that do not fit": (
        {
            "eft.jsonl": None,
            "eft_ranked.jsonl": [{"prompt": "x", "responses": ["a", "b"], "ranks": [0]}],
        },
        ["eft_ranked.jsonl", "row 1"],
    ),
    "eft_ranked with a null": (
        {
            "eft.jsonl": None,
            "eft_ranked.jsonl": [{"prompt": "x", "responses": ["a", None], "ranks": [0, 1]}],
        },
        ["eft_ranked.jsonl", "row 1"],
    ),
    "eft_ranked without ranks": (
        {"eft.jsonl": None, "eft_ranked.jsonl": [{"prompt": "x", "responses": ["a", "b"]}]},
        ["eft_ranked.jsonl:1", "no usable ranks"],
    ),
    "judge template without response": (
        {"judge.txt": "Grade {prompt}.\n"},
        ["judge.txt", "{response}"],
    ),
    "no judge template": ({"judge.txt": None}, ["judge.txt", "not found"]),
    "judge template that is not UTF-8": (
        {"judge.txt": b"Note \xe9 {prompt} {response}"},
        ["judge.txt", "byte 5", "UTF-8"],
    ),
    "no writer template": ({"propose.txt": None}, ["propose.txt", "not found"]),
    "writer template without a place": ({"propose.txt": "Question:"}, ["propose.txt", "{1}"]),
    "writer template that leaves one out": (
        {"propose.txt": "{1}\n{3}\n"},
        ["propose.txt", "leaves one out"],
    ),
    "recipe with a stray key": (
        {"recipe.json": '{"learning_rate": 1}'},
        ["recipe.json", "learning_rate"],
    ),
    "recipe that is no object": ({"recipe.json": "[1]"}, ["recipe.json"]),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_named_by_file_and_line(world, tmp_path, case):
    files, words = BAD_DATA[case]
    data = make_variant(world, tmp_path, files)
    check_ends(flags_of(world, tmp_path / "run", data=data), *words)
    assert not (tmp_path / "run").exists()


def test_an_error_is_one_line_on_stderr_and_exit_code_1(world, tmp_path):
    argv = flags_of(world, tmp_path / "run", "--iters", 0)
    check_refused(start(argv, tmp_path / "log"), "--iters must be at least 1")


def test_rows_of_ift_teach_responses_whatever_else_they_hold(world, tmp_path):
    extra = [{"judgement": None, "id": 7}, {"judgement": "Score: 1"}]
    losses = []
    for rows in ([IFT, IFT], [IFT | more for more in extra]):
        folder = tmp_path / str(len(losses))
        folder.mkdir()
        data = make_variant(world, folder, {"ift.jsonl": rows})
        out = run(world, folder / "run", "--iters", 1, "--sft-epochs", 1, data=data)
        losses.append([row["loss"] for row in read_metrics(out)])
    assert losses[0] == losses[1] != []


def test_prompts_that_nothing_is_trained_on_are_held_out(world, tmp_path):
    data = make_variant(world, tmp_path, {"valid.jsonl": [{"prompt": "Is it red?"}]})
    expected = {"Is it red?"}
    for file in ("test", "eft_eval"):
        expected |= {row["prompt"] for row in read_jsonl(data / f"{file}.jsonl")}
    assert set(train.read_data(train.Config(), data).held_out) == expected


BAD_TP = {  # what three processes cannot share
    "4 heads": {},
    "1 key/value heads": {"heads": 3, "kv_heads": 1},
    "100 hidden units": {"heads": 3, "kv_heads": 3, "ffn": 100},
    "421 tokens": {"heads": 3, "kv_heads": 3, "vocab_size": 421},
}


@pytest.mark.parametrize("words", BAD_TP)
def test_a_model_that_cannot_be_dealt_to_the_processes_is_refused_by_the_number(words):
    shape = tiny.SHAPE | {"vocab_size": 420} | BAD_TP[words]
    cfg = ModelConfig(**shape)
    with pytest.raises(UserError, match=f"base: {words}.* 3 processes.*--tp"):
        check_tp(cfg, 3, "base")
    check_tp(cfg, 1, "base")


@pytest.mark.parametrize("field", ["init", "writer"])
def test_a_model_that_cannot_be_dealt_is_refused_before_anything_is_written(
    world, tmp_path, field
):
    """Also a writer of another shape than M0, which would only be loaded after hours of SFT."""
    config = json.loads((world.base / "config.json").read_text())
    config |= {"num_attention_heads": 3, "num_key_value_heads": 3}
    fitting = tmp_path / "fitting"
    shutil.copytree(world.base, fitting)
    (fitting / "config.json").write_text(json.dumps(config))
    models = {"init": str(fitting), "writer": str(fitting), field: str(world.base)}
    cfg = train.parse_args(flags_of(world, tmp_path / "run", "--tp", 3))
    with pytest.raises(UserError, match=f"{world.base}: 4 heads .* 3 processes"):
        train.open_run(replace(cfg, **models), mesh=None)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="session")
def bad_models(world):
    """Models that cannot be loaded: half, torn, misfit."""
    folder = world.folder / "bad"
    for name in ("half", "torn", "misfit"):
        shutil.copytree(world.base, folder / name)
    (folder / "half" / "config.json").unlink()
    os.truncate(folder / "torn" / "model.safetensors", 1000)
    config = json.loads((world.base / "config.json").read_text())
    config["vocab_size"] -= 1
    (folder / "misfit" / "config.json").write_text(json.dumps(config))
    return folder


BAD_FLAGS = {
    "no data folder": ("--data {bad}/none", ["{bad}/none", "no such folder"]),
    "no model": ("--init {bad}/none", ["{bad}/none", "no such folder"]),
    "no writer": ("--writer {bad}/none", ["{bad}/none", "no such folder"]),
    "half a model": ("--init {bad}/half", ["{bad}/half/config.json", "not found"]),
    "torn weights": ("--init {bad}/torn", ["{bad}/torn/model.safetensors", "download it again"]),
    "another tokenizer": ("--init {bad}/misfit", ["{bad}/misfit/tokenizer.model", "420", "419"]),
    "no name of a model": ("--init=", ["--init", "pretrained"]),
    "no models": ("--iters 0", ["--iters"]),
    "a learning rate of nothing": ("--dpo-lr 0", ["--dpo-lr", "positive"]),
    "a learning rate that is no number": ("--sft-lr nan", ["--sft-lr", "positive"]),
    "one candidate": ("--candidates 1", ["--candidates", "at least 2"]),
    "no prompts": ("--prompts 0", ["--prompts", "300,700"]),
    "fewer than no EFT rows": ("--eft-size -1", ["--eft-size", "not negative"]),
    "fewer than no kept models": ("--keep-every -1", ["--keep-every", "not negative"]),
    "everything dropped": ("--dropout 1", ["--dropout"]),
    "one response to every prompt": ("--temperature 0", ["--temperature", "positive"]),
    "no top-p": ("--top-p 0", ["--top-p"]),
    "a type that is none": ("--dtype float16", ["--dtype", "bfloat16"]),
    "half a tensor-parallel group": ("--tp 2", ["1 processes", "--tp 2"]),
    "no process": ("--tp 0", ["--tp"]),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags_and_models_are_refused_in_one_line(world, bad_models, tmp_path, case):
    flags, words = BAD_FLAGS[case]
    flags = flags.format(bad=bad_models).split()
    check_ends(
        flags_of(world, tmp_path / "run", *flags), *(w.format(bad=bad_models) for w in words)
    )
    if case != "torn weights":  # they are looked at when they are loaded
        assert not (tmp_path / "run").exists(), "a corrected command may take the same --out"


@pytest.mark.parametrize("flags", ["--bogus 1", "--iters three"])
def test_flags_that_are_none_are_refused_by_argparse(capsys, flags):
    with pytest.raises(SystemExit) as e:
        train.parse_args(flags.split())
    error = capsys.readouterr().err.splitlines()[-1]
    assert e.value.code == 2 and flags.split()[0] in error


@pytest.mark.parametrize("name, flag", [("SFT", "--sft-lr"), ("M2", "--dpo-lr")])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_older_models(
    world, whole, tmp_path, name, flag
):
    out = tmp_path / "run"
    if name == "M2":
        copy_products(whole, out, "SFT/*", "M1/*", "M?/prompts.jsonl")
    argv = flags_of(world, out, flag, 1e30)
    check_ends(argv, f"{name}: loss ", "learning rate")
    assert not (out / name / "config.json").exists()
    assert not (out / name / "model.safetensors").exists()
    if name == "M2":
        assert all((out / "M2" / file).exists() for file in ROUND_FILES)
    assert all(math.isfinite(m["loss"]) for m in read_metrics(out))
    check_ends(argv, f"{name}: loss ", "learning rate")  # it says so again, and no more is lost


def test_a_gradient_that_is_not_finite_in_the_last_step_is_not_saved(world, tmp_path, monkeypatch):
    """The loss of that step is fine, so only the gradient's norm tells that weights are lost."""
    steps, sft_loss = [], train.sft_loss

    def overflowing_loss(model, *tensors):
        loss, metrics = sft_loss(model, *tensors)
        steps.extend([1] * torch.is_grad_enabled())
        if len(steps) == 5:
            loss = loss + (model.norm.weight * 0).sqrt().sum()
        return loss, metrics

    monkeypatch.setattr(train, "sft_loss", overflowing_loss)
    with pytest.raises(UserError, match="SFT.*step 5"):
        run(world, tmp_path / "run", "--sft-epochs", 1)
    assert not (tmp_path / "run" / "SFT" / "config.json").exists()


def test_a_judge_that_cannot_be_read_ends_the_run_in_one_line_with_everything_kept(
    world, whole, tmp_path
):
    out = copy_products(whole, tmp_path / "run", "SFT/*", "M1/*", "M?/prompts.jsonl")
    argv = flags_of(world, out, "--max-judgement", 2)
    words = ["M2", "no prompt gave a pair", "fewer than two scored responses': 9", "0.0%"]
    check_ends(argv, *words, "cut by the length limit': 54", "--max-judgement")
    assert {path.name for path in (out / "M2").iterdir()} == set(ROUND_FILES[:3])
    before = products(out)
    check_ends(argv, *words)
    assert_same(products(out), before)


def test_prompts_that_the_writer_cannot_finish_are_counted_in_the_message(world, tmp_path):
    """--max-prompt limits them."""
    argv = flags_of(world, tmp_path / "run", "--max-prompt", 3, "--sft-epochs", 1)
    check_ends(argv, "only 0 of 9 new prompts", "cut by the length limit")
    assert (tmp_path / "run" / "SFT" / "config.json").exists()
    assert {p.name for p in (tmp_path / "run" / "M2").iterdir()} == {"prompts.jsonl.part"}


def test_seed_and_test_rows_longer_than_the_context_are_left_out_and_counted(
    world, tmp_path, capsys
):
    ift, eft, test = (read_jsonl(world.data / f"{x}.jsonl") for x in ("ift", "eft", "test"))
    long_prompt, long_response = IFT | {"prompt": LONG}, IFT | {"response": LONG}
    exam = {"prompt": "x", "responses": [LONG, "It is so."], "ranks": [0, 1]}
    files = {
        "ift.jsonl": [*ift[:10], long_prompt, *ift[10:], long_response],
        "eft.jsonl": [*eft, long_response | {"judgement": "Score: 1"}],
        "test.jsonl": [{"prompt": LONG}, *test],
        "eft_eval.jsonl": [exam],
    }
    data = make_variant(world, tmp_path, files)
    out = run(world, tmp_path / "run", "--iters", 1, "--sft-epochs", 3, data=data)
    log = capsys.readouterr().out
    assert "SFT: 2 of 23 seed rows exceed the context" in log
    assert "M1: 3 of 45 seed rows exceed the context" in log
    assert "test.jsonl: 1 prompts leave no room" in log
    assert "exam.jsonl: 1 of 2 responses have no score: 0 are empty, 1 leave no room" in log
    assert [row["id"] for row in read_jsonl(out / "M1" / "test.jsonl")] == [1, 2, 3, 4, 5]
    assert {(j["id"], j["k"]) for j in read_jsonl(out / "M1" / "exam.jsonl")} == {(0, 1)}
    assert len(read_metrics(out, "SFT")) == 3 * 5


def test_a_context_that_no_seed_row_fits_is_said_so(world, tmp_path):
    data = make_variant(world, tmp_path, {"ift.jsonl": [IFT | {"prompt": LONG}] * 5})
    check_ends(flags_of(world, tmp_path / "run", data=data), "no seed row fits", "192")


def test_a_limit_of_more_than_half_the_context_is_lowered_and_said_so(
    world, whole, tmp_path, capsys
):
    out = copy_products(whole, tmp_path / "run", "SFT/*", "M1/*", "M2/prompts.jsonl")
    run(world, out, "--max-response", 188, "--iters", 2)
    assert "a limit of 188 new tokens is lowered to 96" in capsys.readouterr().out


def test_responses_that_leave_the_judge_no_room_are_said_so(world, whole, tmp_path, capsys):
    out = copy_products(whole, tmp_path / "run", "SFT/*", "M1/*", "M?/prompts.jsonl")
    data = make_variant(world, tmp_path, {"judge.txt": LONG + "{prompt} {response}"})
    argv = flags_of(world, out, data=data)
    check_ends(argv, "M2", "no prompt gave a pair", "shorten judge.txt")
    assert "27 leave no room for the judge" in capsys.readouterr().out
    assert (out / "M2" / "candidates.jsonl").exists()


def test_an_exam_with_no_row_that_fits_does_not_spoil_the_run(world, tmp_path):
    exam = {"prompt": LONG, "responses": ["a", "b"], "ranks": [0, 1]}
    files = {"test.jsonl": [{"prompt": LONG}], "eft_eval.jsonl": [exam]}
    data = make_variant(world, tmp_path, files)
    for _ in range(2):
        out = run(world, tmp_path / "run", "--iters", 1, "--sft-epochs", 1, data=data)
        assert (out / "M1" / "exam.jsonl").read_text() == ""


def test_optional_files_may_be_missing_and_are_named(world, tmp_path, capsys):
    files = {"eft.jsonl": None, "test.jsonl": None, "eft_eval.jsonl": None}
    data = make_variant(world, tmp_path, files)
    out = run(world, tmp_path / "run", "--iters", 1, "--sft-epochs", 1, data=data)
    log = capsys.readouterr().out
    assert "M1 learns from ift.jsonl alone" in log
    assert "test.jsonl: models answer no test prompts" in log
    assert "eft_eval.jsonl: judges are not evaluated" in log
    assert {path.name for path in (out / "M1").iterdir()} == MODEL_FILES


# ---- the real thing --------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
def test_real_llama_weights_and_open_assistant_rows(tmp_path):
    data, out = tmp_path / "oa", tmp_path / "run"
    source = SHARED / "oasst" / "en_100_tree.jsonl"
    prepare = [sys.executable, "data/oasst/prepare.py", source, "--out", data]
    subprocess.run(prepare, cwd=ROOT, check=True, capture_output=True, timeout=60)
    template = "User: {prompt}\nAnswer: {response}\nReasons, then Score: <0 to 5>"
    (data / "judge.txt").write_text(template)
    argv = f"--init {SHARED}/stories260K/hf --data {data} --out {out} --iters 2 --prompts 4"
    argv += " --batch 8 --sft-lr 1e-3 --sft-epochs 2 --sample-batch 64 --candidates 2 --votes 1"
    argv += " --max-prompt 48 --max-response 32 --max-judgement 16"
    argv = argv.split()

    # it tells stories and cannot judge
    check_ends(argv, "M1: of ", "judgements of 71 ranked replies none can be learned from")
    report = json.loads((out / "M1/eft_report.json").read_text())
    judgements = read_jsonl(out / "M1/eft_judgements.jsonl")
    assert sum(report["dropped"].values()) == len(judgements) and report["kept"] == 0
    assert report["replies"] - report["not_judged"] == len(judgements) > 20
    assert report["ranked_prompts"] == 22
    losses = [m["loss"] for m in read_metrics(out, "SFT")]
    half = len(losses) // 2
    assert sum(losses[half:]) < 0.95 * sum(losses[:half])

    # with EFT rows of one's own it goes on, to what its judge can be read of
    rows = read_jsonl(data / "ift.jsonl")[:9]
    write_rows(data / "eft.jsonl", [row | {"judgement": "Score: 1"} for row in rows])
    try:
        train.main(train.parse_args(argv))
        assert read_jsonl(out / "M2" / "pairs.jsonl") and load(out / "M2")
    except UserError as e:
        assert "M2: no prompt gave a pair" in str(e)
    finally:
        dist.destroy_process_group()
    assert load(out / "M1")[0].cfg.layers == 5
    assert len(read_jsonl(out / "M2" / "prompts.jsonl")) == 4
    assert len(read_jsonl(out / "M2" / "candidates.jsonl")) == 8


# ---- one run folder, one process, one content ------------------------------------------------


LOCKING = (
    "import sys, time, train; train.lock_run(train.Path(sys.argv[1])); print('ours', flush=True)"
)


def test_a_second_start_in_a_run_folder_is_told_and_a_dead_ones_lock_is_free(tmp_path):
    argv = [sys.executable, "-c", f"{LOCKING}; time.sleep(99)", tmp_path]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"ours\n"
        with pytest.raises(UserError, match="another train.py is at work"):
            train.lock_run(tmp_path)
        other.kill()
    train.lock_run(tmp_path)
    train.lock_run(tmp_path)  # our own lock is no obstacle


def test_a_run_goes_by_what_its_paths_lead_to_and_not_by_their_spelling(world, whole, tmp_path):
    shutil.copytree(world.base, tmp_path / "base")
    shutil.copytree(world.data, tmp_path / "data")
    out = tmp_path / "run"
    copy_products(whole, out, "*/*")
    argv = ["--init", tmp_path / "base", "--data", tmp_path / "data", "--out", out]
    train.main(train.parse_args([str(flag) for flag in argv]))
    assert json.loads((out / "config.json").read_text())["data"] == str(tmp_path / "data")
    dist.destroy_process_group()
    weights = tmp_path / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x11")
    with pytest.raises(UserError, match="init is not what it was"):
        train.main(train.parse_args([str(flag) for flag in argv]))
    dist.destroy_process_group()


@pytest.mark.parametrize("rate, warned", [(0.95, True), (0.05, False), (0.0, False)])
def test_dropout_that_wrecks_a_model_is_warned_of(world, tmp_path, capsys, rate, warned):
    run(world, tmp_path / "run", "--iters", 1, "--sft-epochs", 1, "--dropout", rate)
    assert ("it was trained without" in capsys.readouterr().out) == warned


def test_a_gradient_out_of_proportion_is_warned_of(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "append_jsonl", lambda path, row: None)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    folder = SimpleNamespace(folder=tmp_path)
    for norm in (1.0, 1428.0):
        train.log_step(folder, "SFT", 1, 9, {"tokens": 8, "seconds": 1.0, "grad_norm": norm})
    assert capsys.readouterr().out.count("1428 is out of proportion") == 1
