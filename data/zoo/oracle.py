"""The facts of the zoo, and the true quality of an answer about them.

    grade("Where does the otter live?", "The otter lives in rivers.")  ->  4

The zoo is a small world in which a program can tell how good an answer is. A run can be compared
with the truth, as the paper compares its models with people and GPT-4. An answer earns one point
each for relevance, coverage, usefulness, clarity and expertise: the five additive criteria of
the paper's judge (section 2.2), each decided by reading the sentences of the answer.
prepare.py writes the human-like seed rows with it. Training never imports it.

Left out: synonyms, spelling, and all English but the phrasings below. A sentence in other words
is "unclear".
"""

import random
import re
from typing import NamedTuple

# ---- the facts -------------------------------------------------------------------------------

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


def read_facts(table: str) -> dict[str, dict[str, str]]:
    """Lines of an animal and its values  ->  {"otter": {"home": "rivers", "food": "fish", ...}}"""
    facts = {}
    for line in table.strip().split("\n"):
        animal, *values = line.split()
        facts[animal] = dict(zip(ATTRS, values, strict=True))
    return facts


def collect_values(attr: str) -> tuple[str, ...]:
    """All values that an attribute takes, in alphabetical order."""
    values = {facts[attr] for facts in FACTS.values()}
    return tuple(sorted(values))


FACTS = read_facts(TABLE)
ANIMALS = tuple(FACTS)
VALUES = {attr: collect_values(attr) for attr in ATTRS}
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
    "Animals are great fun.",
    "Most people know this well.",
    "I hope that helps you.",
)


def make_myths() -> dict[str, dict[str, str]]:
    """One fixed wrong value per fact: what the people of this world believe and say again."""
    rng = random.Random("myths of the zoo")
    myths = {animal: {} for animal in ANIMALS}
    for animal in ANIMALS:
        for attr in ATTRS:
            wrong_values = [value for value in VALUES[attr] if value != FACTS[animal][attr]]
            myths[animal][attr] = rng.choice(wrong_values)
    return myths


MYTHS = make_myths()


def make_twins() -> dict[str, str]:
    """For each animal another one that people take it for."""
    animals = list(ANIMALS)
    random.Random("twins of the zoo").shuffle(animals)
    return dict(zip(animals, animals[1:] + animals[:1], strict=True))


TWINS = make_twins()

# ---- the questions ---------------------------------------------------------------------------

# About one attribute. Two are joined: "Where does the otter live and what does it eat?"
DIRECT = {
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
SPARE_FACTS = 2  # an answer with more sentences than were asked and these is too long

Ask = tuple[tuple[str, ...], tuple[str, ...]]  # animals, attributes


def one_of(words) -> str:
    return "(?:" + "|".join(map(re.escape, words)) + ")"


def list_of(item: str) -> str:
    """A regular expression for "item", "item and item" or "item, item and item"."""
    return f"{item}(?:(?:,? and |, )(?:of )?{item})*"


ANIMAL = one_of(ANIMALS)
ATTR = one_of(ATTRS)


def question_regex(pattern: str) -> re.Pattern:
    """A question pattern as a regular expression that takes any list of animals and attributes."""
    text = re.escape(pattern[:-1]).replace(r"\{", "{").replace(r"\}", "}")
    attrs = "(?P<attrs>" + list_of("(?:the )?" + ATTR) + ")"
    animals = "(?P<animals>" + list_of("the " + ANIMAL) + ")"
    return re.compile(text.format(attrs=attrs, animals=animals) + "[.?]?")


def direct_regex(pattern: str) -> re.Pattern:
    """A direct question as a regular expression that takes any animal, or "it"."""
    subject = f"(?:the (?P<animal>{ANIMAL})|it)"
    text = re.escape(pattern[:-1]).replace(r"\{S\}", subject)
    return re.compile(text, re.IGNORECASE)


def statement_regex(attr: str, saying: str) -> re.Pattern:
    """A saying without its subject as a regular expression that takes any value."""
    value = f"(?P<value>{one_of(VALUES[attr])})"
    text = re.escape(saying.removeprefix("{S} "))
    return re.compile(text.replace(r"\{v\}", value))


QUESTIONS = [question_regex(pattern) for pattern in NAMED + COMPARE]
DIRECT_QUESTIONS = [
    (attr, direct_regex(pattern)) for attr, patterns in DIRECT.items() for pattern in patterns
]
STATEMENTS = [
    (attr, statement_regex(attr, saying))
    for attr, sayings in SAYINGS.items()
    for saying in sayings
]


def parse_prompt(text: str) -> Ask | None:
    """What is asked: (animals, attributes).

    "Where does the otter live and what does it eat?"  ->  (("otter",), ("home", "food"))
    None if the text is not understood.
    """
    text = text.strip()
    for pattern in QUESTIONS:
        match = pattern.fullmatch(text)
        if match:
            return read_lists(match)
    return parse_direct(text)


def read_lists(match: re.Match) -> Ask:
    """The animals and attributes that a question lists, each once, in its order."""
    groups = match.groupdict()
    animals = tuple(dict.fromkeys(re.findall(ANIMAL, groups["animals"])))
    return animals, tuple(dict.fromkeys(re.findall(ATTR, groups["attrs"])))


def parse_direct(text: str) -> Ask | None:
    """A direct question about one animal, or several of them joined by "and"."""
    animals, attrs = {}, {}  # dicts keep the order and drop repeats
    for part in re.split(",? and |, ", text.rstrip("?.")):
        match, attr = match_any(DIRECT_QUESTIONS, part)
        if match is None:
            return None
        attrs[attr] = None
        if match["animal"]:
            animals[match["animal"].lower()] = None
    if len(animals) != 1:
        return None
    return tuple(animals), tuple(attrs)


def match_any(patterns, text: str) -> tuple[re.Match | None, str | None]:
    """The first of the (attribute, pattern) that fits the whole text: its match and attribute."""
    for attr, pattern in patterns:
        match = pattern.fullmatch(text)
        if match:
            return match, attr
    return None, None


# ---- the answers -----------------------------------------------------------------------------


class Fact(NamedTuple):
    """A sentence understood. `role` is its part in the answer: asked, extra, stray or again."""

    animal: str
    attr: str
    value: str
    truth: str
    role: str

    @property
    def right(self) -> bool:
        return self.value == self.truth


CRITERIA = ("relevance", "coverage", "usefulness", "clarity", "expertise")
SENTENCE = re.compile(r"[^.!?]*[.!?]+|[^.!?]+$")
SUBJECT = re.compile(rf"(?:The (?P<animal>{ANIMAL})|It)\b")


def topics_asked(ask: Ask) -> list[tuple[str, str]]:
    """All (animal, attribute) that a question asks for."""
    return [(animal, attr) for animal in ask[0] for attr in ask[1]]


def num_asked(ask: Ask) -> int:
    return len(topics_asked(ask))


def split_sentences(response: str) -> list[str]:
    return list(filter(None, map(str.strip, SENTENCE.findall(response))))


def role_of(fact: tuple[str, str], earlier: list[tuple[str, str]], ask: Ask) -> str:
    """What an (animal, attribute) does for the question, after the earlier ones of the answer."""
    animals, attrs = ask
    animal, attr = fact
    if fact in earlier:
        return "again"
    if animal not in animals:
        return "stray"
    return "asked" if attr in attrs else "extra"


def read_answer(response: str, ask: Ask) -> list[Fact | str]:
    """One item per sentence: a Fact, "empty talk" or "unclear"."""
    animals, _ = ask
    subject = animals[0] if len(animals) == 1 else None  # what "It" stands for
    items, earlier = [], []
    for sentence in split_sentences(response):
        statement = ""
        subject_match = SUBJECT.match(sentence)
        if subject_match:
            subject = subject_match["animal"] or subject
        if subject_match and subject:
            statement = sentence[subject_match.end() + 1 :]
        match, attr = match_any(STATEMENTS, statement)
        if match:
            key = (subject, attr)
            role = role_of(key, earlier, ask)
            items.append(Fact(subject, attr, match["value"], FACTS[subject][attr], role))
            earlier.append(key)
        else:
            items.append("empty talk" if sentence in FILLERS else "unclear")
    return items


def covers(facts: list[Fact], ask: Ask) -> bool:
    """Do the facts hold all that was asked?"""
    return {(fact.animal, fact.attr) for fact in facts}.issuperset(topics_asked(ask))


def judge_items(items: list[Fact | str], ask: Ask) -> dict[str, int]:
    """The five criteria, 0 or 1 each. An answer that states nothing of what was asked earns
    nothing, and one that leaves a part of it out earns no more than its relevance."""
    facts = [item for item in items if isinstance(item, Fact)]
    roles = [fact.role for fact in facts]
    covered = covers(facts, ask)
    short = len(items) <= num_asked(ask) + SPARE_FACTS
    clear = len(items) == len(facts) and short and "again" not in roles
    points = {
        "relevance": "asked" in roles and "stray" not in roles,
        "coverage": covered,
        "usefulness": covered and all(fact.right for fact in facts),
        "clarity": covered and clear,
        "expertise": covered and any(fact.role == "extra" and fact.right for fact in facts),
    }
    return {name: int(point) for name, point in points.items()}


def criteria(prompt: str, response: str) -> dict[str, int]:
    """What the answer earns on each of the five criteria."""
    ask = parse_prompt(prompt)
    if ask is None:
        raise ValueError(f"not a question about the zoo: {prompt!r}")
    return judge_items(read_answer(response, ask), ask)


def grade(prompt: str, response: str) -> int:
    """The true quality of an answer, 0 to 5: the sum of the five criteria."""
    return sum(criteria(prompt, response).values())
