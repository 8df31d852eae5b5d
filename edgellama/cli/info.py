"""`edgellama info`: what a model file is."""

import argparse
from typing import Any

from edgellama.cli import console, options
from edgellama.cli.convert import quality_line
from edgellama.paths import find_model

_DESCRIPTION = "Tell what a model file is: shapes, quantization, source, memory needed."
_EPILOG = """\
example: edgellama info llama-2-7b.edgellama"""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("info", help="tell what a model file is", description=_DESCRIPTION, epilog=_EPILOG)
    options.add_model(parser)
    options.add_json(parser)
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    path = find_model(options.model_of(args))
    from edgellama.format import open_model

    with open_model(path) as file:
        facts = describe(file)
    if args.json:
        console.say_json(facts)
    else:
        console.say(console.table(rows(facts)))
    return 0


def describe(file) -> dict[str, Any]:
    """The facts of an open ModelFile as plain values; sizes in bytes."""
    from edgellama import devices
    from edgellama.memory import available_bytes
    from edgellama.model import choose_n_ctx, kv_bytes_per_token

    config = file.config
    params = sum(_elements(entry.shape) for entry in file.tensors.values() if not entry.name.endswith(".scales"))
    n_ctx, notes = choose_n_ctx(config, None, file.size, available_bytes())
    per_token = kv_bytes_per_token(config)
    return {
        "path": str(file.path),
        "architecture": config.architecture,
        "id2label": {str(i): label for i, label in enumerate(config.id2label)},
        "problem_type": config.problem_type,
        "parameters": params,
        "size_bytes": file.size,
        "bits_per_weight": round(8 * file.size / params, 3),
        "quantization": dict(file.quantization),
        "lm_head_bits": file.lm_head_bits,
        "int8_matrices": sum(
            entry.layout == "int8.g128" and entry.name.startswith("model.layers.") for entry in file.tensors.values()
        ),
        "layer_matrices": 7 * config.num_hidden_layers,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "attention_heads": config.num_attention_heads,
        "key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_type": config.rope.rope_type,
        "rope_theta": config.rope.rope_theta,
        "max_position_embeddings": config.max_position_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_ids": list(config.eos_token_ids),
        "ignored_config_keys": dict(config.ignored),
        "tokenizer": _tokenizer(file.files),
        "chat_template": _has_chat_template(file.files),
        "files": {name: len(data) for name, data in file.files.items()},
        "kv_bytes_per_token": per_token,
        "default_n_ctx": n_ctx,
        "memory_bytes": file.size + n_ctx * per_token,
        "devices": devices.available(),
        "notes": notes,
        "provenance": dict(file.provenance),
        "receipt": file.receipt,
    }


def rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    quantization = facts["quantization"]
    scheme = " ".join(str(quantization[key]) for key in ("scheme", "method") if key in quantization)
    heads = f"{facts['attention_heads']} heads"
    if facts["key_value_heads"] != facts["attention_heads"]:
        heads += f" ({facts['key_value_heads']} for keys and values)"
    output = f"{facts['lm_head_bits']}-bit" + (", shared with the embedding" if facts["tie_word_embeddings"] else "")
    if facts["id2label"]:
        output = "16-bit, a score for each label"
    provenance = facts["provenance"]
    result = [
        ("file", facts["path"]),
        ("model", f"{facts['architecture']}, {console.count(facts['parameters'])} parameters"),
        ("size", f"{console.size(facts['size_bytes'])}, {facts['bits_per_weight']:.2f} bits per weight"),
        ("weights", f"{scheme}{_mixed(facts)}; output layer {output}"),
        (
            "shape",
            f"{facts['layers']} layers, hidden {facts['hidden_size']}, mlp {facts['intermediate_size']}, "
            f"{heads} of {facts['head_dim']}",
        ),
        ("positions", f"{facts['max_position_embeddings']} (rope {facts['rope_type']}, theta {facts['rope_theta']:g})"),
        (
            "tokenizer",
            f"{facts['tokenizer']}, {facts['vocab_size']} tokens; chat template: "
            + ("yes" if facts["chat_template"] else "no"),
        ),
        (
            "memory",
            f"{console.size(facts['memory_bytes'])} with {facts['default_n_ctx']} tokens of context "
            f"({console.size(1024 * facts['kv_bytes_per_token'])} per 1024) for one sequence"
            # The CPU's cache becomes resident as it is written.
            + ("; cuda takes the cache of all n_slots at once" if "cuda" in facts["devices"] else ""),
        ),
    ]
    if facts["id2label"]:
        kind = f"; {facts['problem_type']}" if facts["problem_type"] else ""
        result.append(("labels", f"{len(facts['id2label'])}: {_plain(', '.join(facts['id2label'].values()))}{kind}"))
    result.append(("devices", ", ".join(facts["devices"]) + _cuda_hint(facts["devices"])))
    result += [(key, _plain(value)) for key, value in provenance.items() if value and not isinstance(value, dict)]
    result += _receipt(facts["receipt"] or {})
    result += [("note", note) for note in facts["notes"]]
    return result


def _mixed(facts: dict[str, Any]) -> str:
    eight = facts["int8_matrices"]
    return f", {eight} of {facts['layer_matrices']} matrices in 8 bits" if eight else ""


def _cuda_hint(devices: list[str]) -> str:
    return "" if "cuda" in devices else " (cuda: pip install 'edgellama[cuda]')"


def _receipt(receipt: dict[str, Any]) -> list[tuple[str, str]]:
    """What was measured when the file was made."""
    quality = receipt.get("quality")
    if not isinstance(quality, dict):
        return []
    rows = [
        ("quality", quality_line(quality)),
        ("measured", _plain(f"{quality.get('tokens')} tokens, windows of {quality.get('ctx')}, {quality.get('text')}")),
    ]
    if receipt.get("calibration"):
        rows.append(("calibration", _plain(receipt["calibration"])))
    return rows


def _plain(value: object, limit: int = 68) -> str:
    if isinstance(value, list | tuple):
        value = f"{len(value)} entries" if len(value) > 4 else ", ".join(str(each) for each in value)
    text = " ".join(str(value).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _elements(shape) -> int:
    product = 1
    for length in shape:
        product *= length
    return product


def _tokenizer(files) -> str:
    if "tokenizer.json" in files:
        return "tokenizer.json"
    return "SentencePiece (tokenizer.model)" if "tokenizer.model" in files else "none"


def _has_chat_template(files) -> bool:
    return "chat_template.jinja" in files or b'"chat_template"' in files.get("tokenizer_config.json", b"")
