import io

import jax
import pytest

from tpu_lm import tokenizer as tokenizers
from tpu_lm.errors import UserError
from tpu_lm.generate import engine
from tpu_lm.generate.sampler import Sampler
from tpu_lm.generate.speculative import Draft, Guessing
from tpu_lm.generate.stream import Detokenizer, StopStrings, show, stream
from tpu_lm.models import transformer

TEXT = 'naïve 😀🇨🇭 — größe\n日本語 and plain words, again and again. ' * 4


@pytest.fixture(scope='module', params=['byte', 'bpe'])
def tokenizer(request):
  return tokenizers.train([TEXT], request.param, 300)


@pytest.fixture(scope='module')
def model_and_params(tokenizer):
  model = transformer.Transformer(
    transformer.Config(
      vocab_size=tokenizer.vocab_size,
      num_layers=1,
      dim=16,
      num_heads=2,
      hidden_dim=16,
      max_length=64,
      init_std=0.5,
    )
  )
  return model, jax.jit(model.init_params)(jax.random.key(0))


@pytest.mark.parametrize('step', [1, 2, 3, 8, 100])
def test_characters_are_never_halved(tokenizer, step):
  text, ids = Detokenizer(tokenizer), tokenizer.encode(TEXT)
  shown = ''
  for start in range(0, len(ids), step):
    shown += text.push(ids[start : start + step])
    assert TEXT.startswith(shown)
  assert shown + text.flush() == TEXT


def test_broken_bytes_are_shown_in_the_end(tokenizer):
  euro = tokenizers.train([], 'byte')
  text, ids = Detokenizer(euro), euro.encode('€')
  assert text.push(ids[:2]) == ''
  assert text.push(euro.encode('x')) == '\ufffdx'
  assert text.push(ids[:1]) == ''
  assert text.flush() == '\ufffd'
  assert text.flush() == ''
  text = Detokenizer(euro)
  shown = ''.join(text.push(ids[1:2]) for _ in range(200)) + text.flush()
  assert shown == '\ufffd' * 200


def test_a_stop_string_is_never_partly_shown():
  whole = 'one two thr three four'
  for stops, expected in (
    (['three'], 'one two thr '),
    (['four', 'two'], 'one '),
    (['nowhere', 'fourteen'], whole),
    (['o'], ''),
  ):
    for size in (1, 2, 3, 100):
      filtered, shown = StopStrings(stops), ''
      for start in range(0, len(whole), size):
        shown += filtered.push(whole[start : start + size])
        assert expected.startswith(shown)
        if filtered.met:
          break
      shown += filtered.flush()
      assert shown == expected
      assert filtered.met == (expected != whole)


def test_a_stop_string_that_begins_like_itself():
  filtered = StopStrings(['aab'])
  shown = [filtered.push(c) for c in 'aaab']
  assert shown == ['', '', 'a', '']
  assert filtered.met


def test_the_stream_is_the_completion(tokenizer, model_and_params):
  model, params = model_and_params
  sampler = Sampler(top_k=20)
  ids = [tokenizer.eot_id, *tokenizer.encode('and ')]
  (expected,) = engine.generate(
    model, params, [ids], 40, sampler, [tokenizer.eot_id], seed=7
  )
  pieces = list(
    stream(
      model,
      params,
      tokenizer,
      'and ',
      max_new_tokens=40,
      sampler=sampler,
      seed=7,
    )
  )
  text = tokenizer.decode(expected.tokens)
  assert ''.join(pieces) == text
  assert '' not in pieces
  assert len(pieces) > 2

  stop = text[9:12]
  pieces = stream(
    model,
    params,
    tokenizer,
    'and ',
    max_new_tokens=40,
    sampler=sampler,
    seed=7,
    stop=[stop],
  )
  assert ''.join(pieces) == text[: text.index(stop)]


def test_faster_ways_give_the_same_text(tokenizer, model_and_params):
  model, params = model_and_params
  greedy = Sampler(temperature=0)

  def text(**options):
    pieces = stream(
      model, params, tokenizer, 'and ', sampler=greedy, max_new_tokens=40,
      **options,
    )  # fmt: skip
    return ''.join(pieces)

  plain = text()
  draft = Draft(model, jax.tree.map(lambda x: 1.1 * x, params))
  for guessing in (Guessing(), Guessing(draft, 3)):
    assert text(guessing=guessing) == plain
    shown = plain[: plain.index(plain[9:12])]
    assert text(guessing=guessing, stop=[plain[9:12]]) == shown
  assert len(text(quantised_cache=True)) > 2
  with pytest.raises(UserError, match='quantised_cache: not with'):
    text(quantised_cache=True, guessing=Guessing())


def test_the_trained_length_is_kept_or_warned_of(tokenizer, model_and_params):
  model, params = model_and_params
  said = []

  def ask(prompt, **options):
    return stream(model, params, tokenizer, prompt, warn=said.append, **options)

  text = ''.join(ask('a', sampler=Sampler(temperature=0)))
  assert said == []
  assert text or tokenizer.eot_id is not None
  ask('a', max_new_tokens=62)
  assert said == []
  ask('a', max_new_tokens=63)
  assert 'may reach 65 tokens, but the model was trained on 64' in said[0]
  assert 'max_new_tokens=62' in said[0]
  with pytest.raises(UserError, match='trained on 64 at most; shorten'):
    ask('日' * 64)
  full = 'z' * 63
  if len(tokenizer.encode(full)) == 63:
    with pytest.raises(UserError, match='leave nothing of the 64'):
      ask(full)


def test_mistakes_are_told_before_anything_runs(tokenizer, model_and_params):
  model, params = model_and_params
  for options, message in (
    ({'max_new_tokens': 0}, 'max_new_tokens=0'),
    ({'stop': ['']}, 'stop string must not be empty'),
    ({'sampler': Sampler(top_k=9999)}, 'top_k=9999'),
  ):
    with pytest.raises(UserError, match=message):
      stream(model, params, tokenizer, 'a', **options)


def test_a_terminal_is_not_handed_control_characters(monkeypatch):
  monkeypatch.delenv('NO_COLOR', raising=False)

  class Terminal(io.StringIO):
    def isatty(self):
      return True

  for out, expected in (
    (Terminal(), '\x1b[1mHi\x1b[0m a\n\ufffd[2Jb\n'),
    (io.StringIO(), 'Hi a\n\x1b[2Jb\n'),
  ):
    show('Hi', iter([' a\n', '\x1b[2Jb']), out)
    assert out.getvalue() == expected
