"""A batch on the terminal: borders, colours, what has no loss; lengths of documents counted by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from moetrain.report import batch, figures


def view(counted=None):
    # E = 0; documents of lengths 2 (with its end), 3, 1 and 2; then 6
    tokens = np.array([[7, 0, 8, 9, 0, 0], [1, 2, 3, 4, 5, 6]])
    return SimpleNamespace(
        step=2, steps=9, fingerprint="f" * 64, names=("a", "[b]"), tokens=tokens, counted=counted,
        samples=np.array([4, 5]), source=np.array([0, 1]), epoch=np.array([0, 3]), end_of_text=0,
    )  # fmt: skip


def decode(ids):
    return "".join(f"<{each}>" for each in ids)


def test_documents_end_where_the_token_stands(capsys):
    batch.show(view(), decode=decode, samples=0)
    out = capsys.readouterr().out
    assert "step 2 of 9: samples 4 to 5, 2 sequences of 5 tokens, sha256 ffffffffffffffff" in out
    assert "sample 4  a, epoch 0, 3 documents, 3 to the end\n<7>▮<8><9>▮▮\n" in out
    assert "sample 5  [b], epoch 3, 1 document, 0 to the end\n<1><2><3><4><5><6>\n" in out


def test_what_has_no_loss_is_dim():
    counted = np.array([[True] * 6, [False, False, True, True, False, True]])
    text = batch._text(view(counted), 1, decode=decode)
    styles = [(text.plain[span.start : span.end], str(span.style)) for span in text.spans]
    assert styles == [("<1><2>", "dim yellow"), ("<3><4>", "yellow"), ("<5>", "dim yellow"), ("<6>", "yellow")]


def test_the_picture_counts_every_document(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(batch, "document_lengths", lambda lengths, path, *, title: drawn.update(lengths))
    batch.draw_lengths(view(), tmp_path / "x.png")
    assert drawn == {"a": [2, 3, 1], "[b]": [6]}


def test_bars_hold_all_documents(monkeypatch):
    kept = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: kept.append(figure))
    figures.document_lengths({"a": [1, 1, 2, 7], "b": [300]}, None, title="x")
    (axes,) = kept[0].axes
    assert [sum(bar.get_height() for bar in group) for group in axes.containers] == [4, 1]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a (4)", "b (1)"]
