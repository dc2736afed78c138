"""The facts of the zoo, and the true quality of an answer about them.

    grade("Where does the otter live?", "The otter lives in rivers.")  ->  4

The zoo is a small world (48 animals, 7 attributes) in which a program can tell how good an answer is, so that a run
can be compared with the truth as the paper compares its models with people and GPT-4. An answer earns one point
each for relevance, coverage, usefulness, clarity and expertise: the five additive criteria of the paper's judge
(section 2.2), each decided here by reading the sentences of the answer. prepare.py writes the human-like seed rows
with it; training never imports it.

Left out: synonyms, spelling, and all English but the phrasings below. A sentence in other words is "unclear".
"""

import random
import re
from typing import NamedTuple

# ---- the facts

ATTRS = ("home", "food", "colour", "time", "group", "skill", "young")
TABLE = """
otter    rivers   fish     brown    dusk   families  diving    pup
owl      woods    mice     grey     night  pairs     hunting   chick
fox      woods    mice     red      dusk   families  hunting   cub
bear     hills    fruit    black    noon   families  climbing  cub
wolf     woods    meat     grey     night  packs     running   pup
seal     seas     fish     grey     noon   colonies  diving    pup
deer     woods    grass    brown    dawn   herds     jumping   fawn
bat      caves    insects  black    night  colonies  flying    pup
eagle    hills    fish     golden   noon   pairs     flying    chick
frog     swamps   insects  green    night  colonies  jumping   baby
mole     farms    worms    black    night  pairs     digging   pup
lion     plains   meat     golden   dusk   families  hunting   cub
camel    deserts  leaves   golden   noon   herds     running   calf
goat     hills    leaves   white    noon   herds     climbing  kid
horse    farms    grass    black    noon   herds     running   foal
panda    hills    leaves   spotted  dusk   pairs     climbing  cub
penguin  seas     fish     black    noon   colonies  diving    chick
parrot   jungles  fruit    green    dawn   flocks    singing   chick
turtle   seas     leaves   green    noon   pairs     swimming  baby
snake    swamps   mice     striped  night  pairs     hiding    baby
whale    seas     fish     grey     noon   families  diving    calf
beaver   rivers   leaves   brown    dusk   families  building  kitten
monkey   jungles  fruit    brown    noon   packs     climbing  baby
bee      farms    seeds    striped  noon   colonies  building  baby
tiger    jungles  meat     striped  dusk   pairs     swimming  cub
zebra    plains   grass    striped  noon   herds     running   foal
hippo    rivers   grass    grey     night  herds     swimming  calf
rhino    plains   grass    grey     dawn   pairs     running   calf
koala    woods    leaves   grey     night  pairs     climbing  baby
sloth    jungles  leaves   brown    night  pairs     hiding    baby
lemur    jungles  fruit    white    dawn   packs     jumping   baby
moose    swamps   roots    brown    dawn   pairs     swimming  calf
rabbit   plains   roots    white    dusk   colonies  digging   kitten
badger   woods    worms    striped  night  families  digging   cub
crow     farms    seeds    black    dawn   flocks    flying    chick
duck     lakes    seeds    green    dawn   flocks    swimming  chick
swan     lakes    roots    white    noon   pairs     building  chick
shark    seas     meat     white    night  packs     hunting   pup
crab     seas     worms    red      night  colonies  hiding    baby
lizard   deserts  insects  spotted  noon   pairs     hiding    baby
sheep    farms    grass    white    dawn   flocks    climbing  lamb
donkey   farms    roots    grey     dawn   herds     climbing  foal
llama    hills    grass    white    dawn   herds     jumping   calf
yak      hills    roots    black    noon   herds     climbing  calf
puma     deserts  meat     golden   night  pairs     jumping   kitten
lynx     caves    mice     spotted  dusk   pairs     hunting   kitten
hare     plains   roots    brown    dusk   pairs     running   baby
heron    lakes    fish     grey     dawn   colonies  hunting   chick
"""
FACTS = {name: dict(zip(ATTRS, row, strict=True)) for name, *row in map(str.split, TABLE.strip().split("\n"))}
ANIMALS = tuple(FACTS)
VALUES = {attr: tuple(sorted({facts[attr] for facts in FACTS.values()})) for attr in ATTRS}
SAYINGS = {  # two phrasings of each fact
    "home": ("{S} lives in {v}.", "{S} is found in {v}."),
    "food": ("{S} eats {v}.", "{S} feeds on {v}."),
    "colour": ("{S} is {v}.", "{S} looks {v}."),
    "time": ("{S} wakes at {v}.", "{S} comes out at {v}."),
    "group": ("{S} moves in {v}.", "{S} gathers in {v}."),
    "skill": ("{S} is good at {v}.", "{S} excels at {v}."),
    "young": ("{S} raises a {v}.", "{S} cares for its {v}."),
}
FILLERS = (
    "I am not sure about this.",
    "What a nice thing to ask.",
    "Animals are great fun.",
    "Let me think for a moment.",
    "Most people know this well.",
    "I hope that helps you.",
    "There is much more to say.",
    "Some say other things.",
)


def make_myths() -> dict[str, dict[str, str]]:
    """One fixed wrong value per fact: what the people of this world wrongly believe, and say again and again."""
    rng = random.Random("myths of the zoo")
    return {n: {a: rng.choice([v for v in VALUES[a] if v != FACTS[n][a]]) for a in ATTRS} for n in ANIMALS}


MYTHS = make_myths()

# ---- the questions

DIRECT = {  # about one attribute; two of them are joined as "Where does the otter live and what does it eat?"
    "home": ("Where does {S} live?", "What place is home to {S}?"),
    "food": ("What does {S} eat?", "What food does {S} like?"),
    "colour": ("What colour is {S}?", "What does {S} look like?"),
    "time": ("When does {S} wake?", "At what time does {S} come out?"),
    "group": ("What company does {S} keep?", "In what group does {S} move?"),
    "skill": ("What is {S} good at?", "What skill does {S} have?"),
    "young": ("What young does {S} raise?", "What does {S} call its young?"),
}
NAMED = (  # one to three attributes by name
    "Tell me {attrs} of {animals}.",
    "Describe {attrs} of {animals}.",
    "Write about {attrs} of {animals}.",
    "Please explain {attrs} of {animals}.",
    "I want to know {attrs} of {animals}.",
)
COMPARE = ("Compare {animals} by {attrs}.", "How do {animals} differ in {attrs}?")
OPEN = (  # any three facts will do
    "Tell me about {animals}.",
    "Write a short note on {animals}.",
    "What do you know about {animals}?",
    "Give me three facts about {animals}.",
    "Introduce {animals} to a child.",
)
OPEN_FACTS = 3
SPARE_FACTS = 2  # an answer may say this much more than was asked before it is too long

Ask = tuple[tuple[str, ...], tuple[str, ...] | None]  # animals, attributes; None: an open question


def either(words) -> str:
    return "(?:" + "|".join(map(re.escape, words)) + ")"


def listed(item: str) -> str:
    return f"{item}(?:(?:,? and |, )(?:of )?{item})*"


def shape(pattern: str) -> re.Pattern:
    """A question pattern as a regular expression that takes any list of animals and any list of attributes."""
    text = re.escape(pattern[:-1]).replace(r"\{", "{").replace(r"\}", "}")
    attrs = "(?P<attrs>" + listed("(?:the )?" + either(ATTRS)) + ")"
    animals = "(?P<animals>" + listed("the " + either(ANIMALS)) + ")"
    return re.compile(text.format(attrs=attrs, animals=animals) + "[.?]?")


SHAPES = [shape(pattern) for pattern in NAMED + COMPARE + OPEN]
DIRECT_SHAPES = [
    (attr, re.compile(re.escape(text[:-1]).replace(r"\{S\}", f"(?:the (?P<animal>{either(ANIMALS)})|it)"), re.I))
    for attr, texts in DIRECT.items()
    for text in texts
]


def parse_prompt(text: str) -> Ask | None:
    """What is asked: (animals, attributes), attributes None for an open question; None if not understood.

    "Where does the otter live and what does it eat?"  ->  (("otter",), ("home", "food"))
    """
    text = text.strip()
    for pattern in SHAPES:
        if match := pattern.fullmatch(text):
            found = match.groupdict()
            animals = tuple(dict.fromkeys(re.findall(either(ANIMALS), found["animals"])))
            attrs = found.get("attrs")
            return animals, attrs and tuple(dict.fromkeys(re.findall(either(ATTRS), attrs)))
    animals, attrs = {}, {}
    for part in re.split(",? and |, ", text.rstrip("?.")):
        hits = [(attr, m["animal"]) for attr, pattern in DIRECT_SHAPES if (m := pattern.fullmatch(part))]
        if not hits:
            return None
        attrs[hits[0][0]] = None
        if hits[0][1]:
            animals[hits[0][1].lower()] = None
    return (tuple(animals), tuple(attrs)) if len(animals) == 1 else None


# ---- the answers


class Fact(NamedTuple):
    """A sentence understood. `role` says what it does for the question: asked, extra, stray or again."""

    animal: str
    attr: str
    value: str
    truth: str
    role: str

    @property
    def right(self) -> bool:
        return self.value == self.truth


SENTENCE = re.compile(r"[^.!?]*[.!?]+|[^.!?]+$")
SUBJECT = re.compile(f"(?:The (?P<animal>{either(ANIMALS)})|It)\\b")
STATEMENTS = [
    (attr, re.compile(re.escape(text[4:]).replace(r"\{v\}", f"(?P<v>{either(VALUES[attr])})")))  # without "{S} "
    for attr, texts in SAYINGS.items()
    for text in texts
]


def num_asked(ask: Ask) -> int:
    animals, attrs = ask
    return OPEN_FACTS if attrs is None else len(animals) * len(attrs)


def role_of(key: tuple[str, str], told: list[tuple[str, str]], ask: Ask) -> str:
    animals, attrs = ask
    if key in told:
        return "again"
    if key[0] not in animals:
        return "stray"
    if attrs is None:  # the first three distinct facts are what was asked for, more is extra
        return "asked" if sum(animal in animals for animal, _ in set(told)) < OPEN_FACTS else "extra"
    return "asked" if key[1] in attrs else "extra"


def read_answer(response: str, ask: Ask) -> list[Fact | str]:
    """One item per sentence: a Fact, "empty talk" or "unclear"."""
    animals, _ = ask
    subject = animals[0] if len(animals) == 1 else None  # what "It" stands for
    items, told = [], []
    for sentence in filter(None, map(str.strip, SENTENCE.findall(response))):
        start = SUBJECT.match(sentence)
        if start:
            subject = start["animal"] or subject
        rest = sentence[start.end() + 1 :] if start and subject else ""
        hits = [(attr, m["v"]) for attr, pattern in STATEMENTS if (m := pattern.fullmatch(rest))]
        if hits:
            attr, value = hits[0]
            items.append(Fact(subject, attr, value, FACTS[subject][attr], role_of((subject, attr), told, ask)))
            told.append((subject, attr))
        else:
            items.append("empty talk" if sentence in FILLERS else "unclear")
    return items


def judge_items(items: list[Fact | str], ask: Ask) -> dict[str, int]:
    """The five criteria, 0 or 1 each. An answer that states nothing earns nothing."""
    animals, attrs = ask
    facts = [item for item in items if isinstance(item, Fact)]
    roles = [fact.role for fact in facts]
    told = {(fact.animal, fact.attr) for fact in facts}
    if attrs is None:
        covered = roles.count("asked") == OPEN_FACTS
    else:
        covered = all((animal, attr) in told for animal in animals for attr in attrs)
    clear = len(items) == len(facts) <= num_asked(ask) + SPARE_FACTS and "again" not in roles
    return {
        "relevance": int(bool(facts) and "stray" not in roles),
        "coverage": int(covered),
        "usefulness": int(bool(facts) and all(fact.right for fact in facts)),
        "clarity": int(bool(facts) and clear),
        "expertise": int(any(fact.role == "extra" and fact.right for fact in facts)),
    }


def criteria(prompt: str, response: str) -> dict[str, int]:
    """What the answer earns on each of the five criteria."""
    ask = parse_prompt(prompt)
    if ask is None:
        raise ValueError(f"not a question about the zoo: {prompt!r}")
    return judge_items(read_answer(response, ask), ask)


def grade(prompt: str, response: str) -> int:
    """The true quality of an answer, 0 to 5: the sum of the five criteria."""
    return sum(criteria(prompt, response).values())
