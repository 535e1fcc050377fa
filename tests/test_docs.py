"""The pages for users: commands and examples run, messages are those of the code, links and options exist."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tqcompile import demo
from tqcompile.cli import app

ROOT = Path(__file__).parents[1]
PAGES = ("quickstart.md", "choosing.md", "troubleshooting.md", "coverage.md")
SHORT = ["--samples", "4", "--seq-len", "32"]
# Added to the commands of the page, to see them run in seconds: two of 42 layers, short texts.
FAST = {
    "quantize": ["--ignore", r"re:model\.layers\.[1-5]\..*", "--ignore", "mlp", "--steps", "1", "--tune", "0", *SHORT],
    "eval": ["--windows", "2", "--seq-len", "64"],
}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.M | re.S)


def test_the_examples_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (commands,) = blocks("quickstart.md", "bash")
    for line in commands.replace("MODEL_DIR", str(demo.MODEL_DIR)).splitlines():
        name, *arguments = shlex.split(line)[1:]
        result = CliRunner().invoke(app, [name, *arguments, *FAST.get(name, [])])
        assert result.exit_code == 0, (line, result.output, result.exception)
    assert (tmp_path / "report.html").read_text().count("<figure") == 6
    namespace = {"MODEL_DIR": demo.MODEL_DIR}
    printed = io.StringIO()
    examples = [*blocks("quickstart.md", "python"), *blocks("choosing.md", "python")]
    assert len(examples) == 3
    with contextlib.redirect_stdout(printed):
        for example in examples:
            exec(compile(example, "docs", "exec"), namespace)
    assert "4 layers quantized" in printed.getvalue()
    assert (tmp_path / "from_python" / "tokenizer.json").is_file()
    assert len(namespace["worst"]) == 2


def sources() -> str:
    """All of the package's text, its string literals joined where they run over several lines."""
    folders = ("tqcompile", "passes", "kernels", "exporters")
    text = "\n".join(file.read_text() for folder in folders for file in sorted((ROOT / folder).rglob("*.py")))
    return re.sub(r'"\s*\n\s*f?"', "", text)


def messages() -> list[str]:
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M)
    return [part for row in rows for part in re.findall(r"`([^`]*)`", row)]


@pytest.fixture(scope="module")
def code():
    return sources()


@pytest.mark.parametrize("message", messages())
def test_every_message_is_one_of_the_code(message, code):
    assert message in code


def test_there_are_messages():
    assert len(messages()) > 20


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / "docs" / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert (ROOT / "docs" / target).exists(), target


def test_every_option_in_the_pages_exists():
    text = "".join((ROOT / "docs" / page).read_text() for page in PAGES)
    known = "".join(CliRunner().invoke(app, [c, "--help"], env={"COLUMNS": "200"}).output for c in FAST | {"report": 0})
    for option in set(re.findall(r"`(--[a-z-]+)", text)):
        assert option in known, option
