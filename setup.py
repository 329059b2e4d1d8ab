"""Packaging: `pip install .` for the core, `pip install .[dev]` for everything the tests use."""

import re
import runpy
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
RELEASES = runpy.run_path(str(ROOT / "megatron_capgap/runtime/releases.py"))
(_, LOW), (_, BELOW) = RELEASES["PYTHON"]

CORE = [
    "torch>=2.6",
    *RELEASES["REQUIREMENTS"],
    "numpy",
    "psutil",  # Megatron's checkpoint writer imports it
    "jinja2",  # chat templates
    "filelock",  # tools/make_sweep.py; torch requires it too
    "einops",  # Megatron's process grids import it
    "pydantic>=2.11",
    "pyyaml",
    "rich",
    "safetensors",
    "sentencepiece",
    "tensorboard",
    "tokenizers",
]
HF = ["transformers>=4.56"]
PLOT = ["scipy", "matplotlib", "markdown"]
# 0.4.12 is the first whose tasks are loaded where a broken one is told of; accelerate: for the harness's own backend.
EVAL = [*HF, "lm-eval>=0.4.12", "accelerate"]
DATA = ["pyarrow", "zstandard", "datasets"]  # other files than JSON lines
TRACK = ["wandb", "mlflow"]
FP8 = ["transformer-engine[pytorch]"]  # needs an NVIDIA GPU
QUICKSTART = [*HF]
SMOLLM2 = [*HF, "gguf"]
DOCS = ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.26"]
LINT = ["ruff", "codespell", "mypy", "types-PyYAML"]
PACKAGING = ["build", "setuptools>=70.1"]  # the wheel is built without isolation; 70.1 needs no wheel package
# The loss's kernels run in its interpreter. No bound: PyTorch for CUDA requires one release.
TRITON = "triton; sys_platform == 'linux'"
TESTS = [TRITON, "gguf", "glassllm", "pytest", "pytest-timeout", "pytest-xdist", "hypothesis"]
DEV = [*DATA, *EVAL, *PLOT, *DOCS, *LINT, *PACKAGING, *TESTS]

setup(
    name="megatron_capgap",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "megatron_capgap/__init__.py").read_text())[1],
    description="Knowledge distillation of language models at cluster scale, on stock Megatron-Core.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    author="The megatron_capgap contributors",
    project_urls={"Paper": "https://arxiv.org/abs/2311.07052"},
    keywords="knowledge distillation, language models, Megatron-Core, pruning, FP8, scaling laws",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(LOW, BELOW)),
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=RELEASES["bounds"](RELEASES["PYTHON"]),
    packages=find_packages(include=["megatron_capgap", "megatron_capgap.*"]),
    package_data={"megatron_capgap": ["py.typed"]},
    install_requires=CORE,
    extras_require={
        "hf": HF,
        "plot": PLOT,
        "data": DATA,
        "eval": EVAL,
        "fp8": FP8,
        "track": TRACK,
        "quickstart": QUICKSTART,
        "smollm2": SMOLLM2,
        "docs": DOCS,
        "dev": DEV,
    },
    entry_points={"console_scripts": ["capgap=megatron_capgap.cli:main"]},
)
