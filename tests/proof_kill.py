"""tests/proof_kill.py: kill -9 at random moments -> files of an uninterrupted run (make kills).

For one process and for two: an uninterrupted run; a run that is killed from outside at least once
in every chapter of main, and started again until it is done; then all files of both, byte by byte
(metrics.jsonl without its clock). Of two processes sometimes both are killed, sometimes one, and
the other must end by itself. Last, a run that is killed on one process, goes on on two, is killed
and goes on on one: the same rows, by their keys.

    python tests/proof_kill.py --kills 20 --seed 0

The seed fixes chapters and fractions; the moment itself is one of the machine's.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["PYTHONWARNINGS"] = "ignore"  # a killed process leaves semaphores

import tiny
from tiny import World, assert_same, flags_of, products, start

from sample import read_jsonl

FLAGS = ("--sample-batch", 2, "--save-every", 3)  # several chunks a file, states a training
FLAGS += ("--keep-every", 2)
NO_DROPOUT = ("--dropout", 0, "--sft-lr", 2e-4, "--dpo-lr", 2e-4)  # worlds of any size are alike


class Event(NamedTuple):
    """A line of a trace: what began, and when."""

    time: float
    chapter: str  # as in "train_sft M1"
    part: str  # of the chapter; empty: the chapter itself


def read_trace(path: Path) -> list[Event]:
    events, chapter = [], ""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    for line in lines:
        if not line.endswith("\n"):
            continue
        moment, name = line.rstrip("\n").split(" ", 1)
        if name.startswith(" "):
            events.append(Event(float(moment), chapter, name.strip()))
        else:
            chapter = name
            events.append(Event(float(moment), chapter, ""))
    return events


def work_events(path: Path) -> list[Event]:
    """All parts of chapters but the loading of models."""
    return [event for event in read_trace(path) if event.part not in ("", "loads")]


def durations(path: Path) -> dict[str, float]:
    """Seconds that an uninterrupted run is at work in every chapter, in the order of the run."""
    times = defaultdict(list)
    for event in work_events(path):
        times[event.chapter].append(event.time)
    return {chapter: moments[-1] - moments[0] for chapter, moments in times.items()}


class Plan(NamedTuple):
    """A kill: of these processes, when this fraction of a chapter's work is done."""

    chapter: str
    fraction: float
    victims: list[int]


def kill_once(flags, folder: Path, world_size: int, spans: dict, plan: Plan) -> Event | None:
    """Start, and kill -9 as planned. Returns what was going on, or None if all had ended."""
    trace = folder / "trace"
    chapters = list(spans)
    hits = []

    def begin() -> float | None:
        """When the chapter, or one behind it, was at work first."""
        for event in work_events(trace):
            if chapters.index(event.chapter) >= chapters.index(plan.chapter):
                return event.time
        return None

    def watch(processes):
        while begin() is None:
            if not all(process.is_alive() for process in processes):
                return
            time.sleep(0.002)
        moment = begin() + plan.fraction * spans[plan.chapter]
        time.sleep(max(0.0, moment - time.time()))
        all_alive = all(process.is_alive() for process in processes)
        for victim in plan.victims:
            processes[victim].kill()
        if all_alive:
            hits.append(read_trace(trace)[-1])

    folder.mkdir(parents=True)
    result = start(flags, folder, world_size=world_size, trace_file=trace, watch=watch, timeout=60)
    if result.codes == [0] * world_size:
        return None
    for rank, code in enumerate(result.codes):  # who was not killed has ended by itself, in a line
        assert code == (-9 if rank in plan.victims else 1), (result.codes, result.err)
    assert "Traceback" not in result.err, result.err
    return hits[0] if hits else None


def run_to_its_end(flags, folder: Path, world_size: int, trace: Path | None = None):
    result = start(flags, folder, world_size=world_size, trace_file=trace)
    assert set(result.codes) == {0}, (result.codes, result.out, result.err)


def unfinished_files(out: Path) -> list[str]:
    """Parts of products and training states."""
    paths = [path for path in out.rglob("*") if path.suffix == ".part" or path.name.isdigit()]
    return sorted(str(path.relative_to(out)) for path in paths)


def prove(world: World, folder: Path, world_size: int, kills: int, rng: random.Random):
    """A killed run on some processes ends in the files of an uninterrupted one."""
    straight, trace = folder / "straight", folder / "trace"
    begin = time.time()
    run_to_its_end(flags_of(world, straight, *FLAGS), folder / "log", world_size, trace)
    spans, expected = durations(trace), products(straight)
    seconds = f"{time.time() - begin:.1f} s"
    print(f"{world_size} processes: {len(expected)} files in {seconds} without a kill", flush=True)
    chapters, events = list(spans), []
    to_kill = chapters + rng.choices(chapters, k=max(0, kills - len(chapters)))
    attempt = 0
    while to_kill:  # a second run if a chapter was over before it was hit
        out = folder / f"run{attempt}"
        flags = flags_of(world, out, *FLAGS)
        for chapter in sorted(to_kill, key=chapters.index):  # in the order of the run
            victims = [rng.randrange(world_size)]
            if rng.random() < 0.5:
                victims = list(range(world_size))
            plan = Plan(chapter, rng.random(), victims)
            attempt += 1
            event = kill_once(flags, folder / str(attempt), world_size, spans, plan)
            if event:
                events.append(event)
                print_kill(len(events), event, victims, out)
        run_to_its_end(flags, folder / f"end{attempt}", world_size)
        assert_same(products(out), expected)
        rest = [path for path in out.rglob("*") if path.suffix in (".tmp", ".part")]
        assert not rest and not list(out.rglob("checkpoint")), rest
        text = f"{len(events)} kills: all {len(expected)} files are byte-identical"
        print(f"{world_size} processes, {text}", flush=True)
        chapters_hit = {event.chapter for event in events}
        to_kill = [chapter for chapter in chapters if chapter not in chapters_hit]


def print_kill(number: int, event: Event, victims: list[int], out: Path):
    ranks = f"rank {victims}"
    files = " ".join(unfinished_files(out))
    print(f"{number:4} {event.chapter:20} {event.part:32} {ranks:12} keeps {files}", flush=True)


def row_keys(path: Path) -> list[tuple]:
    return [(row.get("id"), row.get("k"), row.get("vote")) for row in read_jsonl(path)]


def texts(path: Path) -> list[str]:
    keys = ("prompt", "response", "text", "chosen")
    return [" ".join(str(row.get(key)) for key in keys) for row in read_jsonl(path)]


def prove_another_world(world: World, folder: Path, rng: random.Random):
    """Killed on one process, on two, and finished on one: the rows of an uninterrupted run."""
    straight, out, trace = folder / "straight", folder / "killed", folder / "trace"
    run_to_its_end(flags_of(world, straight, *FLAGS, *NO_DROPOUT), folder / "log", 1, trace)
    flags, spans = flags_of(world, out, *FLAGS, *NO_DROPOUT), durations(trace)
    first_words = ("make_eft", "train_sft M1", "self_reward", "train_dpo", "evaluate M1")
    chapters = [chapter for chapter in spans if chapter.startswith(first_words)]
    for number, chapter in enumerate(chapters):
        world_size = 1 + number % 2
        plan = Plan(chapter, rng.random(), list(range(world_size)))
        event = kill_once(flags, folder / str(number), world_size, spans, plan)
        place = f"{event.chapter}, {event.part}" if event else "not hit"
        print(f"on {world_size}: {place}", flush=True)
    run_to_its_end(flags, folder / "end", 1)
    num_equal = num_rows = 0
    for path in sorted(straight.glob("*/*.jsonl")):
        ours = out / path.relative_to(straight)
        assert path.name == "pairs.jsonl" or row_keys(ours) == row_keys(path), path
        expected = texts(path)
        num_rows += len(expected)
        num_equal += sum(a == b for a, b in zip(texts(ours), expected, strict=False))
    text = f"{num_equal} of {num_rows} rows have the same text"
    print(f"another world: all keys are there; {text}", flush=True)


def main():
    parser = argparse.ArgumentParser(description="Kill -9 a tiny run at random moments.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=20, help="of each number of processes")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        world = tiny.make_world(Path(name))
        (world.data / "eft.jsonl").unlink()  # so that the SFT baseline makes it of rankings
        prompts = [tiny.question(rng) for _ in range(40)]
        tiny.write_rows(world.data / "eft_ranked.jsonl", tiny.rankings(rng, prompts))
        for world_size in (1, 2):
            prove(world, world.folder / f"on{world_size}", world_size, args.kills, rng)
        prove_another_world(world, world.folder / "other", rng)


if __name__ == "__main__":
    main()
