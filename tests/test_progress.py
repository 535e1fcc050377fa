"""The progress bar writes to stderr, or nothing at all."""

from tqcompile.progress import Progress


def test_silent_when_not_shown(capsys):
    with Progress(False, "title", 2) as bar:
        bar.advance("a", 0.5)
        bar.advance("b")
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_shown_on_stderr(capsys):
    with Progress(True, "tqcompile twin-w4a8", 2) as bar:
        bar.advance("model.layers.0.q_proj", 0.01234)
        bar.advance("last one")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "tqcompile twin-w4a8" in captured.err
    assert "2/2" in captured.err
    assert "last one" in captured.err
