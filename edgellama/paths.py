"""Where models are looked for and kept; turns what a user typed for MODEL into a file, or says what to do.

Knows names and folders only; what is inside a file is `edgellama.format`'s.
"""

import difflib
import os
from pathlib import Path

from edgellama.errors import EdgellamaError

SUFFIX = ".edgellama"


def cache_dir() -> Path:
    """The user's folder for files edgellama makes on its own; `EDGELLAMA_HOME` moves it. Not created here."""
    home = os.environ.get("EDGELLAMA_HOME")
    if home:
        return Path(home).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("edgellama", appauthor=False))


def find_model(path: str | os.PathLike[str]) -> Path:
    """`path` as an existing file. Raises EdgellamaError: missing (with close names), a folder, another format."""
    path = Path(path)
    if path.is_dir():
        if (path / "config.json").is_file():
            name = path.resolve().name
            raise EdgellamaError(
                f"{path} is a Hugging Face folder; convert it first: edgellama convert {path} -o {name}{SUFFIX}"
            )
        inside = sorted(entry.name for entry in path.glob(f"*{SUFFIX}"))
        hint = f"; did you mean {path / inside[0]}?" if inside else ""
        raise EdgellamaError(f"{path} is a folder, not an {SUFFIX} file{hint}")
    if path.exists():
        if path.suffix in (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".onnx"):
            raise EdgellamaError(
                f"{path} is a {path.suffix} file; edgellama reads {SUFFIX} files, which `edgellama convert` makes "
                "from a Hugging Face folder or hub id"
            )
        return path
    raise EdgellamaError(f"no such file: {path}{_what_instead(path)}")


def _what_instead(path: Path) -> str:
    close = _close_names(path)
    if close:
        return f"; did you mean {' or '.join(str(each) for each in close)}?"
    parts = path.parts
    if len(parts) == 2 and not path.is_absolute() and parts[0] not in (".", "..") and path.suffix != SUFFIX:
        return f"; a model from the Hugging Face hub is converted first: edgellama convert {path}"
    return f"; `edgellama convert` makes {SUFFIX} files, `edgellama demo` one to try"


def _close_names(path: Path) -> list[Path]:
    """At most two existing model files with a similar name: next to the path, then in the cache folder."""
    found: list[Path] = []
    wanted = path.name.lower().removesuffix(SUFFIX)
    if difflib.SequenceMatcher(None, path.suffix.lower(), SUFFIX).ratio() > 0.7:
        wanted = path.stem.lower()  # the suffix is mistyped
    for folder in dict.fromkeys((path.parent, Path(), cache_dir())):
        try:
            names = {each.name.removesuffix(SUFFIX).lower(): each for each in sorted(folder.glob(f"*{SUFFIX}"))}
        except OSError:
            continue
        found += [names[name] for name in difflib.get_close_matches(wanted, names, n=2, cutoff=0.6)]
    return list(dict.fromkeys(found))[:2]
