"""Kill training runs with SIGKILL at random moments, a third of them while a checkpoint is being written, and resume each.

    python tests/kills.py --kills 50      # about two minutes of one core; the suite does three

After every kill all checkpoints must be whole and ckpt.pt no older than before; in the end all tensors of the checkpoint and all lines of
metrics.jsonl must equal those of a run that nobody disturbed. Runs are forked from one process that has imported torch.
"""

import argparse
import contextlib
import glob
import json
import os
import random
import signal
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
TOKENIZER = dict(size=8, base=8, mult="1,2", norm_groups=4, width=16, dec_width=16, depth=2, heads=2,
                 dec_depth=1, dec_heads=2, keep=6, keeps="4,6,16", bits=6, recovery_width=16, recovery_heads=2, align_dim=8,
                 disc_base=4, disc_layers=1, disc_start=5, disc_ramp=2, eval_every=7, eval_num=4, batch_size=4,
                 lr_schedule="cosine", warmup=2)
MERGEAR = dict(width=16, heads=2, depth=1, batch_size=8, warmup=2, eval_every=11, eval_num=4, token_dropout=0.2, dropout=0.1)
RECOVERY = dict(batch_size=8, warmup=2, eval_num=4)


def write_images(folder, size=8):
    """A data set of two classes, 24 images to train and 4 to validate."""
    dice = torch.Generator().manual_seed(0)
    for split, count in (("train", 12), ("val", 2)):
        for name in ("a", "b"):
            os.makedirs(os.path.join(folder, split, name))
            for n in range(count):
                pixels = torch.randint(0, 256, (size, size, 3), generator=dice, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(os.path.join(folder, split, name, f"{n}.png"))


def command(settings, out, **changes):
    """Flags of a small run that saves every third step."""
    settings = {**dict(out=out, device="cpu", workers=0, log_every=1, save_every=3), **settings, **changes}
    argv = []
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        argv += ([flag] if value else []) if isinstance(value, bool) else [flag, str(value)]
    return argv


def start(function, *args, log=os.devnull):
    """Run function(*args) in a forked process of one thread, its output in `log`. Returns the process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        torch.set_num_threads(1)
        for number in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.stdout, sys.stderr = open(1, "w", buffering=1, closefd=False), open(2, "w", buffering=1, closefd=False)
        function(*args)
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def finish(pid):
    """Wait for a process -> its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def cpu_seconds(pid):
    with open(f"/proc/{pid}/stat") as f:
        return sum(map(int, f.read().rsplit(")", 1)[1].split()[11:13])) / os.sysconf("SC_CLK_TCK")


def alive(pid):
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def being_written(path):
    try:
        return os.stat(path).st_mtime > 0
    except FileNotFoundError:
        return False


def kill_at_random(pid, out, dice, longest):
    """SIGKILL after a random share of `longest` CPU seconds, or, one time in three, while a checkpoint is being written.
    Returns what it hit: "write", "anywhere", or "" if the run was over before."""
    half = os.path.join(out, "ckpt.pt.tmp")
    with contextlib.suppress(FileNotFoundError):
        os.utime(half, (0, 0))  # left by the kill before: this time stamp tells it from a write of this run
    in_write, until, skip = dice.random() < 1 / 3, dice.uniform(0, longest), dice.randrange(4)
    writing = False
    while alive(pid):
        before, writing = writing, being_written(half)
        skip -= writing and not before  # not always the first write
        if writing and skip < 0 if in_write else cpu_seconds(pid) > until:
            os.kill(pid, signal.SIGKILL)
            finish(pid)
            return "write" if being_written(half) else "anywhere"  # what the kill left behind says which
        time.sleep(0.0002 if in_write else 0.005)
    assert finish(pid) == 0, f"the run in {out} failed by itself"
    return ""


def read(out):
    """Checkpoint and metrics of a run, without what may differ: folder names and speed."""
    state = torch.load(os.path.join(out, "ckpt.pt"), weights_only=True)
    state["config"] = {k: v for k, v in state["config"].items() if k not in ("out", "resume", "cache", "save_every", "keep_last")}
    with open(os.path.join(out, "metrics.jsonl")) as f:
        return state, [{**json.loads(line), "images_per_s": 0} for line in f]


def difference(a, b, path=""):
    """The first place where two nested structures differ, bit for bit; None if they are equal."""
    if isinstance(a, torch.Tensor):
        return None if a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) else path
    if isinstance(a, dict) and a.keys() != b.keys() or isinstance(a, (list, tuple)) and len(a) != len(b):
        return f"{path}: other entries"
    if isinstance(a, (dict, list, tuple)):
        pairs = a if isinstance(a, dict) else range(len(a))
        return next((d for d in (difference(a[k], b[k], f"{path}/{k}") for k in pairs) if d), None)
    return None if a == b else f"{path}: {a} and {b}"


def torment(main, settings, folder, kills, dice, **changes):
    """Kill runs `kills` times in all -> counts of what was hit. Raises AssertionError when anything was lost."""
    reference = os.path.join(folder, "reference")
    log = os.path.join(folder, "log")
    before = os.times().children_user
    assert finish(start(main, command(settings, reference, **changes), log=log)) == 0, open(log).read()
    longest = 0.6 * (os.times().children_user - before)
    counts, rounds = {"write": 0, "anywhere": 0, "": 0}, 0
    while counts["write"] + counts["anywhere"] < kills:
        out, step = os.path.join(folder, f"victim{rounds}"), 0
        rounds += 1
        while step < changes["max_steps"]:
            resume = os.path.exists(os.path.join(out, "ckpt.pt"))
            pid = start(main, command(settings, out, **changes, resume=resume), log=log)
            if counts["write"] + counts["anywhere"] < kills:
                counts[kill_at_random(pid, out, dice, longest)] += 1
            else:
                assert finish(pid) == 0, open(log).read()
            for name in glob.glob(f"{glob.escape(out)}/ckpt*.pt"):  # with --keep-last there are several
                torch.load(name, weights_only=True)
            if os.path.exists(os.path.join(out, "ckpt.pt")):
                now = torch.load(os.path.join(out, "ckpt.pt"), weights_only=True)["step"]
                assert now >= step, f"the checkpoint went back from step {step} to {now}"
                step = now
        differs = difference(read(reference), read(out))
        assert not differs, f"after kills the run is another: {differs}"
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--max-steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="default: a new temporary folder")
    args = parser.parse_args()
    folder, dice = args.folder or tempfile.mkdtemp(), random.Random(args.seed)
    for name in ("tok", "gpt", "rec"):
        os.makedirs(os.path.join(folder, name))
    images, share, steps = os.path.join(folder, "images"), max(1, args.kills // 3), args.max_steps
    write_images(images)
    trained = dict(tokenizer=os.path.join(folder, "tok/reference/ckpt.pt"))
    generator = os.path.join(folder, "randar")
    for script, settings, place, kills, changes in (
            (tokenizer, TOKENIZER, "tok", share, dict(data=images, keep_last=2)),
            (mergear, MERGEAR, "gpt", share, trained),
            (recovery, RECOVERY, "rec", args.kills - 2 * share, dict(generator=generator + "/ckpt.pt"))):
        if script is recovery:
            assert finish(start(mergear.main, command(MERGEAR, generator, **trained, mode="randar", max_steps=2))) == 0
        hits = torment(script.main, settings, os.path.join(folder, place), kills, dice, max_steps=steps, **changes)
        print(f"{script.__name__}.py: {hits['anywhere']} kills anywhere, {hits['write']} during a write: same run", flush=True)


if __name__ == "__main__":
    main()
