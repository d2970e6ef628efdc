"""The store: keys, a kill at every point, the same bytes whatever happened."""

import json
import os
import signal
import sys

import numpy as np
import pytest

from polyrank.core.errors import CheckpointError, ConfigError
from polyrank.core.files import sha256
from polyrank.retrieval.store import FORMAT, Rows, Store, stage_key


class Squares:
    """Rows n, n * n; counts how often a part is made."""

    unit = "rows"

    def __init__(self, num_parts, made=None, fail_at=None):
        self.num_parts, self.made, self.fail_at = num_parts, made if made is not None else [], fail_at

    def __call__(self, part, file):
        if part == self.fail_at:
            file.write(b"torn")
            raise RuntimeError("the lights went out")
        self.made.append(part)
        for n in (2 * part, 2 * part + 1):
            file.write(json.dumps({"n": n, "square": n * n}).encode() + b"\n")
        return {"rows": 2, "even": 1}


def test_rows_come_in_order_and_are_counted(tmp_path):
    stage = Store(tmp_path).make("squares", {"a": 1}, [], lambda: Squares(3))
    assert [row["square"] for row in stage.rows()] == [0, 1, 4, 9, 16, 25]
    assert stage.rows()[4] == {"n": 4, "square": 16}
    assert [row["n"] for row in stage.rows()[1:3]] == [1, 2]
    assert stage.counts == {"even": 3, "rows": 6}
    assert sorted(file.name for file in stage.folder.iterdir()) == ["rows.jsonl", "stage.json"]


def test_what_is_whole_is_not_made_again(tmp_path):
    def never():
        raise AssertionError("made again")

    made = Store(tmp_path).make("squares", {"a": 1}, [], lambda: Squares(3))
    again = Store(tmp_path).make("squares", {"a": 1}, [], never)
    assert (again.folder, again.counts) == (made.folder, made.counts)


def test_a_setting_changes_its_stage_and_all_after_it_only(tmp_path):
    made = []

    def run(first, second):
        store = Store(tmp_path)
        a = store.make("a", {"x": first}, [], lambda: Squares(1, made))
        b = store.make("b", {"y": second}, [a], lambda: Squares(2, made))
        return store.make("c", {}, [b], lambda: Squares(3, made))

    run(1, 1)
    assert len(made) == 6
    run(1, 2)  # b and c
    assert len(made) == 11
    run(2, 2)  # all three
    assert len(made) == 17
    run(1, 1)  # still there
    assert len(made) == 17


def test_a_failed_part_leaves_the_others_and_the_bytes_are_the_same(tmp_path):
    made = []
    with pytest.raises(RuntimeError, match="lights"):
        Store(tmp_path / "one").make("squares", {}, [], lambda: Squares(4, made, fail_at=2))
    broken = Store(tmp_path / "one").make("squares", {}, [], lambda: Squares(4, made))
    whole = Store(tmp_path / "two").make("squares", {}, [], lambda: Squares(4))
    assert made == [0, 1, 2, 3]
    assert sha256(broken.folder) == sha256(whole.folder)


def test_vectors_are_one_memory_mapped_file(tmp_path):
    class Vectors:
        num_parts, unit = 2, "texts"

        def __call__(self, part, file):
            file.write(np.full((3, 4), part, dtype="<f4").tobytes())
            return {"rows": 3}

    stage = Store(tmp_path).make("vectors", {}, [], Vectors, lambda: 4)
    found = stage.vectors()
    assert isinstance(found, np.memmap)
    np.testing.assert_array_equal(found, np.repeat([[0.0], [1.0]], 3, 0).repeat(4, 1))


def test_another_format_is_refused(tmp_path):
    Store(tmp_path).make("squares", {}, [], lambda: Squares(1))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["stages"].popitem()[1]["counts"] == {"even": 1, "rows": 2}
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 0, "stages": {}}))
    with pytest.raises(CheckpointError, match=f"has format 0, this version reads {FORMAT}; give another run folder"):
        Store(tmp_path)


def test_keys():
    key = stage_key("a", {"x": 1, "y": 2}, ["k"])
    assert key == stage_key("a", {"y": 2, "x": 1}, ["k"])
    assert len({key, stage_key("b", {"x": 1, "y": 2}, ["k"]), stage_key("a", {"x": 1, "y": 3}, ["k"]),
                stage_key("a", {"x": 1, "y": 2}, ["l"])}) == 4  # fmt: skip


def test_an_unknown_engine(tmp_path):
    with pytest.raises(ConfigError, match="unknown engine 'rai'; did you mean 'ray'"):
        Store(tmp_path, "rai").make("squares", {}, [], lambda: Squares(1))


def test_rows_of_an_empty_file(tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    assert len(Rows(tmp_path / "rows.jsonl")) == 0


def killed_after(writes, job):
    """Run a job in a child that is killed (SIGKILL) before its n-th file is flushed or moved; the child's status."""
    child = os.fork()
    if child == 0:
        left = [writes]

        def counted(function):
            def call(*args, **kwargs):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return call

        os.replace, os.fsync = counted(os.replace), counted(os.fsync)
        try:
            job()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize("writes", [1, 2, 5, 11])
def test_killed_again_and_again_the_files_are_the_same_in_the_end(tmp_path, writes):
    """Each run goes on from what the last one left; a run always ends at least the part at hand."""

    def job(folder):
        store = Store(folder)
        first = store.make("a", {}, [], lambda: Squares(2))
        store.make("b", {}, [first], lambda: Squares(3))

    job(tmp_path / "whole")
    codes = [killed_after(writes + step, lambda: job(tmp_path / "killed")) for step in range(0, 40, 2)]
    assert codes[0] == signal.SIGKILL
    assert codes[-1] == 0
    assert sha256(tmp_path / "killed" / "stages") == sha256(tmp_path / "whole" / "stages")


class Dying:
    """Writes its part's number; the process that makes part 2 kills itself the first time."""

    num_parts, unit = 4, "rows"

    def __init__(self, marker=None):
        self.marker = marker

    def __call__(self, part, file):
        if self.marker is not None and part == 2 and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        file.write(json.dumps({"n": part}).encode() + b"\n")
        return {"rows": 1}


@pytest.mark.slow
def test_ray_with_a_worker_killed_on_the_way_gives_the_same_files(tmp_path):
    """A Ray cluster of two workers on this machine; Ray is optional and not among what the tests install."""
    ray = pytest.importorskip("ray")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    here = Store(tmp_path / "here").make("numbers", {}, [], Dying)
    try:
        ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
        there = Store(tmp_path / "there", "ray", 2).make("numbers", {}, [], lambda: Dying(tmp_path / "died"))
    finally:
        ray.shutdown()
    assert (tmp_path / "died").exists()
    assert sha256(there.folder) == sha256(here.folder)
