"""Conversations, pairs and ratings become the rows that one expects."""

import hashlib
import json

import numpy as np
import pytest
from record_cases import (
  END,
  answer,
  apart,
  assert_row,
  column,
  made_up,
  prepared,
  refused,
  row_of,
  segments_in,
  text,
  turn,
  write,
)

from tpu_lm.data import manifest, packing, record_rows, records


def test_conversations_by_hand(tmp_path):
  # 30, 26 and 24 tokens: the first two fill 56 of 64, the third is alone.
  texts = [('12345', '12345'), ('123', '123'), ('12', '12')]
  found = [{'prompt': p, 'completion': c} for p, c in texts]
  made, lines = apart(tmp_path, found)
  one, two, three = (answer(*pair) for pair in texts)
  assert [len(ids) for ids, _ in (one, two, three)] == [30, 26, 24]
  assert column(made, 'train', 'tokens').shape == (2, 65)
  assert_row(made, '', 0, row_of([(0, one), (30, two)]))
  assert_row(made, '', 1, row_of([(0, three)]))
  assert made.rows == 'chat'
  assert made.slots == 2
  for count, wanted in (
    ('rows', 2),
    ('documents', 3),
    ('documents_chunked', 0),
    ('tokens', 80),
    ('targets', 6 + 4 + 3),
    ('padding', 130 - 80),
  ):
    assert made.total('train', count) == wanted, count
  assert '4 records (prompt/completion), ' in lines[0]
  assert (made.directory / 'chat_template.jinja').is_file()


def test_several_turns_and_what_follows_the_last_answer(tmp_path):
  messages = [
    {'role': 'user', 'content': 'a'},
    {'role': 'assistant', 'content': 'b'},
    {'role': 'user', 'content': 'c'},
    {'role': 'assistant', 'content': 'd'},
  ]
  made, _ = apart(tmp_path, [{'messages': messages}])
  ids = [
    *turn('user', 'a'), *turn('assistant', 'b'),
    *turn('user', 'c'), *turn('assistant', 'd'),
  ][:-1]  # fmt: skip
  # <|im_start|>user\na<|im_end|>\n has 9 tokens, the header assistant\n 11.
  trained = [20, 21, 43, 44]
  assert [ids[t] for t in trained] == [ord('b') + 4, END, ord('d') + 4, END]
  mask = [t in trained for t in range(len(ids))]
  assert_row(made, '', 0, row_of([(0, (ids, mask))]))


def test_pairs_by_hand(tmp_path):
  found = [
    {'prompt': '1', 'chosen': 'yes', 'rejected': 'no', 'margin': 0.5},
    {'prompt': '1234', 'chosen': 'a', 'rejected': 'abcdef'},
  ]
  made, _ = apart(tmp_path, found, 'pairs')
  # The second takes 30 slots, by its rejected answer; the first 24.
  chosen = [(0, answer('1234', 'a')), (30, answer('1', 'yes'))]
  rejected = [(0, answer('1234', 'abcdef')), (30, answer('1', 'no'))]
  assert_row(made, 'chosen_', 0, row_of(chosen))
  assert_row(made, 'rejected_', 0, row_of(rejected))
  margins = column(made, 'train', 'margins')
  assert margins.dtype == np.float32
  assert margins.tolist() == [[0.0, 0.5]]
  assert not column(made, 'train', 'chosen_segment_ids')[:, -1].any()
  assert made.total('train', 'targets') == 4 + 2 + 3 + 7
  assert made.total('train', 'tokens') == 25 + 24 + 30 + 23


def test_only_the_completions_of_pairs_are_trained(tmp_path):
  prompt = [
    {'role': 'user', 'content': 'a'},
    {'role': 'assistant', 'content': 'b'},
    {'role': 'user', 'content': 'c'},
  ]
  found = [{'prompt': prompt, 'chosen': 'd', 'rejected': 'e'}]
  made, _ = apart(tmp_path, found, 'pairs')
  for prefix, said in (('chosen_', 'd'), ('rejected_', 'e')):
    mask = column(made, 'train', f'{prefix}loss_mask')
    tokens = column(made, 'train', f'{prefix}tokens')
    assert tokens[mask].tolist() == [*text(said), END]


def test_ratings_by_hand(tmp_path):
  found = [
    {'prompt': '1', 'completion': 'yes', 'label': True},
    {'prompt': '1234', 'completion': 'abcdef', 'label': False},
  ]
  made, _ = apart(tmp_path, found, 'rated')
  # Of two, each is compared with the other's answer.
  own = [('1234', 'abcdef'), ('1', 'yes')]
  other = [('1234', 'yes'), ('1', 'abcdef')]
  # 30 and 27: the second's own answer has 24, what it is compared with 27.
  assert_row(made, '', 0, row_of([(0, answer(*own[0])), (30, answer(*own[1]))]))
  laid = row_of([(0, answer(*other[0])), (30, answer(*other[1]))])
  assert_row(made, 'mismatched_', 0, laid)
  assert column(made, 'train', 'scores').tolist() == [[0.0, 1.0]]


def test_scored_by_hand(tmp_path):
  found = [{'prompt': '1', 'completion': 'yes', 'score': -2.5}]
  made, _ = apart(tmp_path, found, 'scored')
  assert_row(made, '', 0, row_of([(0, answer('1', 'yes'))]))
  assert column(made, 'train', 'scores').tolist() == [[-2.5]]
  shards = made.splits('train')[0].shards
  assert shards[0].files.keys() == {*record_rows.COLUMNS, 'scores'}


@pytest.mark.parametrize('rows', record_rows.PREFIXES)
@pytest.mark.parametrize('kind', packing.WHOLE_KINDS)
def test_every_record_is_whole_and_there_once(tmp_path, rows, kind):
  found = made_up(rows, 80)
  path = write(tmp_path / 'a.jsonl', found)
  made, _ = prepared(path, tmp_path / 'data', rows, packing=kind)
  if kind == 'none':
    assert made.slots == 1
    assert sum(made.total(s, 'rows') for s in manifest.SPLITS) == 80
  first = record_rows.PREFIXES[rows][0]
  names = {'chosen_': 'chosen', 'rejected_': 'rejected', '': 'completion'}
  for prefix in record_rows.PREFIXES[rows]:
    if prefix == 'mismatched_':
      continue
    wanted = [answer(r['prompt'], r[names[prefix]]) for r in found]
    held = []
    for split in manifest.SPLITS:
      held += [(i, m) for i, m, _, _ in segments_in(made, split, prefix)]
    assert sorted(held) == sorted(wanted)
  if first == '':
    texts = [answer(r['prompt'], r['completion'], 999)[0] for r in found]
    cut = sum(len(ids) > 64 for ids in texts)
    assert made.content['counts']['records_cut'] == cut > 0
  if name := record_rows.VALUES[rows]:
    for split in manifest.SPLITS:
      values = column(made, split, name)
      assert values.shape[1] == made.slots
      of = {
        tuple(answer(r['prompt'], r[names[first]])[0]): float(
          r['margin' if rows == 'pairs' else 'score']
        )
        for r in found
      }
      for ids, _, row, number in segments_in(made, split, first):
        assert values[row, number] == of[tuple(ids)]
      assert values.sum() == sum(
        of[tuple(ids)] for ids, _, _, _ in segments_in(made, split, first)
      )


def test_mismatched_is_the_next_record_with_another_completion(tmp_path):
  found = made_up('rated', 60)
  path = write(tmp_path / 'a.jsonl', found)
  made, _ = prepared(path, tmp_path / 'data', 'rated')

  def key(record):
    canonical = records.canonical(record, 'rated')[1]
    text = json.dumps(canonical, sort_keys=True, ensure_ascii=False)
    return hashlib.md5(text.encode()).digest()

  ordered = sorted(found, key=key)
  for split in manifest.SPLITS:
    own = [tuple(ids) for ids, _, _, _ in segments_in(made, split, '')]
    there = [
      r
      for r in ordered
      if tuple(answer(r['prompt'], r['completion'])[0]) in own
    ]
    wanted = {}
    for i, record in enumerate(there):
      cyclic = there[i + 1 :] + there[:i]
      other = next(r for r in cyclic if r['completion'] != record['completion'])
      ids = tuple(answer(record['prompt'], record['completion'])[0])
      wanted[ids] = answer(record['prompt'], other['completion'])
    pairs = zip(
      segments_in(made, split, ''),
      segments_in(made, split, 'mismatched_'),
      strict=True,
    )
    for (ids, _, *place), (others, mask, *other_place) in pairs:
      assert place == other_place
      assert (others, mask) == wanted[tuple(ids)]
      assert others != ids


def test_a_split_of_one_completion_borrows_a_mismatch(tmp_path):
  found = [{'prompt': str(i), 'completion': 'a', 'label': 1} for i in range(30)]
  path = write(tmp_path / 'a.jsonl', found)
  message = refused(path, tmp_path / 'data', 'rated')
  assert 'all completions are the same' in message
  held = [{'prompt': 'held', 'completion': 'b', 'label': 0}]
  made, _ = prepared(
    path,
    tmp_path / 'data',
    'rated',
    heldout_source=str(write(tmp_path / 'b.jsonl', held)),
  )
  for split, other in (('train', 'b'), ('heldout', 'a')):
    tokens = column(made, split, 'mismatched_tokens')
    mask = column(made, split, 'mismatched_loss_mask')
    assert set(tokens[mask].tolist()) == {*text(other), END}


def test_no_row_is_without_targets(tmp_path):
  """What would be a NaN in a loss never gets as far as a row."""
  for rows in record_rows.PREFIXES:
    found = made_up(rows, 80)
    for number, record in enumerate(found):
      record['prompt'] = 'p' * (number % 50)  # from 45 on nothing is left
      record['prompt'] += str(number)[: number % 50]
    path = write(tmp_path / f'{rows}.jsonl', found)
    made, _ = prepared(path, tmp_path / 'data', rows, max_bad_share=0.5)
    assert made.content['counts']['bad_skipped'] > 0
    for split in manifest.SPLITS:
      for prefix in record_rows.PREFIXES[rows]:
        for ids, mask, _, _ in segments_in(made, split, prefix):
          assert any(mask[1:])
          assert mask[-1]
          assert len(ids) <= 64
