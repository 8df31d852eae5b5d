"""Open files in this process and report what happened: run as a script by test_format_bad_files.py.

`python format_guard.py FILE...` prints one JSON object a file: error type, field, offset, message, CPU seconds, and how
much the process's peak memory has grown (MB).
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path

from edgellama.errors import FormatError
from edgellama.format import open_model


def peak_mb() -> float:
    """Peak resident memory of this process; 0 where the system does not say (`ru_maxrss` includes the parent)."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0.0
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def reset_peak() -> None:
    """Count the peak from now on, if the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def main(paths: list[str]) -> None:
    for path in paths:
        reset_peak()
        start = peak_mb()
        report: dict[str, object] = {"path": path, "error": None}
        clock = time.process_time()
        try:
            open_model(path).close()
        except FormatError as error:
            report.update(error="FormatError", field=error.field, offset=error.offset, message=str(error))
        except BaseException as error:
            report.update(error=type(error).__name__, message=str(error))
        report["seconds"] = time.process_time() - clock
        report["grown_mb"] = peak_mb() - start
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
