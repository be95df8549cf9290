import pytest
import tiny

from pyro_blora.inference import fit


@pytest.fixture
def run():
    """``fit`` on ten rows of differing lengths in batches of four, so that the last holds two."""

    def train(blora, rows=None, **options):
        usual = {"collate": tiny.collate, "num_steps": 6, "batch_size": 4, "progress": False}
        return fit(blora, tiny.examples(10) if rows is None else rows, **{**usual, **options})

    return train
