import pytest
import tiny

from tpu_lm import models, stage
from tpu_lm.errors import UserError
from tpu_lm.stages import pretrain


def test_the_files_of_a_folder_are_what_is_known():
  assert 'pretrain' in stage.known('tpu_lm.stages')
  assert 'llama' in stage.known(models.__name__)


def test_find_imports_by_file_name():
  assert stage.find('tpu_lm.stages', 'pretrain', 'stage_name') is pretrain


def test_an_unknown_stage_names_the_nearest_and_all():
  message = r"stage_name='pretrian': unknown.*did you mean 'pretrain'"
  with pytest.raises(UserError, match=message):
    stage.make('pretrian', None, None, {})


@pytest.mark.parametrize(
  ('hparams', 'message'),
  [
    ({'zloss': 0.1}, r"stage\.zloss: unknown key.*'z_loss'"),
    ({'z_loss': 'much'}, r"stage\.z_loss='much': must be float"),
    ({'z_loss': True}, r'stage\.z_loss=True: must be float'),
    ({'params': 1}, r'stage\.params: unknown key'),  # not for users
  ],
)
def test_hparams_are_those_of_make(hparams, message):
  with pytest.raises(UserError, match=message):
    stage.make('pretrain', None, None, hparams)


def test_a_whole_number_does_for_a_number():
  model = tiny.model()
  made = stage.make('pretrain', model, tiny.params(model), {'z_loss': 1})
  assert isinstance(made, stage.Stage)


def test_by_default_a_batch_is_trained_on_as_it_came():
  model, batch = tiny.model(), tiny.batch()
  made = stage.make('pretrain', model, tiny.params(model), {})
  parts = list(made.prepare(None, batch, None))
  assert len(parts) == 1
  assert parts[0] is batch
