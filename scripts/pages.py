"""scripts/pages.py: the tables of a report -> plain text, report.md and report.html.

All text is escaped: what a model writes is shown, never obeyed. report.html is one file that
loads nothing from anywhere; its style is page.html. Figures come from scripts/figures.py, where
matplotlib is installed.
"""

import html
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from judge import MAX_SCORE
from model import atomic_write
from sample import read_jsonl

HEADING_WIDTH = 14  # characters a line in the headings of a printed table
NUM_EXAMPLES = 10  # test prompts, and judgements of each round

# ---- plain text ------------------------------------------------------------------------------


class Table(NamedTuple):
    """Rows of cells: texts, whole numbers, floats, or None for what is not known."""

    title: str
    columns: list[str]
    rows: list[tuple]
    note: str = ""
    kind: str = "numbers"  # or "texts"


def cell_text(value) -> str:
    """Two decimals; nothing is a dash."""
    if value is None:
        return "-"
    return f"{value:z.2f}" if isinstance(value, float) else str(value)


def wrap_headings(columns: list[str]) -> list[list[str]]:
    """Long names over several lines, their last words above the numbers."""
    headings = [textwrap.wrap(name, HEADING_WIDTH) or [""] for name in columns]
    height = max(len(heading) for heading in headings)
    headings = [[""] * (height - len(heading)) + heading for heading in headings]
    return [list(line) for line in zip(*headings, strict=True)]


def table(title: str, columns: list[str], rows: list[tuple], note: str = "") -> str:
    """Plain text: names on the left, numbers on the right, a note below."""
    lines = wrap_headings(columns)
    for row in rows:
        lines.append([cell_text(value) for value in row])
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    text = [title]
    for first, *others in lines:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        text.append("  " + "  ".join(cells).rstrip())
    if note:
        text.append(textwrap.fill(note, 99, initial_indent="  ", subsequent_indent="  "))
    return "\n".join(text)


# ---- tables ----------------------------------------------------------------------------------


def percent(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.1f}"


def percent_of(value: float | None, count: int) -> str | None:
    return None if value is None else f"{100 * value:.1f}% of {count:,}"


def one_decimal(value: float | None) -> str | None:
    return None if value is None else f"{value:.1f}"


def tables(r: dict) -> Iterator[Table]:
    """The report's tables, the paper's figure 3 and table 4 first."""
    if r["head_to_head"]:
        yield head_to_head_table(
            "Head to head on the test prompts, by the true score", r["head_to_head"]
        )
    yield from answer_tables(r["models"])
    if r["agreement"]:
        yield agreement_table(r["agreement"])
    if r["rounds"]:
        yield outcome_table(r["rounds"])
        yield response_table(r["rounds"])
        yield vote_table(r["rounds"])
    if any(stats["pairs"] for stats in r["rounds"].values()):
        yield pair_table(r["rounds"])


def head_to_head_table(title: str, results: dict[str, dict]) -> Table:
    """Results of head_to_head by the names of who is compared, "M2 vs M1"."""
    rows = []
    for name, result in results.items():
        shares = [f"{result[key]:.1f}" for key in ("win", "tie", "lose")]
        difference = result["win"] - result["lose"]
        interval = f"[{result['low']:+.1f}, {result['high']:+.1f}]"
        rows.append((name, *shares, f"{difference:+.1f}", interval, sum(result["counts"])))
    columns = ["", "win %", "tie %", "lose %", "win - lose", "95 % interval", "prompts"]
    note = "win - lose and its interval (a bootstrap over prompts) are in points."
    return Table(title, columns, rows, note)


def answer_tables(models: dict[str, dict]) -> Iterator[Table]:
    models = {name: model for name, model in models.items() if model["answers"]}
    if models:
        yield length_table(models)
    if any("true_mean" in model for model in models.values()):
        yield quality_table(models)


def length_table(models: dict[str, dict]) -> Table:
    columns = ["", "answers", "tokens", "characters", "cut by the length limit %"]
    rows = []
    for name, model in models.items():
        lengths = [one_decimal(model["tokens"]), one_decimal(model["characters"])]
        rows.append((name, model["answers"], *lengths, percent(model["truncated"])))
    return Table("Length of the answers to the test prompts (means)", columns, rows)


def quality_table(models: dict[str, dict]) -> Table:
    criteria = list(next(iter(models.values())).get("criteria", {}))
    columns = ["", "true score", *(f"{name} %" for name in criteria)]
    rows = []
    for name, model in models.items():
        rates = [percent(model["criteria"][criterion]) for criterion in criteria]
        rows.append((name, model["true_mean"], *rates))
    note = "The percentages: answers that earn each point (oracle.py says what each takes)."
    title = (
        f"True score of the answers to the test prompts by the oracle (means, 0 to {MAX_SCORE})"
    )
    return Table(title, columns, rows, note if criteria else "")


def agreement_table(judges: dict[str, dict]) -> Table:
    columns = [
        "",
        "pairs in people's order",
        "pairs of equal score",
        "prompts wholly in people's order",
        f"scores of {MAX_SCORE} that people rank first",
        "spearman",
        "kendall",
        "readable judgements",
    ]
    rows = []
    notes = [
        "A pair: two responses that people rank differently. The first column leaves out those "
        "of equal score; report.json has the two other ways to count them."
    ]
    for name, result in judges.items():
        if result["parse_rate"]:
            shares = [
                percent_of(result["pairwise"], result["pairs_without_ties"]),
                percent_of(result["tie_rate"], result["pairs"]),
                percent_of(result["exact_match"], result["prompts"]),
                percent_of(result["top_score_is_best"], result["top_scores"]),
            ]
            readable = percent_of(result["parse_rate"], result["judgements"])
            rows.append((name, *shares, result["spearman"], result["kendall"], readable))
        else:
            notes.append(why_not_in_the_table(name, result))
    return Table("The judge against held-out human rankings", columns, rows, " ".join(notes))


def why_not_in_the_table(name: str, result: dict) -> str:
    count = f"{result['judgements']:,}"
    line = f"{name} is not in the table: none of its {count} judgements ends in a score"
    if name == "SFT":
        return line + ", as it has learned from instructions alone and never saw a judgement."
    return line + " that can be read."


def outcome_table(rounds: dict[str, dict]) -> Table:
    outcomes = next(iter(rounds.values()))["outcomes"]
    columns = ["makes", "prompts", *outcomes]
    rows = []
    for name, stats in rounds.items():
        counts = [stats["outcomes"][outcome] for outcome in outcomes]
        rows.append((name, stats["prompts"], *counts))
    note = (
        "Counts. Only a pair is learned from; a tie: the best and the worst mean score are equal."
    )
    return Table(
        "What became of the new prompts in the round that makes each model", columns, rows, note
    )


def response_table(rounds: dict[str, dict]) -> Table:
    columns = [
        "makes",
        "responses",
        "mean tokens",
        "mean score",
        "score-length correlation",
        "cut by the length limit %",
        "empty, not judged",
        "too long to be judged",
    ]
    rows = []
    for name, stats in rounds.items():
        row = [name, stats["responses"], one_decimal(stats["length"]), stats["score_mean"]]
        row += [stats["score_length_correlation"], percent(stats["truncated"])]
        row += [stats["empty"], stats["no_room_for_judge"]]
        rows.append(tuple(row))
    title = "The responses to the new prompts, by the model before"
    return Table(title, columns, rows, "The correlation is Spearman's, of ranks.")


def vote_table(rounds: dict[str, dict]) -> Table:
    scores = sorted({s for stats in rounds.values() for s in stats["scores"]}, key=float)
    columns = ["makes", "judgements", "readable %", *(f"score {score} %" for score in scores)]
    rows = []
    for name, stats in rounds.items():
        num_readable = sum(stats["scores"].values())
        shares = []
        for score in scores:
            count = stats["scores"].get(score, 0)
            shares.append(percent(count / num_readable) if num_readable else None)
        rows.append((name, stats["judgements"], percent(stats["parse_rate"]), *shares))
    note = "The share of each score is that among the judgements that can be read."
    return Table(
        "The judgements of these responses, by the model that wrote them", columns, rows, note
    )


def pair_table(rounds: dict[str, dict]) -> Table:
    sides = ("chosen", "rejected")
    columns = ["makes", "pairs"]
    columns += [f"{side}: mean score" for side in sides]
    with_oracle = any("true_chosen" in stats for stats in rounds.values())
    if with_oracle:
        columns += [f"{side}: true score" for side in sides]
    columns += [f"{side}: tokens" for side in sides]
    rows = []
    for name, stats in rounds.items():
        row = [name, stats["pairs"]]
        row += [stats[f"score_{side}"] for side in sides]
        if with_oracle:
            row += [stats.get(f"true_{side}") for side in sides]
        row += [one_decimal(stats[f"length_{side}"]) for side in sides]
        rows.append(tuple(row))
    return Table("The pairs that each model learned from (means)", columns, rows)


def headline(config: dict) -> str:
    """How the answers of the run were sampled, since scores depend on it."""
    knobs = {"temperature": "temperature", "top_p": "top-p", "max_response": "max-response"}
    settings = [f"{name} {config[key]}" for key, name in knobs.items() if key in config]
    text = ", ".join(settings) or "settings that config.json does not hold"
    return f"Answers of this run were sampled with {text}."


def calm_line(r: dict) -> str:
    """What is said where there are no warnings."""
    if any(stats["state"] == "finished" for stats in r["rounds"].values()):
        return "No warnings: every finished round is within its thresholds."
    return "No warnings yet: no self-rewarding round is finished."


def report_text(r: dict) -> str:
    """The report as it is printed."""
    parts = [headline(r["config"])]
    if r["missing"]:
        parts.append("\n  ".join(["Missing", *r["missing"]]))
    if r["warnings"]:
        parts.append("\n  ".join(["Warnings", *r["warnings"]]))
    else:
        parts.append(calm_line(r))
    for t in tables(r):
        parts.append(table(t.title, t.columns, t.rows, t.note))
    return "\n\n".join(parts)


# ---- the two pages ---------------------------------------------------------------------------


def write(run: Path, r: dict, figures: list[dict], grade: Callable | None):
    """Write report.md and report.html, and each figure as a file, into the run folder.

    r: a report; figures: {"name", "title", "caption", "svg"}; grade(prompt, response): the true
    score, where somebody knows it.
    """
    title = f"Report of {run.resolve().name}"
    content = [*tables(r), *examples(run, r, grade), knobs_table(r["config"])]
    for figure in figures:
        (run / "figures").mkdir(exist_ok=True)
        atomic_write(run / "figures" / f"{figure['name']}.svg", figure["svg"])
    atomic_write(run / "report.md", markdown_page(title, r, content, figures))
    atomic_write(run / "report.html", html_page(title, r, content, figures))


def knobs_table(config: dict) -> Table:
    rows = [(name, str(value) or "-") for name, value in config.items() if name != "files"]
    return Table("Knobs of the run", ["knob", "value"], rows)


def markdown_page(title: str, r: dict, content: list[Table], figures: list[dict]) -> str:
    parts = [f"# {plain(title)}", plain(headline(r["config"]))]
    parts.append("\n".join(f"- Missing: {plain(line)}" for line in r["missing"]))
    parts.append("\n".join(f"- Warning, {plain(line)}" for line in r["warnings"]))
    if not r["warnings"]:
        parts.append(calm_line(r))
    for figure in figures:
        parts.append(f"## {figure['title']}")
        parts.append(f"![{figure['title']}](figures/{figure['name']}.svg)")
        parts.append(figure["caption"])
    parts += [markdown_table(t) for t in content]
    return "\n\n".join(part for part in parts if part) + "\n"


def html_page(title: str, r: dict, content: list[Table], figures: list[dict]) -> str:
    body = [f"<p>{html.escape(headline(r['config']))}</p>"]
    if r["missing"]:
        body.append(html_list("missing", "Missing: ", r["missing"]))
    if r["warnings"]:
        body.append(html_list("warnings", "Warning, ", r["warnings"]))
    else:
        body.append(f"<p>{calm_line(r)}</p>")
    body.append('<div class="figures">')
    for figure in figures:
        body.append(f"<figure><h2>{figure['title']}</h2>")
        body.append(f"{figure['svg']}<figcaption>{figure['caption']}</figcaption></figure>")
    body.append("</div>")
    body += [html_table(t) for t in content]
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    page = page.replace("<!--title-->", html.escape(title))
    return page.replace("<!--body-->", "\n".join(body))


# ---- tables of texts -------------------------------------------------------------------------


def examples(run: Path, r: dict, grade: Callable | None) -> list[Table]:
    """Answers of all models to some test prompts, and some judgements of each round."""
    tables = answer_examples(run, list(r["models"]), grade)
    for name in r["rounds"]:
        tables.append(judgement_examples(run / name, grade))
    return tables


def some_of(rows: list) -> list:
    """NUM_EXAMPLES of them at even distances, or all."""
    step = max(1, len(rows) // NUM_EXAMPLES)
    return rows[::step][:NUM_EXAMPLES]


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def true_score(grade: Callable | None, prompt: str, response: str) -> list[str]:
    """The cells of the column "true score", which is there where somebody knows it."""
    return [number(grade(prompt, response))] if grade else []


def answer_examples(run: Path, names: list[str], grade: Callable | None) -> list[Table]:
    answers = {}  # name -> {prompt: response}
    prompts = {}  # as an ordered set
    for name in names:
        rows = read_jsonl(run / name / "test.jsonl", allow_empty=True, missing_ok=True)
        answers[name] = {row["prompt"]: row["response"] for row in rows}
        prompts |= dict.fromkeys(answers[name])
    columns = ["model", *(["true score"] if grade else []), "response"]
    tables = []
    for prompt in some_of(list(prompts)):
        rows = []
        for name in names:
            if prompt in answers[name]:
                response = answers[name][prompt]
                rows.append((name, *true_score(grade, prompt, response), response))
        tables.append(Table(f"Test prompt: {prompt}", columns, rows, kind="texts"))
    return tables


def judgement_examples(folder: Path, grade: Callable | None) -> Table:
    """First votes on first responses, from the round that makes a model."""
    files = ("prompts", "candidates", "judgements")
    prompts, candidates, judgements = (
        read_jsonl(folder / f"{file}.jsonl", allow_empty=True, missing_ok=True) for file in files
    )
    texts = {row["id"]: row["prompt"] for row in prompts}
    responses = {row["id"]: row["response"] for row in candidates if row["k"] == 0}
    first_votes = [row for row in judgements if row["k"] == row["vote"] == 0]
    rows = []
    for row in some_of(first_votes):
        prompt, response = texts[row["id"]], responses[row["id"]]
        address = f"{folder.name}:{row['id']}"
        scores = [*true_score(grade, prompt, response), number(row["score"])]
        rows.append((address, prompt, response, *scores, row["text"]))
    columns = ["ID", "prompt", "response", *(["true score"] if grade else []), "score"]
    title = f"Some judgements of the round that makes {folder.name}"
    note = "python -m scripts.report RUN --trace ID tells the life of a prompt."
    return Table(title, [*columns, "judgement"], rows, note, kind="texts")


# ---- Markdown and HTML -----------------------------------------------------------------------


def plain(text: str) -> str:
    """Text that Markdown shows as it is: no tags, no marks, on one line."""
    text = re.sub(r"([\\`*_\[\]()#|~$!])", r"\\\1", html.escape(text, quote=False))
    return "<br>".join(text.splitlines())


def markdown_row(cells: list[str]) -> str:
    return f"| {' | '.join(plain(cell) for cell in cells)} |"


def markdown_table(t: Table) -> str:
    lines = [f"## {plain(t.title)}", "", markdown_row(t.columns), "|" + " --- |" * len(t.columns)]
    lines += [markdown_row([cell_text(value) for value in row]) for row in t.rows]
    if t.note:
        lines += ["", plain(t.note)]
    return "\n".join(lines)


def html_list(kind: str, start: str, lines: list[str]) -> str:
    items = "".join(f"<li>{start}{html.escape(line)}</li>\n" for line in lines)
    return f'<ul class="{kind}">{items}</ul>'


def html_row(tag: str, names: list[str], cells: list[str]) -> str:
    """Each cell knows its column's name, for narrow screens that show cells below each other."""
    parts = []
    for name, cell in zip(names, cells, strict=True):
        label = f'data-name="{html.escape(name)}" dir="auto"'
        parts.append(f"<{tag} {label}>{html.escape(cell)}</{tag}>")
    return f"<tr>{''.join(parts)}</tr>"


def html_table(t: Table) -> str:
    head = html_row("th", t.columns, t.columns)
    rows = [html_row("td", t.columns, [cell_text(value) for value in row]) for row in t.rows]
    body = "\n".join(rows)
    note = f"<p>{html.escape(t.note)}</p>" if t.note else ""
    return f"""<section><h2 dir="auto">{html.escape(t.title)}</h2><div class="{t.kind}"><table>
<thead>{head}</thead>
<tbody>{body}</tbody></table></div>{note}</section>"""
