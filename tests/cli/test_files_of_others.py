"""The command loses no file that is not its own, and if it fails it leaves no folder."""

from neighbors import NEIGHBORS, put, tree

COMPARING = ["--methods", "lora", "--seeds", "0", "--max-steps", 1, "--max-test", 3]


def test_neighbors_are_as_they_were_and_a_file_in_the_way_stops_it(compare, tmp_path):
    out = tmp_path / "out"
    put(out, NEIGHBORS)
    before = tree(out)
    compare(out, *COMPARING)
    after = tree(out)
    assert {n: after.get(n) for n in before} == before
    assert after.keys() - before.keys()
    out = tmp_path / "taken"
    put(out, [*NEIGHBORS, "results.json"])
    before = tree(out)
    _, told = compare(out, *COMPARING, codes=(2,))
    assert "results.json" in told
    assert len(told.strip().splitlines()) == 1
    assert tree(out) == before


def test_a_command_that_fails_leaves_no_folder(compare, tmp_path):
    out = tmp_path / "new/out"
    compare(out, "--model", "/nowhere/at/all", *COMPARING, codes=(2,))
    assert not (tmp_path / "new").exists()
