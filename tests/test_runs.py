"""Runs end well: kills, signals, full disks, NaNs, errors, wrong flags. A docstring names the bug
that its test catches. tests/kills.py is the long version of the first test."""

import ast
import math
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import ENV, fails
from kills import (MERGEAR, RECOVERY, ROOT, TOKENIZER, command, difference, read, start, torment,
                   write_images)

import data
import eval as evaluation
import generate
import mergear
import recovery
import tokenizer

SCRIPTS = dict(tokenizer=tokenizer, mergear=mergear, randar=mergear, recovery=recovery)
ALL = dict(SCRIPTS, generate=generate, data=data, eval=evaluation)

@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """images/, and an undisturbed run of every script."""
    folder = tmp_path_factory.mktemp("runs")
    write_images(folder / "images")
    for script in SCRIPTS:
        train(folder, script, script)
    return folder

def flags(place, script, out, **changes):
    inputs = dict(tokenizer=dict(TOKENIZER, data=place / "images", disc_start=2, eval_every=2),
                  mergear=dict(MERGEAR, tokenizer=place / "tokenizer/ckpt.pt"),
                  randar=dict(MERGEAR, tokenizer=place / "tokenizer/ckpt.pt", mode="randar"),
                  recovery=dict(RECOVERY, generator=place / "randar/ckpt.pt"))
    return command(inputs[script], str(place / out), **{"max_steps": 6, **changes})

def train(place, script, out, **changes):
    SCRIPTS[script].main(flags(place, script, out, **changes))

def at_step(monkeypatch, script, action):
    """Call action(step) at the beginning of each training step."""
    before = data.set_learning_rate

    def set_learning_rate(step, *rest):
        action(step)
        return before(step, *rest)

    monkeypatch.setattr(SCRIPTS[script], "set_learning_rate", set_learning_rate)

# Kills, signals, disks

# beside CUDA autograd has threads, which no forked process inherits
@pytest.mark.skipif(torch.cuda.is_available(), reason="run python tests/kills.py by itself")
def test_three_kills(tmp_path):
    """State that a checkpoint forgets, half a checkpoint, lines written twice: see kills.py."""
    write_images(tmp_path / "images")
    changes = dict(max_steps=8, data=tmp_path / "images")
    hits = torment(tokenizer.main, TOKENIZER, str(tmp_path), 3, random.Random(0), **changes)
    assert hits["write"] + hits["anywhere"] == 3

@pytest.mark.parametrize("script, number", [
    ("tokenizer", signal.SIGTERM), ("mergear", signal.SIGINT), ("randar", signal.SIGINT),
    ("recovery", signal.SIGTERM)])
def test_a_signal_saves_and_ends(place, script, number, monkeypatch, capsys):
    """SIGTERM or Ctrl-C that loses steps; a resume that does not work."""
    out = f"stopped-{script}"
    with monkeypatch.context() as patch:
        at_step(patch, script, lambda step: os.kill(os.getpid(), number) if step == 3 else None)
        train(place, script, out, save_every=100)
    state = torch.load(place / out / "ckpt.pt", weights_only=True)
    assert state["step"] == 4, "the step is finished first"
    output = capsys.readouterr().out
    line = next(line for line in output.splitlines() if line.startswith("stopped and saved"))
    assert "step 4" in line and "done:" not in output
    assert line.endswith("the same command with --resume")
    train(place, script, out, save_every=100, resume=True)
    assert difference(read(place / script), read(place / out)) is None

def test_a_second_signal_ends_at_once():
    """A run that can only be killed."""
    asked = data.catch_signals()
    signal.raise_signal(signal.SIGINT)
    assert asked
    with pytest.raises(SystemExit):
        signal.raise_signal(signal.SIGINT)

@pytest.mark.parametrize("script", ["tokenizer", "mergear", "recovery"])
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
    bad, clip = [], torch.nn.utils.clip_grad_norm_

    def spoil(parameters, largest):
        parameters = list(parameters)
        if bad:
            parameters[-1].grad.mul_(math.nan)
        return clip(parameters, largest)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spoil)
    at_step(monkeypatch, script, lambda step: bad.append(1) if step == 3 else bad.clear())
    states = []
    for steps in (3, 4, 5):
        train(place, script, f"nan-{script}", max_steps=steps, lr_schedule="constant",
              resume=bool(states))
        states.append(read(place / f"nan-{script}")[0])
    before, after, end = states
    assert [state.pop("step") for state in states] == [3, 4, 5]
    assert [state.pop("skipped") for state in states] == [0, 1, 1]
    assert not difference(before, after)
    assert difference(after["model"], end["model"]), "the next step must train"

# Errors and other processes

BROKEN = """
import os, sys
sys.path[:0] = [{root!r}]
import torch
import data, tokenizer

before = tokenizer.set_learning_rate
run = data.Run(0, 1, torch.device("cpu"), torch.float32)
def set_learning_rate(step, config, *optimizers):
    if step == 3 and os.environ.get("RANK", "0") == "0":
        val = data.val_batches(data.build_dataset(config.data, "val", 8, False), 4, 2, run, 1)
        next(val)  # a second loader is at work
        open({mark!r}, "w").close()
        raise RuntimeError("out of memory")
    return before(step, config, *optimizers)

tokenizer.set_learning_rate = set_learning_rate
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
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    launch = [sys.executable, *launch] if world > 1 else [sys.executable]
    argv = flags(place, "tokenizer", f"broken{world}", workers=2, max_steps=1000)
    with open(place / "log", "w+") as log:
        run = subprocess.Popen([*launch, str(script), *argv], env=ENV, stdout=log, stderr=log)
        code = run.wait(timeout=60)
    text = (place / "log").read_text()
    assert code == 1 and "out of memory" in text, text[-2000:]
    while processes(str(script)):
        assert time.time() - os.path.getmtime(mark) < 10
        time.sleep(0.1)

def test_one_run_per_folder(place, capsys):
    """A second run that deletes the log of the first; a folder that a dead run blocks for ever."""
    argv = flags(place, "tokenizer", "shared", max_steps=1, overwrite=True)
    process = start(tokenizer.main, [*argv, "--max-steps", "100000"])
    try:
        while not os.path.exists(place / "shared/metrics.jsonl"):
            assert process.is_alive()
            time.sleep(0.01)
        assert "another process" in fails(tokenizer.main, argv, capsys)
        assert process.is_alive()
    finally:
        process.kill()
        process.join()
    (place / "shared/ckpt.pt").unlink(missing_ok=True)
    again = flags(place, "tokenizer", "shared", max_steps=1)
    assert "holds a run" in fails(tokenizer.main, again, capsys)
    tokenizer.main(argv)

def test_training_in_a_thread(place):
    """signal.signal() outside the main thread raises."""
    inputs = dict(max_steps=1)
    thread = threading.Thread(target=train, args=(place, "tokenizer", "thread"), kwargs=inputs)
    thread.start()
    thread.join()
    assert read(place / "thread")[0]["step"] == 1

@pytest.mark.parametrize("script", [*SCRIPTS, "finetune"])
def test_a_run_that_is_there_already(place, script, capsys):
    """--resume --max-steps at or below the step reached: a run that never ends, or trains on. A
    second run that silently replaces the first."""
    if script == "finetune":
        main = evaluation.main
        settings = dict(ckpt=place / "tokenizer/ckpt.pt", batch_size=4, max_steps=6)
        argv = ["finetune", *command(settings, str(place / "finetune"))]
        main(argv)
    else:
        main, argv = SCRIPTS[script].main, flags(place, script, script)
    saved = os.stat(place / script / "ckpt.pt").st_mtime_ns
    assert "holds a run already" in fails(main, argv, capsys)
    for steps in ("6", "3"):
        with pytest.raises(SystemExit) as stop:
            main([*argv, "--resume", "--max-steps", steps])
        assert stop.value.code == 0 and "already" in capsys.readouterr().out
    assert os.stat(place / script / "ckpt.pt").st_mtime_ns == saved

# Flags, files, imports

MISTAKES = [  # script, its flags, a word of the error
    ("tokenizer", "--lr -1", "--lr"), ("tokenizer", "--lr nan", "--lr"),
    ("tokenizer", "--keep 17", "nearer to 16"), ("tokenizer", "--keeps 2,6", "nearer to 16"),
    ("tokenizer", "--batch-size 9 --accum 2", "--batch-size"), ("tokenizer", "--bits 25", "20"),
    ("tokenizer", "--data nowhere", "nowhere"), ("tokenizer", "--variant huge", "tiny"),
    ("tokenizer", "--align label --no-labels", "--align"), ("tokenizer", "--resume", "--resume"),
    ("tokenizer", "--device nothing", "nothing"), ("tokenizer", "--nope 1", "--nope"),
    ("mergear", "--tokenizer nowhere", "nowhere"), ("mergear", "--tokenizer GPT", "generator"),
    ("mergear", "--token-dropout 2", "--token-dropout"), ("mergear", "--tokenizer BAD", "readable"),
    ("recovery", "--generator GPT", "mergear model"), ("recovery", "--generator CKPT", "generator"),
    ("recovery", "--drawn 1.5", "--drawn"), ("recovery", "--nope 1", "--nope"),
    ("generate", "--ckpt nowhere", "nowhere"), ("generate", "--ckpt BAD", "readable"),
    ("generate", "--num 0", "--num"), ("generate", "--nope 1", "--nope"),
    ("generate", "--ckpt GPT --npz .", "--npz"), ("generate", "--ckpt GPT --keep 5", "trained on"),
    ("generate", "--ckpt GPT --steps 3", "only randar"),
    ("generate", "--ckpt RANDAR --steps 7", "2 to K = 6"),
    ("generate", "--ckpt GPT --cfg-sweep 2:1:1", "FIRST:LAST:STEP"),
    ("generate", "--ckpt GPT --cfg-sweep 1:nan:1", "FIRST:LAST:STEP"),
    ("generate", "--ckpt GPT --classes bird", "no class"),
    ("generate", "--ckpt GPT --out /dev/null", "/dev/null"),
    # a flag that changes the model but no shape of its tensors would ruin trained weights
    ("tokenizer", "--out RUN --resume --max-steps 99 --heads 1", "has heads 2"),
    ("mergear", "--out RUN --resume --max-steps 99 --heads 1", "has heads 2"),
    ("mergear", "--out RUN --resume --max-steps 99 --window 3", "has window 8"),
    ("mergear", "--out RUN --resume --max-steps 99 --views 3", "has views 2"),
    ("tokenizer", "--out RUN --resume --max-steps 99 --dec-depth 2", "does not fit"),
    ("tokenizer", "--out RUN --overwrite --batch-size 9 --accum 2", "--batch-size"),
    ("mergear", "--out RUN --overwrite --batch-size 9 --accum 2", "--batch-size"),
    ("tokenizer", "--out RUN --overwrite --align label --no-labels", "--align"),
    ("data", "--data nowhere", "nowhere"), ("data", "--nope 1", "--nope"), ("eval", "", "recon"),
    ("eval", "frobnicate", "frobnicate"), ("eval", "recon --kep 3", "--kep"),
    ("eval", "recon --cfg 2", "--cfg"), ("eval", "recon --ckpt no/where.pt", "no/where.pt"),
    ("eval", "recon --ckpt CKPT --classifier CKPT", "classifier"),
    ("eval", "maps --ckpt CKPT --keep 65", "--keep"), ("eval", "gen --ckpt GPT --cfg nan", "--cfg"),
    ("eval", "recon --ckpt CKPT --num -3", "--num"),
    ("eval", "gen --samples no.npz", "no.npz"),
    ("eval", "recon --ckpt CKPT --features inception", "inception"),
    ("eval", "finetune --mixdown 1", "--mixdown"), ("eval", "speed --length 60", "--length"),
    ("eval", "finetune --ckpt CKPT --keep 65", "--keep"), ("eval", "speed --width 20", "--width"),
    ("eval", "stats --features inception", "--size"), ("eval", "probe --no-labels", "--no-labels"),
    ("eval", "recon --ckpt CKPT --data no/such", "no/such"),
]

@pytest.mark.parametrize("script, wrong, word", MISTAKES)
def test_mistakes_are_one_line(place, script, wrong, word, tmp_path, monkeypatch, capsys):
    """A page of traceback for a wrong flag or file, a folder that it leaves behind, a finished
    run that is touched."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "BAD").write_bytes(b"PK\3\4 nonsense")
    os.symlink(place / script, "RUN")
    for name, run in dict(CKPT="tokenizer", GPT="mergear", RANDAR="randar").items():
        os.symlink(place / run / "ckpt.pt", name)
    begin = flags(place, script, "wrong") if script in SCRIPTS else []
    finished = [(place / run / "ckpt.pt").read_bytes() for run in SCRIPTS]
    assert word in fails(ALL[script].main, [*begin, *wrong.split()], capsys)
    assert not os.path.exists(place / "wrong/ckpt.pt")
    assert finished == [(place / run / "ckpt.pt").read_bytes() for run in SCRIPTS]

@pytest.mark.parametrize("name", [*ALL, *(f"eval {name}" for name in evaluation.COMMANDS)])
def test_help(name, capsys):
    """A % in a help text, a row of a flag table with a wrong type."""
    script, *command = name.split()
    with pytest.raises(SystemExit) as stop:
        ALL[script].main([*command, "--help"])
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
