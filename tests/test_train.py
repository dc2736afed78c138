"""train.py: the whole loop in a tiny world (tests/tiny.py), its files, restarts, processes, knobs and refusals.

Runs are bitwise reproducible here (CPU, one thread), so most properties compare files byte for byte.
"""

import gc
import hashlib
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import weakref
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import bench_memory
import pytest
import tiny
import torch
import torch.distributed as dist
from tiny import ROOT, start, write_rows
from torch.utils.flop_counter import FlopCounterMode

import judge
import sample
import train
from dpo import collate, sequence_logps
from model import CONFIGS, BadInput, ModelConfig, Rows, check_tp, load, read_shape
from sample import read_rows

sys.path.insert(0, str(ROOT / "data" / "zoo"))
import ablate

SHARED = ROOT.parent / "shared" / "data"
CHECKPOINT = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer.model"}
CHECKPOINT.add("tokenizer_config.json")
NAMES = ("out", "data", "iters", "save_every")  # knobs that change no product
LINES = ["prompts.jsonl", "candidates.jsonl", "judgements.jsonl", "pairs.jsonl"]


# ---- the tiny world ----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    torch.set_num_threads(1)
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(p for p in paths if p))
    folder = tmp_path_factory.mktemp("world")
    tiny.make_data(folder / "data")
    tiny.make_base(folder / "base")
    return SimpleNamespace(folder=folder, data=folder / "data", base=folder / "base")


@pytest.fixture(scope="session")
def whole(world):
    """An uninterrupted run of all three models; nobody writes into it."""
    return run(world, world.folder / "whole")


def flags_of(world, out, *flags, data=None) -> list[str]:
    return [str(f) for f in ("--init", world.base, "--data", data or world.data, "--out", out, *flags)]


def run(world, out: Path, *flags, data=None) -> Path:
    """A whole run in this process."""
    try:
        train.main(train.parse_args(flags_of(world, out, *flags, data=data))[0])
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return out


def metrics(out: Path, model: str = "") -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines if line["model"].startswith(model)]


def products(out: Path) -> dict[str, bytes]:
    """What a run has made, without work in hand (torn writes, chunks, checkpoints) and what names folder or clock."""
    found = {p.relative_to(out): p for p in out.rglob("*") if p.is_file() and p.suffix not in (".tmp", ".part")}
    found = {str(name): p.read_bytes() for name, p in found.items() if "checkpoint" not in name.parts}
    if "config.json" in found:
        config = json.loads(found["config.json"])
        found["config.json"] = repr({k: v for k, v in config.items() if k not in NAMES}).encode()
    if "metrics.jsonl" in found:
        whole = [line for line in found["metrics.jsonl"].decode().splitlines(True) if line.endswith("\n")]
        rows = [json.loads(line) for line in whole]
        found["metrics.jsonl"] = repr([{k: v for k, v in r.items() if k != "seconds"} for r in rows]).encode()
    return found


def same(a: dict[str, bytes], b: dict[str, bytes]):
    """Two sets of files are equal, or the names of those that differ."""
    assert [k for k in sorted({*a, *b}) if a.get(k) != b.get(k)] == []


def variant(world, folder: Path, files: dict) -> Path:
    """A copy of the data folder with other files: rows, texts, bytes, or None for one taken away."""
    data = folder / "data"
    shutil.copytree(world.data, data)
    for name, content in files.items():
        if content is None:
            (data / name).unlink()
        elif isinstance(content, str | bytes):
            (data / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        else:
            write_rows(data / name, content)
    return data


def part_of(whole: Path, out: Path, *keep: str) -> Path:
    """A run folder that stands where `keep` (globs) are all there is of a whole run."""
    out.mkdir(parents=True)
    for pattern in ("config.json", *keep):
        for path in whole.glob(pattern):
            (out / path.relative_to(whole)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, out / path.relative_to(whole))
    config = json.loads((out / "config.json").read_text()) | {"out": str(out)}
    (out / "config.json").write_text(json.dumps(config))
    return out


# ---- the command and its files -----------------------------------------------------------------------------


def test_the_shipped_command_leaves_every_file_and_a_second_start_changes_no_byte(world, whole, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "train.py", *flags_of(world, out)]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert first.returncode == 0, first.stderr
    weights = [*CHECKPOINT, "alpaca_eval.json", "exam.jsonl", "test.jsonl"]
    expected = {"config.json", "metrics.jsonl"}
    expected |= {f"{m}/{f}" for m in ("SFT", "M1") for f in weights}
    expected |= {f"{m}/{f}" for m in ("M2", "M3") for f in weights + LINES}
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.rglob("*") if p.is_file()}
    assert {str(p.relative_to(out)) for p in before} == expected
    same(products(out), products(whole))  # and it is the run that the tests below look at

    # one line per step of every model, in the file and, as this is no terminal, on stdout
    for name in ("SFT", "M1", "M2", "M3"):
        rows = metrics(out, name)
        assert [r["step"] for r in rows] == list(range(1, rows[0]["steps"] + 1))
        said = [line for line in first.stdout.splitlines() if line.startswith(f"{name} step ")]
        assert [line.split()[2] for line in said] == [f"{r['step']}/{r['steps']}" for r in rows]
        assert all("loss" in line and "tok/s" in line for line in said)
    for what in ("prompts for M2", "M1 responds", "M2 judges", "M3 answers the test prompts", "SFT judges ranked"):
        assert any(line.startswith(what) and "tok/s" in line for line in first.stdout.splitlines()), what
    assert "Answers to the test prompts" in first.stdout and "held-out human rankings" in first.stdout

    second = start(flags_of(world, out), tmp_path / "log")
    assert second.code == 0, second.err
    assert " step " not in second.out and "responds" not in second.out  # all skipped
    assert "Answers to the test prompts" in second.out  # but the table is shown again
    after = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.rglob("*") if p.is_file()}
    assert {p: b for p, (b, _) in before.items()} == {p: b for p, (b, _) in after.items()}
    assert {p.name for p in before if before[p][1] != after[p][1]} <= {"config.json"}  # the knobs are written anew


def test_sft_lowers_the_loss_and_updates_follow_the_schedule(whole):
    for name, rows, epochs in (("SFT", 21, 5), ("M1", 42, 5)):
        lines = metrics(whole, name)
        an_epoch = -(-rows // 5)
        assert len(lines) == an_epoch * epochs
        first, last = lines[:an_epoch], lines[-an_epoch:]
        assert sum(r["loss"] for r in last) < 0.85 * sum(r["loss"] for r in first)
        assert max(r["lr"] for r in lines) == 3e-3 and 0.2 * 3e-3 <= lines[-1]["lr"] < 0.25 * 3e-3
        assert (lines[0]["lr"] < 3e-3) == (len(lines) >= 40)  # 5 % of the steps are warm-up
        assert [r["lr"] for r in last] == sorted((r["lr"] for r in last), reverse=True)
    lines = metrics(whole, "M2")
    assert len(lines) == 3 * -(-len(read_rows(whole / "M2" / "pairs.jsonl")) // 5)
    assert 0.1 * 1e-3 <= lines[-1]["lr"] < 0.35 * 1e-3


def test_rows_of_a_round_are_complete_and_ordered(world, whole):
    for name, count in (("M2", 9), ("M3", 7)):
        prompts, candidates, judgements, pairs = (read_rows(whole / name / f) for f in LINES)
        assert [p["id"] for p in prompts] == list(range(count))
        assert [(c["id"], c["k"]) for c in candidates] == [(i, k) for i in range(count) for k in range(3)]
        spoken = [(c["id"], c["k"]) for c in candidates if c["response"]]
        assert [(j["id"], j["k"], j["vote"]) for j in judgements] == [(*at, v) for at in spoken for v in range(2)]
        assert all(c["truncated"] == (c["tokens"][-1] != 2) and c["tokens"].count(2) <= 1 for c in candidates)
        assert len(pairs) >= 2 and all(p["chosen_score"] > p["rejected_score"] for p in pairs)
        assert {p["prompt"] for p in pairs} <= {p["prompt"] for p in prompts}
    seeds = {r["prompt"] for f in ("ift", "test", "eft_eval") for r in read_rows(world.data / f"{f}.jsonl")}
    new = [p["prompt"] for m in ("M2", "M3") for p in read_rows(whole / m / "prompts.jsonl")]
    assert len(set(new)) == len(new) == 16 and not seeds & set(new)
    tests = [r["prompt"] for r in read_rows(world.data / "test.jsonl")]
    for name in ("SFT", "M1", "M2", "M3"):
        assert [r["prompt"] for r in read_rows(whole / name / "test.jsonl")] == tests
        alpaca = json.loads((whole / name / "alpaca_eval.json").read_text())
        assert [set(r) for r in alpaca] == [{"instruction", "output", "generator", "dataset"}] * len(tests)
        assert [(r["instruction"], r["generator"]) for r in alpaca] == [(t, name) for t in tests]
        exam = read_rows(whole / name / "exam.jsonl")
        asked = [(i, k, v) for i in range(3) for k in range(3) for v in range(2)]
        assert [(r["id"], r["k"], r["vote"]) for r in exam] == asked


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(world, whole, tmp_path):
    same(products(run(world, tmp_path / "again")), products(whole))
    ours, other = products(whole), products(run(world, tmp_path / "other", "--seed", 1, "--iters", 2))
    for file in ("SFT/model.safetensors", "M2/prompts.jsonl", "M1/model.safetensors", "M2/candidates.jsonl",
                 "M2/judgements.jsonl", "M2/model.safetensors", "M1/test.jsonl", "M1/exam.jsonl"):  # fmt: skip
        assert ours[file] != other[file], file


def test_more_models_can_be_asked_of_a_finished_run(world, whole, tmp_path):
    out = run(world, tmp_path / "run", "--iters", 2)
    assert not (out / "M3").exists()
    run(world, out, "--iters", 3)
    ours, theirs = products(out), products(whole)
    ours.pop("metrics.jsonl"), theirs.pop("metrics.jsonl")
    same(ours, theirs)
    assert metrics(out) == metrics(whole)


# ---- killed and started again ------------------------------------------------------------------------------

DEATHS = [  # one after another, in the order in which a run comes by: each start gets as far as the next
    ("step", "SFT", 7),
    ("checkpoint", "SFT", 8),
    ("save", "SFT", 0),
    ("sampling", "prompts for M2", 9),
    ("file", "M3/prompts.jsonl", 0),
    ("step", "M1", 11),
    ("save", "M1", 0),
    ("sampling", "M1 responds", 6),
    ("file", "M2/candidates.jsonl", 0),
    ("sampling", "M1 judges", 5),
    ("file", "M2/judgements.jsonl", 0),
    ("reference", "", 2),
    ("file", "M2/pairs.jsonl", 0),
    ("step", "M2", 3),
    ("save", "M2", 0),
    ("sampling", "M2 judges", 8),
    ("step", "M3", 2),
    ("sampling", "SFT answers the test prompts", 4),
    ("file", "M1/test.jsonl", 0),
    ("sampling", "M2 judges ranked answers", 7),
    ("file", "M3/exam.jsonl", 0),
]


def test_killed_in_every_chapter_and_started_again_a_run_ends_in_the_same_bytes(world, whole, tmp_path):
    out, want, said = tmp_path / "run", products(whole), ""
    for number, death in enumerate(DEATHS):
        result = start(flags_of(world, out, "--save-every", 4), tmp_path / f"log{number}", kill=death)
        assert result.code == -9, (death, result.err)
        said += result.out
        for file, content in products(out).items():  # what stands there is whole, and what it will be in the end
            folder = out / Path(file).parent
            if file == "metrics.jsonl":
                lines = metrics_text(out)
                assert all(line in metrics(whole) for line in lines), death
            elif file.endswith(".jsonl") or (folder / "config.json").exists():
                assert content == want[file], (death, file)
    result = start(flags_of(world, out), tmp_path / "log")
    assert result.code == 0, result.err
    same(products(out), want)
    assert not [p for p in out.rglob("*") if p.suffix in (".tmp", ".part") or p.name == "checkpoint"]  # all tidied up
    assert said.count("SFT: goes on after step 4 of 25") == 2 and said.count("M1: goes on after step 8 of 45") == 1
    assert said.count("prompts for M3: 0 requests") == 1  # they had been written, the file had not
    for step in range(1, 26):  # a step is taken again only after a kill, and only from the last checkpoint on
        assert said.count(f"SFT step {step}/") == 1 + (step in (5, 6)) + (step in (5, 6, 7, 8)) + (step == 25), step


def metrics_text(out: Path) -> list[dict]:
    """The whole lines of metrics.jsonl, where the last may be torn."""
    lines = [line for line in (out / "metrics.jsonl").read_text().splitlines(True) if line.endswith("\n")]
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def ready_to_sample(world, whole, out: Path) -> list[str]:
    """Flags of a run that stands before M1's first responses, and cuts 9 prompts into chunks of 5 and 4."""
    part_of(whole, out, "SFT/*", "M1/*", "M[23]/prompts.jsonl")
    return flags_of(world, out, "--sample-batch", 2, "--iters", 2)


def test_sampling_goes_on_with_the_next_chunk(world, whole, tmp_path):
    straight, out = tmp_path / "straight", tmp_path / "run"
    assert start(ready_to_sample(world, whole, straight), tmp_path / "log").code == 0
    flags, kept = ready_to_sample(world, whole, out), []
    for number, file in enumerate(("candidates", "judgements", "judgements")):  # each start gets to a second chunk
        assert start(flags, tmp_path / f"log{number}", kill=("commit", f"M2/{file}.jsonl", 2)).code == -9
        lines = (out / f"M2/{file}.jsonl.part").read_text().splitlines(keepends=True)
        assert not lines[-1].endswith("\n")  # it is torn
        kept.append([json.loads(line)["rows"] for line in lines[:-1]])
    assert start(flags, tmp_path / "log3").code == 0
    same(products(out), products(straight))
    first, second = list(range(8)), list(range(8, 16))
    assert kept == [[list(range(5))], [first], [first, second]]
    said = [(tmp_path / f"log{n}" / "rank0.out").read_text() for n in (1, 2, 3)]  # what is kept is not sampled again
    assert "M1 responds: 5 of 9 rows are there" in said[0] and "M1 responds: 12 responses" in said[0]
    assert "M1 judges: 8 of 27 rows are there" in said[1]
    assert "M1 judges: 16 of 27 rows are there" in said[2] and "M1 judges: 22 judgements" in said[2]


@pytest.mark.parametrize("place", [0, 1])
def test_rows_are_dealt_to_processes_by_length(place, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "replica", lambda cfg: (place, 2))
    monkeypatch.setattr(train, "share", list)
    monkeypatch.setattr(train, "stop_if_asked", lambda: None)
    monkeypatch.setattr(train, "progress", lambda *_: nullcontext(print))
    monkeypatch.setattr(train.dist, "get_rank", lambda: 0)
    rows = [{"id": n, "k": 0, "prompt": "p" * n, "response": "r" * (50 - n * n % 50)} for n in range(20)]
    took = []
    cfg = train.Config(out=str(tmp_path), sample_batch=4)
    train.in_chunks(cfg, None, torch.nn.Linear(1, 1), rows, "", "", "M2/x.jsonl", 1,
                    lambda mine, tick: took.extend(len(r["prompt"] + r["response"]) for r in mine) or [])  # fmt: skip
    assert took == sorted((len(r["prompt"] + r["response"]) for r in rows), reverse=True)[place::2]


# ---- asked to stop, and things that go wrong on the way ----------------------------------------------------


@pytest.mark.parametrize("tp", [1, 2])
def test_sigterm_to_one_of_two_processes_saves_the_step_and_one_process_goes_on_from_there(
    world, one_process, tmp_path, tp
):
    out = part_of(one_process, tmp_path / "run", "SFT/*", "M2/prompts.jsonl")
    flags = flags_of(world, out, *UNEVEN, "--iters", 1)
    result = start([*flags, "--tp", tp], tmp_path / "log", world=2, kill=("step", "M1", 4, "term", "1"))
    assert result.codes == [75, 75] and "Traceback" not in result.err, result.err
    assert "the same command goes on" in result.out.splitlines()[-1]
    assert [p.name for p in (out / "M1" / "checkpoint").iterdir()] == ["4"]
    again = start(flags, tmp_path / "log2")
    assert again.code == 0 and "M1: goes on after step 4 of 9" in again.out, again.err
    close(metrics(out, "M1"), metrics(one_process, "M1"), ["loss", "grad_norm"], 1e-5)


def test_a_tensor_parallel_group_of_which_one_process_is_asked_to_stop_stops_as_one(world, whole, tmp_path):
    flags = [*ready_to_sample(world, whole, tmp_path / "run"), "--tp", 2]
    result = start(flags, tmp_path / "log", world=2, kill=("sampling", "M1 responds", 30, "term", "1"), timeout=60)
    assert result.codes == [75, 75] and not result.err, result.err


def test_asked_to_stop_sampling_stops_at_once_with_a_line_and_another_world_keeps_its_chunks(world, whole, tmp_path):
    """First one process by Ctrl-C, in its second chunk; then one of two by SIGTERM, in their second."""
    flags, folder = ready_to_sample(world, whole, tmp_path / "run"), tmp_path / "run" / "M2"
    result = start(flags, tmp_path / "log", kill=("sampling", "M1 responds", 65, "int"))
    assert result.code == 130 and not result.err and "the same command goes on" in result.out.splitlines()[-1]
    (chunk,) = read_rows(folder / "candidates.jsonl.part")
    assert chunk["rows"] == list(range(5))
    stale = {"of": "0", "rows": [5, 99], "made": [chunk["made"][0] | {"id": 5}]}  # a chunk of other rows than these
    write_rows(folder / "candidates.jsonl.part", [chunk, stale])
    result = start(flags, tmp_path / "log2", world=2, kill=("sampling", "M1 judges", 120, "term", "1"))
    assert result.codes == [75, 75] and not result.err and "the same command goes on" in result.out.splitlines()[-1]
    assert "M1 responds: 5 of 9 rows are there" in result.out
    rows = read_rows(folder / "candidates.jsonl")
    assert [(r["id"], r["k"]) for r in rows] == [(i, k) for i in range(9) for k in range(3)]
    assert rows[:15] == sorted(chunk["made"], key=lambda r: (r["id"], r["k"]))  # it is dealt by length
    (chunk,) = read_rows(folder / "judgements.jsonl.part")
    assert chunk["rows"] == list(range(16))


def test_a_disk_that_fills_up_leaves_the_last_checkpoint_and_one_line(world, whole, tmp_path):
    out, flags = tmp_path / "run", ("--iters", 1, "--save-every")
    full = start(flags_of(world, out, *flags, 3), tmp_path / "log", kill=("step", "SFT", 5, "full"))
    refused(full, out / "SFT" / "checkpoint" / "6.tmp", "cannot be written", "GB free", "make room")
    full = start(flags_of(world, out, *flags, 99), tmp_path / "log2", kill=("step", "SFT", 25, "full"))
    assert "SFT: goes on after step 3 of 25" in full.out
    refused(full, out, "File too large", "make room")  # the weights
    assert not (out / "SFT" / "config.json").exists() and (out / "SFT" / "checkpoint" / "3").exists()
    assert metrics(run(world, out, *flags, 99)) == metrics(whole, "SFT") + metrics(whole, "M1")
    ours = {name: content for name, content in products(out).items() if "/" in name}
    same(ours, {name: content for name, content in products(whole).items() if name.startswith(("SFT/", "M1/"))})


def test_checkpoints_of_another_training_and_damaged_ones_are_refused(world, tmp_path):
    out, flags = tmp_path / "run", ("--save-every", 3, "--iters", 1)
    home, kept = out / "SFT" / "checkpoint", tmp_path / "kept"
    assert start(flags_of(world, out, *flags), tmp_path / "log", kill=("step", "SFT", 5)).code == -9
    shutil.move(home, kept)
    identity = json.loads((kept / "3" / "training.json").read_text())
    others = {"model": "M1", "steps": 26, "rows": "0", "dim": 64, "beta": 0.5, "": "cut short"}
    for key, value in others.items():
        shutil.copytree(kept, home, dirs_exist_ok=True)
        if key:
            (home / "3" / "training.json").write_text(json.dumps(identity | {key: value}))
        else:
            os.truncate(home / "3" / "__0_0.distcp", 1000)
        with pytest.raises(BadInput) as e:
            run(world, out, *flags)
        what = f"another training, whose {key} is {value!r}" if key else "damaged or incomplete"
        assert f"{home}/3: " in str(e.value) and what in str(e.value) and f"remove {home}" in str(e.value)


# ---- many processes ----------------------------------------------------------------------------------------


def close(a: list[dict], b: list[dict], keys, tolerance: float):
    assert [r["step"] for r in a] == [r["step"] for r in b] and a
    for x, y in zip(a, b, strict=True):
        for k in keys:
            assert x[k] == pytest.approx(y[k], rel=tolerance, abs=tolerance), (x["model"], x["step"], k)


# batch 5 over two processes: 3 and 2 rows, in micro-batches of one row or two; the last batch of an epoch is 1 row
UNEVEN = ("--dropout", 0, "--batch", 5, "--micro-tokens", 70, "--sft-lr", 2e-4, "--dpo-lr", 2e-4, "--iters", 2,
          "--sft-epochs", 1, "--dpo-epochs", 3)  # fmt: skip


@pytest.fixture(scope="session")
def one_process(world):
    return run(world, world.folder / "one", *UNEVEN)


LAYOUTS = {  # number of processes and how they share the model
    "dp 2": (2, ()),
    "tp 2": (2, ("--tp", 2)),
    "dp 2 x tp 2": (4, ("--tp", 2, "--recompute")),
    "2 copies x dp 2": (4, ("--dp-replicate", 2, "--offload")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_processes_take_the_same_steps_as_one(world, one_process, tmp_path, layout):
    """Also, of pairs that one process has made, each layout computes the reference anew, equal to its own policy's
    log-probs to the last bit."""
    processes, flags = LAYOUTS[layout]
    sizes = [len(b) for b in train.batches([1] * 21, 5, 1, (0,))]
    assert sorted(sizes) == [1, 5, 5, 5, 5]
    out = part_of(one_process, tmp_path / "run", "SFT/*", "M2/[!p]*s.jsonl", "M2/prompts.jsonl")
    result = start(flags_of(world, out, *UNEVEN, *flags), tmp_path / "log", world=processes)
    assert result.codes == [0] * processes and result.err == "", result.err
    for model, keys in (("M1", ["loss"]), ("M2", ["loss", "margin", "logp_chosen", "nll"])):
        assert len(metrics(out, model)) >= 6
        close(metrics(out, model), metrics(one_process, model), [*keys, "grad_norm", "tokens"], 1e-5)
    assert {r["padding"] for r in metrics(one_process)} == {0}  # but a row that keeps others company is computed twice
    first = metrics(out, "M2")[0]
    assert first["margin"] == first["reward_chosen"] == first["reward_rejected"] == 0
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    for model in ("M1", "M2"):
        (ours, _), (theirs, _) = (load(folder / model) for folder in (out, one_process))
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert (a - b).abs().max() < 1e-4, (model, name)


def test_the_processes_of_a_tensor_parallel_group_drop_the_same_activations(world, whole, tmp_path):
    """Every hidden unit is on both, so both must drop what one process alone drops."""
    flags = flags_of(world, tmp_path / "run", "--tp", 2)
    result = start(flags, tmp_path / "log", world=2, kill=("step", "SFT", 6))
    assert result.codes == [-9, -9]
    close(metrics_text(tmp_path / "run"), metrics(whole, "SFT")[:5], ["loss", "grad_norm"], 1e-4)


@pytest.mark.parametrize("layout", ["dp 2", "tp 2"])
def test_two_processes_write_the_same_rows_as_one_and_lose_none(world, one_process, tmp_path, layout):
    """Of equal weights: 9 prompts, 27 candidates, 3 * 3 ranked answers fall unevenly to two processes.

    Their batches differ, so logits differ in the last bits, and a draw that falls between may take the next token:
    one row in fifty may be another, none may be missing.
    """
    out = part_of(one_process, tmp_path / "run", "SFT/[cmt]*", "M1/[cmt]*")
    for name in ("SFT", "M1"):
        (out / name / "test.jsonl").unlink()
    result = start(flags_of(world, out, *UNEVEN, *LAYOUTS[layout][1]), tmp_path / "log", world=2)
    assert result.codes == [0, 0], result.err
    files = [f"M2/{f}" for f in LINES] + [f"{m}/{f}" for m in ("SFT", "M1") for f in ("test.jsonl", "exam.jsonl")]
    for file in files:
        ours, theirs = read_rows(out / file), read_rows(one_process / file)
        assert [[r.get(k) for k in ("id", "k", "vote")] for r in ours] == [
            [r.get(k) for k in ("id", "k", "vote")] for r in theirs
        ], file
        for row in ours + theirs:
            row.pop("reference_chosen", 0), row.pop("reference_rejected", 0)
        assert sum(a != b for a, b in zip(ours, theirs, strict=True)) <= len(theirs) / 50, file
    assert not list(out.rglob("*.tmp"))
    assert result.out.count("M1 responds: ") == result.out.count("M1 responds: 27 responses, ") == 1  # one speaks


def test_a_process_without_rows_waits_for_the_others(world, one_process, tmp_path):
    """One test prompt and one ranked answer, two processes; and a run goes on in a world of another size."""
    exam = read_rows(world.data / "eft_eval.jsonl")[:1]
    data = variant(world, tmp_path, {"test.jsonl": read_rows(world.data / "test.jsonl")[:1],
                   "eft_eval.jsonl": [exam[0] | {"responses": ["It is so."], "ranks": [0]}]})  # fmt: skip
    flags = flags_of(world, tmp_path / "run", "--iters", 1, "--prompts", 1, "--sft-epochs", 1, data=data)
    killed = start(flags, tmp_path / "killed", kill=("step", "M1", 3))
    assert killed.code == -9
    result = start(flags, tmp_path / "log", world=2)
    assert result.codes == [0, 0], result.err
    for name in ("SFT", "M1"):
        assert len(read_rows(tmp_path / "run" / name / "test.jsonl")) == 1
        assert len(read_rows(tmp_path / "run" / name / "exam.jsonl")) == 2
        assert load(tmp_path / "run" / name)[0].cfg.layers == 2


@pytest.mark.parametrize("micro", [150, 1])
def test_micro_batches_of_any_size_take_the_same_steps(world, tmp_path, micro):
    flags = ("--dropout", 0, "--batch", 16, "--sft-lr", 2e-4, "--dpo-lr", 2e-4, "--iters", 2, "--sft-epochs", 2)
    one = run(world, tmp_path / "one", *flags)
    out = part_of(one, tmp_path / "run", "M2/*s.jsonl")
    run(world, out, *flags, "--micro-tokens", micro)
    for name in ("SFT", "M1", "M2"):
        close(metrics(out, name), metrics(one, name), ["loss", "grad_norm"], 1e-5)


def test_every_row_is_seen_once_an_epoch():
    for count, batch, epochs in ((1, 4, 1), (21, 5, 3), (100, 3, 2), (64, 16, 2), (7, 100, 1)):
        sizes = [random.Random(i).randrange(100) for i in range(count)]
        plan = train.batches(sizes, batch, epochs, (0, "SFT"))
        an_epoch = -(-count // batch)
        assert len(plan) == epochs * an_epoch
        for e in range(epochs):
            cut = plan[e * an_epoch : (e + 1) * an_epoch]
            assert sorted(i for b in cut for i in b) == list(range(count))
            assert sorted(map(len, cut), reverse=True)[:-1] == [batch] * (an_epoch - 1)
        assert plan == train.batches(sizes, batch, epochs, (0, "SFT"))
    sizes = [random.Random(i).randrange(100) for i in range(100)]
    plan = train.batches(sizes, 10, 2, (0, "SFT"))
    assert plan != train.batches(sizes, 10, 2, (1, "SFT")) and plan != train.batches(sizes, 10, 2, (0, "M1"))
    assert plan[:10] != plan[10:]  # another order each epoch, of which the first does not hang on how many follow
    assert plan[:10] == train.batches(sizes, 10, 1, (0, "SFT"))
    assert max(max(sizes[i] for i in b) - min(sizes[i] for i in b) for b in plan) < 60  # like lengths together


def dealt(monkeypatch, world_size: int, budget: int, batch, examples) -> list[list[tuple[list[int], float]]]:
    """What every process of a world would be given."""
    cfg, found = train.Config(micro_tokens=budget), []
    monkeypatch.setattr(dist, "get_world_size", lambda: world_size)
    for rank in range(world_size):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        found.append(train.micro_batches(cfg, batch, examples))
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_processes_share_a_batch_in_equally_many_micro_batches_within_the_budget(monkeypatch, world_size):
    rng = random.Random(0)
    examples = [([1] * rng.randrange(1, 9), [1] * rng.randrange(1, 40), [1] * rng.randrange(1, 40)) for _ in range(99)]
    size = [sum(map(len, e)) for e in examples]
    for length in (1, 2, 5, 8, 16, 17):
        batch = rng.sample(range(99), length)
        for budget in (0, 1, 60, 200, 10000):
            ranks = dealt(monkeypatch, world_size, budget, batch, examples)
            assert len({len(cuts) for cuts in ranks}) == 1, (length, budget)
            assert Counter(i for cuts in ranks for rows, w in cuts for i in rows if w) == Counter(batch)
            for rows, weight in (cut for cuts in ranks for cut in cuts):
                assert rows and weight in (0, 1) and set(rows) <= set(batch)
                assert sum(size[i] for i in rows) <= max(budget or 2048, max(size[i] for i in batch))
            assert ranks == dealt(monkeypatch, world_size, budget, batch, examples)


def test_micro_batches_are_few_and_processes_have_equally_much_to_do(monkeypatch):
    rng = random.Random(1)
    examples = [([1] * 20, [1] * rng.randrange(10, 60)) for _ in range(64)]
    size = [sum(map(len, e)) for e in examples]
    for world_size, budget in ((1, 500), (2, 500), (4, 300), (4, 10000)):
        ranks = dealt(monkeypatch, world_size, budget, list(range(64)), examples)
        loads = [[sum(size[i] for i in rows) for rows, _ in cuts] for cuts in ranks]
        assert len(loads[0]) <= math.ceil(sum(size) / world_size / budget) + 1
        assert all(max(step) - min(step) <= max(size) / 4 for step in zip(*loads, strict=True))  # they end together


def test_metrics_count_tokens_and_rows_are_not_padded(world, whole):
    tok = load(whole / "M1")[1]
    for name, epochs, key in (("SFT", 5, ["response"]), ("M2", 3, ["chosen_tokens", "rejected_tokens"])):
        rows = read_rows(whole / "M2" / "pairs.jsonl") if name == "M2" else read_rows(world.data / "ift.jsonl")
        said = [[r[k] if name == "M2" else tok.response(r[k]) for k in key] for r in rows]
        count = sum(len(tok.chat(r["prompt"])) - 1 + sum(map(len, both)) for r, both in zip(rows, said, strict=True))
        assert sum(line["tokens"] for line in metrics(whole, name)) == epochs * count
        assert {line["padding"] for line in metrics(whole, name)} == {0}


def test_operations_are_those_that_torch_counts(world, monkeypatch):
    """Attention is computed query by query, so that torch too counts what is seen and no more."""

    def attend(rows, layer, q, k, v):
        at, out = [0, *accumulate(rows.lengths)], []
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
        for (n, of, p), first in zip(rows.layout, at, strict=False):
            for i in range(first, first + n):
                seen = [*range(at[of], at[of] + p), *range(first, i + 1)]
                out.append((q[:, :, [i]] @ k[:, :, seen].mT).softmax(-1) @ v[:, :, seen])
        return torch.cat(out, dim=2)

    monkeypatch.setattr(Rows, "attend", attend)
    net, tok = load(world.base)
    rng = random.Random(0)
    for examples in ([(tok.raw("What is it?"), tok.response("It is so, and it is fine."))],
                     [([1] * rng.randrange(2, 30), [5] * rng.randrange(1, 20), [6] * rng.randrange(1, 20))
                      for _ in range(3)]):  # fmt: skip
        with FlopCounterMode(display=False) as counter:
            sequence_logps(net, *collate(examples)).sum().backward()
        assert counter.get_total_flops() == sum(train.flops(net, e) for e in examples)


# ---- selection of checkpoints ------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def judged(world):
    """The toy data with prompts to validate on and an oracle that likes long answers."""
    data = world.folder / "judged"
    shutil.copytree(world.data, data)
    write_rows(data / "valid.jsonl", [{"prompt": f"Is it {what}?"} for what in ("red", "round", "old", "near")])
    (data / "oracle.py").write_text("def grade(prompt, response):\n    return len(response) % 6\n")
    return data


@pytest.fixture(scope="session")
def selected(world, judged):
    """A whole run that asks the oracle every 2 updates; nobody writes into it."""
    return run(world, world.folder / "selected", *selecting(judged), data=judged)


def selecting(judged: Path) -> tuple:
    return "--iters", 2, "--batch", 1, "--valid-every", 2, "--evaluator", judged / "oracle.py", "--save-every", 3


def before_dpo(selected: Path, out: Path) -> Path:
    return part_of(selected, out, "SFT/*", "M1/*", "M2/*s.jsonl")


@pytest.mark.parametrize("verdicts, taken", [([1, 1, -1, 1], 6), ([0], 2), ([1] * 99, -1)])
def test_dpo_ends_where_answers_to_the_validation_prompts_are_no_longer_better(world, judged, selected, tmp_path, monkeypatch, verdicts, taken):  # fmt: skip  # noqa: E501
    """A tie is not better. The model is the last that was, to the bit, and what was asked lies there to be read."""
    copy, seen, left, asked = before_dpo(selected, tmp_path / "run"), {}, list(verdicts), []

    def outcomes(a, b, **judge):
        asked.append((len(a), judge["oracle"]))
        verdict = left.pop(0)
        return [{"a": x, "b": b[at], "outcome": verdict} for at, x in a.items()]

    def watch(cfg, mesh, data, model, tok, name, step):
        seen[step] = {k: p.detach().clone() for k, p in model.named_parameters()}
        return better(cfg, mesh, data, model, tok, name, step)

    better = train.better
    monkeypatch.setattr(train, "better", watch)
    monkeypatch.setattr(judge, "outcomes", outcomes)
    run(world, copy, *selecting(judged), data=judged)
    steps = len(read_rows(copy / "M2" / "pairs.jsonl")) * 3
    taken = steps if taken == -1 else taken
    assert asked == [(4, judged / "oracle.py")] * (len(seen) - 1) and max(seen) == min(steps, taken + 2) and steps > 8
    assert all(torch.equal(p, seen[taken][k]) for k, p in load(copy / "M2")[0].named_parameters())
    assert json.loads((copy / "M2/selected.json").read_text()) == {"step": taken}
    assert [row["step"] for row in judge.read_metrics(copy)["M2"]] == list(range(1, taken + 1))  # what the report shows
    assert any(not torch.equal(p, seen[2][k]) for k, p in seen[max(seen)].items())
    answers = sorted(p.name for p in (copy / "M2").glob("valid-*.jsonl"))
    assert answers == sorted(f"valid-{step}.jsonl" for step in seen)
    assert len(metrics(copy, "M2")) == max(seen)


def test_a_run_that_selects_is_the_same_when_it_was_killed_while_it_answered_and_saved(world, judged, selected, tmp_path):  # fmt: skip  # noqa: E501
    argv = flags_of(world, before_dpo(selected, tmp_path / "killed"), *selecting(judged), data=judged)
    for place, what in (("save", "saving"), ("file", "M2/valid-4.jsonl")):
        died = start(argv, tmp_path / "log", kill=(place, what, 0))
        assert died.code == -9, died.err
    assert start(argv, tmp_path / "log").code == 0
    for path in (p for p in (selected / "M2").rglob("*") if p.is_file()):
        assert path.read_bytes() == (tmp_path / "killed" / "M2" / path.name).read_bytes(), path


def test_the_evaluator_of_a_run_is_an_oracle_a_checkpoint_or_an_endpoint():
    for said, want in (("data/zoo/oracle.py", {"oracle": Path("data/zoo/oracle.py")}),
                       ("runs/judge", {"judge_checkpoint": Path("runs/judge")}),
                       ("https://host/v1#gpt", {"judge_url": "https://host/v1", "judge_model": "gpt"})):  # fmt: skip
        assert train.evaluator(train.Config(evaluator=said)) == want


# ---- M_t, its pairs and its reference ----------------------------------------------------------------------


@pytest.fixture(scope="session")
def watched(world):
    """A run without dropout whose optimize, sampler and pairs were looked over the shoulder."""
    seen = SimpleNamespace(start={}, examples={}, kept={}, asked=[], pairs={})
    optimize, stream, put = train.optimize, sample.stream, train.put

    def watch_optimize(cfg, model, name, plan, examples, **rest):
        seen.start[name] = {k: p.detach().clone() for k, p in model.named_parameters()}
        seen.examples[name] = json.loads(json.dumps(examples))
        optimize(cfg, model, name, plan, examples, **rest)
        seen.kept[name] = json.loads(json.dumps(examples))

    def watch_stream(model, prompts, keys, **knobs):
        seen.asked += [(key, ids) for key, ids in zip(keys, prompts, strict=True)]
        return stream(model, prompts, keys, **knobs)

    def watch_put(cfg, name, file, rows):
        put(cfg, name, file, rows)
        seen.pairs |= {name: (Path(cfg.out) / name / file).read_bytes()} if file == "pairs.jsonl" else {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "optimize", watch_optimize)
        patch.setattr(sample, "stream", watch_stream)
        patch.setattr(train, "put", watch_put)
        seen.out = run(world, world.folder / "watched", "--dropout", 0)
    return seen


def logps(folder: Path, pairs: list[dict], side: str) -> list[float]:
    """log p(response | prompt) under a checkpoint, one row at a time, from the full logits."""
    model, tok = load(folder)
    found = []
    for p in pairs:
        prompt, response = tok.encode(f"[INST] {p['prompt']} [/INST]"), p[f"{side}_tokens"]
        with torch.no_grad():
            table = model(torch.tensor([[tok.bos, *prompt, *response]]))[0].double().log_softmax(-1)
        found.append(sum(table[len(prompt) + i, t].item() for i, t in enumerate(response)))
    return found


@pytest.mark.parametrize("start_at, end", [("M1", "M2"), ("M2", "M3")])
def test_the_reference_column_is_the_log_prob_under_m_t_and_stands_still(watched, start_at, end):
    pairs = read_rows(watched.out / end / "pairs.jsonl")
    for side in ("chosen", "rejected"):
        stored, ours = [p[f"reference_{side}"] for p in pairs], logps(watched.out / start_at, pairs, side)
        assert stored == pytest.approx(ours, abs=1e-3)
    assert (watched.out / end / "pairs.jsonl").read_bytes() == watched.pairs[end]  # as before the first update
    moved = logps(watched.out / end, pairs, "rejected")
    assert max(abs(p["reference_rejected"] - m) for p, m in zip(pairs, moved, strict=True)) > 0.1  # the policy did


def test_rows_are_not_changed_by_training_on_them(watched):
    assert watched.examples == watched.kept and set(watched.kept) == {"SFT", "M1", "M2", "M3"}


@pytest.mark.parametrize("model", ["M2", "M3"])
def test_dpo_starts_at_ln_2_with_margins_of_zero_and_moves(watched, model):
    first, second = metrics(watched.out, model)[:2]
    assert first["margin"] == first["reward_chosen"] == first["reward_rejected"] == 0  # to the last bit
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert abs(second["loss"] - math.log(2)) > 1e-5 and second["margin"] != 0


@pytest.mark.parametrize("processes, tp", [(1, 1), (2, 1), (2, 2)])
def test_in_bfloat16_and_sharded_dpo_starts_at_ln_2_and_moves_every_tensor(world, tmp_path, processes, tp):
    """Policy and reference agree to the last bit, and nobody leaves gathered copies of weights to the optimizer."""
    flags = ("--dropout", 0, "--dtype", "bfloat16", "--save-dtype", "bfloat16", "--dpo-lr", 1e-2, "--iters", 2,
             "--sft-epochs", 2, "--tp", tp)  # fmt: skip
    result = start(flags_of(world, tmp_path / "run", *flags), tmp_path / "log", world=processes)
    assert set(result.codes) == {0}, result.err
    first = metrics(tmp_path / "run", "M2")[0]
    assert first["margin"] == first["reward_chosen"] == first["reward_rejected"] == 0
    assert json.loads((tmp_path / "run" / "M2" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    (old, _), (new, _) = (load(tmp_path / "run" / name) for name in ("M1", "M2"))
    pairs = zip(old.named_parameters(), new.parameters(), strict=True)
    assert [name for (name, a), b in pairs if torch.equal(a, b)] == []


def test_every_model_starts_from_the_saved_weights_of_the_one_before_and_all_are_kept(world, watched):
    hashes = {}
    for name, before in (("SFT", world.base), ("M1", world.base), ("M2", "M1"), ("M3", "M2")):
        saved = dict(load(watched.out / before)[0].named_parameters())
        assert watched.start[name].keys() == saved.keys()
        assert all(torch.equal(watched.start[name][k], p) for k, p in saved.items()), name
        hashes[name] = hashlib.sha256((watched.out / name / "model.safetensors").read_bytes()).hexdigest()
        ends = dict(load(watched.out / name)[0].named_parameters())
        assert any(not torch.equal(ends[k], p) for k, p in saved.items()), name
    assert len(set(hashes.values())) == 4


def test_one_prompt_builder_serves_sft_sampling_judging_and_dpo(world, watched):
    """One BOS at the front, never another; DPO trains on the very ids that were sampled after."""
    _, tok = load(world.base)
    for name, examples in watched.examples.items():
        for prompt, *responses in examples:
            for ids in responses[: 1 if name in ("SFT", "M1") else 2]:
                assert prompt[0] == tok.bos and (prompt + ids).count(tok.bos) == 1
                assert tok.eos not in prompt and ids.count(tok.eos) == (ids[-1] == tok.eos)
    assert all(ids[0] == tok.bos and ids.count(tok.bos) == 1 for _, ids in watched.asked)
    asked = dict(watched.asked)
    for end in ("M2", "M3"):
        pairs = read_rows(watched.out / end / "pairs.jsonl")
        for pair, (prompt, chosen, rejected, _) in zip(pairs, watched.examples[end], strict=True):
            assert asked[0, end, "responses", pair["id"]] == prompt == tok.chat(pair["prompt"])
            assert [chosen, rejected] == [pair["chosen_tokens"], pair["rejected_tokens"]]
    eft = read_rows(world.data / "eft.jsonl")
    template = (world.data / "judge.txt").read_text()
    sft = [tok.chat(judge.judge_prompt(template, r["prompt"], r["response"])) for r in eft]
    assert [e[0] for e in watched.examples["M1"]][21:] == sft
    assert [e[0] for e in watched.examples["SFT"]] == [tok.chat(r["prompt"]) for r in eft]


def test_reference_m1_anchors_every_round_to_m1(world, watched, tmp_path):
    out = run(world, tmp_path / "run", "--dropout", 0, "--reference", "M1")
    for end in ("M2", "M3"):
        pairs = read_rows(out / end / "pairs.jsonl")
        assert [p["reference_chosen"] for p in pairs] == pytest.approx(logps(out / "M1", pairs, "chosen"), abs=1e-3)
    assert metrics(out, "M2") == metrics(watched.out, "M2")  # the first round's start is M1 anyway
    assert abs(metrics(out, "M3")[0]["margin"]) > 1e-4  # the second begins where the first has led


def test_pairs_that_another_model_has_made_are_refused(world, whole, tmp_path):
    out = part_of(whole, tmp_path / "run", "SFT/*", "M1/*", "M2/*s.jsonl", "M3/prompts.jsonl")
    pairs = read_rows(out / "M2" / "pairs.jsonl")
    write_rows(out / "M2" / "pairs.jsonl", [p | {"reference_chosen": p["reference_chosen"] + 0.5} for p in pairs])
    before = products(out)
    result = start(flags_of(world, out), tmp_path / "log")
    refused(result, "M2/pairs.jsonl", "reference log-probs differ by", "remove all rows but prompts.jsonl")
    same(products(out), before)


def test_shuffled_scores_keep_what_a_prompt_got_and_change_who_got_it(world, whole, tmp_path):
    out = run(world, tmp_path / "run", "--control", "shuffle", "--iters", 2)
    for file in LINES[:3]:
        assert (out / "M2" / file).read_bytes() == (whole / "M2" / file).read_bytes()
    prompts, candidates, judgements, _ = (read_rows(out / "M2" / f) for f in LINES)
    scores = judge.mean_scores(judgements)
    dealt = train.shuffled(scores, (0, "M2", "control"))
    assert dealt.keys() == scores.keys() and dealt != scores
    for i in {i for i, _ in scores}:
        got, gets = (Counter(v for at, v in x.items() if at[0] == i) for x in (scores, dealt))
        assert got == gets
    assert dealt == train.shuffled(dict(reversed(scores.items())), (0, "M2", "control"))

    def told(rows):
        return [(r["id"], r["chosen_tokens"], r["rejected_tokens"], r["chosen_score"]) for r in rows]

    ours, plain = (told(read_rows(folder / "M2" / "pairs.jsonl")) for folder in (out, whole))
    assert ours == told(judge.prefer(prompts, candidates, dealt)[0]) and ours != plain


def test_judge_m1_judges_in_every_round_and_nothing_else_of_a_round_is_m1s(world, watched, tmp_path):
    out = run(world, tmp_path / "run", "--dropout", 0, "--judge", "M1")
    ours, theirs = products(out), products(watched.out)
    differ = {k for k in theirs if ours[k] != theirs[k]}
    after = {f"M3/{f}" for f in (*LINES[2:], "model.safetensors", "test.jsonl", "alpaca_eval.json", "exam.jsonl")}
    assert {"config.json", "M3/judgements.jsonl"} <= differ <= after | {"config.json", "metrics.jsonl"}
    prompts, candidates, judgements, pairs = (read_rows(out / "M3" / f) for f in LINES)
    net, tok = load(out / "M1")
    rows = [c | {"prompt": prompts[c["id"]]["prompt"]} for c in candidates]
    knobs = {"votes": 2, "max_new": 24, "temperature": 1.0, "top_p": 1.0, "batch": 64, "key": (0, "M3", "judgements")}
    assert judgements == judge.score(net.eval(), tok, (world.data / "judge.txt").read_text(), rows, **knobs)
    assert [p["reference_chosen"] for p in pairs] == pytest.approx(logps(out / "M2", pairs, "chosen"), abs=1e-3)


def test_positive_trains_m0_on_the_seed_rows_and_exactly_the_responses_of_mean_score_5(world, tmp_path, monkeypatch):
    begun, taught, optimize = {}, {}, train.optimize

    def watch(cfg, model, name, plan, examples, **rest):
        begun[name] = {k: p.detach().clone() for k, p in model.named_parameters()}
        taught[name] = examples
        optimize(cfg, model, name, plan, examples, **rest)

    monkeypatch.setattr(train, "optimize", watch)
    flags = ("--control", "positive", "--votes", 1, "--max-response", 9)  # some are cut
    out = run(world, tmp_path / "run", *flags)
    base, tok = load(world.base)
    cut = 0
    for end in ("M2", "M3"):
        prompts, candidates, judgements = (read_rows(out / end / f) for f in LINES[:3])
        full_marks = [(j["id"], j["k"]) for j in judgements if j["score"] == 5]
        best = [c for c in candidates if (c["id"], c["k"]) in full_marks]
        cut += sum(c["truncated"] for c in best)
        texts = [(prompts[c["id"]]["prompt"], c["response"]) for c in best if not c["truncated"]]
        assert texts and [(r["prompt"], r["response"]) for r in read_rows(out / end / "positives.jsonl")] == texts
        assert taught[end] == taught["M1"] + [(tok.chat(p), tok.response(r)) for p, r in texts]
        assert all(torch.equal(begun[end][k], p) for k, p in base.named_parameters())
        assert not (out / end / "pairs.jsonl").exists()
    assert cut and len(taught["M1"]) == 42
    before = products(out)
    run(world, out, *flags)
    same(products(out), before)


def test_a_positive_has_a_mean_of_exactly_5_and_an_end(world):
    cfg = train.parse_args(flags_of(world, "run"))[0]
    rows = [{"id": 0, "k": k, "response": f"It is {k}.", "tokens": [k], "truncated": k == 3} for k in range(5)]
    scores = judge.mean_scores([{"id": 0, "k": k, "score": s} for k, s in ((0, 5), (0, 4), (1, 5), (1, 5), (3, 5))])
    asked = [{"id": 0, "prompt": "What is it?"}]
    assert train.positives(cfg, "M2", asked, rows, scores) == [
        {"id": 0, "k": 1, "prompt": "What is it?", "response": "It is 1."}
    ]
    with pytest.raises(BadInput, match="run/M2: no whole response of 4 has a mean score of 5"):
        train.positives(cfg, "M2", asked, rows[:1] + rows[2:], scores)


def test_training_never_reads_the_oracle(world, whole, tmp_path):
    data = variant(world, tmp_path, {"oracle.py": "raise RuntimeError('the loop has read the oracle')\n"})
    with pytest.raises(RuntimeError, match="has read the oracle"):
        judge.load_oracle(data / "oracle.py")
    same(products(run(world, tmp_path / "run", data=data)), products(whole))


# ---- EFT rows by the SFT baseline --------------------------------------------------------------------------


@pytest.fixture(scope="session")
def ranked_world(world, tmp_path_factory):
    """A data folder with human rankings and without eft.jsonl, as prepare.py makes it of Open Assistant."""
    rng = random.Random(1)
    ranked = tiny.rankings(rng, list(dict.fromkeys(tiny.question(rng) for _ in range(24)))[:12])
    ranked[5]["responses"][2], ranked[11]["responses"][2] = " ", ""  # a blank is judged, nothing is not
    return variant(world, tmp_path_factory.mktemp("ranked"), {"eft.jsonl": None, "eft_ranked.jsonl": ranked})


VERDICTS = {  # prompt -> two judgements of each of its three replies, which people rank 0, 1, 2; all others say "?"
    0: [["Good.\nScore: 5", "Score: 0"], ["Score: 3", "Score: 0"], ["Score: 3", "Score: 0"]],  # the first try agrees
    1: [["Score: 1", "Score: 4"], ["Score: 2", "Score: 4"], ["Score: 3", "Score: 3"]],  # the second does
    2: [["Score: 3", "?"], ["Score: 3", "?"], ["Score: 3", "Score: 3"]],  # tied; alone
    3: [["Score: 2", "Score: 2"], ["Score: 4", "Score: 3"], ["?", "Score: 1"]],  # against the people, twice
    5: [["Score: 3", "Score: 4"], ["Hm.", "Score: 3"], ["Score: 1", "Score: 2\nand"]],  # the first two agree
}
KEPT = [(0, 0, "Good.\nScore: 5"), (0, 1, "Score: 3"), (0, 2, "Score: 3"), (1, 0, "Score: 4"), (1, 1, "Score: 4"),
        (1, 2, "Score: 3"), (5, 0, "Score: 3"), (5, 2, "Score: 1")]  # fmt: skip
REPORT = {
    "ranked_prompts": 12, "replies": 36, "not_judged": 1, "judgements": 70, "kept": 6,
    "dropped": {"no readable verdict": 44, "against the people's order": 8, "parts no replies that people part": 6,
                "an earlier try agrees": 2, "most common score": 2, "alone in its try": 1,
                "goes on after its verdict": 1},
    "scores_before": {"1": 1, "3": 4, "4": 2, "5": 1}, "scores_after": {"1": 1, "3": 2, "4": 2, "5": 1},
}  # fmt: skip


@pytest.fixture
def scripted(world, monkeypatch):
    """Judges say what VERDICTS has for the prompt's id; the list of (model, ids, key) that they were asked."""
    asked, (_, tok) = [], load(world.base)

    def generate(model, prompts, keys, *, n, **knobs):
        asked.extend((model, ids, key) for ids, key in zip(prompts, keys, strict=True))
        return [[tok.response(text) for text in VERDICTS.get(i, [["?"] * n] * 3)[k]] for *_, i, k in keys]

    monkeypatch.setattr(judge, "generate", generate)
    return asked


def test_positives_join_the_eft_rows_that_the_baseline_made_also_in_a_later_start(
    world, ranked_world, tmp_path, scripted, monkeypatch
):
    taught, optimize = [], train.optimize

    def watch(cfg, model, name, plan, examples, **rest):
        taught.append((name, examples))
        optimize(cfg, model, name, plan, examples, **rest)

    monkeypatch.setattr(train, "optimize", watch)
    monkeypatch.setattr(judge, "mean_scores", lambda _: {(0, 0): 5.0, (1, 0): 5.0})
    flags = ("--control", "positive", "--iters", 2, "--sft-epochs", 1)
    out = run(world, tmp_path / "run", *flags, data=ranked_world)
    positives = len(read_rows(out / "M2" / "positives.jsonl"))
    (_, sft), (_, m1), (_, m2) = taught
    assert positives and len(m2) == len(m1) + positives and m2[: len(m1)] == m1 and len(m1) > len(sft)
    before = products(out)
    (out / "M2" / "config.json").unlink()
    run(world, out, *flags, data=ranked_world)
    assert len(taught) == 4 and taught[3] == ("M2", m2)
    same(products(out), before)


def test_m1_learns_from_what_the_baseline_says_in_agreement_with_people(world, ranked_world, tmp_path, scripted):
    learned, optimize, (_, tok) = {}, train.optimize, load(world.base)

    def watch(cfg, model, name, plan, examples, **rest):
        learned[name] = list(examples)
        optimize(cfg, model, name, plan, examples, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "optimize", watch)
        out = run(world, tmp_path / "run", "--iters", 1, "--sft-epochs", 1, data=ranked_world)

    ranked, template = read_rows(ranked_world / "eft_ranked.jsonl"), (ranked_world / "judge.txt").read_text()
    asked = sorted(((model, ids, key[2:]) for model, ids, key in scripted if key[:2] == (0, "eft")), key=lambda a: a[2])
    replies = {(i, k): text for i, row in enumerate(ranked) for k, text in enumerate(row["responses"]) if text}
    inputs = {(i, k): tok.chat(judge.judge_prompt(template, ranked[i]["prompt"], replies[i, k])) for i, k in replies}
    assert [(ids, key) for _, ids, key in asked] == [(ids, key) for key, ids in inputs.items()]
    baseline = load(out / "SFT")[0].state_dict()
    assert all(torch.equal(p, baseline[name]) for name, p in asked[0][0].state_dict().items())
    said = read_rows(out / "M1" / "eft_judgements.jsonl")
    assert [(j["id"], j["k"], j["vote"]) for j in said] == [(*at, vote) for at in inputs for vote in range(2)]
    assert all(j["response"] == replies[j["id"], j["k"]] and j["prompt"] == ranked[j["id"]]["prompt"] for j in said)

    report = json.loads((out / "M1" / "eft_report.json").read_text())
    assert report == REPORT and report["kept"] + sum(report["dropped"].values()) == report["judgements"] == len(said)
    rows = read_rows(out / "M1" / "eft.jsonl")
    kept = [(i, k, text) for i, k, text in KEPT if (ranked[i]["prompt"], replies[i, k]) in
            [(r["prompt"], r["response"]) for r in rows]]  # fmt: skip
    assert rows == [{"prompt": ranked[i]["prompt"], "response": replies[i, k], "judgement": t} for i, k, t in kept]
    assert [at for at in KEPT if "3" not in at[2]] == [at for at in kept if "3" not in at[2]] and len(kept) == 6
    assert len(learned["SFT"]) == 21 and learned["M1"][:21] == learned["SFT"]
    assert learned["M1"][21:] == [(inputs[i, k], tok.response(text)) for i, k, text in kept]
    for (_, ids), (_, _, text) in zip(learned["M1"][21:], kept, strict=True):
        assert judge.parse_score(tok.decode(ids[:-1])) == float(text[-1])


def test_eft_size_cuts_the_rows_and_0_leaves_them_out_though_they_are_there(
    world, ranked_world, tmp_path, scripted, capsys
):
    few = ("--iters", 1, "--sft-epochs", 1)
    out = run(world, tmp_path / "cut", *few, "--eft-size", 4, data=ranked_world)
    report = json.loads((out / "M1" / "eft_report.json").read_text())
    assert len(read_rows(out / "M1" / "eft.jsonl")) == report["kept"] == 4 and report["dropped"]["over --eft-size"] == 2
    assert "eft.jsonl: the SFT baseline makes it of eft_ranked.jsonl" in capsys.readouterr().out
    for data, name in ((ranked_world, "ranked"), (world.data, "eft")):
        none = run(world, tmp_path / name, *few, "--eft-size", 0, data=data)
        assert "--eft-size 0: M1 learns from ift.jsonl alone" in capsys.readouterr().out
        assert {p.name for p in (none / "M1").glob("eft*")} == set() and len(metrics(none, "M1")) == -(-21 // 5)
    assert (none / "M1/model.safetensors").read_bytes() == (tmp_path / "ranked/M1/model.safetensors").read_bytes()


def test_a_judge_that_agrees_with_nobody_ends_the_run_and_eft_rows_of_ones_own_help(world, ranked_world, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(ranked_world, data)
    flags = flags_of(world, tmp_path / "run", "--iters", 1, "--sft-epochs", 1, "--max-judgement", 2, data=data)
    words = ("M1: of 70 judgements of 36 ranked replies none", "{'no readable verdict': 70}", "better --init",
             data / "eft.jsonl", "--eft-size 0")  # fmt: skip
    refused(start(flags, tmp_path / "log"), *words)
    before = products(tmp_path / "run")
    assert {"M1/eft_judgements.jsonl", "M1/eft_report.json", "SFT/config.json"} <= before.keys()
    again = start(flags, tmp_path / "log2")
    refused(again, *words)
    assert "SFT writes EFT judgements" not in again.out  # they are there
    same(products(tmp_path / "run"), before)
    ranked = read_rows(data / "eft_ranked.jsonl")
    for other in (ranked[1:], [ranked[0] | {"prompt": "Another?"}, *ranked[1:]]):
        write_rows(data / "eft_ranked.jsonl", other)
        refused(start(flags, tmp_path / "log"), "eft_ranked.jsonl is not what it was when the run in", "old file back")
    shutil.copy(ranked_world / "eft_ranked.jsonl", data)
    shutil.copy(world.data / "eft.jsonl", data)
    result = start(flags, tmp_path / "log3")
    assert result.code == 0, result.err
    assert len(metrics(tmp_path / "run", "M1")) == -(-42 // 5) and not (tmp_path / "run/M1/eft.jsonl").exists()


def test_replies_that_the_judges_prompt_has_no_room_for_are_no_eft(world, ranked_world, tmp_path):
    shutil.copytree(ranked_world, tmp_path / "data")
    (tmp_path / "data" / "judge.txt").write_text(LONG + "{prompt} {response}")
    result = start(flags_of(world, tmp_path / "run", "--sft-epochs", 1, data=tmp_path / "data"), tmp_path / "log")
    refused(result, "of 0 judgements of 36 ranked replies none", "shorten the judge template")


def test_eft_rows_of_a_real_judge_survive_deaths_and_another_number_of_processes(world, ranked_world, tmp_path):
    few = ("--iters", 1, "--sft-epochs", 1)
    want = products(run(world, tmp_path / "whole", *few, data=ranked_world))
    report = json.loads(want["M1/eft_report.json"])
    assert report["kept"] >= 4 and len(want["M1/eft.jsonl"].splitlines()) == report["kept"]
    flags = flags_of(world, tmp_path / "run", *few, data=ranked_world)
    deaths = [("sampling", "SFT writes EFT judgements", 5), ("file", "M1/eft_judgements.jsonl", 0),
              ("file", "M1/eft.jsonl", 0), ("step", "M1", 3)]  # fmt: skip
    for number, death in enumerate(deaths):
        result = start(flags, tmp_path / f"log{number}", kill=death)
        assert result.code == -9, (death, result.err)
    result = start(flags, tmp_path / "log")
    assert result.code == 0, result.err
    same(products(tmp_path / "run"), want)
    out = part_of(tmp_path / "whole", tmp_path / "two", "SFT/*")
    late = ("late", "eft.jsonl", 1)  # and they agree on what is done, however long each takes to look
    result = start(flags_of(world, out, *few, data=ranked_world), tmp_path / "log2", world=2, kill=late, timeout=60)
    assert result.codes == [0, 0], result.err
    ours, theirs = (read_rows(folder / "M1/eft_judgements.jsonl") for folder in (out, tmp_path / "whole"))
    assert len(ours) == len(theirs) and sum(a != b for a, b in zip(ours, theirs, strict=True)) <= len(ours) / 50
    assert result.out.count("M1: EFT {") == 1


# ---- the ablations: run folders that start from the files of another ---------------------------------------


def telling(files) -> set[str]:
    """Those of the models' files that are not the same for all models of all runs."""
    return {f for f in files if "/" in f and f.split("/")[1] not in CHECKPOINT - {"model.safetensors"}}


NOT_HERE = ("ift-only", "positive", "candidates-2")  # these may end early here; what 2 changes, 8 changes


@pytest.mark.parametrize("v", [v for v in ablate.VARIANTS[1:] if v.name not in NOT_HERE],
                         ids=lambda v: v.name)  # fmt: skip
def test_a_variant_copies_all_it_shares_with_the_full_run_and_ends_as_if_it_had_copied_nothing(
    world, whole, tmp_path, monkeypatch, v
):
    monkeypatch.setattr(ablate, "JUDGE", "Pick a grade.\nQuestion: {prompt}\nAnswer: {response}\n")  # few tokens here
    monkeypatch.setattr(ablate, "GRADES", dict(zip(range(1, 6), ["It is bad.", *["It is fine."] * 4], strict=True)))
    data, changes = ablate.make_multiple_choice(world.data, tmp_path), v.flags.replace("guard 0.2", "guard 0.9").split()
    flags = ["--data", world.data, *(c.format(multiple_choice=data) for c in changes), "--iters", v.iters]
    alone, full = products(run(world, tmp_path / "alone", *flags)), products(whole)
    first = v.first.replace("config.json", "model.safetensors")
    assert alone[first] != full.get(first)  # what comes later may still be the same, by chance
    ablate.share(whole, tmp_path / "run", v)
    copied = products(tmp_path / "run")
    same_before = {f for f in alone if alone[f] == full.get(f) and "/" in f and ablate.place(f) < ablate.place(first)}
    assert telling(copied) == telling(same_before)
    models = [{f.split("/")[0] for f in copied if f.endswith(end)} for end in ("/model.safetensors", "/config.json")]
    assert models[0] == models[1] == {r["model"] for r in metrics(tmp_path / "run")}
    same(products(run(world, tmp_path / "run", *flags)), alone)


# ---- knobs -------------------------------------------------------------------------------------------------

NOWHERE = ["--data", "/nowhere"]  # no recipe.json there


def test_every_field_is_a_flag_whose_help_is_its_comment(capsys):
    with pytest.raises(SystemExit) as e:
        train.parse_args(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert e.value.code == 0
    source = (ROOT / "train.py").read_text()
    body = source[source.index("class Config") : source.index("def main")]
    for f in fields(train.Config):
        (line,) = [x for x in body.splitlines() if x.startswith(f"    {f.name}: ")]
        assert "--" + f.name.replace("_", "-") in said and " ".join(line.split("  # ")[1].split()) in said, f.name


VALUES = {
    "save_dtype": "bfloat16",
    "prompts": "3,4",
    "reference": "M1",
    "judge": "M1",
    "control": "shuffle",
    "dtype": "bfloat16",
}


@pytest.mark.parametrize("field", fields(train.Config), ids=lambda f: f.name)
def test_every_flag_parses_to_the_type_of_its_field(field):
    text = VALUES.get(field.name, {int: "7", float: "0.25", str: "x", bool: "yes"}[field.type])
    argv = [*NOWHERE, "--" + field.name.replace("_", "-"), *([text] if field.type is not bool else [])]
    cfg = train.parse_args(argv)[0]
    value = getattr(cfg, field.name)
    assert type(value) is field.type and value == field.type(text) != field.default
    assert asdict(cfg) == asdict(train.Config()) | {"data": "/nowhere", field.name: value}  # and nothing else moves


def test_flags_override_the_recipe_and_the_recipe_the_defaults(tmp_path):
    (tmp_path / "recipe.json").write_text('{"iters": 2, "beta": 1, "prompts": "5"}')
    cfg = train.parse_args(["--data", str(tmp_path), "--iters", "4"])[0]
    assert (cfg.iters, cfg.beta, cfg.prompts, cfg.seed) == (4, 1, "5", 0)
    for recipe, word in (('{"lr": 1}', "lr"), ('{"iters": "2"}', "iters"), ('{"beta": "x"}', "beta"), ("{", "JSON"),
                         ('{"iters": true}', "iters"), ("[1]", "recipe.json")):  # fmt: skip
        (tmp_path / "recipe.json").write_text(recipe)
        with pytest.raises(BadInput, match=word):
            train.parse_args(["--data", str(tmp_path)])


def test_all_knobs_are_saved_with_the_run(whole):
    config = json.loads((whole / "config.json").read_text())
    cfg, _ = train.parse_args(["--data", config["data"], "--init", config["init"], "--out", str(whole)])
    assert config == asdict(cfg) | {"files": config["files"]}


FILES = ("judge.txt", "propose.txt", "ift.jsonl", "eft.jsonl", "eft_eval.jsonl", "test.jsonl")


def test_a_run_goes_on_with_the_data_that_it_began_with_or_not_at_all(world, tmp_path):
    data = variant(world, tmp_path, {})
    out = run(world, tmp_path / "run", "--iters", 1, "--sft-epochs", 1, data=data)
    assert set(json.loads((out / "config.json").read_text())["files"]) == set(FILES)
    before = products(out)
    for name in FILES:
        text = (data / name).read_text()
        for other in (text + "\n", None):  # a blank line more, or the file is gone
            (data / name).write_text(other) if other else (data / name).unlink()
            with pytest.raises(BadInput, match=f"{re.escape(name)}.*(is not what it was when the run|not found)"):
                run(world, out, "--iters", 2, "--sft-epochs", 1, data=data)
            (data / name).write_text(text)
    same(products(out), before)
    write_rows(data / "valid.jsonl", [{"prompt": "Is it red?"}])  # a file more changes nothing that is there
    run(world, out, "--iters", 1, "--sft-epochs", 1, data=data)
    assert set(json.loads((out / "config.json").read_text())["files"]) == {*FILES, "valid.jsonl"}


def test_one_model_at_a_time_is_in_memory(world, tmp_path, monkeypatch):
    """FSDP, which --recompute brings along here, holds a model in cycles that only the collector takes apart."""
    made, alive, open_model = [], [], train.open_model

    def watch(*args):
        model, tok = open_model(*args)
        alive.append(sum(ref() is not None for ref in made))
        made.append(weakref.ref(model))
        return model, tok

    monkeypatch.setattr(train, "open_model", watch)
    gc.disable()
    try:
        run(world, tmp_path / "run", "--recompute", "--iters", 2, "--sft-epochs", 1, "--judge", "M1")
    finally:
        gc.enable()
    assert len(alive) >= 8 and set(alive) == {0}


class Made(Exception):
    """The product that a test waits for is there."""


EFFECTS = [  # a flag, another value, the first product that must change by it
    ("init", "{whole}/SFT", "SFT/model.safetensors"),
    ("data", "{data}", "SFT/model.safetensors"),
    ("seed", "1", "SFT/model.safetensors"),
    ("writer", "{whole}/SFT", "M2/prompts.jsonl"),
    ("judge-template", "{data}/judge.txt", "M1/model.safetensors"),
    ("prompts", "3,4", "M2/prompts.jsonl"),
    ("writer-temperature", "1.2", "M2/prompts.jsonl"),
    ("rouge", "0.75", "M2/prompts.jsonl"),
    ("candidates", "2", "M2/candidates.jsonl"),
    ("votes", "1", "M2/judgements.jsonl"),
    ("length-guard", "0.9", "M2/pairs.jsonl"),
    ("temperature", "0.5", "M2/candidates.jsonl"),
    ("top-p", "0.5", "M2/candidates.jsonl"),
    ("max-response", "4", "M2/candidates.jsonl"),
    ("max-judgement", "9", "M2/judgements.jsonl"),
    ("eft-size", "0", "M1/model.safetensors"),
    ("sft-lr", "1e-3", "SFT/model.safetensors"),
    ("sft-epochs", "4", "SFT/model.safetensors"),
    ("dpo-lr", "1e-4", "M2/model.safetensors"),
    ("dpo-epochs", "2", "M2/model.safetensors"),
    ("batch", "4", "SFT/model.safetensors"),
    ("save-dtype", "bfloat16", "SFT/model.safetensors"),
    ("dropout", "0.3", "SFT/model.safetensors"),
    ("beta", "0.3", "M2/model.safetensors"),
    ("nll", "0.5", "M2/model.safetensors"),
    ("control", "shuffle", "M2/pairs.jsonl"),
    ("dtype", "bfloat16", "SFT/model.safetensors"),
    ("reference", "M1", "M3/pairs.jsonl"),
    ("judge", "M1", "M3/judgements.jsonl"),
]
NO_EFFECT = {"out", "iters", "sample_batch", "micro_tokens", "max_prompt", "save_every"}  # each has a test of its own
NO_EFFECT |= {"tp", "dp_replicate", "recompute", "offload", "valid_every", "evaluator"}


@pytest.mark.parametrize("flag, value, product", EFFECTS, ids=[e[0] for e in EFFECTS])
def test_every_flag_has_an_effect(world, whole, tmp_path, monkeypatch, flag, value, product):
    data = variant(world, tmp_path, {"judge.txt": "Q {prompt} A {response}",
                   "ift.jsonl": read_rows(world.data / "ift.jsonl")[:20]})  # fmt: skip
    made, old_save, old_put = tmp_path / "run" / product, train.save, train.put

    def stop_when_made(work):
        def wrapper(*args, **knobs):
            work(*args, **knobs)
            if made.exists():
                raise Made

        return wrapper

    monkeypatch.setattr(train, "save", stop_when_made(old_save))
    monkeypatch.setattr(train, "put", stop_when_made(old_put))
    with pytest.raises(Made):
        run(world, tmp_path / "run", "--" + flag, value.format(whole=whole, data=data))
    assert made.read_bytes() != (whole / product).read_bytes()
    if product.startswith("M") and flag not in ("control", "reference"):  # and what comes before is as it was
        assert (tmp_path / "run/SFT/model.safetensors").read_bytes() == (whole / "SFT/model.safetensors").read_bytes()


def test_no_flag_was_forgotten():
    assert {e[0].replace("-", "_") for e in EFFECTS} | NO_EFFECT == {f.name for f in fields(train.Config)}


def test_the_sampling_batch_changes_no_row(world, whole, tmp_path):
    out = run(world, tmp_path / "run", "--sample-batch", 5, "--iters", 2)
    for file in LINES[:3]:
        ours, theirs = read_rows(out / "M2" / file), read_rows(whole / "M2" / file)
        assert len(ours) == len(theirs) and sum(a != b for a, b in zip(ours, theirs, strict=True)) <= len(theirs) / 50


# ---- bad input: one clear line, and nothing overwritten ----------------------------------------------------


def refused(result, *words, code: int = 1):
    lines = [line for line in result.err.splitlines() if "error:" in line]
    assert result.code == code and len(lines) == 1, (result.codes, result.err)
    assert "Traceback" not in result.err
    assert lines[0].startswith("error:" if code == 1 else "train.py: error:") and result.err.endswith(lines[0] + "\n")
    for word in words:
        assert str(word) in lines[0], (word, lines[0])


IFT = {"prompt": "What is it?", "response": "It is so."}
BAD_DATA = {
    "malformed row": ({"ift.jsonl": json.dumps(IFT) + '\n{"prompt": "x"\n'}, ["ift.jsonl:2", "JSON"]),
    "row without response": ({"ift.jsonl": [IFT, {"prompt": "x"}]}, ["ift.jsonl:2", "no usable response"]),
    "row that is no object": ({"ift.jsonl": [IFT, [1]]}, ["ift.jsonl:2"]),
    "row whose prompt is a number": ({"ift.jsonl": [IFT, IFT | {"prompt": 5}]}, ["ift.jsonl:2", "prompt"]),
    "no ift.jsonl": ({"ift.jsonl": None}, ["ift.jsonl", "not found"]),
    "empty ift.jsonl": ({"ift.jsonl": ""}, ["ift.jsonl", "no rows"]),
    "empty eft.jsonl": ({"eft.jsonl": ""}, ["eft.jsonl", "no rows"]),
    "judgement without score": ({"eft.jsonl": [IFT | {"judgement": "Score: 4"}, IFT | {"judgement": "Good."}]},
                                ["eft.jsonl", "2", "Score: n"]),
    "ranks that do not fit": ({"eft_eval.jsonl": [{"prompt": "x", "responses": ["a", "b"], "ranks": [0]}]},
                              ["eft_eval.jsonl", "1"]),
    "ranks of eft_ranked that do not fit": (
        {"eft.jsonl": None, "eft_ranked.jsonl": [{"prompt": "x", "responses": ["a", "b"], "ranks": [0]}]},
        ["eft_ranked.jsonl", "row 1"]),
    "eft_ranked with a null": (
        {"eft.jsonl": None, "eft_ranked.jsonl": [{"prompt": "x", "responses": ["a", None], "ranks": [0, 1]}]},
        ["eft_ranked.jsonl", "row 1"]),
    "eft_ranked without ranks": (
        {"eft.jsonl": None, "eft_ranked.jsonl": [{"prompt": "x", "responses": ["a", "b"]}]},
        ["eft_ranked.jsonl:1", "no usable ranks"]),
    "template without response": ({"judge.txt": "Grade {prompt}.\n"}, ["judge.txt", "{response}"]),
    "no judge template": ({"judge.txt": None}, ["judge.txt", "not found"]),
    "no writer template": ({"propose.txt": None}, ["propose.txt", "not found"]),
    "a writer template without a place": ({"propose.txt": "Question:"}, ["propose.txt", "{1}"]),
    "a writer template that leaves one out": ({"propose.txt": "{1}\n{3}\n"}, ["propose.txt", "leaves one out"]),
    "a template that is not UTF-8": ({"judge.txt": b"Note \xe9 {prompt} {response}"}, ["judge.txt", "byte 5", "UTF-8"]),
    "responses that are a number": ({"eft_eval.jsonl": [{"prompt": "x", "responses": 0.5, "ranks": [0]}]},
                                    ["eft_eval.jsonl:1", "no usable responses"]),
    "recipe with a stray key": ({"recipe.json": '{"learning_rate": 1}'}, ["recipe.json", "learning_rate"]),
    "recipe that is no object": ({"recipe.json": "[1]"}, ["recipe.json"]),
}  # fmt: skip


def test_rows_of_ift_teach_answers_whatever_else_they_hold(world, tmp_path, monkeypatch):
    data = variant(
        world, tmp_path, {"ift.jsonl": [IFT | {"judgement": None, "id": 7}, IFT | {"judgement": "Score: 1"}]}
    )
    monkeypatch.setattr(train.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(train.dist, "barrier", lambda: None)
    assert train.open_run(train.parse_args(flags_of(world, tmp_path / "run", data=data))[0])["ift"] == [IFT, IFT]


def test_output_that_nobody_reads_ends_the_command_in_one_line():
    argv = [sys.executable, "train.py", "--preset", "7b", "--plan"]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 1 and said.startswith("error: nobody reads") and said.count("\n") == 1, said


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_named_by_file_and_line(world, tmp_path, case):
    files, words = BAD_DATA[case]
    data = variant(world, tmp_path, files)
    refused(start(flags_of(world, tmp_path / "run", data=data), tmp_path / "log"), *words)
    assert not (tmp_path / "run").exists()


BAD_TP = {  # what groups of three cannot share: the world's model has 4 heads, 2 key heads, ffn 96, 420 tokens
    "heads": ({}, "4 heads"),
    "key heads": ({"heads": 3, "kv_heads": 1}, "1 key/value heads"),
    "ffn": ({"heads": 3, "kv_heads": 3, "ffn": 100}, "100 hidden units"),
    "vocabulary": ({"heads": 3, "kv_heads": 3, "vocab_size": 421}, "421 tokens"),
}


@pytest.mark.parametrize("case", BAD_TP)
def test_a_model_that_cannot_be_dealt_to_the_processes_is_refused_by_the_number(case):
    shape, words = BAD_TP[case]
    shape = ModelConfig(**tiny.SHAPE | {"vocab_size": 420} | shape)
    with pytest.raises(BadInput, match=f"base: {re.escape(words)}.* 3 processes.*--tp"):
        check_tp(shape, 3, "base")
    check_tp(shape, 1, "base")


@pytest.mark.parametrize("who", ["init", "writer"])
def test_three_processes_cannot_share_four_heads_and_write_nothing(world, tmp_path, who):
    """Nor can a writer of another shape than M0, which would only be loaded after hours of SFT."""
    shutil.copytree(world.base, tmp_path / "misfit")
    config = json.loads((world.base / "config.json").read_text()) | {"num_attention_heads": 3, "num_key_value_heads": 3}
    base = tmp_path / "divisible"
    shutil.copytree(world.base, base)
    (base / "config.json").write_text(json.dumps(config))
    flags = {"init": (), "writer": ("--init", base, "--writer", tmp_path / "misfit")}[who]
    result = start(flags_of(world, tmp_path / "run", *flags, "--tp", 3), tmp_path / "log", world=3)
    assert result.code == 1 and not (tmp_path / "run").exists()
    said = [line for line in result.err.splitlines() if line.startswith("error")]  # torch may tell of sockets as well
    others = [line for line in result.err.splitlines() if "ends because another one has" in line]  # by then
    assert said and len(said + others) == 3, result.err
    assert all("4 heads" in line and "3 processes" in line for line in said), result.err


BAD_FLAGS = {
    "no data folder": (["--data", "{tmp}/none"], ["{tmp}/none", "no such folder"], 1),
    "no checkpoint": (["--init", "{tmp}/none"], ["{tmp}/none", "no such folder"], 1),
    "half a checkpoint": (["--init", "{tmp}/half"], ["{tmp}/half/config.json", "not found"], 1),
    "torn weights": (["--init", "{tmp}/torn"], ["{tmp}/torn/model.safetensors", "download it again"], 1),
    "another tokenizer": (["--init", "{tmp}/misfit"], ["{tmp}/misfit/tokenizer.model", "420", "421"], 1),
    "no writer": (["--writer", "{tmp}/none"], ["{tmp}/none", "no such folder"], 1),
    "no evaluator": (["--valid-every", "5"], ["--valid-every and --evaluator belong together"], 1),
    "no prompts to validate on": (["--valid-every", "5", "--evaluator", "x"], ["valid.jsonl", "not found"], 1),
    "an endpoint without a model": (
        ["--valid-every", "5", "--evaluator", "https://host/v1"],
        ["https://host/v1#MODEL"],
        1,
    ),
    "no template": (["--judge-template", "{tmp}/none"], ["{tmp}/none", "not found"], 1),
    "no models": (["--iters", "0"], ["--iters"], 1),
    "a learning rate of nothing": (["--dpo-lr", "0"], ["learning rates"], 1),
    "a learning rate that is no number": (["--sft-lr", "nan"], ["learning rates"], 1),
    "one candidate": (["--candidates", "1"], ["--candidates"], 1),
    "no prompts": (["--prompts", "0"], ["--prompts"], 1),
    "fewer than no EFT rows": (["--eft-size", "-1"], ["--eft-size"], 1),
    "a reference that never comes": (["--reference", "M9"], ["--reference"], 1),
    "a guard over all scores": (["--length-guard", "1"], ["--length-guard"], 1),
    "a judge that never comes": (["--judge", "M2"], ["--judge"], 1),
    "a control that is none": (["--control", "flip"], ["--control"], 1),
    "half a tensor-parallel group": (["--tp", "2"], ["1 processes", "--tp 2"], 1),
    "half a copy": (["--dp-replicate", "2"], ["1 processes", "--dp-replicate 2"], 1),
    "no process": (["--tp", "0"], ["--tp"], 1),
    "unknown flag": (["--bogus", "1"], ["--bogus"], 2),
    "not a number": (["--iters", "three"], ["--iters"], 2),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags_and_checkpoints_are_refused_in_one_line(world, tmp_path, case):
    flags, words, code = BAD_FLAGS[case]
    for name in ("half", "torn", "misfit"):
        shutil.copytree(world.base, tmp_path / name)
    (tmp_path / "half" / "config.json").unlink()
    with (tmp_path / "torn" / "model.safetensors").open("r+b") as f:
        f.truncate(1000)
    config = json.loads((world.base / "config.json").read_text())
    (tmp_path / "misfit" / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 1}))
    argv = flags_of(world, tmp_path / "run", *(f.format(tmp=tmp_path) for f in flags))
    refused(start(argv, tmp_path / "log"), *(w.format(tmp=tmp_path) for w in words), code=code)
    assert not (tmp_path / "run").exists() or case == "torn weights", "a corrected command may take the same --out"


def test_the_run_folder_of_another_configuration_is_left_alone(world, whole, tmp_path):
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in whole.rglob("*") if p.is_file()}
    result = start(flags_of(world, whole, "--beta", 0.5), tmp_path / "log")
    refused(result, whole / "config.json", "beta = 0.1", "0.5", "--out")
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in whole.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("stage, flag", [("SFT", "--sft-lr"), ("M2", "--dpo-lr")])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_older_models(world, tmp_path, stage, flag):
    out = tmp_path / "run"
    refused(start(flags_of(world, out, flag, 1e30), tmp_path / "log"), f"{stage}: loss ", "learning rate")
    assert not (out / stage / "config.json").exists() and not (out / stage / "model.safetensors").exists()
    if stage == "M2":
        assert load(out / "SFT")[0].cfg == load(out / "M1")[0].cfg
        assert all((out / "M2" / f).exists() for f in LINES)
    assert all(math.isfinite(r["loss"]) for r in metrics(out))
    again = start(flags_of(world, out, flag, 1e30), tmp_path / "log2")  # it says so again, and no more is lost
    assert again.err.splitlines()[-1] == [x for x in again.err.splitlines() if "error:" in x][0] and again.code == 1


def test_a_gradient_that_is_not_finite_in_the_last_step_is_not_saved(world, tmp_path, monkeypatch):
    """The loss of that step is fine, so only the gradient's norm tells that the weights are about to be lost."""
    steps, loss = [], train.sft_loss

    def overflows(net, *tensors):
        value, shown = loss(net, *tensors)
        steps.append(1)
        return value + ((net.norm.weight * 0).sqrt().sum() if len(steps) == 5 else 0), shown

    monkeypatch.setattr(train, "sft_loss", overflows)
    with pytest.raises(BadInput, match="SFT.*step 5"):
        run(world, tmp_path / "run", "--sft-epochs", 1)
    assert not (tmp_path / "run" / "SFT" / "config.json").exists()


def test_a_judge_that_cannot_be_read_ends_the_run_in_one_line_with_everything_kept(world, tmp_path):
    out, flags = tmp_path / "run", ("--max-judgement", 2)
    refused(start(flags_of(world, out, *flags), tmp_path / "log"), "M2: none of 9 prompts gave a pair", "0.0%", "None",
            "M1 cannot judge")  # fmt: skip
    assert {p.name for p in (out / "M2").iterdir()} == set(LINES[:3])
    assert load(out / "M1")[0].cfg.layers == 2 and (out / "M3" / "prompts.jsonl").exists()
    before = products(out)
    refused(start(flags_of(world, out, *flags), tmp_path / "log2"), "none of 9 prompts gave a pair")
    same(products(out), before)


def test_prompts_that_the_writer_cannot_finish_are_counted_in_the_message(world, tmp_path):
    refused(start(flags_of(world, tmp_path / "run", "--max-prompt", 3), tmp_path / "log"), "only 0 of 9 new prompts",
            "cut by the length limit")  # fmt: skip
    assert load(tmp_path / "run" / "SFT")[0].cfg.layers == 2
    assert {p.name for p in (tmp_path / "run" / "M2").iterdir()} == {"prompts.jsonl.part"}


LONG = "What does the owl eat at night? " * 60


def test_seed_and_test_rows_longer_than_the_context_are_left_out_and_counted(world, tmp_path, capsys):
    ift, eft = (read_rows(world.data / f"{name}.jsonl") for name in ("ift", "eft"))
    data = variant(
        world, tmp_path, {
        "ift.jsonl": [*ift[:10], IFT | {"prompt": LONG}, *ift[10:], IFT | {"response": LONG}],
        "eft.jsonl": [*eft, IFT | {"response": LONG, "judgement": "Score: 1"}],
        "test.jsonl": [{"prompt": LONG}, *read_rows(world.data / "test.jsonl")],
        "eft_eval.jsonl": [{"prompt": "x", "responses": [LONG, "It is so."], "ranks": [0, 1]}],
    })  # fmt: skip
    out = run(world, tmp_path / "run", "--iters", 2, "--sft-epochs", 3, data=data)
    said = capsys.readouterr().out
    assert "SFT: 2 of 23 seed rows exceed the context of 192 tokens" in said
    assert "M1: 3 of 45 seed rows exceed the context" in said
    assert "M2 answers the test prompts: 1 prompts leave no room" in said
    assert [r["id"] for r in read_rows(out / "M2" / "test.jsonl")] == [1, 2, 3, 4, 5]
    assert {(r["id"], r["k"]) for r in read_rows(out / "M2" / "exam.jsonl")} == {(0, 1)}
    assert len(metrics(out, "SFT")) == 3 * 5


def test_a_context_that_no_seed_row_fits_is_said_so(world, tmp_path):
    data = variant(world, tmp_path, {"ift.jsonl": [IFT | {"prompt": LONG}] * 5})
    refused(start(flags_of(world, tmp_path / "run", data=data), tmp_path / "log"), "no seed row fits", "192")


def test_a_limit_of_more_than_half_the_context_is_lowered_and_said_so(world, tmp_path):
    result = start(flags_of(world, tmp_path / "run", "--max-response", 188, "--iters", 2), tmp_path / "log")
    assert "a limit of 188 new tokens is lowered to 96" in result.out
    assert result.code == 0, result.err


def test_answers_that_the_judges_prompt_has_no_room_for_are_said_so(world, tmp_path):
    out = tmp_path / "run"
    data = variant(world, tmp_path, {"judge.txt": LONG + "{prompt} {response}", "eft.jsonl": None})
    result = start(flags_of(world, out, data=data), tmp_path / "log")
    assert "responses are empty or leave no room for the judge; they have no score" in result.out
    refused(result, "M2", "none of 9 prompts gave a pair", "shorten judge.txt")
    assert (out / "M2" / "candidates.jsonl").exists() and (out / "M1" / "config.json").exists()


def test_an_examination_with_no_row_that_fits_does_not_spoil_the_run(world, tmp_path):
    data = variant(world, tmp_path, {"test.jsonl": [{"prompt": LONG}],
                   "eft_eval.jsonl": [{"prompt": LONG, "responses": ["a", "b"], "ranks": [0, 1]}]})  # fmt: skip
    flags = flags_of(world, tmp_path / "run", "--iters", 1, "--sft-epochs", 1, data=data)
    for log in ("log", "log2"):
        result = start(flags, tmp_path / log)
        assert result.code == 0, result.err


def test_optional_files_may_be_missing_and_are_named(world, tmp_path, capsys):
    data = variant(world, tmp_path, {"eft.jsonl": None, "test.jsonl": None, "eft_eval.jsonl": None})
    out = run(world, tmp_path / "run", "--iters", 1, "--sft-epochs", 1, data=data)
    said = capsys.readouterr().out
    assert "eft.jsonl: M1 learns from ift.jsonl alone" in said and "models are not compared" in said
    assert {p.name for p in (out / "M1").iterdir()} == CHECKPOINT


RANK_1_FAILS = """
import os, sys, time
sys.path.insert(0, {root!r})
import sample, train
from model import BadInput

def respond(model, tok, rows, *, tick, **knobs):
    while os.environ["RANK"] == "0":
        tick(1, 0)
        time.sleep(0.1)
    raise BadInput("the texts of process 1 are lost; find them")

sample.respond = respond
train.command(sys.argv[1:])
"""


def test_torchrun_ends_all_processes_with_the_line_and_the_status_of_the_one_that_fails(world, whole, tmp_path):
    """While another is in the middle of sampling, where it meets nobody; what else there is comes from torchrun."""
    (tmp_path / "fails.py").write_text(RANK_1_FAILS.format(root=str(ROOT)))
    out = part_of(whole, tmp_path / "run", "SFT/*", "M1/*", "M[23]/prompts.jsonl")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [tmp_path / "fails.py", *flags_of(world, out)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert result.returncode == 1 and lines == ["error on process 1: the texts of process 1 are lost; find them"]
    assert 'train.py", line' not in result.stderr, result.stderr


# ---- the plan ----------------------------------------------------------------------------------------------

BY_SIZE = {"7b": 8, "13b": 8, "70b": 64}  # GPUs of 80 GiB
PAPER = {"sft_lr": 5.5e-6, "dpo_lr": 1e-6, "batch": 16, "dropout": 0.1, "beta": 0.1, "temperature": 0.7, "top_p": 0.9,
         "candidates": 4, "votes": 3, "writer_temperature": 0.6}  # paper section 3.1  # fmt: skip


def test_memory_of_the_toy_by_hand():
    shape, matrices = CONFIGS["toy"], 160 * 160 * 2 + 80 * 160 * 2 + 3 * 160 * 432
    block, n = matrices + 320, 2 * 1024 * 160 + 4 * (matrices + 320) + 160
    assert train.parameters(shape) == (n, block)
    cfg = train.Config(dropout=0.0)
    parts = train.training_memory(cfg, shape, 4, 8, True)  # so few tokens that the end of backward is no worse
    kept = 2 * 8 * 160 + 2 * (5 * 160 + 4 * 432)  # norms, attention, MLP, in bytes a token of a block
    assert parts["weights"] == n and parts["optimizer"] == 2 * n and parts["gradients"] == n  # 4, 8 and 4 bytes / 4
    assert parts["gathered"] == 2 * (2 * block + 2 * 1024 * 160 + 160) and parts["gradients in flight"] == 4 * block
    assert parts["logits"] == 8 * 1024 * 12 + 8 * 10 * 160 and parts["activations"] == 8 * 4 * kept
    parts = train.sampling_memory(replace(cfg, tp=2), shape, 4, 3, 100)
    assert parts["gathered"] == n and parts["KV cache"] == 2 * 4 * 3 * 100 * 2 * 40 * 2 / 2
    assert train.training_memory(replace(cfg, offload=True), shape, 4, 8, True)["optimizer"] == 0


def test_memory_is_what_torchs_tracker_finds(tmp_path):
    cases = [("plain", 16, 512, []), ("again", 2, 128, ["--recompute"])]
    argv = [["--config", "toy", "--gpus", "4", "--tp", "2", "--rows", str(rows), "--length", str(length), *flags,
             "--json", str(tmp_path / name)] for name, rows, length, flags in cases]  # fmt: skip
    assert tiny.together(bench_memory.main, [(a,) for a in argv]) == [0, 0]
    for name, rows, length, flags in cases:
        cfg = train.Config(tp=2, dropout=0.0, recompute=bool(flags))
        found = {r["case"]: r["bytes"] for r in json.loads((tmp_path / name).read_text())}
        for case, responses in (("sft", 1), ("dpo", 2)):  # prompt and responses have half of the length each
            tokens, targets = rows * length // 2 * (1 + responses), rows * length // 2 * responses
            ours = train.training_memory(cfg, CONFIGS["toy"], 4, tokens, False, targets)
            assert sum(ours.values()) == pytest.approx(found[case]["total"], rel=0.1), (name, case)
        ours = train.sampling_memory(cfg, CONFIGS["toy"], 4, rows, length)
        assert ours["KV cache"] == found["sample"]["kv cache"] and ours["activations"] > found["sample"]["activations"]
        assert ours["gathered"] == pytest.approx(found["sample"]["gathered"], rel=0.01)


@pytest.mark.parametrize("size", train.PRESETS)
def test_presets_fit_with_the_papers_knobs_and_flags_override_them(size, tmp_path):
    (tmp_path / "recipe.json").write_text('{"sample_batch": 3, "tp": 4, "max_response": 99}')
    argv = ["--data", str(tmp_path), "--preset", size, "--plan"]
    cfg = train.parse_args(argv)[0]
    assert {k: getattr(cfg, k) for k in PAPER} == PAPER
    assert asdict(cfg).items() >= train.PRESETS[size].items() and cfg.max_response == 99
    assert train.parse_args([*argv, "--sample-batch", "7"])[0].sample_batch == 7
    machine = {"gpus": BY_SIZE[size], "gpu_memory": 80.0, "rate": 200.0}
    cfg = replace(cfg, max_response=1024)
    found = train.plan(cfg, CONFIGS[size], machine, train.seed_sizes(cfg))
    assert all(20 < sum(parts.values()) / train.GiB < 80 for parts in found["memory"].values())
    with pytest.raises(BadInput, match="--init"):
        train.parse_args(["--data", str(tmp_path), "--preset", size])


def test_plan_refuses_what_cannot_fit_with_the_remedy_and_starts_and_writes_nothing(
    world, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(dist, "init_process_group", None)
    before, out = sorted(world.folder.rglob("*")), tmp_path / "run"
    train.command(flags_of(world, out, "--plan"))
    said = capsys.readouterr().out
    assert all(word in said for word in ("training: 3.0 of 80 GiB", "sampling", "M3", "hours", "disk: 4 models"))
    for flags, words in (
        (["--gpu-memory", 2], "training needs 3.0 GiB of 2 a GPU: try a larger --tp, more --gpus, --recompute"),
        (["--sample-batch", 10**6, "--gpus", 1], "a smaller --sample-batch"),
        (["--tp", 3, "--gpus", 3], "4 heads"),
        (["--tp", 2, "--gpus", 3], "3 processes are not a multiple of 2"),
        (["--gpus", 0], "more than 0"),
        (["--data", tmp_path / "none"], "no such folder"),
    ):
        with pytest.raises(SystemExit) as e:
            train.command(flags_of(world, out, "--plan", *flags))
        assert words in e.value.code
    assert not out.exists() and sorted(world.folder.rglob("*")) == before


def test_the_plan_bounds_what_a_real_run_does(world, whole):
    cfg = train.parse_args(flags_of(world, whole))[0]
    shape, tok, _ = read_shape(world.base)
    machine = {"gpus": 1, "gpu_memory": 80.0, "rate": 1.0}
    sizes = train.seed_sizes(cfg, tok)
    found = train.plan(cfg, shape, machine, sizes)
    for name, rows in (("SFT", sizes["ift"]), ("M1", sizes["ift"] + sizes["eft"])):  # no row exceeds the context
        trained = sum(line["tokens"] for line in metrics(whole, name)) + cfg.sft_epochs * len(
            rows
        )  # a row's last token
        assert found["models"][name]["trained"] == trained  # is not read
    for name in ("M2", "M3"):
        prompts, drawn, votes = (
            read_rows(whole / name / f"{f}.jsonl") for f in ("prompts", "candidates", "judgements")
        )
        bound = len(prompts) * (cfg.max_prompt + cfg.candidates * (cfg.max_response + cfg.votes * cfg.max_judgement))
        assert found["models"][name]["sampled"] == bound
        assert len(drawn) == len(prompts) * cfg.candidates and len(votes) <= len(drawn) * cfg.votes
        assert 0 < sum(line["tokens"] for line in metrics(whole, name)) <= found["models"][name]["trained"]
    models = sum((whole / name / "model.safetensors").stat().st_size for name in ("SFT", "M1", "M2", "M3"))
    assert found["disk"]["4 models"] == pytest.approx(models, rel=0.02)  # names and shapes come on top


# ---- the real thing ----------------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
def test_real_llama_weights_and_open_assistant_rows(world, tmp_path):
    data, out = tmp_path / "oa", tmp_path / "run"
    source = SHARED / "oasst" / "en_100_tree.jsonl"
    prepare = [sys.executable, "data/oasst/prepare.py", str(source), "--out", str(data)]
    subprocess.run(prepare, cwd=ROOT, check=True, capture_output=True, timeout=60)
    (tmp_path / "judge.txt").write_text("User: {prompt}\nAnswer: {response}\nReasons, then Score: <0 to 5>")
    flags = {"init": SHARED / "stories260K" / "hf", "data": data, "out": out, "iters": 2, "prompts": 4, "batch": 8,
             "judge-template": tmp_path / "judge.txt", "sample-batch": 64, "max-prompt": 48, "candidates": 2,
             "votes": 1, "max-response": 32, "max-judgement": 16, "sft-lr": 1e-3, "sft-epochs": 2,
             "writer-temperature": 0.8}  # fmt: skip
    argv = [x for key, value in flags.items() for x in (f"--{key}", value)]
    result = start(argv, tmp_path / "log0")  # it tells stories and cannot judge
    refused(result, "M1: of ", "judgements of 71 ranked replies none can be learned from", "no readable verdict")
    report, said = json.loads((out / "M1/eft_report.json").read_text()), read_rows(out / "M1/eft_judgements.jsonl")
    assert report["dropped"] == {"no readable verdict": len(said)} and report["kept"] == 0 and len(said) > 20
    assert report["replies"] - report["not_judged"] == len(said) and report["ranked_prompts"] == 22
    rows = read_rows(data / "ift.jsonl")[:9]
    write_rows(data / "eft.jsonl", [r | {"response": "Yes.", "judgement": "Score: 1"} for r in rows])
    result = start(argv, tmp_path / "log")
    lines = metrics(out, "SFT")
    half = len(lines) // 2
    assert sum(r["loss"] for r in lines[half:]) < 0.95 * sum(r["loss"] for r in lines[:half])
    assert load(out / "SFT")[0].cfg.layers == 5
    if result.code == 0:
        assert read_rows(out / "M2" / "pairs.jsonl") and load(out / "M2")
    else:
        refused(result, "M2: none of 4 prompts gave a pair", "% of judgements readable", "scores {")
    assert len(read_rows(out / "M2" / "prompts.jsonl")) == 4 and load(out / "M1")
    assert len(read_rows(out / "M2" / "candidates.jsonl")) == 8
