"""Kills a run at random moments, and goes on with it: ``python kills.py FOLDER KILLS``.

The run is a child of this process, forked again after each kill, since a start takes seconds. Kills
come at random moments of random steps, every other one while the state is being written. Each step
is told in a file before its state is saved, so that what a kill cost can be counted.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import tiny
import torch

from pyro_blora.checkpoints.checkpoint import read_tensors
from pyro_blora.inference import fit
from pyro_blora.inference.resume import STATE

SAVE_EVERY = 2


def train(folder, num_steps, told=None, **options):
    """What the run leaves in the adapter; each step is told in the file."""
    torch.manual_seed(0)
    blora = tiny.adapted(num_data=10)

    def tell(step):
        if told is not None:
            with told.open("ab") as file:
                file.write(b"%d\n" % step)

    rows = tiny.examples(10)
    # rates that do not follow from the number of steps
    options |= {"warmup": 0.0, "decay": "constant", "callback": tell, "batch_size": 4}
    options |= {"precision": "float32"}
    fit(blora, rows, collate=tiny.collate, num_steps=num_steps, progress=False, **options)
    return {name: tensor.clone() for name, tensor in blora.state_dict().items()}


def steps_in(path):
    return len(json.loads(read_tensors(path)[0]["training"])["history"]) if path.exists() else 0


def forked(work):
    """The number of a child that does the work."""
    child = os.fork()
    if child:
        return child
    work()
    os._exit(0)


def main(folder, kills, num_steps=10_000):
    """Prints as JSON how many of the kills left a state that reads, and what they cost."""
    state, told = folder / "run" / STATE, folder / "told"
    folder.mkdir(parents=True, exist_ok=True)
    options = {"checkpoint_dir": folder / "run", "save_every": SAVE_EVERY, "resume": True}

    def writing():
        return len(list(state.parent.glob(f".{STATE}.*")))

    moment, survived, lost, cut = random.Random(), 0, 0, 0
    for number in range(kills):
        saved = steps_in(state)
        told.write_bytes(b"")
        child = forked(lambda: train(folder, num_steps, told, **options))
        begun, wanted = time.perf_counter(), moment.randint(1, 2 * SAVE_EVERY)
        while (count := len(told.read_bytes().split())) < wanted:
            time.sleep(0.002)
        if number % 2:  # within a step
            time.sleep(moment.random() * (time.perf_counter() - begun) / count)
        else:  # while it writes, if that can be caught
            while not writing() and len(told.read_bytes().split()) < wanted + 4 * SAVE_EVERY:
                pass
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        steps = [int(line) for line in told.read_bytes().split()]
        assert steps[0] == saved + 1  # went on from what was saved
        now = steps_in(state)
        survived += now >= saved
        lost = max(lost, steps[-1] - now)
        cut += writing()
    whole = train(folder, now + 7)
    report = {"kills": kills, "survived": survived, "most steps lost": lost, "while writing": cut}
    report["same bits"] = tiny.equal(train(folder, now + 7, **options), whole)
    print(json.dumps(report | {"steps": now + 7}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
