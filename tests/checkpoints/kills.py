"""Saves in processes that end before each single system call of a save, one after the other.

What they leave must load as the old or as the new. Prints how many there were.
"""

import os
import sys
from itertools import count
from pathlib import Path

import tiny
import torch

from pyro_blora.checkpoints import read_pretrained, written

torch.set_num_threads(1)
FOLDER = Path(sys.argv[1])
NET = tiny.llama(1)
BLORA = tiny.adapted(NET)
FILES = ["README.md", "bayesian_lora.safetensors", "bayesian_lora_config.json"]


def save(mark):
    with torch.no_grad():
        for parameter in BLORA.parameters():
            parameter.fill_(mark)
    BLORA.likelihood.num_data = mark
    BLORA.save_pretrained(FOLDER, notes={"mark": mark})


def found():
    """The one mark that all three files bear."""
    saved = read_pretrained(NET, FOLDER)
    mark = saved.options["likelihood"].num_data
    assert all(bool((tensor == mark).all()) for tensor in saved.tensors.values())
    assert f"| mark | {mark} |" in written(FOLDER, "README.md").read_text()
    return mark


def up_to(call):
    """One save in another process, that ends at once before its ``call``-th system call."""
    pid = os.fork()
    if not pid:
        calls = count(1)

        def look(event, arguments):
            here = arguments and str(arguments[0]).startswith(str(FOLDER))
            if event.split(".")[0] in ("open", "os", "shutil") and here and next(calls) == call:
                os._exit(9)

        sys.addaudithook(look)
        save(found() + 1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main():
    save(1)
    for call in count(1):
        before = found()
        done = up_to(call) == 0
        assert found() in ((before + 1,) if done else (before, before + 1))
        if done:
            break
    save(last := found() + 1)
    assert found() == last
    assert sorted(p.name for p in FOLDER.iterdir()) == FILES
    print(call - 1)


main()
