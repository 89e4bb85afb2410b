import types

import jax
import pytest

from tpu_lm import flops
from tpu_lm.models.transformer import Config

LLAMA_8B = Config(
  vocab_size=128256,
  num_layers=32,
  dim=4096,
  num_heads=32,
  num_kv_heads=8,
  hidden_dim=14336,
  tied=False,
)


def device(kind, platform='tpu'):
  return types.SimpleNamespace(
    device_kind=kind, platform=platform, process_index=0
  )


def test_matmul_parameters_of_llama_3_8b():
  # 8,030,261,248 parameters, less the embedding table and the 65 norms.
  expected = 8_030_261_248 - 128256 * 4096 - 65 * 4096
  assert flops.matmul_parameters(LLAMA_8B) == expected


def test_a_hand_counted_model():
  config = Config(
    vocab_size=10,
    num_layers=2,
    dim=4,
    num_heads=2,
    num_kv_heads=1,
    hidden_dim=6,
    window=2,
    window_pattern=(1, 0),
  )
  # Per layer q, o: 4*4 each; k, v: 4*2 each; feed-forward 3*4*6. Head 4*10.
  parameters = 2 * (16 + 16 + 8 + 8 + 72) + 40
  # Four queries see 1, 2, 2, 2 keys in the window and 1, 2, 3, 4 without.
  keys = 7 / 4 + 10 / 4
  expected = 2 * parameters + 4 * 4 * keys
  assert flops.forward_per_token(config, 4) == expected
  assert flops.train_per_token(config, 4) == 3 * expected


def test_attention_is_nearly_half_of_palms_square():
  length = 8192
  attention = flops.train_per_token(LLAMA_8B, length) - 6 * (
    flops.matmul_parameters(LLAMA_8B)
  )
  palm = 12 * 32 * 32 * 128 * length
  assert attention / palm == pytest.approx(0.5, rel=1e-3)


def test_a_window_longer_than_the_row_changes_nothing():
  assert flops.mean_keys(8, 100) == flops.mean_keys(8) == 4.5


@pytest.mark.parametrize(
  ('kind', 'teraflops'),
  [
    ('NVIDIA A100-SXM4-80GB', 312),
    ('NVIDIA H100 80GB HBM3', 989),
    ('NVIDIA H100 PCIe', 756),
    ('NVIDIA L40S', 362),
    ('NVIDIA L4', 121),
    ('Tesla T4', 65),
    ('Tesla V100-SXM2-16GB', 125),
    ('NVIDIA RTX A4000', None),
    ('NVIDIA T400 4GB', None),
  ],
)
def test_gpus_are_told_apart(kind, teraflops):
  expected = teraflops and teraflops * 1e12
  assert flops.peak(device(kind, 'gpu')) == expected


def test_peaks_of_tpus_and_of_several_devices():
  assert flops.peak(device('TPU v5 lite')) == 197e12
  assert flops.peak(device('TPU v5')) == 459e12
  assert flops.total_peak([device('TPU v6 lite')] * 4) == 4 * 918e12
  assert flops.utilisation(459e12, [device('TPU v6 lite')]) == 0.5
  assert flops.utilisation(1e12, [device('TPU v99')]) is None


def test_the_cpu_is_measured_and_shared_by_its_devices():
  cpu = jax.devices('cpu')[0]
  assert 1e9 < flops.peak(cpu) < 1e14
  assert flops.total_peak([cpu] * 8) == flops.peak(cpu)
