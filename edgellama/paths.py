"""Where models and the user's own files are looked for and kept; turns what a user typed for MODEL into a file, or
says what to do.

Knows names and folders only; what is inside a file is `edgellama.format`'s.
"""

import difflib
import os
from pathlib import Path

from edgellama.errors import EdgellamaError

SUFFIX = ".edgellama"


def cache_dir() -> Path:
    """The user's folder for what edgellama can make again; `EDGELLAMA_HOME` moves it. Not created here."""
    return _home() or Path(_platform().user_cache_dir("edgellama", appauthor=False))


def data_dir() -> Path:
    """The user's folder for what should stay (chats, models); `EDGELLAMA_HOME` moves it. Not created here."""
    return _home() or Path(_platform().user_data_dir("edgellama", appauthor=False))


def models_dir() -> Path:
    """The user's model folder. Not created here."""
    return data_dir() / "models"


def _home() -> Path | None:
    home = os.environ.get("EDGELLAMA_HOME")
    return Path(home).expanduser() if home else None


def _platform():
    import platformdirs

    return platformdirs


def is_checkpoint(path: Path) -> bool:
    """Whether it is a Hugging Face checkpoint folder, as far as its name tells."""
    return (path / "config.json").is_file()


def find_model(path: str | os.PathLike[str]) -> Path:
    """The file that a user means: an existing path, or a stored model's name or source (`edgellama.store`).

    Raises EdgellamaError: missing (with close names), a folder, another format.
    """
    text, path = os.fspath(path), Path(path)
    if path.exists() and not path.is_dir():
        if path.suffix in (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".onnx"):
            raise EdgellamaError(
                f"{path} is a {path.suffix} file; edgellama reads {SUFFIX} files, which `edgellama convert` makes "
                "from a Hugging Face folder or hub id"
            )
        return path
    from edgellama import store

    stored = store.find(text)
    if stored is not None:
        return stored
    if path.is_dir():
        if is_checkpoint(path):
            name = path.resolve().name
            raise EdgellamaError(
                f"{path} is a Hugging Face folder; convert it first: edgellama convert {path} -o {name}{SUFFIX}"
            )
        inside = sorted(entry.name for entry in path.glob(f"*{SUFFIX}"))
        hint = f"; did you mean {path / inside[0]}?" if inside else ""
        raise EdgellamaError(f"{path} is a folder, not an {SUFFIX} file{hint}")
    what = "file" if len(path.parts) > 1 or path.suffix == SUFFIX else "file or stored model"
    raise EdgellamaError(f"no such {what}: {text}{_what_instead(text)}")


def _what_instead(text: str) -> str:
    from edgellama import store

    close = list(dict.fromkeys([*map(str, _close_files(Path(text))), *store.close_names(text)]))[:2]
    if close:
        return f"; did you mean {' or '.join(close)}?"
    if store.is_hub_id(text):
        return f"; a model from the Hugging Face hub is converted first: edgellama run {text}"
    return f"; `edgellama convert` makes {SUFFIX} files, `edgellama demo` one to try"


def _close_files(path: Path) -> list[Path]:
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
