"""data/oasst/prepare.py: counts of the real sample, five shapes of one world, all that is dropped,
all that is refused."""

import gzip
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "data" / "oasst"
REAL = ROOT.parent / "shared" / "data" / "oasst"
real = pytest.mark.skipif(not REAL.is_dir(), reason="no real exports at ../shared/data/oasst")

spec = importlib.util.spec_from_file_location("oasst_prepare", FOLDER / "prepare.py")
oasst = importlib.util.module_from_spec(spec)
spec.loader.exec_module(oasst)


# ---- a small world, and the five shapes it can come in


def message(ident, text, role="assistant", replies=(), **fields):
    """A message with every key of the schema, nulls kept."""
    base = {
        "message_id": ident,
        "parent_id": None,
        "text": text,
        "role": role,
        "lang": "en",
        "review_count": 3,
        "review_result": True,
        "deleted": False,
        "rank": None,
        "synthetic": False,
        "model_name": None,
        "emojis": {"+1": 2},
        "labels": {"quality": {"value": 0.5, "count": 3}},
        "detoxify": None,
        "events": None,
    }
    replies = [reply | {"parent_id": ident} for reply in replies]
    return base | fields | {"replies": replies}


def prompt(ident, *replies, text=None, **fields):
    return message(ident, text or f"Question {ident}?", role="prompter", replies=replies, **fields)


def ranked(ident, *ranks, **fields):
    """A prompt with one reply per rank, named p-0, p-1, ... in the order given."""
    replies = []
    for i, rank in enumerate(ranks):
        replies.append(message(f"{ident}-{i}", f"Answer {i} to {ident}.", rank=rank))
    return prompt(ident, *replies, **fields)


def drop_nulls(node):
    if isinstance(node, dict):
        return {name: drop_nulls(value) for name, value in node.items() if value is not None}
    if isinstance(node, list):
        return [drop_nulls(item) for item in node]
    return node


def flatten(root):
    stack = [root]
    while stack:
        node = dict(stack.pop())
        stack.extend(reversed(node.pop("replies")))
        yield node | {"message_tree_id": root["message_id"], "tree_state": "ready_for_export"}


def parallel_lists(row):
    """A row of the Hugging Face dataset: lists of names and values in place of dicts."""
    labels = row["labels"] or {}
    emojis = row["emojis"] or {}
    row["emojis"] = {"name": list(emojis), "count": list(emojis.values())}
    row["labels"] = {"name": list(labels)}
    for field in ("value", "count"):
        row["labels"][field] = [label[field] for label in labels.values()]
    return row


def tree(root, state="ready_for_export"):
    tree_id = root["message_id"]
    return {"message_tree_id": tree_id, "tree_state": state, "prompt": root, "origin": None}


SHAPES = {
    "tree without nulls": lambda roots: [drop_nulls(tree(root)) for root in roots],
    "tree with nulls": lambda roots: [tree(root) for root in roots],
    "nested messages": lambda roots: roots,
    "flat messages": lambda roots: [drop_nulls(row) for root in roots for row in flatten(root)],
    "hf rows": lambda roots: [parallel_lists(row) for root in roots for row in flatten(root)],
}


def save(path, rows, ascii_only=False):
    lines = [json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows]
    path.write_text("".join(lines), "utf-8", newline="")
    return path


def rows_of(path):
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Run:
    """One call of main: its status, what it printed and the files it left."""

    def __init__(self, tmp_path, capsys):
        self.dir, self.capsys = tmp_path, capsys

    def __call__(self, source, *flags, out="out"):
        if isinstance(source, list):
            source = save(self.dir / "export.jsonl", source)
        self.folder = self.dir / out
        self.status = oasst.main(list(map(str, (source, *flags, "--out", self.folder))))
        self.out, self.err = self.capsys.readouterr()
        return self

    def rows(self, name):
        return rows_of(self.folder / f"{name}.jsonl")

    def prompts(self, name):
        return [row["prompt"] for row in self.rows(name)]

    def num_rows(self, *names):
        return [len(self.rows(name)) for name in names]

    def count(self, what):
        """The number printed in front of `what`, 0 where the line is missing."""
        match = re.search(rf"^ +(\d+) {re.escape(what)}$", self.out, re.MULTILINE)
        return int(match[1]) if match else 0

    def has_one_error_line(self):
        """`error: WHERE: what; what to do`"""
        return re.fullmatch("error: [^\n]+; [^\n]+\n", self.err) is not None

    def assert_error(self, *parts):
        """It ended with status 1, one error line that holds the parts, and no file."""
        assert self.status == 1
        assert self.has_one_error_line(), self.err
        assert all(part in self.err for part in parts), self.err
        assert not self.folder.exists()


@pytest.fixture
def run(tmp_path, capsys):
    return Run(tmp_path, capsys)


@pytest.fixture
def all_serve_both(monkeypatch):
    """For the rules that come before the division: every prompt goes to IFT and to EFT."""
    monkeypatch.setattr(oasst, "divide", lambda prompts, args: (prompts, prompts))


undivided = pytest.mark.usefixtures("all_serve_both")


WORLD = [
    ranked("a", 1, 0, 2, text='Two\nlines, {braces}, "quotes", 🦉 and\u2028a separator'),
    ranked("b", 2, 0, None),
    ranked("c", 0),
    ranked("d", None, None),
    prompt(
        "e",
        message("e-0", "First.", rank=0, replies=[ranked("e-1", 0)]),
        message("e-2", "Next.", rank=1),
    ),
]


# ---- the real exports


@real
@pytest.mark.parametrize("name", ["en_100_tree", "en_100_message"])
def test_the_real_sample_gives_the_known_counts(run, name):
    assert run(REAL / f"{name}.jsonl").status == 0
    assert "found: 94 IFT pairs, 94 ranked prompts with 313 replies" in run.out
    assert (run.count("trees read"), run.count("trees dropped: synthetic")) == (100, 5)
    # 980 = 2 * 1630 / 3.33; of 94 prompts 94 * 980 / (3200 + 980) = 22.04
    assert "wanted: 3200 prompts for IFT and 980 for EFT (enough for 1630 judg" in run.out
    assert "divided: 72 prompts for IFT and 22 for EFT, 0 left over" in run.out
    assert run.num_rows("ift", "eft_ranked") == [72, 22]
    assert sum(len(row["ranks"]) for row in run.rows("eft_ranked")) == 71
    assert not set(run.prompts("ift")) & set(run.prompts("eft_ranked"))
    for table in ("eft_eval.jsonl", "test.jsonl"):
        assert f"not written, no rows: {run.folder / table}" in run.out
    assert "nothing is held out" in run.out and "give --valid FILE ..." in run.out
    names = {"ift.jsonl", "eft_ranked.jsonl", "judge.txt", "propose.txt"}
    assert {path.name for path in run.folder.iterdir()} == names

    run(REAL / f"{name}.jsonl", "--keep-synthetic")
    assert "found: 99 IFT pairs, 99 ranked prompts with 330 replies" in run.out
    assert run.num_rows("ift", "eft_ranked") == [76, 23]


@real
def test_every_shape_of_the_real_sample_gives_the_same_bytes(run):
    roots = rows_of(REAL / "en_100_message.jsonl")
    sources = {"tree": REAL / "en_100_tree.jsonl", "message": REAL / "en_100_message.jsonl"}
    sources |= {name: save(run.dir / name, make(roots)) for name, make in SHAPES.items()}
    folders = []
    for name, source in sources.items():
        assert run(source, "--holdout", 0.2, out=f"{name}.out").status == 0
        folders.append(contents(run.folder))
    assert len(folders[0]) == 6
    assert all(files == folders[0] for files in folders)


@real
@undivided
def test_the_best_reply_of_the_real_sample_is_rank_0_and_no_text_is_changed(run):
    best = {}
    for row in rows_of(REAL / "en_100_tree.jsonl"):
        for reply in row["prompt"]["replies"]:
            if reply.get("rank") == 0 and not reply["synthetic"]:
                best[row["prompt"]["text"]] = reply["text"]
    run(REAL / "en_100_tree.jsonl")
    assert {row["prompt"]: row["response"] for row in run.rows("ift")} == best
    assert {row["prompt"]: row["responses"][0] for row in run.rows("eft_ranked")} == best
    for row in run.rows("eft_ranked"):
        assert row["ranks"] == sorted(row["ranks"]) and row["ranks"][0] == 0


@real
@undivided
def test_real_quirks_orphans_deleted_replies_and_gaps_in_the_ranks(run):
    run(REAL / "messages_hf_rows.jsonl")
    assert "found: 5 IFT pairs, 5 ranked prompts with 13 replies" in run.out
    assert run.count("messages dropped: orphan") == 3
    assert run.count("replies dropped: deleted") == 1
    assert run.rows("eft_ranked")[-1]["ranks"] == [0, 1]  # 0 and 2 in the export


@real
@undivided
def test_gzip_is_known_by_content_and_held_out_trees_leave_the_training_rows(run):
    gzip_file = run.dir / "no_gz_in_the_name"
    gzip_file.write_bytes((REAL / "trees.jsonl.gz").read_bytes())
    run(REAL / "en_100_tree.jsonl", "--valid", gzip_file)
    assert run.count("trees dropped: in the --valid files too") == 18
    assert run.num_rows("ift", "eft_eval", "test") == [76, 18, 18]
    plain = run(REAL / "trees.jsonl", out="plain").rows("eft_ranked")
    assert plain == rows_of(run.dir / "out" / "eft_eval.jsonl")


# ---- the rules, on the small world


@undivided
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ascii_only", [True, False])
def test_every_shape_gives_the_rows_worked_out_by_hand(run, shape, ascii_only):
    assert run(save(run.dir / "world.jsonl", SHAPES[shape](WORLD), ascii_only)).status == 0
    text = WORLD[0]["text"]
    answers_a = ["Answer 1 to a.", "Answer 0 to a.", "Answer 2 to a."]
    answers_b = ["Answer 1 to b.", "Answer 0 to b."]
    assert run.rows("ift") == [
        {"prompt": text, "response": "Answer 1 to a."},
        {"prompt": "Question b?", "response": "Answer 1 to b."},
        {"prompt": "Question c?", "response": "Answer 0 to c."},
        {"prompt": "Question e?", "response": "First."},
    ]
    assert "🦉".encode() in (run.folder / "ift.jsonl").read_bytes()
    assert run.rows("eft_ranked") == [
        {"prompt": text, "responses": answers_a, "ranks": [0, 1, 2]},
        {"prompt": "Question b?", "responses": answers_b, "ranks": [0, 1]},
        {"prompt": "Question e?", "responses": ["First.", "Next."], "ranks": [0, 1]},
    ]
    assert "found: 4 IFT pairs, 3 ranked prompts with 7 replies" in run.out
    assert (run.count("trees read"), run.count("messages read")) == (5, 18)
    assert run.count("replies dropped: no rank") == 3
    assert run.count("prompts without a ranked reply, no row") == 1
    assert run.count("prompts with one ranked reply, no ranking") == 1


@undivided
def test_flat_rows_may_come_in_any_order_and_in_several_files(run):
    rows = SHAPES["flat messages"](WORLD)
    expected = run(rows, out="whole").rows("eft_ranked")
    front = save(run.dir / "front", rows[:2])
    back = save(run.dir / "back", rows[2:])
    assert run(front, back, out="two files").rows("eft_ranked") == expected
    roots_last = sorted(rows, key=lambda row: "parent_id" not in row)
    assert roots_last != rows
    assert run(roots_last, out="turned").rows("eft_ranked") == expected


DROPPED_TREES = {
    "deleted": ranked("x", 0, 1, deleted=True),
    "negative review": ranked("x", 0, 1, review_result=False),
    "synthetic": ranked("x", 0, 1, synthetic=True),
    "language not en": ranked("x", 0, 1, lang="es"),
    "no text": ranked("x", 0, 1) | {"text": None},
    "unknown role": ranked("x", 0, 1) | {"role": "system"},
    "not by the prompter": ranked("x", 0, 1) | {"role": "assistant"},
    "broken text": ranked("x", 0, 1, text="half an owl \ud83e"),
    "not ready for export": tree(ranked("x", 0, 1), "halted_by_moderator"),
    "no prompt": {"message_tree_id": "x", "tree_state": "ready_for_export", "prompt": None},
    "duplicate": ranked("a", 1, 0, 2),
}


@undivided
@pytest.mark.parametrize("reason", DROPPED_TREES)
def test_a_tree_that_cannot_be_used_is_dropped_by_reason_and_the_rest_goes_on(run, reason):
    without = run(WORLD, out="without").rows("eft_ranked")
    run(save(run.dir / "x.jsonl", [*WORLD, DROPPED_TREES[reason]], ascii_only=True))
    assert run.status == 0
    assert run.count(f"trees dropped: {reason}") == 1 and run.count("trees read") == 6
    assert run.rows("eft_ranked") == without


DROPPED_REPLIES = {
    "deleted": {"deleted": True},
    "negative review": {"review_result": False},
    "synthetic": {"synthetic": True},
    "language not en": {"lang": "de"},
    "no text": {"text": None},
    "unknown role": {"role": "system"},
    "not by the assistant": {"role": "prompter"},
    "broken text": {"text": "\ud83e"},
    "no rank": {"rank": None},
}


@undivided
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reason", DROPPED_REPLIES)
def test_a_reply_that_cannot_be_used_is_dropped_and_the_next_rank_is_the_best(run, reason, shape):
    root = ranked("a", 0, 1, 2)
    root["replies"][0] |= DROPPED_REPLIES[reason]
    run(save(run.dir / "x.jsonl", SHAPES[shape]([root]), ascii_only=True))
    assert run.status == 0 and run.count(f"replies dropped: {reason}") == 1
    assert run.rows("ift") == [{"prompt": "Question a?", "response": "Answer 1 to a."}]
    assert run.rows("eft_ranked")[0]["ranks"] == [0, 1]
    assert run.count("pairs whose best reply is not rank 0") == 1


def test_blank_text_counts_as_none_and_a_null_review_is_no_objection(run):
    root = ranked("a", 0, 1, 2, review_result=None)
    root["replies"][0]["text"] = " \n"
    root["replies"][1]["review_result"] = None
    assert run([root]).rows("ift")[0]["response"] == "Answer 1 to a."
    assert run.count("replies dropped: no text") == 1


def test_a_lone_rank_makes_a_pair_and_a_lone_unranked_reply_does_not(run):
    run([ranked("a", 2), ranked("b", None)])
    assert run.prompts("ift") == ["Question a?"]
    path = run.folder / "eft_ranked.jsonl"
    assert f"not written, no rows: {path}" in run.out and not path.exists()


@undivided
def test_repeated_ranks_stay_ties_and_the_first_of_them_makes_the_pair(run):
    run([ranked("a", 3, 1, 1, 7.0)])
    assert run.rows("eft_ranked")[0]["ranks"] == [0, 0, 1, 2]
    assert run.count("rankings with ties") == 1
    assert run.rows("ift")[0]["response"] == "Answer 1 to a."


@undivided
def test_ranks_may_be_floats_as_a_data_frame_writes_them(run):
    rows = SHAPES["hf rows"](WORLD)
    expected = run(rows, out="whole").rows("eft_ranked")
    for row in rows:
        row["rank"] = None if row["rank"] is None else float(row["rank"])
    assert run(rows, out="floats").rows("eft_ranked") == expected
    assert "0.0" not in (run.folder / "eft_ranked.jsonl").read_text()


@undivided
def test_other_languages_and_their_regions_can_be_asked_for(run):
    roots = []
    for ident, lang in (("a", "pt-BR"), ("b", "en"), ("c", "pto")):
        root = ranked(ident, 0, lang=lang)
        root["replies"][0]["lang"] = lang
        roots.append(root)
    assert run(roots, "--lang", "pt").prompts("ift") == ["Question a?"]
    assert run.count("trees dropped: language not pt") == 2


@undivided
def test_trees_met_twice_count_once_in_whatever_shape_they_come_back(run):
    once = run(WORLD, out="once").rows("eft_ranked")
    first, *others = [save(run.dir / name, make(WORLD)) for name, make in SHAPES.items()]
    run(first, *others, out="five times")
    assert run.rows("eft_ranked") == once
    assert run.count("trees dropped: duplicate") == 20


def test_orphans_and_circles_are_counted_and_left_out(run):
    rows = SHAPES["flat messages"]([ranked("a", 0, 1)])
    rows += [drop_nulls(message("o", "Whose am I?", rank=0, parent_id="gone"))]
    rows += [drop_nulls(message("p", "Below an orphan.", parent_id="o"))]
    for one, other in ("xy", "yz", "zx", "ww", "vx"):
        rows.append(drop_nulls(message(one, "Round.", parent_id=other)))
    run(rows)
    assert run.status == 0 and len(run.rows("ift")) == 1
    assert run.count("messages dropped: orphan") == 2
    assert run.count("messages dropped: parents in a circle") == 5


@undivided
def test_unknown_keys_crlf_blank_lines_and_a_byte_order_mark_do_no_harm(run):
    lines = [json.dumps(row | {"CRITERIA": 1}) for row in SHAPES["tree with nulls"](WORLD)]
    (run.dir / "odd.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode())
    run(run.dir / "odd.jsonl", out="odd")
    assert run.status == 0 and run.num_rows("ift") == [4]


# ---- held-out prompts


def many(letter, number):
    """Prompts with two or three ranked replies."""
    ranks = [(0, 1), (0, 1, 2), (0, 1, 2)]
    return [ranked(f"{letter}{i}", *ranks[i % 3]) for i in range(number)]


@undivided
def test_holdout_splits_every_row_to_one_side_and_the_totals_add_up(run):
    twins = [ranked(f"twin{i}", 0, 1, text=f"  QUESTION  a{i}?") for i in range(30)]
    run([*many("a", 60), *twins, ranked("z", None)], "--holdout", 0.3)
    train = set(run.prompts("eft_ranked"))
    held_out = set(run.prompts("eft_eval"))
    assert train and held_out and not train & held_out
    assert len(train) + len(held_out) == 90
    assert set(run.prompts("ift")) == train
    assert {text for text in held_out if "  " not in text} <= set(run.prompts("test"))
    for i in range(30):  # asked twice, still on one side
        assert (f"  QUESTION  a{i}?" in held_out) == (f"Question a{i}?" in held_out)
    num_train, num_eval = map(oasst.num_replies, map(run.rows, ("eft_ranked", "eft_eval")))
    assert f"found: 90 IFT pairs, 90 ranked prompts with {num_train + num_eval} rep" in run.out
    assert f"held out: {len(held_out)} IFT pairs, {len(held_out)} ranked prompts" in run.out
    assert f"eft_eval.jsonl: {len(held_out)} rows, {num_eval} replies" in run.out


@undivided
def test_holdout_depends_on_the_prompt_and_the_seed_alone(run):
    held_out = run(many("a", 60), "--holdout", 0.3, out="1").prompts("eft_eval")
    run([*many("b", 30), *many("a", 60)], "--holdout", 0.3, out="2")
    assert [text for text in run.prompts("eft_eval") if " a" in text] == held_out
    run(many("a", 60), "--holdout", 0.3, "--seed", 1, out="3")
    assert run.prompts("eft_eval") != held_out


@undivided
def test_valid_prompts_are_never_trained_on_by_id_or_by_text(run):
    lone, synthetic = ranked("w", None), ranked("s", 0, 1, synthetic=True)
    valid = save(run.dir / "valid.jsonl", [*many("v", 5), lone, synthetic])
    same_id, same_text = ranked("v0", 0, text="Edited?"), ranked("t", 0, text="QUESTION  v1?")
    run([*many("a", 3), same_id, same_text], "--valid", valid)
    assert run.count("trees dropped: in the --valid files too") == 2
    assert run.prompts("ift") == [f"Question a{i}?" for i in range(3)]
    assert run.prompts("eft_eval") == [f"Question v{i}?" for i in range(5)]
    assert run.prompts("test") == [*run.prompts("eft_eval"), "Question w?"]


def test_the_test_prompts_are_a_seeded_draw_without_repeats_in_file_order(run):
    valid = save(run.dir / "valid.jsonl", [*many("v", 50), ranked("twin", 0, text="question V7?")])
    draws = []
    for seed in (0, 0, 1):
        run(WORLD, "--valid", valid, "--test-size", 20, "--seed", seed)
        draws.append([text.lower() for text in run.prompts("test")])
    assert draws[0] == draws[1] != draws[2]
    assert len(set(draws[0])) == 20
    numbers = [int(text[10:-1]) for text in draws[0]]
    assert numbers == sorted(numbers)
    run(WORLD, "--valid", valid)
    assert len(run.rows("test")) == 50


def test_old_held_out_files_are_not_left_beside_rows_that_may_repeat_them(run):
    run(many("a", 20), "--holdout", 0.3)
    before = contents(run.folder)
    run(many("a", 20))
    assert run.status == 1 and "eft_eval.jsonl: is of another run" in run.err
    assert contents(run.folder) == before
    assert run(many("b", 20), "--holdout", 0.5).status == 0
    valid = save(run.dir / "valid.jsonl", [ranked("v", 0)])  # a test prompt, but no ranking
    run(many("c", 3), "--valid", valid)
    assert run.status == 1 and "eft_eval.jsonl: is of another run" in run.err


# ---- IFT and EFT


def sides(run) -> tuple[set[str], set[str]]:
    """The prompts of ift.jsonl and of eft_ranked.jsonl, which may be missing."""
    has_eft = (run.folder / "eft_ranked.jsonl").exists()
    return set(run.prompts("ift")), set(run.prompts("eft_ranked") if has_eft else [])


# Prompts with two ranked replies, with one; --ift-size, --eft-size -> IFT, EFT, left over.
DIVISIONS = {
    "enough for both": (60, 40, 50, 20, (50, 20, 30)),
    "both shrink as they were wanted": (80, 20, 90, 60, (60, 40, 0)),
    "few rankings": (5, 95, 50, 60, (50, 5, 45)),
    "no ranking": (0, 7, 3200, 1630, (7, 0, 0)),
    "no EFT is wanted": (9, 1, 3200, 0, (10, 0, 0)),
    "little IFT is wanted": (50, 0, 1, 9, (1, 9, 40)),
}


@pytest.mark.parametrize("case", DIVISIONS)
def test_prompts_are_divided_between_ift_and_eft_in_the_numbers_worked_out_by_hand(run, case):
    rankings, lone, ift_size, eft_size, expected = DIVISIONS[case]
    roots = [ranked(f"r{i}", 0, 1) for i in range(rankings)]
    roots += [ranked(f"l{i}", 0) for i in range(lone)]
    run(roots, "--ift-size", ift_size, "--eft-size", eft_size)
    ift, eft = sides(run)
    assert not ift & eft and all(text.startswith("Question r") for text in eft)
    assert (len(ift), len(eft), rankings + lone - len(ift | eft)) == expected, run.out
    assert "divided: {} prompts for IFT and {} for EFT, {} left over".format(*expected) in run.out
    assert run.prompts("ift") == [root["text"] for root in roots if root["text"] in ift]


def test_the_division_depends_on_texts_and_seed_and_not_on_the_order_of_the_file(run):
    roots = many("a", 60)
    ift, eft = sides(run(roots, "--holdout", 0.2, out="1"))
    held_out = set(run.prompts("eft_eval"))
    assert sides(run(roots[::-1], "--holdout", 0.2, out="2")) == (ift, eft)
    assert sides(run(roots, "--seed", 1, out="3")) != (ift, eft)
    assert min(len(ift), len(eft)) > 5
    assert len(held_out) + len(ift) + len(eft) == len(held_out | ift | eft) == 60
    sizes = ("--ift-size", 9, "--eft-size", 9)
    few = sides(run(roots, *sizes, out="4"))
    assert len(few[0]) == 9
    assert sides(run(roots[::-1], *sizes, out="5")) == few


def test_a_prompt_asked_twice_is_never_on_both_sides(run):
    roots = many("a", 40)
    for i in range(40):  # every second one has a lone reply
        ranks = [0] if i % 2 == 0 else [0, 1]
        roots.append(ranked(f"t{i}", *ranks, text=f" QUESTION  a{i}?"))
    num_left = 0
    for seed in range(5):
        both = sides(run(roots, "--seed", seed, out=f"{seed}"))
        ift, eft = ({oasst.key_of(text) for text in side} for side in both)
        assert ift and eft and not ift & eft and len(ift | eft) == 40
        # a lone reply is no ranking, and of no use to IFT where its prompt is in EFT
        left = [i for i in range(0, 40, 2) if f"question a{i}?" in eft]
        assert f"{len(left)} left over" in run.out
        num_left += len(left)
    assert num_left > 5


# ---- --exclude

EXCLUDED = ["QUESTION   a1?\n", "Question a3?", '"Quoted" and ["odd"]', "unheard of"]
ALPACA_EVAL = [{"dataset": "x", "instruction": text, "output": "y"} for text in EXCLUDED]
OBJECTS = [json.dumps({"prompt": text, "instruction": ""}) for text in EXCLUDED]
JSON_TEXTS = [json.dumps(text) for text in EXCLUDED]
PLAIN_TEXTS = [text.strip() for text in EXCLUDED]
EXCLUDE_FILES = {
    "AlpacaEval": json.dumps(ALPACA_EVAL, indent=2),
    "a list of texts": json.dumps(EXCLUDED),
    "lines of objects": "\n\n".join(OBJECTS),
    "lines of JSON texts": "\n".join(JSON_TEXTS),
    "plain lines": "\r\n".join(reversed(PLAIN_TEXTS)),
    "all kinds of lines": "\n".join([PLAIN_TEXTS[0], OBJECTS[1], JSON_TEXTS[2], PLAIN_TEXTS[3]]),
}
WRAPS = {
    "plain": lambda data: data,
    "byte order mark": lambda data: b"\xef\xbb\xbf" + data,
    "gzip": gzip.compress,
}


@pytest.mark.parametrize("shape", EXCLUDE_FILES)
@pytest.mark.parametrize("wrap", WRAPS)
def test_prompts_of_any_file_of_prompts_are_left_out_of_training(run, shape, wrap):
    path = run.dir / "prompts"
    path.write_bytes(WRAPS[wrap](EXCLUDE_FILES[shape].encode()))
    odd = ranked("odd", 0, 1, text='"Quoted" and ["odd"]')
    run([*many("a", 9), odd], "--exclude", path)
    ift, eft = sides(run)
    assert ift and eft
    assert ift | eft == {f"Question a{i}?" for i in (0, 2, 4, 5, 6, 7, 8)}
    assert run.count("trees dropped: in the --exclude files") == 3
    assert "prompts: 4 different prompts to leave out" in run.out


ALPACA = [
    {"instruction": "Translate into French.", "input": "The fox hunts at NIGHT.", "output": "x"},
    {"instruction": "Sort these.", "input": "3, 1\n2", "output": "y"},
    {"instruction": "Question a1?", "input": "", "output": "z"},
    {"instruction": "Question a2?", "input": " \n", "output": "z"},
    {"instruction": "Question a3?", "input": None, "output": "z"},
    {"instruction": "", "prompt": "Question a4?", "input": "not its own"},
]


@pytest.mark.parametrize("between", ["\n", "\n\n", " "])
@pytest.mark.parametrize("lines", [True, False])
def test_an_instruction_and_its_input_are_one_prompt_to_leave_out(run, between, lines):
    path = run.dir / "alpaca.json"
    path.write_text("\n".join(map(json.dumps, ALPACA)) if lines else json.dumps(ALPACA))
    joined = [
        ranked("f", 0, 1, text=f"Translate into French.{between}The fox hunts at night."),
        ranked("s", 0, 1, text=f"Sort these.{between}3, 1\n2"),
    ]
    bare = [ranked("t", 0, 1, text="Translate into French."), ranked("u", 0, text="3, 1\n2")]
    run([*many("a", 9), *joined, *bare], "--exclude", path)
    assert "6 different prompts to leave out" in run.out
    assert run.count("trees dropped: in the --exclude files") == 6
    texts = set.union(*sides(run))
    assert {"Translate into French.", "3, 1\n2"} <= texts
    assert not {root["text"] for root in joined} & texts


def test_several_files_can_be_excluded_and_a_useless_one_is_visible(run):
    for i in range(3):
        (run.dir / f"x{i}").write_text(f"Question a{i}?")
    (run.dir / "page.html").write_text("<!DOCTYPE html>\n<p>Not found")
    paths = [run.dir / f"x{i}" for i in range(3)]
    run(many("a", 9), "--exclude", *paths[:2], "--exclude", paths[2])
    assert run.count("trees dropped: in the --exclude files") == 3
    run(many("a", 9), "--exclude", run.dir / "page.html")
    assert "      0 trees dropped: in the --exclude files" in run.out


def test_excluded_prompts_may_still_be_held_out(run):
    valid = save(run.dir / "valid.jsonl", many("v", 3))
    (run.dir / "x").write_text("Question v1?\nQuestion a1?")
    run(many("a", 9), "--valid", valid, "--exclude", run.dir / "x")
    assert run.num_rows("test", "eft_eval") == [3, 3]
    assert "Question a1?" not in set.union(*sides(run))


BAD_LIST = ": begins with [ but is no JSON list in UTF-8"
BAD_EXCLUDES = {
    "list cut short": (b'[{"instruction": "a"}, {"instr', BAD_LIST + " (Unterminated"),
    "list in latin-1": ('["\u00e9"]'.encode("latin-1"), BAD_LIST),
    "nested without end": (b"[" * 200_000, BAD_LIST),
    "empty list": (b" [ ]", ": no prompt in the file"),
    "empty": (b"\n", ":1: no rows"),
    "malformed line": (b'a\n{"prompt": \n', ":2: malformed JSON"),
    "lines in latin-1": ("a\n\u00e9".encode("latin-1"), ":2: byte 1 of the line is not UTF-8"),
    "object of another kind": (b'[{"prompt": "a"}, {"turns": []}]', ": item 2: no text in ins"),
    "null": (b'{"instruction": null}', ":1: no text in instruction or prompt"),
    "a number": (b'{"prompt": 7}', ":1: no text in instruction or prompt"),
    "a blank": (b'["a", " "]', ": item 2: no text in instruction or prompt"),
    "an input of numbers": (
        b'[{"instruction": "a", "input": [1]}]',
        ": item 1: no text in instruction or prompt, or an input that is no text",
    ),
    "a parquet file": (b"PAR1\x15\x04\xff\xfe\n", ": a Parquet file; write its rows as JSON"),
    "numbers": (b"[1]", ": item 1: no text in instruction or prompt"),
    "gzip cut short": (gzip.compress(b'["a"]')[:-9], ":1: gzip data cut short"),
}


@pytest.mark.parametrize("name", BAD_EXCLUDES)
def test_a_bad_file_of_prompts_ends_in_one_line_and_no_output(run, name):
    content, expected = BAD_EXCLUDES[name]
    path = run.dir / "x.json"
    path.write_bytes(content)
    run(WORLD, "--exclude", path).assert_error(f"{path}{expected}")
    run(WORLD, "--exclude", run.dir / "none").assert_error("none: No such file")


# ---- bad input


GOOD = json.dumps(WORLD[2]).encode() + b"\n"
GZIP = gzip.compress(GOOD)
BAD_FILES = {
    "malformed JSON": (GOOD + b'{"message_id": "x", \n' + GOOD, ":2: malformed JSON"),
    "cut short": (GOOD + GOOD[:100], ":2: malformed JSON"),
    "nested without end": (b'{"message_id": ' + b"[" * 200_000, ":1: malformed JSON"),
    "a parquet file": (b"PAR1\x15\x04\xff\xfe\n", ": a Parquet file; write its rows as JSON"),
    "a parquet file in UTF-8": (b"PAR1\n\x00PAR1", ": a Parquet file; write its rows as JSON"),
    "a list of messages": (b"[" + GOOD + b"]", ":1: begins a JSON list; write one object a line"),
    "a list over lines": (b"\n [\n" + GOOD + b"]\n", ":2: begins a JSON list; write one obj"),
    "a marked list": (b"\xef\xbb\xbf[\n" + GOOD + b"]\n", ":1: begins a JSON list; write one"),
    "latin-1": (GOOD + '{"message_id": "é"}'.encode("latin-1"), ":2: byte 17 of the line is no"),
    "a list": (GOOD + b"[1]\n", ":2: not a JSON object"),
    "a thread": (b'{"thread_id": "t", "thread": []}\n', ":1: an object of unknown kind"),
    "empty": (b"", ":1: no rows"),
    "blank": (b"\n \n", ":1: no rows"),
    "empty gzip": (gzip.compress(b""), ":1: no rows"),
    "gzip cut short": (GZIP[:-20], ":1: gzip data cut short"),
    "gzip without its end": (GZIP[:-4], "gzip data cut short"),
    "gzip damaged": (GZIP[:30] + b"damage" + GZIP[36:], "gzip data cut short or damaged"),
    "gzip header alone": (b"\x1f\x8b", ":1: gzip data cut short"),
    "bad id": (GOOD + b'{"message_id": 7}\n', ":2: message_id is not a string"),
    "bad parent": (b'{"message_id": "x", "parent_id": 7}\n', ":1: parent_id is not a string"),
    "rank a list": (b'{"message_id": "x", "rank": []}\n', ":1: rank is not a whole number"),
    "bad rank": (b'{"message_id": "x", "rank": "best"}\n', ":1: rank is not a whole number"),
    "rank 0.5": (b'{"message_id": "x", "rank": 0.5}\n', ":1: rank is not a whole number"),
    "rank NaN": (b'{"message_id": "x", "rank": NaN}\n', ":1: malformed JSON (NaN is no JSON: a "),
    "all NaN": (GOOD + b'{"message_id": "x", "lang": -Infinity}\n', ":2: malformed JSON (-Infin"),
    "bad replies": (b'{"message_id": "x", "replies": {"a": 1}}\n', ":1: replies is not a list"),
    "bad reply": (b'{"message_id": "x", "replies": ["a"]}\n', ":1: a message is not a JSON obj"),
    "bad prompt": (b'{"message_tree_id": "x", "prompt": "Hi"}\n', ":1: a message is not a JSON"),
}


@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.parametrize("argument", ["FILE", "--valid"])
def test_bad_files_end_in_one_line_and_no_output(run, name, argument):
    content, expected = BAD_FILES[name]
    bad, good = run.dir / "bad.jsonl", run.dir / "good.jsonl"
    bad.write_bytes(content)
    good.write_bytes(GOOD)
    if argument == "FILE":
        run(bad)
    else:
        run(good, "--valid", bad)
    run.assert_error(str(bad), expected)


VALUES = (None, 7, -1.5, True, "x", "", [], [1], {}, {"a": [{}]})
PARTS = {
    "tree": lambda row: row,
    "root": lambda row: row["prompt"],
    "reply": lambda row: row["prompt"]["replies"][0],
}


@pytest.mark.parametrize("part", PARTS)
def test_whatever_a_message_holds_in_whatever_key_it_is_counted_or_refused(run, part):
    """Every key missing or of every other type: rows, or one line of error."""
    outcomes = set()

    def prepare_world_with(row):
        save(run.dir / "x.jsonl", [tree(WORLD[0]), row, tree(WORLD[1])])
        run(run.dir / "x.jsonl", out="o")
        assert run.status == 0 or run.has_one_error_line(), row
        outcomes.add(run.status)
        outcomes.update(line.strip(" 0123456789") for line in run.out.split("\n"))

    def new_row():
        return json.loads(json.dumps(tree(ranked("x", 1, 0))))

    for key in PARTS[part](new_row()):
        row = new_row()
        del PARTS[part](row)[key]
        prepare_world_with(row)
        for value in VALUES:
            PARTS[part](row)[key] = value
            prepare_world_with(row)
    expected = {
        "tree": {0, 1, "trees dropped: no prompt", "trees dropped: not ready for export"},
        "root": {0, 1, "trees dropped: no text", "trees dropped: unknown role"},
        "reply": {0, 1, "replies dropped: unknown role", "replies dropped: no rank"},
    }
    assert expected[part] <= outcomes


def test_missing_files_and_folders_end_in_one_line(run):
    run(run.dir / "nowhere.jsonl").assert_error("nowhere.jsonl: No such file", "check the path")
    run(run.dir).assert_error("Is a directory; check the path")
    assert run(WORLD, out="export.jsonl").status == 1 and "export.jsonl: File exists" in run.err


def test_nothing_to_train_or_evaluate_on_is_an_error_that_says_where_to_look(run):
    run(WORLD, "--lang", "fi").assert_error("ift.jsonl: would have no row")
    assert run.count("trees dropped: language not fi") == 5
    run([ranked("d", None)], "--holdout", 0).assert_error("ift.jsonl: would have no row")
    valid = save(run.dir / "valid.jsonl", [ranked("s", 0, 1, synthetic=True)])
    run(WORLD, "--valid", valid).assert_error("test.jsonl: would have no row")
    run(WORLD[:1], "--holdout", 1e-9).assert_error("test.jsonl: would have no row")


@undivided
def test_a_failed_write_changes_nothing(run, monkeypatch):
    run(WORLD)
    before = contents(run.folder)
    real_write = Path.write_bytes

    def full_disk(path, data):
        if path.name.startswith("eft_ranked"):
            raise OSError(28, "No space left on device")
        return real_write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    run([ranked("new", 0, 1)])
    assert run.status == 1 and "out: No space left on device" in run.err
    monkeypatch.undo()
    assert contents(run.folder) == before


WRONG_FLAGS = [
    "--no-such-flag",
    "--holdout 1",
    "--holdout nan",
    "--holdout -0.1",
    "--holdout some",
    "--test-size 0",
    "--ift-size 0",
    "--eft-size -1",
    "--valid x --holdout 0.1",
]


@pytest.mark.parametrize("flags", WRONG_FLAGS)
def test_wrong_flags_end_in_status_2(run, flags):
    with pytest.raises(SystemExit) as stop:
        run(WORLD, *flags.split())
    assert stop.value.code == 2


def test_the_command_line_works_without_any_package_and_from_any_folder(tmp_path):
    save(tmp_path / "world.jsonl", WORLD)
    command = [sys.executable, "-S", "-I", str(FOLDER / "prepare.py")]
    command += ["world.jsonl", "--out", "deep/er"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and not result.stderr
    assert "found: 4 IFT pairs" in result.stdout
    (tmp_path / "world.jsonl").write_text("{")
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("error: world.jsonl:1: malformed JSON")


# ---- the templates


def test_the_judge_template_asks_for_reasons_first_and_the_score_last():
    text = (FOLDER / "judge.txt").read_text("utf-8")
    assert text.count("{prompt}") == text.count("{response}") == 1
    assert text.count("{") == text.count("}") == 2
    parts = ["Relevance", "Coverage", "Usefulness", "Clarity", "Expertise", "User: {prompt}"]
    parts += ["<response>{response}</response>", "at most 100 words", "\nScore: <total points>\n"]
    offsets = [text.index(part) for part in parts]
    assert offsets == sorted(offsets) and text.count("Score:") == 1


def test_the_propose_template_lists_eight_prompts_and_stops_at_the_ninth():
    text = (FOLDER / "propose.txt").read_text("utf-8")
    first_line, *items = text.split("\n")
    assert first_line
    assert items == [f"{i}. {{{i}}}" for i in range(1, 9)] + ["9."]


def test_both_templates_are_copied(run):
    run(WORLD)
    for name in ("judge.txt", "propose.txt"):
        assert (run.folder / name).read_bytes() == (FOLDER / name).read_bytes()
