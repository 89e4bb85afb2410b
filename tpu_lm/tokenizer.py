"""Tokenizers: Hugging Face `tokenizer.json` files, trained here or brought.

Two kinds are trained here: `bpe` is byte-level BPE (Sennrich et al.,
arXiv 1508.07909, over bytes as in GPT-2) with the pre-tokenisation expression
of Llama 3, so that exported files are known to other programs as
`llama-bpe`; `byte` has one token a byte. Both give back every text exactly.
Text that spells a special token stays text: `encode` never returns a
special id.
"""

import hashlib
import heapq
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tokenizers

from tpu_lm.errors import UserError, nearest

EOT, IM_START, IM_END, PAD = SPECIALS = (
  '<|endoftext|>',
  '<|im_start|>',
  '<|im_end|>',
  '<|pad|>',
)
# The names that others give to the token that ends a document, in the order
# in which they are looked for in a brought file.
EOT_NAMES = (EOT, '</s>', '<|end_of_text|>', '<eos>')
PAD_NAMES = (PAD, '<pad>', '[PAD]', '<|finetune_right_pad_id|>')

KINDS = ('bpe', 'byte')
SAMPLE_BYTES = 8_000_000  # of the training split, what a bpe is trained on

LLAMA3_PATTERN = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)


def _byte_characters() -> dict[str, int]:
  """The printable character that GPT-2's table gives to each byte, inverted."""
  kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
  moved = [byte for byte in range(256) if byte not in kept]
  table = {chr(byte): byte for byte in kept}
  return table | {chr(256 + i): byte for i, byte in enumerate(moved)}


_BYTE_OF = _byte_characters()


class Tokenizer:
  """A tokenizer with the ids of its special tokens.

  Attributes:
    vocab_size: one more than the highest id.
    eot_id: begins and ends every document.
    pad_id: fills rows; a brought tokenizer without one uses eot_id.
    im_start_id, im_end_id: of chat templates; None where a brought tokenizer
      has none.
    token_bytes: np.int32[vocab_size], the utf-8 bytes that each id stands for;
      0 for special tokens.
    names: how eos_token, pad_token and bos_token are spelled; the last only
      where a brought tokenizer has one.
    special_tokens: the entries of tokenizer.json that no text can give, with
      content, id, lstrip, rstrip and single_word.
    digest: sha256 over all that decides which ids a text gets.
  """

  def __init__(
    self, tokenizer: tokenizers.Tokenizer, eot: str, pad: str, bos: str = ''
  ):
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    self._tokenizer = tokenizer
    self._spec = json.loads(tokenizer.to_str())
    self._variants: dict[str, tokenizers.Tokenizer] = {'start': tokenizer}
    names = {'eos_token': eot, 'pad_token': pad}
    self.names = names | ({'bos_token': bos} if bos else {})
    self.vocab_size = max(tokenizer.get_vocab(True).values()) + 1
    self.eot_id = tokenizer.token_to_id(eot)
    self.pad_id = tokenizer.token_to_id(pad)
    self.im_start_id = tokenizer.token_to_id(IM_START)
    self.im_end_id = tokenizer.token_to_id(IM_END)
    self.special_tokens = [
      token for token in self._spec['added_tokens'] if token['special']
    ]
    self.special_ids = np.array(
      sorted({token['id'] for token in self.special_tokens}), np.int64
    )
    self.token_bytes = _token_bytes(tokenizer, self._spec, self.vocab_size)
    self.digest = hashlib.sha256(
      json.dumps([self._spec, names], sort_keys=True).encode()
    ).hexdigest()
    # One id a byte needs no search for merges, and is 100 times as fast so.
    model = self._spec['model']
    self._is_byte = model['type'] == 'BPE' and model['vocab'] == _byte_vocab()

  def encode(self, text: str) -> list[int]:
    """The ids of `text`, without any special token."""
    if self._is_byte:
      return self._bytes_to_ids(text).tolist()
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def encode_batch(self, texts: Sequence[str]) -> list[Sequence[int]]:
    """`encode` of each text, on all cores."""
    if self._is_byte:
      return [self._bytes_to_ids(text) for text in texts]
    encodings = self._tokenizer.encode_batch_fast(
      texts, add_special_tokens=False
    )
    return [encoding.ids for encoding in encodings]

  def encode_pieces(
    self, texts: Sequence[str], after: str
  ) -> list[Sequence[int]]:
    """`encode` of pieces of a text that is cut where special tokens stand.

    Tokenizers of the SentencePiece kind put a space before a text, and some
    also after each special token; a piece must get no other.

    Args:
      texts: the pieces.
      after: what stands before them: 'start' (nothing), 'special' (a special
        token) or 'text'.
    """
    if after not in self._variants:
      spec = _unprefixed(self._spec, after)
      variant = self._variants['start']
      if spec != self._spec:
        variant = tokenizers.Tokenizer.from_str(json.dumps(spec))
        variant.encode_special_tokens = True
      self._variants[after] = variant
    if self._variants[after] is self._tokenizer:
      return self.encode_batch(texts)
    encodings = self._variants[after].encode_batch_fast(
      texts, add_special_tokens=False
    )
    return [encoding.ids for encoding in encodings]

  def decode(self, ids: Iterable[int], specials: bool = False) -> str:
    """The text of `ids`; bytes that are not UTF-8 become U+FFFD.

    Args:
      ids: token ids.
      specials: whether special tokens are spelled out; else they are left out.
    """
    return self._tokenizer.decode(
      [int(i) for i in ids], skip_special_tokens=not specials
    )

  def token(self, token_id: int) -> str:
    """How the table spells this id, e.g. 'Ġthe'; '' for an unused id."""
    return self._tokenizer.id_to_token(int(token_id)) or ''

  def save(self, directory: str | os.PathLike) -> None:
    """Writes tokenizer.json and tokenizer_config.json, which `load` reads."""
    folder = pathlib.Path(directory)
    try:
      folder.mkdir(parents=True, exist_ok=True)
      for name, content in (
        ('tokenizer_config.json', self.names),
        ('tokenizer.json', self._spec),
      ):
        text = json.dumps(content, ensure_ascii=False, indent=1)
        partial = folder / f'{name}.tmp'
        partial.write_text(text, encoding='utf-8')
        partial.replace(folder / name)
    except OSError as error:
      raise UserError(
        f'{folder}: cannot write the tokenizer ({error.strerror}); free space '
        'there or choose another folder'
      ) from error

  def _bytes_to_ids(self, text: str) -> np.ndarray:
    data = np.frombuffer(text.encode(), np.uint8)
    return data.astype(np.int32) + len(SPECIALS)


def train(texts: Iterable[str], kind: str, vocab_size: int = 0) -> Tokenizer:
  """Trains a tokenizer on a sample; the same texts give the same tokenizer.

  Args:
    texts: what merges are counted on; not read for 'byte'.
    kind: 'bpe' or 'byte'.
    vocab_size: of 'bpe', special tokens included. Few texts may give fewer.
  """
  if kind == 'byte':
    return Tokenizer(_byte_level(_byte_vocab(), split=False), EOT, PAD)
  if kind != 'bpe':
    raise UserError(
      f'data.tokenizer={kind}: unknown kind{nearest(kind, KINDS)}; there are '
      f'{", ".join(KINDS)} and the path of a tokenizer.json'
    )
  smallest = 256 + len(SPECIALS)
  if vocab_size < smallest:
    raise UserError(
      f'data.vocab_size={vocab_size}: set it to {smallest} or more (256 bytes '
      f'and {len(SPECIALS)} special tokens)'
    )
  tokenizer = _byte_level({}, split=True)
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=list(SPECIALS),
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(texts, trainer)
  return Tokenizer(tokenizer, EOT, PAD)


class Sample:
  """Which texts a tokenizer is trained on: whatever order they come in.

  Keeps the texts whose md5 is smallest, until `limit` bytes are reached.
  """

  def __init__(self, limit: int = SAMPLE_BYTES):
    self._limit = limit
    self._size = 0
    self._heap: list[tuple[int, str]] = []  # by falling md5

  def add(self, text: str) -> None:
    for piece in _split(text, 1 << 14):
      data = piece.encode()
      key = -int.from_bytes(hashlib.md5(data).digest(), 'big')
      if self._size >= self._limit and key <= self._heap[0][0]:
        continue
      heapq.heappush(self._heap, (key, piece))
      self._size += len(data)
      while self._size - len(self._heap[0][1].encode()) >= self._limit:
        self._size -= len(heapq.heappop(self._heap)[1].encode())

  def texts(self) -> list[str]:
    return [text for _, text in sorted(self._heap, reverse=True)]


def _split(text: str, size: int) -> Iterable[str]:
  """Pieces of about `size` characters, cut after line ends where there are."""
  start = 0
  while len(text) - start > size:
    end = text.rfind('\n', start + size // 2, start + size) + 1 or start + size
    yield text[start:end]
    start = end
  yield text[start:]


def load(path: str | os.PathLike) -> Tokenizer:
  """Reads a tokenizer.json, or the folder that holds one.

  The special tokens are found by their names: see `EOT_NAMES`, else
  `eos_token` and `pad_token` of the tokenizer_config.json beside it, which
  come first where they are given.

  Raises:
    UserError: no such file, not a tokenizer, or no token that ends documents.
  """
  path = pathlib.Path(path)
  file = path / 'tokenizer.json' if path.is_dir() else path
  if not file.is_file():
    around = [str(p) for p in file.parent.glob('*')]
    raise UserError(
      f'{file}: no such tokenizer{nearest(str(file), around)}; give a '
      f'tokenizer.json or a folder holding one, or {" or ".join(KINDS)}'
    )
  spec = _json(file)
  beside = file.parent / 'tokenizer_config.json'
  names = _json(beside) if beside.is_file() else {}
  added = {token['content'] for token in spec.get('added_tokens') or []}
  eot = _special(names, 'eos_token', EOT_NAMES, added)
  if not eot:
    raise UserError(
      f'{file}: has no token that ends a document ({", ".join(EOT_NAMES)}); '
      'name it as "eos_token" in a tokenizer_config.json beside it'
    )
  pad = _special(names, 'pad_token', PAD_NAMES, added) or eot
  bos = _special(names, 'bos_token', (), added)
  _isolate(spec, {eot, pad, bos})
  try:
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
  except Exception as error:  # the library raises plain Exception
    raise UserError(f'{file}: not a tokenizer.json ({error})') from error
  return Tokenizer(tokenizer, eot, pad, bos)


def _special(
  names: dict[str, Any], key: str, known: Sequence[str], added: set[str]
) -> str:
  """The content of the special token `key`, or '' where there is none."""
  token = names.get(key)
  if isinstance(token, dict):
    token = token.get('content')
  if token in added:
    return token
  return next((name for name in known if name in added), '')


def _json(file: pathlib.Path) -> dict[str, Any]:
  try:
    spec = json.loads(file.read_text(encoding='utf-8'))
  except (ValueError, OSError) as error:
    raise UserError(f'{file}: not a JSON file ({error})') from error
  if not isinstance(spec, dict):
    raise UserError(f'{file}: holds no JSON object')
  return spec


def _isolate(spec: dict[str, Any], names: set[str]) -> None:
  """Changes `spec` so that no text can become a special token.

  `encode_special_tokens` does that for tokens that are marked special. A
  Unigram model holds them among its pieces too, and would find them there.
  """
  for token in spec['added_tokens']:
    token['special'] = token['special'] or token['content'] in names
  special = {t['content'] for t in spec['added_tokens'] if t['special']}
  model = spec.get('model') or {}
  if model.get('type') == 'Unigram':
    model['vocab'] = [
      [piece, -1e9 if piece in special else score]
      for piece, score in model['vocab']
    ]


def _unprefixed(part: Any, after: str) -> Any:
  """The part of a tokenizer.json without the spaces it puts before texts.

  After a special token only those go that are put before a whole text.
  """
  if isinstance(part, list):
    parts = [_unprefixed(p, after) for p in part]
    return [p for p in parts if p is not None]
  if not isinstance(part, dict):
    return part
  always = after == 'text'
  if part.get('type') == 'Prepend' and always:
    return None
  part = part | {
    key: _unprefixed(part[key], after)
    for key in ('normalizer', 'normalizers', 'pre_tokenizer', 'pretokenizers')
    if key in part
  }
  if 'prepend_scheme' in part and (always or part['prepend_scheme'] == 'first'):
    part['prepend_scheme'] = 'never'
  if part.get('add_prefix_space') and always:
    part['add_prefix_space'] = False
  return part


def _byte_vocab() -> dict[str, int]:
  characters = sorted(_BYTE_OF, key=_BYTE_OF.__getitem__)
  return {token: i for i, token in enumerate([*SPECIALS, *characters])}


def _byte_level(vocab: dict[str, int], split: bool) -> tokenizers.Tokenizer:
  """An own tokenizer without merges."""
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.BPE(vocab=vocab, merges=[])
    if vocab
    else tokenizers.models.BPE()
  )
  steps = [
    tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  ]
  if split:
    pattern = tokenizers.Regex(LLAMA3_PATTERN)
    steps.insert(0, tokenizers.pre_tokenizers.Split(pattern, 'isolated'))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(steps)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  tokenizer.add_special_tokens(list(SPECIALS))
  return tokenizer


def _types(part: dict[str, Any] | None) -> set[str]:
  """The types of a decoder and of those inside it."""
  if not part:
    return set()
  inner = part.get('decoders') or []
  return {part['type']}.union(*(_types(p) for p in inner))


def _token_bytes(
  tokenizer: tokenizers.Tokenizer, spec: dict[str, Any], vocab_size: int
) -> np.ndarray:
  """np.int32[V]: the utf-8 bytes of the text that each id stands for."""
  added = {token['id']: token for token in spec['added_tokens']}
  decoders = _types(spec['decoder'])
  fallback = 'ByteFallback' in decoders
  pieces = fallback or 'Metaspace' in decoders
  sizes = np.zeros(vocab_size, np.int32)
  for token, i in tokenizer.get_vocab(True).items():
    if i in added:
      sizes[i] = 0 if added[i]['special'] else len(token.encode())
    elif 'ByteLevel' in decoders:
      sizes[i] = len(token)
    elif fallback and len(token) == 6 and token.startswith('<0x'):
      sizes[i] = 1
    elif pieces:
      sizes[i] = len(token.replace('▁', ' ').encode())
    else:
      sizes[i] = len(tokenizer.decode([i]).encode())
  return sizes
