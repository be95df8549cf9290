"""The command loses no file that is not its own."""

from neighbors import NEIGHBORS, put, tree

COMPARING = ["--methods", "lora", "--seeds", "0", "--max-steps", 1, "--max-test", 3]


def test_neighbors_are_as_they_were_and_a_file_in_the_way_stops_it(run_words, tmp_path):
    out = tmp_path / "out"
    put(out, NEIGHBORS)
    before = tree(out)
    run_words("compare", out, *COMPARING)
    after = tree(out)
    assert {name: after.get(name) for name in before} == before
    assert after.keys() - before.keys()
    put(out := tmp_path / "taken", [*NEIGHBORS, "results.json"])
    before = tree(out)
    _, err = run_words("compare", out, *COMPARING, codes=(2,))
    assert "results.json" in err
    assert tree(out) == before
