"""The commands of README.md and .github/RESULTS.md. The docstring of a test names the
bug that it catches."""

import importlib
import os
import re
import shlex
import subprocess
import sys

import pytest
from kills import ROOT, write_images

import data

SCRIPTS = ("data", "tokenizer", "recovery", "mergear", "generate", "eval")
QUICK = dict(tokenizer="--max-steps 2 --data images", mergear="--max-steps 2",
             generate="--num 2")

def commands():
    """[(script, its arguments)] of every line in a bash block that starts one of the scripts."""
    found = []
    for name in ("README.md", ".github/RESULTS.md"):
        if not os.path.exists(f"{ROOT}/{name}"):
            continue
        with open(f"{ROOT}/{name}") as file:
            blocks = re.findall(r"^```(?:bash|sh)\n(.*?)^```", file.read(), re.M | re.S)
        for line in "".join(blocks).replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|;", line):
                words = shlex.split(part, comments=True)
                scripts = [word for word in words if word in {f"{s}.py" for s in SCRIPTS}]
                if words and words[0] in ("python", "torchrun") and scripts:
                    place = words.index(scripts[0])
                    found.append((scripts[0][:-3], tuple(words[place + 1:])))
    return list(dict.fromkeys(found))

class Parsed(Exception):
    """All flags were understood."""

@pytest.mark.parametrize("script, argv", commands())
def test_every_command_parses(script, argv, monkeypatch):
    """A flag that was renamed, a value that is out of range: a line of the README that rots."""
    parse = data.Parser.parse_args

    def parse_and_stop(self, args=None, namespace=None):
        parse(self, args, namespace)
        raise Parsed

    monkeypatch.setattr(data.Parser, "parse_args", parse_and_stop)
    with pytest.raises(Parsed):
        importlib.import_module(script).main(list(argv))

def test_the_quickstart_runs(tmp_path):
    """Defaults that do not chain: three commands, one after the other, with a few steps."""
    write_images(tmp_path / "images", size=32)
    for script, flags in QUICK.items():
        assert (script, ()) in commands(), f"python {script}.py is not in the README"
        argv = [sys.executable, f"{ROOT}/{script}.py", *flags.split(), "--device", "cpu"]
        done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-2000:]
    assert os.path.exists(tmp_path / "out/generate/samples.png")
