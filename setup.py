"""Installs tpu_lm; `requirements/` holds the locked versions."""

import pathlib
import re

import setuptools

HERE = pathlib.Path(__file__).parent
VERSION = re.search(
  r"__version__ = '([^']+)'", (HERE / 'tpu_lm/__init__.py').read_text()
)[1]

setuptools.setup(
  name='tpu_lm',
  version=VERSION,
  description='Training language models end to end in JAX, TPU-native',
  long_description=(HERE / 'README.md').read_text(),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  python_requires='>=3.11',
  packages=setuptools.find_packages(include=['tpu_lm', 'tpu_lm.*']),
  package_data={
    'tpu_lm.plan': ['*.css'],
    'tpu_lm.report': ['*.css', '*.js'],
  },
  entry_points={'console_scripts': ['tpu_lm = tpu_lm.__main__:run']},
  install_requires=[
    'array-record>=0.8; platform_machine != "aarch64"',  # TFDS's offline rows
    'chex>=0.1.90',  # invariants
    'etils[epath]>=1.13',  # local and cloud paths alike
    'flax>=0.12',  # the network (linen)
    'grain>=0.2.15',  # random-access data sets
    'jax>=0.10',
    'jinja2>=3.1',  # chat templates
    'math-verify>=0.9',  # answers in LaTeX
    'markupsafe>=2.1',  # report.html
    'ml-collections>=1.1',  # configurations
    'numpy>=2.0',
    'optax>=0.2.8',  # optimizers
    'orbax-checkpoint>=0.12',
    'pyarrow>=20',  # Parquet
    'sentencepiece==0.2.2',  # seqio's; 0.2.3 breaks beside Beam's protobuf
    'seqio>=0.0.20',  # tasks and mixtures
    'tensorflow-datasets>=4.9.9',
    'tokenizers>=0.22',
  ],
  extras_require={
    'tpu': ['jax[tpu]>=0.10'],
    'cuda': ['jax[cuda13]>=0.10'],
    'hf': ['datasets>=4.0'],
    'plan': ['libtpu>=0.0.42'],  # the TPU compiler; no TPU is needed
    'tensorboard': ['tensorboardX>=2.6'],
    'dev': [
      'datasets>=4.0',
      'ipykernel>=6',
      'libtpu>=0.0.42',  # plans
      'matplotlib>=3.9',
      'nbclient>=0.10',
      'pytest>=8',
      'pytest-xdist>=3.6',
      'ruff>=0.15',
      'tensorboardX>=2.6',
    ],
  },
)
