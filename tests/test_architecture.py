"""How the repository hangs together: packaging, the direction of imports, and what every op and file must have."""

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("tqcompile", "passes", "kernels", "exporters")
FILES = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))
# A module may import modules of its own layer and of those below it (at module level).
LAYERS = (
    ("errors", "config", "cuda_graph", "distributed"),
    ("methods", "ops", "data", "progress", "evaluate"),
    ("passes", "kernels", "recipes"),
    (
        "calibration",
        "modules",
        "reporting",
        "checkpoint",
        "checkpoint_files",
        "output_head",
        "block_tuning",
        "streaming",
        "divergence",
    ),
    ("quantize_unit", "allocation"),
    ("finished_blocks",),
    ("api", "backend", "hf", "exporters"),
    ("demo", "tuner", "commands", "cli", "__main__"),
)


def part_of(module: str) -> str:
    """``tqcompile.methods.twin`` -> ``methods``."""
    return module.split(".")[1]


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "tqcompile" else ("tqcompile", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path, module_level_only: bool):
    """(imported module, line) of a file; ``from a import b`` counts as ``a`` and as ``a.b``."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    pending = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield ("." * node.level + (node.module or ""), node.lineno)
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
        if not (module_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
            pending.extend(ast.iter_child_nodes(node))


def rank(part: str) -> int | None:
    return next((index for index, layer in enumerate(LAYERS) if part in layer), None)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_one_way(file):
    module = module_of(file)
    if module == "tqcompile":
        assert not [name for name, _ in imports(file, True) if name.startswith("tqcompile")]
        return
    own = rank(part_of(module))
    assert own is not None, f"{module} is in no layer: add it to LAYERS"
    for name, line in imports(file, module_level_only=True):
        parts = name.split(".")
        if parts[0] != "tqcompile" or len(parts) < 2:
            continue
        other = rank(parts[1])
        if other is not None:
            assert other <= own, f"{file}:{line}: {module} may not import {name}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_what_no_file_does(file):
    relative = file.relative_to(ROOT)
    for name, line in imports(file, module_level_only=False):
        where = f"{relative}:{line}"
        assert not name.startswith("."), f"{where}: a relative import"
        assert name.split(".")[0] not in ("pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"), where
        assert name.split(".")[0] not in ("passes", "kernels", "exporters"), f"{where}: import tqcompile.{name}"
    for name, line in imports(file, module_level_only=True):
        if relative.parts[0] != "exporters":
            assert not name.startswith("tqcompile.exporters"), f"{relative}:{line}: exporters are optional"
        heavy = ("onnx", "onnxscript", "onnxruntime") + (() if relative.parts[0] == "kernels" else ("triton",))
        assert name.split(".")[0] not in heavy, f"{relative}:{line}: {name} is optional and must be imported late"
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            assert text not in ("torch.load", "torch.save"), f"{relative}:{node.lineno}: {text} uses pickle"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec", "__import__"), f"{relative}:{node.lineno}: {node.func.id}"


def test_the_rules_above_see_a_violation(tmp_path):
    file = tmp_path / "x.py"
    file.write_text(
        "if 1:\n    from tqcompile.exporters import onnx\n\ndef f():\n    from . import y\n    import pickle\n"
    )
    assert {name for name, _ in imports(file, True)} == {"tqcompile.exporters", "tqcompile.exporters.onnx"}
    assert {"pickle", "."} <= {name for name, _ in imports(file, False)}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_are_short_and_say_what_they_are(file):
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 400
    assert ast.get_docstring(ast.parse(text)), f"{file} has no docstring"


def settings() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_package_of_the_tree_is_packaged():
    setuptools = settings()["tool"]["setuptools"]
    found = set()
    for file in FILES:
        folder = file.parent.relative_to(ROOT)
        found.add(".".join(folder.parts if folder.parts[0] == "tqcompile" else ("tqcompile", *folder.parts)))
    assert sorted(setuptools["packages"]) == sorted(found)
    for package, folder in setuptools["package-dir"].items():
        assert (ROOT / folder).is_dir(), package
    assert {f"tqcompile.{f}" for f in FOLDERS[1:]} <= set(setuptools["package-dir"])


def test_kernels_is_no_package_that_shadows_the_one_transformers_looks_for():
    # From the repository root, `import kernels` must not find ours: transformers looks for the Hub's package.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def run_python(code: str, cwd: Path = ROOT) -> str:
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=300, env=environment()
    )
    assert found.returncode == 0, found.stderr[-2000:]
    return found.stdout


def environment() -> dict:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_transformers_works_from_the_repository_root():
    # The root holds folders named kernels, passes and exporters, and is on sys.path there.
    code = "import transformers; from transformers import Qwen3ForCausalLM, AutoTokenizer; print(transformers.__name__)"
    assert run_python(code).strip() == "transformers"


def test_every_public_name_exists():
    import tqcompile

    for name in tqcompile.__all__:
        assert getattr(tqcompile, name) is not None
    assert set(tqcompile.__all__) <= set(dir(tqcompile))
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        _ = tqcompile.quantise


OPS = [
    file.stem for file in (ROOT / "tqcompile" / "ops").glob("*.py") if "custom_op(" in file.read_text(encoding="utf-8")
]


def test_there_are_ops():
    assert sorted(OPS) == [
        "int8_linear",
        "lattice_linear",
        "prologue",
        "quantize_activation",
        "twin_gemm",
        "twin_linear",
    ]


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_schema_fake_reference_kernel_and_test(op):
    import torch

    from tqcompile import ops

    overload = getattr(torch.ops.tqcompile, op).default
    assert overload._schema.name == f"tqcompile::{op}"
    assert not overload._schema.is_mutable
    for key in ("CPU", "CUDA", "Meta"):
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"tqcompile::{op}", key), key
    reference = getattr(ops, f"{op}_reference")
    assert reference.__doc__
    assert getattr(ops, op) is not reference
    functions = {
        n.name
        for n in ast.parse((ROOT / "kernels" / f"{op}.py").read_text(encoding="utf-8")).body
        if isinstance(n, ast.FunctionDef)
    }
    assert {"launch", "unsupported"} <= functions
    for folder in ("tests", "tests/gpu"):
        tests = [file.read_text(encoding="utf-8") for file in (ROOT / folder).glob("test_*.py")]
        called = [text for text in tests if f"tqcompile.kernels import {op}" in text]
        assert called, f"no test in {folder} calls the kernel of {op}"
