"""Make the zoo: its rows, its two templates, and M0, the small Llama that stands in for Llama 2.

    python -m data.zoo.prepare                # everything; the base takes most of the time
    python -m data.zoo.prepare --rows-only    # all but the base, in seconds

Rows and templates are the ones that train.py reads (formats: README.md here). People are
simulated: their answers leave things out, state myths, stray, ramble and stumble. Each fault has
its own rate and is independent of the others, and quality is independent of length.
A judge answers the question first and compares the given answer with that, sentence by sentence;
so every step of a judgement is a copy, a look-up or a comparison. The base reads raw documents,
among them such reviews: it never sees the chat format or the judge's template.

Left out: random draws that do not depend on --seed. (The weights also depend on the machine's
arithmetic.)
"""

import argparse
import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import sentencepiece
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from data.zoo import oracle
from data.zoo.oracle import (
    ANIMALS,
    ATTRS,
    FACTS,
    FILLERS,
    MYTHS,
    SAYINGS,
    TWINS,
    VALUES,
    Ask,
    Fact,
)
from dpo import IGNORE
from model import Llama, ModelConfig, Tokenizer, load, save
from sample import generate

SIZES = {  # rows of each file
    "test": 512,
    "valid": 128,
    "eft_eval": 384,
    "eft_ranked": 900,
    "ift": 3200,
}
HELD_OUT = ("test", "valid", "eft_eval")
RESPONSES = 3  # per ranked prompt
GRADING_EVERY = 20  # rows of ift.jsonl: in one of so many somebody asks for a grade
EXAMPLES = 8  # questions that the writer of new prompts is shown
COMPARES = 0.9  # verdicts on claims that fit; a base that cannot compare has about half of them
HEAD_DIM = 32  # what fast attention kernels take: 32 or 64
VOCABULARY = 1024

Tables = dict[str, list[dict]]  # the rows of each file
Rates = dict[str, float]  # how often each fault is made
Items = list[Fact | str]  # what oracle.py reads in an answer

JUDGE = (
    "Grade this answer, one point each for relevance, coverage, usefulness, clarity, expertise. "
    "Explain, then end with the line Score: <n>\n"
    "Question: {prompt}\n"
    "Answer: {response}\n"
)
PLACEHOLDERS = [f"{{{i}}}" for i in range(1, EXAMPLES + 1)]
PROPOSE = "".join(f"Question: {place}\n" for place in PLACEHOLDERS) + "Question:"

# ---- questions -------------------------------------------------------------------------------

QUESTION_KINDS = {  # how often, in percent
    "one": 22,  # one attribute of an animal
    "two": 28,
    "three": 26,
    "compare": 24,  # one attribute of two animals
}


def enumerate_words(words: list[str], article: str = "the ") -> str:
    """("home", "food", "skill")  ->  "the home, the food and the skill" """
    *first_words, last_word = (article + word for word in words)
    if not first_words:
        return last_word
    return f"{', '.join(first_words)} and {last_word}"


def make_question(rng: Random) -> str:
    """A question of one of oracle.py's patterns: one to three attributes, or two animals."""
    kind = draw_kind(rng, QUESTION_KINDS)
    animals = enumerate_words(rng.sample(ANIMALS, 2 if kind == "compare" else 1))
    attrs = rng.sample(ATTRS, {"two": 2, "three": 3}.get(kind, 1))
    if kind in ("one", "two") and rng.random() < 0.7:
        return make_direct_question(rng, animals, attrs)
    if kind == "compare" and rng.random() < 0.6:
        return rng.choice(oracle.COMPARE).format(animals=animals, attrs=attrs[0])
    return rng.choice(oracle.NAMED).format(animals=animals, attrs=enumerate_words(attrs))


def make_direct_question(rng: Random, animal: str, attrs: list[str]) -> str:
    """ "Where does the owl live?", or "Where does the owl live and what does it eat?" """
    first = rng.choice(oracle.DIRECT[attrs[0]]).format(S=animal)
    if len(attrs) == 1:
        return first
    second = rng.choice(oracle.DIRECT[attrs[1]]).format(S="it")
    return first[:-1] + " and " + second[0].lower() + second[1:]


def draw_kind(rng: Random, weights: dict[str, int]) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


def key_of(ask: Ask):
    """What is asked, in whatever words. None for one fact: these are few, so that only their
    words can be held out."""
    animals, attrs = ask
    return None if oracle.num_asked(ask) == 1 else (frozenset(animals), frozenset(attrs))


def make_held_out(rng: Random, count: int) -> list[str]:
    """`count` different questions."""
    questions = {}  # a dict keeps the order
    while len(questions) < count:
        questions[make_question(rng)] = None
    return list(questions)


def question_source(held_out: list[str]) -> Callable[[Random], str]:
    """A maker of questions that avoids the held-out ones, in these and in other words."""
    texts = set(held_out)
    keys = {key_of(oracle.parse_prompt(text)) for text in held_out} - {None}

    def make(rng: Random) -> str:
        while True:
            text = make_question(rng)
            if text not in texts and key_of(oracle.parse_prompt(text)) not in keys:
                return text

    return make


# ---- answers of people -----------------------------------------------------------------------

FAULTS = {  # how often a person does it, per answer
    "drop": 0.12,  # leave out what was asked last
    "stray": 0.25,  # talk of the animal's twin
    "wrong": 0.36,  # state a myth, or rarely anything else, per fact
    "ramble": 0.20,  # say much too much
    "repeat": 0.12,  # say a thing twice
    "filler": 0.25,  # talk without facts
    "broken": 0.10,  # spoil a sentence
}
CROWD = FAULTS | {"extra": 0.32}  # of raw text; a fact more than asked is no fault
HUMAN = CROWD | {"stray": 0.08, "repeat": 0.05, "broken": 0.05}  # of seed data: more careful
CAREFUL = {fault: rate / 2 for fault, rate in HUMAN.items()}  # of the replies that EFT is made of
CAREFUL |= {fault: HUMAN[fault] for fault in ("wrong", "extra")}
# Of the judge's exam: clear and complete, so that only facts make one reply better than another.
LEARNED = dict.fromkeys(HUMAN, 0.0) | {"wrong": HUMAN["wrong"], "extra": 0.9}

Topic = tuple[str, str] | None  # (animal, attribute); None: talk without facts
Plan = list[Topic]


def plan_answer(rng: Random, ask: Ask, rates: Rates) -> Plan:
    """What to talk about, sentence by sentence, with the faults of `rates`."""
    topics = oracle.topics_asked(ask)
    plan = list(topics)
    if rng.random() < rates["drop"]:
        plan.pop()
    if not plan or rng.random() < rates["extra"]:
        for _ in range(rng.choice((1, 1, 1, 2))):
            plan.append(new_topic(rng, plan, topics, ask))
    if rng.random() < rates["ramble"]:
        ramble(rng, plan, topics, ask)
    if rng.random() < rates["repeat"]:
        again = rng.randrange(len(plan))
        plan.insert(again, plan[again])
    if rng.random() < rates["stray"]:
        stray(rng, plan, ask)
    if rng.random() < rates["filler"]:
        plan.insert(rng.choice((0, len(plan))), None)
    return plan


def new_topic(rng: Random, plan: Plan, topics: Plan, ask: Ask) -> Topic:
    """A fact neither asked for nor in the plan; if there is no such fact, one of the plan."""
    facts = [(animal, attr) for animal in ask[0] for attr in ATTRS]
    new_facts = [fact for fact in facts if fact not in topics + plan]
    return rng.choice(new_facts or plan)


def ramble(rng: Random, plan: Plan, topics: Plan, ask: Ask):
    """Go on until the answer is too long."""
    length = len(topics) + oracle.SPARE_FACTS + rng.choice((1, 2))
    while len(plan) < length:
        plan.append(new_topic(rng, plan, topics, ask))


def stray(rng: Random, plan: Plan, ask: Ask):
    """Say one thing of the animal's twin, or go on about that one from some sentence on."""
    twin = TWINS[ask[0][-1]]
    if rng.random() < 0.5:
        plan.append((twin, rng.choice(ask[1])))
        return
    for i in range(rng.randrange(len(plan)), len(plan)):
        plan[i] = (twin, plan[i][1])


def break_sentence(rng: Random, sentence: str) -> str:
    """Spoil a sentence as a hasty writer does."""
    words = sentence.split(" ")
    i = rng.randrange(1, len(words))
    kind = rng.choice(("missing", "doubled", "cut"))
    if kind == "missing":
        words.pop(i)
    elif kind == "doubled":
        words.insert(i, words[i].rstrip("."))
    else:
        del words[i:]
    return " ".join(words)


def believe(rng: Random, topic: Topic, rates: Rates) -> str:
    """What this person takes for true: the truth, or a myth, rarely anything else."""
    animal, attr = topic
    if rng.random() >= rates["wrong"]:
        return FACTS[animal][attr]
    return MYTHS[animal][attr] if rng.random() < 0.85 else rng.choice(VALUES[attr])


def write_facts(rng: Random, plan: Plan, beliefs: dict[Topic, str]) -> list[str]:
    """A sentence for every topic of a plan."""
    sentences, last_topic = [], None
    for topic in plan:
        if topic is None:
            sentences.append(rng.choice(FILLERS))
            continue
        if topic == last_topic:  # said again, in the same words
            sentences.append(sentences[-1])
            continue
        animal, attr = topic
        subject = "The " + animal
        if last_topic and animal == last_topic[0] and rng.random() < 0.85:
            subject = "It"
        sentences.append(rng.choice(SAYINGS[attr]).format(S=subject, v=beliefs[topic]))
        last_topic = topic
    return sentences


def write_answer(rng: Random, prompt: str, rates: Rates) -> str:
    """An answer as a person gives it, with faults at the given rates."""
    plan = plan_answer(rng, oracle.parse_prompt(prompt), rates)
    beliefs = {topic: believe(rng, topic, rates) for topic in plan if topic}
    sentences = write_facts(rng, plan, beliefs)
    if rng.random() < rates["broken"]:
        i = rng.randrange(len(sentences))
        sentences[i] = break_sentence(rng, sentences[i])
    return " ".join(sentences)


# ---- judgements ------------------------------------------------------------------------------


class Views(dict):
    """What somebody takes for true, topic by topic, decided when it is first needed."""

    def __init__(self, rng: Random, rates: Rates):
        super().__init__()
        self.rng, self.rates = rng, rates

    def __missing__(self, topic: Topic) -> str:
        self[topic] = believe(self.rng, topic, self.rates)
        return self[topic]


def check(sentence: str, item: Fact | str, views: Views) -> str:
    """A sentence of an answer, its part in it, and what the judge says instead: "It eats fish.
    Asked, I say mice, wrong." """
    if isinstance(item, str):
        return f"{sentence} {item.capitalize()}."
    view = views[item.animal, item.attr]
    verdict = "right" if item.value == view else "wrong"
    return f"{sentence} {item.role.capitalize()}, I say {view}, {verdict}."


def why_unclear(items: Items, ask: Ask) -> str:
    """What an answer without the point for clarity lacks."""
    if len(items) > oracle.num_asked(ask) + oracle.SPARE_FACTS:
        return "too long"
    for fault in ("empty talk", "unclear"):
        if fault in items:
            return fault
    return "again"


def explain(items: Items, points: dict[str, int], ask: Ask) -> dict[str, str]:
    """The verdict on each of the five criteria in words."""
    facts = [item for item in items if isinstance(item, Fact)]
    roles = {fact.role for fact in facts}
    why_not = {
        "relevance": "stray" if "stray" in roles else "no",
        "coverage": "no",
        "usefulness": "wrong",
        "clarity": why_unclear(items, ask),
        "expertise": "no",
    }
    return {name: "yes" if points[name] else reason for name, reason in why_not.items()}


def write_judgement(rng: Random, prompt: str, response: str, rates: Rates) -> str:
    """A person's grade with its reasons: an own answer, the given one sentence by sentence, the
    five verdicts with a running total. Beliefs are the person's; all else is as the oracle has
    it."""
    ask = oracle.parse_prompt(prompt)
    views = Views(rng, rates)
    own = " ".join(write_facts(rng, oracle.topics_asked(ask), views))
    items = []
    for item in oracle.read_answer(response, ask):
        if isinstance(item, Fact):
            item = item._replace(truth=views[item.animal, item.attr])
        items.append(item)
    sentences = oracle.split_sentences(response)
    checks = " ".join(check(s, item, views) for s, item in zip(sentences, items, strict=True))
    points = oracle.judge_items(items, ask)
    words = explain(items, points, ask)
    verdicts, total = [], 0
    for name, point in points.items():
        total += point
        verdicts.append(f"{name.capitalize()} {words[name]}, {total}.")
        if name == "coverage" and not point:
            break
    num_covered = sum(isinstance(item, Fact) and item.role == "asked" for item in items)
    lengths = f"Covers {num_covered} of {oracle.num_asked(ask)}, sentences {len(items)}."
    return f"I would say: {own} Given: {checks} {lengths} {' '.join(verdicts)}\nScore: {total}"


def grading_prompt(prompt: str, response: str) -> str:
    return JUDGE.replace("{prompt}", prompt).replace("{response}", response).strip()


# ---- rows ------------------------------------------------------------------------------------


def held_out_prompts(rows: Tables) -> list[str]:
    """The questions that nothing may be trained on."""
    return [row["prompt"] for name in HELD_OUT for row in rows[name]]


def draw_responses(rng: Random, prompt: str, people: Rates) -> list[str]:
    """Different answers to one question."""
    responses = {}  # a dict keeps the order
    while len(responses) < RESPONSES:
        responses[write_answer(rng, prompt, people)] = None
    return list(responses)


def all_equal(prompt: str, responses: list[str]) -> bool:
    return len({oracle.grade(prompt, response) for response in responses}) == 1


def ranked_row(rng: Random, prompt: str, people: Rates) -> dict:
    """Answers that are not all equally good, with their dense ranks, best 0."""
    responses = draw_responses(rng, prompt, people)
    while all_equal(prompt, responses):
        responses = draw_responses(rng, prompt, people)
    grades = [oracle.grade(prompt, response) for response in responses]
    order = sorted(set(grades), reverse=True)
    ranks = [order.index(grade) for grade in grades]
    return {"prompt": prompt, "responses": responses, "ranks": ranks}


def ranked_rows(rng: Random, make, count: int, people: Rates) -> list[dict]:
    """Rankings of `count` questions of make(rng) that people answer unequally well."""
    prompts = []
    while len(prompts) < count:
        prompt = make(rng)
        if not all_equal(prompt, draw_responses(rng, prompt, HUMAN)):
            prompts.append(prompt)
    return [ranked_row(rng, prompt, people) for prompt in prompts]


def ift_rows(rng: Random, make, count: int) -> list[dict]:
    """`count` different questions with people's answers; in one of GRADING_EVERY somebody asks
    for the grade of an answer instead."""
    rows = {}
    while len(rows) < count:
        prompt = make(rng)
        response = write_answer(rng, prompt, HUMAN)
        if len(rows) % GRADING_EVERY == GRADING_EVERY - 1:
            answer = write_answer(rng, prompt, HUMAN)
            response = write_judgement(rng, prompt, answer, HUMAN)
            prompt = grading_prompt(prompt, answer)
        rows[prompt] = {"prompt": prompt, "response": response}
    return list(rows.values())


def split_gradings(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """Rows of ift.jsonl: answers to questions, and grades of answers."""
    beginning = JUDGE.partition("{")[0]
    answers = [row for row in rows if not row["prompt"].startswith(beginning)]
    return answers, [row for row in rows if row["prompt"].startswith(beginning)]


def make_rows(seed: int) -> Tables:
    """All rows by file name. Held-out questions come first: no training row can hold one."""
    rngs = {name: Random(f"{seed} {name}") for name in ("held", *SIZES)}
    count = SIZES["test"] + SIZES["valid"] + 2 * SIZES["eft_eval"]  # twice: not all give a row
    held_out = make_held_out(rngs["held"], count)
    make = question_source(held_out)
    left = iter(held_out)
    rows = {}
    for name in ("test", "valid"):
        rows[name] = [{"prompt": next(left)} for _ in range(SIZES[name])]
    size = SIZES["eft_eval"]
    rows["eft_eval"] = ranked_rows(rngs["eft_eval"], lambda rng: next(left), size, LEARNED)
    rows["eft_ranked"] = ranked_rows(rngs["eft_ranked"], make, SIZES["eft_ranked"], CAREFUL)
    rows["ift"] = ift_rows(rngs["ift"], make, SIZES["ift"])
    return rows


def write_rows(rows: Tables, out: Path):
    for name, table in rows.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in table]
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    (out / "judge.txt").write_text(JUDGE, encoding="utf-8")
    (out / "propose.txt").write_text(PROPOSE, encoding="utf-8")


# ---- the base --------------------------------------------------------------------------------

DOCUMENT_KINDS = {  # how often, in percent
    "facts": 10,  # an encyclopedia's entry
    "forum": 24,  # a question and a person's answer
    "claims": 6,  # single sentences and what somebody says instead
    "review": 56,  # a question, an answer, and a grade with its reasons
    "list": 4,  # questions one after the other
}


def make_document(rng: Random, make) -> str:
    """Raw text as a crawler finds it: encyclopedia, forum, claims, reviews, or questions."""
    kind = draw_kind(rng, DOCUMENT_KINDS)
    animal = rng.choice(ANIMALS)
    if kind == "facts":
        return make_article(rng, animal)
    if kind == "claims":
        return "\n".join(make_claim(rng) for _ in range(rng.randint(1, 3)))
    if kind == "list":
        return "\n".join("Question: " + make(rng) for _ in range(EXAMPLES + 2))
    prompt = make(rng)
    if kind == "forum":
        return f"Question: {prompt}\nAnswer: {write_answer(rng, prompt, CROWD)}"
    response = write_answer(rng, prompt, CROWD)
    review = write_judgement(rng, prompt, response, CROWD)
    return f"Question: {prompt}\nAnswer: {response}\n{review}"


def make_article(rng: Random, animal: str) -> str:
    """Some true facts about an animal."""
    name = "The " + animal
    attrs = rng.sample(ATTRS, rng.randint(2, 6))
    subjects = [name] + [rng.choice(("It", name)) for _ in attrs[1:]]
    sentences = []
    for attr, subject in zip(attrs, subjects, strict=True):
        saying = rng.choice(SAYINGS[attr])
        sentences.append(saying.format(S=subject, v=FACTS[animal][attr]))
    return " ".join(sentences)


def make_claim(rng: Random) -> str:
    """A sentence, half of the time true, and what somebody says instead."""
    animal, attr = rng.choice(ANIMALS), rng.choice(ATTRS)
    truth = FACTS[animal][attr]
    value = rng.choice((truth, truth, MYTHS[animal][attr], rng.choice(VALUES[attr])))
    sentence = rng.choice(SAYINGS[attr]).format(S="The " + animal, v=value)
    view = believe(rng, (animal, attr), CROWD)
    return f"Claim: {sentence} I say {view}, {'right' if value == view else 'wrong'}."


def tokenizer_texts(rows: Tables, make) -> list[str]:
    """The tokenizer's text holds the chat format and the judge's template: they are few tokens."""
    rng = Random("tokenizer")
    texts = [make_document(rng, make) for _ in range(6000)]
    for row in rows["ift"]:
        texts.append(f"[INST] {row['prompt']} [/INST] {row['response']}")
    return texts


def train_tokenizer(texts: list[str], path: Path) -> Tokenizer:
    """A BPE with Llama 2's settings: spaces and newlines survive."""
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=file,
            model_type="bpe",
            vocab_size=VOCABULARY,
            byte_fallback=True,
            user_defined_symbols=["\n"],
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
    return Tokenizer(path)


def shape_of(tok: Tokenizer, dim: int) -> ModelConfig:
    """A Llama of four layers, `dim` wide: a multiple of 96, for three heads to a key head."""
    return ModelConfig(
        vocab_size=tok.size,
        dim=dim,
        layers=4,
        heads=dim // HEAD_DIM,
        kv_heads=dim // HEAD_DIM // 3,
        ffn=dim * 8 // 3,
        max_len=512,
    )


def new_model(tok: Tokenizer, dim: int, seed: int) -> Llama:
    """A Llama that learns fast when small: each matrix scaled by its fan-in, the residual branches
    damped, and the embedding as large as if it were multiplied by sqrt(D)."""
    torch.manual_seed(seed)
    model = Llama(shape_of(tok, dim))
    damping = (2 * model.cfg.layers) ** -0.5
    for name, weight in model.named_parameters():
        if weight.dim() != 2:
            continue  # the norms begin at 1
        std = weight.shape[1] ** -0.5
        if "embed_tokens" in name:
            std = 0.02 * model.cfg.dim**0.5
        elif "o_proj" in name or "down_proj" in name:
            std *= damping
        torch.nn.init.normal_(weight, std=std)
    return model


def document_batches(tok: Tokenizer, make, rng: Random, max_tokens: int) -> Iterator[list]:
    """Endless batches of token id lists, documents of like length together."""
    while True:
        documents = []
        for _ in range(4096):
            ids = tok.encode_with_bos(make_document(rng, make))
            documents.append([*ids, tok.eos])
        documents.sort(key=len)
        batches = []
        while documents:
            size = max(1, max_tokens // len(documents[-1]))
            batches.append(documents[-size:])
            del documents[-size:]
        rng.shuffle(batches)
        yield from batches


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine down to a fiftieth of the peak."""
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
    return peak * min((step + 1) / 200, 0.02 + 0.98 * cosine)


def make_optimizer(model: Llama) -> torch.optim.Optimizer:
    """AdamW, with larger steps for the embedding: it is larger itself, see `new_model`."""
    embedding = model.embed_tokens.weight
    rest = [weight for weight in model.parameters() if weight is not embedding]
    groups = [
        {"params": rest, "scale": 1.0},
        {"params": [embedding], "scale": model.cfg.dim**0.5},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def pretrain(model: Llama, batches: Iterator[list], *, steps: int, peak: float = 1.7e-3):
    """Next-token prediction on raw documents. Small batches: copying a name into an answer is
    learned after many steps, not after many tokens."""
    optimizer = make_optimizer(model)
    smooth_loss, began = None, time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["scale"] * learning_rate(step, steps, peak)
        documents = [torch.tensor(ids) for ids in next(batches)]
        tokens = pad_sequence(documents, batch_first=True, padding_value=IGNORE)  # (B, T)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(tokens[:, :-1].clamp(min=0))  # (B, T - 1, V)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=IGNORE)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        last_loss = loss.item()
        smooth_loss = last_loss if step == 0 else 0.98 * smooth_loss + 0.02 * last_loss
        if (step + 1) % 500 == 0 or step + 1 == steps:
            seconds = time.time() - began
            progress = f"step {step + 1}/{steps}  loss {smooth_loss:.3f}  {seconds:.0f} s"
            print(progress, flush=True)


def continue_texts(model: Llama, tok: Tokenizer, texts: list[str], max_new: int) -> list[str]:
    """The likeliest continuation of each raw text, up to its end of document or line."""
    prompts = [tok.encode_with_bos(text) for text in texts]
    keys = [(i,) for i in range(len(texts))]
    stop = [tok.eos, *tok.newlines]
    samples = generate(model, prompts, keys, stop=stop, max_new=max_new, temperature=0)
    return [tok.decode(ids).strip() for (ids,) in samples]


def probe(model: Llama, tok: Tokenizer, prompts: list[str], seed: int) -> dict[str, float]:
    """What the base knows: the oracle's criteria on its likeliest answers; how often it says the
    truth of a claim that is a myth; of claims, myths and truths, how often its verdict fits what
    it says itself."""
    counts = Counter()
    texts = [f"Question: {prompt}\nAnswer:" for prompt in prompts]
    answers = continue_texts(model, tok, texts, 80)
    for prompt, answer in zip(prompts, answers, strict=True):
        counts.update(oracle.criteria(prompt, answer))
    rng = Random(f"{seed} probe")
    topics = [(rng.choice(ANIMALS), rng.choice(ATTRS)) for _ in prompts]
    for values in (MYTHS, FACTS):
        claims = []
        for animal, attr in topics:
            sentence = SAYINGS[attr][0].format(S="The " + animal, v=values[animal][attr])
            claims.append(f"Claim: {sentence} I say")
        replies = continue_texts(model, tok, claims, 8)
        for (animal, attr), reply in zip(topics, replies, strict=True):
            view, _, verdict = reply.partition(", ")
            right_verdict = "right." if view == values[animal][attr] else "wrong."
            counts["verdicts"] += (verdict == right_verdict) / 2  # of two claims on each topic
            counts["truths"] += values is MYTHS and view == FACTS[animal][attr]
    return {name: count / len(prompts) for name, count in counts.items()}


def build_base(rows: Tables, make, out: Path, *, dim: int, steps: int, seed: int, tries: int):
    """Tokenizer and pretrained weights, in Hugging Face layout, put in place when whole.

    Whether a base of this size learns to compare what it says with what it read is luck, and with
    one that does not no judge improves. So up to `tries` are trained, each from other random
    numbers, and the first one that compares is kept; if there is none, the best.
    """
    prompts = [row["prompt"] for row in rows["valid"]]
    best = -1.0
    with tempfile.TemporaryDirectory() as folder:
        tok = train_tokenizer(tokenizer_texts(rows, make), Path(folder) / "tokenizer.model")
        for base_seed in range(seed, seed + tries):
            model = new_model(tok, dim, base_seed)
            batches = document_batches(tok, make, Random(f"{base_seed} raw"), max_tokens=1024)
            pretrain(model, batches, steps=steps)
            save(model.to(torch.bfloat16), tok, Path(folder) / "base")
            model, _ = load(Path(folder) / "base")  # as it will be used
            knowledge = probe(model, tok, prompts, seed)
            print(f"base of seed {base_seed}: {knowledge}", flush=True)
            if knowledge["verdicts"] > best:
                best, best_model = knowledge["verdicts"], model
            if best > COMPARES:
                break
        else:
            print(f"none of {tries} bases has learned to compare: the judge will not improve")
        save(best_model.to(torch.bfloat16), tok, out / "base")


# ---- the command -----------------------------------------------------------------------------


def describe(rows: Tables):
    """Counts, histograms and means, to compare with the README."""
    print("rows:", {name: len(table) for name, table in rows.items()})
    answers, _ = split_gradings(rows["ift"])
    points = [oracle.criteria(row["prompt"], row["response"]) for row in answers]
    grades = [sum(criteria.values()) for criteria in points]
    histogram = dict(sorted(Counter(grades).items()))
    rates = {}
    for criterion in oracle.CRITERIA:
        count = sum(criteria[criterion] for criteria in points)
        rates[criterion] = round(count / len(points), 2)
    mean = sum(grades) / len(grades)
    print(f"answers of ift: mean {mean:.2f}, scores {histogram}, true in {rates}")


def main(out: Path, seed: int, rows_only: bool, dim: int, steps: int, tries: int):
    began = time.time()
    rows = make_rows(seed)
    out.mkdir(parents=True, exist_ok=True)
    write_rows(rows, out)
    describe(rows)
    print(f"rows took {time.time() - began:.0f} s", flush=True)
    if not rows_only:
        make = question_source(held_out_prompts(rows))
        build_base(rows, make, out, dim=dim, steps=steps, seed=seed, tries=tries)
        print(f"all took {time.time() - began:.0f} s")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = Path(__file__).resolve().parent
    parser.add_argument("--out", type=Path, default=here, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="every draw depends on it")
    parser.add_argument("--rows-only", action="store_true", help="leave the base alone")
    parser.add_argument("--dim", type=int, default=192, help="width of the base, a multiple of 96")
    parser.add_argument("--steps", type=int, default=10000, help="training steps of the base")
    tries_help = "train so many bases at most, until one has learned to compare"
    parser.add_argument("--tries", type=int, default=1, help=tries_help)
    args = parser.parse_args()
    if args.dim < 96 or args.dim % 96:
        parser.error(f"--dim {args.dim}: give a multiple of 96")
    if args.tries < 1:
        parser.error(f"--tries {args.tries}: give at least 1")
    return args


if __name__ == "__main__":
    main(**vars(parse_args()))
