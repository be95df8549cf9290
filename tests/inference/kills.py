"""Kills a run at random moments, and goes on with it: ``python kills.py FOLDER KILLS``.

The run is a child of this process, forked again after each kill, since a start takes seconds. It
saves after every other step, so that many a kill comes while the state is being written. Each step
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

    # rates that do not follow from the number of steps
    options |= {"warmup": 0.0, "decay": "constant", "callback": tell, "batch_size": 4}
    options |= {"collate": tiny.collate, "precision": "float32", "progress": False}
    fit(blora, tiny.examples(10), num_steps=num_steps, **options)
    return {name: tensor.clone() for name, tensor in blora.state_dict().items()}


def steps_in(path):
    return len(json.loads(read_tensors(path)[0]["training"])["history"]) if path.exists() else 0


def main(folder, kills, num_steps=10_000):
    """Prints as JSON how many of the kills left a state that reads, and what they cost."""
    state, told = folder / "run" / STATE, folder / "told"
    folder.mkdir(parents=True, exist_ok=True)
    options = {"checkpoint_dir": folder / "run", "save_every": SAVE_EVERY, "resume": True}
    moment, lost = random.Random(), []
    for _ in range(kills):
        saved = steps_in(state)
        told.write_bytes(b"")
        child = os.fork()
        if not child:
            train(folder, num_steps, told, **options)
            os._exit(0)
        begun, wanted = time.perf_counter(), moment.randint(1, 2 * SAVE_EVERY)
        while (count := len(told.read_bytes().split())) < wanted:
            time.sleep(0.002)
        time.sleep(moment.random() * (time.perf_counter() - begun) / count)
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        steps = [int(line) for line in told.read_bytes().split()]
        assert steps[0] == saved + 1  # went on from what was saved
        lost.append(steps[-1] - steps_in(state))
    last = steps_in(state) + 7
    whole = train(folder, last)
    same = tiny.equal(train(folder, last, **options), whole)
    print(json.dumps({"steps lost": lost, "same bits": same}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
