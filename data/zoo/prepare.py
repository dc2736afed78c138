"""Make the zoo: its rows, its two templates, and M0, the small Llama that stands in for Llama 2 base.

    python data/zoo/prepare.py               # everything; the base takes most of the time
    python data/zoo/prepare.py --rows-only   # all but the base, in seconds

Rows and templates are the ones that train.py reads (formats: README.md here). People are simulated: their answers
leave things out, state myths, stray, ramble and stumble, each fault at its own rate and independent of the others,
and as often making an answer too long as too short. Judgements recall the truth before each verdict, so that every
step of them is a copy, a look-up or a comparison. The base reads raw documents only: it never sees the chat
format, the judge's template or a score.

Left out: anything random that does not hang on --seed. (The weights also hang on the machine's arithmetic.)
"""

import argparse
import json
import math
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]  # oracle.py lies beside us, model.py on top of the repository

import oracle  # noqa: E402
from oracle import ANIMALS, ATTRS, FACTS, FILLERS, MYTHS, SAYINGS, VALUES, Ask, Fact  # noqa: E402

from model import CONFIGS, Llama, Tokenizer, save  # noqa: E402
from sample import generate  # noqa: E402

SIZES = {"test": 512, "valid": 128, "eft_eval": 96, "eft_ranked": 96, "ift": 1000, "eft": 6000}
RESPONSES = 4  # per ranked prompt
SHOTS = 8  # questions that the writer of new prompts is shown

JUDGE = """Grade the answer, one point each: relevance, only the animals asked; coverage, all that was asked; \
usefulness, no wrong fact; clarity, no empty talk or repeats; expertise, one more right fact. \
Explain, then end with the line Score: <n>
Question: {prompt}
Answer: {response}
"""
PROPOSE = "".join(f"Question: {{{i}}}\n" for i in range(1, SHOTS + 1)) + "Question:"

# ---- questions


def enumerate_words(words, article="the ") -> str:
    """("home", "food", "skill")  ->  "the home, the food and the skill" """
    *head, last = (article + word for word in words)
    return f"{', '.join(head)} and {last}" if head else last


def make_question(rng: random.Random) -> str:
    """One question in one of the patterns of oracle.py: one, two or three attributes, two animals, or open."""
    kind = rng.choices(("one", "two", "three", "compare", "open"), (18, 24, 24, 22, 12))[0]
    animals = enumerate_words(rng.sample(ANIMALS, 2 if kind == "compare" else 1))
    attrs = rng.sample(ATTRS, {"two": 2, "three": 3}.get(kind, 1))
    if kind == "open":
        return rng.choice(oracle.OPEN).format(animals=animals)
    if kind in ("one", "two") and rng.random() < 0.7:
        parts = [rng.choice(oracle.DIRECT[a]).format(S=s)[:-1] for a, s in zip(attrs, (animals, "it"), strict=False)]
        return " and ".join([parts[0], *(part[0].lower() + part[1:] for part in parts[1:])]) + "?"
    if kind == "compare" and rng.random() < 0.6:
        return rng.choice(oracle.COMPARE).format(animals=animals, attrs=attrs[0])
    return rng.choice(oracle.NAMED).format(animals=animals, attrs=enumerate_words(attrs))


def key_of(ask: Ask):
    """What a question asks for, whatever its words; None where only the words can be held out."""
    animals, attrs = ask
    return None if attrs is None or oracle.num_asked(ask) == 1 else (frozenset(animals), frozenset(attrs))


def hold_out(rng: random.Random, num: int) -> list[str]:
    questions = {}
    while len(questions) < num:
        questions[make_question(rng)] = None
    return list(questions)


def question_source(held: list[str]):
    """A maker of questions that avoids the held-out ones, in these and in other words."""
    texts, keys = set(held), {key_of(oracle.parse_prompt(text)) for text in held} - {None}

    def make(rng: random.Random) -> str:
        while (text := make_question(rng)) in texts or key_of(oracle.parse_prompt(text)) in keys:
            pass
        return text

    return make


# ---- answers of people

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


def choose_beliefs() -> set[tuple[str, str]]:
    """Facts whose myth is widely believed: what people say most often is then not what is true, so that a model of
    people stays wrong however sure it is of its words."""
    facts = [(animal, attr) for animal in ANIMALS for attr in ATTRS]
    return set(random.Random("beliefs").sample(facts, len(facts) * 2 // 5))


BELIEVED = choose_beliefs()


def plan_answer(rng: random.Random, ask: Ask, rates: dict[str, float]) -> list[tuple[str, str] | None]:
    """What to talk about, sentence by sentence: (animal, attribute), or None for talk without facts."""
    animals, attrs = ask
    asked = [(n, a) for n in animals for a in attrs or rng.sample(ATTRS, oracle.OPEN_FACTS)]
    plan = list(asked)

    def insert(item):
        plan.insert(rng.randint(min(1, len(plan)), len(plan)), item)

    def unsaid():
        """A fact not asked for and not yet in the plan; all being told, one told before."""
        return rng.choice([(n, a) for n in animals for a in ATTRS if (n, a) not in asked + plan] or plan)

    if rng.random() < rates["drop"]:
        plan.pop(rng.randrange(len(plan)))
        if len(plan) > 1 and rng.random() < 0.3:
            plan.pop(rng.randrange(len(plan)))
        if not plan:
            plan.append(unsaid() if rng.random() < 0.6 else None)
    if rng.random() < rates["extra"]:
        for _ in range(rng.choice((1, 1, 1, 2))):
            insert(unsaid())
    if rng.random() < rates["ramble"]:
        mixed = rng.random() < 0.4
        for _ in range(len(asked) + oracle.SPARE_FACTS + rng.choice((1, 2, 3)) - len(plan)):
            insert(rng.choice((unsaid(), rng.choice(plan), None)) if mixed else unsaid())
    if rng.random() < rates["repeat"]:
        insert(rng.choice(plan))
    if rng.random() < rates["filler"]:
        plan.insert(rng.choice((0, len(plan), rng.randint(0, len(plan)))), None)
    if rng.random() < rates["stray"]:
        other = rng.choice([n for n in ANIMALS if n not in animals])
        if rng.random() < 0.5:
            insert((other, rng.choice(ATTRS)))
        else:
            begin = rng.randrange(len(plan))
            plan[begin:] = [item and (other, item[1]) for item in plan[begin:]]
    return plan


def break_sentence(rng: random.Random, sentence: str) -> str:
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


def write_answer(rng: random.Random, prompt: str, rates: dict[str, float]) -> str:
    """An answer as a person gives it, with faults at the given rates."""
    plan = plan_answer(rng, oracle.parse_prompt(prompt), rates)
    wrong = {item for item in plan if rng.random() < rates["believed" if item in BELIEVED else "wrong"]}
    sentences, last = [], None
    for item in plan:
        if item is None:
            sentences.append(rng.choice(FILLERS))
            continue
        animal, attr = item
        value = (MYTHS if item in wrong else FACTS)[animal][attr]
        if item in wrong and rng.random() < 0.15:
            value = rng.choice([v for v in VALUES[attr] if v != FACTS[animal][attr]])
        subject = "It" if animal == last and rng.random() < 0.85 else "The " + animal
        sentences.append(rng.choice(SAYINGS[attr]).format(S=subject, v=value))
        last = animal
    if rng.random() < rates["broken"]:
        i = rng.randrange(len(sentences))
        sentences[i] = break_sentence(rng, sentences[i])
    return " ".join(sentences)


def write_varied(rng: random.Random, prompt: str) -> str:
    """An answer from anywhere between hopeless and perfect: what a judge must be able to tell apart."""
    kind = rng.random()
    if kind < 0.04:
        words = " ".join(rng.sample(FILLERS, rng.choice((1, 2))))
        return rng.choice((words, break_sentence(rng, words.split(".")[0] + ".")))
    if kind < 0.30:
        return write_answer(rng, prompt, HUMAN)
    if kind < 0.72:
        scale = rng.uniform(0.2, 1.9)
        return write_answer(rng, prompt, {k: p * scale for k, p in FAULTS.items()} | {"extra": rng.uniform(0, 0.6)})
    good = dict.fromkeys(FAULTS, 0.0) | {"extra": 0.5}
    return write_answer(rng, prompt, good | {rng.choice(("ramble", "ramble", "ramble", *FAULTS)): 0.4})


# ---- judgements


def names(ask: Ask) -> list[str]:
    """What was asked, one name per fact: ["otter home", "otter food"], or ["3 otter facts"]."""
    animals, attrs = ask
    if attrs is None:
        return [f"{oracle.OPEN_FACTS} {' '.join(animals)} facts"]
    return [f"{animal} {attr}" for animal in animals for attr in attrs]


def check(item: Fact | str, roles=True) -> str:
    """Recall the truth, then compare: "otter home woods, truth rivers, wrong"."""
    if isinstance(item, str):
        return item
    role = "" if item.role == "asked" or not roles else ", " + item.role
    verdict = "right" if item.right else "wrong"
    return f"{item.animal} {item.attr} {item.value}, truth {item.truth}, {verdict}{role}"


def review(prompt: str, response: str) -> str:
    """The first half of a judgement: what was asked, what was given, and is it true."""
    ask = oracle.parse_prompt(prompt)
    items = oracle.read_answer(response, ask)
    given = "; ".join(map(check, items)) or "nothing"
    return f"Asked: {', '.join(names(ask))}. Given: {given}. Sentences {len(items)}, asked {oracle.num_asked(ask)}."


def judgement(prompt: str, response: str) -> str:
    """The oracle's grade, with its reasons in words: the review, five verdicts with a running total, the score."""
    ask = oracle.parse_prompt(prompt)
    items = oracle.read_answer(response, ask)
    points = oracle.judge_items(items, ask)
    facts = [item for item in items if isinstance(item, Fact)]
    told = {f"{fact.animal} {fact.attr}" for fact in facts}
    if ask[1] is None and points["coverage"]:
        told.update(names(ask))
    roles = [fact.role for fact in facts]
    blots = (
        ("too long", len(items) > oracle.num_asked(ask) + oracle.SPARE_FACTS),
        ("empty talk", "empty talk" in items),
        ("unclear", "unclear" in items),
        ("repeats", True),
    )
    why_not = {
        "relevance": "stray" if "stray" in roles else "no",
        "usefulness": "wrong" if facts else "no",
        "clarity": next(reason for reason, applies in blots if applies) if items else "no",
        "expertise": "no",
    }
    words = {name: "yes" if points[name] else why for name, why in why_not.items()}
    words["coverage"] = ", ".join(f"{name} {'yes' if name in told else 'no'}" for name in names(ask))
    total, verdicts = 0, []
    for name, point in points.items():
        total += point
        verdicts.append(f"{name.capitalize()}: {words[name]}, {total}.")
    return f"{review(prompt, response)} {' '.join(verdicts)}\nScore: {total}"


# ---- rows


def held_out(rows: dict[str, list[dict]]) -> list[str]:
    """The questions that nothing may be trained on."""
    return [row["prompt"] for name in ("test", "valid", "eft_eval") for row in rows[name]]


def ranked_row(rng: random.Random, prompt: str) -> dict | None:
    """Four answers with their dense ranks, best 0; None when all are equally good."""
    responses = {}
    while len(responses) < RESPONSES:
        responses[write_varied(rng, prompt)] = None
    grades = [oracle.grade(prompt, response) for response in responses]
    order = sorted(set(grades), reverse=True)
    ranks = [order.index(g) for g in grades]
    return {"prompt": prompt, "responses": list(responses), "ranks": ranks} if len(order) > 1 else None


def make_rows(seed: int) -> dict[str, list[dict]]:
    """All rows by file name. Held-out questions come first, so that no training row can hold one."""
    rngs = {name: random.Random(f"{seed} {name}") for name in ("held", *SIZES)}
    held = hold_out(rngs["held"], SIZES["test"] + SIZES["valid"] + 2 * SIZES["eft_eval"])
    make, rest = question_source(held), iter(held)
    rows = {name: [{"prompt": next(rest)} for _ in range(SIZES[name])] for name in ("test", "valid")}
    sources = {"eft_eval": lambda rng: next(rest), "eft_ranked": make}
    for name, source in sources.items():
        rows[name] = []
        while len(rows[name]) < SIZES[name]:
            if row := ranked_row(rngs[name], source(rngs[name])):
                rows[name].append(row)
    ift, eft = {}, {}
    while len(ift) < SIZES["ift"]:
        prompt = make(rngs["ift"])
        ift[prompt] = {"prompt": prompt, "response": write_answer(rngs["ift"], prompt, HUMAN)}
    while len(eft) < SIZES["eft"]:
        prompt = make(rngs["eft"])
        response = write_varied(rngs["eft"], prompt)
        row = {"prompt": prompt, "response": response, "judgement": judgement(prompt, response)}
        eft[prompt, response] = row
    return rows | {"ift": list(ift.values()), "eft": list(eft.values())}


def write_rows(rows: dict[str, list[dict]], out: Path):
    for name, data in rows.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in data)
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    (out / "judge.txt").write_text(JUDGE, encoding="utf-8")
    (out / "propose.txt").write_text(PROPOSE, encoding="utf-8")


# ---- the base


def make_document(rng: random.Random, make) -> str:
    """Raw text as a crawler finds it: encyclopedia, forum, fact checks, and now and then a list of questions."""
    kind = rng.choices(("facts", "forum", "claims", "note", "checked", "list"), (9, 22, 12, 17, 36, 4))[0]
    animal = rng.choice(ANIMALS)
    if kind == "facts":
        attrs = rng.sample(ATTRS, rng.randint(2, 6))
        subjects = ["The " + animal, *(rng.choice(("It", "The " + animal)) for _ in attrs[1:])]
        pairs = zip(attrs, subjects, strict=True)
        return " ".join(rng.choice(SAYINGS[a]).format(S=s, v=FACTS[animal][a]) for a, s in pairs)
    if kind == "claims":
        return "\n".join(make_claim(rng) for _ in range(rng.randint(1, 3)))
    if kind == "list":
        return "\n".join("Question: " + make(rng) for _ in range(SHOTS + 2))
    prompt = make(rng)
    response = write_answer(rng, prompt, HUMAN) if kind == "forum" else write_varied(rng, prompt)
    if kind == "note":
        items = oracle.read_answer(response, oracle.parse_prompt(prompt))
        return f"Note: {response}\nGiven: {'; '.join(check(item, roles=False) for item in items)}."
    text = f"Question: {prompt}\nAnswer: {response}"
    return f"{text}\n{review(prompt, response)}" if kind == "checked" else text


def make_claim(rng: random.Random) -> str:
    animal, attr = rng.choice(ANIMALS), rng.choice(ATTRS)
    truth = FACTS[animal][attr]
    value = rng.choice((truth, truth, MYTHS[animal][attr], rng.choice(VALUES[attr])))
    sentence = rng.choice(SAYINGS[attr]).format(S="The " + animal, v=value)
    return f"Claim: {sentence}\nGiven: {check(Fact(animal, attr, value, truth, 'asked'))}."


def train_tokenizer(rows: dict[str, list[dict]], make, path: Path) -> Tokenizer:
    """A BPE of the zoo's words; chat format and judge's template are in its text, so that they are few tokens."""
    rng = random.Random("tokenizer")
    texts = [make_document(rng, make) for _ in range(6000)]
    texts += [f"[INST] {row['prompt']} [/INST] {row['response']}" for row in rows["ift"]]
    for row in rows["eft"][:1500]:
        asked = JUDGE.replace("{prompt}", row["prompt"]).replace("{response}", row["response"])
        texts.append(f"[INST] {asked.strip()} [/INST] {row['judgement']}")
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=file,
            model_type="bpe",
            vocab_size=CONFIGS["toy"].vocab_size,
            byte_fallback=True,
            user_defined_symbols=["\n"],
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
    return Tokenizer(path)


def fresh_model(tok: Tokenizer, seed: int) -> Llama:
    """A Llama that learns fast when small: each matrix scaled by its fan-in, the residual branches damped, and
    the embedding as large as if it were multiplied by sqrt(D)."""
    torch.manual_seed(seed)
    model = Llama(replace(CONFIGS["toy"], vocab_size=tok.size))
    for name, p in model.named_parameters():
        if "embed_tokens" in name:
            torch.nn.init.normal_(p, std=0.02 * model.cfg.dim**0.5)
        elif p.dim() == 2:
            damping = (2 * model.cfg.layers) ** -0.5 if "o_proj" in name or "down_proj" in name else 1.0
            torch.nn.init.normal_(p, std=p.shape[1] ** -0.5 * damping)
    return model


def batches(tok: Tokenizer, make, rng: random.Random, max_tokens: int):
    """Endless (B, T) token batches, one document per row, right-padded with -1; documents of like length together."""
    while True:
        docs = [[*tok.raw(make_document(rng, make)), tok.eos] for _ in range(4096)]
        docs.sort(key=len)
        cuts = []
        while docs:
            longest = len(docs[-1])
            cuts.append([docs.pop() for _ in range(min(len(docs), max(1, max_tokens // longest)))])
        rng.shuffle(cuts)
        for cut in cuts:
            yield torch.nn.utils.rnn.pad_sequence([torch.tensor(doc) for doc in cut], True, -1)


def pretrain(model: Llama, tok: Tokenizer, make, *, steps: int, seed: int, max_tokens=1024, lr=1.7e-3):
    """Next-token prediction on raw documents. Small batches: copying a name into an answer is learned after many
    steps, not after many tokens."""
    embedding = model.embed_tokens.weight
    rest = [p for p in model.parameters() if p is not embedding]
    groups = [{"params": rest, "scale": 1.0}, {"params": [embedding], "scale": model.cfg.dim**0.5}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    data, mean, start = batches(tok, make, random.Random(f"{seed} raw"), max_tokens), None, time.time()
    for step in range(steps):
        rate = lr * min((step + 1) / 200, 0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        tokens = next(data)
        logits = model(tokens[:, :-1].clamp(min=0))
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=-1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if (step + 1) % 500 == 0 or step + 1 == steps:
            print(f"step {step + 1}/{steps}  loss {mean:.3f}  {time.time() - start:.0f} s", flush=True)


def greedy(model: Llama, tok: Tokenizer, texts: list[str], max_new: int) -> list[str]:
    """The likeliest continuation of each raw text, up to its end of document or line."""
    prompts, keys = [tok.raw(text) for text in texts], [(i,) for i in range(len(texts))]
    drawn = generate(model, prompts, keys, stop=[tok.eos, *tok.newlines], max_new=max_new, temperature=0)
    return [tok.decode(ids).strip() for (ids,) in drawn]


def probe(model: Llama, tok: Tokenizer, prompts: list[str], seed: int) -> dict[str, float]:
    """What the base knows: the oracle on its greedy answers, and how many fact checks it gets wholly right."""
    found, rng = Counter(), random.Random(f"{seed} probe")
    answers = greedy(model, tok, [f"Question: {prompt}\nAnswer:" for prompt in prompts], 80)
    for prompt, answer in zip(prompts, answers, strict=True):
        found.update(oracle.criteria(prompt, answer))
    claims, givens = zip(*(make_claim(rng).split("\n") for _ in prompts), strict=True)
    checks = greedy(model, tok, [claim + "\nGiven:" for claim in claims], 24)
    found["checks"] = sum(c == given.removeprefix("Given: ") for c, given in zip(checks, givens, strict=True))
    return {name: count / len(prompts) for name, count in found.items()}


def build_base(rows: dict[str, list[dict]], make, out: Path, *, steps: int, seed: int):
    """Tokenizer and pretrained weights, in Hugging Face layout, put in place when whole."""
    with tempfile.TemporaryDirectory() as folder:
        tok = train_tokenizer(rows, make, Path(folder) / "tokenizer.model")
        model = fresh_model(tok, seed)
        pretrain(model, tok, make, steps=steps, seed=seed)
        save(model, tok, out / "base", torch.bfloat16)
    print(probe(model, tok, [row["prompt"] for row in rows["valid"]], seed))


# ---- what was made


def describe(rows: dict[str, list[dict]]):
    """Counts, histograms and means, to compare with the README."""
    print("rows:", {name: len(data) for name, data in rows.items()})
    for name in ("ift", "eft"):
        points = [oracle.criteria(row["prompt"], row["response"]) for row in rows[name]]
        grades = [sum(p.values()) for p in points]
        rates = {key: round(sum(p[key] for p in points) / len(points), 2) for key in points[0]}
        histogram = dict(sorted(Counter(grades).items()))
        print(f"{name}: mean {sum(grades) / len(grades):.2f}, scores {histogram}, true in {rates}")


def main(out: Path, seed: int, rows_only: bool, steps: int):
    start = time.time()
    rows = make_rows(seed)
    out.mkdir(parents=True, exist_ok=True)
    write_rows(rows, out)
    describe(rows)
    print(f"rows took {time.time() - start:.0f} s", flush=True)
    if not rows_only:
        build_base(rows, question_source(held_out(rows)), out, steps=steps, seed=seed)
        print(f"all took {time.time() - start:.0f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="every draw hangs on it")
    parser.add_argument("--rows-only", action="store_true", help="leave the base alone")
    parser.add_argument("--steps", type=int, default=12000, help="training steps of the base")
    main(**vars(parser.parse_args()))
