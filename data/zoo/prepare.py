"""Make the zoo: its rows, its two templates, and M0, the small Llama that stands in for Llama 2.

    python -m data.zoo.prepare                # everything; the base takes most of the time
    python -m data.zoo.prepare --rows-only    # all but the base, in seconds

Rows and templates are the ones that train.py reads (formats: README.md here). People are
simulated: their answers leave things out, state myths, stray, ramble and stumble. Each fault has
its own rate and is independent of the others, and as often makes an answer too long as too short.
Judgements recall the truth before each verdict, so that every step of them is a copy, a look-up
or a comparison. The base reads raw documents only: it never sees the chat format, the judge's
template or a score.

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
from data.zoo.oracle import ANIMALS, ATTRS, FACTS, FILLERS, MYTHS, SAYINGS, VALUES, Ask, Fact
from dpo import IGNORE
from model import Llama, ModelConfig, Tokenizer, load, save
from sample import generate

SIZES = {  # rows of each file
    "test": 512,
    "valid": 128,
    "eft_eval": 96,
    "eft_ranked": 96,
    "ift": 1000,
    "eft": 6000,
}
HELD_OUT = ("test", "valid", "eft_eval")
RESPONSES = 4  # per ranked prompt
EXAMPLES = 8  # questions that the writer of new prompts is shown
VOCABULARY = 1024

Tables = dict[str, list[dict]]  # the rows of each file
Rates = dict[str, float]  # how often each fault is made
Items = list[Fact | str]  # what oracle.py reads in an answer

JUDGE = (
    "Grade the answer, one point each: relevance, only the animals asked; coverage, all that was "
    "asked; usefulness, no wrong fact; clarity, no empty talk or repeats; expertise, one more "
    "right fact. Explain, then end with the line Score: <n>\n"
    "Question: {prompt}\n"
    "Answer: {response}\n"
)
PLACEHOLDERS = [f"{{{i}}}" for i in range(1, EXAMPLES + 1)]
PROPOSE = "".join(f"Question: {place}\n" for place in PLACEHOLDERS) + "Question:"

# ---- questions -------------------------------------------------------------------------------

QUESTION_KINDS = {  # how often, in percent
    "one": 18,  # one attribute of an animal
    "two": 24,
    "three": 24,
    "compare": 22,  # one attribute of two animals
    "open": 12,  # any facts about an animal
}


def enumerate_words(words: list[str], article: str = "the ") -> str:
    """("home", "food", "skill")  ->  "the home, the food and the skill" """
    *first_words, last_word = (article + word for word in words)
    if not first_words:
        return last_word
    return f"{', '.join(first_words)} and {last_word}"


def make_question(rng: Random) -> str:
    """A question of one of oracle.py's patterns: one to three attributes, two animals, or open."""
    kind = draw_kind(rng, QUESTION_KINDS)
    animals = enumerate_words(rng.sample(ANIMALS, 2 if kind == "compare" else 1))
    attrs = rng.sample(ATTRS, {"two": 2, "three": 3}.get(kind, 1))
    if kind == "open":
        return rng.choice(oracle.OPEN).format(animals=animals)
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
    """What is asked, in whatever words. None for one fact or an open question: these are few, so
    that only their words can be held out."""
    animals, attrs = ask
    if attrs is None or oracle.num_asked(ask) == 1:
        return None
    return frozenset(animals), frozenset(attrs)


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
    "drop": 0.34,  # leave out something that was asked
    "stray": 0.23,  # talk of another animal
    "wrong": 0.04,  # state a myth, per fact
    "believed": 0.45,  # the same where the myth is widely believed
    "ramble": 0.20,  # say much too much
    "repeat": 0.12,  # say a thing twice
    "filler": 0.14,  # talk without facts
    "broken": 0.12,  # spoil a sentence
}
HUMAN = FAULTS | {"extra": 0.32}  # a fact more than asked is no fault

Topic = tuple[str, str] | None  # (animal, attribute); None: talk without facts
Plan = list[Topic]


def choose_beliefs() -> set[tuple[str, str]]:
    """Facts whose myth is widely believed: what people say most often is then not what is true.
    So a model of people stays wrong however sure it is of its words."""
    facts = [(animal, attr) for animal in ANIMALS for attr in ATTRS]
    return set(Random("beliefs").sample(facts, len(facts) * 2 // 5))


BELIEVED = choose_beliefs()


def plan_answer(rng: Random, ask: Ask, rates: Rates) -> Plan:
    """What to talk about, sentence by sentence, with the faults of `rates`."""
    topics = choose_topics(rng, ask)
    plan = list(topics)
    if rng.random() < rates["drop"]:
        drop_topics(rng, plan, topics, ask)
    if rng.random() < rates["extra"]:
        for _ in range(rng.choice((1, 1, 1, 2))):
            insert_topic(rng, plan, new_topic(rng, plan, topics, ask))
    if rng.random() < rates["ramble"]:
        ramble(rng, plan, topics, ask)
    if rng.random() < rates["repeat"]:
        insert_topic(rng, plan, rng.choice(plan))
    if rng.random() < rates["filler"]:
        anywhere = rng.randint(0, len(plan))
        plan.insert(rng.choice((0, len(plan), anywhere)), None)
    if rng.random() < rates["stray"]:
        stray(rng, plan, ask)
    return plan


def choose_topics(rng: Random, ask: Ask) -> Plan:
    """All that was asked; for an open question any of the animal's facts."""
    animals, attrs = ask
    topics = []
    for animal in animals:
        for attr in attrs or rng.sample(ATTRS, oracle.OPEN_FACTS):
            topics.append((animal, attr))
    return topics


def insert_topic(rng: Random, plan: Plan, topic: Topic):
    """Insert it anywhere but in front of the first."""
    plan.insert(rng.randint(min(1, len(plan)), len(plan)), topic)


def new_topic(rng: Random, plan: Plan, topics: Plan, ask: Ask) -> Topic:
    """A fact neither asked for nor in the plan; if there is no such fact, one of the plan."""
    facts = [(animal, attr) for animal in ask[0] for attr in ATTRS]
    new_facts = [fact for fact in facts if fact not in topics + plan]
    return rng.choice(new_facts or plan)


def drop_topics(rng: Random, plan: Plan, topics: Plan, ask: Ask):
    """Leave out one or two of the topics; where nothing is left, say something else."""
    plan.pop(rng.randrange(len(plan)))
    if len(plan) > 1 and rng.random() < 0.3:
        plan.pop(rng.randrange(len(plan)))
    if not plan:
        topic = new_topic(rng, plan, topics, ask) if rng.random() < 0.6 else None
        plan.append(topic)


def ramble(rng: Random, plan: Plan, topics: Plan, ask: Ask):
    """Go on until the answer is too long, with more facts or with facts, repeats and fillers."""
    is_mixed = rng.random() < 0.4
    length = len(topics) + oracle.SPARE_FACTS + rng.choice((1, 2, 3))
    for _ in range(length - len(plan)):
        topic = new_topic(rng, plan, topics, ask)
        if is_mixed:
            topic = rng.choice((topic, rng.choice(plan), None))
        insert_topic(rng, plan, topic)


def stray(rng: Random, plan: Plan, ask: Ask):
    """Say one thing of another animal, or go on about that one from some sentence on."""
    other = rng.choice([animal for animal in ANIMALS if animal not in ask[0]])
    if rng.random() < 0.5:
        insert_topic(rng, plan, (other, rng.choice(ATTRS)))
        return
    for i in range(rng.randrange(len(plan)), len(plan)):
        if plan[i]:
            plan[i] = (other, plan[i][1])


def break_sentence(rng: Random, sentence: str) -> str:
    """Spoil a sentence as a hasty writer does."""
    words = sentence.split(" ")
    i = rng.randrange(1, len(words))
    kind = rng.choice(("missing", "doubled", "cut", "stop", "nonsense"))
    if kind == "missing":
        words.pop(i)
    elif kind == "doubled":
        words.insert(i, words[i].rstrip("."))
    elif kind == "cut":
        del words[i:]
    elif kind == "stop":
        words[-1] += "."
    else:
        words[-1] = rng.choice(VALUES[rng.choice(ATTRS)]) + "."
    return " ".join(words)


def choose_errors(rng: Random, plan: Plan, rates: Rates) -> set[Topic]:
    """The topics of the plan about which this person is wrong."""
    errors = set()
    for topic in plan:
        rate = rates["believed" if topic in BELIEVED else "wrong"]
        if rng.random() < rate:
            errors.add(topic)
    return errors


def choose_value(rng: Random, topic: Topic, is_wrong: bool) -> str:
    """The truth; or what is told instead of it: a myth, sometimes anything else."""
    animal, attr = topic
    truth = FACTS[animal][attr]
    if not is_wrong:
        return truth
    if rng.random() < 0.15:
        return rng.choice([value for value in VALUES[attr] if value != truth])
    return MYTHS[animal][attr]


def write_answer(rng: Random, prompt: str, rates: Rates) -> str:
    """An answer as a person gives it, with faults at the given rates."""
    plan = plan_answer(rng, oracle.parse_prompt(prompt), rates)
    errors = choose_errors(rng, plan, rates)
    sentences, last_animal = [], None
    for topic in plan:
        if topic is None:
            sentences.append(rng.choice(FILLERS))
            continue
        animal, attr = topic
        value = choose_value(rng, topic, topic in errors)
        subject = "The " + animal
        if animal == last_animal and rng.random() < 0.85:
            subject = "It"
        sentences.append(rng.choice(SAYINGS[attr]).format(S=subject, v=value))
        last_animal = animal
    if rng.random() < rates["broken"]:
        i = rng.randrange(len(sentences))
        sentences[i] = break_sentence(rng, sentences[i])
    return " ".join(sentences)


def write_varied(rng: Random, prompt: str) -> str:
    """An answer from hopeless to perfect: what a judge must be able to tell apart."""
    kind = rng.random()
    if kind < 0.04:
        return write_empty(rng)
    if kind < 0.30:
        return write_answer(rng, prompt, HUMAN)
    if kind < 0.72:
        scale = rng.uniform(0.2, 1.9)
        rates = {fault: rate * scale for fault, rate in FAULTS.items()}
        rates["extra"] = rng.uniform(0, 0.6)
        return write_answer(rng, prompt, rates)
    rates = dict.fromkeys(FAULTS, 0.0) | {"extra": 0.5}
    rates[rng.choice(("ramble", "ramble", "ramble", *FAULTS))] = 0.4
    return write_answer(rng, prompt, rates)


def write_empty(rng: Random) -> str:
    """An answer without a fact."""
    count = rng.choice((1, 2))
    text = " ".join(rng.sample(FILLERS, count))
    first_sentence = text.split(".")[0] + "."
    return rng.choice((text, break_sentence(rng, first_sentence)))


# ---- judgements ------------------------------------------------------------------------------


def names_of(ask: Ask) -> list[str]:
    """What was asked, one name per fact: ["otter home", "otter food"], or ["3 otter facts"]."""
    animals, attrs = ask
    if attrs is None:
        return [f"{oracle.OPEN_FACTS} {' '.join(animals)} facts"]
    return [f"{animal} {attr}" for animal in animals for attr in attrs]


def check(item: Fact | str, with_role: bool = True) -> str:
    """Recall the truth, then compare: "otter home woods, truth rivers, wrong"."""
    if isinstance(item, str):
        return item
    verdict = "right" if item.right else "wrong"
    text = f"{item.animal} {item.attr} {item.value}, truth {item.truth}, {verdict}"
    if with_role and item.role != "asked":
        text += ", " + item.role
    return text


def review(prompt: str, response: str) -> str:
    """The first half of a judgement: what was asked, what was given, and is it true."""
    ask = oracle.parse_prompt(prompt)
    items = oracle.read_answer(response, ask)
    names = ", ".join(names_of(ask))
    checks = "; ".join(map(check, items)) or "nothing"
    lengths = f"Sentences {len(items)}, asked {oracle.num_asked(ask)}."
    return f"Asked: {names}. Given: {checks}. {lengths}"


def why_unclear(items: Items, ask: Ask) -> str:
    """What an answer without the point for clarity lacks."""
    if not items:
        return "no"
    if len(items) > oracle.num_asked(ask) + oracle.SPARE_FACTS:
        return "too long"
    for fault in ("empty talk", "unclear"):
        if fault in items:
            return fault
    return "repeats"


def explain_coverage(facts: list[Fact], point: int, ask: Ask) -> str:
    """ "otter home yes, otter food no" """
    topics = {f"{fact.animal} {fact.attr}" for fact in facts}
    is_open = ask[1] is None
    words = []
    for name in names_of(ask):
        is_covered = point if is_open else name in topics
        words.append(f"{name} {'yes' if is_covered else 'no'}")
    return ", ".join(words)


def explain(items: Items, points: dict[str, int], ask: Ask) -> dict[str, str]:
    """The verdict on each of the five criteria in words."""
    facts = [item for item in items if isinstance(item, Fact)]
    has_stray = any(fact.role == "stray" for fact in facts)
    why_not = {
        "relevance": "stray" if has_stray else "no",
        "usefulness": "wrong" if facts else "no",
        "clarity": why_unclear(items, ask),
        "expertise": "no",
    }
    words = {name: "yes" if points[name] else reason for name, reason in why_not.items()}
    words["coverage"] = explain_coverage(facts, points["coverage"], ask)
    return words


def write_judgement(prompt: str, response: str) -> str:
    """The oracle's grade with its reasons: review, five verdicts with a running total, score."""
    ask = oracle.parse_prompt(prompt)
    items = oracle.read_answer(response, ask)
    points = oracle.judge_items(items, ask)
    words = explain(items, points, ask)
    parts, total = [review(prompt, response)], 0
    for name, point in points.items():
        total += point
        parts.append(f"{name.capitalize()}: {words[name]}, {total}.")
    return " ".join(parts) + f"\nScore: {total}"


# ---- rows ------------------------------------------------------------------------------------


def held_out_prompts(rows: Tables) -> list[str]:
    """The questions that nothing may be trained on."""
    return [row["prompt"] for name in HELD_OUT for row in rows[name]]


def ranked_row(rng: Random, prompt: str) -> dict | None:
    """Different answers with their dense ranks, best 0; None when all are equally good."""
    responses = {}  # a dict keeps the order
    while len(responses) < RESPONSES:
        responses[write_varied(rng, prompt)] = None
    grades = [oracle.grade(prompt, response) for response in responses]
    order = sorted(set(grades), reverse=True)
    if len(order) == 1:
        return None
    ranks = [order.index(grade) for grade in grades]
    return {"prompt": prompt, "responses": list(responses), "ranks": ranks}


def ranked_rows(rng: Random, make, count: int) -> list[dict]:
    """`count` rankings of answers to the questions that make(rng) gives."""
    rows = []
    while len(rows) < count:
        row = ranked_row(rng, make(rng))
        if row:
            rows.append(row)
    return rows


def ift_rows(rng: Random, make, count: int) -> list[dict]:
    """`count` different questions with people's answers."""
    rows = {}
    while len(rows) < count:
        prompt = make(rng)
        rows[prompt] = {"prompt": prompt, "response": write_answer(rng, prompt, HUMAN)}
    return list(rows.values())


def eft_rows(rng: Random, make, count: int) -> list[dict]:
    """`count` different answers with judgements of them."""
    rows = {}
    while len(rows) < count:
        prompt = make(rng)
        response = write_varied(rng, prompt)
        judgement = write_judgement(prompt, response)
        row = {"prompt": prompt, "response": response, "judgement": judgement}
        rows[prompt, response] = row
    return list(rows.values())


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
    rows["eft_eval"] = ranked_rows(rngs["eft_eval"], lambda rng: next(left), SIZES["eft_eval"])
    rows["eft_ranked"] = ranked_rows(rngs["eft_ranked"], make, SIZES["eft_ranked"])
    rows["ift"] = ift_rows(rngs["ift"], make, SIZES["ift"])
    rows["eft"] = eft_rows(rngs["eft"], make, SIZES["eft"])
    return rows


def write_rows(rows: Tables, out: Path):
    for name, table in rows.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in table]
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    (out / "judge.txt").write_text(JUDGE, encoding="utf-8")
    (out / "propose.txt").write_text(PROPOSE, encoding="utf-8")


# ---- the base --------------------------------------------------------------------------------

DOCUMENT_KINDS = {  # how often, in percent
    "facts": 9,  # an encyclopedia's entry
    "forum": 22,  # a question and a person's answer
    "claims": 12,  # single sentences and their checks
    "note": 17,  # an answer and its check, without the question
    "checked": 36,  # a question, an answer, and the first half of a judgement
    "list": 4,  # questions one after the other
}


def make_document(rng: Random, make) -> str:
    """Raw text as a crawler finds it: encyclopedia, forum, fact checks, or a list of questions."""
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
        return f"Question: {prompt}\nAnswer: {write_answer(rng, prompt, HUMAN)}"
    response = write_varied(rng, prompt)
    if kind == "checked":
        return f"Question: {prompt}\nAnswer: {response}\n{review(prompt, response)}"
    items = oracle.read_answer(response, oracle.parse_prompt(prompt))
    checks = "; ".join(check(item, with_role=False) for item in items)
    return f"Note: {response}\nGiven: {checks}."


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
    """A sentence, half of the time true, and its check."""
    animal, attr = rng.choice(ANIMALS), rng.choice(ATTRS)
    truth = FACTS[animal][attr]
    value = rng.choice((truth, truth, MYTHS[animal][attr], rng.choice(VALUES[attr])))
    sentence = rng.choice(SAYINGS[attr]).format(S="The " + animal, v=value)
    fact = Fact(animal, attr, value, truth, "asked")
    return f"Claim: {sentence}\nGiven: {check(fact)}."


def tokenizer_texts(rows: Tables, make) -> list[str]:
    """The tokenizer's text holds the chat format and the judge's template: they are few tokens."""
    rng = Random("tokenizer")
    texts = [make_document(rng, make) for _ in range(6000)]
    for row in rows["ift"]:
        texts.append(f"[INST] {row['prompt']} [/INST] {row['response']}")
    for row in rows["eft"][:1500]:
        prompt = JUDGE.replace("{prompt}", row["prompt"]).replace("{response}", row["response"])
        texts.append(f"[INST] {prompt.strip()} [/INST] {row['judgement']}")
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
    """A Llama of four layers, `dim` wide: a multiple of 8, for four heads of even size."""
    return ModelConfig(
        vocab_size=tok.size,
        dim=dim,
        layers=4,
        heads=4,
        kv_heads=2,
        ffn=dim * 27 // 10,
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
        logits = model(tokens[:, :-1].clamp(min=0))  # (B, T - 1, V)
        targets = tokens[:, 1:].flatten()
        loss = F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=IGNORE)
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
    """What the base knows: the oracle's criteria on its likeliest answers, and how many fact
    checks it gets right word for word."""
    counts = Counter()
    texts = [f"Question: {prompt}\nAnswer:" for prompt in prompts]
    answers = continue_texts(model, tok, texts, 80)
    for prompt, answer in zip(prompts, answers, strict=True):
        counts.update(oracle.criteria(prompt, answer))
    rng = Random(f"{seed} probe")
    documents = [make_claim(rng) for _ in prompts]
    questions = [document.split("\n")[0] + "\nGiven:" for document in documents]
    checks = continue_texts(model, tok, questions, 24)
    for document, question, text in zip(documents, questions, checks, strict=True):
        counts["checks"] += document == f"{question} {text}"
    return {name: count / len(prompts) for name, count in counts.items()}


def build_base(rows: Tables, make, out: Path, *, dim: int, steps: int, seed: int):
    """Tokenizer and pretrained weights, in Hugging Face layout, put in place when whole."""
    with tempfile.TemporaryDirectory() as folder:
        tok = train_tokenizer(tokenizer_texts(rows, make), Path(folder) / "tokenizer.model")
        model = new_model(tok, dim, seed)
        batches = document_batches(tok, make, Random(f"{seed} raw"), max_tokens=1024)
        pretrain(model, batches, steps=steps)
        save(model.to(torch.bfloat16), tok, out / "base")
    model, tok = load(out / "base")
    prompts = [row["prompt"] for row in rows["valid"]]
    print(probe(model, tok, prompts, seed))


# ---- the command -----------------------------------------------------------------------------


def describe(rows: Tables):
    """Counts, histograms and means, to compare with the README."""
    print("rows:", {name: len(table) for name, table in rows.items()})
    for name in ("ift", "eft"):
        points = [oracle.criteria(row["prompt"], row["response"]) for row in rows[name]]
        grades = [sum(criteria.values()) for criteria in points]
        histogram = dict(sorted(Counter(grades).items()))
        rates = {}
        for criterion in oracle.CRITERIA:
            count = sum(criteria[criterion] for criteria in points)
            rates[criterion] = round(count / len(points), 2)
        mean = sum(grades) / len(grades)
        print(f"{name}: mean {mean:.2f}, scores {histogram}, true in {rates}")


def main(out: Path, seed: int, rows_only: bool, dim: int, steps: int):
    began = time.time()
    rows = make_rows(seed)
    out.mkdir(parents=True, exist_ok=True)
    write_rows(rows, out)
    describe(rows)
    print(f"rows took {time.time() - began:.0f} s", flush=True)
    if not rows_only:
        make = question_source(held_out_prompts(rows))
        build_base(rows, make, out, dim=dim, steps=steps, seed=seed)
        print(f"all took {time.time() - began:.0f} s")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = Path(__file__).resolve().parent
    parser.add_argument("--out", type=Path, default=here, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="every draw depends on it")
    parser.add_argument("--rows-only", action="store_true", help="leave the base alone")
    parser.add_argument("--dim", type=int, default=160, help="width of the base")
    parser.add_argument("--steps", type=int, default=12000, help="training steps of the base")
    args = parser.parse_args()
    if args.dim < 8 or args.dim % 8:
        parser.error(f"--dim {args.dim}: give a multiple of 8")
    return args


if __name__ == "__main__":
    main(**vars(parse_args()))
