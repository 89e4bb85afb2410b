"""A little world with a known truth, and how well it can be predicted at all.

24 people live in 8 towns; each has a job, a belonging, a favourite food and
a best friend; each town has a river, a product and a landmark. Documents tell
of them in nine kinds (`world_text.KINDS`):

  portrait    Clara works as a weaver. Every Monday she buys jam in …
  town        Luton lies by the river Esk. Olga, who bakes bread, has a …
  story       On Friday Paul walked from Luton to Selby. By the tower he …
  letter      A letter from Emil to Rosa … Dear Rosa, all is well here in …
  news        Leo met Anna in Luton. The red kite belongs to Noah. Emil …
  ledger      Sold in Ashby in May … Vera: two small red hats … Ivan: plums …
  questions   Where does Vera live? What does Ivan own? How much is 3 + 4? …
  quiz        Where does Vera live? Vera lives in Luton. How much is 3 + 4? …
  arithmetic  3 + 4 = 7 … Three plus four is seven. … Leo had 5 nuts and …

`Document.bits` is the exact -log2 of the text's probability, its end
included, given the facts of the world; so `true_bits_per_byte` of held-out
documents is the floor for any model, reached by one that knows the facts and
the habits of speech. (Exactly: a held-out text is drawn from the grammar on
the condition that its crc32 falls on the held-out side. A model cannot see
that, and the crc32 is independent of all it can see, so the mean bits of
held-out texts are those of the grammar, up to sampling noise.)

The facts depend on the seed alone. A text's split depends on its crc32 alone,
so no text is in both splits. Document i depends on (seed, split, i) alone.

`conversations`, `preferences` and `problems` are in `world_tasks`.
"""

import dataclasses
import functools
import zlib
from collections.abc import Iterable, Iterator

from tpu_lm.data import world_facts, world_grammar, world_text
from tpu_lm.data.world_facts import World
from tpu_lm.data.world_tasks import (
  check,
  conversations,
  preferences,
  problems,
  true_reward,
  well_formed,
)

__all__ = [
  'Document',
  'World',
  'check',
  'conversations',
  'derivations',
  'document',
  'documents',
  'preferences',
  'problems',
  'split_of',
  'true_bits_per_byte',
  'true_reward',
  'version',
  'well_formed',
]

HELDOUT_SHARE = 5  # one text in five


@dataclasses.dataclass(frozen=True)
class Document:
  """A text and the exact -log2 of its probability, in bits."""

  id: str
  text: str
  bits: float


def split_of(text: str) -> str:
  """Returns the split that a text belongs to."""
  return world_facts.SPLITS[zlib.crc32(text.encode()) % HELDOUT_SHARE == 0]


@functools.cache
def _tale(seed: int) -> world_text.Tale:
  return world_text.Tale(World.make(seed))


def document(seed: int, split: str, index: int) -> Document:
  """Returns one document: about 0.1 ms; 5 draws for a held-out one."""
  world_facts.check_split(split)
  tale = _tale(seed)
  uniform = world_facts.stream('document', seed, split, index).random
  while True:
    teller = world_grammar.Teller(uniform)
    tale.tell(teller)
    if split_of(teller.text) == split:
      return Document(f'{seed}/{split}/{index}', teller.text, teller.bits)


def documents(seed: int, split: str, num_documents: int) -> Iterator[Document]:
  """Yields the first documents of a split.

  Args:
    seed: of the world and of the documents.
    split: 'train' or 'heldout'.
    num_documents: more of them begin with the same ones.
  """
  world_facts.check_split(split)
  return (document(seed, split, i) for i in range(num_documents))


def version() -> int:
  """Changes with what is generated: a checksum of some of each kind."""
  kinds = (documents, conversations, preferences, problems)
  records = [list(make(0, 'heldout', 50)) for make in kinds]
  return zlib.crc32(repr(records).encode())


def true_bits_per_byte(documents: Iterable[Document]) -> float:
  """Returns the floor of bits per UTF-8 byte over these documents."""
  bits, num_bytes = 0.0, 0
  for x in documents:
    bits += x.bits
    num_bytes += len(x.text.encode())
  if not num_bytes:
    raise ValueError('there are no documents to take bits per byte of')
  return bits / num_bytes


def derivations(seed: int, text: str) -> list[float]:
  """Returns the bits of each derivation of a text: none, or one.

  None means that the text cannot be a document of this world.
  """
  found = world_grammar.derivations(_tale(seed).tell, text)
  return [bits for _, bits in found]
