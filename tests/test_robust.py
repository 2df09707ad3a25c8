"""Nothing is lost: resume, faults, hostile input, several processes. The docstring of a test names the bug it catches.

    python -m pytest -q tests/test_robust.py

The slow versions are scripts: tests/kills.py (fifty kills), tests/fuzz.py (300 files), tests/hygiene.py (2,000 steps).
"""

import contextlib
import dataclasses
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

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import fuzz
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

def numeric_flags(config_class):
    return ["--" + f.name.replace("_", "-") for f in dataclasses.fields(config_class) if f.type in (int, float, tuple)]


def scripts():
    """(main, flags that make it start, its numeric flags)"""
    import eval
    import generate
    partial = lambda module, name: lambda argv: module.main([name, *argv])
    return [(tokenizer.main, [], numeric_flags(tokenizer.TokenizerConfig)),
            (mergear.main, ["--tokenizer", "{tok}"], numeric_flags(mergear.GPTFlags)),
            (generate.main, ["--ckpt", "{gpt}"],
             "--cfg --temperature --top-k --top-p --num --keep --steps --seed --batch-size".split()),
            (recovery.main, ["--generator", "{randar}"], numeric_flags(recovery.RecoveryConfig)),
            (partial(eval, "recon"), ["--ckpt", "{tok}"], "--num --batch-size --workers --seed --keep".split()),
            (partial(eval, "gen"), ["--ckpt", "{gpt}"], "--cfg --temperature --top-k --top-p --num --keep".split()),
            (partial(eval, "train-classifier"), [], "--size --batch-size --max-steps --lr --workers --seed".split())]


@pytest.mark.parametrize("number", range(7))
def test_every_numeric_flag(place, number, tmp_path, monkeypatch, capsys):
    """A number that ends in a traceback, in silence, in a folder of nothing, or in a machine without memory. The device that
    does not exist ends what the number does not."""
    monkeypatch.chdir(tmp_path)
    main, start, names = scripts()[number]
    start = [part.format(**{name: place / name / "ckpt.pt" for name in ("tok", "gpt", "randar")}) for part in start]
    for name in names:
        for value in ("nan", "text", "1" + "0" * 12, "-1", "0"):
            with pytest.raises(SystemExit) as stop:
                run_main(lambda: main([*start, "--device", "no-such-device", "--out", str(tmp_path / "made"), f"{name}={value}"]))
            error = capsys.readouterr().err.strip()
            assert stop.value.code == 2 and len(error.splitlines()) == 1, f"{name} {value}: {error}"
            if value not in ("-1", "0"):  # these are fine for some flags
                assert name in error or name.strip("-") in error.split(), f"{name} {value}: {error}"
                assert "no-such-device" not in error, f"{name} {value} was accepted"
            assert not os.listdir(tmp_path), f"{name} {value}: {os.listdir(tmp_path)}"


@pytest.mark.parametrize("script, wrong, word", [
    ("tokenizer", dict(keep=17), "--keep 17"), ("tokenizer", dict(batch_size=9, accum=2), "--batch-size 9"),
    ("tokenizer", dict(size=9), "--size 9"), ("tokenizer", dict(disc_base=3), "--disc-base"),
    ("tokenizer", dict(disc_layers=3), "--disc-layers 3"), ("mergear", dict(width=18), "--width 18"),
    ("mergear", dict(batch_size=9, accum=2), "--batch-size 9"), ("mergear", dict(window=-1), "--window -1")])
def test_impossible_combinations(place, script, wrong, word):
    """Combinations that fail in the middle of a network, or after a folder was made."""
    with pytest.raises(UserError) as error:
        train(place, script, "impossible", **wrong)
    assert word in str(error.value) and not os.path.exists(place / "impossible")


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


def test_two_ranks_with_accumulation_equal_one_process(place):
    """Gradients averaged over ranks in every micro-batch or in none, statistics of one rank's micro-batch, the adaptive
    weight of a rank. One batch of 8, and 2 ranks x 2 micro-batches x 2."""
    changes = dict(batch_size=8, lr=1e-4, max_steps=3, disc_start=1)
    train(place, "tokenizer", "one", **changes)
    assert ranks(lambda rank: train(place, "tokenizer", "four", accum=2, **changes)) == [0, 0]
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


def test_a_dead_rank_ends_the_others(place, monkeypatch):
    """Seven GPUs that wait for an eighth until somebody looks."""
    def main(rank):
        at_step(monkeypatch, "tokenizer", lambda step: os.kill(os.getpid(), signal.SIGKILL) if step == 2 and rank == 1 else None)
        train(place, "tokenizer", "dead", max_steps=1000)

    codes = ranks(lambda rank: run_main(lambda: main(rank)))
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, None), codes


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
    os.chmod(source, 0o555)  # means nothing to root: below it is checked that nothing was written

    def script(name, *argv):
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

    tiny = command({name: value for name, value in TOKENIZER.items()}, "", max_steps=1)
    without_out = lambda argv: [part for n, part in enumerate(argv) if "--out" not in (part, argv[max(0, n - 1)])]
    generator = without_out(command(MERGEAR, "", max_steps=1, data=place / "images"))
    for name, *argv in (("data.py",), ("tokenizer.py", *without_out(tiny)), ("mergear.py", *generator),
                        ("generate.py", "--num", "4"),
                        ("mergear.py", *generator, "--mode", "randar", "--out", "out/randar"),
                        ("recovery.py", "--max-steps", "1", "--eval-num", "2", "--batch-size", "4"),
                        ("eval.py", "maps", "--num", "2"), ("eval.py", "train-classifier", "--max-steps", "1", "--size", "8")):
        log = tmp_path / "log"
        assert finish(start(script, name, *argv, log=str(log))) == 0, f"{name}: {log.read_text()[-2000:]}"
    assert sorted(os.listdir(source)) == names and os.listdir(here) == ["out"]
    made = {"data", "tokenizer", "mergear", "generate", "randar", "recovery", "maps", "classifier"}
    assert set(os.listdir(here / "out")) == made
