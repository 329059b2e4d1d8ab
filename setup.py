"""Packaging: `pip install .` for the core, `pip install .[dev]` for everything the tests use."""

import re
import runpy
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
RELEASES = runpy.run_path(str(ROOT / "megatron_capgap/runtime/releases.py"))

CORE = [
    "torch>=2.6",
    *RELEASES["REQUIREMENTS"],
    "numpy",
    "psutil",  # Megatron's checkpoint writer imports it
    "jinja2",  # chat templates
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
FP8 = ["transformer-engine[pytorch]"]  # needs an NVIDIA GPU
QUICKSTART = [*HF]
SMOLLM2 = [*HF, "gguf"]
DEV = [*EVAL, *PLOT, "gguf", "glassllm", "pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "ruff"]

setup(
    name="megatron_capgap",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "megatron_capgap/__init__.py").read_text())[1],
    description="Distil small language models out of large ones at cluster scale, with the teacher that the law "
    "of capacity gap chooses.",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    python_requires=RELEASES["bounds"](RELEASES["PYTHON"]),
    packages=find_packages(include=["megatron_capgap", "megatron_capgap.*"]),
    install_requires=CORE,
    extras_require={
        "hf": HF,
        "plot": PLOT,
        "eval": EVAL,
        "fp8": FP8,
        "quickstart": QUICKSTART,
        "smollm2": SMOLLM2,
        "dev": DEV,
    },
    entry_points={"console_scripts": ["capgap=megatron_capgap.cli:main"]},
)
