"""Conversions that are killed or that race: the destination is the old file, or a whole new one (C1, C3)."""

import os
import random
import signal
import time

import pytest

from checkpoints import make_checkpoint
from edgellama.errors import FormatError
from edgellama.format import open_model
from edgellama_convert import convert

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills processes the POSIX way")


def in_child(source, out, method="search", delay=0.0):
    """Start a conversion in a child process (forked: nothing to import or compile); its process id."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            time.sleep(delay)
            convert(source, out, method=method, n_threads=2)
            status = 0
        finally:
            os._exit(status)
    return pid


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crash") / "model"
    make_checkpoint(folder, hidden_size=384, intermediate_size=1024, vocab_size=2000, num_hidden_layers=6)
    return folder


@pytest.fixture(scope="module")
def expected(source, tmp_path_factory):
    """The bytes of an undisturbed conversion, by method; compiles everything, so that children need not."""
    folder = tmp_path_factory.mktemp("expected")
    return {
        method: convert(source, folder / method, method=method, n_threads=2).out.read_bytes()
        for method in ("rtn", "search")
    }


def kill_at_random_moments(source, expected, folder, times, seed):
    """Moments are spread over a conversion's duration, which is taken anew whenever one ends before its moment."""
    out = folder / "m.edgellama"
    started = time.perf_counter()
    assert os.waitpid(in_child(source, folder / "timed"), 0)[1] == 0
    duration = time.perf_counter() - started
    moments = random.Random(seed)
    killed = 0
    for i in range(times):
        out.unlink(missing_ok=True)
        old = i % 2 == 1
        if old:
            out.write_bytes(expected["rtn"])
        pid, started = in_child(source, out), time.perf_counter()
        moment = started + moments.uniform(0, 1.1 * duration)
        status = None
        while status is None and time.perf_counter() < moment:
            time.sleep(0.001)
            ended, code = os.waitpid(pid, os.WNOHANG)
            if ended:  # too early to kill: the machine is faster now than when it was timed
                status, duration = code, time.perf_counter() - started
        if status is None:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
        killed += os.WIFSIGNALED(status)
        if out.exists():
            assert out.read_bytes() in ([expected["rtn"]] if old else []) + [expected["search"]]
        else:
            assert not old
        for leftover in folder.glob(".*.tmp"):
            if leftover.read_bytes() not in expected.values():  # a second link to the old file is whole
                with pytest.raises(FormatError):
                    open_model(leftover).close()
    assert killed > times // 3  # the moments were not all too late to matter
    assert convert(source, out, method="search").out.read_bytes() == expected["search"]
    assert sorted(path.name for path in folder.iterdir()) == ["m.edgellama", "timed"]  # the killed ones' files too


def test_kill_9_leaves_the_old_file_or_none_and_a_rerun_gives_the_same_bytes(source, expected, tmp_path):
    kill_at_random_moments(source, expected, tmp_path, times=8, seed=1)


@pytest.mark.slow
def test_kill_9_a_hundred_times(source, expected, tmp_path):
    kill_at_random_moments(source, expected, tmp_path, times=100, seed=2)


def race(source, expected, folder, times, seed):
    moments = random.Random(seed)
    for _ in range(times):
        out = folder / "m.edgellama"
        out.unlink(missing_ok=True)
        children = [in_child(source, out, method, moments.uniform(0, 0.05)) for method in ("rtn", "search")]
        assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0]
        with open_model(out) as model:
            model.verify()
        assert out.read_bytes() in expected.values()
        assert [path.name for path in folder.iterdir()] == ["m.edgellama"]


def test_two_conversions_to_one_target_give_one_whole_file(source, expected, tmp_path):
    race(source, expected, tmp_path, times=3, seed=3)


@pytest.mark.slow
def test_two_conversions_to_one_target_twenty_times(source, expected, tmp_path):
    race(source, expected, tmp_path, times=20, seed=4)
