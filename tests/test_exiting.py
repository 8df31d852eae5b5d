"""What threads do while the process ends, seen from outside."""

import os
import subprocess
import sys
import textwrap
import time

import pytest

from edgellama.generate.exiting import computing

LIMIT_S = 60  # generous: who hits it hangs

START = """
    import os, sys, threading, time
    from edgellama.generate import CancelToken
    from edgellama.generate.exiting import computing
    begun = threading.Event()

    def say(text):
        os.write(1, text.encode() + b"\\n")
"""


def run(program: str) -> subprocess.CompletedProcess:
    source = textwrap.dedent(START) + textwrap.dedent(program)
    return subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=LIMIT_S, check=False)


def test_a_thread_that_computes_is_cancelled_and_does_not_come_back():
    done = run("""
        def work(cancel):
            try:
                with computing(cancel):
                    begun.set()
                    while not cancel.cancelled:
                        time.sleep(0.001)
                    say("cancelled")
            finally:
                say("never said")

        threading.Thread(target=work, args=(CancelToken(),), daemon=True).start()
        begun.wait()
    """)
    assert (done.returncode, done.stdout, done.stderr) == (0, "cancelled\n", "")


def test_a_thread_that_comes_too_late_does_not_begin():
    done = run("""
        import atexit

        def work():
            begun.wait()
            say("at the door")
            with computing(None):
                say("never said")

        threading.Thread(target=work, daemon=True).start()
        atexit._run_exitfuncs()  # the process ends, slowly
        begun.set()
        time.sleep(0.2)
    """)
    assert (done.returncode, done.stdout, done.stderr) == (0, "at the door\n", "")


def test_what_cannot_be_cancelled_does_not_hold_the_process():
    begun = time.monotonic()
    done = run("""
        def work():
            with computing(None):
                begun.set()
                threading.Event().wait()

        threading.Thread(target=work, daemon=True).start()
        begun.wait()
    """)
    assert done.returncode == 0 and time.monotonic() - begun > 2.0  # it was waited for, not for ever


def test_the_thread_that_ends_the_process_may_still_compute():
    done = run("""
        import atexit

        def last():
            with computing(None):
                say("goodbye")

        atexit.register(last)
        atexit._run_exitfuncs()  # `last`, then ours
        last()
    """)
    assert (done.returncode, done.stdout, done.stderr) == (0, "goodbye\ngoodbye\n", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_forked_child_waits_for_nobody():
    done = run("""
        def work(cancel):
            with computing(cancel):
                begun.set()
                while not cancel.cancelled:
                    time.sleep(0.001)

        threading.Thread(target=work, args=(CancelToken(),), daemon=True).start()
        begun.wait()
        if os.fork() == 0:
            import atexit

            at = time.monotonic()
            atexit._run_exitfuncs()
            say(str(time.monotonic() - at < 1.0))
            os._exit(0)
        os.wait()
    """)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_errors_pass_through():
    with pytest.raises(ZeroDivisionError), computing(None):
        _ = 1 / 0
