"""Packaging of enat_jax. Tool settings live in pyproject.toml.

Lower bounds are the oldest versions the test suite has passed with. Upper bounds stop at the next
minor version of libraries that are still at 0.x, where a minor version may break its users.
"""

import setuptools

INSTALL_REQUIRES = [
    "jax>=0.10.2,<0.13",  # 0.10 on Python 3.11, 0.11 and later on 3.12 and 3.13
    "flax>=0.12.8,<0.13",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "tensorflow-datasets>=4.9.10,<5",
    "grain>=0.2.18,<0.3",
    "ml-collections>=1.1,<2",
    "chex>=0.1.92,<0.2",
    "numpy>=2.0,<3",
    "array_record>=0.8",  # Reason: the files of TFDS data sets; grain and TFDS bring it, too.
    "etils[epath]>=1.12",  # Reason: TFDS takes paths of this kind only, and brings it.
    "absl-py>=2.3.1",  # Reason: program flags, and Grain's workers need parsed ones.
    "flatbuffers>=25.2",  # Reason: jax.export serializes with it but does not declare it.
    "importlib_resources>=6.4",  # Reason: TFDS imports it through etils but does not declare it.
    "pillow>=11.0",  # Reason: TFDS and tensorboardX decode and encode images with it, undeclared.
    "safetensors>=0.8",  # Reason: weights in the format that every framework reads.
    "jaxtyping>=0.3.11",  # Reason: annotations of arrays that say their shapes; nothing is checked.
    "scikit-learn>=1.6",  # Reason: nearest neighbours of evaluations; the digits of the quickstart.
    "scipy>=1.14",  # Reason: matrix square roots and statistics; jax installs it in any case.
    "tensorboardX>=2.6.4,<3",  # Reason: writes TensorBoard files without TensorFlow.
    "tqdm>=4.66",  # Reason: the progress bar of the training loop.
]

GCSFS = "gcsfs>=2026.9"  # Reason: etils, and so Orbax, reads and writes gs:// by it.
HUGGINGFACE_HUB = "huggingface_hub>=2.4"  # Reason: load models from there and push them.
MATPLOTLIB = "matplotlib>=3.11"  # Reason: the plots of enat_jax.analyze.
OPTUNA = "optuna>=5.0,<6"  # Reason: the search of enat_jax.search.
# Reason: byte pairs of CLIP's texts, and the repair of texts before. OpenAI's package needs torch.
TEXT = ["tokenizers>=0.22", "ftfy>=6.3"]
NOTEBOOK = ["nbclient>=0.11", "ipykernel>=7.4"]  # Reason: run launch/sampling_colab.ipynb.

EXTRAS_REQUIRE = {
    "cuda": ["jax[cuda12]>=0.10.2,<0.13"],
    "tpu": ["jax[tpu]>=0.10.2,<0.13"],
    "gcs": [GCSFS],
    "torch": ["torch>=2.6"],  # Reason: only to compare with the reference and read odd checkpoints.
    "quickstart": [],  # Reason: its data came with scikit-learn, which is now always installed.
    # Reason: training metrics online, if asked for. The tests use a stand-in: no tested bound.
    "wandb": ["wandb>=0.19"],
    "hub": [HUGGINGFACE_HUB],
    "analyze": [MATPLOTLIB],
    "search": [OPTUNA],
    "text": TEXT,
    "notebook": [*NOTEBOOK, MATPLOTLIB],
    # Reason: the page of enat_jax.demo. Its test needs playwright and Chromium besides, and is
    # skipped without them.
    "demo": ["gradio>=6.31,<7"],
    "dev": [
        "pytest>=9.0",
        "pytest-xdist>=3.8",  # Reason: tests compile most of the time, in one thread each.
        "pre-commit>=4.0",  # Reason: runs ruff before each commit.
        "mypy>=2.4,<3",  # Reason: checks the types; launch/test.sh runs it.
        "ruff>=0.17,<0.18",  # Reason: linter and formatter; a new minor version formats anew.
        GCSFS,
        HUGGINGFACE_HUB,
        MATPLOTLIB,
        OPTUNA,
        *NOTEBOOK,
        *TEXT,
    ],
}

setuptools.setup(
    name="enat_jax",
    version="0.1.0",
    description="ENAT, token-based image synthesis in a few parallel steps, in JAX",
    license="Apache-2.0",
    packages=setuptools.find_packages(include=["enat_jax", "enat_jax.*"]),
    package_data={
        "enat_jax.data": ["imagenet_classes.txt", "clip_merges.txt.gz", "clip_merges.LICENSE"]
    },
    python_requires=">=3.11,<3.14",
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
)
