"""Kills a run at random moments, and goes on with it: ``python kills.py FOLDER KILLS``.

The run is a child of this process, forked again after each kill, since a start takes seconds. It
saves after every other step, so that many a kill comes while the state is being written.
"""

import json
import os
import random
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import tiny
import torch

from pyro_blora.checkpoints.checkpoint import read_tensors
from pyro_blora.inference import fit
from pyro_blora.inference.resume import STATE

SAVE_EVERY = 2


def train(num_steps, **options):
    """What the run leaves, at rates that do not follow from the number of steps."""
    torch.manual_seed(0)
    blora = tiny.adapted(num_data=10)
    options |= {"warmup": 0.0, "decay": "constant", "collate": tiny.collate, "batch_size": 4}
    options |= {"num_steps": num_steps, "precision": "float32", "progress": False}
    fit(blora, tiny.examples(10), **options)
    return blora.state_dict()


def steps_in(path):
    return len(json.loads(read_tensors(path)[0]["training"])["history"]) if path.exists() else 0


def train_and_die(saved, last, seconds, **options):
    """Goes on after the steps that are saved, and is killed that long after the last step."""
    steps = []

    def tell(step):
        steps.append(step)
        if steps[0] != saved + 1:
            os._exit(1)
        if step == last:  # without a handler of Python's, this signal kills at once
            signal.setitimer(signal.ITIMER_REAL, seconds)

    train(10_000, callback=tell, **options)


def main(folder, kills):
    """Fails unless each kill leaves a state that reads, with all but the last few steps."""
    state = folder / STATE
    options = {"checkpoint_dir": folder, "save_every": SAVE_EVERY, "resume": True}
    for _ in range(kills):
        saved = steps_in(state)
        last = saved + random.randint(1, 2 * SAVE_EVERY)
        seconds = 1e-4 + 0.02 * random.random() ** 2  # the saving comes first
        child = os.fork()
        if not child:
            train_and_die(saved, last, seconds, **options)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), f"it did not go on after step {saved}"
        assert last - steps_in(state) <= SAVE_EVERY  # of the last step itself, too
    last = steps_in(state) + 7
    assert tiny.equal(train(last, **options), train(last))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
