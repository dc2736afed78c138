"""scripts/answer.py: files of prompts in, files of answers out, the turns of a chat between."""

import copy
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from model import UserError, read_json, save, write_json
from sample import generate, load_for_sampling, read_jsonl
from scripts import answer
from scripts.answer import (
    answer_file,
    answer_questions,
    check_room,
    question_temperature,
    read_questions,
)
from scripts.compare import read_answers

QUESTIONS = [
    {
        "question_id": 81,
        "category": "writing",
        "turns": ["Tell me about the owl", "And the {wolf}?"],
    },
    {
        "question_id": 111,
        "category": "math",
        "turns": ["Where does the otter live?", "Why?"],
    },
    {
        "question_id": 141,
        "category": "stem",
        "turns": ["Compare the bear with the seal."],
    },
]
SAMPLING = {"max_new": 12, "top_p": 0.95, "batch": 2}


def run(*argv):
    answer.main([str(arg) for arg in argv])


@pytest.fixture
def net(net, tok):
    """As it is read from a folder: ids that are no text are never drawn."""
    loaded = copy.copy(net)
    loaded.banned_ids = [tok.sp.unk_id(), tok.bos]
    return loaded


@pytest.fixture
def folder(net, tok, tmp_path):
    """A model folder of a run that samples at temperature 1, top-p 1."""
    save(net, tok, tmp_path / "M3", {"temperature": 1.0, "top_p": 1.0})
    return tmp_path / "M3"


# ---- prompts in ------------------------------------------------------------------------------

ROW = '{"prompt": "a", "score": 1}'
BOM = "\ufeff"
PROMPT_FILES = {
    "alpaca.json": ('[{"instruction": "Why?", "output": "x", "dataset": "koala"}]', [["Why?"]]),
    "rows.jsonl": ('{"prompt": "a"}\n\n{"instruction": "b{}"}\n', [["a"], ["b{}"]]),
    "question.jsonl": (
        '{"question_id": 1, "category": "math", "turns": ["a", "b"]}\n',
        [["a", "b"]],
    ),
    "input.json": (
        '[{"instruction": "Sort.", "input": "3, 1"}, {"instruction": "Why?", "input": ""}]',
        [["Sort.\n3, 1"], ["Why?"]],
    ),
    "input.jsonl": ('{"instruction": "Sort", "input": "\\n3 {}"}', [["Sort\n\n3 {}"]]),
    "no_input.jsonl": (
        '{"instruction": "a", "input": null}\n{"instruction": "b", "input": " "}\n'
        '{"prompt": "c", "input": "x"}\n{"instruction": "d", "turns": ["e"], "input": "x"}',
        [["a"], ["b"], ["c"], ["e"]],
    ),
    "lines.json": (f"{ROW}\n\n{ROW}\n", [["a"], ["a"]]),
    "list.jsonl": (f"\n [{ROW},\n {ROW}]\n", [["a"], ["a"]]),
    "mark.json": (f"{BOM}[{ROW}]", [["a"]]),
    "mark.jsonl": (f"{BOM}{ROW}\n{ROW}\n", [["a"], ["a"]]),
    "mark_and_lines.json": (f"{BOM}{ROW}\r\n{ROW}\r\n", [["a"], ["a"]]),
}


@pytest.mark.parametrize("name", PROMPT_FILES)
def test_prompt_files_of_all_shapes_are_read(tmp_path, name):
    text, turns = PROMPT_FILES[name]
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert [q["turns"] for q in read_questions(tmp_path / name)] == turns


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.json", "[]", "holds no prompts"),
        ("a.json", "{}", "row 1 has no text"),
        ("a.json", '[{"prompt": "a"}', "not valid JSON"),
        ("a.json", '{\n"prompt": "a"}', ":1: not valid JSON"),
        ("a.json", "", "holds no rows"),
        ("a.jsonl", '["Why?"]', "row 1 has no text"),
        ("a.jsonl", '{"prompt": "a", "score": NaN}', "(row 1 holds|:1: ).*NaN"),
        ("a.json", '[{"prompt": "a", "s": [{"x": -Infinity}]}]', "Infinity"),
        ("a.json", '[{"prompt": "a \\ud83e"}]', "(row 1 holds .*surrogate|ud83e)"),
        ("a.json", '[{"instruction": "a", "input": ["b"]}]', "row 1 has no text"),
        ("a.json", '[{"instruction": 7, "input": "b"}]', "row 1 has no text"),
        ("a.json", '["Why?"]', "row 1 has no text"),
        ("a.json", '[{"prompt": "a"}, {"prompt": null}]', "row 2 has no text"),
        ("a.jsonl", '{"prompt": 7}', "row 1 has no text"),
        ("a.jsonl", '{"turns": "abc"}', "row 1 has no text"),
        ("a.jsonl", '{"turns": ["a", " "], "question_id": 1}', "row 1 has no text"),
        ("a.jsonl", '{"turns": ["a", "b"]}', "row 1 has 2 turns and no question_id"),
        ("a.jsonl", "", "holds no rows"),
        ("gone.jsonl", None, "not found"),
        ("gone.json", None, "not found"),
    ],
)
def test_a_prompt_file_that_cannot_be_used_is_named(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=re.escape(str(tmp_path / name)) + ".*" + message):
        read_questions(tmp_path / name)


# ---- answers ---------------------------------------------------------------------------------


def one_by_one(net, tok, turns, *, temperature, number):
    """The slow truth: responses and what was cut, turn after turn, each asked alone."""
    texts, truncated = [], []
    for turn, text in enumerate(turns):
        texts.append(text)
        settings = {"max_new": 12, "temperature": temperature, "top_p": 0.95}
        key = (3, turn, number)
        ((ids,),) = generate(net, [tok.chat(*texts)], [key], stop=[tok.eos], **settings)
        texts.append(tok.decode([i for i in ids if i != tok.eos]).strip())
        truncated.append(ids[-1] != tok.eos)
    return texts[1::2], truncated


def test_the_second_turn_of_a_question_sees_the_first_and_its_response(net, tok):
    temperatures = [question_temperature(q, default=1.0) for q in QUESTIONS]
    assert temperatures == [0.7, 0.0, 0.1], "FastChat's for these categories"
    questions = [q | {"temperature": t} for q, t in zip(QUESTIONS, temperatures, strict=True)]
    (group,) = answer_questions(net, tok, questions, key=(3,), **SAMPLING)
    assert [len(q["responses"]) for q in group] == [2, 2, 1]
    for number, q in enumerate(group):
        expected = one_by_one(net, tok, q["turns"], temperature=q["temperature"], number=number)
        assert (q["responses"], q["truncated"]) == expected


def test_only_questions_of_mt_bench_have_temperatures_of_their_own():
    plain = {"turns": ["Why?"]}
    assert question_temperature(plain, default=1.0) == 1.0
    assert question_temperature(plain | {"category": "math"}, default=1.0) == 1.0
    assert question_temperature({"question_id": 1, "category": "x"}, default=1.0) == 0.7


def test_a_temperature_that_is_given_counts_for_all_categories(folder, net, tok, tmp_path, capsys):
    prompts, out = tmp_path / "question.jsonl", tmp_path / "mt.jsonl"
    prompts.write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    run(folder, prompts, out, "--temperature", 0, "--max-new", 12)
    assert f"3 answers written to {out} (temperature 0, top-p 1)" in capsys.readouterr().out
    for q, row in zip(QUESTIONS, read_jsonl(out), strict=True):
        expected, _ = one_by_one(net, tok, q["turns"], temperature=0, number=0)
        assert row["choices"][0]["turns"] == expected


def test_a_question_that_leaves_no_room_is_named_before_any_is_answered(net, tok, monkeypatch):
    monkeypatch.setattr(answer, "respond", None)
    long = {"question_id": 1, "turns": ["Hi", "the owl " * 60], "temperature": 0.0}
    questions = [QUESTIONS[0] | {"temperature": 0.0}, long]
    message = (
        r"^prompt 2 may need \d+ tokens with its answers, more than the context of 512.*--max-new"
    )
    with pytest.raises(UserError, match=message):
        next(answer_questions(net, tok, questions, key=(), **SAMPLING | {"max_new": 200}))
    need = sum(len(tok.chat(text)) + 12 for text in QUESTIONS[0]["turns"])
    check_room(QUESTIONS[:1], tok, 12, need)  # exactly fits
    with pytest.raises(UserError, match=f"prompt 1 may need {need} tokens"):
        check_room(QUESTIONS[:1], tok, 12, need - 1)


# ---- answers out -----------------------------------------------------------------------------

ANSWERED = [
    {"turns": ["Why?"], "responses": ["So é"], "truncated": [False], "dataset": "koala"},
    {"turns": ["Who?"], "responses": ["I"], "truncated": [True]},
]
for question in ANSWERED:
    question["row"] = {"prompt": question["turns"][0]}


def test_alpaca_evals_file_is_a_list_of_its_four_fields():
    assert json.loads(answer_file(ANSWERED, "M3", "own", ".json")) == [
        {"instruction": "Why?", "output": "So é", "generator": "M3", "dataset": "koala"},
        {"instruction": "Who?", "output": "I", "generator": "M3", "dataset": "own"},
    ]


def test_plain_rows_have_prompt_response_and_whether_it_was_cut():
    lines = answer_file(ANSWERED, "M3", "own", ".jsonl").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"prompt": "Why?", "response": "So é", "truncated": False},
        {"prompt": "Who?", "response": "I", "truncated": True},
    ]


def test_plain_rows_keep_what_else_their_prompt_rows_hold_but_no_other_answer():
    own = {
        "id": "x9",
        "number": 7,
        "temperature": 2,
        "row": None,
        "responses": [],
        "é": {"a": [1]},
    }
    another_answer = {"output": "x", "response": "y", "generator": "z", "tokens": [1], "k": 3}
    row = own | another_answer | {"instruction": "Sort.", "input": "3, 1", "truncated": True}
    answered = row | {"turns": ["Sort.\n3, 1"], "row": row}
    answered |= {"responses": ["1, 3"], "truncated": [False], "number": 0, "temperature": 0.7}
    (line,) = answer_file([answered], "M3", "own", ".jsonl").splitlines()
    expected = {"prompt": "Sort.\n3, 1", "response": "1, 3", "truncated": False}
    assert json.loads(line) == own | expected


def test_mt_bench_answers_have_fastchats_fields():
    questions = []
    for q in QUESTIONS:
        num_turns = len(q["turns"])
        questions.append(q | {"responses": ["a"] * num_turns, "truncated": [False] * num_turns})
    rows = [json.loads(x) for x in answer_file(questions, "M3", "own", ".jsonl").splitlines()]
    fields = {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert [set(row) for row in rows] == [fields] * 3
    assert [row["question_id"] for row in rows] == [81, 111, 141]
    assert len({row["answer_id"] for row in rows}) == 3 and rows[0]["model_id"] == "M3"
    assert rows[0]["choices"] == [{"index": 0, "turns": ["a", "a"]}]


# ---- the command -----------------------------------------------------------------------------


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "asked.jsonl"
    path.write_text('{"prompt": "Tell me about the owl"}\n{"prompt": "Where is the fox?"}\n')
    return path


def test_ids_and_inputs_reach_the_answers_and_compare_finds_them(folder, tmp_path):
    rows = [
        {"id": 17, "instruction": "Where is the fox?", "source": "a", "output": "Here."},
        {"id": "x9", "instruction": "Tell me about", "input": "the owl", "temperature": 9},
    ]
    prompts = tmp_path / "alpaca.json"
    prompts.write_text(json.dumps(rows))
    texts = ["Where is the fox?", "Tell me about\nthe owl"]
    model, tok = load_for_sampling(folder)
    responses = expected_answers(model, tok, texts, temperature=1.0, top_p=1.0)
    run(folder, prompts, tmp_path / "o.jsonl", "--max-new", 9)
    run(folder, prompts, tmp_path / "o.json", "--max-new", 9)
    lines = read_jsonl(tmp_path / "o.jsonl")
    assert [(row["id"], row["prompt"], row["response"]) for row in lines] == [
        (17, texts[0], responses[0]),
        ("x9", texts[1], responses[1]),
    ]
    assert lines[0]["source"] == "a" and lines[1]["temperature"] == 9
    assert set(lines[0]) == {"id", "source", "prompt", "response", "truncated"}
    answers = read_answers(tmp_path / "o.jsonl")
    assert list(answers) == [(texts[0], 0), (texts[1], 0)]
    assert read_answers(tmp_path / "o.json") == answers
    rows = [row | {"output": "x"} for row in rows]
    prompts.write_text(json.dumps(rows))
    assert list(read_answers(prompts)) == list(answers), "a reference's prompts are the same"


def expected_answers(net, tok, texts, *, seed=0, max_new=9, **settings):
    keys = [(seed, 0, i) for i in range(len(texts))]
    ids = [tok.chat(text) for text in texts]
    samples = generate(net, ids, keys, stop=[tok.eos], max_new=max_new, **settings)
    return [tok.decode([i for i in ids if i != tok.eos]).strip() for (ids,) in samples]


TEXTS = ["Tell me about the owl", "Where is the fox?"]


@pytest.mark.parametrize(
    "flags, settings, line",
    [
        ([], {"temperature": 1.0, "top_p": 1.0}, "temperature 1, top-p 1"),
        (["--temperature", 0.8], {"temperature": 0.8, "top_p": 1.0}, "temperature 0.8, top-p 1"),
        (["--top-p", 0.5], {"temperature": 1.0, "top_p": 0.5}, "temperature 1, top-p 0.5"),
        (["--seed", 5], {"temperature": 1.0, "top_p": 1.0, "seed": 5}, "temperature 1, top-p 1"),
    ],
)
def test_the_model_samples_as_its_run_did_unless_flags_say_otherwise(
    folder, net, tok, prompts, tmp_path, capsys, flags, settings, line
):
    out = tmp_path / "M3.json"
    run(folder, prompts, out, "--max-new", 9, *flags)
    assert capsys.readouterr().out == f"2 answers written to {out} ({line})\n"
    outputs = [row["output"] for row in read_json(out, list)]
    assert outputs == expected_answers(net, tok, TEXTS, **settings)


def test_a_folder_that_says_nothing_is_sampled_as_in_the_paper(folder, prompts, tmp_path, capsys):
    write_json(folder / "generation_config.json", {"eos_token_id": 2})
    run(folder, prompts, tmp_path / "o.jsonl", "--max-new", 2)
    assert "(temperature 0.7, top-p 0.9)" in capsys.readouterr().out


def test_mt_benchs_categories_keep_their_temperatures(folder, net, tok, tmp_path, capsys):
    prompts, out = tmp_path / "question.jsonl", tmp_path / "mt.jsonl"
    prompts.write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    run(
        folder,
        prompts,
        out,
        "--max-new",
        12,
        "--seed",
        3,
        "--top-p",
        0.95,
        "--name",
        "self-rewarding",
    )
    line = f"3 answers written to {out} (temperature 0, 0.1, 0.7 by category, top-p 0.95)\n"
    assert capsys.readouterr().out == line
    rows = read_jsonl(out)
    assert {row["model_id"] for row in rows} == {"self-rewarding"}
    for number, (q, t) in enumerate(zip(QUESTIONS, (0.7, 0.0, 0.1), strict=True)):
        expected, _ = one_by_one(net, tok, q["turns"], temperature=t, number=number)
        assert rows[number]["choices"][0]["turns"] == expected


def test_the_command_answers_a_file_for_alpaca_eval(shared, prompts, tmp_path):
    out = tmp_path / "alpaca_eval.json"
    args = [shared / "stories260K" / "hf", prompts, out, "--max-new", 9, "--name", "tiny"]
    process = subprocess.run(
        [sys.executable, "-m", "scripts.answer", *map(str, args)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("\n") == 1
    rows = read_json(out, list)
    fields = [(row["instruction"], row["generator"], row["dataset"]) for row in rows]
    assert fields == [(text, "tiny", "asked") for text in TEXTS]
    assert all(row["output"] for row in rows)


@pytest.fixture
def ten_prompts(net, tok, tmp_path, monkeypatch):
    """A model that counts its calls, and flags by which four prompts are answered at a time."""
    monkeypatch.setattr(answer, "load_for_sampling", lambda folder: (net, tok))
    prompts, out = tmp_path / "asked.json", tmp_path / "answers.jsonl"
    prompts.write_text(json.dumps([{"prompt": f"Number {i}"} for i in range(10)]))
    flags = ["--batch", 1, "--temperature", 1, "--top-p", 1, "--max-new", 4]
    return ["M", prompts, out, *flags]


def interrupt_call(monkeypatch, number: int) -> list:
    """Ctrl-C in this call of respond; the list has an item for each call."""
    calls, real = [], answer.respond

    def respond(*args, **settings):
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt
        return real(*args, **settings)

    monkeypatch.setattr(answer, "respond", respond)
    return calls


def test_ctrl_c_keeps_the_groups_that_are_answered(net, tok, ten_prompts, monkeypatch, capsys):
    out = ten_prompts[2]
    run(*ten_prompts)
    assert capsys.readouterr().out == f"10 answers written to {out} (temperature 1, top-p 1)\n"
    lines = out.read_text().splitlines(keepends=True)
    out.unlink()
    interrupt_call(monkeypatch, 3)
    message = r"interrupted: .*answers.jsonl has the first 8 of 10 answers"
    with pytest.raises(SystemExit, match=message):
        run(*ten_prompts)
    assert out.read_text() == "".join(lines[:8])


def test_every_group_is_written_as_soon_as_it_is_answered(ten_prompts, monkeypatch):
    calls = interrupt_call(monkeypatch, 99)
    monkeypatch.setattr(answer, "answer_file", lambda *_: sys.exit("about to be written"))
    with pytest.raises(SystemExit, match="about to be written"):
        run(*ten_prompts)
    assert len(calls) == 1


def test_ctrl_c_before_the_first_answers_leaves_an_old_file_alone(ten_prompts, monkeypatch):
    out = ten_prompts[2]
    out.write_text("old")
    interrupt_call(monkeypatch, 1)
    with pytest.raises(SystemExit, match="interrupted before the first answers"):
        run(*ten_prompts)
    assert out.read_text() == "old"


def test_questions_of_two_turns_do_not_become_an_alpaca_eval_file(tmp_path):
    prompts = tmp_path / "q.jsonl"
    prompts.write_text(json.dumps(QUESTIONS[0]) + "\n")
    with pytest.raises(UserError, match=r"several turns.*name the answers .*x.jsonl"):
        run("folder", prompts, tmp_path / "x.json")


@pytest.mark.parametrize(
    "out, flags, message",
    [
        ("x.csv", [], "name it .json"),
        ("nowhere/x.json", [], "its folder is not there"),
        ("asked.jsonl", [], "is the file of prompts"),
        ("x.json", ["--batch", "0"], "--batch is at least 1"),
        ("x.json", ["--top-p", "0"], "top-p"),
        ("x.json", ["--temperature", "-1"], "temperature"),
        ("x.json", ["--max-new", "0"], "max_new"),
        ("x.json", ["--max-new", "600"], "prompt 1 may need"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_one_line(
    folder, prompts, tmp_path, out, flags, message
):
    with pytest.raises(UserError, match=message) as e:
        run(folder, prompts, tmp_path / out, *flags)
    assert "\n" not in str(e.value) and prompts.read_text().count("\n") == 2
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize("argv", [[], ["folder"], ["folder", "x.jsonl"], ["a", "b", "c", "d"]])
def test_the_command_takes_a_folder_and_two_files(capsys, argv):
    with pytest.raises(SystemExit) as e:
        run(*argv)
    assert e.value.code == 2 and "usage: python -m scripts.answer" in capsys.readouterr().err


def test_a_folder_that_is_no_model_is_named(prompts, tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        run("nowhere", prompts, tmp_path / "x.json")
