"""What a user installs: the wheel's contents and entry points, and what importing the package brings with it."""

import configparser
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


def run_python(code: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run ``code`` in a fresh interpreter whose sys.path starts with ``cwd``."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    # In a folder of its own, so that the build neither finds nor leaves anything in the checkout.
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for path in ("pyproject.toml", "README.md", "LICENSE", "vllm_babai", "offline", "triton_kernels"):
        (source / path).symlink_to(ROOT / path)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(output), str(source)]
    result = subprocess.run(build, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = output.glob("*.whl")
    return zipfile.ZipFile(path)


def test_only_top_level_is_vllm_babai(wheel: zipfile.ZipFile):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"vllm_babai"}


def test_wheel_has_every_module_and_data_file(wheel: zipfile.ZipFile):
    folders = {
        "vllm_babai": "vllm_babai",
        "offline": "vllm_babai/offline",
        "triton_kernels": "vllm_babai/triton_kernels",
    }
    expected = {
        f"{target}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder, target in folders.items()
        for file in (ROOT / folder).rglob("*")
        if file.suffix in {".py", ".json", ".typed"}
    }
    assert "vllm_babai/py.typed" in expected
    assert expected <= set(wheel.namelist())


def test_entry_points(wheel: zipfile.ZipFile):
    (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    entry_points = configparser.ConfigParser()
    entry_points.read_string(wheel.read(name).decode())
    assert dict(entry_points["vllm.general_plugins"]) == {"babai": "vllm_babai:register"}
    assert dict(entry_points["console_scripts"]) == {"babai": "vllm_babai.offline.cli:main"}


def test_repository_root_does_not_offer_a_top_level_triton_kernels():
    result = run_python("import triton_kernels", ROOT)
    assert result.returncode != 0
    assert "ImportError: import vllm_babai.triton_kernels" in result.stderr


@pytest.mark.parametrize("module", ["vllm_babai", "vllm_babai.format"])
def test_import_is_light(module: str, tmp_path: Path):
    code = f"""
import sys, {module}
print(*({{"vllm", "triton"}} & set(sys.modules)))
torch = sys.modules.get("torch")
print(torch is not None and torch.cuda.is_initialized())
"""
    result = run_python(code, tmp_path)
    assert result.stdout.splitlines() == ["", "False"], result.stdout + result.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "deploy" / "kubernetes").glob("*.yaml")), ids=lambda path: path.name)
def test_kubernetes_manifests_name_their_kind(path: Path):
    for manifest in yaml.safe_load_all(path.read_text()):
        assert {"apiVersion", "kind", "metadata", "spec"} <= manifest.keys()
