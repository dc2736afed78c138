"""data/zoo: hand-made answers against criteria worked out by hand, and the committed rows."""

import re
from itertools import accumulate, product
from pathlib import Path
from random import Random

import numpy as np
import pytest

import model
from data.zoo import oracle, prepare
from sample import read_jsonl

ZOO = Path(__file__).resolve().parents[1] / "data" / "zoo"
ONE = "Where does the otter live?"
TWO = "Where does the otter live and what does it eat?"
PAIR = "Compare the otter and the fox by home."
FREE = "Tell me about the otter."
GOOD = "The otter lives in rivers. It eats fish."


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict]]:
    return {name: read_jsonl(ZOO / f"{name}.jsonl") for name in prepare.SIZES}


def prompts_of(rows: dict[str, list[dict]], *names: str) -> list[str]:
    return [row["prompt"] for name in names for row in rows[name]]


def make_documents(rows: dict[str, list[dict]], seed: int, count: int = 3000) -> list[str]:
    """Raw text of the kind that the base has read."""
    make = prepare.question_source(prepare.held_out_prompts(rows))
    rng = Random(seed)
    return [prepare.make_document(rng, make) for _ in range(count)]


# ---- the oracle


@pytest.mark.parametrize(
    ("prompt", "response", "points"),
    [  # points: relevance, coverage, usefulness, clarity, expertise
        (TWO, GOOD, "11110"),
        (TWO, GOOD + " It looks brown.", "11111"),
        (TWO, "It is found in rivers. The otter feeds on fish.", "11110"),
        (TWO, "The otter lives in rivers.", "10110"),
        (TWO, "The otter lives in rivers. It looks brown.", "10111"),
        (TWO, "The otter lives in rivers. It eats mice.", "11010"),
        (TWO, GOOD + " It looks green.", "11010"),
        (TWO, GOOD + " The fox eats mice.", "01110"),
        (TWO, "The fox lives in woods. It eats mice.", "00110"),
        (TWO, "The fox lives in woods. The otter eats fish.", "00110"),
        (TWO, "Animals are great fun. " + GOOD, "11100"),
        (TWO, GOOD + " The otter feeds on fish.", "11100"),
        (TWO, GOOD + " It eats mice.", "11000"),
        (TWO, "The otter lives in. It eats fish.", "10100"),
        (TWO, "The otter lives in It eats fish.", "00000"),
        (TWO, "The otter lives in rivers. It eats eats fish.", "10100"),
        (TWO, "The otter lives in rivers. It eats fish..", "10100"),
        (TWO, "The otter lives in rivers. It eats fish", "10100"),
        (TWO, "The otter lives in dusk. It eats fish.", "10100"),
        (TWO, GOOD + " It looks brown. It wakes at dusk.", "11111"),
        (TWO, GOOD + " It looks brown. It wakes at dusk. It raises a pup.", "11101"),
        (TWO, "What a nice thing to ask.", "00000"),
        (TWO, "", "00000"),
        (TWO, "...", "00000"),
        (TWO, "\n", "00000"),
        (TWO, "Score: 5", "00000"),
        (ONE, "The otter lives in rivers.", "11110"),
        (ONE, "The otter eats fish.", "10111"),
        (PAIR, "The otter lives in rivers. The fox lives in woods.", "11110"),
        (PAIR, "The otter lives in rivers. It eats fish.", "10111"),
        (PAIR, "It lives in rivers. The fox lives in woods.", "10100"),
        (FREE, "The otter looks brown. It eats fish.", "10110"),
        (FREE, "The otter looks brown. It eats fish. It wakes at dusk.", "11110"),
        (FREE, "The otter looks brown. It eats fish. It wakes at dusk. It raises a pup.", "11111"),
        (FREE, "The otter looks brown. It eats mice. It wakes at dusk. It raises a pup.", "11011"),
        (FREE, "The otter looks brown. It eats fish. It eats fish.", "10100"),
    ],
)
def test_criteria_by_hand(prompt, response, points):
    criteria = oracle.criteria(prompt, response)
    assert tuple(criteria) == oracle.CRITERIA
    assert "".join(map(str, criteria.values())) == points
    assert oracle.grade(prompt, response) == points.count("1")


def test_every_fact_has_one_truth_two_sayings_and_a_wrong_myth():
    assert (len(oracle.ANIMALS), len(oracle.ATTRS)) == (48, 7)
    for animal, attr in product(oracle.ANIMALS, oracle.ATTRS):
        truth, myth = oracle.FACTS[animal][attr], oracle.MYTHS[animal][attr]
        assert myth in oracle.VALUES[attr] and myth != truth
        prompt = f"Describe the {attr} of the {animal}."
        for saying in oracle.SAYINGS[attr]:
            for value, useful in ((truth, 1), (myth, 0)):
                sentence = saying.format(S=f"The {animal}", v=value)
                points = oracle.criteria(prompt, sentence)
                assert list(points.values()) == [1, 1, useful, 1, 0], sentence


@pytest.mark.parametrize("attr", oracle.ATTRS)
def test_direct_questions_are_understood(attr):
    for text in oracle.DIRECT[attr]:
        for animal in oracle.ANIMALS:
            assert oracle.parse_prompt(text.format(S=f"the {animal}")) == ((animal,), (attr,))
        first = text.format(S="the owl")[:-1]
        for other in set(oracle.ATTRS) - {attr}:
            for second in oracle.DIRECT[other]:
                second = second.format(S="it")
                prompt = f"{first} and {second[0].lower()}{second[1:]}"
                assert oracle.parse_prompt(prompt) == (("owl",), (attr, other)), prompt


@pytest.mark.parametrize("pattern", oracle.NAMED + oracle.COMPARE + oracle.OPEN)
def test_patterns_take_any_animals_and_attributes(pattern):
    rng = Random(pattern)
    for _ in range(100):
        animals = rng.sample(oracle.ANIMALS, rng.randint(1, 3))
        attrs = rng.sample(oracle.ATTRS, rng.randint(1, 4))
        ask = (tuple(animals), tuple(attrs) if "{attrs}" in pattern else None)
        fields = {"animals": prepare.enumerate_words(animals)}
        fields["attrs"] = prepare.enumerate_words(attrs, "")
        assert oracle.parse_prompt(pattern.format(**fields)) == ask
        fields["attrs"] = prepare.enumerate_words(attrs)
        assert oracle.parse_prompt(f" {pattern.format(**fields)}\n") == ask


@pytest.mark.parametrize(
    ("text", "ask"),
    [
        ("Tell me the home of the otter and of the fox.", (("otter", "fox"), ("home",))),
        ("Tell me the home and the home of the otter", (("otter",), ("home",))),
        ("Compare the otter and the otter by food.", (("otter",), ("food",))),
        ("What does the bear eat and what does the bear eat?", (("bear",), ("food",))),
        ("Where does the otter live and what does the fox eat?", None),
        ("Where does it live?", None),
        ("Where does the cat live?", None),
        ("Tell me the size of the otter.", None),
        ("Tell me about the otter. Tell me about the fox.", None),
        ("Hello", None),
        ("", None),
    ],
)
def test_prompts_that_a_model_might_write(text, ask):
    assert oracle.parse_prompt(text) == ask
    if ask is None:
        with pytest.raises(ValueError, match="not a question"):
            oracle.grade(text, GOOD)


# ---- the judgements


def test_a_judgement_word_for_word():
    response = "The otter lives in woods. It looks brown. Some say other things."
    assert prepare.write_judgement(TWO, response) == (
        "Asked: otter home, otter food. Given: otter home woods, truth rivers, wrong; "
        "otter colour brown, truth brown, right, extra; empty talk. Sentences 3, asked 2. "
        "Relevance: yes, 1. Coverage: otter home yes, otter food no, 1. Usefulness: wrong, 1. "
        "Clarity: empty talk, 1. Expertise: yes, 2.\nScore: 2"
    )


def test_judgements_agree_with_the_oracle_and_add_up(rows):
    for row in rows["eft"]:
        judgement = row["judgement"]
        points = oracle.criteria(row["prompt"], row["response"]).values()
        totals = re.findall(r"[A-Z][a-z]+: [^.;:]+, (\d)\.", judgement)
        assert [int(total) for total in totals] == list(accumulate(points)), row
        assert judgement.endswith(f".\nScore: {sum(points)}") and judgement.count("Score:") == 1


def test_every_fault_is_judged_often(rows):
    text = "\n".join(row["judgement"] for row in rows["eft"])
    faults = ("wrong", "again", "stray", "extra", "empty talk", "unclear", "too long", "repeats")
    for fault in (*faults, " no,"):
        assert text.count(fault) > 150, fault


# ---- the rows


def test_committed_rows_are_what_the_program_makes(rows, tmp_path):
    prepare.write_rows(prepare.make_rows(0), tmp_path)
    for file in tmp_path.iterdir():
        same = file.read_bytes() == (ZOO / file.name).read_bytes()
        assert same, f"{file.name}: run python -m data.zoo.prepare --rows-only"
    assert {name: len(table) for name, table in rows.items()} == prepare.SIZES


def test_rows_have_the_agreed_keys(rows):
    keys = {
        "ift": ["prompt", "response"],
        "eft": ["prompt", "response", "judgement"],
        "eft_ranked": ["prompt", "responses", "ranks"],
        "eft_eval": ["prompt", "responses", "ranks"],
        "test": ["prompt"],
        "valid": ["prompt"],
    }
    for name, table in rows.items():
        assert all(list(row) == keys[name] for row in table), name


def test_held_out_questions_stay_held_out(rows):
    held_out = prompts_of(rows, "test", "valid", "eft_eval")
    train = prompts_of(rows, "ift", "eft", "eft_ranked")
    raw = re.findall("Question: (.*)", "\n".join(make_documents(rows, 0)))
    assert len(set(held_out)) == len(held_out) and len(raw) > 1000
    assert not set(held_out) & {*train, *raw}
    held_out_keys = {prepare.key_of(oracle.parse_prompt(prompt)) for prompt in held_out} - {None}
    assert not held_out_keys & {prepare.key_of(oracle.parse_prompt(prompt)) for prompt in train}


def test_ranks_are_the_oracles(rows):
    for row in rows["eft_eval"] + rows["eft_ranked"]:
        responses, ranks = row["responses"], row["ranks"]
        grades = [oracle.grade(row["prompt"], response) for response in responses]
        assert len(responses) == len(set(responses)) == len(ranks) == prepare.RESPONSES
        assert len(set(grades)) > 1
        for grade, rank in zip(grades, ranks, strict=True):
            assert rank == sum(other > grade for other in set(grades))


def test_people_are_mediocre_and_length_says_nothing(rows):
    points = [oracle.criteria(row["prompt"], row["response"]) for row in rows["ift"]]
    for name in oracle.CRITERIA:
        assert 0.35 <= sum(p[name] for p in points) / len(points) <= 0.75, name
    grades = [sum(p.values()) for p in points]
    assert 2.5 < sum(grades) / len(grades) < 3.2
    extra_sentences = []
    for row in rows["ift"]:
        ask = oracle.parse_prompt(row["prompt"])
        extra_sentences.append(row["response"].count(".") - oracle.num_asked(ask))
    assert abs(np.corrcoef(grades, extra_sentences)[0, 1]) < 0.1


def test_raw_text_never_shows_a_grade(rows):
    documents = make_documents(rows, 1)
    for word in ("[INST]", "Score", "Relevance"):
        assert not any(word in text for text in documents), word
    lists = [text for text in documents if text.startswith("Question:") and "Answer:" not in text]
    assert 0 < len(lists) / len(documents) <= 0.05


def test_templates_have_their_placeholders_once():
    judge = (ZOO / "judge.txt").read_text(encoding="utf-8")
    assert sorted(re.findall(r"\{\w+\}", judge)) == ["{prompt}", "{response}"]
    assert "Score: <n>" in judge
    propose = (ZOO / "propose.txt").read_text(encoding="utf-8")
    assert re.findall(r"\{\w+\}", propose) == [f"{{{i}}}" for i in range(1, 9)]
    assert propose.endswith("\nQuestion:")


# ---- the base


def test_the_base_knows_its_facts_and_words_are_single_tokens(rows):
    base, tok = model.load(ZOO / "base")
    words = {*oracle.ANIMALS, *oracle.ATTRS}.union(*oracle.VALUES.values())
    assert [word for word in words if len(tok.encode(word)) != 1] == []
    rates = prepare.probe(base, tok, prompts_of(rows, "valid")[:12], seed=0)
    assert min(rates[name] for name in ("relevance", "coverage", "checks")) > 0.8, rates


def test_a_base_is_built_by_learning_to_predict_raw_text(rows, tmp_path, capsys):
    make = prepare.question_source(prepare.held_out_prompts(rows))
    prepare.build_base(rows, make, tmp_path, dim=160, steps=3, seed=0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 3/3  loss 7.") and "'checks'" in lines[1]
    net, tok = model.load(tmp_path / "base")
    assert tok.path.read_bytes() == (ZOO / "base" / "tokenizer.model").read_bytes()
    assert net.cfg == model.read_config(ZOO / "base")
    file = "base/model.safetensors"
    assert (tmp_path / file).stat().st_size == (ZOO / file).stat().st_size  # bfloat16
    batches = prepare.document_batches(tok, make, Random("0 raw"), max_tokens=1024)
    documents = [ids for _ in range(20) for ids in next(batches)]
    assert all(ids[0] == tok.bos and ids[-1] == tok.eos for ids in documents)
    assert 800 < sum(map(len, documents)) / 20 <= 1024


def test_other_seeds_make_other_worlds_of_the_same_kind():
    first, second = prepare.make_rows(1), prepare.make_rows(2)
    assert first["ift"] != second["ift"] and len(first["ift"]) == len(second["ift"])
