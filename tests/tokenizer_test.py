"""Tokenizers give back every text and never read a special token from one."""

import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import tokenizers

from tpu_lm import tokenizer as tokenizer_lib
from tpu_lm.errors import UserError

TEXT = 'The quick brown fox, the lazy dogs; it’s 12345 o’clock.\n\nThe end.\n'


def random_text(rng: random.Random) -> str:
  pools = (
    'ab \n',
    ' \t\r\n',
    'äßœ€',
    '漢字かな',
    '😀🏽‍👩',
    '<|endoftext|>',
    "'s'LL",
  )
  parts = []
  for _ in range(rng.randrange(40)):
    pool = rng.choice(pools)
    parts.append(pool if rng.random() < 0.2 else rng.choice(pool))
    if rng.random() < 0.1:
      code = rng.randrange(0x110000)
      parts.append('' if 0xD800 <= code < 0xE000 else chr(code))
  return ''.join(parts)


@pytest.fixture(params=['bpe', 'byte'])
def own(request):
  return tokenizer_lib.train([TEXT] * 20, request.param, 300)


def test_every_text_comes_back(own):
  rng = random.Random(0)
  specials = {own.eot_id, own.im_start_id, own.im_end_id, own.pad_id}
  assert specials == {0, 1, 2, 3}
  texts = [random_text(rng) for _ in range(300)]
  for text, batched in zip(texts, own.encode_batch(texts), strict=True):
    ids = own.encode(text)
    assert own.decode(ids) == text
    assert list(batched) == ids
    assert not specials.intersection(ids)
    assert own.token_bytes[ids].sum() == len(text.encode())
  assert own.token_bytes.dtype == np.int32
  assert own.token_bytes.shape == (own.vocab_size,)
  assert not own.token_bytes[:4].any()


def test_saved_and_loaded_is_the_same(own, tmp_path):
  own.save(tmp_path)
  for path in (tmp_path, tmp_path / 'tokenizer.json'):
    loaded = tokenizer_lib.load(path)
    assert loaded.digest == own.digest
    assert loaded.encode(TEXT) == own.encode(TEXT)
    assert loaded.eot_id == own.eot_id
    assert loaded.pad_id == own.pad_id


def test_other_programs_read_the_file_alike(own, tmp_path):
  own.save(tmp_path)
  plain = tokenizers.Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
  assert plain.encode(TEXT, add_special_tokens=False).ids == own.encode(TEXT)


def test_specials_are_spelled_out_when_asked_for(own):
  ids = [own.eot_id, *own.encode('abc'), own.im_end_id]
  assert own.decode(ids) == 'abc'
  assert own.decode(ids, specials=True) == '<|endoftext|>abc<|im_end|>'


def test_bytes_that_are_not_utf8_are_shown_as_such(own):
  ids = own.encode('é')
  assert own.decode(ids[:1] if len(ids) > 1 else ids) in ('é', '\ufffd')


def test_training_does_not_depend_on_order_or_process(tmp_path):
  texts = [f'{word} and {word}s again\n' for word in TEXT.split()] * 3
  sample = tokenizer_lib.Sample(limit=200)
  other = tokenizer_lib.Sample(limit=200)
  for text in texts:
    sample.add(text)
  for text in sorted(texts, reverse=True):
    other.add(text)
  assert sample.texts() == other.texts()
  assert 200 <= len(''.join(sample.texts()).encode()) < 260
  code = (
    'from tpu_lm import tokenizer as t; '
    f't = t.train({texts!r}, "bpe", 290); print(t.digest)'
  )
  digests = {
    subprocess.run(
      [sys.executable, '-c', code],
      env=os.environ | {'PYTHONHASHSEED': seed},
      capture_output=True,
      text=True,
      check=True,
    ).stdout
    for seed in '123'
  }
  assert len(digests) == 1


def test_what_cannot_be_trained_is_refused():
  with pytest.raises(UserError, match=r'vocab_size=100: set it to 260 or more'):
    tokenizer_lib.train([TEXT], 'bpe', 100)
  with pytest.raises(UserError, match=r"data.tokenizer=bytes: .*'byte'"):
    tokenizer_lib.train([TEXT], 'bytes')


def pieces_tokenizer(model, names, special=True):
  """A tokenizer in the way of sentencepiece, as a user may bring it."""
  brought = tokenizers.Tokenizer(model)
  brought.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
  decoders = tokenizers.decoders
  brought.decoder = decoders.Sequence(
    [
      decoders.Replace('▁', ' '),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(' ', 1, 0),
    ]
  )
  for name in names:
    token = tokenizers.AddedToken(name, special=special, normalized=False)
    if special:
      brought.add_special_tokens([token])
    else:
      brought.add_tokens([token])
  return brought


def bpe_with_fallback():
  vocab = {'<unk>': 0, '<s>': 1, '</s>': 2}
  vocab |= {f'<0x{byte:02X}>': 3 + byte for byte in range(256)}
  for token in ('▁', 'a', 'b', 'é', '▁a', '<', '/', 's', '>'):
    vocab[token] = len(vocab)
  model = tokenizers.models.BPE(
    vocab=vocab, merges=[('▁', 'a')], unk_token='<unk>', byte_fallback=True
  )
  return pieces_tokenizer(model, ['<unk>', '<s>', '</s>'])


def test_brought_with_byte_fallback(tmp_path):
  bpe_with_fallback().save(str(tmp_path / 'tokenizer.json'))
  brought = tokenizer_lib.load(tmp_path)
  assert brought.eot_id == 2
  assert brought.pad_id == 2  # it has none of its own
  assert brought.im_start_id is None
  text = 'ab é漢</s>a'
  ids = brought.encode(text)
  assert brought.eot_id not in ids
  assert brought.decode(ids) == text
  # One more: the space that such tokenizers put before a text.
  assert brought.token_bytes[ids].sum() == len(text.encode()) + 1


def test_brought_unigram_keeps_specials_as_text(tmp_path):
  vocab = [('<unk>', 0.0), ('</s>', 0.0)]
  vocab += [(token, -3.0) for token in '▁ab<>/s']
  model = tokenizers.models.Unigram(vocab, unk_id=0, byte_fallback=False)
  brought = pieces_tokenizer(model, ['<unk>', '</s>'])
  assert 1 in brought.encode('a</s>').ids  # as other programs have it
  brought.save(str(tmp_path / 'tokenizer.json'))
  loaded = tokenizer_lib.load(tmp_path)
  assert loaded.eot_id == 1
  assert loaded.decode(loaded.encode('a</s>b')) == 'a</s>b'


def test_brought_end_that_is_not_marked_special(tmp_path):
  model = bpe_with_fallback().model
  brought = pieces_tokenizer(model, ['<|endoftext|>'], special=False)
  brought.save(str(tmp_path / 'tokenizer.json'))
  loaded = tokenizer_lib.load(tmp_path)
  assert loaded.eot_id not in loaded.encode('a<|endoftext|>')
  assert loaded.decode(loaded.encode('a<|endoftext|>')) == 'a<|endoftext|>'


def test_brought_end_named_beside_it(tmp_path):
  brought = pieces_tokenizer(bpe_with_fallback().model, ['<stop>', '<fill>'])
  brought.save(str(tmp_path / 'tokenizer.json'))
  with pytest.raises(UserError, match='no token that ends a document'):
    tokenizer_lib.load(tmp_path)
  beside = {'eos_token': {'content': '<stop>'}, 'pad_token': '<fill>'}
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(beside))
  loaded = tokenizer_lib.load(tmp_path)
  assert loaded.token(loaded.eot_id) == '<stop>'
  assert loaded.token(loaded.pad_id) == '<fill>'


def test_what_cannot_be_loaded_is_refused(tmp_path):
  (tmp_path / 'tokenizer.json').write_text('{"version": ')
  with pytest.raises(UserError, match='not a JSON file'):
    tokenizer_lib.load(tmp_path)
  (tmp_path / 'tokenizer.json').write_text(
    '{"added_tokens": [{"content": "</s>", "special": true}]}'
  )
  with pytest.raises(UserError, match=r'not a tokenizer\.json'):
    tokenizer_lib.load(tmp_path)
  with pytest.raises(UserError, match=r"no such tokenizer .*tokenizer\.json'"):
    tokenizer_lib.load(tmp_path / 'tokeniser.json')


def test_read_only_place_is_told(own, tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='cannot write the tokenizer'):
    own.save(tmp_path / 'file')
