"""`scripts/tpu/xpk.sh`: what reaches a workload of a cluster."""

import pathlib
import subprocess

import pytest
from stub_cloud import CREATION, WORDS


def xpk(cloud, command, *argv):
  done = cloud.call(
    command, '--cluster=my-cluster', *CREATION, *argv, program='xpk.sh'
  )
  assert done.returncode == 0, done.stderr
  return cloud.ran()


def test_the_words_reach_a_workload_as_they_are(cloud):
  (words,) = xpk(cloud, 'run', '--env=A=b c', '--num-slices=2', '--', *WORDS)
  assert words[:-2] == [
    'xpk', 'workload', 'create', '--cluster=my-cluster',
    '--project=my-project', '--zone=us-west4-a', '--workload=my-tpu',
    '--tpu-type=v5litepod-256', '--num-slices=2', '--max-restarts=50',
    '--base-docker-image=python:3.11',
  ]  # fmt: skip
  line = words[-1].removeprefix('--command=')
  assert '\n' not in line  # XPK puts it into a block of YAML
  assert '$(' not in line  # Kubernetes would expand $(NAME)
  folder = pathlib.Path(words[-2].removeprefix('--script-dir='))
  assert (folder / 'tpu_lm' / 'new.py').exists()
  assert not (folder / '.git').exists()
  environment = cloud.environment | {
    'PATH': f'{cloud.trainer.parent}:{cloud.environment["PATH"]}',
    'HOME': str(cloud.home),
  }
  # As XPK's template has it.
  script = f'({line}) & PID=$!; wait $PID; exit $?'
  subprocess.run(
    ['bash', '-c', script], env=environment, cwd=folder, check=True
  )
  told = cloud.trained()
  assert told['argv'] == WORDS[1:]
  assert told['a'] == 'b c'
  assert '--editable .[tpu]' in (cloud.home / 'pythons').read_text()


def test_a_workload_of_a_ready_image(cloud):
  (words,) = xpk(
    cloud, 'run', '--image=gcr.io/p/i', '--max-restarts=0', '--', 'tpu_lm'
  )
  assert words[-2:] == [
    '--docker-image=gcr.io/p/i',
    '--command=exec env tpu_lm',
  ]
  assert '--max-restarts=0' in words
  assert not (cloud.tree / '.cache').exists()


@pytest.mark.parametrize(
  ('option', 'tier'),
  [
    ('--num-slices=1', '--on-demand'),
    ('--spot', '--spot'),
    ('--reservation=mine', '--reservation=mine'),
  ],
)
def test_a_cluster(cloud, option, tier):
  (words,) = xpk(cloud, 'cluster-create', option)
  assert words == [
    'xpk', 'cluster', 'create', '--cluster=my-cluster', '--project=my-project',
    '--zone=us-west4-a', '--tpu-type=v5litepod-256', '--num-slices=1', tier,
  ]  # fmt: skip


def test_logs_of_a_workload(cloud):
  credentials, logs = xpk(cloud, 'logs', '--lines=5')
  assert credentials[:5] == [
    'gcloud', 'container', 'clusters', 'get-credentials', 'my-cluster',
  ]  # fmt: skip
  assert '--location=us-west4' in credentials
  assert logs[:2] == ['kubectl', 'logs']
  assert {'--selector=jobset.sigs.k8s.io/jobset-name=my-tpu', '--tail=5',
          '--container=jax-tpu', '--follow'} <= set(logs)  # fmt: skip


def test_list_and_delete(cloud):
  assert xpk(cloud, 'list')[0][1:3] == ['workload', 'list']
  assert xpk(cloud, 'delete')[0][-1] == '--workload=my-tpu'
  assert xpk(cloud, 'cluster-delete')[0][1:3] == ['cluster', 'delete']
  assert xpk(cloud, 'cluster-delete', '--yes')[0][-1] == '--force'
