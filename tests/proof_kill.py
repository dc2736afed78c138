"""kill -9 the toy run at 20 random moments, start it again each time, and compare what it ends in: make kills.

For one process and for two: an uninterrupted run; a run that is killed from outside, at least once in every chapter of
main, and started again until it is done; then all files of both, byte by byte (metrics.jsonl without its clock, which
config.json has none of). Of two processes now both are killed, now one, and the other must end by itself. At last a
run that is killed on one process, goes on on two, is killed and goes on on one: the same rows, by their keys.

The seed fixes chapters and fractions; the moment itself is one of the machine's.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])  # of the processes that are started
os.environ["PYTHONWARNINGS"] = "ignore"  # a killed process leaves semaphores

import tiny
from test_train import flags_of, products, same
from tiny import start

from judge import read_rows

SMALL = ("--sample-batch", 2, "--save-every", 3)  # several chunks a file and several checkpoints a model
NO_DROPOUT = ("--dropout", 0, "--sft-lr", 2e-4, "--dpo-lr", 2e-4)  # worlds of every size take the same steps


def chapters(path: Path) -> list[tuple[float, str, str]]:
    """(time, chapter, part) of every whole line of a trace."""
    found, chapter = [], ""
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        if line.endswith("\n"):
            at, name = line.rstrip("\n").split(" ", 1)
            chapter = chapter if name.startswith(" ") else name
            found.append((float(at), chapter, name if name.startswith(" ") else ""))
    return found


def works(path: Path) -> list[tuple[float, str]]:
    """(time, chapter) of all parts of chapters but the loading of models."""
    return [(at, chapter) for at, chapter, part in chapters(path) if part not in ("", " loads")]


def durations(path: Path) -> dict[str, float]:
    """Seconds that an uninterrupted run is at work in every chapter."""
    spans = {}
    for at, chapter in works(path):
        spans.setdefault(chapter, []).append(at)
    return {chapter: times[-1] - times[0] for chapter, times in spans.items()}


def killed(flags, folder: Path, world: int, spans: dict, chapter: str, share: float, victims: list[int]):
    """Start; when the chapter is at work, wait for this share of its time; kill -9. Returns (chapter, part) that was
    hit, or None if the run was over before."""
    path, hit, order = folder / "trace", [], list(spans)

    def watch(processes):
        while not (began := [at for at, name in works(path) if order.index(name) >= order.index(chapter)]):
            if not all(p.is_alive() for p in processes):
                return
            time.sleep(0.002)
        time.sleep(max(0.0, began[0] + share * spans[chapter] - time.time()))
        alive = all(p.is_alive() for p in processes)
        for victim in victims:
            processes[victim].kill()
        if alive:
            hit.append(chapters(path)[-1][1:])

    folder.mkdir(parents=True)
    result = start(flags, folder, world=world, kill=path, watch=watch, timeout=60)
    if result.codes == [0] * world:
        return None
    for rank, code in enumerate(result.codes):  # who was not killed has ended by itself, in a line
        assert code == (-9 if rank in victims else 1), (rank, result.codes, result.err)
    assert "Traceback" not in result.err, result.err
    return hit[0]


def prove(world: SimpleNamespace, folder: Path, size: int, kills: int, rng: random.Random):
    """A killed run on `size` processes ends in the files of an uninterrupted one."""
    straight, out = folder / "straight", folder / "killed"
    began = time.time()
    result = start(flags_of(world, straight, *SMALL), folder / "log", world=size, kill=folder / "trace")
    assert set(result.codes) == {0}, (result.codes, result.out, result.err)
    spans, want, hits, number = durations(folder / "trace"), products(straight), [], 0
    print(f"{size} processes: {len(want)} files in {time.time() - began:.1f} s without a kill", flush=True)
    plan = [*spans, *rng.choices(list(spans), k=kills - len(spans))]
    while plan:  # in the order of the run; a second run if a chapter was over before it was hit
        for chapter in sorted(plan, key=list(spans).index):
            victims = list(range(size)) if rng.random() < 0.5 else [rng.randrange(size)]
            number += 1
            flags = flags_of(world, out, *SMALL)
            hit = killed(flags, folder / str(number), size, spans, chapter, rng.random(), victims)
            if hit:
                hits.append(hit[0])
                left = sorted(p.relative_to(out) for p in out.rglob("*") if p.suffix == ".part" or p.name.isdigit())
                left = " ".join(map(str, left))
                print(f"{len(hits):4} {hit[0]:22} {hit[1]:35} {'rank ' + str(victims):12} keeps {left}", flush=True)
        result = start(flags_of(world, out, *SMALL), folder / f"end{number}", world=size)
        assert set(result.codes) == {0}, (result.codes, result.out, result.err)
        same(products(out), want)
        assert not [p for p in out.rglob("*") if p.suffix in (".tmp", ".part") or p.name == "checkpoint"]
        print(f"{size} processes, {len(hits)} kills: all {len(want)} files are byte-identical", flush=True)
        plan, out = [c for c in spans if c not in hits], folder / f"killed{number}"
        plan += rng.choices(list(spans), k=max(0, kills - len(hits) - len(plan)))


def keys(path: Path) -> list[tuple]:
    return [tuple(r.get(k) for k in ("id", "k", "vote")) for r in read_rows(path)]


def prove_another_world(world: SimpleNamespace, folder: Path, rng: random.Random):
    """Killed on one process, on two, and finished on one: the rows of an uninterrupted run."""
    straight, out, trace = folder / "straight", folder / "killed", folder / "trace"
    assert start(flags_of(world, straight, *SMALL, *NO_DROPOUT), folder / "log", kill=trace).code == 0
    flags, spans = flags_of(world, out, *SMALL, *NO_DROPOUT), durations(trace)
    wanted = [c for c in spans if c.startswith(("write_eft", "seed_sft M1", "self_reward", "train_dpo", "examine M1"))]
    for number, chapter in enumerate(wanted):
        size = 1 + number % 2
        hit = killed(flags, folder / str(number), size, spans, chapter, rng.random(), list(range(size)))
        print(f"on {size}: {' '.join(hit) if hit else 'not hit'}", flush=True)
    assert start(flags, folder / "end").code == 0
    equal = total = 0
    for path in sorted(straight.glob("*/*.jsonl")):
        ours = out / path.relative_to(straight)
        assert keys(ours) == keys(path) or path.name == "pairs.jsonl", path
        a, b = (["".join(str(r.get(k)) for k in ("prompt", "response", "text", "chosen")) for r in read_rows(p)]
                for p in (ours, path))  # fmt: skip
        equal, total = equal + sum(x == y for x, y in zip(a, b, strict=False)), total + len(b)
    print(f"another world: all keys are there; {equal} of {total} rows have the same text", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=20, help="of each number of processes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        world = SimpleNamespace(folder=Path(name), data=Path(name) / "data", base=Path(name) / "base")
        tiny.make_data(world.data)
        tiny.make_base(world.base)
        rng = random.Random(args.seed)
        (world.data / "eft.jsonl").unlink()  # so that the SFT baseline makes it of rankings
        tiny.write_rows(world.data / "eft_ranked.jsonl", tiny.rankings(rng, [tiny.question(rng) for _ in range(40)]))
        for size in (1, 2):
            prove(world, world.folder / f"on{size}", size, args.kills, rng)
        prove_another_world(world, world.folder / "other", rng)
