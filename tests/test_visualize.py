"""Pictures of attention: the numbers against transformers and brute force, what a terminal gets, what a file holds."""

import io
import itertools
import json
import re

import numpy as np
import pytest

import edgellama
from checkpoints import make_checkpoint
from closeness import ORACLE_TOLERANCE
from conftest import byte_tokenizer
from edgellama.cli import main
from edgellama.errors import EdgellamaError
from edgellama.format import open_model
from edgellama.terminal import cells, fitted
from edgellama.tokenizer import load_tokenizer
from edgellama.visualize import Attention, attention_weights, visualize_attention_mask
from edgellama.visualize.attention import token_labels
from edgellama.visualize.text import render
from edgellama_convert import convert, export_hf


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer({"tokenizer.json": byte_tokenizer().encode()})


def test_a_token_sees_itself_and_what_came_before(tokenizer):
    out = io.StringIO()
    attention = visualize_attention_mask(tokenizer, "Hi there", file=out)
    assert attention.ids == tokenizer.encode("Hi there")
    np.testing.assert_array_equal(attention.mask, np.tri(9, dtype=bool))
    lines = out.getvalue().splitlines()
    assert out.getvalue() == str(attention) + "\n"
    assert lines[:2] == ["attention mask", "rows see columns: ■ seen   · hidden"]
    assert lines[3:6] == ["      0 1 2 3 4 5 6 7 8", "<s> 0 ■ · · · · · · · ·", "H   1 ■ ■ · · · · · · ·"]
    assert lines[-1] == "e   8 ■ ■ ■ ■ ■ ■ ■ ■ ■"
    assert attention.labels == ["<s>", "H", "i", "▁", "t", "h", "e", "r", "e"]
    assert visualize_attention_mask(tokenizer, [5, 6], file=out).ids == [5, 6]


def test_columns_stay_aligned_with_wide_characters():
    labels = ["日本語", "e\u0301a", "👍", "plain"]
    attention = Attention("t", [1, 2, 3, 4], labels, np.tri(4, dtype=bool))
    rows = render(attention).splitlines()[4:]
    assert [cells(row[: row.index("■")]) for row in rows] == [cells(rows[0][: rows[0].index("■")])] * 4
    assert {cells(row) for row in rows} == {6 + 3 + 7}  # a label, " 0 ", squares


def test_fitted_and_cells():
    assert [cells(text) for text in ("", "abc", "日本", "e\u0301", "a\u200db", "👍")] == [0, 3, 4, 1, 2, 2]
    assert fitted("日本語", 5) == "日本…" and fitted("日本語", 4) == "日… " and fitted("ab", 4) == "ab  "


def test_labels_hold_nothing_that_a_terminal_obeys(tokenizer):
    ids = tokenizer.encode("a\x1b[31m\n\t\u202e日", add_special_tokens=False)
    labels = token_labels(tokenizer, [*ids, 99999])
    assert labels[:3] == ["a", "\\x1b", "["]
    assert "\\n" in labels and "\\t" in labels and labels[-1] == "<99999>"
    assert labels[-4:-1] == ["<e6>", "<97>", "<a5>"]
    assert all(label.isprintable() for label in labels)


def test_colours_are_for_terminals_alone(tokenizer, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    terminal, pipe = Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        visualize_attention_mask(tokenizer, "Hello", file=stream)
    assert "\x1b[32m■\x1b[0m" in terminal.getvalue() and "\x1b" not in pipe.getvalue()
    plain = re.sub("\x1b\\[\\d+m", "", terminal.getvalue()).splitlines()
    assert plain[2:] == pipe.getvalue().splitlines()[2:]
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    visualize_attention_mask(tokenizer, "Hello", file=terminal)
    assert terminal.getvalue() == pipe.getvalue()


def test_what_is_wider_than_the_terminal_goes_on_below(tokenizer, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    terminal = Terminal()
    attention = visualize_attention_mask(tokenizer, "The quick brown fox jumps", file=terminal)
    n = len(attention.ids)
    lines = terminal.getvalue().splitlines()
    assert max(map(cells, lines)) <= 40
    rows = [line for line in lines if re.match(r".{3} +\d+ [■·]", line)]
    assert sum(line.count("■") for line in rows) == n * (n + 1) // 2
    assert len(rows) == n + (n - 16) and n == 26


def test_a_stream_that_cannot_show_squares(tokenizer):
    class Latin(io.StringIO):
        encoding = "latin-1"

    out = Latin()
    visualize_attention_mask(tokenizer, "a b", file=out)
    assert out.getvalue().splitlines()[-1] == "b   3 # # # #"
    assert "_   2 # # # ." in out.getvalue()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of three layers and its export."""
    folder = tmp_path_factory.mktemp("visualize")
    make_checkpoint(folder / "m", num_hidden_layers=3, vocab_size=259)
    (folder / "m" / "tokenizer.json").write_text(byte_tokenizer(), encoding="utf-8")
    convert(folder / "m", folder / "m.edgellama", receipt=False)
    return folder / "m.edgellama"


def test_weights_are_a_softmax_over_what_is_seen(model):
    with edgellama.load(model, device="reference") as llm:
        attention = visualize_attention_mask(llm, "Hello", layer=2, head=5, file=io.StringIO())
        mean = visualize_attention_mask(llm, "Hello", layer=2, file=io.StringIO())
        all_heads = attention_weights(llm.file, attention.ids, 2)
    assert all_heads.shape == (6, 6, 6) and all_heads.dtype == np.float32
    np.testing.assert_array_equal(attention.weights, all_heads[5])
    np.testing.assert_array_equal(mean.weights, all_heads.mean(axis=0))
    np.testing.assert_allclose(all_heads.sum(axis=-1), 1, rtol=1e-5)
    assert not all_heads[:, ~np.tri(6, dtype=bool)].any() and (all_heads[:, np.tri(6, dtype=bool)] > 0).all()
    assert attention.title == "m: attention, layer 2, head 5" and "mean of all heads" in mean.title
    # The shades say in which fifth of the range a weight lies.
    rows = [line[6:] for line in render(attention).splitlines()[4:]]
    for i, row in enumerate(rows):
        for j in range(i + 1):
            shade = row.ljust(11)[2 * j]
            low, high = {" ": (0, 0.05), "░": (0.05, 0.2), "▒": (0.2, 0.4), "▓": (0.4, 0.6), "█": (0.6, 1.01)}[shade]
            assert low <= attention.weights[i, j] < high


@pytest.mark.torch
def test_weights_equal_transformers(model, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    export_hf(model, tmp_path / "exported")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", attn_implementation="eager").eval()
    ids = np.arange(30) * 37 % 259
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)[None], output_attentions=True).attentions
    with open_model(model) as file:
        for layer, want in enumerate(expected):
            got = attention_weights(file, ids.tolist(), layer)
            assert np.abs(got - want[0].numpy()).max() < ORACLE_TOLERANCE


@pytest.mark.torch
def test_the_mask_is_transformers(tokenizer):
    """Theirs of a Llama, as its visualizer asks for it."""
    import torch
    from transformers import LlamaConfig
    from transformers.masking_utils import create_causal_mask

    attention = visualize_attention_mask(tokenizer, "Hello this is a test", file=io.StringIO())
    n = len(attention.ids)
    config = LlamaConfig(hidden_size=8, num_attention_heads=1, attn_implementation="eager")
    theirs = create_causal_mask(
        config=config,
        inputs_embeds=torch.zeros(1, n, 8),
        attention_mask=torch.ones(1, n, dtype=torch.long),
        past_key_values=None,
    )
    np.testing.assert_array_equal(attention.mask, theirs[0, 0].numpy() == 0)


def test_wrong_wishes(model, tokenizer, tmp_path):
    for options, message in (
        ({"layer": 3}, "layer 3 is not there: the model has layers 0 to 2"),
        ({"layer": 1, "head": 6}, "head 6 is not there: layer 1 has heads 0 to 5"),
        ({"head": 1}, "head needs a layer"),
        ({"out": tmp_path / "mask.txt"}, "ends with .png, .svg, .pdf"),
    ):
        with pytest.raises(ValueError, match=message):
            visualize_attention_mask(model, "Hi", **options)
    with pytest.raises(ValueError, match="need a model, not its tokenizer alone"):
        visualize_attention_mask(tokenizer, "Hi", layer=0)
    with pytest.raises(ValueError, match="has 2000 tokens; a picture shows 1 to 1024"):
        visualize_attention_mask(tokenizer, [3] * 2000)


def test_pictures(tokenizer, model, tmp_path):
    pytest.importorskip("matplotlib")
    text = "x = $5$ and 日 \\alpha"
    for name, options in (("mask.svg", {}), ("weights.svg", {"layer": 1, "head": 0})):
        visualize_attention_mask(model, text, out=tmp_path / name, **options)
        first = (tmp_path / name).read_bytes()
        visualize_attention_mask(model, text, out=tmp_path / name, **options)
        assert (tmp_path / name).read_bytes() == first  # no date, no chance
    visualize_attention_mask(tokenizer, text, out=tmp_path / "mask.png")
    data = (tmp_path / "mask.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    assert 500 < width < 2000 and 500 < height < 2000
    with pytest.raises(EdgellamaError, match="cannot be written"):
        visualize_attention_mask(tokenizer, text, out=tmp_path / "no" / "mask.png")


def test_no_label_of_a_picture_is_clipped(tokenizer, tmp_path, monkeypatch):
    """Every text lies inside the figure, for a short and a long text, and labels do not overlap."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (figures.append(self), save(self, *args, **kw)))
    for text in ("a", "some words, and a <|very_long_special_token|>", "word " * 45):
        visualize_attention_mask(tokenizer, text, out=tmp_path / "mask.png")
        figure = figures[-1]
        renderer = figure.canvas.get_renderer()
        (axes,) = figure.axes
        texts = [*axes.get_xticklabels(), *axes.get_yticklabels(), axes.xaxis.label, *figure.texts]
        boxes = [label.get_window_extent(renderer) for label in texts if label.get_text()]
        for box in boxes:
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        rows = sorted(label.get_window_extent(renderer).y0 for label in axes.get_yticklabels())
        assert all(b - a >= 6 * figure.dpi / 72 for a, b in itertools.pairwise(rows))


def test_a_character_that_no_font_has_is_spelt_out():
    pytest.importorskip("matplotlib")
    from edgellama.visualize.picture import _fonts, _spelt

    families, known = _fonts({"a", "é", "\U0010fffd"})
    assert families[0] == "DejaVu Sans" and known == {"a", "é"}
    assert _spelt("aé\U0010fffd", known) == "aé\\U0010fffd"


def test_the_verb(model, tmp_path, capsys, monkeypatch):
    assert main(["attention-mask", str(model), "-p", "Hi"]) == 0
    assert "<s> 0 ■ · ·" in capsys.readouterr().out
    assert main(["attention-mask", str(model), "-p", "Hi", "--layer", "1", "--head", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["tokens"], result["layer"], result["head"]) == (["<s>", "H", "i"], 1, 2)
    assert np.allclose(np.sum(result["weights"], axis=1), 1)
    assert main(["attention-mask", str(model), "-p", "Hi", "--layer", "7"]) == 1
    assert "layer 7 is not there" in capsys.readouterr().err
    assert main(["attention-mask", str(model), "-p", "Hi", "--head", "7"]) == 2
    assert main(["attention-mask", str(model), "-p", "Hi", "-o", "mask.gif"]) == 1
    assert "mask.gif: a picture's name ends with .png" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["attention-mask", str(model), "-p", "Hi", "-o", str(tmp_path / "mask.png")]) == 1
    assert "pip install 'edgellama[plot]'" in capsys.readouterr().err
