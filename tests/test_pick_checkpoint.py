"""scripts/pick_checkpoint.py: the paper's early stopping among kept models, and --take."""

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import random_net

from model import UserError, read_json, save, write_json
from sample import read_jsonl, respond
from scripts import pick_checkpoint
from scripts.pick_checkpoint import pick_step

PROMPTS = ["Is it red?", "Is it round?", "Is it old?", "Is it near?"]
STEPS = [2, 4, 6, 8, 9]  # the last one is M2 itself
CONFIG = {
    "seed": 3,
    "temperature": 1.0,
    "top_p": 0.95,
    "max_response": 8,
    "sample_batch": 2,
}
ORACLE = "def grade(prompt, response):\n    return len(response) % 6\n"


def write_rows(path: Path, rows: list[dict]):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def finished_run(cfg, tok, tmp_path_factory) -> Path:
    """A run whose M2 was kept after every second update; nobody writes into it."""
    folder = tmp_path_factory.mktemp("finished")
    data, run = folder / "data", folder / "run"
    data.mkdir()
    run.mkdir()
    write_rows(data / "valid.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    (data / "oracle.py").write_text(ORACLE)
    write_json(run / "config.json", CONFIG | {"data": str(data)})
    rows = [{"model": name, "step": step} for name in ("M1", "M2") for step in range(1, 10)]
    write_rows(run / "metrics.jsonl", rows)
    for step in STEPS:
        name = "M2" if step == STEPS[-1] else f"M2/step-{step}"
        save(random_net(cfg, seed=step), tok, run / name, {"temperature": 1.0, "top_p": 0.95})
    for file in ("prompts.jsonl", "pairs.jsonl", "test.jsonl", "exam.jsonl"):
        write_rows(run / "M2" / file, [{"made for or by": "M2 after 9 updates"}])
    (run / "M3").mkdir()
    write_rows(run / "M3" / "prompts.jsonl", [{"id": 0, "prompt": "by a fixed writer"}])
    return run


@pytest.fixture
def run(finished_run, tmp_path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def oracle_of(run: Path) -> str:
    return str(Path(read_json(run / "config.json")["data"]) / "oracle.py")


def pick(run: Path, *flags, name="M2"):
    pick_checkpoint.main([str(run), name, "--oracle", oracle_of(run), *map(str, flags)])


def script_judge(monkeypatch, outcomes: list[int]) -> list:
    """A judge that has these outcomes for one pair of models after the other, on all prompts."""
    calls = []

    def judge_pairs(a, b):
        calls.append((a, b))
        rows = []
        for key, response in a.items():
            outcome = outcomes[len(calls) - 1]
            rows.append({"prompt": key[0], "a": response, "b": b[key], "outcome": outcome})
        return rows

    monkeypatch.setattr(pick_checkpoint, "open_judge", lambda args, cache: judge_pairs)
    return calls


def model_step(folder: Path) -> int | None:
    """After how many updates the model in a folder was saved; None where there is none."""
    weights = folder / "model.safetensors"
    return WEIGHTS.get(weights.read_bytes()) if weights.exists() else None


WEIGHTS = {}  # bytes of a weights file -> step


@pytest.fixture(autouse=True)
def known_weights(finished_run):
    for step in STEPS[:-1]:
        WEIGHTS[(finished_run / f"M2/step-{step}/model.safetensors").read_bytes()] = step
    WEIGHTS[(finished_run / "M2/model.safetensors").read_bytes()] = STEPS[-1]
    assert len(WEIGHTS) == len(STEPS)


def tree(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


# ---- the rule --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "differences, picked",
    [
        ([1, 1, -1, 1], 6),
        ([0, 1, 1, 1], 2),  # a tie is no improvement
        ([-1, 1, 1, 1], 2),
        ([1, 1, 1, 0], 8),
        ([1, 1, 1, 1], 9),
    ],
)
def test_it_picks_the_last_before_the_first_that_is_no_better(differences, picked):
    results = [{"win": 50 + d, "lose": 50.0} for d in differences]
    assert pick_step(STEPS, results) == picked


@pytest.mark.parametrize(
    "outcomes, picked, line",
    [
        ([1, 1, -1, 1], 6, "Step 8 is no better than step 6: take step 6."),
        ([0, 1, 1, 1], 2, "Step 4 is no better than step 2: take step 2."),
        ([1, 1, 1, 1], 9, "Every model is better than the one before it: take step 9."),
    ],
)
def test_each_model_is_compared_with_the_one_before_and_one_is_named(
    run, monkeypatch, capsys, outcomes, picked, line
):
    calls = script_judge(monkeypatch, outcomes)
    pick(run)
    text = capsys.readouterr().out
    assert line in text
    for before, step in zip(STEPS, STEPS[1:], strict=False):
        assert f"step {step} vs {before} " in text
    assert ("M2 is that model already." in text) == (picked == 9)
    assert ("--take" in text) == (picked != 9)
    assert len(calls) == 4 and all(len(a) == len(b) == 4 for a, b in calls)
    for (a, _), (_, b) in zip(calls, calls[1:], strict=False):
        assert a == b, "each is compared with the one after it as well"
    assert model_step(run / "M2") == 9, "without --take nothing is moved"
    assert not (run / "M2" / "picked.json").exists()


def test_an_oracle_of_the_data_folder_can_be_the_judge(run, capsys):
    pick(run)
    text = capsys.readouterr().out
    assert "M2: each kept model against the one before, by " in text and "take step" in text
    assert oracle_of(run) in text and "step 9 vs 8" in text


def test_prompts_without_a_verdict_are_named_for_the_pair_of_models(run, monkeypatch, capsys):
    def judge_pairs(a, b):
        rows = []
        for number, key in enumerate(a):
            row = {"prompt": key[0], "a": a[key], "b": b[key], "outcome": 1, "problem": None}
            if number == 2 and len(a[key]) + len(b[key]) == lengths[1]:
                row |= {"outcome": None, "problem": "refused: HTTP 400: too long"}
            rows.append(row)
        return rows

    monkeypatch.setattr(pick_checkpoint, "open_judge", lambda args, cache: judge_pairs)
    lengths = [None, None]
    pick(run)
    assert "no verdict" not in capsys.readouterr().out
    rows = [read_jsonl(run / f"M2/step-{step}/valid.jsonl")[2] for step in STEPS[:2]]
    lengths[1] = sum(len(row["response"]) for row in rows)
    pick(run)
    text = capsys.readouterr().out
    assert "step 4 vs 2: 4 prompts were compared. 1 of them has no verdict that can be" in text
    assert "1 refused (HTTP 400: too long)" in text


# ---- answers ---------------------------------------------------------------------------------


def test_answers_are_samples_as_the_run_makes_them_with_the_same_randomness_at_every_step(
    run, cfg, tok
):
    pick(run)
    settings = {"temperature": 1.0, "top_p": 0.95, "max_new": 8, "batch": 2}
    rows = [{"id": i, "prompt": prompt} for i, prompt in enumerate(PROMPTS)]
    for step in STEPS:
        net = random_net(cfg, seed=step).eval()
        net.banned_ids = [tok.sp.unk_id(), tok.bos]
        expected = respond(net, tok, rows, key=(3, "valid"), n=1, **settings)
        assert read_jsonl(run / f"M2/step-{step}/valid.jsonl") == expected


def interrupt_batch(monkeypatch, number: int) -> list:
    """Ctrl-C in this batch of answers; the list has the ids of each batch."""
    batches, real = [], respond

    def interrupted(model, tok, rows, **settings):
        if len(batches) == number:
            raise KeyboardInterrupt
        batches.append([row["id"] for row in rows])
        return real(model, tok, rows, **settings)

    monkeypatch.setattr(pick_checkpoint, "respond", interrupted)
    return batches


def test_an_interrupted_command_goes_on_with_the_next_batch_and_ends_in_the_same_bytes(
    run, finished_run, tmp_path, monkeypatch
):
    other = Path(shutil.copytree(finished_run, tmp_path / "other"))
    pick(other)
    batches = interrupt_batch(monkeypatch, 3)
    with pytest.raises(UserError, match="interrupted; answers so far are in .*M2"):
        pick(run)
    assert batches == [[0, 1], [2, 3], [0, 1]]
    batches = interrupt_batch(monkeypatch, 99)
    pick(run)
    assert batches == [[2, 3], *[[0, 1], [2, 3]] * 3], "the rest of step 4, then 6, 8 and 9"
    assert tree(run) == tree(other)
    batches.clear()
    pick(run)
    assert not batches, "all is there"


def test_prompts_that_leave_no_room_are_left_out_at_every_step(run, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    write_rows(data / "valid.jsonl", [{"prompt": p} for p in ("Why?", "the owl " * 300, "Who?")])
    pick(run, "--data", data)
    for step in STEPS:
        rows = read_jsonl(run / f"M2/step-{step}/valid.jsonl")
        assert [(row["id"], row["prompt"]) for row in rows] == [(0, "Why?"), (2, "Who?")]


def test_prompts_of_which_none_fits_are_refused(run, tmp_path):
    write_rows(tmp_path / "valid.jsonl", [{"prompt": "the owl " * 300}])
    with pytest.raises(UserError, match="no prompt leaves room for a response of 8 tokens"):
        pick(run, "--data", tmp_path)


def test_answers_to_other_prompts_are_refused(run, tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    write_rows(data / "valid.jsonl", [{"prompt": p} for p in reversed(PROMPTS)])
    interrupt_batch(monkeypatch, 1)
    with pytest.raises(UserError, match="interrupted"):
        pick(run)
    with pytest.raises(UserError, match=r"step-2/valid.jsonl.part: answers other prompts"):
        pick(run, "--data", data)
    interrupt_batch(monkeypatch, 99)
    pick(run)
    with pytest.raises(UserError, match=r"step-2/valid.jsonl: answers other prompts"):
        pick(run, "--data", data)


# ---- --take ----------------------------------------------------------------------------------


def take_step_6(run: Path, monkeypatch):
    script_judge(monkeypatch, [1, 1, -1, 1])
    pick(run, "--take")


def test_take_exchanges_m2_and_the_picked_model(run, monkeypatch, capsys):
    before = tree(run)
    take_step_6(run, monkeypatch)
    assert "M2 is now the model of step 6" in capsys.readouterr().out
    after = tree(run)
    assert model_step(run / "M2") == 6 and model_step(run / "M2/step-9") == 9
    assert read_json(run / "M2/picked.json") == {"step": 6}
    assert set(os.listdir(run / "M2/step-6")) == {"valid.jsonl"}
    for file in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model"):
        assert after[f"M2/{file}"] == before[f"M2/step-6/{file}"]
        assert after[f"M2/step-9/{file}"] == before[f"M2/{file}"]
    for file in ("test.jsonl", "exam.jsonl"):
        assert f"M2/{file}" not in after, "made by the model that was there"
        assert after[f"M2/step-9/{file}"] == before[f"M2/{file}"]
    for file in ("prompts.jsonl", "pairs.jsonl"):
        assert after[f"M2/{file}"] == before[f"M2/{file}"]


def test_what_was_taken_is_known_to_a_later_start_and_can_be_given_back(run, monkeypatch, capsys):
    before = tree(run)
    take_step_6(run, monkeypatch)
    after_take = tree(run)
    interrupt_batch(monkeypatch, 0)  # all answers are there
    take_step_6(run, monkeypatch)
    assert "M2 is that model already." in capsys.readouterr().out
    assert tree(run) == after_take
    script_judge(monkeypatch, [1, 1, 1, 1])
    pick(run, "--take")
    assert model_step(run / "M2") == 9 and model_step(run / "M2/step-6") == 6
    again = tree(run)
    assert {name: again[name] for name in before} == before
    more = {f"M2/step-{step}/valid.jsonl" for step in STEPS}
    assert set(again) - set(before) == more | {"M2/picked.json"}


class Killed(Exception):
    pass


def test_an_exchange_that_is_killed_anywhere_can_be_repeated(
    run, finished_run, tmp_path, monkeypatch
):
    take_step_6(run, monkeypatch)
    expected, real, num_moves = tree(run), os.replace, 0
    while True:
        copy = Path(shutil.copytree(finished_run, tmp_path / f"killed-{num_moves}"))
        script_judge(monkeypatch, [1, 1, -1, 1])
        pick(copy)
        moves = []

        def move(source, target, moves=moves, last=num_moves):
            if len(moves) == last:
                raise Killed
            moves.append(target)
            real(source, target)

        monkeypatch.setattr(os, "replace", move)
        try:
            take_step_6(copy, monkeypatch)
            break
        except Killed:
            monkeypatch.setattr(os, "replace", real)
        take_step_6(copy, monkeypatch)
        assert tree(copy) == expected, f"killed before move {num_moves}"
        num_moves += 1
    assert num_moves > 12


@pytest.mark.parametrize("file", ["candidates.jsonl", "candidates.jsonl.part", "config.json"])
def test_a_model_that_another_was_made_from_stays(run, monkeypatch, capsys, file):
    (run / "M3" / file).write_text("")
    with pytest.raises(UserError, match=rf"M3: was made from the M2.*{file}") as e:
        take_step_6(run, monkeypatch)
    assert "\n" not in str(e.value)
    assert "take step 6" in capsys.readouterr().out, "the table is told all the same"
    assert model_step(run / "M2") == 9 and model_step(run / "M2/step-6") == 6


def test_a_training_that_has_not_ended_may_be_ended_by_taking_a_kept_model(run, monkeypatch):
    for path in (run / "M2").glob("*.*"):
        path.unlink()
    script_judge(monkeypatch, [1, -1, 1])
    pick(run, "--take")
    assert model_step(run / "M2") == 4 and (run / "M2/config.json").exists()
    assert [model_step(run / f"M2/step-{step}") for step in (2, 4, 6, 8)] == [2, None, 6, 8]


def test_m2_may_have_been_kept_in_a_step_folder_too(run, monkeypatch, capsys):
    folder = run / "M2/step-9"
    folder.mkdir()
    for path in finished_model_files(run / "M2"):
        shutil.copy(path, folder)
    take_step_6(run, monkeypatch)
    assert capsys.readouterr().out.count(" vs ") == 4
    assert model_step(run / "M2") == 6 and model_step(folder) == 9


def finished_model_files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file() and path.suffix != ".jsonl"]


# ---- flags and folders -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "--judge-url, --judge-checkpoint or --oracle"),
        (["--judge-url", "https://host/v1"], "--judge-url and --judge-model"),
        (["--oracle", "nowhere.py"], "nowhere.py: no such Python file"),
        (["--judge-checkpoint", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_a_judge_is_checked_before_anything_is_answered(run, monkeypatch, flags, message):
    monkeypatch.setattr(pick_checkpoint, "respond", None)
    with pytest.raises(UserError, match=message):
        pick_checkpoint.main([str(run), "M2", *flags])


@pytest.mark.parametrize("name", ["M3 ", "M4", "SFT", "step-2", "m2", "..", "M0"])
def test_a_name_that_is_no_model_of_the_run_is_refused(run, name):
    with pytest.raises(UserError, match="has no model .*such as M2"):
        pick(run, name=name)


def test_runs_that_have_nothing_to_compare_say_what_is_missing(run, tmp_path):
    with pytest.raises(UserError, match=r"M3: has 0 models.*--keep-every"):
        pick(run, name="M3")
    with pytest.raises(UserError, match="valid.jsonl: not found"):
        pick(run, "--data", tmp_path)
    for step in STEPS[:-1]:
        shutil.rmtree(run / f"M2/step-{step}")
    with pytest.raises(UserError, match=r"M2: has 1 models.*--keep-every"):
        pick(run)
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=r"metrics.jsonl: has no updates of M2"):
        pick(run)
