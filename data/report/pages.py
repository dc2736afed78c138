"""pages.py: the tables of a report -> report.md and report.html. judge.py loads this file by its path.

All text is escaped: what a model writes is shown, never obeyed. report.html is one file that loads nothing from
anywhere; its style is page.html. Figures come from figures.py, where matplotlib is installed.
"""

import html
import re
from pathlib import Path

from model import write_text
from sample import read_rows


def write(run: Path, r: dict, figures: list[dict], numbers: list[tuple], grade=None):
    """Write both pages, and each figure as a file, into the run folder.

    numbers: tables as (title, header, *rows), all of them strings. grade(prompt, response): the true score, if known.
    """
    texts, knobs = examples(run, r, grade), [(k, str(v) or "-") for k, v in r["config"].items() if k != "files"]
    knobs = ("Knobs of the run", ["knob", "value"], *knobs)
    title = f"Report of {run.resolve().name}"
    said = [f"Warning, {line}" for line in r["warnings"]]
    listed = "".join(f"<li>{html.escape(line)}</li>\n" for line in said)
    calm = "No warnings: every round is within its thresholds."
    text = [f"# {plain(title)}", "\n".join(f"- {plain(line)}" for line in said) or calm]
    body = [f"<ul>{listed}</ul>" if said else f"<p>{calm}</p>", '<div class="figures">']
    for f in figures:
        (run / "figures").mkdir(exist_ok=True)
        write_text(run / "figures" / f"{f['name']}.svg", f["svg"])
        text.append(f"## {f['title']}\n\n![{f['title']}](figures/{f['name']}.svg)\n\n{f['caption']}")
        body.append(f"<figure><h2>{f['title']}</h2>\n{f['svg']}<figcaption>{f['caption']}</figcaption></figure>")
    body += ["</div>", *(web(*t) for t in numbers), *(web(*t, kind="texts") for t in texts), web(*knobs)]
    write_text(run / "report.md", "\n\n".join([*text, *(markdown(*t) for t in [*numbers, *texts, knobs])]) + "\n")
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    page = page.replace("<!--title-->", html.escape(title)).replace("<!--body-->", "\n".join(body))
    write_text(run / "report.html", page)


def examples(run: Path, r: dict, grade=None, count: int = 10) -> list[tuple]:
    """Tables of texts: the answers of all models to some test prompts, and some judgements of each round."""

    def few(rows):  # at even distances
        return rows[:: max(1, len(rows) // count)][:count]

    def worth(prompt, response):
        return [number(grade(prompt, response))] if grade else []

    def read(name, file):
        return read_rows(run / name / f"{file}.jsonl", empty=True) if (run / name / f"{file}.jsonl").exists() else []

    true, found = ["true score"] * bool(grade), []
    answers = {name: {a["prompt"]: a["response"] for a in read(name, "test")} for name in r["models"]}
    for prompt in few(list(dict.fromkeys(p for mine in answers.values() for p in mine))):
        rows = [[name, *worth(prompt, mine[prompt]), mine[prompt]] for name, mine in answers.items() if prompt in mine]
        found.append((f"Test prompt: {prompt}", ["model", *true, "response"], *rows))
    for name in r["health"]:
        prompts = {p["id"]: p["prompt"] for p in read(name, "prompts")}
        responses = {c["id"]: c["response"] for c in read(name, "candidates") if c["k"] == 0}
        rows = []
        for j in few([j for j in read(name, "judgements") if j["k"] == j["vote"] == 0]):
            both = prompts[j["id"]], responses[j["id"]]
            rows.append([f"{name}:{j['id']}", *both, *worth(*both), number(j["score"]), j["text"]])
        title = f"The judge's words in the round that made {name} (--show ID tells the whole life of a prompt)"
        found.append((title, ["ID", "prompt", "response", *true, "score", "judgement"], *rows))
    return found


def number(x: float | None) -> str:
    return "-" if x is None else f"{x:g}"


def plain(text: str) -> str:
    """Text that Markdown shows as it is: no tags, no marks, on one line."""
    text = re.sub(r"([\\`*_\[\]()#|~$!])", r"\\\1", html.escape(text, quote=False))
    return "<br>".join(text.splitlines())


def markdown(title: str, *rows: list[str]) -> str:
    head, *body = ["| " + " | ".join(map(plain, row)) + " |" for row in rows]
    return "\n".join([f"## {plain(title)}", "", head, "|" + " --- |" * len(rows[0]), *body])


def web(title: str, *rows: list[str], kind: str = "numbers") -> str:
    """An HTML table; each cell knows the name of its column, for narrow screens that show cells below each other."""
    lines = [
        "".join(f'<{tag} data-name="{html.escape(name)}" dir="auto">{html.escape(cell)}</{tag}>'
                for name, cell in zip(rows[0], row, strict=True))
        for tag, row in zip(["th"] + ["td"] * len(rows), rows, strict=False)
    ]  # fmt: skip
    body = "".join(f"<tr>{line}</tr>\n" for line in lines[1:])
    return f"""<section><h2 dir="auto">{html.escape(title)}</h2><div class="{kind}"><table>
<thead><tr>{lines[0]}</tr></thead>
<tbody>{body}</tbody></table></div></section>"""
