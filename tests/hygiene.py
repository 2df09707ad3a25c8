"""Does a long run grow? Memory, open files and processes of 2,000 tiny steps of each training script.

    python tests/hygiene.py --steps 2000      # minutes; the suite looks at open files and processes over a few steps

Prints resident memory, open files and child processes at a tenth of the run and at its end. With two loader workers, an
evaluation and a checkpoint every 50 steps.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from kills import MERGEAR, TOKENIZER, alive, command, finish, mergear, start, tokenizer, write_images


def vitals(pid):
    """(resident MB of the process, open files, child processes)."""
    with open(f"/proc/{pid}/statm") as f:
        resident = int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    with open(f"/proc/{pid}/task/{pid}/children") as f:
        children = len(f.read().split())
    return resident, len(os.listdir(f"/proc/{pid}/fd")), children


def last_step(out):
    try:
        with open(os.path.join(out, "metrics.jsonl"), "rb") as f:
            f.seek(max(0, os.path.getsize(f.name) - 4000))
            return json.loads(f.read().splitlines()[-1])["step"]
    except (OSError, ValueError, IndexError):
        return 0


def watch(main, argv, out, steps, log):
    """Run and look twice -> vitals at steps / 10 and shortly before the end, both between two evaluations."""
    pid, seen = start(main, argv, log=log), {}
    while alive(pid):
        step = last_step(out)
        for mark in (steps // 10 + 20, steps - 30):
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
    often = dict(max_steps=args.steps, save_every=50, eval_every=50, workers=2, data=images)
    for main, settings, name in ((tokenizer.main, TOKENIZER, "tok"), (mergear.main, MERGEAR, "gpt")):
        out = os.path.join(folder, name)
        if name == "gpt":
            often.update(tokenizer=os.path.join(folder, "tok/ckpt.pt"), cache="none")
        for step, (resident, files, children) in watch(main, command(settings, out, **often), out, args.steps, log).items():
            print(f"{main.__module__}.py, step {step}: {resident:.1f} MB resident, {files} open files, {children} children",
                  flush=True)


if __name__ == "__main__":
    main()
