"""Does a long run grow? Memory, open files and processes of 2,000 tiny steps of each training script.

    python tests/hygiene.py --steps 2000      # minutes; the suite looks at open files and processes over a few steps

Prints resident memory, open files and child processes at a tenth of the run, at half of it and at --steps, and fails if the
second half has grown by more than 2 % or left anything open. With two loader workers, an evaluation and a checkpoint
every 60 steps.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from kills import MERGEAR, RECOVERY, TOKENIZER, alive, command, finish, mergear, recovery, start, tokenizer, write_images


def vitals(pid):
    """(resident MB of the process, open files, child processes)."""
    with open(f"/proc/{pid}/statm") as f:
        resident = int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    with open(f"/proc/{pid}/task/{pid}/children") as f:
        children = len(f.read().split())
    names = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            names.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
        except FileNotFoundError:  # closed in between
            pass
    return resident, len([name for name in names if not name.endswith("metrics.jsonl")]), children  # which is open now and then


def last_step(out):
    try:
        with open(os.path.join(out, "metrics.jsonl"), "rb") as f:
            f.seek(max(0, os.path.getsize(f.name) - 4000))
            return json.loads(f.read().splitlines()[-1])["step"]
    except (OSError, ValueError, IndexError):
        return 0


def watch(main, argv, out, steps, log):
    """Run a little longer than `steps` and look three times -> {step: vitals}, at steps between two evaluations."""
    pid, seen = start(main, argv, log=log), {}
    while alive(pid):
        step = last_step(out)
        for mark in (steps // 10, steps // 2 + 10, steps):
            if step >= mark and mark not in seen:
                os.kill(pid, signal.SIGSTOP)  # hold still for the picture
                seen[mark] = vitals(pid)
                os.kill(pid, signal.SIGCONT)
        time.sleep(0.02)
    assert finish(pid) == 0, open(log).read()
    return seen


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    folder = tempfile.mkdtemp()
    images, log = os.path.join(folder, "images"), os.path.join(folder, "log")
    write_images(images)
    often = dict(max_steps=args.steps + 20, save_every=60, eval_every=60)
    loader = dict(data=images, workers=2)  # recovery.py reads codes, not images
    generator = os.path.join(folder, "gpt/ckpt.pt")
    for script, settings, name, more in (
            (tokenizer, TOKENIZER, "tok", loader),
            (mergear, MERGEAR, "gpt", dict(loader, tokenizer=os.path.join(folder, "tok/ckpt.pt"), cache="none", mode="randar")),
            (recovery, RECOVERY, "rec", dict(generator=generator))):
        out = os.path.join(folder, name)
        seen = watch(script.main, command(settings, out, **often, **more), out, args.steps, log)
        for step, (resident, files, children) in seen.items():
            print(f"{script.__name__}.py, step {step}: {resident:.1f} MB resident, {files} open files, {children} children",
                  flush=True)
        _, middle, end = seen.values()
        assert end[0] < 1.02 * middle[0] and end[2] == middle[2], f"{script.__name__}.py grows"
        assert end[1] <= middle[1] + 1, f"{script.__name__}.py leaves files open"  # one may be open at that moment


if __name__ == "__main__":
    main()
