"""The benchmark's plan, what it counts, and its rows; never how fast anything is."""

import json
import time

import pytest

from edgellama import bench
from edgellama.cli import main
from edgellama.errors import ContextError
from edgellama.format import open_model
from edgellama.kv_cache import bytes_per_position
from edgellama.sampling import Sampler

FIELDS = (
    "n_prompt n_gen n_depth n_batch n_threads avg_ts stddev_ts samples_ts bandwidth_share bandwidth ttft_s "
    "model_bytes peak_rss"
).split()


def test_plan_takes_all_combinations_and_names_them_as_llama_bench_does():
    names = [test.name for test in bench.plan([512], [128], [0, 4096], [1, 8])]
    assert names == [
        "pp512", "tg128", "pp512 x8", "tg128 x8",
        "pp512 @ d4096", "tg128 @ d4096", "pp512 x8 @ d4096", "tg128 x8 @ d4096",
    ]  # fmt: skip
    assert [test.name for test in bench.plan([0], [16], [0], [1])] == ["tg16"]


def test_bytes_of_a_step_are_the_weights_and_each_slots_cache(tiny_model):
    with open_model(tiny_model) as file:
        weights = sum(entry.nbytes for name, entry in file.tensors.items() if name != "model.embed_tokens.weight")
        position = bytes_per_position(file.config)
        # Three steps at depth 10 read 11, 12 and 13 positions.
        assert bench.bytes_per_step(file, bench.Test(0, 3, 10, 1)) == weights + 12 * position
        assert bench.bytes_per_step(file, bench.Test(0, 3, 10, 4)) == weights + 4 * 12 * position


def test_rows(tiny_model):
    with open_model(tiny_model) as file:
        tests = bench.plan([20], [3], [0, 7], [2])
        seen = []
        rows = list(bench.run(file, tests, repetitions=3, n_threads=1, progress=lambda *at: seen.append(at)))
    assert seen == [(test, repetition) for test in tests for repetition in range(3)]
    for test, row in zip(tests, rows, strict=True):
        assert (row.n_prompt, row.n_gen, row.n_depth, row.n_batch) == (test.n_prompt, test.n_gen, test.n_depth, 2)
        assert row.n_threads == 1 and len(row.samples_ts) == 3 and min(row.samples_ts) > 0
        assert row.avg_ts == pytest.approx(sum(row.samples_ts) / 3)
        assert (row.bandwidth_share is None) == (test.n_gen == 0) == (row.ttft_s is not None)
        assert row.bandwidth > 0 and row.model_bytes == tiny_model.stat().st_size


def test_tests_beyond_the_models_context_are_refused(tiny_model):
    with open_model(tiny_model) as file, pytest.raises(ContextError, match=r"129 tokens .* 128"):
        next(bench.run(file, bench.plan([0], [29], [100], [1]), 1))


def test_command_prints_a_table_or_a_list(tiny_model, capsys):
    arguments = ["bench", str(tiny_model), "-p", "8", "-n", "2", "-r", "2", "-t", "1"]
    assert main([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    rows = json.loads(out)
    assert [list(row) for row in rows] == [FIELDS, FIELDS] and err == ""
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("|")[6].strip() == "test" and len({len(line) for line in lines[:-1]}) == 1
    assert [line.split("|")[6].strip() for line in lines[2:4]] == ["pp8", "tg2"]


def test_what_generate_adds_is_counted(tiny_model, capsys, monkeypatch):
    with open_model(tiny_model) as file:
        row = bench.run_generate(file, 20, repetitions=3, n_threads=1)
        assert (row.n_gen, row.n_threads) == (20, 1)
        assert 0 < row.outside_us < 1e6 / row.generate_ts * 20 and row.forward_ts > 0
        sample = Sampler.__call__

        def slow(self, logits):
            time.sleep(0.01)
            return sample(self, logits)

        with monkeypatch.context() as patched:
            patched.setattr(Sampler, "__call__", slow)
            row = bench.run_generate(file, 5, repetitions=1, n_threads=1)
        assert row.outside_us >= 10_000 and row.generate_ts < 100 and row.overhead > 0
        with pytest.raises(ContextError, match=r"136 tokens"):
            bench.run_generate(file, 128, 1)
    arguments = ["bench", str(tiny_model), "-p", "0", "-n", "0", "--generate", "20", "-r", "2", "-t", "1"]
    assert main([*arguments, "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)[0]) == [
        "n_gen", "n_threads", "generate_ts", "forward_ts", "outside_us", "overhead"
    ]  # fmt: skip
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith("generate: ") and "outside the passes" in out


@pytest.mark.parametrize("arguments", [["-p", "0", "-n", "0"], ["-b", "0"], ["-p", "x"], ["-d", "-1"]])
def test_command_refuses_what_makes_no_sense(tiny_model, capsys, arguments):
    assert main(["bench", str(tiny_model), *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1
