"""scripts/gpu.py on a machine that may have no GPU: it runs to its end, and tells what fails."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

from scripts import gpu

ON_CPU = not torch.cuda.is_available()


def test_the_whole_script_runs_with_tiny_shapes(tmp_path):
    out = tmp_path / "new" / "gpu.json"
    command = [sys.executable, "-m", "scripts.gpu", "--tiny", "--out", out]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    results = json.loads(out.read_text())
    assert list(results) == list(gpu.PARTS)
    for name, part in results.items():
        assert part["verdict"] == "ok" and part["lines"], name
        assert f"\n{name}" in "\n" + result.stdout
    texts = [line for part in results.values() for line in part["lines"].values()]
    assert texts.count(gpu.NOT_HERE) == 3 * ON_CPU


def good(setup):
    yield "a", {"ms": 12345.678}
    yield "b", {"difference": 1.0, "at most": 1.0}


def raises(setup):
    yield "a", {"ms": 1.0}
    raise ValueError("no luck\nat all")


def over(setup):
    yield "a", {"difference": float("nan"), "at most": 1.0}
    yield "b", gpu.NOT_HERE


def dies(setup):
    yield "a", {"ms": 1.0}
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(setup):
    yield "a", {"ms": 1.0}
    time.sleep(60)


def test_parts_that_fail_in_any_way_are_told_and_end_no_other(tmp_path, monkeypatch, capfd):
    parts = (raises, over, dies, hangs, good)
    monkeypatch.setattr(gpu, "PARTS", {part.__name__: part for part in parts})
    monkeypatch.setattr(gpu, "SECONDS", 2)
    with pytest.raises(SystemExit) as e:
        gpu.main(["--tiny", "--out", str(tmp_path / "gpu.json")])
    assert e.value.code == 1
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert {name: part["verdict"] for name, part in results.items()} == {
        "raises": "ValueError: no luck",
        "over": "a: difference nan, at most 1",
        "dies": "its process ended with code -9",
        "hangs": "no end after 2 seconds",
        "good": "ok",
    }
    assert all("a" in part["lines"] for part in results.values())
    text = capfd.readouterr().out
    assert "  a: ms 1.235e+04\n" in text and text.splitlines()[-1].endswith("s  ok")


@pytest.mark.skipif(not ON_CPU, reason="a GPU is there")
def test_without_a_gpu_it_says_what_runs_on_a_cpu(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--only", "machine", "--out", str(tmp_path / "gpu.json")])
    assert "torch sees no GPU; --tiny runs on a CPU" in capsys.readouterr().out


@pytest.mark.parametrize("part, num_wrong", [("agreement", 5), ("engine", 2)])
def test_a_device_that_computes_otherwise_is_found_out(part, num_wrong, monkeypatch):
    """One hidden unit is another one in the models that lie on the device."""
    small_models = gpu.small_models

    def broken_models(setup):
        models = small_models(setup)
        for name in ("device fp32", "device bf16"):
            with torch.no_grad():
                models[name].layers[0].mlp.up_proj.weight[0] += 1
        return models

    monkeypatch.setattr(gpu, "small_models", broken_models)
    setup = gpu.Setup("cpu", tiny=True)
    wrong = []
    for label, figures in gpu.PARTS[part](setup):
        if "at most" in figures and not figures["difference"] <= figures["at most"]:
            wrong.append(label)
    assert len(wrong) >= num_wrong, wrong
