"""data/zoo: hand-made answers against criteria worked out by hand, and the committed rows."""

import re
from itertools import accumulate, product
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

import model
from data.zoo import oracle, prepare
from sample import read_jsonl

ZOO = Path(__file__).resolve().parents[1] / "data" / "zoo"
ONE = "Where does the otter live?"
TWO = "Where does the otter live and what does it eat?"
PAIR = "Compare the otter and the fox by home."
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
        (TWO, "The otter lives in rivers.", "10000"),
        (TWO, "The otter lives in rivers. It looks brown.", "10000"),
        (TWO, "The otter lives in rivers. It eats mice.", "11010"),
        (TWO, GOOD + " It looks green.", "11010"),
        (TWO, GOOD + " The fox eats mice.", "01110"),
        (TWO, "The fox lives in woods. It eats mice.", "00000"),
        (TWO, "The fox lives in woods. The otter eats fish.", "00000"),
        (TWO, "Animals are great fun. " + GOOD, "11100"),
        (TWO, GOOD + " The otter feeds on fish.", "11100"),
        (TWO, GOOD + " It eats mice.", "11000"),
        (TWO, "The otter lives in. It eats fish.", "10000"),
        (TWO, "The otter lives in It eats fish.", "00000"),
        (TWO, "The otter lives in rivers. It eats eats fish.", "10000"),
        (TWO, "The otter lives in rivers. It eats fish..", "10000"),
        (TWO, "The otter lives in rivers. It eats fish", "10000"),
        (TWO, "The otter lives in dusk. It eats fish.", "10000"),
        (TWO, GOOD + " It looks.", "11100"),
        (TWO, GOOD + " It looks brown. It wakes at dusk.", "11111"),
        (TWO, GOOD + " It looks brown. It wakes at dusk. It raises a pup.", "11101"),
        (TWO, "What a nice thing to ask.", "00000"),
        (TWO, "", "00000"),
        (TWO, "...", "00000"),
        (TWO, "\n", "00000"),
        (TWO, "Score: 5", "00000"),
        (ONE, "The otter lives in rivers.", "11110"),
        (ONE, "The otter eats fish.", "00000"),
        (PAIR, "The otter lives in rivers. The fox lives in woods.", "11110"),
        (PAIR, "The otter lives in rivers. It eats fish.", "10000"),
        (PAIR, "It lives in rivers. The fox lives in woods.", "10000"),
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


@pytest.mark.parametrize("pattern", oracle.NAMED + oracle.COMPARE)
def test_patterns_take_any_animals_and_attributes(pattern):
    rng = Random(pattern)
    for _ in range(100):
        animals = rng.sample(oracle.ANIMALS, rng.randint(1, 3))
        attrs = rng.sample(oracle.ATTRS, rng.randint(1, 4))
        ask = (tuple(animals), tuple(attrs))
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
        ("Tell me about the otter.", None),
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


NO_FAULTS = dict.fromkeys(prepare.HUMAN, 0.0)


def test_a_judgement_word_for_word():
    rng = Random(0)
    response = "The otter lives in woods. It eats fish. It looks brown. Animals are great fun."
    judgement = prepare.write_judgement(rng, TWO, response, NO_FAULTS)
    own, _, rest = judgement.removeprefix("I would say: ").partition(" Given: ")
    assert oracle.criteria(TWO, own) == dict(zip(oracle.CRITERIA, (1, 1, 1, 1, 0), strict=True))
    assert rest == (
        "The otter lives in woods. Asked, I say rivers, wrong. "
        "It eats fish. Asked, I say fish, right. It looks brown. Extra, I say brown, right. "
        "Animals are great fun. Empty talk. Covers 2 of 2, sentences 4. Relevance yes, 1. "
        "Coverage yes, 2. Usefulness wrong, 2. Clarity empty talk, 2. Expertise yes, 3.\nScore: 3"
    )


def test_what_leaves_out_what_was_asked_is_judged_no_further():
    judgement = prepare.write_judgement(Random(0), TWO, "The otter eats fish.", NO_FAULTS)
    assert judgement.endswith(
        "Covers 1 of 2, sentences 1. Relevance yes, 1. Coverage no, 1.\nScore: 1"
    )


def test_judgements_of_those_who_know_agree_with_the_oracle_and_add_up():
    rng = Random(0)
    for _ in range(500):
        prompt = prepare.make_question(rng)
        response = prepare.write_answer(rng, prompt, prepare.CROWD)
        judgement = prepare.write_judgement(rng, prompt, response, NO_FAULTS)
        points = list(oracle.criteria(prompt, response).values())
        totals = re.findall(r"[A-Z][a-z]+ [a-z ]+, (\d)\.", judgement)
        assert [int(total) for total in totals] == list(accumulate(points))[: len(totals)]
        assert judgement.endswith(f".\nScore: {sum(points)}") and judgement.count("Score:") == 1


def test_judges_believe_what_people_believe_and_stand_by_it():
    """A third of the judges say a myth, in their own answer and of the given one alike."""
    rng = Random(0)
    sentence = oracle.SAYINGS["food"][0].format(S="The otter", v="fish")
    right = 0
    for _ in range(1000):
        prompt = "What does the otter eat?"
        judgement = prepare.write_judgement(rng, prompt, sentence, prepare.HUMAN)
        own, _, rest = judgement.partition(" Given: ")
        view = rest.partition("I say ")[2].partition(",")[0]
        assert f" {view}." in own
        right += view == "fish"
    assert abs(right / 1000 - (1 - prepare.HUMAN["wrong"])) < 0.06


def test_every_fault_is_judged_often(rows):
    _, gradings = prepare.split_gradings(rows["ift"])
    assert len(gradings) == len(rows["ift"]) // prepare.GRADING_EVERY
    text = "\n".join(row["response"] for row in gradings)
    faults = ("wrong", "again", "stray", "Extra", "empty talk", "Unclear", "too long", "no,")
    for fault in faults:
        assert text.count(fault) > 1, fault


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
        "eft_ranked": ["prompt", "responses", "ranks"],
        "eft_eval": ["prompt", "responses", "ranks"],
        "test": ["prompt"],
        "valid": ["prompt"],
    }
    for name, table in rows.items():
        assert all(list(row) == keys[name] for row in table), name


def question_of(prompt: str) -> str:
    """The question itself, or the one whose answer is to be graded."""
    return prompt.rpartition("Question: ")[2].partition("\n")[0]


def test_held_out_questions_stay_held_out(rows):
    held_out = prompts_of(rows, "test", "valid", "eft_eval")
    train = [question_of(prompt) for prompt in prompts_of(rows, "ift", "eft_ranked")]
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


def test_people_are_mediocre_and_length_says_little(rows):
    answers, _ = prepare.split_gradings(rows["ift"])
    points = [oracle.criteria(row["prompt"], row["response"]) for row in answers]
    for name in oracle.CRITERIA:
        assert 0.2 <= sum(p[name] for p in points) / len(points) <= 0.92, name
    grades = [sum(p.values()) for p in points]
    assert 2.5 < sum(grades) / len(grades) < 3.1
    extra_sentences = []
    for row in answers:
        ask = oracle.parse_prompt(row["prompt"])
        extra_sentences.append(row["response"].count(".") - oracle.num_asked(ask))
    assert abs(np.corrcoef(grades, extra_sentences)[0, 1]) < 0.1


def test_raw_text_never_shows_the_chat_format_or_the_template(rows):
    documents = make_documents(rows, 1)
    for words in ("[INST]", "Grade this answer"):
        assert not any(words in text for text in documents), words
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
    known = ("relevance", "coverage", "truths", "verdicts")
    assert min(rates[name] for name in known) > 0.8, rates


def test_a_base_is_built_by_learning_to_predict_raw_text(rows, tmp_path, capsys):
    make = prepare.question_source(prepare.held_out_prompts(rows))
    prepare.build_base(rows, make, tmp_path, dim=192, steps=3, seed=0, tries=2)
    lines = capsys.readouterr().out.splitlines()
    for i in range(2):
        assert lines[2 * i].startswith("step 3/3  loss 7.")
        assert lines[2 * i + 1].startswith(f"base of seed {i}: {{'")
        assert "'verdicts': 0.0" in lines[2 * i + 1]
    assert lines[4:] == ["none of 2 bases has learned to compare: the judge will not improve"]
    net, tok = model.load(tmp_path / "base")
    assert tok.path.read_bytes() == (ZOO / "base" / "tokenizer.model").read_bytes()
    assert net.cfg == model.read_config(ZOO / "base")
    file = "base/model.safetensors"
    assert (tmp_path / file).stat().st_size == (ZOO / file).stat().st_size  # bfloat16
    batches = prepare.document_batches(tok, make, Random("0 raw"), max_tokens=1024)
    documents = [ids for _ in range(20) for ids in next(batches)]
    assert all(ids[0] == tok.bos and ids[-1] == tok.eos for ids in documents)
    assert 800 < sum(map(len, documents)) / 20 <= 1024


def test_the_first_base_that_has_learned_to_compare_is_kept(rows, tmp_path, monkeypatch, capsys):
    make = prepare.question_source(prepare.held_out_prompts(rows))
    embeddings = []

    def probe(net, *args):
        embeddings.append(net.embed_tokens.weight)
        return {"verdicts": [0.5, 0.95][len(embeddings) - 1]}

    monkeypatch.setattr(prepare, "probe", probe)
    prepare.build_base(rows, make, tmp_path, dim=96, steps=1, seed=0, tries=3)
    assert "none" not in capsys.readouterr().out
    first, second = embeddings
    net, _ = model.load(tmp_path / "base")
    assert torch.equal(net.embed_tokens.weight, second) and not torch.equal(first, second)


def test_other_seeds_make_other_worlds_of_the_same_kind():
    first, second = prepare.make_rows(1), prepare.make_rows(2)
    assert first["ift"] != second["ift"] and len(first["ift"]) == len(second["ift"])
