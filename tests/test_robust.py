"""Nothing is lost: resume, faults, hostile input, several processes. The docstring of a test names the bug it catches.

    python -m pytest -q tests/test_robust.py

The slow versions are scripts: tests/kills.py (fifty kills), tests/fuzz.py (300 files), tests/hygiene.py (2,000 steps).
"""

import argparse
import contextlib
import ctypes
import errno
import json
import math
import os
import random
import resource
import runpy
import shlex
import shutil
import signal
import socket
import sys
import time

import pytest
import torch
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import data
import eval as evaluation
import fuzz
import generate
import mergear
import recovery
import tokenizer
from data import UserError, run_main
from hygiene import vitals
from kills import MERGEAR, RECOVERY, ROOT, TOKENIZER, command, difference, finish, read, start, torment, write_images

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """images/, and a tokenizer and a generator trained on them for a few undisturbed steps."""
    folder = tmp_path_factory.mktemp("robust")
    write_images(folder / "images")
    train(folder, "tokenizer", "tok")
    train(folder, "mergear", "gpt")
    train(folder, "mergear", "randar", mode="randar", max_steps=2)
    train(folder, "recovery", "rec")
    return folder


SCRIPTS = dict(tokenizer=tokenizer, mergear=mergear, recovery=recovery)
UNDISTURBED = dict(tokenizer="tok", mergear="gpt", recovery="rec")


def flags(place, script, out, **changes):
    if script == "tokenizer":
        return command(TOKENIZER, str(place / out), **{**dict(data=place / "images", max_steps=6, disc_start=2), **changes})
    if script == "mergear":
        return command(MERGEAR, str(place / out), **{**dict(tokenizer=place / "tok/ckpt.pt", max_steps=6), **changes})
    return command(RECOVERY, str(place / out), **{**dict(generator=place / "randar/ckpt.pt", max_steps=6), **changes})


def train(place, script, out, **changes):
    SCRIPTS[script].main(flags(place, script, out, **changes))


def at_step(monkeypatch, script, action):
    """Call action(step) at the beginning of each training step. The dry run, which has steps of its own, is left out."""
    module, before = SCRIPTS[script], tokenizer.learning_rate

    def learning_rate(step, config):
        action(step)
        return before(step, config)

    monkeypatch.setattr(module, "learning_rate", learning_rate)
    monkeypatch.setattr(module, "dry_run", lambda *args, **kwargs: None)


def ranks(function, world=2, seconds=120):
    """Run function(rank) in `world` forked processes of one group -> their exit codes. What hangs is killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def main(rank):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))
        function(rank)

    pids = [start(main, rank, log=os.environ.get("RANKS_LOG", os.devnull)) for rank in range(world)]
    until, codes = time.time() + seconds, {}
    while len(codes) < world and time.time() < until:
        for pid in set(pids) - set(codes):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                codes[pid] = finish(pid)
        time.sleep(0.02)
    for pid in set(pids) - set(codes):
        os.kill(pid, signal.SIGKILL)
        finish(pid)
    return [codes.get(pid) for pid in pids]


# ---------------------------------------------------------------------------------------------------------------------
# Kills, signals, disks

def test_three_kills(tmp_path):
    """State that a checkpoint forgets, half a checkpoint that is picked up, lines written twice: see tests/kills.py."""
    write_images(tmp_path / "images")
    hits = torment(tokenizer.main, TOKENIZER, str(tmp_path), 3, random.Random(0), max_steps=12, data=tmp_path / "images")
    assert hits["write"] + hits["anywhere"] == 3


@pytest.mark.parametrize("script, number", [("tokenizer", signal.SIGTERM), ("mergear", signal.SIGINT),
                                            ("recovery", signal.SIGTERM)])
def test_a_signal_saves_and_ends(place, script, number, monkeypatch, capsys):
    """SIGTERM of a cluster or Ctrl-C that loses the steps since the last checkpoint; a stopped run that looks finished; a
    resume command that does not work; a signal handler that stays behind."""
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_step(patch, script, lambda step: os.kill(os.getpid(), number) if step == 3 else None)
        train(place, script, f"stopped-{script}", save_every=100)
    assert signal.getsignal(number) is handler
    assert torch.load(place / f"stopped-{script}/ckpt.pt", weights_only=True)["step"] == 4, "the step is finished first"
    output = capsys.readouterr().out
    line = next(line for line in output.splitlines() if "--resume" in line)
    assert "done:" not in output and line.startswith("stopped and saved at step 4")
    argv = flags(place, script, f"stopped-{script}", save_every=100)
    assert tokenizer.resume_command("x.py", ["--overwrite", *argv], 1) == shlex.join(["python", "x.py", *argv, "--resume"])
    train(place, script, f"stopped-{script}", resume=True)
    assert difference(read(place / UNDISTURBED[script]), read(place / f"stopped-{script}")) is None


def test_a_second_signal_is_not_caught(monkeypatch):
    """A run that cannot be stopped at all while an evaluation hangs."""
    monkeypatch.setattr(signal, "SIGINT", signal.SIGUSR1)  # the real one is ignored in background jobs
    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    with tokenizer.Stop() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGUSR1, before)


@contextlib.contextmanager
def full_disk(room):
    """Writing beyond `room` bytes of a file fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def folder_gone(path):
    """A folder that is not there for a while, like one on a server."""
    os.rename(path, f"{path}.away")
    try:
        yield
    finally:
        os.rename(f"{path}.away", path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_full_disk_costs_nothing(place, script, monkeypatch, capsys):
    """A run that dies of a full disk or a lost folder, loses its last checkpoint to half a new one, or never tries again;
    metrics that lack the lines of that time."""
    out, room, saved = place / f"full-{script}", contextlib.ExitStack(), []

    def action(step):
        if step == 2:
            room.enter_context(full_disk(0) if script == "tokenizer" else folder_gone(out))
        elif step == 5:
            room.close()
            saved.append(torch.load(out / "ckpt.pt", weights_only=True)["step"])
            saved.extend(name for name in os.listdir(out) if name.endswith(".tmp"))

    with monkeypatch.context() as patch:
        at_step(patch, script, action)
        train(place, script, out.name, save_every=2)
    assert saved == [2], "the checkpoint of step 2 stays, and nothing half-written"
    assert "ckpt.pt could not be written" in capsys.readouterr().err
    assert difference(read(place / UNDISTURBED[script]), read(out)) is None
    assert not tokenizer.UNWRITTEN

    with full_disk(1000), pytest.raises(UserError, match="could not be written .*make room"):  # at once, not after hours
        train(place, script, f"never-{script}")
    assert "ckpt.pt" not in os.listdir(place / f"never-{script}")


def test_keep_last(place, capsys):
    """Numbered checkpoints that pile up, or the newest one that is not ckpt.pt; a damaged ckpt.pt with no way back."""
    train(place, "tokenizer", "several", save_every=1, max_steps=5, keep_last=2)
    out = place / "several"
    names = sorted(name for name in os.listdir(out) if name.endswith(".pt"))
    assert names == ["ckpt.pt", "ckpt_0000004.pt", "ckpt_0000005.pt"]
    step = lambda name: torch.load(out / name, weights_only=True)["step"]
    assert [step(name) for name in names] == [5, 4, 5]
    (out / "ckpt.pt").unlink()  # it may share its content with ckpt_0000005.pt
    (out / "ckpt.pt").write_bytes(b"damaged")
    with pytest.raises(UserError, match="copy .*ckpt_0000005.pt over it"):
        train(place, "tokenizer", "several", resume=True)
    (out / "ckpt.pt").unlink()
    with pytest.raises(UserError, match="--overwrite"):
        train(place, "tokenizer", "several")
    train(place, "tokenizer", "several", overwrite=True, max_steps=1)
    assert sorted(name for name in os.listdir(out) if name.endswith(".pt")) == ["ckpt.pt"]


def test_going_back_to_an_older_checkpoint(place):
    """New checkpoints that are deleted at once because those of the abandoned steps count as newer; lines of metrics twice."""
    out = place / "back"
    train(place, "tokenizer", "back", save_every=1, keep_last=3)
    shutil.copy(out / "ckpt_0000004.pt", out / "ckpt.pt")
    train(place, "tokenizer", "back", save_every=1, keep_last=3, max_steps=5, resume=True)
    names = sorted(name for name in os.listdir(out) if name.endswith(".pt"))
    assert names == ["ckpt.pt", "ckpt_0000004.pt", "ckpt_0000005.pt", "ckpt_0000006.pt"]
    assert [row["step"] for row in read(out)[1] if "lr" in row] == [1, 2, 3, 4, 5]


def test_waiting_metrics_are_written_before_a_checkpoint(tmp_path, capsys):
    """A run that is resumed from a checkpoint whose lines of metrics died with the process: a gap for good."""
    path = str(tmp_path / "metrics.jsonl")
    with full_disk(0):
        tokenizer.append_metrics(path, step=1)
    assert tokenizer.UNWRITTEN
    tokenizer.save_checkpoint(str(tmp_path / "ckpt.pt"), "tokenizer", step=1)
    assert [json.loads(line) for line in open(path)] == [dict(step=1)] and not tokenizer.UNWRITTEN


@pytest.mark.parametrize("error, code", [(OSError(errno.ENOSPC, "No space left on device", "a.json"), 2),
                                         (PermissionError(errno.EACCES, "Permission denied", "a.json"), 2),
                                         (RuntimeError("[gloo/transport/tcp/pair.cc:537] Connection reset by peer"), 2),
                                         (torch.distributed.DistBackendError("NCCL error"), 2),
                                         (FileNotFoundError(errno.ENOENT, "No such file", "a.json"), None),
                                         (RuntimeError("bug"), None)])
def test_what_is_no_fault_of_the_script_is_one_line(error, code, capsys):
    """A page of traceback for a full disk; or a bug of ours that looks like one."""
    def main():
        raise error

    with pytest.raises(SystemExit if code else type(error)) as stop:
        run_main(main)
    lines = capsys.readouterr().err.splitlines()
    assert not code and not lines or stop.value.code == code and len(lines) == 1 and lines[0].startswith("error: ")


def test_a_log_on_a_full_disk_ends_nothing(tmp_path, monkeypatch):
    """python tokenizer.py > log 2>&1 that survives the full disk, but not its own warning about it."""
    def main():
        tqdm.write("warning", file=sys.stderr)
        done.extend(tqdm(range(3)))
        print("done", flush=True)

    done = []
    with open(tmp_path / "log", "w", buffering=1) as log, full_disk(0), monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", log)
        patch.setattr(sys, "stdout", log)
        run_main(main)
    assert done == [0, 1, 2]


def test_a_mapped_file_has_its_space_on_the_disk(tmp_path, monkeypatch):
    """Codes or images written to pages that a full disk has no place for: SIGBUS, hours later and without a message."""
    path = str(tmp_path / "a.npy")
    data.new_array(path, "uint8", (1000, 1000))
    assert os.stat(path).st_blocks * 512 >= 10**6
    with full_disk(1000), pytest.raises(OSError):
        data.new_array(path, "uint8", (1000, 1000))
    assert not os.listdir(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Bad steps, the dry run

@pytest.mark.parametrize("script, loss", [("tokenizer", "perceptual_stub"), ("mergear", "code_losses"),
                                          ("recovery", "codes_to_bits")])
def test_too_many_bad_steps_end_the_run(place, script, loss, monkeypatch):
    """A run that skips steps for days; a last checkpoint with the bad weights in it."""
    module, bad = SCRIPTS[script], []
    before = getattr(module, loss)

    def poisoned(*args):
        result = before(*args)
        factor = math.nan if bad else 1.0
        return (result[0] * factor, result[1]) if isinstance(result, tuple) else result * factor

    monkeypatch.setattr(module, loss, poisoned)
    at_step(monkeypatch, script, lambda step: bad.append(step) if step in (2, 4, 5, 6) else bad.clear())
    monkeypatch.setattr(tokenizer, "MAX_BAD", 3)
    with pytest.raises(UserError, match="3 steps in a row up to step 6 .*--resume"):
        train(place, script, f"bad-{script}", max_steps=20, save_every=1)
    state, rows = read(place / f"bad-{script}")
    assert state["step"] == 6 and state["skipped"] == 3
    assert [row["skipped"] for row in rows if "lr" in row] == [0, 0, 1, 1, 2, 3]
    for name, value in state["model"].items():
        assert value.isfinite().all(), name


def test_the_dry_run_finds_what_would_come_late(place, monkeypatch):
    """A run that dies hours later, at its first evaluation, of a picture that cannot be drawn, or of a parameter that the
    discriminator's start leaves without a gradient; and a dry run that leaves traces."""
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "draw_reconstructions", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(place, "tokenizer", "dry", max_steps=1000, eval_every=1000)
        assert not os.path.exists(place / "dry/metrics.jsonl") and not os.path.exists(place / "dry/ckpt.pt")
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "adamw", lambda named, *args: torch.optim.AdamW([p for _, p in list(named)[1:]]))
        with pytest.raises(AssertionError, match="0 times in the optimizer"):
            train(place, "tokenizer", "dry", disc_start=1000)
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "perceptual_stub", lambda a, b: (a - b).mean() * math.nan)
        with pytest.raises(UserError, match="the first step gave a loss"):
            train(place, "tokenizer", "dry")
    train(place, "tokenizer", "dry")
    assert sorted(os.listdir(place / "dry")) == ["ckpt.pt", "curves.png", "metrics.jsonl", "recon_0000006.png"]
    assert difference(read(place / "tok"), read(place / "dry")) is None


def test_lecam_starts_with_the_first_good_step(place, monkeypatch):
    """Averages that creep up from 0 for hundreds of steps because the discriminator's very first step was skipped."""
    stub, bad = tokenizer.perceptual_stub, []
    monkeypatch.setattr(tokenizer, "perceptual_stub", lambda a, b: stub(a, b) * (math.nan if bad else 1.0))
    seen, lecam_loss = [], tokenizer.lecam_loss

    def watched(real, fake, average):
        seen.append((torch.stack([real.mean(), fake.mean()]).detach(), average.clone()))
        return lecam_loss(real, fake, average)

    monkeypatch.setattr(tokenizer, "lecam_loss", watched)
    at_step(monkeypatch, "tokenizer", lambda step: bad.append(1) if step == 2 else bad.clear())
    train(place, "tokenizer", "lecam", max_steps=5)
    assert not seen[1][1].any() and torch.allclose(seen[2][1], seen[1][0])


# ---------------------------------------------------------------------------------------------------------------------
# Hostile files

def test_hostile_checkpoints(tmp_path):
    """A pickle that runs code, half a file, another network: a traceback, or weights that are only half loaded."""
    count = 0
    for load, good in fuzz.trained(str(tmp_path)).items():
        folder = tmp_path / load.__name__
        folder.mkdir()
        for name, path in fuzz.hostile_checkpoints(str(folder), good).items():
            error = fuzz.attempt(f"{load.__name__}, {name}", load, path)
            assert isinstance(error, UserError) and path in str(error), f"{load.__name__}, {name}: {error}"
            count += 1
        assert not os.path.exists(folder / "pwned")
    assert count > 40


def image_folder(root, files):
    """A data set with these files to train on, and one good image to validate."""
    for split, content in (("train", files), ("val", {"good.png": fuzz.whole_images()["rgb.png"]})):
        fuzz.make_folder(str(root / split), content)
    return root


def test_unusual_images_are_read_and_broken_ones_counted(tmp_path):
    """CMYK, 16 bits, animations, extreme shapes or odd names that crash or are skipped; bombs that are unpacked."""
    whole, broken = fuzz.whole_images(), fuzz.broken_images()
    assert fuzz.attempt("whole", fuzz.read_all, image_folder(tmp_path / "whole", whole)) == (len(whole), 0)
    mixed = image_folder(tmp_path / "mixed", {**whole, **broken})
    assert fuzz.attempt("mixed", fuzz.read_all, mixed) == (len(whole), len(broken))
    with pytest.raises(UserError, match="none of the"):
        fuzz.read_all(image_folder(tmp_path / "broken", broken))


def test_links_pipes_and_folders_that_cannot_be_read(tmp_path, monkeypatch):
    """Links in a circle walked for ever, a pipe or a device that is read until the memory is full, a traceback for a
    folder without permission."""
    root = image_folder(tmp_path / "images", {"a.png": fuzz.whole_images()["rgb.png"]})
    folder = root / "train"
    os.symlink("..", f"{folder}/loop")
    os.symlink("self.png", f"{folder}/self.png")
    os.symlink("nowhere.png", f"{folder}/lost.png")
    os.symlink("/dev/zero", f"{folder}/zero.png")
    os.mkfifo(f"{folder}/pipe.png")
    os.symlink("pipe.png", f"{folder}/to_pipe.png")
    assert fuzz.attempt("links", fuzz.read_all, root) == (1, 2)  # the two links to nowhere are counted
    scandir = os.scandir

    def forbidden(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    os.mkdir(f"{folder}/secret")
    monkeypatch.setattr(os, "scandir", forbidden)  # root may read everything
    with pytest.raises(UserError, match="secret .Permission denied"):
        fuzz.read_all(root)


def test_a_tar_stays_inside(tmp_path):
    """Members called ../x or /x, links and devices that are followed; a truncated end that is taken for the end."""
    path = tmp_path / "wicked.tar"
    fuzz.wicked_tar(path)
    before = fuzz.listing(tmp_path)
    assert fuzz.attempt("tar", fuzz.read_all, path) == (1, 0) == fuzz.attempt("tar", fuzz.read_all, path, "val")
    assert fuzz.listing(tmp_path) == before
    content = path.read_bytes()
    (tmp_path / "cut.tar").write_bytes(content[:700])
    with pytest.raises(UserError, match="no intact"):
        fuzz.read_all(tmp_path / "cut.tar")
    negative = bytearray(content)  # a size below 0 (CVE-2025-8194) leads tarfile back to where it was
    negative[124:136] = b"\xff" * 10 + b"\xfe\x00"
    negative[148:156] = b" " * 8
    negative[148:156] = b"%06o\x00 " % sum(negative[:512])
    (tmp_path / "negative.tar").write_bytes(negative)
    assert isinstance(fuzz.attempt("negative", fuzz.read_all, tmp_path / "negative.tar"), UserError)


def test_two_hundred_mutated_files(tmp_path, capsys):
    """A loader that crashes, hangs, writes or executes something: see tests/fuzz.py."""
    assert fuzz.fuzz(str(tmp_path), 200, seed=1) >= 200


# ---------------------------------------------------------------------------------------------------------------------
# Flags

class Parsers(Exception):
    """Carries a parser out of a main() that was about to use it."""


def parser_of(main, argv):
    def caught(self, argv=None):
        raise Parsers(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsers) as found:
        patch.setattr(data.Parser, "parse_args", caught)
        main(argv)
    return found.value.args[0]


def every_script(place):
    """(name, main, flags that make it start, parser) of every script and every command of eval.py: what is listed here is the
    scripts alone, their flags come from their parsers."""
    tok, gpt, randar = (str(place / name / "ckpt.pt") for name in ("tok", "gpt", "randar"))
    starts = [("tokenizer.py", tokenizer.main, []), ("mergear.py", mergear.main, ["--tokenizer", tok]),
              ("recovery.py", recovery.main, ["--generator", randar]), ("generate.py", generate.main, ["--ckpt", gpt]),
              ("generate.py, randar", generate.main, ["--ckpt", randar]), ("data.py", data.main, ["--data", "no-such-data"]),
              ("data.py --pack", data.main, ["--data", "no-such-data", "--pack", "made"])]
    actions = parser_of(evaluation.main, ["recon"])._actions
    commands = next(a for a in actions if isinstance(a, argparse._SubParsersAction)).choices
    for name, parser in commands.items():
        has = name == "finetune" or "--ckpt" in parser._option_string_actions
        starts.append((f"eval.py {name}", evaluation.main, [name, *(["--ckpt", gpt if name == "gen" else tok] if has else [])]))
    for name, main, begin in starts:
        command = name.removeprefix("eval.py ")
        own = command == "finetune" or command not in commands
        yield name, main, begin, parser_of(main, begin) if own else commands[command]


# What may be 0: seeds, schedules and rates, weights of losses, what 0 switches off, and what it gives to a default.
# --workers -1 chooses the number. Nothing takes nan, inf, a text, 1e30 or 10^18
ZERO = """--seed --workers --warmup --lr --weight-decay --ema --layer-scale --patch --w-rec --w-perceptual --w-disc
    --w-lecam --w-commit --w-entropy --w-recovery --w-align --disc-start --disc-ramp --beta1 --beta2 --head-depth --dropout
    --token-dropout --class-dropout --label-smoothing --drawn --cfg --temperature --top-k --steps --train-num
    --layer-decay --mixup --cutmix --smoothing --drop-path --erasing""".split()
ZERO_IN = {"--keep": ("generate.py", "generate.py, randar", "recovery.py", "eval.py finetune"), "--size": ("eval.py stats",),
           "--window": ("mergear.py",),
           "--max-steps": ("tokenizer.py", "mergear.py", "recovery.py", "eval.py finetune"),
           "--num": [f"eval.py {name}" for name in "recon maps probe sweep ablate-source gen".split()]}


def test_every_numeric_flag(place, tmp_path, monkeypatch, capsys):
    """A number that ends in a traceback, in silence, in a folder of nothing, or in a machine without memory; a new flag that
    nobody thought about. A device or data set that does not exist ends what the number does not."""
    monkeypatch.chdir(tmp_path)
    scripts = flags = tried = 0
    for script, main, begin, parser in every_script(place):
        scripts += 1
        end = [] if script.startswith("data.py") else ["--device", "no-such-device"]
        end += ["--out", "made"] if "--out" in parser._option_string_actions and "--pack" not in begin else []
        for action in parser._actions:
            if not action.option_strings or action.type in (None, str):
                continue
            name, flags = action.option_strings[0], flags + 1
            for value in ("0", "-1", "1e30", "1" + "0" * 18, "nan", "inf", "text", ""):
                with pytest.raises(SystemExit) as stop:
                    run_main(lambda: main([*begin, *end, f"{name}={value}"]))
                tried += 1
                error, what = capsys.readouterr().err.strip(), f"{script} {name}={value}"
                assert stop.value.code == 2 and len(error.splitlines()) == 1, f"{what}: {error}"
                fine = value == "0" and (name in ZERO or script in ZERO_IN.get(name, ())) or value == "-1" and (
                    name == "--workers" and not script.startswith("data.py"))
                assert ("no-such" in error) == fine, f"{what} is {'refused' if fine else 'accepted'}: {error}"
                if not fine:  # 0 may be shown as 0.0, and 1e30 as what Python makes of it
                    shown = [value, repr(value)] + ([str(float(value))] if value not in ("text", "") else [])
                    assert name in error and any(v in error for v in shown), f"{what}: {error}"
                assert not os.listdir(tmp_path), f"{what}: {os.listdir(tmp_path)}"
    with capsys.disabled():
        print(f"[{scripts} scripts, {flags} numeric flags, {tried} runs] ", end="")
    assert scripts >= 17 and flags >= 204


IMPOSSIBLE = {  # script -> flags, and a word of the message
    "tokenizer": ("--keep 17", "--keeps 4,17", "--batch-size 9 --accum 2", "--size 9", "--disc-base 3", "--disc-layers 3",
                  "--heads 3", "--dec-heads 3", "--recovery-heads 3", "--norm-groups 3", "--base 6", "--patch 4",
                  "--dec-width 18", "--keep 1 --depth 1", "--align label --data {flat}", "--align dinov2 --teacher-size 15",
                  "--perceptual lpips", "--init dinov2", "--resume"),
    "mergear": ("--width 18", "--heads 3", "--batch-size 9 --accum 2", "--window -1", "--resume"),
    "recovery": ("--generator {gpt}", "--keep 5", "--keep 17", "--batch-size 9 --accum 2", "--resume"),
    "generate": ("--cfg -1", "--top-p 1.5", "--top-k -3", "--classes c", "--classes 2", "--keep 5", "--steps 3",
                 "--cfg-sweep 2:1:1", "--cfg-sweep 0:2000:1000", "--cfg-sweep 1:nan:1", "--ckpt {randar} --steps 7"),
    "recon": ("--keep 17", "--keep 4,17", "--classifier nowhere", "--features inception"),
    "maps": ("--keep 17",), "probe": ("--keep 17", "--data {flat}"), "sweep": ("--keep 17", "--data {flat}"),
    "ablate-source": ("--keep 17", "--recovery nowhere"),
    "gen": ("--keep 5", "--cfg -1", "--top-p 1.5", "--num 5", "--ckpt {randar} --keep 5", "--classifier nowhere"),
    "finetune": ("--keep 17", "--batch-size 9 --accum 2", "--data {flat}", "--beta2 1", "--clip 0", "--resume"),
    "train-classifier": ("--data {flat} --size 8",), "stats": ("--features inception", "--classifier nowhere"),
    "speed": ("--keep 300", "--length 10", "--heads 3", "--width 30", "--bits 21", "--bits 4 --keep 64"),
    "data": ("--data nowhere --pack made", "--size 0 --pack made", "--pack ."),
}


@pytest.mark.parametrize("script", IMPOSSIBLE)
def test_impossible_combinations(place, script, tmp_path, monkeypatch, capsys):
    """Combinations that fail in the middle of a network, after hours, or after a folder was made; a message that names
    neither the flag nor a file, or no remedy."""
    flat = tmp_path / "flat"
    fuzz.make_folder(str(flat), {f"{n}.png": fuzz.whole_images()["rgb.png"] for n in range(30)})
    places = dict(flat=flat, **{name: place / name / "ckpt.pt" for name in ("tok", "gpt", "randar")})
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    out, device = ["--out", "made"], ["--device", "cpu"]
    if script in SCRIPTS:
        main, begin = SCRIPTS[script].main, flags(place, script, tmp_path / "here/made", max_steps=1)
    elif script in ("generate", "data"):
        begin = ["--ckpt", str(places["gpt"]), *out, *device] if script == "generate" else []
        main = (generate if script == "generate" else data).main
    else:
        ckpt = ["--ckpt", str(places["gpt" if script == "gen" else "tok"])]
        more = dict(speed=device, stats=[*out, *device]).get(script, out + device)
        main, begin = evaluation.main, [script, *([] if script in ("train-classifier", "stats", "speed") else ckpt), *more]
    for wrong in IMPOSSIBLE[script]:
        with pytest.raises(SystemExit) as stop:
            run_main(lambda: main([*begin, *wrong.format(**places).split()]))
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert stop.value.code == 2 and error.startswith("error: "), f"{wrong}: {error}"
        assert "pass" in error or "must be" in error or "train" in error or "leave" in error, f"{wrong} without a remedy: {error}"
        assert not os.listdir(), f"{wrong}: {os.listdir()}"


# ---------------------------------------------------------------------------------------------------------------------
# Several processes

def test_flags_are_agreed_on():
    """A step that is skipped, or a stop, on one rank only: from then on the ranks have different weights, or hang."""
    def main(rank):
        torch.distributed.init_process_group("gloo")
        run = tokenizer.Run(rank, 2, torch.device("cpu"), torch.float32)
        bad = ~torch.isfinite(torch.tensor(math.nan if rank else 1.0))
        assert tokenizer.any_rank(run, rank == 1, torch.tensor(False), bad) == [True, False, True]

    assert ranks(main) == [0, 0]


@pytest.mark.parametrize("before", [0, 2])
def test_two_ranks_with_accumulation_equal_one_process(place, before):
    """Gradients averaged over ranks in every micro-batch or in none, statistics of one rank's micro-batch, the adaptive
    weight of a rank. One batch of 8, and 2 ranks x 2 micro-batches x 2; from the start, and after a resume on this other
    number of processes, which must go on with the same images."""
    changes = dict(batch_size=8, lr=1e-4, lr_schedule="constant", disc_start=1)
    train(place, "tokenizer", "one", max_steps=4, overwrite=True, **changes)
    if before:
        train(place, "tokenizer", "four", max_steps=before, overwrite=True, **changes)
    assert ranks(lambda rank: train(place, "tokenizer", "four", max_steps=4, accum=2, resume=before > 0, **changes)) == [0, 0]
    (one, rows), (four, rows_four) = read(place / "one"), read(place / "four")
    for a, b in zip(rows, rows_four, strict=True):
        for name in set(a) - {"usage", "perplexity", "bit_imbalance", "dead_bits"}:  # of rank 0's images
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-4), f"step {a['step']}: {name}"
    for part in ("model", "ema", "disc"):
        for name, value in one[part].items():
            torch.testing.assert_close(four[part][name], value, rtol=0, atol=5e-5, msg=lambda m: f"{part}.{name}: {m}")


def test_one_bad_or_stopping_rank_is_enough(place, monkeypatch):
    """A NaN or a SIGTERM that one rank alone sees; and a run that goes on with 2 ranks where 1 process stopped."""
    stub = tokenizer.perceptual_stub
    train(place, "tokenizer", "ranks", max_steps=1, lr_schedule="constant")

    def main(rank):
        bad = []
        monkeypatch.setattr(tokenizer, "perceptual_stub", lambda a, b: stub(a, b) * (math.nan if bad else 1.0))

        def action(step):
            bad[:] = [step] if step == 1 and rank == 1 else []
            if step == 4 and rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        at_step(monkeypatch, "tokenizer", action)
        train(place, "tokenizer", "ranks", max_steps=8, save_every=100, resume=True, lr_schedule="constant")

    assert ranks(main) == [0, 0]
    state, rows = read(place / "ranks")
    assert state["step"] == 5 and state["skipped"] == 1
    assert [row["step"] for row in rows if "lr" in row] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("dead", [0, 1])
def test_a_dead_rank_ends_the_others(place, dead, monkeypatch):
    """Seven GPUs that wait for an eighth until somebody looks; a page of traceback in place of what to do."""
    log = str(place / f"dead{dead}.log")

    def main(rank):
        action = lambda step: os.kill(os.getpid(), signal.SIGKILL) if step == 2 and rank == dead else None
        at_step(monkeypatch, "tokenizer", action)
        train(place, "tokenizer", f"dead{dead}", max_steps=1000, save_every=1, overwrite=True)

    monkeypatch.setenv("RANKS_LOG", log)
    codes = ranks(lambda rank: run_main(lambda: main(rank)))
    assert codes[dead] == -signal.SIGKILL and codes[1 - dead] == 2, codes
    text = open(log).read()
    assert "error: the processes of this run cannot reach each other" in text and "Traceback" not in text, text
    assert torch.load(place / f"dead{dead}/ckpt.pt", weights_only=True)["step"] in (1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Long runs, any place

def test_nothing_stays_open(place, monkeypatch):
    """Files, loader processes or lines of metrics that a step or an evaluation leaves behind."""
    def main():
        seen = {}
        at_step(monkeypatch, "tokenizer", lambda step: seen.update({step: vitals(os.getpid())[1:]}))
        train(place, "tokenizer", "open", max_steps=30, eval_every=3, save_every=2, workers=1)
        assert len(set(list(seen.values())[4:])) == 1 and seen[20][1] == 1, seen
        assert vitals(os.getpid())[2] == 0, "workers outlive the run"

    assert finish(start(main, log=str(place / "open.log"))) == 0, (place / "open.log").read_text()


def test_default_commands_work_anywhere(place, tmp_path):
    """Something downloaded without being asked for; files looked up beside the script or written there; a path with
    spaces that is taken apart."""
    source, here = tmp_path / "a tree", tmp_path / "an other place"
    source.mkdir()
    here.mkdir()
    names = sorted(name for name in os.listdir(ROOT) if name.endswith(".py"))
    for name in names:
        shutil.copy(os.path.join(ROOT, name), source)
    os.chmod(source, 0o555)

    def script(name, *argv):
        if os.geteuid() == 0:  # to whom a read-only tree means nothing, unless it gives up its capabilities
            ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
        assert not os.access(source, os.W_OK)
        for module in list(sys.modules):
            if f"{module}.py" in names:
                del sys.modules[module]
        sys.path[:] = [str(source), *(path for path in sys.path if path not in (ROOT, os.path.join(ROOT, "tests")))]
        sys.argv, sys.dont_write_bytecode = [name, *argv], True
        os.chdir(here)

        connect = socket.socket.connect

        def local_only(self, address):  # loader processes talk to each other through files
            assert self.family == socket.AF_UNIX, f"{name} connects to {address}"
            return connect(self, address)

        socket.socket.connect = socket.socket.connect_ex = local_only
        socket.getaddrinfo = lambda *address, **kwargs: exit(f"{name} looks up {address}")
        runpy.run_path(str(source / name), run_name="__main__")

    tiny = command(TOKENIZER, "", max_steps=1, size=16, mult="1,1,2")  # L = 16; SSIM needs 11 px
    without_out = lambda argv: [part for n, part in enumerate(argv) if "--out" not in (part, argv[max(0, n - 1)])]
    generator = without_out(command(MERGEAR, "", max_steps=1, data=place / "images"))
    images, probe = ("--data", str(place / "images")), ("--epochs", "1", "--num", "4")
    small = "--length 16 --keep 4 --width 32 --depth 1 --heads 2 --batch-size 1 --repeats 1 --bits 8".split()
    for name, *argv in (("data.py",), ("data.py", *images, "--size", "8", "--pack", "out/packed"),
                        ("tokenizer.py", *without_out(tiny)), ("mergear.py", *generator),
                        ("generate.py", "--num", "4"),
                        ("mergear.py", *generator, "--mode", "randar", "--out", "out/randar"),
                        ("recovery.py", "--max-steps", "1", "--eval-num", "2", "--batch-size", "4"),
                        ("eval.py", "train-classifier", *images, "--max-steps", "1", "--size", "16"),
                        ("eval.py", "recon", "--num", "4"), ("eval.py", "maps", "--num", "2"), ("eval.py", "stats", *images),
                        ("eval.py", "gen", "--num", "10", "--cfg", "1"), ("eval.py", "probe", *images, *probe),
                        ("eval.py", "finetune", *images, "--max-steps", "1", "--batch-size", "4"),
                        ("eval.py", "sweep", *images, *probe), ("eval.py", "ablate-source", "--num", "4"),
                        ("eval.py", "speed", *small)):
        log = tmp_path / "log"
        assert finish(start(script, name, *argv, log=str(log))) == 0, f"{name}: {log.read_text()[-2000:]}"
    assert sorted(os.listdir(source)) == names and os.listdir(here) == ["out"]
    made = {"data", "packed", "tokenizer", "mergear", "generate", "randar", "recovery", "classifier", "recon", "maps", "stats",
            "gen", "probe", "finetune", "sweep", "ablate"}
    assert set(os.listdir(here / "out")) == made
