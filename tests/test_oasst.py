"""data/oasst/prepare.py: the real sample's known counts, five shapes of one world, every drop and every bad input."""

import gzip
import importlib.util
import json
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
    base = {"message_id": ident, "parent_id": None, "text": text, "role": role, "lang": "en", "review_count": 3}
    base |= {"review_result": True, "deleted": False, "rank": None, "synthetic": False, "model_name": None}
    base |= {"emojis": {"+1": 2}, "labels": {"quality": {"value": 0.5, "count": 3}}, "detoxify": None, "events": None}
    return base | fields | {"replies": [reply | {"parent_id": ident} for reply in replies]}


def prompt(ident, *replies, text=None, **fields):
    return message(ident, text or f"Question {ident}?", role="prompter", replies=replies, **fields)


def ranked(ident, *ranks, **fields):
    """A prompt with one reply per rank, named p-0, p-1, ... in the order given."""
    replies = [message(f"{ident}-{i}", f"Answer {i} to {ident}.", rank=rank) for i, rank in enumerate(ranks)]
    return prompt(ident, *replies, **fields)


def drop_nulls(node):
    if isinstance(node, dict):
        return {name: drop_nulls(value) for name, value in node.items() if value is not None}
    return [drop_nulls(item) for item in node] if isinstance(node, list) else node


def flatten(root):
    stack = [root]
    while stack:
        node = dict(stack.pop())
        stack.extend(reversed(node.pop("replies")))
        yield node | {"message_tree_id": root["message_id"], "tree_state": "ready_for_export"}


def parallel_lists(row):
    labels = row["labels"] or {}
    row["emojis"] = {"name": list(row["emojis"] or {}), "count": list((row["emojis"] or {}).values())}
    row["labels"] = {"name": list(labels)} | {k: [v[k] for v in labels.values()] for k in ("value", "count")}
    return row


def tree(root, state="ready_for_export"):
    return {"message_tree_id": root["message_id"], "tree_state": state, "prompt": root, "origin": None}


SHAPES = {
    "tree without nulls": lambda roots: [drop_nulls(tree(root)) for root in roots],
    "tree with nulls": lambda roots: [tree(root) for root in roots],
    "nested messages": lambda roots: roots,
    "flat messages": lambda roots: [drop_nulls(row) for root in roots for row in flatten(root)],
    "hf rows": lambda roots: [parallel_lists(row) for root in roots for row in flatten(root)],
}


def save(path, rows, ascii_only=False):
    path.write_text("".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows), "utf-8", newline="")
    return path


def rows_of(path):
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


class Run:
    """One call of main: its status, what it printed and the files it left."""

    def __init__(self, tmp_path, capsys):
        self.dir, self.capsys = tmp_path, capsys

    def __call__(self, source, *flags, out="out"):
        if isinstance(source, list):
            source = save(self.dir / "export.jsonl", source)
        self.folder = self.dir / out
        self.status = oasst.main([str(source), "--out", str(self.folder), *map(str, flags)])
        self.out, self.err = self.capsys.readouterr()
        return self

    def rows(self, name):
        return rows_of(self.folder / f"{name}.jsonl")

    def counted(self, what):
        """The number printed in front of `what`, 0 where the line is missing."""
        lines = [line.split(maxsplit=1) for line in self.out.split("\n") if line.startswith("  ")]
        return next((int(number) for number, text in lines if text == what), 0)

    def fails(self, *parts):
        """It ended with status 1, one error line that holds the parts, and no file."""
        assert self.status == 1
        assert self.err.startswith("error: ") and self.err.count("\n") == 1 and "; " in self.err, self.err
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
    prompt("e", message("e-0", "First.", rank=0, replies=[ranked("e-1", 0)]), message("e-2", "Next.", rank=1)),
]


# ---- the real exports


@real
@pytest.mark.parametrize("name", ["en_100_tree", "en_100_message"])
def test_the_real_sample_gives_the_known_counts(run, name):
    assert run(REAL / f"{name}.jsonl").status == 0
    assert "found: 94 IFT pairs, 94 ranked prompts with 313 replies" in run.out
    assert (run.counted("trees read"), run.counted("trees dropped: synthetic")) == (100, 5)
    assert "wanted: 3200 prompts for IFT and 980 for EFT (enough for 1630 judgements:" in run.out  # 2 * 1630 / 3.33
    assert "divided: 72 prompts for IFT and 22 for EFT, 0 left over" in run.out  # 94 * 980 / (3200 + 980) = 22.04
    assert (len(run.rows("ift")), len(run.rows("eft_ranked"))) == (72, 22)
    assert sum(len(row["ranks"]) for row in run.rows("eft_ranked")) == 71
    assert not {row["prompt"] for row in run.rows("ift")} & {row["prompt"] for row in run.rows("eft_ranked")}
    for table in ("eft_eval.jsonl", "test.jsonl"):
        assert f"not written, no rows: {run.folder / table}" in run.out
    assert "nothing is held out" in run.out and "give --valid FILE ..." in run.out
    names = {"ift.jsonl", "eft_ranked.jsonl", "judge.txt", "propose.txt"}
    assert {path.name for path in run.folder.iterdir()} == names

    run(REAL / f"{name}.jsonl", "--keep-synthetic")
    assert "found: 99 IFT pairs, 99 ranked prompts with 330 replies" in run.out
    assert (len(run.rows("ift")), len(run.rows("eft_ranked"))) == (76, 23)


@real
def test_every_shape_of_the_real_sample_gives_the_same_bytes(run):
    roots = rows_of(REAL / "en_100_message.jsonl")
    sources = {"tree": REAL / "en_100_tree.jsonl", "message": REAL / "en_100_message.jsonl"}
    sources |= {name: save(run.dir / name, make(roots)) for name, make in SHAPES.items()}
    written = set()
    for name, source in sources.items():
        assert run(source, "--holdout", 0.2, out=f"{name}.out").status == 0
        written.add(tuple(path.read_bytes() for path in sorted(run.folder.iterdir())))
    assert len(written) == 1 and len(written.pop()) == 6


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
    assert all(row["ranks"] == sorted(row["ranks"]) and row["ranks"][0] == 0 for row in run.rows("eft_ranked"))


@real
@undivided
def test_real_quirks_orphans_deleted_replies_and_gaps_in_the_ranks(run):
    run(REAL / "messages_hf_rows.jsonl")
    assert "found: 5 IFT pairs, 5 ranked prompts with 13 replies" in run.out
    assert run.counted("messages dropped: orphan") == 3 and run.counted("replies dropped: deleted") == 1
    assert run.rows("eft_ranked")[-1]["ranks"] == [0, 1]  # 0 and 2 in the export


@real
@undivided
def test_gzip_is_known_by_content_and_held_out_trees_leave_the_training_rows(run):
    packed = run.dir / "no_gz_in_the_name"
    packed.write_bytes((REAL / "trees.jsonl.gz").read_bytes())
    run(REAL / "en_100_tree.jsonl", "--valid", packed)
    assert run.counted("trees dropped: in the --valid files too") == 18
    assert (len(run.rows("ift")), len(run.rows("eft_eval")), len(run.rows("test"))) == (76, 18, 18)
    plain = run(REAL / "trees.jsonl", out="plain").rows("eft_ranked")
    assert plain == rows_of(run.dir / "out" / "eft_eval.jsonl")


# ---- the rules, on the small world


@undivided
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ascii_only", [True, False])
def test_every_shape_gives_the_rows_worked_out_by_hand(run, shape, ascii_only):
    assert run(save(run.dir / "world.jsonl", SHAPES[shape](WORLD), ascii_only)).status == 0
    text = WORLD[0]["text"]
    answers = ["Answer 1 to a.", "Answer 0 to a.", "Answer 2 to a."]
    assert run.rows("ift") == [
        {"prompt": text, "response": "Answer 1 to a."},
        {"prompt": "Question b?", "response": "Answer 1 to b."},
        {"prompt": "Question c?", "response": "Answer 0 to c."},
        {"prompt": "Question e?", "response": "First."},
    ]
    assert "🦉".encode() in (run.folder / "ift.jsonl").read_bytes()
    assert run.rows("eft_ranked") == [
        {"prompt": text, "responses": answers, "ranks": [0, 1, 2]},
        {"prompt": "Question b?", "responses": ["Answer 1 to b.", "Answer 0 to b."], "ranks": [0, 1]},
        {"prompt": "Question e?", "responses": ["First.", "Next."], "ranks": [0, 1]},
    ]
    assert "found: 4 IFT pairs, 3 ranked prompts with 7 replies" in run.out
    assert (run.counted("trees read"), run.counted("messages read")) == (5, 18)
    assert run.counted("replies dropped: no rank") == 3
    assert run.counted("prompts without a ranked reply, no row") == 1
    assert run.counted("prompts with one ranked reply, no ranking") == 1


@undivided
def test_flat_rows_may_come_in_any_order_and_in_several_files(run):
    rows = SHAPES["flat messages"](WORLD)
    whole = run(rows, out="whole").rows("eft_ranked")
    front, back = save(run.dir / "front", rows[:2]), save(run.dir / "back", rows[2:])
    assert run(front, out="shards").status == 0 and oasst.main([str(front), str(back), "--out", str(run.folder)]) == 0
    assert run.rows("eft_ranked") == whole
    roots_last = [row for row in rows if "parent_id" in row] + [row for row in rows if "parent_id" not in row]
    assert run(roots_last, out="turned").rows("eft_ranked") == whole


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
    assert run(save(run.dir / "x.jsonl", [*WORLD, DROPPED_TREES[reason]], ascii_only=True)).status == 0
    assert run.counted(f"trees dropped: {reason}") == 1 and run.counted("trees read") == 6
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
    assert run.status == 0 and run.counted(f"replies dropped: {reason}") == 1
    assert run.rows("ift") == [{"prompt": "Question a?", "response": "Answer 1 to a."}]
    assert run.rows("eft_ranked")[0]["ranks"] == [0, 1]
    assert run.counted("pairs whose best reply is not rank 0") == 1


def test_blank_text_counts_as_none_and_a_null_review_is_no_objection(run):
    root = ranked("a", 0, 1, 2, review_result=None)
    root["replies"][0]["text"] = " \n"
    root["replies"][1]["review_result"] = None
    assert run([root]).rows("ift")[0]["response"] == "Answer 1 to a."
    assert run.counted("replies dropped: no text") == 1


def test_a_lone_rank_makes_a_pair_and_a_lone_unranked_reply_does_not(run):
    run([ranked("a", 2), ranked("b", None)])
    assert [row["prompt"] for row in run.rows("ift")] == ["Question a?"]
    assert not (run.folder / "eft_ranked.jsonl").exists() and "eft_ranked.jsonl" in run.out  # it says so


@undivided
def test_repeated_ranks_stay_ties_and_the_first_of_them_makes_the_pair(run):
    run([ranked("a", 3, 1, 1, 7.0)])
    assert run.rows("eft_ranked")[0]["ranks"] == [0, 0, 1, 2] and run.counted("rankings with ties") == 1
    assert run.rows("ift")[0]["response"] == "Answer 1 to a."


def test_other_languages_and_their_regions_can_be_asked_for(run):
    roots = [ranked("a", 0, lang="pt-BR"), ranked("b", 0, lang="en"), ranked("c", 0, lang="pto")]
    for root in roots:
        root["replies"][0]["lang"] = root["lang"]
    assert [row["prompt"] for row in run(roots, "--lang", "pt").rows("ift")] == ["Question a?"]
    assert run.counted("trees dropped: language not pt") == 2


@undivided
def test_trees_met_twice_count_once_in_whatever_shape_they_come_back(run):
    once = run(WORLD, out="once").rows("eft_ranked")
    sources = [str(save(run.dir / name, make(WORLD))) for name, make in SHAPES.items()]
    assert run(sources[0], "--holdout", 0, out="twice").status == 0
    assert oasst.main([*sources, "--out", str(run.folder)]) == 0
    run.out = run.capsys.readouterr().out
    assert run.rows("eft_ranked") == once and run.counted("trees dropped: duplicate") == 20


def test_orphans_and_circles_are_counted_and_left_out(run):
    rows = SHAPES["flat messages"]([ranked("a", 0, 1)])
    rows += [drop_nulls(message("o", "Whose am I?", rank=0, parent_id="gone"))]
    rows += [drop_nulls(message("p", "Below an orphan.", parent_id="o"))]
    rows += [drop_nulls(message(one, "Round.", parent_id=other)) for one, other in ("xy", "yz", "zx", "ww", "vx")]
    run(rows)
    assert run.status == 0 and len(run.rows("ift")) == 1
    assert run.counted("messages dropped: orphan") == 2
    assert run.counted("messages dropped: parents in a circle") == 5


@undivided
def test_unknown_keys_crlf_blank_lines_and_a_byte_order_mark_do_no_harm(run):
    lines = [json.dumps(row | {"CRITERIA": 1}) for row in SHAPES["tree with nulls"](WORLD)]
    (run.dir / "odd.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode())
    assert run(run.dir / "odd.jsonl", out="odd").status == 0 and len(run.rows("ift")) == 4


# ---- held-out prompts


def many(letter, number):
    return [ranked(f"{letter}{i}", 0, 1, *([2] if i % 3 else [])) for i in range(number)]


@undivided
def test_holdout_splits_every_row_to_one_side_and_the_totals_add_up(run):
    twins = [ranked(f"twin{i}", 0, 1, text=f"  QUESTION  a{i}?") for i in range(30)]
    run([*many("a", 60), *twins, ranked("z", None)], "--holdout", 0.3)
    train, held = ({row["prompt"] for row in run.rows(name)} for name in ("eft_ranked", "eft_eval"))
    assert train and held and not train & held and len(train) + len(held) == 90
    assert {row["prompt"] for row in run.rows("ift")} == train
    assert {text for text in held if "  " not in text} <= {row["prompt"] for row in run.rows("test")}
    for i in range(30):  # asked twice, still on one side
        assert (f"  QUESTION  a{i}?" in held) == (f"Question a{i}?" in held)
    replies = {name: sum(len(row["ranks"]) for row in run.rows(name)) for name in ("eft_ranked", "eft_eval")}
    assert f"found: 90 IFT pairs, 90 ranked prompts with {sum(replies.values())} replies" in run.out
    assert f"held out: {len(held)} IFT pairs, {len(held)} ranked prompts" in run.out
    assert f"eft_eval.jsonl: {len(held)} rows, {replies['eft_eval']} replies" in run.out


@undivided
def test_holdout_depends_on_the_prompt_and_the_seed_alone(run):
    held = {row["prompt"] for row in run(many("a", 60), "--holdout", 0.3, out="1").rows("eft_eval")}
    more = run([*many("b", 30), *many("a", 60)], "--holdout", 0.3, out="2").rows("eft_eval")
    other = run(many("a", 60), "--holdout", 0.3, "--seed", 1, out="3").rows("eft_eval")
    assert {row["prompt"] for row in more if " a" in row["prompt"]} == held
    assert {row["prompt"] for row in other} != held


@undivided
def test_valid_prompts_are_never_trained_on_by_id_or_by_text(run):
    valid = save(run.dir / "valid.jsonl", [*many("v", 5), ranked("w", None), ranked("s", 0, 1, synthetic=True)])
    reworded, twin = ranked("v0", 0, 1, text="Edited?"), ranked("t", 0, 1, text="QUESTION  v1?")
    run([*many("a", 3), reworded, twin], "--valid", valid)
    assert run.counted("trees dropped: in the --valid files too") == 2
    assert [row["prompt"] for row in run.rows("ift")] == [f"Question a{i}?" for i in range(3)]
    assert [row["prompt"] for row in run.rows("eft_eval")] == [f"Question v{i}?" for i in range(5)]
    assert [row["prompt"] for row in run.rows("test")] == [f"Question v{i}?" for i in range(5)] + ["Question w?"]


def test_the_test_prompts_are_a_seeded_draw_without_repeats_in_file_order(run):
    valid = save(run.dir / "valid.jsonl", [*many("v", 50), ranked("twin", 0, text="question V7?")])
    draws = []
    for seed in (0, 0, 1):
        run(WORLD, "--valid", valid, "--test-size", 20, "--seed", seed)
        draws.append([row["prompt"].lower() for row in run.rows("test")])
    assert draws[0] == draws[1] != draws[2] and len(set(draws[0])) == 20
    numbers = [int(text[10:-1]) for text in draws[0]]
    assert numbers == sorted(numbers)
    run(WORLD, "--valid", valid)
    assert len(run.rows("test")) == 50


def test_old_held_out_files_are_not_left_beside_rows_that_may_repeat_them(run):
    run(many("a", 20), "--holdout", 0.3)
    before = {path: path.read_bytes() for path in run.folder.iterdir()}
    run(many("a", 20))
    assert run.status == 1 and "eft_eval.jsonl: is of another run" in run.err
    assert {path: path.read_bytes() for path in run.folder.iterdir()} == before
    assert run(many("b", 20), "--holdout", 0.5).status == 0
    valid = save(run.dir / "valid.jsonl", [ranked("v", 0)])  # a test prompt, but no ranking
    assert run(many("c", 3), "--valid", valid).status == 1 and "eft_eval.jsonl: is of another run" in run.err


# ---- IFT and EFT


def sides(run) -> tuple[set[str], set[str]]:
    """The prompts of ift.jsonl and of eft_ranked.jsonl, which may be missing."""
    names = [name for name in ("ift", "eft_ranked") if (run.folder / f"{name}.jsonl").exists()]
    ift, eft = ([row["prompt"] for row in run.rows(name)] for name in (names + ["ift"])[:2])
    return set(ift), set(eft) if len(names) == 2 else set()


DIVISIONS = {  # ranked prompts with two replies each, lone ones, --ift-size, --eft-size -> IFT, EFT, left over
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
    roots = [ranked(f"r{i}", 0, 1) for i in range(rankings)] + [ranked(f"l{i}", 0) for i in range(lone)]
    run(roots, "--ift-size", ift_size, "--eft-size", eft_size)
    ift, eft = sides(run)
    assert not ift & eft and all(text.startswith("Question r") for text in eft)
    assert (len(ift), len(eft), rankings + lone - len(ift | eft)) == expected, run.out
    assert "divided: {} prompts for IFT and {} for EFT, {} left over".format(*expected) in run.out
    order = [root["text"] for root in roots]
    assert [row["prompt"] for row in run.rows("ift")] == [text for text in order if text in ift]


def test_the_division_hangs_on_texts_and_seed_and_not_on_the_order_of_the_file(run):
    roots = many("a", 60)
    once = sides(run(roots, "--holdout", 0.2, out="1"))
    assert once == sides(run(roots[::-1], "--holdout", 0.2, out="2")) != sides(run(roots, "--seed", 1, out="3"))
    held = {row["prompt"] for row in rows_of(run.dir / "1" / "eft_eval.jsonl")}
    few = [sides(run(r, "--ift-size", 9, "--eft-size", 9, out=f"few{i}")) for i, r in enumerate((roots, roots[::-1]))]
    assert few[0] == few[1] and len(few[0][0]) == 9
    assert min(map(len, once)) > 5 and len(held | once[0] | once[1]) == len(held) + sum(map(len, once)) == 60


def test_a_prompt_asked_twice_is_never_on_both_sides(run):
    roots = [*many("a", 40), *(ranked(f"t{i}", *([0, 1][: 1 + i % 2]), text=f" QUESTION  a{i}?") for i in range(40))]
    met = 0
    for seed in range(5):
        ift, eft = ({oasst.key(text) for text in side} for side in sides(run(roots, "--seed", seed, out=f"{seed}")))
        assert ift and eft and not ift & eft and len(ift | eft) == 40
        lone = [i for i in range(0, 40, 2) if f"question a{i}?" in eft]  # no ranking, and not for IFT any more
        assert f"{len(lone)} left over" in run.out
        met += len(lone)
    assert met > 5


# ---- --exclude

EXCLUDED = ["QUESTION   a1?\n", "Question a3?", '"Quoted" and ["odd"]', "unheard of"]
EXCLUDE_FILES = {
    "AlpacaEval": json.dumps([{"dataset": "x", "instruction": text, "output": "y"} for text in EXCLUDED], indent=2),
    "a list of texts": json.dumps(EXCLUDED),
    "lines of objects": "".join(json.dumps({"prompt": text, "instruction": ""}) + "\n\n" for text in EXCLUDED),
    "lines of JSON texts": "".join(json.dumps(text) + "\n" for text in EXCLUDED),
    "plain lines": "\r\n".join(text.strip() for text in reversed(EXCLUDED)),
    "both kinds of lines": f"{EXCLUDED[0]}{json.dumps({'prompt': EXCLUDED[1]})}\n{json.dumps(EXCLUDED[2])}",
}


@pytest.mark.parametrize("shape", EXCLUDE_FILES)
@pytest.mark.parametrize("wrap", [lambda b: b, lambda b: b"\xef\xbb\xbf" + b, gzip.compress], ids=["", "BOM", "gzip"])
def test_prompts_of_any_file_of_prompts_are_left_out_of_training(run, shape, wrap):
    (run.dir / "prompts").write_bytes(wrap(EXCLUDE_FILES[shape].encode()))
    run([*many("a", 9), ranked("odd", 0, 1, text='"Quoted" and ["odd"]')], "--exclude", run.dir / "prompts")
    ift, eft = sides(run)
    assert ift | eft == {f"Question a{i}?" for i in (0, 2, 4, 5, 6, 7, 8)} and ift and eft
    assert run.counted("trees dropped: in the --exclude files") == 3
    assert f"prompts: {3 if shape.startswith('both') else 4} different prompts to leave out" in run.out


def test_several_files_can_be_excluded_and_a_useless_one_is_visible(run):
    for i in range(3):
        (run.dir / f"x{i}").write_text(f"Question a{i}?")
    (run.dir / "page.html").write_text("<!DOCTYPE html>\n<p>Not found")
    run(many("a", 9), "--exclude", run.dir / "x0", run.dir / "x1", "--exclude", run.dir / "x2")
    assert run.counted("trees dropped: in the --exclude files") == 3
    run(many("a", 9), "--exclude", run.dir / "page.html")
    assert "      0 trees dropped: in the --exclude files" in run.out


def test_excluded_prompts_may_still_examine(run):
    valid = save(run.dir / "valid.jsonl", many("v", 3))
    (run.dir / "x").write_text("Question v1?\nQuestion a1?")
    run(many("a", 9), "--valid", valid, "--exclude", run.dir / "x")
    assert len(run.rows("test")) == len(run.rows("eft_eval")) == 3 and "Question a1?" not in set.union(*sides(run))


BAD_EXCLUDES = {
    "list cut short": (b'[{"instruction": "a"}, {"instr', ": begins with [ but is no JSON list in UTF-8 (Unterminated"),
    "list in latin-1": ('["\u00e9"]'.encode("latin-1"), ": begins with [ but is no JSON list in UTF-8"),
    "nested without end": (b"[" * 200_000, ": begins with [ but is no JSON list in UTF-8"),
    "empty list": (b" [ ]", ": no prompt in the file"),
    "empty": (b"\n", ":1: no rows"),
    "malformed line": (b'a\n{"prompt": \n', ":2: malformed JSON"),
    "lines in latin-1": ("a\n\u00e9".encode("latin-1"), ":2: byte 1 of the line is not UTF-8"),
    "object of another kind": (b'[{"prompt": "a"}, {"turns": []}]', ": item 2: no text in instruction or prompt"),
    "null": (b'{"instruction": null}', ":1: no text in instruction or prompt"),
    "a number": (b'{"prompt": 7}', ":1: no text in instruction or prompt"),
    "a blank": (b'["a", " "]', ": item 2: no text in instruction or prompt"),
    "numbers": (b"[1]", ": item 1: no text in instruction or prompt"),
    "gzip cut short": (gzip.compress(b'["a"]')[:-9], ":1: gzip data cut short"),
}


@pytest.mark.parametrize("name", BAD_EXCLUDES)
def test_a_bad_file_of_prompts_ends_in_one_line_and_no_output(run, name):
    content, expected = BAD_EXCLUDES[name]
    (run.dir / "x.json").write_bytes(content)
    run(WORLD, "--exclude", run.dir / "x.json").fails(f"{run.dir / 'x.json'}{expected}")
    run(WORLD, "--exclude", run.dir / "none").fails("none: No such file")


# ---- bad input


GOOD = json.dumps(WORLD[2]).encode() + b"\n"
BAD_FILES = {
    "malformed JSON": (GOOD + b'{"message_id": "x", \n' + GOOD, ":2: malformed JSON"),
    "cut short": (GOOD + GOOD[:100], ":2: malformed JSON"),
    "nested without end": (b'{"message_id": ' + b"[" * 200_000, ":1: malformed JSON"),
    "a parquet file": (b"PAR1\x15\x04\xff\xfe\n", ":1: byte 7 of the line is not UTF-8"),
    "latin-1": (GOOD + '{"message_id": "é"}'.encode("latin-1"), ":2: byte 17 of the line is not UTF-8"),
    "a list": (GOOD + b"[1]\n", ":2: not a JSON object"),
    "a thread": (b'{"thread_id": "t", "thread": []}\n', ":1: an object of unknown kind"),
    "empty": (b"", ":1: no rows"),
    "blank": (b"\n \n", ":1: no rows"),
    "empty gzip": (gzip.compress(b""), ":1: no rows"),
    "gzip cut short": (gzip.compress(GOOD)[:-20], ":1: gzip data cut short"),
    "gzip without its end": (gzip.compress(GOOD)[:-4], "gzip data cut short"),
    "gzip damaged": (gzip.compress(GOOD)[:30] + b"damage" + gzip.compress(GOOD)[36:], "gzip data cut short or dam"),
    "gzip header alone": (b"\x1f\x8b", ":1: gzip data cut short"),
    "bad id": (GOOD + b'{"message_id": 7}\n', ":2: message_id is not a string"),
    "bad parent": (b'{"message_id": "x", "parent_id": 7}\n', ":1: parent_id is not a string"),
    "rank a list": (b'{"message_id": "x", "rank": []}\n', ":1: rank is not a whole number"),
    "bad rank": (b'{"message_id": "x", "rank": "best"}\n', ":1: rank is not a whole number"),
    "rank NaN": (b'{"message_id": "x", "rank": NaN}\n', ":1: rank is not a whole number"),
    "bad replies": (b'{"message_id": "x", "replies": {"a": 1}}\n', ":1: replies is not a list"),
    "bad reply": (b'{"message_id": "x", "replies": ["a"]}\n', ":1: a message is not a JSON object"),
    "bad prompt": (b'{"message_tree_id": "x", "prompt": "Hi"}\n', ":1: a message is not a JSON object"),
}


@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.parametrize("place", ["FILE", "--valid"])
def test_bad_files_end_in_one_line_and_no_output(run, name, place):
    content, expected = BAD_FILES[name]
    bad, good = run.dir / "bad.jsonl", run.dir / "good.jsonl"
    bad.write_bytes(content)
    good.write_bytes(GOOD)
    run(*([bad] if place == "FILE" else [good, "--valid", bad]))
    run.fails(str(bad), expected)


def test_whatever_a_message_holds_in_whatever_key_it_is_counted_or_refused(run):
    """Every key of a tree, of a root and of a reply, missing or of every other type: one line or rows, never more."""
    outcomes = set()
    for where in (lambda row: row, lambda row: row["prompt"], lambda row: row["prompt"]["replies"][0]):
        for name in where(tree(WORLD[0])):
            for value in (..., None, 7, -1.5, True, "x", "", [], [1], {}, {"a": [{}]}):
                row = json.loads(json.dumps(tree(ranked("x", 1, 0))))
                where(row)[name] = value
                if value is ...:
                    del where(row)[name]
                save(run.dir / "x.jsonl", [tree(WORLD[0]), row, tree(WORLD[1])])
                run(run.dir / "x.jsonl", out="o")
                assert run.status == 0 or run.err.startswith("error: ") and run.err.count("\n") == 1, (name, value)
                outcomes |= {run.status, *(line.strip(" 0123456789") for line in run.out.split("\n"))}
    expected = {
        "trees dropped: no text",
        "replies dropped: unknown role",
        "messages dropped: parents in a circle",
        0,
        1,
    }
    assert expected | {"trees dropped: no prompt", "replies dropped: no rank"} <= outcomes


def test_missing_files_and_folders_end_in_one_line(run):
    run(run.dir / "nowhere.jsonl").fails("nowhere.jsonl: No such file or directory; check the path")
    run(run.dir).fails("Is a directory; check the path")
    assert run(WORLD, out="export.jsonl").status == 1 and "export.jsonl: File exists" in run.err


def test_nothing_to_train_or_examine_on_is_an_error_that_says_where_to_look(run):
    run(WORLD, "--lang", "fi").fails("ift.jsonl: would have no row")
    assert run.counted("trees dropped: language not fi") == 5
    run([ranked("d", None)], "--holdout", 0).fails("ift.jsonl: would have no row")
    valid = save(run.dir / "valid.jsonl", [ranked("s", 0, 1, synthetic=True)])
    run(WORLD, "--valid", valid).fails("test.jsonl: would have no row")
    run(WORLD[:1], "--holdout", 1e-9).fails("test.jsonl: would have no row")


@undivided
def test_a_failed_write_changes_nothing(run, monkeypatch):
    run(WORLD)
    before = {path.name: path.read_bytes() for path in run.folder.iterdir()}
    real_write = Path.write_bytes

    def full_disk(path, data):
        if path.name.startswith("eft_ranked"):
            raise OSError(28, "No space left on device")
        return real_write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    run([ranked("new", 0, 1)])
    assert run.status == 1 and "out: No space left on device" in run.err
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in run.folder.iterdir()} == before


@pytest.mark.parametrize(
    "flags",
    [
        ["--no-such-flag"],
        ["--holdout", "1"],
        ["--holdout", "nan"],
        ["--holdout", "-0.1"],
        ["--holdout", "some"],
        ["--test-size", "0"],
        ["--ift-size", "0"],
        ["--eft-size", "-1"],
        ["--valid", "x", "--holdout", "0.1"],
    ],
)
def test_wrong_flags_end_in_status_2(run, flags):
    with pytest.raises(SystemExit) as stop:
        run(WORLD, *flags)
    assert stop.value.code == 2


def test_the_command_line_works_without_any_package_and_from_any_folder(tmp_path):
    save(tmp_path / "world.jsonl", WORLD)
    command = [sys.executable, "-S", "-I", str(FOLDER / "prepare.py"), "world.jsonl", "--out", "deep/er"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr and "found: 4 IFT pairs" in done.stdout
    (tmp_path / "world.jsonl").write_text("{")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: world.jsonl:1: malformed JSON")


# ---- the templates


def test_the_judge_template_asks_for_reasons_first_and_the_score_last():
    text = (FOLDER / "judge.txt").read_text("utf-8")
    assert text.count("{prompt}") == text.count("{response}") == 1
    assert text.count("{") == text.count("}") == 2
    places = ["Relevance", "Coverage", "Usefulness", "Clarity", "Expertise", "User: {prompt}"]
    places += ["<response>{response}</response>", "at most 100 words", "\nScore: <total points>\n"]
    found = [text.index(place) for place in places]
    assert found == sorted(found) and text.count("Score:") == 1


def test_the_propose_template_lists_eight_prompts_and_stops_at_the_ninth():
    text = (FOLDER / "propose.txt").read_text("utf-8")
    head, *numbered = text.split("\n")
    assert head and numbered == [f"{i}. {{{i}}}" for i in range(1, 9)] + ["9."]


def test_both_templates_are_copied(run):
    run(WORLD)
    for name in ("judge.txt", "propose.txt"):
        assert (run.folder / name).read_bytes() == (FOLDER / name).read_bytes()
