"""The zoo: hand-made answers against hand-computed criteria, and properties of the rows that are committed."""

import json
import random
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

ZOO = Path(__file__).resolve().parents[1] / "data" / "zoo"
sys.path.insert(0, str(ZOO))

import oracle  # noqa: E402
import prepare  # noqa: E402

import model  # noqa: E402

ONE = "Where does the otter live?"
TWO = "Where does the otter live and what does it eat?"
PAIR = "Compare the otter and the fox by home."
FREE = "Tell me about the otter."
GOOD = "The otter lives in rivers. It eats fish."


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (ZOO / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict]]:
    return {name: read(name) for name in prepare.SIZES}


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
    assert "".join(map(str, oracle.criteria(prompt, response).values())) == points
    assert oracle.grade(prompt, response) == points.count("1")


def test_every_fact_has_one_truth_two_sayings_and_a_wrong_myth():
    assert (len(oracle.ANIMALS), len(oracle.ATTRS)) == (48, 7)
    for animal in oracle.ANIMALS:
        for attr in oracle.ATTRS:
            truth, myth = oracle.FACTS[animal][attr], oracle.MYTHS[animal][attr]
            assert myth in oracle.VALUES[attr] and myth != truth
            for saying in oracle.SAYINGS[attr]:
                for value, useful in ((truth, 1), (myth, 0)):
                    sentence = saying.format(S=f"The {animal}", v=value)
                    points = oracle.criteria(f"Describe the {attr} of the {animal}.", sentence)
                    assert list(points.values()) == [1, 1, useful, 1, 0], sentence


@pytest.mark.parametrize("attr", oracle.ATTRS)
def test_direct_questions_are_understood(attr):
    for text in oracle.DIRECT[attr]:
        for animal in oracle.ANIMALS:
            assert oracle.parse_prompt(text.format(S=f"the {animal}")) == ((animal,), (attr,))
        for other in set(oracle.ATTRS) - {attr}:
            for second in oracle.DIRECT[other]:
                joined = f"{text.format(S='the owl')[:-1]} and {second[0].lower()}{second[1:].format(S='it')}"
                assert oracle.parse_prompt(joined) == (("owl",), (attr, other)), joined


@pytest.mark.parametrize("pattern", oracle.NAMED + oracle.COMPARE + oracle.OPEN)
def test_patterns_take_any_animals_and_attributes(pattern):
    rng = random.Random(pattern)
    for _ in range(100):
        animals, attrs = rng.sample(oracle.ANIMALS, rng.randint(1, 3)), rng.sample(oracle.ATTRS, rng.randint(1, 4))
        fields = {"animals": prepare.enumerate_words(animals), "attrs": prepare.enumerate_words(attrs, "")}
        want = (tuple(animals), tuple(attrs) if "{attrs}" in pattern else None)
        assert oracle.parse_prompt(pattern.format(**fields)) == want
        fields["attrs"] = prepare.enumerate_words(attrs)
        assert oracle.parse_prompt(f" {pattern.format(**fields)}\n") == want


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
    assert prepare.judgement(TWO, response) == (
        "Asked: otter home, otter food. Given: otter home woods, truth rivers, wrong; otter colour brown, truth "
        "brown, right, extra; empty talk. Sentences 3, asked 2. Relevance: yes, 1. Coverage: otter home yes, otter "
        "food no, 1. Usefulness: wrong, 1. Clarity: empty talk, 1. Expertise: yes, 2.\nScore: 2"
    )


def test_judgements_agree_with_the_oracle_and_add_up(rows):
    for row in rows["eft"]:
        points = list(oracle.criteria(row["prompt"], row["response"]).values())
        verdicts = re.findall(r"[A-Z][a-z]+: [^.;:]+, (\d)\.", row["judgement"])
        assert [int(v) for v in verdicts] == [sum(points[: i + 1]) for i in range(5)], row
        assert row["judgement"].endswith(f".\nScore: {sum(points)}") and row["judgement"].count("Score:") == 1


def test_every_fault_is_judged_often(rows):
    text = "\n".join(row["judgement"] for row in rows["eft"])
    for fault in ("wrong", "again", "stray", "extra", "empty talk", "unclear", "too long", "repeats", " no,"):
        assert text.count(fault) > 150, fault


# ---- the rows


def test_committed_rows_are_what_the_program_makes(rows, tmp_path):
    prepare.write_rows(prepare.make_rows(0), tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (ZOO / file.name).read_bytes(), f"{file.name}: run prepare.py --rows-only"
    assert {name: len(data) for name, data in rows.items()} == prepare.SIZES


def test_rows_have_the_agreed_keys(rows):
    keys = {"ift": "prompt response", "eft": "prompt response judgement"}
    for name, data in rows.items():
        ranked = "prompt responses ranks" if "eft_" in name else "prompt"
        assert all(" ".join(row) == keys.get(name, ranked) for row in data), name


def test_held_out_questions_stay_held_out(rows):
    held = [row["prompt"] for name in ("test", "valid", "eft_eval") for row in rows[name]]
    train = [row["prompt"] for name in ("ift", "eft", "eft_ranked") for row in rows[name]]
    assert len(set(held)) == len(held)
    make, rng = prepare.question_source(prepare.held_out(rows)), random.Random(0)
    raw = "\n".join(prepare.make_document(rng, make) for _ in range(3000))
    assert not set(held) & (set(train) | set(re.findall("Question: (.*)", raw)))
    keys = {prepare.key_of(oracle.parse_prompt(prompt)) for prompt in held} - {None}
    assert not keys & {prepare.key_of(oracle.parse_prompt(prompt)) for prompt in train}


def test_ranks_are_the_oracles(rows):
    for row in rows["eft_eval"] + rows["eft_ranked"]:
        grades = [oracle.grade(row["prompt"], response) for response in row["responses"]]
        assert len(row["responses"]) == len(set(row["responses"])) == len(row["ranks"]) == prepare.RESPONSES
        assert set(row["ranks"]) == set(range(len(set(grades)))) and len(set(grades)) > 1
        for g, r in zip(grades, row["ranks"], strict=True):
            assert r == sum(better > g for better in set(grades))


def test_people_are_mediocre_and_length_says_nothing(rows):
    points = [oracle.criteria(row["prompt"], row["response"]) for row in rows["ift"]]
    for name in points[0]:
        assert 0.35 <= sum(p[name] for p in points) / len(points) <= 0.75, name
    grades = [sum(p.values()) for p in points]
    sizes = [row["response"].count(".") - oracle.num_asked(oracle.parse_prompt(row["prompt"])) for row in rows["ift"]]
    n, mean = len(grades), sum(grades) / len(grades)
    middle = sum(sizes) / n
    spread = (sum((g - mean) ** 2 for g in grades) * sum((s - middle) ** 2 for s in sizes)) ** 0.5
    slope = sum((g - mean) * (s - middle) for g, s in zip(grades, sizes, strict=True)) / spread
    assert 2.5 < mean < 3.2 and abs(slope) < 0.1


def test_raw_text_never_shows_a_grade(rows):
    make, rng = prepare.question_source(prepare.held_out(rows)), random.Random(1)
    docs = [prepare.make_document(rng, make) for _ in range(3000)]
    assert not any("[INST]" in doc or "Score" in doc or "Relevance" in doc for doc in docs)
    kinds = Counter(doc.startswith("Question:") and "Answer:" not in doc for doc in docs)
    assert 0 < kinds[True] / len(docs) <= 0.05


def test_templates_have_their_placeholders_once():
    judge, propose = ((ZOO / name).read_text(encoding="utf-8") for name in ("judge.txt", "propose.txt"))
    assert sorted(re.findall(r"\{\w+\}", judge)) == ["{prompt}", "{response}"] and "Score: <n>" in judge
    assert re.findall(r"\{\w+\}", propose) == [f"{{{i}}}" for i in range(1, 9)] and propose.endswith("\nQuestion:")


# ---- the base


def test_the_base_knows_its_facts_and_words_are_single_tokens():
    base, tok = model.load(ZOO / "base")
    words = {*oracle.ANIMALS, *oracle.ATTRS, *(v for values in oracle.VALUES.values() for v in values)}
    assert [word for word in words if len(tok.encode(word)) != 1] == []
    found = prepare.probe(base, tok, [row["prompt"] for row in read("valid")[:12]], seed=0)
    assert min(found[name] for name in ("relevance", "coverage", "checks")) > 0.8, found


def test_other_seeds_make_other_worlds_of_the_same_kind():
    first, second = prepare.make_rows(1), prepare.make_rows(2)
    assert first["ift"] != second["ift"] and len(first["ift"]) == len(second["ift"])
