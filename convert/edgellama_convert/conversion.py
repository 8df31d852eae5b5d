"""Converts a checkpoint: finds it, plans it, streams every tensor through the quantizer into the writer.

This module puts the parts together and holds no arithmetic: `source` finds files, `files` and `checkpoint` read them,
`names` maps them, `tensors` has made what is stored of them, `edgellama.format` owns the result's bytes and writes
atomically.

Same input and options give the same bytes: nothing of the time, the machine or the user's folders goes into the file.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from edgellama import __version__
from edgellama.backends.cpu.threads import default_threads
from edgellama.config import LlamaConfig
from edgellama.errors import ConvertError
from edgellama.format import ModelWriter, has_tokenizer, model_tensors, unit_names
from edgellama.format.schema import LM_HEAD_BITS
from edgellama.format.writer import check_replaceable
from edgellama.sizing import layer_weights

from . import gptq, sensitivity
from .budget import Budget, linear_bits, unit_matrices
from .calibration import BUILTIN, SELF, SEQUENCE_TOKENS, SMALL_MODEL, Calibration, CalibrationText
from .checkpoint import Checkpoint
from .files import check_tokenizer, read_config, read_files, with_config
from .gptq import CalibratedLayers, WorkFolder, work_folder_of
from .names import plan_tensors
from .quantizers import METHODS, quantize
from .receipt import Receipt, make_receipt
from .report import ConvertReport
from .resources import check_calibration_memory
from .self_text import sample
from .siblings import as_llama_files, model_type_of, open_checkpoint
from .source import Source, resolve
from .surgery import Model, operate
from .tensors import Tensors
from .weights import CheckpointWeights, StoredWeights

SUFFIX = ".edgellama"
GPTQ, AUTO = "gptq", "auto"
_OWN_TEXT = "own-text.npz"


@contextmanager
def _explained() -> Iterator[None]:
    """An OSError about the source's files becomes one line; the writer explains its own."""
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise ConvertError(f"{where}{error.strerror or error}") from None


@_explained()
def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    method: str = AUTO,
    bpw: float | None = None,
    lm_head_bits: int = 8,
    calibration: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    calibration_tokens: int | None = None,
    device: str = AUTO,
    max_ram: int | None = None,
    revision: str | None = None,
    token: str | None = None,
    offline: bool = False,
    n_threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    receipt: bool = True,
    receipt_progress: Callable[[int, int], None] | None = None,
    add_pad_token: str | None = None,
    num_key_value_heads: int | None = None,
) -> ConvertReport:
    """Convert a hub id or a local folder into one `.edgellama` file, by default `./<name of the source>.edgellama`.

    method: "rtn", "search" or "gptq", which is calibrated with about `calibration_tokens` tokens of text: "builtin"
    (None), "self" (the model's own), a text file or a folder of such, or several of these. It works in a hidden folder
    beside `out`, and goes on there if it was killed. "auto" is "gptq" where calibration is asked for, and for models of
    up to `SMALL_MODEL` weights with a tokenizer, which lose most and are done in minutes; "search" for others.
    bpw: bits per weight that the layers' matrices may take, scales and padding counted: those that gain most by it,
    which is measured with text, get 8 bits instead of 4. device: where gptq computes: "cpu", "cuda", "torch-cpu", or
    "auto", which is "cuda" where a GPU works and has the memory, else "cpu". Other devices, and other machines, give
    other bytes, which are as good. lm_head_bits: 4, 8 or 16, of a tied embedding too. max_ram: bytes that the process
    may hold (RSS without pages of mapped files). progress(done, total) counts weights. receipt: measure the result
    against the source and keep the figures in the file; receipt_progress(done, total) tells how far that is.
    add_pad_token: a token with rows of zeros. num_key_value_heads: average neighbouring heads of keys and values to so
    many. Raises ConvertError, ConfigError, DeviceError or TokenizerError; the destination is then what it was before,
    or absent.
    """
    started = time.perf_counter()
    n_threads = _check_options(method, device, bpw, lm_head_bits, max_ram, n_threads)
    if method == AUTO and (calibration is not None or calibration_tokens is not None):
        method = GPTQ
    text = None
    if method in (GPTQ, AUTO):
        calibration = BUILTIN if calibration is None else calibration
        names = [calibration] if isinstance(calibration, str | os.PathLike) else calibration
        text = CalibrationText(names, calibration_tokens)
    origin = resolve(source, revision=revision, token=token, offline=offline)
    destination = _destination(origin.name, out)
    check_destination(destination)
    source_raw, source_config = read_config(origin.folder)
    source_files = read_files(origin.folder)
    model = operate(
        Model(source_raw, source_config, as_llama_files(source_files, model_type_of(origin.folder))),
        add_pad_token=add_pad_token,
        num_key_value_heads=num_key_value_heads,
    )
    raw_config, config, files = model.raw, model.config, dict(model.files)
    warnings = [*model.changes, *check_tokenizer(files, config)]
    if method == AUTO:
        method = GPTQ if has_tokenizer(files) and layer_weights(config) <= SMALL_MODEL else "search"
    budget = None if bpw is None else Budget(config, bpw)
    if method == GPTQ:
        device, notes = gptq.choose_device(device, config, SEQUENCE_TOKENS)
        warnings += notes
    else:
        if budget is not None and not has_tokenizer(files):
            raise ConvertError(
                f"bpw needs text to measure with, and the source has no tokenizer to read it: "
                f"use --method {GPTQ} --calibration {SELF}, text that the model writes itself"
            )
        text = None if budget is None else CalibrationText([BUILTIN], sensitivity.MEASURED_TOKENS)
        if device not in (AUTO, "cpu"):
            warnings.append(f"device {device!r} is for calibrating (--method gptq); method {method} runs on the CPU")
    plain_method = "search" if method == GPTQ else method  # of what is not calibrated
    for bits in {4, lm_head_bits} - {16}:
        quantize(np.zeros((1, 1), np.float32), bits, plain_method)  # compiles, before memory is measured, time counted

    with ExitStack() as stack:
        checkpoint = stack.enter_context(open_checkpoint(origin.folder, source_config, model.steps))
        specs = model_tensors(config, lm_head_bits)
        plan = plan_tensors(config, specs, checkpoint.tensors)
        work = Tensors(checkpoint, specs, plan, plain_method, max_ram, n_threads, files, progress)
        if budget is not None:
            work.also += layer_weights(config)
        stack.enter_context(work.pipeline)
        extra: dict[str, Any] = {}
        work_started = time.perf_counter()
        work.compare_tied()
        raw_files = with_config(origin.folder, source_files)
        units: list[str] = []
        if text is not None:
            if method == GPTQ:
                gptq.check_memory(device, config, SEQUENCE_TOKENS, max_ram)
            if budget is not None:
                check_calibration_memory(max_ram, sensitivity.memory_needed(config, SEQUENCE_TOKENS, method))
            state = _work_state(checkpoint, raw_files, text, method, bpw, lm_head_bits, model.changes)
            if method == GPTQ:
                state["arithmetic"] = gptq.identity_of(device, n_threads)
            folder = stack.enter_context(WorkFolder(destination, state))
            used = _calibration_ids(text, folder, origin.folder, config, files, max_ram, n_threads)
        if budget is not None:
            extra["bpw"] = budget.bpw
            units = work.choose_units(budget, config, method, used.ids, folder)
            specs = model_tensors(config, lm_head_bits, units)
        if method == GPTQ:
            extra["calibration"] = used.summary()
            gptq.check_disk(folder, config, used.ids.size, specs)
            layers = CalibratedLayers(
                checkpoint,
                config,
                used.ids,
                folder,
                embedding_bits=lm_head_bits if config.tie_word_embeddings else 16,
                int8_units=units,
                n_threads=n_threads,
                on_weights=work.on_weights,
                device=device,
            )
            work.calibrate(layers)
        # Where the checkpoint once lay on someone's disk is nobody's business.
        stored_config = {key: value for key, value in raw_config.items() if key != "_name_or_path"}
        with ModelWriter(
            destination, stored_config, lm_head_bits=lm_head_bits, method=method, int8_units=units, **extra
        ) as writer:
            for spec in specs:
                writer.write(spec.name, work.data(spec))
            work_seconds = time.perf_counter() - work_started
            measured = Receipt(None)
            if receipt and not config.is_classifier:  # it is measured by the next tokens, and a classifier gives none
                measured = make_receipt(
                    CheckpointWeights(config, checkpoint, plan),
                    StoredWeights.of_writer(writer),
                    files,
                    {
                        "method": method,
                        "calibration": extra.get("calibration"),
                        **({} if bpw is None else {"bpw": bpw}),
                        "source": origin.name,
                        "commit": origin.commit,
                    },
                    n_threads,
                    max_ram=max_ram,
                    progress=receipt_progress,
                )
                warnings += measured.warnings
            provenance = _provenance(origin, checkpoint, raw_files)
            if model.changes:
                provenance["changes"] = list(model.changes)
            writer.finish(files, provenance, measured.stored)
        if text is not None:
            folder.remove()
        seconds = time.perf_counter() - started
        file_bytes = destination.stat().st_size
        errors = {name: error.relative_rms for name, error in work.pipeline.errors.items()}
        return ConvertReport(
            out=destination,
            source=origin.name,
            commit=origin.commit,
            method=method,
            bpw=bpw,
            device=device if method == GPTQ else None,
            lm_head_bits=lm_head_bits,
            int8_matrices=sum(len(unit_matrices(unit)) for unit in units),
            layer_matrices=sum(len(unit_matrices(unit)) for unit in unit_names(config)),
            source_bytes=checkpoint.nbytes,
            file_bytes=file_bytes,
            weights=work.total,
            linear_bits_per_weight=linear_bits(specs),
            bits_per_weight=8 * file_bytes / work.total,
            worst_tensor=max(errors.items(), key=lambda item: item[1]),
            errors=errors,
            ignored=plan.ignored,
            ignored_config_keys=dict(config.ignored),
            seconds=seconds,
            n_threads=n_threads,
            weights_per_second=work.total / work_seconds,
            receipt_seconds=time.perf_counter() - work_started - work_seconds,
            quality=(measured.stored or {}).get("quality"),
            peak_rss=max((peak for peak in (work.peak_rss, measured.peak_rss) if peak is not None), default=None),
            files=tuple(files),
            warnings=tuple(warnings),
        )


def is_begun(source: str | os.PathLike[str], out: str | os.PathLike[str] | None) -> bool:
    """Whether calibrated work for this conversion waits to be finished."""
    path = Path(source).expanduser()
    return work_folder_of(_destination(path.resolve().name if path.is_dir() else str(source), out)).is_dir()


def _destination(name: str, out: str | os.PathLike[str] | None) -> Path:
    """`out`, or by default a file here that is named after the source: the last part of a hub id."""
    return Path(f"{name.rsplit('/', 1)[-1]}{SUFFIX}" if out is None else out)


def _check_options(
    method: str, device: str, bpw: float | None, lm_head_bits: int, max_ram: int | None, n_threads: int | None
) -> int:
    """The number of threads, all options being valid."""
    if method not in (*METHODS, GPTQ, AUTO):
        raise ConvertError(f"method {method!r} is unknown: it is one of {', '.join((AUTO, GPTQ, *METHODS))}")
    gptq.check_name(device)
    if bpw is not None and not 0 < bpw < 16:  # false for NaN; `Budget` knows what the model can do
        raise ConvertError(f"bpw {bpw:g} is not possible: the layers' matrices have 4 or 8 bits, so give 4.5 to 8, say")
    if lm_head_bits not in LM_HEAD_BITS:
        raise ConvertError(f"lm_head_bits {lm_head_bits!r} is not possible: it is one of 4, 8, 16")
    if max_ram is not None and max_ram <= 0:
        raise ConvertError(f"max_ram {max_ram} must be a positive number of bytes")
    if n_threads is None:
        return default_threads()
    if not 1 <= n_threads <= 1024:
        raise ConvertError(f"n_threads {n_threads} must be from 1 to 1024")
    return n_threads


def check_destination(path: Path) -> None:
    """Refuse a destination before the work, not after it; the writer checks again, and the free space too."""
    if path.is_dir():
        raise ConvertError(f"{path} is a folder; name a file in it: -o {path / f'model{SUFFIX}'}")
    if not path.parent.is_dir():
        raise ConvertError(f"the folder {path.parent} does not exist; create it first")
    check_replaceable(path)


def _work_state(
    checkpoint: Checkpoint,
    raw_files: Mapping[str, bytes],
    text: CalibrationText,
    method: str,
    bpw: float | None,
    lm_head_bits: int,
    changes: Sequence[str],
) -> dict[str, Any]:
    """What unfinished work depends on: with any of this different, it is begun anew."""
    return {
        "converter": __version__,
        "weights": {name: file.identity() for name, file in checkpoint.files.items()},
        "files": {name: xxhash.xxh3_128_hexdigest(data) for name, data in raw_files.items()},
        "calibration": text.state(),
        "method": method,
        "bpw": bpw,
        "lm_head_bits": lm_head_bits,
        "changes": list(changes),
    }


def _calibration_ids(
    text: CalibrationText,
    folder: WorkFolder,
    source: Path,
    config: LlamaConfig,
    files: Mapping[str, bytes],
    max_ram: int | None,
    n_threads: int,
) -> Calibration:
    """The token ids, or those that were chosen before the conversion was killed."""
    tokenizer = None
    if has_tokenizer(files):
        from edgellama.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(files, config)
    elif text.needs_tokenizer:
        raise ConvertError(f"the source has no tokenizer to read calibration text with: use --calibration {SELF}")

    def own_text(sequences: int, length: int) -> np.ndarray:
        if config.is_classifier:
            raise ConvertError("a classifier writes no text of its own: use --calibration builtin, or a text file")
        if not folder.is_whole(_OWN_TEXT, ["ids"]):
            draft = folder.path / f"draft{SUFFIX}"
            convert(source, draft, method="search", max_ram=max_ram, n_threads=n_threads, receipt=False)
            bos = config.bos_token_id if tokenizer is None else tokenizer.bos_id
            bos = bos if bos is not None and 0 <= bos < config.vocab_size else None
            folder.save_arrays(_OWN_TEXT, {"ids": sample(draft, sequences, length, bos, n_threads)})
            draft.unlink()
        return folder.load_array(_OWN_TEXT, "ids")

    return text.ids(config, tokenizer, own_text)


def _provenance(origin: Source, checkpoint: Checkpoint, raw_files: Mapping[str, bytes]) -> dict[str, Any]:
    """Where the weights come from. No times, no paths: the same source gives the same bytes."""
    sources = {
        name: {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)} for name, data in raw_files.items()
    }
    for name, file in checkpoint.files.items():
        sources[name] = {"bytes": file.size, "xxh3_128_by_tensor": file.digest()}
    return {
        "source": origin.name,
        "commit": origin.commit,
        "files": sources,
        "converter": f"edgellama {__version__}",
    }
