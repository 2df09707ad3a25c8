"""Runs end well: kills, signals, full disks, NaNs, errors, wrong flags. The docstring of a test
names the bug it catches.

    python -m pytest -q tests/test_runs.py      # tests/kills.py is the long version of the first
"""

import ast
import copy
import importlib
import math
import os
import random
import resource
import shlex
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import data
import generate
import mergear
import recovery
import tokenizer
from data import UserError, run_main
from kills import (MERGEAR, RECOVERY, ROOT, TOKENIZER, alive, command, difference, finish, read,
                   start, torment, write_images)

torch.set_num_threads(1)
SCRIPTS = dict(tokenizer=tokenizer, mergear=mergear, recovery=recovery)
ALL = dict(SCRIPTS, generate=generate, data=data)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """images/, and an undisturbed run of every script."""
    folder = tmp_path_factory.mktemp("runs")
    write_images(folder / "images")
    train(folder, "tokenizer", "tokenizer")
    train(folder, "mergear", "mergear")
    train(folder, "mergear", "randar", mode="randar", max_steps=2)
    train(folder, "recovery", "recovery")
    return folder


def flags(place, script, out, **changes):
    settings = dict(tokenizer=TOKENIZER, mergear=MERGEAR, recovery=RECOVERY)[script]
    inputs = dict(tokenizer=dict(data=place / "images", disc_start=2),
                  mergear=dict(tokenizer=place / "tokenizer/ckpt.pt"),
                  recovery=dict(generator=place / "randar/ckpt.pt"))[script]
    return command(settings, str(place / out), **{"max_steps": 6, **inputs, **changes})


def train(place, script, out, **changes):
    SCRIPTS[script].main(flags(place, script, out, **changes))


def at_step(monkeypatch, script, action):
    """Call action(step) at the beginning of each training step."""
    before = data.learning_rate

    def learning_rate(step, config):
        action(step)
        return before(step, config)

    monkeypatch.setattr(SCRIPTS[script], "learning_rate", learning_rate)


def fails(main, argv, capsys):
    """The one line with which a script refuses its flags; its exit code must be 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: main(argv))
    lines = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in lines if line.strip() and "it/s" not in line]  # progress bars
    assert stop.value.code == 2 and len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


# Kills, signals, disks


# beside CUDA autograd has threads, which no forked process inherits
@pytest.mark.skipif(torch.cuda.is_available(), reason="run python tests/kills.py by itself")
def test_three_kills(tmp_path):
    """State that a checkpoint forgets, half a checkpoint, lines written twice: see kills.py."""
    write_images(tmp_path / "images")
    changes = dict(max_steps=8, data=tmp_path / "images")
    hits = torment(tokenizer.main, TOKENIZER, str(tmp_path), 3, random.Random(0), **changes)
    assert hits["write"] + hits["anywhere"] == 3


SIGNALS = [("tokenizer", signal.SIGTERM), ("mergear", signal.SIGINT), ("recovery", signal.SIGTERM)]


@pytest.mark.parametrize("script, number", SIGNALS)
def test_a_signal_saves_and_ends(place, script, number, monkeypatch, capsys):
    """SIGTERM or Ctrl-C that loses steps; a resume command that does not work."""
    out = f"stopped-{script}"
    with monkeypatch.context() as patch:
        at_step(patch, script, lambda step: os.kill(os.getpid(), number) if step == 3 else None)
        train(place, script, out, save_every=100)
    state = torch.load(place / out / "ckpt.pt", weights_only=True)
    assert state["step"] == 4, "the step is finished first"
    output = capsys.readouterr().out
    line = next(line for line in output.splitlines() if line.startswith("stopped and saved"))
    assert "step 4" in line and "done:" not in output
    python, name, *argv = shlex.split(line.split(": ", 1)[1])
    assert (python, name, argv[-1]) == ("python", f"{script}.py", "--resume")
    SCRIPTS[script].main(argv)
    assert difference(read(place / script), read(place / out)) is None


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("trouble", ["full disk", "lost folder"])
def test_a_disk_that_fails_costs_no_checkpoint(place, script, trouble, monkeypatch, capsys):
    """A traceback; a checkpoint that is lost to half a new one; half a line of metrics."""
    out = place / f"{trouble}-{script}"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def action(step):
        if step == 3 and trouble == "full disk":
            room = os.path.getsize(out / "metrics.jsonl") + 10
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        elif step == 3:
            os.rename(out, f"{out}-away")

    with monkeypatch.context() as patch:
        at_step(patch, script, action)
        argv = flags(place, script, out.name, save_every=2)
        try:
            fails(SCRIPTS[script].main, argv, capsys)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            if trouble == "lost folder":
                os.rename(f"{out}-away", out)
    assert torch.load(out / "ckpt.pt", weights_only=True)["step"] == 2
    train(place, script, out.name, save_every=2, resume=True)
    assert difference(read(place / script), read(out)) is None


# Bad steps


@pytest.mark.parametrize("script", ["tokenizer", "mergear"])
def test_a_step_with_nan_changes_nothing(place, script, monkeypatch):
    """NaN in weights, EMA, moments, running averages or BitNorm statistics; a step not counted."""
    bad, states = [], {}
    at_step(monkeypatch, script, lambda step: bad.append(1) if step == 3 else bad.clear())
    save, clip = data.save_checkpoint, torch.nn.utils.clip_grad_norm_

    def spoil(parameters, largest):
        parameters = list(parameters)
        if bad:
            parameters[-1].grad.mul_(math.nan)
        return clip(parameters, largest)

    def remember(path, kind, **state):
        states[state["step"]] = copy.deepcopy(state)
        save(path, kind, **state)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spoil)
    monkeypatch.setattr(SCRIPTS[script], "save_checkpoint", remember)
    train(place, script, f"nan-{script}", save_every=1)
    counts = [states[step].pop("skipped") for step in range(7)]
    assert counts == [0, 0, 0, 0, 1, 1, 1]
    assert {states[step].pop("step") for step in range(7)} == set(range(7))
    for name, part in states[3].items():
        after = states[4][name]
        if "optimizer" in name:  # without the learning rate
            part, after = part["state"], after["state"]
        assert difference(part, after) is None, f"{name} changed"
    assert difference(states[4]["model"], states[5]["model"]), "the next step must train"


# Errors and other processes

BROKEN = """
import os, sys
sys.path[:0] = [{root!r}]
import torch
import data, tokenizer

before = tokenizer.learning_rate
run = data.Run(0, 1, torch.device("cpu"), torch.float32)
def learning_rate(step, config):
    if step == 3 and os.environ.get("RANK", "0") == "0":
        val = data.val_batches(data.build_dataset(config.data, "val", 8, False), 4, 2, run, 1)
        next(val)  # a second loader is at work
        open({mark!r}, "w").close()
        raise RuntimeError("out of memory")
    return before(step, config)

tokenizer.learning_rate = learning_rate
if __name__ == "__main__":
    tokenizer.run_main(tokenizer.main)
"""


def processes(text):
    """Ids of all processes whose command line holds `text`."""
    lines = subprocess.check_output(["ps", "-eo", "pid,args", "-ww"], text=True).splitlines()
    return [int(line.split()[0]) for line in lines if text in line]


@pytest.mark.parametrize("world", [1, 2])
def test_an_error_ends_all_processes(place, world):
    """Loader workers that are joined for ever; a rank that waits for one that has failed."""
    script, mark = place / f"broken{world}.py", place / f"mark{world}"
    script.write_text(BROKEN.format(root=ROOT, mark=str(mark)))
    launch = [sys.executable]
    if world > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    argv = flags(place, "tokenizer", f"broken{world}", workers=2, max_steps=1000)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(place / "log", "w+") as log:
        run = subprocess.Popen([*launch, str(script), *argv], env=env, stdout=log, stderr=log)
        code = run.wait(timeout=60)
    text = (place / "log").read_text()
    assert code == 1 and "out of memory" in text, text[-2000:]
    while processes(str(script)) and time.time() - os.path.getmtime(mark) < 10:
        time.sleep(0.1)
    assert time.time() - os.path.getmtime(mark) < 10
    assert not processes(str(script))


def test_one_run_per_folder(place, capsys):
    """A second run that deletes the log of the first; a folder that a dead run blocks for ever."""
    argv = flags(place, "tokenizer", "shared", max_steps=100000, overwrite=True)
    pid = start(tokenizer.main, argv)
    try:
        while not os.path.exists(place / "shared/metrics.jsonl"):
            assert alive(pid)
            time.sleep(0.01)
        assert "another process" in fails(tokenizer.main, argv, capsys)
        assert alive(pid)
    finally:
        os.kill(pid, signal.SIGKILL)
        finish(pid)
    (place / "shared/ckpt.pt").unlink(missing_ok=True)
    again = flags(place, "tokenizer", "shared", max_steps=1)
    assert "holds a run" in fails(tokenizer.main, again, capsys)
    train(place, "tokenizer", "shared", max_steps=1, overwrite=True)


def test_training_in_a_thread(place):
    """signal.signal() outside the main thread raises."""
    done = []

    def work():
        train(place, "tokenizer", "thread", max_steps=1)
        done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done


@pytest.mark.parametrize("script", [*SCRIPTS, "finetune"])
def test_a_run_that_is_there_already(place, script, capsys):
    """--resume --max-steps at or below the step reached: a run that never ends, or trains on."""
    if script == "finetune":
        main, out = importlib.import_module("eval").main, str(place / "finetune")
        argv = ["finetune", "--ckpt", str(place / "tokenizer/ckpt.pt"), "--out", out,
                "--batch-size", "4", "--device", "cpu", "--workers", "0", "--max-steps"]
        main([*argv, "2"])
        tries = [[*argv, steps, "--resume"] for steps in ("2", "1")]
    else:
        main, out = SCRIPTS[script].main, place / script
        tries = [flags(place, script, script, resume=True, max_steps=n) for n in (6, 3)]
    saved = os.stat(f"{out}/ckpt.pt").st_mtime_ns
    for argv in tries:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 0 and "already" in capsys.readouterr().out
    assert os.stat(f"{out}/ckpt.pt").st_mtime_ns == saved


# Flags, files, imports

MISTAKES = [
    ("tokenizer", "--lr -1"), ("tokenizer", "--lr nan"), ("tokenizer", "--keep 17"),
    ("tokenizer", "--batch-size 9 --accum 2"), ("tokenizer", "--data nowhere"),
    ("tokenizer", "--resume"), ("tokenizer", "--device nothing"), ("tokenizer", "--nope 1"),
    ("mergear", "--tokenizer nowhere"), ("mergear", "--tokenizer {mergear}"),
    ("mergear", "--token-dropout 2"), ("mergear", "--tokenizer {damaged}"),
    ("recovery", "--generator {mergear}"), ("recovery", "--generator {tokenizer}"),
    ("recovery", "--drawn 1.5"), ("recovery", "--nope 1"),
    ("generate", "--ckpt nowhere"), ("generate", "--ckpt {damaged}"), ("generate", "--num 0"),
    ("generate", "--npz ."), ("generate", "--nope 1"), ("data", "--data nowhere"),
    ("data", "--nope 1"),
]


@pytest.mark.parametrize("script, wrong", MISTAKES)
def test_mistakes_are_one_line(place, script, wrong, capsys):
    """A page of traceback for a wrong flag or file, or a folder that it leaves behind."""
    (place / "damaged.pt").write_bytes(b"PK\3\4 nonsense")
    paths = dict(tokenizer=place / "tokenizer/ckpt.pt", mergear=place / "mergear/ckpt.pt",
                 damaged=place / "damaged.pt")
    begin = flags(place, script, "wrong") if script in SCRIPTS else []
    begin += ["--ckpt", str(paths["mergear"])] if wrong == "--npz ." else []
    fails(ALL[script].main, [*begin, *wrong.format(**paths).split()], capsys)
    assert not os.path.exists(place / "wrong/ckpt.pt")


def test_an_existing_run_is_kept(place, capsys):
    """A second run that silently replaces the first."""
    for script, module in SCRIPTS.items():
        line = fails(module.main, flags(place, script, script), capsys)
        assert "holds a run already" in line


@pytest.mark.parametrize("script, flag, value", [
    ("tokenizer", "heads", 1), ("mergear", "window", 3), ("mergear", "heads", 1)])
def test_a_resumed_run_keeps_its_model(place, script, flag, value, capsys):
    """A flag that changes the model but no shape of its tensors: trained weights are ruined."""
    argv = flags(place, script, script, resume=True, max_steps=99, **{flag: value})
    assert f"has {flag}" in fails(SCRIPTS[script].main, argv, capsys)


@pytest.mark.parametrize("name", [*ALL, "eval"])
def test_help(name, capsys):
    """A % in a help text, which only --help trips over."""
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(name).main(["--help"])
    assert stop.value.code == 0 and "usage" in capsys.readouterr().out


def test_imports_go_one_way():
    """A circle, an import inside a function, a sixth run-time package."""
    below = dict(data=[], tokenizer=["data"], mergear=["data", "tokenizer"])
    for name in ("recovery", "generate", "eval"):
        below[name] = ["data", "tokenizer", "mergear"]
    packages = {"torch", "numpy", "PIL", "tqdm", "scipy", *sys.stdlib_module_names}
    for name, allowed in below.items():
        with open(f"{ROOT}/{name}.py") as file:
            tree = ast.parse(file.read())
        found = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module.split(".")[0])
        assert found <= packages | set(allowed), f"{name}: {found - packages - set(allowed)}"
