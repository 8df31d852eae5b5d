"""Many Python threads, two models, forks and exits: no abort, no deadlock, right results."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

pytest.importorskip("numba")
import edgellama

LIMIT_S = 120  # generous: a test that hits it has found a deadlock


def test_sixteen_threads_call_two_models_at_once(tiny_model):
    prompts = [[1, 3 + i, 7 * i % 250] for i in range(16)]
    with edgellama.load(tiny_model, n_threads=2) as one, edgellama.load(tiny_model, n_threads=3) as two:
        expected = [one.generate(prompt, max_new_tokens=8, temperature=0).token_ids for prompt in prompts]
        got: dict[int, list] = {i: [] for i in range(16)}

        def work(i: int) -> None:
            for llm in (one, two, one) if i % 2 else (two, one, two):
                got[i].append(llm.generate(prompts[i], max_new_tokens=8, temperature=0).token_ids)

        threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT_S)
            assert not thread.is_alive(), "deadlock"
    assert got == {i: [expected[i]] * 3 for i in range(16)}


def run(program: str, model, *, interrupt: bool = False) -> subprocess.CompletedProcess:
    """Run a program with `llm` loaded in a process of its own; with `interrupt`, Ctrl-C once it prints "running"."""
    source = f"import edgellama, os, sys, threading\nllm = edgellama.load({str(model)!r}, n_threads=2)\n"
    command = [sys.executable, "-c", source + textwrap.dedent(program)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        if interrupt:
            assert process.stdout is not None and process.stdout.readline() == "running\n"
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


FOREVER = """
    def forever():
        while True:
            llm.generate([1, 5, 9], max_new_tokens=100, temperature=0)
    llm.generate([1], max_new_tokens=1)
"""


def test_a_process_may_exit_in_the_middle_of_generating(tiny_model):
    program = textwrap.dedent(FOREVER) + textwrap.dedent("""
        import time
        threading.Thread(target=forever, daemon=True).start()
        time.sleep(0.2)
        print("done", flush=True)
    """)
    done = run(program, tiny_model)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_ends_a_program_that_generates(tiny_model):
    done = run(textwrap.dedent(FOREVER) + 'print("running", flush=True)\nforever()\n', tiny_model, interrupt=True)
    assert done.returncode in (-signal.SIGINT, 130, 1) and "KeyboardInterrupt" in done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_fork_after_use_works_in_parent_and_child(tiny_model):
    program = """
        first = llm.generate([1, 5, 9], max_new_tokens=10, temperature=0).token_ids
        pid = os.fork()
        again = llm.generate([1, 5, 9], max_new_tokens=10, temperature=0).token_ids
        if pid == 0:
            os._exit(0 if again == first else 1)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(again == first, code)
    """
    done = run(program, tiny_model)
    assert done.stdout == "True 0\n", done.stderr


def test_closing_ends_the_threads(tiny_model):
    before = set(threading.enumerate())
    llm = edgellama.load(tiny_model, n_threads=4)
    llm.forward([1, 2])
    assert len(set(threading.enumerate()) - before) == 3
    llm.close()
    deadline = time.monotonic() + LIMIT_S
    while set(threading.enumerate()) - before:
        assert time.monotonic() < deadline, "threads are left"
        time.sleep(0.01)
