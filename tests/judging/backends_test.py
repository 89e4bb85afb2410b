"""Endpoints with faults, limits, prices, the cache; a directory of ours."""

import http.client
import json
import os
import time

import pytest
import tiny
from judging import chat_server

from tpu_lm.errors import UserError
from tpu_lm.judging import backends, cache
from tpu_lm.judging.asked import Request, Sampling
from tpu_lm.judging.cache import Reply

FAST = {'pause': 0.01, 'timeout': 0.5}


def asked(text, number=0):
  return Request([{'role': 'user', 'content': text}], number)


def echo(messages):
  return f'you said {messages[-1]["content"]}'


@pytest.fixture
def server():
  with chat_server.serving(echo) as server:
    yield server


def opened(server, **options):
  return backends.make(server.url, 'a-model', **FAST | options)


def test_replies_come_in_the_order_of_the_requests(server):
  server.pause = 0.02
  with opened(server, concurrency=4) as backend:
    replies = backend.ask([asked(f'number {n}') for n in range(12)])
  assert [r.text for r in replies] == [
    f'you said number {n}' for n in range(12)
  ]
  assert all(reply.finished and not reply.error for reply in replies)
  assert 1 < server.most_at_once <= 4
  # Two words each asked, four each said.
  assert backend.price[:3] == (12, 24, 48)


def test_what_is_sent(server):
  sampling = Sampling(0.7, 33, seed=5)
  with opened(server, options='{"top_p": 0.9, "seed": null}') as backend:
    backend.ask([asked('one')], sampling)
  with opened(server) as backend:
    backend.ask([asked('one'), asked('one', 1)], sampling)
    backend.ask([asked('one')])
  first, second, third, greedy = server.asked
  assert first == {
    'model': 'a-model', 'messages': [{'role': 'user', 'content': 'one'}],
    'temperature': 0.7, 'max_tokens': 33, 'top_p': 0.9,
  }  # fmt: skip
  assert second['seed'] != third['seed']
  assert 'seed' not in greedy  # nothing is drawn
  assert 'Authorization' not in server.headers[0]


@pytest.mark.parametrize(
  'fault', [429, 500, 503, 408, 'cut', 'garbage', 'empty', 'slow']
)
def test_what_passes_is_asked_again(server, fault):
  server.faults = [fault, fault]
  begun = time.monotonic()
  with opened(server) as backend:
    (reply,) = backend.ask([asked('hello')])
  assert reply.text == 'you said hello'
  assert time.monotonic() - begun < 5  # what drips would take ten seconds
  assert backend.price.calls == 3
  assert backend.price.failed == 2
  # What may have been paid for is counted, and said to be a guess.
  is_paid = fault in ('cut', 'garbage', 'empty', 'slow')
  assert backend.price.unreported == 2 * is_paid
  assert (backend.price.prompt_tokens > 100) == is_paid


def test_pauses_grow_and_are_those_the_server_asks_for(server, monkeypatch):
  pauses = []
  with opened(server, attempts=4, pause=0.25) as backend:
    ended = backend._model._ended
    monkeypatch.setattr(ended, 'wait', lambda seconds: pauses.append(seconds))
    server.faults = [500, 500, 500]
    backend.ask([asked('one')])
    assert pauses == [0.25, 0.5, 1.0]
    server.faults, server.more = [429, 503], {'Retry-After': '7'}
    backend.ask([asked('two')])
    assert pauses[3:] == [7.0, 7.0]
    # A pause has an end, whatever the server says.
    date = 'Fri, 31 Dec 2100 23:59:59 GMT'
    for said, expected in ((date, 60.0), ('soon', 0.25), ('-3', 0.25)):
      server.faults, server.more = [429], {'Retry-After': said}
      backend.ask([asked(said)])
      assert pauses[-1] == expected


def test_a_request_that_is_given_up_says_why(server):
  server.faults = [500] * 3
  with opened(server, attempts=3, concurrency=1) as backend:
    replies = backend.ask([asked('one'), asked('two')])
    assert replies[0].error == 'HTTP 500: fault 500 for, 3 times'
    assert replies[1].text == 'you said two'
    # It is not kept: the next time it is asked again.
    assert backend.ask([asked('one')])[0].text == 'you said one'


def test_failures_between_replies_do_not_end_the_run(server):
  server.faults = [500, None] * 20
  with opened(server, attempts=1, concurrency=1) as backend:
    replies = backend.ask([asked(str(n)) for n in range(40)])
  assert [bool(reply.error) for reply in replies] == [True, False] * 20


def test_a_request_that_is_wrong_is_asked_once(server):
  server.faults = [400]
  with opened(server) as backend:
    (reply,) = backend.ask([asked('too long')])
  assert reply.error.startswith('HTTP 400')
  assert len(server.asked) == 1


@pytest.mark.parametrize(('fault', 'hint'), [
  (401, 'set key_env'), (403, 'may not use'), (404, '/v1'), ('moved', '302'),
])  # fmt: skip
def test_what_cannot_be_mended_ends_at_once(server, fault, hint, monkeypatch):
  monkeypatch.setenv('A_KEY', 'sk-secret-1234')
  server.faults = [fault] * 9
  with (
    opened(server, key_env='A_KEY', concurrency=1) as backend,
    pytest.raises(UserError, match=hint) as caught,
  ):
    backend.ask([asked(str(n)) for n in range(9)])
  assert len(server.asked) == 1
  assert 'secret' not in str(caught.value)
  assert '\n' not in str(caught.value)


def test_the_key_is_sent_and_never_shown(server, monkeypatch, tmp_path, capfd):
  monkeypatch.setenv('A_KEY', 'sk-secret-1234\n')
  path = tmp_path / 'replies.jsonl'
  server.faults = [500, 400]
  with opened(
    server, key_env='A_KEY', attempts=1, cache=str(path), concurrency=1
  ) as backend:
    replies = backend.ask([asked('one'), asked('two'), asked('three')])
  assert server.headers[0]['Authorization'] == 'Bearer sk-secret-1234'
  assert [bool(reply.error) for reply in replies] == [True, True, False]
  assert '(the key)' in replies[0].error
  shown = f'{replies} {path.read_text()} {backend.price} {capfd.readouterr()}'
  assert 'secret' not in shown


@pytest.mark.parametrize(('options', 'said'), [
  ({'key_env': 'NO_SUCH_KEY'}, 'no such variable'),
  ({'key_env': 'sk-secret-1234'}, 'is no name'),
  ({'key_env': 'BAD_KEY'}, 'no key has'),
  ({'options': '[1]'}, 'no JSON object'),
  ({'options': '{'}, 'no JSON object'),
  ({'concurrency': 0}, 'at least 1'),
  ({'max_calls': -1}, 'at least 0'),
])  # fmt: skip
def test_mistakes_are_named(server, options, said, monkeypatch):
  monkeypatch.delenv('NO_SUCH_KEY', raising=False)
  monkeypatch.setenv('BAD_KEY', 'sk-secret\x07')
  with pytest.raises(UserError, match=said) as caught:
    opened(server, **options)
  assert 'secret' not in str(caught.value)


@pytest.mark.parametrize(('backend', 'options', 'said'), [
  ('', {}, 'is empty'),
  ('http://localhost:1/v1', {}, 'model=…'),
  ('http://me:secret@localhost/v1', {'model': 'm'}, 'key_env=NAME'),
  ('http://localhost/v1?key=secret', {'model': 'm'}, 'key_env=NAME'),
  ('ftp://localhost/v1', {'model': 'm'}, 'no address'),
  ('http:///v1', {'model': 'm'}, 'no address'),
  ('no/such/dir', {}, 'no such directory'),
  ('.', {'model': 'm'}, 'needs no model'),
  ('.', {}, 'config.json'),
])  # fmt: skip
def test_backends_that_cannot_be(backend, options, said, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match=said) as caught:
    backends.make(backend, **options)
  assert 'secret' not in str(caught.value)


def test_an_endpoint_that_is_not_there_ends_the_run():
  with (
    backends.make(
      'http://127.0.0.1:9/v1', 'm', attempts=2, concurrency=1, pause=0.001
    ) as backend,
    pytest.raises(UserError, match=r'none of the last 8 requests'),
  ):
    backend.ask([asked(str(n)) for n in range(50)])
  assert backend.price.calls == 16
  assert backend.price.prompt_tokens == 0  # nobody was there to be paid


def test_the_limit_of_calls_is_exact(server, tmp_path):
  path = str(tmp_path / 'replies.jsonl')
  requests = [asked(str(n)) for n in range(20)]
  with opened(server, max_calls=7, cache=path) as backend:
    with pytest.raises(UserError, match=r'max_calls=7 would be passed') as e:
      backend.ask(requests)
    assert '\n' not in str(e.value)
  assert len(server.asked) == 7
  # What was paid for is kept, and the rest is all that is asked.
  with opened(server, max_calls=13, cache=path) as backend:
    replies = backend.ask(requests)
    assert backend.price.kept == 7
  assert [reply.text for reply in replies] == [
    f'you said {n}' for n in range(20)
  ]
  assert len(server.asked) == 20


def test_retries_count_against_the_limit(server):
  server.faults = [500] * 9
  with (
    opened(server, max_calls=2) as backend,
    pytest.raises(UserError, match='max_calls=2'),
  ):
    backend.ask([asked('one')])
  assert len(server.asked) == 2


def test_the_limit_of_tokens_holds_with_calls_side_by_side(server):
  server.pause = 0.02
  server.answer = lambda _: 'word ' * 20
  sampling = Sampling(max_new_tokens=20)
  with (
    opened(server, max_tokens=200, concurrency=8) as backend,
    pytest.raises(UserError, match='max_tokens=200 would be passed'),
  ):
    backend.ask([asked(f'word {n}') for n in range(100)], sampling)
  price = backend.price
  spent = price.prompt_tokens + price.completion_tokens
  # A call reserves about 60 tokens and takes 22: it stops near the limit, and
  # eight calls that had not reserved would go far beyond it.
  assert 120 < spent <= 200


def test_replies_without_usage_are_estimated(server):
  server.faults = ['silent']
  with opened(server) as backend:
    backend.ask([asked('one')], Sampling(max_new_tokens=50))
  assert backend.price.unreported == 1
  assert backend.price.completion_tokens == 50
  assert 'estimated' in str(backend.price)


def test_a_reply_that_was_cut_off_is_not_finished(server):
  server.faults = ['length']
  with opened(server) as backend:
    (reply,) = backend.ask([asked('one')])
  assert not reply.finished


def test_equal_requests_are_asked_once_and_others_apart(server, tmp_path):
  path = str(tmp_path / 'deep' / 'replies.jsonl')
  with opened(server, cache=path) as backend:
    backend.ask([asked('one'), asked('one'), asked('one', 1)])
    backend.ask([asked('one')])
    assert len(server.asked) == 2
    backend.ask([asked('one')], Sampling(seed=1))
    backend.ask([asked('one')], Sampling(temperature=1.0))
    assert len(server.asked) == 4
  for options in ({}, {'options': '{"top_p": 1}'}):
    with opened(server, cache=path, **options) as backend:
      backend.ask([asked('one')])
  with backends.make(server.url, 'another', cache=path, **FAST) as backend:
    backend.ask([asked('one')])
  assert len(server.asked) == 6
  assert oct(os.stat(path).st_mode)[-3:] == '600'


def test_a_line_that_was_cut_off_is_asked_again(server, tmp_path):
  path = tmp_path / 'replies.jsonl'
  with opened(server, cache=str(path)) as backend:
    backend.ask([asked('one'), asked('two')])
  lines = path.read_bytes()
  path.write_bytes(lines[:-10])
  for count in (1, 0):
    with opened(server, cache=str(path)) as backend:
      replies = backend.ask([asked('one'), asked('two')])
    assert [r.text for r in replies] == ['you said one', 'you said two']
    assert backend.price.calls == count
  assert cache.Cache(path).damaged == 1


def test_odd_lines_of_a_cache_are_left_out(tmp_path):
  path = tmp_path / 'replies.jsonl'
  good = {'key': 'k', 'text': 'x \u2028 é', 'finished': True}
  odd = ('[]', '7', '{}', '{"key": 1, "text": "x"}', '{"key": "a"}', '"\\ud8')
  path.write_text('\n'.join([*odd, json.dumps(good)]))
  found = cache.Cache(path)
  assert (len(found), found.damaged) == (1, len(odd))
  assert found.get('k') == Reply('x \u2028 é')
  for place in (tmp_path, '/dev/full'):
    with pytest.raises(UserError, match='cannot be used'):
      cache.Cache(place)


def test_a_full_disk_is_named(server, tmp_path):
  with opened(server, cache=str(tmp_path / 'c')) as backend:
    full = os.open('/dev/full', os.O_WRONLY)
    os.dup2(full, backend._cache._file)
    os.close(full)
    with pytest.raises(UserError, match=r'cannot be written \(No space left'):
      backend.ask([asked('one')])
    assert backend.ask([asked('one')])[0].text == 'you said one'


def test_halves_of_surrogate_pairs_are_replaced(server):
  server.answer = lambda _: '\ud83d half'
  with opened(server) as backend:
    assert backend.ask([asked('one \ud83d')])[0].text == '? half'


def test_an_endpoint_can_be_ended_while_it_waits(server):
  server.faults = [500] * 9
  backend = opened(server, pause=30.0)
  begun = time.monotonic()
  running = backend._model._threads.submit(backend.ask, [asked('one')])
  while not server.asked:
    time.sleep(0.01)
  backend.close()
  assert running.result()[0].error
  assert time.monotonic() - begun < 5


def test_a_working_directory_answers_alike_in_any_company(tmp_path):
  workdir, _ = tiny.teacher()
  sampling = Sampling(1.0, 8, seed=3)
  requests = [asked(f'What is {"so " * n}{n}?') for n in range(5)]
  requests.append(asked('What is 0?', 1))
  path = str(tmp_path / 'replies.jsonl')
  with backends.make(workdir, cache=path, concurrency=4) as backend:
    together = backend.ask(requests, sampling)
    prompts = [len(r.messages[0]['content']) for r in requests]
    assert backend.price.prompt_tokens > sum(prompts)  # a token a byte
    assert 6 <= backend.price.completion_tokens <= 48
  with backends.make(workdir, concurrency=4) as backend:
    alone = [backend.ask([one], sampling)[0] for one in requests[::-1]][::-1]
  assert [a.text for a in together] == [a.text for a in alone]
  assert together[5].text != together[0].text  # drawn apart
  with backends.make(workdir, cache=path, max_calls=1) as backend:
    assert backend.ask(requests, sampling) == together
    assert backend.price[:3] == (0, 0, 0)


def test_the_limits_of_a_working_directory():
  workdir, _ = tiny.teacher()
  requests = [asked(f'What is {n}?') for n in range(7)]
  with backends.make(workdir, concurrency=2, max_calls=5) as backend:
    with pytest.raises(UserError, match='max_calls=5'):
      backend.ask(requests, Sampling(max_new_tokens=2))
    assert backend.price.calls == 5
    # The five that were answered cost nothing any more.
    backend.ask(requests[:5], Sampling(max_new_tokens=2))


def test_the_server_of_these_tests_cuts_connections(server):
  """Else the faults above would prove nothing."""
  server.faults = ['cut']
  body = json.dumps({'messages': asked('x').messages})
  connection = http.client.HTTPConnection(*server.server_address)
  connection.request('POST', '/v1/chat/completions', body)
  with pytest.raises(http.client.IncompleteRead):
    connection.getresponse().read()
  connection.close()
