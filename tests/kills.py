"""Kill training runs with SIGKILL at random moments, a third of them while a checkpoint is being
written, and resume each.

    python tests/kills.py --kills 20      # a minute of one core; the suite does three

After each kill the checkpoint must be whole and no older than before. In the end all tensors of
the checkpoint and all lines of metrics.jsonl must equal those of an undisturbed run. Runs are
forked from one process that has imported torch.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
import traceback

import torch
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]
import mergear
import recovery
import tokenizer

# 8 px, L = 16: a step takes milliseconds
TOKENIZER = dict(size=8, base=8, mult=(1, 2), width=16, depth=2, heads=2,
                 dec_depth=1, dec_heads=2, recovery_width=16, keep=6, keeps=(4, 6, 16), bits=6,
                 align_dim=8, disc_base=4, disc_layers=1, disc_start=5, disc_ramp=2, warmup=2,
                 batch_size=4, eval_every=7)
MERGEAR = dict(width=16, heads=2, depth=1, batch_size=8, warmup=2, eval_every=11,
               token_dropout=0.2, dropout=0.1)
RECOVERY = dict(batch_size=8, warmup=2, drawn=0.5, eval_every=5)

def write_images(folder, size=8):
    """A data set of two classes, 24 images to train and 4 to validate."""
    dice = torch.Generator().manual_seed(0)
    for split, count in (("train", 12), ("val", 2)):
        for name in ("a", "b"):
            os.makedirs(f"{folder}/{split}/{name}")
            for n in range(count):
                pixels = torch.randint(0, 256, (size, size, 3), generator=dice, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(f"{folder}/{split}/{name}/{n}.png")

def command(settings, out, **changes):
    """Flags of a small run that saves every third step."""
    common = dict(out=out, device="cpu", workers=0, log_every=1, save_every=3)
    argv = []
    for name, value in {**common, **settings, **changes}.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            argv.append(flag if value else "--no-" + flag[2:])
        else:
            argv += [flag, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return argv

def start(function, *args, log=os.devnull):
    """Run function(*args) in a forked process of one thread, its output in `log`."""
    def run():
        torch.set_num_threads(1)
        with open(log, "a", buffering=1) as file, contextlib.redirect_stdout(file):
            with contextlib.redirect_stderr(file):
                try:
                    function(*args)
                except Exception:
                    traceback.print_exc()
                    sys.exit(1)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process

def finish(process):
    """Wait for a process -> its exit code, or minus the signal that ended it."""
    process.join()
    return process.exitcode

def cpu_seconds(process):
    with open(f"/proc/{process.pid}/stat") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")

def being_written(path):
    try:
        return os.stat(path).st_mtime > 0
    except FileNotFoundError:
        return False

def kill_at_random(process, out, dice, longest):
    """SIGKILL after a random share of `longest` CPU seconds, or, one time in three, while a
    checkpoint is being written -> "write", "anywhere", or "" when the run ended before."""
    half = f"{out}/ckpt.pt.tmp"
    with contextlib.suppress(FileNotFoundError):
        os.utime(half, (0, 0))  # left by the kill before: tells it from a write of this run
    in_write = dice.random() < 1 / 3
    until, skip = dice.uniform(0, longest), dice.randrange(4)
    writing = False
    while process.is_alive():
        before, writing = writing, being_written(half)
        skip -= writing and not before  # not always the first write
        if writing and skip < 0 if in_write else cpu_seconds(process) > until:
            process.kill()
            process.join()
            return "write" if being_written(half) else "anywhere"
        time.sleep(0.0002 if in_write else 0.005)
    assert finish(process) == 0, f"the run in {out} failed by itself"
    return ""

def read(out):
    """Checkpoint and metrics of a run, without what may differ: folder names and speed."""
    state = torch.load(f"{out}/ckpt.pt", weights_only=True)
    for name in ("config", "recovery_config"):
        for flag in ("out", "resume", "overwrite", "save_every", "max_steps"):
            state.get(name, {}).pop(flag, None)
    with open(f"{out}/metrics.jsonl") as file:
        return state, [{**json.loads(line), "images_per_s": 0} for line in file]

def difference(a, b, path=""):
    """The first place where two nested structures differ, bit for bit; None if they are equal."""
    if isinstance(a, torch.Tensor):
        return None if a.dtype == b.dtype and torch.equal(a, b) else path
    if isinstance(a, dict) and a.keys() != b.keys() or hasattr(a, "append") and len(a) != len(b):
        return f"{path}: other entries"
    if isinstance(a, (dict, list, tuple)):
        keys = a if isinstance(a, dict) else range(len(a))
        found = (difference(a[key], b[key], f"{path}/{key}") for key in keys)
        return next((place for place in found if place), None)
    return None if a == b else f"{path}: {a} and {b}"

def torment(main, settings, folder, kills, dice, **changes):
    """Kill runs `kills` times in all -> counts of what was hit. AssertionError on any loss."""
    reference, log = f"{folder}/reference", f"{folder}/log"
    before = os.times().children_user
    code = finish(start(main, command(settings, reference, **changes), log=log))
    assert code == 0, open(log).read()
    longest = 0.6 * (os.times().children_user - before)
    counts, rounds = {"write": 0, "anywhere": 0, "": 0}, 0
    while counts["write"] + counts["anywhere"] < kills:
        out, step = f"{folder}/victim{rounds}", -1
        rounds += 1
        while step < changes["max_steps"]:
            resume = os.path.exists(f"{out}/ckpt.pt")
            argv = command(settings, out, **changes, resume=resume, overwrite=not resume)
            process = start(main, argv, log=log)
            if counts["write"] + counts["anywhere"] < kills:
                counts[kill_at_random(process, out, dice, longest)] += 1
            else:
                assert finish(process) == 0, open(log).read()
            if os.path.exists(f"{out}/ckpt.pt"):
                now = torch.load(f"{out}/ckpt.pt", weights_only=True)["step"]
                assert now >= step, f"the checkpoint went back from step {step} to {now}"
                step = now
        differs = difference(read(reference), read(out))
        assert not differs, f"after kills the run is another: {differs}"
    return counts

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    kills = parser.parse_args().kills
    folder, dice = tempfile.mkdtemp(), random.Random(0)
    write_images(f"{folder}/images")
    trained = dict(tokenizer=f"{folder}/tokenizer/reference/ckpt.pt")
    randar = f"{folder}/randar"
    for n, (script, settings, changes) in enumerate((
            (tokenizer, TOKENIZER, dict(data=f"{folder}/images")),
            (mergear, MERGEAR, trained),
            (recovery, RECOVERY, dict(generator=f"{randar}/ckpt.pt")))):
        if script is recovery:
            argv = command(MERGEAR, randar, **trained, mode="randar", max_steps=2)
            assert finish(start(mergear.main, argv)) == 0
        place = f"{folder}/{script.__name__}"
        os.makedirs(place)
        hits = torment(script.main, settings, place, (kills + n) // 3, dice, max_steps=40,
                       **changes)
        print(f"{script.__name__}.py: {hits['anywhere']} kills anywhere, {hits['write']} during a "
              "write: the same run", flush=True)

if __name__ == "__main__":
    main()
